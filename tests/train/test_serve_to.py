"""`lathe train --serve-to URL`: a server has each adapter that a run publishes; a bad one changes nothing of it."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import mlx.core as mx
import pytest
from rich.console import Console
from waiting import until

import lathe
from serve.adapters.formats.manifest import read_config, read_tensors
from serve.api.server import serving
from serve.config import ServeConfig
from serve.errors import ConfigError, StoppedError, TrainingError
from serve.runtime import Runtime
from train.asking import HeldOut
from train.demo_live import _look
from train.loop import checkpoint
from train.recipe.recipe import load_recipe
from train.run import run
from train.watch.serve_to import LOAD_PATH, ServeTo

pytestmark = pytest.mark.long

RECIPE = """
num_layers: -1
batch_size: 2
iters: 6
learning_rate: 1e-2
lora_parameters: {rank: 4, scale: 4.0}
steps_per_report: 1
val_batches: 0
save_every: 2
"""


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": f"{'ab' * (i % 4)} {i}?", "completion": f"no {i % 3}"} for i in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def words(tmp_path, model_folder, rows_folder) -> Callable[..., list[str]]:
    """words(name, *overrides) → the recipe and its --set values, writing to tmp_path/name."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    places = (f"model={model_folder}", f"data={rows_folder}")
    return lambda name, *overrides: [str(path), *places, f"adapter_path={tmp_path / name}", *overrides]


@pytest.fixture
def train(words) -> Callable[..., str]:
    """train(name, *overrides, **as run) → what was printed."""

    def begin(name: str, *overrides: str, **how: object) -> str:
        console = Console(file=io.StringIO(), width=300)
        path, *values = words(name, *overrides)
        run(load_recipe(path, values), console=console, **how)
        return console.file.getvalue()

    return begin


@pytest.fixture
def served(model_folder) -> Iterator[tuple[Runtime, str]]:
    """A server of the model that is trained on, and its address."""
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively"))
    with closing(runtime):
        with serving(runtime) as url:
            yield runtime, url
        runtime.engine.registry.check_integrity()


def test_a_demo_whose_server_took_no_checkpoint_says_so(served):
    _, url = served
    over = threading.Event()
    over.set()
    prompt = HeldOut([{"role": "user", "content": "what?"}], "that")
    with pytest.raises(StoppedError, match="was never told of a checkpoint of nobody, or took none"):
        asyncio.run(_look(url, "lively", "nobody", [prompt], threading.Event(), over))


def hash_of(folder: Path) -> str:
    return read_config(folder).lineage.content_hash


def same_weights(folder: Path, other: Path) -> bool:
    ours, theirs = read_tensors(folder), read_tensors(other)
    return all(mx.array_equal(ours[name], theirs[name]).item() for name in theirs)


