"""What goes into the engine and what comes out: Request → Events. Plain data, no arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from serve.adapters.versions.version import AdapterVersion
from serve.cache.precision import KvPrecision
from serve.cache.stats import FeatureStats, PrefixStats
from serve.engine.drafts import DraftStats
from serve.engine.thinking import Thinking
from serve.errors import LatheError, RequestError
from serve.model.ngrams import Ngrams
from serve.model.prompt import Prompt

if TYPE_CHECKING:  # the scheduler plans with requests, and imports no mlx
    from serve.constraints.grammar import Grammar

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_TEMPERATURE = 1e6
"""Beyond it every token of every vocabulary is equally likely in single precision."""
MAX_STOP_CHARS = 1024
"""Each token is compared with all beginnings of a stop string, on the thread that serves everyone."""


@dataclass(frozen=True)
class Sampling:
    """How one row draws its tokens. Filters apply after temperature, in the order top_n_sigma,
    top_k, top_p, min_p, XTC.

    RequestError for a value that says nothing (a negative temperature, an empty stop string).
    """

    max_tokens: int | None = None
    """None: the rest of the context. More than that is as much as that; see `Engine.check`."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary, as any number beyond it does."""
    min_p: float = 0.0
    seed: int = 0
    """The same seed, prompt and adapter give the same tokens in any company, but for near-ties; 64 bits count."""
    stop: tuple[str, ...] = ()
    """Strings that end the text and are no part of it. One that is a special token's name ends it at that token."""
    ignore_eos: bool = False
    num_logprobs: int | None = None
    """None: no log-probabilities. k: the sampled token's, and those of the k likeliest."""
    num_prompt_logprobs: int | None = None
    """As num_logprobs, of the prompt's tokens but the first. All of it is computed, whatever is cached."""
    repetition_penalty: float = 1.0
    """Of tokens of prompt and answer: their positive logits are divided by it, negative ones multiplied."""
    repetition_context_size: int | None = None
    """Of so many last tokens of prompt and answer alone, as mlx-lm has it; the same of the next two."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer holds."""
    presence_context_size: int | None = None
    frequency_penalty: float = 0.0
    """Subtracted as often as the answer holds the token."""
    frequency_context_size: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, none twice, and what is added to their logits, before any penalty."""
    min_tokens: int = 0
    """So many tokens come before one that ends the answer, or a stop string that does."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, also under `ignore_eos`; their text is no part of it."""
    top_n_sigma: float = 0.0
    """0: none. n: tokens whose logit is at least the largest minus n standard deviations, the first filter."""
    xtc_probability: float = 0.0
    """How often, the last filter, all tokens above `xtc_threshold` but the least likely of them are left out."""
    xtc_threshold: float = 0.1
    """Of the probabilities that the other filters leave."""
    xtc_special_tokens: tuple[int, ...] = ()
    """Those that XTC never leaves out."""

    def __post_init__(self) -> None:
        wanted = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "a number, 0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "stop": (
                all(0 < len(stop) <= MAX_STOP_CHARS for stop in self.stop),
                f"strings that are not empty, of at most {MAX_STOP_CHARS:,} characters",
            ),
            "num_logprobs": (self.num_logprobs is None or self.num_logprobs >= 0, "0 or more"),
            "num_prompt_logprobs": (
                self.num_prompt_logprobs is None or self.num_prompt_logprobs >= 0,
                "0 or more",
            ),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a number, more than 0"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a number"),
            "min_tokens": (self.min_tokens >= 0, "0 or more"),
            "top_n_sigma": (0 <= self.top_n_sigma < math.inf, "a number, 0 or more"),
            "xtc_probability": (0 <= self.xtc_probability <= 1, "from 0 to 1"),
            "xtc_threshold": (0 <= self.xtc_threshold <= 0.5, "from 0 to 0.5"),
            "logit_bias": (
                all(math.isfinite(bias) for _, bias in self.logit_bias)
                and len(dict(self.logit_bias)) == len(self.logit_bias),
                "a number for each token, none of them twice",
            ),
        }
        for name in ("repetition_context_size", "presence_context_size", "frequency_context_size"):
            size = getattr(self, name)
            wanted[name] = (size is None or size >= 1, "at least 1")
        for name, (is_right, expected) in wanted.items():
            if not is_right:
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected {expected}", name)


