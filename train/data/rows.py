"""One parsed row of a data file -> an Example, or the reasons why not. No files, no tokens."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import DataError
from serve.model.messages import MEDIA_PARTS
from train.data.example import Example, Message
from train.data.media import COLUMNS, Gatherer
from train.data.messages import (
    half_characters,
    kind_of,
    no_turn_of,
    parse_json_list,
    problems_of,
    turns_of,
    untrained_turns,
    without_marks,
)
from train.recipe.kinds import SHAPES
from train.recipe.objectives import OBJECTIVES, needed, objectives_of
from train.recipe.recipe import DatasetSource, Recipe

CONVERSATIONS = "conversations"
"""ShareGPT's key; read where `chat_feature` is not in the row."""

LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
"""Whether an answer was wanted, as files spell it: JSON's booleans, and numbers of tables."""


@dataclass(frozen=True)
class Need:
    """A column that rows of prompts must have, and who reads it: `the reward regex`."""

    column: str
    reader: str


@dataclass(frozen=True)
class Rules:
    """How rows of one source are read. A conversation must hold a turn of one of `roles`; none: any will do."""

    entry: DatasetSource
    objective: str = "sft"
    roles: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()

    def root(self, source: str) -> Path:
        """Where relative paths of media begin."""
        if self.entry.media_root is not None:
            return Path(self.entry.media_root).absolute()
        return Path(source).absolute().parent if Path(source).is_file() else Path.cwd()

    @classmethod
    def of(cls, recipe: Recipe, entry: DatasetSource, needs: tuple[Need, ...] = ()) -> Rules:
        """The rules of a recipe for one of its sources."""
        return cls(entry, recipe.objective, recipe.roles_to_train if recipe.mask_prompt else (), needs)


class _Row:
    """A row being taken apart: its parts so far, and its problems."""

    def __init__(self, row: Mapping[str, Any], rules: Rules) -> None:
        self.row = row
        self.entry = rules.entry
        self.objective = rules.objective
        self.roles: Collection[str] = rules.roles
        self.problems: list[str] = []
        self.parts: dict[str, Any] = {}
        self.used: set[str] = set()

    def get(self, name: str) -> Any:
        self.used.add(name)
        return self.row.get(name)

    def text(self, name: str) -> str:
        """A key's words; a problem if there are none."""
        value = self.get(name)
        if not isinstance(value, str):
            self.problems.append(f"{name}: found {kind_of(value)}; expected a string")
        elif not value:
            self.problems.append(f"{name}: found an empty string; expected text")
        return value if isinstance(value, str) else ""

    def turns(self, name: str) -> list[Any]:
        """A key's messages, in our spelling; problems where they are none. [] if there are any."""
        value = parse_json_list(self.get(name))
        value = [value] if isinstance(value, Mapping) else value
        problems = list(problems_of(value, name))
        self.problems += problems
        return [] if problems else turns_of(value)

    def tools(self) -> None:
        value = parse_json_list(self.get("tools"))
        if value is None or value == [] or value == "":
            return
        if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
            self.problems.append(f"tools: found {kind_of(value)}; expected a list of objects")
        else:
            self.parts["tools"] = tuple(value)

    def converse(self, turns: Sequence[Message], context: int = 0) -> None:
        """Take `turns` as the conversation; the first `context` of them are not learned from."""
        marked = untrained_turns(turns)
        untrained = tuple(sorted({*range(context), *marked}))
        if marked and not self.roles:
            self.problems.append(
                "a turn is marked as not to be trained on, which needs mask_prompt: true and an objective that masks"
            )
        self.parts["messages"], self.parts["untrained"] = without_marks(turns), untrained

    def chat_key(self) -> str:
        """Where this row's conversation stands."""
        name = self.entry.chat_feature
        return CONVERSATIONS if name not in self.row and CONVERSATIONS in self.row else name


