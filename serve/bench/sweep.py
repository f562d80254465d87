"""`lathe bench serve`: any OpenAI-compatible server at several numbers of clients, or at several rates of requests.

Prompts are calibrated to a length in tokens, every model is warmed up, then each level is run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from serve.bench.arrivals import offsets
from serve.bench.client import Answer, Ask, Endpoint
from serve.bench.goodput import Objective
from serve.bench.load import NO_LIMIT, Round, TimeLimit, drive, drive_open
from serve.bench.prompts import calibrate
from serve.bench.summary import Summary, summarize
from serve.bench.workload import Wanted, Workload, WorkloadMaker
from serve.errors import ConfigError

GREETING = "hello there, this is a warm up"
MOST_WARMED_UP = 8
"""Models that are asked once before anything is measured; of more, the first ones."""
DRAIN_S = 60.0
"""How long streams that are under way at the time limit may take to end."""
OPEN_LOOP_S = 10
"""An open loop has as many requests as come in so long, where nothing else is said."""
BURST_REQUESTS = 64


@dataclass(frozen=True)
class Sweep:
    """What to measure."""

    url: str
    workload: Workload
    concurrency: tuple[int, ...] = (1, 4, 16)
    """Closed loops of so many clients; where requests come at a rate, the most that may be under way, or ()."""
    request_rates: tuple[float, ...] = ()
    """Open loops of so many requests a second; inf: all at once. (): closed loops."""
    burstiness: float = 1.0
    """Of an open loop: 1 is Poisson, inf a request every 1/rate seconds."""
    num_requests: int | None = None
    """Requests at each level; None: 4 for each client and at least 8, as many as a time limit allows, or what comes
    in 10 seconds of an open loop (64 of a burst)."""
    time_limit_s: float | None = None
    """Of each level: later no request is sent, and those under way have a minute to end."""
    endpoint: Endpoint = "chat"
    tokenizer: Path | None = None
    """A folder whose tokenizer sizes the prompts; None: the server's own usage does."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective | None = None
    """What counts as good for goodput."""
    api_key: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The settings, without the key."""
        shown = asdict(self)
        del shown["api_key"]
        work = shown["workload"]
        work["prompt_tokens"], work["max_tokens"] = (
            str(each) for each in (self.workload.prompt_tokens, self.workload.max_tokens)
        )
        work["dataset"] = str(self.workload.dataset.path) if self.workload.dataset else None
        shown["tokenizer"] = str(self.tokenizer) if self.tokenizer else None
        shown["objective"] = str(self.objective) if self.objective else None
        return {
            **shown,
            "request_rates": [_finite(rate) for rate in self.request_rates],
            "burstiness": _finite(self.burstiness),
        }


def _finite(number: float) -> float | str:
    """JSON knows no infinity."""
    return number if math.isfinite(number) else "inf"


class SweepRunner:
    """Holds what is measured once for a server: the cost of a word, and the requests not yet sent."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._random = random.Random(sweep.workload.seed)
        self._wanted: Iterator[Wanted] | None = None

    def warm_up(self) -> None:
        """One request to each model; the server must answer all of them. Also sizes the prompts.

        Raises ConfigError with the server's own words.
        """
        for model in self.sweep.workload.models[:MOST_WARMED_UP]:
            self._one(model, GREETING, max_tokens=2)
        self._wanted = iter(WorkloadMaker(self.sweep.workload, calibrate(self._tokens_of)))

    def level(self, concurrency: int, count: int | None, limit: TimeLimit = NO_LIMIT) -> Round:
        """A closed loop: `count` requests at `concurrency` clients; None: as many as the limit allows."""
        asks = self._asks() if count is None else islice(self._asks(), count)
        return drive(self.sweep.url, asks, concurrency, self.sweep.api_key, limit)

    def open_level(
        self, request_rate: float, count: int, max_concurrency: int | None, limit: TimeLimit = NO_LIMIT
    ) -> Round:
        """An open loop: `count` requests, `request_rate` a second."""
        at_s = offsets(count, request_rate, self.sweep.burstiness, self._random)
        asks = list(islice(self._asks(), count))
        return drive_open(
            self.sweep.url,
            asks,
            at_s,
            request_rate,
            self.sweep.api_key,
            max_concurrency=max_concurrency,
            limit=limit,
        )

    def _asks(self) -> Iterator[Ask]:
        assert self._wanted is not None, "warm_up() comes first"
        sweep = self.sweep
        for each in self._wanted:
            yield Ask(
                each.model,
                each.prompt,
                each.max_tokens,
                sweep.endpoint,
                sweep.extra,
                history=each.history,
                shown=each.shown,
            )

    def _one(self, model: str, prompt: str, max_tokens: int) -> Answer:
        request = Ask(model, prompt, max_tokens, self.sweep.endpoint, self.sweep.extra)
        answer = drive(self.sweep.url, [request], 1, self.sweep.api_key).answers[0]
        if answer.error is not None:
            raise ConfigError(f"{self.sweep.url}: model {model!r} does not answer\n  {answer.error}")
        return answer

    def _tokens_of(self, prompt: str) -> int:
        if self.sweep.tokenizer is not None:
            return count_tokens(self.sweep.tokenizer, prompt, self.sweep.endpoint)
        counted = self._one(self.sweep.workload.models[0], prompt, max_tokens=1).num_prompt_tokens
        if counted is None:
            raise ConfigError(
                f"{self.sweep.url} does not say how many tokens a prompt has (no usage in its stream), "
                "so prompts cannot be sized; give --tokenizer FOLDER"
            )
        return counted


