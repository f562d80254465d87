"""What adapters take: the versions that are in and nothing else, within a budget; a step makes nothing anew."""

from __future__ import annotations

import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import mlx.core as mx
import pytest

from serve import device
from serve.adapters.bank.bank import Banked
from serve.adapters.bank.group import Key
from serve.adapters.bank.stack import Stack, entries_for
from serve.adapters.layers.lora import LANES
from serve.adapters.registry.registry import run_here
from serve.adapters.versions.version import AdapterVersion
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.engine.worker import Worker
from serve.errors import AdapterError, AdapterMemoryError, NotFoundError
from serve.model.loading import load
from serve.model.weights import linear_modules, linear_shape

RANKS = {1: 4, 2: 9, 3: 2, 4: 16, 5: 1, 6: 4}
"""Of the adapter made with each seed."""
KEYS = {3: ["self_attn.q_proj"], 5: ["mlp.up_proj", "mlp.down_proj"]}
"""Of those that do not touch all layers."""
NUM_TOKENS = 24
CUDA_PAGE = 2**14
"""MLX's CUDA allocator fills up arrays to whole pages, and counts that: two factors a layer, and their copies."""


@dataclass
class Streams:
    """Requests that run on an engine, each holding its version, and what they have answered."""

    engine: Engine
    held: dict[str, AdapterVersion] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def start(self, request, version: AdapterVersion) -> None:
        self.engine.add(request)
        self.held[request.id] = version
        self.tokens[request.id] = []

    def step(self) -> None:
        for event in self.engine.step() if self.engine.has_work else []:
            self.tokens[event.request_id] += event.token_ids
            if event.finish is not None:
                self.engine.registry.release(self.held.pop(event.request_id))

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()


@pytest.fixture
def make_one(make_adapter):
    """make_one(seed) → folder of an adapter with the rank and the layers of RANKS and KEYS."""
    return lambda seed: make_adapter(seed, rank=RANKS[seed], keys=KEYS.get(seed))


@pytest.fixture
def alone(fresh_engine, make_one, make_request):
    """alone(seed) → the tokens of an adapter's row with no other adapter ever loaded."""
    known: dict[int, list[int]] = {}

    def tokens(seed: int) -> list[int]:
        if seed not in known:
            engine = fresh_engine()
            version = engine.registry.load("x", make_one(seed))
            known[seed] = list(generate(engine, [make_request("r", adapter=version)])[0].token_ids)
        return known[seed]

    return tokens


@pytest.fixture
def engine(model):
    """One that tidies as soon as a version is free, as a server's worker does."""
    made = Engine(model, EngineLimits(max_adapters=6))
    made.registry.post = run_here
    return made


def stacks(engine: Engine) -> dict[tuple[str, Key], Stack]:
    """By a layer that reads their input, and by what they hold."""
    groups = dict.fromkeys(engine.bank._groups.values())
    return {(g.paths[0], key): stack for g in groups for key, stack in g.stacks.items()}


def array_bytes(engine: Engine) -> int:
    """Of the arrays that there are, whatever the bank says."""
    return sum(array.nbytes for stack in stacks(engine).values() for array in stack.arrays)


def test_a_version_can_be_replaced_while_streams_hold_every_earlier_one(model, make_one, alone, make_request):
    engine = Engine(model, EngineLimits(max_adapters=1))
    engine.registry.post = run_here
    streams = Streams(engine)
    for number, seed in enumerate(RANKS, start=1):
        engine.registry.load("x", make_one(seed), replace=True)
        version = engine.registry.acquire("x")
        assert version.id == f"x@{number}"
        streams.start(make_request(f"r{seed}", adapter=version), version)
        streams.step()
        engine.registry.check_integrity()
    assert len(engine.registry.versions()) == len(RANKS)
    engine.registry.unload("x")
    with pytest.raises(NotFoundError):
        engine.registry.acquire("x")
    assert len(engine.registry.versions()) == len(RANKS), "the streams hold all of them"
    streams.finish()
    assert streams.tokens == {f"r{seed}": alone(seed) for seed in RANKS}
    assert engine.registry.versions() == []
    engine.registry.check_integrity()
    assert (engine.bank.num_bytes, array_bytes(engine)) == (0, 0)
    assert engine.registry.load("y", make_one(1)).id == "y@1"


