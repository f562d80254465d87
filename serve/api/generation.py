"""One HTTP completion in the engine: its rows, their events, its timing, and its exposure. Knows no JSON."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import anyio.to_thread

from serve.api.errors import problem_of
from serve.api.exchange import Exchange, current
from serve.api.logprobs import LogprobWriter
from serve.api.metrics import Metrics
from serve.api.prompt_scores import PromptScores
from serve.api.schemas import CompletionBody, GenerationBody
from serve.api.services import Services
from serve.api.targets import Target
from serve.api.tools import NO_TOOLS, ToolUse, grammar_of, headers_in_grammar
from serve.api.vllm_metrics import Gaps
from serve.draft.lookup import NAME as NGRAM
from serve.engine.drafts import NONE
from serve.engine.request import Event, Request, Sampling
from serve.engine.thinking import Thinking
from serve.errors import LatheError, StoppedError
from serve.experiments.records import Exposure
from serve.model.ngrams import Ngrams
from serve.model.prompt import Prompt

INDEXED_TOKENS = 1024
"""A prompt of fewer tokens is indexed by the drafter in no time."""


class Generation:
    """Rows of the engine that answer one HTTP request: one per prompt and choice, in that order.

    The rows belong to this object until `close`, which may be called at any time and any number of times, and
    takes out of the engine what is still running. So long the model stays loaded.
    """

    def __init__(
        self,
        metrics: Metrics,
        id: str,
        endpoint: str,
        target: Target,
        requests: Sequence[Request],
        num_choices: int,
    ) -> None:
        """Submits all rows or none. RequestError, OverloadedError, StoppedError."""
        self.id = id
        self.created = int(time.time())
        self.target = target
        self.num_answer_tokens = 0
        self.num_choices = num_choices
        """Rows of one prompt."""
        self.has_thoughts = any(request.thinking is not None for request in requests)
        """Thoughts are told apart from answers."""
        self._num_cached_tokens: dict[int, int] = {}  # by row
        self._num_reasoning_tokens: dict[int, int] = {}  # by row
        self._num_cached_before = 0
        guesses = target.services.runtime.engine.guesses
        self.has_drafter = any((request.drafter or guesses.default) != NONE for request in requests)
        self.num_drafted = 0
        self.num_accepted = 0
        """Guesses of tokens that were checked, and right, of the rows that have ended."""
        self._metrics = metrics
        self._label = metrics.label(target.label)
        self._gaps = Gaps()
        self._last_token_s: dict[int, float] = {}  # by row
        self._num_prompt_tokens = 0
        self._runtime = target.services.runtime
        self._endpoint = endpoint
        self._started_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._exposed: Future[None] | None = None
        self._finish = "cancelled"
        self._is_closed = False
        self._exchange = current()
        self._is_thinking: dict[int, bool] = {}  # by row
        self._events: deque[tuple[int, Event]] = deque()
        self._waiter: asyncio.Future[None] | None = None  # the one who waits for events
        is_scoring = any(request.sampling.num_prompt_logprobs is not None for request in requests)
        self._scores = PromptScores(num_choices) if is_scoring and num_choices > 1 else None
        self._open: dict[int, str] = {}
        self._num_rows = len(requests)
        self._lease = target.lease.again() if target.lease is not None else None
        try:
            self._submit(requests)
        except LatheError:
            self._finish = "refused"
            self.close()
            raise
        self._num_prompt_tokens = sum(len(each.prompt.token_ids) for each in requests[::num_choices])
        if self._exchange is not None:
            self._begin(self._exchange)

    @property
    def is_done(self) -> bool:
        """True when every row has had its final event."""
        return not self._open

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompts that were not computed, as far as is known. A prompt counts once, as its first choice
        found the cache: the other choices share what that one computes."""
        own = sum(self._num_cached_tokens.get(row, 0) for row in range(0, self._num_rows, self.num_choices))
        return self._num_cached_before + own

    @property
    def first_token_s(self) -> float | None:
        """When the first token of any row came, by time.perf_counter; None: it has not."""
        return self._first_token_s

    @property
    def num_reasoning_tokens(self) -> int:
        """Of the answers' tokens, those of thoughts, as far as is known."""
        return sum(self._num_reasoning_tokens.values())

    async def next(self) -> tuple[int, Event]:
        """The next event of any row, with the row's index. StoppedError or OverloadedError if the engine ended it."""
        index, event = await self._event()
        while index not in self._open:  # ended here, before the engine knew
            index, event = await self._event()
        self.num_answer_tokens += len(event.token_ids)
        if self._exchange is not None:
            self._exchange.add_answer(len(event.token_ids))
            if event.text or event.reasoning:
                self._is_thinking[index] = not event.text
        if event.num_reasoning_tokens:
            self._num_reasoning_tokens[index] = event.num_reasoning_tokens
        if event.num_cached_tokens:
            self._num_cached_tokens[index] = event.num_cached_tokens
        self.num_drafted += event.num_drafted
        self.num_accepted += event.num_accepted
        if event.finish in ("error", "cancelled"):
            self._finish = "error"
            del self._open[index]
            failure = self._failure(event)
            if self._exchange is not None:
                self._exchange.problem = problem_of(failure)
            raise failure
        if event.token_ids:
            self._time(index, len(event.token_ids))
        if event.finish is not None:
            del self._open[index]
            self._finish = event.finish
            if self.is_done and self._exposed is not None:
                # Whoever has seen the end of the answer may send feedback on it, to any replica.
                await asyncio.wrap_future(self._exposed)
        return index, event

    def go_on_from(self, before: Generation) -> None:
        """Count what another used, whose answer this one's goes on from."""
        self.num_answer_tokens += before.num_answer_tokens
        self.num_drafted += before.num_drafted
        self.num_accepted += before.num_accepted
        self._num_reasoning_tokens[-1] = before.num_reasoning_tokens
        self._num_cached_before = before.num_cached_tokens

    async def _event(self) -> tuple[int, Event]:
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._events.popleft()

    def end(self, row: int) -> None:
        """End an open row's answer where it stands, as if it had stopped there."""
        self._runtime.worker.cancel(self._open.pop(row))
        self._finish = "stop"

    def close(self) -> None:
        """Cancel what still runs, and count the request."""
        if self._is_closed:
            return
        self._is_closed = True
        worker = self._runtime.worker
        for request_id in self._open.values():
            worker.cancel(request_id)
        if self._open and self._finish not in ("error", "refused"):
            self._finish = "cancelled"
        self._count()
        if self._lease is not None:
            self._lease.release()

    def abort(self) -> None:
        """End what runs by an error that says that the server ends; whoever waits for it gets that."""
        ending = StoppedError("the server is shutting down")
        for index, request_id in self._open.items():
            self._put(index, Event(request_id, finish="error", error=ending))
            self._runtime.worker.cancel(request_id)

    def describe(self) -> list[dict[str, Any]]:
        """One entry a row that has not ended: where it is, by a step that may be the last but one."""
        entries = []
        for index, request_id in self._open.items():
            progress = self._runtime.engine.progress(request_id)
            is_thinking = progress.phase == "decode" and self._is_thinking.get(index, False)
            phase = "thinking" if is_thinking else progress.phase
            entries.append({"id": request_id, **asdict(progress), "phase": phase})
        return entries

    def _begin(self, exchange: Exchange) -> None:
        exchange.asked, exchange.served = self.target.asked, self.target.served
        exchange.add_prompt(self._num_prompt_tokens)
        exchange.running.append(self)

    def _leave(self, exchange: Exchange) -> None:
        exchange.finish = self._finish
        exchange.num_cached_tokens = self.num_cached_tokens
        if self in exchange.running:
            exchange.running.remove(self)

    def _submit(self, requests: Sequence[Request]) -> None:
        runtime = self._runtime
        for request in requests:
            if request.adapter is not None:
                runtime.registry.acquire(request.adapter.id)  # released by the worker
        sinks = [partial(self._put, index) for index in range(len(requests))]
        runtime.worker.submit_all(requests, sinks, asyncio.get_running_loop())
        self._open = {index: request.id for index, request in enumerate(requests)}

    def _put(self, index: int, event: Event) -> None:
        scores = self._scores
        self._events.extend([(index, event)] if scores is None else scores.pass_on(index, event))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _failure(self, event: Event) -> LatheError:
        return event.error or StoppedError("the request was cancelled by the server")

    def _time(self, row: int, num_tokens: int) -> None:
        """Tokens of a row have come."""
        now = time.perf_counter()
        if self._first_token_s is None:
            self._note_first_token(now)
        if (last_s := self._last_token_s.get(row)) is not None:
            self._gaps.add(now - last_s, num_tokens)
        self._last_token_s[row] = now

    def _note_first_token(self, now: float) -> None:
        self._first_token_s = now
        ttft_s = now - self._started_s
        if self._exchange is not None:
            self._exchange.ttft_s = now - self._exchange.started_s
        asyncio.get_running_loop().call_soon(self._observe_first_token, ttft_s)  # behind the sending of it
        assignment, recorder = self.target.assignment, self._runtime.recorder
        if assignment is None or recorder is None:
            return
        version = self.target.version
        self._exposed = recorder.expose(
            Exposure(
                completion_id=self.id,
                run_id=assignment.run.id,
                variant=assignment.variant.name,
                unit=assignment.unit,
                model_version=self.target.served,
                content_hash=version.content_hash if version else self._runtime.model.fingerprint,
                exposed_at=time.time(),
                ttft_s=ttft_s,
            )
        )

    def _observe_first_token(self, ttft_s: float) -> None:
        self._metrics.ttft_s.labels(self._label).observe(ttft_s)

    def _count(self) -> None:
        if self._exchange is not None:
            self._leave(self._exchange)
        self._metrics.requests.labels(self._endpoint, self._label, self._finish).inc()
        self._metrics.prompt_tokens.labels(self._label).inc(self._num_prompt_tokens)
        self._metrics.answer_tokens.labels(self._label).inc(self.num_answer_tokens)
        self._metrics.gaps.add(self._label, self._gaps)
        now = time.perf_counter()
        latency_s = now - self._started_s
        if self._finish in ("stop", "length") and self._first_token_s is not None:
            self._metrics.e2e_s.labels(self._label).observe(latency_s)
            tokens_a_row = self.num_answer_tokens / self._num_rows
            if tokens_a_row > 1:
                tpot_s = (now - self._first_token_s) / (tokens_a_row - 1)
                self._metrics.tpot_s.labels(self._label).observe(tpot_s)
        recorder = self._runtime.recorder
        if self._exposed is not None and recorder is not None:
            recorder.complete(
                self.id, latency_s=latency_s, num_tokens=self.num_answer_tokens, finish=self._finish
            )


