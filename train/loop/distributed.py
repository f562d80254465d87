"""Processes that train one model together: sums over all of them. One process is a group of one, at no cost.

Started by `mlx.launch`, N processes each read the same recipe and data, take every N-th row of the same global
batches, and move the same weights by the same sums: one process with N times the batch, cut in parts. Rank 0 alone
reads checkpoints, writes and prints. Every call here is made by all processes in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from serve.errors import ConfigError, TrainingError

MAX_CHUNK_BYTES = 1 << 28
"""Arrays of a dtype travel as one, unless they are more than this: it bounds the copy."""


class Shareable(Protocol):
    """What `share` needs of a batch, a frozen dataclass: `train.data.batches.Batch` is one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def tokens(self) -> np.ndarray: ...  # [B, T]

    @property
    def row_ids(self) -> Sequence[int]: ...


B = TypeVar("B", bound=Shareable)


class Ranks(Protocol):
    """The processes of a run."""

    @property
    def rank(self) -> int:
        """This process, from 0; 0 writes and prints."""
        ...

    @property
    def size(self) -> int: ...

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Host numbers of each process, exactly, by rank; everywhere as many."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, by rank: anything JSON can say."""
        ...

    def sum_tree(self, tree: Any) -> Any:
        """A tree of arrays, each summed over the processes, with the same bits in each; lazy."""
        ...

    def first_tree(self, tree: Any) -> Any:
        """Rank 0's arrays, bit for bit, where each process has a tree of the same shapes."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Its own."""
        return [list(numbers)]

    def gather(self, value: Any) -> list[Any]:
        """Its own."""
        return [value]

    def sum_tree(self, tree: Any) -> Any:
        """Unchanged."""
        return tree

    def first_tree(self, tree: Any) -> Any:
        """Unchanged."""
        return tree


