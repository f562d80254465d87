"""`lathe bench conversations`: many chats under shared system prompts, in a prefix cache that holds a part of them.

Lathe and mlx_vlm.server, each with as many bytes for its prefix cache, answer the same turns in the same order:
the next turn is of a conversation drawn at random, so most of them have gone cold by then. The order is cut into
stretches. The servers take turns at each, the other one paused, so drift of the machine meets both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from serve.bench import servers, standin
from serve.bench.about import about
from serve.bench.player import Player, Turn
from serve.bench.process import ServerProcess
from serve.bench.scripts import Script, Setting, num_positions, order_of, write_scripts
from serve.bench.summary import Spread, spread
from serve.remote import connect
from serve.tables import Table, numbers

MAX_STRETCHES = 10
MIN_TURNS_A_CLIENT = 5
"""In a stretch: at its end some clients have nothing to do."""
OURS, THEIRS = "lathe", "mlx_vlm.server"


@dataclass(frozen=True)
class Result:
    """One server's numbers over all turns. Tokens are as the server counts them."""

    label: str
    num_turns: int
    num_errors: int
    errors: tuple[str, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    hit_rate: float
    """Share of the prompts' tokens that the cache had."""
    most_possible: float
    """What it would have been, had nothing been forgotten and every token kept its place."""
    ttft_s: Spread | None
    first_turns_ttft_s: Spread | None
    answers_per_s: float
    cache_stats: Mapping[str, Any]
    """As the server tells them at /v1/cache/stats, in its own words."""


@dataclass(frozen=True)
class Outcome:
    """Everything `lathe bench conversations` shows."""

    results: list[Result]
    cache_bytes: int
    ttft_ratios: dict[str, float]
    """Lathe's TTFT over the other's: at p50, at p95, and the median over turns of their own ratio."""

    def as_json(self, setting: Setting) -> dict[str, Any]:
        return {**about(), "settings": asdict(setting), **asdict(self)}


def run(setting: Setting, folder: Path, progress: Callable[[str], None]) -> Outcome:
    """Write the model into `folder`, start both servers, play, stop them. Raises StoppedError if one fails."""
    size, dtype, model = standin.SIZES[setting.size], standin.default_dtype(), folder / "model"
    progress("writing a random model")
    standin.write_model(model, dtype, size)
    mx.clear_cache()
    scripts = write_scripts(setting)
    position_bytes = size.position_bytes(dtype)
    cache_bytes = int(setting.held_frac * num_positions(setting, scripts) * position_bytes)
    started = {
        OURS: servers.lathe(
            model, folder / "lathe.log", settings={"prefix_cache_gib": repr(cache_bytes / 2**30)}
        ),
        THEIRS: servers.mlx_vlm(
            model, folder / "mlx_vlm.server.log", cache_bytes=cache_bytes, position_bytes=position_bytes
        ),
    }
    names = {OURS: model.name, THEIRS: str(model)}
    with ExitStack() as stack:
        players = []
        for label, server in started.items():
            progress(f"starting {label}")
            stack.enter_context(server)
            _warm_up(server.url, names[label])
            server.pause()
            players.append(Player(label, server.url, names[label], scripts, setting.max_tokens))
        _play(players, started, setting, progress)
        results = [_result(player, started[player.label], scripts) for player in players]
    return Outcome(results, cache_bytes, _ratios(players, results))


def _warm_up(url: str, model: str) -> None:
    """A prompt that no conversation shares; the first forward of a process is a slow one."""
    Player("warming up", url, model, [Script("warming up", ("hello there",))], 2).play([0], 1)


def _play(
    players: Sequence[Player],
    started: Mapping[str, ServerProcess],
    setting: Setting,
    progress: Callable[[str], None],
) -> None:
    """All turns with all players; their servers are paused before and after."""
    order = order_of(setting)
    length = max(-(-len(order) // MAX_STRETCHES), MIN_TURNS_A_CLIENT * setting.clients)
    stretches = [order[start : start + length] for start in range(0, len(order), length)]
    for number, stretch in enumerate(stretches):
        for player in players if number % 2 == 0 else reversed(players):
            progress(f"stretch {number + 1} of {len(stretches)}: {len(stretch)} turns with {player.label}")
            started[player.label].resume()
            player.play(stretch, setting.clients)
            started[player.label].pause()


def _result(player: Player, server: ServerProcess, scripts: Sequence[Script]) -> Result:
    """Its numbers, and what the server says of its cache in the end."""
    server.resume()
    with connect(player.url) as http:
        said = http.get("/v1/cache/stats")
    server.pause()
    return result_of(
        player.label, player.turns, scripts, player.wall_s, said.json() if said.is_success else {}
    )


def result_of(
    label: str,
    turns: Sequence[Turn],
    scripts: Sequence[Script],
    wall_s: float,
    cache_stats: Mapping[str, Any],
) -> Result:
    """The numbers of `turns`, in whatever order they ended."""
    good = [turn for turn in turns if turn.answer.error is None]
    asked = sum(turn.answer.num_prompt_tokens or 0 for turn in good)
    cached = sum(turn.answer.num_cached_tokens or 0 for turn in good)
    errors = {turn.answer.error for turn in turns if turn.answer.error is not None}
    return Result(
        label=label,
        num_turns=len(turns),
        num_errors=len(turns) - len(good),
        errors=tuple(sorted(errors)),
        num_prompt_tokens=asked,
        num_cached_tokens=cached,
        hit_rate=cached / max(1, asked),
        most_possible=_most_cached(good, scripts) / max(1, asked),
        ttft_s=spread(turn.answer.first_s for turn in good),
        first_turns_ttft_s=spread(turn.answer.first_s for turn in good if turn.number == 0),
        answers_per_s=len(good) / wall_s,
        cache_stats=cache_stats,
    )


def _most_cached(turns: Sequence[Turn], scripts: Sequence[Script]) -> int:
    """Tokens of prompts that had been computed before: the last turn and its answer; at first, the system prompt."""
    by_place = {(turn.conversation, turn.number): turn.answer for turn in turns}
    total, seen = 0, set()
    for turn in turns:
        before = by_place.get((turn.conversation, turn.number - 1))
        system = scripts[turn.conversation].system
        if before is not None:
            # The last token drawn was never run.
            total += (before.num_prompt_tokens or 0) + max(0, before.num_tokens - 1)
        elif turn.number == 0 and system in seen:
            total += len(system.split()) + standin.MESSAGE_TOKENS + standin.HEADER_TOKENS
        seen.add(system)
    return total


def _ratios(players: Sequence[Player], results: Sequence[Result]) -> dict[str, float]:
    """Empty where a server answered nothing."""
    ours, theirs = (result.ttft_s for result in results)
    times = [
        {(turn.conversation, turn.number): turn.answer.first_s for turn in player.turns} for player in players
    ]
    pairs = [(mine, times[1].get(key)) for key, mine in times[0].items()]
    by_turn = [mine / other for mine, other in pairs if mine and other]
    if ours is None or theirs is None or not by_turn:
        return {}
    return {"p50": ours.p50 / theirs.p50, "p95": ours.p95 / theirs.p95, "by turn": median(by_turn)}


def table(outcome: Outcome, setting: Setting) -> Table:
    """A line a server; times in milliseconds."""
    title = (
        f"{setting.num_conversations} conversations of {setting.num_turns} turns, "
        f"{outcome.cache_bytes / 2**20:,.0f} MiB of prefix cache"
    )
    headings = (
        "hit rate",
        "of possible",
        "TTFT p50 ms",
        "p95 ms",
        "first turns p50 ms",
        "answers/s",
        "errors",
    )
    drawn = Table("server", *numbers(*headings), title=title)
    for each in outcome.results:
        first = each.first_turns_ttft_s
        drawn.add(
            each.label,
            f"{each.hit_rate:.1%}",
            f"{each.most_possible:.1%}",
            "-" if each.ttft_s is None else f"{each.ttft_s.p50 * 1e3:,.0f}",
            "-" if each.ttft_s is None else f"{each.ttft_s.p95 * 1e3:,.0f}",
            "-" if first is None else f"{first.p50 * 1e3:,.0f}",
            f"{each.answers_per_s:.2f}",
            f"{each.num_errors:,} of {each.num_turns:,}" if each.num_errors else "0",
        )
    return drawn


def notes(outcome: Outcome) -> list[str]:
    """How the two compare, and what went wrong."""
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in outcome.ttft_ratios.items())
    said = [f"TTFT of {OURS} over {THEIRS}'s: {ratios}"] if ratios else []
    return said + [f"{each.label}: {error}" for each in outcome.results for error in each.errors]
