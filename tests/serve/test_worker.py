"""The worker: one final event a request, whatever happens; hot loads beside running streams."""

from __future__ import annotations

import queue
import threading

import pytest

from serve.engine.engine import Engine, EngineLimits
from serve.engine.worker import Worker
from serve.errors import ContextLengthError, OverloadedError, StoppedError
from serve.model.loading import load


@pytest.fixture
def worker(model):
    worker = Worker(Engine(model, EngineLimits(max_rows=4, max_waiting=4)))
    worker.start()
    yield worker
    worker.stop()


def collect(events: queue.SimpleQueue) -> tuple[tuple[int, ...], str]:
    tokens: list[int] = []
    while True:
        event = events.get(timeout=120)
        tokens += event.token_ids
        if event.finish:
            return tuple(tokens), event.finish


def test_answers_are_the_models_own_and_end_once(worker, model_folder, make_request, assert_drawn):
    requests = [make_request(str(i), f"text {i}", max_tokens=10 + i) for i in range(6)]
    sinks = [queue.SimpleQueue() for _ in requests]
    for request, sink in zip(requests, sinks, strict=True):
        worker.submit(request, sink.put)
    module = load(str(model_folder)).network.module
    for request, sink in zip(requests, sinks, strict=True):
        tokens, finish = collect(sink)
        assert (len(tokens), finish) == (request.sampling.max_tokens, "length")
        assert_drawn(request, tokens, module)
        assert sink.empty()


def test_an_adapter_loads_while_a_stream_runs_and_the_stream_goes_on(
    worker, model_folder, make_adapter, make_request, merged, assert_drawn
):
    running: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(make_request("runs", max_tokens=300), running.put)
    first = [running.get(timeout=120) for _ in range(5)]
    worker.engine.registry.load("late", make_adapter(1))
    assert worker.stats().num_decoding == 1, "the stream must still be running"
    pinned = worker.engine.registry.acquire("late")
    late: queue.SimpleQueue = queue.SimpleQueue()
    request = make_request("late", adapter=pinned)
    worker.submit(request, late.put)
    tokens, _ = collect(late)
    rest, finish = collect(running)
    assert finish == "length"
    whole = (*(token for event in first for token in event.token_ids), *rest)
    assert len(whole) == 300
    base = load(str(model_folder)).network.module
    assert_drawn(make_request("runs"), whole, base)
    assert_drawn(request, tokens, merged(model_folder, make_adapter(1)))
    with pytest.raises(AssertionError):
        assert_drawn(request, tokens, base)
    assert worker.engine.registry.num_pins(pinned) == 0


def test_cancelling_ends_a_row_once_and_releases_its_adapter(worker, make_adapter, make_request):
    registry = worker.engine.registry
    registry.load("a", make_adapter(1))
    pinned = registry.acquire("a")
    sink: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(make_request("r", max_tokens=900, adapter=pinned), sink.put)
    for _ in range(3):
        sink.get(timeout=120)
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
    with pytest.raises(ContextLengthError):
        worker.submit(make_request("big", max_tokens=5000, adapter=pinned), seen.put)
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


@pytest.mark.parametrize("broken", ["forward", "scheduler"])
def test_a_failing_engine_reaches_every_stream_and_new_requests_are_told(worker, make_request, broken):
    sinks = [queue.SimpleQueue() for _ in range(2)]
    for i, sink in enumerate(sinks):
        worker.submit(make_request(str(i), max_tokens=900), sink.put)
    for sink in sinks:
        sink.get(timeout=120)

    def break_it() -> None:
        if broken == "forward":
            worker.engine.model.network.layers[1].self_attn.o_proj.weight = None
        else:
            del worker.engine.scheduler.waiting

    worker.call(break_it)
    assert [collect(sink)[1] for sink in sinks] == ["error", "error"]
    assert worker.failure is not None
    with pytest.raises(StoppedError, match="the engine has failed"):
        worker.submit(make_request("after"), queue.SimpleQueue().put)


def test_stopping_ends_open_requests_and_later_ones_are_refused(model, make_request):
    worker = Worker(Engine(model))
    worker.start()
    sink: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(make_request("r", max_tokens=900), sink.put)
    sink.get(timeout=120)
    worker.stop()
    assert collect(sink)[1] == "error"
    with pytest.raises(StoppedError, match="not running"):
        worker.submit(make_request("after"), sink.put)


def test_what_a_called_function_raises_is_raised_at_the_caller(worker):
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0)
    assert worker.failure is None
