"""What the parts of a step's updates take on this machine, measured, and which form is the cheapest by that.

Rows of a batch are multiplied each with its own matrices (one product a row), or some rows of one adapter together
(tiles): fewer products, for the price of taking rows together and putting them back. All forms have the same answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from serve import device
from serve.adapters.layers.lora import gathered

TILES = (1, 2, 4, 8, 16, 32)
"""Tokens of one product that are measured. With more, a row's own are enough to keep the machine busy."""
FEW, MANY = 4, 16
"""Products that are timed together."""
RANK = 16
REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """Microseconds.

    product  by its tokens, one of TILES: of one entry's two products
    row      to take one row's input together with others, and to put its output back
    start    of an operation, however small
    """

    product: Mapping[int, float]
    row: float
    start: float

    def of(self, num_tokens: int) -> float:
        """Of one entry's two products with so many tokens."""
        largest = max(self.product)
        if num_tokens > largest:
            return self.product[largest] * num_tokens / largest
        return self.product[min(size for size in self.product if size >= num_tokens)]

    def tile(self, counts: Sequence[int], num_tokens: int, *, weight: float, is_placed: bool) -> int:
        """How many rows of one adapter to multiply together; 1: each by itself.

        counts      rows of each adapter in the stack
        num_tokens  of each row
        weight      a product's time over that of the measured rank
        is_placed   outputs are put in their rows' order anyway
        """
        row, rows = self.row * num_tokens, sum(counts)
        best, least = 1, rows * (weight * self.of(num_tokens) + (row / 2 if is_placed else 0))
        for size, cost in self.product.items():
            height = size // num_tokens
            if height < 2:
                continue
            num_tiles = sum(-(-count // height) for count in counts)
            total = num_tiles * (weight * cost + height * row) + (1 if is_placed else 2) * self.start
            if total < least:
                best, least = height, total
        return best

    def skips_base(self, num_base: int, num_rows: int, num_tokens: int, *, weight: float) -> bool:
        """Whether to leave the base's rows out, and put all outputs in order, rather than to multiply zeros."""
        placing = num_rows * self.row * num_tokens / 2 + 2 * self.start
        return num_base * weight * self.of(num_tokens) > placing


ON_CPU = Costs({1: 4.0, 2: 4.4, 4: 5.0, 8: 8.0, 16: 14.0, 32: 28.0}, 0.3, 4.0)
"""Until it is measured: of a layer of 512 by 512 and rank 16, OpenBLAS, one thread."""
ON_GPU = Costs({1: 1.0}, 1.0, 5.0)
"""Until it is measured: a product a row."""


def measure(inputs: int, outputs: int, dtype: mx.Dtype) -> Costs:
    """What a layer of that shape takes here and now: some milliseconds on a CPU, the least of several times each.

    A product counts by what one more of them adds: a GPU does many at once, and moving rows is then worth nothing.
    """
    draw = partial(mx.random.normal, key=mx.random.key(0))  # MLX's own state is whoever's who trains here
    a, b = draw((MANY, inputs, RANK)).astype(dtype), draw((MANY, RANK, outputs)).astype(dtype)
    tiny, every = mx.zeros(8, dtype), mx.arange(MANY, dtype=mx.uint32)
    product: dict[int, float] = {}
    for size in TILES:
        x = draw((MANY, size, inputs)).astype(dtype)
        few, many = (_least_us(partial(_products, x, a, b, every[:count])) for count in (FEW, MANY))
        product[size] = max(many - few, 0.01) / (MANY - FEW)
    for smaller, larger in zip(TILES[-2::-1], TILES[:0:-1], strict=True):
        product[smaller] = min(product[smaller], product[larger])  # whatever else the machine did meanwhile
    order = mx.array([(7 * i) % (4 * MANY) for i in range(4 * MANY)], dtype=mx.uint32)
    rows, out = (draw((4 * MANY, 1, width)).astype(dtype) for width in (inputs, outputs))
    mx.eval(rows, out, order, tiny)
    start = _least_us(lambda: [tiny + tiny])
    moved = _least_us(lambda: [mx.take(rows, order, axis=0), mx.take(out, order, axis=0)])
    return Costs(product, max(moved - 2 * start, 0.0) / (4 * MANY), start)


def _products(x: mx.array, a: mx.array, b: mx.array, entries: mx.array) -> list[mx.array]:
    return [gathered(gathered(x, a, entries, entries), b, entries, entries)]


def _least_us(make: Callable[[], list[mx.array]]) -> float:
    """Microseconds of what `make` describes, eight of them at once: the least of a few times.

    On a CPU of this process alone, so that others on the machine count little.
    """
    now = time.process_time if device.backend() == "cpu" else time.perf_counter
    times = []
    mx.eval(make())
    for _ in range(REPEATS):
        start = now()
        mx.eval([make() for _ in range(8)])
        times.append(now() - start)
    return min(times) / 8 * 1e6