class Loads:
    """A real HTTP server that notes what it is asked to load, and answers as told."""

    def __init__(self, answer: Callable[[dict], tuple[int, str]] = lambda body: (200, "Success")) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.answer = answer

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[str]:
        loads = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == LOAD_PATH
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                loads.headers.append(dict(self.headers))
                loads.bodies.append(body)
                status, text = loads.answer(body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def test_a_server_has_each_checkpoint_as_it_is_published_and_streams_go_on(served, train, tmp_path):
    """Asked all the while, the name is served by one version after the other, each the content of a checkpoint."""
    runtime, url = served
    ask = {"model": "mine", "prompt": "hello there", "max_tokens": 4}
    versions: list[str] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            while not is_over.is_set():
                answer = http.post("/v1/completions", json=ask)
                if answer.status_code == 200:
                    versions.append(answer.headers["x-lathe-model"])
                else:
                    assert answer.status_code == 404, answer.text

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        printed = train("out", f"serve_to={url}/v1", "serve_as=mine", "iters=40", "save_every=8")
    finally:
        is_over.set()
        asking.join()
    newest = runtime.registry.resolve("mine")
    assert newest.content_hash == hash_of(tmp_path / "out")
    assert newest.path == str(tmp_path / "out")
    assert f"{url}/v1 serves {tmp_path / 'out'} as mine; " in printed
    numbers = [int(version.removeprefix("mine@")) for version in versions]
    assert numbers == sorted(numbers)
    assert 2 <= newest.number <= 6
    assert len(set(numbers)) >= 2, "it was asked while it trained"


def test_the_name_is_the_folders_unless_the_recipe_says_otherwise_and_paths_are_absolute(
    train, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    loads = Loads()
    with loads.serving() as url:
        train("one", f"serve_to={url}", "adapter_path=one")
        train("two", f"serve_to={url}", "serve_as=zwei")
    names = [body["lora_name"] for body in loads.bodies]
    assert set(names) == {"one", "zwei"}
    assert names == sorted(names)
    for body in loads.bodies:
        assert body["load_inplace"] is True
        assert Path(body["lora_path"]).is_relative_to(
            tmp_path / {"one": "one", "zwei": "two"}[body["lora_name"]]
        )
    assert [body["lora_path"] for body in loads.bodies if body["lora_name"] == "one"][-1] == str(
        tmp_path / "one"
    )


def test_a_key_is_sent_and_asked_for(train, words, monkeypatch):
    def answer(body: dict) -> tuple[int, str]:
        is_known = loads.headers[-1].get("Authorization") == "Bearer secret"
        return (200, "") if is_known else (401, '{"error": "no key"}')

    loads = Loads(answer)
    with loads.serving() as url:
        printed = train("without", f"serve_to={url}")
        assert "answered 401: no key; give its key with --api-key or LATHE_API_KEY" in printed
        assert " serves " in train("with", f"serve_to={url}", api_key="secret")
        path, *values = words("by-environment")
        monkeypatch.setenv("LATHE_API_KEY", "secret")
        with pytest.raises(SystemExit) as stop:
            lathe.main(
                ["train", path, "--serve-to", url, *(word for value in values for word in ("--set", value))]
            )
        assert stop.value.code == 0
    assert loads.headers[-1]["Authorization"] == "Bearer secret"
    assert loads.bodies[-1]["lora_name"] == "by-environment"


def refused(body: dict) -> tuple[int, str]:
    return 403, '{"error": {"message": "it is under none of my folders"}}'


def failing(body: dict) -> tuple[int, str]:
    return 503, "no"


def moved(body: dict) -> tuple[int, str]:
    return 404, "x" * 1_000_000


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (refused, "it answered 403: it is under none of my folders; 0 of 4"),
        (failing, "it answered 503: no"),
        (moved, "404: xxx"),
    ],
)
def test_a_server_that_refuses_is_told_once_and_changes_nothing(train, tmp_path, answer, reason):
    train("plain")
    with Loads(answer).serving() as url:
        printed = train("out", f"serve_to={url}")
    lines = [line for line in printed.splitlines() if reason in line]
    assert len(lines) <= 2
    assert lines[-1].startswith(f"{url} does not serve {tmp_path / 'out'} as out: ")
    assert "; 0 of 4 adapters" in lines[-1]
    assert same_weights(tmp_path / "out", tmp_path / "plain")


