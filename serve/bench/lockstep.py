"""Two engines that do the same work step by step in turns: what each of them takes, on a machine that others use.

A step of the one, a step of the other, in an order that turns round: whatever slows the machine meets both alike.
What a step took is counted by the wall, and in the CPU time of this whole process, of which other processes' work is
no part (with one BLAS thread: waiting threads of a pool spin, and spinning is counted).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import mlx.core as mx

from serve.bench.finding import Finding
from serve.constraints.grammar import Grammar
from serve.engine.engine import Engine
from serve.engine.request import Request, Sampling
from serve.errors import StoppedError
from serve.model.prompt import Prompt

KINDS = ("wall", "cpu")
"""Of time."""


@dataclass(frozen=True)
class Side:
    """An engine, the adapters that its rows name in turn, none: the base, and the grammars that they keep to."""

    engine: Engine
    adapters: Sequence[str] = ()
    grammars: Sequence[Grammar] = ()


@dataclass
class Cost:
    """Seconds that one side's steps took."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of all threads."""
    num_steps: int = 0
    num_tokens: int = 0


def run(
    sides: Sequence[Side],
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    number: int = 0,
    temperature: float = 0.0,
) -> list[Cost]:
    """Every side answers all `prompts`, a row each, from beginning to end. Raises StoppedError if a row fails.

    number       of the round: odd ones begin with the last side
    temperature  at which tokens are drawn, by the number of the row in the round
    """
    costs = [Cost() for _ in sides]
    held = [_begin(side, prompts, max_tokens, number, temperature) for side in sides]
    turns = list(zip(sides, costs, strict=True))
    if number % 2:
        turns.reverse()
    while any(side.engine.has_work for side in sides):
        for side, cost in turns:
            if side.engine.has_work:
                _step(side.engine, cost)
        turns.reverse()
    for side, versions in zip(sides, held, strict=True):
        for version in versions:
            side.engine.registry.release(version)
    return costs


def throughput(what: str, kind: str, costs: Sequence[Sequence[Cost]], asked: float) -> Finding:
    """Of the first side over the second, by the wall or in CPU time, a round each. Both have made as many tokens, so
    it is the inverse of what they took."""
    ours, theirs = ([getattr(each[side], f"{kind}_s") for each in costs] for side in (0, 1))
    words = "by the wall" if kind == "wall" else "in CPU time"
    return Finding(
        f"{what}, {words}",
        tuple(b / a for a, b in zip(ours, theirs, strict=True)),
        asked,
        "at least",
        {"s": ours, "s of the other": theirs},
    )


def _begin(
    side: Side, prompts: Sequence[Sequence[int]], max_tokens: int, number: int, temperature: float
) -> list:
    """Queue a request for each prompt. Returns the versions that they hold."""
    engine = side.engine
    versions = [engine.registry.acquire(name) for name in islice(cycle(side.adapters), len(prompts))]
    for row, prompt in enumerate(prompts):
        adapter = versions[row] if versions else None
        seed = number * len(prompts) + row
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, ignore_eos=True, seed=seed)
        grammar = side.grammars[row % len(side.grammars)] if side.grammars else None
        request = Request(str(row), Prompt(tuple(prompt)), sampling, adapter, grammar=grammar)
        engine.add(engine.check(request))
    return versions


def _step(engine: Engine, cost: Cost) -> None:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    events = engine.step()
    mx.synchronize()
    cost.wall_s += time.perf_counter() - wall_s
    cost.cpu_s += time.process_time() - cpu_s
    cost.num_steps += 1
    for event in events:
        if event.error is not None:
            raise StoppedError(f"a row failed: {event.error}")
        cost.num_tokens += len(event.token_ids)