async def build_requests(
    id: str,
    body: GenerationBody,
    prompts: Sequence[Prompt],
    target: Target,
    *,
    tenant: str,
    continues_prompt: bool,
    thinking: Thinking | None = None,
    tools: ToolUse = NO_TOOLS,
) -> list[Request]:
    """One engine request per prompt and drawn answer, all of one group; answer i draws with seed + i, and the first
    scores the prompt for all.

    tenant, continues_prompt, thinking  as Request has them
    RequestError names the field that cannot be served.
    """
    services = target.services
    precision = body.precision(services.runtime.config)
    if precision is not None:
        # The first of a scheme imports what it needs, which takes seconds: not on the loop that serves everyone.
        await anyio.to_thread.run_sync(services.runtime.engine.max_context_at, precision)
    grammar = await grammar_of(services, body, tools)
    if grammar is not None and thinking is not None and tools.wanted is not None and tools.is_in_headers:
        thinking, grammar = headers_in_grammar(thinking, grammar)
    drafter, prediction = await _drafting(services, body, prompts)
    deadline_s, most_s = body.deadline_s, services.runtime.config.max_request_s
    if most_s is not None:
        deadline_s = min(deadline_s or math.inf, time.monotonic() + most_s)
    num_choices = body.num_drawn
    sampling = _sampling(services, body)
    seed = body.seed if body.seed is not None else secrets.randbits(32)
    return [
        Request(
            id=f"{id}-{p * num_choices + choice}",
            prompt=prompt,
            sampling=replace(
                sampling,
                seed=seed + choice,
                num_prompt_logprobs=None if choice else sampling.num_prompt_logprobs,
            ),
            adapter=target.version,
            group=id,
            continues_prompt=continues_prompt,
            precision=precision,
            tenant=tenant,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
            drafter=drafter,
            prediction=prediction,
            deadline_s=deadline_s,
            thinking=thinking,
            grammar=grammar,
            shown_ids=tools.shown_ids,
            stop_ids=tools.stop_ids,
        )
        for p, prompt in enumerate(prompts)
        for choice in range(num_choices)
    ]


