"""What goes into the engine and what comes out: Request → Events. Plain data, no arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from serve.adapters.version import AdapterVersion
from serve.model.prompt import Prompt

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How one row draws its tokens. Filters apply after temperature, in the order top_k, top_p, min_p."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    seed: int = 0
    """The same seed, prompt and adapter give the same tokens, alone and in any company."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    ignore_eos: bool = False
    num_logprobs: int | None = None
    """None: no log-probabilities. k: the sampled token's, and those of the k likeliest."""


@dataclass(frozen=True)
class Request:
    """One sequence to generate. `adapter` is pinned by whoever made the request; the worker releases it."""

    id: str
    prompt: Prompt
    sampling: Sampling
    adapter: AdapterVersion | None = None
    """None is the base."""


@dataclass(frozen=True)
class TokenLogprob:
    """log p of one generated token under the row's unfiltered distribution at temperature 1, in nats."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """News of one request. Text pieces concatenate to the whole answer; exactly one event has `finish`."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None
    """Set with finish == "error"."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for /metrics and /health. Counters grow for the life of the engine."""

    num_decoding: int = 0
    num_prefilling: int = 0
    num_waiting: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_steps: int = 0
    kv_bytes: int = 0
    num_finished: Mapping[str, int] = field(default_factory=dict)
    """Ended requests by finish reason."""