class Group:
    """Two or more processes over an MLX group: ring, jaccl, MPI or NCCL."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        self.rank: int = group.rank()
        self.size: int = group.size()

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """As 32-bit halves of 64-bit floats, which every backend carries."""
        halves = mx.array(np.array(numbers, np.float64).view(np.uint32))
        gathered = np.array(mx.distributed.all_gather(halves[None], group=self._group))  # [ranks, 2 n]
        rows: list[list[float]] = np.ascontiguousarray(gathered).view(np.float64).tolist()
        return rows

    def gather(self, value: Any) -> list[Any]:
        """As JSON text, its length sent ahead."""
        encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = [int(row[0]) for row in self.gather_numbers([len(encoded)])]
        padded = mx.array(np.pad(encoded, (0, max(lengths) - len(encoded))))
        rows = np.array(mx.distributed.all_gather(padded[None], group=self._group))
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def sum_tree(self, tree: Any) -> Any:
        """One sum for each dtype."""
        return _joined(tree, lambda flat: mx.distributed.all_sum(flat, group=self._group))

    def first_tree(self, tree: Any) -> Any:
        """As bytes, which only rank 0 sends: adding zeros to floats would turn -0 into 0."""

        def sent(flat: mx.array) -> mx.array:
            return mx.distributed.all_sum(flat.view(mx.uint8), group=self._group).view(flat.dtype)

        received = _joined(tree_map(mx.zeros_like, tree) if self.rank else tree, sent)
        mx.eval(received)
        return received


def _joined(tree: Any, send: Callable[[mx.array], mx.array]) -> Any:
    """The tree with `send` done to its arrays, joined by dtype: flat [n] in, flat [n] out."""
    leaves: dict[str, mx.array] = tree_flatten(tree, destination={})
    received: dict[str, mx.array] = {}
    last: list[mx.array] = []
    for paths in _chunks(leaves):
        arrays = [leaves[path] for path in paths]
        flat = mx.concatenate([array.reshape(-1) for array in arrays])
        # One after the other, for evaluation may take independent sums in another order in each process.
        sent = send(mx.depends(flat, last) if last else flat)
        last = [sent]
        stops = np.cumsum([array.size for array in arrays]).tolist()
        for path, array, stop in zip(paths, arrays, stops, strict=True):
            received[path] = sent[stop - array.size : stop].reshape(array.shape)
    return tree_map_with_path(lambda path, _: received[path or ""], tree)


def _chunks(leaves: Mapping[str, mx.array]) -> Iterator[list[str]]:
    """Paths of arrays of one dtype each, of at most MAX_CHUNK_BYTES unless one array is more.

    In the paths' own order: where the processes built their trees in another one, arrays still meet their like.
    """
    for dtype in sorted({str(array.dtype) for array in leaves.values()}):
        chunk: list[str] = []
        num_bytes = 0
        for path in sorted(path for path, array in leaves.items() if str(array.dtype) == dtype):
            if chunk and num_bytes + leaves[path].nbytes > MAX_CHUNK_BYTES:
                yield chunk
                chunk, num_bytes = [], 0
            chunk.append(path)
            num_bytes += leaves[path].nbytes
        yield chunk


def join() -> Ranks:
    """The group this process was launched in; a process that was not is alone."""
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise TrainingError(f"the processes of this run did not find each other: {error}") from error
    return Alone() if group.size() == 1 else Group(group)


def sum_named(ranks: Ranks, values: Mapping[str, float]) -> dict[str, float]:
    """Numbers by name, summed over the processes; one that a process does not name is 0 there."""
    gathered: list[dict[str, float]] = ranks.gather(dict(values))
    names = dict.fromkeys(name for each in gathered for name in each)
    return {name: sum(each.get(name, 0.0) for each in gathered) for name in names}


def check_same(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """ConfigError, in every process, naming the facts in which one differs from rank 0."""
    first, *others = ranks.gather(dict(facts))
    problems = [
        f"  rank {rank}: {name} is {theirs.get(name)}, rank 0 has {value}"
        for rank, theirs in enumerate(others, 1)
        for name, value in first.items()
        if theirs.get(name) != value
    ]
    if problems:
        listing = "\n".join(problems)
        raise ConfigError(
            f"the processes of a run need the same recipe, data, base and versions, but:\n{listing}"
        )


def share(batch: B, ranks: Ranks) -> B:
    """This process's rows of a global batch: every `size`-th one; of preference pairs, every `size`-th pair.

    Arrays are cut, the rest stays the whole batch's: counts add up in every process as in one, shapes are alike, and
    a message about a step names all its rows. May be empty: [0, T].
    """
    if ranks.size == 1:
        return batch
    return part_of(batch, ranks.rank, ranks.size, are_pairs=len(batch.tokens) == 2 * len(batch.row_ids))


def part_of(batch: B, index: int, count: int, *, are_pairs: bool) -> B:
    """Part `index` of `count`: every `count`-th row from there, or pair, whose second half stands in the second half.

    Only arrays are cut, as `share` says.
    """
    num_rows = len(batch.tokens)
    half = num_rows // 2 if are_pairs else num_rows
    kept = np.concatenate([np.arange(index, half, count) + start for start in range(0, num_rows, half)])
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    arrays = {name: value[kept] for name, value in values.items() if isinstance(value, np.ndarray)}
    named = {
        name: {key: array[kept] for key, array in value.items()}
        for name, value in values.items()
        if isinstance(value, Mapping)
    }
    return replace(batch, **arrays, **named)


def agree_to_stop(ranks: Ranks, caught: list[int]) -> bool:
    """Whether a signal reached any process. It then counts as caught in all of them: all end as one does."""
    numbers = [int(row[0]) for row in ranks.gather_numbers([caught[0] if caught else 0])]
    if any(numbers) and not caught:
        caught.append(max(numbers))
    return any(numbers)


@contextmanager
def losses_named() -> Iterator[None]:
    """Inside, the loss of another process is a TrainingError that says so."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("[ring]", "[jaccl]", "[nccl]", "[mpi]")):
            raise
        raise TrainingError(
            f"another process of this run has ended ({error}); its own message says why. The last checkpoint is "
            f"whole: start all of them again with --resume"
        ) from error