def parse_row(row: Any, rules: Rules, source: str, line: int) -> Example:
    """The Example of a row. DataError, a line for each problem, each starting with `source:line`.

    A key that changes what the row means is used, or refused by its name; others are left alone.
    """
    place = f"{source}:{line}"
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: found {kind_of(row)}; expected an object with keys")
    row = _with_question(row, rules)
    kind = rules.entry.type if rules.entry.type != "auto" else recognise(row, rules)
    if kind not in OBJECTIVES[rules.objective].kinds:
        raise DataError(f"{place}: {unusable(row, rules)}")
    taken = _Row(row, rules)
    _PARSERS[kind](taken)
    _media(taken, rules.root(source)) if _has_media(row, taken) else None
    if kind != "text":
        _beside(taken)
    if "fields" in taken.parts:
        taken.problems += _missing(taken.parts["fields"], rules.needs)
    if not taken.problems:
        taken.problems += half_characters(taken.parts, row)
    if taken.problems:
        raise DataError("\n".join(f"{place}: {problem}" for problem in taken.problems))
    return Example(source=source, line=line, **taken.parts)


# What a row is


def recognise(row: Mapping[str, Any], rules: Rules) -> str | None:
    """The kind of a row by its keys; the objective's own kinds first, in their order. None: nothing fits."""
    present = list(_kinds(row, rules))
    if "unpaired" in present and OBJECTIVES[rules.objective].is_supervised:
        return "unpaired"  # half of such answers are unwanted ones: not to be learned from by accident
    wanted = [kind for kind in OBJECTIVES[rules.objective].kinds if kind in present]
    others = [kind for kind in present if kind != "prompt"]  # such a row rather lacks its answer
    return (wanted or others or [None])[0]


def unusable(row: Mapping[str, Any], rules: Rules) -> str | None:
    """Why no row with these keys can be used, or None."""
    entry, objective = rules.entry, rules.objective
    row = _with_question(row, rules)
    found = ", ".join(map(str, row)) or "nothing"
    kind = entry.type if entry.type != "auto" else recognise(row, rules)
    if kind is None:
        return f"found keys {found}; objective {objective} needs {needed(objective)}{_hint(row, rules)}"
    if kind in OBJECTIVES[objective].kinds:
        return None
    if kind == "unpaired":
        advice = (
            f"write objective: {objectives_of(kind)}, or type: completion or chat to learn from every answer"
        )
    else:
        advice = f"rows of {SHAPES[kind]} are for objective {objectives_of(kind)}"
    return f"found keys {found}; objective {objective} needs {needed(objective)}; {advice}"


