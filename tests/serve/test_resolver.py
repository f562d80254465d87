"""Names that nobody loaded: looked up in folders and on a hub, loaded by the first request, forgotten again."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from serve.adapters.bank.bank import Bank
from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE
from serve.adapters.registry.registry import Registry
from serve.adapters.registry.resolver import MAX_LISTED, MAX_LOOKED_AT, Resolver
from serve.config_file import load_config
from serve.errors import AdapterError, ConfigError, ForbiddenError, NotFoundError, OverloadedError

ASK = {"prompt": "hello there", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def shelf(tmp_path, make_one) -> Path:
    """A folder of adapters: a, b, c, and org/d."""
    for seed, name in enumerate(("a", "b", "c", "org/d")):
        shutil.copytree(make_one(seed), tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def make_resolver(model) -> Callable[..., Resolver]:
    def make(*args, max_found: int = 100, **options) -> Resolver:
        registry = Registry(model, Bank(model.network), max_bytes=1 << 30, max_found=max_found)
        return Resolver(registry, *args, **options)

    return make


def answer(http: httpx.Client, model: str) -> str:
    found = http.post("/v1/completions", json={**ASK, "model": model})
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["text"]


def test_the_first_request_for_a_name_loads_it_and_the_answer_is_its_own(served, model_folder, shelf):
    with served(model_folder, adapter_dirs=(shelf,), max_adapters=2) as (runtime, http):
        listed = [card["id"] for card in http.get("/v1/models").json()["data"]]
        assert listed == ["lively", "a", "b", "c"]
        assert runtime.registry.names() == []
        found = {name: answer(http, name) for name in ("a", "b", "c", "org/d")}
        assert len(set(found.values())) == 4
        assert runtime.registry.names() == ["a", "b", "c", "org/d"]
        for name in found:
            loaded = {"lora_name": f"{name}-by-hand", "lora_path": str(shelf / name)}
            assert http.post("/v1/load_lora_adapter", json=loaded).status_code == 200
            assert answer(http, f"{name}-by-hand") == found[name]
        assert http.get("/v1/adapters/org/d").json()["found"]
        assert http.get("/v1/models/a").json()["version"] == "a@1"
        assert [card["id"] for card in http.get("/v1/models").json()["data"]].count("a") == 1


def test_a_name_that_is_nowhere_is_a_404_until_it_is_there(served, model_folder, shelf, make_one):
    with served(model_folder, adapter_dirs=(shelf,)) as (_, http):
        for name in ("later", "later@1", "a/", "a//b", "./a", "org", "x" * 300, "a\u200bb", "org/"):
            refused = http.post("/v1/completions", json={**ASK, "model": name})
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found"), name
        assert http.get("/v1/models/later").status_code == 404
        shutil.copytree(make_one(5), shelf / "later")
        assert answer(http, "later")
        unknown = http.post("/v1/completions", json={**ASK, "model": "later@2"}).json()
        assert "has no version 2; there are 1" in unknown["error"]["message"]
        unloaded = http.post("/v1/unload_lora_adapter", json={"lora_name": "later"})
        assert unloaded.status_code == 200
        shutil.rmtree(shelf / "later")
        assert http.post("/v1/completions", json={**ASK, "model": "later"}).status_code == 404


def test_names_and_links_that_lead_out_of_the_folder_are_refused(make_resolver, shelf, make_one, tmp_path):
    shutil.copytree(make_one(5), tmp_path / "secret")
    (shelf / "link").symlink_to(tmp_path / "secret")
    (shelf / "inner").symlink_to(shelf / "a")
    for file in (TENSORS_FILE, CONFIG_FILE):
        shutil.copytree(make_one(5), shelf / f"linked-{file}")
        (shelf / f"linked-{file}" / file).unlink()
        (shelf / f"linked-{file}" / file).symlink_to(tmp_path / "secret" / file)
    resolver = make_resolver([shelf])
    for name in ("../secret", "a/../../secret", str(tmp_path / "secret"), "link", "..", "a\\..\\..\\secret"):
        with pytest.raises(ForbiddenError, match="leads out of"):
            resolver.find(name)
    for file in (TENSORS_FILE, CONFIG_FILE):
        with pytest.raises(ForbiddenError, match=f"{file} is a link that leads out of"):
            resolver.find(f"linked-{file}")
    assert resolver.find("inner").id == "inner@1", "a link inside is as good as a folder"


def test_what_is_there_and_is_no_adapter_says_why(make_resolver, shelf):
    (shelf / "a" / TENSORS_FILE).write_bytes(b"\0" * 40)
    (shelf / "b" / CONFIG_FILE).write_text("[]")
    resolver = make_resolver([shelf])
    for name, told in (("a", "not a safetensors"), ("b", "an object was expected")):
        with pytest.raises(AdapterError, match=told):
            resolver.find(name)
    assert resolver.find("c").id == "c@1"


def test_names_that_were_found_are_forgotten_when_there_are_too_many_but_not_those_in_use(
    make_resolver, shelf, make_one
):
    for seed in range(8):
        shutil.copytree(make_one(seed % 4), shelf / f"n{seed}")
    resolver = make_resolver([shelf], max_found=3)
    registry = resolver._registry
    resolver.find("n0")
    held = registry.acquire("n0")
    registry.load("by hand", make_one(1))
    for number in range(1, 8):
        resolver.find(f"n{number}")
    assert registry.names() == ["n0", "by hand", "n6", "n7"]
    assert resolver.find("n1").id == "n1@2", "found again"
    registry.release(held)
    resolver.find("n2")
    assert set(registry.names()) == {"by hand", "n7", "n1", "n2"}
    registry.check_integrity()


def test_what_somebody_loads_in_the_place_of_what_was_found_is_not_forgotten(make_resolver, shelf, make_one):
    """The name would stand for the folder's again."""
    resolver = make_resolver([shelf], max_found=1)
    registry = resolver._registry
    resolver.find("a")
    version = registry.load("a", make_one(7), replace=True)
    assert not registry.show("a").is_found
    for name in ("b", "c"):
        resolver.find(name)
    assert registry.names() == ["a", "c"]
    assert registry.resolve("a") == version
    registry.check_integrity()


