"""Everything about a run that can be known without loading weights; `--dry-run` prints it and ends there.

A recipe goes in; out come tokenized rows, batches and what was dropped and why. Shares all of it with the real run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property

from rich.console import Console

from serve.adapters.formats.lineage import Lineage
from serve.errors import DataError
from serve.model.loading import LoadedModel, load_tokenizer
from serve.model.template import ChatTemplate
from serve.model.template_rules import make_template
from serve.settings import dump
from serve.tables import show as show_tables
from train.data.batches import Batch, BatchPlan, Plan, collate, validation_rows
from train.data.duplicates import DuplicateReport
from train.data.inherited import Inherited, inherited, lineage_of_parent
from train.data.media_reader import MediaReader
from train.data.packing import PackedPlan
from train.data.rules import TokenRules
from train.data.splits import Split, read_splits, rows_per_batch
from train.data.stops import stop_ids
from train.data.stream import StreamedRows, StreamPlan
from train.data.tables import (
    dropped_lines,
    duplicate_lines,
    histogram,
    media_histogram,
    reasons,
    rows_table,
    sources_table,
    template_lines,
)
from train.data.tokens import ENDLESS
from train.loop.distributed import Alone, Ranks, share
from train.loop.objective import Objective
from train.objectives.draft import Draft
from train.objectives.rewards import Scorer
from train.objectives.rollouts import Questions, Rollouts
from train.objectives.taught import TaughtBatches
from train.objectives.teacher import check_tokenizers
from train.recipe.grpo import GRPOConfig
from train.recipe.optimizer_config import AdamConfig
from train.recipe.recipe import Recipe
from train.watch.lineage import lineage_of
from train.watch.samples import SamplePrompt, prompts_of


@dataclass(frozen=True)
class Preflight:
    """A run that is ready to start, but for its weights. `num_iterations` counts batches."""

    recipe: Recipe
    template: ChatTemplate
    rules: TokenRules
    train: Split
    valid: Split | None
    test: Split | None
    plan: Plan
    num_iterations: int
    duplicates: DuplicateReport
    sample_prompts: tuple[SamplePrompt, ...] = ()
    """What is answered at each validation, for a person to read."""
    scorer: Scorer | None = None
    """What answers are worth, under objective grpo."""
    inherited: Inherited = field(default_factory=Inherited)
    """What the adapter that the run starts from brings besides weights."""
    reader: MediaReader | None = None
    """Of what rows show, where the model takes media."""
    ranks: Ranks = field(default_factory=Alone)
    """The processes of the run: a batch of the plan holds batch_size rows for each of them."""

    @property
    def num_steps(self) -> int:
        """Optimizer updates."""
        return -(-self.num_iterations // self.recipe.grad_accumulation_steps)

    @property
    def data_hash(self) -> str:
        """Of the training rows as trained on: their tokens, in order, and which of them count."""
        digest = hashlib.sha256()
        if isinstance(self.train.rows, StreamedRows):
            # All its rows are not known beforehand: what they are read from, and the first of them.
            digest.update(self.train.rows.identity.encode())
        for row in self.train.rows:
            for sequence in row.sequences:
                digest.update(sequence.token_ids.tobytes() + b"|" + sequence.is_target.tobytes() + b"\n")
                for piece in sequence.media.media if sequence.media is not None else ():
                    digest.update(piece.key.encode() + piece.positions.tobytes())
            if row.label is not None or row.fields is not None:
                digest.update(repr((row.label, row.fields)).encode())
        return f"sha256:{digest.hexdigest()}"

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those that the training rows teach (of a stream, its first rows), and those that
        the adapter it starts from ended answers with."""
        taught = stop_ids(list(self.train.rows), self.template, self.rules)
        return tuple(sorted({*taught, *self.inherited.stop_ids}))

    def batch_at(self, iteration: int) -> Batch:
        """This process's share of the batch of any iteration, from its number alone."""
        return share(self.plan.batch(self.train.rows, iteration), self.ranks)

    def name_row(self, row_id: int) -> str:
        """`file:line` of a training row."""
        row = self.train.rows[row_id]
        return f"{row.source}:{row.line}"

    def take_notes(self) -> list[str]:
        """What a stream left out since the last time this was asked; nothing where rows are read beforehand."""
        return self.train.rows.take_notes() if isinstance(self.train.rows, StreamedRows) else []

    def valid_batches(self) -> list[Batch]:
        """This process's share of the fixed validation batches."""
        return self._fixed_batches(self.valid, self.recipe.val_batches)

    def answered(self, model: LoadedModel, objective: Objective) -> Rollouts | TaughtBatches | None:
        """What makes the batches of objectives that learn from answers; None under others, whose batches are read.

        model  that trains
        """
        recipe, config = self.recipe, self.recipe.answering
        if isinstance(objective, Draft):
            return TaughtBatches(
                model,
                objective,
                self.train.rows,
                self.plan.rows,
                self.plan.batches_per_epoch,
                seed=recipe.seed,
                batch_size=recipe.batch_size,
                max_positions=recipe.micro_batch_tokens,
                ranks=self.ranks,
                stop_ids=self.stop_ids,
            )
        if not isinstance(config, GRPOConfig) or self.scorer is None:
            return None
        return Rollouts(
            model,
            Questions.of(self.train.rows, self.train.examples),
            self.plan.rows,
            config,
            self.scorer,
            seed=self.recipe.seed,
            batch_size=self.recipe.batch_size,
            ranks=self.ranks,
            stop_ids=self.stop_ids,
        )

    def lineage(self, model: LoadedModel, created: str = "") -> Lineage:
        """Where the adapter comes from; `created` as lineage_of has it."""
        return lineage_of(
            self.recipe,
            model,
            self.template,
            self.rules,
            data_hash=self.data_hash,
            stop_ids=self.stop_ids,
            created=created,
        )

    def test_batches(self) -> list[Batch]:
        """This process's share of the batches of the test after training."""
        return self._fixed_batches(self.test, self.recipe.test_batches)

    def _fixed_batches(self, split: Split | None, num_batches: int) -> list[Batch]:
        if split is None:
            return []
        chosen = validation_rows(split.lengths, self.recipe.batch_size * self.ranks.size, num_batches)
        return [share(collate(split.rows, rows), self.ranks) for rows in chosen]


