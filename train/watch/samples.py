"""Answers to a few prompts at each validation, by the serving engine, for a person to read.

The recipe's `samples` and the validation rows go in, prompts come out; prompts and the model as it stands go in,
answers come out. Nothing of the training is touched: neither its randomness, for the engine counts its own, nor
the model's mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.engine.engine import Engine
from serve.engine.generate import generate
from serve.engine.request import Request, Sampling
from serve.errors import ConfigError, DataError, RequestError
from serve.model.loading import LoadedModel
from serve.model.network import evaluating
from serve.model.prompt import Prompt
from serve.model.template import ChatTemplate, Message
from serve.model.texts import encode_text
from train.data.example import Example
from train.data.looking import look, num_shown, words_of
from train.data.media import Gatherer
from train.data.media_reader import MediaReader
from train.recipe.recipe import Samples

SHARE_OF_TEXT = 0.5
"""How much of a text row is shown to the model, which goes on from there."""


@dataclass(frozen=True)
class SamplePrompt:
    """What the model is given, and how a person reads it."""

    text: str
    prompt: Prompt


@dataclass(frozen=True)
class Sample:
    """A prompt as a person reads it, and its answer."""

    prompt: str
    answer: str


def prompts_of(
    samples: Samples,
    template: ChatTemplate,
    valid_examples: Sequence[Example],
    *,
    as_text: bool,
    reader: MediaReader | None = None,
) -> list[SamplePrompt]:
    """The prompts a recipe asks for, rendered as serving renders them.

    reader   of what rows show, where the model takes media
    as_text  texts are what the model goes on from, not a user's turn (objective cpt); so without a chat template
    ConfigError names the prompt the template refuses; DataError when no validation row has a prompt.
    """
    if samples.rows is not None:
        found = [_of_row(example, template, reader) for example in valid_examples[: samples.rows]]
        if not found:
            raise DataError("samples.rows: there is no validation row to take a prompt from")
        return found
    prompts = []
    for number, prompt in enumerate(samples.prompts):
        try:
            prompts.append(_of_recipe(prompt, template, as_text, reader))
        except RequestError as error:
            raise ConfigError(f"samples.prompts.{number}: {error}") from error
    return prompts


def _of_recipe(
    prompt: str | Sequence[Message], template: ChatTemplate, as_text: bool, reader: MediaReader | None
) -> SamplePrompt:
    if isinstance(prompt, str):
        if as_text or not template.exists:
            return SamplePrompt(prompt, Prompt(encode_text(template.tokenizer, prompt)))
        return SamplePrompt(prompt, Prompt(template.render([{"role": "user", "content": prompt}])))
    if not any(num_shown(message) for message in prompt):
        return SamplePrompt(_shown(prompt), Prompt(template.render(prompt)))
    gatherer = Gatherer({}, Path.cwd())
    messages, media = gatherer.take(prompt, "messages")
    if problems := [*gatherer.problems, *(problem for ref in media for problem in ref.missing())]:
        raise RequestError("; ".join(problems))
    looked = look(Example("samples.prompts", 1, messages=messages, media=media), reader)
    token_ids = template.render(looked.example.messages or (), media=looked.expansions)
    return SamplePrompt(_shown(messages), looked.prompt(token_ids))


def _of_row(example: Example, template: ChatTemplate, reader: MediaReader | None) -> SamplePrompt:
    looked = look(example, reader)
    example = looked.example
    messages, tokenizer = example.as_messages(), template.tokenizer
    if messages is None:
        token_ids = encode_text(tokenizer, example.text or "")
        token_ids = token_ids[: max(int(len(token_ids) * SHARE_OF_TEXT), 1)]
        return SamplePrompt(tokenizer.decode(list(token_ids)), Prompt(token_ids))
    # The turns of a preference pair end before its answers; a conversation's last answer is the model's to give.
    has_answer = example.chosen is None and messages[-1].get("role") == "assistant" and len(messages) > 1
    asked = messages[:-1] if has_answer else messages
    if template.exists:
        token_ids = template.render(
            asked, tools=example.tools, variables=example.variables, media=looked.expansions
        )
        return SamplePrompt(_shown(asked), looked.prompt(token_ids))
    return SamplePrompt(_shown(asked), Prompt(encode_text(tokenizer, _shown(asked))))


def _shown(messages: Sequence[Message]) -> str:
    """`role: content` lines, or the content alone of a single user's turn."""
    if len(messages) == 1 and messages[0].get("role") == "user":
        return words_of(messages[0])
    return "\n".join(f"{message.get('role')}: {words_of(message)}" for message in messages)


def answers_of(
    model: LoadedModel, prompts: Sequence[SamplePrompt], samples: Samples, stop_ids: tuple[int, ...] = ()
) -> list[Sample]:
    """Each prompt's answer by the weights as they are, in order. RequestError for a prompt beyond the context.

    stop_ids  tokens that end an answer, besides the model's own
    """
    requests = [
        Request(
            f"sample-{number}",
            prompt.prompt,
            Sampling(
                max_tokens=samples.max_tokens, temperature=samples.temperature, seed=samples.seed + number
            ),
            stop_ids=stop_ids,
        )
        for number, prompt in enumerate(prompts)
    ]
    with evaluating(model.network):
        completions = generate(Engine(model), requests)
    return [Sample(prompt.text, each.text) for prompt, each in zip(prompts, completions, strict=True)]
