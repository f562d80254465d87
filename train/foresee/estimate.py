"""What a run will take, known before it starts: peak memory and time. No weights are loaded, nothing is trained.

The model is built from its config with arrays that are never evaluated; the gradient of the largest batch is traced
on them, for the device at hand, and `memory.cost_of` counts the graph. Beside it stand the weights, the optimizer's
state and one chunk of logits. Time is that work over the machine's rates, measured here and now.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import psutil
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from rich.console import Console

from serve import device
from serve.adapters.layers.experts import LoRAExperts
from serve.errors import AdapterError, ConfigError, ModelError
from serve.model.loading import DTYPES, cast, read_config, resolve, vocab_size_of
from serve.model.network import Network
from serve.model.quantization import Quantization
from serve.model.towers import build_with_towers, has_towers
from train.adapters.build import build_adapted
from train.data.batches import num_parts, padded_length
from train.data.packing import PackedPlan
from train.data.splits import rows_per_batch
from train.data.stream import StreamedRows
from train.foresee.memory import Cost, Operation, Value, cost_of
from train.foresee.preflight import Preflight
from train.loop.loss import CHUNK_LOGITS, MIN_CHUNK_ROWS
from train.loop.optim import build_optimizer
from train.recipe.draft import DraftConfig
from train.recipe.recipe import Recipe

LOGITS_COPIES = 5
"""Of a chunk's float32 logits at the peak: themselves, their exponentials and gradients (measured: 4.5 to 6)."""
LAYERS_RECOMPUTED = 1.5
"""With gradient checkpointing, activations at the peak in layers' worth: the one at work and part of the next."""
FORWARD_SHARE = 0.4
"""Of a step's time: what a batch of validation costs."""
ATTENTION_TILE = 128
"""MLX's CUDA backend fuses the gradient of attention at whole tiles of tokens, and cannot export what it fused: there
one token more is counted, whose attention is not."""
PAD_TO = 8
RATE_SIZE, RATE_BYTES = 512, 1 << 24


