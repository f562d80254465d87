"""What a run measures on rows it does not learn from: their mean loss, the mean reward of answers to them, or what of
answers to them a drafter guesses; and beside it the recipe's metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from serve.model.loading import LoadedModel
from train.data.batches import Batch
from train.data.splits import Split
from train.foresee.preflight import Preflight
from train.loop.keeper import METRIC
from train.loop.step import Evaluation, Stepper
from train.objectives.rollouts import Rollouts
from train.objectives.taught import TaughtBatches
from train.watch.exact_match import exact_match

Answered = Rollouts | TaughtBatches
"""What makes batches of prompts."""
Measure = Callable[[int], Mapping[str, float]]
"""step → numbers by name, of the weights as they are."""


def validation(
    flight: Preflight, stepper: Stepper, answered: Answered | None, measure: Measure
) -> Callable[[int], Evaluation] | None:
    """What the trainer calls at each validation; None where there are no validation rows."""
    loss = _loss(flight, stepper, answered, flight.valid, flight.valid_batches(), flight.recipe.val_batches)
    if loss is None:
        return None

    def evaluate(step: int) -> Evaluation:
        evaluation = loss()
        return replace(evaluation, measures={**evaluation.measures, **measure(step)})

    return evaluate


def test_loss(flight: Preflight, stepper: Stepper, answered: Answered | None) -> float | None:
    """The loss on the test rows, for weights that are done; None where the recipe asks for none."""
    loss = _loss(flight, stepper, answered, flight.test, flight.test_batches(), flight.recipe.test_batches)
    return loss().loss if loss else None


def _loss(
    flight: Preflight,
    stepper: Stepper,
    answered: Answered | None,
    split: Split | None,
    batches: Sequence[Batch],
    num_batches: int,
) -> Callable[[], Evaluation] | None:
    if split is None:
        return None
    if answered is not None:  # its rows are prompts, to be answered
        num_rows = flight.recipe.batch_size * flight.ranks.size
        return lambda: answered.evaluation(split, num_rows, num_batches)
    return lambda: stepper.mean_loss(batches)


def metric_of(flight: Preflight, model: LoadedModel, say: Callable[[str], None]) -> Measure:
    """The recipe's metric on the first validation rows, told as it is taken; nothing where it has none."""
    metric, valid = flight.recipe.metric, flight.valid
    if metric is None or valid is None:
        return lambda step: {}

    def measure(step: int) -> dict[str, float]:
        answers = exact_match(
            model,
            flight.template,
            valid.examples,
            max_tokens=metric.max_tokens,
            rows=metric.rows,
            stop_ids=flight.stop_ids,
            reader=flight.reader,
        )
        share, count = answers.exact_match, f"{answers.num_exact} of {len(answers.texts)}"
        say(f"step {step}: exact match {share:.1%} ({count})")
        return {METRIC: share}

    return measure
