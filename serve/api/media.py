"""What a chat shows -> what its prompt takes of it, off the event loop and within bounds.

Addresses are fetched by threads that wait, what came is decoded and processed by threads that work; there are so many
of each and no more, so that neither a slow host nor a huge picture holds up what others show. Nothing is decoded of a
request that shows more than the model's context can hold, and a client that leaves gives up its turn.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from serve.api.message_bodies import Message
from serve.api.parts import LOW_DETAIL_PIXELS, Shown
from serve.errors import ContextLengthError, OverloadedError, RequestError, StoppedError
from serve.media.parts import MediaPart, media_part
from serve.media.processor import Processed
from serve.media.settings import MediaSettings, settings_of
from serve.media.sources import check_count
from serve.model.prompt import MediaKind, Prompt
from serve.runtime import Runtime
from serve.sight import Blind, Sight, kinds_of

T = TypeVar("T")
FETCHING_THREADS = 16
MAX_WORKING_THREADS = 4
FETCHES_OF_ONE = 4
"""Threads that fetch for one request at a time; of those that work it has half. The others are for its neighbours."""
KWARGS = "mm_processor_kwargs"
RETRY_AFTER_S = 5.0

_PLURAL: Mapping[MediaKind, str] = {"image": "images", "video": "videos", "audio": "sounds"}


@dataclass(frozen=True)
class _Share:
    """What one request has of each pool's threads."""

    fetching: asyncio.Semaphore
    working: asyncio.Semaphore


class MediaDesk:
    """Looks at what the chats of one server show. For the event loop."""

    def __init__(self, runtime: Runtime) -> None:
        self._sight = runtime.sight
        self._max_context = runtime.max_context
        self._max_requests = runtime.config.max_waiting + runtime.config.max_rows
        self._num_requests = 0
        limits = runtime.config.media_limits
        self._limit_s = limits.fetch_s + limits.decode_s
        num_working = min(max(os.cpu_count() or 1, 2), MAX_WORKING_THREADS)
        # Threads end with the pools, and the pools with this object.
        self._fetching = ThreadPoolExecutor(FETCHING_THREADS, "lathe-fetch")
        self._working = ThreadPoolExecutor(num_working, "lathe-media")
        self._works_of_one = num_working // 2

    def close(self) -> None:
        """Nothing more is looked at; what has begun goes on."""
        for pool in (self._fetching, self._working):
            pool.shutdown(wait=False)

    async def look(self, messages: Sequence[Message], told: Mapping[str, Any] | None) -> list[Processed]:
        """What the messages show, in their order; nothing of text alone.

        told  mm_processor_kwargs
        RequestError names the part. OverloadedError if too many requests wait here already, or this one for too long.
        """
        shown = [
            (part, f"messages.{index}.content.{number}")
            for index, message in enumerate(messages)
            for number, part in message.shown
        ]
        sight = self._sight
        if isinstance(sight, Blind):
            _check_kinds(shown, kinds_of(sight), sight.reason)
            if told is not None:
                raise RequestError(f"{KWARGS}: this model reads text only{_because(sight.reason)}", KWARGS)
            return []
        settings = settings_of(told or {}, KWARGS).over(sight.settings)
        _check_kinds(shown, sight.processor.kinds, "")
        if not shown:
            return []
        parts = [_part(part, name) for part, name in shown]
        check_count(parts, sight.sources.limits)
        if self._num_requests >= self._max_requests:
            raise OverloadedError(
                f"{self._num_requests} requests that show something wait already", RETRY_AFTER_S
            )
        self._num_requests += 1
        share = _Share(asyncio.Semaphore(FETCHES_OF_ONE), asyncio.Semaphore(self._works_of_one))
        try:
            async with asyncio.timeout(self._limit_s):
                return await self._all(sight, parts, settings, share)
        except TimeoutError:
            raise OverloadedError(
                f"what the messages show was not ready within {self._limit_s:g} s (media_limits.fetch_s and "
                "decode_s): it is much, or the server is busy",
                RETRY_AFTER_S,
            ) from None
        finally:
            self._num_requests -= 1

    async def prompt(self, token_ids: tuple[int, ...], processed: Sequence[Processed]) -> Prompt:
        """The prompt of these tokens and of what `look` gave. RequestError if they do not belong together."""
        if isinstance(self._sight, Blind) or not processed:
            return Prompt(token_ids)
        return await _run(self._working, partial(self._sight.processor.prompt, token_ids, processed))

    async def _all(
        self, sight: Sight, parts: Sequence[MediaPart], settings: MediaSettings, share: _Share
    ) -> list[Processed]:
        tasks = [asyncio.ensure_future(self._one(sight, part, settings, share)) for part in parts]
        num_tokens = 0
        try:
            for done in asyncio.as_completed(tasks):
                num_tokens += (await done).num_placeholders
                if num_tokens >= self._max_context:
                    raise ContextLengthError(
                        f"This model's maximum context length is {self._max_context} tokens. However, what your "
                        f"messages show takes {num_tokens} of them at least; {KWARGS}.max_pixels makes it smaller.",
                        "messages",
                    )
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, sight: Sight, part: MediaPart, settings: MediaSettings, share: _Share) -> Processed:
        fetched = await self._fetched(sight, part, share)

        def work() -> Processed:
            content = sight.sources.load(fetched, settings)
            return sight.processor.process(content, fetched.settings.over(settings), part.name)

        async with share.working:
            return await _run(self._working, work)

    async def _fetched(self, sight: Sight, part: MediaPart, share: _Share) -> MediaPart:
        """The part with bytes where it had an address or a path."""

        async def read(source: Any, name: str) -> Any:
            if not isinstance(source, str) or source.lstrip()[:5].lower() == "data:":
                return source
            kind: MediaKind = part.kind if source is part.source else "image"
            async with share.fetching:
                return await _run(self._fetching, partial(sight.sources.read, source, kind, name))

        source = part.source
        if not isinstance(source, list):
            return replace(part, source=await read(source, part.name))
        if len(source) > sight.sources.limits.max_video_frames:
            return part  # refused by its length
        frames = [asyncio.ensure_future(read(each, f"{part.name}.{i}")) for i, each in enumerate(source)]
        try:
            return replace(part, source=await asyncio.gather(*frames))
        finally:
            for frame in frames:
                frame.cancel()


async def _run(pool: Executor, work: Callable[[], T]) -> T:
    """The result of `work` on a thread of the pool. Cancelled, it is left out if it has not begun."""
    try:
        working = asyncio.get_running_loop().run_in_executor(pool, work)
    except RuntimeError:  # the pool was shut down
        raise StoppedError("the model that was asked has been unloaded") from None
    return await working


def _part(shown: Shown, name: str) -> MediaPart:
    part = media_part(shown.model_dump(exclude_none=True), name)
    if not shown.is_low:
        return part
    return replace(part, settings=part.settings.over(MediaSettings(max_pixels=LOW_DETAIL_PIXELS)))


def _check_kinds(shown: Sequence[tuple[Shown, str]], kinds: Collection[MediaKind], reason: str) -> None:
    """RequestError that names the first part of a kind that is not among those the model takes."""
    for part, name in shown:
        if part.kind not in kinds:
            words = ["text", *(_PLURAL[kind] for kind in _PLURAL if kind in kinds)]
            reads = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
            raise RequestError(
                f"{name}: found a part of type {part.type!r}; {_PLURAL[part.kind]} are not accepted, this model "
                f"reads {reads} only{_because(reason)}",
                name,
            )


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""
