"""A model in, what combines for it out: each pair is run in the real engine, and what fails says why.

The base, and an adapter of each kind that the model takes (random ones, unless one is named), against the forms of
keys and values, the prefix cache and the order of steps. Nothing is known by a family's name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.text import Text

from serve import device
from serve.adapters.formats.config import AdapterConfig, FineTuneType
from serve.adapters.formats.manifest import write_adapter
from serve.adapters.versions.version import AdapterVersion
from serve.cache.capacity import Bucket, positions_capacity
from serve.cache.precision import GROUP_SIZES, PLAIN, KvPrecision, precision
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Event, Request, Sampling
from serve.errors import GenerationError, LatheError, RequestError
from serve.model.loading import load
from serve.model.network import Network
from serve.model.prompt import MediaKind, Prompt
from serve.model.weights import expert_modules, linear_modules, linear_shape, squared_row_norms
from serve.shown import Shown, shown_to
from serve.tables import Table

BASE = "base"
BITS: Mapping[str, float] = {"plain": 16, "8 bit": 8, "4 bit": 4, "TurboQuant 3.5": 3.5}
MEMORY, DISK, AHEAD = "prefix in memory", "prefix on disk", "one step ahead"
TOGETHER = "beside all others"
MEDIA: Mapping[MediaKind, str] = {"image": "a picture", "video": "a clip", "audio": "a sound"}
"""Columns of models that take such a thing."""
COLUMNS = (*BITS, TOGETHER, MEMORY, DISK, AHEAD)
"""Of all models."""
RANK = 2
SHARE_OF_A_LAYER = 0.1
"""How large a random update is beside what its layer gives."""
PROMPT_TOKENS, ANSWER_TOKENS = 40, 6
BUCKET = positions_capacity(PROMPT_TOKENS + ANSWER_TOKENS)
MEDIA_TOKENS = 8
"""Of words before what is shown, and behind it."""
CHUNK_TOKENS = 16
"""Of a prompt in a step, so that a prompt takes several."""
ONE_BLOCK = "all tokens of its prompts see one another, so that none can be computed before the last is known"
LARGEST_ID = 1000
"""Prompts are made of ids below it, or below the vocabulary's end."""
MAX_DIFFERENCE, MAX_DIFFERENCE_HALF = 0.05, 0.5
"""Between log-probabilities of one token after one text, in single and in half precision: rounding alone."""
LEAST_DIFFERENCE = 1e-6
"""Between log-probabilities of answers about two different things."""


@dataclass(frozen=True)
class Cell:
    """One pair."""

    row: str
    column: str
    is_possible: bool
    note: str = ""
    """Why not, or on what condition."""


