"""mlx-vlm's own supervised training of a vision-language model, with the time and memory of each step; and what a
loss that sees no later token says of the same rows. A script for a process of its own.

    python mlx_vlm_child.py train RECIPE.yaml OUT.json as_is|prepared
    python mlx_vlm_child.py reference RECIPE.yaml OUT.json [ADAPTER]

`as_is` is mlx_vlm's Trainer as it comes: rows are decoded and processed as their batches come. `prepared` is the same
loop with all rows processed before its first step. `reference` trains nothing: each row alone, its embeddings with
its picture merged in handed to the layers without any mask, so that theirs, the causal one, holds. Nothing of Lathe
is imported here, so the process weighs what mlx-vlm's training weighs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import yaml
from mlx.utils import tree_flatten
from mlx_vlm import load
from mlx_vlm.trainer import Trainer, get_peft_model
from mlx_vlm.trainer.common.callbacks import TrainingCallback
from mlx_vlm.trainer.vlm.config import VLMTrainingArgs
from mlx_vlm.trainer.vlm.sft.dataset import VisionDataset

NOT_MEDIA = ("input_ids", "attention_mask", "completion_mask", "pixel_values")


class Log(TrainingCallback):
    """Takes down each report; with a report a step that is each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.steps.append({"time": time.time(), "loss": train_info["train_loss"]})

    def counted(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, with their tokens, places and rows taken down."""
        for batch in batches:
            mask = np.array(batch["attention_mask"]).astype(bool)
            rows = [
                tuple(ids[own].tolist()) for ids, own in zip(np.array(batch["input_ids"]), mask, strict=True)
            ]
            self.batches.append({"data_tokens": int(mask.sum()), "places": mask.size, "rows": rows})
            yield batch


class Processed:
    """Rows that were processed ahead, as its loop takes prepared ones."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)


def train(recipe: str, out: str, how: str) -> None:
    """Write {"steps": [{time, loss, data_tokens, places, rows}], "peak_memory_bytes"} to `out`.

    `rows` are the numbers of the batch's rows in the file.
    """
    told, model, processor = opened(recipe)
    lora = told["lora_parameters"]
    mx.random.seed(told["seed"])
    model = get_peft_model(
        model, None, rank=lora["rank"], alpha=lora["rank"] * lora["scale"], dropout=0.0, verbose=False
    )
    args = VLMTrainingArgs(
        batch_size=told["batch_size"],
        iters=told["iters"],
        steps_per_report=1,
        steps_per_eval=None,
        steps_per_save=10**6,
        adapter_file=str(Path(told["adapter_path"]) / "adapters.safetensors"),
        max_seq_length=told["max_seq_length"],
        train_on_completions=True,
    )
    rows: Any = conversations(told)
    if how == "prepared":
        rows = Processed(processed(rows, model, processor))
    log = Log()
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        processing_class=processor,
        optimizer=optim.Adam(told["learning_rate"]),
        prepared=how == "prepared",
        training_callback=log,
        seed=told["seed"],
    )
    its_own = trainer.task.batches
    trainer.task = dataclasses.replace(
        trainer.task, batches=lambda *given, **named: log.counted(iter(its_own(*given, **named)))
    )
    trainer.train()
    peak = mx.get_peak_memory()
    known = {
        tuple(np.array(row["input_ids"]).tolist()): number
        for number, row in enumerate(processed(conversations(told), model, processor))
    }
    for batch in log.batches:
        batch["rows"] = [known[ids] for ids in batch["rows"]]
    steps = [step | counts for step, counts in zip(log.steps, log.batches, strict=True)]
    Path(out).write_text(json.dumps({"steps": steps, "peak_memory_bytes": peak}))


def reference(recipe: str, out: str, adapter: str | None = None) -> None:
    """Write {"rows": [[sum of losses in nats, targets, tokens]]} to `out`, in the file's order."""
    told, model, processor = opened(recipe)
    if adapter is not None:
        merge(model, Path(adapter))
    rows = [row_loss(model, row) for row in processed(conversations(told), model, processor)]
    Path(out).write_text(json.dumps({"rows": rows}))


def row_loss(model: nn.Module, row: dict[str, Any]) -> tuple[float, int, int]:
    """(sum of the losses of one row's targets, their number, tokens of the row)."""
    ids = row["input_ids"][None]
    media = {name: value for name, value in row.items() if name not in NOT_MEDIA}
    found = model.get_input_embeddings(ids, row["pixel_values"], mask=mx.ones_like(ids), **media)
    extras = {
        name: value
        for name, value in found.to_dict().items()
        if value is not None and name not in ("inputs_embeds", "attention_mask_4d")
    }
    said = model.language_model(ids, inputs_embeds=found.inputs_embeds, mask=None, **extras).logits
    targets = ids[0, 1:]
    losses = nn.losses.cross_entropy(said[0, :-1].astype(mx.float32), targets, reduction="none")
    counts = row["completion_mask"][1:].astype(mx.float32)
    return float((losses * counts).sum()), int(counts.sum()), ids.shape[1]


def merge(model: nn.Module, adapter: Path) -> None:
    """Add an adapter's updates to the weights; both loops name its tensors alike."""
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    tensors: Any = mx.load(str(adapter / "adapters.safetensors"))
    weights = dict(tree_flatten(model.parameters()))
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        path = name.removesuffix(".lora_a")
        weight = f"{path}.weight"
        delta = scale * (tensors[name] @ tensors[f"{path}.lora_b"]).T
        model.load_weights([(weight, weights[weight] + delta)], strict=False)


def opened(recipe: str) -> tuple[dict[str, Any], nn.Module, Any]:
    """(what the recipe says, the model, its processor)."""
    told = yaml.safe_load(Path(recipe).read_text())
    model, processor = load(told["model"])
    return told, model, processor


def conversations(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's rows in its form: words beside the pictures of all turns."""
    file = Path(told["datasets"][0]["path"])
    found = []
    for line in file.read_text().splitlines():
        messages, images = [], []
        for message in json.loads(line)["messages"]:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            images += [str(file.parent / part["image"]) for part in parts if part["type"] == "image"]
            words = "".join(part["text"] for part in parts if part["type"] == "text")
            messages.append({"role": message["role"], "content": words})
        found.append({"messages": messages, "images": images})
    return found


def processed(rows: list[dict[str, Any]], model: nn.Module, processor: Any) -> list[dict[str, Any]]:
    """All rows through its own processing."""
    settings = {"train_on_completions": True}
    data = VisionDataset(rows, model.config, processor, config=settings)
    return [data[index] for index in range(len(data))]


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(*sys.argv[2:])
    else:
        reference(*sys.argv[2:])
