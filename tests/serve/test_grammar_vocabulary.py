"""What masks let through is what answers show, whatever the tokenizer is like."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizer_kinds import KINDS, byte_fallback
from tokenizers import AddedToken, Tokenizer, decoders

from serve.constraints.edit import GrammarEdit
from serve.constraints.grammar import compile_grammar
from serve.constraints.spec import ConstraintSpec
from serve.constraints.vocabulary import GrammarVocabulary
from serve.engine.text import TextStream
from serve.model.token_bytes import TokenBytes

PATTERNS = ["( ?(Paris|the|a|é|日本|🌍|1)){2,5}", " (Paris|x)( the)?\\.?", "[^\\n]{1,4}", "(the|a) x{0,2}<?"]


@pytest.fixture(params=list(KINDS))
def tokenizer(request) -> Tokenizer:
    """One of each kind, with a control token and an added word."""
    tokenizer = KINDS[request.param]()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> SimpleNamespace:
    """What is taken of mlx_lm's TokenizerWrapper."""
    python = SimpleNamespace(backend_tokenizer=tokenizer)
    return SimpleNamespace(_tokenizer=python, eos_token_ids=[tokenizer.token_to_id("<|end|>")])


@pytest.mark.parametrize("begins", [True, False])
def test_random_answers_read_as_their_pattern(tokenizer, begins):
    rng = random.Random(0)
    whole = wrapped(tokenizer)
    tokens = TokenBytes(whole)
    size = tokenizer.get_vocab_size() + 3  # logits have room for more
    vocabulary = GrammarVocabulary(whole, tokens, size)
    num_ended = num_stuck = 0
    for pattern in PATTERNS:
        grammar = compile_grammar(ConstraintSpec("regex", pattern), vocabulary)
        for _ in range(40):
            edit = GrammarEdit(grammar, whole.eos_token_ids, begins_text=begins)
            stream = TextStream(tokens, follows=None if begins else [1])
            text = ""
            while edit.length is None:
                change = edit.change()
                assert change is not None or edit.length is not None
                if change is None:
                    break
                bits = np.unpackbits(change.allowed.view(np.uint8), bitorder="little")[:size]
                allowed = np.flatnonzero(bits)
                if not allowed.size:  # an error of the row; this vocabulary has no such text
                    num_stuck += 1
                    break
                token_id = int(rng.choice(allowed))
                edit.advance([token_id])
                if token_id in whole.eos_token_ids:
                    break
                text += stream.push(token_id)
            else:
                num_ended += 1
                text += stream.finish()
                assert re.fullmatch(pattern, text), (pattern, text)
                continue
            if allowed.size:
                num_ended += 1
                text += stream.finish()
                assert re.fullmatch(pattern, text), (pattern, text)
    if begins and isinstance(tokenizer.decoder, decoders.WordPiece):
        assert num_ended == 0, (
            "no token says at a text's beginning what it says elsewhere: such rows end by an error"
        )
    else:
        assert num_ended > num_stuck


def test_where_a_special_token_must_come_no_other_may_and_nothing_that_is_no_token(tokenizer):
    """Logits of real models have room for more tokens than there are."""
    tokenizer.add_special_tokens([AddedToken("<|mark|>", special=True)])
    whole = wrapped(tokenizer)
    size, mark = tokenizer.get_vocab_size() + 9, tokenizer.token_to_id("<|mark|>")
    vocabulary = GrammarVocabulary(whole, TokenBytes(whole), size)
    grammar = compile_grammar(ConstraintSpec("grammar", f"start: <[{mark}]> /.+/"), vocabulary)
    edit = GrammarEdit(grammar, [])
    bits = np.unpackbits(edit.change().allowed.view(np.uint8), bitorder="little")[:size]
    assert np.flatnonzero(bits).tolist() == [mark]


@pytest.mark.parametrize("strips", [True, False])
def test_only_tokenizers_that_leave_the_first_space_out_have_other_firsts(strips):
    tokenizer = byte_fallback(strips)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    whole = wrapped(tokenizer)
    vocabulary = GrammarVocabulary(whole, TokenBytes(whole), tokenizer.get_vocab_size())
    assert (vocabulary.firsts is not None) == strips
    if strips:
        token_id = tokenizer.token_to_id("▁the")
        assert not vocabulary.firsts[token_id // 32] >> token_id % 32 & 1
