"""What the bodies of Ollama's API may hold. What only says how its own engine loads a model is a hint."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from serve.api.ollama.keep_alive import KeepAlive
from serve.api.schemas import MAX_LOGPROBS, Seed, Strings
from serve.api.strict import Body, Neutral
from serve.api.tool_bodies import FunctionTool

Images = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)]
"""Base64, as it is or in data URIs; or addresses."""
Think = bool | Literal["low", "medium", "high", "max"]
Form = Literal["", "json"] | dict[str, Any]
"""Of the answer: any text, JSON, or JSON of this schema."""


class Options(Body):
    """How tokens are drawn, and when an answer ends. -1 and -2 of num_predict: no limit."""

    neutral: ClassVar[Neutral] = {
        "embedding_only": (None, False),
        "mirostat": (None, 0, 0.0),
        "tfs_z": (None, 1, 1.0),
        "typical_p": (None, 1, 1.0, 0, 0.0),
    }
    hints = frozenset(
        {
            *("f16_kv", "logits_all", "low_vram", "main_gpu", "num_batch", "num_ctx", "num_gpu", "num_keep"),
            *("num_thread", "numa", "use_mlock", "use_mmap", "vocab_only"),
            *("draft_num_predict", "mirostat_eta", "mirostat_tau", "penalize_newline"),
        }
    )

    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=-1)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Seed | None = None
    stop: str | Strings | None = None
    num_predict: int | None = Field(None, ge=-2)
    repeat_penalty: float | None = Field(None, gt=0, le=100)
    repeat_last_n: int | None = Field(None, ge=-1)
    """Tokens that repeat_penalty looks back over; -1: all, 0: it counts for nothing."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)


class _Asking(Body):
    """What both endpoints share."""

    neutral: ClassVar[Neutral] = {"template": (None, "")}
    hints = frozenset({"shift", "truncate"})

    model: str = Field(min_length=1)
    keep_alive: KeepAlive = None
    """How long the model stays after this; 0: no longer, below 0: for good. None: as long as before."""
    stream: bool | None = None
    """True, if left out."""
    options: Options | None = None
    format: Form | None = None
    think: Think | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def is_streamed(self) -> bool:
        """Whether the answer comes in lines."""
        return self.stream is not False


class CalledFunction(Body):
    """What was called."""

    hints = frozenset({"description", "index"})

    name: str
    arguments: dict[str, Any] | str | None = None


class OllamaToolCall(Body):
    """A call in a turn of the history."""

    hints = frozenset({"type"})

    id: str | None = None
    function: CalledFunction


class OllamaTool(Body):
    """An entry of `tools`."""

    hints = frozenset({"items"})

    type: Literal["function"] = "function"
    function: FunctionTool


class OllamaMessage(Body):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Images | None = None
    tool_calls: Annotated[list[OllamaToolCall], Field(fail_fast=True)] | None = None
    tool_name: str | None = None
    """Whose result a tool's turn is."""
    name: str | None = None
    """The same, in the word that clients had before."""
    tool_call_id: str | None = None


class OllamaChatBody(_Asking):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True)] = Field(default_factory=list)
    """None: the model is loaded, and nothing is said."""
    tools: Annotated[list[OllamaTool], Field(fail_fast=True)] | None = None


class OllamaGenerateBody(_Asking):
    """POST /api/generate."""

    neutral: ClassVar[Neutral] = {
        **_Asking.neutral,
        "context": (None, []),
        "height": (None, 0),
        "steps": (None, 0),
        "suffix": (None, ""),
        "width": (None, 0),
    }

    prompt: str | None = None
    """None, or nothing: the model is loaded, and nothing is said."""
    system: str | None = None
    images: Images | None = None
    raw: bool | None = None
    """The prompt is continued as it is, without a chat template."""


class ShowBody(Body):
    """POST /api/show."""

    hints = frozenset({"verbose"})

    model: str | None = None
    name: str | None = None
    """Its older word."""


class OllamaEmbedBody(Body):
    """POST /api/embed, and /api/embeddings, which takes one `prompt`."""

    hints = frozenset({"keep_alive", "options"})

    model: str = Field(min_length=1)
    input: str | Strings | None = None
    prompt: str | None = None
    truncate: bool | None = None
    """True, if left out: a text that is too long loses its end. False: it is refused."""
    dimensions: int | None = Field(None, ge=1)
