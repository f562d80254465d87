"""Small tokenizers that mark thoughts as each parser knows them, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve.model.template import ChatTemplate
from serve.model.thoughts import ThoughtRules, Thoughts
from serve.model.token_bytes import BYTE_OF, TokenBytes

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = ("<|im_start|>", "<|im_end|>")
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str | None, str | None]]] = {
    # name: (parser, special tokens, other added tokens, marks of one's own)
    "qwen3": ("auto", (), ("<think>", "</think>"), (None, None)),
    "deepseek_r1": ("deepseek_r1", (), ("<think>", "</think>"), (None, None)),
    "gpt_oss": ("auto", HARMONY, (), (None, None)),
    "gemma4": ("auto", ("<|channel>", "<channel|>"), (), (None, None)),
    "mistral": ("auto", ("[THINK]", "[/THINK]"), (), (None, None)),
    "text": ("qwen3", (), (), (None, None)),
    "own": ("none", (), ("<b>",), ("<a><b>", "</a")),
}


def make_tokenizer(
    special: Sequence[str] = (), added: Sequence[str] = (), template: str = CHATML, others: Sequence[str] = ()
) -> TokenizerWrapper:
    """One token a byte, and these. `others`: of several bytes, which no text is cut into."""
    alphabet = {byte: character for character, byte in BYTE_OF.items()}
    spelled = ["".join(alphabet[byte] for byte in text.encode()) for text in others]
    names = [*ENDS, *special, *added, *sorted(pre_tokenizers.ByteLevel.alphabet()), *spelled]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*ENDS, *special])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in added])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)
    return TokenizerWrapper(fast)


class Family:
    """One parser's tokenizer and marks."""

    def __init__(self, name: str, others: Sequence[str] = ()) -> None:
        parser, special, added, marks = CASES[name]
        self.name = name
        self.tokenizer = make_tokenizer(special, added, others=others)
        self.rules = ThoughtRules(self.tokenizer, parser, *marks)
        found = self.rules.of(ChatTemplate(self.tokenizer))
        assert found is not None
        self.thoughts: Thoughts = found
        self.tokens = TokenBytes(self.tokenizer)
        self.marks = [mark.text for marks in found.marks.values() for mark in marks]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def written(self, text: str) -> str:
        """As a reader gets it: control tokens as halves of pairs."""
        names = {self.tokenizer.convert_ids_to_tokens(n): half for n, half in self.thoughts.controls.items()}
        for name, half in names.items():
            text = text.replace(name, half)
        return text
