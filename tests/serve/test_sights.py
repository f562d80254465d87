"""The engine with pictures: each row is what the whole model makes of it alone, whatever its pictures' features come
from and whoever it shares steps with; and a picture's trouble is its own row's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sighted import Alone, Eyes, broken, moving, shown

from serve.adapters.versions.version import AdapterVersion
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Event, Request, Sampling
from serve.errors import GenerationError, RequestError
from serve.model.loading import load

pytestmark = pytest.mark.long

SEEING = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "smolvlm")
"""Positions of three kinds; features deep in the stack; recurrent layers; windows and pictures that see themselves;
nothing of all that."""
NUM_TOKENS = 8
TEXT = tuple(range(40, 60))
MORE = tuple(range(90, 101))
NOT_DRAWN = tuple((token, -100.0) for token in range(30))
"""Special tokens: a conversation that goes on from an answer with a placeholder would lack a picture."""


class Desk:
    """What a test asks of one family: prompts, engines, and what is right."""

    def __init__(self, family: str, folder: Path, assert_drawn: Callable[..., None]) -> None:
        self.family, self.folder = family, folder
        self.eyes = Eyes(family, folder)
        self.alone = Alone(load(str(folder)))
        self._assert_drawn = assert_drawn

    def engine(self, **limits) -> Engine:
        bounds = {"max_rows": 6, "prefill_chunk_tokens": 16, "kv_budget_bytes": 64 << 20, **limits}
        return Engine(load(str(self.folder), name=self.family), EngineLimits(**bounds))

    def request(self, id: str, *parts, max_tokens: int = NUM_TOKENS, **fields) -> Request:
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logit_bias=NOT_DRAWN)
        return Request(id, self.eyes.prompt(*parts), sampling, **fields)

    def check(self, request: Request, token_ids: Sequence[int]) -> None:
        assert len(token_ids) == request.sampling.max_tokens
        self._assert_drawn(request, token_ids, self.alone)


@pytest.fixture(scope="module")
def desk(vlm_folder, assert_drawn) -> Callable[[str], Desk]:
    """desk(family) → made once."""
    return cache(lambda family: Desk(family, vlm_folder(family), assert_drawn))


class Run:
    """Requests on their way."""

    def __init__(self, engine: Engine, *requests: Request) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, Event] = {}
        self.add(*requests)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.tokens[request.id] = []
            self.engine.add(self.engine.check(request))

    def step(self) -> None:
        for event in self.engine.step():
            self.tokens[event.request_id] += event.token_ids
            if event.finish is not None:
                self.last[event.request_id] = event
        self.engine.scheduler.check_integrity()

    def finish(self) -> Run:
        while self.engine.has_work:
            self.step()
        return self

    def error(self, id: str) -> str:
        event = self.last[id]
        assert event.finish == "error"
        assert isinstance(event.error, GenerationError)
        return str(event.error)


def pictures(*seeds: int):
    return [shown(seed) for seed in seeds]


@pytest.mark.parametrize("family", SEEING)
def test_rows_with_and_without_pictures_in_one_batch_are_each_alone(desk, family, ahead):
    """Two rows whose pictures are prefilled together keep both rows' features, deepstack and all; text beside them
    and after them keeps its own positions."""
    table = desk(family)
    one, two, three = pictures(1, 2, 3)
    requests = [
        table.request("text", TEXT),
        table.request("one", TEXT[:3], one, MORE),
        table.request("another", two, MORE),
        table.request("three", one, TEXT[:5], two, MORE, three, TEXT[5:9]),
        table.request("long", TEXT, TEXT, two, TEXT),
    ]
    if "video" in table.eyes.kinds:
        requests.append(table.request("clip", TEXT[:2], moving(1), MORE))
    engine = table.engine(ahead=ahead, prefill_chunk_tokens=64)
    run = Run(engine, *requests).finish()
    after = table.request("after", MORE, TEXT)
    run.add(after)
    run.finish()
    for request in (*requests, after):
        table.check(request, run.tokens[request.id])
    stats = engine.stats().features
    assert stats.num_queries - stats.num_hits == stats.num_encoded, "encoded once each"
    assert engine.stats().memory.feature_bytes > 0


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_chunks_of_every_size_and_joining_late_change_nothing(desk, family, ahead):
    table = desk(family)
    one, two = pictures(1, 2)
    requests = [
        table.request("first", TEXT, max_tokens=20),
        table.request("second", TEXT[:4], one, TEXT[:1], two, MORE),
        table.request("third", one, MORE, max_tokens=3),
    ]
    for size in (4, 7, 64):
        engine = table.engine(ahead=ahead, prefill_chunk_tokens=size, encode_patches=1)
        run = Run(engine, requests[0])
        for request in requests[1:]:
            while len(run.tokens["first"]) < (3 if request is requests[1] else 9):
                run.step()
            run.add(request)
        run.finish()
        for request in requests:
            table.check(request, run.tokens[request.id])


@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_a_known_picture_is_not_encoded_again_and_keeps_all_its_features(desk, family, tmp_path):
    """Behind other words, so that no prefix has its tokens; in memory, and on disk after a restart."""
    table = desk(family)
    one, two = pictures(1, 2)
    limits = {"feature_cache_dir": tmp_path, "feature_cache_disk_bytes": 1 << 26}
    requests = [
        table.request("first", TEXT, one, MORE),
        table.request("second", MORE, one, two, TEXT),
        table.request("third", MORE[:4], two, one),
    ]
    engine = table.engine(**limits)
    for number, request in enumerate(requests[:2], start=1):
        table.check(request, Run(engine, request).finish().tokens[request.id])
        assert engine.stats().features.num_encoded == number
    assert engine.stats().features.num_hits == 1
    engine.close()
    engine = table.engine(**limits)
    table.check(requests[2], Run(engine, requests[2]).finish().tokens["third"])
    stats = engine.stats().features
    assert (stats.num_encoded, stats.num_hits, stats.num_disk_hits) == (0, 2, 2)
    engine.close()
    torn = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-1] + b"\x99")
    engine = table.engine(**limits)
    table.check(requests[2], Run(engine, requests[2]).finish().tokens["third"])
    stats = engine.stats().features
    assert (stats.num_encoded, stats.num_disk_hits, stats.num_disk_errors) == (1, 1, 1)
    engine.close()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_another_picture_under_the_same_ids_never_hits(desk, family):
    table = desk(family)
    engine = table.engine()
    first = table.request("first", TEXT, shown(1), MORE)
    second = table.request("second", TEXT, shown(2), MORE)
    again = table.request("again", TEXT, shown(1), MORE)
    assert first.prompt.token_ids == second.prompt.token_ids
    run = Run(engine)
    for request in (first, second, again):
        run.add(request)
        run.finish()
        table.check(request, run.tokens[request.id])
    assert run.tokens["first"] != run.tokens["second"], "the pictures do not tell"
    start = first.prompt.media[0].start
    assert run.last["first"].num_cached_tokens == 0
    assert 0 < run.last["second"].num_cached_tokens <= start
    assert run.last["again"].num_cached_tokens == len(first.prompt.token_ids) - 1
    assert engine.stats().features.num_encoded == 2


@pytest.mark.parametrize("family", SEEING)
def test_a_second_turn_about_the_first_ones_picture_hits_and_encodes_nothing(desk, family, ahead):
    table = desk(family)
    engine = table.engine(ahead=ahead)
    one, two = pictures(1, 2)
    first = table.request("first", TEXT, one, MORE)
    run = Run(engine, first).finish()
    second = table.request("second", TEXT, one, MORE, tuple(run.tokens["first"]), MORE, two, TEXT[:4])
    run.add(second)
    run.finish()
    for request in (first, second):
        table.check(request, run.tokens[request.id])
    assert run.last["second"].num_cached_tokens == len(first.prompt.token_ids) + NUM_TOKENS - 1
    assert engine.stats().features.num_encoded == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, None], ids=["nan", "inf", "raises"])
def test_a_picture_that_cannot_be_encoded_ends_its_row_alone(desk, ahead, value):
    table = desk("qwen3_vl")
    engine = table.engine(ahead=ahead, prefill_chunk_tokens=64)
    requests = [
        table.request("text", TEXT),
        table.request("sound", TEXT[:3], shown(1), MORE),
        table.request("bad", TEXT[:3], shown(1), MORE, shown(2)),
        table.request("bad too", MORE, shown(2)),
    ]
    requests[2] = replace(requests[2], prompt=broken(requests[2].prompt, 1, value))
    requests[3] = replace(requests[3], prompt=broken(requests[3].prompt, 0, value))
    run = Run(engine, *requests).finish()
    for request in requests[:2]:
        table.check(request, run.tokens[request.id])
    assert "image 2 of 2 in the prompt cannot be encoded" in run.error("bad")
    assert "image 1 of 1 in the prompt cannot be encoded" in run.error("bad too")
    # Nothing of it is kept: neither its features nor what was computed with them.
    again = replace(requests[3], id="again")
    run.add(again, replace(requests[1], id="and the sound one"))
    run.finish()
    assert "cannot be encoded" in run.error("again")
    table.check(requests[1], run.tokens["and the sound one"])
    engine.features._cache.check_integrity()
    assert engine.stats().kv_bytes == 0
    assert not engine.features._held, "features of nobody"


@pytest.mark.parametrize("steps", range(5))
def test_who_leaves_while_a_step_is_in_flight_leaves_no_features_held(desk, ahead, steps):
    table = desk("qwen3_vl")
    engine = table.engine(ahead=ahead)
    run = Run(engine, table.request("before", TEXT, shown(1), MORE)).finish()
    run.add(table.request("leaving", TEXT, shown(1), MORE, shown(2), MORE))
    for _ in range(steps):
        run.step()
    engine.cancel("leaving")
    run.finish()
    assert not engine.features._held
    engine.forget()
    assert engine.stats().memory.feature_bytes == 0


@pytest.mark.parametrize("patches", [1, 1024])
def test_the_other_pictures_of_a_row_that_one_of_them_ended_are_nobodys(desk, ahead, patches):
    table = desk("qwen3_vl")
    engine = table.engine(ahead=ahead, prefill_chunk_tokens=64, encode_patches=patches)
    request = table.request("bad", shown(1), shown(2), shown(3), MORE)
    for value in (None, np.nan):
        for number in range(3):
            run = Run(engine, replace(request, prompt=broken(request.prompt, number, value))).finish()
            assert f"image {number + 1} of 3" in run.error("bad")
            assert not engine.features._held


def test_a_forward_that_fails_leaves_no_picture_half_encoded(desk, ahead):
    table = desk("qwen2_5_vl")
    engine = table.engine(ahead=ahead, encode_patches=1)
    requests = [table.request("a", shown(1), MORE, shown(2)), table.request("b", TEXT, shown(1), shown(3))]
    for steps in range(6):
        run = Run(engine, *requests)
        for _ in range(steps):
            run.step()
        engine.recover(RuntimeError("injected"))
        while engine.has_work:
            engine.step()
        assert not engine.features._held
        engine.scheduler.check_integrity()
        engine.features._cache.check_integrity()
    run = Run(engine, *requests).finish()
    for request in requests:
        table.check(request, run.tokens[request.id])


def preempted(table: Desk, engine: Engine, asked: Request) -> Run:
    """The younger of two rows of one group gives way to somebody else, and comes back."""
    neighbour = replace(table.request("neighbour", TEXT, max_tokens=60), group="g")
    run = Run(engine, neighbour, replace(asked, group="g"))
    while len(run.tokens[asked.id]) < 3:
        run.step()
    run.add(table.request("other", MORE, max_tokens=2))
    while asked.id not in {sequence.request.id for sequence in engine.scheduler.waiting}:
        run.step()
    return run


@pytest.mark.parametrize("kept", [1 << 20, 0], ids=["from features", "encoded again"])
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "qwen3_5"])
def test_a_row_that_is_preempted_goes_on_from_features_or_encodes_again(desk, family, ahead, kept):
    table = desk(family)
    engine = table.engine(max_rows=2, ahead=ahead, prefix_cache_bytes=0, feature_cache_bytes=kept)
    asked = table.request("asked", TEXT[:4], shown(1), MORE, shown(2), MORE[:5])
    run = preempted(table, engine, asked).finish()
    table.check(asked, run.tokens["asked"])
    assert engine.stats().num_preempted > 0
    assert engine.stats().features.num_encoded == (2 if kept else 4)
    assert engine.stats().memory.feature_bytes <= kept


def test_pixels_leave_memory_when_their_tokens_are_computed(desk):
    table = desk("qwen2_5_vl")
    engine = table.engine()
    request = table.request("asked", TEXT[:4], shown(1), MORE, shown(2), max_tokens=40)
    pieces = [replace(m, inputs={n: a.copy() for n, a in m.inputs.items()}) for m in request.prompt.media]
    pixels = [weakref.ref(piece.inputs["pixel_values"]) for piece in pieces]
    run = Run(engine, replace(request, prompt=replace(request.prompt, media=tuple(pieces))))
    del pieces
    while not run.tokens["asked"]:
        run.step()
    gc.collect()
    assert [ref() for ref in pixels] == [None, None]
    run.finish()
    table.check(request, run.tokens["asked"])


def test_adapters_share_features_unless_they_have_a_tower_of_their_own(
    desk, make_vlm_adapter, assert_drawn, ahead
):
    family = "qwen3_vl"
    table = desk(family)
    engine = table.engine(ahead=ahead)
    folders = {
        "words": make_vlm_adapter(family, 1),
        "more words": make_vlm_adapter(family, 2),
        "eyes": make_vlm_adapter(family, 3, parts=("vision_tower", "language_model"), size=0.1),
    }
    versions: dict[str, AdapterVersion | None] = {"base": None}
    versions |= {name: engine.registry.load(name, folder) for name, folder in folders.items()}
    assert {bool(each and each.tower_hash) for each in versions.values()} == {False, True}
    requests = [
        table.request(name, TEXT[:4], shown(1), MORE, adapter=version) for name, version in versions.items()
    ]
    run = Run(engine, *requests).finish()
    assert engine.stats().features.num_encoded == 2
    table.check(requests[0], run.tokens["base"])
    for request in requests[1:]:
        merged = Alone(merged_model(table.folder, folders[request.id]))
        assert_drawn(request, run.tokens[request.id], merged)
    assert len({tuple(tokens) for tokens in run.tokens.values()}) == 4, "the adapters do not tell"


def merged_model(folder: Path, adapter: Path):
    from vlm_families import merge_lora

    model = load(str(folder))
    merge_lora(model.network.module, adapter)
    return model


def test_what_the_model_does_not_take_is_refused_by_name(desk, fresh_engine):
    request = desk("qwen2_5_vl").request("asked", shown(1), MORE)
    with pytest.raises(RequestError, match="lively takes no image; it takes text alone"):
        fresh_engine().check(replace(request, prompt=replace(request.prompt, rope=None)))
    (piece,) = request.prompt.media
    heard = replace(request.prompt, media=(replace(piece, kind="audio"),))
    with pytest.raises(RequestError, match="takes no audio; it takes image, video"):
        desk("qwen2_5_vl").engine().check(replace(request, prompt=heard))
    request = desk("gemma3").request("asked", shown(1), MORE)
    with pytest.raises(RequestError, match=r"4 tokens of the prompt see one another.*3 at most"):
        desk("gemma3").engine(prefill_chunk_tokens=3).check(request)


def test_a_picture_of_many_tokens_is_paged_in_chunk_by_chunk(desk):
    """It is encoded once, and its features are put where they stand, wherever chunks are cut."""
    table = desk("qwen2_5_vl")
    request = table.request("asked", TEXT[:3], shown(1, 112, 112), MORE)
    (piece,) = request.prompt.media
    assert len(piece.positions) >= 16
    engine = table.engine(prefill_chunk_tokens=5)
    table.check(request, Run(engine, request).finish().tokens["asked"])
    assert engine.stats().features.num_encoded == 1


def test_a_server_tells_what_its_features_hold(desk):
    table = desk("qwen2_5_vl")
    engine = table.engine()
    Run(engine, table.request("asked", shown(1), shown(2), shown(1), MORE)).finish()
    stats = engine.stats()
    assert (stats.features.num_queries, stats.features.num_hits) == (3, 1)
    assert (stats.features.num_encoded, stats.features.num_kept) == (2, 2)
    assert 0 < stats.memory.feature_bytes < stats.memory.budget_bytes
    engine.forget()
    assert engine.stats().memory.feature_bytes == engine.stats().features.num_kept == 0
