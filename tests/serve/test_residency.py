"""More adapters than slots: who is on the device, who waits for whom, and what becomes of content that has left."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE
from serve.adapters.registry.registry import run_here
from serve.adapters.versions.source import Content, Fitting, FolderSource, Outline
from serve.adapters.versions.version import AdapterVersion
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.engine.request import Event
from serve.engine.worker import Worker
from serve.errors import AdapterGoneError, AdapterMemoryError, NotFoundError
from serve.model.loading import load


@pytest.fixture
def copied(make_one, tmp_path) -> Callable[[str, int], Path]:
    """copied(name, seed) → a folder of that name that holds the adapter, whatever it held before."""

    def copy(name: str, seed: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file in (TENSORS_FILE, CONFIG_FILE):
            shutil.copy(make_one(seed) / file, folder / f"new-{file}")
            (folder / f"new-{file}").rename(folder / file)
        return folder

    return copy


@pytest.fixture
def make_engine(model_folder) -> Callable[..., Engine]:
    """make_engine(**limits) → one that gives memory back at once."""

    def make(**limits) -> Engine:
        engine = Engine(load(str(model_folder), name="lively"), EngineLimits(**limits))
        engine.registry.post = run_here
        return engine

    return make


@pytest.fixture
def merged_module(model_folder, make_one, merged):
    """merged_module(seed) → the base with that adapter fused, made once."""
    made: dict[int, object] = {}

    def module(seed: int):
        if seed not in made:
            made[seed] = merged(model_folder, make_one(seed))
        return made[seed]

    return module


class Asked:
    """Requests on an engine that nobody else steps: held, answered, released."""

    def __init__(self, engine: Engine, make_request) -> None:
        self.engine = engine
        self._make_request = make_request
        self.tokens: dict[str, list[int]] = {}
        self.errors: dict[str, Exception] = {}
        self.open: dict[str, AdapterVersion] = {}

    def ask(self, id: str, name: str, **settings) -> AdapterVersion:
        version = self.engine.registry.acquire(name)
        self.open[id], self.tokens[id] = version, []
        self.engine.add(self.engine.check(self._make_request(id, adapter=version, **settings)))
        return version

    def step(self) -> None:
        for event in self.engine.step():
            self.tokens[event.request_id] += event.token_ids
            if event.finish is not None:
                self.engine.registry.release(self.open.pop(event.request_id))
            if event.error is not None:
                self.errors[event.request_id] = event.error
        self.engine.scheduler.check_integrity()

    def steps(self) -> Iterator[None]:
        """One after the other until nothing is left to do; a bounded number."""
        for _ in range(2000):
            if not self.engine.has_work:
                return
            self.step()
            yield
        raise AssertionError(f"{[*self.open]} never end: {self.engine.registry.residency.stats()}")

    def finish(self) -> None:
        for _ in self.steps():
            pass


@pytest.fixture
def asking(make_request) -> Callable[[Engine], Asked]:
    return lambda engine: Asked(engine, make_request)


def taken(engine: Engine) -> int:
    return engine.bank.num_bytes + engine.registry.host_bytes


def test_more_adapters_than_slots_answer_each_as_its_own(
    make_engine, make_one, asking, make_request, merged_module, assert_drawn
):
    engine = make_engine(max_adapters=2, max_rows=6)
    registry = engine.registry
    for seed in range(6):
        registry.load(f"n{seed}", make_one(seed))
    asked = asking(engine)
    for number in range(18):
        asked.ask(f"r{number}", f"n{number % 6}", max_tokens=6 + number % 4)
    for _ in asked.steps():
        assert len(engine.bank.slots) <= 2
        assert engine.stats().num_decoding <= 6
    assert asked.errors == {}
    for number in range(18):
        request = make_request(f"r{number}", max_tokens=6 + number % 4)
        assert_drawn(request, asked.tokens[f"r{number}"], merged_module(number % 6))
    assert len({tuple(tokens[:6]) for tokens in asked.tokens.values()}) == 6, (
        "every adapter answers otherwise"
    )
    stats = registry.residency.stats()
    assert stats.num_evicted >= 4
    assert stats.num_loads == stats.num_evicted + 2
    registry.check_integrity()


def test_who_holds_a_version_is_told(make_engine, make_one, asking):
    engine = make_engine(max_adapters=1)
    registry = engine.registry
    for seed in range(2):
        registry.load(f"n{seed}", make_one(seed))
    asked = asking(engine)
    for id, name in (("a", "n0"), ("b", "n0"), ("c", "n1")):
        asked.ask(id, name, max_tokens=8)
    for _ in range(3):
        asked.step()
    busy, awaited = (registry.show(name).versions[0] for name in ("n0", "n1"))
    assert (busy.num_requests, set(busy.standing.request_ids), busy.standing.num_hits) == (2, {"a", "b"}, 2)
    assert (awaited.num_requests, awaited.standing.slot, awaited.standing.num_waiting) == (1, None, 1)
    asked.finish()
    standing = registry.show("n1").versions[0].standing
    assert (standing.num_hits, standing.num_misses, standing.num_loads, standing.request_ids) == (0, 1, 1, ())


def test_the_slot_that_was_not_used_longest_gives_way(make_engine, make_one, make_request):
    engine = make_engine(max_adapters=3)
    registry = engine.registry
    versions = [registry.load(f"n{seed}", make_one(seed)) for seed in range(5)]

    def resident() -> set[str]:
        return {version.name for version in versions if registry.slot_of(version) is not None}

    assert resident() == {"n0", "n1", "n2"}, "a load takes free slots, and nobody else's"
    for seed in (1, 2, 0):
        generate(engine, [make_request("r", adapter=versions[seed], max_tokens=2)])
    for seed, expected in ((3, {"n2", "n0", "n3"}), (2, {"n2", "n0", "n3"}), (4, {"n2", "n3", "n4"})):
        generate(engine, [make_request("r", adapter=versions[seed], max_tokens=2)])
        assert resident() == expected
    registry.check_integrity()


def test_a_slots_number_is_never_given_twice(make_engine, make_one, make_request):
    engine = make_engine(max_adapters=1)
    versions = [engine.registry.load(f"n{seed}", make_one(seed)) for seed in range(2)]
    slots = []
    for number in range(6):
        version = versions[number % 2]
        generate(engine, [make_request("r", adapter=version, max_tokens=2)])
        slots.append(engine.registry.slot_of(version))
    assert slots == sorted(set(slots))


@pytest.mark.parametrize("host_bytes", [0, 20_000, 1 << 30], ids=["no host", "some", "all"])
def test_an_evicted_adapter_comes_back_from_host_memory_or_from_its_folder(
    make_engine, make_one, asking, make_request, merged_module, assert_drawn, host_bytes
):
    engine = make_engine(max_adapters=1, adapter_host_bytes=host_bytes)
    registry = engine.registry
    for seed in range(4):
        registry.load(f"n{seed}", make_one(seed))
    tiers = {registry.find(f"n{seed}").versions[0].tier for seed in range(4)}
    assert tiers == {0: {"source"}, 20_000: {"source", "host"}, 1 << 30: {"host"}}[host_bytes]
    asked = asking(engine)
    for number in (0, 1, 2, 3, 0, 2):
        asked.ask(f"r{number}-{len(asked.tokens)}", f"n{number}", max_tokens=5)
        asked.finish()
        assert registry.host_bytes <= host_bytes
        registry.check_integrity()
    assert asked.errors == {}
    for id, tokens in asked.tokens.items():
        assert_drawn(make_request(id, max_tokens=5), tokens, merged_module(int(id[1])))


def test_a_folder_that_was_written_over_gives_its_name_a_version_and_takes_none_away(
    make_engine, copied, asking, make_request, merged_module, assert_drawn
):
    """Content that nobody else has goes from host memory into a file."""
    engine = make_engine(max_adapters=1, adapter_host_bytes=30_000)
    registry = engine.registry
    for seed in range(5):
        assert registry.load("x", copied("x", seed), replace=True).id == f"x@{seed + 1}"
    assert {each.tier for each in registry.show("x").versions} == {"host", "file"}
    asked = asking(engine)
    for seed in (0, 3, 1, 4, 2):
        version = registry.rollback("x", seed + 1)
        assert (version.id, registry.resolve("x")) == (f"x@{seed + 1}", version)
        asked.ask(f"r{seed}", "x", max_tokens=5)
        asked.finish()
        registry.check_integrity()
    assert asked.errors == {}
    for seed in range(5):
        assert_drawn(make_request("r", max_tokens=5), asked.tokens[f"r{seed}"], merged_module(seed))
    assert registry.load("x", copied("x", 1), replace=True).id == "x@6", "numbers go on from the newest"
    registry.unload("x")
    assert (taken(engine), registry.residency.stats().file_bytes) == (0, 0)
    registry.check_integrity()


def test_a_rollback_to_content_that_is_gone_says_where_it_was_looked_for_and_changes_nothing(
    make_engine, copied, make_request
):
    engine = make_engine(adapter_host_bytes=0, adapter_file_bytes=0)
    registry = engine.registry
    first = registry.load("x", copied("x", 1))
    registry.load("x", copied("x", 2), replace=True)
    with pytest.raises(
        AdapterGoneError, match=r"'x@1' is gone.*/x holds another one now \(content hash sha256:"
    ):
        registry.rollback("x", 1)
    assert registry.resolve("x").id == "x@2"
    assert registry.show("x").versions[1].tier == "gone"
    shutil.rmtree(Path(first.path))
    with pytest.raises(AdapterGoneError, match="no adapter folder at"):
        registry.rollback("x")
    copied("x", 1)
    assert registry.rollback("x").id == "x@1", "its folder holds it again"
    for number, told in ((7, "no version 7; there are 1, 2"), (0, "no version 0")):
        with pytest.raises(NotFoundError, match=told):
            registry.rollback("x", number)
    with pytest.raises(NotFoundError, match="no version before 'x@1'"):
        registry.rollback("x")
    registry.check_integrity()


def test_a_bounded_number_of_earlier_versions_is_known(make_engine, make_one):
    engine = make_engine(adapter_versions=2)
    registry = engine.registry
    registry.load("x", make_one(0))
    held = registry.acquire("x")
    for seed in range(1, 6):
        registry.load("x", make_one(seed), replace=True)
    assert [each.version.number for each in registry.show("x").versions] == [6, 5, 4, 1]
    with pytest.raises(
        NotFoundError, match="version 3 of adapter 'x' is known no more; there are 1, 4, 5, 6"
    ):
        registry.acquire("x@3")
    registry.release(held)
    assert [each.version.number for each in registry.show("x").versions] == [6, 5, 4]
    with pytest.raises(NotFoundError):
        registry.acquire("x@1")
    registry.check_integrity()


def test_an_earlier_version_can_be_asked_for_beside_the_current_one(
    make_engine, make_one, asking, make_request, merged_module, assert_drawn
):
    engine = make_engine(max_adapters=2)
    registry = engine.registry
    for seed in range(3):
        registry.load("x", make_one(seed), replace=True)
    asked = asking(engine)
    for number in (1, 2, 3):
        asked.ask(f"r{number}", f"x@{number}", max_tokens=5)
    asked.finish()
    for number in (1, 2, 3):
        assert_drawn(make_request("r", max_tokens=5), asked.tokens[f"r{number}"], merged_module(number - 1))
    assert len(engine.bank.slots) == 1, "only what the name stands for keeps its slot"
    registry.check_integrity()


def test_what_cannot_be_read_again_ends_its_own_requests_and_is_told_until_it_can(
    make_engine, copied, asking, make_request, merged_module, assert_drawn
):
    engine = make_engine(max_adapters=1, adapter_host_bytes=0)
    registry = engine.registry
    kinds = ("gone", "changed", "cut", "no config")
    for number, kind in enumerate(kinds):
        registry.load(kind, copied(kind, number))
    registry.load("whole", copied("whole", 4))
    generate(engine, [make_request("r", adapter=registry.resolve("whole"), max_tokens=2)])
    folders = {kind: Path(registry.resolve(kind).path) for kind in kinds}
    shutil.rmtree(folders["gone"])
    copied("changed", 5)
    cut = (folders["cut"] / TENSORS_FILE).read_bytes()
    (folders["cut"] / TENSORS_FILE).write_bytes(cut[: len(cut) // 2])
    (folders["no config"] / CONFIG_FILE).write_text("[]")
    asked = asking(engine)
    for kind in (*kinds, "whole", *kinds):
        asked.ask(f"{kind}-{len(asked.tokens)}", kind, max_tokens=5)
    asked.finish()
    assert {id.rpartition("-")[0] for id in asked.errors} == set(kinds)
    assert len(asked.errors) == 2 * len(kinds)
    told = {id.rpartition("-")[0]: str(error) for id, error in asked.errors.items()}
    assert all(isinstance(error, AdapterGoneError) for error in asked.errors.values())
    for kind, words in zip(
        kinds, ("no adapter folder", "another one", "truncated", "object was expected"), strict=True
    ):
        assert words in told[kind]
        assert f"'{kind}@1' is gone" in told[kind]
        assert registry.show(kind).versions[0].standing.problem == told[kind]
    assert_drawn(make_request("r", max_tokens=5), asked.tokens["whole-4"], merged_module(4))
    assert registry.residency.stats().num_failed >= len(kinds)
    registry.check_integrity()
    copied("changed", 1)
    asked.ask("again", "changed", max_tokens=5)
    asked.finish()
    assert_drawn(make_request("r", max_tokens=5), asked.tokens["again"], merged_module(1))
    assert registry.show("changed").versions[0].standing.problem is None


def test_a_pinned_adapter_keeps_its_slot_and_one_slot_is_left_to_others(make_engine, make_one, make_request):
    engine = make_engine(max_adapters=2)
    registry = engine.registry
    for seed in range(4):
        registry.load(f"n{seed}", make_one(seed))
    registry.pin("n0")
    for seed in (1, 2, 3, 2):
        generate(engine, [make_request("r", adapter=registry.resolve(f"n{seed}"), max_tokens=2)])
        assert registry.slot_of(registry.resolve("n0")) is not None
        registry.check_integrity()
    with pytest.raises(AdapterMemoryError, match="'n1' cannot be pinned: 1 of 2 slots are"):
        registry.pin("n1")
    registry.load("n0", make_one(3), replace=True)
    assert registry.slot_of(registry.resolve("n0")) is not None, "the pin is the name's"
    generate(engine, [make_request("r", adapter=registry.resolve("n2"), max_tokens=2)])
    assert registry.slot_of(registry.resolve("n0")) is not None
    registry.rollback("n0")
    registry.check_integrity()
    registry.unpin("n0")
    registry.pin("n3")
    generate(engine, [make_request("r", adapter=registry.resolve("n2"), max_tokens=2)])
    assert {version.name for version in registry.versions() if registry.slot_of(version)} == {"n2", "n3"}
    registry.unload("n3")
    registry.pin("n1")
    for name in ("n4", "n1@1"):
        with pytest.raises(NotFoundError):
            registry.pin(name)
    alone = make_engine(max_adapters=1)
    alone.registry.load("n0", make_one(0))
    with pytest.raises(AdapterMemoryError, match="0 of 1 slots are"):
        alone.registry.pin("n0")


@pytest.mark.parametrize("max_adapters", [1, 2, 5])
def test_whoever_waits_for_a_slot_waits_for_rows_that_run_and_not_for_those_that_come_later(
    make_engine, make_one, asking, max_adapters
):
    """Hot adapters that are asked for without end keep nobody out."""
    engine = make_engine(max_adapters=max_adapters, max_rows=16)
    registry = engine.registry
    for seed in range(max_adapters + 2):
        registry.load(f"n{seed}", make_one(seed))
    asked = asking(engine)
    for number in range(12):
        asked.ask(f"hot{number}", f"n{number % max_adapters}", max_tokens=6 + number % 5)
    for _ in range(3):
        asked.step()
    cold = [
        asked.ask(f"cold{seed}", f"n{seed}", max_tokens=3).name for seed in (max_adapters, max_adapters + 1)
    ]
    num_hot, num_steps = 12, 0
    while any(f"cold{name[1:]}" in asked.open for name in cold):
        while len([id for id in asked.open if id.startswith("hot")]) < 12:
            asked.ask(f"hot{num_hot}", f"n{num_hot % max_adapters}", max_tokens=6 + num_hot % 5)
            num_hot += 1
        asked.step()
        num_steps += 1
        assert num_steps < 90, "two answers of hot rows, their own, and what a load takes"
    asked.finish()
    assert asked.errors == {}
    assert all(len(tokens) >= 3 for tokens in asked.tokens.values())
    registry.check_integrity()


def test_what_adapters_take_is_within_their_budget_and_rows_have_the_rest(
    make_engine, make_one, asking, make_request, merged_module, assert_drawn
):
    budget = 250_000
    engine = make_engine(
        max_adapters=4,
        memory_budget_bytes=1_500_000,
        kv_budget_bytes=1_500_000,
        adapter_budget_bytes=budget,
        max_rows=8,
    )
    registry, rng, asked = engine.registry, random.Random(5), asking(engine)
    seeds: dict[str, int] = {}
    for turn in range(150):
        name, seed = f"n{rng.randrange(9)}", rng.randrange(6)
        if name not in registry.names() or rng.random() < 0.1:
            seeds[registry.load(name, make_one(seed), replace=True).id] = seed
        elif rng.random() < 0.05:
            registry.unload(name)
        elif len(asked.open) < 10:
            version = registry.resolve(name)
            asked.ask(f"{version.id}#{turn}", name, max_tokens=rng.randrange(2, 12))
        asked.step()
        assert taken(engine) <= budget
        engine.make_room()
        assert engine.scheduler.max_bytes == engine.memory.max_row_bytes(
            engine.bank.num_bytes, registry.host_bytes
        )
        assert engine.stats().kv_bytes + taken(engine) <= 1_500_000
    asked.finish()
    assert asked.errors == {}
    assert registry.residency.stats().num_evicted > 10
    for id, tokens in asked.tokens.items():
        request = make_request(id, max_tokens=len(tokens))
        assert_drawn(request, tokens, merged_module(seeds[id.partition("#")[0]]))
    for name in registry.names():
        registry.unload(name)
    assert (taken(engine), registry.versions()) == (0, [])
    registry.check_integrity()


def test_two_that_do_not_fit_together_take_turns_and_one_that_never_fits_is_refused(
    make_engine, make_adapter, asking
):
    def fresh(num_bytes: int) -> Engine:
        return make_engine(adapter_budget_bytes=num_bytes, max_adapters=8)

    folders = [make_adapter(seed, rank=16) for seed in (1, 2, 3)]
    for budget in range(50_000, 10_000_000, 50_000):
        engine = fresh(budget)
        with contextlib.suppress(AdapterMemoryError):
            engine.registry.load("n0", folders[0])
            break
    for number in (1, 2):
        engine.registry.load(f"n{number}", folders[number])
    asked = asking(engine)
    for number in range(9):
        asked.ask(f"r{number}", f"n{number % 3}", max_tokens=4)
    for _ in asked.steps():
        assert taken(engine) <= budget
        assert len(engine.bank.slots) <= 1
    assert asked.errors == {}
    assert all(len(tokens) == 4 for tokens in asked.tokens.values())
    engine.registry.check_integrity()


class SlowSource(FolderSource):
    """A folder on a disk that answers when it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.is_slow = False
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()

    @property
    def is_intact(self) -> bool:
        return True

    def read(self, name: str, fitting: Fitting) -> Content:
        if self.is_slow:
            self.is_asked.set()
            assert self.may_answer.wait(60)
        return super().read(name, fitting)


