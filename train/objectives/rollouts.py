"""Answers by the model that trains, scored: prompts in, batches with advantages out. serve's own engine generates.

A batch follows from (weights, seed, iteration) alone: each answer's seed comes from (seed, iteration, row, number in
its group), and the engine's memory budget from the batch, never from what happens to be free. So a resumed run draws
the answers the uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import Completion, generate
from serve.engine.request import Request, Sampling
from serve.model.loading import LoadedModel
from serve.model.network import evaluating
from train.data.batches import Batch, validation_rows
from train.data.example import Example
from train.data.splits import Split
from train.data.tokens import TokenizedExample
from train.loop.distributed import Alone, Ranks
from train.loop.step import Evaluation
from train.objectives.grpo import summary_of_scores
from train.objectives.prompted import UNBOUNDED_BYTES, batch_of, check_context, prompt_of, seed_of
from train.objectives.rewards import Answer, Scorer
from train.recipe.grpo import GRPOConfig


@dataclass(frozen=True)
class RolloutBatch(Batch):
    """A batch of answers. `scores`: by name, a number for each row, [B] float32; see `scores_of`.

    is_masked  [B] bool, the answers that the loss leaves out
    """

    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    is_masked: np.ndarray | None = None


@dataclass(frozen=True)
class Questions:
    """The prompts of a split, as tokens and as they were written."""

    rows: Sequence[TokenizedExample]
    prompts: Sequence[Any]
    """A text, or messages: what a reward function is given."""

    @classmethod
    def of(cls, rows: Sequence[TokenizedExample], examples: Sequence[Example]) -> Questions:
        """Rows, with the prompts of the examples they were made from."""
        by_place = {(example.source, example.line): example for example in examples}
        asked = [by_place[row.source, row.line] for row in rows]
        return cls(rows, [e.prompt if e.prompt is not None else list(e.messages or ()) for e in asked])

    def answer(self, row: int, completion: Completion) -> Answer:
        """A row's completion, as rewards look at it."""
        example = self.rows[row]
        place = f"{example.source}:{example.line}"
        return Answer(self.prompts[row], completion.text, completion.token_ids, example.fields or {}, place)


