"""Those that `lathe bench compare` measures: the bare loop, servers, and one server's models in different mixes.

Each takes rounds of the same prompts. All are started before anything is measured and stay up; those that are not
being measured are paused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from serve.bench import servers
from serve.bench.bare import BareLoop
from serve.bench.lengths import Fixed
from serve.bench.load import NO_LIMIT, Round, TimeLimit
from serve.bench.process import ServerProcess, cpu_s
from serve.bench.prompts import calibrate
from serve.bench.sweep import GREETING, Sweep, SweepRunner, count_tokens
from serve.bench.workload import Workload, WorkloadMaker
from serve.errors import ConfigError, StoppedError

FEW, MANY = 8, 32
"""Adapters in the two mixes; all of MANY are loaded in the server that has any."""
LATHE, BARE, UNUSED, ONE = "lathe", "bare loop", "lathe, adapters unused", "lathe, one adapter"
FEW_MIXED, MANY_MIXED = f"lathe, {FEW} adapters mixed", f"lathe, {MANY} adapters mixed"
PEERS = ("mlx_lm.server", "mlx_vlm.server", servers.VLLM_MLX.label)
KEYS: Mapping[str, str] = {
    "lathe": LATHE,
    "bare": BARE,
    "mlx_lm": PEERS[0],
    "mlx_vlm": PEERS[1],
    "vllm_mlx": PEERS[2],
    "unused": UNUSED,
    "one": ONE,
    "mixed8": FEW_MIXED,
    "mixed32": MANY_MIXED,
}
"""What the command line calls them → their labels. In this order they take turns."""
_SEEDS = {FEW_MIXED: 1, MANY_MIXED: 2, ONE: 3}
"""Whose prompts are their own: they share adapters, and so would share prefixes. The others all get the same ones."""


class Contestant(Protocol):
    """Whoever takes rounds."""

    label: str

    def warm_up(self) -> None: ...

    def level(self, concurrency: int, count: int, limit: TimeLimit = NO_LIMIT) -> Round: ...


@dataclass(frozen=True)
class Work:
    """What is asked in each request."""

    num_prompt_tokens: int
    max_tokens: int


class Served:
    """A server, asked for `models` in turn."""

    def __init__(self, label: str, server: ServerProcess, models: Sequence[str], work: Work) -> None:
        self.label = label
        self._server = server
        workload = Workload(
            tuple(models),
            Fixed(work.num_prompt_tokens),
            Fixed(work.max_tokens),
            seed=_SEEDS.get(label, 0),
        )
        self._runner = SweepRunner(Sweep(server.url, workload))

    def warm_up(self) -> None:
        """Ask it once; its server is paused after it. Raises ConfigError if it does not answer."""
        self._server.resume()
        self._runner.warm_up()
        self._server.pause()

    def level(self, concurrency: int, count: int, limit: TimeLimit = NO_LIMIT) -> Round:
        self._server.resume()
        try:
            before_s = cpu_s(self._server.pid)
            done = self._runner.level(concurrency, count, limit)
            return replace(done, cpu_s=cpu_s(self._server.pid) - before_s)
        finally:
            self._server.pause()


class Bare:
    """The bare loop. Its prompts are those of the servers."""

    label = BARE

    def __init__(self, loop: BareLoop, model: Path, work: Work) -> None:
        self._loop = loop
        self._work = work
        workload = Workload((BARE,), Fixed(work.num_prompt_tokens), Fixed(work.max_tokens))
        cost = calibrate(lambda prompt: count_tokens(model, prompt, "chat"))
        self._wanted = iter(WorkloadMaker(workload, cost))

    def warm_up(self) -> None:
        self._loop.round([GREETING], 2, 1)

    def level(self, concurrency: int, count: int, limit: TimeLimit = NO_LIMIT) -> Round:
        """Its batches cannot be cut off; `limit` is the servers'."""
        prompts = [each.prompt for each in islice(self._wanted, count)]
        before_s = cpu_s(self._loop.pid)
        done = self._loop.round(prompts, self._work.max_tokens, concurrency)
        return replace(done, cpu_s=cpu_s(self._loop.pid) - before_s)


@dataclass(frozen=True)
class Field:
    """What is started, and for whom."""

    labels: Sequence[str]
    work: Work
    model: Path
    adapters: Mapping[str, Path]
    folder: Path
    """For logs."""
    vllm_mlx: str | None
    """Its executable."""

    def start(
        self, stack: ExitStack, progress: Callable[[str], None], left_out: list[str]
    ) -> list[Contestant]:
        """Everybody in `labels`, warmed up and paused; `stack` stops them. A peer that fails is left out, and why is
        added to `left_out`; another one that fails raises StoppedError or ConfigError."""
        started: dict[str, ServerProcess] = {}
        contestants: list[Contestant] = []
        for label in self.labels:
            progress(f"starting {label}")
            try:
                contestant = self._start(label, started, stack)
                contestant.warm_up()
            except (StoppedError, ConfigError) as error:
                if label not in PEERS:
                    raise
                left_out.append(f"{label}: {error}")
            else:
                contestants.append(contestant)
        return contestants

    def _start(self, label: str, started: dict[str, ServerProcess], stack: ExitStack) -> Contestant:
        """One of them; its server, if it has one, is started or is in `started`."""
        if label == BARE:
            loop = stack.enter_context(BareLoop(self.model, self.folder / "bare.log"))
            return Bare(loop, self.model, self.work)
        key = label if label in (LATHE, *PEERS) else "lathe with adapters"
        if key not in started:
            started[key] = stack.enter_context(self._server(key))
        return Served(label, started[key], self._models(label), self.work)

    def _server(self, key: str) -> ServerProcess:
        log = self.folder / f"{key.replace(' ', '-')}.log"
        if key == LATHE:
            return servers.lathe(self.model, log)
        if key == PEERS[0]:
            return servers.mlx_lm(self.model, log)
        if key == PEERS[1]:
            return servers.mlx_vlm(self.model, log)
        if key == PEERS[2]:
            assert self.vllm_mlx is not None, "it is measured where it is installed"
            return servers.peer(servers.VLLM_MLX, self.vllm_mlx, self.model, log)
        return servers.lathe(self.model, log, adapters=self.adapters)

    def _models(self, label: str) -> tuple[str, ...]:
        """What requests name."""
        names = {
            PEERS[0]: ("default_model",),
            PEERS[1]: (str(self.model),),
            PEERS[2]: (servers.VLLM_MLX.served_name,),
            FEW_MIXED: tuple(islice(self.adapters, FEW)),
            MANY_MIXED: tuple(self.adapters),
            ONE: tuple(islice(self.adapters, 1)),
        }
        return names.get(label, (self.model.name,))
