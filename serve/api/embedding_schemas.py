"""What bodies of /v1/embeddings, /v1/rerank, /v1/score, /tokenize and /detokenize may hold."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from serve.api.schemas import ChatBody, Label, Strings, TokenIds
from serve.api.strict import Body, Neutral
from serve.embed.model import Length, Side
from serve.errors import RequestError

MAX_INPUTS = 2048
"""OpenAI's bound on the texts of a request."""
VLLM: Neutral = {
    "activation": (None, True),
    "endianness": (None, "native", "little"),
    "embed_dtype": (None, "float32"),
    "mm_processor_kwargs": (None,),
    "normalize": (None,),
    "priority": (None, 0),
    "softmax": (None,),
    "stream": (None, False),
    "use_activation": (None, True),
}
"""Its fields that are done in one way here."""
HINTS = frozenset({"additional_data", "request_id", "user"})


class EncodeBody(Body):
    """What all of them share."""

    model: Label | None = Field(None, min_length=1)
    """May be left out where one model alone does what is asked."""
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    """vLLM's: tokens of each text that are kept at most; -1: as many as the model can read. Left out, a text that is
    too long is refused, unless the model's configuration says `truncate`."""
    truncation_side: Literal["left", "right"] | None = None
    """vLLM's: at which end."""

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _something_is_kept(cls, count: int | None) -> int | None:
        if count == 0:
            raise RequestError(
                "truncate_prompt_tokens: found 0; expected at least 1, or -1 for as many as fit",
                "truncate_prompt_tokens",
            )
        return count

    def length(self, max_tokens: int, truncates: bool) -> Length:
        """How long a row of a model may be, of which this is the longest; truncates: where the request is silent."""
        limit = self.truncate_prompt_tokens
        if limit is None:
            limit = max_tokens if truncates else None
        elif limit == -1:
            limit = max_tokens
        elif limit > max_tokens:
            raise RequestError(
                f"truncate_prompt_tokens: found {limit}; the model reads {max_tokens} tokens",
                "truncate_prompt_tokens",
            )
        return Length(limit, self.truncation_side == "left")


PROMPTS_ELSEWHERE = ("input_type", "task")
"""Cohere's, NVIDIA's and Jina's words for what a text is embedded as."""


class EmbeddingBody(EncodeBody):
    """POST /v1/embeddings."""

    neutral: ClassVar[Neutral] = {name: values for name, values in VLLM.items() if name != "normalize"}
    hints: ClassVar[frozenset[str]] = HINTS

    input: str | Strings | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    """Numbers of a vector, of a model whose vectors may be cut."""
    normalize: bool | None = None
    """vLLM's: whether vectors have length 1; as the model's folder says, if left out."""
    add_special_tokens: bool | None = None
    """vLLM's: false leaves out the tokens that the tokenizer puts around a text."""
    prompt_name: Label | None = None
    """sentence-transformers': which of the model's prompts stands before each text; "" is none."""

    @model_validator(mode="before")
    @classmethod
    def _a_prompt_is_named(cls, data: Any) -> Any:
        for name in PROMPTS_ELSEWHERE if isinstance(data, dict) else ():
            if data.get(name) is not None:
                raise RequestError(
                    f"{name}: unknown field; send prompt_name, which of the model's prompts stands before each text",
                    name,
                )
        return data

    @field_validator("input")
    @classmethod
    def _there_is_something(cls, value: Any) -> Any:
        if isinstance(value, list) and (not value or value == [[]]):
            raise RequestError(
                "input: found an empty list; expected a text, tokens, or a list of them", "input"
            )
        return value

    @model_validator(mode="after")
    def _are_not_too_many(self) -> EmbeddingBody:
        _check_count("input", len(self.inputs))
        if self.prompt_name and not all(isinstance(each, str) for each in self.inputs):
            raise RequestError("prompt_name: a prompt stands before text; found tokens", "prompt_name")
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
        """One entry a vector: text, or tokens."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [list(self.input)]
        return list(self.input)


class PairsBody(EncodeBody):
    """What rerank and score share."""

    instruction: str | None = None
    """What a document is judged by, of a model that is told so in words."""
    max_tokens_per_query: int | None = Field(None, ge=0)
    """vLLM's: a query's beginning of so many tokens is read; 0, or left out: all of it."""
    max_tokens_per_doc: int | None = Field(None, ge=0)
    """Cohere's and vLLM's: the same of each document. What they come to together is bounded by the model, and by
    truncate_prompt_tokens."""

    @property
    def pairs(self) -> list[tuple[Side, Side]]:
        """The pairs to be scored."""
        raise NotImplementedError


class Document(Body):
    """Cohere's and Jina's: a document with a name for its text."""

    text: str


class RerankBody(PairsBody):
    """POST /v1/rerank: Cohere's, Jina's and vLLM's fields."""

    neutral: ClassVar[Neutral] = {**VLLM, "max_chunks_per_doc": (None, 1), "rank_fields": (None, ["text"])}
    hints: ClassVar[frozenset[str]] = HINTS

    query: str | Document
    documents: Annotated[list[str | Document], Field(fail_fast=True)] = Field(min_length=1)
    top_n: int | None = Field(None, ge=0)
    """So many of the best; 0, or left out: all."""
    return_documents: bool | None = None
    """false leaves the documents' texts out of the results."""

    @model_validator(mode="after")
    def _are_not_too_many(self) -> RerankBody:
        _check_count("documents", len(self.documents))
        return self

    @property
    def pairs(self) -> list[tuple[Side, Side]]:
        """The query with each document."""
        query = Side(text_of(self.query), "query")
        return [(query, Side(text, f"documents.{number}")) for number, text in enumerate(self.texts)]

    @property
    def texts(self) -> list[str]:
        """The documents'."""
        return [text_of(each) for each in self.documents]


