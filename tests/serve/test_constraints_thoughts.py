"""Grammars behind thoughts: these are free, and an answer is its grammar's from its first token on, whatever is
drawn, taken back, forced or begun by the prompt; for each parser's marks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jsonschema
import numpy as np
import pytest
import regex
from pydantic_core import from_json
from thinkers import CASES, Family

from serve.constraints.after_thoughts import grammar_edit
from serve.constraints.compiler import GrammarCompiler
from serve.constraints.spec import ConstraintSpec
from serve.engine.edits import LogitsEdit, make_edit
from serve.engine.finish import FinishRule
from serve.engine.request import Request, Sampling
from serve.engine.thinking import Thinking, ThoughtTokens
from serve.errors import GenerationError
from serve.model.prompt import Prompt

OTHERS = (
    "k>\n",
    '>{"a"',
    '"</think>"',
    "x</think>y",
    "a[",
    "</ab",
    "</a{",
    "</a>",
    "ab",
    "<think",
    '{"a":',
    "é",
    "[[",
)
"""Tokens that hold ends of marks and more, marks whole, and beginnings of what grammars say."""
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 12}, "b": {"enum": [1, None, "<think>"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
PATTERNS = (
    "[ab]{2,}",
    "\n\na+\n",
    "<[a-z/]{0,9}>[0-9]{2}",
    "[^x]{4,12}",
    "(</think>|</a|\\[|a)b?c{3}",
    "é{2,3}",
)
PROMPTS = ("silent", "opened", "thought already")
NUM_TOKENS = 50


@pytest.fixture(scope="module", params=list(CASES))
def family(request) -> Family:
    return Family(request.param, OTHERS)


@pytest.fixture(scope="module")
def compiler(family) -> GrammarCompiler:
    return GrammarCompiler(family.tokenizer, family.tokens, len(family.tokenizer.get_vocab()))


@dataclass
class Row:
    """One request, told of tokens as an engine tells."""

    request: Request
    spec: ConstraintSpec
    family: Family

    def again(self) -> Row:
        """One that was told nothing."""
        return Row(self.request, self.spec, self.family)

    def __post_init__(self) -> None:
        self.rule = FinishRule(self.request, self.family.tokens, self.family.tokenizer.eos_token_ids)
        self.rule.whole = grammar_edit(self.request, self.rule.ends, self.family.tokens)
        edit = make_edit(self.request, self.rule.ends, self.family.tokens, self.rule.whole)
        assert edit is not None
        self.edit: LogitsEdit = edit


def asking(
    rng: random.Random, family: Family, compiler: GrammarCompiler, prompt: str, **sampling: object
) -> Row:
    """A request with a random grammar and budget."""
    spec = ConstraintSpec("regex", rng.choice(PATTERNS))
    if rng.random() < 0.3:
        spec = ConstraintSpec.of_schema(SCHEMA, "response_format")
    opening, closing = marks_of(family)
    said = {"silent": "", "opened": opening, "thought already": f"{opening}x{closing}"}[prompt]
    begin = [*family.encode("<|start|>assistant")] if family.name == "gpt_oss" else [0]
    token_ids = (*family.encode("hello"), *begin, *family.encode(said))
    cue = family.thoughts.cue(token_ids, frozenset({0, 1}))
    thinking = Thinking(family.thoughts, cue, rng.choice([None, None, 0, 1, 4, 12]))
    asked = Sampling(max_tokens=NUM_TOKENS, seed=rng.getrandbits(30), **sampling)
    request = Request("r", Prompt(token_ids), asked, thinking=thinking, grammar=compiler.compile(spec))
    return Row(request, spec, family)


def marks_of(family: Family) -> tuple[str, str]:
    """How a thought begins and ends."""
    if family.name == "gpt_oss":
        return "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
    _, _, _, (start, end) = CASES[family.name]
    names = {half: family.tokenizer.convert_ids_to_tokens(n) for n, half in family.thoughts.controls.items()}
    texts = [family.thoughts.marks["content"][0].text, family.thoughts.marks["reasoning"][0].text]
    spelled = ["".join(names.get(character, character) for character in text) for text in texts]
    assert (start or spelled[0], end or spelled[1]) == tuple(spelled)
    return spelled[0], spelled[1]


def allowed(edit: LogitsEdit, size: int) -> np.ndarray:
    """[V] bool."""
    change = edit.change()
    mask = np.ones(size, dtype=bool)
    if change is not None and change.tokens is not None:
        mask[change.tokens.token_ids[np.isneginf(change.tokens.biases)]] = False
    if change is not None and change.allowed is not None:
        mask &= np.unpackbits(change.allowed.view(np.uint8), bitorder="little")[:size].astype(bool)
    if change is not None and change.forced is not None:
        mask[:] = False
        mask[change.forced] = True
    return mask


def drawn(rng: random.Random, family: Family, wishes: list[int], mask: np.ndarray) -> int:
    """Often what goes on with a mark, or begins one; else any that may come, ends seldom."""
    if not wishes:
        told = [*marks_of(family), *marks_of(family), "so", "\n\n", "<", "final", "日"]
        wishes += family.encode(rng.choice(told))
    wish = wishes.pop(0)
    if rng.random() < 0.9 and mask[wish]:
        return wish
    choices = np.flatnonzero(mask).tolist()
    merged = [each for each in choices if each >= len(mask) - len(OTHERS)]
    return rng.choice(merged if merged and rng.random() < 0.4 else choices)


def raw_of(family: Family, token_ids: Sequence[int]) -> bytes:
    """What tokens say, with control tokens as no text has them."""
    return b"".join(
        b"\xff%d\xff" % each if each in family.thoughts.controls else family.tokens[each]
        for each in token_ids
    )


def answer_of(family: Family, token_ids: Sequence[int], prompt: str) -> list[int] | None:
    """The tokens of the answer's text, by the marks in what all of them say; None: it has not begun."""
    if prompt == "thought already":
        return list(token_ids)
    opening, closing = (raw_of(family, family.encode(mark)) for mark in marks_of(family))
    raws = [raw_of(family, token_ids[:count]) for count in range(len(token_ids) + 1)]
    if family.name == "gpt_oss":
        return answer_of_harmony(family, token_ids, prompt)
    begins = prompt == "opened" or family.thoughts.begins_inside
    if not begins and not raws[-1].startswith(opening):
        return None if opening.startswith(raws[-1]) else list(token_ids)
    at = 0 if begins else len(opening)
    ended = next((count for count, raw in enumerate(raws) if closing in raw[at:]), None)
    if ended is None:
        return None
    assert raws[ended].endswith(closing), "the thought's last token says more"
    return list(token_ids[ended:])


