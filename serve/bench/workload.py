"""What requests ask: which model, a prompt of what length behind which shared prefix, and how long an answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, cycle, islice
from typing import Any

from serve.bench.dataset import Dataset, Record
from serve.bench.lengths import Lengths
from serve.bench.prompts import PromptMaker, WordCost
from serve.bench.zipf import Zipf


@dataclass(frozen=True)
class Prefixes:
    """Beginnings that prompts share: how many, how long, and how unevenly they are used. They come before a prompt's
    own words, and add to its length."""

    count: int
    num_tokens: int
    exponent: float = 1.0
    """Of Zipf's law; 0: each as often."""


@dataclass(frozen=True)
class Shown:
    """What every request shows before its words."""

    num_images: int = 0
    num_videos: int = 0
    edge: int = 448
    """Of pictures and frames, in pixels."""
    num_frames: int = 16
    """Of a clip."""
    num_distinct: int = 64
    """So many pictures, and clips, that differ are made before anything is measured, and then shown in turn."""


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they are sent; the same seed gives the same ones."""

    models: tuple[str, ...]
    prompt_tokens: Lengths
    max_tokens: Lengths
    model_exponent: float | None = None
    """The k-th model is asked for as Zipf has it; 0: each as likely. None: they take turns."""
    prefixes: Prefixes | None = None
    dataset: Dataset | None = None
    """Its lines take the place of made-up prompts, one after the other, again and again."""
    shown: Shown | None = None
    seed: int = 0


@dataclass(frozen=True)
class Wanted:
    """One request, before it is known how it is sent."""

    model: str
    prompt: str
    max_tokens: int
    history: tuple[dict[str, str], ...] = ()
    shown: tuple[Mapping[str, Any], ...] = ()
    """Parts of its message."""


class WorkloadMaker:
    """An endless supply of a workload's requests.

    cost  of a prompt's words in tokens, for this server
    """

    def __init__(self, workload: Workload, cost: WordCost) -> None:
        self._workload = workload
        self._cost = cost
        self._random = random.Random(workload.seed)
        self._own = PromptMaker(workload.seed)
        self._records = workload.dataset.records if workload.dataset else ()
        self._models = Zipf(len(workload.models), workload.model_exponent or 0.0)
        shared = workload.prefixes
        # Prefixes are words of another seed, so no prompt's own words repeat them.
        prefix_maker = PromptMaker(workload.seed ^ 0x5EED)
        num_words = max(1, round(shared.num_tokens / cost.per_word)) if shared else 0
        self._prefixes = [prefix_maker.prompt(num_words) for _ in range(shared.count)] if shared else []
        self._which_prefix = Zipf(shared.count, shared.exponent) if shared else None
        self._parts = _Parts(workload.shown, workload.seed) if workload.shown else None

    def __iter__(self) -> Iterator[Wanted]:
        for number in count():
            yield self._request(number)

    def _request(self, number: int) -> Wanted:
        work = self._workload
        model = work.models[
            number % len(work.models) if work.model_exponent is None else self._models.draw(self._random)
        ]
        record = self._records[number % len(self._records)] if self._records else Record(None, None, None)
        max_tokens = record.num_output_tokens or work.max_tokens.draw(self._random)
        prompt = record.prompt
        if prompt is None:
            num_tokens = record.num_prompt_tokens or work.prompt_tokens.draw(self._random)
            prompt = self._own.prompt(self._cost.words_for(num_tokens))
        if self._which_prefix is not None:
            prompt = f"{self._prefixes[self._which_prefix.draw(self._random)]} {prompt}"
        history = tuple(dict(each) for each in record.history)
        return Wanted(model, prompt, max_tokens, history, self._parts.next() if self._parts else ())


class _Parts:
    """Pictures and clips, made at once, handed out in turn."""

    def __init__(self, shown: Shown, seed: int) -> None:
        from serve.bench.pictures import PictureMaker

        maker = PictureMaker(seed, shown.edge)
        num_made = shown.num_distinct
        self._images = cycle([maker.part() for _ in range(num_made if shown.num_images else 0)])
        self._clips = cycle(
            [maker.sent_clip(shown.num_frames) for _ in range(num_made if shown.num_videos else 0)]
        )
        self._shown = shown

    def next(self) -> tuple[Mapping[str, Any], ...]:
        """Of one request."""
        return (*islice(self._images, self._shown.num_images), *islice(self._clips, self._shown.num_videos))
