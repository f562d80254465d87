"""A drafter's batches and validations: prompts in, the teacher's answers to them out, each drawn when it is needed.

Which answers stand in a batch follows from its number alone. They are drawn in blocks of neighbouring batches, the
same ones whether a run begins before the block or is resumed inside it; so a resumed run learns from the tokens that
the uninterrupted one would have learned from, bit for bit, with its cache or without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import mlx.core as mx
import numpy as np

from serve.model.loading import LoadedModel
from serve.model.network import evaluating
from train.data.batches import Batch, validation_rows
from train.data.splits import Split
from train.data.tokens import TokenizedExample
from train.loop.distributed import Alone, Ranks, share, sum_named
from train.loop.loss import find_targets
from train.loop.step import Evaluation, parts_of
from train.objectives.acceptance import Acceptance, guesses_of, measures_of
from train.objectives.draft import Draft
from train.objectives.prompted import batch_of, check_context, seed_of
from train.objectives.teacher import ROWS_AT_ONCE, sampling_of

HELD_OUT = 1 << 32
"""In the seeds of validation answers, where training's have the number of their window."""


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """A teacher's answers. `seeds` [B] uint64: what each was drawn by."""

    seeds: np.ndarray | None = None


@dataclass(frozen=True)
class Window:
    """Batches between two refreshes: its number, its first batch, and in which block each row is first needed."""

    number: int
    start: int
    block_of: dict[int, int]

    def rows(self, block: int) -> list[int]:
        """Those of a block, in the order in which they are needed."""
        return [row for row, home in self.block_of.items() if home == block]


