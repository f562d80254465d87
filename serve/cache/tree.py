"""A radix tree over tokens' keys: what is kept of every prefix, in two tiers (memory and disk). No arrays.

A key is a token's id; where a picture stands, a number that follows from the picture (`Prompt.keys`).

A node holds the tokens [start, stop) of every sequence that goes through it, as many as its text has in common, and
keeps a payload for them in at least one tier. Payloads are cut where sequences part. What is used is used with
everything before it, so a tier's least recently used node has none of its tier's nodes behind it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self

from serve.cache.precision import KvPrecision

TOKEN_BYTES = array("q").itemsize
MEMORY, DISK = 0, 1
TIERS = (MEMORY, DISK)


def itself(length: int) -> int:
    """Any prefix may be asked for."""
    return length


class Space(NamedTuple):
    """What two sequences must share, besides their tokens, to share keys and values."""

    base: str
    """Fingerprint of the base's weights."""
    adapter: str
    """Content hash of the adapter's tensors; "" is the base."""
    precision: str
    """`KvPrecision.label`."""
    tenant: str = ""
    salt: str = ""
    media: str = ""
    """Of what picture features are kept; "" where keys and values of a text are."""


class Payload(Protocol):
    """Keys and values of consecutive positions."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def precision(self) -> KvPrecision: ...
    @property
    def num_window_tokens(self) -> int:
        """So many of the last tokens have what sliding windows need; all where no layer has one."""

    @property
    def has_state(self) -> bool:
        """The recurrent state after the last token is there, or none is needed."""

    def cut(self, at: int) -> tuple[Self, Self]:
        """The first `at` tokens and the others; the state after the last goes with those."""


class Node:
    """Tokens [start, stop) behind its parent's."""

    __slots__ = ("children", "is_gone", "kept", "num_pins", "parent", "start", "stop", "tokens")

    def __init__(self, parent: Node | None, start: int, tokens: bytes) -> None:
        self.parent = parent
        self.start = start
        self.stop = start + len(tokens) // TOKEN_BYTES
        self.tokens = tokens
        self.children: dict[bytes, Node] = {}
        """By the bytes of their first token."""
        self.kept: list[Any] = [None for _ in TIERS]
        """A payload or None, by tier."""
        self.num_pins = 0
        self.is_gone = False
        """Taken out of the tree; a pinned one keeps its payloads until it is released."""

    @property
    def num_tokens(self) -> int:
        """Its own, without its parents'."""
        return self.stop - self.start

    def path(self) -> Iterator[Node]:
        """This node and those before it, the root left out."""
        node: Node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Root(Node):
    """Where a space begins; it holds no token."""

    __slots__ = ("space",)

    def __init__(self, space: Space) -> None:
        super().__init__(None, 0, b"")
        self.space = space


class Found(NamedTuple):
    """The longest prefix that can be restored."""

    path: list[Node]
    """From the first token on; the last node may reach further than `num_tokens`."""
    num_tokens: int


class Tier:
    """Who keeps something here. `is_dropped` is called with each payload that the tree no longer holds here."""

    def __init__(self, is_dropped: Callable[[Any], None]) -> None:
        self.is_dropped = is_dropped
        self.num_bytes = 0
        self.num_nodes = 0
        self.order: OrderedDict[Node, None] = OrderedDict()
        """Unpinned nodes that keep something here, the least recently used first, children before parents."""


