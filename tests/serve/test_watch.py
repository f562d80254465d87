"""Watched folders: what appears there becomes a version, whole and in order; what is bad is told and harms nobody."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from watched import Setting

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import (
    CONFIG_FILE,
    TENSORS_FILE,
    read_config,
    read_tensors,
    write_adapter,
)
from serve.adapters.formats.published import CHECKPOINTS, STATE_FILE, Published, published_in
from serve.adapters.registry.copies import Copies
from serve.adapters.registry.watch import FIRST_AGAIN_S, STILL_S
from serve.adapters.tools.writing import convert
from serve.api.server import serving
from serve.config import ServeConfig
from serve.engine.engine import Engine, EngineLimits
from serve.errors import AdapterMemoryError, ConfigError
from serve.runtime import Runtime

LINEAGE = Lineage("lively", "", "", "", "", "", "0")


@pytest.fixture
def start(model, tmp_path):
    """start(**options) → a Setting over tmp_path/watched."""
    settings: list[Setting] = []
    (tmp_path / "watched").mkdir()

    def begin(**options: object) -> Setting:
        limits = EngineLimits(adapter_versions=options.pop("adapter_versions", 8))
        settings.append(Setting(tmp_path / "watched", Engine(model, limits).registry, **options))
        return settings[-1]

    yield begin
    for setting in settings:
        if setting.copies.folder.exists():
            setting.watch.close()
        assert not setting.copies.folder.exists()
        setting.registry.check_integrity()


@pytest.fixture
def put(tmp_path, make_adapter) -> Callable[..., Path]:
    """put(name, seed, is_hashed=True) → an adapter in the watched folder, there from one instant to the next."""

    def place(name: str, seed: int, *, is_hashed: bool = True) -> Path:
        final, new = tmp_path / "watched" / name, tmp_path / "watched" / f".new-{name}"
        lineage = LINEAGE if is_hashed else None
        write_adapter(
            new, read_tensors(make_adapter(seed)), AdapterConfig("lora", -1, 4, 2.0, lineage=lineage)
        )
        if final.exists():
            shutil.rmtree(final)
        os.replace(new, final)
        return final

    return place


def content(setting: Setting, name: str) -> str:
    return setting.registry.resolve(name).content_hash


def test_what_appears_is_loaded_what_is_replaced_is_a_new_version_and_what_goes_leaves_its_name(
    start, put, make_adapter, caplog
):
    setting = start()
    assert setting.settle() == []
    put("a", 1)
    put("b", 2)
    (setting.folder / "notes").mkdir()
    (setting.folder / "readme.txt").write_text("no folder")
    (setting.folder / "b" / "added_tokens.json").write_text('{"<mine>": 9999}')
    assert sorted(setting.look()) == ["a@1", "b@1"]
    assert "'<mine>' (9999)" in caplog.text, "the copy has what its own tokenizer adds"
    assert setting.settle() == []
    put("a", 3)
    assert setting.look() == ["a@2"]
    assert content(setting, "a") == read_config(setting.folder / "a").lineage.content_hash
    shutil.rmtree(setting.folder / "b")
    assert setting.settle() == []
    assert not setting.of("b").is_there
    assert setting.registry.resolve("b").id == "b@1", "it stays until somebody unloads it"
    assert [record.message for record in caplog.records if "gone" in record.message] != []
    put("b", 2)
    assert setting.settle() == [], "the same content as before it went"
    put("b", 4)
    assert setting.look() == ["b@2"]
    assert {each.problem for each in setting.watch.watched()} == {""}


def unfinished(folder: Path, adapter: Path, step: int, written_s: int) -> Path:
    """A run's folder with one checkpoint, which was published at that time."""
    place = folder / CHECKPOINTS / f"step-{step:06d}"
    shutil.copytree(adapter, place)
    (place / STATE_FILE).write_text("{}")
    for file in place.iterdir():
        os.utime(file, (written_s, written_s))
    return folder