def prepare(
    recipe: Recipe,
    console: Console | None = None,
    ranks: Ranks | None = None,
    today: date | None = None,
) -> Preflight:
    """Read, tokenize and plan; `console` shows progress, `ranks` are the processes that share the batches.

    today  the day that a chat template prints, all the run long; None: the real one
    DataError when there is nothing to train on, or no validation where one is needed.
    """
    tokenizer = load_tokenizer(recipe.prompting_model, trust_remote_code=recipe.trust_remote_code)
    rules = TokenRules.of_recipe(recipe, today or date.today())
    template = make_template(tokenizer, rules.template)
    check_tokenizers(recipe, tokenizer)
    scorer = Scorer(recipe.answering.rewards) if isinstance(recipe.answering, GRPOConfig) else None
    reader = MediaReader.of(recipe)
    needs_columns = scorer.needs if scorer is not None else ()
    splits = read_splits(recipe, template, rules, console, needs_columns, reader)
    train, valid = splits.train, splits.valid
    if train.report.told:  # the run's other prompts, and serving, ask as the training rows do
        rules = rules.telling(train.report.told)
        template = make_template(tokenizer, rules.template)
    if not train.rows:
        raise DataError(f"no training rows are left: {reasons(train.report) or 'the source is empty'}")
    needs = [
        name
        for name in ("load_best_model_at_end", "early_stopping_patience", "metric", "samples")
        if getattr(recipe, name)
    ]
    if needs and not (valid and valid.rows):
        raise DataError(f"{', '.join(needs)} need validation rows; add a valid split, or set val_set_size")
    ranks = ranks or Alone()
    plan = _plan(recipe, train, ranks.size)
    num_iterations = recipe.iters or plan.num_batches(recipe.epochs or 1.0)
    return Preflight(
        recipe=recipe,
        template=template,
        rules=rules,
        train=train,
        valid=valid,
        test=splits.test,
        plan=plan,
        num_iterations=num_iterations,
        sample_prompts=_sample_prompts(recipe, template, valid, reader),
        duplicates=splits.duplicates,
        scorer=scorer,
        inherited=inherited(recipe, lineage_of_parent(recipe), template),
        reader=reader,
        ranks=ranks,
    )


def _sample_prompts(
    recipe: Recipe, template: ChatTemplate, valid: Split | None, reader: MediaReader | None
) -> tuple[SamplePrompt, ...]:
    if recipe.samples is None:
        return ()
    examples = valid.examples if valid else []
    as_text = recipe.objective == "cpt"
    return tuple(prompts_of(recipe.samples, template, examples, as_text=as_text, reader=reader))


def _plan(recipe: Recipe, train: Split, num_processes: int) -> Plan:
    num_rows = rows_per_batch(recipe) * num_processes
    if isinstance(train.rows, StreamedRows):
        return StreamPlan(train.rows, num_rows, recipe.seed)
    if recipe.sample_packing:
        batch_size = recipe.batch_size * num_processes
        return PackedPlan(train.lengths, batch_size, recipe.max_seq_length, recipe.seed)
    return BatchPlan(train.lengths, num_rows, recipe.seed)