def answer_of_harmony(family: Family, token_ids: Sequence[int], prompt: str) -> list[int] | None:
    """What follows the first header that does not speak of an analysis."""
    header: bytes | None = b"assistant" if prompt == "silent" else None
    for count, token_id in enumerate(token_ids, start=1):
        name = family.tokenizer.convert_ids_to_tokens(token_id)
        if name in ("<|start|>", "<|channel|>"):
            header = b""
        elif name == "<|message|>" and header is not None:
            if not header.strip().startswith(b"analysis"):
                return list(token_ids[count:])
            header = None
        elif token_id in family.thoughts.controls and name != "<|message|>":
            header = None
        elif header is not None:
            header += family.tokens[token_id]
    return None


def keeps_to(spec: ConstraintSpec, text: str, is_whole: bool) -> bool:
    """By other means: all of it, or a beginning."""
    if spec.kind == "json":
        if is_whole:
            jsonschema.validate(json.loads(text), SCHEMA)
        else:
            from_json(text, allow_partial="trailing-strings") if text else None
        return True
    return bool(regex.fullmatch(spec.text, text, partial=not is_whole))


def walk(
    rng: random.Random, row: Row, family: Family, more: Callable[[list[int]], None] = lambda _: None
) -> tuple[list[int], str, str, str | None]:
    """Draw until it ends: the tokens, the answer's text, its thoughts, and how it ended."""
    token_ids: list[int] = []
    wishes: list[int] = []
    text = reasoning = ""
    size = len(family.tokenizer.get_vocab())
    while True:
        more(token_ids)
        token_id = drawn(rng, family, wishes, allowed(row.edit, size))
        token_ids.append(token_id)
        row.edit.advance([token_id])
        step = row.rule.push([token_id])
        text, reasoning = text + step.text, reasoning + step.reasoning
        if step.finish is not None:
            return token_ids, text, reasoning, step.finish


def read_by_forks(rng: random.Random, row: Row, token_ids: Sequence[int]) -> str:
    """The answer's text, while others read on from each of its tokens."""
    assert row.request.thinking is not None
    read, told = ThoughtTokens(row.request.thinking, row.family.tokens, before=True), ""
    for token_id in token_ids:
        read.fork().push(rng.randrange(len(row.family.tokenizer.get_vocab())))
        told += "".join(piece.text for piece in read.push(token_id) if piece.kind == "content")
    return told + "".join(piece.text for piece in read.finish() if piece.kind == "content")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_thoughts_are_free_and_answers_keep_to_their_grammar_from_their_first_token_on(
    family, compiler, prompt
):
    rng = random.Random(f"{family.name} {prompt}")
    seen = dict.fromkeys(("stop", "length", "thought", "both", "none"), 0)
    for number in range(60):
        row = asking(rng, family, compiler, prompt)
        token_ids, text, reasoning, finish = walk(rng, row, family)
        own = answer_of(family, token_ids, prompt)
        assert read_by_forks(rng, row, token_ids) == (text if own is not None else "")
        ended = token_ids[-1] in row.rule.ends
        said = b"".join(family.tokens[each] for each in own or ()).decode("utf-8", "replace")
        if own is None:  # a thought to its end, or less than its mark
            assert finish == "length", (number, token_ids)
            assert not text, (number, token_ids)
        else:
            assert text == said, (number, row.spec, token_ids)
            assert keeps_to(row.spec, text.rstrip("\ufffd"), finish == "stop"), (number, row.spec, text)
        assert not ended or own is not None
        seen[finish] += 1
        seen["thought"] += bool(reasoning)
        seen["both"] += bool(reasoning and text)
        seen["none"] += own is None
    assert seen["stop"] > 10, seen
    assert (seen["both"] > 3) == (prompt != "thought already"), seen


