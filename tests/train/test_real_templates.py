"""What the loss counts, held against real chat templates: those that the package trl ships as data, marked by hand.

For most there is a twin with `{% generation %}` around what the model writes. Rows go through the same path as in
`lathe data show`; the reference is transformers' own rendering of the twin. Where the supervised text differs from
the marked one, it does so by the rules of `DIFFERENCES`, which says for which family, and why.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from serve.model.template import ChatTemplate
from serve.model.template_rules import TemplateRules
from train.data.rows import Rules, parse_row
from train.data.rules import TokenRules
from train.data.tokens import tokenize_row, whole_rows
from train.recipe.recipe import DatasetSource, Recipe

FOLDER = Path(str(metadata.distribution("trl").locate_file("trl/chat_templates")))
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
CONTROL = re.compile(
    r"<\|[\w▁]+\|>|<\uff5c[\w▁]+\uff5c>|<\|\w+>|<\w+\|>|<(?:s|/s|bos|sop|start_of_turn|end_of_turn|end_of_utterance)>|\[gMASK\]"
)
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
THOUGHT = re.compile(r"(?:<think>)?\s*</think>\s*")
MARKUP = re.compile(r"</?(?:think|tool_call|tool_response)>")
ENDS = {  # by the beginning of a name: (what the tokenizer calls eos, what else ends a turn of such a model)
    "cohere": ("<|END_OF_TURN_TOKEN|>", ()),
    "deepseek": ("<\uff5cend▁of▁sentence\uff5c>", ()),
    "diffusion_gemma": ("<turn|>", ("<|tool_response>",)),
    "gemma4": ("<turn|>", ("<|tool_response>",)),
    "gemma": ("<eos>", ("<end_of_turn>",)),
    "glm4moe": ("<|endoftext|>", ("<|user|>", "<|observation|>")),
    "gptoss": ("<|return|>", ("<|call|>",)),
    "idefics3": ("<end_of_utterance>", ()),
    "lfm2": ("<|im_end|>", ()),
    "llama3": ("<|end_of_text|>", ("<|eot_id|>",)),
    "llava_next": ("</s>", ()),
    "muse_glimmer": ("<|eot|>", ()),
    "nemotron": ("<|im_end|>", ()),
    "phi3": ("<|endoftext|>", ("<|end|>",)),
    "qwen": ("<|im_end|>", ()),
    "smolvlm": ("<end_of_utterance>", ()),
}
CALL = {
    "id": "callnine9",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"place": "Reykjavik", "days": 3}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks it up.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def user(words: str) -> dict:
    return {"role": "user", "content": words}


def answer(words: str | None, **more) -> dict:
    return {"role": "assistant", "content": words, **more}


RESULT = {"role": "tool", "content": "Rain until Friday.", "tool_call_id": "callnine9", "name": "look_up"}
ROWS = {
    "plain": {"messages": [user("Question one?"), answer("Fine words.")]},
    "two turns": {
        "messages": [
            user("Question one?"),
            answer("Fine words."),
            user("Question two?"),
            answer("Other words."),
        ]
    },
    "system": {
        "messages": [
            {"role": "system", "content": "Rules hold."},
            user("Question one?"),
            answer("Fine words."),
        ]
    },
    "tool call": {
        "messages": [
            user("Question one?"),
            answer("", tool_calls=[CALL]),
            RESULT,
            answer("It rains."),
        ],
        "tools": [TOOL],
    },
    "null content": {
        "messages": [user("Question one?"), answer(None, tool_calls=[CALL])],
        "tools": [TOOL],
    },
    "reasoning": {
        "messages": [user("Question one?"), answer("Fine words.", reasoning_content="Thinking about it.")]
    },
    "assistant first": {
        "messages": [answer("Hello there."), user("Question one?"), answer("Fine words.")],
    },
}
HEADER = "the marks begin before the prompt does that is served"
FIRST_STOP = "the marks go on after the first token at which the engine stops"
END = "the marks stop before the token that ends the turn"
HISTORY = "the twin keeps an empty thought where the template itself drops it: before the last question"
FIRST_TOKEN = "nothing stands before a row's first token, from which it could be predicted"
DIFFERENCES: dict[str, tuple[str, ...]] = {  # why -> beginnings of names
    HEADER: ("gptoss", "muse_glimmer", "nemotron", "qwen2_5", "qwen3_5", "qwen3_6", "qwen3_8"),
    FIRST_STOP: ("phi3",),
    END: ("diffusion_gemma",),
    HISTORY: ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"),
    FIRST_TOKEN: ("llava_next",),
}
REFUSED = {  # a prompt that opens a thought, which rows without one cannot go on from
    "deepseek_r1_distill": {"plain", "two turns", "system", "assistant first"},
    "deepseekv3": {"plain", "two turns", "system", "assistant first", "tool call", "null content"},
}
WRONG = {  # opens the model's turn anew after a tool's result, but not in the prompt
    "diffusion_gemma": {"tool call"},
}
RIGHT = 0.97
"""Share of the rows that the twin can say and that are not refused for an open thought."""


@dataclass(frozen=True)
class Family:
    """A template with its twin, and a tokenizer that has its control tokens."""

    name: str
    twin: str | None
    template: ChatTemplate
    marked: ChatTemplate | None
    """The twin's."""
    tokenizer: TokenizerWrapper
    stops: frozenset[int]

    @property
    def drops_thoughts(self) -> bool:
        """Of turns before the last question, where its twin keeps them."""
        return self.name in ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")


