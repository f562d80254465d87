"""Data parallel: two real processes over a ring ≡ one process with twice the batch; what one meets, both end by."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from rich.console import Console
from vlm_families import picture

from serve.adapters.formats.manifest import read_tensors
from train.data.batches import Batch
from train.loop.distributed import Alone, share
from train.recipe.recipe import load_recipe
from train.run import run
from train.watch.metrics import rows_of

pytestmark = pytest.mark.long

BIN = Path(sys.executable).parent
TIMEOUT_S = 600


@dataclass(frozen=True)
class Place(Alone):
    """A process's number among some, for what needs no other process."""

    rank: int
    size: int


@contextmanager
def _launched(free_ports: Callable[[int], int], *command: str) -> Iterator[subprocess.Popen[str]]:
    words = [BIN / "mlx.launch", "-n", "2", "--backend", "ring", "-p", str(free_ports(2))]
    # Two processes that each spin as many threads as there are cores would wait for one another.
    words += ["--env", "OPENBLAS_NUM_THREADS=1", "--", *command]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for each in children:
                each.kill()
            process.kill()


@pytest.fixture(scope="module")
def launched(
    free_ports: Callable[[int], int],
) -> Callable[..., AbstractContextManager[subprocess.Popen[str]]]:
    """`with launched(*command)`: in two processes, as a user starts them. Standard input stays open: mlx.launch
    reads it."""
    return partial(_launched, free_ports)


