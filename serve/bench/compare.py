"""`lathe bench compare`: Lathe, mlx_lm.server and mlx_vlm.server on one random model, one after the other.

All three get the same BLAS, the same prompts and the same number of tokens to make. They stay up for the whole
run, and all but the one being measured are paused. Rounds alternate between them, so drift of the machine
meets all alike, and ratios are taken within a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from serve.bench import servers, standin
from serve.bench.about import about
from serve.bench.load import Round
from serve.bench.process import ServerProcess
from serve.bench.summary import Summary, summarize
from serve.bench.sweep import Sweep, SweepRunner
from serve.errors import StoppedError
from serve.tables import Table, numbers

NUM_ADAPTERS = 8


@dataclass(frozen=True)
class Comparison:
    """What to measure, the same for every server."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    num_prompt_tokens: int = 74
    max_tokens: int = 64
    rounds: int = 3
    requests_per_client: int = 2
    size: str = "29M"
    """Of the random model: one of `standin.SIZES`."""


@dataclass(frozen=True)
class Contestant:
    """A server, and the models its requests name."""

    label: str
    server: ServerProcess
    models: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """Throughput of one setting over another's: the median over rounds, and its extremes."""

    of: str
    to: str
    concurrency: int
    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Outcome:
    """Everything `lathe bench compare` shows."""

    summaries: list[Summary]
    ratios: list[Ratio]
    same_text: dict[str, float]
    """Fraction of Lathe's base answers that another server gave too, word for word."""

    def as_json(self, comparison: Comparison) -> dict[str, Any]:
        return {
            **about(),
            "settings": asdict(comparison),
            "results": [each.as_json() for each in self.summaries],
            "ratios": [asdict(each) for each in self.ratios],
            "same_text": self.same_text,
        }


def run(
    comparison: Comparison,
    folder: Path,
    progress: Callable[[str], None],
    keep: Callable[[Outcome], None],
) -> Outcome:
    """Write the model into `folder`, start the servers, measure, stop them. Raises StoppedError if one fails.

    `keep` is given what is known so far each time that all servers had their turn, so a run cut off has told it.
    """
    progress("writing a random model and 8 adapters")
    model, adapters, size = folder / "model", folder / "adapters", standin.SIZES[comparison.size]
    standin.write_model(model, standin.default_dtype(), size)
    paths = standin.write_adapters(adapters, NUM_ADAPTERS, size)
    mx.clear_cache()
    with ExitStack() as stack:
        contestants = _start(model, paths, folder, stack, progress)
        rounds = _measure(contestants, comparison, progress, lambda so_far: keep(outcome_of(so_far)))
    return outcome_of(rounds)


def outcome_of(rounds: Mapping[tuple[str, int], Sequence[Round]]) -> Outcome:
    """(label, concurrency) → rounds, as far as they came: a level that not all servers had has no entry."""
    summaries = [summarize(label, each) for (label, _), each in rounds.items()]
    return Outcome(summaries, _ratios(rounds), _same_text(rounds))


def _start(
    model: Path,
    adapters: Mapping[str, Path],
    folder: Path,
    stack: ExitStack,
    progress: Callable[[str], None],
) -> list[Contestant]:
    named = {
        "lathe": servers.lathe(model, folder / "lathe.log", adapters=adapters),
        "mlx_lm.server": servers.mlx_lm(model, folder / "mlx_lm.server.log"),
        "mlx_vlm.server": servers.mlx_vlm(model, folder / "mlx_vlm.server.log"),
    }
    for name, server in named.items():
        progress(f"starting {name}")
        stack.enter_context(server)
    return [
        Contestant("lathe", named["lathe"], (model.name,)),
        Contestant("mlx_lm.server", named["mlx_lm.server"], ("default_model",)),
        Contestant("mlx_vlm.server", named["mlx_vlm.server"], (str(model),)),
        Contestant(f"lathe, {len(adapters)} adapters", named["lathe"], tuple(adapters)),
    ]


