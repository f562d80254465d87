"""Cross entropy, computed only where a target stands. Batches and a network in, a sum over targets out.

The head runs on chunks of targets, so peak memory holds one chunk's logits, never [targets, vocabulary].
Knows neither optimizers nor means: whoever calls divides by the targets of the whole accumulated step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from serve.model.network import Network
from train.loop.eyes import Seen

CHUNK_LOGITS = 1 << 22
"""Logits of one chunk: 16 MiB in float32. MLX allocates some ten operations ahead of the one that runs."""
MIN_CHUNK_ROWS = 128
"""Fewer rows would leave a matmul with the head's matrix bound by reading that matrix."""


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


def chunk_rows(vocab_size: int) -> int:
    """Targets the head scores at once."""
    return max(CHUNK_LOGITS // max(vocab_size, 1), MIN_CHUNK_ROWS)


BESIDE = ("segments", "seen")
"""What a forward takes beside tokens, by its name among an objective's inputs."""


def beside(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of an objective's inputs, what its forwards take beside tokens."""
    return {name: inputs[name] for name in BESIDE if name in inputs}


def hidden_states(
    network: Network, tokens: mx.array, segments: mx.array | None = None, seen: Seen | None = None
) -> mx.array:
    """Hidden states before the head: tokens [B, T] → [B, T, D].

    segments  [B, T] int32, the document each token of a packed row belongs to; None: one document a row
    seen      what the rows show; None: nothing
    """
    blocks = seen.blocks if seen is not None else None
    cache = None
    if segments is not None or blocks is not None:
        from serve.model.packed import packed_cache

        cache = packed_cache(network, mx.zeros_like(tokens) if segments is None else segments, blocks)
    if seen is None:
        return network.hidden(tokens, cache)
    embeddings, extras = seen.inputs(tokens)
    return network.hidden(tokens, cache, embeddings, extras)


def hidden_at(
    network: Network,
    tokens: mx.array,
    positions: mx.array,
    segments: mx.array | None = None,
    seen: Seen | None = None,
) -> mx.array:
    """Hidden states at flat positions: tokens [B, T], positions [N] → [N, D]."""
    hidden = hidden_states(network, tokens, segments, seen)
    return hidden.reshape(-1, hidden.shape[-1])[positions]


def target_logits(
    network: Network,
    tokens: mx.array,
    positions: mx.array,
    segments: mx.array | None = None,
    seen: Seen | None = None,
) -> mx.array:
    """Logits at flat positions: tokens [B, T], positions [N] → [N, V], all at once."""
    return network.logits(hidden_at(network, tokens, positions, segments, seen))


def target_logprobs(
    network: Network,
    tokens: mx.array,
    positions: mx.array,
    token_ids: mx.array,
    segments: mx.array | None = None,
    seen: Seen | None = None,
    *,
    temperature: float = 1.0,
) -> mx.array:
    """Log-probabilities of the targets in nats, [N] float32, with any gradient. Logits are divided by `temperature`.

    Where the targets are more than a chunk, a chunk's logits are computed again in the backward pass.
    """
    hidden = hidden_at(network, tokens, positions, segments, seen)
    size = chunk_rows(network.vocab_size)
    if len(token_ids) <= size:
        return -_cross_entropy(network, {_HIDDEN: hidden}, token_ids, temperature)
    head = _head_parameters(network)

    def chunk_logprobs(leaves: dict[str, mx.array], ids: mx.array) -> mx.array:
        return -_cross_entropy(network, leaves, ids, temperature)

    parts: list[mx.array] = []
    for rows in chunks(len(token_ids), size):
        scored = mx.checkpoint(partial(chunk_logprobs, ids=token_ids[rows]))
        parts.append(scored({**head, _HIDDEN: _after(parts, hidden[rows])}))
    return mx.concatenate(parts)


def sum_loss(
    network: Network,
    tokens: mx.array,
    positions: mx.array,
    token_ids: mx.array,
    weights: mx.array,
    segments: mx.array | None = None,
    seen: Seen | None = None,
    *,
    trains: bool = True,
) -> mx.array:
    """Negative log-likelihood in nats, weighted, summed over the targets, in float32. Scalar.

    trains  a gradient will be taken. Then each chunk's gradient is computed beside its value, while its logits
            are there: the head runs once forward and once backward, and nothing is kept but [N, D].
            False gives the same value, without a gradient where there is more than one chunk.
    """
    hidden = hidden_at(network, tokens, positions, segments, seen)

    def losses(logits: mx.array, rows: slice) -> mx.array:
        return cross_entropy(logits, token_ids[rows])  # type: ignore[return-value]

    return sum_of_losses(network, hidden, weights, losses, trains=trains)


Losses = Callable[[mx.array, slice], mx.array]
"""(logits [n, V] in float32, which of all the targets they are of) → a loss each, [n]."""


def sum_of_losses(
    network: Network, hidden: mx.array, weights: mx.array, losses: Losses, *, trains: bool = True
) -> mx.array:
    """Losses of hidden states [N, D], weighted by [N] and summed. Scalar, float32. `trains` as `sum_loss`."""
    size = chunk_rows(network.vocab_size)

    def part_sum(leaves: dict[str, mx.array], rows: slice) -> mx.array:
        return (losses(_head_logits(network, leaves), rows) * weights[rows]).sum()

    if len(weights) <= size:
        return part_sum({_HIDDEN: hidden}, slice(0, len(weights)))
    if trains:
        return _sum_with_gradient(network, hidden, part_sum, size)
    sums: list[mx.array] = []
    for rows in chunks(len(weights), size):
        sums.append(part_sum({_HIDDEN: _after(sums, hidden[rows])}, rows))
    return mx.stack(sums).sum()


def sum_loss_and_hits(
    network: Network,
    tokens: mx.array,
    positions: mx.array,
    token_ids: mx.array,
    weights: mx.array,
    segments: mx.array | None = None,
    seen: Seen | None = None,
) -> tuple[mx.array, mx.array]:
    """`sum_loss` without a gradient, and the weight of the targets that are the likeliest token. Scalars, float32."""
    hidden = hidden_at(network, tokens, positions, segments, seen)
    sums: list[mx.array] = []
    for rows in chunks(len(token_ids), chunk_rows(network.vocab_size)):
        logits = network.logits(_after(sums, hidden[rows])).astype(mx.float32)
        is_hit = mx.equal(logits.argmax(axis=-1), token_ids[rows]).astype(mx.float32)
        losses: mx.array = cross_entropy(logits, token_ids[rows])  # type: ignore[assignment]
        by_target = mx.stack([losses, is_hit])  # [2, n]
        sums.append((by_target * weights[rows]).sum(axis=1))
    loss, hits = mx.stack(sums).sum(axis=0)
    return loss, hits


@mx.custom_function
def cross_entropy(logits: mx.array, token_ids: mx.array) -> mx.array:
    """−log softmax(logits)[token]: logits [N, V] float32, token_ids [N] → [N], in nats.

    Its own gradient, softmax − one-hot, takes one array of the logits' size; the derived one takes several.
    """
    scores = mx.take_along_axis(logits, token_ids[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits, axis=-1) - scores


@cross_entropy.vjp
def _cross_entropy_gradient(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    logits, token_ids = primals
    gradient = mx.softmax(logits, axis=-1)
    rows = mx.arange(len(token_ids))
    gradient = gradient.at[rows, token_ids].add(-1.0) * cotangent[:, None]
    return gradient, mx.zeros_like(token_ids)


_HIDDEN = "hidden"
"""Key of the hidden states among a chunk's leaves; parameters' names hold dots."""


def _sum_with_gradient(
    network: Network,
    hidden: mx.array,
    part_sum: Callable[[dict[str, mx.array], slice], mx.array],
    size: int,
) -> mx.array:
    """The sum, built so that differentiating it yields the gradients computed here.

    With g = ∂sum/∂x held constant, (x · g).sum() has gradient g; taken away from itself it adds nothing.
    """
    head = {name: mx.stop_gradient(value) for name, value in _head_parameters(network).items()}
    values: list[mx.array] = []
    hidden_gradients: list[mx.array] = []
    gradients: dict[str, mx.array] = {}
    for rows in chunks(len(hidden), size):
        part = _after([*values[-1:], *hidden_gradients[-1:]], mx.stop_gradient(hidden[rows]))
        value, chunk_gradients = mx.value_and_grad(part_sum)({**head, _HIDDEN: part}, rows)
        values.append(value)
        hidden_gradients.append(chunk_gradients.pop(_HIDDEN))
        gradients = {
            name: gradients[name] + chunk_gradients[name] if gradients else chunk_gradients[name]
            for name in chunk_gradients
        }
    leaves = {**_head_parameters(network), _HIDDEN: hidden}
    gradients[_HIDDEN] = mx.concatenate(hidden_gradients)
    carriers = [_dot(leaves[name], mx.stop_gradient(gradient)) for name, gradient in gradients.items()]
    carrier = mx.stack(carriers).sum()
    return mx.stop_gradient(mx.stack(values).sum()) + (carrier - mx.stop_gradient(carrier))


def _dot(left: mx.array, right: mx.array) -> mx.array:
    return (left.astype(mx.float32) * right.astype(mx.float32)).sum()


def _cross_entropy(
    network: Network, leaves: dict[str, mx.array], token_ids: mx.array, temperature: float = 1.0
) -> mx.array:
    """[n] float32 of n hidden states, with the head's trained parameters as given among the leaves."""
    logits = _head_logits(network, leaves)
    if temperature != 1.0:
        logits = logits / temperature
    return cross_entropy(logits, token_ids)  # type: ignore[return-value]


def _head_logits(network: Network, leaves: dict[str, mx.array]) -> mx.array:
    """[n, V] float32 likewise."""
    head = [(name, value) for name, value in leaves.items() if name != _HIDDEN]
    before = _head_parameters(network) if head else {}
    network.module.update(tree_unflatten(head)) if head else None
    logits = network.logits(leaves[_HIDDEN]).astype(mx.float32)
    network.module.update(tree_unflatten(list(before.items()))) if head else None
    return logits


def _head_parameters(network: Network) -> dict[str, mx.array]:
    """Trainable parameters outside the layers, by path: what the head may use (a tied embedding too)."""
    inside = {id(leaf) for layer in network.layers for _, leaf in tree_flatten(layer.trainable_parameters())}
    prefix = f"{network.text_path}." if network.has_towers else ""
    outside = tree_flatten(network.module.trainable_parameters())
    return {name: leaf for name, leaf in outside if id(leaf) not in inside and name.startswith(prefix)}


def chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _after(earlier: list[mx.array], value: mx.array) -> mx.array:
    """`value`, not computed before what came earlier: chunks run one by one, so one chunk's logits are held."""
    return mx.depends(value, earlier[-2:]) if earlier else value
