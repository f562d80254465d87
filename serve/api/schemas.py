"""What request bodies may hold. Unknown fields are refused by name, and fields of OpenAI's that Lathe does not do are
accepted with their neutral values only. Hints, which ask nothing of the answer, are taken and listed in README."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from serve.api.constraints import ConstrainedBody
from serve.api.message_bodies import Message
from serve.api.parts import TextPart
from serve.api.sampling import SamplingBody
from serve.api.strict import Body, Neutral
from serve.api.tool_bodies import ToolsBody
from serve.cache.precision import PLAIN, KvPrecision, KvScheme
from serve.config import ContextOverflow, ServeConfig
from serve.draft.lookup import NAME as NGRAM
from serve.errors import RequestError
from serve.model.thoughts import MAX_MARK_CHARS

MAX_STOPS = 64
MAX_LOGPROBS = 20
MAX_SALT_CHARS = 1024
"""vLLM's bound."""
MAX_TIMEOUT_S = 7 * 24 * 3600.0

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
ThoughtMark = Annotated[str, Field(min_length=1, max_length=MAX_MARK_CHARS)]
Label = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""Text that databases and file systems take as a name."""
# One wrong entry is told, not a million of them.
Strings = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class StreamOptions(Body):
    """How a stream reports."""

    neutral: ClassVar[Neutral] = {"include_obfuscation": (None, False)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: every chunk says what its choice has used so far. Brings the usage chunk at the end with it."""

    @model_validator(mode="after")
    def _continuous_usage_is_usage(self) -> StreamOptions:
        if self.continuous_usage_stats and self.include_usage is False:
            raise RequestError(
                "continuous_usage_stats: found true, but include_usage is false", "continuous_usage_stats"
            )
        return self


_SCHEMES: Mapping[str, KvScheme] = {"uniform": "affine", "turboquant": "turbo"}
"""mlx-vlm's words and ours."""
_BESIDE_KV_BITS = (
    *("kv_value_bits", "kv_scheme", "kv_quant_scheme", "kv_group_size"),
    *("kv_quantize_after", "quantized_kv_start", "kv_plain_layers"),
)


UNCONSTRAINED: Neutral = {"guided_whitespace_pattern": (None,), "structural_tag": (None,)}
"""vLLM's, of what answers are constrained by: done in one way here, or not at all."""


