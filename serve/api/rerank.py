"""POST /v1/rerank and /v1/score: how well documents answer a query, by a model that reads both together, or by how
near their vectors are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve.api.body import CLIENT_CLOSED_REQUEST, JsonRoute
from serve.api.embedding_schemas import PairsBody, RerankBody, ScoreBody
from serve.api.generation import new_id
from serve.api.leaving import ClientGoneError, unless_gone
from serve.api.state import StateDep
from serve.api.texts import Texts
from serve.embed.model import DOCUMENT, QUERY, Embedder, Encoded, Scorer, Side, TextModel
from serve.errors import RequestError

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/rerank")
@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
async def rerank(body: RerankBody, http: Request, state: StateDep) -> Response:
    """Cohere's, Jina's and vLLM's rerank: the best documents first."""
    texts = state.texts
    model = texts.find(body.model, TextModel, "scores")
    documents = body.texts
    try:
        async with texts.counted("rerank", model):
            work = _scores(texts, model, body)
            scores, num_tokens = await unless_gone(http.receive, work)
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
    if body.return_documents is not False:
        results = [{**each, "document": {"text": documents[each["index"]]}} for each in results]
    return JSONResponse(
        {"id": new_id("rerank"), "model": model.name, "usage": _usage(num_tokens), "results": results}
    )


@router.post("/v1/score")
@router.post("/score", include_in_schema=False)
async def score(body: ScoreBody, http: Request, state: StateDep) -> Response:
    """vLLM's score: one text against each of several, or pair by pair."""
    texts = state.texts
    model = texts.find(body.model, TextModel, "scores")
    try:
        async with texts.counted("score", model):
            work = _scores(texts, model, body)
            scores, num_tokens = await unless_gone(http.receive, work)
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(
        {
            "id": new_id("score"),
            "object": "list",
            "created": int(time.time()),
            "model": model.name,
            "data": [
                {"index": index, "object": "score", "score": value} for index, value in enumerate(scores)
            ],
            "usage": _usage(num_tokens),
        }
    )


async def _scores(texts: Texts, model: TextModel, body: PairsBody) -> tuple[list[float], int]:
    """Of each pair; and how many tokens were read."""
    length, instruction = body.length(model.max_tokens, model.truncates), body.instruction
    pairs = await texts.tokenize(lambda: _beginnings(model, body))
    if isinstance(model, Scorer):
        rows = await texts.tokenize(lambda: [model.pair(*pair, length, instruction) for pair in pairs])
        found = await texts.encode(model, rows)
        return [float(score) for score in found[:, 0]], _num_tokens(rows)
    assert isinstance(model, Embedder)
    if instruction is not None:
        raise RequestError(f"instruction: {model.name!r} is an embedding model and takes none", "instruction")
    # Texts that are the same are read once, and errors name the first of them.
    queries = {query.text: query for query, _ in reversed(pairs)}
    documents = {document.text: document for _, document in reversed(pairs)}

    def rows_of_sides() -> list[Encoded]:
        return [
            model.text(side.text, length, prompt=prompt, place=side.place)
            for sides, prompt in ((queries, model.side(QUERY)), (documents, model.side(DOCUMENT)))
            for side in sides.values()
        ]

    rows = await texts.tokenize(rows_of_sides)
    vectors = await texts.encode(model, rows)
    at_query = {text: index for index, text in enumerate(queries)}
    at_document = {text: len(queries) + index for index, text in enumerate(documents)}
    scores = model.similarity(
        vectors[[at_query[query.text] for query, _ in pairs]],
        vectors[[at_document[document.text] for _, document in pairs]],
    )
    return [float(score) for score in scores], _num_tokens(rows)


def _beginnings(model: TextModel, body: PairsBody) -> list[tuple[Side, Side]]:
    """What is read of the pairs' texts, before the model's own bound."""
    beginning = cache(model.beginning)

    def of(side: Side, num_tokens: int | None) -> Side:
        return replace(side, text=beginning(side.text, num_tokens)) if num_tokens else side

    return [
        (of(query, body.max_tokens_per_query), of(document, body.max_tokens_per_doc))
        for query, document in body.pairs
    ]


def _num_tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.token_ids) for row in rows)


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
