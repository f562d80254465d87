"""Many more adapters on disk than slots, asked for as Zipf has it: throughput over that of one adapter alone.

One server, both kinds of rounds in turns. By the wall, and by the server's own CPU time, which is no other process's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from serve.bench import servers
from serve.bench.finding import Finding
from serve.bench.lengths import Fixed
from serve.bench.load import Round
from serve.bench.process import ServerProcess, cpu_s
from serve.bench.sweep import Sweep, SweepRunner
from serve.bench.workload import Workload
from serve.bench.zipf import Zipf
from serve.errors import StoppedError

ASKED = 0.7


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    num_adapters: int = 1000
    num_slots: int = 16
    exponent: float = 1.0
    rank: int = 8
    clients: int = 16
    requests_per_client: int = 4
    num_prompt_tokens: int = 74
    max_tokens: int = 64
    rounds: int = 3


def run(
    setting: Setting,
    model: Path,
    adapters: Mapping[str, Path],
    folder: Path,
    progress: Callable[[str], None],
) -> list[Finding]:
    """Start a server of `model` that finds `adapters`, folders of one folder, by their names; measure; stop it."""
    (home,) = {path.parent for path in adapters.values()}
    settings = {"adapter_dirs": f"[{home.absolute()}]", "max_adapters": setting.num_slots}
    names = list(adapters)
    measured: dict[str, list[Round]] = {"many": [], "one": []}
    with servers.lathe(model, folder / "lathe-many.log", settings=settings) as server:
        runners = {
            "many": _runner(server, setting, names, seed=1),
            "one": _runner(server, setting, names[:1], seed=2),
        }
        for number in range(setting.rounds):
            for kind in runners if number % 2 == 0 else reversed(runners):
                progress(f"{setting.num_adapters} adapters: round {number + 1} of {setting.rounds}, {kind}")
                measured[kind].append(_measure(server, runners[kind], setting))
                if _num_failed(measured[kind][-1]) == len(measured[kind][-1].answers):
                    raise StoppedError(f"all requests failed: {measured[kind][-1].answers[0].error}")
    return _findings(setting, measured["many"], measured["one"])


def _runner(server: ServerProcess, setting: Setting, names: Sequence[str], seed: int) -> SweepRunner:
    workload = Workload(
        tuple(names),
        Fixed(setting.num_prompt_tokens),
        Fixed(setting.max_tokens),
        model_exponent=setting.exponent,
        seed=seed,
    )
    runner = SweepRunner(Sweep(server.url, workload))
    runner.warm_up()
    return runner


def _measure(server: ServerProcess, runner: SweepRunner, setting: Setting) -> Round:
    before_s = cpu_s(server.pid)
    done = runner.level(setting.clients, setting.clients * setting.requests_per_client)
    return replace(done, cpu_s=cpu_s(server.pid) - before_s)


def _findings(setting: Setting, many: Sequence[Round], one: Sequence[Round]) -> list[Finding]:
    pairs = list(zip(many, one, strict=True))
    what = (
        f"throughput of {setting.num_adapters:,} adapters, Zipf({setting.exponent:g}), {setting.num_slots} slots, "
        "over one adapter's"
    )
    most = Zipf(setting.num_adapters, setting.exponent).share(setting.num_slots)
    return [
        Finding(
            f"{what}, by the wall",
            tuple(a.tokens_per_s / b.tokens_per_s for a, b in pairs),
            ASKED,
            "at least",
            {
                "many tok/s": [each.tokens_per_s for each in many],
                "one tok/s": [each.tokens_per_s for each in one],
                "share of requests that the likeliest adapters of all slots get": [most],
                "adapters asked for": [len({answer.model for answer in each.answers}) for each in many],
            },
        ),
        Finding(
            f"{what}, in CPU time",
            tuple(_per_cpu_s(a) / _per_cpu_s(b) for a, b in pairs),
            ASKED,
            "at least",
            {
                "many tok/CPU s": [_per_cpu_s(each) for each in many],
                "one tok/CPU s": [_per_cpu_s(each) for each in one],
            },
        ),
        Finding(
            f"requests of {setting.num_adapters:,} adapters that failed, of all",
            tuple(_num_failed(each) / len(each.answers) for each in many),
            0.0,
            "at most",
            {"requests": [len(each.answers) for each in many]},
        ),
    ]


def _num_failed(done: Round) -> int:
    return sum(answer.error is not None for answer in done.answers)


def _per_cpu_s(done: Round) -> float:
    assert done.tokens_per_cpu_s is not None, "it was looked at"
    return done.tokens_per_cpu_s
