"""How much memory a computation takes at its peak, and how much work it is: counted on its graph, nothing run.

Operations with sizes go in, numbers come out. Knows no arrays. The rules are those of MLX's evaluation: an output
takes new memory unless it is a view or may take over an input that nobody else needs; an array's memory is free once
its last reader has run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

VIEWS = frozenset(
    {"Broadcast", "ExpandDims", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "View"}
)
STRIDED = frozenset({"Broadcast", "Slice", "Split", "Transpose"})
"""Views whose elements do not lie side by side; a reshape of them copies."""
RESHAPES = frozenset({"Flatten", "Reshape", "Unflatten"})
IN_PLACE = frozenset(
    {
        *(
            "Abs",
            "Add",
            "AsType",
            "Cos",
            "Divide",
            "Erf",
            "Exp",
            "Expm1",
            "Log",
            "Log1p",
            "LogicalNot",
            "Maximum",
        ),
        *(
            "Minimum",
            "Multiply",
            "Negative",
            "Power",
            "Rsqrt",
            "Select",
            "Sigmoid",
            "Sin",
            "SliceUpdate",
            "Softmax",
        ),
        *("Sqrt", "Square", "Subtract", "Tanh"),
    }
)
"""Element by element: the output may stand where an input stood."""
MATMULS = frozenset({"AddMM", "GatherMM", "GatherQMM", "Matmul", "QuantizedMatmul"})


@dataclass(frozen=True)
class Value:
    """One array of a graph. `name` is unique in it."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Operation:
    """One node, in the order of evaluation."""

    kind: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Cost:
    """Of one computation. `peak_bytes` is beside its inputs, its outputs counted."""

    peak_bytes: int
    flops: float
    """Multiplications and additions of its matrix products."""
    traffic_bytes: float
    """Read and written by everything else."""
    recomputed_bytes: int = 0
    """Of the peak, what is there only while a layer is computed a second time."""


def cost_of(operations: Sequence[Operation], outputs: Iterable[str]) -> Cost:
    """Peak memory, arithmetic and traffic of a graph whose `outputs` stay to the end."""
    return Cost(
        peak_bytes=peak_bytes(operations, outputs),
        flops=sum(_flops(operation) for operation in operations if operation.kind in MATMULS),
        traffic_bytes=float(sum(_traffic(operation) for operation in operations)),
    )


def peak_bytes(operations: Sequence[Operation], outputs: Iterable[str]) -> int:
    """The most memory that is taken at one time, beside the inputs of the graph."""
    memory = _Memory(_num_readers(operations, outputs))
    for operation in operations:
        memory.run(operation)
    return memory.peak


class _Memory:
    """Which array stands in whose memory while a graph is evaluated."""

    def __init__(self, readers: dict[str, int]) -> None:
        self.taken = self.peak = 0
        self._readers = readers  # array → operations that will still read it
        self._owner: dict[
            str, str
        ] = {}  # array → the array that its memory was taken for; not the graph's inputs
        self._users: dict[str, int] = {}  # owner → arrays in its memory that will still be read
        self._bytes: dict[str, int] = {}  # owner → its memory
        self._strided: set[str] = set()

    def run(self, operation: Operation) -> None:
        """Take memory for the outputs, then free what nobody will read again."""
        places = [self._place(operation, output) for output in operation.outputs]
        for output, place in zip(operation.outputs, places, strict=True):
            if operation.kind in STRIDED:
                self._strided.add(output.name)
            if place is None:
                continue
            if place == output.name:
                self._bytes[place], self._users[place] = output.num_bytes, 0
                self.taken += output.num_bytes
            self._owner[output.name] = place
            self._users[place] += 1
        self.peak = max(self.peak, self.taken)
        for name in {value.name for value in operation.inputs}:
            self._readers[name] -= 1
        for value in {value.name: value for value in (*operation.inputs, *operation.outputs)}:
            self._free_if_unread(value)

    def _free_if_unread(self, name: str) -> None:
        if self._readers.get(name, 0) > 0 or name not in self._owner:
            return
        owner = self._owner.pop(name)
        self._users[owner] -= 1
        if not self._users[owner]:
            self.taken -= self._bytes[owner]

    def _place(self, operation: Operation, output: Value) -> str | None:
        """The owner of the memory an output stands in, itself if that is new; None: the graph's inputs' memory."""
        kind, inputs = operation.kind, operation.inputs
        if inputs and (kind in VIEWS or (kind in RESHAPES and inputs[0].name not in self._strided)):
            return self._owner.get(inputs[0].name)
        if kind in IN_PLACE:
            for value in inputs:
                owner = self._owner.get(value.name)
                is_last = owner is not None and self._readers[value.name] == 1 and self._users[owner] == 1
                if is_last and value.num_bytes == output.num_bytes:
                    return owner
        return output.name


def _num_readers(operations: Sequence[Operation], outputs: Iterable[str]) -> dict[str, int]:
    readers: dict[str, int] = {}
    for operation in operations:
        for name in {value.name for value in operation.inputs}:
            readers[name] = readers.get(name, 0) + 1
    for name in outputs:
        readers[name] = readers.get(name, 0) + 1
    return readers


def _flops(operation: Operation) -> float:
    """2 · outputs · inner size, the inner size being the first operand's last axis."""
    return 2.0 * operation.outputs[0].size * operation.inputs[0].shape[-1]


def _traffic(operation: Operation) -> int:
    if operation.kind in MATMULS or operation.kind in VIEWS or operation.kind in RESHAPES:
        return 0
    return sum(value.num_bytes for value in (*operation.inputs, *operation.outputs))
