"""`lathe bench images`: what a picture costs, the first time and again, and what it costs those beside it.

Lathe and mlx_vlm.server on one random model with a deep tower. Both stay up for the whole run, and the one that is
not being measured is paused. Rounds alternate, so drift of the machine meets both alike, and ratios are taken within
a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from serve.bench import servers, stall, standin, standin_vlm
from serve.bench.client import Ask
from serve.bench.finding import Finding, Keep, collect
from serve.bench.load import drive
from serve.bench.pictures import PictureMaker, data_uri, image_part
from serve.bench.process import ServerProcess
from serve.bench.prompts import PromptMaker
from serve.errors import StoppedError

PARTS = ("again", "clip", "requests", "stall")
ASKED_AGAIN = 1 / 20
QUESTION_WORDS = 16
ANSWER_TOKENS = 16
OURS, THEIRS = "lathe", "mlx_vlm.server"
THEIR_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    parts: tuple[str, ...] = PARTS
    size: standin_vlm.Size = field(default_factory=standin_vlm.Size)
    edge: int = 448
    """Of pictures, in pixels."""
    num_frames: int = 32
    frame_edge: int = 224
    clients: tuple[int, ...] = (1, 8)
    requests_per_client: int = 3
    num_streams: int = 4
    stream_tokens: int = 400
    rounds: int = 3


class _Asker:
    """One server, asked about pictures."""

    def __init__(self, server: ServerProcess, model: str, words: PromptMaker) -> None:
        self.server = server
        self.model = model
        self._words = words

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Inside it the server runs, and no other does."""
        self.server.resume()
        try:
            yield
        finally:
            self.server.pause()

    def ask(self, shown: Sequence[Mapping[str, Any]], num_tokens: int, opening: str | None = None) -> Ask:
        """Another question about what is shown; `opening`: words before it, a system prompt."""
        history = ({"role": "system", "content": opening},) if opening else ()
        extra = {"ignore_eos": True} if self.server.name == OURS else {}
        question = self._words.prompt(QUESTION_WORDS)
        return Ask(self.model, question, num_tokens, extra=extra, history=history, shown=tuple(shown))

    def first_s(self, *shown: Mapping[str, Any], opening: str | None = None) -> float:
        """TTFT of another question about what is shown. StoppedError."""
        (answer,) = drive(self.server.url, [self.ask(shown, 2, opening)], 1).answers
        if answer.error is not None or answer.first_s is None:
            raise StoppedError(f"{self.server.name} gave no answer: {answer.error}")
        return answer.first_s

    def requests_per_s(self, maker: PictureMaker, clients: int, count: int) -> float:
        """Answers about pictures, each another. StoppedError."""
        done = drive(
            self.server.url, [self.ask([maker.part()], ANSWER_TOKENS) for _ in range(count)], clients
        )
        failed = [answer.error for answer in done.answers if answer.error is not None]
        if failed:
            raise StoppedError(f"{self.server.name}: {len(failed)} of {count} requests failed: {failed[0]}")
        return count / done.wall_s


def run(setting: Setting, folder: Path, progress: Callable[[str], None], keep: Keep) -> list[Finding]:
    """Write the model into `folder`, start both servers, measure, stop them. Raises StoppedError if one fails."""
    progress("writing a random model")
    model = folder / "model"
    standin_vlm.write_model(model, standin.default_dtype(), setting.size)
    mx.clear_cache()
    position_bytes = 2 * setting.size.num_layers * setting.size.hidden * standin.default_dtype().size
    started = {
        OURS: (servers.lathe(model, folder / "lathe.log"), model.name),
        THEIRS: (
            servers.mlx_vlm(
                model,
                folder / "mlx_vlm.server.log",
                cache_bytes=THEIR_CACHE_BYTES,
                position_bytes=position_bytes,
            ),
            str(model),
        ),
    }
    with ExitStack() as stack:
        askers = []
        for seed, (name, (server, served)) in enumerate(started.items()):
            progress(f"starting {name}")
            stack.enter_context(server)
            askers.append(_Asker(server, served, PromptMaker(seed)))
            askers[-1].first_s(
                PictureMaker(100 + seed, setting.edge).part()
            )  # a process's first is a slow one
            server.pause()
        parts = {
            "again": lambda: _again(setting, askers, progress),
            "clip": lambda: _clip(setting, askers, folder, progress),
            "requests": lambda: _requests(setting, askers, progress),
            "stall": lambda: _stall(setting, askers, progress),
        }
        return collect(parts, setting.parts, keep)


def _turns(setting: Setting, askers: Sequence[_Asker]) -> Iterator[tuple[int, _Asker]]:
    """Each round's number with each asker, awake, in an order that turns round."""
    for number in range(setting.rounds):
        for asker in askers if number % 2 == 0 else reversed(askers):
            with asker.awake():
                yield number, asker


