"""Laws of the training step: sums over targets, whatever way the batch is cut."""

from __future__ import annotations

import dataclasses
import itertools
import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from serve.errors import TrainingError
from train.adapters.adapt import AdapterSettings, add_lora, checkpointed_layers, train_all, trainable_tensors
from train.data.batches import Batch
from train.loop.loss import find_targets, round_up, sum_loss
from train.loop.step import Stepper, StepSettings, mean_loss
from train.loop.trainer import LoopSettings, Trainer
from train.objectives.sft import SFT

FAMILIES = ("qwen3", "llama", "gemma3_text", "gemma2", "phi3", "olmo2")


class Recorder:
    def __init__(self) -> None:
        self.reports, self.evals, self.saves, self.bad = [], [], [], []
        self.rollbacks = 0

    def on_report(self, report):
        self.reports.append(report)

    def on_eval(self, step, evaluation, is_best, seconds):
        self.evals.append((step, evaluation.loss, is_best))

    def on_save(self, state):
        self.saves.append(dataclasses.replace(state))

    def on_nonfinite(self, event):
        self.bad.append(event)

    def on_rollback(self):
        self.rollbacks += 1


def rows_of(batch: Batch, start: int, end: int) -> Batch:
    tokens, is_target = batch.tokens[start:end], batch.is_target[start:end]
    return Batch(tokens, is_target, int(is_target.sum()), tokens.size, batch.row_ids[start:end])


def full_logits_loss(module: nn.Module, batch: Batch) -> mx.array:
    """The plain way: logits everywhere, a mask, a sum."""
    logits = module(mx.array(batch.tokens))[:, :-1].astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, mx.array(batch.tokens[:, 1:]))
    return (losses * mx.array(batch.is_target[:, 1:])).sum()


def loss_of(network, batch: Batch, pad: bool = False) -> mx.array:
    found = find_targets(batch.tokens, batch.is_target, pad=pad)
    arrays = (batch.tokens, found.positions, found.token_ids, found.weights)
    return sum_loss(network, *(mx.array(a) for a in arrays))


def largest_difference(left: dict, right: dict) -> float:
    left, right = dict(tree_flatten(left)), dict(tree_flatten(right))
    assert left.keys() == right.keys()
    return max(float(mx.abs(left[name] - right[name]).max()) for name in left)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_full_logits_way(tiny_network, make_batch, family):
    network, batch = tiny_network(family), make_batch([9, 17, 5, 12])
    ours, our_gradients = nn.value_and_grad(network.module, lambda: loss_of(network, batch, pad=True))()
    plain, gradients = nn.value_and_grad(network.module, lambda: full_logits_loss(network.module, batch))()
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)
    scale = max(float(mx.abs(g).max()) for _, g in tree_flatten(gradients))
    assert largest_difference(our_gradients, gradients) < 1e-4 * scale


@pytest.mark.parametrize(("max_places", "forwards"), [(0, [8]), (64, [2] * 4), (130, [4, 4]), (1, [1] * 8)])
def test_a_batch_in_parts_is_the_batch_at_the_memory_of_a_part(
    tiny_network, make_batch, monkeypatch, max_places, forwards
):
    batch = make_batch([31, 30, 29, 33, 28, 27, 26, 25])  # 8 rows read at 32 positions
    heard = []

    def step(bound):
        network = tiny_network()
        train_all(network)
        stepper = Stepper(network, mlx_optim.SGD(1e-1), SFT(), StepSettings(max_positions=bound))
        result = stepper.step([batch], 0)
        return result, network.module.parameters()

    whole, weights = step(0)
    prepare = SFT.prepare
    monkeypatch.setattr(
        SFT, "prepare", lambda self, part, **pad: heard.append(len(part.tokens)) or prepare(self, part, **pad)
    )
    result, parts = step(max_places)
    assert heard == forwards
    heard.clear()
    stepper = Stepper(tiny_network(), mlx_optim.SGD(0.0), SFT(), StepSettings(max_positions=max_places))
    assert stepper.mean_loss([batch]).loss == pytest.approx(whole.loss, rel=1e-5)
    assert heard == forwards
    assert (result.num_units, result.num_places) == (whole.num_units, whole.num_places)
    assert result.shares.shape == (1,)
    assert result.loss == pytest.approx(whole.loss, rel=1e-5)
    assert result.norm == pytest.approx(whole.norm, rel=1e-4)
    assert largest_difference(parts, weights) < 1e-5


