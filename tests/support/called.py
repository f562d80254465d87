"""Answers that call tools: read in pieces, cut at random, and drawn at random from what a grammar lets through."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from thinkers import Family
from transformers import AutoTokenizer

from serve.constraints.grammar import compile_grammar
from serve.constraints.spec import ConstraintSpec
from serve.constraints.vocabulary import GrammarVocabulary
from serve.engine.thinking import Thinking, ThoughtStream
from serve.model.token_bytes import TokenBytes
from serve.tools.call import Call, add_pieces
from serve.tools.format import ToolFormat
from serve.tools.grammar import calls_grammar
from serve.tools.reader import ToolReader
from serve.tools.rules import ToolMarks
from serve.tools.tool import Tool


def read(
    format: ToolFormat,
    tools: Sequence[Tool],
    pieces: Sequence[str],
    *,
    is_cut: bool = False,
    is_single: bool = False,
) -> tuple[str, list[tuple[str, str, str]]]:
    numbers = iter(range(10_000))
    reader = ToolReader(format, tools, lambda _: f"id{next(numbers)}", is_single=is_single)
    text, calls = "", list[Call]()
    for found in (*map(reader.push, pieces), reader.finish(is_cut=is_cut)):
        text += found.text
        add_pieces(calls, found.calls)
    return text, [(call.id, call.name, call.arguments) for call in calls]


def split(text: str, rng: random.Random) -> list[str]:
    at = sorted(rng.choices(range(len(text) + 1), k=rng.choice([0, 1, 2, 5, 20])))
    return [text[begin:end] for begin, end in zip([0, *at], [*at, len(text)], strict=True)]


def heard(format: ToolFormat, answer: str) -> str:
    """What a reader of calls gets of an answer: where headers tell thoughts from calls, they are read before."""
    if format.writing.headers is None:
        return answer
    family = Family(format.name)
    stream = ThoughtStream(Thinking(family.thoughts, tells_calls=True), family.tokens)
    cue = "<|start|>assistant"
    return "".join(map(stream.push, family.encode(cue + answer))) + stream.finish()


class Held:
    """Answers of a random vocabulary that are held to one format's calls."""

    def __init__(self, folder, format: ToolFormat, *, is_special: bool) -> None:
        """is_special: the format's marks are special tokens, as far as they can be."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if is_special:
            marks = [text for text in format.texts if text[:1] in "<[" and not set(text) & set(" =\n")]
            tokenizer.add_special_tokens({"additional_special_tokens": marks})
        wrapper = TokenizerWrapper(tokenizer)
        special = {
            token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        special = {
            text: number for text, number in special.items() if any(text in mark for mark in format.texts)
        }
        self._tokenizer = tokenizer
        self._marks = ToolMarks(format, frozenset(special.values()), (), special)
        self._vocabulary = GrammarVocabulary(wrapper, TokenBytes(wrapper), len(tokenizer))
        self._shown = TokenBytes(wrapper).showing(self._marks.shown_ids)

    def answers(self, tools: Sequence[Tool], rng: random.Random, count: int, begun: str = "", **asked):
        """So many, each drawn from what may follow `begun`. asked: as calls_grammar takes it."""
        text = calls_grammar(self._marks, tools, **asked)
        grammar = compile_grammar(ConstraintSpec("grammar", text, "tools"), self._vocabulary)
        ids = self._tokenizer.encode(begun, add_special_tokens=False)
        for _ in range(count):
            yield walked(grammar, self._vocabulary, self._shown, ids, rng)


def walked(
    grammar, vocabulary: GrammarVocabulary, shown: TokenBytes, begun: Sequence[int], rng: random.Random
) -> str:
    """An answer that the grammar lets through: random, but that it likes to come to an end."""
    matcher, ids = grammar.matcher(), list(begun)
    assert matcher.consume_tokens(ids), "the beginning is not let through"
    special = {number for number in range(vocabulary.size) if number in vocabulary.silent and shown[number]}
    while not matcher.is_stopped():
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = [number for number in np.flatnonzero(mask).tolist() if number != vocabulary.end_id]
        if matcher.is_accepting() and len(ids) > len(begun) and (not allowed or rng.random() < 0.5):
            break
        ending = [n for n in allowed if n in special or shown[n] in (b'"', b"}", b"<", b"\n", b")", b"]")]
        likes_ends = ending and rng.random() < (0.6 if len(ids) < 300 else 0.95)
        ids.append(rng.choice(ending if likes_ends else allowed))
        assert matcher.consume_token(ids[-1])
        assert len(ids) < 3000, "it comes to no end"
    return b"".join(shown[number] for number in ids).decode("utf-8", "replace")
