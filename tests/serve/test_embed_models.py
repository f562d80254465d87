"""Vectors and scores are those of transformers and sentence-transformers, for every family, pooling and batch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serve as serve  # before mlx: it brings a real BLAS

import torch  # isort: skip
import transformers
from embedders import CLASSIFIERS, FAMILIES, ended_tokenizer, write_backbone, write_classifier, write_embedder
from sentence_transformers import CrossEncoder

from serve.embed.config import EmbeddingModelConfig
from serve.embed.model import (
    PREFIX,
    SUFFIX,
    Classifier,
    Embedder,
    Length,
    Scorer,
    Side,
    YesNo,
    load_text_model,
)
from serve.errors import ContextLengthError, ModelError, RequestError

pytestmark = pytest.mark.long
TEXTS = ["a", "The lamp arrived broken.", "Ünïcode ☂ und mehr", "x" * 40, "one two three four five six seven"]
PAIRS = [("lamp", "The lamp arrived broken."), ("lamp", "a"), ("where?", "x" * 30), ("ü", "☂ und mehr " * 3)]
CLOSE = 2e-5
"""What other products round differently; a wrong mask or position moves these vectors by 0.01 and more."""
CAUSAL = ("qwen3", "qwen2", "llama")
ENDLESS = Length()


def sides(query: str, document: str) -> tuple[Side, Side]:
    return Side(query, "query"), Side(document, "documents.0")


def opened(folder: Path, **settings: Any) -> Any:
    return load_text_model(EmbeddingModelConfig(name="tiny", model=str(folder), **settings))


def vectors(model: Embedder, texts: list[str], prompt: str = "") -> np.ndarray:
    return model.run([model.text(text, ENDLESS, prompt=prompt) for text in texts])


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_sentence_transformers_also_of_texts_beside_longer_ones(
    family: str, tmp_path: Path
) -> None:
    pooling = "lasttoken" if family in CAUSAL else "mean"
    wanted = write_embedder(tmp_path / "made", family, pooling=pooling).encode(TEXTS)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01
    model = opened(tmp_path / "made")
    together = vectors(model, TEXTS)
    np.testing.assert_allclose(together, wanted, atol=CLOSE)
    alone = np.concatenate([vectors(model, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=CLOSE)


POOLINGS = ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("cls", "max", "mean")]


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_every_pooling_is_sentence_transformers(pooling: Any, normalize: bool, tmp_path: Path) -> None:
    wanted = write_embedder(tmp_path / "made", "bert", pooling=pooling, normalize=normalize).encode(TEXTS)
    np.testing.assert_allclose(vectors(opened(tmp_path / "made"), TEXTS), wanted, atol=CLOSE, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_a_prompt_is_left_out_of_a_vector_where_the_folder_says_so(pooling: Any, tmp_path: Path) -> None:
    oracle = write_embedder(tmp_path / "made", "bert", pooling=pooling, include_prompt=False)
    wanted = oracle.encode(TEXTS, prompt="find: ")
    model = opened(tmp_path / "made")
    np.testing.assert_allclose(vectors(model, TEXTS, "find: "), wanted, atol=CLOSE)
    if pooling != "lasttoken":
        with_it = vectors(model, [f"find: {text}" for text in TEXTS])
        assert np.abs(with_it - wanted).max() > 1e-3


def test_layers_behind_the_pooling_are_sentence_transformers(tmp_path: Path) -> None:
    nn = torch.nn
    for number, activation in enumerate(
        (nn.Tanh(), nn.Identity(), nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Sigmoid())
    ):
        folder = tmp_path / str(number)
        wanted = write_embedder(folder, "bert", dense=[(48, activation), (16, None)]).encode(TEXTS)
        np.testing.assert_allclose(vectors(opened(folder), TEXTS), wanted, atol=CLOSE)


def test_prompts_are_named_and_a_default_stands_before_all(tmp_path: Path) -> None:
    prompts = {"query": "find: ", "passage": "text: "}
    oracle = write_embedder(tmp_path / "made", "bert", prompts=prompts, default_prompt="passage")
    model = opened(tmp_path / "made")
    for name, wanted in ((None, oracle.encode(TEXTS)), ("query", oracle.encode(TEXTS, prompt_name="query"))):
        np.testing.assert_allclose(vectors(model, TEXTS, model.prompt(name)), wanted, atol=CLOSE)
    assert model.side(("query",)) == "find: "
    assert model.side(("document", "passage")) == "text: "
    with pytest.raises(RequestError, match="query"):
        model.prompt("quarry")


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_a_text_that_is_cut_is_cut_as_sentence_transformers_cuts_it(family: str, tmp_path: Path) -> None:
    oracle = write_embedder(tmp_path / "made", family)
    model = opened(tmp_path / "made")
    long = "".join(map(chr, random.Random(0).choices(range(97, 123), k=300)))
    row = model.text(long, Length(model.max_tokens))
    assert len(row.token_ids) == model.max_tokens == 64
    np.testing.assert_allclose(model.run([row]), oracle.encode([long]), atol=CLOSE)
    with pytest.raises(ContextLengthError, match="64 tokens"):
        model.text(long, ENDLESS)


def test_a_folder_without_a_word_is_pooled_by_what_it_is(tmp_path: Path) -> None:
    encoder, language = write_backbone(tmp_path / "bert", "bert"), write_backbone(tmp_path / "qwen3", "qwen3")
    assert opened(encoder).modes == ("mean",)
    assert opened(language).modes == ("last",)
    np.testing.assert_allclose(np.linalg.norm(vectors(opened(language), TEXTS), axis=1), 1, atol=1e-5)
    assert opened(encoder, pooling="cls").modes == ("cls",)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_of_pairs_are_transformers(family: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "made", family)
    network, tokenizer = (
        CLASSIFIERS[family][0].from_pretrained(folder),
        ended_tokenizer(begins=CLASSIFIERS[family][1]),
    )
    model = opened(folder)
    assert isinstance(model, Classifier)
    wanted = []
    for pair in PAIRS:
        inputs = tokenizer(*pair, return_tensors="pt")
        if family != "bert":
            inputs.pop("token_type_ids")
        with torch.no_grad():
            wanted.append(torch.sigmoid(network(**inputs).logits[0, 0]).item())
    assert np.ptp(wanted) > 0.01
    rows = [model.pair(*sides(*pair), ENDLESS, None) for pair in PAIRS]
    np.testing.assert_allclose(model.run(rows)[:, 0], wanted, atol=CLOSE)
    np.testing.assert_allclose([model.run([row])[0, 0] for row in rows], wanted, atol=CLOSE)


def test_a_cross_encoder_s_own_activation_is_used(tmp_path: Path) -> None:
    told = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    folder = write_classifier(tmp_path / "made", "bert", **told)
    wanted = CrossEncoder(str(folder), device="cpu").predict(PAIRS)
    model = opened(folder)
    found = model.run([model.pair(*sides(*pair), ENDLESS, None) for pair in PAIRS])[:, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(found).max() > 1 or found.min() < 0  # no sigmoid


def test_of_a_pair_that_is_too_long_the_document_is_cut(tmp_path: Path) -> None:
    model = opened(write_classifier(tmp_path / "made", "bert"), max_tokens=32)
    row = model.pair(*sides("query", "d" * 100), Length(32), None)
    whole = model.pair(*sides("query", "d" * 24), ENDLESS, None)
    assert row == whole
    assert len(row.token_ids) == 32
    with pytest.raises(ContextLengthError):
        model.pair(*sides("query", "d" * 100), ENDLESS, None)
    with pytest.raises(RequestError, match="no room for a document"):
        model.pair(*sides("q" * 40, "d"), Length(32), None)


def yes_no_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = ended_tokenizer(begins=False, ends=False)
    tokenizer.add_tokens(["yes", "no"])
    return tokenizer


def test_a_language_model_judges_by_how_much_surer_it_is_of_yes(tmp_path: Path) -> None:
    config = FAMILIES["qwen3"][1]()
    config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings = 264, 512, False
    torch.manual_seed(0)
    network = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        network.lm_head.weight.normal_(0, 0.5)
    tokenizer = yes_no_tokenizer()
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = opened(tmp_path, kind="yes_no")
    assert isinstance(model, YesNo)
    wanted = []
    for query, document in PAIRS:
        asked = f"{PREFIX}<Instruct>: Judge.\n<Query>: {query}\n<Document>: {document}{SUFFIX}"
        ids = tokenizer.encode(asked, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logits = network(ids).logits[0, -1, tokenizer.convert_tokens_to_ids(["no", "yes"])]
        wanted.append(torch.softmax(logits, 0)[1].item())
    assert np.ptp(wanted) > 0.01
    rows = [model.pair(*sides(*pair), ENDLESS, "Judge.") for pair in PAIRS]
    np.testing.assert_allclose(model.run(rows)[:, 0], wanted, atol=CLOSE)
    cut = model.pair(*sides("lamp", "d" * 900), Length(500), None)
    assert len(cut.token_ids) == 500
    assert tokenizer.decode(cut.token_ids).endswith(SUFFIX)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config.json": {"hidden_act": "relu"}}, "hidden_act"),
        ({"config.json": {"position_embedding_type": "relative_key"}}, "position_embedding_type"),
        ({"config.json": {"model_type": "mpnet_of_tomorrow"}}, "mpnet_of_tomorrow"),
        ({"1_Pooling/config.json": {"pooling_mode": "median"}}, "median"),
        ({"modules.json": [{"type": "sentence_transformers.models.LSTM", "path": ""}]}, "LSTM"),
        ({"modules.json": [{"type": "sentence_transformers.models.Router", "path": ""}]}, "Router"),
        ({"2_Dense/config.json": {"activation_function": "torch.nn.modules.activation.Mish"}}, "Mish"),
        ({"config_sentence_transformers.json": {"similarity_fn_name": "angle"}}, "angle"),
        ({"model.safetensors": None}, "no .safetensors"),
        ({"2_Dense/model.safetensors": None}, "model.safetensors"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_computed_here_is_refused_by_name(changes: dict, words: str, tmp_path: Path) -> None:
    write_embedder(tmp_path / "made", "bert", dense=[(16, None)])
    opened(tmp_path / "made")
    for name, change in changes.items():
        file = tmp_path / "made" / name
        if change is None:
            file.unlink()
        elif isinstance(change, list):
            file.write_text(json.dumps(change))
        else:
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=words):
        opened(tmp_path / "made")


def test_what_is_asked_of_a_folder_that_is_not_it_is_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "two", "bert", num_labels=2)
    with pytest.raises(ModelError, match="2 labels"):
        opened(folder)
    with pytest.raises(ModelError, match="no classifier"):
        opened(write_backbone(tmp_path / "bert", "bert"), kind="classifier")
    with pytest.raises(ModelError, match="default_prompt"):
        opened(write_backbone(tmp_path / "other", "bert"), default_prompt="query")


def test_a_scorer_is_no_embedder(tmp_path: Path) -> None:
    assert isinstance(opened(write_classifier(tmp_path / "made", "bert")), Scorer)
