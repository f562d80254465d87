"""The model that a drafter learns to guess: which one it is, its answers by serve's own engine, and its network.

Loaded when it is first asked for what is not kept on disk, so a run over known answers never holds it. Knows neither
the drafter nor its batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from serve.adapters.formats.files import AdapterFiles, read_adapter
from serve.adapters.formats.manifest import content_hash, effect_hash
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.engine.request import Request, Sampling
from serve.errors import ConfigError
from serve.model.loading import (
    LoadedModel,
    fingerprint,
    load,
    load_tokenizer,
    max_context_of,
    read_config,
    resolve,
    vocab_size_of,
)
from serve.model.network import Network
from serve.model.prompt import Prompt
from serve.model.vocabulary import difference
from train.adapters.on_base import load_adapted, packing_of
from train.objectives.kept_answers import Answers, KeptAnswers
from train.objectives.prompted import UNBOUNDED_BYTES
from train.recipe.draft import DraftConfig
from train.recipe.recipe import Recipe

ROWS_AT_ONCE = 64
"""Answers that share the engine's batch."""


class Teacher:
    """A base, or a base with an adapter, that answers and is never trained.

    kept_in  a folder for its answers; None: the default one
    """

    def __init__(
        self, model: str, adapter: str | None, *, trust_remote_code: bool = False, kept_in: str | None = None
    ) -> None:
        self.name = model
        self._adapter = adapter
        self._trust_remote_code = trust_remote_code
        self._kept = KeptAnswers(kept_in)

    @classmethod
    def of(cls, recipe: Recipe) -> Teacher | None:
        """That of a recipe; None where it has none."""
        teacher = recipe.block.teacher if recipe.block is not None else None
        if teacher is None:
            return None
        return cls(*teacher, trust_remote_code=recipe.trust_remote_code, kept_in=recipe.dataset_prepared_path)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base's weights, as they are packed for the adapter."""
        how = packing_of(self._files.config, self.name) if self._files is not None else None
        return fingerprint(resolve(self.name), how)

    @cached_property
    def adapter_hash(self) -> str:
        """The adapter's content hash; "" for the base alone."""
        return content_hash(self._files.read()) if self._files is not None else ""

    @cached_property
    def model(self) -> LoadedModel:
        """With the adapter in place, unfused: to the engine it is a base. Errors as `load` and `load_adapted`."""
        if self._files is None:
            return load(self.name, trust_remote_code=self._trust_remote_code)
        adapter = Path(str(self._adapter))
        model = load_adapted(adapter, self._files.config, self.name)
        model.network.module.freeze()
        return model

    @property
    def network(self) -> Network:
        return self.model.network

    @property
    def max_context(self) -> int:
        """In tokens, of prompt and answer."""
        return max_context_of(read_config(resolve(self.name)))

    def answers(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        settings: DraftConfig,
        stop_ids: tuple[int, ...],
    ) -> Answers:
        """Its answer to each prompt [T] int32, drawn by its seed; the tokens that ended them included.

        The same every time: prompts share batches in their order, `ROWS_AT_ONCE` at a time.
        """
        who = [
            *(self.fingerprint, self._effect_hash, settings.temperature, settings.top_p),
            *(settings.max_completion_length, list(stop_ids), ROWS_AT_ONCE, list(map(int, seeds))),
        ]
        return self._kept.get(who, prompts, lambda: self._generate(prompts, seeds, settings, stop_ids))

    def _generate(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        settings: DraftConfig,
        stop_ids: tuple[int, ...],
    ) -> Answers:
        requests = [
            Request(
                f"answer-{number}",
                Prompt(tuple(prompt.tolist())),
                sampling_of(settings, seed, settings.max_completion_length),
                stop_ids=stop_ids,
            )
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        engine = Engine(self.model, EngineLimits(max_rows=ROWS_AT_ONCE, kv_budget_bytes=UNBOUNDED_BYTES))
        return [np.array(done.token_ids, np.int32) for done in generate(engine, requests)]

    @cached_property
    def _files(self) -> AdapterFiles | None:
        return read_adapter(Path(self._adapter)) if self._adapter is not None else None

    @property
    def _effect_hash(self) -> str:
        return effect_hash(self.adapter_hash, self._files.config) if self._files is not None else ""


def sampling_of(settings: DraftConfig, seed: int, max_tokens: int | None = None) -> Sampling:
    """How a token is drawn: the teacher's, and the drafter's guess of it."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p if settings.temperature else 1.0,
        seed=seed,
    )


def check_tokenizers(recipe: Recipe, of_teacher: Any) -> None:
    """ConfigError where the drafter's token ids are not its teacher's, with what differs; nothing without a teacher.

    of_teacher  the teacher's tokenizer
    """
    teacher = recipe.block.teacher if recipe.block is not None else None
    if teacher is None:
        return
    own = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    if found := difference(own, of_teacher):
        raise ConfigError(
            f"draft.teacher_model: {recipe.model} cannot draft for {teacher[0]}: of their tokenizers, in this order, "
            f"{found}. A drafter guesses token ids, so both must have the same"
        )
    highest = max(own.get_vocab().values())
    size = vocab_size_of(read_config(resolve(recipe.model)))
    if highest >= size:
        raise ConfigError(
            f"model: {recipe.model} has {size:,} logits, and its tokenizer, which is its teacher's, tokens up to id "
            f"{highest:,}; expected a vocab_size of at least {highest + 1:,}"
        )
