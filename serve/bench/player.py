"""One server's side of many chats: turns in an order go in, its answers come out and become part of the chats."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from serve.bench.client import Answer, Ask, ask
from serve.bench.scripts import Script
from serve.errors import StoppedError
from serve.remote import connect_async


@dataclass(frozen=True)
class Turn:
    """One request of a conversation, as a server answered it."""

    conversation: int
    number: int
    answer: Answer


@dataclass
class Player:
    """One server's side of all conversations: what has been said so far, and how each turn went."""

    label: str
    url: str
    model: str
    scripts: Sequence[Script]
    max_tokens: int
    turns: list[Turn] = field(default_factory=list)
    said: dict[int, list[Mapping[str, str]]] = field(default_factory=dict)
    """By conversation: its messages, the answers among them."""
    wall_s: float = 0.0
    """Spent playing."""

    def play(self, stretch: Sequence[int], clients: int) -> None:
        """The next turn of each conversation in `stretch`, in this order, `clients` at a time.

        StoppedError if all of them fail.
        """
        start_s = time.perf_counter()
        done = asyncio.run(self._play(stretch, clients))
        self.wall_s += time.perf_counter() - start_s
        if done and all(turn.answer.error is not None for turn in done):
            raise StoppedError(f"{self.label}: all {len(done)} requests failed: {done[0].answer.error}")
        self.turns += done

    async def _play(self, stretch: Sequence[int], clients: int) -> list[Turn]:
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        locks = {index: asyncio.Lock() for index in stretch}
        waiting = iter(stretch)
        async with connect_async(self.url, None, limits) as http:
            played = await asyncio.gather(*(self._client(http, waiting, locks) for _ in range(clients)))
        return [turn for turns in played for turn in turns]

    async def _client(
        self, http: httpx.AsyncClient, waiting: Iterator[int], locks: Mapping[int, asyncio.Lock]
    ) -> list[Turn]:
        turns = []
        for index in waiting:
            # Locks are taken in the order in which they were asked for, so a conversation's turns keep theirs.
            async with locks[index]:
                turns.append(await self._turn(http, index))
        return turns

    async def _turn(self, http: httpx.AsyncClient, index: int) -> Turn:
        script = self.scripts[index]
        said = self.said.setdefault(index, [{"role": "system", "content": script.system}])
        number = sum(message["role"] == "user" for message in said)
        message = script.messages[number]
        answer = await ask(http, Ask(self.model, message, self.max_tokens, history=tuple(said)))
        said += [{"role": "user", "content": message}, {"role": "assistant", "content": answer.text}]
        return Turn(index, number, answer)
