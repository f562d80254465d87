"""A chat → its prompt; one that does not fit the context is made to fit first, where server or request say so.

What is done to it is `overflow`'s, what a summary says `summaries`'.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from serve.api.message_bodies import Message
from serve.api.overflow import ROOM_SHARE, Shortened, summed_up, transcript, truncated
from serve.api.schemas import ChatBody
from serve.api.summaries import AROUND
from serve.api.targets import Target
from serve.errors import ContextLengthError
from serve.model.prompt import Prompt
from serve.runtime import Runtime

P = TypeVar("P")
SUMMARY_SHARE = 8
"""Of the context, a summary has at most one in so many tokens."""
MAX_SUMMARY_TOKENS = 512
TEMPLATE_TOKENS = 64
"""That a chat template may take beside the one message."""
MIN_PART_TOKENS = 64
"""Of a conversation that are read at once, lest it take for ever."""
COPIED = ("user", "cache_salt", "priority")
"""Fields that a summary's request has of the chat's."""


class Fitting(Generic[P]):
    """Makes one chat fit.

    prompt   a chat's prompt, by whatever else it holds; raises ContextLengthError
    answer   what the model that answers says to a chat
    """

    def __init__(
        self,
        target: Target,
        tenant: str,
        prompt: Callable[[ChatBody], Awaitable[P]],
        tokens: Callable[[P], Prompt],
        answer: Callable[[ChatBody], Awaitable[str]],
    ) -> None:
        self._target = target
        self._tenant = tenant
        self._prompt = prompt
        self._tokens = tokens
        self._answer = answer

    async def of(self, body: ChatBody) -> tuple[P, Shortened]:
        """The prompt, and the chat that it is of. ContextLengthError where nothing helps."""
        policy = body.context_overflow or self._runtime.config.context_overflow
        if policy == "error":
            return await self._prompt(body), Shortened(body)
        found = await self._fitting_prompt(body)
        if found is not None:
            return found, Shortened(body)
        if policy == "truncate":
            shortened = await truncated(body, self._fits)
        else:
            shortened = await summed_up(body, lambda messages: self._summary(body, messages))
        return await self._prompt(shortened.body), shortened

    async def _fits(self, body: ChatBody) -> bool:
        return await self._fitting_prompt(body) is not None

    async def _fitting_prompt(self, body: ChatBody) -> P | None:
        """None where it is too long, or leaves too little room for the answer."""
        runtime = self._runtime
        try:
            found = await self._prompt(body)
        except ContextLengthError:
            return None
        most = runtime.max_context // ROOM_SHARE
        wanted = body.answer_limit or runtime.config.default_max_tokens or most
        room = runtime.max_context - len(self._tokens(found).token_ids)
        return found if room >= max(min(wanted, most), 1) else None

    async def _summary(self, body: ChatBody, messages: Sequence[Message]) -> str:
        owner = "\0".join((self._tenant, body.cache_salt or "", self._target.served))
        summaries = self._target.services.summaries
        return await summaries.of(messages, owner, transcript, self._cut, lambda text: self._ask(body, text))

    async def _ask(self, body: ChatBody, text: str) -> str:
        asked: dict[str, Any] = {name: getattr(body, name) for name in COPIED}
        asked |= {
            "model": body.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self._max_summary,
            "temperature": 0,
            "context_overflow": "error",
        }
        if "enable_thinking" in self._runtime.template_of(self._target.version).variables:
            asked["enable_thinking"] = False
        answer = await self._answer(ChatBody.model_validate(asked))
        # Read again it may be more tokens than were drawn.
        return "".join((await self._pieces(answer, self._max_summary))[:1])

    async def _cut(self, text: str) -> list[str]:
        """In parts that leave room for the task, for the summary before and for the one that is asked for."""
        around = await self._target.services.tokenize(lambda: len(self._encode(AROUND)))
        most = self._runtime.max_context - around - 2 * self._max_summary - TEMPLATE_TOKENS
        if most < MIN_PART_TOKENS:
            raise ContextLengthError(
                f"This model's maximum context length is {self._runtime.max_context} tokens. However, summing up a "
                "conversation takes more of them than that; shorten it, or ask for context_overflow: truncate.",
                "messages",
            )
        return await self._pieces(text, most)

    async def _pieces(self, text: str, num_tokens: int) -> list[str]:
        """A text in pieces of so many tokens."""

        def cut() -> list[str]:
            ids = self._encode(text)
            pieces = (ids[first : first + num_tokens] for first in range(0, len(ids), num_tokens))
            return [self._runtime.model.tokenizer.decode(piece) for piece in pieces]

        return await self._target.services.tokenize(cut)

    def _encode(self, text: str) -> list[int]:
        return list(self._runtime.model.tokenizer.encode(text, add_special_tokens=False))

    @property
    def _runtime(self) -> Runtime:
        return self._target.services.runtime

    @property
    def _max_summary(self) -> int:
        """Tokens."""
        return min(MAX_SUMMARY_TOKENS, max(self._runtime.max_context // SUMMARY_SHARE, 1))
