"""Streamed text: pieces join to the whole, half characters wait, stop strings never show."""

from __future__ import annotations

import pytest

from serve.engine.text import TextStream
from serve.model.token_bytes import TokenBytes

TEXT = "  Grüße 🌍, naïve 日本語 text\n\nand more."


def pieces(model, text: str, stop=()) -> tuple[list[str], TextStream]:
    stream = TextStream(TokenBytes(model.tokenizer), stop)
    out = []
    for token in model.tokenizer.encode(text):
        out.append(stream.push(token))
        if stream.is_stopped:
            return out, stream
    return [*out, stream.finish()], stream


def test_pieces_join_to_the_whole_and_hold_no_half_character(model):
    out, _ = pieces(model, TEXT)
    assert "".join(out) == TEXT
    assert not any("\ufffd" in piece for piece in out)
    assert len([piece for piece in out if piece]) > 20


@pytest.mark.parametrize("stop", ["\n\n", "日本", "text\n\nand", "🌍", "more."])
def test_text_ends_right_before_the_stop_string(model, stop):
    out, stream = pieces(model, TEXT, [stop])
    assert stream.is_stopped
    assert "".join(out) == TEXT[: TEXT.index(stop)]


def test_the_first_of_several_stop_strings_wins_and_near_misses_come_through(model):
    out, stream = pieces(model, "ab abc abcd", ["abcd", "zzz"])
    assert "".join(out) == "ab abc "
    out, stream = pieces(model, "ab abc abc", ["abcd"])
    assert "".join(out) == "ab abc abc"
    assert not stream.is_stopped


def test_an_answer_that_ends_inside_a_character_says_so(model):
    stream = TextStream(TokenBytes(model.tokenizer))
    tokens = model.tokenizer.encode("a🌍")
    text = "".join(stream.push(token) for token in tokens[:-1]) + stream.finish()
    assert text.startswith("a")
    assert text[1:] == "\ufffd" * len(text[1:]) != ""
