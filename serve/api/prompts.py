"""Messages or a text -> the prompt's token ids, on threads and within bounds.

Templates run on a few threads under a clock, and the tokenizer there, for one at a time, so a slow conversation
holds up no other; what is short is made at once, on the event loop. What cannot fit the model's context is refused by
its length, before a template or a tokenizer works on it.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.to_thread

from serve.errors import ContextLengthError, RequestError
from serve.model.expansion import Expansion
from serve.model.messages import leaves
from serve.model.ngrams import Ngrams
from serve.model.template import ChatTemplate
from serve.model.texts import encode_text
from serve.runtime import Runtime

T = TypeVar("T")
TokenIds = tuple[int, ...]
RENDERING_THREADS = 4
SHORT_CHARS = 2000
"""What says no more than this is rendered and tokenized on the event loop: in half a millisecond, which is less than
a hop to a thread and back takes where another thread is busy."""
QUICK_S = 0.002
"""A template's time there. One that takes longer begins anew on a thread."""
PROBED_CHARS = 8
"""A text of more characters than this for each token of the context is looked at by its beginning first."""
SURELY = 1.25
"""Where a beginning has this many times the context's tokens, the whole does not fit: only its end may change."""


class Bounds(NamedTuple):
    """Of one rendering."""

    limit_s: float
    """That the template may take."""
    is_quick: bool
    """It holds up the event loop."""


class _NotQuickError(Exception):
    """What may take long, however short the text. Never leaves this file."""


class Prompts:
    """Makes prompts for one runtime. But for `render`, what is here is to be called on a thread."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # A fast tokenizer refuses to be used by two threads at once.
        self._tokenizer = threading.RLock()
        self._rendering = anyio.CapacityLimiter(RENDERING_THREADS)
        longest = max(map(len, runtime.model.tokenizer.get_vocab()), default=1)
        self._max_chars = longest * runtime.max_context
        self._limit_s = runtime.config.max_render_s

    async def render(self, work: Callable[[Bounds], T], *, num_chars: float) -> T:
        """Run work that is templates'. All of a request's at once: to go to a thread and back takes as long as a
        short chat's template.

        num_chars  that it is about. Where they are few and the tokenizer is free, it runs here; what it refuses here
                   is refused on a thread, which has more time
        """
        if num_chars <= SHORT_CHARS:
            with suppress(RequestError, _NotQuickError):
                found = self.at_once(lambda: work(Bounds(min(QUICK_S, self._limit_s), True)))
                if found is not None:
                    return found
        return await anyio.to_thread.run_sync(work, Bounds(self._limit_s, False), limiter=self._rendering)

    def alone(self, work: Callable[[], T]) -> T:
        """Run the tokenizer's work here, when it is its turn."""
        with self._tokenizer:
            return work()

    def at_once(self, work: Callable[[], T]) -> T | None:
        """The same where its turn is now; None: it is not."""
        if not self._tokenizer.acquire(blocking=False):
            return None
        try:
            return work()
        finally:
            self._tokenizer.release()

    def of_messages(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        media: Sequence[Expansion] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        bounds: Bounds,
    ) -> TokenIds:
        """Ids of a chat. RequestError as ChatTemplate.write, ContextLengthError for more than can ever fit.

        media  what the messages' parts of media become, in their order
        """
        self._check_size(messages, [variables, tools])
        written = template.write(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
            limit_s=bounds.limit_s,
            media=media,
        )
        if written.veil is not None and bounds.is_quick:  # a tokenizer may have to be made first
            raise _NotQuickError
        self._check_chars(len(written), "messages")
        return self.alone(lambda: self._encode(written.encode, len(written), "messages"))

    def of_text(self, text: str, *, adds_special: bool = True) -> TokenIds:
        """Ids of a plain prompt, whose special tokens are special and which begins once.

        To be called when it is the tokenizer's turn. adds_special: with the tokens that it puts around a text.
        """
        self._check_chars(len(text), "prompt")
        tokenizer = self._runtime.model.tokenizer

        def encode(first: int | None) -> TokenIds:
            if adds_special:
                return encode_text(tokenizer, text[:first])
            return tuple(tokenizer.encode(text[:first], add_special_tokens=False))

        return self._encode(encode, len(text), "prompt")

    def of_prediction(self, text: str) -> Ngrams:
        """What an answer is thought to be, to be looked up: as much of it as can be one.

        To be called when it is the tokenizer's turn.
        """
        context = self._runtime.max_context
        ids = self._runtime.model.tokenizer.encode(text[: PROBED_CHARS * context], add_special_tokens=False)
        return Ngrams(array("q", ids[:context]))

    def _encode(self, encode: Callable[[int | None], TokenIds], num_chars: int, param: str) -> TokenIds:
        """`encode` gives the ids of the first characters, or of all."""
        first, context = PROBED_CHARS * self._runtime.max_context, self._runtime.max_context
        if num_chars > first:
            num_tokens = len(encode(first))
            if num_tokens > SURELY * context:
                raise self._too_long(
                    f"the first {first:,} characters of your {param} alone are {num_tokens:,} tokens", param
                )
        return encode(None)

    def _check_size(self, messages: Sequence[Mapping[str, Any]], variables: Any) -> None:
        if len(messages) > self._runtime.max_context:
            raise self._too_long(f"your request has {len(messages):,} messages", "messages")
        try:
            self._check_chars(sum(map(len, leaves([messages, variables]))), "messages")
        except RecursionError:
            raise RequestError("messages: found values nested too deeply", "messages") from None

    def _check_chars(self, num_chars: int, param: str) -> None:
        if num_chars > self._max_chars:
            raise self._too_long(
                f"your {param} hold {num_chars:,} characters, where even the longest tokens hold no more than "
                f"{self._max_chars:,}",
                param,
            )

    def _too_long(self, found: str, param: str) -> ContextLengthError:
        limit = self._runtime.max_context
        return ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, {found}.", param
        )
