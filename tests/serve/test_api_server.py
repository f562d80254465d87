"""The server around the endpoints: ports, clients that leave, a full queue, an engine that fails."""

import inspect
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import h11
import httpx
import openai
import pytest

from serve.adapters.versions.version import AdapterVersion
from serve.api.metrics import MAX_GONE
from serve.api.server import Server, bind, make_server, run, serving, url_of
from serve.api.targets import Assignment, Target
from serve.bench import wire
from serve.config import ServeConfig
from serve.engine.arrivals import ARRIVALS
from serve.errors import ConfigError
from serve.experiments.assignment import Experiment, Variant
from serve.experiments.records import Run
from serve.experiments.store import Store
from serve.runtime import Runtime

ROOT = Path(__file__).parents[2]
LONG = {"model": "lively", "prompt": "hello there", "max_tokens": 900, "ignore_eos": True}


@pytest.fixture
def start(model_folder):
    """start(**config) → a Runtime, closed at the end."""
    with ExitStack() as started:

        def begin(**fields) -> Runtime:
            config = ServeConfig(model=str(model_folder), name="lively", **fields)
            return started.enter_context(closing(Runtime.start(config)))

        yield begin


@contextmanager
def browsing(runtime: Runtime) -> Iterator[httpx.Client]:
    """A client of a server on `runtime`."""
    with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


def wait_for(http: str, fact: Callable[[dict], bool], timeout_s: float = 120) -> bool:
    """True as soon as `fact` holds of /health; False if it does not come to hold."""
    end = time.monotonic() + timeout_s
    while not fact(http.get("/health").json()):
        if time.monotonic() > end:
            return False
    return True


def is_idle(health: dict) -> bool:
    return health["num_decoding"] + health["num_prefilling"] + health["num_waiting"] == 0


def test_a_port_in_use_is_named_before_any_model_is_loaded(tmp_path):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 cannot be opened: it is in use"):
            run(ServeConfig(model=str(tmp_path / "no model here"), port=port))


def test_a_failed_start_gives_the_port_back(tmp_path):
    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(LookupError):
        run(ServeConfig(model=str(tmp_path / "no model here"), port=port))
    bind("127.0.0.1", port).close()


