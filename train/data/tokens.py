"""Examples -> token ids with a loss mask, and a report of what was kept. Rendering is serve's ChatTemplate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.errors import DataError, RequestError
from serve.model.template import ChatTemplate, Supervised
from train.data.example import Example
from train.recipe import Recipe

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class TokenizedExample:
    """One training sequence. `is_target[i]`: token i is predicted from tokens before i and counts; never i = 0."""

    token_ids: np.ndarray  # [T] int32
    is_target: np.ndarray  # [T] bool
    source: str
    line: int

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """Tokens the loss counts."""
        return int(self.is_target.sum())


@dataclass(frozen=True)
class TokenizeReport:
    """What became of the rows; a conversation may give several sequences, or be dropped in part."""

    num_read: int
    num_sequences: int
    num_truncated: int
    num_tokens: int
    num_targets: int
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> sequences
    dropped_places: tuple[str, ...] = ()  # file:line of the first few
    histogram: tuple[
        tuple[int, int], ...
    ] = ()  # (longest length of the bin in tokens, sequences), powers of two
    longest: int = 0


def tokenize(
    examples: Sequence[Example], template: ChatTemplate, tokenizer: Any, recipe: Recipe
) -> tuple[list[TokenizedExample], TokenizeReport]:
    """Tokenize every example as serving would.

    DataError names the rows the chat template refuses (up to 20), and under `excess_length_strategy: raise` those
    that are longer than `max_seq_length`. Rows with nothing to learn from are dropped, and counted in the report.
    """
    kept: list[TokenizedExample] = []
    dropped: dict[str, int] = {}
    places: list[str] = []
    problems: list[str] = []
    num_truncated = 0
    for example in examples:
        try:
            sequences = [
                _marked(sequence, example) for sequence in _sequences(example, template, tokenizer, recipe)
            ]
        except RequestError as error:
            problems.append(f"{example.place}: {error}")
            sequences = []
        for whole in sequences:
            row, reason = _fit(whole, recipe)
            if row is None and _is_refused(whole, recipe):
                problems.append(f"{example.place}: {reason}")
            elif row is None:
                dropped[str(reason)] = dropped.get(str(reason), 0) + 1
                places.append(example.place)
            else:
                kept.append(row)
                num_truncated += len(row) < len(whole)
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise DataError("\n".join(problems))
    return kept, _report(len(examples), kept, num_truncated, dropped, places)


def _sequences(
    example: Example, template: ChatTemplate, tokenizer: Any, recipe: Recipe
) -> Iterator[Supervised]:
    """A row's sequences with what loss may use, before any cut."""
    messages = example.as_messages()
    if messages is None or (example.messages is None and not template.exists):
        yield _raw(example, tokenizer, recipe)
    elif recipe.mask_prompt:
        found = template.supervise(
            messages, tools=example.tools, roles=recipe.roles_to_train, train_on_eos=recipe.train_on_eos
        )
        yield from found or [Supervised(template.render(messages, tools=example.tools), ())]
    else:
        ids = template.render(messages, tools=example.tools, add_generation_prompt=False)
        yield Supervised(ids, ((0, len(ids)),))


def _raw(example: Example, tokenizer: Any, recipe: Recipe) -> Supervised:
    """Text, or prompt and completion for a tokenizer without a chat template; the end token closes both."""
    if example.text is not None:
        ids, start = list(tokenizer.encode(example.text)), 0
        end_is_target = True
    else:
        prompt = list(tokenizer.encode(example.prompt))
        ids = [*prompt, *tokenizer.encode(example.completion, add_special_tokens=False)]
        start = len(prompt) if recipe.mask_prompt else 0
        end_is_target = not recipe.mask_prompt or recipe.train_on_eos != "none"
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    stop = len(ids) if end_is_target or tokenizer.eos_token_id is None else len(ids) - 1
    return Supervised(tuple(ids), ((start, stop),))


def _marked(sequence: Supervised, example: Example) -> TokenizedExample:
    is_target = np.zeros(len(sequence.token_ids), bool)
    for start, stop in sequence.spans:
        is_target[start:stop] = True
    is_target[:1] = False  # nothing comes before the first token to predict it from
    return TokenizedExample(np.array(sequence.token_ids, np.int32), is_target, example.source, example.line)


def _fit(row: TokenizedExample, recipe: Recipe) -> tuple[TokenizedExample | None, str | None]:
    """The row within `max_seq_length` and with something to learn from, or None and the reason."""
    limit = recipe.max_seq_length
    if not row.is_target.any():
        return None, "nothing in it is supervised"
    if len(row) <= limit:
        return row, None
    if recipe.excess_length_strategy == "raise":
        return None, f"{len(row)} tokens; max_seq_length is {limit} and excess_length_strategy is raise"
    if recipe.excess_length_strategy == "drop":
        return None, "longer than max_seq_length"
    cut = TokenizedExample(row.token_ids[:limit], row.is_target[:limit], row.source, row.line)
    if not cut.is_target.any():
        return None, "nothing supervised is left within max_seq_length"
    return cut, None


def _is_refused(row: TokenizedExample, recipe: Recipe) -> bool:
    is_long = len(row) > recipe.max_seq_length
    return is_long and recipe.excess_length_strategy == "raise" and bool(row.is_target.any())


def _report(
    num_read: int,
    kept: Sequence[TokenizedExample],
    num_truncated: int,
    dropped: dict[str, int],
    places: list[str],
) -> TokenizeReport:
    lengths = np.array([len(row) for row in kept], dtype=int)
    bounds = 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    bins, counts = np.unique(bounds, return_counts=True)
    return TokenizeReport(
        num_read=num_read,
        num_sequences=len(kept),
        num_truncated=num_truncated,
        num_tokens=int(lengths.sum()),
        num_targets=sum(row.num_targets for row in kept),
        dropped=dropped,
        dropped_places=tuple(places[:MAX_PROBLEMS]),
        histogram=tuple((int(bound), int(count)) for bound, count in zip(bins, counts, strict=True)),
        longest=int(lengths.max(initial=0)),
    )
