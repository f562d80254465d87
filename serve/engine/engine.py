"""The engine: schedule → run → commit. No threads, no HTTP; whoever calls `step` owns the arrays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from serve import device
from serve.adapters.bank import Bank
from serve.adapters.registry import Registry
from serve.engine.plan import Plan, Sequence
from serve.engine.request import EngineStats, Event, FinishReason, Request
from serve.engine.runner import Drawn, Runner
from serve.engine.scheduler import Budget, Scheduler
from serve.engine.text import TextStream
from serve.model.loading import LoadedModel

KV_SHARE_OF_FREE_MEMORY = 0.6
ADAPTER_SHARE_OF_FREE_MEMORY = 0.2


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of one engine."""

    max_rows: int = 64
    max_waiting: int = 256
    prefill_chunk_tokens: int = 256
    max_context: int | None = None
    """Tokens; None: what the model was made for."""
    kv_budget_bytes: int | None = None
    """None: 0.6 of the memory that is free when the engine is made."""
    adapter_budget_bytes: int | None = None
    """None: 0.2 of the memory that is free when the engine is made."""
    max_adapters: int = 64
    max_rank: int = 256
    allow_other_base: bool = False
    """Load adapters whose manifest names other base weights, or another tokenizer."""


class Engine:
    """One base model, its adapters, and the requests that run on them in one batch."""

    def __init__(self, model: LoadedModel, limits: EngineLimits = EngineLimits()) -> None:
        self.model = model
        self.limits = limits
        self.bank = Bank(model.network)
        self.registry = Registry(
            model,
            self.bank,
            max_bytes=limits.adapter_budget_bytes
            or int(device.free_memory_bytes() * ADAPTER_SHARE_OF_FREE_MEMORY),
            max_adapters=limits.max_adapters,
            max_rank=limits.max_rank,
            allow_other_base=limits.allow_other_base,
        )
        self._runner = Runner(model.network, self.bank)
        self.scheduler = Scheduler(self._budget(model, limits))
        self._texts: dict[str, TextStream] = {}
        self._by_id: dict[str, Sequence] = {}
        self._eos = frozenset(model.tokenizer.eos_token_ids)
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_finished: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return self.scheduler.has_work

    def check(self, request: Request) -> None:
        """Raise RequestError if the request could never run here. Safe to call from any thread."""
        self.scheduler.check(Sequence(request))

    def add(self, request: Request) -> None:
        """Queue a request. RequestError if it can never run, OverloadedError if the queue is full."""
        assert request.id not in self._by_id, f"request {request.id} is already here"
        sequence = Sequence(request)
        self.scheduler.add(sequence)
        self._by_id[request.id] = sequence
        self._texts[request.id] = TextStream(self.model.tokenizer, request.sampling.stop)

    def cancel(self, request_id: str) -> Event | None:
        """Take a request out; its final event, or None if it had ended already."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return None
        self._forget([sequence])
        self._num_finished["cancelled"] += 1
        return Event(request_id, finish="cancelled")

    def step(self) -> list[Event]:
        """One forward for every running row. Returns what is new, in row order."""
        plan = self.scheduler.schedule()
        drawn = self._runner.run(plan)
        self.scheduler.commit(plan)
        return self._commit(plan, drawn)

    def stats(self) -> EngineStats:
        """A snapshot; counters are of the engine's life."""
        return EngineStats(
            num_decoding=len(self.scheduler.decoding),
            num_prefilling=len(self.scheduler.prefilling),
            num_waiting=len(self.scheduler.waiting),
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_steps=self._num_steps,
            kv_bytes=self._runner.rows.num_bytes,
            num_finished=dict(self._num_finished),
        )

    def _commit(self, plan: Plan, drawn: list[Drawn]) -> list[Event]:
        self._num_steps += 1
        self._num_prompt_tokens += sum(chunk.stop - chunk.start for chunk in plan.prefill)
        self._num_generated_tokens += len(drawn)
        ended: list[Sequence] = []
        events: list[Event] = []
        for token in drawn:
            event = self._event(token)
            events.append(event)
            if event.finish is not None:
                ended.append(token.sequence)
                self._num_finished[event.finish] += 1
        self._forget(ended)
        return events

    def _event(self, drawn: Drawn) -> Event:
        sequence, token_id = drawn.sequence, drawn.token_id
        request = sequence.request
        sequence.generated.append(token_id)
        text = self._texts[request.id]
        finish: FinishReason | None = None
        if token_id in self._eos and not request.sampling.ignore_eos:
            piece, finish = text.finish(), "stop"
        else:
            piece = text.push(token_id)
            if text.is_stopped:
                finish = "stop"
            elif len(sequence.generated) >= request.sampling.max_tokens:
                piece, finish = piece + text.finish(), "length"
                finish = "stop" if text.is_stopped else finish
        logprobs = (drawn.logprob,) if drawn.logprob is not None else ()
        return Event(request.id, text=piece, token_ids=(token_id,), logprobs=logprobs, finish=finish)

    def _forget(self, sequences: list[Sequence]) -> None:
        self.scheduler.remove(sequences)
        for sequence in sequences:
            del self._by_id[sequence.request.id]
            del self._texts[sequence.request.id]
        if not self.scheduler.has_work:
            self._runner.rows.clear()

    def _budget(self, model: LoadedModel, limits: EngineLimits) -> Budget:
        kv_bytes = limits.kv_budget_bytes
        if kv_bytes is None:
            kv_bytes = int(device.free_memory_bytes() * KV_SHARE_OF_FREE_MEMORY)
        return Budget(
            max_rows=limits.max_rows,
            max_waiting=limits.max_waiting,
            prefill_chunk_tokens=limits.prefill_chunk_tokens,
            max_context=min(limits.max_context or model.max_context, model.max_context),
            max_bytes=kv_bytes,
            row_cost=self._runner.probe(),
        )