class Prediction(Body):
    """OpenAI's: what much of the answer is thought to be."""

    type: Literal["content"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        """All of it."""
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class GenerationBody(SamplingBody, ConstrainedBody):
    """What chat and plain completions share. Null means left out, as everywhere in OpenAI's API."""

    hints = frozenset(
        {
            "guided_decoding_backend",
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
        }
    )

    model: Label | None = None
    """The server's own, the first of several, if left out or empty: mlx_lm.server and vLLM take such bodies."""
    seed: Seed | None = None
    stop: str | Strings | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    """The unit of an experiment: the same user meets the same variant. Without effect on other models."""
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """vLLM's: of each of the prompt's tokens log p, its rank, and so many of the likeliest. Not as a stream."""
    kv_bits: float | None = None
    """Bits of this request's stored keys and values, in place of the server's; 16: unquantized."""
    kv_value_bits: float | None = None
    kv_scheme: KvScheme | None = None
    kv_quant_scheme: Literal["uniform", "turboquant"] | None = None
    """mlx-vlm's words for kv_scheme."""
    kv_group_size: int | None = None
    kv_quantize_after: int | None = Field(None, ge=0)
    quantized_kv_start: int | None = Field(None, ge=0)
    """mlx-lm's name for kv_quantize_after."""
    kv_plain_layers: int | None = Field(None, ge=0)
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_SALT_CHARS)
    """vLLM's: prefixes are shared with requests of the same salt alone."""
    priority: Priority | None = None
    """vLLM's: the lower, the earlier; 0, if left out."""
    drafter: Label | None = None
    """Who guesses tokens ahead, in place of the server's: ngram, none, or what else the server has."""
    prediction: Prediction | None = None
    """Where the answer goes on as this does, its tokens are guessed from it; with ngram, which it asks for where
    `drafter` is left out."""
    timeout: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S)
    """Seconds, from when the body was read, after which the answer is of no use: 504 then, and nothing more is
    computed. A stream that has begun ends with that error."""
    _read_s: float = PrivateAttr(default_factory=time.monotonic)

    @field_validator("stop")
    @classmethod
    def _stops_are_few_and_not_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS:
            raise RequestError(f"stop: found {len(stops)} strings; at most {MAX_STOPS} are accepted", "stop")
        if not all(stops):
            raise RequestError("stop: found an empty string, which would end every answer at once", "stop")
        return stop

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: accepted with stream: true only", "stream_options")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_are_told_at_once(self) -> GenerationBody:
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs: accepted with stream: false only", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _min_tokens_are_no_more_than_all(self) -> GenerationBody:
        limit = self.answer_limit
        if self.min_tokens is not None and limit is not None and self.min_tokens > limit:
            raise RequestError(
                f"min_tokens: found {self.min_tokens}, but at most {limit} tokens are asked for", "min_tokens"
            )
        return self

    @model_validator(mode="after")
    def _predictions_are_looked_up(self) -> GenerationBody:
        if self.prediction is not None and self.drafter not in (None, NGRAM):
            raise RequestError(
                f"prediction: found one, but drafter is {self.drafter!r:.80}, which does not look it up; send "
                f"{NGRAM!r} or leave drafter out",
                "prediction",
            )
        return self

    @model_validator(mode="after")
    def _kv_fields_agree(self) -> GenerationBody:
        for name, other, both in (
            ("quantized_kv_start", "kv_quantize_after", {self.quantized_kv_start, self.kv_quantize_after}),
            ("kv_quant_scheme", "kv_scheme", {_SCHEMES.get(self.kv_quant_scheme or ""), self.kv_scheme}),
        ):
            if len(both - {None}) > 1:
                raise RequestError(
                    f"{name}: found {getattr(self, name)}, but {other} is {getattr(self, other)}; "
                    "they mean the same, send one",
                    name,
                )
        if self.kv_bits is None or self.kv_bits == PLAIN.key_bits:
            for name in _BESIDE_KV_BITS:
                if getattr(self, name) is not None:
                    raise RequestError(f"{name}: accepted beside a kv_bits that quantizes only", name)
        return self

    def precision(self, config: ServeConfig) -> KvPrecision | None:
        """What the kv fields mean on such a server; None where they are left out. RequestError names the field."""
        if self.kv_bits is None:
            return None
        scheme = self.kv_scheme or _SCHEMES.get(self.kv_quant_scheme or "")
        start_after = self.kv_quantize_after
        precision = config.make_precision(
            self.kv_bits,
            value_bits=self.kv_value_bits,
            scheme=scheme,
            group_size=self.kv_group_size,
            start_after=self.quantized_kv_start if start_after is None else start_after,
            num_plain_layers=self.kv_plain_layers,
        )
        if precision.scheme == "turbo" and self.kv_group_size is not None:
            raise RequestError("kv_group_size: TurboQuant has no groups; leave it out", "kv_group_size")
        return precision

    @property
    def deadline_s(self) -> float | None:
        """By time.monotonic; None: whenever."""
        return None if self.timeout is None else self._read_s + self.timeout

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however they were written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage_chunk(self) -> bool:
        """True if a stream is to end with its usage."""
        options = self.stream_options
        return bool(options and (options.include_usage or options.continuous_usage_stats))

    @field_validator("max_tokens", "max_completion_tokens", mode="before", check_fields=False)
    @classmethod
    def _minus_one_is_no_limit(cls, limit: Any) -> Any:
        """In LM Studio's words and llama.cpp's; their clients send it unasked."""
        return None if limit == -1 else limit

    @property
    def wants_continuous_usage(self) -> bool:
        """True if every chunk is to say its usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def answer_limit(self) -> int | None:
        """Tokens at most, if the request says so."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None: none wanted; k: the token's and those of the k likeliest."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As num_logprobs, of the prompt."""
        return self.prompt_logprobs

    @property
    def num_drawn(self) -> int:
        """Answers that are drawn for each prompt, `n` of which are sent."""
        return self.n or 1


_TEMPLATE_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class TemplatedBody(GenerationBody):
    """What bodies of chats say of their template, of thoughts and of what they show, in any API."""

    mm_processor_kwargs: dict[str, Any] | None = None
    """vLLM's: how pictures and clips are looked at; min_pixels, max_pixels, fps, max_frames, …"""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables that the template reads; any other is refused by name."""
    enable_thinking: bool | None = None
    """mlx-vlm's: as in chat_template_kwargs."""
    thinking_budget: int | None = Field(None, ge=0)
    """mlx-vlm's: tokens of thoughts at most; then their end is forced."""
    thinking_token_budget: int | None = Field(None, ge=0)
    """vLLM's name for thinking_budget."""
    thinking_start_token: ThoughtMark | None = None
    """mlx-vlm's: what begins a thought, in place of the model's mark; it may be several tokens."""
    thinking_end_token: ThoughtMark | None = None
    include_reasoning: bool | None = None
    """vLLM's: false leaves thoughts out of the response; they count all the same."""

    @model_validator(mode="after")
    def _what_means_the_same_is_said_once(self) -> TemplatedBody:
        if self.enable_thinking is not None and "enable_thinking" in (self.chat_template_kwargs or {}):
            raise RequestError(
                "enable_thinking: found here and in chat_template_kwargs; they mean the same, send one",
                "enable_thinking",
            )
        if len({self.thinking_budget, self.thinking_token_budget} - {None}) > 1:
            raise RequestError(
                f"thinking_token_budget: found {self.thinking_token_budget}, but thinking_budget is "
                f"{self.thinking_budget}; they mean the same, send one",
                "thinking_token_budget",
            )
        taken = [name for name in self.chat_template_kwargs or {} if name in _TEMPLATE_ARGUMENTS]
        if taken:
            raise RequestError(
                f"chat_template_kwargs: {taken[0]} is set by the server; send the template's own variables only",
                "chat_template_kwargs",
            )
        return self

    @property
    def budget(self) -> int | None:
        """Tokens of thoughts at most, if the request says so."""
        return self.thinking_token_budget if self.thinking_budget is None else self.thinking_budget


