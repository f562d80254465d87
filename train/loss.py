"""Cross entropy, computed only where a target stands. Batches and a network in, a sum over targets out.

Knows neither optimizers nor means: whoever calls divides by the targets of the whole accumulated step.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from serve.model.network import TextNetwork


@dataclass(frozen=True)
class Targets:
    """Where a batch has targets, found on the host. N counts padding entries, whose weight is 0.

    positions  [N] int32    flat index into the batch's B·T hidden states, of the token *before* the target
    token_ids  [N] int32    the target
    weights    [N] float32  1, or 0 for padding
    """

    positions: np.ndarray
    token_ids: np.ndarray
    weights: np.ndarray

    @property
    def num_targets(self) -> int:
        return int(self.weights.sum())


def find_targets(tokens: np.ndarray, is_target: np.ndarray, *, pad: bool = False) -> Targets:
    """The targets of a right-padded batch. A target in column 0 has nothing before it and is left out.

    tokens     [B, T] int32
    is_target  [B, T] bool
    pad        round N up, so that a compiled step meets few distinct shapes
    """
    rows, columns = np.nonzero(is_target[:, 1:])
    positions = rows * tokens.shape[1] + columns
    token_ids = tokens[rows, columns + 1]
    size = round_up(len(rows)) if pad else len(rows)
    spare = size - len(rows)
    return Targets(
        positions=np.pad(positions, (0, spare)).astype(np.int32),
        token_ids=np.pad(token_ids, (0, spare)).astype(np.int32),
        weights=np.pad(np.ones(len(rows), np.float32), (0, spare)),
    )


def round_up(size: int) -> int:
    """The next of 64, 80, 96, 112, 128, 160 …: four sizes an octave, at most a fifth of it padding."""
    if size <= 64:
        return 64
    grain = 1 << (size.bit_length() - 3)
    return -(-size // grain) * grain


def target_logits(network: TextNetwork, tokens: mx.array, positions: mx.array) -> mx.array:
    """Logits at flat positions: tokens [B, T], positions [N] → [N, V]. The head runs on N rows, not on B·T."""
    hidden = network.hidden(tokens)  # [B, T, D]
    return network.logits(hidden.reshape(-1, hidden.shape[-1])[positions])


def sum_loss(
    network: TextNetwork, tokens: mx.array, positions: mx.array, token_ids: mx.array, weights: mx.array
) -> mx.array:
    """Negative log-likelihood in nats, summed over the targets, in float32. Scalar."""
    logits = target_logits(network, tokens, positions).astype(mx.float32)
    return (nn.losses.cross_entropy(logits, token_ids) * weights).sum()
