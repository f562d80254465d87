"""An adapter in the names and forms of one model: prefixes, stacks of experts, layers that are one there, two here.

transformers has a layer's experts as parameters (`mlp.experts.gate_up_proj`) or one by one (`mlp.experts.3.up_proj`),
mlx-lm as stacks (`mlp.switch_mlp.up_proj`). Works on headers and on tensors alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from serve.adapters.fitting.joined import LEAVES, LOW, beside, outputs_of, placed, wholes_of
from serve.adapters.fitting.paths import adaptable_modules, finder
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.header import TensorSpec
from serve.errors import AdapterError
from serve.model.network import Network
from serve.model.weights import EXPERTS, linear_shape

T = TypeVar("T", mx.array, TensorSpec)
Parts = Mapping[str, str]
"""Of one module: part → the name of its tensor."""
Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by name."""

EXPERT = re.compile(r"(?:.*\.)?(?:experts|block_sparse_moe)\.(?:(?P<number>\d{1,6})\.)?(?P<leaf>\w+)")
STACKS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"),),
    "input_linear": (("gate_proj", "up_proj"),),
    "output_linear": (("down_proj",),),
    "gate_proj": (("gate_proj",),),
    "up_proj": (("up_proj",), ("fc1",)),
    "down_proj": (("down_proj",), ("fc2",)),
    "w1": (("gate_proj",),),
    "w2": (("down_proj",),),
    "w3": (("up_proj",),),
}
"""What transformers calls an expert's matrices → what mlx-lm calls the stacks: the first that are there."""
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "input_linear": ("gate_proj", "up_proj"),
}
"""One linear layer there → its parts here, the outputs of each behind the last one's."""
INTERLEAVED = ("gpt_oss",)
"""Families in which the rows of gate and up take turns in gate_up_proj."""
TURNED = ("llama4",)
"""Families whose stacks are [E, D, O] and which PEFT takes for [E, O, D]: A is on the side of the outputs."""
OF_OUTPUTS = {"lora_b": -1, "m": 0, "bias": 0, "lora_bias": 0, "weight": 0, "base_weight": 0}
"""Parts with an axis of outputs, and which it is."""


@dataclass(frozen=True)
class _Recipe:
    """A tensor of the model's own: the ones it is made of, and how; None: it is the first of them."""

    sources: tuple[str, ...]
    made: Callable[[Sequence[mx.array]], mx.array] | None = None

    def of(self, named: Mapping[str, T]) -> T:
        values = [named[source] for source in self.sources]
        if self.made is None:
            return values[0]
        if isinstance(values[0], TensorSpec):
            # Lazy: shapes come out, and nothing is computed.
            shape = self.made([mx.zeros(value.shape) for value in values]).shape
            odd = next((value.dtype for value in values if not value.is_floating), values[0].dtype)
            return TensorSpec(tuple(shape), odd)
        return self.made(values)


def own_layout(
    named: Mapping[str, T], config: AdapterConfig, network: Network
) -> tuple[dict[str, T], AdapterConfig]:
    """`path.part` → value with this model's own paths, and the config by these. What fits nothing keeps its name.

    AdapterError where two names mean the same tensor, or experts that were adapted one by one make no stack.
    """
    by_module: dict[str, dict[str, str]] = {}
    for name in named:
        module, _, part = name.rpartition(".")
        by_module.setdefault(module, {})[part] = name
    shapes = {name: tuple(value.shape) for name, value in named.items()}
    layout = _Layout(network, config, shapes)
    for module, parts in by_module.items():
        layout.place(module, layout.find(module), parts)
    layout.stack_singles()
    layout.join_leaves()
    made = {name: recipe.of(named) for name, recipe in layout.recipes.items()}
    return made, layout.own_config()


