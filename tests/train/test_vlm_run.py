"""Whole runs on rows with pictures: every objective learns, a run that is resumed goes on bit for bit, and the engine
answers held-out rows with the weights as they are."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from rich.console import Console
from vlm_families import build, picture

from serve.errors import ConfigError
from serve.model.loading import load
from train.adapters.adapt import AdapterSettings, add_lora, train_all, trainable_tensors
from train.adapters.towers import VisionTraining
from train.recipe.recipe import Recipe
from train.run import run

pytestmark = pytest.mark.long
FAMILY = "qwen3_vl"
NAMES = ("lamp", "chair", "table", "door")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four pictures and what they are called, as rows of every kind."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(len(NAMES)):
        picture(number, 64, 64).save(folder / f"{number}.png")
    rows: dict[str, list[dict]] = {"chat": [], "pairs": [], "feedback": [], "prompts": []}
    for number, name in enumerate(NAMES):
        shown = {"prompt": "what is it?", "images": [f"{number}.png"]}
        rows["chat"].append({**shown, "completion": name})
        rows["pairs"].append({**shown, "chosen": name, "rejected": NAMES[number - 1]})
        rows["feedback"].append({**shown, "completion": name, "label": number % 2 == 0})
        rows["prompts"].append({**shown, "answer": name})
    rows["chat"].append({"prompt": "hello", "completion": "hi"})
    for kind, found in rows.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, found)))
    return folder


@pytest.fixture
def train(vlm_folder: Callable[[str], Path], data: Path, tmp_path: Path) -> Callable:
    """train(kind of rows, **keys) → (summary, folder)."""

    def make(kind: str, name: str = "out", resume: bool = False, told: io.StringIO | None = None, **keys):
        recipe = Recipe(
            adapter_path=str(tmp_path / name),
            **{
                "datasets": [{"path": str(data / f"{kind}.jsonl")}],
                "model": str(vlm_folder(FAMILY)),
                "val_batches": 0,
                "batch_size": 4,
                "num_layers": -1,
                "learning_rate": 5e-3,
                "lora_parameters": {"rank": 4, "scale": 2.0},
                "iters": 6,
                "steps_per_report": 1,
                "save_every": 3,
                **keys,
            },
        )
        console = Console(quiet=True) if told is None else Console(file=told, width=160)
        return run(recipe, resume=resume or None, console=console), tmp_path / name

    return make


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


OBJECTIVES = {
    "sft": ("chat", {}),
    "dpo": ("pairs", {}),
    "orpo": ("pairs", {}),
    "kto": ("feedback", {}),
}


@pytest.mark.parametrize(
    "objective",
    [name if name == "dpo" else pytest.param(name, marks=pytest.mark.large) for name in OBJECTIVES],
)
def test_every_objective_learns_from_rows_with_pictures(objective, train):
    kind, keys = OBJECTIVES[objective]
    summary, folder = train(kind, objective=objective, iters=12, **keys)
    assert summary.status == "finished"
    found = losses(folder)
    assert min(found[-3:]) < found[0]


def test_answers_to_pictures_are_rewarded(train):
    rewards = [{"kind": "regex", "pattern": "^[a-m]"}]
    grpo = {"num_generations": 4, "max_completion_length": 3, "rewards": rewards}
    summary, folder = train("prompts", objective="grpo", grpo=grpo, batch_size=8, iters=2, save_every=10)
    assert summary.status == "finished"
    assert len(losses(folder)) == 2


@pytest.mark.parametrize(
    "vision",
    [
        {"tower": "lora", "projector": "full"},
        *(pytest.param(vision, marks=pytest.mark.large) for vision in (False, {"projector": "lora"})),
    ],
)
def test_a_run_on_pictures_goes_on_bit_for_bit(vision, train):
    whole, one = train("chat", "whole", train_vision=vision)
    train("chat", "parts", train_vision=vision, iters=3)
    for file in (one.parent / "parts").glob("summary.json"):
        file.unlink()  # as if it had been killed behind its checkpoint
    again, two = train("chat", "parts", resume=True, train_vision=vision)
    assert again.steps == whole.steps == 6
    tensors = [mx.load(str(folder / "adapters.safetensors")) for folder in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(mx.array_equal(value, tensors[1][name]).item() for name, value in tensors[0].items())
    assert losses(one) == losses(two)


def test_held_out_pictures_are_answered_as_training_goes(train, data):
    told = io.StringIO()
    summary, _ = train(
        "chat",
        told=told,
        batch_size=5,
        iters=40,
        optimizer_config={"adam": {"bias_correction": True}},
        **{"val_batches": 1, "steps_per_eval": 40, "save_every": 40, "metric": {"rows": 5, "max_tokens": 8}},
        samples={"rows": 1},
        **held_out(data),
    )
    assert (summary.exact_match_before, summary.exact_match) == (0.0, 1.0)
    assert "(image) what is it? → lamp" in told.getvalue()


def held_out(data: Path) -> dict:
    """The same rows to learn from and to validate on: does the engine answer as it was taught?"""
    folder = data / "both"
    if not folder.exists():
        folder.mkdir()
        for name in ("train", "valid"):
            (folder / f"{name}.jsonl").write_text((data / "chat.jsonl").read_text())
    return {"datasets": [{"path": str(folder), "media_root": str(data)}]}


@pytest.mark.large
def test_what_trains_is_what_the_recipe_says_and_nothing_else_moves(train):
    _, folder = train("chat", train_vision={"tower": "lora", "projector": "full"}, iters=2)
    tensors = mx.load(str(folder / "adapters.safetensors"))
    towers = {name for name in tensors if name.startswith("vision_tower")}
    projector = {name for name in towers if "merger" in name}
    assert projector
    assert not any(name.endswith(("lora_a", "lora_b")) for name in projector)
    assert towers - projector
    assert all(name.endswith(("lora_a", "lora_b")) for name in towers - projector)
    assert all(name.startswith("language_model") for name in tensors.keys() - towers)


def test_a_packed_tower_takes_an_adapter_and_no_weights(vlm_folder, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(vlm_folder(FAMILY), folder)
    config = json.loads((folder / "config.json").read_text())
    module = build(json.loads(json.dumps(config)))
    module.load_weights(str(folder / "model.safetensors"))
    packs = lambda path, layer: "vision_tower.blocks" in path and isinstance(layer, nn.Linear)  # noqa: E731
    nn.quantize(module, group_size=32, bits=8, class_predicate=packs)
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    packed = {path: {"group_size": 32, "bits": 8} for path, m in module.named_modules() if hasattr(m, "bits")}
    plain = {path: False for path, m in module.named_modules() if hasattr(m, "to_quantized")}
    config["quantization"] = {"group_size": 32, "bits": 8, **plain, **packed}
    (folder / "config.json").write_text(json.dumps(config))
    network = load(str(folder), dequantize=False).network  # as on a GPU
    with pytest.raises(ConfigError, match=r"train_vision: full cannot train vision_tower\.blocks.* packed"):
        train_all(network, vision=VisionTraining(tower="full"))
    adapted = add_lora(network, AdapterSettings(2, 1.0, vision=VisionTraining(tower="lora")))
    assert adapted.num_trainable > 0
    assert any(name.startswith("vision_tower.blocks") for name in trainable_tensors(network))