def test_padding_is_never_a_target_and_the_first_token_never_counts(make_batch):
    batch = make_batch([4, 11])
    is_target = batch.is_target.copy()
    is_target[0, 0] = True
    found = find_targets(batch.tokens, is_target)
    assert found.num_targets == batch.num_targets == len(found.positions)
    places = set(zip(*np.nonzero(batch.is_target), strict=True))
    assert {(p // 11, p % 11 + 1) for p in found.positions.tolist()} == places


def test_sizes_are_rounded_up_by_at_most_a_quarter():
    sizes = {round_up(n) for n in range(1, 4097)}
    assert all(n <= round_up(n) <= max(64, 1.25 * n) for n in range(1, 4097))
    assert len(sizes) == 25


@pytest.mark.parametrize("optimizer", [mlx_optim.SGD, mlx_optim.Adam])
@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 1, 3, 8), (0, 2, 4, 6, 8)])
def test_batch_of_8_equals_its_parts_accumulated(tiny_network, make_batch, cuts, optimizer):
    whole = make_batch([5, 31, 7, 12, 3, 22, 16, 9])
    parts = [rows_of(whole, start, end) for start, end in itertools.pairwise(cuts)]
    results = []
    for batches in ([whole], parts):
        network = tiny_network()
        train_all(network)
        result = Stepper(network, optimizer(1e-2), SFT()).step(batches, 0)
        results.append((result.loss, result.norm, result.num_units, network.module.parameters()))
    (loss, norm, count, weights), (loss_2, norm_2, count_2, weights_2) = results
    assert count == count_2 == whole.num_targets
    assert loss == pytest.approx(loss_2, rel=1e-5)
    assert norm == pytest.approx(norm_2, rel=1e-4)
    if optimizer is mlx_optim.SGD:
        assert largest_difference(weights, weights_2) < 1e-6


