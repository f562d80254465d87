"""Chats that share system prompts, as they will be played: what is said, by whom, and in which order.

Pure functions of a Setting: the same seed gives the same chats.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from serve.bench import standin
from serve.bench.prompts import PromptMaker


@dataclass(frozen=True)
class Setting:
    """What to play. A word is a token of the stand-in."""

    num_conversations: int = 200
    num_turns: int = 10
    num_systems: int = 20
    """System prompts; how often each is used falls as Zipf has it: the k-th 1/k as often as the first."""
    system_words: int = 384
    message_words: int = 32
    max_tokens: int = 16
    held_frac: float = 0.25
    """The caches hold so much of what all conversations come to, a shared system prompt counted once."""
    clients: int = 4
    size: str = "29M"
    """Of the random model: one of `standin.SIZES`."""
    seed: int = 0


@dataclass(frozen=True)
class Script:
    """One conversation's own part: its system prompt and what the user says, turn by turn."""

    system: str
    messages: tuple[str, ...]


def write_scripts(setting: Setting) -> list[Script]:
    """The conversations; the same seed gives the same ones."""
    maker, drawn = PromptMaker(setting.seed), random.Random(setting.seed)
    systems = [maker.prompt(setting.system_words) for _ in range(setting.num_systems)]
    weights = [1 / (rank + 1) for rank in range(setting.num_systems)]
    chosen = drawn.choices(systems, weights, k=setting.num_conversations)
    return [
        Script(system, tuple(maker.prompt(setting.message_words) for _ in range(setting.num_turns)))
        for system in chosen
    ]


def order_of(setting: Setting) -> list[int]:
    """Whose turn it is, conversation by conversation: each next one drawn among those that are not over."""
    order = [index for index in range(setting.num_conversations) for _ in range(setting.num_turns)]
    random.Random(setting.seed + 1).shuffle(order)
    return order


def num_positions(setting: Setting, scripts: Sequence[Script]) -> int:
    """Tokens of all conversations at their ends, each system prompt that is used counted once."""
    systems = len({script.system for script in scripts}) * (setting.system_words + standin.MESSAGE_TOKENS)
    turn = setting.message_words + setting.max_tokens + 2 * standin.MESSAGE_TOKENS
    return systems + len(scripts) * setting.num_turns * turn
