"""instructor against the real server, by OpenAI's client and Anthropic's: objects, pieces of them, asking again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import anthropic
import instructor
import openai
import pytest
from instructor import Mode
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from tiny import QWEN3, running

ASKED = [{"role": "user", "content": "How warm is it?"}]
HELD = ["openai TOOLS", "openai JSON_SCHEMA", "openai RESPONSES_TOOLS", "anthropic TOOLS"]
"""Modes in which a grammar holds the answer to the schema, or to a call of it."""
FREE = ["openai MD_JSON", "anthropic JSON"]
"""In which the schema is only told to the model: the text is told it here."""


class Weather(BaseModel):
    """How warm it is."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2]

    @field_validator("days")
    @classmethod
    def _is_refused_as_often_as_the_test_says(cls, days: int, info: ValidationInfo) -> int:
        if info.context and info.context.get("refusals"):
            raise ValueError(info.context["refusals"].pop())
        return days


class Trip(BaseModel):
    """Some days somewhere."""

    model_config = ConfigDict(extra="forbid")
    legs: list[Weather] = Field(min_length=2, max_length=3)


PARIS, ROME = {"city": "Paris", "days": 2}, {"city": "Rome", "days": 1}


@pytest.fixture(scope="module")
def url(make_model) -> Iterator[str]:
    folder = make_model("instructed", {**QWEN3, "max_position_embeddings": 8192})
    with running(folder, tool_call_parser="hermes") as (_, opened):
        yield opened


@pytest.fixture(scope="module")
def ask(url: str) -> Iterator[Callable[..., Any]]:
    """ask(way, how="create", says=text, **fields) → what instructor makes of the answer, `text` if it is said."""
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as gpt,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as claude,
    ):

        def by(
            way: str, how: str = "create", says: str | None = None, seen: list | None = None, **fields: Any
        ):
            whose, mode = way.split()
            if whose == "openai":
                client = instructor.from_openai(gpt, mode=Mode[mode])
            else:
                client = instructor.from_anthropic(claude, mode=Mode[mode])
            if seen is not None:
                client.on("completion:kwargs", lambda *_, **told: seen.append(told))
            body = {"temperature": 1.0, "seed": 2}
            if says is not None:
                body["structured_outputs"] = {"choice": [says]}
            told = {"model": "m", "messages": ASKED, "max_tokens": 400, "max_retries": 1, "extra_body": body}
            return getattr(client, how)(**{"response_model": Weather, **told, **fields})

        yield by


def said(way: str, value: Any) -> str | None:
    """What the model has to be made to say, where no grammar does."""
    return json.dumps(value) if way in FREE else None


@pytest.mark.parametrize("way", HELD + FREE)
def test_an_object_comes_whole_and_in_pieces(ask, way):
    assert isinstance(ask(way, says=said(way, PARIS)), Weather)
    pieces = [piece.model_dump() for piece in ask(way, "create_partial", says=said(way, PARIS))]
    assert Weather.model_validate(pieces[-1])
    for name, last in pieces[-1].items():
        values = [piece[name] for piece in pieces]
        assert values == sorted(values, key=lambda value: value is not None), "it does not go again"
        assert all(value is None or value == last or str(last).startswith(value) for value in values)


@pytest.mark.parametrize("way", HELD)
def test_a_list_inside_an_object_grows(ask, way):
    sizes = [len(piece.legs or ()) for piece in ask(way, "create_partial", response_model=Trip)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 2 <= sizes[-1]


@pytest.mark.parametrize("way", FREE)
def test_objects_come_one_after_the_other(ask, way):
    found = list(ask(way, "create_iterable", says=json.dumps({"tasks": [PARIS, ROME]})))
    assert [each.model_dump() for each in found] == [PARIS, ROME]


@pytest.mark.parametrize("way", ["openai PARALLEL_TOOLS", "anthropic PARALLEL_TOOLS"])
def test_several_calls_are_several_objects(ask, way):
    calls = [
        f'<tool_call>\n{{"name": "Weather", "arguments": {json.dumps(each)}}}\n</tool_call>'
        for each in (PARIS, ROME)
    ]
    found = list(ask(way, says="\n".join(calls), response_model=Iterable[Weather]))
    assert [each.model_dump() for each in found] == [PARIS, ROME]


@pytest.mark.parametrize("way", HELD + FREE)
def test_what_does_not_validate_is_asked_again_with_the_reason(ask, way):
    seen: list[dict[str, Any]] = []
    context = {"refusals": ["that is too warm"]}
    answer = ask(way, says=said(way, PARIS), seen=seen, max_retries=2, context=context)
    assert isinstance(answer, Weather)
    first, again = (json.dumps(each.get("messages") or each["input"], default=str) for each in seen)
    assert "that is too warm" in again
    assert again.startswith(first[:-1]), "the conversation goes on"


@pytest.mark.parametrize("way", ["openai TOOLS", "openai JSON_SCHEMA", "anthropic TOOLS"])
def test_an_answer_that_is_cut_off_is_told_as_that(ask, way):
    with pytest.raises((IncompleteOutputException, InstructorRetryException), match="incomplete"):
        ask(way, max_tokens=8)


def test_any_object_comes_without_a_schema(ask):
    class Anything(BaseModel):
        model_config = ConfigDict(extra="allow")

    assert isinstance(ask("openai JSON", response_model=Anything), Anything)


@pytest.mark.parametrize("way", HELD)
def test_what_went_wrong_is_told_by_the_client_s_own_error(ask, way):
    with pytest.raises(InstructorRetryException, match="nobody") as caught:
        ask(way, model="nobody")
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, openai.NotFoundError | anthropic.NotFoundError):
        error = error.__cause__ or error.__context__
    assert error is not None
