"""Gemma 4's assistants: a few layers without keys of their own, which look at those of the target's last layers.

    [embedding of t_m, h_{m−1}] ─▶ projection ─▶ layers that see the target's positions 0 … m − 1 ─▶ state ─▶ guess
                                                                          └─▶ projection ─▶ h of the next guess

Every guess of a chain is made at the same position, so nothing is written. The arithmetic is mlx-vlm's module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from serve.cache.attention import install
from serve.cache.layers import LayerRows
from serve.cache.rows import BatchRows
from serve.cache.spans import Span
from serve.draft.eagle import NEVER, refuse_other
from serve.engine.sampler import Sampler
from serve.errors import ModelError
from serve.model.network import Network, embedding_scale

KINDS = ("full_attention", "sliding_attention")


class Gemma4Assistant:
    """A head of mlx-vlm's class, over the target's rows."""

    taps: Sequence[int] = ()

    def __init__(self, module: Any, name: str, fingerprint: str) -> None:
        self._module, self._name = module, name
        self.fingerprint = f"gemma4_assistant:{fingerprint}"
        self._width = module.config.backbone_hidden_size
        self._read: dict[str, LayerRows] = {}
        self._embeddings: Any = None

    def bind(self, network: Network, rows: BatchRows) -> Sequence[LayerRows]:
        """No layers' rows: it has none. ModelError where it was made for another target."""
        text = self._module.config.text_config
        refuse_other(
            self._name,
            {
                "numbers a state": (self._width, network.width),
                "tokens": (text.vocab_size, network.vocab_size),
            },
        )
        last = {KINDS[layer.shape.window is not None]: layer for layer in rows.own}
        for number, kind in enumerate(text.layer_types[: text.num_hidden_layers]):
            shape = last[kind].shape if kind in last else None
            attention = self._module.model.layers[number].self_attn
            if shape is None or shape.key_dim != attention.head_dim:
                found = "none" if shape is None else f"{shape.key_dim} channels"
                raise ModelError(
                    f"{self._name}: layer {number} looks at keys of {attention.head_dim} channels in a layer of "
                    f"{kind}; the base's last one has {found}"
                )
        self._read = last
        self._embeddings, self._scale = network.embeddings, embedding_scale(network)
        self._module.bind(network.text)
        install(self._module)
        return []

    def read(self, hidden: mx.array, taken: Mapping[int, mx.array]) -> mx.array:
        """The final states as they are."""
        return hidden

    def run(self, tokens: mx.array, states: mx.array, span: Span) -> mx.array:
        """[B, 1, D + D'] of one token a row: h of the next guess, and the state that this one is made of."""
        joined = [self._embeddings(tokens) * self._scale, states[..., : self._width]]
        h = self._module.pre_projection(mx.concatenate(joined, axis=-1))
        for layer in self._module.model.layers:
            seen = self._read[layer.layer_type].seen(span)
            h, _, _ = layer(h, mask=None, cache=None, shared_kv=seen, offset=span.offset)
        h = self._module.model.norm(h)
        return mx.concatenate([self._module.post_projection(h), h], axis=-1)

    def guess(self, states: mx.array, sampler: Sampler, counters: Sequence[int]) -> mx.array:
        """[B]"""
        h, few = states[:, None, self._width :], self._module.masked_embedding
        if few is None:
            return sampler.tokens(self._module._lm_head_fn(h)[:, 0], counters)
        # mlx-vlm gives the others what the least of all rows has, less 1: what a row may draw hangs on its company.
        ids, logits = few._selected_logits(h, self._module.model.embed_tokens.weight)
        ids, logits = ids.reshape(len(h), -1), logits[:, 0]
        everything = mx.full((len(h), few.vocab_size), NEVER, dtype=logits.dtype)
        return sampler.tokens(mx.put_along_axis(everything, ids, logits, axis=-1), counters)