@pytest.mark.parametrize("seed", range(3))
def test_after_any_loads_and_unloads_the_bank_is_as_small_as_what_is_in_it_and_every_stream_right(
    seed, engine, make_one, alone, make_request
):
    rng = random.Random(seed)
    engine.bank.bytes_at_once = rng.choice([1, 50_000, 1 << 28])
    streams, seeds, loaded = Streams(engine), {}, {}
    for turn in range(40):
        name, made_with = rng.choice("abcdefg"), rng.choice(list(RANKS))
        choice = rng.random()
        if choice < 0.45 and (name in loaded or len(loaded) < 6):
            loaded[name] = engine.registry.load(name, make_one(made_with), replace=True).id
            seeds[loaded[name]] = made_with
        elif choice < 0.6 and name in loaded:
            engine.registry.unload(name)
            del loaded[name]
        elif name in loaded and len(streams.held) < 12:
            version = engine.registry.acquire(name)
            request = make_request(f"{version.id}#{turn}", adapter=version)
            streams.start(request, version)
        streams.step()
        engine.registry.check_integrity()
        slots = {engine.registry.slot_of(v): seeds[v.id] for v in engine.registry.versions()}
        check_sizes(engine, {slot: seed for slot, seed in slots.items() if slot is not None})
    streams.finish()
    assert len(streams.tokens) > 5
    for request_id, tokens in streams.tokens.items():
        assert tokens == alone(seeds[request_id.partition("#")[0]]), request_id


