"""Chat rows in, a Hugging Face tokenizer folder out: byte-level BPE with a ChatML template.

Run as `python -m train.data.tokenizer_bpe ROWS.jsonl OUT`; `--pictures` makes one that has places for pictures and
clips. It knows nothing of models or of what rows mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1152
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"

TEMPLATE = """\
{%- if tools %}{{ raise_exception('this model was not trained to call tools') }}{% endif -%}
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{ raise_exception('this model knows the roles system, user and assistant, not ' ~ message.role) }}
{%- endif -%}
<|im_start|>{{ message.role ~ '\\n' ~ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

PICTURE_TOKENS = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
"""By the names under which Qwen's processors look for them."""
PICTURE_TEMPLATE = """\
{%- if tools %}{{ raise_exception('this model was not trained to call tools') }}{% endif -%}
{%- set seen = namespace(number=0) -%}
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{ raise_exception('this model knows the roles system, user and assistant, not ' ~ message.role) }}
{%- endif -%}
<|im_start|>{{ message.role ~ '\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{{ part.text }}
{%- elif 'image' in part.type or 'video' in part.type -%}
{%- set seen.number = seen.number + 1 -%}
{%- set pad = '<|image_pad|>' if 'image' in part.type else '<|video_pad|>' -%}
{{ '#' ~ seen.number }}<|vision_start|>{{ pad }}<|vision_end|>
{%- else -%}
{{ raise_exception('this model takes text, images and videos, not ' ~ part.type) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""Pictures stand where the message has them, numbered through the chat."""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = VOCAB_SIZE,
    *,
    takes_pictures: bool = False,
) -> PreTrainedTokenizerFast:
    """Learn merges from `texts`. Every byte is a token, so any text encodes; digits stand alone.

    takes_pictures  with Qwen's tokens for pictures and clips, and a template that places them
    """
    more_tokens = PICTURE_TOKENS if takes_pictures else {}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END, *more_tokens.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"start_token": START, **more_tokens},
        chat_template=PICTURE_TEMPLATE if takes_pictures else TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def contents(path: Path) -> Iterator[str]:
    """The text of every message, with the role names the template writes."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            for message in json.loads(line)["messages"]:
                yield f"{message['role']}\n{words(message['content'])}"


def words(content: str | list[dict[str, Any]]) -> str:
    """A message's text, without its pictures."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="JSONL file of chats")
    parser.add_argument("out", type=Path, help="model folder to write the tokenizer into")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--pictures", action="store_true", help="with tokens and a template for pictures")
    arguments = parser.parse_args()
    texts = contents(arguments.rows)
    tokenizer = train_tokenizer(texts, arguments.vocab_size, takes_pictures=arguments.pictures)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
