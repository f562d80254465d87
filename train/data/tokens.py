"""Examples -> token ids with a loss mask, and a report of what was kept. Rendering is serve's ChatTemplate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.errors import DataError, RequestError
from serve.model.template import ChatTemplate, Supervised
from train.data.example import Example, Message
from train.data.messages import REASONING
from train.data.rules import TokenRules

MAX_PROBLEMS = 20
NOT_SUPERVISED = "nothing in it is supervised"
CUT_AWAY = "nothing supervised is left within max_seq_length"
NO_DIFFERENCE = "chosen and rejected are the same, so nothing is preferred"


@dataclass(frozen=True)
class TokenizedExample:
    """One training sequence. `is_target[i]`: token i is predicted from tokens before i and counts; never i = 0."""

    token_ids: np.ndarray  # [T] int32
    is_target: np.ndarray  # [T] bool
    source: str
    line: int
    rejected: TokenizedExample | None = None
    """Of a preference pair: the other answer, after the same prompt."""
    label: bool | None = None
    """Of feedback on one answer: wanted or not."""
    fields: Mapping[str, Any] | None = None
    """Of a prompt alone, for rollouts: the row's other columns. Nothing in it is a target."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def length(self) -> int:
        """Tokens of its longest sequence, which is what batches are planned by."""
        return max(len(self), len(self.rejected)) if self.rejected is not None else len(self)

    @property
    def sequences(self) -> tuple[TokenizedExample, ...]:
        """Itself, and the other answer of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def num_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(map(len, self.sequences))

    @property
    def num_targets(self) -> int:
        """Tokens the loss counts."""
        return int(sum(sequence.is_target.sum() for sequence in self.sequences))


@dataclass(frozen=True)
class Outcome:
    """What became of one row: sequences, and what was not kept. `lost` names what the chat template leaves out."""

    rows: tuple[TokenizedExample, ...] = ()
    num_truncated: int = 0
    dropped: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass
class SourceCounts:
    """What one file or hub split gave."""

    num_read: int = 0
    num_sequences: int = 0
    num_truncated: int = 0
    num_dropped: int = 0
    num_tokens: int = 0
    num_targets: int = 0


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
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)  # reason -> file:line of its first few
    histogram: tuple[
        tuple[int, int], ...
    ] = ()  # (longest length of the bin in tokens, sequences), powers of two
    longest: int = 0
    lost: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # what the template leaves out -> rows, the first
    sources: dict[str, SourceCounts] = field(default_factory=dict)  # file or hub split -> its share

    @property
    def num_without_targets(self) -> int:
        """Sequences dropped because loss would have counted nothing in them."""
        return self.dropped.get(NOT_SUPERVISED, 0) + self.dropped.get(CUT_AWAY, 0)


def tokenize(
    examples: Sequence[Example], template: ChatTemplate, rules: TokenRules
) -> tuple[list[TokenizedExample], TokenizeReport]:
    """Tokenize every example as serving would.

    DataError names the rows the chat template refuses (up to 20), and under `excess_length_strategy: raise` those
    that are longer than `max_seq_length`. Rows with nothing to learn from are dropped, and counted in the report.
    """
    return collect(examples, (tokenize_row(example, template, rules) for example in examples))


def tokenize_row(example: Example, template: ChatTemplate, rules: TokenRules) -> Outcome:
    """The sequences of one row, within `max_seq_length`; what is wrong with it stands in the outcome."""
    try:
        whole = whole_rows(example, template, rules)
        lost = tuple(_lost(example, whole, template))
    except RequestError as error:
        return Outcome(problems=(f"{example.place}: {error}",))
    kept: list[TokenizedExample] = []
    dropped: list[str] = []
    problems: list[str] = []
    num_truncated = 0
    for row in whole:
        pieces, reason = _fit(row, rules)
        kept += pieces
        num_truncated += len(pieces) == 1 and pieces[0].num_tokens < row.num_tokens
        if reason and _is_refused(row, rules):
            problems.append(f"{example.place}: {reason}")
        elif reason:
            dropped.append(reason)
    return Outcome(tuple(kept), num_truncated, tuple(dropped), tuple(problems), lost)


def collect(
    examples: Sequence[Example], outcomes: Iterable[Outcome]
) -> tuple[list[TokenizedExample], TokenizeReport]:
    """All rows and the report of all outcomes, which are the examples' in their order. DataError as `tokenize`."""
    kept: list[TokenizedExample] = []
    places: dict[str, list[str]] = {}
    lost: dict[str, tuple[int, str]] = {}
    sources: dict[str, SourceCounts] = {}
    problems: list[str] = []
    for example, outcome in zip(examples, outcomes, strict=False):
        kept += outcome.rows
        problems += outcome.problems
        for reason in outcome.dropped:
            places.setdefault(reason, []).append(example.place)
        for name in outcome.lost:
            count, first = lost.get(name, (0, example.place))
            lost[name] = (count + 1, first)
        _count(sources.setdefault(example.source, SourceCounts()), outcome)
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise DataError("\n".join(problems))
    return kept, _report(kept, places, lost, sources)


