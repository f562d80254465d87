"""`lathe generate`: one answer, to standard output. Flags have mlx_lm.generate's and mlx_vlm.generate's words."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Mapping, Sequence
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
from serve.commands.options import ApiKey, Overrides, check_writable
from serve.commands.output import new_console, save_json
from serve.commands.serving import server_for

if TYPE_CHECKING:
    from serve.remote_answer import RemoteAnswer

app = typer.Typer()

STDIN, STDOUT = "-", Path("-")
NO_PROMPT = "found none; give --prompt TEXT, or pipe it in"


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder, a hub name, or a serving configuration (.yaml); without --url only."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Else, or if -, what standard input holds.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "--adapter-path",
            metavar="[NAME=]PATH",
            help="Load this adapter; a sole one answers.",
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Ask this running server.")] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--model", help="Which of the models and adapters; else a sole --adapter, or the first."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "--system-prompt", help="System prompt.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="A picture's file or address, before the prompt; repeatable.")
    ] = None,
    video: Annotated[list[str] | None, typer.Option(help="A clip's; repeatable.")] = None,
    audio: Annotated[
        list[Path] | None, typer.Option(help="A sound's file, .wav or .mp3; repeatable.")
    ] = None,
    max_tokens: MaxTokens = 512,
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
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", "--extra-eos-token", help="Ends the answer: a text or a token; repeatable."),
    ] = None,
    prefill_response: Annotated[
        str | None, typer.Option(help="What the answer begins with; it is not printed.")
    ] = None,
    chat_template_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="Variables of the chat template.")
    ] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Go on from the prompt as it is.")
    ] = False,
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Any other field of the request, as JSON or text; repeatable."
        ),
    ] = None,
    overrides: Overrides = None,
    verbose: Annotated[
        bool | None,
        typer.Option(help="Tell tokens and times on standard error; if left out, where that is a terminal."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Also write answer, tokens and times to FILE; - prints them alone."
        ),
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Answer one prompt and end. A pipe gets the answer alone."""
    from serve.remote import choose_model
    from serve.remote_answer import CHAT, COMPLETIONS, RemoteAnswer

    if json_file != STDOUT:
        check_writable(json_file)
    drawing = fields_given(context.params) | _named(field or [])
    if stop:
        drawing["stop"] = stop
    if chat_template_config is not None:
        drawing["chat_template_kwargs"] = _json_object(chat_template_config, "--chat-template-config")
    asked = _prompt(prompt)
    if not (asked.strip() or image or video or audio or (ignore_chat_template and prompt == "")):
        raise typer.BadParameter(NO_PROMPT, param_hint="--prompt")
    if ignore_chat_template:
        _refuse_of_chats(
            {
                "--system": system,
                "--image": image,
                "--video": video,
                "--audio": audio,
                "--prefill-response": prefill_response,
                "--chat-template-config": chat_template_config,
            }
        )
        path, body = COMPLETIONS, dict[str, Any](prompt=asked)
    else:
        path, body = CHAT, _chat(asked, system, prefill_response, image or [], video or [], audio or [])
    adapters = [_named_adapter(words) for words in adapter or []]
    with server_for(model, adapters, url, overrides or []) as served_url:
        only = adapters[0].partition("=")[0] if len(adapters) == 1 else None
        name = choose_model(served_url, to or only, api_key)
        body = {"model": name, **body, "stream_options": {"include_usage": True}, **drawing}
        answer = RemoteAnswer(served_url, path, body, api_key)
        pieces = _pieces(answer, is_printed=json_file != STDOUT)
    told = _told(name, answer, pieces)
    if json_file == STDOUT:
        print(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        save_json(json_file, told)
    if verbose or (verbose is None and sys.stderr.isatty()):
        _tell_times(answer)


def _pieces(answer: RemoteAnswer, *, is_printed: bool) -> list[str]:
    """All of them, printed as they come, or not."""
    from serve.chat import show

    pieces: list[str] = []

    def kept() -> Generator[str, None, None]:
        for piece in answer:
            pieces.append(piece)
            yield piece

    if is_printed:
        show(kept(), new_console())
    else:
        for _ in kept():
            pass
    return pieces


def _told(model: str, answer: RemoteAnswer, pieces: Sequence[str]) -> dict[str, Any]:
    from serve.remote_answer import Thought

    return {
        "model": model,
        "text": "".join(piece for piece in pieces if not isinstance(piece, Thought)),
        "reasoning": "".join(piece for piece in pieces if isinstance(piece, Thought)) or None,
        "finish_reason": answer.finish,
        "usage": answer.usage,
        "first_token_s": answer.first_s,
        "total_s": answer.total_s,
    }


def _tell_times(answer: RemoteAnswer) -> None:
    """A line on standard error."""
    usage, first_s, total_s = answer.usage or {}, answer.first_s, answer.total_s or 0.0
    num_prompt, num_tokens = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    parts = [f"{num_prompt:,} tokens of prompt, {num_tokens:,} of answer in {total_s:.2f} s"]
    if first_s is not None:
        parts.append(f"the first after {first_s:.2f} s")
        if num_tokens > 1 and total_s > first_s:
            parts.append(f"then {(num_tokens - 1) / (total_s - first_s):,.1f} a second")
    parts.append(f"ended by {answer.finish}")
    new_console(stderr=True).print("; ".join(parts), style="dim", highlight=False, soft_wrap=True)


def _prompt(typed: str | None) -> str:
    """The option's, or standard input's. A last line break of a pipe is not part of it."""
    if typed is not None and typed != STDIN:
        return typed
    if typed is None and sys.stdin.isatty():
        raise typer.BadParameter(NO_PROMPT, param_hint="--prompt")
    return sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n")


def _chat(
    prompt: str,
    system: str | None,
    prefill: str | None,
    images: Sequence[str],
    videos: Sequence[str],
    sounds: Sequence[Path],
) -> dict[str, Any]:
    """The part of a chat's body that says what is asked. RequestError for a file that cannot be read."""
    from serve.conversation import address_of, encoded

    parts: list[Mapping[str, Any]] = [
        *({"type": "image_url", "image_url": {"url": address_of(each)}} for each in images),
        *({"type": "video_url", "video_url": {"url": address_of(each)}} for each in videos),
        *(
            {
                "type": "input_audio",
                "input_audio": {"data": encoded(str(each)), "format": each.suffix[1:].lower() or "wav"},
            }
            for each in sounds
        ),
    ]
    content = [*parts, {"type": "text", "text": prompt}] if parts else prompt
    messages: list[Mapping[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    if prefill is None:
        return {"messages": messages}
    messages.append({"role": "assistant", "content": prefill})
    return {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}


def _named_adapter(words: str) -> str:
    """NAME=PATH of either; a path alone is called as its folder is."""
    path = Path(words).expanduser()
    name, equals, _ = words.partition("=")
    if equals and name and not path.exists():
        return words
    return f"{path.resolve().name}={path}"


def _named(fields: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE each, the value as JSON where it is some."""
    found: dict[str, Any] = {}
    for words in fields:
        name, equals, value = words.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"found {words!r}; expected NAME=VALUE", param_hint="--field")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _json_object(text: str, option: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"found {text!r}; expected a JSON object", param_hint=option)
    return found


def _refuse_of_chats(given: Mapping[str, object]) -> None:
    """A prompt that is taken as it is has no messages."""
    wrong = [option for option, value in given.items() if value]
    if wrong:
        raise typer.BadParameter("is of chats; leave --ignore-chat-template out", param_hint=", ".join(wrong))
