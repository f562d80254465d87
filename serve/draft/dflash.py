"""DFlash (block diffusion): a few layers that read the target's states, and guess a whole block in one forward.

What they keep of the past is an entry for each state h_p, at position p of the row, beside the target's own layers.

    observe   h_p of the taps ─ fc, norm ─▶ keys and values of every layer
    propose   [t_m, MASK, MASK, …] at positions m, m + 1, … see all entries before m, and one another ─▶ guesses

The block's own keys and values are scratch, which the chunk that checks the guesses writes over. The weights are in
mlx-vlm's module; its attention, which knows one cache a row, is written anew over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from serve.adapters.bank.bank import Bank
from serve.cache.capacity import LayerShape
from serve.cache.layers import LayerRows
from serve.cache.rows import BatchRows
from serve.draft.eagle import ALWAYS_PLAIN, refuse_other
from serve.draft.places import Samplers, in_rows, place_of, span_of
from serve.engine.drafts import Wanted
from serve.engine.plan import Chunk, SequenceState
from serve.errors import ModelError
from serve.model.network import Network, embedding_scale


class DFlash:
    """A drafter (`serve.engine.drafts.Reader`) over mlx-vlm's module."""

    def __init__(self, module: Any, name: str, fingerprint: str, max_tokens: int) -> None:
        """`max_tokens`: guesses of one step at most, of a row. ModelError for what is not done."""
        config = module.config
        problems = [
            f"layer {n} is {kind}" for n, kind in enumerate(config.layer_types) if kind != "full_attention"
        ]
        problems += [
            f"it has {word}" for word in ("draft_window_size", "attention_sink_bias") if getattr(config, word)
        ]
        if problems:
            raise ModelError(
                f"{name}: cannot be used: {', '.join(problems)}; expected full attention in each layer"
            )
        self.taps: Sequence[int] = tuple(config.target_layer_ids)
        self._module, self._name, self._fingerprint = module, name, fingerprint
        self._max_tokens = min(max_tokens, config.block_size - 1)
        self._layers: list[LayerRows] = []
        self._samplers = Samplers()
        self._embeddings: Any = None

    def bind(self, network: Network, bank: Bank, rows: BatchRows) -> None:
        """To a target and its rows, once. ModelError where the drafter is not of this target."""
        config = self._module.config
        refuse_other(
            self._name,
            {
                "numbers a state": (config.hidden_size, network.width),
                "layers": (config.num_target_layers, len(network.layers)),
                "tokens": (config.vocab_size, network.vocab_size),
            },
        )
        if network.embeddings is None:
            raise ModelError(f"{self._name}: the base's embeddings are in none of the usual places")
        self._network, self._bank, self._embeddings = network, bank, network.embeddings
        dtype = self._module.fc.weight.dtype
        heads, dim = config.num_key_value_heads, config.head_dim
        shape = LayerShape(heads, dim, dim, dtype.size, None, ALWAYS_PLAIN)
        self._layers = [LayerRows(shape, dtype) for _ in self._module.layers]
        rows.attach(self._layers, f"dflash:{self._fingerprint}")

    def observe(
        self, tokens: mx.array, hidden: mx.array, taken: Mapping[int, mx.array], chunks: Sequence[Chunk]
    ) -> list[mx.array]:
        """A forward of the target: entries of its chunks' states."""
        sequences = [chunk.sequence for chunk in chunks]
        self._place(sequences, [c.start for c in chunks], [c.begins for c in chunks], tokens.shape[1])
        module = self._module
        states = module.hidden_norm(module.fc(mx.concatenate([taken[tap] for tap in self.taps], axis=-1)))
        for layer, rows in zip(module.layers, self._layers, strict=True):
            rows.update_and_fetch(*self._entries(layer.self_attn, states, rows.offset))
        return []

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """A block of guesses for each row that has room for the scratch of one."""
        guesses: list[list[int]] = [[] for _ in wanted]
        most = min(max(one.most for one in wanted), self._max_tokens)
        order = [number for number in in_rows(wanted) if _room(wanted[number]) > most]
        if not order:
            return guesses
        sequences = [wanted[number].sequence for number in order]
        self._bank.rows.set([one.slot for one in sequences])
        starts = [one.num_tokens - 1 for one in sequences]
        blocks = None if self._module.config.is_causal else [[(start, start + most + 1)] for start in starts]
        self._place(sequences, starts, [False] * len(order), most + 1, blocks)
        last = [[one.token(one.num_tokens - 1)] for one in sequences]
        masked = [self._module.config.mask_token_id] * most
        states = self._run(mx.array([[*each, *masked] for each in last], dtype=mx.int32))[:, 1:]  # [B, k, D]
        drawn = self._draw(sequences, states)
        for number, found in zip(order, np.asarray(drawn).tolist(), strict=True):
            guesses[number] = found[: wanted[number].most]
        return guesses

    @property
    def max_bytes(self) -> int:
        """Its layers stand in the target's rows, and are counted there."""
        return 0

    num_bytes = max_bytes

    def forget(self, sequence: SequenceState) -> None:
        """Nothing is kept but in its row."""

    def clear(self, tenant: str | None) -> None:
        """It remembers nothing of texts that have ended."""

    def _draw(self, sequences: Sequence[SequenceState], states: mx.array) -> mx.array:
        """[B, k] of states [B, k, D], each by its row's settings."""
        count = states.shape[1]
        logits = self._network.logits(states).reshape(len(sequences) * count, -1)
        sampler = self._samplers.of([one for one in sequences for _ in range(count)])
        counters = [len(one.generated) + step for one in sequences for step in range(count)]
        drawn = sampler.tokens(logits, counters).reshape(-1, count)
        # The chunk that checks them writes where these read.
        mx.eval(drawn, [layer.state for layer in self._layers])
        return drawn

    def _place(
        self,
        sequences: Sequence[SequenceState],
        starts: Sequence[int],
        begins: Sequence[bool],
        num_tokens: int,
        blocks: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        span = span_of(sequences, starts, begins, num_tokens, blocks)
        for layer in self._layers:
            layer.span = span

    def _run(self, tokens: mx.array) -> mx.array:
        """[B, T, D] of a block's tokens."""
        module = self._module
        h = self._embeddings(tokens) * embedding_scale(self._network)
        for layer, rows in zip(module.layers, self._layers, strict=True):
            attention = layer.self_attn
            x = layer.input_layernorm(h)
            queries = _heads(attention.q_proj(x), attention.n_heads)
            queries = module.rope(attention.q_norm(queries).swapaxes(1, 2), offset=rows.offset)
            held, _ = rows.update_and_fetch(*self._entries(attention, x, rows.offset))
            out = held.attend(queries, attention.scale, None, None)
            h = h + attention.o_proj(out.swapaxes(1, 2).reshape(*h.shape[:2], -1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return module.norm(h)

    def _entries(self, attention: Any, states: mx.array, offset: mx.array) -> tuple[mx.array, mx.array]:
        """[B, H, T, D] keys and values of states [B, T, D]."""
        keys, values = (_heads(each, attention.n_kv_heads) for each in attention._project_kv(states))
        return self._module.rope(attention.k_norm(keys).swapaxes(1, 2), offset=offset), values.swapaxes(1, 2)


def _heads(values: mx.array, count: int) -> mx.array:
    """[B, T, H · D] → [B, T, H, D]."""
    return values.reshape(*values.shape[:2], count, -1)


def _room(one: Wanted) -> int:
    """Positions that its row has from the last token's on."""
    return place_of(one.sequence).bucket.num_positions - (one.sequence.num_tokens - 1)
