"""One model of a pool, loaded or not: who uses it, who waits for it, and since when. No threads; its pool locks."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from serve.pool.pool import Lease, Waiter

T = TypeVar("T")
State = Literal["unloaded", "loading", "ready", "draining", "unloading"]
"""Of these "ready" alone takes requests; "draining" lets those that it has end."""


@dataclass(frozen=True)
class Terms:
    """How a pool may treat a model.

    is_pinned      it leaves for no other, and for no idleness
    idle_unload_s  so long without a request, it leaves; None: never
    num_bytes      of its weights and of what rows may take beside them, for the pool's budget
    """

    is_pinned: bool = False
    idle_unload_s: float | None = None
    num_bytes: int = 0


@dataclass(eq=False)
class Member(Generic[T]):
    """What a pool knows of a model. Times in seconds, by the pool's clock."""

    name: str
    terms: Terms
    state: State = "unloaded"
    loaded: T | None = None
    """While its state is ready or draining, and until it has stopped."""
    leases: set[Lease[T]] = field(default_factory=set)
    """Of those who use it."""
    waiters: deque[Waiter[T]] = field(default_factory=deque)
    """Who asked for it and has not got it, the first one first."""
    ready_since_s: float = 0.0
    used_s: float = 0.0
    """When somebody took or gave back a lease last."""
    draining_since_s: float = 0.0
    is_looked_at: bool = False
    """It was found to be there by those who wait for it now."""
    is_to_leave: bool = False
    """Somebody has said so: it makes no room, it just goes."""
    leavers: list[Future[None]] = field(default_factory=list)
    """Who said so, and waits."""
    num_loads: int = 0
    num_failed: int = 0
    load_s: float = 0.0
    """All loads together."""
    problem: str | None = None
    """Why the last load failed, or what was loaded did; None: neither did."""
    is_broken: bool = False
    """What is loaded does nothing any more: it goes at once, and comes anew when it is asked for."""
    num_breaks: int = 0
    """In a row, each soon after it had been loaded."""
    retry_s: float = 0.0
    """Having broken, it is not loaded before."""
    keep_s: float | None = None
    """While it stays loaded, the time without a request after which it leaves, instead of its terms'; inf: never."""

    @property
    def idle_s(self) -> float | None:
        """Without a request for so long, it leaves; None: it never does."""
        if self.terms.is_pinned:
            return None
        return self.terms.idle_unload_s if self.keep_s is None else self.keep_s

    @property
    def is_resident(self) -> bool:
        """Whether it takes memory, or is about to."""
        return self.state != "unloaded"

    @property
    def is_idle(self) -> bool:
        """Loaded, and nobody's."""
        return self.state in ("ready", "draining") and not self.leases

    @property
    def wanted_since_s(self) -> float | None:
        """When the first of those asked who wait; None: nobody waits."""
        return self.waiters[0].asked_s if self.waiters else None
