"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any, NamedTuple

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from serve.api.body import CLIENT_CLOSED_REQUEST, JsonRoute
from serve.api.embedding_schemas import EmbeddingBody
from serve.api.generation import new_id
from serve.api.leaving import ClientGoneError, unless_gone
from serve.api.state import AppState, StateDep
from serve.api.texts import Texts
from serve.embed.model import Embedder, Encoded, Rows

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingBody, http: Request, state: StateDep) -> Response:
    """OpenAI's embeddings, of texts or of tokens; vLLM's `truncate_prompt_tokens` and `add_special_tokens` beside
    them."""
    try:
        found = await embedded(state, http, body)
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    # Thousands of vectors are written for a while: not on the loop that serves everyone.
    written = await anyio.to_thread.run_sync(lambda: _written(body, *found))
    return Response(written, media_type="application/json")


class Embedded(NamedTuple):
    """What texts became."""

    model: Embedder
    vectors: Rows
    num_tokens: int
    """Of all texts."""


async def embedded(state: AppState, http: Request, body: EmbeddingBody) -> Embedded:
    """The vectors of a body's inputs, in their order. ClientGoneError if the client has left meanwhile."""
    texts = state.texts
    model = texts.find(body.model, Embedder, "embeddings")
    async with texts.counted("embeddings", model):
        return await unless_gone(http.receive, _embedded(texts, model, body))


async def _embedded(texts: Texts, model: Embedder, body: EmbeddingBody) -> Embedded:
    model.check_dimensions(body.dimensions)
    rows = await texts.tokenize(lambda: _rows(model, body))
    vectors = model.cut(await texts.encode(model, rows), body.dimensions, body.normalize)
    return Embedded(model, vectors, sum(len(row.token_ids) for row in rows))


def _rows(model: Embedder, body: EmbeddingBody) -> list[Encoded]:
    length = body.length(model.max_tokens, model.truncates)
    prompt = "" if body.prompt_name == "" else model.prompt(body.prompt_name)
    adds_special = body.add_special_tokens is not False
    rows = [
        model.text(each, length, prompt=prompt, adds_special=adds_special)
        if isinstance(each, str)
        else model.ids(each, length)
        for each in body.inputs
    ]
    return rows if body.normalize is None else [replace(row, normalize=body.normalize) for row in rows]


def _written(body: EmbeddingBody, model: Embedder, vectors: Rows, num_tokens: int) -> bytes:
    values: list[Any]
    if body.encoding_format == "base64":
        values = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    else:
        values = vectors.tolist()
    return json.dumps(
        {
            "id": new_id("embd"),
            "object": "list",
            "model": model.name,
            "data": [
                {"object": "embedding", "index": index, "embedding": value}
                for index, value in enumerate(values)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        },
        separators=(",", ":"),
    ).encode()
