"""Versions, rollback, pins and what there is, over HTTP and by `lathe adapters`; all of it at once under streams."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

import lathe
from serve.adapters.manifest import AdapterConfig, Lineage, read_tensors, write_adapter
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

ASK = {"prompt": "hello there", "max_tokens": 10, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def make_one(make_adapter) -> Callable[[int], Path]:
    return lambda seed: make_adapter(seed, rank=2 + seed % 3, keys=["self_attn.q_proj", "mlp.up_proj"])


@contextmanager
def served(model_folder: Path, **settings) -> Iterator[tuple[Runtime, httpx.Client]]:
    """A server; when it is left, names, slots and bytes agree."""
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", **settings))
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=120) as http:
            yield runtime, http
        runtime.registry.check_integrity()
    finally:
        runtime.close()


def post(http: httpx.Client, path: str, **fields) -> httpx.Response:
    return http.post(f"/v1/{path}", json=fields)


def put(http: httpx.Client, name: str, folder: Path) -> httpx.Response:
    found = post(http, "load_lora_adapter", lora_name=name, lora_path=str(folder), load_inplace=True)
    assert found.status_code == 200, found.text
    return found


def answer(http: httpx.Client, model: str, **fields) -> tuple[str, str]:
    """The text, and the version that gave it."""
    found = post(http, "completions", **{**ASK, "model": model, **fields})
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["text"], found.headers["x-lathe-model"]


def test_a_name_is_rolled_back_and_forth_while_it_streams(model_folder, make_one):
    with served(model_folder, max_adapters=2) as (_, http):
        alone = {}
        for seed in (1, 2, 3):
            put(http, "x", make_one(seed))
            alone[f"x@{seed}"], version = answer(http, "x")
            assert version == f"x@{seed}"
        assert len(set(alone.values())) == 3
        with http.stream(
            "POST", "/v1/completions", json={**ASK, "model": "x", "stream": True, "max_tokens": 60}
        ) as s:
            lines = s.iter_lines()
            next(lines)
            back = post(http, "adapters/x/rollback")
            back = post(http, "adapters/x/rollback", version=1) if back.status_code == 200 else back
            assert (back.status_code, back.json()["current"]) == (200, "x@1")
            assert answer(http, "x") == (alone["x@1"], "x@1")
            assert s.headers["x-lathe-model"] == "x@3"
            assert answer(http, "x@3") == (alone["x@3"], "x@3")
            text = "".join(
                json.loads(each[6:])["choices"][0]["text"] for each in lines if each.startswith("data: {")
            )
        assert alone["x@3"].endswith(text[:4]) or text[:3] in alone["x@3"]
        assert post(http, "adapters/x/rollback", version=3).json()["current"] == "x@3"
        assert answer(http, "x") == (alone["x@3"], "x@3")
        assert put(http, "x", make_one(4)).text.splitlines()[1].startswith("x@4 adapts 4 modules, rank 3")
        assert [each["id"] for each in http.get("/v1/adapters/x").json()["versions"]] == [
            "x@4",
            "x@3",
            "x@2",
            "x@1",
        ]


def test_what_cannot_be_done_to_an_adapter_says_why(model_folder, make_one):
    with served(model_folder, max_adapters=2) as (_, http):
        put(http, "x", make_one(1))
        put(http, "y", make_one(2))
        for path, fields, status, told in (
            ("nope/rollback", {}, 404, "no adapter 'nope' is loaded"),
            ("x/rollback", {}, 404, "no version before 'x@1'"),
            ("x/rollback", {"version": 9}, 404, "no version 9; there are 1"),
            ("x/rollback", {"version": 0}, 400, "version"),
            ("x/rollback", {"verson": 1}, 400, "did you mean version"),
            ("nope/pin", {}, 404, "no adapter 'nope' is loaded"),
            ("x@1/pin", {}, 404, "no adapter 'x@1' is loaded"),
            ("x/pin", {"for": 1}, 400, "for: unknown field"),
            ("x/pin", {}, 200, '"pinned":true'),
            ("y/pin", {}, 507, "'y' cannot be pinned: 1 of 2 slots are"),
            ("x/unpin", {}, 200, '"pinned":false'),
            ("nope/unpin", {}, 404, "no adapter 'nope' is loaded"),
        ):
            found = post(http, f"adapters/{path}", **fields)
            assert (found.status_code, told in found.text) == (status, True), (path, fields, found.text)
        assert http.get("/v1/adapters/nope").status_code == 404
        assert http.get("/v1/models/x@7").status_code == 404
        refused = post(http, "completions", **{**ASK, "model": "x@7"})
        assert (refused.status_code, "no version 7; there are 1" in refused.text) == (404, True)


def test_an_adapter_says_where_it_is_who_holds_it_and_what_it_is(model_folder, make_one, tmp_path):
    with served(model_folder, max_adapters=2) as (runtime, http):
        lineage = Lineage(
            *("base", runtime.model.fingerprint, "", "sha256:r", "sha256:d", "2026-01-01", "1"),
            stop_ids=(7,),
            metrics={"loss": 0.5},
            objective="sft",
        )
        config = AdapterConfig("lora", -1, 3, 2.0, lineage=lineage)
        write_adapter(tmp_path / "x", read_tensors(make_one(1)), config)
        put(http, "x", tmp_path / "x")
        for seed in (2, 3):
            put(http, f"n{seed}", make_one(seed))
        text, _ = answer(http, "x", prompt="a prompt of some length", max_tokens=30)
        assert text
        card = http.get("/v1/adapters/x").json()
        only = card["versions"][0]
        assert (card["current"], card["state"], card["base"], card["pinned"]) == (
            "x@1",
            "resident",
            "lively",
            False,
        )
        assert (only["modules"], only["rank"], only["hits"], only["loads"]) == (4, {"min": 3, "max": 3}, 1, 1)
        assert only["bytes"]["device"] >= only["bytes"]["content"] == only["bytes"]["host"] > 0
        assert only["path"] == str(tmp_path / "x")
        assert only["slot"] >= 1
        assert only["held_by"] == {"requests": 0, "rows": 0, "waiting": 0, "ids": []}
        assert (only["lineage"]["recipe_hash"], only["lineage"]["metrics"]) == ("sha256:r", {"loss": 0.5})
        manifest = card["manifest"]
        assert manifest["stop_ids"] == [2, 7]
        assert manifest["trained_on"] == "base"
        assert manifest["base_fingerprint"] == runtime.model.fingerprint
        assert manifest["prefix_bytes"] > 0
        assert http.get("/v1/adapters/n2").json()["manifest"]["prefix_bytes"] == 0
        listed = http.get("/v1/adapters").json()
        assert {each["name"]: each["state"] for each in listed["data"]} == {
            "x": "resident",
            "n2": "resident",
            "n3": "host",
        }
        assert listed["slots"] == {"max": 2, "taken": 2, "awaited": 0}
        assert listed["bytes"]["device"] == runtime.engine.bank.num_bytes
        assert listed["bytes"]["host"] == runtime.registry.host_bytes
        held = runtime.registry.acquire("n2")
        assert http.get("/v1/adapters/n2").json()["versions"][0]["held_by"]["requests"] == 1
        put(http, "n2", make_one(4))
        states = {each["id"]: each["state"] for each in http.get("/v1/adapters/n2").json()["versions"]}
        assert states == {"n2@1": "resident", "n2@2": "resident"}, "who holds a version keeps its slot"
        runtime.registry.release(held)
        states = {each["id"]: each["state"] for each in http.get("/v1/adapters/n2").json()["versions"]}
        assert states == {"n2@1": "host", "n2@2": "resident"}
        metrics = http.get("/metrics").text
        assert "lathe_adapter_names 3.0" in metrics
        assert "lathe_adapter_slots 2.0" in metrics


def test_the_command_does_what_the_endpoints_do(model_folder, make_one, tmp_path):
    with served(model_folder, max_adapters=2) as (_, http):

        def run(*words: str):
            return CliRunner().invoke(lathe.app, ["adapters", *words, "--url", str(http.base_url)])

        first = run("load", "x", str(make_one(1)))
        assert (first.exit_code, "x@1 adapts 4 modules" in first.output) == (0, True)
        assert isinstance(run("load", "x", str(make_one(2))).exception, Exception)
        assert run("load", "x", str(make_one(2)), "--replace").exit_code == 0
        assert "x is x@1 (" in run("rollback", "x").output
        assert "x is x@2 (" in run("rollback", "x", "--version", "2").output
        assert "pinned)" in run("pin", "x").output
        listed = run("list", "--json", str(tmp_path / "found.json"))
        for word in ("x@2", "x@1 (earlier)", "pinned", "1 adapters; 1 of 2 slots"):
            assert word in listed.output
        assert json.loads((tmp_path / "found.json").read_text()) == http.get("/v1/adapters").json()
        assert "pinned" not in run("unpin", "x").output
        assert "removed successfully" in run("unload", "x").output
        assert http.get("/v1/adapters").json()["data"] == []
        gone = run("unload", "x")
        assert "cannot be found" in str(gone.exception)


def test_an_adapter_whose_content_is_gone_is_a_410_of_its_own_and_told_as_broken(
    model_folder, make_one, tmp_path
):
    with served(model_folder, max_adapters=1, adapter_host_gib=0, adapter_file_gib=0) as (_, http):
        for name, seed in (("x", 1), ("y", 2)):
            put(http, name, shutil.copytree(make_one(seed), tmp_path / name))
        expected = answer(http, "y")
        shutil.rmtree(tmp_path / "x")
        for stream in (False, True):
            gone = post(
                http, "completions", **{**ASK, "model": "x", "stream": stream, "n": 2, "temperature": 1}
            )
            assert "'x@1' is gone" in gone.text
            assert gone.status_code == 410
        card = http.get("/v1/adapters/x").json()
        assert (card["state"], "no adapter folder" in card["versions"][0]["problem"]) == ("broken", True)
        assert answer(http, "y") == expected
        shutil.copytree(make_one(1), tmp_path / "x")
        assert answer(http, "x")[1] == "x@1"
        assert http.get("/v1/adapters/x").json()["state"] == "resident"


def test_under_any_churn_every_answer_is_one_versions_and_nothing_is_left(model_folder, make_one, tmp_path):
    """Loads, updates, rollbacks, pins, unloads and evictions beside streams; folders are written over meanwhile."""
    seeds, names, num_each = range(5), [f"n{number}" for number in range(6)], 14
    with served(model_folder) as (_, http):
        alone = {}
        for seed in seeds:
            put(http, "x", make_one(seed))
            alone[seed] = answer(http, "x")[0]
    assert len(set(alone.values())) == len(seeds)
    settings = {"max_adapters": 2, "max_rows": 8, "adapter_host_gib": 60_000 / 2**30, "adapter_versions": 3}
    seed_of: dict[str, int] = {}
    wrong: list[str] = []
    counted: list[str] = []
    with served(model_folder, **settings) as (runtime, http):

        def change(name: str, rng: random.Random, client: httpx.Client) -> None:
            """One thread alone changes a name, so it knows what each version holds."""
            folder = tmp_path / name
            number = 0
            for _ in range(num_each):
                choice = rng.random()
                if choice < 0.5 or number == 0:
                    seed = rng.choice(seeds)
                    new = shutil.copytree(make_one(seed), tmp_path / f"{name}-new")
                    shutil.rmtree(folder, ignore_errors=True)
                    new.rename(folder)
                    number += 1
                    seed_of[f"{name}@{number}"] = seed
                    put(client, name, folder)
                elif choice < 0.7:
                    found = post(client, f"adapters/{name}/rollback")
                    if found.status_code not in (200, 404):
                        wrong.append(f"rollback of {name}: {found.text}")
                elif choice < 0.8:
                    found = post(client, f"adapters/{name}/{rng.choice(['pin', 'unpin'])}")
                    if found.status_code not in (200, 404, 507):
                        wrong.append(f"pin of {name}: {found.text}")
                elif choice < 0.9:
                    post(client, "unload_lora_adapter", lora_name=name)

        def ask(rng: random.Random, client: httpx.Client) -> None:
            for _ in range(2 * num_each):
                name, body = rng.choice(names), {**ASK, "stream": rng.random() < 0.5}
                with client.stream("POST", "/v1/completions", json={**body, "model": name}) as found:
                    if found.status_code == 404:
                        found.read()
                        continue
                    version = found.headers["x-lathe-model"]
                    whole = "".join(found.iter_text())
                if found.status_code != 200 or '"error"' in whole:
                    wrong.append(f"{name}: {found.status_code} {whole[:300]}")
                    continue
                if body["stream"]:
                    parts = [
                        json.loads(each[6:]) for each in whole.splitlines() if each.startswith("data: {")
                    ]
                else:
                    parts = [json.loads(whole)]
                text = "".join(part["choices"][0]["text"] for part in parts)
                counted.append(version)
                if text != alone[seed_of[version]]:
                    wrong.append(f"{version} said {text!r}, and {alone[seed_of[version]]!r} is its own")

        def run(work: Callable[[httpx.Client], None]) -> threading.Thread:
            def inside() -> None:
                with httpx.Client(base_url=http.base_url, timeout=120) as client:
                    try:
                        work(client)
                    except Exception as error:
                        wrong.append(repr(error))

            thread = threading.Thread(target=inside)
            thread.start()
            return thread

        threads = [
            run(lambda client, name=name: change(name, random.Random(name), client)) for name in names
        ] + [run(lambda client, number=number: ask(random.Random(number), client)) for number in range(4)]
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(counted) > 40
        stats = runtime.registry.residency.stats()
        assert stats.num_evicted > 5
        for name in runtime.registry.names():
            post(http, "unload_lora_adapter", lora_name=name)
        while runtime.engine.bank.tidy_is_due or runtime.engine.bank.slots:
            runtime.worker.call(lambda: None)
        assert runtime.registry.versions() == []
        assert (runtime.engine.bank.num_bytes, runtime.registry.host_bytes) == (0, 0)
        assert runtime.registry.residency.stats().file_bytes == 0