def test_leftover_batches_at_the_end_make_a_step_of_their_own(tiny_network, make_batch):
    network, recorder = tiny_network(), Recorder()
    train_all(network)
    settings = LoopSettings(num_iterations=5, accumulation=2, iterations_per_report=2)
    batches = [make_batch([8, 6], seed=i) for i in range(5)]
    trainer = Trainer(Stepper(network, mlx_optim.SGD(1e-2), SFT()), settings, batches.__getitem__, recorder)
    state = trainer.fit()
    assert (state.iteration, state.step) == (5, 3)
    assert state.num_targets == sum(batch.num_targets for batch in batches)
    assert [report.step for report in recorder.reports] == [1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_tensor_moves_and_nothing_else(tiny_network, make_batch, family):
    network = tiny_network(family)
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    stepper = Stepper(network, mlx_optim.Adam(1e-2), SFT())
    before = {name: np.array(value) for name, value in tree_flatten(network.module.parameters())}
    for step in range(2):  # B is zero at first, so A moves in the second step
        stepper.step([make_batch([9, 14], seed=step)], step)
    trained = set(trainable_tensors(network))
    assert trained
    assert all(name.endswith(("lora_a", "lora_b")) for name in trained)
    for name, value in tree_flatten(network.module.parameters()):
        assert np.array_equal(before[name], np.array(value)) == (name not in trained), name


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_few_rows_are_learned_by_heart(tiny_network, make_batch, kind):
    network, batch = tiny_network(), make_batch([10, 15, 12])
    if kind == "lora":
        add_lora(network, AdapterSettings(rank=8, scale=4.0))
    else:
        train_all(network)
    stepper = Stepper(network, mlx_optim.Adam(1e-2), SFT(), StepSettings(max_grad_norm=1.0))
    before = mean_loss(network, [batch], SFT()).loss
    for step in range(200):
        stepper.step([batch], step)
    assert before > 2
    # Two hundred steps amplify rounding: one kernel ends at 0.05, another at 0.11.
    assert mean_loss(network, [batch], SFT()).loss < 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient_and_no_class(tiny_network, make_batch, family):
    network, batch = tiny_network(family), make_batch([9, 12])
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    for name, tensor in trainable_tensors(network).items():
        network.module.load_weights([(name, tensor + 0.01)], strict=False)
    classes = [type(layer) for layer in network.layers]
    calls = [kind.__call__ for kind in classes]
    _, plain = nn.value_and_grad(network.module, lambda: loss_of(network, batch))()
    with checkpointed_layers(network):
        assert [type(layer) for layer in network.layers] != classes
        assert [kind.__call__ for kind in classes] == calls
        _, recomputed = nn.value_and_grad(network.module, lambda: loss_of(network, batch))()
    assert [type(layer) for layer in network.layers] == classes
    assert largest_difference(plain, recomputed) < 1e-6


def test_clipping_bounds_the_update(tiny_network, make_batch):
    network = tiny_network()
    train_all(network)
    before = dict(tree_flatten(network.module.parameters()))
    result = Stepper(network, mlx_optim.SGD(1.0), SFT(), StepSettings(max_grad_norm=0.01)).step(
        [make_batch([9, 12])], 0
    )
    moved = sum(float((v - before[n]).square().sum()) for n, v in tree_flatten(network.module.parameters()))
    assert result.norm > 0.1
    assert math.sqrt(moved) == pytest.approx(0.01, rel=1e-2)


def test_a_weight_that_is_not_a_number_stops_the_run_and_names_the_rows(tiny_network, make_batch):
    network, recorder = tiny_network(), Recorder()
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    network.layers[1].mlp.up_proj.lora_b = mx.full((4, 96), math.nan)
    stepper = Stepper(network, mlx_optim.Adam(1e-2), SFT(), name_row=lambda row: f"train.jsonl:{row + 1}")
    settings = LoopSettings(num_iterations=4, iterations_per_report=2, iterations_per_save=1)
    trainer = Trainer(stepper, settings, lambda i: make_batch([9, 12], first_id=7), recorder)
    with pytest.raises(
        TrainingError, match=r"step 1: the loss is nan on rows train\.jsonl:8, train\.jsonl:9"
    ):
        trainer.fit()
    assert recorder.saves == []


def test_patience_ends_the_run(tiny_network, make_batch):
    network, recorder = tiny_network(), Recorder()
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    settings = LoopSettings(num_iterations=50, iterations_per_eval=1, patience=2)
    trainer = Trainer(
        Stepper(network, mlx_optim.SGD(0.0), SFT()),
        settings,
        lambda i: make_batch([9]),
        recorder,
        lambda step: mean_loss(network, [make_batch([8, 5])], SFT()),
    )
    state = trainer.fit()
    assert [is_best for _, _, is_best in recorder.evals] == [False, True, False, False]
    assert state.step == 3
    assert recorder.saves[-1].step == 3


def test_dropout_depends_on_the_iteration_and_not_on_what_was_drawn_before(tiny_network, make_batch):
    losses = []
    for disturb in (False, True):
        network = tiny_network()
        add_lora(network, AdapterSettings(rank=4, scale=2.0, dropout=0.5))
        for name, tensor in trainable_tensors(network).items():
            network.module.load_weights([(name, tensor + 0.05)], strict=False)
        network.module.train()
        stepper = Stepper(network, mlx_optim.Adam(1e-2), SFT(), StepSettings(seed=3))
        for step in range(3):
            if disturb:
                mx.eval(mx.random.uniform(shape=(5,)))
            losses.append(stepper.step([make_batch([9, 12])], step).loss)
    assert losses[:3] == losses[3:]
    assert len(set(losses)) == 3


def clean(batch: Batch) -> Batch:
    """The same batch without token 95."""
    return dataclasses.replace(batch, tokens=np.minimum(batch.tokens, 94))


def spoiled(batch: Batch) -> Batch:
    """The same batch with token 95 in its first row."""
    tokens = np.minimum(batch.tokens, 94)
    tokens[0, 0] = 95
    return dataclasses.replace(batch, tokens=tokens)


def poisoned_run(tiny_network, batches, **settings):
    """A run over a model whose token 95 is embedded as infinity; phi3's head is a matrix of its own."""
    network, recorder = tiny_network("phi3"), Recorder()
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    embedding = network.module.model.embed_tokens
    embedding.weight = mx.concatenate([embedding.weight[:95], mx.full((1, 64), math.inf)])
    stepper = Stepper(network, mlx_optim.Adam(1e-2), SFT(), name_row=lambda row: f"train.jsonl:{row + 1}")
    loop = LoopSettings(num_iterations=len(batches), iterations_per_report=1, **settings)
    return stepper, Trainer(stepper, loop, batches.__getitem__, recorder), recorder


def test_a_skipped_step_leaves_weights_and_optimizer_as_if_it_had_not_been(tiny_network, make_batch):
    good = [clean(make_batch([9, 12], seed=i, first_id=2 * i)) for i in range(3)]
    stepper, trainer, recorder = poisoned_run(
        tiny_network, [good[0], spoiled(good[1]), good[2]], nonfinite="skip"
    )
    state = trainer.fit()
    assert [(e.step, e.action, e.rows) for e in recorder.bad] == [
        (2, "skip", "rows train.jsonl:3, train.jsonl:4")
    ]
    assert (state.iteration, state.step, state.num_nonfinite) == (3, 3, 1)
    assert [report.step for report in recorder.reports] == [1, 3]
    without, trainer, _ = poisoned_run(tiny_network, [good[0], good[2]])
    trainer.fit()
    for part in ("module", "optimizer"):
        trees = [
            s.network.module.trainable_parameters() if part == "module" else s.optimizer.state
            for s in (stepper, without)
        ]
        assert largest_difference(*trees) == 0.0


def test_a_rollback_asks_for_the_last_checkpoint_and_saves_one_before_the_first_step(
    tiny_network, make_batch
):
    good = [clean(make_batch([9, 12], seed=i)) for i in range(3)]
    _, trainer, recorder = poisoned_run(
        tiny_network, [good[0], spoiled(good[1]), good[2]], nonfinite="rollback"
    )
    trainer.fit()
    assert [save.step for save in recorder.saves] == [0, 3]
    assert recorder.rollbacks == 1


def test_a_run_whose_steps_are_all_bad_ends_whatever_its_policy(tiny_network, make_batch):
    bad = [spoiled(make_batch([9, 12], seed=i)) for i in range(20)]
    _, trainer, recorder = poisoned_run(tiny_network, bad, nonfinite="skip")
    with pytest.raises(TrainingError, match=r"step 10: .*10 steps in a row"):
        trainer.fit()
    assert len(recorder.bad) == 10
    assert recorder.bad[-1].action == "stop"


def test_bad_steps_with_good_ones_between_them_do_not_end_a_run(tiny_network, make_batch):
    batches = [clean(make_batch([9, 12], seed=i)) for i in range(25)]
    batches = [spoiled(batch) if i % 2 else batch for i, batch in enumerate(batches)]
    _, trainer, recorder = poisoned_run(tiny_network, batches, nonfinite="skip")
    assert trainer.fit().num_nonfinite == 12
    assert [event.step for event in recorder.bad] == list(range(2, 25, 2))


def test_the_best_may_be_the_greatest_of_a_measure(tiny_network, make_batch):
    network, recorder = tiny_network(), Recorder()
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    shares = iter([0.9, 0.2, 0.7, 0.7, 0.1])
    settings = LoopSettings(
        num_iterations=4, iterations_per_eval=1, save_best=True, best_by="exact", greater_is_better=True
    )
    trainer = Trainer(
        Stepper(network, mlx_optim.SGD(0.0), SFT()),
        settings,
        lambda i: make_batch([9]),
        recorder,
        lambda step: dataclasses.replace(
            mean_loss(network, [make_batch([8, 5])], SFT()), measures={"exact": next(shares)}
        ),
    )
    state = trainer.fit()
    assert [is_best for _, _, is_best in recorder.evals] == [False, True, True, False, False]
    assert (state.best_step, state.best_value) == (2, 0.7)
    assert state.best_loss == pytest.approx(recorder.evals[2][1])


def test_a_batch_without_targets_costs_nothing_beside_one_that_has_some(tiny_network, make_batch):
    full = make_batch([9, 12])
    empty = dataclasses.replace(full, is_target=np.zeros_like(full.is_target), num_targets=0)
    losses = []
    for batches in ([full], [empty, full], [full, empty]):
        network = tiny_network()
        train_all(network)
        losses.append(Stepper(network, mlx_optim.SGD(1e-2), SFT()).step(batches, 0).loss)
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(TrainingError, match="no loss targets"):
        Stepper(tiny_network(), mlx_optim.SGD(1e-2), SFT()).step([empty], 0)