@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_is_taken_back_leaves_nothing_behind(family, compiler, prompt):
    """Grammars, budgets and penalties in one edit, against one that was told no more than what stayed."""
    rng, size = random.Random(f"back {family.name} {prompt}"), len(family.tokenizer.get_vocab())
    num_compared = 0
    for _ in range(16):
        settings = {
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.2,
            "repetition_context_size": 7,
            "min_tokens": 4,
        }
        row = asking(rng, family, compiler, prompt, **settings)

        def try_out(token_ids: list[int], row: Row = row) -> None:
            nonlocal num_compared
            if rng.random() < 0.7:
                return
            guessed: list[int] = []
            wishes: list[int] = []
            for _ in range(rng.randint(1, 9)):
                mask = allowed(row.edit, size)
                if not mask.any():
                    break
                guessed.append(drawn(rng, family, wishes, mask))
                row.edit.advance(guessed[-1:])
                if rng.random() < 0.3:
                    back = rng.randint(1, len(guessed))
                    row.edit.retract(back)
                    del guessed[len(guessed) - back :]
            kept = rng.randint(0, len(guessed))
            row.edit.retract(len(guessed) - kept)
            fresh = row.again()
            fresh.edit.advance([*token_ids, *guessed[:kept]])
            assert same(row.edit, fresh.edit)
            assert row.rule.whole.length == fresh.rule.whole.length
            row.edit.retract(kept)
            num_compared += 1

        walk(rng, row, family, try_out)
    assert num_compared > 20


def same(one: LogitsEdit, other: LogitsEdit) -> bool:
    """Whether both change logits alike."""
    changes = [edit.change() for edit in (one, other)]
    if changes[0] is None or changes[1] is None:
        return changes == [None, None]
    first, second = changes
    by_token = [
        {int(t): tuple(values) for t, *values in zip(*each.tokens, strict=True) if values != [0, 1, 0]}
        for each in changes
        if each.tokens is not None
    ]
    return (
        first.forced == second.forced
        and np.array_equal(first.allowed, second.allowed)
        and by_token[1:] == by_token[:-1]
    )


def test_a_token_that_is_refused_is_not_heard_by_anybody(family, compiler):
    rng, size = random.Random(4), len(family.tokenizer.get_vocab())
    for _ in range(20):
        row = asking(rng, family, compiler, "thought already", presence_penalty=1.0)
        if rng.random() < 0.5:
            row = Row(replace(row.request, thinking=None), row.spec, family)
        heard: list[int] = []
        for _ in range(rng.randint(0, 3)):
            heard.append(rng.choice(np.flatnonzero(allowed(row.edit, size)).tolist()))
            row.edit.advance(heard[-1:])
        if (heard and heard[-1] in row.rule.ends) or row.rule.whole.length is not None:
            continue
        refused = rng.choice(np.flatnonzero(~allowed(row.edit, size)).tolist())
        more = [rng.choice(np.flatnonzero(allowed(row.edit, size)).tolist())] if rng.random() < 0.5 else []
        if (more and more[0] in row.rule.ends) or refused in row.rule.ends:
            continue
        fresh = row.again()
        fresh.edit.advance([*heard, *more])
        if fresh.rule.whole.length is not None or allowed(fresh.edit, size)[refused]:
            continue
        with pytest.raises(GenerationError):
            row.edit.advance([*more, refused])
        again = row.again()
        again.edit.advance(heard)
        assert same(row.edit, again.edit)


def test_a_thought_may_say_what_its_grammar_and_the_ends_of_answers_do_not(family, compiler):
    row, size = asking(random.Random(1), family, compiler, "opened"), len(family.tokenizer.get_vocab())
    spec = ConstraintSpec("regex", "[ab]{2,}")
    thinking = replace(row.request.thinking, budget=None)
    row = Row(replace(row.request, grammar=compiler.compile(spec), thinking=thinking), spec, family)
    barred = set(np.flatnonzero(~allowed(row.edit, size)).tolist())
    ends = set(row.rule.ends)
    others = {size - len(OTHERS) + number for number in range(len(OTHERS))}
    assert ends <= barred <= ends | others
    holders = {"text": {'"</think>"', "x</think>y"}, "own": {"</ab", "</a{", "</a>"}}.get(family.name, set())
    assert {OTHERS[each - size + len(OTHERS)] for each in barred - ends} == holders
