"""The kinds of rows there are, and which of them each objective learns from. Imports nothing of ours."""

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

ANSWERED: tuple[Kind, ...] = ("completion", "chat", "sharegpt", "text", "alpaca")
LEARNS_FROM: dict[str, tuple[Kind, ...]] = {
    "sft": ANSWERED,
    "cpt": ANSWERED,
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("unpaired",),
    "grpo": ("prompt",),
}
"""Objective -> kinds of rows it can use, in the order in which `type: auto` looks; mlx-lm's where it has one."""


def needed(objective: str) -> str:
    """What rows of an objective must hold, in words."""
    return "; or ".join(SHAPES[kind] for kind in LEARNS_FROM[objective])


def objectives_of(kind: str) -> str:
    """`dpo or orpo`: the objectives that a kind of row is for."""
    return " or ".join(name for name, kinds in LEARNS_FROM.items() if kind in kinds)
