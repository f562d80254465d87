"""Embeddings over HTTP: OpenAI's shapes, batches of many requests, what is refused and how, clients that leave."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from embedders import write_classifier, write_embedder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

TEXTS = ["The lamp arrived broken.", "a", "Where is my parcel? It was due on Monday."]
PROMPTS = {"query": "find: ", "document": "text: "}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A BERT of sentence-transformers, in a folder that `tiny` serves."""
    folder = tmp_path_factory.mktemp("embedders") / "tiny"
    return write_embedder(folder, "bert", prompts=PROMPTS, is_matryoshka=True), folder


@pytest.fixture(scope="module")
def served(
    oracle: Any, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Runtime, httpx.Client]]:
    folders = tmp_path_factory.mktemp("others")
    write_embedder(folders / "last", "qwen3", pooling="lasttoken", dense=[(16, None)], normalize=False)
    write_classifier(folders / "judge", "bert")
    config = ServeConfig(
        model=str(model_folder),
        name="lively",
        embedding_models=[
            {"name": "tiny", "model": str(oracle[1])},
            {"name": "last", "model": str(folders / "last")},
            {"name": "judge", "model": str(folders / "judge")},
        ],
        embedding_piece_tokens=96,
    )
    runtime = Runtime.start(config)
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
            yield runtime, http
    finally:
        runtime.close()


@pytest.fixture
def http(served: tuple[Runtime, httpx.Client]) -> httpx.Client:
    return served[1]


@pytest.fixture
def client(http: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)


def embed(http: httpx.Client, input: Any, **fields: Any) -> np.ndarray:
    body = {"model": "tiny", "input": input, **fields}
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert [each["index"] for each in told["data"]] == [*range(len(told["data"]))]
    return np.array([each["embedding"] for each in told["data"]])


def refused(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code in (400, 404), answer.text
    return {**answer.json()["error"], "status": answer.status_code}


def test_openai_s_client_reads_the_vectors_of_sentence_transformers(
    client: openai.OpenAI, oracle: Any
) -> None:
    wanted = oracle[0].encode(TEXTS)
    as_base64 = client.embeddings.create(model="tiny", input=TEXTS)  # its own default
    as_float = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    for answer in (as_base64, as_float):
        np.testing.assert_allclose([each.embedding for each in answer.data], wanted, atol=2e-5)
    # A byte a token, and one at each end.
    assert as_float.usage.prompt_tokens == sum(len(text.encode()) + 2 for text in TEXTS)
    assert as_float.usage.total_tokens == as_float.usage.prompt_tokens
    assert as_float.model == "tiny"


def test_base64_is_the_same_numbers_in_little_endian_floats(http: httpx.Client) -> None:
    body = {"model": "tiny", "input": TEXTS[0], "encoding_format": "base64"}
    told = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    packed = np.frombuffer(base64.b64decode(told), "<f4")
    assert packed.shape == (32,)
    np.testing.assert_allclose(packed, embed(http, TEXTS[0])[0], atol=1e-6)


def test_text_and_tokens_alone_and_in_lists_give_the_same_vectors(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"model": "tiny", "prompt": TEXTS[0]}).json()["tokens"]
    whole = embed(http, TEXTS[0])
    for input in ([TEXTS[0]], tokens, [tokens]):
        np.testing.assert_allclose(embed(http, input), whole, atol=1e-6)


def test_each_model_answers_under_its_own_name(http: httpx.Client) -> None:
    assert embed(http, "a", model="last").shape == (1, 16)
    assert embed(http, "a").shape == (1, 32)


def test_a_prompt_s_name_puts_its_text_before_each_input(http: httpx.Client) -> None:
    asked = embed(http, TEXTS, prompt_name="query")
    np.testing.assert_allclose(asked, embed(http, [f"find: {text}" for text in TEXTS]), atol=1e-6)
    assert np.abs(asked - embed(http, TEXTS)).max() > 0.01
    error = refused(http, "/v1/embeddings", model="tiny", input="a", prompt_name="quarry")
    assert error["param"] == "prompt_name"
    assert "query" in error["message"]
    assert "document" in error["message"]