# A row's sequences, before any cut


def whole_rows(example: Example, template: ChatTemplate, rules: TokenRules) -> list[TokenizedExample]:
    """A row's sequences of any length, with or without targets. RequestError if the chat template refuses it."""
    if example.chosen is not None and example.rejected is not None:
        chosen, rejected = (
            _marked(_after_prompt(example, answer, template, rules), example)
            for answer in (example.chosen, example.rejected)
        )
        return [TokenizedExample(chosen.token_ids, chosen.is_target, *_at(example), rejected=rejected)]
    if rules.objective == "grpo":
        prompt = _prompt(example, template)
        is_target = np.zeros(len(prompt), bool)
        return [TokenizedExample(prompt, is_target, *_at(example), fields=example.fields)]
    found = [_marked(sequence, example) for sequence in _sequences(example, template, rules)]
    if example.label is None:
        return found
    if len(found) != 1:
        raise RequestError("the answer is not one sequence; expected one assistant turn after its prompt")
    return [TokenizedExample(found[0].token_ids, found[0].is_target, *_at(example), label=example.label)]


def _at(example: Example) -> tuple[str, int]:
    return example.source, example.line


def _sequences(example: Example, template: ChatTemplate, rules: TokenRules) -> Iterator[Supervised]:
    """A row's sequences with what loss may use."""
    messages = example.as_messages()
    if messages is None or (example.messages is None and not template.exists):
        yield _raw(example, template, rules)
    elif rules.mask_prompt:
        found = template.supervise(
            messages,
            tools=example.tools,
            roles=rules.roles_to_train,
            train_on_eos=rules.train_on_eos,
            skip=example.untrained,
        )
        yield from found or [Supervised(template.render(messages, tools=example.tools), ())]
    else:
        ids = template.render(messages, tools=example.tools, add_generation_prompt=False)
        yield Supervised(ids, ((0, len(ids)),))


def _after_prompt(
    example: Example, answer: Sequence[Message], template: ChatTemplate, rules: TokenRules
) -> Supervised:
    """One answer of a pair after the prompt of both; the answer alone is supervised."""
    before = example.as_messages() or ()
    if example.messages is None and not template.exists:
        completion = str(answer[-1]["content"])
        return _raw(Example(*_at(example), prompt=example.prompt, completion=completion), template, rules)
    found = template.supervise(
        [*before, *answer],
        tools=example.tools,
        train_on_eos=rules.train_on_eos,
        skip=range(len(before)),
    )
    if len(found) != 1:
        raise RequestError(
            "the chat template rewrites earlier turns, so an answer of several turns is no one sequence; "
            "expected answers of one assistant turn"
        )
    return found[0]


def _prompt(example: Example, template: ChatTemplate) -> np.ndarray:
    messages = example.as_messages() or ()
    if example.messages is None and not template.exists:
        return np.array(template.tokenizer.encode(example.prompt), np.int32)
    return np.array(template.render(messages, tools=example.tools), np.int32)


def _raw(example: Example, template: ChatTemplate, rules: TokenRules) -> Supervised:
    """Text, or prompt and completion for a tokenizer without a chat template; the end token closes both."""
    tokenizer = template.tokenizer
    if example.text is not None:
        ids, start = list(tokenizer.encode(example.text)), 0
        end_is_target = True
    else:
        prompt = list(tokenizer.encode(example.prompt))
        ids = [*prompt, *tokenizer.encode(example.completion, add_special_tokens=False)]
        start = len(prompt) if rules.mask_prompt else 0
        end_is_target = not rules.mask_prompt or rules.train_on_eos != "none"
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    stop = len(ids) if end_is_target or tokenizer.eos_token_id is None else len(ids) - 1
    return Supervised(tuple(ids), ((start, stop),))


def _marked(sequence: Supervised, example: Example) -> TokenizedExample:
    is_target = np.zeros(len(sequence.token_ids), bool)
    for start, stop in sequence.spans:
        is_target[start:stop] = True
    is_target[:1] = False  # nothing comes before the first token to predict it from
    return TokenizedExample(np.array(sequence.token_ids, np.int32), is_target, *_at(example))


def _lost(example: Example, rows: Sequence[TokenizedExample], template: ChatTemplate) -> Iterator[str]:
    """What the row says and its sequences do not, because the chat template has no place for it."""
    words = dict(_structured(example))
    if not words:
        return
    texts = [template.tokenizer.decode(s.token_ids.tolist()) for row in rows for s in row.sequences]
    seen = "".join("".join(texts).split())
    yield from (name for name, said in words.items() if not all("".join(w.split()) in seen for w in said))


