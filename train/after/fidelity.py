"""What an export is compared on, and how near it is. Rows and two networks in, numbers out; writes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from serve.adapters.formats.lineage import Lineage
from serve.engine.engine import Engine
from serve.engine.generate import generate
from serve.engine.request import Request, Sampling
from serve.errors import DataError
from serve.model.loading import LoadedModel
from serve.model.network import Network
from serve.model.prompt import Prompt
from serve.model.template_rules import make_template
from train.data.batches import Batch, collate, validation_rows
from train.data.media_reader import MediaReader
from train.data.rules import TokenRules
from train.data.sources import read
from train.data.tables import reasons
from train.data.tokens import TokenizedExample, tokenize
from train.loop.eyes import Eyes, Seen
from train.loop.loss import find_targets, target_logits
from train.recipe.recipe import DatasetSource, Recipe, load_recipe

ROWS_PER_BATCH = 8
MOST_OF_A_RUN = 64
"""Rows of a run's own data, where nobody says which."""
ANSWER_TOKENS = 64
"""Of an answer to a row that has none."""
SPLITS: tuple[Literal["test", "valid", "train"], ...] = ("test", "valid", "train")
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Rows:
    """What to compare on.

    data   a file of rows, a folder or a recipe; None: the run's own recipe
    limit  at most so many, evenly over their lengths; None: all of `data`, or `MOST_OF_A_RUN` of the run's
    """

    data: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """Token rows to compare on. `source` says in words where they are from, and `notes` what is particular; of the
    rows `num_showing` hold pictures, clips or sounds."""

    source: str
    num_rows: int
    num_found: int
    batches: list[Batch]
    notes: tuple[str, ...] = ()
    num_showing: int = 0

    @property
    def line(self) -> str:
        """For a person: which rows, and how many of them."""
        rows = (
            f"{self.num_rows:,} of {self.num_found:,}"
            if self.num_rows < self.num_found
            else f"{self.num_rows:,}"
        )
        return f"{rows} rows of {self.source}"


def held_out(adapter: Path, asked: Rows, model: LoadedModel, lineage: Lineage | None = None) -> HeldOut:
    """The rows that were asked for, as tokens. Prompts without an answer get the one that the model itself gives.

    model    base + adapter, as they are compared
    lineage  the adapter's, whose chat template and end tokens are used
    DataError where there are no such rows.
    """
    rows, source, notes, recipe = _find(adapter, asked, model, lineage)
    limit = asked.limit or (len(rows) if asked.data is not None else MOST_OF_A_RUN)
    (chosen,) = validation_rows([len(row) for row in rows], min(limit, len(rows)), 1)
    picked = [rows[index] for index in chosen]
    if not any(sequence.is_target.any() for row in picked for sequence in row.sequences):
        picked = _answered(picked, model, recipe, lineage.stop_ids if lineage else ())
        notes = (*notes, "these rows are prompts: compared at the greedy answers of base + adapter")
    groups = range(0, len(picked), ROWS_PER_BATCH)
    batches = [collate(picked, range(start, min(start + ROWS_PER_BATCH, len(picked)))) for start in groups]
    num_showing = sum(any(part.media is not None for part in row.sequences) for row in picked)
    if model.vision is not None and not num_showing:
        notes = (*notes, "none of these rows shows anything: what its towers see is not compared")
    return HeldOut(source, len(picked), len(rows), batches, notes, num_showing)


def _find(
    adapter: Path, asked: Rows, model: LoadedModel, lineage: Lineage | None
) -> tuple[list[TokenizedExample], str, tuple[str, ...], Recipe]:
    """(rows, where they are from, what was left out of them, the recipe that reads them)."""
    problems: list[str] = []
    for recipe, split, source in _sources(adapter, asked.data, model):
        rules = TokenRules.of_adapter(recipe, lineage)
        template = make_template(model.tokenizer, rules.template)
        reader = MediaReader(model.path, recipe.image.settings) if model.vision is not None else None
        try:
            rows, report = tokenize(read(recipe, split), template, rules, reader)
        except DataError as error:  # a data set without test rows says so by this
            problems.append(str(error))
            continue
        left_out = reasons(report)
        if rows:
            return rows, source, (f"left out: {left_out}",) if left_out else (), recipe
        problems.append(f"{source}: no rows{f', left out: {left_out}' if left_out else ''}")
    raise DataError("\n".join([f"{asked.data or adapter}: no rows to compare the export on", *problems]))


def _sources(
    adapter: Path, data: Path | None, model: LoadedModel
) -> Iterator[tuple[Recipe, Literal["test", "valid", "train"], str]]:
    """(recipe, split, in words) in the order in which they are tried."""
    own = _own_recipe(adapter)
    if data is None and own is None:
        raise DataError(
            f"{adapter} has no {RECIPE_FILE} to find held-out rows by; name a file of rows with --data"
        )
    if data is None or data.suffix in (".yaml", ".yml"):
        path = own if data is None else data
        assert path is not None
        recipe = load_recipe(path)
        yield from ((recipe, split, f"the {split} split of {path}") for split in SPLITS)
        return
    for recipe in _readers(load_recipe(own) if own else None, data, model):
        if data.is_dir():
            yield from ((recipe, split, f"the {split} split of {data}") for split in SPLITS)
        else:
            yield recipe, "train", str(data)


