"""Log-probabilities of whole answers, one a row of a batch: what preferences are computed from."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from serve.model.network import Network
from train.loop.loss import beside, find_targets, target_logprobs


def answer_inputs(tokens: np.ndarray, is_target: np.ndarray, *, pad: bool) -> dict[str, Any]:
    """What `answer_logprobs` needs of right-padded rows: tokens [B, T] int32, is_target [B, T] bool.

    tokens [B, T] · positions, token_ids, rows [N] int32 · is_real [N] float32, 0 where N was padded
    num_answer_tokens [B] float32, at least 1
    """
    # No array may be empty: rows without any target get entries that are not real.
    targets = find_targets(tokens, is_target, pad=pad or not is_target[:, 1:].any())
    rows = targets.positions // tokens.shape[1]
    lengths = np.bincount(rows, weights=targets.weights, minlength=len(tokens))
    return {
        "tokens": tokens,
        "positions": targets.positions,
        "token_ids": targets.token_ids,
        "rows": rows.astype(np.int32),
        "is_real": targets.weights,
        "num_answer_tokens": np.maximum(lengths, 1).astype(np.float32),
    }


def answer_logprobs(network: Network, inputs: dict[str, Any]) -> mx.array:
    """log p(answer | what stands before it), summed over the answer's tokens, in nats: [B] float32."""
    logprobs = target_logprobs(
        network, inputs["tokens"], inputs["positions"], inputs["token_ids"], **beside(inputs)
    )  # [N]
    return sum_by_row(logprobs * inputs["is_real"], inputs["rows"], len(inputs["tokens"]))


def sum_by_row(values: mx.array, rows: mx.array, num_rows: int) -> mx.array:
    """values [N], rows [N] -> the sum of each row's values, [B] float32."""
    return mx.zeros((num_rows,), mx.float32).at[rows].add(values)
