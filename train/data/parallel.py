"""Examples -> outcomes of tokenizing, over several processes where that is faster than one. Order is kept.

A worker is a fresh process (spawn) that loads the tokenizer once. What is tokenized does not depend on where.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from serve.errors import DataError
from serve.model.loading import load_tokenizer, resolve
from serve.model.template import ChatTemplate
from serve.model.template_rules import make_template
from train.data.example import Example
from train.data.media_reader import MediaReader
from train.data.rules import TokenRules
from train.data.tokens import Outcome, tokenize_row
from train.recipe.recipe import Recipe
from train.recipe.vision import ImageConfig

CHUNK_ROWS = 64
AHEAD_ROWS = 16
"""Rows whose pictures are decoded together, on threads."""
PROBE_ROWS = 256
"""Rows that are tokenized here first, to see how long the rest would take."""
WORKER_START_S = 8.0
"""What a worker costs before its first row: imports and a tokenizer."""

Told = Callable[[int], None]
"""Told how many rows are done."""


def outcomes_of(
    examples: Sequence[Example],
    recipe: Recipe,
    template: ChatTemplate,
    rules: TokenRules,
    told: Told,
    reader: MediaReader | None = None,
) -> tuple[list[Outcome], int]:
    """(an outcome for each example, the processes that made them). `template` must be of
    `recipe.prompting_model`, by `rules`.

    DataError if a worker dies, which is mostly for lack of memory.
    """
    done: list[Outcome] = []
    asked = recipe.dataset_processes
    probed = PROBE_ROWS if asked is None else 0
    here = len(examples) if asked == 1 or len(examples) <= CHUNK_ROWS else min(probed, len(examples))
    start_s = time.perf_counter()
    _here(examples[:here], template, rules, done, told, reader)
    rest = examples[here:]
    if not rest:
        return done, 1
    num_processes = asked or num_cores()
    if asked is None and not _pays(time.perf_counter() - start_s, here, len(rest), num_processes):
        _here(rest, template, rules, done, told, reader)
        return done, 1
    for outcomes in _spread(rest, recipe, rules, num_processes):
        done += outcomes if reader is None else [outcome.bound_to(reader) for outcome in outcomes]
        told(len(done))
    return done, num_processes


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pays(seconds: float, num_done: int, num_left: int, num_processes: int) -> bool:
    alone_s = seconds / max(num_done, 1) * num_left
    return WORKER_START_S + alone_s / num_processes < alone_s


def _here(
    examples: Sequence[Example],
    template: ChatTemplate,
    rules: TokenRules,
    done: list[Outcome],
    told: Told,
    reader: MediaReader | None,
) -> None:
    for number, example in enumerate(examples, 1):
        if reader is not None and number % AHEAD_ROWS == 1:
            reader.read_ahead(ref for one in examples[number - 1 :][:AHEAD_ROWS] for ref in one.media)
        done.append(tokenize_row(example, template, rules, reader))
        if number % CHUNK_ROWS == 0 or number == len(examples):
            told(len(done))


def _spread(
    examples: Sequence[Example], recipe: Recipe, rules: TokenRules, num_processes: int
) -> Iterator[list[Outcome]]:
    chunks = [examples[begin : begin + CHUNK_ROWS] for begin in range(0, len(examples), CHUNK_ROWS)]
    arguments = (str(resolve(recipe.prompting_model)), recipe.trust_remote_code, rules, recipe.image)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_processes, len(chunks)), context, _start, arguments)
    try:
        yield from pool.map(_tokenize, chunks)
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that tokenized ended before its work did ({error}); write dataset_processes: 1 to see why, "
            f"or if memory was short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# In a worker: one process, one tokenizer, for as long as the pool lives.

_worker: dict[str, Any] = {}


def _start(model: str, trust_remote_code: bool, rules: TokenRules, image: ImageConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends its workers
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    reader = MediaReader.of_model(Path(model), image, num_threads=1)
    _worker.update(template=make_template(tokenizer, rules.template), rules=rules, reader=reader)


def _tokenize(examples: Sequence[Example]) -> list[Outcome]:
    template, rules, reader = (_worker[name] for name in ("template", "rules", "reader"))
    return [tokenize_row(example, template, rules, reader) for example in examples]