def family(name: str) -> Family:
    base = name.removesuffix("_training")
    own = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    marked = FOLDER / f"{base}_training.jinja"
    twin = marked.read_text(encoding="utf-8") if marked.exists() else own if MARKED.search(own) else None
    eos, others = next(ends for beginning, ends in ENDS.items() if base.startswith(beginning))
    bos = "<|begin_of_text|>" if base.startswith(("llama", "muse")) else "<bos>"
    special = sorted({*CONTROL.findall(own + (twin or "")), eos, *others, bos, "<|begin_of_text|>"})
    markup = sorted(set(MARKUP.findall(own + (twin or ""))))
    vocab = {t: n for n, t in enumerate([*special, *markup, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in markup])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=own, eos_token=eos, bos_token=bos
    )
    stops = frozenset(fast.convert_tokens_to_ids([eos, *others]))
    tokenizer = TokenizerWrapper(fast)
    marked = ChatTemplate(with_template(tokenizer, twin)) if twin else None
    return Family(name, twin, ChatTemplate(tokenizer), marked, tokenizer, stops)


def with_template(tokenizer: TokenizerWrapper, source: str) -> TokenizerWrapper:
    inner = copy.copy(tokenizer._tokenizer)
    inner.chat_template = source
    return TokenizerWrapper(inner)


# The reference: what the twin marks


def marked_turns(family: Family, row: dict) -> list[tuple[str, int, int]] | None:
    """Of each assistant turn: (conversation up to and with it, where its marks begin, where they end).

    None if the twin cannot say the row.
    """
    for parts in (False, True):
        for as_text in (False, True):
            for keeps_empty in (True, False):
                messages = [_in_form(m, parts, as_text, keeps_empty) for m in row["messages"]]
                found = _marked_turns(family, messages, row)
                if found is not None:
                    return found
    return None


def _in_form(message: dict, parts: bool, as_text: bool, keeps_empty: bool) -> dict:
    message = json.loads(json.dumps(message))
    for call in message.get("tool_calls") or () if as_text else ():
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    if message.get("tool_calls") and not message["content"]:
        message["content"] = ""
        if not keeps_empty:
            del message["content"]
    elif parts and isinstance(message["content"], str):
        message["content"] = [{"type": "text", "text": message["content"]}]
    return message


