"""The engine: schedule → run → commit. No threads, no HTTP; whoever calls `step` owns the arrays."""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from serve import device
from serve.adapters.bank.bank import Bank
from serve.adapters.registry.registry import Registry
from serve.adapters.versions.version import AdapterVersion
from serve.cache.capacity import MAX_REMEMBERED
from serve.cache.precision import KvPrecision
from serve.cache.stats import FeatureStats, PrefixStats
from serve.constraints.after_thoughts import grammar_edit
from serve.engine.budget import Budget
from serve.engine.drafts import Drafter, Reader
from serve.engine.edits import make_edit
from serve.engine.features import SequenceFeatures
from serve.engine.finish import FinishRule
from serve.engine.gains import Gains
from serve.engine.guesses import Guesses
from serve.engine.limits import EngineLimits as EngineLimits
from serve.engine.limits import MemoryBudget
from serve.engine.pace import Pace
from serve.engine.plan import Drawn, Plan, SequenceState
from serve.engine.prefixes import SequencePrefixes
from serve.engine.request import EngineStats, Event, MemoryUse, Progress, Request
from serve.engine.runner import Captured, Flight, Runner
from serve.engine.scheduler import Scheduler
from serve.engine.sights import Sights
from serve.errors import (
    ConfigError,
    ContextLengthError,
    DeadlineError,
    GenerationError,
    LatheError,
    RequestError,
)
from serve.model.loading import LoadedModel
from serve.model.prompt import Prompt
from serve.model.template_rules import TemplateRules
from serve.model.token_bytes import TokenBytes

logger = logging.getLogger(__name__)

NO_DRAFTERS: Mapping[str, Drafter] = MappingProxyType({})
LITTLE_COPIED = 4
"""Tokens of rows that are copied in a step, for each that it computes of prompts: to copy one takes a hundredth of
what it takes to compute one."""
MAX_GATHER_S = 0.05
"""However long the prompts are that wait: it is what bursts are made ready in."""


