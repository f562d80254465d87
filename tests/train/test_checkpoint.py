"""A checkpoint is whole or not there, and continuing from it is as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap

import mlx.core as mx
import numpy as np
import pytest

from serve import device
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_config, read_tensors, write_adapter
from serve.errors import AdapterError, ConfigError, NotFoundError, TrainingError
from train.adapters.adapt import (
    AdapterSettings,
    add_lora,
    embedding_names,
    set_tensors,
    train_all,
    trainable_tensors,
)
from train.loop import checkpoint
from train.loop.identity import check
from train.loop.optim import OPTIMIZERS, build_optimizer, build_schedule
from train.loop.step import Stepper, StepSettings
from train.loop.trainer import LoopSettings, Trainer, TrainState
from train.objectives.sft import SFT

CONFIG = AdapterConfig("lora", -1, 4, 2.0, 0.1)


class Saver:
    """Saves when told to, as a run does."""

    def __init__(self, folder, network, optimizer) -> None:
        self.folder, self.network, self.optimizer = folder, network, optimizer

    def on_report(self, report): ...

    def on_eval(self, step, loss, is_best, seconds): ...

    def on_save(self, state):
        checkpoint.save(
            self.folder, trainable_tensors(self.network), self.optimizer, CONFIG, state, {"seed": 1}, 0
        )


def train(folder, tiny_network, make_batch, *, optimizer_name, num_iterations, resume=None, kind="lora"):
    network = tiny_network()
    if kind == "lora":
        mx.random.seed(5)
        add_lora(network, AdapterSettings(rank=4, scale=2.0, dropout=0.1))
    else:
        train_all(network)
    schedule = build_schedule({"name": "cosine_decay", "warmup": 3}, learning_rate=1e-2, num_steps=8)
    optimizer = build_optimizer(
        optimizer_name, {}, schedule, learning_rate=1e-2, embedding_names=embedding_names(network)
    )
    stepper = Stepper(network, optimizer, SFT(), StepSettings(max_grad_norm=1.0, seed=1))
    state = TrainState()
    if resume:
        saved = checkpoint.load(resume)
        set_tensors(network, saved.tensors, str(resume))
        checkpoint.restore_optimizer(optimizer, saved.optimizer)
        state = saved.state
    settings = LoopSettings(num_iterations=num_iterations, accumulation=2, iterations_per_save=6)
    batches = [make_batch([9, 12 + i], seed=i) for i in range(num_iterations)]
    Trainer(stepper, settings, batches.__getitem__, Saver(folder, network, optimizer), state=state).fit()
    return network, optimizer, state


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    tmp_path, tiny_network, make_batch, optimizer_name, kind
):
    if kind == "full" and device.backend() == "cuda":
        pytest.skip("MLX's CUDA backend adds up an embedding's gradient in no fixed order")

    def run(name, **arguments):
        return train(
            tmp_path / name, tiny_network, make_batch, optimizer_name=optimizer_name, kind=kind, **arguments
        )

    straight, optimizer, state = run("straight", num_iterations=12)
    half = checkpoint.find(tmp_path / "straight" / checkpoint.FOLDER / "step-000003")
    mx.random.seed(99)
    continued, optimizer_2, state_2 = run("continued", num_iterations=12, resume=half)
    assert state_2.step == state.step == 6
    for name, tensor in trainable_tensors(straight).items():
        assert np.array_equal(np.array(tensor), np.array(trainable_tensors(continued)[name])), name
    saved, saved_2 = checkpoint.flat_state(optimizer), checkpoint.flat_state(optimizer_2)
    assert saved.keys() == saved_2.keys()
    assert all(np.array_equal(np.array(saved[name]), np.array(saved_2[name])) for name in saved)
    assert dataclasses.replace(state, seconds=0) == dataclasses.replace(state_2, seconds=0)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, model_folder):
    """A real refusal by the system: no file of this process may grow beyond a limit."""
    script = f"""
        import serve, resource, signal, mlx.core as mx, mlx.optimizers as optim
        from pathlib import Path
        from serve.adapters.formats.config import AdapterConfig
        from serve.errors import StorageError
        from train.loop import checkpoint
        from train.loop.trainer import TrainState
        folder, tensors = Path({str(tmp_path)!r}), {{"w.lora_a": mx.ones((64, 64))}}
        optimizer = optim.Adam(1e-3)
        optimizer.init(tensors)
        def save(step):
            checkpoint.save(folder, tensors, optimizer, AdapterConfig("lora", -1), TrainState(step=step), {{}}, 0)
        save(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for limit in (100, 10_000, 20_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                save(2)
            except StorageError as error:
                assert "could not be saved" in str(error)
                print("refused at", limit)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Tensors are refused by the first two limits, the optimizer's twice as large file by the last.
    assert done.stdout.splitlines() == ["refused at 100", "refused at 10000", "refused at 20000"]
    assert [p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-000001"]
    assert checkpoint.load(checkpoint.find(tmp_path)).state.step == 1


@pytest.mark.parametrize("file", ["adapters.safetensors", "optimizer.safetensors"])
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path, tiny_network, make_batch, file):
    train(tmp_path, tiny_network, make_batch, optimizer_name="adam", num_iterations=2)
    path = checkpoint.find(tmp_path) / file
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterError, match=rf"{file}: truncated"):
        checkpoint.load(path.parent)


def test_old_checkpoints_go_and_the_best_stays(tmp_path, tiny_network, make_batch):
    network = tiny_network()
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    optimizer = Stepper(network, OPTIMIZERS["adam"](1e-3), SFT()).optimizer
    saver = Saver(tmp_path, network, optimizer)
    for step in range(1, 7):
        saver.on_save(TrainState(step=step))
    checkpoint.prune(tmp_path, 2, best_step=3)
    assert [checkpoint.step_of(p) for p in checkpoint.existing(tmp_path)] == [3, 5, 6]
    assert checkpoint.find(tmp_path).name == "step-000006"


def test_a_checkpoint_of_another_run_or_optimizer_is_refused(tmp_path, tiny_network, make_batch):
    network, _, _ = train(tmp_path, tiny_network, make_batch, optimizer_name="adam", num_iterations=2)
    folder = checkpoint.find(tmp_path)
    saved = checkpoint.load(folder)
    check(saved, {"seed": 1})
    with pytest.raises(ConfigError, match=r"seed: the checkpoint has 1, this run 2"):
        check(saved, {"seed": 2})
    other = OPTIMIZERS["sgd"](1e-3, momentum=0.9)
    other.init(network.module.trainable_parameters())
    with pytest.raises(TrainingError, match="another optimizer"):
        checkpoint.restore_optimizer(other, saved.optimizer)
    with pytest.raises(NotFoundError, match="no checkpoint"):
        checkpoint.find(tmp_path / "nowhere")


def test_a_checkpoint_holds_an_adapter_as_any_other(tmp_path, tiny_network, make_batch):
    network, _, _ = train(tmp_path, tiny_network, make_batch, optimizer_name="adam", num_iterations=2)
    folder = checkpoint.find(tmp_path)
    tensors = read_tensors(folder)
    assert tensors.keys() == trainable_tensors(network).keys()
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert raw["lora_parameters"] == {"rank": 4, "scale": 2.0, "dropout": 0.1}


def test_half_of_a_publication_is_noticed_and_the_config_comes_first(tmp_path):
    """Between the two renames a reader finds the new config beside the old tensors."""
    lineage = Lineage("m", "", "", "", "", "", "0")
    for name, value in (("old", 1.0), ("new", 2.0)):
        config = dataclasses.replace(CONFIG, lineage=lineage)
        write_adapter(tmp_path / name, {"w.lora_a": mx.full((2, 2), value)}, config)
    shutil.copy(tmp_path / "new" / "adapter_config.json", tmp_path / "old")
    with pytest.raises(AdapterError, match="a save was interrupted"):
        read_tensors(tmp_path / "old", read_config(tmp_path / "old"))
    script = f"""
        import os, signal, sys, serve, mlx.core as mx
        from pathlib import Path
        from serve.adapters.formats.config import AdapterConfig
        from serve.adapters.formats.manifest import write_adapter
        renames = []
        def die(event, arguments):
            if event == "os.rename":
                renames.append(arguments)
                if len(renames) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die)
        write_adapter(Path({str(tmp_path / "cut")!r}), {{"w.lora_a": mx.ones((2, 2))}}, AdapterConfig("lora", -1))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert (tmp_path / "cut" / "adapter_config.json").exists()
    assert not (tmp_path / "cut" / "adapters.safetensors").exists()


def test_what_a_kill_leaves_is_cleared_and_a_whole_checkpoint_takes_its_place(tmp_path):
    root = tmp_path / checkpoint.FOLDER
    for name in (
        ".old-step-000003",
        ".new-step-000003",
        ".new-step-000004",
        ".old-step-000001",
        "step-000002",
    ):
        (root / name).mkdir(parents=True)
        (root / name / "state.json").write_text(name)
    (tmp_path / ".new-summary.json").write_text("half")
    (tmp_path / ".old-checkpoints").mkdir()
    (tmp_path / "notes.txt").write_text("a person's own")
    checkpoint.tidy(tmp_path)
    assert {path.name for path in root.iterdir()} == {"step-000002", "step-000003"}
    assert (root / "step-000003" / "state.json").read_text() == ".new-step-000003"
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.FOLDER, "notes.txt"}