WISHES = ("reasoning_effort", "verbosity")
"""Fields of a chat that are variables of the template, where it reads them."""


Effort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh"],
    BeforeValidator(
        lambda given: "xhigh" if given == "max" else given,
        json_schema_input_type=Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    ),
]
"""OpenAI's and Anthropic's words; `max` is the most that templates know."""


class ChatBody(TemplatedBody, ToolsBody):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Neutral] = {
        **UNCONSTRAINED,
        "audio": (None,),
        "modalities": (None, ["text"]),
        "moderation": (None,),
        "web_search_options": (None,),
    }

    insists_on_thinking: ClassVar[bool] = True
    """Whether a request for thoughts, or for none, is refused by a model that cannot be told. False: it is a wish."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    reasoning_effort: Effort | None = None
    """A variable of the template; a hint where the template does not read it."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """How many words an answer has: as reasoning_effort."""
    context_overflow: ContextOverflow | None = None
    """What is done to a conversation that is longer than the context: as the server's key of that name."""
    add_generation_prompt: bool | None = None
    """Open the assistant's next turn; true, unless the last message is continued."""
    continue_final_message: bool | None = None
    """The answer goes on from the last message, an assistant's, and begins after its words (prefill)."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError(
                f"max_completion_tokens: found {self.max_completion_tokens}, but max_tokens is {self.max_tokens}; "
                "they mean the same, send one",
                "max_completion_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs: accepted with logprobs: true only", "top_logprobs")
        for name in WISHES:
            if getattr(self, name) is not None and name in (self.chat_template_kwargs or {}):
                raise RequestError(
                    f"{name}: found here and in chat_template_kwargs; they mean the same, send one", name
                )
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message: found true, and add_generation_prompt too; an answer goes on from the last "
                "message or begins a turn, send one of them",
                "continue_final_message",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise RequestError(
                f"continue_final_message: the last message is of role {self.messages[-1].role!r}; expected assistant",
                "continue_final_message",
            )
        return self

    @property
    def has_tool_history(self) -> bool:
        """True if a turn calls a tool or brings a result."""
        return any(message.calls or message.role in ("tool", "function") for message in self.messages)

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    neutral: ClassVar[Neutral] = {**UNCONSTRAINED, "suffix": (None, "")}

    prompt: str | Strings | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    max_tokens: int | None = Field(None, ge=0)
    """0, with echo alone: no answer."""
    echo: bool | None = None
    """The prompt stands before its answer, with its log-probabilities where those are asked for."""
    best_of: int | None = Field(None, ge=1, le=128)
    """So many answers are drawn, and the `n` of the highest log-probability a token are sent; not as a stream."""

    @field_validator("prompt")
    @classmethod
    def _there_is_a_prompt(cls, prompt: Any) -> Any:
        if not prompt or (isinstance(prompt, list) and not all(p or p == 0 for p in prompt)):
            raise RequestError("prompt: found an empty one; there is nothing to continue", "prompt")
        return prompt

    @model_validator(mode="after")
    def _no_answer_is_for_an_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(
                "max_tokens: found 0; expected at least 1, or 0 with echo: true, which gives the prompt back",
                "max_tokens",
            )
        constraint = self.constraint
        if self.max_tokens == 0 and constraint is not None:
            name = constraint.place.partition(".")[0]
            raise RequestError(f"{name}: found with max_tokens: 0, which asks for no answer", name)
        return self

    @model_validator(mode="after")
    def _best_of_is_more_than_n(self) -> CompletionBody:
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise RequestError(f"best_of: found {self.best_of}, but n is {n}; expected at least n", "best_of")
        if self.stream and self.best_of is not None and self.best_of > n:
            raise RequestError(
                "best_of: which answers are best is known at their end, so they cannot be streamed; send stream: "
                "false, or a best_of as large as n",
                "best_of",
            )
        return self

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    @property
    def num_drawn(self) -> int:
        return max(self.best_of or 1, self.n or 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt, text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter, vLLM's fields."""

    neutral: ClassVar[Neutral] = {
        "lora_int_id": (None,),
        "is_3d_lora_weight": (None, False),
    }

    lora_name: Label
    lora_path: str
    load_inplace: bool = False
    base_model_name: Label | None = None
    """Of the bases of a server, the one that it was trained on."""


class ModelBody(Body):
    """POST /v1/models/load and /v1/models/unload."""

    model: Label
    """A base's name or alias."""


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter, vLLM's fields."""

    neutral: ClassVar[Neutral] = {"lora_int_id": (None,)}

    lora_name: Label


class RollbackBody(Body):
    """POST /v1/adapters/{name}/rollback."""

    version: int | None = Field(None, ge=1)
    """Its number; the one before the current one, if left out."""


class PinAdapterBody(Body):
    """POST /v1/adapters/{name}/pin and /unpin: nothing is to be said."""


class FeedbackBody(Body):
    """POST /v1/feedback: how one completion turned out."""

    id: Label = Field(min_length=1, max_length=200)
    """The completion's id."""
    name: Label = Field(min_length=1, max_length=200)
    """What was measured, for example exact_match or thumbs_up."""
    value: float = Field(ge=0, le=1)
    """Comparisons are of means in [0, 1]: scale it."""