@dataclass(frozen=True)
class Combinations:
    """Everything that was tried, in the order of rows and columns."""

    model: str
    cells: tuple[Cell, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def probe(model: str, adapter: Path | None = None) -> Combinations:
    """Run every pair once.

    model    a folder or a hub name; loaded twice, one after the other, so that the disk is read by another engine
    adapter  a folder, in place of random adapters of every kind
    LatheError where there is no such model or adapter, or where the base cannot be served at all.
    """
    with TemporaryDirectory(prefix="lathe-doctor-") as folder:
        named = {} if adapter is None else {f"{adapter.resolve().name} (adapter)": adapter}
        tried = _Tried(model, Path(folder), named)
        tried.run({**dict.fromkeys(BITS, _answers), MEMORY: _restores}, ahead=False, shows_media=True)
        tried.run({DISK: _finds_on_disk, AHEAD: _answers_as_before}, ahead=True)
    rows = [BASE, *tried.adapters]
    columns = [*COLUMNS, *MEDIA.values()]
    cells = sorted(tried.cells, key=lambda cell: (rows.index(cell.row), columns.index(cell.column)))
    return Combinations(model, tuple(cells))


def table(found: Combinations) -> tuple[Table, list[Text]]:
    """The pairs, and the reasons under their numbers."""
    tried = dict.fromkeys(cell.column for cell in found.cells)
    drawn = Table("", *(tried or COLUMNS), title=found.model)
    notes: list[str] = []
    for row, cells in itertools.groupby(found.cells, key=lambda cell: cell.row):
        drawn.add(Text(row, style="bold"), *(_mark(cell, notes) for cell in cells))
    return drawn, [Text(f"{number}  {note}", style="dim") for number, note in enumerate(notes, start=1)]


def _mark(cell: Cell, notes: list[str]) -> Text:
    word, style = ("yes", "green") if cell.is_possible else ("no", "red")
    if not cell.note:
        return Text(word, style=style)
    if cell.note not in notes:
        notes.append(cell.note)
    return Text(f"{word} ({notes.index(cell.note) + 1})", style=style)


# What is tried


@dataclass(frozen=True)
class _Answer:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_cached_tokens: int


@dataclass(frozen=True)
class _Pair:
    """What a column's trial gets: an engine, whose row it is, and what earlier trials of the row gave."""

    engine: Engine
    version: AdapterVersion | None
    row: int
    column: str
    earlier: dict[str, _Answer]
    shown: Shown | None = None
    """What it is asked about, in a column of media."""

    def request(self, prompt: int | Prompt, form: KvPrecision = PLAIN, salt: str = "") -> Request:
        """A prompt, or the `prompt`-th, the same for every row, to be answered greedily."""
        words = (
            prompt
            if isinstance(prompt, Prompt)
            else Prompt(_prompt(self.engine.model.network, prompt, PROMPT_TOKENS))
        )
        return Request(
            id=f"{self.row} {self.column}",
            prompt=words,
            sampling=Sampling(max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True, num_logprobs=0),
            adapter=self.version,
            precision=form,
            cache_salt=salt,
        )

    def ask(self, prompt: int | Prompt, form: KvPrecision = PLAIN, salt: str = "") -> _Answer:
        """Its answer, alone. LatheError where there is none."""
        (found,) = _run(self.engine, [self.request(prompt, form, salt)])
        if isinstance(found, LatheError):
            raise found
        return found


def _run(engine: Engine, requests: Sequence[Request]) -> list[_Answer | LatheError]:
    """All of them at once; each one's answer, or why there is none. RequestError for one that cannot be asked."""
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in [engine.check(request) for request in requests]:
        engine.add(request)
    while engine.has_work:
        try:
            new = engine.step()
        except Exception as error:  # as in serving, it costs the rows and not the engine
            new = engine.recover(error)
        for event in new:
            events[event.request_id].append(event)
    return [_joined(each) for each in events.values()]


def _joined(events: Sequence[Event]) -> _Answer | LatheError:
    if events[-1].error is not None:
        return events[-1].error
    return _Answer(
        tuple(token for event in events for token in event.token_ids),
        tuple(entry.logprob for event in events for entry in event.logprobs),
        max(event.num_cached_tokens for event in events),
    )


Trial = Callable[[_Pair], str]
"""Tries one pair; returns a condition on which it works, or nothing. LatheError says why it does not."""


def _answers(pair: _Pair) -> str:
    """In some form of keys and values, with the first group size that fits."""
    form = _fitting(pair.engine, BITS[pair.column])
    pair.earlier[pair.column] = pair.ask(0, form, salt=pair.column)
    row_bytes = pair.engine.scheduler.budget.row_cost.row_bytes
    is_same = row_bytes(Bucket(form, BUCKET)) == row_bytes(Bucket(PLAIN, BUCKET))
    if is_same and not form.is_plain:
        return "it has no full attention, so nothing is quantized"
    return "" if form.group_size == PLAIN.group_size else f"with kv_group_size {form.group_size}"


def _fitting(engine: Engine, bits: float) -> KvPrecision:
    """With the default group size, or the first that divides the model's channels. RequestError where none does."""
    others = (size for size in GROUP_SIZES if size != PLAIN.group_size)
    problem: RequestError | None = None
    for group_size in (PLAIN.group_size, *others):
        form = precision(bits, group_size=group_size)
        try:
            engine.max_context_at(form)
            return form
        except RequestError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _restores(pair: _Pair) -> str:
    prompt = pair.engine.check(pair.request(1)).prompt
    if not prompt.whole(len(prompt.token_ids) - 1):
        raise GenerationError(ONE_BLOCK)
    cold = pair.earlier[pair.column] = pair.ask(1)
    if cold.num_cached_tokens:
        raise GenerationError("it found another's prefix")
    _check_is_restored(pair, pair.ask(1), cold)
    return ""


def _finds_on_disk(pair: _Pair) -> str:
    """What an engine before this one kept."""
    if MEMORY not in pair.earlier:
        raise GenerationError("no prefix was kept in memory, from where the disk gets them")
    before = pair.engine.stats().prefixes.num_disk_hit_tokens
    _check_is_restored(pair, pair.ask(1), pair.earlier[MEMORY])
    if pair.engine.stats().prefixes.num_disk_hit_tokens == before:
        raise GenerationError("its prefix was not read from disk")
    return ""


def _answers_as_before(pair: _Pair) -> str:
    """As an engine that reads each token before it goes on."""
    if "plain" not in pair.earlier:
        raise GenerationError("it answers in no order of steps")
    _check_is_same(pair, pair.ask(0, salt=pair.column), pair.earlier["plain"])
    return ""


def _sees(pair: _Pair) -> str:
    """The same again from what was kept, and something else of something else."""
    if isinstance(pair.shown, LatheError):
        raise pair.shown
    assert pair.shown is not None, "a column of media"
    one, other = pair.shown
    cold = pair.earlier[pair.column] = pair.ask(one, salt=pair.column)
    _check_is_same(pair, pair.ask(one, salt=pair.column), cold)
    if np.allclose(pair.ask(other, salt=pair.column).logprobs, cold.logprobs, atol=LEAST_DIFFERENCE):
        raise GenerationError("it answers the same whatever it is shown")
    return ""


def _check_is_restored(pair: _Pair, warm: _Answer, cold: _Answer) -> None:
    if warm.num_cached_tokens == 0:
        raise GenerationError("no prefix was found again")
    _check_is_same(pair, warm, cold)


def _check_is_same(pair: _Pair, found: _Answer, expected: _Answer) -> None:
    """Token for token up to a near-tie, behind which the texts are two."""
    is_single = device.multiplies_in_single(pair.engine.model.network.parameters_dtype())
    allowed = MAX_DIFFERENCE if is_single else MAX_DIFFERENCE_HALF
    for index, (one, other) in enumerate(zip(found.logprobs, expected.logprobs, strict=True)):
        if not abs(one - other) <= allowed:  # NaN is not
            raise GenerationError(
                f"token {index} has log-probability {one:.4f}, and {other:.4f} where it is computed anew and alone"
            )
        if found.token_ids[index] != expected.token_ids[index]:
            return


class _Tried:
    """The pairs so far, of engines that come one after the other."""

    def __init__(self, model: str, folder: Path, adapters: Mapping[str, Path]) -> None:
        """`adapters` by row; where there is none, random ones of every kind are made in `folder`."""
        self.cells: list[Cell] = []
        self.adapters = dict(adapters)
        self._model = model
        self._folder = folder
        self._earlier: dict[str, dict[str, _Answer]] = {}
        self._shown: dict[str, Shown] = {}
        self._refused: dict[str, str] = {}

    def run(self, columns: Mapping[str, Trial], *, ahead: bool, shows_media: bool = False) -> None:
        """Try these columns on every row, in an engine of their own; `shows_media`: and those of what it takes."""
        limits = EngineLimits(
            prefill_chunk_tokens=CHUNK_TOKENS, prefix_cache_dir=self._folder / "prefixes", ahead=ahead
        )
        engine = Engine(load(self._model), limits)
        if not self.adapters:
            self.adapters = write_adapters(engine.model.network, self._folder)
        if shows_media:
            around = (_prompt(engine.model.network, seed, MEDIA_TOKENS) for seed in (2, 3))
            shown = shown_to(engine.model, *around)
            self._shown = {MEDIA[kind]: found for kind, found in shown.items()}
            columns = {**columns, **dict.fromkeys(self._shown, _sees)}
        versions: dict[str, AdapterVersion | None] = {}
        try:
            for name in [BASE, *self.adapters]:
                self.cells += self._row(engine, name, columns, versions)
            if not ahead:
                self.cells += self._together(engine, versions)
        finally:
            engine.close()

    def _row(
        self,
        engine: Engine,
        name: str,
        columns: Mapping[str, Trial],
        versions: dict[str, AdapterVersion | None],
    ) -> Iterator[Cell]:
        try:
            path = self.adapters.get(name)
            versions[name] = engine.registry.load(f"trial-{len(versions)}", path) if path else None
        except LatheError as error:
            self._refused[name] = str(error)
            yield from (Cell(name, column, False, str(error)) for column in columns)
            return
        for column, trial in columns.items():
            try:
                yield Cell(name, column, True, trial(self._pair(engine, name, column, versions)))
            except LatheError as error:
                yield Cell(name, column, False, str(error))

    def _together(self, engine: Engine, versions: Mapping[str, AdapterVersion | None]) -> Iterator[Cell]:
        """Every row in every form that it takes alone, all in one batch."""
        pairs = [
            self._pair(engine, name, column, versions)
            for name in versions
            for column in (*BITS, *self._shown)
            if column in self._earlier[name]
        ]
        requests = [_asked_together(pair) for pair in pairs]
        problems = dict(self._refused)
        for pair, found in zip(pairs, _run(engine, requests), strict=True):
            name = [BASE, *self.adapters][pair.row]
            try:
                if isinstance(found, LatheError):
                    raise found
                _check_is_same(pair, found, pair.earlier[pair.column])
            except LatheError as error:
                problems.setdefault(name, f"{pair.column}: {error}")
        for name in [BASE, *self.adapters]:
            yield Cell(name, TOGETHER, name not in problems, problems.get(name, ""))

    def _pair(
        self, engine: Engine, name: str, column: str, versions: Mapping[str, AdapterVersion | None]
    ) -> _Pair:
        row = [BASE, *self.adapters].index(name)
        earlier = self._earlier.setdefault(name, {})
        return _Pair(engine, versions[name], row, column, earlier, self._shown.get(column))


def _asked_together(pair: _Pair) -> Request:
    if isinstance(pair.shown, tuple):
        return pair.request(pair.shown[0], salt=TOGETHER)
    return pair.request(0, _fitting(pair.engine, BITS[pair.column]), salt=TOGETHER)


def _prompt(network: Network, seed: int, num_tokens: int) -> tuple[int, ...]:
    """Random words; none stands for media."""
    highest = min(network.vocab_size, LARGEST_ID)
    drawn = np.random.default_rng(seed).integers(0, highest, 2 * PROMPT_TOKENS).tolist()
    return tuple(token for token in drawn if token not in network.placeholder_ids)[:num_tokens]


# Random adapters


def write_adapters(network: Network, folder: Path) -> dict[str, Path]:
    """One of each kind that the network takes: kind -> folder. Small, on its first and its last layers."""
    linears, experts = linear_modules(network.module), expert_modules(network.module)
    kinds: dict[str, tuple[FineTuneType, Mapping[str, nn.Module]]] = {
        "LoRA": ("lora", _ends(network, linears)),
        "DoRA": ("dora", _ends(network, linears)),
        "experts": ("lora", _ends(network, experts)),
    }
    made: dict[str, Path] = {}
    for number, (name, (kind, modules)) in enumerate(kinds.items()):
        if not modules:
            continue
        tensors: dict[str, mx.array] = {}
        for index, (path, module) in enumerate(modules.items()):
            tensors |= _update(path, module, kind, mx.random.key(1000 * number + index))
        made[name] = folder / kind / str(number)
        write_adapter(made[name], tensors, AdapterConfig(kind, -1, RANK, 1.0, keys=tuple(_keys(modules))))
    return made


def _update(path: str, module: nn.Module, kind: FineTuneType, key: mx.array) -> dict[str, mx.array]:
    inputs, outputs = linear_shape(module)
    stack = module.weight.shape[:-2]
    a = mx.random.normal((*stack, inputs, RANK), key=mx.random.split(key)[0]) / inputs**0.5
    b = mx.random.normal((*stack, RANK, outputs), key=mx.random.split(key)[1]) * SHARE_OF_A_LAYER
    if stack:  # mlx-lm has experts' matrices the other way round
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    tensors = {f"{path}.lora_a": a, f"{path}.lora_b": b}
    if kind == "dora":
        tensors[f"{path}.m"] = mx.sqrt(squared_row_norms(module))
    return tensors


def _ends(network: Network, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the first and the last layer that has any."""
    owned = [
        {path: module for path, module in modules.items() if any(module is part for part in layer.modules())}
        for layer in network.layers
    ]
    owned = [each for each in owned if each]
    return {**owned[0], **owned[-1]} if owned else {}


def _keys(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Paths inside a layer."""
    return iter(dict.fromkeys(path.split(".layers.")[-1].partition(".")[2] for path in modules))