class Rollouts:
    """What the loop calls for batches under objective grpo, and for evaluations.

    rows_at   iteration → the rows whose prompts are answered; num_generations answers each make the batch
    stop_ids  tokens that end an answer, besides the model's own
    """

    def __init__(
        self,
        model: LoadedModel,
        questions: Questions,
        rows_at: Callable[[int], Sequence[int]],
        config: GRPOConfig,
        scorer: Scorer,
        *,
        seed: int,
        batch_size: int,
        ranks: Ranks | None = None,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        self._model = model
        self._questions = questions
        self._rows_at = rows_at
        self._config = config
        self._scorer = scorer
        self._seed = seed
        self._ranks = ranks or Alone()
        self._stop_ids = stop_ids
        self._limits = EngineLimits(max_rows=batch_size, kv_budget_bytes=UNBOUNDED_BYTES)
        check_context(model.max_context, "the model", questions.rows, config.max_completion_length, "grpo")

    def batch_at(self, iteration: int) -> RolloutBatch:
        """The batch of an iteration, answered by the weights as they are. Groups stand together, in order.

        Of several processes each answers every `size`-th prompt; counts are of all, rows its own, maybe none.
        TrainingError as `Scorer.score`. The module is left in the mode (training or not) it was in.
        """
        size, config, ranks = self._config.num_generations, self._config, self._ranks
        rows = np.repeat(np.array(self._rows_at(iteration), int)[ranks.rank :: ranks.size], size)
        seeds = [
            seed_of(self._seed, iteration, row, number % size) for number, row in enumerate(rows.tolist())
        ]
        completions = self._generate(self._questions, rows, seeds, config.temperature)
        scores = self._score(self._questions, rows, completions)
        rewards = self._scorer.total(scores)
        everyone = np.concatenate([np.array(part) for part in ranks.gather(rewards.tolist())])
        advantages, is_flat = group_advantages(rewards, size, config.scale_rewards, everyone)
        measures = scores_of(self._scorer, scores, completions) | {
            "frac_reward_zero_std": is_flat.astype(np.float32)
        }
        prompts = [self._questions.rows[row] for row in rows]
        answered = batch_of(prompts, [one.token_ids for one in completions], tuple(rows.tolist()))
        batch = _scored(answered, advantages, measures)
        counts = ranks.gather_numbers([batch.num_targets, batch.num_tokens])
        num_targets, num_tokens = (round(sum(numbers)) for numbers in zip(*counts, strict=True))
        is_cut = np.array([one.finish == "length" for one in completions], bool)
        is_masked = is_cut if config.mask_truncated_completions else None
        return replace(batch, num_targets=num_targets, num_tokens=num_tokens, is_masked=is_masked)

    def evaluate(self, questions: Questions, batches: Sequence[Sequence[int]]) -> Evaluation:
        """Rewards of greedy answers, one to each row of `batches`: means. The loss is minus the mean reward."""
        scored: list[dict[str, np.ndarray]] = []
        for rows in batches:
            completions = self._generate(questions, np.array(rows), [0] * len(rows), temperature=0.0)
            scores = self._score(questions, np.array(rows), completions)
            scored.append(scores_of(self._scorer, scores, completions))
        means = {name: float(np.concatenate([one[name] for one in scored]).mean()) for name in scored[0]}
        return Evaluation(-means["reward"], summary_of_scores(means))

    def evaluation(self, split: Split, batch_size: int, num_batches: int) -> Evaluation:
        """Mean rewards of greedy answers to a split's prompts: the same rows each time; `num_batches` -1 is all."""
        questions = Questions.of(split.rows, split.examples)
        return self.evaluate(questions, validation_rows(split.lengths, batch_size, num_batches))

    def _generate(
        self, questions: Questions, rows: np.ndarray, seeds: Sequence[int], temperature: float
    ) -> list[Completion]:
        requests = [
            Request(
                f"rollout-{number}",
                prompt_of(questions.rows[row]),
                Sampling(
                    max_tokens=self._config.max_completion_length,
                    temperature=temperature,
                    top_p=self._config.top_p if temperature else 1.0,
                    seed=seed,
                ),
                stop_ids=self._stop_ids,
            )
            for number, (row, seed) in enumerate(zip(rows.tolist(), seeds, strict=True))
        ]
        with evaluating(self._model.network):
            return generate(Engine(self._model, self._limits), requests)

    def _score(self, questions: Questions, rows: np.ndarray, completions: Sequence[Completion]) -> np.ndarray:
        answers = [questions.answer(row, one) for row, one in zip(rows.tolist(), completions, strict=True)]
        return self._scorer.score(answers)


def group_advantages(
    rewards: np.ndarray, num_generations: int, scale: str, everyone: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(advantage of each answer, whether its group was scored alike) of rewards [B], groups standing together.

    A = (r - mean of the group) / (std + 1e-4), with the sample standard deviation of the group, of the batch
    (`everyone`: its rewards in all processes), or undivided. Shao et al. 2024, section 4.1.2; TRL's
    `_generate_and_score_completions`.
    """
    groups = rewards.reshape(-1, num_generations)
    spread = groups.std(axis=1, ddof=1, keepdims=True)
    advantages = groups - groups.mean(axis=1, keepdims=True)
    if scale == "group":
        advantages = advantages / (spread + 1e-4)
    elif scale == "batch":
        whole = rewards if everyone is None else everyone
        advantages = advantages / (whole.std(ddof=1) + 1e-4)
    is_flat = np.broadcast_to(np.isclose(spread, 0), groups.shape)
    return advantages.reshape(-1).astype(np.float32), is_flat.reshape(-1)


def scores_of(scorer: Scorer, scores: np.ndarray, completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    """What is worth watching of each answer, [B] float32 each, to be averaged: reward and its square, whether it was
    cut off, each reward by name, and whether that one scored it."""
    rewards = scorer.total(scores)
    measured = {
        "reward": rewards,
        "reward_squared": rewards**2,
        "completions/clipped_ratio": np.array([one.finish == "length" for one in completions]),
    }
    for name, values in zip(scorer.names, scores.T, strict=True):
        measured[f"rewards/{name}"] = np.nan_to_num(values)
        measured[f"scored/{name}"] = ~np.isnan(values)
    return {name: values.astype(np.float32) for name, values in measured.items()}


def _scored(
    batch: Batch,
    advantages: np.ndarray,
    scores: Mapping[str, np.ndarray],
) -> RolloutBatch:
    known = {each.name: getattr(batch, each.name) for each in fields(batch)}
    return RolloutBatch(**{**known, "advantages": advantages}, scores=scores)
