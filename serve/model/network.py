"""A language model, alone or with eyes, as two steps: tokens → hidden states → logits.

mlx-lm's models do both in one call; training wants logits only where a label stands and serving only where a
token is drawn, so the head (tied or not, with its soft cap and scale) must run by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from serve.errors import ModelError

BACKBONE_NAMES = ("model", "transformer", "backbone")


class _Passthrough:
    """Stands where the backbone stood: returns `hidden`, and lends the backbone's parts (tied embeddings)."""

    def __init__(self, backbone: nn.Module, hidden: mx.array) -> None:
        self._backbone = backbone
        self._hidden = hidden

    def __call__(self, *_: object, **__: object) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)


class Network:
    """An mlx-lm model, split at its head.

    The split calls the family's own code with the backbone replaced by the identity, so nothing of the head is
    written twice. `check()` proves it equal to the whole model; `load` calls it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        outer = module
        while "language_model" in outer and not any(name in outer for name in BACKBONE_NAMES):
            outer = outer["language_model"]
        names = [name for name in BACKBONE_NAMES if name in outer]
        if not names:
            found = ", ".join(outer.children())
            raise ModelError(
                f"{type(module).__module__}: cannot find the layers behind the head; "
                f"looked for {', '.join(BACKBONE_NAMES)}, found {found}"
            )
        self._outer = outer
        self.vocab_size = 0
        """V: how many tokens the head scores; known once `check` has run."""
        self.num_head_axes: int | None = None
        """Axes the family's scores have between rows and tokens; known once `packed.mask_axes` has run."""
        self._backbone_name = names[0]
        self._takes_embeddings = (
            "input_embeddings" in inspect.signature(type(self.backbone).__call__).parameters
        )

    @property
    def backbone(self) -> nn.Module:
        """The part that maps tokens to hidden states."""
        return self._outer[self._backbone_name]

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        return self.module.layers

    def hidden(
        self, tokens: mx.array, cache: Sequence[Any] | None = None, embeddings: mx.array | None = None
    ) -> mx.array:
        """Hidden states before the head.

        tokens      [B, T] int32; with `embeddings` only its shape counts
        cache       one object a layer, as mlx-lm's models call them; None runs without one, causally
        embeddings  [B, T, D] in place of the embedded tokens (images)
        Returns [B, T, D].
        """
        if embeddings is None:
            return self.backbone(tokens, cache=cache)
        if not self._takes_embeddings:
            raise ModelError(f"{type(self.backbone).__name__} does not take input embeddings")
        return self.backbone(tokens, cache=cache, input_embeddings=embeddings)

    def logits(self, hidden: mx.array) -> mx.array:
        """The head alone: [..., D] → [..., V], by the family's own code. Rows keep their axis."""
        outer = self._outer
        head = dict.__new__(type(outer))
        dict.update(head, outer)
        head.__dict__.update(outer.__dict__)
        states = hidden if hidden.ndim > 2 else hidden[None]
        dict.__setitem__(head, self._backbone_name, _Passthrough(self.backbone, states))
        # Some heads look at the shape of the tokens, [B, T], before they hand them on.
        logits: mx.array = type(outer).__call__(head, mx.zeros(states.shape[:-1], dtype=mx.int32))
        return logits if hidden.ndim > 2 else logits[0]

    def check(self) -> None:
        """Raise ModelError unless head(backbone(x)) is the whole model on a few tokens."""
        tokens = mx.array([[1, 2, 3]], dtype=mx.int32)
        whole = self.module(tokens)
        self.vocab_size = whole.shape[-1]
        split = self.logits(self.hidden(tokens))
        scale = mx.maximum(mx.abs(whole).max(), 1.0)
        if not bool(mx.all(mx.abs(whole - split).max() <= 1e-2 * scale)):
            raise ModelError(f"{type(self.module).__module__}: its head cannot be run apart from its layers")

    def parameters_dtype(self) -> mx.Dtype:
        """The dtype activations have: that of the final norm or any other floating, unquantized weight."""
        for layer in self.layers:
            for _, child in layer.named_modules():
                weight = child.get("weight") if isinstance(child, nn.Module) else None
                if isinstance(weight, mx.array) and mx.issubdtype(weight.dtype, mx.floating):
                    return weight.dtype
        return mx.float32


@contextmanager
def evaluating(network: Network) -> Iterator[None]:
    """Inside, no dropout, which would also move the random state; afterwards the mode is what it was."""
    was_training = network.module.training
    network.module.eval()
    try:
        yield
    finally:
        network.module.train(was_training)
