"""Responses that can be asked for later, and gone on from: within bytes, a number and an age, each tenant its own.

What a conversation said before is held once, by the response that was asked; those that go on from it refer to it.
So one that has been left out counts as long as another refers to it.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Items = list[dict[str, Any]]


@dataclass(eq=False)
class Entry:
    """One response, and what it was asked."""

    id: str
    tenant: str
    written: bytes
    """{"response", "input"}, as JSON: nobody changes what others read."""
    item_ids: tuple[str, ...]
    previous: Entry | None
    stored_s: float
    num_after: int = 0
    """Entries that go on from it."""
    is_known: bool = True
    """Can be asked for."""

    @property
    def response(self) -> dict[str, Any]:
        """As it was sent."""
        found: dict[str, Any] = json.loads(self.written)["response"]
        return found

    @property
    def input(self) -> Items:
        """Its own, without what came before."""
        found: Items = json.loads(self.written)["input"]
        return found

    @property
    def history(self) -> Iterator[dict[str, Any]]:
        """All that was said up to its end: what each asked and answered, the first first."""
        chain: list[Entry] = []
        entry: Entry | None = self
        while entry is not None:
            chain.append(entry)
            entry = entry.previous
        for each in reversed(chain):
            found = json.loads(each.written)
            yield from found["input"]
            yield from found["response"]["output"]


class ResponseStore:
    """For the event loop."""

    def __init__(
        self, max_bytes: int, max_count: int, max_age_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._max_age_s = max_age_s
        self._clock = clock
        self._known: OrderedDict[tuple[str, str], Entry] = OrderedDict()
        """By tenant and id; what was stored or gone on from last stands last."""
        self._items: dict[tuple[str, str], Entry] = {}
        """By tenant and an item's id."""
        self._oldest_s = clock()
        """Nothing was stored before."""
        self.num_bytes = 0
        """Of what can be asked for, and what that refers to."""

    def __len__(self) -> int:
        return len(self._known)

    def get(self, tenant: str, id: str) -> Entry | None:
        """None for what is not known (any more), and what is another tenant's."""
        self._drop_old()
        return self._known.get((tenant, id))

    def item(self, tenant: str, id: str) -> dict[str, Any] | None:
        """The item of that id, among what was asked and answered."""
        self._drop_old()
        entry = self._items.get((tenant, id))
        if entry is None:
            return None
        return next(
            (each for each in (*entry.input, *entry.response["output"]) if each.get("id") == id), None
        )

    def put(self, tenant: str, response: dict[str, Any], input: Items, previous: Entry | None) -> bool:
        """False if there is no room for it, whoever gives way."""
        written = json.dumps({"response": response, "input": input}, separators=(",", ":")).encode()
        if len(written) > self._max_bytes or not self._max_count:
            return False
        item_ids = tuple(each["id"] for each in (*input, *response["output"]) if each.get("id"))
        entry = Entry(response["id"], tenant, written, item_ids, previous, self._clock())
        self._retain(previous)
        if previous is not None and previous.is_known:
            self._known.move_to_end((tenant, previous.id))
        self._known[tenant, entry.id] = entry
        self._items |= dict.fromkeys(((tenant, each) for each in item_ids), entry)
        self.num_bytes += len(written)
        self._drop_old()
        while len(self._known) > self._max_count or self.num_bytes > self._max_bytes:
            self._forget(self._next_to_go())
        return entry.is_known

    def delete(self, tenant: str, id: str) -> bool:
        """False where there is none. Responses that go on from it keep what they refer to."""
        entry = self.get(tenant, id)
        if entry is not None:
            self._forget(entry)
        return entry is not None

    def _drop_old(self) -> None:
        now_s = self._clock()
        if now_s <= self._oldest_s + self._max_age_s:
            return
        for entry in [each for each in self._known.values() if each.stored_s < now_s - self._max_age_s]:
            self._forget(entry)
        self._oldest_s = min((each.stored_s for each in self._known.values()), default=now_s)

    def _next_to_go(self) -> Entry:
        """Whoever was used longest ago, of the tenant who holds most: one tenant's do not crowd out others'."""
        held: dict[str, int] = {}
        for entry in self._known.values():
            held[entry.tenant] = held.get(entry.tenant, 0) + len(entry.written)
        tenant = max(held, key=lambda name: held[name])
        return next(entry for entry in self._known.values() if entry.tenant == tenant)

    def _forget(self, entry: Entry) -> None:
        entry.is_known = False
        del self._known[entry.tenant, entry.id]
        for each in entry.item_ids:
            if self._items.get((entry.tenant, each)) is entry:
                del self._items[entry.tenant, each]
        self._release(entry)

    def _retain(self, entry: Entry | None) -> None:
        """One more goes on from it. What had been forgotten meanwhile counts again."""
        while entry is not None:
            was_gone = not entry.is_known and not entry.num_after
            entry.num_after += 1
            if not was_gone:
                return
            self.num_bytes += len(entry.written)
            entry = entry.previous

    def _release(self, entry: Entry | None) -> None:
        """Stop counting it, and what only it referred to, once nobody can come to it."""
        while entry is not None and not entry.is_known and not entry.num_after:
            self.num_bytes -= len(entry.written)
            before = entry.previous
            if before is not None:
                before.num_after -= 1
            entry = before
