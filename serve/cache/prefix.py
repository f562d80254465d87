"""The prefix cache: finds what of a text was computed before, keeps what was computed, forgets what is not used.

Segments live outside the batch's rows, in a tree by tokens, in memory and perhaps on disk. Every space is its own:
another base, adapter, precision, tenant or salt never sees them. The thread that steps the engine alone calls it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from serve.cache.disk import Disk, Stored, StoredFile
from serve.cache.stats import PrefixStats
from serve.cache.tree import DISK, MEMORY, Found, Node, PrefixTree, itself
from serve.cache.tree import Space as Space

PENDING_SHARE = 4
"""Of the memory's bound, one part in so many may be segments that are out of the tree but not on disk yet."""


class Match:
    """A prefix that can be restored. Whoever was given it gives it back to `PrefixCache.release`, once.

    What it stands on cannot be evicted meanwhile, and its segments are at hand, also those that were on disk.
    """

    def __init__(self, node: Node, num_tokens: int, num_disk_tokens: int, segments: list[Any]) -> None:
        self.num_tokens = num_tokens
        self.num_disk_tokens = num_disk_tokens
        """So many of them were read from disk."""
        self.segments = segments
        """They follow each other; the last one may reach further than `num_tokens`."""
        self._node: Node | None = node

    def take_node(self) -> Node:
        """The node it pins, once."""
        node, self._node = self._node, None
        assert node is not None, "released twice"
        return node


