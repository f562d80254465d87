"""What rounds of answers add up to: rates, percentiles, errors; as numbers, JSON and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np

from serve.bench.goodput import Goodput, Objective, goodput
from serve.bench.load import Round
from serve.tables import Table, numbers

LATE_S = 0.05
"""A request sent later than this after its time is worth a word."""


@dataclass(frozen=True)
class Spread:
    """Seconds over requests, or over gaps."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class Summary:
    """One setting's numbers. Rates count the tokens of answers without error over the wall time of the rounds."""

    label: str
    concurrency: int
    request_rate: float | None
    """Requests a second of an open loop; None: a closed one."""
    num_requests: int
    num_errors: int
    errors: tuple[str, ...]
    """The distinct messages."""
    errors_by_kind: dict[str, int]
    wall_s: float
    num_tokens: int
    tokens_per_s: float
    tokens_per_s_by_round: tuple[float, ...]
    tokens_per_cpu_s_by_round: tuple[float | None, ...]
    """Of the server's processes; None where nobody looked."""
    requests_per_s: float
    ttft_s: Spread | None
    tpot_s: Spread | None
    latency_s: Spread | None
    gap_s: Spread | None
    """Between two pieces of one stream: inter-token latency, where a piece is a token."""
    longest_gap_s_by_round: tuple[float | None, ...]
    late_s: Spread | None
    """Open loop: how long after its time a request was sent."""
    goodput: Goodput | None
    """None where no objective was given."""
    prompt_tokens_mean: float | None
    answer_tokens: dict[int, int]
    """Length of answer -> how many had it. Servers are comparable when these are equal."""
    counted_by: tuple[str, ...]
    """`usage` where the server counted the tokens, `chunks` where it did not say and stream chunks were."""
    requests_by_model: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        rate = self.request_rate
        return {**asdict(self), "request_rate": rate if rate is None or isfinite(rate) else "inf"}


def summarize(label: str, rounds: Sequence[Round], objective: Objective | None = None) -> Summary:
    """The numbers of `rounds`, which share one setting and ran one after the other.

    objective  what goodput is counted by
    """
    answers = [answer for each in rounds for answer in each.answers]
    good = [answer for answer in answers if answer.error is None]
    wall_s = sum(each.wall_s for each in rounds)
    num_tokens = sum(answer.num_tokens for answer in good)
    prompts = [answer.num_prompt_tokens for answer in good if answer.num_prompt_tokens is not None]
    return Summary(
        label=label,
        concurrency=rounds[0].concurrency,
        request_rate=rounds[0].request_rate,
        num_requests=len(answers),
        num_errors=len(answers) - len(good),
        errors=tuple(sorted({answer.error for answer in answers if answer.error is not None})),
        errors_by_kind=dict(
            Counter(answer.error_kind or "other" for answer in answers if answer.error is not None)
        ),
        wall_s=wall_s,
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / wall_s,
        tokens_per_s_by_round=tuple(each.tokens_per_s for each in rounds),
        tokens_per_cpu_s_by_round=tuple(each.tokens_per_cpu_s for each in rounds),
        requests_per_s=len(good) / wall_s,
        ttft_s=spread(answer.first_s for answer in good),
        tpot_s=spread(answer.tpot_s for answer in good),
        latency_s=spread(answer.last_s for answer in good),
        gap_s=spread(gap for answer in good for gap in answer.gaps_s),
        longest_gap_s_by_round=tuple(each.longest_gap_s for each in rounds),
        late_s=spread(late for each in rounds for late in each.late_s),
        goodput=goodput(answers, wall_s, objective) if objective else None,
        prompt_tokens_mean=float(np.mean(prompts)) if prompts else None,
        answer_tokens=dict(sorted(Counter(answer.num_tokens for answer in good).items())),
        counted_by=tuple(sorted({answer.counted_by for answer in good})),
        requests_by_model=dict(sorted(Counter(answer.model for answer in answers).items())),
    )


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of those that are there; None where none is."""
    known = np.array([value for value in values if value is not None])
    if not known.size:
        return None
    p50, p95, p99 = np.percentile(known, (50, 95, 99))
    return Spread(float(known.mean()), float(p50), float(p95), float(p99), float(known.max()))


def table(title: str, summaries: Sequence[Summary]) -> Table:
    """One line a setting; times in milliseconds, p50 / p95, and of gaps p50 / p95 / p99 / longest."""
    has_rate = any(each.request_rate is not None for each in summaries)
    has_goodput = any(each.goodput is not None for each in summaries)
    rate, good = ("rate/s",) if has_rate else (), ("good/s",) if has_goodput else ()
    headings = (*rate, "clients", "tok/s", "TTFT ms", "TPOT ms", "gaps ms", *good, "errors")
    drawn = Table("setting", *numbers(*headings), title=title)
    for each in summaries:
        drawn.add(
            each.label,
            *(("-" if each.request_rate is None else f"{each.request_rate:g}",) if has_rate else ()),
            str(each.concurrency),
            f"{each.tokens_per_s:,.1f}",
            _percentiles(each.ttft_s, "p50", "p95"),
            _percentiles(each.tpot_s, "p50", "p95"),
            _percentiles(each.gap_s, "p50", "p95", "p99", "max"),
            *((_goodput(each.goodput),) if has_goodput else ()),
            f"{each.num_errors:,} of {each.num_requests:,}" if each.num_errors else "0",
        )
    return drawn


def _percentiles(spread: Spread | None, *names: str) -> str:
    return "-" if spread is None else " / ".join(f"{getattr(spread, name) * 1e3:,.0f}" for name in names)


def _goodput(found: Goodput | None) -> str:
    return "-" if found is None else f"{found.requests_per_s:,.2f} ({found.share:.0%})"


def notes(summaries: Sequence[Summary]) -> list[str]:
    """What a reader of the table must know: prompt and answer lengths, uncounted tokens, error messages."""
    prompts = sorted({round(s.prompt_tokens_mean) for s in summaries if s.prompt_tokens_mean is not None})
    lengths = sorted({length for s in summaries for length in s.answer_tokens})
    said = [f"prompt tokens: {_range(prompts)}; answer tokens: {_range(lengths)}"]
    if any("chunks" in s.counted_by for s in summaries):
        said.append(
            "the server gave no usage: stream chunks were counted, and a chunk may hold several tokens"
        )
    said += [f"goodput: {each}" for each in sorted({s.goodput.objective for s in summaries if s.goodput})]
    late_s = max((s.late_s.max for s in summaries if s.late_s), default=0.0)
    if late_s > LATE_S:
        said.append(f"requests were sent up to {1e3 * late_s:,.0f} ms after their time")
    return said + _errors(summaries)


def _errors(summaries: Sequence[Summary]) -> list[str]:
    """How many of each kind, and the messages."""
    kinds: Counter[str] = Counter()
    for each in summaries:
        kinds.update(each.errors_by_kind)
    counted = [f"errors: {', '.join(f'{count:,} {kind}' for kind, count in sorted(kinds.items()))}"]
    messages = sorted({message for each in summaries for message in each.errors})
    return (counted if kinds else []) + [f"error: {message}" for message in messages]


def _range(values: Sequence[int]) -> str:
    if not values:
        return "not reported"
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