def test_a_server_that_is_down_changes_nothing(train, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    printed = train("out", f"serve_to=127.0.0.1:{port}")
    assert f"127.0.0.1:{port} does not serve {tmp_path / 'out'} as out: " in printed
    assert len(checkpoint.existing(tmp_path / "out")) == 3


def test_a_server_that_comes_up_later_gets_the_newest(tmp_path, free_ports):
    port, loads = free_ports(), Loads()
    with ServeTo(f"127.0.0.1:{port}", "mine") as server:
        server.tell(tmp_path / "step-1")
        server.tell(tmp_path / "step-2")
        notes: list[str] = []
        end_s = time.monotonic() + 60
        while not notes and time.monotonic() < end_s:
            notes = server.take_notes()
        assert "has not loaded step-" in notes[0]
        with loads.serving(port):
            end_s = time.monotonic() + 60
            while not loads.bodies and time.monotonic() < end_s:
                pass
            assert [body["lora_path"] for body in loads.bodies] == [str(tmp_path / "step-2")]
            assert server.take_notes() == [], "told once"
            assert " serves " in server.finish(tmp_path / "out")[-1]
    assert [Path(body["lora_path"]).name for body in loads.bodies] == ["step-2", "out"]


@pytest.mark.parametrize("status", [404, 429, 503])
def test_what_may_pass_is_told_once_and_asked_for_again(tmp_path, status):
    def answer(body: dict) -> tuple[int, str]:
        return (status, f"nothing at {body['lora_path']}") if len(loads.bodies) < 3 else (200, "")

    loads = Loads(answer)
    with loads.serving() as url, ServeTo(url, "mine") as server:
        for number in (1, 2):
            server.tell(tmp_path / f"step-{number}")
            until(lambda number=number: len(loads.bodies) == number)
        until(lambda: len(loads.bodies) == 3)
        [note] = server.take_notes()
    assert f"it answered {status}: nothing at {tmp_path}" in note
    assert [Path(body["lora_path"]).name for body in loads.bodies] == ["step-1", "step-2", "step-2"]


def test_training_waits_for_no_answer_and_the_newest_is_told_next(train, tmp_path):
    """The server answers the first question only when the run has published its adapter: it waited for no answer."""
    last = tmp_path / "out" / "adapters.safetensors"

    def answer(body: dict) -> tuple[int, str]:
        end_s = time.monotonic() + 60
        while not last.exists():
            if time.monotonic() > end_s:
                return 500, "the run waits for this answer"
        return 200, ""

    loads = Loads(answer)
    with loads.serving() as url:
        printed = train("out", f"serve_to={url}")
    told = [Path(body["lora_path"]).name for body in loads.bodies]
    assert told[0] == "step-000002"
    assert told[-1] == "out"
    assert "step-000004" not in told, "a newer one stood when its turn came"
    assert f" serves {tmp_path / 'out'} as out; {len(told)} of 4 adapters" in printed


def test_a_run_that_goes_on_tells_on_and_one_that_replaces_another_tells_where_it_ends(train, tmp_path):
    loads = Loads()
    with loads.serving() as url:
        train("out")
        train("out", f"serve_to={url}", "serve_as=other", "iters=8", resume=True)
        first = [Path(body["lora_path"]) for body in loads.bodies]
        assert set(first) <= {tmp_path / "out/checkpoints/step-000008", tmp_path / "out"}
        assert first[-1] == tmp_path / "out"
        loads.bodies.clear()
        train("out", f"serve_to={url}", "seed=1", overwrite=True)
    second = [Path(body["lora_path"]) for body in loads.bodies]
    assert second[-1] == tmp_path / "out"
    assert all(path.is_relative_to(tmp_path / "out" / "next") for path in second[:-1])
    assert {body["lora_name"] for body in loads.bodies} == {"out"}


def test_where_it_is_served_makes_no_other_run_and_no_other_recipe(train, tmp_path):
    with Loads().serving() as url:
        train("out", f"serve_to={url}", "iters=4")
        printed = train("out", "iters=6", resume=True)
    train("plain")
    assert "serve_to" not in printed
    assert same_weights(tmp_path / "out", tmp_path / "plain")
    assert (
        read_config(tmp_path / "out").lineage.recipe_hash
        == read_config(tmp_path / "plain").lineage.recipe_hash
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("serve_to=ftp://here",), "'ftp://here' is not a server's address"),
        (("serve_to=http://",), "is not a server's address"),
        (("serve_to=http://h:99999",), "is not a server's address"),
        (("serve_as=x",), "write serve_to"),
        (("serve_to=http://h", "serve_as=x@1"), "'@' separates"),
        (("serve_to=http://h", "adapter_path=runs/x@1"), "'@' separates"),
        (
            ("serve_to=http://h", "fine_tune_type=full", "lora_parameters=null"),
            "fine_tune_type: full makes none",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(words, overrides, said):
    path, *values = words("out", "model=nowhere/at-all", "data=nowhere", *overrides)
    with pytest.raises(ConfigError) as refusal:
        load_recipe(path, values)
    assert said in str(refusal.value)


def test_a_key_that_no_header_can_hold_is_refused_before_the_model_is_read(train):
    with pytest.raises(ConfigError, match="API key"):
        train("out", "serve_to=http://h", "model=nowhere/at-all", api_key="schlüssel")


def test_a_dry_run_asks_nothing(train):
    loads = Loads()
    with loads.serving() as url:
        train("out", f"serve_to={url}", dry_run=True)
    assert loads.bodies == []


def test_a_run_that_fails_leaves_no_thread_behind(train):
    loads = Loads()
    with loads.serving() as url:
        before = threading.active_count()
        with pytest.raises(TrainingError, match="step 2: the loss is nan"):
            train("out", f"serve_to={url}", "save_every=1", "learning_rate=1e38", "optimizer=sgd")
        end_s = time.monotonic() + 30
        while threading.active_count() > before and time.monotonic() < end_s:
            pass
        assert threading.active_count() <= before