async def _drafting(
    services: Services, body: GenerationBody, prompts: Sequence[Prompt]
) -> tuple[str | None, Ngrams | None]:
    """Who is to guess, by name, and the answer that was predicted. What is looked up is indexed here, and not on the
    thread that serves everyone. A prediction is a hint: where nothing is looked up, none is made of it."""
    guesses, drafter, prediction = services.runtime.engine.guesses, body.drafter, None
    if body.prediction is not None and NGRAM in guesses.names:
        drafter, text = NGRAM, body.prediction.text
        prediction = await services.tokenize(lambda: services.prompts.of_prediction(text))
    long = [prompt for prompt in prompts if len(prompt.token_ids) >= INDEXED_TOKENS]
    if long and (drafter or guesses.default) == NGRAM:
        await anyio.to_thread.run_sync(lambda: [prompt.ngrams for prompt in long])
    return drafter, prediction


def logprob_writers(
    services: Services, body: GenerationBody, requests: Sequence[Request]
) -> list[LogprobWriter] | None:
    """One for each request; None where no log-probabilities were asked for."""
    if body.num_logprobs is None:
        return None
    echoes = isinstance(body, CompletionBody) and body.echo  # the prompt is written before
    return [
        LogprobWriter(
            services.runtime.engine.token_bytes,
            request.prompt.token_ids if request.continues_prompt and not echoes else None,
        )
        for request in requests
    ]


def new_id(prefix: str) -> str:
    """A completion id."""
    return f"{prefix}-{secrets.token_hex(12)}"


def _sampling(services: Services, body: GenerationBody) -> Sampling:
    runtime = services.runtime
    num_logprobs = body.num_logprobs
    if num_logprobs is None and body.num_drawn > (body.n or 1):
        num_logprobs = 0  # by which the best are known
    return replace(
        body.drawing(runtime.sampling_defaults),
        max_tokens=_max_tokens(body.answer_limit, runtime.config.default_max_tokens),
        stop=body.stops,
        ignore_eos=bool(body.ignore_eos),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
    )


def _max_tokens(wanted: int | None, default: int | None) -> int | None:
    """A prompt that is to have no answer draws a token that nobody sees."""
    return default if wanted is None else max(wanted, 1)