def show(preflight: Preflight, console: Console, *, with_recipe: bool = False) -> None:
    """Print it. `with_recipe` adds the resolved recipe and the histogram of lengths."""
    if with_recipe:
        console.print("[bold]resolved recipe")
        console.print(dump(preflight.recipe), highlight=False, markup=False, soft_wrap=True)
    splits = [split for split in (preflight.train, preflight.valid, preflight.test) if split]
    show_tables(console, rows_table(splits))
    for split in splits:
        if (table := sources_table(split)) is not None:
            show_tables(console, table)
        for line in (*split.notes, *dropped_lines(split)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for line in template_lines(split):
            console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for line in preflight.inherited.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in (*preflight.inherited.warnings, *_stop_lines(preflight)):
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for line in duplicate_lines(preflight.duplicates):
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if with_recipe:
        show_tables(console, histogram(preflight.train.report))
        if (shown := media_histogram(preflight.train.report)) is not None:
            show_tables(console, shown)
    show_tables(console, _clocks(preflight))
    for line in adam_lines(preflight.recipe, preflight.num_steps):
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


def adam_lines(recipe: Recipe, num_steps: int) -> Iterator[str]:
    """What the first updates are without bias correction and warm-up; nothing where there is one of them."""
    used = {"adam": "adam", "adamw": "adamw", "muon": "adamw"}.get(recipe.optimizer)
    schedule = recipe.lr_schedule
    has_warmup = (schedule is not None and schedule.warmup > 0) or round(recipe.warmup_ratio * num_steps) > 0
    if used is None or has_warmup:
        return
    config: AdamConfig = getattr(recipe.optimizer_config, used)
    if config.bias_correction:
        return
    beta_1, beta_2 = config.betas
    # The moments of a gradient that stays the same, from zero: (1 - beta^t) of it and of its square.
    sizes = [
        (1 - beta_1**t) / math.sqrt(max(1 - beta_2**t, 1e-12)) for t in range(1, min(num_steps, 1000) + 1)
    ]
    if max(sizes) >= 2:
        yield (
            f"{used} runs without bias correction and without warm-up: its first updates are up to {max(sizes):.1f} "
            f"times learning_rate (step {1 + sizes.index(max(sizes))}). If the loss jumps at first, write "
            f"warmup_ratio: 0.05 or optimizer_config: {{{used}: {{bias_correction: true}}}}"
        )


def _stop_lines(preflight: Preflight) -> Iterator[str]:
    """Where trained answers end at another token than the base's answers do, or at none."""
    tokenizer, recipe = preflight.template.tokenizer, preflight.recipe
    known = {*tokenizer.eos_token_ids, *preflight.inherited.stop_ids}
    new = [number for number in preflight.stop_ids if number not in known]
    if new:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(new)))
        yield f"answers end at {names}, which ends none of the base's: it is kept with the adapter as its stop id"
    wants_end = recipe.train_on_eos != "none" and recipe.objective != "cpt" and not recipe.entry.asks
    if wants_end and not preflight.stop_ids and ENDLESS not in preflight.train.report.notes:
        yield "no token ends the answers that are trained: they will go on to max_tokens"


def _clocks(preflight: Preflight) -> str:
    recipe, per_epoch = preflight.recipe, preflight.plan.batches_per_epoch
    source = f"iters {recipe.iters}" if recipe.iters else f"epochs {recipe.epochs:g}"
    is_stream = isinstance(preflight.train.rows, StreamedRows)
    length = (
        f"batches go by length in windows of {per_epoch}; padding of the first {preflight.plan.padding_share:.1%}"
        if is_stream
        else f"an epoch is {per_epoch:,} batches, the run {preflight.num_iterations / per_epoch:.2f} epochs; "
        f"padding {preflight.plan.padding_share:.1%}"
    )
    batches = recipe.grad_accumulation_steps
    accumulated = f" of {batches} batches" if batches > 1 else ""
    return (
        f"{source} is the clock: {preflight.num_iterations:,} batches of {_batch_size(preflight)}, "
        f"{preflight.num_steps:,} optimizer steps{accumulated}; {length}"
    )


def _batch_size(preflight: Preflight) -> str:
    recipe = preflight.recipe
    num_processes = preflight.ranks.size
    if not recipe.sample_packing:
        each = f"{recipe.batch_size * num_processes}"
        return (
            each
            if num_processes == 1
            else f"{each} ({recipe.batch_size} in each of {num_processes} processes)"
        )
    tokens = recipe.batch_size * num_processes * recipe.max_seq_length
    rows = len(preflight.train.rows) / preflight.plan.batches_per_epoch
    return f"up to {tokens:,} packed tokens (about {rows:.1f} sequences)"
