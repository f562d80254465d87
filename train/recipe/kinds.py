"""The kinds of rows there are. Imports nothing of ours."""

from __future__ import annotations

from typing import Literal

Kind = Literal["chat", "completion", "text", "alpaca", "sharegpt", "preference", "unpaired", "prompt"]

SHAPES: dict[str, str] = {
    "chat": "messages",
    "completion": "prompt and completion",
    "text": "text",
    "alpaca": "instruction, input and output",
    "sharegpt": "conversations of from and value",
    "preference": "chosen and rejected, after a prompt",
    "unpaired": "prompt, completion and label, or messages and label",
    "prompt": "prompt, or messages that end with the user's turn",
}
"""Kind -> the keys of its rows, for messages."""
