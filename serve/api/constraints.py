"""What bodies say that an answer must be → ConstraintSpec: OpenAI's `response_format`, vLLM's `structured_outputs`,
and its older words `guided_…`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from serve.api.strict import Body, Neutral
from serve.constraints.spec import ConstraintSpec
from serve.errors import RequestError

MAX_CHOICES = 4096

Pattern = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
Schema = dict[str, Any] | bool


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """A JSON object, of any properties; or JSON of a schema, in the words of llama.cpp, Together and Fireworks."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema")

    def spec(self, place: str) -> ConstraintSpec:
        """What an answer keeps to."""
        if self.schema_ is None:
            return ConstraintSpec.of_schema({"type": "object"}, place)
        return ConstraintSpec.of_schema(self.schema_, f"{place}.schema")


class NamedSchema(Body):
    """A JSON Schema. Answers keep to it whether `strict` is true or not."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's: exactly one kind."""

    neutral: ClassVar[Neutral] = {
        "disable_additional_properties": (None, False),
        "disable_any_whitespace": (None, False),
        "disable_fallback": (None, True, False),
        "structural_tag": (None,),
        "whitespace_pattern": (None,),
    }

    json_: Schema | str | None = Field(None, alias="json")
    """A schema, as an object or as JSON text."""
    json_object: bool | None = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    """In Lark's form or in GBNF."""

    @property
    def specs(self) -> Iterator[ConstraintSpec]:
        """Of each kind that is there."""
        return _specs(
            "structured_outputs.", self.json_, self.regex, self.choice, self.grammar, bool(self.json_object)
        )

    @model_validator(mode="after")
    def _there_is_one(self) -> StructuredOutputs:
        kinds = [spec.kind for spec in self.specs]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none"
            raise RequestError(
                f"structured_outputs: found {found}; expected one of json, json_object, regex, choice, grammar",
                "structured_outputs",
            )
        return self


class ConstrainedBody(Body):
    """Fields that say what an answer must be; one of them at most. vLLM's words are taken beside OpenAI's."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None

    @field_validator("guided_json")
    @classmethod
    def _guided_json_is_json(cls, value: Schema | str | None) -> Schema | str | None:
        if isinstance(value, str):
            _parsed(value, "guided_json")
        return value

    @property
    def specs(self) -> Iterator[ConstraintSpec]:
        """Of each field that is there and asks for something."""
        wanted = self.response_format
        if isinstance(wanted, ObjectFormat):
            yield wanted.spec("response_format")
        if isinstance(wanted, SchemaFormat):
            yield ConstraintSpec.of_schema(wanted.json_schema.schema_, "response_format.json_schema.schema")
        if self.structured_outputs is not None:
            yield from self.structured_outputs.specs
        yield from _specs(
            "guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar
        )

    @property
    def constraint(self) -> ConstraintSpec | None:
        """What an answer must be; None: anything."""
        return next(self.specs, None)

    @model_validator(mode="after")
    def _one_at_most_says_what_an_answer_is(self) -> ConstrainedBody:
        places = [spec.place for spec in self.specs]
        if len(places) > 1:
            name = places[1].partition(".")[0]
            raise RequestError(
                f"{name}: found beside {places[0].partition('.')[0]}; an answer keeps to one of them", name
            )
        return self


def _specs(
    prefix: str,
    schema: Schema | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    is_object: bool = False,
) -> Iterator[ConstraintSpec]:
    if schema is not None:
        place = f"{prefix}json"
        yield ConstraintSpec.of_schema(_parsed(schema, place) if isinstance(schema, str) else schema, place)
    if is_object:
        yield ConstraintSpec.of_schema({"type": "object"}, f"{prefix}json_object")
    if regex is not None:
        yield ConstraintSpec("regex", regex, f"{prefix}regex")
    if choice is not None:
        yield ConstraintSpec.of_choices(choice, f"{prefix}choice")
    if grammar is not None:
        yield ConstraintSpec("grammar", grammar, f"{prefix}grammar")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: not JSON: {error}", place.partition(".")[0]) from None
