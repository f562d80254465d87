"""`lathe serve`, `chat` and `doctor`: a model and its adapters, for others, for one person, for a look."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.commands.drawing import (
    EnableThinking,
    FrequencyPenalty,
    MaxTokens,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Temperature,
    ThinkingBudget,
    TopK,
    TopNSigma,
    TopP,
    XtcProbability,
    XtcThreshold,
    fields_given,
)
from serve.commands.options import EMBEDDED_MODEL, ApiKey, JsonFile, Overrides, check_writable, overrides_of
from serve.commands.output import new_console, save_json

if TYPE_CHECKING:
    from serve.config import ServeConfig
    from serve.conversation import Conversation

app = typer.Typer()

Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", metavar="NAME=PATH", help="Load this adapter; repeatable.")
]

EmbeddingModels = Annotated[
    list[str] | None,
    typer.Option(
        "--embedding-model", metavar="NAME=PATH", help="Load this model of vectors or scores too; repeatable."
    ),
]

KEYS_OF = {
    "alias": "aliases",
    "model_dir": "model_dirs",
    "adapter_dir": "adapter_dirs",
    "allowed_media_root": "allowed_media_roots",
    "allow_private_hosts": "media_limits.allow_private_hosts",
    "allowed_origin": "allowed_origins",
    "max_media": "media_limits.max_items",
    "max_pixels": "media.max_pixels",
    **{f"drafter_{name}": f"drafter.{name}" for name in ("model", "max_tokens", "min_match")},
    **{
        name: f"default_sampling.{name}"
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    },
}
"""Flags of `lathe serve` by other names than their keys': one is given several times, the others stand in groups."""
NOT_KEYS = ("model", "adapter", "embedding_model", "also", "host", "port", "overrides")
"""What is not put into the file before it is checked."""


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A model folder, a hub name, or a serving configuration (.yaml).")
    ],
    adapter: Adapters = None,
    embedding_model: EmbeddingModels = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MODEL", help="Another model, loaded by the first request for it; repeatable."
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name of the first model; repeatable.")
    ] = None,
    model_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Requests may name any model in this folder; repeatable."),
    ] = None,
    max_loaded_models: Annotated[
        int | None, typer.Option(help="Models in memory at once; 1, if left out.")
    ] = None,
    models_budget_gib: Annotated[
        float | None, typer.Option(help="Their memory together, weights and all.")
    ] = None,
    idle_unload_s: Annotated[
        float | None, typer.Option(help="Seconds without a request after which a model leaves memory.")
    ] = None,
    context_overflow: Annotated[
        str | None, typer.Option(help="Chats longer than the context: error, truncate or summarize.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    adapter_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Requests may name any adapter in this folder; repeatable."),
    ] = None,
    max_adapters: Annotated[
        int | None, typer.Option(help="Adapters on the device at once; names may be many more.")
    ] = None,
    adapter_watch: Annotated[
        list[Path] | None,
        typer.Option(help="Load what appears in this folder, a run's or one of adapters; repeatable."),
    ] = None,
    memory_budget_gib: Annotated[
        float | None, typer.Option(help="Memory of keys, values, prefixes and adapters.")
    ] = None,
    prefix_cache_gib: Annotated[
        float | None, typer.Option(help="Of it, at most so much for prefixes; 0 keeps none.")
    ] = None,
    prefix_cache_dir: Annotated[
        Path | None, typer.Option(help="A folder that keeps prefixes across restarts.")
    ] = None,
    prefix_cache_disk_gib: Annotated[float | None, typer.Option(help="What that folder may hold.")] = None,
    encode_patches: Annotated[
        int | None, typer.Option(help="Of pictures, between two decode steps; or one picture.")
    ] = None,
    feature_cache_gib: Annotated[
        float | None, typer.Option(help="Of the memory, at most so much for encoded pictures; 0 keeps none.")
    ] = None,
    feature_cache_dir: Annotated[
        Path | None, typer.Option(help="A folder that keeps encoded pictures across restarts.")
    ] = None,
    feature_cache_disk_gib: Annotated[float | None, typer.Option(help="What that folder may hold.")] = None,
    kv_bits: Annotated[
        float | None, typer.Option(help="Bits of stored keys and values: 8, 4, …; 3.5 is TurboQuant.")
    ] = None,
    kv_value_bits: Annotated[float | None, typer.Option(help="Bits of values, where others.")] = None,
    kv_scheme: Annotated[str | None, typer.Option(help="affine or turbo; else by --kv-bits.")] = None,
    kv_group_size: Annotated[
        int | None, typer.Option(help="Channels that share a scale: 32, 64 or 128.")
    ] = None,
    kv_quantize_after: Annotated[
        int | None, typer.Option(help="Rows of at most so many tokens stay plain.")
    ] = None,
    kv_plain_layers: Annotated[
        int | None, typer.Option(help="So many of the last full-attention layers stay plain.")
    ] = None,
    one_step_ahead: Annotated[
        str | None, typer.Option(help="on, off or auto: build a step before the last one is read.")
    ] = None,
    drafter: Annotated[
        str | None, typer.Option(help="ngram, model, heads or none: who guesses tokens ahead.")
    ] = None,
    drafter_model: Annotated[
        str | None, typer.Option(help="Its folder or hub name: of a smaller model, or of heads.")
    ] = None,
    drafter_max_tokens: Annotated[int | None, typer.Option(help="Guesses of one step at most.")] = None,
    drafter_min_match: Annotated[
        int | None, typer.Option(help="ngram: so many tokens are found again at least; 2 to 4.")
    ] = None,
    generation_config: Annotated[
        str | None,
        typer.Option(help="auto: requests that do not say are sampled as the model's file says; none: not."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of requests that do not say.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(help="Marks of thoughts: auto, qwen3, deepseek_r1, gpt_oss, gemma4, mistral, none."),
    ] = None,
    enable_thinking: Annotated[
        bool | None, typer.Option(help="Whether models think for requests that do not say.")
    ] = None,
    thinking_budget: Annotated[
        int | None, typer.Option(help="Tokens of thoughts in an answer at most, unless a request says.")
    ] = None,
    thinking_start_token: Annotated[
        str | None, typer.Option(help="What begins a thought, in place of the parser's mark.")
    ] = None,
    thinking_end_token: Annotated[str | None, typer.Option(help="What ends it.")] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            help="How answers hold calls of tools: auto, none, hermes, qwen3_coder, llama3, mistral, …"
        ),
    ] = None,
    mcp_servers: Annotated[
        Path | None,
        typer.Option(help="A file of MCP servers whose tools are run for requests that name them."),
    ] = None,
    allowed_media_root: Annotated[
        list[Path] | None,
        typer.Option(help="Requests may show files in this folder; repeatable. On loopback: any."),
    ] = None,
    allow_private_hosts: Annotated[
        bool | None, typer.Option("--allow-private-hosts", help="Fetch pictures from private addresses too.")
    ] = None,
    max_media: Annotated[
        int | None, typer.Option(help="Pictures, clips and sounds of one request, together.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Of a picture; larger ones are made smaller, unless a request says.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LATHE_API_KEY", help="A key that every request needs; better by LATHE_API_KEY."),
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file of keys, with tenants, limits and adapters.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(help="A page that may ask from a browser, https://…, or *; repeatable."),
    ] = None,
    drain_timeout_s: Annotated[
        float | None, typer.Option(help="What running requests have to end, after SIGTERM or Ctrl-C.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json: one line a request.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_prompts: Annotated[
        bool | None, typer.Option("--log-prompts", help="Write down what requests say, too.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="OpenTelemetry collector: http://host:4318/v1/traces.")
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate chain, PEM: HTTPS alone.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    ssl_keyfile_password: Annotated[str | None, typer.Option(help="Of that key.")] = None,
    ssl_ca_certs: Annotated[
        Path | None, typer.Option(help="Clients must show a certificate of one of these authorities.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Serve a model and any number of adapters over an OpenAI-compatible API."""
    # What was typed is read as a whole, so no flag can be taken and forgotten.
    keys = keys_given(context.params)
    words = [*keys, *(overrides or [])]
    config = _serve_config(model, adapter or [], host, port, words, embedding_model or [], also or [])
    from serve.api.server import run  # seconds, which a configuration that is wrong need not wait for

    run(config)


@app.command()
def chat(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="What to serve and talk to; without --url only.")
    ] = None,
    adapter: Adapters = None,
    url: Annotated[
        str | None, typer.Option(help="Talk to this running server: the address that `lathe serve` prints.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--model", help="Which of the server's models or adapters; else its only --adapter."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    top_n_sigma: TopNSigma = None,
    xtc_probability: XtcProbability = None,
    xtc_threshold: XtcThreshold = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    enable_thinking: EnableThinking = None,
    thinking_budget: ThinkingBudget = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 512,
    history: Annotated[
        bool, typer.Option(help="Keep what is typed in ~/.cache/lathe/chat_history, for the arrow keys.")
    ] = True,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model in the terminal. Ctrl-C ends an answer, Ctrl-D the talk. Lines may come from a pipe."""
    from serve.conversation import Conversation, Speaker
    from serve.remote import choose_model

    sampling = fields_given(context.params)
    with server_for(model, adapter or [], url) as served_url:
        # Who names one adapter to serve here means to talk to it.
        only = adapter_of(adapter[0])["name"] if url is None and adapter and len(adapter) == 1 else None
        chosen = choose_model(served_url, to or only, api_key)
        _talk(Conversation(Speaker(served_url, chosen, api_key, sampling), system), keeps_history=history)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Try what combines for this model, a folder or a hub name, instead.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="With --model: this adapter folder, not random ones of every kind.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Say what this machine is, how fast its matmul is, and what is missing; or what combines for a model."""
    if model is None:
        from serve.doctor import diagnose, show

        if adapter is not None:
            raise typer.BadParameter(
                "an adapter is tried on a model: name it with --model", param_hint="--adapter"
            )
        found = diagnose(EMBEDDED_MODEL)
        show(found, new_console())
        save_json(json_file, found.as_json())
        return
    from serve.combinations import probe, table
    from serve.tables import show as show_tables

    check_writable(json_file)
    combined = probe(model, adapter)
    drawn, notes = table(combined)
    show_tables(new_console(), drawn, *notes)
    save_json(json_file, combined.as_json())


def _serve_config(
    model: str,
    adapters: list[str],
    host: str | None,
    port: int | None,
    overrides: list[str],
    embedding_models: Sequence[str] = (),
    also: Sequence[str] = (),
) -> ServeConfig:
    """The configuration that `lathe serve` was asked for: a file's, or one made of words."""
    from serve.config_file import load_config

    changes: dict[str, Any] = {"host": host, "port": port}
    if adapters:
        changes["adapters"] = [adapter_of(words) for words in adapters]
    if embedding_models:
        named = [_named(words, "--embedding-model") for words in embedding_models]
        changes["embedding_models"] = [{"name": name, "model": path} for name, path in named]
    if also:
        changes["models"] = [_model_of(words) for words in also]
    return load_config(model, overrides, **changes)


def _model_of(words: str) -> dict[str, str]:
    """'NAME=MODEL', or a model alone -> the keys of its block."""
    name, equals, model = words.partition("=")
    if not equals or "/" in name:
        return {"model": words}
    if not (name and model):
        raise typer.BadParameter(f"found {words!r}; expected MODEL or NAME=MODEL", param_hint="--also")
    return {"name": name, "model": model}


def keys_given(flags: Mapping[str, Any]) -> list[str]:
    """Flags of `lathe serve`, as typer has them, as --set takes them. One that was not given leaves the file's key
    alone."""
    keys: dict[str, Any] = {"drafter": None}  # before what is said of it
    keys |= {name: _as_key(value) for name, value in flags.items() if name not in NOT_KEYS}
    if keys["drafter"] is not None:
        keys["drafter"] = {"kind": keys["drafter"]}  # in place of the file's, whatever that says
    return overrides_of({KEYS_OF.get(name, name): value for name, value in keys.items()})


def _as_key(value: Any) -> bool | float | str | list[str] | None:
    """A flag's value as the file would have it; None: it was not given."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, list | tuple):  # typer has a tuple, an empty one, where nothing was given
        return [str(each.absolute()) if isinstance(each, Path) else each for each in value] or None
    return value


@contextmanager
def server_for(
    model: str | None, adapters: list[str], url: str | None, overrides: Sequence[str] = ()
) -> Iterator[str]:
    """The address of a server: the one that was named, or one started here for as long as it is needed."""
    if (model is None) == (url is None):
        raise typer.BadParameter(
            "name what to serve, or a running server with --url", param_hint="MODEL, --url"
        )
    if url is not None and (adapters or overrides):
        raise typer.BadParameter(
            "are of a model that is loaded here; name one of a server's with --model",
            param_hint="--adapter, --set" if overrides else "--adapter",
        )
    if url is not None:
        yield url
        return
    config = _serve_config(str(model), adapters, None, None, [*overrides])
    from serve.api.bases import Bases
    from serve.api.server import serving

    bases = Bases.start(config)
    try:
        with serving(bases) as served_url:
            yield served_url
    finally:
        bases.close()


def _talk(conversation: Conversation, *, keeps_history: bool) -> None:
    from serve import chat as terminal

    if sys.stdin.isatty():
        history = terminal.HISTORY if keeps_history else None
        with terminal.Keyboard(history=history) as keyboard:
            terminal.at_terminal(conversation, keyboard.read, new_console())
    else:
        terminal.from_pipe(conversation, sys.stdin.buffer, new_console())


def adapter_of(words: str) -> dict[str, str]:
    """'NAME=PATH' -> its parts."""
    name, path = _named(words, "--adapter")
    return {"name": name, "path": path}


def _named(words: str, option: str) -> tuple[str, str]:
    """'NAME=PATH' -> its parts."""
    name, equals, path = words.partition("=")
    if not (name and equals and path):
        raise typer.BadParameter(f"found {words!r}; expected NAME=PATH", param_hint=option)
    return name, path
