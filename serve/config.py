"""The serving configuration: each knob once, its meaning under it, and which contradict one another."""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from serve.adapters.versions.names import label_problem, name_problem
from serve.cache.precision import KvPrecision, KvScheme, precision
from serve.drafter_config import ELSEWHERE as DRAFTERS_ELSEWHERE
from serve.drafter_config import DrafterConfig, NoDrafter
from serve.embed.config import EmbeddingModelConfig
from serve.errors import ConfigError, RequestError
from serve.experiments.assignment import Experiment, Variant
from serve.media_config import MediaConfig, MediaLimitsConfig
from serve.model.quantization import Quantization
from serve.model.thoughts import MAX_MARK_CHARS, Parser
from serve.operating_config import OperatingConfig
from serve.settings import Problems, Strict
from serve.tools.formats import NAMES as TOOL_PARSERS

Weight = Annotated[float, Field(gt=0, lt=math.inf)]
ContextOverflow = Literal["error", "summarize", "truncate"]
SQLITE_PREFIX = "sqlite:///"
ELSEWHERE = {
    "quantized_kv_start": "write kv_quantize_after",
    "kv_quant_scheme": "write kv_scheme, affine for uniform and turbo for turboquant",
    **DRAFTERS_ELSEWHERE,
}
"""Other servers' names, and what to write instead."""


class AdapterConfig(Strict):
    """An adapter that is loaded before the first request."""

    name: str = Field(min_length=1)
    """What requests put into `model`."""
    path: Path
    """Folder with adapters.safetensors and adapter_config.json."""


class VariantConfig(Strict):
    """One arm of an experiment."""

    model: str = Field(min_length=1)
    """The base's name, an adapter's name, or `name@version`. It may be loaded later: until then, requests that
    are assigned to it answer 503."""
    name: str | None = None
    """How reports call it; the model, if left out."""
    weight: float = Field(1.0, gt=0)
    """Share of the units, relative to the other variants' weights."""


class ExperimentConfig(Strict):
    """A public model name behind which variants share the traffic."""

    name: str = Field(min_length=1)
    """What requests put into `model`."""
    salt: str | None = None
    """Changes who gets which variant; the experiment's name, if left out."""
    variants: tuple[VariantConfig, ...] = Field(min_length=2)
    """The first is the one the others are compared with."""

    def build(self) -> Experiment:
        """The plain value that assignment and reports take."""
        variants = tuple(Variant(v.name or v.model, v.model, v.weight) for v in self.variants)
        return Experiment(self.name, self.salt or self.name, variants)