def test_sigterm_ends_the_server_after_its_streams_and_its_writes(model_folder, tmp_path):
    experiment = {"name": "e", "variants": [{"model": "lively"}, {"model": "lively", "name": "twin"}]}
    config = tmp_path / "c.yaml"
    fields = {"model": str(model_folder), "name": "lively", "port": 0, "experiments": [experiment]}
    config.write_text(json.dumps({**fields, "store": "sqlite:///e.sqlite"}))
    code = "import sys; from serve.config_file import load_config; from serve.api.server import run; "
    command = [sys.executable, "-c", f"{code}run(load_config(sys.argv[1]))", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        line = process.stdout.readline()
        assert line.startswith("Lathe serves lively, e at http://127.0.0.1:")
        body = {**LONG, "model": "e", "max_tokens": 200, "stream": True}
        url = line.split()[-1].removesuffix("/v1")
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(120) == 0
    store = Store(f"sqlite:///{tmp_path}/e.sqlite", create=False)
    assert [record.finish for record in store.records(store.newest_run("e").id)] == ["length"]
    store.close()


def test_no_dependency_of_a_request_goes_to_a_thread_and_back(start):
    """Where FastAPI sends every plain function."""
    app, calls = make_server(start()).config.app, set()
    found = [*app.routes]
    while found:
        each = found.pop()
        found += getattr(getattr(each, "original_router", None), "routes", ())
        dependants = [each.dependant] if hasattr(each, "dependant") else []
        while dependants:
            inner = dependants.pop().dependencies
            calls |= {one.call for one in inner}
            dependants += inner
    assert len(calls) > 3
    assert [call for call in calls if not inspect.iscoroutinefunction(call)] == []


def test_closing_a_stream_frees_its_row_and_its_adapter(start, make_adapter):
    runtime = start(adapters=[{"name": "x", "path": make_adapter(1)}])
    with browsing(runtime) as http:
        body = {**LONG, "model": "x", "stream": True, "n": 2}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # dropping it would close the connection
            next(lines)
            assert runtime.worker.stats().num_decoding == 2
        assert wait_for(http, is_idle)
        assert runtime.worker.stats().num_finished == {"cancelled": 2}
        version = runtime.registry.resolve("x")
        assert wait_for(http, lambda _: runtime.registry.num_pins(version) == 0)
        assert 'finish="cancelled"' in http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_any_answer_frees_its_row(start, stream):
    runtime = start(max_rows=1)
    with (
        browsing(runtime) as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first,
    ):
        lines = first.iter_lines()  # dropping it would close the connection
        next(lines)
        host, port = http.base_url.host, http.base_url.port
        content = json.dumps({**LONG, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        with socket.create_connection((host, port)) as leaver:
            leaver.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            assert wait_for(http, lambda health: health["num_waiting"] == 1)
        assert wait_for(http, lambda health: health["num_waiting"] == 0)
        assert runtime.worker.stats().num_decoding == 1, "the other stream goes on"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "hello there"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello there"}]}),
    ],
)
def test_a_client_that_leaves_before_its_prompt_is_ready_costs_the_engine_nothing(start, path, asked):
    runtime = start()
    server, listener = make_server(runtime), bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    content = json.dumps({"model": "lively", **asked}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with listener:
        server.state.services.prompts.alone(lambda: leave(server, listener, head.encode(), content))
        while server.state.exchanges:
            pass
        server.should_exit = True
        thread.join()
    stats = runtime.worker.stats()
    assert (stats.num_prompt_tokens, stats.num_finished) == (0, {})


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "hello there"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello there"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hello there"}]}),
        ("/v1/responses", {"input": "hello there", "max_output_tokens": 16}),
    ],
)
def test_prompts_that_come_at_once_are_computed_in_one_step(start, monkeypatch, path, asked):
    """The first would else be computed alone while the others are still being read."""
    runtime = start(prefix_cache_gib=0)
    monkeypatch.setattr("serve.engine.engine.MAX_GATHER_S", 60.0)
    for _ in range(2):
        runtime.engine.pace.note(0, 100, 1000.0)
    plans, schedule = [], runtime.engine.scheduler.schedule
    runtime.engine.scheduler.schedule = lambda *given: plans.append(schedule(*given)) or plans[-1]
    server, listener = make_server(runtime), bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    with listener, httpx.Client(base_url=url_of(listener), timeout=120) as http, ThreadPoolExecutor() as pool:
        limit = {} if "max_output_tokens" in asked else {"max_tokens": 2}

        def ask() -> list[Future]:
            body = {"model": "lively", **asked, **limit}
            answers = [pool.submit(http.post, path, json=body) for _ in range(3)]
            end = time.monotonic() + 60
            while runtime.worker.num_coming < 3:
                assert time.monotonic() < end, "nobody says that they come"
            return answers

        for answer in server.state.services.prompts.alone(ask):
            answer.result().raise_for_status()
        assert runtime.worker.num_coming == 0
        server.should_exit = True
        thread.join()
    assert len(plans[0].chunks) == 3


NUM_AT_ONCE = 16
"""That a thread takes longer for than it may keep the interpreter's lock."""


def test_short_chats_that_have_come_at_once_are_computed_in_one_step(start, monkeypatch):
    """Each is made ready in one turn of the loop, and would be gone before the next is looked at."""
    runtime = start(prefix_cache_gib=0, max_rows=NUM_AT_ONCE)
    monkeypatch.setattr("serve.engine.engine.MAX_GATHER_S", 60.0)
    for _ in range(2):
        runtime.engine.pace.note(0, 100, 1000.0)
    plans, schedule = [], runtime.engine.scheduler.schedule
    runtime.engine.scheduler.schedule = lambda *given: plans.append(schedule(*given)) or plans[-1]
    server, listener = make_server(runtime), bind("127.0.0.1", 0)
    is_due, is_held, goes_on, tick = threading.Event(), threading.Event(), threading.Event(), server.on_tick

    async def on_tick(counter: int) -> bool:
        if is_due.is_set() and not is_held.is_set():
            is_held.set()
            goes_on.wait(60)  # and so does the loop
        return await tick(counter)

    monkeypatch.setattr(server, "on_tick", on_tick)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    body = {"model": "lively", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 2}
    asked = wire.chat(url_of(listener), body)
    with listener, ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(NUM_AT_ONCE)
        ]
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert client.recv(4096)
        is_due.set()
        assert is_held.wait(60)
        for client in clients:
            client.sendall(asked)
        goes_on.set()
        for client in clients:
            while not client.recv(65536).endswith(wire.DONE):
                pass
        server.should_exit = True
        thread.join()
    assert len(plans[0].chunks) == NUM_AT_ONCE