@pytest.fixture(scope="module")
def said_by_two(free_ports: Callable[[int], int], folder: Path) -> Callable[..., str]:
    """said_by_two(*command) → what two processes of a ring printed until both had ended, each told what mlx.launch
    tells it. That one spins all the while on a pipe that takes input, which is as much work again as theirs."""

    def run_both(*command: str) -> str:
        hosts, first = folder / "hosts.json", free_ports(2)
        hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(2)]))
        told = {**os.environ, "MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
        with (folder / "said").open("w+") as said, ExitStack() as stack:
            ranks = [
                stack.enter_context(
                    subprocess.Popen(
                        command, env={**told, "MLX_RANK": str(rank)}, stdout=said, stderr=subprocess.STDOUT
                    )
                )
                for rank in range(2)
            ]
            try:
                for each in ranks:
                    each.wait(TIMEOUT_S)
            finally:
                for each in ranks:
                    each.kill()
            return (folder / "said").read_text()

    return run_both


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file are."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def make_recipe(model_folder: Path, folder: Path) -> Callable[..., Path]:
    """make_recipe(name, **keys) → a recipe over 17 rows: batches of 8, 8 and 1, so one share is empty."""
    rng = np.random.default_rng(0)
    data = folder / "data"
    data.mkdir()
    for split, count in (("train", 17), ("valid", 5)):
        turns = [("q" * int(rng.integers(3, 40)), f"a{i} " * int(rng.integers(1, 12))) for i in range(count)]
        rows = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in turns
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, **keys: object) -> Path:
        recipe = {
            "model": str(model_folder),
            "data": str(data),
            "num_layers": -1,
            "lora_parameters": {"rank": 4, "alpha": 8.0},
            "learning_rate": 1e-3,
            "max_grad_norm": 1.0,
            "iters": 6,
            "steps_per_report": 1,
            "steps_per_eval": 3,
            "val_batches": -1,
            "adapter_path": str(folder / name),
            **keys,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return make


def losses(folder: Path) -> dict[tuple[str, int], float]:
    return {(row["kind"], row["step"]): row["loss"] for row in rows_of(folder)}


def alone(path: Path, **options: object) -> None:
    run(load_recipe(path), console=Console(quiet=True), **options)


def assert_same_run(ours: Path, reference: Path, distinct: int = 5) -> None:
    expected = losses(reference)
    assert losses(ours) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len({round(value, 4) for value in expected.values()}) >= distinct, "the reference moves"
    theirs = read_tensors(reference)
    for name, tensor in read_tensors(ours).items():
        expected_tensor = np.array(theirs[name])
        # By length: where a gradient is nearly zero, Adam makes a step of its rounding.
        length = max(np.linalg.norm(expected_tensor), 1e-6)  # what nothing is learned by stays zero
        away = np.linalg.norm(np.array(tensor) - expected_tensor) / length
        assert away < 2e-3, f"{name} is {away:.2e} of its length away"


GRPO = {
    "objective": "grpo",
    "grpo": {
        "num_generations": 4,
        "max_completion_length": 8,
        "rewards": [{"kind": "regex", "pattern": "[a-m]"}],
    },
    "iters": 3,
}
DRAFT = {
    "objective": "draft",
    "draft": {"num_generations": 2, "max_completion_length": 8, "refresh_every": 4},
    "iters": 3,
}
KINDS = {
    "by length": (4, {}, "4 in each of 2 processes"),
    "packed": (
        2,
        {"sample_packing": True, "max_seq_length": 128, "grad_accumulation_steps": 2},
        "packed tokens",
    ),
    "grpo": (8, GRPO, "iter 3/3"),
    "draft": (4, DRAFT, "acceptance/coupled"),
}
"""Kind → batch size of each process, keys, and what is printed of it."""


@pytest.fixture(scope="module")
def pair_of_runs(make_recipe, folder, said_by_two, model_folder) -> Callable[[str], tuple[Path, Path, str]]:
    """pair_of_runs(kind) → the run of two processes, the one of one, and what the two printed.

    All kinds are trained in one launch, by `lathe train`'s own code: starting two processes costs more than training.
    """
    asks = folder / "asks"
    asks.mkdir()
    for split, count in (("train", 7), ("valid", 3)):
        rows = [{"messages": [{"role": "user", "content": f"{split} {i}?" * (i + 1)}]} for i in range(count)]
        (asks / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(kind: str, processes: int) -> Path:
        batch_size, keys, _ = KINDS[kind]
        data = {"data": str(asks)} if kind in ("grpo", "draft") else {}
        if kind == "draft":
            keys = {**keys, "draft": {**keys["draft"], "teacher_model": str(model_folder)}}
        name = f"{processes} {kind}".replace(" ", "-")
        return make_recipe(name, batch_size=2 * batch_size // processes, **data, **keys)

    script = folder / "train_all.py"
    script.write_text(
        "import sys\nfrom train.recipe.recipe import load_recipe\nfrom train.run import run\n"
        "for path in sys.argv[1:]:\n    run(load_recipe(path))\n    print('END OF RUN', flush=True)\n"
    )
    paths = [str(recipe(kind, 2)) for kind in KINDS]
    said = said_by_two(sys.executable, str(script), *paths)

    def runs(kind: str) -> tuple[Path, Path, str]:
        one = recipe(kind, 1)
        alone(one)
        two = Path(paths[list(KINDS).index(kind)])
        assert (two.with_suffix("") / "summary.json").exists(), said
        return two.with_suffix(""), one.with_suffix(""), said

    return runs


@pytest.mark.large
def test_two_processes_share_rows_with_pictures(make_recipe, folder, launched, vlm_folder):
    shown = folder / "shown"
    shown.mkdir()
    for number in range(5):
        picture(number, 64 + 32 * (number % 2), 64).save(shown / f"{number}.png")
    for split, count in (("train", 7), ("valid", 3)):
        rows = [
            {"prompt": f"{split}? <image>", "completion": f"it is {i}", "images": [f"{i % 5}.png"]}
            if i % 3
            else {"prompt": f"words {i}", "completion": "no picture"}
            for i in range(count)
        ]
        (shown / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model": str(vlm_folder("qwen3_vl")), "data": str(shown), "train_vision": {"projector": "lora"}}
    two, one = (make_recipe(f"{n}-pictures", batch_size=4 // n, **keys) for n in (2, 1))
    with launched(str(BIN / "lathe"), "train", str(two)) as process:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert (two.with_suffix("") / "summary.json").exists(), said
    alone(one)
    assert_same_run(two.with_suffix(""), one.with_suffix(""))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_with_twice_the_batch(kind, pair_of_runs):
    two, one, said = pair_of_runs(kind)
    assert_same_run(two, one, distinct=5 if kind in ("by length", "packed") else 3)
    assert said.count("iter 6/6") == 2, "one process prints"
    assert said.count("iter 3/3") == 2
    assert KINDS[kind][2] in said
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert summaries[0]["num_targets"] == summaries[1]["num_targets"] > 0
    assert summaries[0]["num_tokens"] == summaries[1]["num_tokens"]


def test_a_signal_to_one_process_ends_both_and_one_process_can_go_on(make_recipe, folder, launched):
    path = make_recipe("two", batch_size=4, iters=100_000, val_batches=0)
    with launched(str(BIN / "lathe"), "train", str(path)) as process:
        assert process.stdout is not None
        heard = []
        for line in process.stdout:
            heard.append(line)
            if "iter 2/" in line:
                break
        else:
            pytest.fail("".join(heard))
        writer = json.loads((folder / "two" / "run.json").read_text())["pid"]
        ranks = psutil.Process(process.pid).children(recursive=True)
        (other,) = [each for each in ranks if each.pid != writer]
        other.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert not any(each.is_running() for each in ranks)
    assert "exited with code 143" in said  # mlx.launch ends whoever is left once one process has ended
    ended = json.loads((folder / "two" / "summary.json").read_text())
    assert (ended["status"], ended["signal"]) == ("interrupted", signal.SIGTERM)
    ends = ended["steps"] + 3
    shared = {"batch_size": 8, "iters": ends, "val_batches": 0}
    alone(make_recipe("two", **shared), resume=True)
    alone(make_recipe("one", **shared))
    assert_same_run(folder / "two", folder / "one")


LAWS = """
import sys
import serve
import mlx.core as mx
import numpy as np
from dataclasses import replace
from mlx_lm.models import qwen3
from serve.errors import ConfigError, TrainingError
from serve.model.network import Network
from train.data.batches import Batch
from train.loop.distributed import check_same, join, losses_named, share, sum_named
from train.recipe.orpo import ORPOConfig
from train.objectives.orpo import ORPO
from train.loop.step import Stepper, mean_loss
import mlx.optimizers as optim

ranks = join()
assert ranks.size == 2
mine = ranks.rank

# Host numbers and values arrive whole, from both.
assert ranks.gather_numbers([2.0**53 - 1 + mine, 0.1]) == [[2.0**53 - 1, 0.1], [2.0**53, 0.1]]
assert ranks.gather("x" * mine) == ["", "x"]
assert sum_named(ranks, {"a": 1.0} if mine else {"a": 2.0, "b": 3.0}) == {"a": 3.0, "b": 3.0}

# Trees: sums by path whatever the order they were built in, and rank 0's own bits.
tree = {"b": mx.array([1.0 + mine]), "a": [mx.array([[2, 3]]) * (mine + 1), {}], "h": mx.ones(3, mx.bfloat16)}
summed = ranks.sum_tree(tree if mine else dict(reversed(tree.items())))
assert summed["b"].tolist() == [3.0] and summed["a"][0].tolist() == [[6, 9]] and summed["a"][1] == {}
assert summed["h"].dtype == mx.bfloat16 and summed["h"].tolist() == [2.0] * 3
odd = {"x": mx.array([-0.0, float("nan"), 1.5e-38]) if mine == 0 else mx.zeros(3), "n": mx.array(7 - mine, mx.uint64)}
first = ranks.first_tree(odd)
assert np.array(first["x"]).tobytes() == np.array([-0.0, float("nan"), 1.5e-38], np.float32).tobytes()
assert first["n"].item() == 7 and first["n"].shape == ()

# What differs is named, in both.
check_same(ranks, {"the data": "1", "the base": "2"})
try:
    check_same(ranks, {"the data": str(mine), "the base": "2"})
except ConfigError as error:
    assert "rank 1: the data is 1, rank 0 has 0" in str(error) and "base is" not in str(error), error
else:
    raise AssertionError("different data passed")

# One pair: this process or the other has no row, and both have the same loss, measures and weights after it.
CONFIG = dict(model_type="qwen3", hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
              num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, vocab_size=64, max_position_embeddings=64,
              rope_theta=10000.0, tie_word_embeddings=True)

def stepper(group):
    mx.random.seed(0)
    network = Network(qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG)))
    mx.eval(network.module.parameters())
    return Stepper(network, optim.SGD(learning_rate=0.1), ORPO(ORPOConfig()), ranks=group)

rng = np.random.default_rng(0)
def pairs(count):
    tokens = rng.integers(1, 64, (2 * count, 9)).astype(np.int32)
    is_target = np.zeros(tokens.shape, bool)
    is_target[:, 4:] = True
    return Batch(tokens, is_target, int(is_target.sum()), tokens.size, tuple(range(count)))

batches = [pairs(1), pairs(3)]
ours, reference = stepper(ranks), stepper(None)
for batch in batches:
    found = ours.step([share(batch, ranks)], 0)
    expected = reference.step([batch], 0)
    assert found.num_units == expected.num_units and found.num_places == expected.num_places
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-4)
    assert found.measures.keys() == expected.measures.keys() and found.measures
    for name, value in expected.measures.items():
        np.testing.assert_allclose(found.measures[name], value, rtol=1e-4, atol=1e-6)
found = mean_loss(ours.network, [share(b, ranks) for b in batches], ours.objective, ranks)
expected = mean_loss(ours.network, batches, ours.objective)
np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)

print("laws hold", flush=True)
if mine == 1:
    sys.exit(3)
try:
    with losses_named():
        mx.eval(ranks.sum_tree(mx.ones(3)))
except TrainingError as error:
    assert "another process of this run has ended" in str(error)
    print("loss named", flush=True)
"""


def test_sums_shares_and_losses_of_processes(tmp_path, said_by_two):
    script = tmp_path / "laws.py"
    script.write_text(LAWS)
    said = said_by_two(sys.executable, str(script))
    assert said.count("laws hold") == 2, said
    assert "loss named" in said, said


@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_the_batch_each_row_once(make_batch, size):
    batch = make_batch([9, 5, 7, 3, 8])
    batch = replace(batch, labels=np.arange(5) % 2 == 0)
    shares = [share(batch, Place(rank, size)) for rank in range(size)]
    order = np.concatenate([np.arange(rank, 5, size) for rank in range(size)])
    for name in ("tokens", "is_target", "labels"):
        whole = np.concatenate([getattr(each, name) for each in shares])
        np.testing.assert_array_equal(whole, getattr(batch, name)[order])
    assert {each.row_ids for each in shares} == {batch.row_ids}
    assert share(batch, Alone()) is batch


def test_a_share_of_pairs_keeps_each_pair_together():
    tokens = np.arange(6)[:, None] * np.ones((6, 4), np.int32)
    batch = Batch(tokens.astype(np.int32), tokens > 0, 20, 24, (0, 1, 2))
    assert share(batch, Place(0, 2)).tokens[:, 0].tolist() == [0, 2, 3, 5]
    assert share(batch, Place(1, 2)).tokens[:, 0].tolist() == [1, 4]
    assert share(batch, Place(3, 4)).tokens.shape == (0, 4)