class PrefixCache:
    """Prefixes of all spaces, least recently used ones leaving first.

    max_bytes  of segments in memory; those on disk have the disk's own bound
    window     the longest sliding window of the model's layers, in tokens; 0 where there is none
    has_state  layers keep recurrent state, so that prefixes end only where a segment did
    """

    def __init__(
        self, *, max_bytes: int, window: int = 0, has_state: bool = False, disk: Disk | None = None
    ) -> None:
        self.max_bytes = max_bytes
        self._disk = disk
        self._tree = PrefixTree(window=window, has_state=has_state, is_dropped=self._leaves_disk)
        self._bound = max_bytes
        self._num_queries = self._num_hits = 0
        self._num_query_tokens = self._num_hit_tokens = self._num_disk_hit_tokens = 0
        self._num_evicted = self._num_disk_evicted = 0
        if disk is not None:
            self._load(disk)

    @property
    def num_bytes(self) -> int:
        """Memory held by segments, those included that wait to be written. Any thread may ask."""
        return self._tree.tiers[MEMORY].num_bytes + self._num_leaving_bytes()

    @property
    def bound(self) -> int:
        """Bytes of memory that segments may take now."""
        return self._bound

    def match(
        self,
        space: Space,
        tokens: Sequence[int],
        limit: int,
        *,
        whole: Callable[[int], int] = itself,
        is_first: bool = True,
    ) -> Match | None:
        """The longest prefix of at most `limit` of these tokens that a row can be given; None if there is none.

        Segments on disk are read here, and come into memory. `whole` as `PrefixTree.find` takes it. `is_first`:
        counted as a query; False where the same request asks again.
        """
        self._settle()
        match = self._find(space, tokens, min(limit, len(tokens)), whole)
        if is_first:
            self._count(min(limit, len(tokens)), match)
        self._fit()
        return match

    def release(self, match: Match) -> None:
        """The match is in its row, or will not be."""
        self._tree.unpin(match.take_node())
        self._fit()

    def known(self, space: Space, tokens: Sequence[int]) -> int:
        """How many of these tokens need not be captured for all of them to be restorable; all, if they are.

        Ask with exactly the tokens that a row holds: a capture starts at the answer, and ends with the last of them.
        The answer may be less than what is kept, where that lacks the window or state that going on from here needs.
        """
        return self._tree.known(space, tokens, start_after(space))

    def is_in_memory(self, space: Space, tokens: Sequence[int]) -> bool:
        """Whether a row could be given all of these tokens without the disk."""
        threshold = start_after(space)
        found = self._tree.find(space, tokens, len(tokens), threshold)
        return (
            found is not None
            and found.num_tokens == len(tokens)
            and all(self._tree.tier_for(node, len(tokens), threshold) == MEMORY for node in found.path)
        )

    def num_shared(self, space: Space, tokens: Sequence[int], limit: int) -> int:
        """How many of the first `limit` tokens another text began with, though it cannot be restored there."""
        return self._tree.num_shared(space, tokens, limit)

    def insert(self, space: Space, tokens: Sequence[int], start: int, segment: Any) -> None:
        """Keep positions [start, start + segment.num_tokens) of these tokens. The segment is the cache's from now on.

        Its arrays are evaluated. Nothing is kept of what is there already, of a segment whose beginning has been
        evicted meanwhile, and of one that is larger than the memory there is.
        """
        self._settle()
        if segment.num_bytes > self._bound:
            return
        nodes = self._tree.insert(space, tokens, start, segment)
        if self._disk is not None:
            for node in nodes:
                self._write(node)
        self._fit()

    def shrink(self, max_bytes: int) -> None:
        """From here on no more than so many bytes of memory, and no more than the cache's own bound."""
        self._settle()
        self._bound = min(max_bytes, self.max_bytes)
        self._fit()

    def clear(self, tenant: str | None = None) -> None:
        """Forget a tenant's prefixes, in memory and on disk; everybody's, where none is named."""
        self._settle()
        for space in self._tree.spaces:
            if tenant is None or space.tenant == tenant:
                self._tree.clear(space)
        self._settle()

    def bytes_of(self, adapter: str) -> int:
        """Memory held by segments of one adapter's spaces."""
        nodes = (
            node
            for space in self._tree.spaces
            if space.adapter == adapter
            for node in self._tree.nodes(space)
        )
        return sum(node.kept[MEMORY].num_bytes for node in nodes if node.kept[MEMORY] is not None)

    def close(self) -> None:
        """Write what waits for the disk, and let go of its folder."""
        if self._disk is not None:
            self._disk.close()

    def stats(self) -> PrefixStats:
        """A snapshot; any thread may ask."""
        disk = self._disk
        return PrefixStats(
            num_queries=self._num_queries,
            num_hits=self._num_hits,
            num_query_tokens=self._num_query_tokens,
            num_hit_tokens=self._num_hit_tokens,
            num_disk_hit_tokens=self._num_disk_hit_tokens,
            num_evicted=self._num_evicted,
            num_disk_evicted=self._num_disk_evicted,
            disk_bytes=disk.num_bytes if disk else 0,
            num_segments=sum(tier.num_nodes for tier in self._tree.tiers),
            num_disk_dropped=disk.num_dropped if disk else 0,
            num_disk_errors=disk.num_errors if disk else 0,
        )

    def check_integrity(self) -> None:
        """AssertionError if the accounts are wrong."""
        self._tree.check_integrity()
        assert self.num_bytes <= self._bound or self._is_stuck()

    # Finding

    def _find(
        self, space: Space, tokens: Sequence[int], limit: int, whole: Callable[[int], int]
    ) -> Match | None:
        """A file that cannot be read leaves the tree, and what is left is asked again."""
        threshold = start_after(space)
        while (found := self._tree.find(space, tokens, limit, threshold, whole)) is not None:
            segments = self._segments(found, threshold)
            if segments is not None:
                return self._pinned(found, segments)
        return None

    def _segments(self, found: Found, threshold: int) -> list[tuple[Any, bool]] | None:
        """One a node, and whether it comes from disk; None if one could not be read."""
        segments: list[tuple[Any, bool]] = []
        file: StoredFile | None = None
        whole: Any = None
        for node in found.path:
            tier = self._tree.tier_for(node, found.num_tokens, threshold)
            assert tier is not None
            if tier == MEMORY:
                segments.append((node.kept[MEMORY], False))
                continue
            stored: Stored = node.kept[DISK]
            assert self._disk is not None
            if stored.file is not file:
                file, whole = stored.file, self._disk.read(stored.file)
            if whole is None:
                self._lose(stored.file)
                return None
            segments.append((stored.part_of(whole), True))
        return segments

    def _pinned(self, found: Found, segments: list[tuple[Any, bool]]) -> Match:
        """What was read comes into memory, if there is room for it all."""
        last = found.path[-1]
        self._tree.pin(last)
        is_roomy = sum(segment.num_bytes for segment, is_read in segments if is_read) <= self._bound
        self._note_use(found.path)
        num_disk_tokens = 0
        for node, (segment, is_read) in zip(found.path, segments, strict=True):
            if is_read:
                num_disk_tokens += min(node.stop, found.num_tokens) - node.start
                if is_roomy:
                    self._tree.keep(node, MEMORY, segment)
        return Match(last, found.num_tokens, num_disk_tokens, [segment for segment, _ in segments])

    def _count(self, num_asked: int, match: Match | None) -> None:
        self._num_queries += 1
        self._num_query_tokens += num_asked
        if match is not None:
            self._num_hits += 1
            self._num_hit_tokens += match.num_tokens
            self._num_disk_hit_tokens += match.num_disk_tokens

    # Forgetting

    def _fit(self) -> None:
        """Evict until memory is within its bound. What cannot leave now (pinned, being written) leaves later."""
        while self.num_bytes > self._bound:
            is_behind = self._num_leaving_bytes() > self._bound // PENDING_SHARE
            if is_behind and self._cancel_write():
                continue
            if not self._evict() and not self._cancel_write():
                return

    def _evict(self) -> bool:
        oldest = self._tree.oldest(MEMORY)
        if oldest is None:
            return False
        if self._disk is not None and oldest.kept[DISK] is None:
            self._write(oldest)
        self._tree.forget(oldest, MEMORY)
        self._num_evicted += 1
        return True

    def _is_stuck(self) -> bool:
        return self._tree.oldest(MEMORY) is None

    # The disk

    def _load(self, disk: Disk) -> None:
        """What an earlier process has left, in the order of its last uses."""
        ends = []
        for space, tokens, file in disk.take_found():
            nodes = self._tree.insert(space, array("q", tokens), file.start, file.stored(), DISK)
            if nodes:
                file.node = nodes[-1]
                ends.append(file)
        for file in sorted(ends, key=lambda file: file.used_at):
            if file.node is not None and not file.node.is_gone:
                self._tree.touch(file.node)
        self._fit_disk(0)

    def _write(self, node: Node) -> None:
        """Hand a node's segment to the disk, unless that has as good a one."""
        disk, segment = self._disk, node.kept[MEMORY]
        assert disk is not None
        if not self._tree.would_serve_more(node, DISK, segment):
            return
        space, tokens = self._tree.text_of(node)
        num_bytes = disk.size_of(segment)
        if num_bytes > disk.max_bytes:
            return
        self._fit_disk(num_bytes)
        if node.is_gone or node.kept[MEMORY] is not segment:
            return
        file = disk.write(space, tokens, node.start, segment, num_bytes)
        file.node = node
        self._tree.keep(node, DISK, file.stored())
        self._tree.touch(node, (DISK,))

    def _note_use(self, path: Sequence[Node]) -> None:
        """For the order in which files leave after a restart."""
        if self._disk is not None:
            now = time.time()
            for node in path:
                if node.kept[DISK] is not None:
                    self._disk.use(node.kept[DISK].file, now)

    def _num_leaving_bytes(self) -> int:
        """Segments that wait for the disk, and are in memory for nothing else."""
        if self._disk is None or not self._disk.waiting:
            return 0
        # Copied at once: whoever asks for numbers may be another thread.
        return sum(file.payload_bytes for file in list(self._disk.waiting) if _is_leaving(file))

    def _fit_disk(self, num_bytes: int) -> None:
        """Room on disk for so many bytes more."""
        assert self._disk is not None
        while self._disk.num_bytes + num_bytes > self._disk.max_bytes:
            if self._tree.evict(DISK) is None:
                return
            self._num_disk_evicted += 1

    def _settle(self) -> None:
        """What the disk's thread has done since."""
        if self._disk is None:
            return
        for file, is_written in self._disk.settle():
            if not is_written:
                self._lose(file)
        self._fit_disk(0)

    def _cancel_write(self) -> bool:
        """Give up the oldest segment that waits for the disk and is in memory no more."""
        if self._disk is None:
            return False
        for file in self._disk.waiting:
            if _is_leaving(file) and self._disk.cancel(file):
                self._lose(file)
                return True
        return False

    def _lose(self, file: StoredFile) -> None:
        """A file is not there: its nodes keep nothing on disk."""
        node = file.node
        while node is not None and node.parent is not None and node.start >= file.start:
            stored, parent = node.kept[DISK], node.parent
            if stored is not None and stored.file is file:
                self._tree.forget(node, DISK)
            node = parent

    def _leaves_disk(self, stored: Stored) -> None:
        """The tree has let go of a part of a file; a file of no parts is deleted."""
        assert self._disk is not None
        stored.file.num_parts -= 1
        if stored.file.num_parts == 0:
            self._disk.remove(stored.file)


def _is_leaving(file: StoredFile) -> bool:
    return file.node is None or file.node.kept[MEMORY] is not file.payload


def start_after(space: Space) -> int:
    """`KvPrecision.start_after` of the label in a space."""
    return 0 if space.precision == "plain" else int(space.precision.split(":")[-2])
