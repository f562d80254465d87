"""The one thread that owns the arrays. Requests come in from any thread, events go out to whoever asked.

Exactly one final event ends each request: finished, cancelled, or failed. A step that raises fails the requests
that have a row, and the engine goes on with an empty batch; at the second step in a row that raises it gives up: all
open requests fail, and the worker then refuses new ones and says why (`failure`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from serve import device
from serve.adapters.versions.version import AdapterVersion
from serve.engine.arrivals import ARRIVALS
from serve.engine.engine import Engine
from serve.engine.request import EngineStats, Event, Request
from serve.errors import (
    GenerationError,
    LatheError,
    OverloadedError,
    RequestError,
    StoppedError,
    TenantLimitError,
)

logger = logging.getLogger(__name__)

Sink = Callable[[Event], None]
STOP_TIMEOUT_S = 30.0
IDLE_S = 10.0
FIRST_TOKEN_S = 0.002
"""How long a step that has brought answers' first tokens leaves the interpreter's lock to whoever sends them. The
next step's graph would else be built first, which holds it for milliseconds."""
LOOK_S = 0.001
"""How often whoever waits for others looks whether they still come."""
TURNS_TO_SEND = 2
"""Of an asyncio loop, after which a first token has been sent."""
NUM_LOADERS = 4
"""Threads that bring adapters to the device: one that waits for a slow disk holds up no other."""


@dataclass
class _Open:
    """A request that has not ended, and where its events go. Its prompt is the engine's alone."""

    id: str
    adapter: AdapterVersion | None
    sink: Sink
    tenant: str
    loop: asyncio.AbstractEventLoop | None = None
    """Set when `sink` must run on that loop."""
    has_begun: bool = False
    """It has had a token."""


