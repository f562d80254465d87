"""A language model, alone or with eyes, as two steps: tokens → hidden states → logits.

mlx-lm's models do both in one call; training wants logits only where a label stands and serving only where a
token is drawn, so the head (tied or not, with its soft cap and scale) must run by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from serve.errors import ModelError
from serve.model import activations as activations  # SiLU for CPU
from serve.model import rotary as rotary  # so too
from serve.model.weights import LINEAR

BACKBONE_NAMES = ("model", "transformer", "backbone")
CONTAINER_NAMES = ("language_model", "thinker")
"""What modules with towers, or of several parts, call what has the layers and the head."""
HEAD_NAME = "lm_head"
EMBEDDED_NAMES = (
    "embed_tokens",
    "wte",
    "tok_embeddings",
    "token_embeddings",
    "word_embeddings",
    "embeddings",
    "embedding",
)
"""What backbones call the tokens' embeddings."""
EMBEDDINGS_NAMES = ("input_embeddings", "inputs_embeds", "input_embeds")
"""What backbones call what stands in for embedded tokens: mlx-lm's the first, mlx-vlm's any of them."""


class _Passthrough:
    """Stands where the backbone stood: returns `hidden`, and lends the backbone's parts (tied embeddings)."""

    def __init__(self, backbone: nn.Module, hidden: mx.array) -> None:
        self._backbone = backbone
        self._hidden = hidden

    def __call__(self, *_: object, **__: object) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)


class _Same:
    """Stands where a head stood: gives back what it is given."""

    def __call__(self, hidden: mx.array) -> mx.array:
        return hidden