@dataclass(frozen=True)
class Request:
    """One sequence to generate. `adapter` is pinned by whoever made the request; the worker releases it."""

    id: str
    prompt: Prompt
    sampling: Sampling
    adapter: AdapterVersion | None = None
    """None is the base."""
    group: str = ""
    """Whose it is: rows and prompt computation are shared out between groups. Its own, if left out."""
    continues_prompt: bool = True
    """The text goes on from the prompt's (a completion), or is one of its own (a chat's answer)."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the base's own and the adapter's."""
    precision: KvPrecision | None = None
    """In what form its row keeps keys and values; None: the engine's default."""
    tenant: str = ""
    """Prefixes are shared inside a tenant alone."""
    cache_salt: str = ""
    """The same among those who send the same salt."""
    priority: int = 0
    """The lower, the earlier it has a row, as in vLLM."""
    drafter: str | None = None
    """Who guesses its tokens, by name; None: the engine's default; "none": nobody."""
    prediction: Ngrams | None = None
    """What the answer is thought to be: for drafters that look texts up. Not to be extended."""
    deadline_s: float | None = None
    """By time.monotonic: once that has passed, it ends with a DeadlineError and costs nothing more."""
    thinking: Thinking | None = None
    """Its thoughts are told apart from the answer's text; None: what comes is the answer."""
    grammar: Grammar | None = None
    """What its answer must be, or be a beginning of where it ends by its length."""

    shown_ids: frozenset[int] = frozenset()
    """Special tokens that its text shows by their names: marks of calls, which somebody reads there."""

    @property
    def thinks_before(self) -> bool:
        """Its thoughts stand before what its grammar says, and are free."""
        return self.grammar is not None and self.thinking is not None and not self.thinking.in_grammar

    @property
    def all_stop_ids(self) -> tuple[int, ...]:
        """Its own, and those that its adapter learned to end with."""
        return (*self.stop_ids, *(self.adapter.stop_ids if self.adapter else ()))


@dataclass(frozen=True)
class TokenLogprob:
    """log p of one token under the row's unfiltered distribution at temperature 1, in nats; may be −inf."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None
    """Of a prompt's token: 1 if nothing is likelier."""


class Event(NamedTuple):
    """News of one request. Text pieces concatenate to the whole answer; exactly one event has `finish`."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    """With finish == "stop": the stop string or the token of `stop_token_ids` that ended it; None where the model did
    (vLLM's `stop_reason`)."""
    num_cached_tokens: int = 0
    """With the first token and with the last event: tokens of the prompt that a prefix gave, and nobody computed."""
    error: LatheError | None = None
    """Set with finish == "error"."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With the first token, where they were asked for: the prompt's, but for its first token."""
    num_drafted: int = 0
    """With the last event: guesses of the answer's tokens that were checked."""
    num_accepted: int = 0
    """And of those the right ones."""
    reasoning: str = ""
    """What became final of its thoughts."""
    num_reasoning_tokens: int = 0
    """Tokens of thoughts among the answer's, as far as is known: all since its beginning."""


@dataclass(frozen=True)
class Progress:
    """How far a request is."""

    phase: Literal["waiting", "prefill", "decode"] = "waiting"
    """Without a row, before its first token, behind it."""
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    """Of prompt and answer, those whose keys and values its row has."""
    num_generated_tokens: int = 0


@dataclass(frozen=True)
class MemoryUse:
    """Bytes now, and what they may be together."""

    kv_bytes: int = 0
    """Of rows: keys, values and recurrent state."""
    prefix_bytes: int = 0
    feature_bytes: int = 0
    """Of pictures that were encoded."""
    adapter_bytes: int = 0
    """On the device."""
    adapter_host_bytes: int = 0
    """Of adapters in host memory."""
    drafter_bytes: int = 0
    """Of drafters beside the rows: a draft model's own rows, prefixes and adapters, and texts that are looked up."""
    budget_bytes: int = 0

    @property
    def used_bytes(self) -> int:
        """Of everything, in device and host memory."""
        held = (self.kv_bytes, self.prefix_bytes, self.feature_bytes, self.adapter_bytes)
        return sum(held) + self.adapter_host_bytes + self.drafter_bytes


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for /metrics and /health. Counters grow for the life of the engine."""

    num_decoding: int = 0
    num_prefilling: int = 0
    num_waiting: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_steps: int = 0
    num_preempted: int = 0
    """Times that a row was taken back into the queue."""
    memory: MemoryUse = MemoryUse()
    prefixes: PrefixStats = field(default_factory=PrefixStats)
    features: FeatureStats = field(default_factory=FeatureStats)
    num_finished: Mapping[str, int] = field(default_factory=dict)
    """Ended requests by finish reason."""
    drafts: Mapping[str, DraftStats] = field(default_factory=dict)
    """By adapter's label; the base's by ""."""

    @property
    def kv_bytes(self) -> int:
        """Of rows: keys, values and recurrent state."""
        return self.memory.kv_bytes
