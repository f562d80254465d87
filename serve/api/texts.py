"""The models that encode texts, as endpoints use them: found by name, run in turn, counted."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import anyio.to_thread
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.api.exchange import current
from serve.api.permission import check_name
from serve.config import ServeConfig
from serve.embed.desk import EncodeDesk, Run
from serve.embed.model import Encoded, Rows, TextModel
from serve.errors import LatheError, NotFoundError, RequestError

T = TypeVar("T", bound=TextModel)
R = TypeVar("R")
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
HOW = (
    "list it under embedding_models of the server's configuration, or start with --embedding-model NAME=PATH"
)


class Texts:
    """One app's."""

    def __init__(
        self,
        models: Mapping[str, TextModel],
        config: ServeConfig,
        run: Run,
        registry: CollectorRegistry,
        generates: Callable[[str], bool],
    ) -> None:
        """run: as EncodeDesk has it. registry: where to count. generates: whether
        a name is of what generates text."""
        self.models = models
        self._generates = generates
        self._desk = EncodeDesk(run, config.embedding_piece_tokens, config.max_waiting_texts)
        # One at a time: a fast tokenizer refuses to be used by two threads at once.
        self._tokenizing = anyio.CapacityLimiter(1)
        self._counts = _Counts(registry, self._desk)

    def find(self, name: str | None, kind: type[T], what: str) -> T:
        """The model of that name; without a name, the only one there is. NotFoundError, or RequestError where it does
        something else.

        what  it is asked for, in words
        """
        fitting = {each: model for each, model in self.models.items() if isinstance(model, kind)}
        if name is None:
            if len(fitting) == 1:
                check_name(next(iter(fitting)))
                return next(iter(fitting.values()))
            raise RequestError(f"model: missing; {_there(fitting, what)}", "model")
        check_name(name)
        model = self.models.get(name)
        if isinstance(model, kind):
            return model
        if model is not None:
            raise RequestError(f"model {name!r} does not give {what}; {_there(fitting, what)}", "model")
        if self._generates(name):
            raise RequestError(
                f"model {name!r} generates text and does not give {what}; {_there(fitting, what)}", "model"
            )
        raise NotFoundError(f"model {name!a:.200} is not served here for {what}; {_there(fitting, what)}")

    async def tokenize(self, work: Callable[[], R]) -> R:
        """Run tokenizers' work on their thread."""
        return await anyio.to_thread.run_sync(work, limiter=self._tokenizing)

    async def encode(self, model: TextModel, rows: Sequence[Encoded]) -> Rows:
        """[len(rows), O]: as EncodeDesk has it."""
        if exchange := current():
            exchange.asked = exchange.served = model.name
            exchange.add_prompt(sum(len(row.token_ids) for row in rows))
        return await self._desk.encode(model, rows)

    @asynccontextmanager
    async def counted(self, endpoint: str, model: TextModel) -> AsyncIterator[None]:
        """Count what is done inside as one request, and how it ended."""
        began_s, finish = time.perf_counter(), "cancelled"
        try:
            yield
            finish = "stop"
        except LatheError:
            finish = "error"
            raise
        finally:
            self._counts.requests.labels(endpoint, model.name, finish).inc()
            if finish == "stop":
                self._counts.latency_s.labels(model.name).observe(time.perf_counter() - began_s)


class _Counts:
    """What /metrics shows of it. `model` is one of the configuration's, so labels are few."""

    def __init__(self, registry: CollectorRegistry, desk: EncodeDesk) -> None:
        self.requests = Counter(
            "lathe_encode_requests",
            "Requests for vectors and scores, by how they ended.",
            ["endpoint", "model", "finish"],
            registry=registry,
        )
        self.latency_s = Histogram(
            "lathe_encode_seconds",
            "Time to the answer.",
            ["model"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        waiting = Gauge("lathe_encode_waiting", "Texts that wait to be encoded.", registry=registry)
        waiting.set_function(lambda: desk.num_waiting)
        registry.register(_DeskCollector(desk))


class _DeskCollector(Collector):
    """Reads the desk when asked, so nothing is counted twice."""

    def __init__(self, desk: EncodeDesk) -> None:
        self._desk = desk

    def collect(self) -> Iterable[Metric]:
        stats = self._desk.stats
        for name, meaning, count in (
            ("texts", "Texts, and pairs of texts, encoded.", stats.num_rows),
            ("tokens", "Their tokens.", stats.num_tokens),
            ("padding_tokens", "Tokens of padding beside them.", stats.num_padding),
            ("pieces", "Forwards that encoded them.", stats.num_pieces),
        ):
            yield CounterMetricFamily(f"lathe_encoded_{name}", meaning, count)


def _there(fitting: Mapping[str, TextModel], what: str) -> str:
    return f"there are {', '.join(fitting)}" if fitting else f"no model here gives {what}: {HOW}"
