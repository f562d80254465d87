"""POST /tokenize and /detokenize: a prompt's tokens, as the model that is named would be given it, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve.api.body import JsonRoute
from serve.api.embedding_schemas import DetokenizeBody, TokenizeBody, TokenizeChatBody, TokenizePromptBody
from serve.api.generation import new_id
from serve.api.permission import check_name
from serve.api.state import AppState, StateDep
from serve.api.targets import held_target
from serve.api.turn import prompt_of, with_offers
from serve.embed.model import TextModel
from serve.errors import RequestError

MAX_TOKENS = 2**20
"""That are written as text at once: a second of the tokenizer's time."""

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, http: Request, state: StateDep) -> Response:
    """vLLM's: `tokens` of a prompt, or of a chat as its template writes it, and how many they are."""
    name = body.model or state.bases.first.name
    encoding = state.texts.models.get(name)
    if encoding is not None:
        check_name(name)
        return await _of_text_model(state, encoding, body)
    async with held_target(state, name, new_id("tokenize"), http) as target:
        services = target.services
        if isinstance(body, TokenizePromptBody):
            prompt, adds_special = body.prompt, body.add_special_tokens is not False
            ids = await services.tokenize(lambda: services.prompts.of_text(prompt, adds_special=adds_special))
        else:
            ids = (await prompt_of(target, await with_offers(state, http, body), http)).prompt.token_ids
        tokenizer = services.runtime.model.tokenizer
        strings = (
            await services.tokenize(lambda: _strings(tokenizer, ids)) if body.return_token_strs else None
        )
    return JSONResponse(_told(ids, services.runtime.max_context, strings))


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, state: StateDep) -> dict[str, Any]:
    """vLLM's: the text of tokens, special ones too."""
    name = body.model or state.bases.first.name
    encoding = state.texts.models.get(name)
    if encoding is not None:
        check_name(name)
        _check_ids(body.tokens, encoding.vocab_size)
        return {"prompt": await state.texts.tokenize(lambda: encoding.tokenizer.decode(body.tokens))}
    async with held_target(state, name, new_id("detokenize")) as target:
        services = target.services
        _check_ids(body.tokens, services.runtime.model.network.vocab_size)
        return {
            "prompt": await services.tokenize(lambda: services.runtime.model.tokenizer.decode(body.tokens))
        }


async def _of_text_model(
    state: AppState, model: TextModel, body: TokenizePromptBody | TokenizeChatBody
) -> Response:
    """As it would be encoded, without any of its prompts."""
    if isinstance(body, TokenizeChatBody):
        raise RequestError(
            f"messages: model {model.name!r} makes vectors of texts; send `prompt`", "messages"
        )
    adds_special = body.add_special_tokens is not False
    ids = await state.texts.tokenize(lambda: model.all_ids(body.prompt, adds_special))
    strings = (
        await state.texts.tokenize(lambda: _strings(model.tokenizer, ids)) if body.return_token_strs else None
    )
    return JSONResponse(_told(ids, model.max_tokens, strings))


def _strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The vocabulary's own names of tokens; one that has none, since the network counts more, has no text."""
    return [name if name is not None else "" for name in tokenizer.convert_ids_to_tokens(list(ids))]


def _told(ids: Sequence[int], max_context: int, strings: Sequence[str] | None) -> dict[str, Any]:
    return {"count": len(ids), "max_model_len": max_context, "tokens": list(ids), "token_strs": strings}


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if len(ids) > MAX_TOKENS:
        raise RequestError(f"tokens: found {len(ids)}; at most {MAX_TOKENS} are taken", "tokens")
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"tokens: found {wrong}; there are 0 to {vocab_size - 1}", "tokens")