def _kinds(row: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    def has(*names: str) -> bool:
        return all(row.get(name) is not None for name in names)

    entry, label = rules.entry, row.get(rules.entry.label_feature)
    prompt, completion, chat = entry.prompt_feature, entry.completion_feature, entry.chat_feature
    if has(entry.chosen_feature) or has(entry.rejected_feature):
        yield "preference"
    if (_is_label(label) or (label is not None and "unpaired" in OBJECTIVES[rules.objective].kinds)) and (
        has(completion) or has(chat) or has(CONVERSATIONS)
    ):
        yield "unpaired"
    if has(prompt, completion):
        yield "completion"
    if has(chat):
        yield "chat"
    if not has(chat) and has(CONVERSATIONS):
        yield "sharegpt"
    if has(entry.text_feature):
        yield "text"
    if has("instruction", "output"):
        yield "alpaca"
    is_asked = OBJECTIVES[rules.objective].answers_anew and has("instruction")
    if has(prompt) or has(chat) or has(CONVERSATIONS) or is_asked:
        yield "prompt"


def _is_label(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


def _hint(row: Mapping[str, Any], rules: Rules) -> str:
    entry = rules.entry
    names = [name for key, name in entry if key.endswith("_feature")]
    for key in row:
        if (close := difflib.get_close_matches(str(key), names, n=1)) and close[0] not in row:
            return f"; did you mean {close[0]} by {key}?"
    return " (or name the keys by chat_feature, prompt_feature, …)"


# The parts of each kind


def _chat(taken: _Row, name: str | None = None) -> None:
    name = name or taken.chat_key()
    turns = taken.turns(name)
    if turns:
        taken.converse(turns)
        problem = no_turn_of(taken.roles, turns, taken.parts["untrained"])
        taken.problems += [f"{name}: {problem}"] if problem else []
    taken.tools()


def _sharegpt(taken: _Row) -> None:
    _chat(taken, CONVERSATIONS if CONVERSATIONS in taken.row else taken.entry.chat_feature)


def _completion(taken: _Row) -> None:
    """Both as texts, or both as lists of turns (TRL's conversational form: the completion alone is learned from)."""
    prompt, completion = taken.entry.prompt_feature, taken.entry.completion_feature
    if isinstance(taken.row.get(prompt), list):
        before, after = taken.turns(prompt), taken.turns(completion)
        if before and after:
            taken.converse([*before, *after], context=len(before) if taken.roles else 0)
    else:
        taken.parts["prompt"], taken.parts["completion"] = taken.text(prompt), taken.text(completion)
    taken.tools()


def _text(taken: _Row) -> None:
    taken.parts["text"] = taken.text(taken.entry.text_feature)


def _alpaca(taken: _Row) -> None:
    """instruction, then input if there is any, as the user's turn; output as the assistant's; history before both."""
    asked, answer = _instruction(taken), taken.text("output")
    earlier = list(_history(taken))
    if earlier:
        taken.converse(
            [*earlier, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        )
    else:
        taken.parts["prompt"], taken.parts["completion"] = asked, answer


def _history(taken: _Row) -> Iterator[Message]:
    """The turns of alpaca's `history`: a list of [question, answer]."""
    history = parse_json_list(taken.get("history"))
    if not history:
        return
    pairs = history if isinstance(history, (list, tuple)) else [history]
    for index, pair in enumerate(pairs):
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(w, str) for w in pair)
        if not is_pair:
            taken.problems.append(f"history.{index}: found {kind_of(pair)}; expected [question, answer]")
            return
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}


def _instruction(taken: _Row) -> str:
    more = taken.get("input")
    if more is not None and not isinstance(more, str):
        taken.problems.append(f"input: found {kind_of(more)}; expected a string")
    asked = taken.text("instruction")
    return f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked


def _preference(taken: _Row) -> None:
    """Two answers after one prompt; or, TRL's implicit form, two whole conversations with a common beginning."""
    names = taken.entry.chosen_feature, taken.entry.rejected_feature
    values = [taken.row.get(name) for name in names]
    taken.tools()
    if not any(isinstance(value, (list, Mapping)) for value in values):
        answers = [[{"role": "assistant", "content": taken.text(name)}] for name in names]
        _before(taken, required=True)
    else:
        answers = [taken.turns(name) for name in names]
        if not all(answers):
            return
        is_whole = any(turns[0]["role"] != "assistant" for turns in answers)
        if is_whole:
            _take_common_beginning(taken, answers)
        else:
            _before(taken, required=True)
    for name, turns in zip(names, answers, strict=True):
        _check_answer(taken, name, turns)
    taken.parts["chosen"], taken.parts["rejected"] = map(without_marks, answers)


def _before(taken: _Row, required: bool, *, drops_answer: bool = False) -> None:
    """The turns before the answers: `prompt`, the messages' key, or instruction and input.

    drops_answer  a conversation may end with the assistant's turns, which are left out
    """
    prompt, chat = taken.entry.prompt_feature, taken.chat_key()
    if isinstance(taken.row.get(prompt), str):
        taken.parts["prompt"] = taken.text(prompt)
    elif taken.row.get(prompt) is not None:
        taken.parts["messages"] = without_marks(taken.turns(prompt))
    elif taken.row.get(chat) is not None:
        taken.parts["messages"] = without_marks(taken.turns(chat))
    elif taken.row.get("instruction") is not None:
        asked = _instruction(taken)
        earlier = tuple(_history(taken))
        if earlier:
            taken.parts["messages"] = (*earlier, {"role": "user", "content": asked})
        else:
            taken.parts["prompt"] = asked
    elif required:
        taken.problems.append(
            f"{prompt}: found nothing; expected the prompt of both answers (or whole conversations in "
            f"{taken.entry.chosen_feature} and {taken.entry.rejected_feature})"
        )
    if drops_answer:
        taken.parts["messages"] = _without_answer(taken.parts.get("messages"))
    _check_prompt(taken)


def _without_answer(messages: Sequence[Any] | None) -> tuple[Any, ...] | None:
    """Up to the last turn that is not the assistant's; None stays None."""
    if messages is None:
        return None
    last = max((i for i, turn in enumerate(messages) if turn["role"] != "assistant"), default=-1)
    return tuple(messages[: last + 1])


def _check_prompt(taken: _Row) -> None:
    messages = taken.parts.get("messages")
    if messages and messages[-1]["role"] == "assistant":
        taken.problems.append("the prompt ends with the assistant's turn; expected the user's (or a tool's)")


def _take_common_beginning(taken: _Row, answers: list[list[Any]]) -> None:
    """Split off the turns that both conversations begin with, in place; they are the prompt."""
    chosen, rejected = answers
    prompt, chat = taken.entry.prompt_feature, taken.chat_key()
    count = sum(1 for _ in _common(chosen, rejected))
    while count and chosen[count - 1]["role"] == "assistant" and count == min(len(chosen), len(rejected)):
        count -= 1
    common = chosen[:count]
    if not common:
        taken.problems.append("chosen and rejected are conversations that begin with different turns")
    said = taken.get(prompt)
    if isinstance(said, str) and common and said.strip() not in _words(common):
        taken.problems.append(f"{prompt}: its words are not in the conversation both answers begin with")
    taken.used.add(chat)
    taken.parts["messages"] = without_marks(common)
    answers[:] = [chosen[count:], rejected[count:]]


def _words(turns: Sequence[Message]) -> str:
    return "\n".join(str(turn.get("content")) for turn in turns)


def _common(first: Sequence[Any], second: Sequence[Any]) -> Iterator[Any]:
    for one, other in zip(first, second, strict=False):
        if one != other:
            return
        yield one


def _check_answer(taken: _Row, name: str, turns: Sequence[Message]) -> None:
    if not turns:
        taken.problems.append(f"{name}: found no answer after the turns both begin with")
    elif turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
        roles = ", ".join(str(turn["role"]) for turn in turns)
        taken.problems.append(f"{name}: found turns of {roles}; expected the assistant's answer")
    elif turns[-1].get("content") == "" and not turns[-1].get("tool_calls"):
        problem = f"{name}: found an empty string; expected text"
        taken.problems += [] if problem in taken.problems else [problem]


def _unpaired(taken: _Row) -> None:
    """One answer and whether it was wanted; the answer is the completion, or the last turn of the messages."""
    label = taken.get(taken.entry.label_feature)
    key = str(label).lower() if isinstance(label, (bool, int, float, str)) else ""
    if key not in LABELS:
        taken.problems.append(
            f"{taken.entry.label_feature}: found {kind_of(label)}; expected true or false, or 1 or 0"
        )
    taken.parts["label"] = LABELS.get(key, False)
    if taken.row.get(taken.entry.completion_feature) is not None:
        _completion(taken)
        return
    name = taken.chat_key()
    turns = taken.turns(name)
    taken.tools()
    if turns and turns[-1]["role"] != "assistant":
        taken.problems.append(
            f"{name}: the last turn is of {turns[-1]['role']}; expected the assistant's answer"
        )
    if turns:
        taken.converse(turns, context=len(turns) - 1)


def _prompt(taken: _Row) -> None:
    """What is to be answered; every other column is for the reward, unless the answers are to be given anew."""
    taken.tools()
    answers_anew = OBJECTIVES[taken.objective].answers_anew
    _before(taken, required=False, drops_answer=answers_anew)
    if taken.parts.get("prompt") is None and not taken.parts.get("messages"):
        taken.problems += (
            [] if taken.problems else [f"{taken.entry.prompt_feature}: found nothing; expected text"]
        )
    others = {} if answers_anew else taken.row
    taken.parts["fields"] = {str(k): v for k, v in others.items() if k not in taken.used}


def _missing(fields: Mapping[str, Any], needs: Sequence[Need]) -> Iterator[str]:
    for need in needs:
        if need.column not in fields:
            yield f"no column {need.column}, which {need.reader} needs; found {', '.join(fields) or 'none'}"


# Keys beside them that change what a row means


def _has_media(row: Mapping[str, Any], taken: _Row) -> bool:
    """Whether a row names a picture, a clip or a sound anywhere."""
    said = [taken.parts.get(name) or () for name in ("messages", "chosen", "rejected")]
    return any(_is_there(row.get(name)) for name in COLUMNS) or any(
        _media_parts(turn) for turns in said for turn in turns
    )


def _media(taken: _Row, root: Path) -> None:
    """Take the row's media: where they stand in the prompt, and what they are, in that order."""
    taken.used.update(COLUMNS)
    if "text" in taken.parts:
        name = next((name for name in COLUMNS if _is_there(taken.row.get(name))), "")
        taken.problems.append(
            f"{name}: found {kind_of(taken.row[name])} beside a text, which has no place for it; write messages"
        )
        return
    for name in ("chosen", "rejected"):
        if any(_media_parts(turn) for turn in taken.parts.get(name) or ()):
            taken.problems.append(f"{name}: found a picture or sound in an answer; answers are words")
    gatherer = Gatherer(taken.row, root)
    messages, found = gatherer.take(_conversation_of(taken), taken.chat_key())
    gatherer.finish()
    taken.parts["messages"], taken.parts["media"] = messages, found
    taken.problems += gatherer.problems
    taken.problems += [problem for ref in found for problem in ref.missing()]


def _media_parts(turn: Message) -> list[Any]:
    content = turn.get("content")
    return (
        [part for part in content if part.get("type") in MEDIA_PARTS]
        if isinstance(content, (list, tuple))
        else []
    )


def _with_question(row: Mapping[str, Any], rules: Rules) -> Mapping[str, Any]:
    """mlx-vlm's `question` and `answer` beside pictures, by the names of a prompt and its completion."""
    words, entry = ("question", "answer"), rules.entry
    if not any(_is_there(row.get(name)) for name in COLUMNS) or recognise(row, rules) is not None:
        return row
    if not all(isinstance(row.get(name), str) for name in words):
        return row
    others = {name: value for name, value in row.items() if name not in words}
    return {**others, entry.prompt_feature: row["question"], entry.completion_feature: row["answer"]}


def _beside(taken: _Row) -> None:
    _system(taken)
    _functions(taken)
    variables = taken.get("chat_template_kwargs")
    if isinstance(variables, Mapping):
        taken.parts["variables"] = {name: value for name, value in variables.items() if value is not None}
    elif variables is not None:
        taken.problems.append(f"chat_template_kwargs: found {kind_of(variables)}; expected an object")
    if _is_there(taken.row.get("history")) and "history" not in taken.used:
        taken.problems.append(
            "history: only rows of instruction and output have one; write its turns as messages"
        )
    if "fields" in taken.parts:
        taken.parts["fields"] = {k: v for k, v in taken.parts["fields"].items() if k not in taken.used}


def _system(taken: _Row) -> None:
    """A `system` beside the turns is their first."""
    system = taken.get("system")
    if not _is_there(system):
        return
    if not isinstance(system, str):
        taken.problems.append(f"system: found {kind_of(system)}; expected a string")
        return
    messages = _conversation_of(taken)
    if messages and messages[0]["role"] in ("system", "developer"):
        if str(messages[0].get("content")).strip() != system.strip():
            taken.problems.append(
                f"system: found {kind_of(system)}, and other words in the conversation's own"
            )
        return
    if messages:
        taken.parts["messages"] = ({"role": "system", "content": system}, *messages)
        taken.parts["untrained"] = tuple(index + 1 for index in taken.parts.get("untrained", ()))


def _conversation_of(taken: _Row) -> tuple[Message, ...]:
    """The row's turns; a prompt and a completion become some."""
    prompt, completion = taken.parts.pop("prompt", None), taken.parts.pop("completion", None)
    if prompt is not None:
        asked = ({"role": "user", "content": prompt},)
        answer = () if completion is None else ({"role": "assistant", "content": completion},)
        taken.parts["messages"] = (*asked, *answer)
    return tuple(taken.parts.get("messages", ()))


def _functions(taken: _Row) -> None:
    """OpenAI's earlier name for tools."""
    functions = parse_json_list(taken.get("functions"))
    if not _is_there(functions):
        return
    if "tools" in taken.parts:
        taken.problems.append("functions: found beside tools; they mean the same, write one")
    elif not isinstance(functions, (list, tuple)) or not all(isinstance(f, Mapping) for f in functions):
        taken.problems.append(f"functions: found {kind_of(functions)}; expected a list of objects")
    else:
        taken.parts["tools"] = tuple({"type": "function", "function": dict(f)} for f in functions)


def _is_there(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}


_PARSERS: Mapping[str, Callable[[_Row], None]] = {
    "chat": _chat,
    "completion": _completion,
    "text": _text,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "unpaired": _unpaired,
    "prompt": _prompt,
}