def _marked_turns(family: Family, messages: list[dict], row: dict) -> list[tuple[str, int, int]] | None:
    found = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            text, marks = _rendered(family, messages[: index + 1], row)
        except Exception:
            if index:
                return None
            try:
                text, marks = _rendered(family, messages, row)
            except Exception:
                return None
            marks = [(a, b) for a, b in marks if b < text.index("Question one?")]
        try:
            before = _rendered(family, messages[:index], row)[0] if index else ""
        except Exception:
            before = ""
        pairs = enumerate(zip(before, text, strict=False))
        begin = next((i for i, (a, b) in pairs if a != b), len(before))
        marks = [(a, b) for a, b in marks if b > begin]
        learned = "".join(text[a:b] for a, b in marks)
        if not _says(row["messages"][index], learned):
            return None
        found.append((text, marks[0][0], marks[-1][1]))
    return found


def _rendered(family: Family, messages: list[dict], row: dict) -> tuple[str, list[tuple[int, int]]]:
    texts, marks = render_jinja_template(
        conversations=[messages],
        tools=row.get("tools"),
        chat_template=family.twin,
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        **family.tokenizer.special_tokens_map,
    )
    return texts[0], [(int(a), int(b)) for a, b in marks[0]]


def _says(message: dict, text: str) -> bool:
    said = [message.get("content") or "", message.get("reasoning_content") or ""]
    if message.get("tool_calls"):
        said += ["look_up", "place", "Reykjavik", "days", "3"]
    return all(words in text for words in said)


# The rows as they are trained


@dataclass(frozen=True)
class Trained:
    """A row's sequences; or the problem for which it has none."""

    texts: tuple[str, ...] = ()
    """Of each supervised span: its text."""
    last_ids: tuple[int, ...] = ()
    problem: str = ""
    begins: bool = True
    """Whether each sequence begins with the prompt as served."""


def train(family: Family, kind: str) -> Trained:
    row = ROWS[kind]
    recipe = Recipe(model="m", data="d", max_seq_length=100_000)
    example = parse_row(row, Rules.of(recipe, DatasetSource(path="d")), "rows.jsonl", 1)
    template, rules = family.template, TokenRules.of(recipe, TemplateRules())
    outcome = tokenize_row(example, template, rules)
    if outcome.problems or outcome.dropped:
        return Trained(problem="; ".join([*outcome.problems, *outcome.dropped]))
    texts, ends, begins = [], [], True
    for sequence in whole_rows(example, template, rules):
        ids, mask = sequence.token_ids.tolist(), [*sequence.is_target.tolist(), False]
        starts = [i for i in range(len(ids)) if mask[i] and not (i and mask[i - 1])]
        for start in starts:
            stop = next(i for i in range(start, len(mask)) if not mask[i])
            texts.append(family.tokenizer.decode(ids[start:stop]))
            ends.append(ids[stop - 1])
        turns = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant" and i]
        options = {"tools": row.get("tools"), "variables": outcome.told}
        prompts = [template.render(row["messages"][:i], **options) for i in turns]
        is_served = any(tuple(ids[: len(prompt)]) == prompt for prompt in prompts)
        # Nothing is served before a conversation's first turn.
        begins = begins and (is_served or (len(texts) == 1 and kind == "assistant first"))
    return Trained(tuple(texts), tuple(ends), begins=begins)


def expected(family: Family, kind: str) -> tuple[str, set[str]] | None:
    """(what the twin marks in this row, as far as it can be served and stopped at; the rules that took part)."""
    row = ROWS[kind]
    turns = marked_turns(family, row) if family.twin else None
    if turns is None:
        return None
    indices = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    stops = [family.tokenizer.decode([number]) for number in sorted(family.stops)]
    texts, rules = [], set()
    for index, (text, begin, end) in zip(indices, turns, strict=True):
        served = _served(family.marked, row, index, text)
        if begin < served:
            rules.add(HEADER)
            begin = served
        if index == 0 and begin == 0:
            rules.add(FIRST_TOKEN)
            begin = 1
        learned = text[begin:end].rstrip()
        if index == 0 and family.drops_thoughts and (thought := THOUGHT.match(learned)):
            rules.add(HISTORY)
            learned = learned[thought.end() :]
        closing = re.search(f"(?:{'|'.join(map(re.escape, stops))})", learned)
        if closing is not None and closing.end() < len(learned):
            rules.add(FIRST_STOP)
            learned = learned[: closing.end()]
        elif closing is None:
            rules.add(END)
            after = re.match(rf"\s*(?:{'|'.join(map(re.escape, stops))})", text[end:])
            learned += after.group() if after else ""
        texts.append(learned)
    return "".join(texts), rules