@pytest.mark.parametrize("how", ["moved there", "a link to it"])
def test_another_folder_in_the_place_of_one_is_followed_though_it_is_older(start, put, tmp_path, how):
    later, older = (
        unfinished(tmp_path / name, put("x", seed), step, seconds)
        for name, seed, step, seconds in (("later", 1, 6, 2000), ("older", 2, 3, 1000))
    )
    shutil.rmtree(tmp_path / "watched" / "x")
    setting, shown = start(), tmp_path / "watched" / "a"
    if how == "moved there":
        os.rename(later, shown)
        assert setting.settle() == ["a@1"]
        os.rename(shown, later)
        assert setting.look() == []
        os.rename(older, shown)
    else:
        shown.symlink_to(later)
        assert setting.settle() == ["a@1"]
        shown.unlink()
        shown.symlink_to(older)
    assert setting.settle() == ["a@2"]
    assert setting.settle() == []


def test_a_folder_that_comes_back_after_its_name_was_unloaded_is_loaded_again(start, put):
    setting = start()
    put("a", 1)
    assert setting.look() == ["a@1"]
    setting.registry.unload("a")
    put("a", 1)
    assert setting.settle() == [], "it was unloaded on purpose, and nothing has changed"
    assert list(setting.copies.folder.glob("a/*")) == [], "nor is a copy left"
    shutil.rmtree(setting.folder / "a")
    assert setting.look() == []
    put("a", 1)
    assert setting.look() == ["a@2"]


def test_a_folder_that_is_an_adapter_itself_is_known_by_its_own_name(start, put, tmp_path):
    later = tmp_path / "elsewhere" / "z"
    setting = start(folders=(put("a", 1), later))
    assert setting.look() == ["a@1"]
    assert setting.watch.troubles() == {str(later): "is not there"}
    shutil.copytree(put("b", 2), later)
    assert setting.look() == ["z@1"], "and b, beside a, is not watched"
    assert setting.watch.troubles() == {}


def test_a_peft_folder_is_followed_like_any_other(start, put, tmp_path):
    setting = start()
    for seed in (1, 2):
        convert(put("plain", seed), tmp_path / f"peft-{seed}", "peft")
        new = setting.folder / ".new"
        shutil.copytree(tmp_path / f"peft-{seed}", new)
        shutil.rmtree(setting.folder / "a", ignore_errors=True)
        os.replace(new, setting.folder / "a")
        assert f"a@{seed}" in setting.settle()
    assert setting.of("a").problem == ""
    assert setting.registry.resolve("a").format == "peft"


def test_files_that_were_touched_or_written_anew_with_the_same_content_are_no_new_version(start, put):
    setting = start()
    folder = put("a", 1)
    assert setting.look() == ["a@1"]
    os.utime(folder / TENSORS_FILE, ns=(1, 1))
    assert setting.settle() == []
    put("a", 1)
    assert setting.settle() == []
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["lineage"]["metrics"] = {"valid_loss": 1.0}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert setting.settle() == [], "where it came from changes nothing of what it does"
    config["lora_parameters"]["scale"] = 3.0
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert setting.settle() == ["a@2"]


