"""Faults that others had with embeddings and rerankers, tried here: each by what went wrong, and where it was told.

In test_embed_models: batches that differ from single texts (vllm 15393, llm2vec 68), scores of Qwen3-Reranker
(vllm 21681). In test_api_embeddings: vectors in another's place (ollama 6187), base64 that is not honoured
(text-embeddings-inference 288, tabbyAPI 268), tokens as input (aoai-api-simulator 87). In test_embed_desk: a text
longer than a piece, which never ran (text-embeddings-inference 723).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serve as serve  # before mlx: it brings a real BLAS

import torch  # isort: skip
import transformers
from embedders import FAMILIES, LANGUAGE, SIZES, ended_tokenizer, loud, write_backbone, write_embedder

from serve.embed.config import EmbeddingModelConfig
from serve.embed.model import Embedder, Length, load_text_model

CLOSE = 2e-5


def opened(folder: Path, **settings: Any) -> Embedder:
    model = load_text_model(EmbeddingModelConfig(name="tiny", model=str(folder), **settings))
    assert isinstance(model, Embedder)
    return model


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("pad", [0, 1])
def test_the_longest_text_has_a_position_for_each_token(family: str, pad: int, tmp_path: Path) -> None:
    """text-embeddings-inference 28: XLM-R's positions begin behind the padding's, so two of 514 are no text's."""
    network, _, _ = FAMILIES[family]
    config = network.config_class(**{**SIZES, "pad_token_id": pad, "bos_token_id": 1 - pad})
    oracle = loud(network(config))
    oracle.save_pretrained(tmp_path)
    ended_tokenizer().save_pretrained(tmp_path)
    model = opened(tmp_path)
    assert model.max_tokens == (128 if family == "bert" else 128 - pad - 1)
    tokens = [4 + i % 250 for i in range(model.max_tokens)]
    with torch.no_grad():
        wanted = oracle(torch.tensor([tokens])).last_hidden_state.mean(dim=1)
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(model.run([model.ids(tokens, Length())]), wanted, atol=CLOSE)


def test_a_tokenizer_that_pads_and_cuts_by_itself_is_not_asked_to(tmp_path: Path) -> None:
    """fastembed 703: gte-base's tokenizer.json pads to 128, all-MiniLM's cuts there too."""
    folder = write_backbone(tmp_path / "bert", "bert")
    plain = opened(folder)
    texts = ["a", "x" * 60]
    wanted = plain.run([plain.text(text, Length()) for text in texts])
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    told["padding"] = {
        **{"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    }
    told["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(told))
    model = opened(folder)
    rows = [model.text(text, Length()) for text in texts]
    assert [len(row.token_ids) for row in rows] == [3, 62]
    np.testing.assert_allclose(model.run(rows), wanted, atol=CLOSE)


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u0000", "<pad>", "</s><s>", "\U0001f9e9" * 20, "ﷺ"])
def test_odd_texts_are_embedded_as_the_library_does(text: str, tmp_path: Path) -> None:
    """sycamore 943 and others: an empty or blank text fails the whole request."""
    oracle = write_embedder(tmp_path / "made", "bert")
    model = opened(tmp_path / "made")
    row = model.text(text, Length(model.max_tokens))
    np.testing.assert_allclose(model.run([row]), oracle.encode([text]), atol=CLOSE)


def test_every_text_of_a_list_is_cut(tmp_path: Path) -> None:
    """text-embeddings-inference 52, 56: of a list none was."""
    model = opened(write_backbone(tmp_path / "bert", "bert"), truncate=True)
    assert model.truncates
    rows = [model.text("x" * n, Length(16)) for n in (5, 50, 500)]
    assert [len(row.token_ids) for row in rows] == [7, 16, 16]
    assert all(row.token_ids[-1] == 2 for row in rows), "the last token is the one that ends a text"


def test_a_row_is_not_moved_by_what_stands_in_its_padding(tmp_path: Path) -> None:
    """A padding's state may be anything, and 0 · NaN is NaN."""
    folder = write_backbone(tmp_path / "qwen3", "qwen3")
    model = opened(folder, pooling="mean")
    short, long = model.text("ab", Length()), model.text("y" * 60, Length())
    np.testing.assert_allclose(model.run([short, long])[:1], model.run([short]), atol=CLOSE)


def test_a_language_model_saved_with_its_head_and_one_without_are_one(tmp_path: Path) -> None:
    """Qwen3-Embedding's weights have no `model.` before their names, others' do."""
    config = transformers.Qwen3Config(**LANGUAGE, tie_word_embeddings=False)
    torch.manual_seed(0)
    whole = loud(transformers.Qwen3ForCausalLM(config))
    for name, network in (("whole", whole), ("bare", whole.model)):
        network.save_pretrained(tmp_path / name)
        ended_tokenizer(begins=False).save_pretrained(tmp_path / name)
    found = []
    for name in ("whole", "bare"):
        model = opened(tmp_path / name)
        found.append(model.run([model.text("The lamp arrived broken.", Length())]))
    np.testing.assert_allclose(*found, atol=CLOSE)