@pytest.fixture
def working(make_engine, make_request):
    """working(**limits) → a started worker, and ask(id, name) → a queue of the request's events."""
    workers = []

    def start(**limits):
        engine = make_engine(**limits)
        worker = Worker(engine)
        worker.start()
        workers.append(worker)

        def ask(id: str, name: str, **settings) -> Answer:
            answer = Answer()
            version = engine.registry.acquire(name)
            worker.submit(make_request(id, adapter=version, **settings), answer.take)
            return answer

        return worker, ask

    yield start
    for worker in workers:
        worker.stop()
        worker.engine.close()


class Answer:
    """What came of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._is_over = threading.Event()

    def take(self, event: Event) -> None:
        self.events.append(event)
        if event.finish is not None:
            self._is_over.set()

    def wait(self) -> list[int]:
        assert self._is_over.wait(60), "it never ended"
        return [token for event in self.events for token in event.token_ids]

    @property
    def error(self) -> Exception | None:
        return self.events[-1].error

    @property
    def is_over(self) -> bool:
        return self._is_over.is_set()


def test_an_adapter_that_is_being_read_keeps_nobody_waiting_but_its_own_requests(
    working, make_one, make_request, merged_module, assert_drawn
):
    worker, ask = working(max_adapters=2, adapter_host_bytes=0)
    registry = worker.engine.registry
    source = SlowSource(make_one(0))
    registry.load("a", make_one(1))
    registry.load("b", make_one(2))
    registry.add("slow", source)
    registry.load("c", make_one(3))
    source.is_slow = True
    slow = [ask(f"slow{number}", "slow", max_tokens=5) for number in range(3)]
    assert source.is_asked.wait(60)
    others = [
        ask(f"r{number}", name, max_tokens=8) for number, name in enumerate(("a", "b", "c", "a", "b", "c"))
    ]
    for number, answer in enumerate(others):
        assert_drawn(make_request("r", max_tokens=8), answer.wait(), merged_module(1 + number % 3))
    assert not any(answer.is_over for answer in slow)
    source.may_answer.set()
    for answer in slow:
        assert_drawn(make_request("r", max_tokens=5), answer.wait(), merged_module(0))


def test_a_request_that_is_cancelled_while_its_adapter_is_read_leaves_nothing_behind(working, make_one):
    worker, ask = working(max_adapters=1, adapter_host_bytes=0)
    registry = worker.engine.registry
    source = SlowSource(make_one(0))
    registry.load("a", make_one(1))
    registry.add("slow", source)
    source.is_slow = True
    answer = ask("slow", "slow", max_tokens=5)
    assert source.is_asked.wait(60)
    worker.cancel("slow")
    answer.wait()
    assert answer.events[-1].finish == "cancelled"
    registry.unload("slow")
    source.may_answer.set()
    for _ in range(20_000):
        if not registry.residency.stats().num_seated:
            break
        worker.call(lambda: None)
    assert registry.residency.stats().num_seated == 0, "nobody needs what was on its way"
    registry.unload("a")
    for _ in range(1000):
        if not (worker.engine.bank.tidy_is_due or worker.engine.bank.slots):
            break
        worker.call(lambda: None)
    assert taken(worker.engine) == 0
    registry.check_integrity()


def test_a_server_that_stops_while_an_adapter_is_read_ends_its_requests(working, make_one):
    worker, ask = working(max_adapters=1, adapter_host_bytes=0)
    source = SlowSource(make_one(0))
    worker.engine.registry.load("a", make_one(1))
    worker.engine.registry.add("slow", source)
    source.is_slow = True
    answer = ask("slow", "slow", max_tokens=5)
    assert source.is_asked.wait(60)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    answer.wait()
    source.may_answer.set()
    stopping.join(60)
    assert not stopping.is_alive()
    assert answer.events[-1].finish == "error"


def test_a_thousand_names_are_known_and_a_few_slots_serve_them(
    make_engine, make_adapter, asking, make_request, merged, model_folder, assert_drawn
):
    engine = make_engine(max_adapters=4, adapter_host_bytes=100_000)
    registry = engine.registry
    folders = [make_adapter(seed, rank=1, keys=["self_attn.q_proj"]) for seed in range(5)]
    for number in range(1000):
        registry.load(f"n{number}", folders[number % 5])
    assert len(registry.names()) == 1000
    rng, asked = random.Random(1), asking(engine)
    chosen = [rng.randrange(1000) for _ in range(40)]
    for index, number in enumerate(chosen):
        asked.ask(f"r{index}", f"n{number}", max_tokens=3)
    asked.finish()
    assert asked.errors == {}
    modules = [merged(model_folder, folder) for folder in folders]
    for index, number in enumerate(chosen):
        assert_drawn(make_request("r", max_tokens=3), asked.tokens[f"r{index}"], modules[number % 5])
    assert registry.host_bytes <= 100_000, "those that do the same share what they hold"
    registry.check_integrity()


def test_an_outline_and_a_content_are_what_a_source_of_any_kind_gives(make_engine, make_one, make_request):
    """A version made of something else than a folder is a version like any other."""
    engine = make_engine(max_adapters=1)
    registry = engine.registry
    inner = FolderSource(make_one(1))

    class Made:
        path, is_intact = "made of n1", True

        def look(self, name: str, fitting: Fitting) -> Outline:
            return inner.look(name, fitting)

        def read(self, name: str, fitting: Fitting) -> Content:
            return inner.read(name, fitting)

    made = registry.add("made", Made())
    plain = registry.load("plain", make_one(1))
    tokens = [
        generate(engine, [make_request("r", adapter=version, max_tokens=6)])[0].token_ids
        for version in (made, plain)
    ]
    assert tokens[0] == tokens[1]
    assert made.path == "made of n1"
    updates = registry.read(made)
    assert set(updates) == set(made.sizes)
    assert {path: update.size for path, update in updates.items()} == dict(made.sizes)
    registry.check_integrity()


def test_content_is_shared_by_versions_that_do_the_same(make_engine, make_one):
    engine = make_engine()
    registry = engine.registry
    registry.load("x", make_one(1))
    once = registry.host_bytes
    assert once > 0
    for _ in range(3):
        registry.load("x", make_one(1), replace=True)
    registry.load("y", make_one(1))
    assert registry.host_bytes == once
    registry.unload("x")
    assert registry.host_bytes == once
    registry.unload("y")
    assert registry.host_bytes == 0


def test_files_that_were_touched_and_hold_the_same_are_read_again(make_engine, copied, make_request):
    engine = make_engine(max_adapters=1, adapter_host_bytes=0)
    registry = engine.registry
    versions = [registry.load(name, copied(name, seed)) for seed, name in enumerate("ab")]
    first = [generate(engine, [make_request("r", adapter=v, max_tokens=5)])[0].token_ids for v in versions]
    for seed, name in enumerate("ab"):
        copied(name, seed)
    config = Path(versions[0].path) / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7))
    again = [generate(engine, [make_request("r", adapter=v, max_tokens=5)])[0].token_ids for v in versions]
    assert again == first
    mx.synchronize()


def test_a_rollback_to_a_version_that_still_has_a_slot_of_its_own_takes_none_from_others_for_ever(
    make_engine, make_one, asking, make_request, merged_module, assert_drawn
):
    """Its slot was not counted, and is again: somebody else's turn is not lost for it."""
    engine = make_engine(max_adapters=1)
    registry = engine.registry
    asked = asking(engine)
    registry.load("x", make_one(0))
    asked.ask("long", "x", max_tokens=40)
    asked.step()
    registry.load("x", make_one(1), replace=True)
    for seed in (2, 3):
        registry.load(f"n{seed}", make_one(seed))
    asked.ask("y", "n2", max_tokens=3)
    for _ in asked.steps():
        if "y" not in asked.open:
            break
    assert registry.rollback("x").id == "x@1"
    assert "long" in asked.open, "it ended too soon to tell"
    asked.finish()
    registry.check_integrity()
    asked.ask("z", "n3", max_tokens=3)
    asked.finish()
    registry.check_integrity()
    assert asked.errors == {}
    for id, seed in (("long", 0), ("y", 2), ("z", 3)):
        assert_drawn(
            make_request(id, max_tokens=len(asked.tokens[id])), asked.tokens[id], merged_module(seed)
        )


