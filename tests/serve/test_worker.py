"""The worker: one final event a request, whatever happens; hot loads beside running streams."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace

import mlx.core as mx
import psutil
import pytest

from serve import device
from serve.engine.worker import Worker
from serve.errors import (
    ContextLengthError,
    DeadlineError,
    OverloadedError,
    RequestError,
    StoppedError,
    TenantLimitError,
)
from serve.model.loading import load


@pytest.fixture
def worker(model, make_engine):
    worker = Worker(make_engine(model, max_rows=4, max_waiting=4))
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


@pytest.fixture
def gathering(worker, monkeypatch):
    """A worker whose engine has seen prompts take long; called with the seconds that it may wait for others."""
    for _ in range(2):
        worker.engine.pace.note(0, 100, 1000.0)

    def bound(gather_s: float) -> Worker:
        monkeypatch.setattr("serve.engine.engine.MAX_GATHER_S", gather_s)
        return worker

    return bound


def test_an_idle_engine_waits_for_who_is_about_to_come_and_computes_all_prompts_at_once(
    gathering, make_request
):
    worker = gathering(60.0)
    plans, schedule = [], worker.engine.scheduler.schedule
    worker.engine.scheduler.schedule = lambda *given: plans.append(schedule(*given)) or plans[-1]
    sinks = [queue.SimpleQueue() for _ in range(2)]
    with worker.expecting():
        worker.submit(make_request("first", max_tokens=5), sinks[0].put)
        time.sleep(0.2)
        assert worker.stats().num_steps == 0, "it has begun alone"
        with worker.expecting():
            pass  # one that is refused
        worker.submit(make_request("second", "more", max_tokens=5), sinks[1].put)
    assert [collect(sink)[1] for sink in sinks] == ["length", "length"]
    assert [len(plan.chunks) for plan in plans[:2]] == [2, 2], "one began later than the other"


def test_how_long_prompts_take_is_learned_where_their_beginning_is_known_too(worker, make_request):
    """Chats begin alike: each copies some tokens, which was taken for a step that says nothing."""
    for number in range(3):
        sink: queue.SimpleQueue = queue.SimpleQueue()
        worker.submit(make_request(str(number), f"alike {number} " + "words " * 8, max_tokens=3), sink.put)
        assert collect(sink)[1] == "length"
        if number == 0:
            worker.engine.pace._prefill.clear()
    assert worker.stats().prefixes.num_hits >= 2
    assert worker.engine.pace.prompts_s(10) is not None


def test_nobody_is_held_up_beside_running_rows_nor_for_longer_than_a_moment(gathering, make_request):
    worker = gathering(60.0)
    running: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(make_request("runs", max_tokens=900), running.put)
    running.get(timeout=120)
    with worker.expecting():
        beside: queue.SimpleQueue = queue.SimpleQueue()
        worker.submit(make_request("beside", max_tokens=2), beside.put)
        assert collect(beside)[1] == "length"
        assert worker.stats().num_decoding == 1, "the stream must still be running"
    worker.cancel("runs")
    assert collect(running)[1] == "cancelled"
    gathering(0.05)
    with worker.expecting():
        alone: queue.SimpleQueue = queue.SimpleQueue()
        worker.submit(make_request("alone", max_tokens=2), alone.put)
        assert collect(alone)[1] == "length"
        gathering(0.5)
        time.sleep(0.6)  # whoever is so slow is not waited for at all
        since_s = time.perf_counter()
        worker.submit(make_request("after", max_tokens=2), alone.put)
        assert collect(alone)[1] == "length"
        assert time.perf_counter() - since_s < 0.45


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
        sink.get(timeout=120)
    return sinks


def test_after_a_failed_step_its_rows_are_told_and_the_engine_goes_on(
    worker, model_folder, make_adapter, make_request, assert_drawn
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
    tokens, finish = collect(late)
    assert (len(tokens), finish) == (24, "length")
    assert worker.failure is None
    assert_drawn(make_request("late"), tokens, load(str(model_folder)).network.module)
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


def test_a_listener_that_raises_ends_its_own_request_alone(worker, model, make_request, assert_drawn):
    good: queue.SimpleQueue = queue.SimpleQueue()

    def bad(event) -> None:
        raise ZeroDivisionError

    worker.submit(make_request("bad", max_tokens=900), bad)
    worker.submit(make_request("good"), good.put)
    tokens, finish = collect(good)
    assert (len(tokens), finish) == (24, "length")
    worker.stop()
    assert_drawn(make_request("good"), tokens, model.network.module)
    assert worker.failure is None


def test_stopping_ends_open_requests_and_later_ones_are_refused(model, make_engine, make_request):
    worker = Worker(make_engine(model))
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


def test_one_tenant_cannot_fill_the_queue(model, make_engine, make_request):
    worker = Worker(make_engine(model, max_rows=2, max_waiting=6, max_tenant_requests=3))
    worker.start()
    sinks = {str(number): queue.SimpleQueue() for number in range(5)}
    asked = [replace(make_request(name, max_tokens=300), tenant="much") for name in ("0", "1", "2")]
    worker.submit_all(asked, [sinks[request.id].put for request in asked])
    for tenant in ("much", "other"):
        request = replace(make_request("3", max_tokens=300), tenant=tenant)
        if tenant == "much":
            with pytest.raises(TenantLimitError, match="3 requests of tenant 'much' are running or waiting"):
                worker.submit(request, sinks["3"].put)
        else:
            worker.submit(request, sinks["3"].put)
    with pytest.raises(RequestError, match="tenant 'n' may have 3 at most"):
        worker.submit_all(
            [replace(make_request(f"n{i}"), tenant="n") for i in range(4)], [sinks["3"].put] * 4
        )
    worker.cancel("0")
    assert collect(sinks["0"])[1] == "cancelled"
    worker.submit(replace(make_request("4"), tenant="much"), sinks["4"].put)
    assert {collect(sinks[name])[1] for name in "1234"} == {"length"}
    worker.stop()
    assert not worker._num_of_tenant, "who has ended is counted"


def test_a_worker_with_nothing_to_run_wakes_up_for_a_deadline(worker, make_request):
    """A request that waits for an adapter which nobody loads: no step runs, and no command comes."""
    scheduler = worker.engine.scheduler
    sink: queue.SimpleQueue = queue.SimpleQueue()
    never = NeverThere()
    worker.call(lambda: setattr(scheduler, "_adapters", never))
    worker.submit(replace(make_request("late"), deadline_s=time.monotonic() + 0.5), sink.put)
    event = sink.get(timeout=120)
    assert isinstance(event.error, DeadlineError)
    assert never.num_asked == 1, "it was asked again and again meanwhile"


def test_an_engine_that_has_failed_sleeps_though_deadlines_pass(model, make_engine, make_request):
    """Whoever has set one has been told already, and nothing takes it out of the engine any more."""
    worker = Worker(make_engine(model))
    engine = worker.engine
    engine.add(engine.check(replace(make_request("told"), deadline_s=time.monotonic() + 60)))
    engine._deadlines = [(time.monotonic(), "told")]
    worker.failure = RuntimeError("two steps have failed")
    is_asked = threading.Event()
    threading.Timer(0.2, worker._commands.put, [is_asked.set]).start()
    worker._do_commands(wait=True)
    assert is_asked.is_set(), "its thread spins"


class NeverThere:
    """No adapter is there, and none comes."""

    num_asked = 0

    def hold(self, sequence) -> bool:
        self.num_asked += 1
        return False

    def let_go(self, sequence) -> None:
        raise AssertionError("nothing was held")


@pytest.mark.skipif(not device.keep_freed_memory(), reason="this machine's malloc keeps nothing for us")
def test_memory_that_steps_leave_goes_back_once_nobody_asks_for_a_while(model, make_engine, make_request):
    def resident() -> int:
        return psutil.Process().memory_info().rss

    worker = Worker(make_engine(model, max_rows=4, max_waiting=4), idle_s=0.05)
    worker.start()
    try:
        worker.call(lambda: mx.eval([mx.ones((2500, 4000)) + i for i in range(8)]))  # 320 MB
        held, sink = resident(), queue.SimpleQueue()
        worker.submit(make_request("r", max_tokens=4), sink.put)
        collect(sink)
        end_s = time.monotonic() + 60
        while resident() > held - 200_000_000:
            assert time.monotonic() < end_s, "it is kept"
    finally:
        worker.stop()
