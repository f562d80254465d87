"""`lathe bench` but for its `serve` and `train`: Lathe beside others, and beside itself, on random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from serve.commands.options import (
    EMBEDDED_MODEL,
    JsonFile,
    PngFile,
    above_0,
    check_writable,
    numbers_of,
    one_of,
    words_of,
)
from serve.commands.output import at_work, dim, new_console, save_json

if TYPE_CHECKING:
    from serve.bench.finding import Finding, Keep

app = typer.Typer()

Parts = Annotated[str, typer.Option(help="Any of them.")]
ModelSize = Annotated[str, typer.Option(help="Parameters of the random model: tiny, 29M, 0.6B or 1.7B.")]
S = TypeVar("S")
Bench = Callable[[S, Path, Callable[[str], None], "Keep"], "list[Finding]"]
"""(setting, folder, progress, keep) → findings."""


@app.command("compare")
def bench_compare(
    concurrency: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,4,16,32,64",
    only: Annotated[
        str, typer.Option(help="Who takes part, any of them.")
    ] = "lathe,bare,mlx_lm,mlx_vlm,vllm_mlx,unused,one,mixed8,mixed32",
    prompt_tokens: Annotated[int, typer.Option(min=16)] = 74,
    max_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="They take turns this many times.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Of each client in a round.")] = 2,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds of all rounds; what would not end in time is not begun.")
    ] = None,
    size: ModelSize = "29M",
    rank: Annotated[int, typer.Option(min=1, help="Of each adapter, on all linear layers.")] = 16,
    vllm_mlx: Annotated[
        str | None,
        typer.Option(
            envvar="LATHE_VLLM_MLX", metavar="EXECUTABLE", help="vllm-mlx's, where it is not on the path."
        ),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Keep model, adapters and server logs here.")] = None,
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure Lathe, its mixes of adapters, a bare batched loop and other servers on one random model, in turns."""
    from serve.bench import compare, contest, plots, servers
    from serve.bench.standin import SIZES
    from serve.bench.summary import notes, table
    from serve.tables import show

    above_0(time_limit, "--time-limit")
    asked = compare.Comparison(
        size=one_of(size, tuple(SIZES), "--size"),
        concurrency=numbers_of(concurrency, "--concurrency"),
        num_prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        rounds=rounds,
        requests_per_client=requests,
        only=_chosen(only, tuple(contest.KEYS), "--only"),
        time_limit_s=time_limit,
        rank=rank,
    )
    check_writable(json_file)
    check_writable(png, "--png")

    def keep(so_far: compare.Outcome) -> None:
        save_json(json_file, so_far.as_json(asked))

    with at_work(folder) as (home, progress):
        executable = vllm_mlx or servers.find_vllm_mlx()
        outcome = compare.run(asked, home, progress, keep, executable)
    keep(outcome)
    title = "p50 / p95 over all rounds (gaps p50 / p95 / p99 / longest)"
    show(
        new_console(),
        table(title, outcome.summaries),
        compare.table(outcome),
        *dim([*notes(outcome.summaries), *compare.notes(outcome)]),
    )
    if png is not None:
        asked_for = f"{size} model, {prompt_tokens} prompt tokens, {max_tokens} new, {rounds} rounds"
        plots.save(plots.compared(asked_for, outcome), png)


