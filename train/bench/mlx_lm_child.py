"""mlx_lm.lora's own training, with the time and memory of each step. A script for a process of its own.

    python mlx_lm_child.py RECIPE.yaml OUT.json as_is|sorted

`as_is` is mlx_lm.lora as it comes. `sorted` is the same loop with the lengths it sorts by made right: mlx-lm
0.32's CacheDataset counts a row's keys in their place. Nothing of Lathe is imported here, so the process weighs
what `mlx_lm.lora` weighs. Rows are tokenized before the first step in both, as Lathe does.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, load_dataset, train_model
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import iterate_batches
from mlx_lm.utils import load


class StepLog(TrainingCallback):
    """Takes down each report; with `steps_per_report: 1` that is each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.steps.append({"time": time.time(), "loss": train_info["train_loss"]})


class Tokenized:
    """A data set of mlx-lm's whose rows were processed ahead; `len(rows[i])` is what the loop sorts by."""

    def __init__(self, rows: list[Any], processed: list[tuple[list[int], int]]) -> None:
        self.rows = rows
        self._processed = processed

    def __getitem__(self, index: int) -> Any:
        return Numbered(index, self.rows[index])

    def __len__(self) -> int:
        return len(self.rows)

    def process(self, row: Numbered) -> tuple[list[int], int]:
        """(token ids, offset of the first supervised one)."""
        return self._processed[row.index]


class Numbered:
    """A row that knows its place and is as long as what it holds."""

    def __init__(self, index: int, held: Any) -> None:
        self.index = index
        self._length = len(held)

    def __len__(self) -> int:
        return self._length


def main(recipe: str, out: str, loop: str) -> None:
    """Train as `recipe` says; write {"steps": [{time, loss, data_tokens, places}], "peak_memory_bytes"} to `out`."""
    args = SimpleNamespace(**{**CONFIG_DEFAULTS, **yaml.safe_load(Path(recipe).read_text())})
    model, tokenizer = load(args.model)
    rows, _, _ = load_dataset(args, tokenizer)
    processed = [rows.process(rows[i]) for i in range(len(rows))]
    held = [tokens for tokens, _ in processed] if loop == "sorted" else [rows[i] for i in range(len(rows))]
    train_set = Tokenized(held, processed)
    log = StepLog()
    np.random.seed(args.seed)
    train_model(args, model, train_set, [], log)
    peak = mx.get_peak_memory()
    for step, counts in zip(log.steps, batch_counts(train_set, args), strict=True):
        step.update(counts)
    Path(out).write_text(json.dumps({"steps": log.steps, "peak_memory_bytes": peak}))


def batch_counts(train_set: Tokenized, args: SimpleNamespace) -> Iterator[dict[str, int]]:
    """Tokens and places of each batch, made again as the loop made them: its own counts are of targets."""
    np.random.seed(args.seed)
    batches = iterate_batches(CacheDataset(train_set), args.batch_size, args.max_seq_length, loop=True)
    for batch, spans in itertools.islice(batches, args.iters):
        yield {"data_tokens": int(np.array(spans)[:, 1].sum()), "places": batch.size}


if __name__ == "__main__":
    main(*sys.argv[1:])