@dataclass(frozen=True)
class Workload:
    """What a run computes on: its largest forward [rows, tokens], and how much there is in all."""

    rows: int
    tokens: int
    mean_places: float
    """Of a batch, padding included."""
    num_iterations: int
    num_validations: int
    valid_places: int
    """Of one validation."""
    in_parts: bool = False
    """Whether a step's gradient is a sum of several forwards'."""


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a step, by what takes them, and seconds."""

    weights_bytes: int
    teacher_bytes: int
    """Weights of the model that answers, where it is another one than the one that trains."""
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    recomputed_bytes: int
    """Of the activations, those that gradient checkpointing makes again in the backward pass."""
    logits_bytes: int
    process_bytes: int
    """Python and its libraries, where they share the memory with the arrays."""
    total_bytes: int
    """What the machine has for arrays."""
    available_bytes: int
    """What of that is free."""
    seconds: float
    step_s: float

    @property
    def peak_bytes(self) -> int:
        """Logits are made between the forward and the backward pass: activations that are kept are all there then.

        Of the logits about half are still there while the first layer is computed again (measured).
        """
        kept = (
            self.weights_bytes
            + self.teacher_bytes
            + self.optimizer_bytes
            + self.gradients_bytes
            + self.process_bytes
        )
        half = self.logits_bytes // 2
        at_loss = self.activations_bytes - self.recomputed_bytes + self.logits_bytes
        return kept + max(at_loss, self.activations_bytes + half, self.gradients_bytes)


def workload_of(flight: Preflight) -> Workload:
    """The largest batch there may be, and the amount of work. Of a stream, every row counts as max_seq_length."""
    recipe, plan = flight.recipe, flight.plan
    is_stream = isinstance(flight.train.rows, StreamedRows)
    longest = recipe.max_seq_length if is_stream else max(flight.train.lengths)
    if recipe.answering is not None:
        longest += recipe.answering.max_completion_length
    rows, tokens = rows_per_batch(recipe), int(padded_length(np.array(longest), PAD_TO))
    if isinstance(plan, PackedPlan):
        rows, tokens = (int(length) for length in flight.batch_at(0).tokens.shape)
    splits_by = recipe.entry.splits_by
    rows *= 2 if splits_by == "pair" else 1
    if recipe.answering is not None:
        rows = recipe.batch_size
    mean_places = float(rows * tokens)
    if not is_stream and not isinstance(plan, PackedPlan) and recipe.answering is None:
        num_tokens = sum(len(part) for row in flight.train.rows for part in row.sequences)
        mean_places = num_tokens / (1 - plan.padding_share) / plan.batches_per_epoch
    in_parts = recipe.grad_accumulation_steps > 1
    if splits_by is not None:
        are_pairs = splits_by == "pair"
        count = num_parts(rows, tokens - 1, recipe.micro_batch_tokens, are_pairs=are_pairs)
        unit = 2 if are_pairs else 1
        rows, in_parts = -(-rows // unit // count) * unit, in_parts or count > 1
    valid_places = (
        sum(batch.tokens.size for batch in flight.valid_batches()) if recipe.answering is None else 0
    )
    num_validations = 1 + -(-flight.num_iterations // recipe.steps_per_eval) if valid_places else 0
    return Workload(rows, tokens, mean_places, flight.num_iterations, num_validations, valid_places, in_parts)


def show(flight: Preflight, console: Console) -> None:
    """Print the estimate; loudly, with what helps, if the run needs more than the machine has free."""
    recipe, workload = flight.recipe, workload_of(flight)
    try:
        found = estimate(recipe, workload)
    except ModelError as error:
        console.print(
            f"no estimate of memory and time: {error}",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return
    for line in lines(found, workload, has_rollouts=recipe.answering is not None):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if recipe.train_vision:
        said = "the tower trains inside the loss: its activations, and its time, are not in the estimate"
        console.print(said, style="yellow", highlight=False, markup=False, soft_wrap=True)
    helps = advice(found, recipe)
    if helps:
        console.print(
            "This run needs more memory than is free here. What helps:\n  " + "\n  ".join(helps),
            style="bold red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def estimate(recipe: Recipe, workload: Workload) -> Estimate:
    """Peak memory and time of a run. ModelError where the model cannot be built or traced without its weights;

    ConfigError where the adapter the recipe asks for does not fit it.
    """
    try:
        network = _unweighted(recipe)
        vocab_size = vocab_size_of(read_config(resolve(recipe.model)))
        module = network.module
        weights = _num_bytes(module.parameters())
        gradients = _num_bytes(module.trainable_parameters())
        optimizer = build_optimizer(recipe.optimizer, {}, lambda step: mx.array(1.0), learning_rate=1.0)
        optimizer.init(module.trainable_parameters())
        state = _num_bytes(optimizer.state)
        cost = step_cost(network, workload.rows, workload.tokens, recompute=recipe.grad_checkpoint)
    except (AdapterError, ConfigError):
        raise  # the run would end by it too
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{recipe.model}: cannot be traced without its weights: {error}") from error
    places = workload.rows * workload.tokens
    chunk = min(places, max(CHUNK_LOGITS // vocab_size, MIN_CHUNK_ROWS))
    on_cpu = device.backend() == "cpu"
    process = psutil.Process().memory_info().rss if on_cpu else 0
    step_s = _seconds(cost) * workload.mean_places / places
    valid_s = FORWARD_SHARE * _seconds(cost) * workload.valid_places / places
    return Estimate(
        weights_bytes=weights,
        teacher_bytes=teacher_bytes(recipe),
        optimizer_bytes=state,
        gradients_bytes=gradients * (2 if workload.in_parts else 1),
        activations_bytes=cost.peak_bytes,
        recomputed_bytes=cost.recomputed_bytes,
        logits_bytes=LOGITS_COPIES * chunk * vocab_size * 4 * (2 if _reads_teacher(recipe) else 1),
        process_bytes=process,
        total_bytes=_memory_bytes(on_cpu),
        available_bytes=device.free_memory_bytes() + process,
        seconds=step_s * workload.num_iterations + valid_s * workload.num_validations,
        step_s=step_s * recipe.grad_accumulation_steps,
    )


def teacher_bytes(recipe: Recipe) -> int:
    """Weights of the model that answers for a recipe, as it is loaded; its adapter's are little beside them."""
    teacher = recipe.block.teacher if recipe.block is not None else None
    if teacher is None:
        return 0
    network = _built(read_config(resolve(teacher[0])), None, is_random=False)
    return _num_bytes(network.module.parameters())