Sides = str | Strings


class ScoreBody(PairsBody):
    """POST /v1/score: vLLM's."""

    neutral: ClassVar[Neutral] = VLLM
    hints: ClassVar[frozenset[str]] = HINTS

    text_1: Sides | None = None
    text_2: Sides | None = None
    queries: Sides | None = None
    """vLLM's other name for text_1,"""
    documents: Sides | None = None
    """and for text_2."""

    @model_validator(mode="after")
    def _sides_fit(self) -> ScoreBody:
        for one, other in (("text_1", "queries"), ("text_2", "documents")):
            given = [name for name in (one, other) if getattr(self, name) is not None]
            if len(given) != 1:
                raise RequestError(
                    f"{one}: found {' and '.join(given) or 'nothing'}; send {one}, or {other}, which is the same",
                    one,
                )
        first, second = self.sides
        if not first or not second:
            name = "text_1" if not first else "text_2"
            raise RequestError(f"{name}: found an empty list; expected at least one text", name)
        if len(first) not in (1, len(second)):
            raise RequestError(
                f"text_1: found {len(first)} texts, and {len(second)} of text_2; send one of text_1, or as many "
                "as of text_2",
                "text_1",
            )
        _check_count("text_2", len(second))
        return self

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The texts of either side, as they were sent."""
        return _listed(self.text_1, self.queries), _listed(self.text_2, self.documents)

    @property
    def pairs(self) -> list[tuple[Side, Side]]:
        """The pairs to be scored."""
        first = _placed("text_1", self.text_1, "queries", self.queries)
        second = _placed("text_2", self.text_2, "documents", self.documents)
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


class TokenizePromptBody(Body):
    """POST /tokenize of a text."""

    model: Label | None = Field(None, min_length=1)
    """The base, if left out."""
    prompt: str
    add_special_tokens: bool | None = None
    """false leaves out the tokens that the tokenizer puts around a text."""
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatBody):
    """POST /tokenize of a chat: any body of /v1/chat/completions."""

    neutral: ClassVar[Neutral] = {
        **ChatBody.neutral,
        "add_special_tokens": (None, False),
        "chat_template": (None,),
    }

    return_token_strs: bool | None = None


def _of_kind(body: Any) -> str:
    return (
        "chat"
        if isinstance(body, TokenizeChatBody) or (isinstance(body, dict) and "messages" in body)
        else "text"
    )


TokenizeBody = Annotated[
    Annotated[TokenizePromptBody, Tag("text")] | Annotated[TokenizeChatBody, Tag("chat")],
    Discriminator(_of_kind),
]


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Label | None = Field(None, min_length=1)
    """The base, if left out."""
    tokens: TokenIds


def text_of(document: str | Document) -> str:
    """Its words."""
    return document if isinstance(document, str) else document.text


def _listed(first: Sides | None, second: Sides | None) -> list[str]:
    given = second if first is None else first
    return [given] if isinstance(given, str) else list(given or ())


def _placed(name: str, given: Sides | None, other_name: str, other: Sides | None) -> list[Side]:
    name, given = (other_name, other) if given is None else (name, given)
    if isinstance(given, str):
        return [Side(given, name)]
    return [Side(text, f"{name}.{number}") for number, text in enumerate(given or ())]


def _check_count(param: str, count: int) -> None:
    if count > MAX_INPUTS:
        raise RequestError(f"{param}: found {count} texts; at most {MAX_INPUTS} are taken at once", param)
