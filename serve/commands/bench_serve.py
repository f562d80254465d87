"""`lathe bench serve`: any OpenAI-compatible server, measured from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.commands.options import (
    DEFAULT_URL,
    ApiKey,
    JsonFile,
    Overrides,
    PngFile,
    above_0,
    check_writable,
    numbers_of,
    one_of,
    words_of,
)
from serve.commands.output import dim, new_console, reporting, save_json

app = typer.Typer()


@app.command("serve")
def bench_serve(
    url: Annotated[
        str | None,
        typer.Option(
            help="The address that `lathe serve` prints; http://127.0.0.1:8000 if nothing is started."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Start a server for it: what `lathe serve` takes, or tiny, 29M, 0.6B, 1.7B for a random model.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Models to ask in turn, a,b,c; else the first listed.")
    ] = None,
    adapters: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ask so many of the server's adapters; a random model is started with so many."
        ),
    ] = None,
    zipf: Annotated[
        float | None,
        typer.Option(min=0, help="Draw the models: the k-th 1/k^ZIPF as often as the first. Else in turn."),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            "--concurrency",
            "--max-concurrency",
            help="Numbers of clients, one after the other (1,4,16); with a rate, the most under way.",
        ),
    ] = None,
    request_rate: Annotated[
        str | None,
        typer.Option(help="Open loop: requests a second, one rate after the other; inf is a burst."),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(help="Of arrivals at a rate: 1 is Poisson, inf evenly spaced, less than 1 burstier."),
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", "--num-prompts", min=1, help="At each level; else 4 a client, or 10 s of a rate."
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds of each level: later no request is sent, and a minute later none is heard."
        ),
    ] = None,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            "--prompt-tokens",
            "--random-input-len",
            metavar="LENGTHS",
            help="128, uniform:64:512 or lognormal:MEDIAN:SIGMA[:MAX].",
        ),
    ] = "128",
    max_tokens: Annotated[
        str,
        typer.Option(
            "--max-tokens", "--random-output-len", metavar="LENGTHS", help="Of answers; as prompts."
        ),
    ] = "64",
    dataset_path: Annotated[
        Path | None,
        typer.Option(help="JSONL: prompt, messages or prompt_tokens a line, and output_tokens if it likes."),
    ] = None,
    num_prefixes: Annotated[
        int,
        typer.Option(
            "--num-prefixes", "--prefix-repetition-num-prefixes", min=0, help="Beginnings that prompts share."
        ),
    ] = 0,
    prefix_tokens: Annotated[
        int,
        typer.Option(
            "--prefix-tokens",
            "--prefix-repetition-prefix-len",
            min=1,
            help="Of each, beside --prompt-tokens.",
        ),
    ] = 256,
    prefix_zipf: Annotated[
        float, typer.Option(min=0, help="The k-th prefix 1/k^PREFIX_ZIPF as often as the first.")
    ] = 1.0,
    images: Annotated[
        int, typer.Option(min=0, help="Made-up pictures of each request, before its words; chat alone.")
    ] = 0,
    videos: Annotated[int, typer.Option("--videos", "--video", min=0, help="Made-up clips of each.")] = 0,
    image_size: Annotated[int, typer.Option(min=16, help="Edge of pictures and frames, in pixels.")] = 448,
    frames: Annotated[int, typer.Option(min=2, help="Of a clip.")] = 16,
    distinct_media: Annotated[
        int, typer.Option(min=1, help="So many that differ are shown in turn: more than that are known ones.")
    ] = 64,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="What is good: ttft:500, tpot:50, e2el:2000; repeatable."),
    ] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for full-length answers, where the server can.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="Size prompts with this folder's tokenizer.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same one, the same requests.")] = 0,
    overrides: Overrides = None,
    api_key: ApiKey = None,
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure any OpenAI-compatible server: time to first token, time per token, gaps, tokens per second, goodput."""
    from contextlib import ExitStack
    from dataclasses import replace

    from serve.bench import dataset, lengths, plots, subject
    from serve.bench import goodput as good
    from serve.bench.summary import notes, table
    from serve.bench.sweep import Sweep, run
    from serve.bench.workload import Prefixes, Shown, Workload
    from serve.tables import show

    rates = _rates(request_rate)
    levels = numbers_of(concurrency or "1,4,16", "--concurrency")
    one_of(endpoint, ("chat", "completions"), "--endpoint")
    above_0(burstiness, "--burstiness")
    above_0(time_limit, "--time-limit")
    _refuse(
        burstiness != 1.0 and not rates, "--burstiness", "clients are no arrivals; give --request-rate too"
    )
    _refuse(start is None and overrides, "--set", "is of a server that --start starts")
    _refuse(start is not None and url is not None, "--url, --start", "name a running server, or --start one")
    _refuse(
        not num_prefixes and (prefix_tokens, prefix_zipf) != (256, 1.0),
        "--prefix-tokens, --prefix-zipf",
        "no prefixes are shared; give --num-prefixes too",
    )
    _refuse(
        not (images or videos) and (image_size, frames, distinct_media) != (448, 16, 64),
        "--image-size, --frames, --distinct-media",
        "nothing is shown; give --images or --videos too",
    )
    _refuse(
        (images or videos) and endpoint != "chat", "--images, --videos", "completions show nothing; ask chats"
    )
    named = words_of(model or "")
    _refuse(model is not None and not named, "--model", f"found {model!r}; expected names like a,b,c")
    _refuse(
        model is not None and adapters is not None,
        "--model, --adapters",
        "name the models, or say how many adapters",
    )
    workload = Workload(
        models=(),
        prompt_tokens=lengths.parse(prompt_tokens, "--prompt-tokens"),
        max_tokens=lengths.parse(max_tokens, "--max-tokens"),
        model_exponent=zipf,
        prefixes=Prefixes(num_prefixes, prefix_tokens, prefix_zipf) if num_prefixes else None,
        dataset=dataset.read(dataset_path) if dataset_path else None,
        shown=Shown(images, videos, image_size, frames, distinct_media) if images or videos else None,
        seed=seed,
    )
    objective = good.parse(goodput) if goodput else None
    check_writable(json_file)
    check_writable(png, "--png")
    with ExitStack() as stack:
        progress = stack.enter_context(reporting())
        if start is not None:
            url = stack.enter_context(subject.started(start, adapters, overrides or [], progress))
        url = url or DEFAULT_URL
        sweep = Sweep(
            url=url,
            workload=replace(workload, models=subject.models_of(url, named, adapters, api_key)),
            concurrency=levels if concurrency or not rates else (),
            request_rates=rates,
            burstiness=burstiness,
            num_requests=requests,
            time_limit_s=time_limit,
            endpoint="completions" if endpoint == "completions" else "chat",
            tokenizer=tokenizer,
            extra={"ignore_eos": True} if ignore_eos else {},
            objective=objective,
            api_key=api_key,
        )
        outcome = run(sweep, progress)
    asked = f"{start or url}, {prompt_tokens} prompt tokens asked, {max_tokens} new"
    title = f"{asked}; p50 / p95 (gaps p50 / p95 / p99 / longest)"
    show(new_console(), table(title, outcome.summaries), *dim(notes(outcome.summaries)))
    save_json(json_file, outcome.as_json(sweep))
    if png is not None:
        plots.save(plots.served(asked, outcome.rounds, outcome.summaries), png)


def _refuse(is_wrong: object, option: str, why: str) -> None:
    """Options that say nothing together."""
    if is_wrong:
        raise typer.BadParameter(why, param_hint=option)


def _rates(text: str | None) -> tuple[float, ...]:
    """'0.5,4,inf' -> (0.5, 4.0, inf); nothing -> ()."""
    if text is None:
        return ()
    try:
        rates = tuple(float(word) for word in words_of(text))
    except ValueError:
        rates = ()
    if not rates or not all(rate > 0 for rate in rates):
        raise typer.BadParameter(
            f"found {text!r}; expected requests a second like 0.5,4,inf", param_hint="--request-rate"
        )
    return rates
