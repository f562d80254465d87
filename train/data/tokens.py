"""Examples -> token ids with a loss mask, and a report of what was kept. Rendering is serve's ChatTemplate."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from serve.errors import DataError, RequestError
from serve.model.forms import missing_calls
from serve.model.template import ChatTemplate, Supervised
from serve.model.texts import brings_beginning, brings_end, encode_text
from train.data.example import Example, Message
from train.data.looking import Looked, look
from train.data.media_reader import LaterInputs, MediaReader
from train.data.messages import REASONING
from train.data.row_media import RowMedia
from train.data.rules import TokenRules
from train.recipe.objectives import OBJECTIVES

MAX_PROBLEMS = 20
NOT_SUPERVISED = "nothing in it is supervised"
CUT_MEDIA = "a picture, clip or sound would be cut at max_seq_length"
CUT_AWAY = "nothing supervised is left within max_seq_length"
ENDLESS = "end their answers with no token of the chat template's, so where to stop is not learned"
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
    media: RowMedia | None = None
    """What it shows; its placeholders are never targets."""

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
    """What became of one row: sequences, and what was not kept."""

    rows: tuple[TokenizedExample, ...] = ()
    num_truncated: int = 0
    dropped: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    """What it says and the chat template leaves out."""
    notes: tuple[str, ...] = ()
    """What was changed of it."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the chat template was given for it, besides those that were asked for."""

    def bound_to(self, reader: MediaReader) -> Outcome:
        """The same, its media read by this reader: they may come from another process."""
        for media in (s.media for row in self.rows for s in row.sequences if s.media is not None):
            for piece in media.media:
                assert isinstance(piece.inputs, LaterInputs)
                piece.inputs.bind(reader)
        return self


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
    num_media: int = 0
    """Pictures, clips' pieces and sounds that the sequences show; one that is shown twice counts twice."""
    num_placeholders: int = 0
    """Tokens that stand for them."""
    media_histogram: tuple[tuple[int, int], ...] = ()
    """(most placeholders of the bin, sequences that show something), powers of two."""
    lost: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # what the template leaves out -> rows, the first
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)  # what was changed -> rows, the first
    sources: dict[str, SourceCounts] = field(default_factory=dict)  # file or hub split -> its share
    told: dict[str, Any] = field(default_factory=dict)
    """Variables that most rows' chat templates were given besides those asked for: serving must give them too."""

    @property
    def num_without_targets(self) -> int:
        """Sequences dropped because loss would have counted nothing in them."""
        return self.dropped.get(NOT_SUPERVISED, 0) + self.dropped.get(CUT_AWAY, 0)


def tokenize(
    examples: Sequence[Example],
    template: ChatTemplate,
    rules: TokenRules,
    reader: MediaReader | None = None,
) -> tuple[list[TokenizedExample], TokenizeReport]:
    """Tokenize every example as serving would; `reader` as in `tokenize_row`.

    DataError names the rows the chat template refuses (up to 20), and under `excess_length_strategy: raise` those
    that are longer than `max_seq_length`. Rows with nothing to learn from are dropped, and counted in the report.
    """
    return collect(examples, (tokenize_row(example, template, rules, reader) for example in examples))


def tokenize_row(
    example: Example, template: ChatTemplate, rules: TokenRules, reader: MediaReader | None = None
) -> Outcome:
    """The sequences of one row, within `max_seq_length`; what is wrong with it stands in the outcome.

    reader  of the media that rows show; None: the model takes none
    """
    try:
        looked = look(example, reader)
        example = looked.example
        whole, told = _whole_rows(looked, template, rules)
        lost = tuple(_lost(example, whole, template, rules))
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
    notes = tuple(_notes(looked, template, told))
    if _is_endless(example, whole, template, rules):
        notes = (*notes, ENDLESS)
    return Outcome(tuple(kept), num_truncated, tuple(dropped), tuple(problems), lost, notes, told)


