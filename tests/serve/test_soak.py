"""A soak: clients that ask, show pictures, go on from earlier answers, leave and swap adapters, in memory that is too
small, while steps fail. Afterwards nothing is left of it, and every answer, whole or cut short, was right.

A few requests run always, three thousand under `-m large`, more with `--soak-times 6`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import math
import queue
import random
from array import array
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest
from drafting import Eager
from sighted import broken, moving, shown
from vlm_families import VLM_FAMILIES

from serve.cache.precision import PLAIN, precision
from serve.draft.lookup import LookupDrafter
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Event, Request, Sampling
from serve.engine.worker import Worker
from serve.errors import GenerationError
from serve.media.content import Content
from serve.model.loading import LoadedModel, load
from serve.model.ngrams import Ngrams
from serve.model.prompt import Prompt

Items = tuple[int | Content, ...]

NUM_CLIENTS = 12
NUM_SYSTEM_PROMPTS = 20
MAX_CONTEXT = 700
KV_BYTES = 3 << 20
"""A row and a half of 1,024 positions of the model without windows or state: rows are preempted."""
DISK_BYTES = 4 << 20
MAX_ARRAY_GROWTH_BYTES = 256 << 10
"""Of all arrays, between a fifth of the soak and its end, when all is forgotten: half a row, or codebooks."""
MAX_GROWTH_BYTES = 64 << 20
"""Of the process."""
SAMPLINGS = (
    *({}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}, {"temperature": 1.2, "top_k": 9}),
    {"repetition_penalty": 1.5},
    {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": 0.4, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3, "repetition_context_size": 30, "num_prompt_logprobs": 1},
)
PRECISIONS = (PLAIN, PLAIN, precision(8), precision(4), precision(8, start_after=100), precision(3.5))
SEEING_PRECISIONS = (PLAIN, PLAIN, precision(8, group_size=32), precision(4, group_size=32, start_after=100))
FEATURE_BYTES, FEATURE_DISK_BYTES = 40_000, 1 << 20
KINDS = ("lora", "dora", "experts")


def failing_now_and_then(model: LoadedModel, rng: random.Random) -> Counter[str]:
    """From now on some of the model's forwards raise, never two of neighbouring steps. Returns a count of them."""
    count, forwards = Counter(), itertools.count()
    due = [rng.randrange(60, 200)]

    class Failing(type(model.network.backbone)):
        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            number = next(forwards)
            if number >= due[0]:
                due[0] = number + rng.randrange(150, 900)
                count["failed"] += 1
                raise RuntimeError("an injected fault")
            return super().__call__(*args, **kwargs)

    model.network.backbone.__class__ = Failing
    return count


@dataclass
class Answer:
    """What became of a request."""

    request: Request
    items: Items
    """Its prompt: tokens, pictures and clips."""
    source: tuple[str, int]
    """Kind and number of its adapter."""
    is_broken: bool
    """It shows a picture that becomes no numbers."""
    tokens: list[int]
    final: Event | None = None
    """None: nobody listened to the end."""


