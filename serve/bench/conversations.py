"""`lathe bench conversations`: many chats under shared system prompts, in a prefix cache that holds a part of them.

Lathe and mlx_vlm.server, each with as many bytes for its prefix cache, answer the same turns in the same order:
the next turn is of a conversation drawn at random, so most of them have gone cold by then. The order is cut into
stretches. The servers take turns at each, the other one paused, so drift of the machine meets both alike.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import mlx.core as mx

from serve.bench import servers, standin
from serve.bench.about import about
from serve.bench.client import Answer, Ask, ask
from serve.bench.process import ServerProcess
from serve.bench.prompts import PromptMaker
from serve.bench.summary import Spread, spread
from serve.errors import StoppedError
from serve.remote import connect_async
from serve.tables import Table, numbers

MAX_STRETCHES = 10
OURS, THEIRS = "lathe", "mlx_vlm.server"


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


@dataclass(frozen=True)
class Turn:
    """One request of a conversation, as a server answered it."""

    conversation: int
    number: int
    answer: Answer


@dataclass
class Player:
    """One server's side of all conversations: what has been said so far, and how each turn went."""

    label: str
    server: ServerProcess
    model: str
    scripts: Sequence[Script]
    max_tokens: int
    turns: list[Turn] = field(default_factory=list)
    said: dict[int, list[Mapping[str, str]]] = field(default_factory=dict)
    """By conversation: its messages, the answers among them."""

    def play(self, stretch: Sequence[int], clients: int) -> None:
        """The next turn of each conversation in `stretch`, in this order, `clients` at a time.

        StoppedError if all of them fail.
        """
        done = asyncio.run(self._play(stretch, clients))
        if done and all(turn.answer.error is not None for turn in done):
            raise StoppedError(f"{self.label}: all {len(done)} requests failed: {done[0].answer.error}")
        self.turns += done

    async def _play(self, stretch: Sequence[int], clients: int) -> list[Turn]:
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        locks = {index: asyncio.Lock() for index in stretch}
        waiting = iter(stretch)
        async with connect_async(self.server.url, None, limits) as http:
            played = await asyncio.gather(*(self._client(http, waiting, locks) for _ in range(clients)))
        return [turn for turns in played for turn in turns]

    async def _client(
        self, http: httpx.AsyncClient, waiting: Iterator[int], locks: Mapping[int, asyncio.Lock]
    ) -> list[Turn]:
        turns = []
        for index in waiting:
            # Locks are taken in the order in which they were asked for, so a conversation's turns keep theirs.
            async with locks[index]:
                turns.append(await self._turn(http, index))
        return turns

    async def _turn(self, http: httpx.AsyncClient, index: int) -> Turn:
        script = self.scripts[index]
        said = self.said.setdefault(index, [{"role": "system", "content": script.system}])
        number = sum(message["role"] == "user" for message in said)
        message = script.messages[number]
        answer = await ask(http, Ask(self.model, message, self.max_tokens, history=tuple(said)))
        said += [{"role": "user", "content": message}, {"role": "assistant", "content": answer.text}]
        return Turn(index, number, answer)


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
    with ExitStack() as stack:
        players = []
        for player in _players(model, folder, setting, scripts, cache_bytes, position_bytes):
            progress(f"starting {player.label}")
            stack.enter_context(player.server)
            _warm_up(player)
            player.server.pause()
            players.append(player)
        wall_s = _play(players, setting, progress)
    results = [result_of(each.label, each.turns, scripts, wall_s[each.label]) for each in players]
    return Outcome(results, cache_bytes, _ratios(players, results))


def _players(
    model: Path,
    folder: Path,
    setting: Setting,
    scripts: Sequence[Script],
    cache_bytes: int,
    position_bytes: int,
) -> list[Player]:
    lathe = servers.lathe(
        model, folder / "lathe.log", settings={"prefix_cache_gib": repr(cache_bytes / 2**30)}
    )
    other = servers.mlx_vlm(
        model, folder / "mlx_vlm.server.log", cache_bytes=cache_bytes, position_bytes=position_bytes
    )
    return [
        Player(OURS, lathe, model.name, scripts, setting.max_tokens),
        Player(THEIRS, other, str(model), scripts, setting.max_tokens),
    ]


def _warm_up(player: Player) -> None:
    """A prompt of its own, which no conversation shares; the first forward of a process is a slow one."""
    script = Script("warming up", ("hello there",))
    Player(player.label, player.server, player.model, [script], 2).play([0], 1)


def _play(players: Sequence[Player], setting: Setting, progress: Callable[[str], None]) -> dict[str, float]:
    """Label → seconds that its server played, all of its stretches together."""
    order = order_of(setting)
    length = max(-(-len(order) // MAX_STRETCHES), 5 * setting.clients)
    stretches = [order[start : start + length] for start in range(0, len(order), length)]
    wall_s = dict.fromkeys((player.label for player in players), 0.0)
    for number, stretch in enumerate(stretches):
        for player in players if number % 2 == 0 else reversed(players):
            progress(f"stretch {number + 1} of {len(stretches)}: {len(stretch)} turns with {player.label}")
            player.server.resume()
            start_s = time.perf_counter()
            player.play(stretch, setting.clients)
            wall_s[player.label] += time.perf_counter() - start_s
            player.server.pause()
    return wall_s


def result_of(label: str, turns: Sequence[Turn], scripts: Sequence[Script], wall_s: float) -> Result:
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