def _measure(
    contestants: Sequence[Contestant],
    comparison: Comparison,
    progress: Callable[[str], None],
    keep: Callable[[Mapping[tuple[str, int], Sequence[Round]]], None],
) -> dict[tuple[str, int], list[Round]]:
    """(label, concurrency) -> its rounds, in order."""
    runners = {}
    for each in contestants:
        progress(f"warming up {each.label}")
        runners[each.label] = SweepRunner(_sweep(each, comparison))
        runners[each.label].warm_up()
    for each in contestants:
        each.server.pause()
    rounds: dict[tuple[str, int], list[Round]] = {}
    for number in range(comparison.rounds):
        for concurrency in comparison.concurrency:
            for each in contestants:
                progress(f"round {number + 1} of {comparison.rounds}: {each.label}, {concurrency} client(s)")
                each.server.resume()
                count = max(2, comparison.requests_per_client * concurrency)
                done = runners[each.label].level(concurrency, count)
                each.server.pause()
                _check(each.label, done)
                rounds.setdefault((each.label, concurrency), []).append(done)
            keep(rounds)
    return rounds


def _sweep(contestant: Contestant, comparison: Comparison) -> Sweep:
    return Sweep(
        url=contestant.server.url,
        models=contestant.models,
        num_prompt_tokens=comparison.num_prompt_tokens,
        max_tokens=comparison.max_tokens,
    )


def _check(label: str, done: Round) -> None:
    """Failed requests are counted and shown; a round of nothing else has no rate to show."""
    if all(answer.error is not None for answer in done.answers):
        raise StoppedError(f"{label}: all {len(done.answers)} requests failed: {done.answers[0].error}")


def _ratios(rounds: Mapping[tuple[str, int], Sequence[Round]]) -> list[Ratio]:
    labels = list(dict.fromkeys(label for label, _ in rounds))
    levels = list(dict.fromkeys(concurrency for _, concurrency in rounds))
    pairs = [(labels[0], labels[1]), (labels[0], labels[2]), (labels[3], labels[0])]
    return [
        _ratio(of, to, concurrency, rounds[of, concurrency], rounds[to, concurrency])
        for of, to in pairs
        for concurrency in levels
    ]


def _ratio(of: str, to: str, concurrency: int, ours: Sequence[Round], theirs: Sequence[Round]) -> Ratio:
    values = [a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=True)]
    return Ratio(of, to, concurrency, median(values), min(values), max(values))


def _same_text(rounds: Mapping[tuple[str, int], Sequence[Round]]) -> dict[str, float]:
    """Servers saw the same prompts in the same order, so equal weights should give equal greedy text."""
    texts: dict[str, list[list[str]]] = {label: [] for label, _ in rounds}
    for (label, _), each in rounds.items():
        texts[label] += [sorted(answer.text for answer in one.answers) for one in each]
    ours, *others = texts
    return {label: _overlap(texts[ours], texts[label]) for label in others[:2]}


def _overlap(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> float:
    shared = sum(text in there for here, there in zip(ours, theirs, strict=True) for text in here)
    return shared / max(1, sum(len(here) for here in ours))


def table(outcome: Outcome) -> Table:
    """How many times as fast: the median of the rounds and its extremes, a column for each number of clients."""
    title = "Ratio of tokens per second: median of rounds (lowest, highest)"
    levels = list(dict.fromkeys(each.concurrency for each in outcome.ratios))
    headings = [f"{level} client{'s' if level > 1 else ''}" for level in levels]
    drawn = Table("of / to", *numbers(*headings), title=title)
    for of, to in dict.fromkeys((each.of, each.to) for each in outcome.ratios):
        found = [each for each in outcome.ratios if (each.of, each.to) == (of, to)]
        drawn.add(f"{of} / {to}", *(f"{each.median:.2f} ({each.min:.2f}, {each.max:.2f})" for each in found))
    return drawn


def notes(outcome: Outcome) -> list[str]:
    """How alike the servers' answers were."""
    return [
        f"{label} gave {share:.0%} of Lathe's base answers word for word"
        for label, share in outcome.same_text.items()
    ]