class DefaultSamplingConfig(Strict):
    """How tokens are drawn for requests that do not say."""

    temperature: float | None = Field(default=None, ge=0, lt=math.inf)
    """0 is greedy; 1, if nobody says."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """1, if nobody says."""
    top_k: int | None = Field(default=None, ge=0)
    """0, the whole vocabulary, if nobody says."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """0, if nobody says."""
    repetition_penalty: float | None = Field(default=None, gt=0, lt=math.inf)
    """1, none, if nobody says."""


class ModelSettings(Strict):
    """What may differ between two models of one server."""

    model: str = Field(min_length=1)
    """The base: a local folder or a hub name."""
    name: str | None = None
    """What requests call the base; the folder's name or the hub name, if left out."""
    aliases: tuple[str, ...] = ()
    """What they may call it too."""
    pinned: bool = False
    """It leaves for no other model, and for no idleness."""
    idle_unload_s: float | None = Field(None, gt=0)
    """So many seconds without a request, its memory is given back; the next request loads it again. Never, if left
    out."""
    adapters: tuple[AdapterConfig, ...] = ()
    """Loaded at start, in this order."""
    adapter_watch: tuple[Path, ...] = ()
    """Folders that are watched: a run's or an adapter's, or one that holds such folders. What a run publishes, and
    what is put there, becomes a new version of the adapter that is called as the folder. Each under
    allowed_adapter_roots, where these are named."""
    adapter_watch_interval_s: float = Field(1.0, gt=0)
    """Seconds between two looks at them."""
    media: MediaConfig = MediaConfig.model_validate({})
    """How pictures and clips are looked at where a request says nothing."""
    max_rows: int = Field(64, ge=1)
    """Requests that run at once."""
    max_waiting: int = Field(256, ge=0)
    """Requests that wait for a row; more answer 503 with Retry-After."""
    max_tenant_requests: int | None = Field(None, ge=1)
    """Requests of one tenant (X-Tenant) that run or wait at once; more answer 429 with Retry-After. No bound but
    everybody's, if left out."""
    shares: dict[str, Weight] = Field(default_factory=dict)
    """Weights of adapters and of the base, by name: rows go to whoever has had least for its weight, which is 1 for
    those that are not named. If left out, rows go by arrival."""
    tenant_shares: dict[str, Weight] = Field(default_factory=dict)
    """The same of tenants (X-Tenant; "" for requests that name none); adapters' shares hold inside one then."""
    max_gap_ms: float | None = Field(None, gt=0)
    """Milliseconds that a running stream waits for other requests' prompts between two of its tokens; from how long
    steps take follows how much is computed. If left out, 28 times what a forward takes at least: a burst is then
    computed nearly as fast as if no stream ran beside it."""
    prefill_chunk_tokens: int = Field(2048, ge=1)
    """Prompt tokens computed in one step at most, padding included: all of them where no stream runs."""
    row_chunk_tokens: int | None = Field(None, ge=1)
    """Of one prompt among them. If left out, all; 256 on CPU, where longer chunks are no faster, and in models with
    sliding windows, whose memory has room for a chunk beside each row's window."""
    max_context: int | None = Field(None, ge=1)
    """Tokens of prompt and answer together; what the model was made for, if left out."""
    memory_budget_gib: float | None = Field(None, gt=0)
    """Memory for keys and values, recurrent state, prefixes and adapters together, in GiB; 0.8 of what is free at
    start, if left out. The model's own weights are not in it."""
    kv_budget_gib: float | None = Field(None, gt=0)
    """Of it, at most so much for keys, values, recurrent state and prefixes, in GiB; three quarters, if left out."""
    adapter_budget_gib: float | None = Field(None, gt=0)
    """Of it, at most so much for adapters on the device, in GiB, with the copies made while one is loaded; a quarter,
    if left out. A load that needs more answers 507."""
    adapter_host_gib: float | None = Field(None, ge=0)
    """At most so much for adapters in host memory, from where they come to a slot without being read again, in GiB;
    what those on the device leave of adapter_budget_gib, if left out; with CUDA a quarter of the host's free one."""
    adapter_file_gib: float = Field(4, ge=0)
    """At most so much, in GiB, for files of adapters that left memory and that nobody else has any more, since their
    folder was written over: in a folder of the server's own, removed when it ends."""
    prefix_cache_gib: float | None = Field(None, ge=0)
    """Of the keys' and values' memory, at most so much for prefixes of earlier prompts and answers, in GiB: all that
    the running rows leave, if left out; 0 keeps none."""
    prefix_cache_dir: Path | None = None
    """Folder that keeps prefixes too, for when they have left memory, and across restarts; none, if left out. One
    server at a time has it, and what another base has left there is removed."""
    prefix_cache_disk_gib: float | None = Field(None, gt=0)
    """What that folder may hold, in GiB; 16, if left out."""
    encode_patches: int = Field(1024, ge=1)
    """Patches of pictures, clips and sounds encoded between two decode steps, or one picture of any size: the longest
    a running stream is held up by them."""
    feature_cache_gib: float | None = Field(None, ge=0)
    """Of the keys' and values' memory, at most so much for what pictures were encoded to, in GiB: an eighth, as far
    as rows leave it, if left out; 0 keeps none."""
    feature_cache_dir: Path | None = None
    """Folder that keeps it too, across restarts; none, if left out. One server at a time has it, and what another
    base has left there is removed."""
    feature_cache_disk_gib: float | None = Field(None, gt=0)
    """What that folder may hold, in GiB; 16, if left out."""
    kv_bits: float | None = None
    """Bits of a stored key or value in full-attention layers: 2, 3, 4, 5, 6, 8, or with half a bit (3.5) TurboQuant.
    Left out, or 16: as the model computes them. A request's own kv_bits takes its place."""
    kv_value_bits: float | None = None
    """Bits of values, where not those of keys."""
    kv_scheme: KvScheme | None = None
    """How they are packed: affine (a scale and a bias a group), or turbo (TurboQuant, 1 to 8 bits); by kv_bits, if
    left out."""
    kv_group_size: Literal[32, 64, 128] = 64
    """Channels that share a scale (affine)."""
    kv_quantize_after: int = Field(0, ge=0)
    """A row of at most so many tokens stays plain; once it is longer, all of it is quantized."""
    kv_plain_layers: int = Field(0, ge=0)
    """So many of the last full-attention layers stay plain."""
    one_step_ahead: Literal["auto", "on", "off"] = "auto"
    """Build a step before the tokens of the one before it are read, so that the device does not wait for Python;
    auto: everywhere but on CPU."""
    drafter: DrafterConfig = Field(default_factory=NoDrafter)
    """Who guesses the next tokens of requests that name nobody (`drafter` in their body), for a step to check: none,
    ngram, or a block with a kind: ngram, model or heads. Tokens are the same with any. Requests may ask for ngram in
    any case."""
    max_adapters: int = Field(64, ge=1)
    """Adapters that are on the device at once. Others that are known come there when they are asked for. A version
    that was replaced while requests hold it counts no more."""
    adapter_versions: int = Field(8, ge=0)
    """Earlier versions of a name that can be asked for as name@N, and rolled back to."""
    adapter_dirs: tuple[Path, ...] = ()
    """Folders in which a model name that is not known is looked up: the adapter folder of that name is loaded by the
    first request that asks for it. Links that lead out of them are refused."""
    adapter_hub: tuple[str, ...] = ()
    """Owners and repositories (`owner`, `owner/name`) that are looked up on the Hugging Face hub the same way, after
    adapter_dirs; of a repository the adapter's files alone are fetched."""
    max_rank: int = Field(256, ge=1)
    """Largest rank an adapter may have."""
    allow_other_base: bool = False
    """Load adapters whose manifest names other base weights, or another tokenizer."""
    context_overflow: ContextOverflow = "error"
    """What is done to a chat that leaves the answer no room in the context. error: it is refused. truncate: its
    oldest turns are left out. summarize: the model itself sums it up, but for what the system says and the last six
    messages."""
    default_max_tokens: int | None = Field(None, ge=1)
    """Answer length of requests that name none, in tokens; the rest of the context, if left out."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: a request that names no temperature, top_p, top_k, min_p or repetition_penalty has the model's, from the
    generation_config.json beside its weights (vLLM's --generation-config). none: that file is not asked."""
    default_sampling: DefaultSamplingConfig = Field(default_factory=DefaultSamplingConfig)
    """The same by the server; it comes before the model's, and after the request's."""
    reasoning_parser: Parser = "auto"
    """By which marks thoughts are told from answers. auto: by those of vocabulary and template. none: what comes is
    the answer. harmony is gpt_oss; deepseek_r1 begins every answer with a thought, unless the prompt has ended it."""
    enable_thinking: bool | None = None
    """The chat template's variable of requests that say nothing, where it reads one; the template's own default, if
    left out."""
    thinking_budget: int | None = Field(None, ge=0)
    """Tokens of thoughts in answers to requests that name no budget; then their end is forced. No bound, if left
    out."""
    thinking_start_token: str | None = Field(None, min_length=1, max_length=MAX_MARK_CHARS)
    """What begins a thought, in place of the parser's mark; it may be several tokens."""
    thinking_end_token: str | None = Field(None, min_length=1, max_length=MAX_MARK_CHARS)
    """What ends it."""
    tool_call_parser: str = "auto"
    """In which family's way answers hold calls of tools. auto: by chat template, then by vocabulary; as Hermes,
    where neither tells. none: calls stay text."""
    special_tokens_in_messages: Literal["words", "control"] = "words"
    """What the text of a special token is inside a message. words: its characters, so that nobody writes a turn into
    what they say. control: the token, for clients that build turns inside messages themselves."""
    max_render_s: float = Field(2.0, gt=0)
    """Seconds of CPU that the chat template may take over one request's messages; more answers 400."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What to compute in; float32 on CPU and as stored elsewhere, if left out."""
    dequantize: bool | None = None
    """Expand quantized weights at load; yes on CPU and no elsewhere, if left out."""
    quantize: Quantization | None = None
    """Pack a full-precision base as it is loaded: as the recipe of its adapters did, or to save memory."""

    @field_validator("tool_call_parser")
    @classmethod
    def _tool_call_parser_is_known(cls, value: str) -> str:
        if value not in TOOL_PARSERS:
            raise ValueError(f"found {value!r}; expected one of {', '.join(TOOL_PARSERS)}")
        return value

    @property
    def base_name(self) -> str:
        """What requests call the base."""
        if self.name is not None:
            return self.name
        folder = Path(self.model).expanduser()
        return folder.resolve().name if folder.is_dir() else self.model

    @property
    def kv_precision(self) -> KvPrecision:
        """In what form rows keep their keys and values, unless a request says otherwise."""
        return self.make_precision(self.kv_bits, value_bits=self.kv_value_bits, scheme=self.kv_scheme)

    def make_precision(
        self,
        kv_bits: float | None,
        *,
        value_bits: float | None,
        scheme: KvScheme | None,
        group_size: int | None = None,
        start_after: int | None = None,
        num_plain_layers: int | None = None,
    ) -> KvPrecision:
        """What such bits mean here; what is left out is this configuration's. RequestError names the field."""
        return precision(
            kv_bits,
            value_bits=value_bits,
            scheme=scheme,
            group_size=self.kv_group_size if group_size is None else group_size,
            start_after=self.kv_quantize_after if start_after is None else start_after,
            num_plain_layers=self.kv_plain_layers if num_plain_layers is None else num_plain_layers,
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problems := list(self._problems()):
            raise Problems(problems)
        return self

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Keys that do not go together, and why."""
        if self.name is not None and (expected := name_problem(self.name)):
            yield "name", f"found {self.name!a:.80}; {expected}"
        yield from self._memory_problems()
        yield from self._precision_problems()
        yield from self._hub_problems()
        yield from self.media.problems()

    def _memory_problems(self) -> Iterator[tuple[str, str]]:
        """Parts that are larger than the whole, and bounds of what is not there."""
        for key, whole_key in (
            ("kv_budget_gib", "memory_budget_gib"),
            ("adapter_budget_gib", "memory_budget_gib"),
            ("adapter_host_gib", "memory_budget_gib"),
            ("prefix_cache_gib", "memory_budget_gib"),
            ("prefix_cache_gib", "kv_budget_gib"),
            ("feature_cache_gib", "memory_budget_gib"),
            ("feature_cache_gib", "kv_budget_gib"),
        ):
            part, whole = getattr(self, key), getattr(self, whole_key)
            if part is not None and whole is not None and part > whole:
                yield key, f"found {part:g}, which is a part of {whole_key}; expected at most {whole:g}"
        for what in ("prefix", "feature"):
            memory, folder, disk = (
                getattr(self, f"{what}_cache_{end}") for end in ("gib", "dir", "disk_gib")
            )
            if folder is not None and memory == 0:
                yield (
                    f"{what}_cache_dir",
                    f"what it holds reaches the disk from memory, and {what}_cache_gib is 0; leave one of them out",
                )
            if disk is not None and folder is None:
                yield (
                    f"{what}_cache_disk_gib",
                    f"found a bound of a folder, but no {what}_cache_dir; write that too",
                )
        if self.feature_cache_dir is not None and self.feature_cache_dir == self.prefix_cache_dir:
            yield "feature_cache_dir", "found prefix_cache_dir's folder; give features one of their own"

    def _precision_problems(self) -> Iterator[tuple[str, str]]:
        try:
            self.kv_precision  # noqa: B018
        except RequestError as error:
            yield error.param or "kv_bits", str(error)

    def _hub_problems(self) -> Iterator[tuple[str, str]]:
        """What can be neither an owner nor a repository."""
        for index, name in enumerate(self.adapter_hub):
            parts = name.split("/")
            if len(parts) > 2 or not all(parts) or name_problem(name):
                yield f"adapter_hub.{index}", f"found {name!a:.80}; expected an owner, or owner/name"


class ModelConfig(ModelSettings):
    """Another model of a server: what it leaves out is as the server has it, but for what is one model's alone."""

    preload: bool = False
    """Load it at start, and not with the first request."""


OWN = frozenset(
    {
        *(
            "model",
            "name",
            "aliases",
            "pinned",
            "adapters",
            "adapter_watch",
            "adapter_dirs",
            "adapter_hub",
            "shares",
        ),
        *(
            "drafter",
            "dequantize",
            "quantize",
            "prefix_cache_dir",
            "prefix_cache_disk_gib",
            "feature_cache_dir",
        ),
        *("feature_cache_disk_gib", "reasoning_parser", "thinking_start_token", "thinking_end_token"),
        "tool_call_parser",
    }
)
"""Keys that say something of one model, and nothing of its neighbours."""
SERVERS_OWN: dict[str, Any] = {"models": (), "model_dirs": (), "experiments": (), "embedding_models": ()}
"""Keys that say something of a server, and nothing of one of its models; as they are where there are none."""


class ServeConfig(ModelSettings, OperatingConfig):
    """Everything `lathe serve` can be told: of its model, and of the server."""

    models: tuple[ModelConfig, ...] = ()
    """Other models, each loaded by the first request that asks for it. Nothing but these and `model` is."""
    model_dirs: tuple[Path, ...] = ()
    """Folders of models: one that is there may be asked for by its folder's name, or as `a/b`, and is served as the
    first one is. Links that lead out of them are refused."""
    max_loaded_models: int = Field(1, ge=1)
    """Models in memory at once. Another that is asked for takes the place of the one that was used least lately; one
    that is in use first ends the requests it has."""
    models_budget_gib: float | None = Field(None, gt=0)
    """Memory of all of them together, weights and memory_budget_gib of each, in GiB; only their number is bounded, if
    left out."""
    min_resident_s: float = Field(5, ge=0)
    """Seconds that a model in use stays at least once it is loaded, while requests for others wait."""
    max_drain_s: float = Field(300, ge=0)
    """Seconds that a model which is to go lets its requests run on at most; those that still run then end with
    503."""
    embedding_models: tuple[EmbeddingModelConfig, ...] = ()
    """Models beside them that make vectors of texts, or scores of pairs; loaded at start, and there to stay."""
    embedding_piece_tokens: int = Field(2048, ge=1)
    """Tokens of texts, padding included, encoded between two decode steps, or one text of any length: the longest a
    running stream is held up by them."""
    max_waiting_texts: int = Field(8192, ge=1)
    """Texts that wait to be encoded; more answer 503 with Retry-After."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback also closes the adapter paths, see allowed_adapter_roots."""
    port: int = Field(8000, ge=0, le=65535)
    """TCP port; 0 takes a free one and prints it."""
    max_body_mib: float = Field(16, gt=0)
    """Largest request body, in MiB; a larger one answers 413 and is not read."""
    body_timeout_s: float = Field(60, gt=0)
    """What a request's body may take to arrive, in seconds; one that takes longer answers 408."""
    stream_keep_alive_s: float = Field(5, ge=0)
    """A stream with nothing to say for so many seconds sends a comment, at first with its headers; 0: never."""
    response_store_mib: float = Field(256, ge=0, lt=math.inf)
    """What responses (/v1/responses) may take that can be asked for later and gone on from, pictures included."""
    response_store_count: int = Field(10_000, ge=0)
    """So many of them at most; 0: none is kept."""
    response_store_hours: float = Field(24, gt=0, lt=math.inf)
    """So long at most. Whoever has not been used longest goes first, of the tenant who holds most."""
    ui: bool = True
    """Show the page at /ui/. Everybody who reaches the server may read it; what it asks needs a key like all else."""
    allowed_adapter_roots: tuple[Path, ...] | None = None
    """Folders under which /v1/load_lora_adapter may read. Left out: everywhere when bound to loopback, else
    nowhere."""
    allowed_media_roots: tuple[Path, ...] | None = None
    """Folders whose files a request may show by their paths. Left out: everything when bound to loopback, else
    nothing."""
    media_limits: MediaLimitsConfig = MediaLimitsConfig.model_validate({})
    """What a request may show."""
    mcp_servers: Path | None = None
    """A file of MCP servers as other clients have it, {"mcpServers": {name: {command, args, env} or {url}}}: a
    request may have their tools run for it, `tools: [{"type": "mcp", "server_label": name}]`. Left out: none."""
    mcp_max_rounds: int = Field(8, ge=1)
    """So often a request's answer may call such tools; the next answer is text."""
    mcp_timeout_s: float = Field(30, gt=0)
    """What connecting to one, or one call, may take."""
    mcp_max_result_chars: int = Field(65536, ge=256)
    """Of a call's result; the model is told where more was cut off."""
    experiments: tuple[ExperimentConfig, ...] = ()
    """A/B tests, each under its own public model name."""
    store: str = "sqlite:///lathe.sqlite"
    """SQLAlchemy URL of exposures and outcomes (SQLite or PostgreSQL); opened if there are experiments."""

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def watch_roots(self) -> tuple[Path, ...] | None:
        """Where files of watched adapters may be, links followed; None: anywhere. ConfigError where a watched folder
        is not there itself."""
        roots = self.allowed_adapter_roots
        if roots is None:
            return None if self.is_loopback else self.adapter_watch
        allowed = [root.expanduser().resolve() for root in roots]
        for folder in self.adapter_watch:
            place = folder.expanduser().resolve()
            if not any(place.is_relative_to(root) for root in allowed):
                raise ConfigError(
                    f"adapter_watch: {folder} is under none of allowed_adapter_roots "
                    f"({', '.join(map(str, roots)) or 'none'})"
                )
        return roots

    @property
    def media_roots(self) -> tuple[Path, ...]:
        """Folders whose files a request may show, links followed."""
        roots = self.allowed_media_roots
        if roots is None:
            return (Path("/"),) if self.is_loopback else ()
        return tuple(root.expanduser().resolve() for root in roots)

    @property
    def has_several_models(self) -> bool:
        """Whether models come and go."""
        return bool(self.models or self.model_dirs)

    @property
    def blocks(self) -> tuple[ModelConfig, ...]:
        """Every model that is configured, the first of them loaded at start."""
        first = {"model": self.model, "name": self.name, "aliases": self.aliases, "preload": True}
        return (ModelConfig.model_validate(first), *self.models)

    def of_model(self, block: ModelConfig) -> ServeConfig:
        """What a server of this model alone would be told. What the block leaves out is the server's, but for what
        only one model can have. ConfigError."""
        return checked(self._fields_of(block))

    @property
    def of_first_model(self) -> ServeConfig:
        """The same of the first."""
        return self.model_copy(update=SERVERS_OWN)

    def _fields_of(self, block: ModelConfig) -> dict[str, Any]:
        inherited = {name: value for name, value in dict(self).items() if name not in OWN}
        own = {
            name: getattr(block, name) for name in block.model_fields_set if name in ServeConfig.model_fields
        }
        return {**inherited, **own, **SERVERS_OWN}

    def _problems(self) -> Iterator[tuple[str, str]]:
        yield from self._name_problems()
        yield from self._experiment_problems()
        yield from self.operating_problems()
        yield from super()._problems()
        yield from self._model_problems()

    def _model_problems(self) -> Iterator[tuple[str, str]]:
        """Models that can never be loaded, and folders that two of them would write to."""
        for index, block in enumerate(self.models):
            try:
                ServeConfig.model_validate(self._fields_of(block))
            except ValidationError as error:
                for problem in error.errors():
                    yield f"models.{index}", _line(problem)
        num_first = 1 + sum(block.preload for block in self.models)
        if self.models and num_first > self.max_loaded_models:
            yield (
                "max_loaded_models",
                f"found {self.max_loaded_models}, and {num_first} models are loaded at start (the first, and those "
                f"with preload); expected as many at least",
            )
        pinned = sum(block.pinned for block in self.models) + self.pinned
        if self.models and pinned >= self.max_loaded_models and pinned <= len(self.models):
            yield (
                "max_loaded_models",
                f"found {self.max_loaded_models}, and {pinned} models are pinned: there is never room for another",
            )
        for key in ("prefix_cache_dir", "feature_cache_dir"):
            folders = [getattr(self, key), *(getattr(block, key) for block in self.models)]
            for index, folder in enumerate(folders):
                if folder is not None and folder in folders[:index]:
                    yield (
                        f"models.{index - 1}.{key}",
                        f"found {folder}, which another model has; give each its own",
                    )

    def _experiment_problems(self) -> Iterator[tuple[str, str]]:
        """Arms of one name, arms that are experiments, names that reports and headers cannot say."""
        for index, experiment in enumerate(self.experiments):
            arms = Counter(variant.name for variant in experiment.build().variants)
            for name, count in arms.items():
                if count > 1:
                    yield (
                        f"experiments.{index}.variants",
                        f"two variants are called {name!r}; give each its own name",
                    )
            for i, v in enumerate(experiment.variants):
                if v.model in {e.name for e in self.experiments}:
                    yield (
                        f"experiments.{index}.variants.{i}.model",
                        f"found the experiment {v.model!r}; expected a model",
                    )
            for i, v in enumerate(experiment.variants):
                for key, label in (("model", v.model), ("name", v.name)):
                    if label is not None and (expected := label_problem(label)):
                        yield f"experiments.{index}.variants.{i}.{key}", f"found {label!a:.80}; {expected}"

    def _name_problems(self) -> Iterator[tuple[str, str]]:
        """Public names share one space: the bases', their aliases, the adapters', the embedding
        models' and the experiments'."""
        taken: dict[str, str] = {}
        for key, name, what in self._public_names():
            if key and (expected := name_problem(name)):
                yield key, f"found {name!a:.80}; {expected}"
            elif name in taken:
                yield key or "name", f"{name!r} is already the name of {taken[name]}"
            taken.setdefault(name, what)

    def _public_names(self) -> Iterator[tuple[str, str, str]]:
        """Each name: where it is written ("": nowhere), the name, and what has it."""
        yield "", self.base_name, "the base"
        for i, other in enumerate(self.models):
            # A path's last part, or a hub name, has told what it is; a name that was written has to be one.
            yield f"models.{i}" + ".name" * (other.name is not None), other.base_name, f"models.{i}"
        settings: list[tuple[str, ModelSettings]] = [("", self)]
        settings += [(f"models.{i}.", block) for i, block in enumerate(self.models)]
        for where, block in settings:
            for i, alias in enumerate(block.aliases):
                yield f"{where}aliases.{i}", alias, f"{where}aliases.{i}"
            for i, adapter in enumerate(block.adapters):
                yield f"{where}adapters.{i}.name", adapter.name, f"{where}adapters.{i}"
        for i, each in enumerate(self.embedding_models):
            yield f"embedding_models.{i}.name", each.name, f"embedding_models.{i}"
        for i, experiment in enumerate(self.experiments):
            yield f"experiments.{i}.name", experiment.name, f"experiments.{i}"


def checked(fields: dict[str, Any]) -> ServeConfig:
    """Of these fields, by name. ConfigError lists all problems."""
    try:
        return ServeConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(problem) for problem in error.errors())) from None


def _line(problem: Any) -> str:
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, Problems):
        return str(cause)
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
