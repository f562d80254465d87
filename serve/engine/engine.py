"""The engine: schedule → run → commit. No threads, no HTTP; whoever calls `step` owns the arrays."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from serve import device
from serve.adapters.bank import Bank
from serve.adapters.registry import Registry
from serve.cache.precision import PLAIN, KvPrecision
from serve.engine.finish import FinishRule
from serve.engine.plan import Drawn, SequenceState
from serve.engine.request import EngineStats, Event, MemoryUse, Request
from serve.engine.runner import Runner
from serve.engine.scheduler import Budget, Scheduler
from serve.errors import ConfigError, ContextLengthError, GenerationError, LatheError, RequestError
from serve.model.loading import LoadedModel
from serve.model.template_rules import TemplateRules
from serve.model.token_bytes import TokenBytes

logger = logging.getLogger(__name__)

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
    memory_budget_bytes: int | None = None
    """Rows, prefixes and adapters together."""
    kv_budget_bytes: int | None = None
    """None: 0.6 of the memory that is free when the engine is made."""
    prefix_cache_bytes: int | None = None
    """None: what rows leave; 0: no prefixes are kept."""
    prefix_cache_dir: Path | None = None
    prefix_cache_disk_bytes: int | None = None
    precision: KvPrecision = PLAIN
    """Of rows whose request names none."""
    ahead: bool | None = None
    """Build a step before the one before it is read; None: where the backend is not cpu."""
    adapter_budget_bytes: int | None = None
    """None: 0.2 of the memory that is free when the engine is made."""
    max_adapters: int = 64
    max_rank: int = 256
    allow_other_base: bool = False
    """Load adapters whose manifest names other base weights, or another tokenizer."""


class Engine:
    """One base model, its adapters, and the requests that run on them in one batch."""

    def __init__(
        self,
        model: LoadedModel,
        limits: EngineLimits = EngineLimits(),
        rules: TemplateRules = TemplateRules(),
    ) -> None:
        """`rules`: of chat templates, the base's and those that adapters bring."""
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
            rules=rules,
        )
        if device.backend() != "cpu":
            self.bank.warm_up(limits.prefill_chunk_tokens)
        self.token_bytes = TokenBytes(model.tokenizer)
        self._runner = Runner(model.network, self.bank)
        self.scheduler = Scheduler(self._budget(limits))
        self.max_context = min(
            limits.max_context or model.max_context, model.max_context, self.scheduler.budget.max_positions
        )
        """Tokens of prompt and answer together: what model, limits and memory allow one row."""
        if self.max_context < 2:
            raise ConfigError(
                f"{self.scheduler.budget.max_bytes} bytes for keys, values and states do not hold one row of two "
                f"tokens; raise kv_budget_gib"
            )
        self._rules: dict[str, FinishRule] = {}
        self._by_id: dict[str, SequenceState] = {}
        self._eos = frozenset(model.tokenizer.eos_token_ids)
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_finished: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return self.scheduler.has_work

    def check(self, request: Request) -> Request:
        """The request as it will run: `max_tokens` is what the context leaves, or less. Safe to call from any thread.

        The one admission check, for every caller. RequestError for an empty prompt or ids that are not in the
        vocabulary, ContextLengthError where the prompt leaves no room for an answer.
        """
        prompt, sampling = request.prompt.token_ids, request.sampling
        if not prompt:
            raise RequestError("the prompt is empty: there is nothing to continue", "prompt")
        outside = min(prompt) if min(prompt) < 0 else max(prompt)
        vocabulary = self.model.network.vocab_size
        if not 0 <= outside < vocabulary:
            raise RequestError(
                f"prompt: token id {outside} is not in this model's vocabulary of {vocabulary}", "prompt"
            )
        remaining = self.max_context - len(prompt)
        if remaining < 1:
            raise ContextLengthError(context_message(self.max_context, len(prompt)), "prompt")
        wanted = remaining if sampling.max_tokens is None else min(sampling.max_tokens, remaining)
        if wanted == sampling.max_tokens:
            return request
        return replace(request, sampling=replace(sampling, max_tokens=wanted))

    def add(self, request: Request) -> None:
        """Queue a request that `check` has returned."""
        assert request.id not in self._by_id, f"request {request.id} is already here"
        sequence = SequenceState(request)
        self._rules[request.id] = FinishRule(request, self.token_bytes, self._eos)
        self._by_id[request.id] = sequence
        self.scheduler.add(sequence)

    def cancel(self, request_id: str) -> Event | None:
        """Take a request out; its final event, or None if it had ended already."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return None
        self._forget([sequence])
        self._num_finished["cancelled"] += 1
        return Event(request_id, finish="cancelled")

    def step(self) -> list[Event]:
        """One forward for every running row. Returns what is new, in row order.

        What goes wrong with one row ends that row, by an error event. Only a forward that fails raises; then
        `recover` says whose it was.
        """
        plan = self.scheduler.schedule()
        drawn = self._runner.run(plan)
        self.scheduler.commit(plan, drawn)
        self._num_steps += 1
        self._num_prompt_tokens += sum(chunk.stop - chunk.start for chunk in plan.prefill)
        events = [self._event(one) for one in drawn]
        self._forget([self._by_id[event.request_id] for event in events if event.finish is not None])
        return events

    def recover(self, error: BaseException) -> list[Event]:
        """End every row that a failed step may have left in any state, and go on with an empty batch.

        Returns their final events. Requests that still wait for a row are untouched.
        """
        failure = GenerationError(f"a step of the engine has failed: {error!r}")
        running = self.scheduler.running
        events = [self._ended(sequence.request.id, failure) for sequence in running]
        self._forget(running)
        self._runner.reset()
        return events

    def stats(self) -> EngineStats:
        """A snapshot; counters are of the engine's life."""
        return EngineStats(
            num_decoding=len(self.scheduler.decoding),
            num_prefilling=len(self.scheduler.prefilling),
            num_waiting=len(self.scheduler.waiting),
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_steps=self._num_steps,
            num_preempted=self.scheduler.num_preempted,
            memory=MemoryUse(
                kv_bytes=self._runner.rows.num_bytes,
                adapter_bytes=self.bank.num_bytes,
                budget_bytes=self.scheduler.budget.max_bytes + self.registry.max_bytes,
            ),
            num_finished=dict(self._num_finished),
        )

    def _event(self, drawn: Drawn) -> Event:
        request = drawn.sequence.request
        if not drawn.is_sound:
            whose = f"adapter {request.adapter.id!r}" if request.adapter else f"model {self.model.name!r}"
            return self._ended(
                request.id, GenerationError(f"{whose} gave logits that are not numbers; nothing can be drawn")
            )
        try:
            step = self._rules[request.id].push(drawn.token_ids)
        except Exception as error:  # one row's text is one row's trouble, whatever it is
            logger.exception("the text of request %s cannot be read", request.id)
            return self._ended(request.id, GenerationError(f"the answer's text cannot be read: {error!r}"))
        self._num_generated_tokens += step.num_tokens
        if step.finish is not None:
            self._num_finished[step.finish] += 1
        return Event(
            request.id,
            text=step.text,
            token_ids=drawn.token_ids[: step.num_tokens],
            logprobs=drawn.logprobs[: step.num_tokens],
            finish=step.finish,
            stop_reason=step.stop_reason,
        )

    def _ended(self, request_id: str, error: LatheError) -> Event:
        self._num_finished["error"] += 1
        return Event(request_id, finish="error", error=error)

    def _forget(self, sequences: list[SequenceState]) -> None:
        self.scheduler.remove(sequences)
        for sequence in sequences:
            del self._by_id[sequence.request.id]
            del self._rules[sequence.request.id]
        if not self.scheduler.has_work:
            self._runner.rows.clear()

    def _budget(self, limits: EngineLimits) -> Budget:
        kv_bytes = limits.kv_budget_bytes
        if kv_bytes is None:
            kv_bytes = int(device.free_memory_bytes() * KV_SHARE_OF_FREE_MEMORY)
        return Budget(
            max_rows=limits.max_rows,
            prefill_chunk_tokens=limits.prefill_chunk_tokens,
            max_bytes=kv_bytes,
            row_cost=self._runner.probe(),
        )


def context_message(max_context: int, num_prompt_tokens: int) -> str:
    """In the words by which OpenAI's clients and litellm know an overlong prompt."""
    return (
        f"This model's maximum context length is {max_context} tokens. However, the prompt has {num_prompt_tokens} "
        f"tokens, which leaves no room for an answer. Please shorten it."
    )
