"""Tokens as bytes, over the kinds of tokenizers: random ids never raise, and join to the decoder's own text."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from tokenizer_kinds import KINDS, WORDS, byte_fallback
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

from serve.api.logprobs import LogprobWriter
from serve.engine.request import TokenLogprob
from serve.engine.text import TextStream
from serve.model.token_bytes import TokenBytes

NUM_SEQUENCES = 10_000


def wrapped(tokenizer: Tokenizer) -> SimpleNamespace:
    """What TokenBytes takes of mlx_lm's TokenizerWrapper."""
    return SimpleNamespace(_tokenizer=SimpleNamespace(backend_tokenizer=tokenizer))


@pytest.fixture(params=list(KINDS))
def tokenizer(request) -> Tokenizer:
    """One of each kind, with a control token and an added word."""
    tokenizer = KINDS[request.param]()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def random_ids(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """A few tokens: words, or bytes in a row, or any, sometimes an id that no token has."""
    if rng.random() < 0.4:
        return tokenizer.encode(rng.choice(["", " "]).join(rng.choices(WORDS, k=rng.randint(1, 6)))).ids
    size = tokenizer.get_vocab_size()
    bytes_first = rng.random() < 0.5
    return [
        rng.randrange(1, 257)
        if bytes_first and rng.random() < 0.7 and size > 257
        else rng.randrange(size + 2)
        for _ in range(rng.randint(1, 12))
    ]


def text_of(tokens: TokenBytes, ids, follows=None) -> str:
    stream = TextStream(tokens, follows=follows)
    pieces = [stream.push(token_id) for token_id in ids]
    return "".join(pieces) + stream.finish()


def test_random_tokens_never_raise_and_join_to_what_the_tokenizer_decodes(tokenizer):
    rng, tokens = random.Random(0), TokenBytes(wrapped(tokenizer))
    num_whole = 0
    for _ in range(NUM_SEQUENCES):
        ids = random_ids(rng, tokenizer)
        text, whole = text_of(tokens, ids), tokenizer.decode(ids, skip_special_tokens=True)
        if "\ufffd" not in whole or isinstance(tokenizer.decoder, decoders.ByteLevel):
            num_whole += 1
            assert text == whole, ids
        else:
            # A decoder with byte fallback gives up a whole run of bytes for one that is wrong; a stream cannot wait.
            assert "\ufffd" in text, ids
    assert num_whole > NUM_SEQUENCES / 10


def test_a_run_of_bytes_that_is_no_character_goes_on_with_a_replacement():
    tokenizer = byte_fallback(strips=True)
    tokens = TokenBytes(wrapped(tokenizer))
    ids = [
        tokenizer.token_to_id(name) for name in ("<0x0A>", "<0xE2>", "▁Paris", "<0xE2>", "<0x82>", "<0xAC>")
    ]
    assert text_of(tokens, ids) == "\n\ufffd Paris€"


def test_prompt_and_completion_join_to_what_both_decode_to(tokenizer):
    rng, tokens = random.Random(1), TokenBytes(wrapped(tokenizer))
    num_compared = 0
    for _ in range(NUM_SEQUENCES // 4):
        prompt, answer = random_ids(rng, tokenizer), random_ids(rng, tokenizer)
        before, both = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + answer))
        if "\ufffd" not in both and "\ufffd" not in before:
            num_compared += 1
            assert before + text_of(tokens, answer, follows=prompt) == both, (prompt, answer)
    assert num_compared > NUM_SEQUENCES / 80


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("character", ["é", "日", "🌍"])
def test_a_prompt_that_ends_in_half_a_character_is_completed_by_the_answer(kind, character):
    tokenizer = KINDS[kind]()
    tokens = TokenBytes(wrapped(tokenizer))
    names = [f"<0x{byte:02X}>" for byte in character.encode()]
    if kind == "byte-level":
        names = list(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(character)[0][0])
    ids = [tokenizer.token_to_id(name) for name in names]
    word = tokenizer.token_to_id("a")
    for cut in range(1, len(ids)):
        prompt, answer = [word, *ids[:cut]], [*ids[cut:], word]
        assert text_of(tokens, answer, follows=prompt) == f"{character}a"
        entries = [TokenLogprob(token_id, -1.0) for token_id in answer]
        written = LogprobWriter(tokens, prompt).chat(entries)["content"]
        assert bytes(byte for entry in written for byte in entry["bytes"]).decode() == f"{character}a"


@pytest.mark.parametrize("follows", [None, "prompt"])
def test_logprob_entries_join_to_the_bytes_of_the_text_and_their_offsets_index_it(tokenizer, follows):
    rng, tokens = random.Random(2), TokenBytes(wrapped(tokenizer))
    for _ in range(NUM_SEQUENCES // 10):
        prompt = random_ids(rng, tokenizer) if follows else None
        ids = random_ids(rng, tokenizer)
        text = text_of(tokens, ids, prompt)
        entries = [TokenLogprob(token_id, -1.0, ((token_id, -1.0), (5, -2.0))) for token_id in ids]
        chat = LogprobWriter(tokens, prompt).chat(entries)["content"]
        joined = b"".join(bytes(entry["bytes"]) for entry in chat)
        assert joined.decode("utf-8", "replace") == text
        assert "\ufffd" in text or joined == text.encode()
        assert all(entry["bytes"] == entry["top_logprobs"][0]["bytes"] for entry in chat)
        completion = LogprobWriter(tokens, prompt).completion(entries)
        for name, offset in zip(completion["tokens"], completion["text_offset"], strict=True):
            assert 0 <= offset <= len(text)
            assert name in ("<|end|>", "") or "\\x" in name or text.startswith(name, offset)


def test_half_characters_and_special_tokens_have_names_of_their_own(tokenizer):
    tokens = TokenBytes(wrapped(tokenizer))
    end = tokenizer.token_to_id("<|end|>")
    assert (tokens[end], tokens.name(end, b""), tokens.special_id("<|end|>")) == (b"", "<|end|>", end)
    assert tokens[tokenizer.token_to_id("<tool>")].strip() == b"<tool>"
    assert tokens.special_id("<tool>") is None
    everything = [tokens[i] for i in range(tokenizer.get_vocab_size())]
    halves = [data for data in everything if data.decode("utf-8", "ignore").encode() != data]
    names = [tokens.name(0, data) for data in halves]
    assert len(set(names)) == len(names)
    assert all("\\x" in name for name in names)