class PrefixTree:
    """The nodes of all spaces. One thread at a time.

    window     positions that sliding layers look back, the token's own included; 0 where there are none
    has_state  the model has recurrent layers: a prefix ends only where their state was kept
    """

    def __init__(
        self,
        *,
        window: int = 0,
        has_state: bool = False,
        is_dropped: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """`is_dropped` is called with each payload of the disk's tier that the tree no longer holds."""
        self.window = window
        self.has_state = has_state
        self.tiers = (Tier(lambda _: None), Tier(is_dropped))
        self._roots: dict[Space, Root] = {}

    @property
    def spaces(self) -> list[Space]:
        """Those in which something is kept."""
        return list(self._roots)

    def nodes(self, space: Space) -> Iterator[Node]:
        """All nodes of a space, parents first."""
        return _below(self._roots[space]) if space in self._roots else iter(())

    # Looking

    def find(
        self,
        space: Space,
        tokens: Sequence[int],
        limit: int,
        start_after: int = 0,
        whole: Callable[[int], int] = itself,
    ) -> Found | None:
        """The longest prefix of at most `limit` of these tokens that can be restored. Nothing changes.

        `start_after`: a prefix of at most so many tokens is restored from plain payloads alone, as
        `KvPrecision.start_after` says of the row. `whole(n)`: the longest prefix of at most n tokens that may be
        asked for at all.
        """
        path, length = self._walk(space, tokens, limit)
        length = whole(length)
        for node in reversed(path):
            if node.start < length and self.tier_for(node, length, start_after) is None:
                length = whole(node.start)
        if length == 0:
            return None
        return Found([node for node in path if node.start < length], length)

    def num_shared(self, space: Space, tokens: Sequence[int], limit: int) -> int:
        """How many of the first `limit` tokens another text began with, restorable there or not."""
        return self._walk(space, tokens, limit)[1]

    def tier_for(self, node: Node, length: int, start_after: int) -> int | None:
        """Where a prefix of `length` tokens finds what it needs of this node; None if nowhere."""
        for tier in TIERS:
            if self._serves(node, tier, length, start_after):
                return tier
        return None

    def known(self, space: Space, tokens: Sequence[int], start_after: int = 0) -> int:
        """How many of these tokens need not be inserted for all of them to be restorable afterwards.

        All of them, if they are restorable now. Less than the tree has, where it lacks a window or a state that a
        prefix of exactly these tokens needs.
        """
        stop = len(tokens)
        path, length = self._walk(space, tokens, stop)
        for node in reversed(path):
            if self.tier_for(node, stop, start_after) is None:
                is_at_end = node.stop >= stop and self._has_all_but_state(node, stop, start_after)
                length = min(length, stop - 1 if is_at_end else node.start)
        return length

    def _serves(self, node: Node, tier: int, length: int, start_after: int) -> bool:
        if self.has_state and node.start < length <= node.stop:
            kept = node.kept[tier]
            if kept is None or length < node.stop or not kept.has_state:
                return False
        return self._serves_but_for_state(node, tier, length, start_after)

    def _serves_but_for_state(self, node: Node, tier: int, length: int, start_after: int) -> bool:
        kept = node.kept[tier]
        if kept is None:
            return False
        is_seen = node.stop > length - self.window
        if self.window and is_seen and _window_start(node, kept) > max(node.start, length - self.window):
            return False
        return length > start_after or kept.precision.is_plain

    def _has_all_but_state(self, node: Node, length: int, start_after: int) -> bool:
        return any(self._serves_but_for_state(node, tier, length, start_after) for tier in TIERS)

    def _walk(self, space: Space, tokens: Sequence[int], limit: int) -> tuple[list[Node], int]:
        """The nodes that hold tokens [0, length), the last one perhaps more; and that length, at most `limit`."""
        path: list[Node] = []
        text = _Text(tokens, limit)
        position = 0
        node: Node | None = self._roots.get(space)
        while node is not None and position < text.length:
            node = node.children.get(text.part(position, position + 1))
            if node is None:
                break
            path.append(node)
            asked = text.part(position, min(node.stop, text.length))
            position += _common(node.tokens, asked)
            if position < node.stop:
                break
        return path, position

    # Keeping

    def insert(
        self, space: Space, tokens: Sequence[int], start: int, payload: Any, tier: int = MEMORY
    ) -> list[Node]:
        """Keep a payload of positions [start, start + payload.num_tokens) of these tokens. Counts as a use.

        Returns the nodes that now keep a part of it: what no node had in this tier, or had less of (no window, no
        state, quantized). None of it, where the tree lacks the tokens before `start`.
        """
        stop = start + payload.num_tokens
        assert 0 <= start < stop <= len(tokens)
        path, length = self._walk(space, tokens, stop)
        if length < start:
            self.tiers[tier].is_dropped(payload)
            return []
        rest, position = payload, start
        taken: list[Node] = []
        node: Node = self._roots.get(space) or self._plant(space)
        for node in path:
            end = min(node.stop, length)
            if end <= start or not self._is_better(node, tier, end, payload, stop):
                continue
            rest, position = self._skip(rest, position, max(node.start, start), tier)
            if node.start < position:
                self._split(node, position - node.start)
            node = self._split(node, end - position) if end < node.stop else node
            rest, position = self._give(node, rest, position, end, tier)
            taken.append(node)
        if length < stop:
            rest, position = self._skip(rest, position, length, tier)
            node = self._grow(node, tokens, position, stop)
            rest, position = self._give(node, rest, position, stop, tier)
            taken.append(node)
        self._skip(rest, position, stop, tier)
        self.touch(node)
        return taken

    def touch(self, node: Node, tiers: Sequence[int] = TIERS) -> None:
        """This node, and all before it, are used now."""
        for one in node.path():
            if one.num_pins == 0:
                for tier in tiers:
                    if one.kept[tier] is not None:
                        self.tiers[tier].order[one] = None
                        self.tiers[tier].order.move_to_end(one)

    def would_serve_more(self, node: Node, tier: int, payload: Any) -> bool:
        """Whether a payload of all of the node's tokens has what the one in this tier lacks."""
        return self._is_better(node, tier, node.stop, payload, node.stop)

    def text_of(self, node: Node) -> tuple[Space, bytes]:
        """The node's space, and all tokens up to its end, as `array("q")` has them."""
        parts = []
        one = node
        while one.parent is not None:
            parts.append(one.tokens)
            one = one.parent
        assert isinstance(one, Root)
        return one.space, b"".join(reversed(parts))

    def tiers_of(self, node: Node) -> list[Tier]:
        """The tiers in which it keeps something."""
        return [tier for tier, kept in zip(self.tiers, node.kept, strict=True) if kept is not None]

    def keep(self, node: Node, tier: int, payload: Any) -> None:
        """All of this node's tokens, in place of what it kept in this tier."""
        assert payload.num_tokens == node.num_tokens
        assert not node.is_gone
        self._drop(node, tier)
        node.kept[tier] = payload
        self.tiers[tier].num_bytes += payload.num_bytes
        self.tiers[tier].num_nodes += 1
        if node.num_pins == 0:
            self.tiers[tier].order[node] = None

    # Pins

    def pin(self, node: Node) -> None:
        """Keep it, and all before it, from being evicted. What splits later stays pinned in both halves."""
        for one in node.path():
            one.num_pins += 1
            if one.num_pins == 1:
                for tier in self.tiers:
                    tier.order.pop(one, None)

    def unpin(self, node: Node) -> None:
        """Undo one `pin` of this node; counts as a use."""
        for one in node.path():
            assert one.num_pins > 0, "released more often than pinned"
            one.num_pins -= 1
            if one.num_pins == 0 and one.is_gone:
                self._drop_all(one)
        self.touch(node)

    # Leaving

    def oldest(self, tier: int) -> Node | None:
        """The least recently used unpinned node of a tier; None if there is none."""
        return next(iter(self.tiers[tier].order), None)

    def evict(self, tier: int) -> Node | None:
        """Forget the oldest node of a tier, and return it."""
        node = self.oldest(tier)
        if node is not None:
            self.forget(node, tier)
        return node

    def forget(self, node: Node, tier: int) -> None:
        """Drop what a node keeps in a tier. One that keeps nothing leaves the tree, with all behind it."""
        self._drop(node, tier)
        if not self.tiers_of(node):
            self._remove(node)

    def clear(self, space: Space) -> None:
        """Take all of a space out. What is pinned is dropped when it is released."""
        root = self._roots.pop(space, None)
        if root is not None:
            for child in list(root.children.values()):
                self._take_out(child)

    def check_integrity(self) -> None:
        """AssertionError if the tree's accounts are wrong."""
        kept: dict[int, list[Node]] = {tier: [] for tier in TIERS}
        for root in self._roots.values():
            assert root.children, "an empty space"
            for node in _below(root):
                self._check_node(node)
                for tier in TIERS:
                    if node.kept[tier] is not None:
                        kept[tier].append(node)
        for tier, nodes in kept.items():
            account = self.tiers[tier]
            assert set(account.order) == {node for node in nodes if node.num_pins == 0}
            rank = {node: number for number, node in enumerate(account.order)}
            for node in account.order:
                parent = node.parent
                assert parent not in rank or rank[node] < rank[parent], "a parent goes before its child"
            # Pinned nodes that were taken out are still counted.
            rest = account.num_bytes - sum(node.kept[tier].num_bytes for node in nodes)
            num_gone = account.num_nodes - len(nodes)
            assert (rest == num_gone == 0) or (rest > 0 and num_gone > 0), "bytes of nobody"

    def _check_node(self, node: Node) -> None:
        assert node.parent is not None
        assert node.tokens
        assert not node.is_gone
        assert node.start == node.parent.stop
        assert node.parent.children[node.tokens[:TOKEN_BYTES]] is node
        assert self.tiers_of(node), "a node that keeps nothing"
        assert node.num_pins >= sum(child.num_pins for child in node.children.values())
        for kept in node.kept:
            assert kept is None or kept.num_tokens == node.num_tokens

    # Parts of the above

    def _is_better(self, node: Node, tier: int, end: int, payload: Any, stop: int) -> bool:
        """Whether a payload that ends at `stop` serves positions up to `end` of this node as nothing there does."""
        old = node.kept[tier]
        if old is None:
            return True
        start = max(node.start, stop - payload.num_tokens)
        virtues = [(payload.precision.is_plain, old.precision.is_plain)]
        if self.window:
            new_start, old_start = stop - payload.num_window_tokens, _window_start(node, old)
            virtues.append((end - max(new_start, start), end - max(old_start, start)))
        if self.has_state:
            virtues.append((payload.has_state and end == stop, old.has_state and end == node.stop))
        return all(new >= was for new, was in virtues) and any(new > was for new, was in virtues)

    def _skip(self, rest: Any, position: int, until: int, tier: int) -> tuple[Any, int]:
        """What is left of a payload from `until` on."""
        if until == position or rest is None:
            return rest, position
        first, second = _cut(rest, until - position)
        self.tiers[tier].is_dropped(first)
        return second, until

    def _give(self, node: Node, rest: Any, position: int, until: int, tier: int) -> tuple[Any, int]:
        first, second = _cut(rest, until - position)
        self.keep(node, tier, first)
        return second, until

    def _plant(self, space: Space) -> Root:
        root = self._roots[space] = Root(space)
        return root

    def _grow(self, parent: Node, tokens: Sequence[int], start: int, stop: int) -> Node:
        """A new node behind the first tokens of `parent`, up to `start`; it keeps nothing yet."""
        if start < parent.stop:
            parent = self._split(parent, start - parent.start)
        node = Node(parent, start, _encode(tokens, start, stop))
        parent.children[node.tokens[:TOKEN_BYTES]] = node
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Its first `at` tokens become a new node before it, which is returned; the caller touches it."""
        parent = node.parent
        assert parent is not None
        head, tail = node.tokens[: at * TOKEN_BYTES], node.tokens[at * TOKEN_BYTES :]
        first = Node(parent, node.start, head)
        first.num_pins = node.num_pins
        parent.children[head[:TOKEN_BYTES]] = first
        first.children[tail[:TOKEN_BYTES]] = node
        node.parent, node.start, node.tokens = first, node.start + at, tail
        for tier, account in enumerate(self.tiers):
            whole = node.kept[tier]
            if whole is not None:
                first.kept[tier], node.kept[tier] = whole.cut(at)
                account.num_bytes += first.kept[tier].num_bytes + node.kept[tier].num_bytes - whole.num_bytes
                account.num_nodes += 1
                if first.num_pins == 0:
                    account.order[first] = None
        return first

    def _drop(self, node: Node, tier: int) -> None:
        kept, account = node.kept[tier], self.tiers[tier]
        if kept is None:
            return
        node.kept[tier] = None
        account.order.pop(node, None)
        account.num_bytes -= kept.num_bytes
        account.num_nodes -= 1
        account.is_dropped(kept)

    def _drop_all(self, node: Node) -> None:
        for tier in TIERS:
            self._drop(node, tier)

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        if node.is_gone:
            return
        del parent.children[node.tokens[:TOKEN_BYTES]]
        self._take_out(node)
        if isinstance(parent, Root) and not parent.children:
            del self._roots[parent.space]

    def _take_out(self, node: Node) -> None:
        for one in [node, *_below(node)]:
            one.is_gone = True
            for tier in self.tiers:
                tier.order.pop(one, None)
            if one.num_pins == 0:
                self._drop_all(one)


def _below(node: Node) -> Iterator[Node]:
    stack = list(node.children.values())
    while stack:
        one = stack.pop()
        yield one
        stack += one.children.values()


def _window_start(node: Node, kept: Any) -> int:
    """From this position on a payload of all of the node's tokens has what sliding windows need."""
    return node.stop - int(kept.num_window_tokens)


class _Text:
    """The first `limit` tokens as bytes, which compare at the speed of memory; made as far as they are asked for."""

    def __init__(self, tokens: Sequence[int], limit: int) -> None:
        self.length = min(limit, len(tokens))
        self._tokens = tokens
        self._bytes = b""

    def part(self, start: int, stop: int) -> bytes:
        """Tokens [start, stop)."""
        if stop * TOKEN_BYTES > len(self._bytes):
            reach = min(max(stop, 2 * len(self._bytes) // TOKEN_BYTES, 256), self.length)
            self._bytes = _encode(self._tokens, 0, reach)
        return self._bytes[start * TOKEN_BYTES : stop * TOKEN_BYTES]


def _encode(tokens: Sequence[int], start: int, stop: int) -> bytes:
    part = tokens[start:stop]
    if isinstance(part, array) and part.typecode == "q":
        return part.tobytes()
    return array("q", part).tobytes()


def _common(one: bytes, other: bytes) -> int:
    """Tokens that both begin with."""
    if one == other or one.startswith(other):
        return len(other) // TOKEN_BYTES
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        part = slice(low * TOKEN_BYTES, middle * TOKEN_BYTES)
        low, high = (middle, high) if one[part] == other[part] else (low, middle - 1)
    return low


def _cut(payload: Any, at: int) -> tuple[Any, Any]:
    return (payload, None) if at == payload.num_tokens else payload.cut(at)