class Worker:
    """Runs an Engine. `start` before use, `stop` after; both once."""

    def __init__(self, engine: Engine, *, idle_s: float = IDLE_S) -> None:
        """idle_s: without a step for so long, memory that waits for the next one goes back to the system."""
        self.engine = engine
        self._idle_s = idle_s
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open: dict[str, _Open] = {}  # the worker's thread alone
        self._lock = threading.Lock()  # guards what follows
        self._num_open = 0
        self._num_of_tenant: Counter[str] = Counter()
        self._coming: dict[object, float] = {}  # since when, by time.monotonic
        self._is_accepting = False
        self._reason = ""
        self._has_just_failed = False  # the worker's thread alone
        self._has_run = False  # so too: since memory was given back
        self._stopping = False
        self._loaders = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="lathe-adapters")
        self._thread = threading.Thread(target=self._run, name="lathe-engine", daemon=True)

    def start(self) -> None:
        """Take over the engine's arrays."""
        self._is_accepting = True
        registry = self.engine.registry
        registry.run = self.call
        registry.post = self._commands.put
        self._thread.start()
        wake = self.engine.scheduler.wake
        registry.residency.use_loaders(self._loaders.submit, lambda: self._commands.put(wake))

    def stop(self, reason: str = "the server is shutting down") -> None:
        """Fail what is open, for that reason, end the thread, and wait for it: a running thread at interpreter exit
        would abort it."""
        with self._lock:
            self._is_accepting = False
            self._reason = reason
            self._commands.put(self._stop)
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        self._loaders.shutdown(cancel_futures=True)

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Inside the block somebody makes a request ready. Where nothing runs, those that are here wait for it a
        moment (`Engine.gather_s`): a burst's prompts are then computed together, and none of its answers is held up
        by another's prompt. Who takes longer than such a moment is not waited for."""
        one = object()
        with self._lock:
            self._coming[one] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._coming[one]

    @property
    def is_idle(self) -> bool:
        """Nobody runs or waits."""
        return not self._num_open

    @property
    def num_coming(self) -> int:
        """Requests that are being made ready."""
        return len(self._coming)

    def submit(self, request: Request, sink: Sink, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Queue a request; as `submit_all`, of one."""
        self.submit_all([request], [sink], loop)

    def submit_all(
        self,
        requests: Sequence[Request],
        sinks: Sequence[Sink],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Queue all requests or none; each one's sink gets its events, on the worker's thread or on `loop`.

        Raises RequestError, OverloadedError or StoppedError, and then no event follows and the adapters' pins have
        been released. Otherwise the worker releases each with its final event.
        """
        try:
            checked = [self.engine.check(request) for request in requests]
            self._enter(
                checked,
                [
                    _Open(each.id, each.adapter, sink, each.tenant, loop)
                    for each, sink in zip(checked, sinks, strict=True)
                ],
            )
        except LatheError:
            for request in requests:
                self._release(request.adapter)
            raise

    def cancel(self, request_id: str) -> None:
        """End a request; its final event is `cancelled`, unless it ended first. Unknown ids do nothing."""
        self._commands.put(lambda: self._cancel(request_id))

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the worker's thread between two steps and wait for it; what it raises is raised here."""
        if threading.current_thread() is self._thread:
            function()
            return
        if self.failure is not None or not self._thread.is_alive():
            raise self._stopped()
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._commands.put(lambda: done.put(self._outcome(function)))
        while True:
            try:
                outcome = done.get(timeout=1.0)
                break
            except queue.Empty:
                if not self._thread.is_alive():
                    raise self._stopped() from None
        if outcome is not None:
            raise outcome

    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters; may be one step old."""
        return self.engine.stats()

    def _enter(self, requests: Sequence[Request], opened: Sequence[_Open]) -> None:
        """The one check of how many requests there are."""
        limits = self.engine.limits
        room = limits.max_rows + limits.max_waiting
        if len(opened) > room:
            raise RequestError(
                f"n: this asks for {len(opened)} answers at once; this server takes {room} at most", "n"
            )
        with self._lock:
            if not self._is_accepting or self.failure is not None:
                raise self._stopped()
            if self._num_open + len(opened) > room:
                raise OverloadedError(
                    f"{self._num_open} requests are running or waiting; this server takes {room} at most"
                )
            self._check_tenant(opened)
            self._num_open += len(opened)
            self._num_of_tenant[opened[0].tenant] += len(opened)
            # Under the lock, so that nothing is queued behind `_stop`.
            self._commands.put(lambda: self._admit(requests, opened))

    def _check_tenant(self, opened: Sequence[_Open]) -> None:
        """One tenant's bound; those who send no name are one too."""
        most, tenant = self.engine.limits.max_tenant_requests, opened[0].tenant
        now = self._num_of_tenant[tenant]
        if most is None or now + len(opened) <= most:
            return
        whose = f"tenant {tenant!r}" if tenant else "requests without a tenant"
        if len(opened) > most:
            raise RequestError(
                f"n: this asks for {len(opened)} answers at once; {whose} may have {most} at most, by "
                f"max_tenant_requests",
                "n",
            )
        raise TenantLimitError(
            f"{now} requests of {whose} are running or waiting; this server takes {most} of a tenant at most"
        )

    def _stopped(self) -> StoppedError:
        if self.failure is not None:
            return StoppedError(f"the engine has failed: {self.failure!r}")
        return StoppedError("the engine is not running")

    def _release(self, adapter: AdapterVersion | None) -> None:
        if adapter is not None:
            self.engine.registry.release(adapter)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception as error:  # whatever it is, every open request must hear of it
                logger.exception("the engine has failed")
                self._give_up(error)
        self._end_all(StoppedError(self._reason))

    def _turn(self) -> None:
        """What was asked meanwhile, then one step. Waits for something to do where there is nothing."""
        self._do_commands(wait=not self._can_step())
        self._gather()
        if self._can_step() and not self._stopping:
            self._deliver(self._step())

    def _gather(self) -> None:
        """Where nobody runs, wait a moment for those that are about to come."""
        start_s = time.monotonic()
        while (self._coming or ARRIVALS) and self._can_step() and not self._stopping:
            gather_s = self.engine.gather_s
            with self._lock:
                youngest_s = max(self._coming.values(), default=-math.inf)
            until_s = max(youngest_s + gather_s, ARRIVALS.until_s)
            left_s = min(start_s + gather_s, until_s) - time.monotonic()
            if left_s <= 0:
                break
            with suppress(queue.Empty):
                self._commands.get(timeout=min(left_s, LOOK_S))()
        self._do_commands(wait=False)  # who comes no more has come before

    def _step(self) -> list[Event]:
        self._has_run = True
        try:
            events = self.engine.step()
        except Exception as error:
            if self._has_just_failed:
                raise
            logger.exception("a step has failed; going on with an empty batch")
            self._has_just_failed = True
            return self.engine.recover(error)
        self._has_just_failed = False
        return events

    def _can_step(self) -> bool:
        return self.failure is None and self.engine.can_step

    def _give_up(self, error: BaseException) -> None:
        with self._lock:
            self.failure = error
        self._end_all(self._stopped())

    def _end_all(self, reason: LatheError) -> None:
        self._deliver([Event(request_id, finish="error", error=reason) for request_id in self._open])

    def _outcome(self, function: Callable[[], None]) -> BaseException | None:
        """What a caller's function raised, if anything. Room for what it took is made before it ends."""
        try:
            function()
            self.engine.make_room()
        except Exception as error:  # handed to the caller's thread
            return error
        return None

    def _do_commands(self, *, wait: bool) -> None:
        if wait:
            # Until something is asked, or somebody's time is up whom nobody has told.
            sleep_s = self.engine.sleep_s if self.failure is None else None
            is_to_tidy = sleep_s is None and self._has_run
            try:
                self._commands.get(timeout=self._idle_s if is_to_tidy else sleep_s)()
            except queue.Empty:
                if is_to_tidy:
                    self._has_run = False
                    device.give_back_freed_memory()
                return
        for _ in range(self._commands.qsize()):  # what comes meanwhile waits: a step is due
            self._commands.get()()

    def _admit(self, requests: Sequence[Request], opened: Sequence[_Open]) -> None:
        for one in opened:
            self._open[one.id] = one
        if self.failure is not None:
            reason = self._stopped()
            self._deliver([Event(one.id, finish="error", error=reason) for one in opened])
            return
        for request in requests:
            try:
                self.engine.add(request)
            except Exception as error:  # one request's trouble is its own
                logger.exception("request %s cannot be added", request.id)
                failure = GenerationError(f"the request cannot be run: {error!r}")
                self._deliver([Event(request.id, finish="error", error=failure)])

    def _cancel(self, request_id: str) -> None:
        event = self.engine.cancel(request_id)
        if event is not None:
            self._deliver([event])

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(self, events: list[Event]) -> None:
        """Each event to its sink; those of one asyncio loop together, since waking a loop costs a system call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Sink, Event]]] = {}
        waited: set[asyncio.AbstractEventLoop] = set()  # for
        for event in events:
            opened = self._open[event.request_id]
            if event.token_ids and not opened.has_begun and opened.loop is not None:
                opened.has_begun = True
                waited.add(opened.loop)
            if event.finish is not None:
                self._close(opened)
            if opened.loop is None:
                self._hand_over(opened.sink, event)
            else:
                by_loop.setdefault(opened.loop, []).append((opened.sink, event))
        for loop, batch in by_loop.items():
            sent = threading.Event() if loop in waited else None
            try:
                loop.call_soon_threadsafe(_put_all, batch, sent)
                if sent is not None:
                    sent.wait(FIRST_TOKEN_S)
            except RuntimeError:  # the loop is closed: nobody listens any more
                for _, event in batch:
                    self.cancel(event.request_id)

    def _hand_over(self, sink: Sink, event: Event) -> None:
        try:
            sink(event)
        except Exception:  # a listener's fault is not the engine's, nor its neighbours'
            logger.exception("the listener of request %s has failed", event.request_id)
            self.cancel(event.request_id)

    def _close(self, opened: _Open) -> None:
        del self._open[opened.id]
        self._release(opened.adapter)
        with self._lock:
            self._num_open -= 1
            self._num_of_tenant[opened.tenant] -= 1
            if not self._num_of_tenant[opened.tenant]:
                del self._num_of_tenant[opened.tenant]


def _put_all(batch: list[tuple[Sink, Event]], sent: threading.Event | None) -> None:
    for sink, event in batch:
        sink(event)
    if sent is not None:
        _turn_round(asyncio.get_running_loop(), TURNS_TO_SEND, sent)


def _turn_round(loop: asyncio.AbstractEventLoop, turns: int, sent: threading.Event) -> None:
    if turns:
        loop.call_soon(_turn_round, loop, turns - 1, sent)
    else:
        sent.set()
