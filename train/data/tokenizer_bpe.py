"""Chat rows in, a Hugging Face tokenizer folder out: byte-level BPE with a ChatML template.

Run as `python -m train.data.tokenizer_bpe ROWS.jsonl OUT`. It knows nothing of models or of what rows mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

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


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Learn merges from `texts`. Every byte is a token, so any text encodes; digits stand alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"start_token": START},
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def contents(path: Path) -> Iterator[str]:
    """The text of every message, with the role names the template writes."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            for message in json.loads(line)["messages"]:
                yield f"{message['role']}\n{message['content']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="JSONL file of chats")
    parser.add_argument("out", type=Path, help="model folder to write the tokenizer into")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    arguments = parser.parse_args()
    train_tokenizer(contents(arguments.rows), arguments.vocab_size).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