def test_dimensions_cut_a_vector_and_make_it_one_again(http: httpx.Client) -> None:
    whole, cut = embed(http, TEXTS), embed(http, TEXTS, dimensions=8)
    wanted = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, wanted, atol=1e-6)
    assert embed(http, "a", model="last", dimensions=16).shape == (1, 16)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"dimensions": 33}, "dimensions", "have 32"),
        ({"model": "last", "dimensions": 8}, "dimensions", "embedding_models"),
        ({"input": []}, "input", "empty"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": [260]}, "input", "0 to 259"),
        ({"input": [-1]}, "input", "0 to 259"),
        ({"input": [1, "a"]}, "input", ""),
        ({"input": {"text": "a"}}, "input", ""),
        ({"input": "x" * 63}, "input", "maximum context length is 64 tokens. However, your input has 65"),
        ({"input": "x" * 200_000}, "input", "maximum context length is 64"),
        ({"input": [5] * 65}, "input", "65 tokens"),
        ({"truncate_prompt_tokens": 65}, "truncate_prompt_tokens", "64"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"encoding_format": "hex"}, "encoding_format", ""),
        ({"model": "lively"}, "model", "generates text"),
        ({"model": "judge"}, "model", "does not give embeddings"),
        ({"model": "nobody"}, "model", "tiny, last"),
        ({"inputs": "a"}, "inputs", "unknown field; did you mean input"),
        ({"input_type": "query"}, "input_type", "prompt_name"),
        ({"task": "retrieval.query"}, "task", "prompt_name"),
        ({"stream": True}, "stream", "only null or false"),
        ({"input": "", "add_special_tokens": False}, "input", "no tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_encoded_is_refused_by_the_field(
    http: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refused(http, "/v1/embeddings", **{"model": "tiny", "input": "a", **fields})
    assert error["param"] == param
    assert words in error["message"]


def test_vectors_have_length_one_or_their_own_where_that_is_asked_for(
    http: httpx.Client, oracle: Any
) -> None:
    own = SentenceTransformer(modules=[each for each in oracle[0] if not isinstance(each, Normalize)])
    np.testing.assert_allclose(embed(http, TEXTS, normalize=False), own.encode(TEXTS), atol=2e-5)
    np.testing.assert_array_equal(embed(http, TEXTS, normalize=True), embed(http, TEXTS))
    raw = embed(http, TEXTS, model="last")
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
    unit = embed(http, TEXTS, model="last", normalize=True)
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
    cut = embed(http, TEXTS, normalize=False, dimensions=8)
    np.testing.assert_allclose(cut, own.encode(TEXTS)[:, :8], atol=2e-5)


def test_what_is_too_long_is_cut_where_that_is_asked_for(http: httpx.Client) -> None:
    long = "".join(chr(97 + i % 26) for i in range(100))
    first = embed(http, long[:62])
    np.testing.assert_allclose(embed(http, long, truncate_prompt_tokens=-1), first, atol=1e-6)
    np.testing.assert_allclose(embed(http, long, truncate_prompt_tokens=10), embed(http, long[:8]), atol=1e-6)
    last = embed(http, long, truncate_prompt_tokens=10, truncation_side="left")
    np.testing.assert_allclose(last, embed(http, long[-8:]), atol=1e-6)


def test_an_error_of_length_says_that_it_is_one(http: httpx.Client) -> None:
    assert refused(http, "/v1/embeddings", model="tiny", input="x" * 99)["code"] == "context_length_exceeded"


def test_an_embedding_model_does_not_chat(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    assert "/v1/embeddings" in refused(http, "/v1/chat/completions", **body)["message"]


def test_models_lists_them(http: httpx.Client) -> None:
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert cards["tiny"]["max_model_len"] == 64
    assert cards["tiny"]["dimensions"] == 32
    assert http.get("/v1/models/judge").json()["task"] == "score"


def test_many_requests_share_pieces_and_get_their_own_vectors(served: tuple[Runtime, httpx.Client]) -> None:
    http = served[1]
    texts = [f"{i} " + "word " * (i % 9) for i in range(48)]
    whole = np.concatenate([embed(http, text) for text in texts])
    before = _metric(http, "lathe_encoded_pieces_total")

    async def all_at_once() -> list[np.ndarray]:
        async with httpx.AsyncClient(base_url=http.base_url, timeout=60) as client:
            bodies = [{"model": "tiny", "input": texts[i : i + 3]} for i in range(0, 48, 3)]
            answers = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for body in bodies))
        return [np.array([each["embedding"] for each in answer.json()["data"]]) for answer in answers]

    np.testing.assert_allclose(np.concatenate(asyncio.run(all_at_once())), whole, atol=1e-5)
    assert _metric(http, "lathe_encoded_pieces_total") - before < 48
    assert _metric(http, "lathe_encoded_texts_total") >= 96


def test_streams_and_texts_run_beside_each_other(served: tuple[Runtime, httpx.Client]) -> None:
    runtime, http = served
    chat = {
        "model": "lively",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 48,
        "temperature": 0,
        "ignore_eos": True,
    }
    alone = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    steps = runtime.worker.stats().num_steps

    async def both() -> tuple[Any, Any]:
        async with httpx.AsyncClient(base_url=http.base_url, timeout=60) as client:
            return await asyncio.gather(
                client.post("/v1/chat/completions", json=chat),
                client.post("/v1/embeddings", json={"model": "tiny", "input": ["x" * 60] * 200}),
            )

    said, embedded = asyncio.run(both())
    assert said.json()["choices"][0]["message"]["content"] == alone
    assert len(embedded.json()["data"]) == 200
    assert runtime.worker.stats().num_steps - steps >= 48


def test_a_client_that_leaves_takes_its_texts_along(served: tuple[Runtime, httpx.Client]) -> None:
    http = served[1]
    left = _metric(http, 'lathe_encode_requests_total{endpoint="embeddings",finish="cancelled",model="tiny"}')
    body = json.dumps({"model": "tiny", "input": ["x" * 60] * 2048}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    before = _metric(http, "lathe_encoded_texts_total")
    with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
        connection.sendall(head + body)
        while not _metric(http, "lathe_encode_waiting"):
            pass
    name = 'lathe_encode_requests_total{endpoint="embeddings",finish="cancelled",model="tiny"}'
    while _metric(http, name) == left:
        pass
    assert _metric(http, "lathe_encode_waiting") == 0
    assert _metric(http, "lathe_encoded_texts_total") - before < 2048


def _metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)
