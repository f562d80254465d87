"""The worker: one final event a request, whatever happens; hot loads beside running streams."""

from __future__ import annotations

import queue
import threading

import pytest

from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.engine.worker import Worker
from serve.errors import ContextLengthError, OverloadedError, StoppedError


@pytest.fixture
def worker(model):
    worker = Worker(Engine(model, EngineLimits(max_rows=4, max_waiting=4)))
    worker.start()
    yield worker
    worker.stop()


def collect(events: queue.SimpleQueue) -> tuple[tuple[int, ...], str]:
    tokens: list[int] = []
    while True:
        event = events.get(timeout=30)
        tokens += event.token_ids
        if event.finish:
            return tuple(tokens), event.finish


def test_answers_equal_the_engines_own_and_end_once(worker, fresh_engine, make_request):
    sinks = {}
    for i in range(6):
        sinks[i] = queue.SimpleQueue()
        worker.submit(make_request(str(i), f"text {i}", max_tokens=10 + i), sinks[i].put)
    expected = generate(
        fresh_engine(), [make_request(str(i), f"text {i}", max_tokens=10 + i) for i in range(6)]
    )
    for i in range(6):
        assert collect(sinks[i]) == (expected[i].token_ids, "length")
        assert sinks[i].empty()


def test_an_adapter_loads_while_a_stream_runs_and_the_stream_goes_on(
    worker, fresh_engine, make_adapter, make_request
):
    running: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(make_request("runs", max_tokens=300), running.put)
    first = [running.get(timeout=30) for _ in range(5)]
    worker.engine.registry.load("late", make_adapter(1))
    assert worker.stats().num_decoding == 1, "the stream must still be running"
    pinned = worker.engine.registry.acquire("late")
    late: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(make_request("late", adapter=pinned), late.put)
    tokens, _ = collect(late)
    rest, finish = collect(running)
    assert finish == "length"
    alone = generate(fresh_engine(), [make_request("runs", max_tokens=300)])[0].token_ids
    assert tuple(t for e in first for t in e.token_ids) + rest == alone
    assert tokens != generate(fresh_engine(), [make_request("late")])[0].token_ids
    assert worker.engine.registry.num_pins(pinned) == 0


def test_cancelling_ends_a_row_once_and_releases_its_adapter(worker, make_adapter, make_request):
    registry = worker.engine.registry
    registry.load("a", make_adapter(1))
    pinned = registry.acquire("a")
    sink: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(make_request("r", max_tokens=900, adapter=pinned), sink.put)
    for _ in range(3):
        sink.get(timeout=30)
    worker.cancel("r")
    worker.cancel("r")
    assert collect(sink)[1] == "cancelled"
    done = threading.Event()
    worker.call(done.set)  # runs after the second cancellation
    assert sink.empty()
    assert worker.stats().num_finished == {"cancelled": 1}
    assert registry.num_pins(pinned) == 0
    assert not worker.engine.has_work


def test_what_cannot_be_taken_is_refused_before_any_event_and_unpinned(worker, make_adapter, make_request):
    registry = worker.engine.registry
    registry.load("a", make_adapter(1))
    seen: queue.SimpleQueue = queue.SimpleQueue()
    pinned = registry.acquire("a")
    with pytest.raises(ContextLengthError, match="maximum context length is 1024 tokens"):
        worker.submit(make_request("big", "x" * 1024, adapter=pinned), seen.put)
    assert registry.num_pins(pinned) == 0
    sinks = [queue.SimpleQueue() for _ in range(8)]
    for i, sink in enumerate(sinks):
        worker.submit(make_request(str(i), max_tokens=200), sink.put)
    with pytest.raises(OverloadedError, match="8 requests are running or waiting"):
        worker.submit(make_request("ninth"), seen.put)
    assert seen.empty()
    for i in range(8):
        worker.cancel(str(i))
    assert {collect(sink)[1] for sink in sinks} <= {"cancelled", "length"}


def start_streams(worker, make_request, names, **options) -> dict[str, queue.SimpleQueue]:
    """Requests that have each had a token."""
    sinks = {name: queue.SimpleQueue() for name in names}
    for name, sink in sinks.items():
        worker.submit(make_request(name, max_tokens=900, **options), sink.put)
    for sink in sinks.values():
        sink.get(timeout=30)
    return sinks


def test_after_a_failed_step_its_rows_are_told_and_the_engine_goes_on(
    worker, fresh_engine, make_adapter, make_request
):
    registry = worker.engine.registry
    registry.load("a", make_adapter(1))
    pinned = [registry.acquire("a") for _ in range(4)][-1]
    sinks = start_streams(worker, make_request, "0123", adapter=pinned)
    late: queue.SimpleQueue = queue.SimpleQueue()
    put_back = threading.Event()

    def sink_and_repair(event) -> None:
        """The first final event comes from the worker's own thread, between the failed step and the next."""
        if event.finish == "error" and not put_back.is_set():
            layer.weight = weight
            put_back.set()
        sinks["0"].put(event)

    layer = worker.engine.model.network.layers[1].input_layernorm
    weight = layer.weight
    worker.call(lambda: worker._open["0"].__setattr__("sink", sink_and_repair))
    worker.submit(make_request("late"), late.put)  # waits: all rows are taken
    worker.call(lambda: setattr(layer, "weight", None))
    assert [collect(sink)[1] for sink in sinks.values()] == ["error"] * 4
    assert collect(late)[0] == generate(fresh_engine(), [make_request("late")])[0].token_ids
    assert worker.failure is None
    assert registry.num_pins(pinned) == 0
    worker.engine.scheduler.check_integrity()


def test_at_the_second_failed_step_in_a_row_the_engine_gives_up_and_says_so(worker, make_request):
    sinks = start_streams(worker, make_request, "0123")
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(make_request("waiting"), waiting.put)
    layer = worker.engine.model.network.layers[1].input_layernorm
    worker.call(lambda: setattr(layer, "weight", None))
    assert [collect(sink)[1] for sink in [*sinks.values(), waiting]] == ["error"] * 5
    assert worker.failure is not None
    with pytest.raises(StoppedError, match="the engine has failed"):
        worker.submit(make_request("after"), queue.SimpleQueue().put)


def test_a_broken_scheduler_ends_every_stream_and_new_requests_are_told(worker, make_request):
    sinks = start_streams(worker, make_request, "01")

    def break_it() -> None:
        del worker.engine.scheduler.waiting

    worker.call(break_it)
    assert [collect(sink)[1] for sink in sinks.values()] == ["error", "error"]
    with pytest.raises(StoppedError, match="the engine has failed"):
        worker.submit(make_request("after"), queue.SimpleQueue().put)


def test_a_listener_that_raises_ends_its_own_request_alone(worker, fresh_engine, make_request):
    good: queue.SimpleQueue = queue.SimpleQueue()

    def bad(event) -> None:
        raise ZeroDivisionError

    worker.submit(make_request("bad", max_tokens=900), bad)
    worker.submit(make_request("good"), good.put)
    assert collect(good)[0] == generate(fresh_engine(), [make_request("good")])[0].token_ids
    assert worker.failure is None


def test_stopping_ends_open_requests_and_later_ones_are_refused(model, make_request):
    worker = Worker(Engine(model))
    worker.start()
    sink: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(make_request("r", max_tokens=900), sink.put)
    sink.get(timeout=30)
    worker.stop()
    assert collect(sink)[1] == "error"
    with pytest.raises(StoppedError, match="not running"):
        worker.submit(make_request("after"), sink.put)


def test_what_a_called_function_raises_is_raised_at_the_caller(worker):
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0)
    assert worker.failure is None
