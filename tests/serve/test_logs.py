"""What a server writes down: a line a request, by whose id its errors are found; nothing of what was said."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from fastapi.testclient import TestClient
from left_running import left_running

from serve.api.app import create_app
from serve.api.exchange import SANE_ID
from serve.config import ServeConfig
from serve.logs import ROOM, JsonLines, TextLines, logging_to
from serve.runtime import Runtime

SECRET = "the password is swordfish"
CHAT = {
    "model": "lively",
    "max_tokens": 4,
    "ignore_eos": True,
    "messages": [{"role": "user", "content": SECRET}],
}


@pytest.fixture
def start(tmp_path, model_folder) -> Iterator:
    """start(*words, **keys) → a server process, killed at the end."""
    with ExitStack() as stack:
        yield lambda *words, **keys: stack.enter_context(left_running(tmp_path, model_folder, *words, **keys))


def end(server) -> None:
    server.process.terminate()
    assert server.process.wait(60) == 0


def test_each_request_has_one_line_with_what_it_was_and_cost_and_nothing_of_what_it_said(start):
    server = start("--log-format", "json", api_key="sk-a")
    with httpx.Client(
        base_url=server.url, timeout=60, headers={"x-api-key": "sk-a", "X-Tenant": "team"}
    ) as http:
        whole = http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine-1"})
        streamed = http.post("/v1/chat/completions", json={**CHAT, "stream": True})
        bad = http.post("/v1/chat/completions", json={**CHAT, SECRET: SECRET})
        stray = http.get("/a%0A2026-01-01T00:00:00.000Z%20INFO%20forged", headers={"x-api-key": "sk-wrong"})
        http.get("/health")
    end(server)
    answers = (whole, streamed, bad, stray)
    lines = {line["request_id"]: line for line in server.requests()}
    assert len(lines) == len(server.requests()) == 4, "probes are debug"
    assert [answer.headers["x-request-id"] for answer in answers] == list(lines)
    assert next(iter(lines)) == "mine-1"
    one = lines["mine-1"]
    assert (one["model"], one["served"], one["key"], one["tenant"]) == ("lively", "lively", "api_key", "team")
    usage = whole.json()["usage"]
    assert (one["prompt_tokens"], one["completion_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert (one["status"], one["finish"], one["level"]) == (200, "length", "info")
    assert 0 < one["ttft_ms"] <= one["duration_ms"]
    assert lines[streamed.headers["x-request-id"]]["completion_tokens"] == 4
    assert lines[bad.headers["x-request-id"]]["error"] == "invalid_request_error"
    assert lines[stray.headers["x-request-id"]]["error"] == "invalid_api_key"
    assert "\n" not in lines[stray.headers["x-request-id"]]["path"]
    for secret in ("swordfish", "sk-a", "sk-wrong"):
        assert secret not in server.log


def test_what_requests_say_is_written_where_that_is_asked_for_and_long_texts_are_cut(start):
    server = start("--log-prompts", "--log-format", "json")
    picture = "data:image/png;base64," + "A" * 50_000
    httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "user": picture}, timeout=60)
    end(server)
    prompt = server.requests()[0]["prompt"]
    assert prompt["messages"][0]["content"] == SECRET
    assert prompt["user"].endswith("… (50022 characters)")
    assert len(server.log) < 20_000


@pytest.mark.parametrize(("level", "count"), [("debug", 2), ("info", 1), ("error", 0)])
def test_a_level_says_how_much_is_written(start, level, count):
    server = start("--log-level", level, log_format="json")
    httpx.get(f"{server.url}/health")
    httpx.get(f"{server.url}/v1/models")
    end(server)
    assert len(server.requests()) == count


def test_a_fault_is_told_by_its_request_id_and_the_log_has_the_traceback(model_folder):
    """What nobody foresaw: an application that divides by nothing, behind the server's own middlewares."""
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively"))
    written = io.StringIO()
    try:
        with logging_to("info", "json", written):
            app = create_app(runtime)

            @app.get("/divide")
            async def divide() -> float:
                return 1 / int("0")

            with TestClient(app, base_url="http://localhost") as http:
                answer = http.get("/divide", headers={"X-Request-Id": "mine"})
    finally:
        runtime.close()
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert error["message"] == "internal error: ZeroDivisionError; the server's log has it under mine"
    assert answer.headers["x-request-id"] == "mine"
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    fault = next(line for line in lines if line["level"] == "error")
    assert fault["request_id"] == "mine"
    assert fault["traceback"].rstrip().endswith("ZeroDivisionError: division by zero")
    assert next(line for line in lines if line["logger"] == "serve.request")["status"] == 500


def test_ids_that_a_log_or_header_cannot_hold_are_replaced():
    for sane in ("a", "req_1", "0f3e/9:1+x=.", "x" * 128):
        assert SANE_ID.match(sane)
    for other in ("", "-a", "a b", "a\nb", "é", 'a"b', "x" * 129, "a\n", "a{b}"):
        assert not SANE_ID.match(other), other


def record(message: str, **fields) -> logging.LogRecord:
    made = logging.LogRecord("serve.x", logging.INFO, "f", 1, message, None, None)
    made.fields = fields
    return made


NASTY = [
    "a\nb",
    "\x1b[31mred",
    "\u2028",
    '"',
    "\\",
    "\udc80",
    "é",
    "",
    "a b",
    "x=y",
    None,
    1.5,
    {"a": ["\n"]},
]


def test_a_record_is_one_line_of_json_whatever_it_holds():
    for value in NASTY:
        line = JsonLines().format(record("m", value=value))
        assert line.isascii()
        assert "\n" not in line
        assert json.loads(line)["value"] == value


def test_a_record_is_one_line_of_text_that_no_value_ends_or_colours():
    for value in NASTY:
        line = TextLines().format(record("m", value=value, next=1))
        assert line.isascii()
        assert "\n" not in line
        assert "\x1b" not in line
        assert line.endswith(" next=1")
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    m value=", line)


def test_nobody_waits_for_a_log_that_nobody_reads_and_what_is_lost_is_counted():
    reading, writing = os.pipe()
    stream = io.TextIOWrapper(io.FileIO(writing, "w"), write_through=True)
    logger = logging.getLogger("serve.test")
    done = threading.Event()

    def write() -> None:
        for _ in range(2 * ROOM):
            logger.info("x" * 100)
        done.set()

    with logging_to("info", "text", stream) as handler:
        threading.Thread(target=write, daemon=True).start()
        assert done.wait(120), "the pipe was full long before"
        assert handler.num_dropped > ROOM // 2
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(os.fdopen(reading)), daemon=True)
        reader.start()
    stream.close()
    reader.join(60)
    assert any(
        re.fullmatch(r"\d+ lines of the log were dropped: it is read too slowly\n", line) for line in lines
    )
    assert len(lines) < 2 * ROOM


def test_logging_is_afterwards_as_it_was():
    root = logging.getLogger()
    before = root.level, [*root.handlers], logging.getLogger("serve").level
    with logging_to("debug", "json", io.StringIO()):
        assert logging.getLogger("serve.engine").isEnabledFor(logging.DEBUG)
        assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
    assert (root.level, root.handlers, logging.getLogger("serve").level) == (before[0], before[1], before[2])