def _unweighted(recipe: Recipe) -> Network:
    """The network as it will train, its arrays never evaluated."""
    config = read_config(resolve(recipe.model))
    network = _built(config, recipe.quantize, is_random=recipe.init == "random")
    build_adapted(recipe, network, is_sketch=True)
    network.module.train()
    return network


def _built(config: dict[str, Any], quantize: Quantization | None, *, is_random: bool) -> Network:
    """A network as it is loaded, its arrays never evaluated."""
    if has_towers(config):
        module = build_with_towers(config)
    else:
        model_class, args_class = mlx_lm_utils._get_classes(config)
        module = model_class(args_class.from_dict(config))
    text = config.get("text_config") or {}
    stored = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16")
    dtype = device.compute_dtype("float32" if is_random else stored)
    cast(module, DTYPES.get(dtype, mx.bfloat16))
    packing = config.get("quantization") or (quantize.model_dump() if quantize else None)
    if packing and device.backend() != "cpu":
        known = {name: packing[name] for name in ("group_size", "bits", "mode") if name in packing}
        # Towers are packed by whoever made a folder, never as it is loaded.
        nn.quantize(
            Network(module).text,
            class_predicate=lambda _, layer: _fits(layer, known.get("group_size", 64)),
            **known,
        )
    return Network(module)


def _reads_teacher(recipe: Recipe) -> bool:
    """Whether a step holds the teacher's logits beside its own."""
    return isinstance(recipe.block, DraftConfig) and recipe.block.kd_alpha > 0


def _fits(layer: nn.Module, group_size: int) -> bool:
    return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % group_size == 0


def _num_bytes(tree: Any) -> int:
    return sum(value.nbytes for _, value in tree_flatten(tree) if isinstance(value, mx.array))


def _memory_bytes(on_cpu: bool) -> int:
    info = {} if on_cpu else mx.device_info()
    total = (
        info.get("max_recommended_working_set_size") or info.get("memory_size") or info.get("total_memory")
    )
    return int(total or psutil.virtual_memory().total)


def _seconds(cost: Cost) -> float:
    """Products at the matmul rate, everything else at the rate memory is read and written."""
    flops_per_s, bytes_per_s = _rates()
    return cost.flops / flops_per_s + cost.traffic_bytes / bytes_per_s