@pytest.mark.parametrize("is_hashed", [True, False])
@pytest.mark.parametrize("file", [TENSORS_FILE, CONFIG_FILE])
def test_a_file_cut_anywhere_is_never_loaded_is_told_once_it_stays_so_and_taken_when_it_is_whole(
    start, put, file, is_hashed, caplog
):
    setting = start()
    put("other", 9)
    assert setting.look() == ["other@1"]
    whole = (put("a", 1, is_hashed=is_hashed) / file).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if file == TENSORS_FILE else len(whole) // 3
    for number, cut in enumerate((0, 1, 8, header - 1, header, (header + len(whole)) // 2, len(whole) - 2)):
        folder = put("a", 1, is_hashed=is_hashed)
        (folder / file).write_bytes(whole[:cut])
        caplog.clear()
        assert setting.look() == setting.look(after_s=STILL_S / 2) == []
        assert not caplog.records, "it may still be written"
        assert setting.look(after_s=STILL_S) == setting.look() == setting.look(after_s=9) == []
        assert [record.levelno for record in caplog.records] == [logging.WARNING], cut
        assert str(folder) in caplog.text or file in caplog.text
        assert setting.of("a").problem
        (folder / file).write_bytes(whole)
        took = setting.settle()
        assert took == (["a@1"] if number == 0 else []), "the first; afterwards it is what is loaded already"
        assert setting.of("a").problem == ""
        if number == 0:
            kept = content(setting, "a")
    assert content(setting, "a") == kept
    assert setting.loaded == ["other@1", "a@1"]


@pytest.mark.parametrize("order", [(CONFIG_FILE, TENSORS_FILE), (TENSORS_FILE, CONFIG_FILE)])
def test_half_a_pair_is_never_loaded_in_whatever_order_its_files_come(start, put, tmp_path, order):
    setting = start()
    folder = put("a", 1)
    assert setting.look() == ["a@1"]
    shutil.copytree(put("b", 2), tmp_path / "b")
    shutil.rmtree(setting.folder / "b")
    for step, file in enumerate(order):
        shutil.copy(tmp_path / "b" / file, folder / file)
        took = setting.settle()
        assert took == ([] if step == 0 else ["a@2"])
    assert content(setting, "a") == read_config(tmp_path / "b").lineage.content_hash


def test_files_without_a_content_hash_are_taken_when_they_have_stayed_the_same(start, put):
    setting = start()
    folder = put("a", 1, is_hashed=False)
    assert setting.look() == setting.look(after_s=STILL_S * 0.9) == []
    (folder / CONFIG_FILE).write_text((folder / CONFIG_FILE).read_text() + " ")
    assert setting.look(after_s=STILL_S * 0.9) == setting.look(after_s=STILL_S * 0.9) == []
    assert setting.look(after_s=STILL_S * 0.2) == ["a@1"]


def no_list(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("[1, 2]")


def other_shapes(folder: Path) -> None:
    tensors = {name: value[:-1] for name, value in read_tensors(folder).items()}
    write_adapter(folder, tensors, read_config(folder))


def half(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()


def other_half(folder: Path) -> None:
    (folder / TENSORS_FILE).unlink()


def for_python_alone(folder: Path) -> None:
    (folder / TENSORS_FILE).unlink()
    (folder / CONFIG_FILE).write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    )
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")


def pickled(folder: Path) -> None:
    (folder / TENSORS_FILE).write_bytes(b"\x80\x04K\x01.")


def endless_header(folder: Path) -> None:
    (folder / TENSORS_FILE).write_bytes((10 << 30).to_bytes(8, "little") + b"{}")


def huge(folder: Path) -> None:
    with (folder / TENSORS_FILE).open("ab") as stream:
        stream.truncate(200 << 30)  # a hole


def large_config(folder: Path) -> None:
    with (folder / CONFIG_FILE).open("ab") as stream:
        stream.truncate(1 << 30)


def of_another_base(folder: Path) -> None:
    lineage = Lineage("other", "sha256:0", "", "", "", "", "0")
    config = AdapterConfig("lora", -1, 4, 2.0, lineage=lineage)
    write_adapter(folder, read_tensors(folder), config)


BAD = (
    no_list,
    other_shapes,
    half,
    other_half,
    for_python_alone,
    pickled,
    endless_header,
    huge,
    large_config,
    of_another_base,
)


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_one_is_told_once_changes_nothing_and_is_tried_again_when_it_changes(start, put, spoil, caplog):
    setting = start(max_bytes=64 << 20)
    put("a", 1)
    put("good", 2)
    assert sorted(setting.look()) == ["a@1", "good@1"]
    spoil(put("a", 3))
    for _ in range(3):
        assert setting.settle() == []
    told = [record for record in caplog.records if "is not loaded" in record.message]
    assert len(told) == 1, caplog.text
    assert setting.of("a").problem in told[0].message
    assert setting.registry.resolve("a").id == "a@1"
    put("good", 4)
    assert setting.look() == ["good@2"], "the others go on"
    assert str(setting.folder / "a") in told[0].message
    assert str(setting.copies.folder) not in told[0].message
    assert len(list(setting.copies.folder.glob("a/*"))) == 1, "no copy of it stays"
    put("a", 5)
    assert setting.look() == ["a@2"]
    assert setting.of("a").problem == ""


def test_what_cannot_be_read_is_told_and_taken_when_it_can(start, put, caplog):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    setting = start()
    folder = put("a", 1)
    put("b", 2)
    folder.chmod(0)
    assert setting.settle() == ["b@1"]
    assert "ermission" in setting.of("a").problem
    folder.chmod(0o755)
    assert setting.settle() == ["a@1"]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(start, put):
    setting = start()
    folder = put("a", 1)
    (folder / CONFIG_FILE).unlink()
    os.mkfifo(folder / CONFIG_FILE)
    put("b", 2)
    assert setting.settle() == ["b@1"]


def test_names_that_cannot_be_are_told(start, put, tmp_path):
    setting = start(folders=(tmp_path / "watched", tmp_path / "more"))
    put("b@2", 1)
    put("lively", 2)
    put("a", 3)
    shutil.copytree(put("a", 3), tmp_path / "more" / "a")
    assert setting.settle() == ["a@1"]
    problems = {each.folder: each.problem for each in setting.watch.watched()}
    assert "'@'" in problems[str(setting.folder / "b@2")]
    assert "base's" in problems[str(setting.folder / "lively")]
    assert problems[str(setting.folder / "a")] == ""
    assert "watched under that name too" in problems[str(tmp_path / "more" / "a")]
    os.replace(setting.folder / "a", tmp_path / "more" / "a.new")  # the name is free again
    assert sorted([*setting.settle(), *setting.settle()]) == ["a.new@1", "a@2"]
    assert setting.of("a").problem == ""


def test_no_link_leads_out_of_where_the_server_may_read(start, put, tmp_path):
    setting = start(roots=(tmp_path / "watched",))
    outside = tmp_path / "secret"
    os.replace(put("gone", 1), outside)
    (setting.folder / "whole").symlink_to(outside)
    (setting.folder / "part").mkdir()
    shutil.copy(outside / CONFIG_FILE, setting.folder / "part")
    (setting.folder / "part" / TENSORS_FILE).symlink_to(outside / TENSORS_FILE)
    (setting.folder / "round").symlink_to("round")
    (setting.folder / "inside").symlink_to(put("a", 2))
    assert sorted(setting.settle()) == ["a@1", "inside@1"]
    assert all("under none" in setting.of(name).problem for name in ("whole", "part"))


def test_what_has_no_room_is_tried_again_later_and_less_and_less_often(start, put):
    setting = start()
    tries = []

    def no_room() -> None:
        tries.append(setting.clock.now)
        raise AdapterMemoryError("no room")

    setting.before_load = no_room
    put("a", 1)
    for _ in range(100):
        setting.look(after_s=1)
    waits = [later - earlier for earlier, later in pairwise(tries) if earlier > STILL_S]
    assert waits[0] >= FIRST_AGAIN_S
    assert waits == sorted(waits)
    assert 3 < len(tries) < 10
    assert setting.of("a").problem == "no room"
    setting.before_load = lambda: None
    while not setting.of("a").version and setting.clock.now < 1000:
        setting.look(after_s=1)
    assert (setting.of("a").version, setting.of("a").problem) == ("a@1", "")


def test_copies_outlive_their_originals_as_long_as_their_versions_are_known(start, put):
    setting = start(adapter_versions=2)
    put("a", 1)
    setting.look()
    held = setting.registry.acquire("a")
    hashes = []
    for seed in (2, 3, 4, 5):
        hashes.append(read_config(put("a", seed)).lineage.content_hash)
        setting.look()
    shutil.rmtree(setting.folder / "a")

    def copies() -> list[str]:
        return [path.name[:6] for path in sorted((setting.copies.folder / "a").iterdir())]

    assert copies() == ["000001", "000003", "000004", "000005"], (
        "the held one, and two beside the current one"
    )
    for path in (setting.copies.folder / "a").iterdir():
        read_tensors(path, read_config(path))
    assert setting.registry.rollback("a", 3).content_hash == hashes[1]
    setting.registry.release(held)
    put("a", 6)
    setting.look()
    assert "000001" not in copies()
    assert len(copies()) == 3


def test_a_copy_is_of_one_moment_or_not_there(put, tmp_path):
    (tmp_path / "watched").mkdir()
    copies = Copies(lambda name, path: False)
    folder = put("a", 1)
    found = published_in(folder)
    for change in (
        lambda: os.utime(folder / CONFIG_FILE, ns=(1, 1)),
        lambda: put("a", 2),
        lambda: (folder / TENSORS_FILE).unlink(),
        lambda: shutil.rmtree(folder),
    ):
        change()
        assert copies.take("a", found) is None
        assert list(copies.folder.glob("a/*")) == []
        found = published_in(folder) or found
    copies.close()


def at(step: int | None, seconds: int, word: str = "") -> Published:
    return Published(Path("x"), ((word or f"{step}", 1, seconds, seconds),), seconds, step)


@pytest.mark.parametrize(
    ("last", "found", "is_newer"),
    [
        (None, at(3, 10), True),
        (at(3, 10), at(3, 10), False),
        (at(3, 10), at(6, 20), True),
        (at(6, 20), at(3, 10), False),  # the newer one was pruned
        (at(6, 20), at(4, 30), True),  # a continuation from step 3
        (at(6, 20), at(6, 30, "again"), True),
        (at(6, 20), at(7, 20), True),  # in the same instant of a coarse clock
        (at(6, 20), at(None, 20), True),  # the run has ended
        (at(6, 20), at(None, 10), False),  # its checkpoints were deleted; an earlier end is left
        (at(None, 20), at(6, 10), False),  # a run that has ended goes on: its old checkpoint
        (at(None, 20), at(9, 30), True),
        (at(None, 20), at(None, 10, "other"), True),  # somebody puts an older file there
    ],
)
def test_an_older_one_never_follows_a_newer_one(last, found, is_newer):
    assert found.is_newer(last) is is_newer


def test_an_empty_folder_and_a_missing_one_stand_for_nothing(tmp_path):
    assert published_in(tmp_path) is None
    assert published_in(tmp_path / "nowhere") is None
    (tmp_path / "checkpoints").write_text("a file")
    assert published_in(tmp_path) is None


@pytest.fixture
def serve(model_folder):
    """serve(**config) → a Runtime that looks every 10 ms, closed at the end."""
    with ExitStack() as started:

        def begin(**fields: object) -> Runtime:
            config = ServeConfig(
                model=str(model_folder), name="lively", adapter_watch_interval_s=0.01, **fields
            )
            return started.enter_context(closing(Runtime.start(config)))

        yield begin


def wait_for(http: httpx.Client, fact: Callable[[dict], bool], timeout_s: float = 120) -> dict:
    """What /v1/adapter_watch says as soon as `fact` holds of it."""
    end = time.monotonic() + timeout_s
    while not fact(told := http.get("/v1/adapter_watch").json()):
        assert time.monotonic() < end, told
    return told


def test_a_server_follows_its_folders_and_says_how_that_goes(serve, put, tmp_path):
    runtime = serve(adapter_watch=(tmp_path / "watched",))  # which is not there yet
    ask = {"prompt": "hello there", "max_tokens": 8}
    with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
        wait_for(http, lambda told: told["folders"][0]["problem"] == "is not there")
        pickled(put("bad", 1))
        shutil.copytree(put("a", 2), tmp_path / "staged")
        os.rename(tmp_path / "staged", os.fsencode(tmp_path / "watched" / "caf") + b"\xe9")
        told = wait_for(http, lambda told: told["num_problems"] == 2 and len(told["data"]) == 3)
        bad, unnamed, good = told["data"]
        assert "printable" in unnamed["problem"]
        assert (bad["name"], bad["version"]) == ("bad", "")
        assert TENSORS_FILE in bad["problem"]
        assert (good["name"], good["folder"], good["is_there"]) == (
            "a",
            str(tmp_path / "watched" / "a"),
            True,
        )
        wait_for(http, lambda told: told["data"][2]["version"] == "a@1")
        assert http.post("/v1/completions", json={**ask, "model": "a"}).headers["x-lathe-model"] == "a@1"
        put("a", 3)
        wait_for(http, lambda told: told["data"][2]["version"] == "a@2")
        assert http.post("/v1/completions", json={**ask, "model": "a"}).headers["x-lathe-model"] == "a@2"


def test_a_server_without_watched_folders_says_so(serve):
    with serving(serve()) as url:
        told = httpx.get(f"{url}/v1/adapter_watch").json()
    assert (told["folders"], told["data"], told["num_problems"]) == ([], [], 0)


def test_an_experiments_name_is_no_adapters(serve, put, tmp_path):
    put("e", 1)
    experiment = {"name": "e", "variants": [{"model": "lively"}, {"model": "lively", "name": "twin"}]}
    runtime = serve(
        adapter_watch=(tmp_path / "watched",),
        experiments=[experiment],
        store=f"sqlite:///{tmp_path / 'e.sqlite'}",
    )
    with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
        told = wait_for(http, lambda told: told["num_problems"] == 1)
        assert "public name of an experiment" in told["data"][0]["problem"]


def test_watched_folders_stand_under_the_allowed_roots_where_these_are_named(model_folder, tmp_path):
    inside, outside = tmp_path / "roots" / "a", tmp_path / "outside"
    (tmp_path / "roots").mkdir()
    (tmp_path / "roots" / "link").symlink_to(outside)
    roots = (tmp_path / "roots",)

    def roots_of(*watched: Path, **fields: object):
        return ServeConfig(model="m", adapter_watch=watched, **fields).watch_roots

    assert roots_of(inside) is None
    assert roots_of(inside, host="0.0.0.0") == (inside,)
    assert roots_of(inside, allowed_adapter_roots=roots, host="0.0.0.0") == roots
    for folder in (outside, tmp_path / "roots" / "link", tmp_path / "roots" / ".." / "outside"):
        with pytest.raises(ConfigError, match=r"adapter_watch: .* is under none of allowed_adapter_roots"):
            roots_of(inside, folder, allowed_adapter_roots=roots)
    config = ServeConfig(model="no such model", adapter_watch=(outside,), allowed_adapter_roots=roots)
    with pytest.raises(ConfigError, match="adapter_watch"):
        Runtime.start(config)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of a thread here")
def test_a_folder_of_thousands_takes_a_small_share_of_the_time_and_adapters_in_it_are_found(start, put):
    setting = start(interval_s=0.001)
    for number in range(3000):
        (setting.folder / f"run-{number}").mkdir()
    put("needle", 1)
    begun_s = time.monotonic()
    setting.watch.start()
    thread = setting.watch._thread
    while not setting.watch.watched() or not setting.watch.watched()[0].version:
        thread.join(0.01)
        assert time.monotonic() - begun_s < 300
    put("needle", 2)
    clock = time.pthread_getcpuclockid(thread.ident)
    while setting.watch.watched()[0].version != "needle@2" or time.clock_gettime(clock) < 0.5:
        thread.join(0.01)
        assert time.monotonic() - begun_s < 300
    share = time.clock_gettime(clock) / (time.monotonic() - begun_s)
    assert share < 0.12, "a tenth, and what one entry takes"


def test_closing_waits_for_the_load_under_way(start, put):
    setting = start(interval_s=0.001)
    begun, may_end = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert may_end.wait(60)

    setting.before_load = slow
    put("a", 1)
    setting.watch.start()
    assert begun.wait(60)
    closing = threading.Thread(target=setting.watch.close)
    closing.start()
    assert setting.copies.folder.exists()
    may_end.set()
    closing.join(60)
    assert setting.loaded == ["a@1"]