class _Tap:
    """Stands where a layer stood: runs it, and keeps what it gives."""

    def __init__(self, layer: nn.Module, number: int, taken: dict[int, mx.array]) -> None:
        self._layer, self._number, self._taken = layer, number, taken

    def __call__(self, *args: object, **kwargs: object) -> Any:
        output = self._layer(*args, **kwargs)
        self._taken[self._number] = output[0] if isinstance(output, tuple) else output
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class Network:
    """A model of mlx-lm, or one of mlx-vlm with all its towers, whose language part is split at its head.

    The split calls the family's own code with the backbone replaced by the identity, so nothing of the head is
    written twice; where layers and head stand side by side, the head is replaced and then called by itself.
    `check()` proves it equal to the whole language part; `load` calls it.

    What a family needs beside tokens and cache is an argument of each forward: nothing that mlx-vlm's modules keep of
    the last prompt (positions, deltas) is read or written.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        outer, path = module, []
        while not any(name in outer for name in BACKBONE_NAMES):
            inner = next((name for name in CONTAINER_NAMES if name in outer), None)
            if inner is None:
                break
            outer = outer[inner]
            path.append(inner)
        names = [name for name in BACKBONE_NAMES if name in outer]
        if not names and not ("layers" in outer and HEAD_NAME in outer):
            found = ", ".join(outer.children())
            raise ModelError(
                f"{type(module).__module__}: cannot find the layers behind the head; "
                f"looked for {', '.join(BACKBONE_NAMES)}, found {found}"
            )
        self.text = outer
        """What maps tokens to logits: of a model with towers, the language part."""
        self.text_path = ".".join(path)
        """Where that is in the module; "" where it is the module."""
        self.vocab_size = 0
        """V: how many tokens the head scores; known once `check` has run."""
        self.width = 0
        """D: numbers of a hidden state; known once `check` has run."""
        self.num_head_axes: int | None = None
        """Axes the family's scores have between rows and tokens; known once `packed.mask_axes` has run."""
        self.placeholder_ids: tuple[int, ...] = ()
        """Tokens that stand for media and that the family's own code never looks up; set by `Vision`."""
        self._backbone_name = names[0] if names else None
        self._parameters = frozenset(inspect.signature(type(self.backbone).__call__).parameters)
        self._embeddings_name = next((name for name in EMBEDDINGS_NAMES if name in self._parameters), None)
        self.takes_positions = self.takes("position_ids") and hasattr(self.text, "get_rope_index")
        """Its keys are turned by three positions a token (M-RoPE), which every forward is given."""

    def takes(self, name: str) -> bool:
        """Whether the family's backbone has an argument of that name."""
        return name in self._parameters

    @cached_property
    def has_towers(self) -> bool:
        """It is mlx-vlm's, and has weights beside its language part."""
        if not (self._is_of_mlx_vlm and self.text_path):
            return False
        *outside, name = self.text_path.split(".")
        around = self.module
        for part in outside:
            around = around[part]
        beside = [child for other, child in around.children().items() if other != name]
        return any(tree_flatten(child.parameters()) for child in _modules(beside))

    @cached_property
    def embeddings_path(self) -> str | None:
        """Where the tokens' embeddings are in the module; None: in none of the usual places."""
        inside = self.backbone.children()
        name = next((name for name in EMBEDDED_NAMES if name in inside), None)
        parts = [self.text_path, self._backbone_name, name]
        return None if name is None else ".".join(part for part in parts if part)

    @property
    def embeddings(self) -> nn.Module | None:
        """The tokens' embeddings as the base has them, without updates; None: in none of the usual places."""
        name = next((name for name in EMBEDDED_NAMES if name in self.backbone.children()), None)
        found: Any = None if name is None else self.backbone[name]
        return found["linear"] if getattr(found, "wraps_linear", False) else found

    @cached_property
    def tied_head(self) -> dict[str, str]:
        """Where the embeddings are the head: the path that a head would have → the embeddings' path. Else nothing."""
        beside = self.text.children().values()
        has_head = any(isinstance(each, LINEAR) or getattr(each, "wraps_linear", False) for each in beside)
        if self._backbone_name is None or has_head or self.embeddings_path is None:
            return {}
        return {f"{self.text_path}.{HEAD_NAME}" if self.text_path else HEAD_NAME: self.embeddings_path}

    @property
    def backbone(self) -> nn.Module:
        """The part that maps tokens to hidden states; the whole language part where the head stands among the
        layers."""
        return self.text if self._backbone_name is None else self.text[self._backbone_name]

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        inside = self.text if self._is_of_mlx_vlm and hasattr(self.text, "layers") else self.module
        return inside.layers

    def make_cache(self) -> list[Any]:
        """The family's own cache of one sequence, an object a layer, empty."""
        for module in (self.module, self.text):
            if hasattr(module, "make_cache"):
                return list(module.make_cache())
        return [KVCache() for _ in self.layers]

    def hidden(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        embeddings: mx.array | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> mx.array:
        """Hidden states before the head.

        tokens      [B, T] int32; at the media's placeholders only `embeddings` count
        cache       one object a layer, as the family's code calls them; None runs without one, causally
        embeddings  [B, T, D] in place of the embedded tokens, as `Vision.embed` makes them; left as they are
        extras      more arguments of the family's backbone: position_ids [3, B, T] (left out, the tokens are text
                    and stand where the cache says), visual_pos_masks and deepstack_visual_embeds
        Returns [B, T, D].
        """
        options = dict(extras or {})
        if embeddings is not None:
            if self._embeddings_name is None:
                raise ModelError(f"{type(self.backbone).__name__} does not take input embeddings")
            # gemma3 scales what it is given in place: this is another array with the same numbers.
            options[self._embeddings_name] = embeddings[...]
            for token in self.placeholder_ids:
                tokens = mx.where(tokens == token, 0, tokens)
        if self.takes_positions and "position_ids" not in options:
            options["position_ids"] = text_positions(tokens.shape, cache)
        if self._backbone_name is not None:
            return self.backbone(tokens, cache=cache, **options)
        body = self._with(HEAD_NAME, _Same())
        return _logits(type(body).__call__(body, tokens, cache=cache, **options))

    @contextmanager
    def tapped(self, numbers: Sequence[int]) -> Iterator[dict[int, mx.array]]:
        """Inside, what these layers give is kept: by number, [B, T, D] of the last forward.

        ModelError where there is no such layer, or the family's layers are in no list of the backbone.
        """
        layers, taken = self.backbone.get("layers"), dict[int, mx.array]()
        if not numbers:
            yield taken
            return
        if not isinstance(layers, list) or not all(0 <= number < len(layers) for number in numbers):
            found = f"it has {len(layers)}" if isinstance(layers, list) else "its layers are in no list"
            raise ModelError(
                f"{type(self.module).__module__}: cannot look into layers {list(numbers)}: {found}"
            )
        whole = list(layers)
        try:
            for number in numbers:
                layers[number] = _Tap(whole[number], number, taken)
            yield taken
        finally:
            layers[:] = whole

    def logits(self, hidden: mx.array) -> mx.array:
        """The head alone: [..., D] → [..., V], by the family's own code. Rows keep their axis."""
        if self._backbone_name is None:
            return self.text[HEAD_NAME](hidden)
        states = hidden if hidden.ndim > 2 else hidden[None]
        head = self._with(self._backbone_name, _Passthrough(self.backbone, states))
        # Some heads look at the shape of the tokens, [B, T], before they hand them on.
        tokens = mx.zeros(states.shape[:-1], dtype=mx.int32)
        logits = _logits(type(head).__call__(head, tokens, **self._no_positions(tokens)))
        return logits if hidden.ndim > 2 else logits[0]

    def check(self) -> None:
        """Raise ModelError unless head(backbone(x)) is the whole language part on a few tokens."""
        tokens = mx.array([[1, 2, 3]], dtype=mx.int32)
        if self.takes_positions:
            whole = _logits(self.text(tokens, position_ids=text_positions(tokens.shape, None)))
        else:
            # mlx-vlm's outermost modules want pictures too.
            whole = _logits((self.text if self._is_of_mlx_vlm else self.module)(tokens))
        self.vocab_size = whole.shape[-1]
        hidden = self.hidden(tokens)
        self.width = hidden.shape[-1]
        split = self.logits(hidden)
        scale = mx.maximum(mx.abs(whole).max(), 1.0)
        if not bool(mx.all(mx.abs(whole - split).max() <= 1e-2 * scale)):
            raise ModelError(f"{type(self.module).__module__}: its head cannot be run apart from its layers")

    @property
    def _is_of_mlx_vlm(self) -> bool:
        return type(self.module).__module__.startswith("mlx_vlm.")

    def _no_positions(self, tokens: mx.array) -> dict[str, mx.array]:
        """What keeps the family's head from making positions of its own, for a backbone that is not run."""
        return {"position_ids": mx.zeros((3, *tokens.shape), dtype=mx.int32)} if self.takes_positions else {}

    def _with(self, name: str, part: object) -> Any:
        """The language part with another one of its parts, which is used for one call: it shares all else."""
        outer = self.text
        copy = dict.__new__(type(outer))
        dict.update(copy, outer)
        copy.__dict__.update(outer.__dict__)
        dict.__setitem__(copy, name, part)
        return copy

    @property
    def num_bytes(self) -> int:
        """Of its weights."""
        return sum(weight.nbytes for _, weight in tree_flatten(self.module.parameters()))

    def parameters_dtype(self) -> mx.Dtype:
        """The dtype activations have: that of the final norm or any other floating, unquantized weight."""
        for layer in self.layers:
            for _, child in layer.named_modules():
                weight = child.get("weight") if isinstance(child, nn.Module) else None
                if isinstance(weight, mx.array) and mx.issubdtype(weight.dtype, mx.floating):
                    return weight.dtype
        return mx.float32


def _modules(value: object) -> Iterator[nn.Module]:
    """The modules in lists and dicts of them."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _modules(inner)


def embedding_scale(network: Network) -> float:
    """What the family multiplies its tokens' embeddings by."""
    embeddings = network.embeddings
    return float(getattr(embeddings, "embed_scale", getattr(network.backbone, "embed_scale", 1.0)))


def text_positions(shape: Sequence[int], cache: Sequence[Any] | None) -> mx.array:
    """[3, B, T]: each row's tokens stand one behind the other, from where its cache says, in all three ways."""
    offset: mx.array | int = 0
    for layer in cache or ():
        if hasattr(layer, "offset"):
            offset = layer.offset
            break
    rows, num_tokens = shape
    start = mx.array(offset, dtype=mx.int32).reshape(-1, 1)
    return mx.broadcast_to(start + mx.arange(num_tokens, dtype=mx.int32), (3, rows, num_tokens))


def _logits(output: Any) -> mx.array:
    """mlx-vlm's language parts return an object, mlx-lm's the array."""
    return getattr(output, "logits", output)


@contextmanager
def evaluating(network: Network) -> Iterator[None]:
    """Inside, no dropout, which would also move the random state; afterwards the mode is what it was."""
    was_training = network.module.training
    network.module.eval()
    try:
        yield
    finally:
        network.module.train(was_training)
