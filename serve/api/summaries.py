"""Messages in, a summary of them out, by the model that is to answer what comes after them, through the engine.

A longer conversation than the context is read in parts, each with the summary of what came before. Summaries are kept
by what they are of: when a client sends its conversation again, a few messages longer, only these are read.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence

from serve.api.message_bodies import Message

MAX_KEPT = 256
TASK = (
    "Below is a part of a conversation between a user and an assistant. Write a summary of it, as short as it can be "
    "while the conversation can still go on from it: what was asked, what was found or decided, names, numbers and "
    "what is left to do. Write the summary alone."
)
SO_FAR = "Summary of what came before it:"
PART = "The part:"
AROUND = f"{TASK}\n\n{SO_FAR}\n\n{PART}\n"
"""All that a request for a summary says beside the conversation's own words."""

Ask = Callable[[str], Awaitable[str]]
Cut = Callable[[str], Awaitable[list[str]]]


class Summaries:
    """Of one model, the ones used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, str] = OrderedDict()

    async def of(
        self,
        messages: Sequence[Message],
        owner: str,
        write: Callable[[Sequence[Message]], str],
        cut: Cut,
        ask: Ask,
    ) -> str:
        """The summary of these messages.

        owner  whose they are: no other's summary is used
        write  what they say, as one text
        cut    a text in parts that the model can read at once
        ask    the model, once
        """
        names = list(_names(messages, owner))
        first, summary = 0, ""
        for number in range(len(messages), 0, -1):
            if (found := self._kept.get(names[number - 1])) is not None:
                first, summary = number, found
                break
        for part in await cut(write(messages[first:])) if first < len(messages) else ():
            before = f"{SO_FAR}\n{summary}\n\n" if summary else ""
            summary = await ask(f"{TASK}\n\n{before}{PART}\n{part}")
        if summary:
            self._keep(names[-1], summary)
        return summary

    def _keep(self, name: str, summary: str) -> None:
        self._kept[name] = summary
        self._kept.move_to_end(name)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)


def _names(messages: Sequence[Message], owner: str) -> Iterator[str]:
    """Of the first message, of the first two, …"""
    digest = hashlib.sha256(owner.encode("utf-8", "surrogatepass"))
    for message in messages:
        written = message.model_dump_json(exclude_none=True).encode("utf-8", "surrogatepass")
        digest.update(f"{len(written)}:".encode() + written)
        yield digest.hexdigest()