def _own_recipe(adapter: Path) -> Path | None:
    """A run's recipe, by its folder or by one of its checkpoints'."""
    places = (adapter, adapter.resolve().parent.parent)
    return next((place / RECIPE_FILE for place in places if (place / RECIPE_FILE).is_file()), None)


def _readers(own: Recipe | None, data: Path, model: LoadedModel) -> Iterator[Recipe]:
    """Ways to read a file: rows with answers, as the run counted them; else rows of the run's objective."""
    plain = Recipe.model_validate({"model": model.name, "datasets": ({"path": str(data)},)})
    if own is None:
        yield plain
        return
    sources = {
        "data": None,
        "hf_dataset": (),
        "datasets": (DatasetSource(path=str(data)),),
        "val_set_size": 0,
    }
    ours = own.model_copy(update=sources)
    if not own.entry.is_supervised:
        kept = ("special_tokens_in_messages", "max_seq_length")
        yield plain.model_copy(update={name: getattr(own, name) for name in kept})
    yield ours


def _answered(
    rows: Sequence[TokenizedExample], model: LoadedModel, recipe: Recipe, stop_ids: tuple[int, ...]
) -> list[TokenizedExample]:
    """Prompts, each with the model's own greedy answer, which is what counts."""
    longest = recipe.answering.max_completion_length if recipe.answering is not None else ANSWER_TOKENS
    sampling = Sampling(max_tokens=min(longest, ANSWER_TOKENS), temperature=0.0)
    prompts = [_prompt(row) for row in rows]
    requests = [
        Request(f"compare-{number}", prompt, sampling, stop_ids=stop_ids)
        for number, prompt in enumerate(prompts)
    ]
    answers = [completion.token_ids for completion in generate(Engine(model), requests)]
    return [_with_answer(row, np.array(ids, np.int32)) for row, ids in zip(rows, answers, strict=True)]


def _prompt(row: TokenizedExample) -> Prompt:
    ids = tuple(row.token_ids.tolist())
    return Prompt(ids) if row.media is None else row.media.prompt(ids)


def _with_answer(row: TokenizedExample, answer: np.ndarray) -> TokenizedExample:
    token_ids = np.concatenate([row.token_ids, answer])
    is_target = np.arange(len(token_ids)) >= len(row.token_ids)
    return dataclasses.replace(row, token_ids=token_ids, is_target=is_target)


def eyes_of(model: LoadedModel) -> Eyes | None:
    """What a model sees with, while nothing of it trains; None: a text model."""
    return Eyes(model.network, model.vision, trains=False) if model.vision is not None else None


def compare(
    reference: Network,
    exported: Network,
    batches: Sequence[Batch],
    eyes: tuple[Eyes | None, Eyes | None] = (None, None),
) -> dict[str, Any]:
    """Agreement at the targets: what the two networks would say there. DataError where there is no target.

    eyes  of the two: each sees with its own towers
    """
    same, divergences = 0, []
    for batch in batches:
        found = find_targets(batch.tokens, batch.is_target)
        tokens, positions = mx.array(batch.tokens), mx.array(found.positions)
        p, q = (
            log_probabilities(network, tokens, positions, seen_of(batch, own))
            for network, own in zip((reference, exported), eyes, strict=True)
        )
        same += int(np.sum(np.array(p.argmax(-1) == q.argmax(-1))))
        divergences.append(np.array((mx.exp(p) * (p - q)).sum(-1)))
    kl = np.maximum(np.concatenate(divergences), 0.0)  # rounding can leave −1e-9
    if not len(kl):
        raise DataError("the rows to compare on have no token that counts")
    return {
        "top1_agreement": same / len(kl),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "num_tokens": len(kl),
        "num_rows": sum(len(batch.row_ids) for batch in batches),
    }


def features_apart(batches: Sequence[Batch], eyes: tuple[Eyes | None, Eyes | None]) -> float | None:
    """How far two towers are apart, at the worst piece of media: ‖difference‖ / ‖features of the first‖.

    None where nothing is shown.
    """
    apart = []
    for batch in batches:
        one, other = (seen_of(batch, own) for own in eyes)
        if one is None or other is None:
            continue
        for key, features in one.features.items():
            difference = features.embeddings - other.features[key].embeddings
            apart.append(mx.linalg.norm(difference) / mx.linalg.norm(features.embeddings))
    return float(mx.stack(apart).max()) if apart else None


def seen_of(batch: Batch, eyes: Eyes | None) -> Seen | None:
    """What a batch's rows show, as the owner of these eyes sees it."""
    if batch.media is None:
        return None
    assert eyes is not None, "rows with media are of a model with towers"
    return eyes.see(batch.media.tolist(), (batch.tokens.shape[0], batch.tokens.shape[1]))


def log_probabilities(
    network: Network, tokens: mx.array, positions: mx.array, seen: Seen | None = None
) -> mx.array:
    """[N, V] float32, normalised."""
    logits = target_logits(network, tokens, positions, seen=seen).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