class TaughtBatches:
    """What the loop calls for batches under objective draft, and for evaluations.

    rows_at            iteration → the rows whose prompts are answered; num_generations answers each make the batch
    batches_per_epoch  after so many, every row has stood in a batch
    stop_ids           tokens that end an answer, besides the teacher's own
    max_positions      of one forward of an evaluation, as in StepSettings
    """

    def __init__(
        self,
        model: LoadedModel,
        objective: Draft,
        prompts: Sequence[TokenizedExample],
        rows_at: Callable[[int], Sequence[int]],
        batches_per_epoch: int,
        *,
        seed: int,
        batch_size: int,
        max_positions: int = 0,
        ranks: Ranks | None = None,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        self._network = model.network
        self._objective = objective
        self._config = objective.config
        self._prompts = prompts
        self._rows_at = rows_at
        self._batches_per_epoch = batches_per_epoch
        self._seed = seed
        self._block_batches = max(ROWS_AT_ONCE // batch_size, 1)
        self._max_positions = max_positions
        self._ranks = ranks or Alone()
        self._stop_ids = stop_ids
        self._window = Window(-1, 0, {})
        self._answers: dict[tuple[int, int], np.ndarray] = {}  # (row, number) → token ids, of this window
        self._held_out: dict[str, list[AnswerBatch]] = {}  # by split
        teacher, longest = objective.teacher, self._config.max_completion_length
        for max_context, name in ((teacher.max_context, teacher.name), (model.max_context, model.name)):
            check_context(max_context, name, prompts, longest, "draft")

    def batch_at(self, iteration: int) -> AnswerBatch:
        """The batch of an iteration. Answers to one prompt stand together, prompts in their order.

        Of several processes each has every `size`-th prompt; counts are of all, rows its own, maybe none.
        """
        self._enter(iteration)
        rows = list(self._rows_at(iteration))
        for block in sorted({self._window.block_of[row] for row in rows}):
            self._answer(block)
        mine = rows[self._ranks.rank :: self._ranks.size]
        keys = [(row, number) for row in mine for number in range(self._config.num_generations)]
        batch = self._batch(
            [self._prompts[row] for row, _ in keys],
            [self._answers[key] for key in keys],
            [self._seed_of(*key) for key in keys],
            tuple(row for row, _ in keys),
        )
        counts = self._ranks.gather_numbers([batch.num_targets, batch.num_tokens])
        num_targets, num_tokens = (round(sum(numbers)) for numbers in zip(*counts, strict=True))
        return replace(batch, num_targets=num_targets, num_tokens=num_tokens)

    def evaluation(self, split: Split, batch_size: int, num_batches: int) -> Evaluation:
        """The loss, and how often the drafter guesses right, on one answer to each of a split's prompts: the same
        each time; `num_batches` -1 is all."""
        if split.name not in self._held_out:
            self._held_out[split.name] = self._drawn(split, batch_size, num_batches)
        acceptance, loss, num_targets = Acceptance(), 0.0, 0
        with evaluating(self._network):
            for batch in self._held_out[split.name]:
                for part in parts_of(batch, self._objective, self._max_positions):
                    if len(part.tokens):
                        part_loss, part_targets = self._measure(part, acceptance)
                        loss, num_targets = loss + part_loss, num_targets + part_targets
        own = {"loss": loss, "targets": float(num_targets), **acceptance.as_sums()}
        sums = sum_named(self._ranks, own)
        return Evaluation(sums["loss"] / (sums["targets"] or 1.0), measures_of(sums))

    def _measure(self, batch: AnswerBatch, acceptance: Acceptance) -> tuple[float, int]:
        """(sum of losses, targets) of rows, which are added to `acceptance`."""
        assert batch.seeds is not None
        targets = find_targets(batch.tokens, batch.is_target)
        lengths = batch.is_target.sum(axis=1)
        settings = [
            sampling_of(self._config, int(seed))
            for seed, length in zip(batch.seeds.tolist(), lengths.tolist(), strict=True)
            for _ in range(length)
        ]
        counters = [number for length in lengths.tolist() for number in range(length)]
        inputs = {
            "tokens": mx.array(batch.tokens),
            "positions": mx.array(targets.positions),
            "token_ids": mx.array(targets.token_ids),
        }
        loss, is_right = guesses_of(self._network, inputs, settings, counters, self._objective.losses(inputs))
        stops = np.cumsum(lengths)
        for start, stop in zip(stops - lengths, stops, strict=True):
            acceptance.add({way: values[start:stop] for way, values in is_right.items()})
        return loss, targets.num_targets

    def _enter(self, iteration: int) -> None:
        """The window that a batch stands in; answers of the one before are forgotten."""
        every = self._config.refresh_every
        number = iteration // every if every else 0
        if number == self._window.number:
            return
        start = number * every if every else 0
        block_of: dict[int, int] = {}
        for index in range(every or self._batches_per_epoch):
            for row in self._rows_at(start + index):
                block_of.setdefault(row, index // self._block_batches)
        self._window = Window(number, start, block_of)
        self._answers = {}

    def _answer(self, block: int) -> None:
        """Draw a block's answers, unless they are there."""
        size = self._config.num_generations
        keys = [(row, number) for row in self._window.rows(block) for number in range(size)]
        if keys[0] in self._answers:
            return
        answers = self._ask([self._prompts[row] for row, _ in keys], [self._seed_of(*key) for key in keys])
        self._answers |= dict(zip(keys, answers, strict=True))

    def _seed_of(self, row: int, number: int) -> int:
        return seed_of(self._seed, self._window.number, row, number)

    def _drawn(self, split: Split, batch_size: int, num_batches: int) -> list[AnswerBatch]:
        """One answer to each of a split's rows, in this process's share of its batches."""
        chosen = validation_rows(split.lengths, batch_size, num_batches)
        rows = [row for batch in chosen for row in batch]
        seeds = {row: seed_of(self._seed, HELD_OUT, row) for row in rows}
        answers = dict(
            zip(rows, self._ask([split.rows[row] for row in rows], list(seeds.values())), strict=True)
        )
        return [
            share(
                self._batch(
                    [split.rows[row] for row in batch],
                    [answers[row] for row in batch],
                    [seeds[row] for row in batch],
                    batch,
                ),
                self._ranks,
            )
            for batch in chosen
        ]

    def _ask(self, prompts: Sequence[TokenizedExample], seeds: Sequence[int]) -> list[np.ndarray]:
        """Every process gets all answers, and draws every `size`-th."""
        rank, size = self._ranks.rank, self._ranks.size
        token_ids = [prompt.token_ids for prompt in prompts[rank::size]]
        own = self._objective.teacher.answers(token_ids, seeds[rank::size], self._config, self._stop_ids)
        if size == 1:
            return own
        parts = self._ranks.gather([ids.tolist() for ids in own])
        return [np.array(parts[index % size][index // size], np.int32) for index in range(len(prompts))]

    def _batch(
        self,
        prompts: Sequence[TokenizedExample],
        answers: Sequence[np.ndarray],
        seeds: Sequence[int],
        row_ids: tuple[int, ...],
    ) -> AnswerBatch:
        batch = batch_of(prompts, [ids.tolist() for ids in answers], row_ids)
        known = {each.name: getattr(batch, each.name) for each in fields(batch)}
        return AnswerBatch(**known, seeds=np.array(seeds, np.uint64))
