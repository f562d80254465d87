"""A tokenizer with another chat template than its own: the same token ids, other prompts."""

from __future__ import annotations

import copy
import importlib
from typing import Any

from mlx_lm import tokenizer_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper


class Retold(TokenizerWrapper):
    """`tokenizer` (mlx_lm's TokenizerWrapper) under the Jinja template `source`; the original is left as it is.

    What mlx-lm tells from a template, such as the marks around calls of tools, is told from this one.
    """

    def __init__(self, tokenizer: TokenizerWrapper, source: str) -> None:
        inner = copy.copy(tokenizer._tokenizer)
        inner.chat_template = source
        super().__init__(inner, eos_token_ids=tokenizer.eos_token_ids, **_tool_marks(inner))


def _tool_marks(inner: Any) -> dict[str, Any]:
    kind = tokenizer_utils._infer_tool_parser(inner)
    if kind is None:
        return {}
    module = importlib.import_module(f"mlx_lm.tool_parsers.{kind}")
    return {
        "tool_parser": module.parse_tool_call,
        "tool_call_start": module.tool_call_start,
        "tool_call_end": module.tool_call_end,
    }
