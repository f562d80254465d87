"""What a prefix cache costs where it never helps: prompts that are all different, with it on and off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from serve.bench import servers
from serve.bench.finding import Finding
from serve.bench.lengths import Fixed
from serve.bench.sweep import Sweep, SweepRunner
from serve.bench.workload import Workload
from serve.errors import StoppedError

ASKED = 0.97
"""Nothing is to be lost; rounds of one server differ by more than this."""


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    clients: int = 16
    requests_per_client: int = 2
    num_prompt_tokens: int = 256
    max_tokens: int = 64
    rounds: int = 3


def run(setting: Setting, model: Path, folder: Path, progress: Callable[[str], None]) -> list[Finding]:
    """Start two servers of `model`, measure them in turns, the other one paused, and stop them."""
    started = {
        "on": servers.lathe(model, folder / "lathe-on.log"),
        "off": servers.lathe(model, folder / "lathe-off.log", settings={"prefix_cache_gib": 0}),
    }
    speeds: dict[str, list[float]] = {name: [] for name in started}
    with ExitStack() as stack:
        runners = {}
        for seed, (name, server) in enumerate(started.items()):
            stack.enter_context(server)
            runners[name] = SweepRunner(
                Sweep(
                    server.url,
                    Workload(
                        (model.name,),
                        Fixed(setting.num_prompt_tokens),
                        Fixed(setting.max_tokens),
                        seed=seed,
                    ),
                )
            )
            runners[name].warm_up()
            server.pause()
        for number in range(setting.rounds):
            for name in started if number % 2 else reversed(started):
                progress(f"round {number + 1} of {setting.rounds}: prefix cache {name}")
                started[name].resume()
                done = runners[name].level(setting.clients, setting.clients * setting.requests_per_client)
                started[name].pause()
                errors = [answer.error for answer in done.answers if answer.error is not None]
                if errors:
                    raise StoppedError(f"prefix cache {name}: {len(errors)} requests failed: {errors[0]}")
                speeds[name].append(done.tokens_per_s)
    return [
        Finding(
            what="throughput with the prefix cache over without, prompts all different",
            ratios=tuple(a / b for a, b in zip(speeds["on"], speeds["off"], strict=True)),
            asked=ASKED,
            sense="at least",
            values={"with tok/s": speeds["on"], "without tok/s": speeds["off"]},
        )
    ]