class ChangingSource(FolderSource):
    """A folder; something else happens while it is read."""

    def __init__(self, path: Path, meanwhile: Callable[[], object]) -> None:
        super().__init__(path)
        self._meanwhile = meanwhile
        self.is_changing = False

    def read(self, name: str, fitting: Fitting) -> Content:
        if self.is_changing:
            self.is_changing = False
            self._meanwhile()
        return super().read(name, fitting)


def test_what_is_unloaded_while_it_is_rolled_back_or_pinned_is_gone(make_engine, make_one):
    engine = make_engine(adapter_host_bytes=0)
    registry = engine.registry
    source = ChangingSource(make_one(0), lambda: registry.unload("x"))
    registry.add("x", source)
    registry.load("x", make_one(1), replace=True)
    source.is_changing = True
    with pytest.raises(NotFoundError, match="'x'"):
        registry.rollback("x")
    assert (registry.names(), registry.versions(), taken(engine)) == ([], [], 0)
    registry.check_integrity()
    for seed in range(3):
        registry.load(f"n{seed}", make_one(seed))
    later: list[Callable[[], None]] = []
    engine = make_engine(max_adapters=2)
    registry = engine.registry
    for seed in range(3):
        registry.load(f"n{seed}", make_one(seed))

    def start(work: Callable[[], None]) -> None:
        later.append(work)
        registry.unload("n2")

    registry.residency.start = start
    with pytest.raises(NotFoundError, match="'n2'"):
        registry.pin("n2")
    registry.residency.start = later.append
    while later:
        later.pop()()
    registry.check_integrity()
    assert registry.pin("n0").id == "n0@1", "no slot is pinned for what is gone"


