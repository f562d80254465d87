"""Thoughts told from answers: however the text is cut, as mlx-vlm and mlx-lm tell them, and counted by tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlx_lm.generate import make_text_state_machine
from mlx_vlm.server.responses_state import ThinkingStreamState
from thinkers import CASES, CHATML, ENDS, HARMONY, Family, make_tokenizer

from serve.engine.thinking import Thinking, ThoughtStream, ThoughtTokens
from serve.engine.thinking_budget import ThinkingBudget
from serve.errors import ConfigError, RequestError
from serve.model.template import ChatTemplate
from serve.model.thoughts import Teller, ThoughtReader, ThoughtRules
from serve.model.token_bytes import TokenBytes

NUM_SPLITS = 1000


@pytest.fixture(scope="module", params=list(CASES))
def family(request) -> Family:
    return Family(request.param)


def prompt_opens(family: Family) -> str:
    """The end of a prompt that has begun a thought."""
    if family.name == "gpt_oss":
        return family.written("<|start|>assistant<|channel|>analysis<|message|>")
    return next(mark.text for mark in family.thoughts.marks["content"]) + "\n"


def an_answer(rng: random.Random, family: Family) -> str:
    """Words, newlines, marks, beginnings of marks, and the names of control tokens, in any order."""
    opening = "<|channel|>analysis<|message|>" if family.name == "gpt_oss" else ""
    words = [family.written(opening)] * 6 if opening else []
    words += ["so", "Größe", "\n", "\n\n", " ", "日本", "<", "analysis", "final", "thought", "</", "[", "a"]
    cuts = [mark[: rng.randint(1, len(mark))] for mark in family.marks]
    return "".join(
        rng.choice([*words, *family.marks, *family.marks, *cuts]) for _ in range(rng.randint(0, 14))
    )


def pieces_of(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.choice([0, 1, 3, len(text)])))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def told(family: Family, pieces: Sequence[str], cue: str = "") -> tuple[str, str]:
    reader = ThoughtReader(family.thoughts, cue)
    teller = Teller(family.thoughts, reader.state)
    parts = [teller.push(reader.push(piece)) for piece in pieces]
    parts += [teller.push(reader.finish()), teller.finish()]
    return "".join(part.content for part in parts), "".join(part.reasoning for part in parts)


def kinds_by_regex(family: Family, text: str, cue: str) -> list[tuple[str, str, bool]]:
    """The reference: marks found by regular expressions over all of the text."""
    split = re.split(
        "(" + "|".join(map(re.escape, sorted(set(family.marks), key=len, reverse=True))) + ")", cue + text
    )
    found, state, header, length = [], "content", "", 0
    is_open = family.thoughts.begins_inside and not any(mark in cue for mark in family.marks)
    if is_open:
        state = "reasoning"
    for part in split:
        goes = next((m for m in family.thoughts.marks[state] if m.text == part), None)
        own = part[max(len(cue) - length, 0) :]
        length += len(part)
        if goes is None:
            found.append((state, own, False))
            header += part if state == "header" else ""
            continue
        found.append(("header", own, state == "reasoning" == goes.goes))
        said = "reasoning" if header.strip().startswith("analysis") else "content"
        state, header = goes.goes or said, ""
    if found and found[-1][0] == "reasoning":  # what begins a mark at the very end is none of the thought
        last = found.pop()[1]
        starts = [mark.text[:n] for mark in family.thoughts.marks[state] for n in range(1, len(mark.text))]
        begun = max((len(start) for start in starts if (cue + text).endswith(start)), default=0)
        begun = min(begun, len(last))
        found += [
            ("reasoning", last[: len(last) - begun], False),
            ("begun", last[len(last) - begun :], False),
        ]
    return [each for each in found if each[1]]


def told_by_regex(family: Family, text: str, cue: str = "") -> tuple[str, str]:
    parts: list[list[str]] = []
    starts = ThoughtReader(family.thoughts, cue).state
    is_fresh, is_first = starts == "reasoning", True
    for kind, piece, _ in kinds_by_regex(family, text, cue):
        if kind == "begun":
            continue
        if kind == "header":
            is_fresh, is_first = True, False
        elif parts and parts[-1][0] == kind and not is_fresh:
            parts[-1][1] += piece
        else:
            parts.append([kind, piece, is_fresh or not is_first])
            is_fresh = False
    shown = {"content": [], "reasoning": []}
    for number, (kind, piece, after_mark) in enumerate(parts):
        piece = re.sub("[\ud800-\udfff]", "", piece)
        if after_mark:
            piece = piece.lstrip("\n")
        if kind == "reasoning":
            piece = piece.strip("\n")
        followed = number + 1 < len(parts) or any(
            k == "header" for k, *_ in kinds_by_regex(family, text, cue)
        )
        if kind == "content" and not after_mark and followed and not piece.strip("\n"):
            piece = ""
        if piece:
            shown[kind].append(piece)
    return "\n".join(shown["content"]), "\n".join(shown["reasoning"])


def test_any_cut_of_any_answer_gives_what_the_whole_gives_and_what_marks_say(family):
    rng = random.Random(family.name)
    num_thoughts = 0
    for _ in range(NUM_SPLITS):
        text = an_answer(rng, family)
        cue = rng.choice(["", "", prompt_opens(family), *family.marks])
        whole = told(family, [text], cue)
        assert told(family, pieces_of(rng, text), cue) == whole, (text, cue)
        assert whole == told_by_regex(family, text, cue), (text, cue)
        num_thoughts += bool(whole[1])
        shown = "".join(whole)
        assert not any(0xD800 <= ord(char) < 0xE000 for char in shown)
    assert num_thoughts > NUM_SPLITS / 20


def token_ids_of(family: Family, text: str) -> list[int]:
    """Tokens that are written `text`, halves of pairs included."""
    numbers = {half: number for number, half in family.thoughts.controls.items()}
    parts = re.split("([\ud800-\udfff])", text)
    return [n for part in parts for n in ([numbers[part]] if part in numbers else family.encode(part))]


def token_ids_told(family: Family, token_ids: Sequence[int], stop: Sequence[str] = ()) -> ThoughtStream:
    """A stream that has had them; `shown` is what it gave."""
    stream = ThoughtStream(Thinking(family.thoughts), family.tokens, stop)
    content, reasoning = "", ""
    for token_id in token_ids:
        content += stream.push(token_id)
        reasoning += stream.take_reasoning()
        if stream.matched is not None:
            break
    content += stream.finish()
    stream.shown = (content, reasoning + stream.take_reasoning())  # type: ignore[attr-defined]
    return stream


def test_tokens_give_what_their_text_gives_and_those_of_thoughts_are_counted(family):
    rng = random.Random(family.name)
    total = 0
    for _ in range(200):
        text = an_answer(rng, family)
        if not family.thoughts.controls and "<" in text and "\u65e5" in text:
            text = text.replace("\u65e5", "")
        token_ids = token_ids_of(family, text)
        stream = token_ids_told(family, token_ids)
        assert stream.shown == told(family, [text])
        kinds = "".join(
            ("r" if again else kind[0]) * len(piece.encode("utf-8", "surrogatepass"))
            for kind, piece, again in kinds_by_regex(family, text, "")
        )
        sizes = [
            3 if n in family.thoughts.controls else 1 for n in token_ids
        ]  # a half of a pair is three bytes
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        assert stream.num_thought == sum(kinds[start] == "r" for start in starts), text
        total += stream.num_thought
    assert total > 60


@pytest.mark.parametrize("name", ["qwen3", "gemma4", "text"])
def test_well_formed_answers_are_told_as_mlx_vlm_and_mlx_lm_tell_them(name):
    family, rng = Family(name), random.Random(0)
    start, end = ("<|channel>thought", "<channel|>") if name == "gemma4" else ("<think>", "</think>")
    machine = make_text_state_machine(
        SimpleNamespace(
            has_thinking=True, think_start=start, think_end=end, has_tool_calling=False,
            structural_markers=(), response_transitions={},
        )
    )  # fmt: skip
    for _ in range(100):
        thought, answer = (
            "x" + "".join(rng.choices(["a", " b", "\n", "Größe", "< / >", "日本"], k=rng.randint(1, 9))) + "y"
            for _ in range(2)
        )
        text = f"{start}\n{thought}\n{end}\n\n{answer}"
        ours = told(family, pieces_of(rng, family.written(text)))
        theirs = ThinkingStreamState()
        parts = [theirs.feed(piece) for piece in pieces_of(rng, text)] + [theirs.feed("", last=True)]
        content, reasoning = ("".join(getattr(p, n) or "" for p in parts) for n in ("content", "reasoning"))
        assert ours == (content.strip("\n"), reasoning.strip("\n")) == (answer, thought)
        by_state = {"normal": "", "reasoning": ""}
        state = machine.make_state("normal")
        for piece in pieces_of(rng, text):
            state, segments = machine.split(state, piece)
            for kind, segment in segments:
                by_state[kind] += segment
        assert ours == (by_state["normal"].strip("\n"), by_state["reasoning"].strip("\n"))


def test_a_budget_holds_to_the_token_whatever_is_drawn_and_taken_back(family):
    rng = random.Random(family.name)
    close, num_forced, num_spent = family.thoughts.close_ids, 0, 0
    for _ in range(60):
        size = rng.choice([0, 0, 1, 2, 3, 5, 9])
        cue = token_ids_of(family, prompt_opens(family)) if rng.random() < 0.6 else []
        thinking = Thinking(family.thoughts, tuple(cue), size)
        budget, drawn, forced = ThinkingBudget(thinking, family.tokens), [], []
        wishes = token_ids_of(family, "".join(an_answer(rng, family) for _ in range(3)))
        while wishes or budget.due is not None:
            due = budget.due
            token_id = wishes.pop(0) if due is None else due
            forced.append(due is not None)
            drawn.append(token_id)
            budget.push([token_id])
            if rng.random() < 0.03:
                count = rng.randint(1, min(len(drawn), 60))
                tail = drawn[-count:]
                budget.pop(count)
                again = ThinkingBudget(thinking, family.tokens)
                again.push(drawn[:-count])
                assert budget.due == again.due
                budget.push(tail)
        read = ThoughtTokens(thinking, family.tokens)
        states = []
        for token_id in drawn:
            read.push(token_id)
            states.append(read.state)
            assert read.num_thought <= size
        if any(forced):
            num_forced += 1
            first = forced.index(True)
            if all(forced[first : first + len(close)]):
                num_spent += 1
                before = ThoughtTokens(thinking, family.tokens)
                for token_id in drawn[:first]:
                    before.push(token_id)
                assert before.num_thought + before.num_held == size
                assert tuple(drawn[first : first + len(close)]) == close
                assert states[first + len(close) - 1] != "reasoning"
    assert num_forced > 15
    assert num_spent > 8


def test_a_mark_that_a_row_has_begun_is_gone_on_with():
    family = Family("text")
    for begun in range(1, len("</think>")):
        budget = ThinkingBudget(
            Thinking(family.thoughts, tuple(family.encode("<think>\n")), 3), family.tokens
        )
        drawn = [*family.encode("abc"[: max(3 - begun, 0)]), *family.encode("</think>")[:begun]]
        for token_id in drawn[:3]:
            assert budget.due is None
            budget.push([token_id])
        rest = []
        while budget.due is not None:
            rest.append(budget.due)
            budget.push([budget.due])
        assert family.tokenizer.decode([*drawn[:3], *rest]) == "abc"[: max(3 - begun, 0)] + "</think>"


def test_stop_strings_cut_answers_and_not_thoughts(family):
    opening = (
        "<|channel|>analysis<|message|>"
        if family.name == "gpt_oss"
        else family.thoughts.marks["content"][0].text
    )
    thought = token_ids_of(family, family.written(opening)) + family.encode("first 9.8 then")
    ids = [*thought, *family.thoughts.close_ids, *family.encode("it is 9.8, so")]
    stream = token_ids_told(family, ids, ["9.8"])
    assert stream.shown == ("it is ", "first 9.8 then")
    assert stream.matched == "9.8"


def test_automatic_marks_are_those_of_the_vocabulary_then_of_the_template():
    def named(special=(), added=(), template=CHATML, parser="auto", **marks):
        tokenizer = make_tokenizer(special, added, template)
        found = ThoughtRules(tokenizer, parser, **marks).of(ChatTemplate(tokenizer))
        return found.name if found else None

    assert named() is None
    for name, (_, special, added, _) in list(CASES.items())[:1] + list(CASES.items())[2:5]:
        assert named(special, added) == name
        assert named(special, added, parser="none") is None
    assert named(("<|START_THINKING|>", "<|END_THINKING|>")) == "own"
    assert named(added=("<longcat_think>", "</longcat_think>")) == "own"
    assert named(template=CHATML + "{# <think> and </think> #}") == "qwen3"
    assert named(HARMONY, parser="harmony") == "gpt_oss"
    assert named(start="<a>", end="</a>") == "own"
    assert named(added=("<think>", "</think>"), end="</mull>") == "own"
    for parser in ("gpt_oss", "harmony", "gemma4", "mistral"):
        with pytest.raises(ConfigError, match=f"reasoning_parser: found {parser}"):
            named(parser=parser)
    with pytest.raises(RequestError, match="thinking_end_token: found none"):
        named(start="<a>")
    with pytest.raises(RequestError, match="begins a thought too"):
        named(start="<a>", end="<a>")
    tokenizer = make_tokenizer()
    with pytest.raises(ConfigError, match="thinking_budget: found 5"):
        ThoughtRules(tokenizer).check(ChatTemplate(tokenizer), 5)


def test_words_are_no_marks_where_the_vocabulary_has_a_token():
    family = Family("qwen3")
    spelled = [family.encode(char)[0] for char in "<think>hm</think>"]
    assert token_ids_told(family, spelled).shown == ("<think>hm</think>", "")
    assert token_ids_told(family, family.encode("<think>hm</think>")).shown == ("", "hm")


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for block in m['content'] %}"
    "{% if block['type'] == 'text' %}{{ block['text'] }}{% elif block['type'] == 'thinking' %}"
    "{{ '[THINK]' + block['thinking'] + '[/THINK]' }}{% else %}{{ raise_exception('only text and thinking') }}"
    "{% endif %}{% endfor %}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""In the style of Magistral's and Ministral's."""
