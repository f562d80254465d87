"""What one loaded model answers with: its runtime, and the work that must not run on the event loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from serve.api.media import MediaDesk
from serve.api.prompts import SHORT_CHARS, Prompts
from serve.api.summaries import Summaries
from serve.constraints.compiler import GrammarCompiler
from serve.runtime import Runtime

T = TypeVar("T")
LOOKUPS = 8
"""Names of models that are looked up at a time."""
LOADS = 2
"""Adapters that are read at a time since somebody says so: more at once are there no sooner, and hold streams up."""
CHANGES = 8
"""Rollbacks and pins under way at a time, which wait for loads of their names."""


class Services:
    """One model's; `held_target` says which model's a request wants."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.created = int(time.time())
        # Work that is the tokenizer's alone waits for its turn on the event loop; with what renders it shares a lock.
        self._tokenizing = anyio.CapacityLimiter(1)
        # Where a slow disk or the hub keeps all of them busy, requests for known names go on.
        self._looking_up = anyio.CapacityLimiter(LOOKUPS)
        # None of these is of the threads that everybody's requests share.
        self._loading = anyio.CapacityLimiter(LOADS)
        self._changing = anyio.CapacityLimiter(CHANGES)
        self.prompts = Prompts(runtime)
        self.media = MediaDesk(runtime)
        self.summaries = Summaries()
        engine = runtime.engine
        vocab_size = engine.model.network.vocab_size
        self.grammars = GrammarCompiler(engine.model.tokenizer, engine.token_bytes, vocab_size)

    def close(self) -> None:
        """End the threads that work for it. The runtime's are its own."""
        self.media.close()
        self.grammars.close()

    async def look_up(self, work: Callable[[], T]) -> T:
        """Find or read adapters, on one of the threads for that."""
        return await anyio.to_thread.run_sync(work, limiter=self._looking_up)

    async def load(self, work: Callable[[], T]) -> T:
        """Read an adapter that an operator names, when it is its turn."""
        return await anyio.to_thread.run_sync(work, limiter=self._loading)

    async def change(self, work: Callable[[], T]) -> T:
        """Change what a name stands for, or keeps: waits for whoever makes a version of it."""
        return await anyio.to_thread.run_sync(work, limiter=self._changing)

    async def tokenize(self, work: Callable[[], T], *, num_chars: float = math.inf) -> T:
        """Run the tokenizer's work on a thread, when it is its turn; of few characters here, if that is now."""
        if num_chars <= SHORT_CHARS and (found := self.prompts.at_once(work)) is not None:
            return found
        return await anyio.to_thread.run_sync(self.prompts.alone, work, limiter=self._tokenizing)