def _structured(example: Example) -> Iterator[tuple[str, list[str]]]:
    """(key, words that stand for it) of thoughts, calls and tools."""
    turns = [*(example.messages or ()), *(example.chosen or ()), *(example.rejected or ())]
    learned = [turn for index, turn in enumerate(turns) if index not in example.untrained]
    for name in REASONING:
        thoughts = [str(t[name]) for t in learned if t.get(name) and t.get("role") == "assistant"]
        if thoughts:
            yield name, thoughts
    calls = [call.get("function") or call for turn in learned for call in turn.get("tool_calls") or ()]
    if calls:
        yield "tool_calls", [str(call.get("name", "")) for call in calls]
    if example.tools:
        yield "tools", [str((tool.get("function") or tool).get("name", "")) for tool in example.tools]


# Cutting to length


def _fit(row: TokenizedExample, rules: TokenRules) -> tuple[list[TokenizedExample], str | None]:
    """The row within `max_seq_length` and with something to learn from, or [] and the reason."""
    limit, strategy = rules.max_seq_length, rules.excess_length_strategy
    if row.fields is None and not all(sequence.is_target.any() for sequence in row.sequences):
        return [], NOT_SUPERVISED
    if row.length <= limit:
        return ([row], None) if not _is_even(row) else ([], NO_DIFFERENCE)
    if strategy == "raise":
        return [], f"{row.length} tokens; max_seq_length is {limit} and excess_length_strategy is raise"
    if strategy == "drop":
        return [], "longer than max_seq_length"
    if row.fields is not None:
        return [], "a prompt longer than max_seq_length, and no prompt once cut"
    if strategy == "split":
        return _split(row, limit), None
    cut = _cut(row, limit)
    if not all(sequence.is_target.any() for sequence in cut.sequences):
        return [], CUT_AWAY
    return ([cut], None) if not _is_even(cut) else ([], NO_DIFFERENCE)


def _cut(row: TokenizedExample, limit: int) -> TokenizedExample:
    rejected = _cut(row.rejected, limit) if row.rejected is not None else None
    return TokenizedExample(
        row.token_ids[:limit], row.is_target[:limit], row.source, row.line, rejected, row.label
    )


def _split(row: TokenizedExample, limit: int) -> list[TokenizedExample]:
    """Pieces that follow each other; each begins with the last token before it, so each token is predicted once."""
    pieces = []
    for start in range(0, len(row) - 1, limit - 1):
        is_target = row.is_target[start : start + limit].copy()
        is_target[:1] = False
        pieces.append(TokenizedExample(row.token_ids[start : start + limit], is_target, row.source, row.line))
    return pieces


def _is_even(row: TokenizedExample) -> bool:
    return row.rejected is not None and np.array_equal(row.token_ids, row.rejected.token_ids)


def _is_refused(row: TokenizedExample, rules: TokenRules) -> bool:
    is_long = row.length > rules.max_seq_length
    has_targets = row.fields is not None or all(sequence.is_target.any() for sequence in row.sequences)
    return is_long and rules.excess_length_strategy == "raise" and has_targets


# Counting


def _count(counts: SourceCounts, outcome: Outcome) -> None:
    counts.num_read += 1
    counts.num_sequences += len(outcome.rows)
    counts.num_truncated += outcome.num_truncated
    counts.num_dropped += len(outcome.dropped)
    counts.num_tokens += sum(row.num_tokens for row in outcome.rows)
    counts.num_targets += sum(row.num_targets for row in outcome.rows)


def _report(
    kept: Sequence[TokenizedExample],
    places: Mapping[str, Sequence[str]],
    lost: dict[str, tuple[int, str]],
    sources: dict[str, SourceCounts],
) -> TokenizeReport:
    lengths = np.array([row.length for row in kept], dtype=int)
    bounds = 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    bins, counts = np.unique(bounds, return_counts=True)
    total = list(sources.values())
    return TokenizeReport(
        num_read=sum(source.num_read for source in total),
        num_sequences=len(kept),
        num_truncated=sum(source.num_truncated for source in total),
        num_tokens=sum(source.num_tokens for source in total),
        num_targets=sum(source.num_targets for source in total),
        dropped={reason: len(found) for reason, found in places.items()},
        dropped_places=tuple(place for found in places.values() for place in found)[:MAX_PROBLEMS],
        places={reason: tuple(found[:MAX_PROBLEMS]) for reason, found in places.items()},
        histogram=tuple((int(bound), int(count)) for bound, count in zip(bins, counts, strict=True)),
        longest=int(lengths.max(initial=0)),
        lost=lost,
        sources=sources,
    )
