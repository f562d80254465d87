"""Rerank and score over HTTP: the order is the scores', by cross-encoders and by vectors alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from embedders import write_classifier, write_embedder
from sentence_transformers import CrossEncoder

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

QUERY = "my lamp is broken"
DOCUMENTS = ["The lamp arrived broken.", "a", "Where is my parcel?", "lamp", "broken lamps, all of them"]
PROMPTS = {"query": "find: ", "document": "text: "}
BODY = {"query": QUERY, "documents": DOCUMENTS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judges")


@pytest.fixture(scope="module")
def near(folders: Path) -> Any:
    """The oracle of vectors."""
    return write_embedder(folders / "near", "bert", prompts=PROMPTS)


@pytest.fixture(scope="module")
def http(folders: Path, near: Any, model_folder: Path) -> Iterator[httpx.Client]:
    for family in ("bert", "xlm-roberta", "qwen3"):
        write_classifier(folders / family, family)
    names = ("near", "bert", "xlm-roberta", "qwen3")
    models = [{"name": name, "model": str(folders / name)} for name in names]
    config = ServeConfig(model=str(model_folder), name="lively", embedding_models=models)
    runtime = Runtime.start(config)
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client
    finally:
        runtime.close()


def asked(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def scores_of(told: dict[str, Any]) -> list[float]:
    return [each["relevance_score"] for each in sorted(told["results"], key=lambda each: each["index"])]


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "qwen3"])
def test_the_best_documents_come_first_by_the_cross_encoder(
    name: str, http: httpx.Client, folders: Path
) -> None:
    told = asked(http, "/v1/rerank", model=name, **BODY)
    found = [each["relevance_score"] for each in told["results"]]
    assert found == sorted(found, reverse=True)
    assert {each["index"] for each in told["results"]} == {*range(5)}
    assert all(each["document"] == {"text": DOCUMENTS[each["index"]]} for each in told["results"])
    if name == "bert":  # of the others CrossEncoder is given types that their networks have none of
        wanted = CrossEncoder(str(folders / name), device="cpu").predict(
            [(QUERY, each) for each in DOCUMENTS]
        )
        np.testing.assert_allclose(scores_of(told), wanted, atol=2e-5)
    pairs = asked(http, "/v1/score", model=name, text_1=QUERY, text_2=DOCUMENTS)["data"]
    np.testing.assert_allclose([each["score"] for each in pairs], scores_of(told), atol=1e-5)


def test_an_embedding_model_ranks_by_cosine_with_the_prompt_of_either_side(
    http: httpx.Client, near: Any
) -> None:
    wanted = near.similarity(near.encode_query([QUERY]), near.encode_document(DOCUMENTS))[0].numpy()
    np.testing.assert_allclose(scores_of(asked(http, "/v1/rerank", model="near", **BODY)), wanted, atol=2e-5)
    plain = near.similarity(near.encode([QUERY]), near.encode(DOCUMENTS))[0].numpy()
    assert np.abs(wanted - plain).max() > 1e-3


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_every_path_of_rerank_answers_alike(path: str, http: httpx.Client) -> None:
    told = asked(http, path, model="bert", **BODY, top_n=2)
    assert told["results"] == asked(http, "/v1/rerank", model="bert", **BODY)["results"][:2]
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] > 0


def test_documents_may_be_objects_and_be_left_out_of_the_answer(http: httpx.Client) -> None:
    whole = asked(http, "/v1/rerank", model="bert", **BODY)
    body = {**BODY, "documents": [{"text": text} for text in DOCUMENTS], "query": {"text": QUERY}}
    bare = asked(http, "/v1/rerank", model="bert", **body, return_documents=False, top_n=0)
    assert [{k: v for k, v in each.items() if k != "document"} for each in whole["results"]] == bare[
        "results"
    ]


def test_two_documents_alike_have_one_score_and_keep_their_order(http: httpx.Client) -> None:
    told = asked(http, "/v1/rerank", model="near", query=QUERY, documents=["lamp", "a", "lamp"])
    alike = [each["index"] for each in told["results"] if each["index"] != 1]
    assert alike == [0, 2]


def test_one_text_is_scored_against_each_or_pair_by_pair(http: httpx.Client) -> None:
    path = "/score"
    each = asked(http, path, model="bert", text_1=QUERY, text_2=DOCUMENTS)["data"]
    pairs = asked(http, path, model="bert", text_1=[QUERY] * 5, text_2=DOCUMENTS)["data"]
    named = asked(http, path, model="bert", queries=QUERY, documents=DOCUMENTS)["data"]
    alone = [
        asked(http, path, model="bert", text_1=QUERY, text_2=text)["data"][0]["score"] for text in DOCUMENTS
    ]
    for found in (pairs, named):
        np.testing.assert_allclose([one["score"] for one in found], [one["score"] for one in each], atol=1e-5)
    np.testing.assert_allclose([one["score"] for one in each], alone, atol=1e-5)
    assert [one["index"] for one in each] == [*range(5)]


def test_a_document_that_is_too_long_is_cut_where_that_is_asked_for(http: httpx.Client) -> None:
    long = {"query": QUERY, "documents": ["d" * 500, "a"]}
    answer = http.post("/v1/rerank", json={"model": "bert", **long})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    cut = asked(http, "/v1/rerank", model="bert", **long, truncate_prompt_tokens=-1)
    same = asked(http, "/v1/rerank", model="bert", query=QUERY, documents=["d" * (128 - 20), "a"])
    np.testing.assert_allclose(scores_of(cut), scores_of(same), atol=1e-5)


@pytest.mark.parametrize("model", ["bert", "qwen3", "near"])
@pytest.mark.parametrize(
    ("path", "names"), [("/v2/rerank", ("query", "documents")), ("/v1/score", ("text_1", "text_2"))]
)
def test_beginnings_of_queries_and_documents_are_read_where_that_is_asked_for(
    http: httpx.Client, path: str, names: tuple[str, str], model: str
) -> None:
    def scores(query: str, documents: list[str], **fields: Any) -> list[float]:
        told = asked(http, path, model=model, **dict(zip(names, (query, documents), strict=True)), **fields)
        return scores_of(told) if "results" in told else [each["score"] for each in told["data"]]

    bounds = {"max_tokens_per_query": 4, "max_tokens_per_doc": 3}
    cut = scores("abcdefgh", ["xyz" + "w" * 400, "a", "xyzv"], **bounds, truncate_prompt_tokens=-1)
    np.testing.assert_allclose(cut, scores("abcd", ["xyz", "a", "xyz"]), atol=1e-5)
    assert max(cut) - min(cut) > 1e-3
    whole = scores("abcdefgh", ["xyzw"], max_tokens_per_query=0, max_tokens_per_doc=0)
    np.testing.assert_allclose(whole, scores("abcdefgh", ["xyzw"]), atol=1e-5)


@pytest.mark.parametrize("num_chars", [500, 100_000])
@pytest.mark.parametrize("model", ["bert", "qwen3", "near"])
def test_a_text_that_is_too_long_is_named_where_it_stands(
    http: httpx.Client, model: str, num_chars: int
) -> None:
    long = "d" * num_chars
    for path, fields, place in (
        ("/v1/rerank", {"query": "a", "documents": ["a", long]}, "documents.1"),
        ("/v1/rerank", {"query": long, "documents": ["a"]}, "query"),
        ("/v1/score", {"text_1": "a", "text_2": ["a", "b", long]}, "text_2.2"),
        ("/v1/score", {"queries": [long], "documents": "a"}, "queries.0"),
    ):
        answer = http.post(path, json={"model": model, **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == place.partition(".")[0]
        assert f"However, {place} " in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/rerank", {"documents": []}, "documents"),
        ("/v1/rerank", {"documents": ["a"] * 2049}, "documents"),
        ("/v1/rerank", {"documents": [3]}, "documents"),
        ("/v1/rerank", {"documents": [{"text": "a", "title": "b"}]}, "documents"),
        ("/v1/rerank", {"top_n": -1}, "top_n"),
        ("/v1/rerank", {"model": None}, "model"),
        ("/v1/rerank", {"model": "lively"}, "model"),
        ("/v1/rerank", {"model": "nobody"}, "model"),
        ("/v1/rerank", {"instruction": "be kind"}, "instruction"),
        ("/v1/rerank", {"rank_fields": ["title"]}, "rank_fields"),
        ("/v1/rerank", {"max_tokens_per_doc": -1}, "max_tokens_per_doc"),
        ("/v1/rerank", {"max_tokens_per_query": -1}, "max_tokens_per_query"),
        ("/v1/score", {"query": None, "documents": None}, "text_1"),
        ("/v1/score", {"query": None, "documents": None, "text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("/v1/score", {"query": None, "documents": None, "text_1": "a", "text_2": []}, "text_2"),
        ("/v1/score", {"query": None, "documents": ["a"], "text_1": "a", "text_2": "b"}, "text_2"),
    ],
    ids=lambda value: str(value)[:48],
)
def test_what_cannot_be_ranked_is_refused_by_the_field(
    path: str, fields: dict[str, Any], param: str, http: httpx.Client
) -> None:
    told = {key: value for key, value in {"model": "bert", **BODY, **fields}.items() if value is not None}
    answer = http.post(path, json=told)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param, answer.text