class Soak:
    """All clients of one engine."""

    def __init__(self, worker: Worker, name: str, lively: Any, seed: int) -> None:
        self.worker, self.name, self.lively = worker, name, lively
        self.eyes = lively.eyes(name) if name in VLM_FAMILIES else None
        self.first_token = 30 if self.eyes else 3  # behind the special ones, placeholders among them
        self.precisions = SEEING_PRECISIONS if self.eyes else PRECISIONS
        if name == "gemma3":  # the oracle has none of windows, blocks and quantized keys at once
            self.precisions = (PLAIN,)
        self.rng = random.Random(seed)
        if self.eyes is not None:  # what the processor keeps of them is no array that was left
            for number in range(1, 13):
                self.eyes.prompt(shown(number, 56, 56), shown(number, 112, 84))
            if "video" in self.eyes.kinds:
                self.eyes.prompt(*(moving(number, count) for number in range(3) for count in (4, 6)))
        self.prompts = [self.random_tokens(self.rng.choice([40, 90, 200])) for _ in range(NUM_SYSTEM_PROMPTS)]
        self.past: deque[Answer] = deque(maxlen=40)
        self.sources = {
            str(lively.adapter(name, kind, number).resolve()): (kind, number)
            for kind in KINDS
            for number in range(2)
        }
        """Kind and number of an adapter by its folder."""
        self.answers: list[Answer] = []
        self.numbers = itertools.count()
        self.swap_lock = asyncio.Lock()

    def random_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(self.first_token, 259) for _ in range(count))

    def items(self, earlier: Answer | None) -> Items:
        rng, tail = self.rng, self.random_tokens(self.rng.choice([1, 3, 20, 70, 250]))
        if self.eyes is not None:
            for _ in range(rng.choice([0, 1, 1, 3])):
                at = rng.randrange(len(tail) + 1)
                tail = (*tail[:at], self.shown(), *tail[at:])
        if earlier is not None and (self.eyes is None or min(earlier.tokens) >= self.first_token):
            return (*earlier.items, *earlier.tokens, *tail)
        if rng.random() < 0.6:
            return self.prompts[min(int(rng.paretovariate(1)) - 1, NUM_SYSTEM_PROMPTS - 1)] + tail
        return tail

    def shown(self) -> Content:
        rng = self.rng
        if "video" in self.eyes.kinds and rng.random() < 0.2:
            return moving(rng.randrange(3), rng.choice([4, 6]))
        return shown(min(int(rng.paretovariate(1)), 12), *rng.choice([(56, 56), (112, 84)]))

    def prompt(self, items: Items) -> tuple[Items, Prompt]:
        """As much of it as fits the context."""
        while True:
            if self.eyes is None:
                prompt = Prompt(items)
            else:
                prompt = self.eyes.prompt(*([item] if isinstance(item, int) else item for item in items))
            over = len(prompt.token_ids) - (MAX_CONTEXT - 100)
            if over <= 0:
                return items, prompt
            items = items[:-over] if self.eyes is None else items[: -max(over // 20, 1)]

    def answer(self) -> Answer:
        """A request, about to be asked: the next turn of a conversation, or the first of one."""
        rng, registry = self.rng, self.worker.engine.registry
        earlier = rng.choice(self.past) if self.past and rng.random() < 0.4 else None
        adapter = rng.choice([None, *registry.names()])
        if earlier is not None:
            before = earlier.request.adapter.name if earlier.request.adapter else None
            adapter = before if before in registry.names() else None
        version = registry.acquire(adapter) if adapter else None
        sampling = Sampling(
            max_tokens=rng.choice([1, 4, 4, 12, 12, 12, 30, 30, 90, 300]),
            seed=rng.getrandbits(40),
            ignore_eos=True,
            **{"temperature": 0.0, **rng.choice(SAMPLINGS)},
        )
        items, prompt = self.prompt(self.items(earlier))
        is_broken = bool(prompt.media) and rng.random() < 0.03
        request = Request(
            str(next(self.numbers)),
            broken(prompt, rng.randrange(len(prompt.media)), math.nan) if is_broken else prompt,
            sampling,
            adapter=version,
            group=rng.choice(["", "many"]),
            tenant=earlier.request.tenant if earlier else rng.choice(["", "a", "b"]),
            precision=earlier.request.precision if earlier else rng.choice(self.precisions),
        )
        drafter = rng.choice(["none", *self.worker.engine.guesses.names])
        if (
            drafter == "ngram" and earlier is not None and rng.random() < 0.5
        ):  # to be looked up, and mostly wrong
            request = replace(request, prediction=Ngrams(array("q", earlier.tokens)))
        request = replace(request, drafter=drafter)
        source = self.sources[version.path] if version else ("base", 0)
        answer = Answer(request, items, source, is_broken, [])
        self.answers.append(answer)
        return answer

    async def swap(self) -> None:
        """An adapter in the place of another, or of none, or gone; as handlers do it, on a thread of their own."""
        kind, number = self.rng.choice(KINDS), self.rng.randrange(2)
        registry = self.worker.engine.registry
        async with self.swap_lock:
            if self.rng.random() < 0.2 and kind in registry.names():
                registry.unload(kind)
                return
            folder = self.lively.adapter(self.name, kind, number)
            await asyncio.to_thread(registry.load, kind, folder, replace=True)

    async def ask(self, answer: Answer) -> None:
        """Reads to the end, or leaves: by cancelling, by a listener that fails, by a loop that is gone."""
        rng, loop = self.rng, asyncio.get_running_loop()
        manner, patience = rng.random(), rng.choice([1, 2, 9, 40])
        events: asyncio.Queue[Event] = asyncio.Queue()
        if manner < 0.03:
            gone = asyncio.new_event_loop()
            gone.close()
            self.worker.submit(answer.request, events.put_nowait, gone)
            return
        heard: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def failing(event: Event) -> None:
            heard.put(event)
            loop.call_soon_threadsafe(events.put_nowait, event)
            if heard.qsize() == patience:
                raise ConnectionError("the listener is gone")

        if manner < 0.1:
            self.worker.submit(answer.request, failing)
        else:
            self.worker.submit(answer.request, events.put_nowait, loop)
        for number in itertools.count():
            event = await events.get()
            answer.tokens += event.token_ids
            if event.finish is not None:
                answer.final = event
                break
            if manner > 0.85 and number == patience:
                self.worker.cancel(answer.request.id)
        if event.finish == "length":
            self.past.append(answer)

    async def client(self, total: int) -> None:
        while len(self.answers) < total:
            if self.rng.random() < 0.1:
                await self.swap()
            await self.ask(self.answer())

    async def run(self, total: int) -> None:
        """Until so many requests have been asked in all."""
        await asyncio.gather(*(self.client(total) for _ in range(NUM_CLIENTS)))


@dataclass
class Held:
    """What a process holds when nothing runs and all is forgotten."""

    array_bytes: int
    resident_bytes: int


def until_idle(worker: Worker) -> None:
    for _ in range(20_000):
        if not worker.engine.has_work:
            return
        worker.call(lambda: None)  # whoever left is cancelled between two steps
    raise AssertionError(f"it never ends: {worker.stats()}")


def held_after_all(worker: Worker) -> Held:
    """Wait until nothing runs, forget everything, and look."""
    engine = worker.engine
    until_idle(worker)
    for name in engine.registry.names():
        engine.registry.unload(name)
    worker.call(engine.forget)
    for cache in [engine.prefixes.cache, *([engine.features._cache._cache] if engine.features else [])]:
        assert cache._disk.flush()  # what is being written is held by the thread that writes it
    worker.call(mx.clear_cache)
    gc.collect()
    return Held(mx.get_active_memory(), psutil.Process().memory_info().rss)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("full", 50),
        pytest.param("full", 700, marks=pytest.mark.large),
        pytest.param("sliding", 500, marks=pytest.mark.large),
        pytest.param("hybrid", 500, marks=pytest.mark.large),
        ("qwen3_vl", 40),
        pytest.param("qwen3_vl", 400, marks=pytest.mark.large),
        pytest.param("gemma3", 400, marks=pytest.mark.large),
        pytest.param("qwen3_5", 400, marks=pytest.mark.large),
    ],
)
def test_after_a_soak_nothing_is_left_and_every_answer_was_right(
    name, total, lively, assert_drawn, tmp_path, caplog, pytestconfig
):
    total *= pytestconfig.getoption("soak_times") if total > 50 else 1
    # What pytest keeps of a log holds the frames of a failed step, and their arrays.
    caplog.set_level(logging.CRITICAL, logger="serve.engine.worker")
    model = load(str(lively.folder(name)), name="soak")
    limits = EngineLimits(
        max_rows=6,
        max_context=MAX_CONTEXT,
        prefill_chunk_tokens=64,
        kv_budget_bytes=KV_BYTES,
        prefix_cache_dir=tmp_path / "prefixes",
        prefix_cache_disk_bytes=DISK_BYTES,
        encode_patches=64,
        feature_cache_bytes=FEATURE_BYTES,
        feature_cache_dir=tmp_path / "features",
        feature_cache_disk_bytes=FEATURE_DISK_BYTES,
        max_adapters=8,
        ahead=True,
    )
    lookup = LookupDrafter(remembered_tokens=1000)
    engine = Engine(model, limits, drafters={"ngram": lookup}, gains=Eager(4))
    faults = failing_now_and_then(model, random.Random(total))
    worker = Worker(engine)
    worker.start()
    try:
        soak = Soak(worker, name, lively, seed=total)
        with asyncio.Runner() as runner:
            runner.run(soak.run(total // 5))
            before = held_after_all(worker)
            runner.run(soak.run(total))
        until_idle(worker)
        assert worker.failure is None
        assert not lookup.num_rows, "who has ended is forgotten"
        worker.call(engine.prefixes.cache.check_integrity)
        assert 0 < num_file_bytes(tmp_path / "prefixes") <= DISK_BYTES
        if engine.features is not None:
            assert not engine.features._held, "features of nobody are held"
            worker.call(engine.features._cache.check_integrity)
            assert 0 < num_file_bytes(tmp_path / "features") <= FEATURE_DISK_BYTES
            assert 0 < worker.stats().features.num_hits < worker.stats().features.num_queries
        after = held_after_all(worker)
        stats = worker.stats()
        assert (stats.num_decoding, stats.num_prefilling, stats.num_waiting) == (0, 0, 0)
        assert stats.memory.kv_bytes == 0, "rows are left"
        assert stats.memory.adapter_bytes == 0, "adapters are left"
        assert (stats.memory.prefix_bytes, stats.prefixes.num_segments) == (0, 0), "a prefix is pinned"
        assert (stats.memory.feature_bytes, stats.features.num_kept) == (0, 0), "features are pinned"
        assert engine.registry.versions() == [], "a pin is left"
        engine.registry.check_integrity()
        engine.scheduler.check_integrity()
    finally:
        worker.stop()
        engine.close()
    assert not list(tmp_path.rglob("*.safetensors")), "what is forgotten is on disk"
    assert faults["failed"]
    ends = Counter(answer.final.finish for answer in soak.answers if answer.final is not None)
    assert ends["length"]
    if total >= 1000:  # how often is a matter of time
        assert stats.num_preempted > total // 100, stats
        assert stats.prefixes.num_hit_tokens, stats
        assert ends["length"] > total // 2, ends
        assert ends["cancelled"], ends
        assert ends["error"], ends
    for answer in soak.answers:
        check(answer, lively.module(name, *answer.source), assert_drawn)
    assert after.array_bytes - before.array_bytes < MAX_ARRAY_GROWTH_BYTES, "arrays are left"
    growth = after.resident_bytes - before.resident_bytes
    assert growth < MAX_GROWTH_BYTES or total < 1000, f"{growth >> 20} MiB more than after a fifth"


def num_file_bytes(folder: Path) -> int:
    """Of those that are there: the disk's thread may still delete some."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def check(answer: Answer, module: Any, assert_drawn: Any) -> None:
    """All of it was right, and as long as its end says."""
    final, request = answer.final, answer.request
    if final is not None and final.finish == "error":
        assert isinstance(final.error, GenerationError), final.error
        assert "injected" in str(final.error) or answer.is_broken, final.error
    if answer.is_broken:
        assert final is None or final.finish in ("error", "cancelled"), "nobody noticed a broken picture"
        assert not answer.tokens
        return
    if final is not None and final.finish == "length":
        room = MAX_CONTEXT - len(request.prompt.token_ids)
        assert len(answer.tokens) == min(request.sampling.max_tokens, room)
    if answer.tokens:
        assert_drawn(request, answer.tokens, module)
