"""What rounds of answers add up to: rates, percentiles, errors; as numbers, JSON and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from serve.bench.load import Round
from serve.tables import Table, numbers


@dataclass(frozen=True)
class Spread:
    """Seconds over requests."""

    mean: float
    p50: float
    p95: float
    max: float


@dataclass(frozen=True)
class Summary:
    """One setting's numbers. Rates count the tokens of answers without error over the wall time of the rounds."""

    label: str
    concurrency: int
    num_requests: int
    num_errors: int
    errors: tuple[str, ...]
    """The distinct messages."""
    wall_s: float
    num_tokens: int
    tokens_per_s: float
    tokens_per_s_by_round: tuple[float, ...]
    requests_per_s: float
    ttft_s: Spread | None
    tpot_s: Spread | None
    latency_s: Spread | None
    prompt_tokens_mean: float | None
    answer_tokens: dict[int, int]
    """Length of answer -> how many had it. Servers are comparable when these are equal."""
    counted_by: tuple[str, ...]
    """`usage` where the server counted the tokens, `chunks` where it did not say and stream chunks were."""
    requests_by_model: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(label: str, rounds: Sequence[Round]) -> Summary:
    """The numbers of `rounds`, which share one setting and ran one after the other."""
    answers = [answer for each in rounds for answer in each.answers]
    good = [answer for answer in answers if answer.error is None]
    wall_s = sum(each.wall_s for each in rounds)
    num_tokens = sum(answer.num_tokens for answer in good)
    prompts = [answer.num_prompt_tokens for answer in good if answer.num_prompt_tokens is not None]
    return Summary(
        label=label,
        concurrency=rounds[0].concurrency,
        num_requests=len(answers),
        num_errors=len(answers) - len(good),
        errors=tuple(sorted({answer.error for answer in answers if answer.error is not None})),
        wall_s=wall_s,
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / wall_s,
        tokens_per_s_by_round=tuple(each.tokens_per_s for each in rounds),
        requests_per_s=len(good) / wall_s,
        ttft_s=spread(answer.first_s for answer in good),
        tpot_s=spread(answer.tpot_s for answer in good),
        latency_s=spread(answer.last_s for answer in good),
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
    p50, p95 = np.percentile(known, (50, 95))
    return Spread(float(known.mean()), float(p50), float(p95), float(known.max()))


def table(title: str, summaries: Sequence[Summary]) -> Table:
    """One line a setting; times in milliseconds, p50 / p95."""
    drawn = Table("setting", *numbers("clients", "tok/s", "TTFT ms", "TPOT ms", "errors"), title=title)
    for each in summaries:
        drawn.add(
            each.label,
            str(each.concurrency),
            f"{each.tokens_per_s:,.1f}",
            _pair(each.ttft_s),
            _pair(each.tpot_s),
            f"{each.num_errors:,} of {each.num_requests:,}" if each.num_errors else "0",
        )
    return drawn


def _pair(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.p50 * 1e3:,.0f} / {spread.p95 * 1e3:,.0f}"


def notes(summaries: Sequence[Summary]) -> list[str]:
    """What a reader of the table must know: prompt and answer lengths, uncounted tokens, error messages."""
    prompts = sorted({round(s.prompt_tokens_mean) for s in summaries if s.prompt_tokens_mean is not None})
    lengths = sorted({length for s in summaries for length in s.answer_tokens})
    said = [f"prompt tokens: {_range(prompts)}; answer tokens: {_range(lengths)}"]
    if any("chunks" in s.counted_by for s in summaries):
        said.append(
            "the server gave no usage: stream chunks were counted, and a chunk may hold several tokens"
        )
    return said + [f"error: {message}" for message in sorted({m for s in summaries for m in s.errors})]


def _range(values: Sequence[int]) -> str:
    if not values:
        return "not reported"
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