TRL = Path(str(metadata.distribution("trl").locate_file("trl/chat_templates")))
HISTORY = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First.", "reasoning_content": "Thought of one"},
    {"role": "user", "content": "Two?"},
]
CONTROL = re.compile(r"<\|[\w\u2581]+\|>|<\uff5c[\w\u2581]+\uff5c>|<\|\w+>|<\w+\|>|\[/?[A-Z]+\]")
TEMPLATES = {
    # name: (where an answer begins, and where it does if told not to think; whether an earlier thought is shown)
    "qwen3": ("content", "content", False),
    "qwen3_5_think": ("reasoning", "content", False),
    "qwen3_8": ("reasoning", "content", True),
    "deepseek_r1_distill": ("reasoning", None, False),
    "gemma4": ("content", "content", False),
    "gptoss": ("header", None, False),
    "nemotron_3_nano": ("reasoning", "content", False),
    "mistral": ("content", None, True),
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_real_templates_tell_where_an_answer_begins_and_what_becomes_of_earlier_thoughts(name):
    source = MISTRAL if name == "mistral" else (TRL / f"{name}.jinja").read_text(encoding="utf-8")
    special = sorted(
        {
            *re.findall(r"<\|[\w\u2581]+\|>|<\uff5c[\w\u2581]+\uff5c>|<\|\w+>|<\w+\|>|\[/?[A-Z]+\]", source),
            *HARMONY[5:],
        }
    )
    special = [each for each in special if each not in ENDS and ("gptoss" in name or each not in HARMONY)]
    tokenizer = make_tokenizer(
        sorted(special), ["<think>", "</think>"] if "<think>" in source else [], source
    )
    template = ChatTemplate(tokenizer)
    thoughts, tokens = ThoughtRules(tokenizer).of(template), TokenBytes(tokenizer)
    assert thoughts is not None
    starts, quiet, keeps = TEMPLATES[name]
    for variables, expected in (({}, starts), ({"enable_thinking": False}, quiet)):
        if expected is None:
            continue
        ids = template.render(HISTORY, variables=variables)
        thinking = Thinking(thoughts, thoughts.cue(ids, template.end_ids))
        assert ThoughtTokens(thinking, tokens).state == expected, tokenizer.decode(ids)
    assert ("Thought of one" in tokenizer.decode(template.render(HISTORY))) == keeps
    renamed = [
        {"reasoning" if key == "reasoning_content" else key: value for key, value in m.items()}
        for m in HISTORY
    ]
    assert template.render(renamed) == template.render(HISTORY)