def collect(
    examples: Sequence[Example], outcomes: Iterable[Outcome]
) -> tuple[list[TokenizedExample], TokenizeReport]:
    """All rows and the report of all outcomes, which are the examples' in their order. DataError as `tokenize`."""
    kept: list[TokenizedExample] = []
    places: dict[str, list[str]] = {}
    lost: dict[str, tuple[int, str]] = {}
    notes: dict[str, tuple[int, str]] = {}
    told: list[Mapping[str, Any]] = []
    sources: dict[str, SourceCounts] = {}
    problems: list[str] = []
    for example, outcome in zip(examples, outcomes, strict=False):
        kept += outcome.rows
        problems += outcome.problems
        for reason in outcome.dropped:
            places.setdefault(reason, []).append(example.place)
        for counts, names in ((lost, outcome.lost), (notes, outcome.notes)):
            for name in names:
                count, first = counts.get(name, (0, example.place))
                counts[name] = (count + 1, first)
        told += [outcome.told] * len(outcome.rows)
        _count(sources.setdefault(example.source, SourceCounts()), outcome)
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise DataError("\n".join(problems))
    return kept, replace(_report(kept, places, lost, sources), notes=notes, told=_of_most(told))


def _of_most(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = Counter(json.dumps(variables, sort_keys=True) for variables in told)
    most, count = next(iter(counts.most_common(1)), ("{}", 0))
    return dict(json.loads(most)) if 2 * count > len(told) else {}


# A row's sequences, before any cut


def whole_rows(
    example: Example, template: ChatTemplate, rules: TokenRules, reader: MediaReader | None = None
) -> list[TokenizedExample]:
    """A row's sequences of any length, with or without targets. RequestError if the chat template refuses it."""
    return _whole_rows(look(example, reader), template, rules)[0]


def _whole_rows(
    looked: Looked, template: ChatTemplate, rules: TokenRules
) -> tuple[list[TokenizedExample], Mapping[str, Any]]:
    """(the row's sequences, what the template was told for the last of them)."""
    example = looked.example
    if example.variables and not template.exists:
        raise RequestError(
            "chat_template_kwargs: found in a row, and this model's tokenizer has no chat template"
        )
    if example.chosen is not None and example.rejected is not None:
        answers = (example.chosen, example.rejected)
        pair = [_after_prompt(looked, answer, template, rules) for answer in answers]
        if pair[0].variables != pair[1].variables:
            raise RequestError(
                "one answer has thoughts and the other has none, which the chat template asks for in different ways"
            )
        chosen, rejected = (_marked(sequence, looked) for sequence in pair)
        return [replace(chosen, rejected=rejected)], pair[0].variables
    if OBJECTIVES[rules.objective].asks:
        prompt = _prompt(looked, template)
        row = _marked(Supervised(prompt, ()), looked)
        return [replace(row, fields=example.fields)], {}
    sequences = list(_sequences(looked, template, rules))
    found = [_marked(sequence, looked) for sequence in sequences]
    told = sequences[-1].variables if sequences else {}
    if example.label is None:
        return found, told
    if len(found) != 1:
        raise RequestError("the answer is not one sequence; expected one assistant turn after its prompt")
    return [replace(found[0], label=example.label)], told


def _at(example: Example) -> tuple[str, int]:
    return example.source, example.line


def _sequences(looked: Looked, template: ChatTemplate, rules: TokenRules) -> Iterator[Supervised]:
    """A row's sequences with what loss may use."""
    example, shown = looked.example, looked.expansions
    messages = example.as_messages()
    if messages is None or (example.messages is None and not template.exists):
        yield _raw(example, template, rules)
    elif rules.mask_prompt:
        found = template.supervise(
            messages,
            tools=example.tools,
            variables=example.variables,
            roles=rules.roles_to_train,
            train_on_eos=rules.train_on_eos,
            skip=example.untrained,
            media=shown,
        )
        options = {"tools": example.tools, "variables": example.variables, "media": shown}
        yield from found or [Supervised(template.render(messages, **options), ())]
    else:
        ids = template.render(
            messages,
            tools=example.tools,
            variables=example.variables,
            add_generation_prompt=False,
            media=shown,
        )
        yield Supervised(ids, ((0, len(ids)),))


def _after_prompt(
    looked: Looked, answer: Sequence[Message], template: ChatTemplate, rules: TokenRules
) -> Supervised:
    """One answer of a pair after the prompt of both; the answer alone is supervised."""
    example = looked.example
    before = example.as_messages() or ()
    if example.messages is None and not template.exists:
        completion = str(answer[-1]["content"])
        return _raw(Example(*_at(example), prompt=example.prompt, completion=completion), template, rules)
    found = template.supervise(
        [*before, *answer],
        tools=example.tools,
        variables=example.variables,
        train_on_eos=rules.train_on_eos,
        skip=range(len(before)),
        media=looked.expansions,
    )
    if len(found) != 1:
        raise RequestError(
            "the chat template rewrites earlier turns, so an answer of several turns is no one sequence; "
            "expected answers of one assistant turn"
        )
    return found[0]


def _prompt(looked: Looked, template: ChatTemplate) -> tuple[int, ...]:
    example = looked.example
    messages = example.as_messages() or ()
    if example.messages is None and not template.exists:
        return tuple(encode_text(template.tokenizer, str(example.prompt)))
    options = {"tools": example.tools, "variables": example.variables, "media": looked.expansions}
    return template.render(messages, **options)


def _raw(example: Example, template: ChatTemplate, rules: TokenRules) -> Supervised:
    """Text, or prompt and completion for a tokenizer without a chat template; one end token closes both."""
    tokenizer = template.tokenizer
    if example.text is not None:
        said, ids, start = example.text, list(encode_text(tokenizer, example.text)), 0
        end_is_target = True
    else:
        said, prompt = str(example.completion), encode_text(tokenizer, str(example.prompt))
        ids = [*prompt, *tokenizer.encode(said, add_special_tokens=False)]
        start = len(prompt) if rules.mask_prompt else 0
        end_is_target = not rules.mask_prompt or rules.train_on_eos != "none"
    end = tokenizer.eos_token_id
    if end is not None and not brings_end(tokenizer, said):
        ids.append(end)
    is_cut = not end_is_target and bool(ids) and ids[-1] == end
    return Supervised(tuple(ids), ((start, len(ids) - 1 if is_cut else len(ids)),))


def _marked(sequence: Supervised, looked: Looked) -> TokenizedExample:
    is_target = np.zeros(len(sequence.token_ids), bool)
    for start, stop in sequence.spans:
        is_target[start:stop] = True
    is_target[:1] = False  # nothing comes before the first token to predict it from
    first = int(is_target.argmax()) if is_target.any() else len(is_target)
    media = looked.row_media(sequence.token_ids, first)
    if media is not None:
        is_target[media.placeholders] = False
    token_ids = np.array(sequence.token_ids, np.int32)
    return TokenizedExample(token_ids, is_target, *_at(looked.example), media=media)


def _lost(
    example: Example, rows: Sequence[TokenizedExample], template: ChatTemplate, rules: TokenRules
) -> Iterator[str]:
    """What the row says and its sequences do not, because the chat template has no place for it.

    What a turn says that is learned is looked for among the targets: a call's name stands in the list of tools too.
    """
    turns = list(_structured(example, rules))
    if not turns and not example.tools:
        return
    tokenizer = template.tokenizer
    sequences = [sequence for row in rows for sequence in row.sequences]
    whole = "".join(tokenizer.decode(s.token_ids.tolist()) for s in sequences)
    learned = "".join(tokenizer.decode(s.token_ids[s.is_target].tolist()) for s in sequences)
    lost: dict[str, None] = {}  # in the order of turns, each once
    for turn, is_learned in turns:
        lost |= dict.fromkeys(_lost_of(turn, learned if is_learned else whole))
    names = [str((tool.get("function") or tool).get("name", "")) for tool in example.tools or ()]
    if not all(_holds(whole, name) for name in names):
        lost["tools"] = None
    yield from lost


def _lost_of(turn: Message, text: str) -> Iterator[str]:
    thoughts = [name for name in REASONING if turn.get(name) and turn.get("role") == "assistant"]
    yield from (name for name in thoughts if not _holds(text, str(turn[name])))
    if any(missing_calls(turn, text)):
        yield "tool_calls"
    elif (
        turn.get("tool_calls") and isinstance(turn.get("content"), str) and not _holds(text, turn["content"])
    ):
        yield "content beside tool_calls"


def _holds(text: str, words: str) -> bool:
    return "".join(words.split()) in "".join(text.split())


def _structured(example: Example, rules: TokenRules) -> Iterator[tuple[Message, bool]]:
    """(turn, whether it is learned from) of turns with thoughts or calls that belong in the sequence."""
    answers = [*(example.chosen or ()), *(example.rejected or ())]
    roles = rules.roles_to_train if rules.mask_prompt else ()
    for index, turn in enumerate([*(example.messages or ()), *answers]):
        if index in example.untrained or not (
            turn.get("tool_calls") or any(turn.get(name) for name in REASONING)
        ):
            continue
        is_answer = bool(answers) and index >= len(example.messages or ())
        yield turn, is_answer or (not answers and turn.get("role") in roles)


def _notes(looked: Looked, template: ChatTemplate, told: Mapping[str, Any]) -> Iterator[str]:
    """What a person should know of how the row was read."""
    example = looked.example
    yield from looked.notes
    for name, value in told.items():
        yield f"rendered with {name}: {json.dumps(value)}, as only then prompt and answer agree"
    begins = example.text
    if example.prompt is not None and example.messages is None and not template.exists:
        begins = example.prompt
    if begins is not None and brings_beginning(template.tokenizer, begins):
        yield "begin with the tokenizer's own beginning token, which is not put there twice"


def _is_endless(
    example: Example, rows: Sequence[TokenizedExample], template: ChatTemplate, rules: TokenRules
) -> bool:
    """Whether an answer is learned without an end, though ends are asked for."""
    if not (template.exists and rules.mask_prompt and rules.train_on_eos == "turn" and example.as_messages()):
        return False
    learned = [s.token_ids[s.is_target] for row in rows for s in row.sequences]
    return any(len(ids) and int(ids[-1]) not in template.end_ids for ids in learned)


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
    if any(s.media is not None and s.media.stop > limit for s in row.sequences):
        return [], CUT_MEDIA
    if row.fields is not None:
        return [], "a prompt longer than max_seq_length, and no prompt once cut"
    if strategy == "split":
        return ([], CUT_MEDIA) if row.media is not None else (_split(row, limit), None)
    cut = _cut(row, limit)
    if not all(sequence.is_target.any() for sequence in cut.sequences):
        return [], CUT_AWAY
    return ([cut], None) if not _is_even(cut) else ([], NO_DIFFERENCE)


def _cut(row: TokenizedExample, limit: int) -> TokenizedExample:
    rejected = _cut(row.rejected, limit) if row.rejected is not None else None
    return replace(row, token_ids=row.token_ids[:limit], is_target=row.is_target[:limit], rejected=rejected)


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
    dropped: Mapping[str, Sequence[str]],
    lost: dict[str, tuple[int, str]],
    sources: dict[str, SourceCounts],
) -> TokenizeReport:
    lengths = np.array([row.length for row in kept], dtype=int)
    shown = [row.media for row in kept if row.media is not None]
    places = np.array([media.num_placeholders for media in shown], dtype=int)
    total = list(sources.values())
    return TokenizeReport(
        num_read=sum(source.num_read for source in total),
        num_sequences=len(kept),
        num_truncated=sum(source.num_truncated for source in total),
        num_tokens=sum(source.num_tokens for source in total),
        num_targets=sum(source.num_targets for source in total),
        dropped={reason: len(found) for reason, found in dropped.items()},
        dropped_places=tuple(place for found in dropped.values() for place in found)[:MAX_PROBLEMS],
        places={reason: tuple(found[:MAX_PROBLEMS]) for reason, found in dropped.items()},
        histogram=_binned(lengths),
        num_media=sum(len(media.media) for media in shown),
        num_placeholders=int(places.sum()),
        media_histogram=_binned(places),
        longest=int(lengths.max(initial=0)),
        lost=lost,
        sources=sources,
    )


def _binned(sizes: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(largest of the bin, how many are in it), bins by powers of two."""
    bounds = 2 ** np.ceil(np.log2(np.maximum(sizes, 1))).astype(int)
    bins, counts = np.unique(bounds, return_counts=True)
    return tuple((int(bound), int(count)) for bound, count in zip(bins, counts, strict=True))