@app.command("adapters")
def bench_adapters(
    parts: Parts = "mixes,unused,ranks,load,many",
    rounds: Annotated[int, typer.Option(min=1, help="What is compared takes turns this many times.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="mixes, unused: requests that run together.")] = 32,
    ranked: Annotated[int, typer.Option(min=1, help="ranks: adapters of ranks 4 to 128, a row each.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=16)] = 74,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 48,
    streams: Annotated[int, typer.Option(min=1, help="load: rows that stream meanwhile.")] = 16,
    loads: Annotated[int, typer.Option(min=1, help="load: adapters loaded, replaced and unloaded.")] = 5,
    many: Annotated[int, typer.Option(min=2, help="many: adapters on disk.")] = 1000,
    slots: Annotated[int, typer.Option(min=1, help="many: that fit on the device together.")] = 16,
    clients: Annotated[int, typer.Option(min=1, help="many: clients.")] = 16,
    zipf: Annotated[float, typer.Option(min=0, help="many: the k-th 1/k^ZIPF as often as the first.")] = 1.0,
    size: ModelSize = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep model, adapters and server logs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure what adapters cost: mixed, unused, of many ranks, loaded beside streams, and more than fit."""
    from serve.bench import adapters, crowd, disturb
    from serve.bench.standin import SIZES

    asked = adapters.Setting(
        parts=_chosen(parts, adapters.PARTS, "--parts"),
        size=SIZES[one_of(size, tuple(SIZES), "--size")],
        rows=rows,
        num_ranked=ranked,
        num_prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        rounds=rounds,
        load=disturb.Setting(num_rows=streams, rounds=loads),
        crowd=crowd.Setting(
            num_adapters=many,
            num_slots=slots,
            exponent=zipf,
            clients=clients,
            num_prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            rounds=rounds,
        ),
    )
    _measure(adapters.run, asked, f"Median of {rounds} round(s), and extremes", folder, json_file)


@app.command("step")
def bench_step(
    rows: Annotated[str, typer.Option(help="Numbers of rows, measured one after the other.")] = "16,64",
    rounds: Annotated[int, typer.Option(min=1, help="Loop and engine take turns this many times.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Of each in a round.")] = 20,
    adapters: Annotated[
        bool,
        typer.Option(
            help="Of a 29M model's step instead: with adapters, mixed and alone, over the bare one."
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure what a decode step takes over mlx-lm's bare loop, on a tiny model, and where its time goes."""
    from serve.bench import mixtures, step
    from serve.tables import show

    asked = step.Setting(numbers_of(rows, "--rows"), rounds, steps)
    check_writable(json_file)
    if adapters:
        mixed = mixtures.Setting(asked.rows, rounds)
        with at_work() as (home, progress):
            found = mixtures.run(mixed, home, progress)
        show(new_console(), mixtures.table(found))
        save_json(json_file, mixtures.as_json(mixed, found))
        return
    with at_work() as (home, progress):
        results = step.run(asked, home, progress)
    show(new_console(), step.table(results), step.parts_table(results))
    save_json(json_file, step.as_json(asked, results))


@app.command("constraints")
def bench_constraints(
    rows: Annotated[int, typer.Option(min=1, help="Each with a schema of its own.")] = 16,
    vocabulary: Annotated[int, typer.Option(min=512, help="Tokens of the model.")] = 32_768,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Of answers, both sides' step by step.")] = 5,
    size: ModelSize = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep the model here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure what a schema in each row takes of a step, over the same rows without, on a random model."""
    from serve.bench import constraints
    from serve.bench.standin import SIZES

    size = one_of(size, tuple(SIZES), "--size")
    asked = constraints.Setting(rows, vocabulary, max_tokens, rounds, size)
    title = f"Vocabulary of {vocabulary:,}; median of {rounds} round(s), and extremes"
    _measure(constraints.run, asked, title, folder, json_file)


@app.command("overhead")
def bench_overhead(
    clients: Annotated[str, typer.Option(help="Numbers of clients, one after the other.")] = "1,16",
    rounds: Annotated[int, typer.Option(min=1, help="HTTP and engine take turns this many times.")] = 5,
    requests: Annotated[int, typer.Option(min=1, help="Of each client in a round.")] = 2,
    alone: Annotated[int, typer.Option(min=1, help="Of one client alone in a round.")] = 12,
    prompt_tokens: Annotated[int, typer.Option(min=16)] = 74,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    size: ModelSize = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep model and server log here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure what HTTP costs over the engine alone, in one process, in turns."""
    from serve.bench import overhead
    from serve.bench.standin import SIZES

    asked = overhead.Setting(
        size=one_of(size, tuple(SIZES), "--size"),
        clients=numbers_of(clients, "--clients"),
        requests_per_client=requests,
        requests_alone=alone,
        num_prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        rounds=rounds,
    )
    title = (
        f"{size}, {prompt_tokens} prompt tokens, {max_tokens} new; median of {rounds} round(s), and extremes"
    )
    _measure(overhead.run, asked, title, folder, json_file)


@app.command("hostile")
def bench_hostile(
    parts: Parts = "vanish,half,bodies,keys,deaf",
    rounds: Annotated[int, typer.Option(min=1, help="With and without them take turns this many times.")] = 3,
    streams: Annotated[int, typer.Option(min=1, help="Of others, whose rate is measured.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each.")] = 192,
    size: ModelSize = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep model and server log here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the rate of streams beside clients that vanish, stall, send too much or try keys, over without them."""
    from serve.bench import hostile
    from serve.bench.standin import SIZES

    asked = hostile.Setting(
        parts=_chosen(parts, hostile.PARTS, "--parts"),
        size=one_of(size, tuple(SIZES), "--size"),
        num_streams=streams,
        max_tokens=max_tokens,
        rounds=rounds,
    )
    _measure(hostile.run, asked, f"Median of {rounds} round(s), and extremes", folder, json_file)


@app.command("cache")
def bench_cache(
    parts: Parts = "ragged,prefix,precision,throughput",
    rounds: Annotated[int, typer.Option(min=1, help="What is compared takes turns this many times.")] = 1,
    rows: Annotated[int, typer.Option(min=2, help="ragged: rows in the batch.")] = 16,
    long_tokens: Annotated[int, typer.Option(min=64, help="ragged: the long row's prompt.")] = 2000,
    prefix_tokens: Annotated[str, typer.Option(help="prefix: lengths of documents.")] = "2048,8192",
    prefill_tokens: Annotated[int, typer.Option(min=64, help="precision: the prompt's length.")] = 4096,
    clients: Annotated[int, typer.Option(min=1, help="throughput: clients.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=8, help="ragged and throughput: of each answer.")] = 64,
    size: ModelSize = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep model, prefixes and server logs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure rows of mixed lengths, prefixes in memory and on disk, quantized KV, and what the cache costs."""
    from serve.bench import cache, precision, prefix, ragged, throughput
    from serve.bench.standin import SIZES

    asked = cache.Setting(
        parts=_chosen(parts, cache.PARTS, "--parts"),
        size=one_of(size, tuple(SIZES), "--size"),
        ragged=ragged.Setting(num_rows=rows, long_tokens=long_tokens, max_tokens=max_tokens, rounds=rounds),
        prefix=prefix.Setting(numbers_of(prefix_tokens, "--prefix-tokens"), rounds),
        precision=precision.Setting(prefill_tokens),
        throughput=throughput.Setting(clients, max_tokens=max_tokens, rounds=rounds),
    )
    _measure(cache.run, asked, f"Median of {rounds} round(s), and extremes", folder, json_file)


@app.command("drafters")
def bench_drafters(
    parts: Parts = "copied,unguessed,model",
    rounds: Annotated[int, typer.Option(min=1, help="What is compared takes turns this many times.")] = 3,
    rows: Annotated[int, typer.Option(min=2, help="copied, unguessed: requests that run together.")] = 8,
    adapters: Annotated[int, typer.Option(min=1, help="copied: of those rows, in turns.")] = 4,
    changed: Annotated[
        float, typer.Option(min=0, max=1, help="copied: share of the shown tokens that are others.")
    ] = 0.02,
    prompt_tokens: Annotated[int, typer.Option(min=32)] = 256,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 160,
    draft: Annotated[
        Path, typer.Option(help="model: the draft model; the embedded one.", show_default=False)
    ] = EMBEDDED_MODEL,
    target: Annotated[
        Path | None,
        typer.Option(help="model: its target, 20 times as large; one that it stands in, widened."),
    ] = None,
    noise: Annotated[
        float, typer.Option(min=0, help="model: how far the widened one is from saying the same.")
    ] = 0.01,
    size: ModelSize = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep models and adapters here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure what guesses gain: n-grams on copied and on unguessed answers, and a draft model, over none."""
    from serve.bench import drafters
    from serve.bench.standin import SIZES

    asked = drafters.Setting(
        draft=str(draft),
        parts=_chosen(parts, drafters.PARTS, "--parts"),
        target=str(target) if target is not None else None,
        noise=noise,
        size=SIZES[one_of(size, tuple(SIZES), "--size")],
        rows=rows,
        num_adapters=adapters,
        changed=changed,
        num_prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        rounds=rounds,
    )
    _measure(drafters.run, asked, f"Median of {rounds} round(s), and extremes", folder, json_file)


@app.command("images")
def bench_images(
    parts: Parts = "again,clip,requests,stall",
    rounds: Annotated[int, typer.Option(min=1, help="The servers take turns this many times.")] = 3,
    edge: Annotated[int, typer.Option(min=28, help="Of a picture, in pixels.")] = 448,
    tower_layers: Annotated[int, typer.Option(min=1, help="Of what looks at it.")] = 24,
    frames: Annotated[int, typer.Option(min=2, help="clip: of a film.")] = 32,
    clients: Annotated[str, typer.Option(help="requests: numbers of clients.")] = "1,8",
    streams: Annotated[int, typer.Option(min=1, help="stall: text streams beside the picture.")] = 4,
    stream_tokens: Annotated[int, typer.Option(min=16, help="stall: of each.")] = 400,
    folder: Annotated[Path | None, typer.Option(help="Keep model, films and server logs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure pictures and clips, new and known, with Lathe and mlx_vlm.server on one random model, in turns."""
    from serve.bench import images
    from serve.bench.standin_vlm import Size

    asked = images.Setting(
        parts=_chosen(parts, images.PARTS, "--parts"),
        size=Size(tower_layers=tower_layers, max_pixels=edge * edge),
        edge=edge,
        num_frames=frames,
        clients=numbers_of(clients, "--clients"),
        num_streams=streams,
        stream_tokens=stream_tokens,
        rounds=rounds,
    )
    title = f"Pictures of {edge} px; median of {rounds} round(s), and extremes"
    _measure(images.run, asked, title, folder, json_file)


@app.command("conversations")
def bench_conversations(
    conversations: Annotated[int, typer.Option(min=1)] = 24,
    turns: Annotated[int, typer.Option(min=1, help="Of each conversation.")] = 5,
    systems: Annotated[
        int, typer.Option(min=1, help="System prompts, shared as Zipf has it: the k-th 1/k as often.")
    ] = 5,
    system_tokens: Annotated[int, typer.Option(min=1)] = 384,
    message_tokens: Annotated[int, typer.Option(min=1)] = 32,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 16,
    held: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the conversations that the caches hold.")
    ] = 0.25,
    clients: Annotated[int, typer.Option(min=1)] = 4,
    size: ModelSize = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep model and server logs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the prefix caches of Lathe and mlx_vlm.server on chats that share system prompts, in turns."""
    from serve.bench import conversations as played
    from serve.bench.scripts import Setting
    from serve.bench.standin import SIZES
    from serve.tables import show

    asked = Setting(
        num_conversations=conversations,
        num_turns=turns,
        num_systems=systems,
        system_words=system_tokens,
        message_words=message_tokens,
        max_tokens=max_tokens,
        held_frac=held,
        clients=clients,
        size=one_of(size, tuple(SIZES), "--size"),
    )
    check_writable(json_file)
    with at_work(folder) as (home, progress):
        outcome = played.run(asked, home, progress)
    show(new_console(), played.table(outcome, asked), *dim(played.notes(outcome)))
    save_json(json_file, outcome.as_json(asked))


def _measure(run: Bench[S], setting: S, title: str, folder: Path | None, json_file: Path | None) -> None:
    """Run a benchmark of findings and show them; each is in the file as soon as it is known."""
    from serve.bench import finding
    from serve.tables import show

    check_writable(json_file)

    def keep(so_far: list[Finding]) -> None:
        save_json(json_file, finding.as_json(setting, so_far))

    with at_work(folder) as (home, progress):
        findings = run(setting, home, progress, keep)
    show(new_console(), finding.table(title, findings), *dim(finding.notes(findings)))


def _chosen(text: str, choices: tuple[Any, ...], option: str) -> tuple[Any, ...]:
    """Some of the choices, one at least, in the order in which they were written."""
    return tuple(one_of(word, choices, option) for word in words_of(text) or [text])
