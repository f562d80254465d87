"""`lathe bench serve`: any OpenAI-compatible server at several numbers of clients.

Prompts are calibrated to a length in tokens, every model is warmed up, then each level of concurrency is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from serve.bench.client import Answer, Ask, Endpoint
from serve.bench.load import Round, drive
from serve.bench.prompts import PromptMaker, WordCost, fit
from serve.bench.summary import Summary, summarize
from serve.errors import ConfigError

CALIBRATION_WORDS = (16, 64)


@dataclass(frozen=True)
class Sweep:
    """What to measure."""

    url: str
    models: tuple[str, ...]
    """Requests go round these in turn."""
    concurrency: tuple[int, ...] = (1, 4, 16)
    num_prompt_tokens: int = 128
    max_tokens: int = 64
    num_requests: int | None = None
    """Requests at each level; None: 4 for each client, at least 8."""
    endpoint: Endpoint = "chat"
    tokenizer: Path | None = None
    """A folder whose tokenizer sizes the prompts; None: the server's own usage does."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """The settings, without the key."""
        shown = {**asdict(self), "tokenizer": str(self.tokenizer) if self.tokenizer else None}
        return {name: value for name, value in shown.items() if name != "api_key"}


class SweepRunner:
    """Holds what is measured once for a server: the cost of a word, and the prompts not yet used."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._prompts = PromptMaker(sweep.seed)
        self._cost: WordCost | None = None

    def warm_up(self) -> None:
        """One request to each model; the server must answer all of them. Also sizes the prompts.

        Raises ConfigError with the server's own words.
        """
        for model in self.sweep.models:
            self._one(model, CALIBRATION_WORDS[0], max_tokens=2)
        short, long = (self._tokens_of(words) for words in CALIBRATION_WORDS)
        self._cost = fit((CALIBRATION_WORDS[0], short), (CALIBRATION_WORDS[1], long))

    def level(self, concurrency: int, count: int) -> Round:
        """One round of `count` requests at `concurrency` clients."""
        assert self._cost is not None, "warm_up() comes first"
        num_words = self._cost.words_for(self.sweep.num_prompt_tokens)
        models = islice(cycle(self.sweep.models), count)
        asks = [self._ask(model, num_words, self.sweep.max_tokens) for model in models]
        return drive(self.sweep.url, asks, concurrency, self.sweep.api_key)

    def _ask(self, model: str, num_words: int, max_tokens: int) -> Ask:
        prompt = self._prompts.prompt(num_words)
        return Ask(model, prompt, max_tokens, self.sweep.endpoint, self.sweep.extra)

    def _one(self, model: str, num_words: int, max_tokens: int) -> Answer:
        asks = [self._ask(model, num_words, max_tokens)]
        answer = drive(self.sweep.url, asks, 1, self.sweep.api_key).answers[0]
        if answer.error is not None:
            raise ConfigError(f"{self.sweep.url}: model {model!r} does not answer\n  {answer.error}")
        return answer

    def _tokens_of(self, num_words: int) -> int:
        if self.sweep.tokenizer is not None:
            prompt = self._prompts.prompt(num_words)
            return count_tokens(self.sweep.tokenizer, prompt, self.sweep.endpoint)
        counted = self._one(self.sweep.models[0], num_words, max_tokens=1).num_prompt_tokens
        if counted is None:
            raise ConfigError(
                f"{self.sweep.url} does not say how many tokens a prompt has (no usage in its stream), "
                "so prompts cannot be sized; give --tokenizer FOLDER"
            )
        return counted


def count_tokens(folder: Path, prompt: str, endpoint: Endpoint) -> int:
    """Tokens of `prompt` as a server of that tokenizer would see them, chat template included. Raises ConfigError."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ConfigError(f"--tokenizer: no folder at {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"--tokenizer: {folder} holds none that can be loaded: {error}") from error
    if endpoint == "completions":
        return len(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def run(sweep: Sweep, progress: Callable[[str], None]) -> list[Summary]:
    """Warm up, then every level of `sweep`; `progress` is told what runs."""
    runner = SweepRunner(sweep)
    progress(f"warming up {len(sweep.models)} model(s) and sizing prompts")
    runner.warm_up()
    summaries = []
    for concurrency in sweep.concurrency:
        count = sweep.num_requests or max(8, 4 * concurrency)
        progress(f"{count} requests from {concurrency} client(s)")
        summaries.append(summarize(_label(sweep.models), [runner.level(concurrency, count)]))
    return summaries


def _label(models: Sequence[str]) -> str:
    return models[0] if len(models) == 1 else f"{len(models)} models in turn"
