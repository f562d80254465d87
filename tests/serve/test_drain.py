"""The end of a server, asked for by signals, of a real process: who is told what, who may end, when it is over."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from threading import Thread

import httpx
import pytest
from left_running import LeftRunning, left_running

pytestmark = pytest.mark.long

LONG = {"model": "lively", "prompt": "hello there", "max_tokens": 900, "ignore_eos": True}
ENDS_S = 60


@pytest.fixture
def start(tmp_path, model_folder) -> Iterator:
    """start(*words, **keys) → a server process, killed at the end."""
    with ExitStack() as stack:
        yield lambda *words, **keys: stack.enter_context(left_running(tmp_path, model_folder, *words, **keys))


def wait_until(fact, timeout_s: float = ENDS_S) -> bool:
    end = time.monotonic() + timeout_s
    while not fact():
        if time.monotonic() > end:
            return False
    return True


def status_of(url: str, path: str) -> int:
    return httpx.get(f"{url}{path}", timeout=30).status_code


def drain(server: LeftRunning) -> None:
    """Ask for the end, and wait until that is known."""
    server.process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: status_of(server.url, "/health") == 503)


def test_while_a_stream_ends_readiness_says_so_liveness_stays_and_nothing_new_is_taken(start):
    server = start()
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        with httpx.Client(base_url=server.url) as http:  # a connection that was there before
            assert http.get("/health").json()["status"] == "ok"
            drain(server)
            assert http.get("/health/ready").json()["status"] == "draining"
            assert http.get("/health/live").status_code == 200
            assert [http.get(path).status_code for path in ("/metrics", "/version")] == [200, 200]
            status = http.get("/v1/status").json()
            assert (status["status"], len(status["requests"])) == ("draining", 1)
            refused = http.post("/v1/completions", json=LONG)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["type"]) == (503, "draining", "server_error")
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["connection"] == "close"
        said = [line for line in lines if line]
    assert said[-1] == "data: [DONE]", "the stream came to its own end"
    assert json.loads(said[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(ENDS_S) == 0


def test_what_does_not_end_in_time_ends_with_an_error_event_or_a_503(start):
    server = start(drain_timeout_s=0.5, max_rows=1)
    whole: list[httpx.Response] = []
    ask = lambda: whole.append(httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60))  # noqa: E731
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        asking = Thread(target=ask)
        asking.start()
        waits = lambda: httpx.get(f"{server.url}/health").json()["num_waiting"] == 1  # noqa: E731
        assert wait_until(waits)
        server.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"] == {
        "message": "the server is shutting down",
        "type": "server_error",
        "param": None,
        "code": "engine_stopped",
    }
    asking.join(ENDS_S)
    assert (whole[0].status_code, whole[0].json()["error"]["code"]) == (503, "engine_stopped")
    assert server.process.wait(ENDS_S) == 0
    assert "2 requests are ended before their time" in server.log


def test_a_second_signal_waits_for_nobody(start):
    server = start(drain_timeout_s=3600)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        drain(server)
        server.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert "error" in json.loads(last.removeprefix("data: "))
    assert server.process.wait(ENDS_S) == 0


def test_an_idle_server_ends_at_once_whatever_it_may_wait_for(start):
    server = start(drain_timeout_s=3600)
    with httpx.Client(base_url=server.url) as http:  # an idle connection holds nothing up
        assert http.get("/health").status_code == 200
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(ENDS_S) == 0
