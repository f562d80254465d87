"""How long the first token takes where the prompt's beginning is known: in memory, and on disk after a restart.

A document and a question, then the same document and other questions. Each ratio is of two requests that follow each
other: the one in memory to the one that brought it there, the one from disk to another document's first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from serve.bench import servers, standin
from serve.bench.client import Ask
from serve.bench.finding import Finding
from serve.bench.load import drive
from serve.bench.process import ServerProcess
from serve.bench.prompts import PromptMaker
from serve.errors import StoppedError

QUESTION_WORDS = 16
KNOWN_FRAC = 0.9
"""Of the document, what the server must say it had, or nothing was measured."""


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    lengths: tuple[int, ...] = (2048, 8192)
    """Tokens of the documents."""
    rounds: int = 3
    memory_gib: float = 2.0
    disk_gib: float = 4.0


@dataclass
class Times:
    """Seconds to the first token, an entry a round."""

    cold: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    cold_later: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)


class _Asker:
    """Asks one server, and checks what it says it had."""

    def __init__(self, server: ServerProcess, model: str, maker: PromptMaker) -> None:
        self._server = server
        self._model = model
        self._maker = maker

    def first_s(self, document: str, known_tokens: int) -> float:
        """TTFT of a new question about `document`, of which the server knows so many tokens. Raises StoppedError."""
        prompt = f"{document} {self._maker.prompt(QUESTION_WORDS)}"
        answer = drive(self._server.url, [Ask(self._model, prompt, 2)], 1).answers[0]
        if answer.error is not None or answer.first_s is None:
            raise StoppedError(f"{self._server.name} gave no answer: {answer.error}")
        had = answer.num_cached_tokens or 0
        is_as_said = had >= KNOWN_FRAC * known_tokens if known_tokens else had < KNOWN_FRAC * QUESTION_WORDS
        if not is_as_said:
            raise StoppedError(
                f"{self._server.name} had {had} of the prompt's {answer.num_prompt_tokens} tokens; "
                f"expected {known_tokens or 'none'}"
            )
        return answer.first_s


def run(setting: Setting, model: Path, folder: Path, progress: Callable[[str], None]) -> list[Finding]:
    """Start a server of `model`, fill its cache, start it again, stop it."""
    maker = PromptMaker(20)
    documents = {
        length: [maker.prompt(standin.words_for(length)) for _ in range(setting.rounds)]
        for length in setting.lengths
    }
    times = {length: Times() for length in setting.lengths}
    settings = {
        "prefix_cache_gib": setting.memory_gib,
        "prefix_cache_dir": folder.absolute() / "prefixes",
        "prefix_cache_disk_gib": setting.disk_gib,
    }
    for is_restarted in (False, True):
        name = "again" if is_restarted else "cold"
        with servers.lathe(model, folder / f"lathe-{name}.log", settings=settings) as server:
            asker = _Asker(server, model.name, maker)
            asker.first_s("warming up", 0)
            for length, each in documents.items():
                for number, document in enumerate(each):
                    progress(f"{name}: {length} tokens, {number + 1} of {setting.rounds}")
                    if is_restarted:
                        times[length].disk.append(asker.first_s(document, length))
                        other = maker.prompt(standin.words_for(length))
                        times[length].cold_later.append(asker.first_s(other, 0))
                    else:
                        times[length].cold.append(asker.first_s(document, 0))
                        times[length].memory.append(asker.first_s(document, length))
    return [finding for length in setting.lengths for finding in findings_of(length, times[length])]


def findings_of(length: int, times: Times) -> list[Finding]:
    """What is asked at 2k tokens and at 8k is asked of what is nearer."""
    in_memory, on_disk = (1 / 15, 1 / 5) if length < 4096 else (1 / 25, 1 / 8)
    return [
        Finding(
            what=f"TTFT at {length:,} tokens, {where} over cold",
            ratios=tuple(a / b for a, b in zip(warm, cold, strict=True)),
            asked=asked,
            sense="at most",
            values={f"{where} ms": [1e3 * s for s in warm], "cold ms": [1e3 * s for s in cold]},
        )
        for where, warm, cold, asked in (
            ("from memory", times.memory, times.cold, in_memory),
            ("from disk", times.disk, times.cold_later, on_disk),
        )
    ]
