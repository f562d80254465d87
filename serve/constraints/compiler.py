"""Grammars by their content: compiled once, on threads of their own, and kept as long as they are asked for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from mlx_lm.tokenizer_utils import TokenizerWrapper

from serve.constraints.grammar import Grammar, compile_grammar
from serve.constraints.spec import ConstraintSpec
from serve.constraints.vocabulary import GrammarVocabulary
from serve.errors import OverloadedError, RequestError, StoppedError
from serve.model.token_bytes import TokenBytes

MAX_GRAMMARS = 256
MAX_CACHED_CHARS = 1 << 23
MAX_COMPILING = 256
NUM_THREADS = 2
BUSY = "other requests' grammars are being compiled"
TIMEOUT_S = 20.0
"""After which a request for a grammar is told that it takes too long."""


@dataclass(frozen=True)
class GrammarStats:
    """Counters of one compiler's life, and what it holds."""

    num_queries: int = 0
    """Requests that needed a grammar."""
    num_hits: int = 0
    """Of those, that found it compiled."""
    num_compiled: int = 0
    num_refused: int = 0
    """Compilations that ended with what is wrong with it."""
    compile_s: float = 0.0
    """Of both, by the wall."""
    num_kept: int = 0


class GrammarCompiler:
    """One model's. Safe to use from any thread."""

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        tokens: TokenBytes,
        vocab_size: int,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """The vocabulary is read when the first grammar is asked for."""
        self._timeout_s = timeout_s
        self._tokenizer, self._tokens, self._vocab_size = tokenizer, tokens, vocab_size
        self._vocabulary: GrammarVocabulary | None = None
        self._reading = threading.Lock()
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="lathe-grammars")
        self._lock = threading.Lock()  # guards what follows
        self._grammars: OrderedDict[ConstraintSpec, Grammar] = OrderedDict()  # the least recently used first
        self._compiling: dict[tuple[ConstraintSpec, str], Future[Grammar]] = {}  # errors name a place
        self._num_chars = 0
        self._stats = GrammarStats()

    def stats(self) -> GrammarStats:
        """Now."""
        with self._lock:
            return replace(self._stats, num_kept=len(self._grammars))

    def close(self) -> None:
        """Nothing more is compiled; what has begun goes on."""
        self._threads.shutdown(wait=False)

    async def get(self, spec: ConstraintSpec) -> Grammar:
        """RequestError names the place where it is wrong, or says that it takes too long; OverloadedError where
        others' grammars keep the threads busy."""
        found = self.find(spec)
        self._count(num_queries=1, num_hits=int(found is not None))
        if found is not None:
            return found
        future = self._submitted(spec)
        answer = asyncio.wrap_future(future)
        answer.add_done_callback(_heard)
        done, _ = await asyncio.wait({answer}, timeout=self._timeout_s)
        if done:
            return answer.result()
        if not future.running():
            raise OverloadedError(BUSY)  # not cancelled: another may wait for it too
        raise RequestError(
            f"{spec.place}: compiling it takes more than {self._timeout_s:g} s", spec.place.partition(".")[0]
        )

    def compile(self, spec: ConstraintSpec) -> Grammar:
        """The same on the calling thread, however long it takes."""
        found = self.find(spec)
        return found if found is not None else self._made(spec)

    def find(self, spec: ConstraintSpec) -> Grammar | None:
        """One that is at hand."""
        with self._lock:
            found = self._grammars.get(spec)
            if found is not None:
                self._grammars.move_to_end(spec)
            return found

    def _submitted(self, spec: ConstraintSpec) -> Future[Grammar]:
        """Its compilation, which may be another request's too."""
        key = (spec, spec.place)
        with self._lock:
            future = self._compiling.get(key)
            if future is None and len(self._compiling) >= MAX_COMPILING:
                raise OverloadedError(BUSY)
            if future is None:
                try:
                    future = self._compiling[key] = self._threads.submit(self._compiled, spec)
                except RuntimeError:  # the threads have ended
                    raise StoppedError("the model that was asked has been unloaded") from None
            return future

    def _compiled(self, spec: ConstraintSpec) -> Grammar:
        try:
            return self.compile(spec)
        finally:
            with self._lock:
                self._compiling.pop((spec, spec.place), None)

    def _made(self, spec: ConstraintSpec) -> Grammar:
        vocabulary, begun_s = self._read_vocabulary(), time.perf_counter()
        try:
            grammar = compile_grammar(spec, vocabulary)
        except RequestError:
            self._count(num_refused=1, compile_s=time.perf_counter() - begun_s)
            raise
        self._count(num_compiled=1, compile_s=time.perf_counter() - begun_s)
        with self._lock:
            if (found := self._grammars.get(spec)) is not None:  # another thread's
                return found
            self._grammars[spec] = grammar
            self._num_chars += len(spec.text)
            while len(self._grammars) > MAX_GRAMMARS or self._num_chars > MAX_CACHED_CHARS:
                self._num_chars -= len(self._grammars.popitem(last=False)[0].text)
        return grammar

    def _count(self, **more: float) -> None:
        with self._lock:
            now = self._stats
            self._stats = replace(now, **{name: getattr(now, name) + count for name, count in more.items()})

    def _read_vocabulary(self) -> GrammarVocabulary:
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = GrammarVocabulary(self._tokenizer, self._tokens, self._vocab_size)
            return self._vocabulary


def _heard(answer: asyncio.Future[Grammar]) -> None:
    """Nobody may wait for it any more: its error is not asyncio's to tell."""
    if not answer.cancelled():
        answer.exception()