@cache
def _rates() -> tuple[float, float]:
    """Measured once a process: FLOP/s of a matmul, bytes/s of an element-wise product. A fraction of a second."""
    a, b = (mx.arange(RATE_BYTES // 4, dtype=mx.float32) for _ in range(2))
    mx.eval(a, b)
    best_s = math.inf
    for _ in range(3):
        start_s = time.perf_counter()
        mx.eval(a * b)
        best_s = min(best_s, time.perf_counter() - start_s)
    return device.matmul_gflops(RATE_SIZE) * 1e9, 3 * RATE_BYTES / best_s


def advice(found: Estimate, recipe: Recipe) -> list[str]:
    """What makes a run that needs too much memory smaller, most helpful first; nothing if it fits."""
    if found.peak_bytes <= found.available_bytes:
        return []
    words = []
    if not recipe.grad_checkpoint:
        words.append("grad_checkpoint: true (keeps the layers' inputs only; a third more time)")
    if recipe.batch_size > 1:
        half = recipe.batch_size // 2
        words.append(
            f"batch_size: {half} with grad_accumulation_steps: {recipe.grad_accumulation_steps * 2} (the same step)"
        )
    words.append(f"max_seq_length below {recipe.max_seq_length}")
    if recipe.fine_tune_type == "full":
        words.append("fine_tune_type: lora (gradients and optimizer state of the adapter only)")
    elif recipe.quantize is None and device.backend() != "cpu":
        words.append("quantize: {bits: 4} (a quarter of the weights)")
    return words


def lines(found: Estimate, workload: Workload, *, has_rollouts: bool = False) -> list[str]:
    """For people: memory beside what the machine has, and time."""
    parts = {
        "weights": found.weights_bytes,
        "the teacher's weights": found.teacher_bytes,
        "optimizer": found.optimizer_bytes,
        "gradients": found.gradients_bytes,
        f"activations of {workload.rows} x {workload.tokens:,} tokens": found.activations_bytes,
        "logits": found.logits_bytes,
        "this process": found.process_bytes,
    }
    said = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
    return [
        f"estimated peak memory {_size(found.peak_bytes)} of {_size(found.total_bytes)}, "
        f"{_size(found.available_bytes)} of it free: {said}",
        f"estimated time {_duration(found.seconds)}: {found.step_s:.2g} s a step"
        + (", the answers' time on top" if has_rollouts else ", validations included"),
    ]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def traced(function: Callable[..., Sequence[mx.array]], *arrays: mx.array) -> Cost:
    """The cost of a function of arrays, none of which is evaluated."""
    operations: list[Operation] = []
    outputs: list[str] = []

    def note(event: dict[str, Any]) -> None:
        if event["type"] == "primitive":
            parts = (tuple(_value(*entry) for entry in event[side]) for side in ("inputs", "outputs"))
            operations.append(Operation(event["name"], *parts))
        elif event["type"] == "outputs":
            outputs.extend(name for name, _, _ in event["outputs"])

    mx.export_function(note, function, *arrays)
    return cost_of(operations, outputs)


def _value(name: str, shape: Sequence[int], dtype: mx.Dtype) -> Value:
    return Value(name, tuple(shape), math.prod(shape) * dtype.size)


def step_cost(network: Network, num_rows: int, num_tokens: int, *, recompute: bool) -> Cost:
    """Forward and backward of the layers on a batch [num_rows, num_tokens], without the head.

    recompute  gradient checkpointing: of the layers only their inputs stay, beside one layer's activations
    The network's weights are replaced by tracers; it is of no use afterwards.
    """
    if device.backend() == "cuda" and num_tokens % ATTENTION_TILE == 0:
        num_tokens += 1
    module = network.module
    for layer in module.modules():
        if isinstance(layer, (LoRAExperts, SwitchLinear, QuantizedSwitchLinear)):
            # Their own gradients take an operation that MLX cannot export; what flows through them is counted.
            layer.freeze()
    frozen = dict(tree_flatten(module.parameters()))
    names = list(frozen)

    def gradients(tokens: mx.array, *weights: mx.array) -> list[mx.array]:
        module.update(tree_unflatten(list(zip(names, weights, strict=True))))

        def total() -> mx.array:
            return network.hidden(tokens).astype(mx.float32).square().sum()

        loss, found = nn.value_and_grad(module, total)()
        return [loss, *(value for _, value in tree_flatten(found))]

    inputs = [mx.zeros(value.shape, value.dtype) for value in frozen.values()]
    cost = traced(gradients, mx.zeros((num_rows, num_tokens), mx.int32), *inputs)
    gradient_bytes = sum(value.nbytes for _, value in tree_flatten(module.trainable_parameters()))
    activations = max(cost.peak_bytes - gradient_bytes, 0)
    if not recompute:
        return Cost(activations, cost.flops, cost.traffic_bytes)
    layers = len(network.layers)
    kept = num_rows * num_tokens * _width(network) * network.parameters_dtype().size * layers
    at_work = int(LAYERS_RECOMPUTED * activations / layers)
    return Cost(kept + at_work, cost.flops * 4 / 3, cost.traffic_bytes * 4 / 3, at_work)


def _width(network: Network) -> int:
    """D, by tracing: the width of the hidden states."""
    width: list[int] = []

    def forward(tokens: mx.array) -> list[mx.array]:
        hidden = network.hidden(tokens)
        width.append(hidden.shape[-1])
        return [hidden]

    traced(forward, mx.zeros((1, 2), mx.int32))
    return width[0]