def test_who_has_connected_and_says_nothing_yet_is_waited_for_a_moment(start, monkeypatch):
    """A client of many requests opens its connections first; llhttp has not read the others when one begins."""
    runtime = start(prefix_cache_gib=0)
    monkeypatch.setattr("serve.engine.engine.MAX_GATHER_S", 60.0)
    monkeypatch.setattr("serve.engine.arrivals.COMING_S", 60.0)
    for _ in range(2):
        runtime.engine.pace.note(0, 100, 1000.0)
    plans, schedule = [], runtime.engine.scheduler.schedule
    runtime.engine.scheduler.schedule = lambda *given: plans.append(schedule(*given)) or plans[-1]
    content = json.dumps({"model": "lively", "prompt": "hello there", "max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(content) + content
    with serving(runtime) as url:
        address = ("127.0.0.1", httpx.URL(url).port)
        with socket.create_connection(address) as one, socket.create_connection(address) as other:
            other.settimeout(60)
            one.settimeout(60)
            with socket.create_connection(address):
                while len(ARRIVALS) < 3:
                    pass
            one.sendall(request)
            while not runtime.engine.scheduler.waiting:
                pass
            time.sleep(0.2)
            assert not plans, "it has begun alone"
            other.sendall(request)
            for each in (one, other):
                assert each.recv(2**16).startswith(b"HTTP/1.1 200 ")
        assert len(plans[0].chunks) == 2
        while ARRIVALS:
            pass


def leave(server: Server, listener: socket.socket, head: bytes, content: bytes) -> None:
    """Ask, wait until the server has the request, close the connection, and wait until it knows."""
    with socket.create_connection(listener.getsockname()) as leaver:
        leaver.sendall(head + b"content-length: %d\r\n\r\n" % len(content) + content)
        while not server.state.exchanges:
            pass
    while server.server_state.connections:
        pass


def test_a_client_that_leaves_while_its_whole_answer_is_made_frees_its_row(start):
    runtime = start()
    with browsing(runtime) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=LONG, timeout=httpx.Timeout(30, read=0.3))
        assert wait_for(http, is_idle)
        assert runtime.worker.stats().num_finished == {"cancelled": 1}


def test_a_full_queue_answers_503_with_retry_after(start):
    runtime = start(max_rows=1, max_waiting=1)
    with browsing(runtime) as http, ThreadPoolExecutor(2) as pool:
        body = {**LONG, "max_tokens": 200}
        taken = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(2)]
        assert wait_for(http, lambda health: health["num_waiting"] == 1)
        for stream in (False, True):
            answer = http.post("/v1/completions", json={**LONG, "stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "server_error"
        assert [answer.result().status_code for answer in taken] == [200, 200]


def test_a_tenant_that_asks_for_too_much_at_once_answers_429_and_others_are_served(start):
    runtime = start(max_rows=2, max_waiting=4, max_tenant_requests=1, shares={"lively": 2.0})
    with browsing(runtime) as http, ThreadPoolExecutor(1) as pool:
        mine = {"X-Tenant": "much"}
        taken = pool.submit(http.post, "/v1/completions", json={**LONG, "max_tokens": 200}, headers=mine)
        assert wait_for(http, lambda health: health["num_decoding"] == 1)
        for stream in (False, True):
            answer = http.post("/v1/completions", json={**LONG, "stream": stream}, headers=mine)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (429, "rate_limit_exceeded")
            assert error["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
        short = {**LONG, "max_tokens": 2, "priority": -1}
        assert http.post("/v1/completions", json=short).status_code == 200
        assert taken.result().status_code == 200


def test_a_request_whose_time_is_up_answers_504_and_leaves_its_row(start):
    runtime = start(max_rows=2)
    with browsing(runtime) as http:
        answer = http.post("/v1/completions", json={**LONG, "timeout": 0.05})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (504, "deadline_exceeded")
        assert error["message"].startswith("timeout: the time that the request has set has passed")
        assert answer.headers["x-should-retry"] == "false"
        assert runtime.worker.stats().num_finished.get("cancelled") is None
        assert wait_for(http, lambda health: health["num_decoding"] == 0)
        assert http.post("/v1/completions", json={**LONG, "max_tokens": 3, "timeout": 60}).status_code == 200


def test_a_priority_or_timeout_that_says_nothing_is_refused_by_its_name(start):
    bad = {"priority": [1.5, "high", 2**40, True], "timeout": [0, -1, "x", 1e9]}
    with browsing(start()) as http:
        for field, values in bad.items():
            for value in values:
                answer = http.post("/v1/completions", json={**LONG, "max_tokens": 2, field: value})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), value


def test_a_failed_step_ends_its_streams_and_a_second_in_a_row_turns_health_to_503(start):
    runtime = start()
    with browsing(runtime) as http:
        assert http.get("/health").json()["status"] == "ok"
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            runtime.worker.call(lambda: _break(runtime))
            last = [line for line in lines if line][-1]
        assert (
            "a step of the engine has failed" in json.loads(last.removeprefix("data: "))["error"]["message"]
        )
        assert http.get("/health").status_code == 200, "the engine goes on with an empty batch"
        second = http.post("/v1/completions", json=LONG)
        assert (second.status_code, second.json()["error"]["code"]) == (503, "engine_stopped")
        health = http.get("/health")
        assert health.status_code == 503
        assert "NoneType" in health.json()["error"]
        refused = http.post("/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")
        assert "lathe_engine_up 0.0" in http.get("/metrics").text


def _break(runtime: Runtime) -> None:
    runtime.engine._runner.start = None


def test_metrics_count_requests_tokens_and_latencies_by_model(start, make_adapter):
    runtime = start(adapters=[{"name": "x", "path": make_adapter(1)}])
    with browsing(runtime) as http:
        for model in ("lively", "x", "x@1"):
            http.post("/v1/completions", json={**LONG, "model": model, "max_tokens": 4})
        http.post("/v1/completions", json={**LONG, "model": "nope"})
        text = http.get("/metrics").text
    assert 'lathe_requests_total{endpoint="completions",finish="length",model="x"} 2.0' in text
    assert 'lathe_requests_total{endpoint="completions",finish="length",model="lively"} 1.0' in text
    assert "lathe_preempted_total 0.0" in text
    for histogram in ("ttft", "tpot", "request"):
        assert f'lathe_{histogram}_seconds_count{{model="x"}} 2.0' in text
    assert "lathe_generated_tokens_total 12.0" in text
    assert 'lathe_http_errors_total{status="404"} 1.0' in text
    assert "nope" not in text


def test_two_apps_in_one_process_count_apart(start):
    one, other = start(), start()
    with browsing(one) as http, browsing(other) as other_http:
        http.post("/v1/completions", json={**LONG, "max_tokens": 2})
        assert "lathe_generated_tokens_total 2.0" in http.get("/metrics").text
        assert "lathe_generated_tokens_total 0.0" in other_http.get("/metrics").text


def test_labels_of_adapters_that_are_gone_are_shown_once_more_and_then_no_longer(start, make_adapter):
    runtime = start(adapters=[{"name": "x", "path": make_adapter(1)}])
    with browsing(runtime) as http:
        for model in ("lively", "x"):
            http.post("/v1/completions", json={**LONG, "model": model, "max_tokens": 2})
        assert http.get("/metrics").text.count('model="x"') == http.get("/metrics").text.count(
            'model="lively"'
        )
        with http.stream("POST", "/v1/completions", json={**LONG, "model": "x", "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            version = runtime.registry.resolve("x")
            http.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
            for _ in range(2):
                assert 'model="x"' in http.get("/metrics").text, "a stream still uses it"
        assert wait_for(http, is_idle)
        assert wait_for(http, lambda _: runtime.registry.num_pins(version) == 0)
        assert 'finish="cancelled",model="x"' in http.get("/metrics").text
        text = http.get("/metrics").text
        assert 'model="x"' not in text
        assert 'model="lively"' in text


def test_labels_are_bounded_where_nobody_scrapes(start, make_adapter):
    runtime, path = start(), str(make_adapter(1))
    with browsing(runtime) as http:
        for number in range(MAX_GONE + 10):
            name = f"visitor-{number}"
            http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
            http.post("/v1/completions", json={**LONG, "model": name, "max_tokens": 1})
            http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        names = set(re.findall(r'model="(visitor-\d+)"', http.get("/metrics").text))
        assert 0 < len(names) <= MAX_GONE


NAMES = [
    "x\r\nset-cookie: a=b",
    "x\ny",
    " x ",
    "\t",
    "é",
    "\U0001f600",
    "\x7f",
    "x" * 5000,
    "\u2028",
    "\x00",
    "a b",
    "x",
]


def test_whatever_a_name_holds_a_header_can_say_it():
    run = Run(1, Experiment("e", "e", (Variant("v", "m"), Variant("w", "m"))), 0.0)
    for name in [*NAMES, *(f"{chr(i)}a{chr(i)}b{chr(i)}" for i in range(0x250))]:
        version = AdapterVersion(name, 1, "sha256:0", "/a")
        target = Target(name, "base", version, Assignment(run, Variant(name, "m"), "unit"))
        for key, value in target.headers.items():
            h11.Response(status_code=200, headers=[(key, value)])  # raises for what no header may hold
            assert len(value) < 4000
            assert value.isascii()
            assert value.isprintable()
    assert Target("x", "base", AdapterVersion("a b", 2, "", "")).headers["x-lathe-model"] == "a b@2"


def test_idle_connections_outlive_those_of_clients(start):
    server = make_server(start())
    assert server.config.timeout_keep_alive > 2 * httpx.Limits().keepalive_expiry


def test_a_client_whose_base_url_lacks_v1_or_has_it_twice_is_told(start):
    with serving(start()) as url:
        for base, mistake in ((url, "lacks /v1"), (f"{url}/v1/v1", "has one /v1 too many")):
            with openai.OpenAI(base_url=base, api_key="x", max_retries=0) as client:
                for ask in (
                    lambda client=client: client.models.list(),
                    lambda client=client: client.models.retrieve("lively"),
                    lambda client=client: client.completions.create(model="lively", prompt="x"),
                    lambda client=client: client.chat.completions.create(model="lively", messages=[]),
                ):
                    with pytest.raises(openai.NotFoundError, match=f"base_url {mistake}; it is {url}/v1"):
                        ask()
        for path in ("/nothing", "/v1/nothing", "/v1", "/v1/health", "/v1/v1"):
            answer = httpx.get(f"{url}{path}")
            assert answer.json()["error"]["message"] == f"there is nothing at GET {path}"


def test_a_wrong_method_is_405_and_says_which_is_right(start):
    with browsing(start()) as http:
        answer = http.get("/v1/completions")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["code"] == "method_not_allowed"


def test_an_overlong_prompt_is_told_in_the_words_that_other_software_looks_for(start):
    with browsing(start()) as http:
        for path, fields in (
            ("/v1/completions", {"prompt": "x" * 2000}),
            ("/v1/completions", {"prompt": [5] * 1024}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}),
        ):
            answer = http.post(path, json={"model": "lively", **fields})
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            # litellm makes its ContextWindowExceededError of this sentence, in these letters.
            assert "This model's maximum context length is 1024 tokens" in answer.json()["error"]["message"]
