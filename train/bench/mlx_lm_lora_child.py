"""mlx-lm-lora's own supervised training, with the time and memory of each step. A script for a process of its own.

    python mlx_lm_lora_child.py RECIPE.yaml OUT.json

Its loop as it comes, told what `recipe` says in its own names. It sets a wired limit without asking whether there is
Metal, so elsewhere that call does nothing; and it draws each batch anew, so a run is no pass over the rows: what is
counted is what it drew. Nothing of Lathe is imported here. Rows are tokenized before the first step, as Lathe does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import yaml
from mlx_lm_lora.train import CONFIG_DEFAULTS, build_lora_config
from mlx_lm_lora.trainer import sft_trainer
from mlx_lm_lora.trainer.datasets import CacheDataset, load_dataset
from mlx_lm_lora.utils import from_pretrained

ITS_NAMES = {"fine_tune_type": "train_type"}


class Log(sft_trainer.TrainingCallback):
    """Takes down each report and each batch; with `steps_per_report: 1` both are each step's."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.batches: list[dict[str, int]] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.steps.append({"time": time.time(), "loss": train_info["train_loss"]})

    def batches_of(self, **asked: Any) -> Iterator[tuple[mx.array, mx.array]]:
        """Its own batches, counted."""
        for batch, spans in sft_trainer.iterate_batches(**asked):
            self.batches.append({"data_tokens": int(np.array(spans)[:, 1].sum()), "places": batch.size})
            yield batch, spans


def _no_metal(device: Any = None) -> dict[str, str | int]:
    return {"max_recommended_working_set_size": 0}


def main(recipe: str, out: str) -> None:
    """Train as `recipe` says; write {"steps": [{time, loss, data_tokens, places}], "peak_memory_bytes"} to `out`."""
    told = yaml.safe_load(Path(recipe).read_text())
    renamed = {ITS_NAMES.get(name, name): value for name, value in told.items()}
    args = SimpleNamespace(**{**CONFIG_DEFAULTS, **renamed})
    if not mx.metal.is_available():
        mx.device_info = _no_metal  # type: ignore[assignment]
        mx.set_wired_limit = lambda limit: 0
    np.random.seed(args.seed)
    model, tokenizer, adapter_file = from_pretrained(
        model=args.model, new_adapter_path=args.adapter_path, lora_config=build_lora_config(args)
    )
    rows, _, _ = load_dataset(args, tokenizer)
    train_set = CacheDataset(rows)
    for index in range(len(train_set)):
        train_set[index]  # it tokenizes a row when that is first asked for
    log = Log()
    sft_trainer.train_sft(
        model=model,
        optimizer=optimizer_of(args),
        train_dataset=train_set,
        args=sft_trainer.SFTTrainingArgs(
            loss_type=args.sft_loss_type,
            batch_size=args.batch_size,
            iters=args.iters,
            val_batches=args.val_batches,
            steps_per_report=args.steps_per_report,
            steps_per_eval=args.steps_per_eval,
            steps_per_save=args.save_every,
            adapter_file=adapter_file,
            max_seq_length=args.max_seq_length,
            grad_checkpoint=args.grad_checkpoint,
        ),
        iterate_batches=log.batches_of,
        training_callback=log,
    )
    steps = [step | counts for step, counts in zip(log.steps, log.batches, strict=True)]
    Path(out).write_text(json.dumps({"steps": steps, "peak_memory_bytes": mx.get_peak_memory()}))


def optimizer_of(args: SimpleNamespace) -> Any:
    """As its `train_model` makes it."""
    kinds = {"adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon}
    config = args.optimizer_config.get(args.optimizer, {})
    return kinds[args.optimizer](learning_rate=args.learning_rate, **config)


if __name__ == "__main__":
    main(*sys.argv[1:])