def test_a_version_that_leaves_others_beside_a_rollback_is_not_the_one_that_is_rolled_back_to(
    make_engine, make_one
):
    engine = make_engine(adapter_versions=1, adapter_host_bytes=0)
    registry = engine.registry
    source = ChangingSource(make_one(0), lambda: registry.release(held))
    registry.add("x", source)
    registry.load("x", make_one(2), replace=True)
    held = registry.acquire("x")
    registry.load("x", make_one(1), replace=True)
    source.is_changing = True
    assert registry.rollback("x", 1).id == "x@1"
    registry.check_integrity()
    assert registry.resolve("x").id == "x@1"
    registry.unload("x")
    assert (registry.versions(), taken(engine)) == ([], 0)
    registry.check_integrity()


def test_a_slot_that_is_given_away_while_its_names_next_version_is_installed_is_not_taken_twice(
    make_engine, make_one, asking
):
    engine = make_engine(max_adapters=1)
    registry = engine.registry
    registry.load("x", make_one(0))
    registry.load("y", make_one(1))
    asked = asking(engine)

    def run(function: Callable[[], None]) -> None:
        function()
        if len(engine.bank.slots) == 2 and not asked.tokens:  # x@2 is being installed beside x@1
            asked.ask("y", "y", max_tokens=3)
            engine.scheduler.schedule()

    registry.run = run
    assert registry.load("x", make_one(2), replace=True).id == "x@2"
    registry.run = run_here
    asked.finish()
    registry.check_integrity()
    asked.ask("x", "x", max_tokens=3)
    asked.finish()
    assert (len(asked.tokens["x"]), len(asked.tokens["y"]), asked.errors) == (3, 3, {})
    registry.check_integrity()


def test_an_adapter_is_copied_by_whoever_loads_it_and_not_between_two_steps(make_engine, make_adapter):
    """However large it is: what runs for a load on the engine's thread is what the bank takes at a time."""
    registry, inside = make_engine().registry, []

    def run(function: Callable[[], None]) -> None:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        function()
        inside.append(tracemalloc.get_traced_memory()[1] - before)

    registry.run = run
    tracemalloc.start()
    try:
        version = registry.load("a", make_adapter(1, rank=64))
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept > version.num_bytes > 100_000, "NumPy's copy is seen"
    assert max(inside) < version.num_bytes / 2


def test_however_many_leave_between_two_steps_memory_is_given_back_once(make_engine, make_one):
    registry, posted = make_engine(max_adapters=8).registry, []
    registry.post = posted.append
    for number in range(8):
        registry.load(f"a{number}", make_one(number))
    for number in range(8):
        registry.unload(f"a{number}")
    assert len(posted) == 1
    while posted:
        posted.pop()()
    assert registry.residency._bank.num_bytes == 0
