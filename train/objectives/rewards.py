"""What an answer is worth: answers and their rows in, one number each out. Functions, patterns and JSON, by recipe.

Knows no model and no batch; what it calls of the user's is checked for what comes back.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from serve.errors import ConfigError, TrainingError
from train.data.rows import Need
from train.recipe.grpo import FunctionReward, JSONReward, RegexReward, Reward

GIVEN = ("completions", "prompts", "completion_ids")
"""What a reward function is given beside the rows' columns."""


@dataclass(frozen=True)
class Answer:
    """One answer to score. `prompt` is the row's own: messages, or a text. `fields` are its other columns."""

    prompt: Any
    text: str
    token_ids: tuple[int, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    """`file:line` of the row."""


@dataclass(frozen=True)
class _Check:
    """One reward of a recipe, ready to run. None: it has nothing to say about that answer."""

    name: str
    columns: tuple[str, ...]
    score: Callable[[Sequence[Answer]], list[float | None]]


class Scorer:
    """All rewards of a recipe. Making it imports the functions' modules; ConfigError where one cannot be had."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self._checks = _named([_check_of(reward) for reward in rewards])
        self.weights = np.array([reward.weight for reward in rewards], np.float64)
        self.names = tuple(check.name for check in self._checks)

    @property
    def needs(self) -> tuple[Need, ...]:
        """The columns that some reward looks at, and cannot do without."""
        return tuple(
            Need(column, f"the reward {check.name}") for check in self._checks for column in check.columns
        )

    def score(self, answers: Sequence[Answer]) -> np.ndarray:
        """[B, rewards] float64, unweighted; NaN where a reward has nothing to say about an answer.

        TrainingError names the function and the row where one raises, gives too few or too many numbers, something
        that is no number, or one that is not finite; and the row where no reward says anything.
        """
        if not answers:
            return np.zeros((0, len(self._checks)))
        scores = np.stack([_checked(check, check.score(answers), answers) for check in self._checks], axis=1)
        silent = np.flatnonzero(np.isnan(scores).all(axis=1))
        if len(silent):
            raise TrainingError(f"no reward scored the answer to {answers[silent[0]].place}; all gave None")
        return scores

    def total(self, scores: np.ndarray) -> np.ndarray:
        """Weighted sums of `score`'s rows, [B] float64."""
        return np.nansum(scores * self.weights, axis=1)


def _check_of(reward: Reward) -> _Check:
    if isinstance(reward, FunctionReward):
        return _function(reward)
    return _regex(reward) if isinstance(reward, RegexReward) else _json(reward)


def _named(checks: Sequence[_Check]) -> list[_Check]:
    """Each by a name of its own: regex, regex_2, …"""
    seen: dict[str, int] = {}
    named = []
    for check in checks:
        seen[check.name] = count = seen.get(check.name, 0) + 1
        named.append(
            _Check(check.name if count == 1 else f"{check.name}_{count}", check.columns, check.score)
        )
    return named


def _checked(check: _Check, values: list[float | None], answers: Sequence[Answer]) -> np.ndarray:
    if len(values) != len(answers):
        raise TrainingError(
            f"reward {check.name} gave {len(values)} numbers for {len(answers)} answers, the first to "
            f"{answers[0].place}; expected one each"
        )
    for value, answer in zip(values, answers, strict=True):
        if value is None:
            continue
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise TrainingError(
                f"reward {check.name} gave {value!r} for an answer to {answer.place}; expected a finite number, or "
                f"None. The answer was {_shown(answer.text)}"
            )
    return np.array([math.nan if value is None else float(value) for value in values], np.float64)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else repr(text[:77]) + "…"


# Patterns


def _regex(reward: RegexReward) -> _Check:
    pattern = re.compile(reward.pattern)
    group: str | int = "answer" if "answer" in pattern.groupindex else min(pattern.groups, 1)

    def one(answer: Answer) -> float:
        match = pattern.search(answer.text)
        if match is None:
            return 0.0
        if reward.field is None:
            return 1.0
        return float((match[group] or "").strip() == str(answer.fields[reward.field]).strip())

    columns = (reward.field,) if reward.field is not None else ()
    return _Check("regex", columns, lambda answers: [one(answer) for answer in answers])


# JSON

_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


def _json(reward: JSONReward) -> _Check:
    validator = _validator(reward.json_schema)

    def one(answer: Answer) -> float:
        fenced = _FENCE.match(answer.text)
        try:
            value = json.loads(fenced[1] if fenced else answer.text)
        except (ValueError, RecursionError):
            return 0.0
        if (reward.required or reward.equals) and not isinstance(value, dict):
            return 0.0
        if any(key not in value for key in reward.required) or not validator(value):
            return 0.0
        right = [_is_equal(value, key, answer.fields[column]) for key, column in reward.equals.items()]
        return sum(right) / len(right) if right else 1.0

    return _Check("json", tuple(reward.equals.values()), lambda answers: [one(answer) for answer in answers])


def _validator(schema: Mapping[str, Any] | None) -> Callable[[Any], bool]:
    if schema is None:
        return lambda value: True
    from jsonschema.validators import validator_for

    return validator_for(schema)(schema).is_valid


def _is_equal(value: Mapping[str, Any], key: str, wanted: Any) -> bool:
    """Equal, or the same text where a table has made one of a number."""
    return key in value and (value[key] == wanted or str(value[key]) == str(wanted))


# Functions


def _function(reward: FunctionReward) -> _Check:
    function = load_function(reward.name)
    accepted, columns = _parameters(function, reward.name)

    def score(answers: Sequence[Answer]) -> list[float | None]:
        names = dict.fromkeys(name for answer in answers for name in answer.fields)
        given = {
            **{name: [answer.fields.get(name) for answer in answers] for name in names},
            "completions": [_completion(answer) for answer in answers],
            "prompts": [answer.prompt for answer in answers],
            "completion_ids": [list(answer.token_ids) for answer in answers],
        }
        try:
            values = function(
                **{name: value for name, value in given.items() if accepted is None or name in accepted}
            )
            return list(values)
        except Exception as error:  # whatever the user's own code raises is told as his, with where
            places = ", ".join(dict.fromkeys(answer.place for answer in answers))
            raise TrainingError(
                f"reward {reward.name} raised {type(error).__name__}: {error}, on answers to {places}"
            ) from error

    return _Check(function.__name__, columns, score)


def _completion(answer: Answer) -> Any:
    """As TRL gives it: a text where the prompt is one, else the assistant's turn."""
    if isinstance(answer.prompt, str):
        return answer.text
    return [{"role": "assistant", "content": answer.text}]


def _parameters(function: Callable, name: str) -> tuple[set[str] | None, tuple[str, ...]]:
    """(what it can be given, None for anything; the columns it cannot do without)."""
    parameters = inspect.signature(function).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_all and "completions" not in [p.name for p in by_name]:
        taken = ", ".join(p.name for p in parameters) or "nothing"
        raise ConfigError(
            f"grpo.rewards: {name} takes {taken}; expected completions, and what it needs of prompts, "
            f"completion_ids and the rows' columns by name (or **columns for all)"
        )
    columns = tuple(p.name for p in by_name if p.default is p.empty and p.name not in GIVEN)
    return (None if takes_all else {p.name for p in by_name}), columns


def load_function(name: str) -> Callable:
    """`package.module:function` or `path/to/file.py:function` -> the function. ConfigError says what is missing."""
    where, _, function_name = name.rpartition(":")
    try:
        module = _module_of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ConfigError:
        raise
    except Exception as error:  # the user's module may raise anything while it is imported
        raise ConfigError(
            f"grpo.rewards: {name}: importing {where} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = ", ".join(
            n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")
        )
        raise ConfigError(f"grpo.rewards: {where} has no function {function_name}; found {there or 'none'}")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"grpo.rewards: {name}: found an async function; expected a plain one")
    return function


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"grpo.rewards: {path}: no such file")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"lathe_rewards_{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickles look their own module up
    spec.loader.exec_module(module)
    return module