class Engine:
    """One base model, its adapters, and the requests that run on them in one batch."""

    def __init__(
        self,
        model: LoadedModel,
        limits: EngineLimits = EngineLimits(),
        rules: TemplateRules = TemplateRules(),
        drafters: Mapping[str, Drafter] = NO_DRAFTERS,
        drafter: str | None = None,
        gains: Gains | None = None,
    ) -> None:
        """`rules`: of chat templates, the base's and those that adapters bring. `drafters`: by the name by which
        requests choose one; `drafter`: of those that name none; `gains`: None: learned as steps run."""
        self.model = model
        self.limits = limits
        self.memory = MemoryBudget.of(limits)
        self.bank = Bank(model.network)
        self.registry = Registry(
            model,
            self.bank,
            max_bytes=self.memory.adapters,
            host_bytes=self.memory.host,
            file_bytes=limits.adapter_file_bytes,
            max_slots=limits.max_adapters,
            max_others=limits.adapter_versions,
            max_rank=limits.max_rank,
            allow_other_base=limits.allow_other_base,
            rules=rules,
        )
        on_cpu = device.backend() == "cpu"
        if not on_cpu:
            self.bank.warm_up(limits.prefill_chunk_tokens)
        self.token_bytes = TokenBytes(model.tokenizer)
        self._ahead = limits.ahead if limits.ahead is not None else not on_cpu
        self.features = SequenceFeatures.make(limits, self.memory.kv, model) if model.vision else None
        """None for a text model."""
        self._runner = Runner(
            model.network,
            self.bank,
            Sights(model.vision, self.features) if model.vision and self.features else None,
            readers=[each for each in drafters.values() if isinstance(each, Reader)],
            row_chunk_tokens=limits.window_chunk_tokens,
            ahead=self._ahead,
        )
        cost = self._runner.rows.cost
        gains = gains or Gains(reruns=self._runner.rows.has_states)
        self.guesses = Guesses(drafters, drafter, gains, ahead=self._ahead)
        self.pace = Pace(None if limits.max_gap_ms is None else limits.max_gap_ms / 1000)
        budget = Budget(
            max_rows=limits.max_rows,
            prefill_chunk_tokens=limits.prefill_chunk_tokens,
            max_bytes=self._max_row_bytes(self.memory.adapters, self.memory.host or 0),
            row_cost=cost,
            encode_patches=limits.encode_patches,
            row_chunk_tokens=limits.row_chunk(has_windows=cost.has_windows, on_cpu=on_cpu),
        )
        self.prefixes = SequencePrefixes.make(limits, self.memory.kv, model, self._runner.rows)
        """None where the limits want none."""
        self.scheduler = Scheduler(
            budget, self.prefixes, self.features, self.registry.residency, self.pace, limits.make_shares()
        )
        self.registry.residency.wake = self.scheduler.wake
        self._max_contexts: dict[KvPrecision, int] = {}
        self.max_context = self.max_context_at(limits.precision)
        """Tokens of prompt and answer together: what model, limits and memory allow one row."""
        if self.max_context < 2:
            raise ConfigError(
                f"{self.scheduler.budget.max_bytes} bytes for keys, values and states do not hold one row of two "
                f"tokens; raise memory_budget_gib or kv_budget_gib"
            )
        self._rules: dict[str, FinishRule] = {}
        self._by_id: dict[str, SequenceState] = {}
        self._flights: deque[Flight] = deque()  # steps that have been started and not read
        self._events: list[Event] = []  # what the step that runs has found so far
        self._eos = frozenset(model.tokenizer.eos_token_ids)
        self._newline = self.token_bytes.ids_of("\n")  # XTC spares it
        self._deadlines: list[tuple[float, str]] = []  # a heap; those that have ended stay until they come up
        self._landed_s = 0.0  # when the last step was read
        self._num_adapter_changes = (-1, -1)
        self._kv_bytes = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_finished: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs, or a step is to be read."""
        return self.scheduler.has_work or bool(self._flights)

    @property
    def can_step(self) -> bool:
        """Whether `step` has anything to do: False while all that is open waits for adapters on their way."""
        if self._flights or (self.scheduler.has_work and not self.scheduler.is_asleep):
            return True
        return self.sleep_s == 0

    @property
    def gather_s(self) -> float:
        """How long those that wait may be held back for requests that are about to come: as long as it would take to
        compute their prompts, which is what others would wait for otherwise; 0 while any row runs."""
        if self._flights or self.scheduler.running:
            return 0.0
        took_s = self.pace.prompts_s(sum(each.num_tokens for each in self.scheduler.waiting))
        return min(took_s, MAX_GATHER_S) if took_s is not None else 0.0

    @property
    def sleep_s(self) -> float | None:
        """Seconds until some request's deadline has passed; None where none has one."""
        while self._deadlines and self._deadlines[0][1] not in self._by_id:
            heapq.heappop(self._deadlines)
        return max(self._deadlines[0][0] - time.monotonic(), 0.0) if self._deadlines else None

    def max_context_at(self, precision: KvPrecision) -> int:
        """Tokens of prompt and answer together that a row of this precision may have. Safe to call from any thread.

        RequestError where this model's keys and values cannot be stored so.
        """
        found = self._max_contexts.get(precision)
        if found is None:
            self._runner.rows.check(precision)
            budget, limits = self.scheduler.budget, self.limits
            found = min(
                limits.max_context or self.model.max_context,
                self.model.max_context,
                budget.row_cost.max_positions(budget.max_bytes, precision),
            )
            if len(self._max_contexts) >= MAX_REMEMBERED:
                self._max_contexts.clear()
            self._max_contexts[precision] = found
        return found

    def check(self, request: Request) -> Request:
        """The request as it will run: with a precision, and `max_tokens` what the context leaves, or less.

        Safe to call from any thread.

        The one admission check, for every caller. RequestError for an empty prompt, ids that are not in the
        vocabulary, or media that this model does not take; ContextLengthError where the prompt leaves no room for an
        answer.
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
        request = replace(request, prompt=self._with_blocks(request.prompt))
        self._check_media(request.prompt)
        precision = request.precision or self.limits.precision
        max_context = self.max_context_at(precision)
        if request.deadline_s is not None and request.deadline_s <= time.monotonic():
            raise DeadlineError("timeout: the time that the request has set has passed before it was queued")
        self._check_tokens(request)
        self.guesses.check(request)
        remaining = max_context - len(prompt)
        if remaining < 1:
            raise ContextLengthError(context_message(max_context, len(prompt)), "prompt")
        wanted = remaining if sampling.max_tokens is None else min(sampling.max_tokens, remaining)
        if wanted != sampling.max_tokens:
            sampling = replace(sampling, max_tokens=wanted)
        if sampling.xtc_probability and not sampling.xtc_special_tokens:
            ends = (*self._eos, *request.all_stop_ids, *sampling.stop_token_ids)
            sampling = replace(sampling, xtc_special_tokens=tuple({*self._newline, *ends}))
        return replace(request, sampling=sampling, precision=precision)

    def _with_blocks(self, prompt: Prompt) -> Prompt:
        """A prompt of words knows of no model; of some families its tokens see one another all the same."""
        if self.model.vision is None or prompt.blocks or prompt.media:
            return prompt
        blocks = self.model.vision.blocks(prompt.token_ids, ())
        return replace(prompt, blocks=blocks) if blocks else prompt

    def _check_tokens(self, request: Request) -> None:
        """RequestError for a token that is named and is not in the vocabulary."""
        vocabulary, sampling = self.model.network.vocab_size, request.sampling
        biased = [token_id for token_id, _ in sampling.logit_bias]
        for name, ids in (("logit_bias", biased), ("stop_token_ids", sampling.stop_token_ids)):
            for token_id in ids:
                if not 0 <= token_id < vocabulary:
                    raise RequestError(
                        f"{name}: token id {token_id} is not in this model's vocabulary of {vocabulary}", name
                    )

    def _check_media(self, prompt: Prompt) -> None:
        """RequestError for what the network cannot be told, or not in one step."""
        kinds = self.model.vision.kinds if self.model.vision else frozenset()
        for media in prompt.media:
            if media.kind not in kinds:
                taken = f"; it takes {', '.join(sorted(kinds))}" if kinds else "; it takes text alone"
                raise RequestError(f"{self.model.name} takes no {media.kind}{taken}", "prompt")
            assert 0 <= media.start < media.stop <= len(prompt.token_ids), "placeholders outside the prompt"
        # Sounds stand one token behind the other, as words do.
        if self.model.network.takes_positions and any(media.kind != "audio" for media in prompt.media):
            assert prompt.rope is not None, "this family's media have positions"
        longest = max((stop - start for start, stop in prompt.blocks), default=0)
        most = self.limits.window_chunk_tokens
        if self.scheduler.budget.row_cost.has_windows and longest > most:
            raise RequestError(
                f"{longest} tokens of the prompt see one another and are computed in one step; this server takes "
                f"{most} at most, by row_chunk_tokens",
                "prompt",
            )

    def add(self, request: Request) -> None:
        """Queue a request that `check` has returned."""
        assert request.id not in self._by_id, f"request {request.id} is already here"
        tokens = self.token_bytes.showing(request.shown_ids)
        rule = self._rules[request.id] = FinishRule(request, tokens, self._eos)
        others = []
        if request.grammar is not None:
            rule.whole = grammar_edit(request, rule.ends, tokens)
            others.append(rule.whole)
        sequence = SequenceState(request, edit=make_edit(request, rule.ends, tokens, *others))
        self.guesses.begin(sequence)
        self._by_id[request.id] = sequence
        self.scheduler.add(sequence)
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.id))

    def cancel(self, request_id: str) -> Event | None:
        """Take a request out; its final event, or None if it had ended already."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return None
        self._num_finished["cancelled"] += 1  # before its row is free, for whoever reads of it meanwhile
        self._forget([sequence])
        return Event(request_id, finish="cancelled", num_cached_tokens=sequence.num_restored_tokens or 0)

    def step(self) -> list[Event]:
        """One forward for every running row. Returns what is new, in the order of the batch.

        One step ahead, the step that is started here is read by the next call, and what is returned is of the one
        before. What goes wrong with one row ends that row, by an error event. Only a forward that fails raises; then
        `recover` says whose it was.
        """
        self.registry.residency.catch_up()
        self._expire()
        drafts = self._drafts()
        plan = self._planned(drafts)
        if not plan.is_empty:
            flight = self._start(plan)
            self._flights.append(flight)
            self._num_steps += 1
            self._see(flight)
        self._refuse()
        is_last = plan.is_empty or not self.scheduler.has_work or plan.width > 1
        while self._flights and (len(self._flights) > self._ahead or is_last):
            self._land(self._flights.popleft())
            is_last |= not self.scheduler.has_work
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _drafts(self) -> dict[SequenceState, Sequence[int]]:
        """Guesses for the next step, most often none. What they follow must be known: steps that are not read are
        read first."""
        count = self.guesses.num_wanted(self.scheduler.decoding)
        if not count:
            return {}
        while self._flights:
            self._land(self._flights.popleft())
        decoding = self.scheduler.decoding
        ends = {one.request.id: self._rules[one.request.id].ends for one in decoding}
        return self.guesses.propose(decoding, ends, count)

    def _start(self, plan: Plan) -> Flight:
        """A step on its way. What it takes from prefixes is the graph's from then on, or nobody's."""
        try:
            return self._runner.start(plan)
        finally:
            for restore in plan.restores:
                assert self.prefixes is not None
                self.prefixes.release(restore.prefix)

    def _expire(self) -> None:
        """Whose deadline has passed, ends here, whether it has a row or waits for one."""
        late: list[SequenceState] = []
        while self.sleep_s == 0:
            late.append(self._by_id.pop(heapq.heappop(self._deadlines)[1]))
        self._by_id |= {sequence.request.id: sequence for sequence in late}
        self._events += [self._ended(sequence, _late(sequence)) for sequence in late]
        if late:
            self._forget(late)

    def _refuse(self) -> None:
        """Whose adapter cannot come, ends here: each with its own error."""
        failed = self.scheduler.take_failed()
        self._events += [self._ended(sequence, error) for sequence, error in failed]
        if failed:
            self._forget([sequence for sequence, _ in failed])

    def _see(self, flight: Flight) -> None:
        """What a started step encodes is at hand for the next; whose picture could not be, ends here."""
        for one in flight.encoded:
            assert self.features is not None
            if self._by_id.get(one.encode.sequence.request.id) is not one.encode.sequence:
                continue  # another of its pictures has ended it
            if one.error is None:
                self.features.begin(one.encode, one.features)
            else:
                self._blind(one.encode.sequence, one.encode.number, repr(one.error))

    def _settle(self, flight: Flight) -> None:
        """What a step has encoded is kept; whose picture is not made of numbers, ends here."""
        assert self.features is not None
        for one in flight.encoded:
            if one.error is not None:
                continue
            key = one.encode.sequence.feature_key(one.encode.number)
            assert one.is_sound is not None
            if one.is_sound.item():
                self.features.finish(key, one.features)
                continue
            for sequence, number in self.features.fail(key):
                if self._by_id.get(sequence.request.id) is sequence:
                    self._blind(sequence, number, "what it becomes are not numbers")
        flight.encoded.clear()
        for sequence in {chunk.sequence for chunk in flight.plan.chunks} if flight.plan.num_prefilled else ():
            if self._by_id.get(sequence.request.id) is sequence:
                self.features.take_in(sequence, sequence.num_cached_tokens)

    def _blind(self, sequence: SequenceState, number: int, reason: str) -> None:
        """The end of a row whose picture cannot be encoded."""
        media = sequence.request.prompt.media
        error = GenerationError(
            f"{media[number].kind} {number + 1} of {len(media)} in the prompt cannot be encoded: {reason}"
        )
        self._events.append(self._ended(sequence, error))
        self._forget([sequence], is_sound=False)

    def make_room(self) -> None:
        """Where adapters have come or gone, prefixes and coming rows have what these leave. Between two steps."""
        num_changes = (self.bank.num_changes, self.registry.contents.shelf.num_changes)
        if self._num_adapter_changes == num_changes:
            return
        self._num_adapter_changes = num_changes
        self.scheduler.max_bytes = self._max_row_bytes(self.bank.num_bytes, self.registry.host_bytes)
        self._share(self.scheduler.max_bytes - self._kv_bytes)

    def _max_row_bytes(self, adapter_bytes: int, host_bytes: int) -> int:
        """What rows, prefixes and features may take beside adapters of that size, and what drafters hold."""
        return max(self.memory.max_row_bytes(adapter_bytes, host_bytes) - self.guesses.max_bytes, 0)

    def _planned(self, drafts: Mapping[SequenceState, Sequence[int]]) -> Plan:
        """The next step, and prefixes within what its rows leave them."""
        self.make_room()
        allowed = self.scheduler.max_bytes
        plan = self.scheduler.schedule(drafts)
        self._kv_bytes = plan.num_bytes
        self._share(allowed - plan.num_bytes)
        return plan

    def _share(self, num_bytes: int) -> None:
        """What rows leave: features first, then prefixes."""
        if self.features is not None:
            self.features.bound(num_bytes)
            num_bytes -= self.features.num_bytes
        if self.prefixes is not None:
            self.prefixes.bound(num_bytes)

    def _land(self, flight: Flight) -> None:
        """Read a step that was started."""
        drawn = self._runner.read(flight)
        for scores in flight.scores:
            known = scores.sequence.prompt_logprobs  # of tokens 1, 2, …
            num_known = len(known) + 1 - scores.first  # of these: a prompt that is computed anew is told once
            if num_known >= 0:
                known += scores.entries()[num_known:]
        self.guesses.note(flight.plan, drawn, self._note_time(flight))
        self.scheduler.commit(flight.plan, drawn)
        self._num_prompt_tokens += flight.plan.num_prefilled
        if self.features is not None:
            self._settle(flight)
        if flight.captured:
            for one in drawn:
                one.sequence.is_sound &= one.is_sound
            self._keep(flight.captured)
        # A step ahead, a row may have run a token too many: its sequence has ended meanwhile.
        alive = self._by_id
        events = [self._event(one) for one in drawn if alive.get(one.sequence.request.id) is one.sequence]
        self._events += events
        ended = [event for event in events if event.finish is not None]
        if ended:
            self._forget([alive[event.request_id] for event in ended if event.finish != "error"])
            self._forget(
                [alive[event.request_id] for event in ended if event.finish == "error"], is_sound=False
            )

    def _note_time(self, flight: Flight) -> float | None:
        """How long the step took that was read a moment ago, unless it also encoded pictures, or copied more of rows
        than is little beside the prompts that it computed. Returns it where nothing of a prompt was computed either.
        """
        now, plan = time.perf_counter(), flight.plan
        duration_s, self._landed_s = now - max(flight.began_s, self._landed_s), now
        num_copied = sum(each.prefix.num_tokens for each in plan.restores)
        num_copied += sum(each.stop - each.start for each in plan.departures)
        if plan.encodes or plan.moves or not plan.chunks or num_copied > LITTLE_COPIED * plan.num_padded:
            return None
        if plan.width == 1:
            self.pace.note(plan.num_single, plan.num_padded, duration_s)
        return None if plan.num_padded or plan.num_prefilled else duration_s

    def recover(self, error: BaseException) -> list[Event]:
        """End every row that a failed step may have left in any state, and go on with an empty batch.

        Returns what the step had found before it failed, then their final events. Requests that still wait for a row
        are untouched.
        """
        failure = GenerationError(f"a step of the engine has failed: {error!r}")
        self._flights.clear()
        lost = self.scheduler.abandon()
        for sequence in lost:
            self._drop(sequence)
        self._runner.reset()
        self._kv_bytes = 0
        found = self._take_events()
        ended = {event.request_id for event in found if event.finish is not None}
        return found + [self._ended(each, failure) for each in lost if each.request.id not in ended]

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
                kv_bytes=self._kv_bytes,
                prefix_bytes=self.prefixes.num_bytes if self.prefixes else 0,
                feature_bytes=self.features.num_bytes if self.features else 0,
                adapter_bytes=self.bank.num_bytes,
                adapter_host_bytes=self.registry.host_bytes,
                drafter_bytes=self.guesses.num_bytes,
                budget_bytes=self.memory.total,
            ),
            prefixes=self.prefixes.stats if self.prefixes else PrefixStats(),
            features=self.features.stats if self.features else FeatureStats(),
            num_finished=dict(self._num_finished),
            drafts=dict(self.guesses.stats),
        )

    def progress(self, request_id: str) -> Progress:
        """How far a request is. Safe to call from any thread; may be one step old."""
        sequence = self._by_id.get(request_id)
        return Progress() if sequence is None else sequence.progress

    @property
    def has_prefixes(self) -> bool:
        """Whether there is a prefix cache."""
        return self.prefixes is not None

    def prefix_bytes(self, version: AdapterVersion | None) -> int:
        """Memory of prefixes under an adapter, whoever's, or under the base (None)."""
        return self.prefixes.bytes_of(version.effect_hash if version else "") if self.prefixes else 0

    def forget(self, tenant: str | None = None) -> None:
        """Drop a tenant's prefixes and features, in memory and on disk, and what drafters remember of it; of
        everybody, where none is named."""
        self.guesses.clear(tenant)
        if self.prefixes is not None:
            self.prefixes.cache.clear(tenant)
        if self.features is not None:
            self.features.forget(tenant)

    def close(self) -> None:
        """Write what waits for the disk, and let go of its folders. No step follows."""
        self.registry.close()
        if self.prefixes is not None:
            self.prefixes.cache.close()
        if self.features is not None:
            self.features.close()

    def _event(self, drawn: Drawn) -> Event:
        sequence, token_ids, logprobs, is_sound, error, *_ = drawn
        request = sequence.request
        if error is None and is_sound:
            try:
                sequence.tell()
            except Exception as raised:  # one row's trouble, too
                logger.exception("request %s cannot go on", request.id)
                error = raised
        if error is not None:
            told = error if isinstance(error, LatheError) else None
            return self._ended(
                sequence, told or GenerationError(f"what may follow in the answer cannot be told: {error!r}")
            )
        if not is_sound:
            whose = f"adapter {request.adapter.id!r}" if request.adapter else f"model {self.model.name!r}"
            return self._ended(
                sequence, GenerationError(f"{whose} gave logits that are not numbers; nothing can be drawn")
            )
        try:
            step = self._rules[request.id].push(token_ids)
        except Exception as error:  # one row's text is one row's trouble, whatever it is
            logger.exception("the text of request %s cannot be read", request.id)
            return self._ended(sequence, GenerationError(f"the answer's text cannot be read: {error!r}"))
        self._num_generated_tokens += step.num_tokens
        if step.finish is not None:
            self._num_finished[step.finish] += 1
        is_first, drafting = len(sequence.generated) == len(token_ids), sequence.drafting
        is_told = step.finish is not None or is_first
        return Event(
            request.id,
            step.text,
            token_ids[: step.num_tokens],
            logprobs[: step.num_tokens],
            step.finish,
            step.stop_reason,
            num_cached_tokens=(sequence.num_restored_tokens or 0) if is_told else 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first else (),
            num_drafted=drafting.num_drafted if drafting and step.finish else 0,
            num_accepted=drafting.num_right if drafting and step.finish else 0,
            reasoning=step.reasoning,
            num_reasoning_tokens=step.num_thought,
        )

    def _ended(self, sequence: SequenceState, error: LatheError) -> Event:
        self._num_finished["error"] += 1
        return Event(
            sequence.request.id,
            finish="error",
            error=error,
            num_cached_tokens=sequence.num_restored_tokens or 0,
        )

    def _forget(self, sequences: list[SequenceState], *, is_sound: bool = True) -> None:
        self.scheduler.remove(sequences, is_sound=is_sound)
        for sequence in sequences:
            sequence.is_sound &= is_sound
            self._drop(sequence)
        if not self.scheduler.has_work:
            self._clear_rows()

    def _clear_rows(self) -> None:
        """Nobody needs a row now: prefixes take what was in them, and the memory."""
        captured = self._runner.capture(self.scheduler.take_departures())
        if self._flights:  # what they are copied from is being computed, and may fail
            self._flights[-1].captured += captured
        else:
            self._keep(captured)
        self._runner.clear()
        self._kv_bytes = 0

    def _keep(self, captured: Iterable[Captured]) -> None:
        for each in captured:
            if each.capture.sequence.is_sound:
                assert self.prefixes is not None
                self.prefixes.keep(each)

    def _drop(self, sequence: SequenceState) -> None:
        del self._by_id[sequence.request.id]
        del self._rules[sequence.request.id]
        self.guesses.forget(sequence)
        if self.features is not None:
            self.features.release(sequence)


def _late(sequence: SequenceState) -> DeadlineError:
    count = len(sequence.generated)
    done = f"after {count} tokens of the answer" if count else "before the answer began"
    return DeadlineError(f"timeout: the time that the request has set has passed {done}")


def context_message(max_context: int, num_prompt_tokens: int) -> str:
    """In the words by which OpenAI's clients and litellm know an overlong prompt."""
    return (
        f"This model's maximum context length is {max_context} tokens. However, the prompt has {num_prompt_tokens} "
        f"tokens, which leaves no room for an answer. Please shorten it."
    )
