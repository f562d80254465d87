"""The bare batched loop as one of those that are compared: it takes rounds of requests as a server does.

Its process does nothing between two rounds but wait for a line, so there is nothing to pause.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.bench.client import Answer
from serve.bench.lines import LineProcess
from serve.bench.load import Round

MODEL = "bare loop"


class BareLoop:
    """A context manager: inside it the loop waits for work.

    log  where what it prints besides answers goes
    """

    def __init__(self, model: Path, log: Path) -> None:
        self._process = LineProcess("the bare loop", ["serve.bench.bare_child", str(model)], log)

    def __enter__(self) -> BareLoop:
        self._process.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.__exit__(*error)

    @property
    def pid(self) -> int:
        return self._process.pid

    def round(self, prompts: Sequence[str], max_tokens: int, concurrency: int) -> Round:
        """All `prompts`, `concurrency` at a time, each batch whole before the next begins. Raises StoppedError."""
        answers: list[Answer] = []
        wall_s = 0.0
        for first in range(0, len(prompts), concurrency):
            start_s = time.perf_counter()
            found = self._process.ask(
                {"prompts": prompts[first : first + concurrency], "max_tokens": max_tokens}
            )
            wall_s += found["wall_s"]
            answers += _answers(found, start_s)
        return Round(concurrency, wall_s, tuple(answers))


def _answers(found: Mapping[str, Any], start_s: float) -> list[Answer]:
    """One batch's. Every row has its tokens at the same times."""
    after_s: list[float] = found["arrivals_s"]
    return [
        Answer(
            model=MODEL,
            first_s=after_s[0],
            last_s=after_s[-1],
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=len(after_s),
            counted_by="usage",
            text=text,
            finish="length",
            arrivals_s=tuple(start_s + each for each in after_s),
            start_s=start_s,
        )
        for text, num_prompt_tokens in zip(found["texts"], found["num_prompt_tokens"], strict=True)
    ]
