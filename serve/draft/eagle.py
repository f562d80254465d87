"""EAGLE-3 (Li, Wei, Zhang, Zhang 2025, arXiv 2503.01840): a layer that reads three of the target's, and has a head of
its own over fewer tokens. The arithmetic is mlx-vlm's module; its cache and its loop are not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from serve.cache.attention import install
from serve.cache.capacity import LayerShape
from serve.cache.layers import LayerRows
from serve.cache.rows import BatchRows
from serve.cache.spans import Span
from serve.engine.sampler import Sampler
from serve.errors import ModelError
from serve.model.network import Network

NUM_TAPS = 3
NEVER = -1e9
"""The logit of a token that the head has no output for."""
ALWAYS_PLAIN = -1
"""The depth of a layer that no precision quantizes."""


def refuse_other(name: str, asked: Mapping[str, tuple[int, int]]) -> None:
    """ModelError where what a drafter takes of its base is not what the base has: (its, the base's) by what it is."""
    problems = [f"{its} {what}, where the base has {has}" for what, (its, has) in asked.items() if its != has]
    if problems:
        raise ModelError(f"{name}: was made for another base: it takes {' and '.join(problems)}")


class Eagle3:
    """A head of mlx-vlm's class, over rows."""

    def __init__(self, module: Any, name: str, fingerprint: str) -> None:
        self._module = module
        self._name = name
        self.fingerprint = f"eagle3:{fingerprint}"
        self.taps: Sequence[int] = ()
        self._targets: mx.array | None = None
        self._vocab_size = 0

    def bind(self, network: Network, rows: BatchRows) -> Sequence[LayerRows]:
        """Its layers' rows. ModelError where it was made for another target."""
        module, layers = self._module, len(network.layers)
        chosen = module.config.eagle_aux_hidden_state_layer_ids
        inputs = [2, layers // 2, layers - 3] if chosen is None else list(chosen)  # its authors' choice
        if len(inputs) != NUM_TAPS or not all(1 <= number <= layers for number in inputs):
            raise ModelError(
                f"{self._name}: reads the inputs of layers {inputs}, and the base has {layers}; expected "
                f"{NUM_TAPS} from 1 to {layers}"
            )
        self.taps = [number - 1 for number in inputs]
        self._vocab_size = network.vocab_size
        refuse_other(
            self._name,
            {
                "numbers a state": (module.target_hidden_size, network.width),
                "tokens": (module.target_vocab_size, network.vocab_size),
            },
        )
        embeddings = network.embeddings
        if embeddings is not None and embeddings.weight.shape == module.embed_tokens.weight.shape:
            module.embed_tokens = embeddings
        if module.uses_draft_vocab:
            self._targets = mx.arange(module.draft_vocab_size) + module.d2t
        install(module)
        text = module.config.transformer_layer_config
        dtype = module.fc.weight.dtype
        shape = LayerShape(
            text.num_key_value_heads, text.head_dim, text.head_dim, dtype.size, None, ALWAYS_PLAIN
        )
        module._cache = [LayerRows(shape, dtype) for _ in module.layers]
        return module._cache

    def read(self, hidden: mx.array, taken: Mapping[int, mx.array]) -> mx.array:
        """[B, T, D'] of three layers' outputs."""
        return self._module._prepare_target_hidden(mx.concatenate([taken[tap] for tap in self.taps], axis=-1))

    def run(self, tokens: mx.array, states: mx.array, span: Span) -> mx.array:
        """[B, T, D']; a pair is turned by its token's position."""
        self._module._next_position = span.offset + 1
        return self._module._forward_tokens(tokens, states, mx.int32)

    def guess(self, states: mx.array, sampler: Sampler, counters: Sequence[int]) -> mx.array:
        """[B]"""
        logits = self._module._logits(states)
        if self._targets is None:
            return sampler.tokens(logits, counters)
        if sampler.is_greedy:
            return self._targets[mx.argmax(logits, axis=-1)]
        everything = mx.full((len(logits), self._vocab_size), NEVER, dtype=logits.dtype)
        everything[:, self._targets] = logits
        return sampler.tokens(everything, counters)