def count_tokens(folder: Path, prompt: str, endpoint: Endpoint) -> int:
    """Tokens of `prompt` as a server of that tokenizer would see them, chat template included. Raises ConfigError."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ConfigError(f"--tokenizer: no folder at {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"--tokenizer: {folder} holds none that can be loaded: {error}") from error
    if endpoint == "completions":
        return len(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@dataclass(frozen=True)
class Outcome:
    """Everything `lathe bench serve` shows: a summary and a round for each level."""

    summaries: list[Summary]
    rounds: list[Round]

    def as_json(self, sweep: Sweep) -> dict[str, Any]:
        return {"settings": sweep.as_json(), "results": [each.as_json() for each in self.summaries]}


def run(sweep: Sweep, progress: Callable[[str], None]) -> Outcome:
    """Warm up, then every level of `sweep`; `progress` is told what runs."""
    runner = SweepRunner(sweep)
    progress(f"warming up {len(sweep.workload.models)} model(s) and sizing prompts")
    runner.warm_up()
    label = _label(sweep.workload.models)
    rounds = list(_open_levels(runner, progress) if sweep.request_rates else _closed_levels(runner, progress))
    return Outcome([summarize(label, [each], sweep.objective) for each in rounds], rounds)


def _closed_levels(runner: SweepRunner, progress: Callable[[str], None]) -> Iterator[Round]:
    sweep, limit = runner.sweep, _limit(runner.sweep)
    for concurrency in sweep.concurrency:
        count = sweep.num_requests
        if count is None and sweep.time_limit_s is None:
            count = max(8, 4 * concurrency)
        much = f"{count} requests" if count else f"{sweep.time_limit_s:g} s of requests"
        progress(f"{much} from {concurrency} client(s)")
        yield runner.level(concurrency, count, limit)


def _open_levels(runner: SweepRunner, progress: Callable[[str], None]) -> Iterator[Round]:
    sweep, limit = runner.sweep, _limit(runner.sweep)
    for rate in sweep.request_rates:
        count = sweep.num_requests or _open_count(rate, sweep.time_limit_s or OPEN_LOOP_S)
        for most in sweep.concurrency or (None,):
            beside = "" if most is None else f", at most {most} under way"
            progress(f"{count} requests, {rate:g} a second{beside}")
            yield runner.open_level(rate, count, most, limit)


def _open_count(rate: float, time_s: float) -> int:
    """So many requests come in that time; a burst has no length of its own."""
    return BURST_REQUESTS if math.isinf(rate) else max(2, math.ceil(rate * time_s))


def _limit(sweep: Sweep) -> TimeLimit:
    if sweep.time_limit_s is None:
        return NO_LIMIT
    return TimeLimit(sweep.time_limit_s, sweep.time_limit_s + DRAIN_S)


def _label(models: Sequence[str]) -> str:
    return models[0] if len(models) == 1 else f"{len(models)} models"