def check_sizes(engine: Engine, seeds: dict[int, int]) -> None:
    """Each adapter is as wide as its own ranks, and none as another's; there is room for one more and a block."""
    assert engine.bank.num_bytes == array_bytes(engine)
    for slot, seed in seeds.items():
        layers = linear_modules(engine.model.network.module)
        names = KEYS.get(seed, [path.split(".", 3)[-1] for path in layers if ".layers." in path])
        shapes = [linear_shape(layer) for path, layer in layers.items() if path.split(".", 3)[-1] in names]
        lanes = -(-RANKS[seed] // LANES) * LANES
        assert engine.bank.slot_bytes(slot) == sum(4 * lanes * (ins + outs) for ins, outs in shapes)
    for stack in stacks(engine).values():
        assert {slot for slot in stack.entries if slot is not None} <= seeds.keys()
        assert 0 < stack.num_entries <= entries_for(1 + stack.count + 1)


def test_a_visitor_of_high_rank_leaves_nothing_behind_and_disturbs_no_stream(
    engine, make_one, make_adapter, alone, make_request
):
    engine.registry.load("x", make_one(1))
    before = engine.bank.num_bytes
    streams, version = Streams(engine), engine.registry.acquire("x")
    streams.start(make_request("r", adapter=version), version)
    for _ in range(4):
        streams.step()
    engine.registry.load("visitor", make_adapter(7, rank=48))
    streams.step()
    assert engine.bank.num_bytes > 5 * before
    engine.registry.unload("visitor")
    streams.step()
    assert engine.bank.num_bytes == array_bytes(engine) == before
    streams.finish()
    assert streams.tokens["r"] == alone(1)


def test_replacing_again_and_again_moves_no_array_but_its_own_entry(engine, make_one, make_adapter):
    for name in "abc":
        engine.registry.load(name, make_one(1))
    engine.registry.load("a", make_adapter(8), replace=True)
    sizes = {place: stack.num_entries for place, stack in stacks(engine).items()}
    for seed in (9, 10, 11):
        engine.registry.load("a", make_adapter(seed), replace=True)
        assert {place: stack.num_entries for place, stack in stacks(engine).items()} == sizes
        copied = [group.shrink() for group in dict.fromkeys(engine.bank._groups.values())]
        assert set(copied) == {0}, "nothing is copied to give room back"


def test_streams_take_steps_between_the_parts_of_a_load(engine, make_one, alone, make_request):
    engine.bank.bytes_at_once = 1
    engine.registry.load("x", make_one(1))
    streams, version = Streams(engine), engine.registry.acquire("x")
    streams.start(make_request("r", adapter=version), version)
    steps = []

    def step_first(function) -> None:
        streams.step()
        steps.append(len(streams.tokens["r"]))
        function()

    engine.registry.run = step_first
    other = engine.registry.load("y", make_one(4))
    assert len(steps) >= 4, "one part for each of the layers' blocks"
    assert steps == sorted(set(steps)), "a token in every one"
    engine.registry.acquire("y")
    streams.start(make_request("s", adapter=other), other)
    streams.finish()
    assert streams.tokens == {"r": alone(1), "s": alone(4)}


def test_what_does_not_fit_is_refused_with_every_number_and_changes_nothing(model, make_one, make_adapter):
    engine = Engine(model, EngineLimits(adapter_budget_bytes=1_000_000))
    engine.registry.post = run_here
    engine.registry.load("x", make_one(1))
    before = engine.bank.num_bytes
    with pytest.raises(AdapterMemoryError) as caught:
        engine.registry.load("big", make_adapter(7, rank=48))
    message = str(caught.value)
    assert re.search(
        r"'big' of rank 48 needs \d\.\d MiB.*allows 1\.0 MiB, and 1 versions take 0\.\d MiB", message
    )
    assert "raise adapter_budget_gib" in message
    assert (engine.registry.names(), engine.bank.num_bytes) == (["x"], before)
    engine.registry.check_integrity()
    engine.registry.load("y", make_one(3))
    held = engine.registry.acquire("x")
    engine.registry.load("x", make_one(3), replace=True)
    with pytest.raises(AdapterMemoryError, match="requests that still hold 1 replaced versions"):
        engine.registry.load("big", make_adapter(7, rank=48))
    engine.registry.release(held)
    engine.registry.check_integrity()


def peak_of_load(engine: Engine, name: str, folder) -> int:
    """Memory that adapters took at most while one was loaded, by MLX's own count."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    others = mx.get_active_memory() - engine.bank.num_bytes
    engine.registry.load(name, folder)
    return mx.get_peak_memory() - others


@pytest.mark.parametrize("order", [(1, 4, 2), (4, 1, 2), (4, 4, 4, 4), (3, 5, 4)], ids=str)
def test_a_load_never_takes_more_than_the_smallest_budget_that_allows_it(fresh_engine, make_adapter, order):
    *earlier, last = order

    def make_one(seed: int):
        return make_adapter(seed, rank=8 * RANKS[seed], keys=KEYS.get(seed))

    def needed(seed: int) -> float:
        with pytest.raises(AdapterMemoryError) as caught:
            fresh_engine(adapter_budget_bytes=1).registry.load("x", make_one(seed))
        told = re.search(r"needs ([\d,.]+) MiB", str(caught.value))
        assert told is not None
        return float(told[1].replace(",", "")) * 2**20

    told = max(map(needed, order))
    largest = max(order, key=needed)
    with pytest.raises(AdapterMemoryError):
        fresh_engine(adapter_budget_bytes=int(told * 0.8)).registry.load("x", make_one(largest))
    engine = fresh_engine(adapter_budget_bytes=int(told * 1.1))
    for number, seed in enumerate(earlier):
        engine.registry.load(f"n{number}", make_one(seed))
    peak = peak_of_load(engine, "last", make_one(last))
    assert peak >= needed(last) / 4, "and not a multiple of what is needed"
    told *= 1.1
    num_layers = sum(isinstance(module, Banked) for _, module in engine.model.network.module.named_modules())
    rounding = 4 * num_layers * CUDA_PAGE if device.backend() == "cuda" else 0
    assert peak <= told + 60_000 + rounding, "as far as the message rounds it"


def test_no_array_of_slots_is_made_while_the_rows_stay_the_same(engine, make_one, make_request):
    versions = [engine.registry.load(f"n{seed}", make_one(seed)) for seed in (1, 3, 5)]
    for number, version in enumerate([*versions, None, versions[0]]):
        text = "the quick brown fox " * (1 + number)
        engine.add(make_request(f"r{number}", text, adapter=version, max_tokens=60))
    while engine.stats().num_decoding < 5:
        engine.step()
    engine.step()
    rows = engine.bank.rows.composition
    before = rows.num_arrays
    lengths = {num_tokens for _, num_tokens in rows._shares}  # prompts may have been the same rows
    assert before < 20 * len(lengths), "a few for each set of adapters that layers have, not for each layer"
    for _ in range(20):
        engine.step()
        assert engine.bank.rows.composition is rows
    assert rows.num_arrays == before
    engine.registry.load("of other ranks", make_one(2))
    for _ in range(5):
        engine.step()
    assert rows.num_arrays == before
    engine.registry.load("of the same ranks", make_one(6))
    for _ in range(10):
        engine.step()
    assert engine.bank.rows.composition is rows
    again = rows.num_arrays
    assert before < again < 2 * before, "once more, for stacks that one more is in"
    for _ in range(10):
        engine.step()
    assert rows.num_arrays == again


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("size", "scale"), [(1e5, 1.0), (1e3, 1e3), (1e25, 1e20), (1e20, 1e38), (1.0, 1e39)])
def test_values_that_the_bank_cannot_hold_are_refused_by_tensor(
    model_folder, make_adapter, dtype, size, scale
):
    folder = make_adapter(1, rank=2, size=size, scale=scale, keys=["self_attn.q_proj"])
    engine = Engine(load(str(model_folder), name="lively", dtype=dtype))
    largest = {"float16": 65504, "bfloat16": 3.38e38, "float32": 3.4e38}[dtype]
    if 5 * size * scale < largest:
        engine.registry.load("a", folder)
    else:
        told = f"layers.0.self_attn.q_proj.lora_b, times its scale of {scale:g}, has values that {dtype}"
        with pytest.raises(AdapterError, match=re.escape(told)):
            engine.registry.load("a", folder)
        assert engine.bank.num_bytes == 0


def test_loads_replacements_and_unloads_from_many_threads_leave_every_stream_right_and_nothing_behind(
    model, make_one, alone, make_request
):
    engine = Engine(model, EngineLimits(max_adapters=3))
    engine.bank.bytes_at_once = 20_000
    folders, expected = {seed: make_one(seed) for seed in RANKS}, {seed: alone(seed) for seed in RANKS}
    worker = Worker(engine)
    worker.start()
    wrong: list[str] = []
    done = threading.Semaphore(0)

    def churn(name: str, rng: random.Random) -> int:
        count = 0
        for turn in range(10):
            seed = rng.choice(list(RANKS))
            engine.registry.load(name, folders[seed], replace=True)
            version = engine.registry.acquire(name)
            tokens: list[int] = []

            def take(event, seed=seed, tokens=tokens) -> None:
                tokens.extend(event.token_ids)
                if event.finish is not None:
                    if event.finish != "length" or tokens != expected[seed]:
                        wrong.append(f"{event}: {tokens}")
                    done.release()

            worker.submit(make_request(f"{name}-{turn}", adapter=version), take)
            count += 1
            if rng.random() < 0.5:
                engine.registry.unload(name)
        return count

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(churn, name, random.Random(number)) for number, name in enumerate("abc")]
        for _ in range(sum(future.result() for future in futures)):
            assert done.acquire(timeout=60)
    for name in engine.registry.names():
        engine.registry.unload(name)
    worker.call(lambda: None)
    while engine.bank.tidy_is_due:
        worker.call(lambda: None)
    assert wrong == []
    assert engine.registry.versions() == []
    engine.registry.check_integrity()
    assert (engine.bank.num_bytes, array_bytes(engine)) == (0, 0)
    worker.stop()


def test_work_that_posts_itself_again_holds_up_no_stream(model, make_request):
    """As giving back a large bank's memory does, a part between two steps."""
    worker, finished = Worker(Engine(model)), threading.Event()
    worker.start()

    def again() -> None:
        if not finished.is_set():
            worker.engine.registry.post(again)

    try:
        worker.engine.registry.post(again)
        worker.submit(make_request("r"), lambda event: finished.set() if event.finish else None)
        assert finished.wait(timeout=10)
    finally:
        finished.set()
        worker.stop()