def _again(setting: Setting, askers: Sequence[_Asker], progress: Callable[[str], None]) -> list[Finding]:
    """A picture, then another question about it; from another file of the same pixels; behind other words."""
    makers = {asker.server.name: PictureMaker(1, setting.edge) for asker in askers}
    times: dict[str, dict[str, list[float]]] = {asker.server.name: {} for asker in askers}
    words = PromptMaker(77)
    for number, asker in _turns(setting, askers):
        name = asker.server.name
        progress(f"a picture again: round {number + 1} of {setting.rounds}, {name}")
        image = makers[name].image()
        png, bmp = (image_part(data_uri(image, form)) for form in ("PNG", "BMP"))
        for what, shown, opening in (
            ("first", png, None),
            ("again", png, None),
            ("another file", bmp, None),
            ("other words before it", png, words.prompt(QUESTION_WORDS)),
        ):
            times[name].setdefault(what, []).append(asker.first_s(shown, opening=opening))
    return [
        _finding(f"TTFT of a known picture over its first: {what}", times, what)
        for what in ("again", "another file", "other words before it")
    ]


def _clip(
    setting: Setting, askers: Sequence[_Asker], folder: Path, progress: Callable[[str], None]
) -> list[Finding]:
    makers = {asker.server.name: PictureMaker(2, setting.frame_edge) for asker in askers}
    times: dict[str, dict[str, list[float]]] = {asker.server.name: {} for asker in askers}
    for number, asker in _turns(setting, askers):
        name = asker.server.name
        progress(f"a clip of {setting.num_frames} frames: round {number + 1} of {setting.rounds}, {name}")
        clip = makers[name].clip(setting.num_frames, folder / f"{name}-{number}.avi")
        for what in ("first", "again"):
            times[name].setdefault(what, []).append(asker.first_s(clip))
    return [_finding(f"TTFT of a known clip of {setting.num_frames} frames over its first", times, "again")]


def _finding(what: str, times: Mapping[str, Mapping[str, Sequence[float]]], later: str) -> Finding:
    """Ours, judged; theirs beside it."""
    ours = times[OURS]
    values = {
        f"{name} {each} ms": [1e3 * seconds for seconds in times[name][each]]
        for name in times
        for each in ("first", later)
    }
    ratios = tuple(a / b for a, b in zip(ours[later], ours["first"], strict=True))
    return Finding(what, ratios, ASKED_AGAIN, "at most", values)


def _requests(setting: Setting, askers: Sequence[_Asker], progress: Callable[[str], None]) -> list[Finding]:
    findings = []
    for clients in setting.clients:
        speeds: dict[str, list[float]] = {asker.server.name: [] for asker in askers}
        makers = {asker.server.name: PictureMaker(10 + clients, setting.edge) for asker in askers}
        for number, asker in _turns(setting, askers):
            name = asker.server.name
            progress(f"pictures from {clients} client(s): round {number + 1} of {setting.rounds}, {name}")
            count = clients * setting.requests_per_client
            speeds[name].append(asker.requests_per_s(makers[name], clients, count))
        findings.append(
            Finding(
                what=f"image requests a second over {THEIRS}'s, {clients} client(s)",
                ratios=tuple(a / b for a, b in zip(speeds[OURS], speeds[THEIRS], strict=True)),
                asked=1.0,
                sense="at least",
                values={f"{name} requests/s": speeds[name] for name in speeds},
            )
        )
    return findings


def _stall(setting: Setting, askers: Sequence[_Asker], progress: Callable[[str], None]) -> list[Finding]:
    stalls: dict[str, list[stall.Stall]] = {asker.server.name: [] for asker in askers}
    makers = {asker.server.name: PictureMaker(3, setting.edge) for asker in askers}
    for number, asker in _turns(setting, askers):
        name = asker.server.name
        progress(
            f"a picture beside {setting.num_streams} streams: round {number + 1} of {setting.rounds}, {name}"
        )
        streams = [asker.ask([], setting.stream_tokens) for _ in range(setting.num_streams)]
        picture = asker.ask([makers[name].part()], 2)
        stalls[name].append(stall.measure(asker.server.url, streams, picture))
    values = {
        f"{name} {what} ms": [1e3 * getattr(each, key) for each in stalls[name]]
        for name in stalls
        for what, key in (
            ("longest gap", "longest_gap_s"),
            ("usual gap", "median_gap_s"),
            ("TTFT", "first_s"),
        )
    }
    return [
        Finding(
            what=f"longest gap of running streams while a picture comes, over {THEIRS}'s",
            ratios=tuple(
                a.longest_gap_s / b.longest_gap_s for a, b in zip(stalls[OURS], stalls[THEIRS], strict=True)
            ),
            asked=1.0,
            sense="at most",
            values=values,
        )
    ]