def test_many_who_ask_for_one_name_at_once_load_it_once(make_resolver, shelf):
    resolver = make_resolver([shelf])
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(resolver.find("a").id)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["a@1"] * 6
    resolver._registry.check_integrity()


def test_a_found_adapter_whose_folder_holds_another_one_is_found_anew(served, model_folder, shelf, make_one):
    settings = {"adapter_dirs": (shelf,), "max_adapters": 1, "adapter_host_gib": 0, "adapter_file_gib": 0}
    with served(model_folder, **settings) as (_, http):
        first = answer(http, "a")
        answer(http, "b")
        for file in (TENSORS_FILE, CONFIG_FILE):
            shutil.copy(make_one(2) / file, shelf / "new")
            (shelf / "new").rename(shelf / "a" / file)
        gone = http.post("/v1/completions", json={**ASK, "model": "a"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "adapter_gone")
        assert "holds another one now" in gone.json()["error"]["message"]
        assert answer(http, "a") == answer(http, "c") != first
        assert http.get("/v1/models/a").json()["version"] == "a@2"


def test_a_bounded_number_of_names_is_listed(make_resolver, tmp_path):
    for number in range(MAX_LISTED + 5):
        (tmp_path / f"{number:05}").mkdir()
        (tmp_path / f"{number:05}" / CONFIG_FILE).touch()
    (tmp_path / "no adapter").mkdir()
    listed = make_resolver([tmp_path / "nowhere", tmp_path]).listed()
    assert len(listed) == MAX_LISTED
    assert listed == sorted({*listed})
    assert {*listed} < {f"{number:05}" for number in range(MAX_LISTED + 5)}


def test_a_folder_of_very_many_is_not_read_to_its_end(make_resolver, tmp_path):
    """To be listed, that is: whoever asks for one of them by name gets it."""
    (tmp_path / "last").mkdir()
    for number in range(MAX_LOOKED_AT + 2):
        (tmp_path / "last" / f"no adapter {number}").touch()
    resolver, start_s = make_resolver([tmp_path / "last"]), time.thread_time()
    assert resolver.listed() == []
    once_s = time.thread_time() - start_s
    for number in range(MAX_LOOKED_AT + 2, 5 * MAX_LOOKED_AT):
        (tmp_path / "last" / f"no adapter {number}").touch()
    start_s = time.thread_time()
    assert resolver.listed() == []
    assert time.thread_time() - start_s < 2 * once_s


def test_an_arm_of_an_experiment_is_looked_up_too(served, model_folder, shelf, tmp_path):
    arms = [{"model": "a"}, {"model": "nowhere", "weight": 1e-9}]
    experiment = {"name": "public", "variants": arms}
    settings = {"adapter_dirs": (shelf,), "experiments": (experiment,), "store": f"sqlite:///{tmp_path}/x.db"}
    with served(model_folder, **settings) as (_, http):
        found = http.post("/v1/completions", json={**ASK, "model": "public", "user": "somebody"})
        assert (found.status_code, found.headers["x-lathe-model"]) == (200, "a@1")


def test_folders_of_a_configuration_are_relative_to_it_and_names_of_the_hub_are_checked(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\nadapter_dirs: [adapters, /b]\nadapter_hub: [me, you/this]\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.adapter_dirs == (tmp_path / "adapters", Path("/b"))
    assert config.adapter_hub == ("me", "you/this")
    for name in ("a/b/c", "/a", "a/", "", "a@1"):
        (tmp_path / "c.yaml").write_text(f"model: m\nadapter_hub: ['{name}']\n")
        with pytest.raises(ConfigError, match=r"adapter_hub\.0: found .*expected an owner"):
            load_config(tmp_path / "c.yaml")


# The hub


class Hub:
    """Repositories as huggingface_hub asks for them, and what was asked."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.asked: list[str] = []
        self.is_broken = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                hub.asked.append(path)
                status, headers, body = hub.answer(path, repositories)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, path: str, repositories: dict[str, Path]) -> tuple[int, dict[str, str], bytes]:
        commit = "0123456789" * 4
        if self.is_broken:
            return 500, {}, b""
        for name, folder in repositories.items():
            files = sorted(each.name for each in folder.iterdir())
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {
                        "type": "file",
                        "path": file,
                        "size": (folder / file).stat().st_size,
                        "oid": hashlib.sha1((folder / file).read_bytes()).hexdigest(),
                    }
                    for file in files
                ]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            if path.startswith(f"/api/models/{name}"):
                told = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
                return 200, {"Content-Type": "application/json"}, json.dumps(told).encode()
            if path.startswith(f"/{name}/resolve/"):
                body = (folder / path.rpartition("/")[2]).read_bytes()
                etag = hashlib.sha1(body).hexdigest()
                return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, body
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


@pytest.fixture
def hub(make_one, tmp_path) -> Iterator[Hub]:
    """me/one and you/two, each with a large file that is no adapter's."""
    folders = {}
    for seed, name in enumerate(("me/one", "you/two")):
        folders[name] = shutil.copytree(make_one(seed), tmp_path / "hub" / name)
        (folders[name] / "optimizer.bin").write_bytes(b"x" * 1000)
    made = Hub(folders)
    yield made
    made.close()


def test_adapters_of_allowed_owners_come_from_the_hub_and_nothing_else_of_them(make_resolver, hub, tmp_path):
    resolver = make_resolver((), ["me", "you/three"], endpoint=hub.url, cache=tmp_path / "cache")
    assert resolver.find("me/one").num_modules == 4
    assert any(path.endswith(TENSORS_FILE) for path in hub.asked)
    assert not any(
        "optimizer" in path.rpartition("/resolve/")[2] for path in hub.asked if "/resolve/" in path
    )
    hub.asked.clear()
    for name in ("you/two", "two", "me", "me/one/more", "he/one"):
        with pytest.raises(NotFoundError):
            resolver.find(name)
    assert hub.asked == [], "nobody is asked for what is not allowed"
    for name in ("me/nothing", "you/three"):
        with pytest.raises(NotFoundError, match="the hub has none"):
            resolver.find(name)
    hub.is_broken = True
    with pytest.raises(OverloadedError, match="cannot be fetched from the hub now"):
        resolver.find("me/other")


def test_without_folders_and_owners_nothing_is_looked_up(make_resolver):
    assert not make_resolver().looks_up("me/one")
    assert make_resolver((), ["me"]).looks_up("me/one")
    assert not make_resolver((), ["me"]).looks_up("me/one@2")