def _served(twin: ChatTemplate, row: dict, index: int, text: str) -> int:
    """Where the prompt ends, as served, of turn `index` in what the twin makes of it."""
    for variables in ({}, {"enable_thinking": False}):
        if variables.keys() - twin.variables:
            continue
        if index:
            prompt = twin.write(row["messages"][:index], tools=row.get("tools"), variables=variables).text
            if text.startswith(prompt):
                return len(prompt)
            continue
        # Nothing is served before the first turn: what would open it after a question stands before its words.
        opening = twin.write([user("Q?")], variables=variables).text.rpartition("Q?")[2]
        starts = [i for i in range(len(opening)) if opening[i] in "<A"]
        for begin in starts:
            if opening[begin:] in text[: text.index("Hello there.")]:
                return text.index(opening[begin:]) + len(opening[begin:])
    return 0


@dataclass(frozen=True)
class Verdict:
    """What became of a row: right, wrong, refused, or unsayable by the twin, and why."""

    kind: str
    why: str = ""
    rules: frozenset[str] = frozenset()


def verdict(family: Family, kind: str) -> Verdict:
    reference, trained = expected(family, kind), train(family, kind)
    if reference is None and family.twin:
        return Verdict("unsayable", trained.problem or repr(trained.texts))
    if trained.problem:
        return Verdict("refused", trained.problem)
    text, rules = "".join(trained.texts), frozenset(reference[1] if reference else ())
    if reference is not None and text != reference[0]:
        return Verdict("wrong", f"{text!r} is not {reference[0]!r}", rules)
    if not trained.begins:
        return Verdict("wrong", "a sequence does not begin with the prompt as served", rules)
    if not set(trained.last_ids) <= family.stops:
        return Verdict("wrong", f"{trained.texts!r} do not all end where the engine stops", rules)
    if any(words in text for words in ("Question", "Rules hold", "You are", "Rain until", "<bos>")):
        return Verdict("wrong", f"{text!r} has words of another turn", rules)
    return Verdict("right", rules=rules)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, dict[str, Verdict]]:
    """Of each template and kind of row."""
    families = {name: family(name) for name in NAMES}
    return {name: {kind: verdict(families[name], kind) for kind in ROWS} for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_what_the_loss_counts_is_what_the_marks_say_or_differs_for_a_reason_that_stands_here(name, verdicts):
    base = name.removesuffix("_training")
    found = verdicts[name]
    refused = {kind for kind, verdict in found.items() if verdict.kind == "refused"}
    assert refused == REFUSED.get(base, set()), found
    assert all("opens a thought (<think>)" in found[kind].why for kind in refused)
    wrong = {kind: verdict.why for kind, verdict in found.items() if verdict.kind == "wrong"}
    assert wrong.keys() == WRONG.get(name, set()), wrong
    for rule in frozenset().union(*(verdict.rules for verdict in found.values())):
        assert base.startswith(DIFFERENCES[rule]), rule


def test_no_reason_stands_here_that_no_template_needs(verdicts):
    needed = {
        (rule, beginning)
        for name, found in verdicts.items()
        for verdict in found.values()
        for rule in verdict.rules
        for beginning in DIFFERENCES[rule]
        if name.startswith(beginning)
    }
    assert needed == {
        (rule, beginning) for rule, beginnings in DIFFERENCES.items() for beginning in beginnings
    }


def test_nearly_all_rows_that_a_marked_template_can_say_are_right(verdicts):
    kinds = [
        verdict.kind
        for name, found in verdicts.items()
        for verdict in found.values()
        if (FOLDER / f"{name.removesuffix('_training')}_training.jinja").exists() or name.startswith("lfm2")
    ]
    right, wrong = kinds.count("right"), kinds.count("wrong")
    assert right >= 300
    assert right / (right + wrong) >= RIGHT
