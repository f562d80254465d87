"""Versions, rollback, pins and what there is, over HTTP and by `lathe adapters`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
from typer.testing import CliRunner

import lathe
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_tensors, write_adapter

ASK = {"prompt": "hello there", "max_tokens": 10, "temperature": 0, "ignore_eos": True}


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


def test_a_name_is_rolled_back_and_forth_while_it_streams(served, model_folder, make_one):
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


def test_what_cannot_be_done_to_an_adapter_says_why(served, model_folder, make_one):
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


def test_an_adapter_says_where_it_is_who_holds_it_and_what_it_is(served, model_folder, make_one, tmp_path):
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


def test_the_command_does_what_the_endpoints_do(served, model_folder, make_one, tmp_path):
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
    served, model_folder, make_one, tmp_path
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