class _Layout:
    """Where each tensor goes, found module by module."""

    def __init__(self, network: Network, config: AdapterConfig, shapes: Shapes) -> None:
        self.recipes: dict[str, _Recipe] = {}
        self._family = type(network.text).__module__.split(".")[2:3]
        self._modules = adaptable_modules(network)
        self.find = finder(network)
        self._stacks = _stacks_by_layer(self._modules)
        self._config = config
        self._shapes = shapes
        self._sources: dict[str, tuple[str, ...]] = {}
        """By own path, the modules of the file that it comes from."""
        self._singles: dict[str, dict[int, Parts]] = {}
        """By own path of a stack: experts that were adapted one by one."""
        self._leaves: dict[str, dict[str, tuple[str, Parts]]] = {}
        """By own path of a layer that is several there: their modules, by leaf."""
        self._ranks: dict[str, int] = {}
        """Of those, by own path."""

    def place(self, module: str, own: str, parts: Parts) -> None:
        """Find a place for one module of the file; `own` is its path here if it has one."""
        stacks, number = self._stacks_of(module, own)
        if stacks and number is not None:
            self._singles.setdefault(stacks[0], {})
            if number in self._singles[stacks[0]]:
                raise AdapterError(f"two tensors are the same expert's: expert {number} of {stacks[0]}")
            self._singles[stacks[0]][number] = parts
        elif stacks:
            self._unpack(module, stacks, parts)
        elif own not in self._modules and (pieces := self._pieces_of(own)):
            self._split(module, pieces, parts)
        elif own not in self._modules and (whole := self._whole_of(own)):
            leaf = own.rpartition(".")[2]
            leaves = self._leaves.setdefault(whole, {})
            if leaf in leaves:
                raise AdapterError(f"two modules are the same layer: {leaves[leaf][0]} and {module}")
            leaves[leaf] = module, parts
        else:
            self._keep(own, module, parts)

    def own_config(self) -> AdapterConfig:
        """The config, its ranks and scales by own paths."""
        config = self._config
        if not config.ranks and not config.scales and not self._ranks:
            return config
        ranks = {
            path: max(config.rank_of(source) for source in sources) for path, sources in self._sources.items()
        }
        ranks |= self._ranks
        scales = {path: config.scale_of(sources[0]) for path, sources in self._sources.items()}
        return replace(
            config,
            ranks={path: rank for path, rank in ranks.items() if rank != config.rank},
            scales={path: scale for path, scale in scales.items() if scale != config.scale},
        )

    def stack_singles(self) -> None:
        """Stacks of the experts that were adapted one by one: zeros where one was not, and beyond its own rank."""
        for path, by_number in self._singles.items():
            modules = {number: _module(parts) for number, parts in by_number.items()}
            num_experts = self._modules[path].weight.shape[0]
            if max(by_number) >= num_experts:
                raise AdapterError(f"{modules[max(by_number)]}: the model has {num_experts} experts there")
            scales = {self._config.scale_of(module) for module in modules.values()}
            if len(scales) > 1:
                raise AdapterError(
                    f"{path}: its experts have scales from {min(scales):g} to {max(scales):g}, and one was expected"
                )
            recipes = {}
            for part in dict.fromkeys(part for parts in by_number.values() for part in parts):
                recipes[part] = self._stacked(part, by_number, num_experts)
            self._add(path, modules[min(modules)], recipes, tuple(modules.values()))

    def join_leaves(self) -> None:
        """Layers that are one here, of those that they are there: of the parts that come, the ranks together."""
        for path, leaves in self._leaves.items():
            order = [leaf for leaf in LEAVES[path.rpartition(".")[2]][0] if leaf in leaves]
            modules = [leaves[leaf][0] for leaf in order]
            by_part: dict[str, dict[str, str]] = {}
            for leaf in order:
                for part, name in leaves[leaf][1].items():
                    by_part.setdefault(part, {})[leaf] = name
            low = [leaf for leaf in order if any(leaf in by_part.get(part, {}) for part in LOW)]
            self._check_leaves(low, leaves)
            total = linear_shape(self._modules[path])[1]
            known = {leaf: self._outputs(leaves[leaf][1]) for leaf in order}
            slices = outputs_of(path, known, total)
            scales = {leaf: self._config.scale_of(leaves[leaf][0]) for leaf in order}
            recipes = {}
            for part, names in by_part.items():
                if part in ("lora_b", "lora_bias"):
                    factors = [scales[leaf] / scales[order[0]] for leaf in names]
                    made = placed([slices[leaf] for leaf in names], total, factors)
                else:
                    made = beside(path, part, list(names))
                recipes[part] = _Recipe(tuple(names.values()), made)
            self._add(path, modules[0], recipes, tuple(modules))
            if low:
                self._ranks[path] = sum(self._config.rank_of(leaves[leaf][0]) for leaf in low)

    def _check_leaves(self, low: Sequence[str], leaves: Mapping[str, tuple[str, Parts]]) -> None:
        """Before they are one: each has both factors, and the rank that the config says."""
        for module, parts in (leaves[leaf] for leaf in low):
            if missing := [part for part in LOW if part not in parts]:
                raise AdapterError(f"{module}: {', '.join(missing)} is missing")
            a, b, rank = *(self._shapes[parts[part]] for part in LOW), self._config.rank_of(module)
            if len(a) != 2 or len(b) != 2 or (a[1], b[0]) != (rank, rank):
                raise AdapterError(
                    f"{module}: A is {a} and B {b}; rank {rank} was expected, as the config says"
                )

    def _outputs(self, parts: Parts) -> int:
        """How many outputs a module of the file has."""
        name = next((parts[part] for part in OF_OUTPUTS if part in parts), None)
        shape = self._shapes[name] if name else ()
        return shape[-1 if name == parts.get("lora_b") else 0] if shape else 0

    def _whole_of(self, path: str) -> str | None:
        """The layer here that is one with others there."""
        found = map(self.find, wholes_of(path))
        return next(
            (p for p in found if p in self._modules and not isinstance(self._modules[p], EXPERTS)), None
        )

    def _add(
        self, path: str, module: str, recipes: Mapping[str, _Recipe], sources: tuple[str, ...] = ()
    ) -> None:
        for part, recipe in recipes.items():
            own = f"{path}.{part}" if path else part
            if own in self.recipes:
                first = self.recipes[own].sources[0]
                raise AdapterError(
                    f"two tensors are the same layer's {part}: {first} and {recipe.sources[0]}"
                )
            self.recipes[own] = recipe
        self._sources[path] = sources or (module,)

    def _keep(self, path: str, module: str, parts: Parts) -> None:
        self._add(path, module, {part: _Recipe((name,)) for part, name in parts.items()})

    def _stacks_of(self, module: str, own: str) -> tuple[tuple[str, ...], int | None]:
        """The stacks that a module or parameter of transformers' experts means, and of which expert it is."""
        if own in self._modules:
            is_parameter = isinstance(self._modules[own], EXPERTS) and self._config.sides != "own"
            return ((own,) if is_parameter else ()), None
        found = EXPERT.fullmatch(module)
        if found is None:
            return (), None
        here = self._stacks.get(_layer(module), {})
        number = None if found["number"] is None else int(found["number"])
        for leaves in STACKS.get(found["leaf"], ()):
            if all(leaf in here for leaf in leaves):
                return tuple(here[leaf] for leaf in leaves), number
        return (), None

    def _unpack(self, module: str, stacks: tuple[str, ...], parts: Parts) -> None:
        """A parameter [E, O, D] of PEFT's, O the outputs of all `stacks` → A and B of each stack."""
        shapes = [self._shapes.get(parts.get(part, ""), ()) for part in ("lora_a", "lora_b")]
        inputs = linear_shape(self._modules[stacks[0]])[0]
        outputs = [linear_shape(self._modules[path])[1] for path in stacks]
        if set(parts) != {"lora_a", "lora_b"} or any(len(shape) != 3 for shape in shapes):
            self._keep(module, module, parts)
            return
        is_turned = self._is_turned(module, shapes[0][2], shapes[1][1], inputs, sum(outputs))
        a, b = (parts["lora_b"], parts["lora_a"]) if is_turned else (parts["lora_a"], parts["lora_b"])
        for which, path in enumerate(stacks):
            start = sum(outputs[:which])
            rows = slice(start, start + outputs[which])
            if len(stacks) > 1 and self._is_of(INTERLEAVED):
                rows = slice(which, None, len(stacks))
            recipes = {
                "lora_a": _Recipe((a,), _turned if is_turned else None),
                "lora_b": _Recipe((b,), _rows(rows, axis=1, is_turned=is_turned)),
            }
            self._add(path, module, recipes)

    def _is_turned(self, module: str, a: int, b: int, inputs: int, outputs: int) -> bool:
        """Whether A is on the side of the outputs, as PEFT before 0.19 had it, and has it of some families."""
        if {a, b} != {inputs, outputs}:
            raise AdapterError(
                f"{module}: A has {a} inputs and B {b} outputs; the experts here have {inputs} and {outputs}"
            )
        if inputs != outputs:
            return a == outputs
        if self._config.sides == "unsaid":
            raise AdapterError(
                f"{module}: {inputs} inputs and as many outputs, and a PEFT before 0.19 wrote it: its shapes do not "
                f"say on which side A is; save it with a newer PEFT"
            )
        return self._config.sides == "peft" and self._is_of(TURNED)

    def _is_of(self, families: Sequence[str]) -> bool:
        return bool(self._family) and self._family[0] in families

    def _pieces_of(self, path: str) -> tuple[str, ...]:
        """The layers that a fused layer of transformers is here, in the order of its outputs."""
        parent, _, leaf = path.rpartition(".")
        for around in dict.fromkeys((parent, parent.replace("shared_mlp", "mlp"))):
            names = tuple(self.find(f"{around}.{piece}") for piece in FUSED.get(leaf, ()))
            if names and all(name in self._modules for name in names):
                return names
        return ()

    def _split(self, module: str, pieces: tuple[str, ...], parts: Parts) -> None:
        total = sum(linear_shape(self._modules[path])[1] for path in pieces)
        for part, name in parts.items():
            shape = self._shapes[name]
            if part in OF_OUTPUTS and (not shape or shape[OF_OUTPUTS[part]] != total):
                leaves = ", ".join(path.rpartition(".")[2] for path in pieces)
                raise AdapterError(f"{name} is {shape}; {total} outputs were expected, for {leaves} here")
        start = 0
        for path in pieces:
            rows = slice(start, start + linear_shape(self._modules[path])[1])
            start = rows.stop
            recipes = {
                part: _Recipe((name,), _rows(rows, axis=OF_OUTPUTS[part]) if part in OF_OUTPUTS else None)
                for part, name in parts.items()
            }
            self._add(path, module, recipes)

    def _stacked(self, part: str, by_number: Mapping[int, Parts], num_experts: int) -> _Recipe:
        names = {number: parts[part] for number, parts in by_number.items() if part in parts}
        shapes = [self._shapes[name] for name in names.values()]
        shape = tuple(max(sizes) for sizes in zip(*shapes, strict=False))
        rank_axis = {"lora_a": 1, "lora_b": 0}.get(part, 0)
        for name, found in zip(names.values(), shapes, strict=True):
            same = [i for i in range(len(found)) if i != rank_axis]
            if part not in ("lora_a", "lora_b"):
                raise AdapterError(f"{name}: holds {part} of an expert, and A and B alone make a stack")
            if len(found) != 2 or any(found[i] != shape[i] for i in same):
                raise AdapterError(f"{name} is {found}, and another expert's is {shape}: they make no stack")

        def made(values: Sequence[mx.array]) -> mx.array:
            given = dict(zip(names, values, strict=True))
            none = mx.zeros(shape, dtype=values[0].dtype)
            padded = {
                number: mx.pad(
                    value, [(0, more - size) for size, more in zip(value.shape, shape, strict=True)]
                )
                for number, value in given.items()
            }
            return mx.stack([padded.get(number, none).T for number in range(num_experts)])

        return _Recipe(tuple(names.values()), made)


def _turned(values: Sequence[mx.array]) -> mx.array:
    return values[0].swapaxes(-1, -2)


def _rows(rows: slice, axis: int, *, is_turned: bool = False) -> Callable[[Sequence[mx.array]], mx.array]:
    def made(values: Sequence[mx.array]) -> mx.array:
        value = values[0].swapaxes(-1, -2) if is_turned else values[0]
        return value[(slice(None),) * (axis % value.ndim) + (rows,)]

    return made


def _stacks_by_layer(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """Of each layer: what a stack is called there → its path."""
    found: dict[str, dict[str, str]] = {}
    for path, each in modules.items():
        if isinstance(each, EXPERTS):
            found.setdefault(_layer(path), {})[path.rpartition(".")[2]] = path
    return found


def _module(parts: Parts) -> str:
    return next(iter(parts.values())).rpartition(".")[0]


def _layer(path: str) -> str:
    """`3` of `model.layers.3.mlp.…`."""
    found = re.search(r"\.(\d+)(?:\.|$)", f".{path}")
    return found[1] if found else ""
