"""Keys over HTTP: which paths need one, what each may do, what it may have; whose its requests are."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import openai
import psutil
import pytest

from serve.api.app import create_app
from serve.api.guard import duration
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

OPEN = {"/health", "/health/live", "/health/ready", "/ping"}
ASKS = re.compile(
    r"/v1/(chat/)?completions|/v1/messages.*|/v1/responses.*|/v1/feedback|/v1/embeddings|(/v[12])?/(rerank|score)"
    r"|/(de)?tokenize|/api/(chat|generate|embed|embeddings|show)"
)
"""What a key that is no admin's may POST: questions. What changes the server is not among them."""
CHATS = ("/v1/chat/completions", "/v1/messages")
SHORT = {"model": "lively", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    hashed = hashlib.sha256(b"sk-hashed").hexdigest()
    entries = [
        "{name: plain, key: sk-plain}",
        f"{{name: hashed, key_sha256: {hashed}, tenant: team}}",
        "{name: ops, key: sk-ops, admin: true}",
        "{name: proxy, key: sk-proxy, tenant: '*'}",
        "{name: narrow, key: sk-narrow, adapters: ['one*']}",
        "{name: aliased, key: sk-aliased, adapters: [gpt-4o]}",
        "{name: tooled, key: sk-tooled, mcp_servers: ['shop-*']}",
        "{name: untooled, key: sk-untooled, mcp_servers: []}",
        "{name: few, key: sk-few, requests_per_minute: 3}",
        "{name: tokens, key: sk-tokens, tokens_per_minute: 40}",
        "{name: both, key: sk-both, requests_per_minute: 100, tokens_per_day: 5000}",
    ]
    file.write_text("keys:\n" + "".join(f"  - {entry}\n" for entry in entries))
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def runtime(model_folder, keys_file, tmp_path_factory) -> Iterator[Runtime]:
    servers = tmp_path_factory.mktemp("mcp") / "servers.json"
    # Nobody listens there: whoever may ask them is told so, by a 424.
    servers.write_text(
        json.dumps({"mcpServers": {name: {"url": "http://127.0.0.1:9/mcp"} for name in ("shop-1", "files")}})
    )
    started = Runtime.start(
        ServeConfig(
            model=str(model_folder),
            name="lively",
            aliases=("gpt-4", "gpt-4o"),
            api_keys=keys_file,
            mcp_servers=servers,
            allowed_origins=(
                "https://a.example",
                "app://notes.md",
                "chrome-extension://*",
                "https://*.c.example",
            ),
        )
    )
    yield started
    started.close()


@pytest.fixture(scope="module")
def url(runtime) -> Iterator[str]:
    with serving(runtime) as found:
        yield found


@pytest.fixture
def ask(url):
    """ask(key, path, method="GET", **options) → the response; key None: none is sent."""
    with httpx.Client(base_url=url, timeout=60) as http:

        def send(key: str | None, path: str, method: str = "GET", **options) -> httpx.Response:
            headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **options.pop("headers", {})}
            return http.request(method, path, headers=headers, **options)

        yield send


def routes(runtime: Runtime) -> list[tuple[str, str]]:
    """Method and path of everything the application answers, with names filled in."""
    app = create_app(runtime)
    described = [
        (method.upper(), re.sub(r"\{\w+(:path)?\}", "x", path))
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    ]
    return [*described, *(("GET", route.path) for route in app.routes if hasattr(route, "path"))]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize"])
@pytest.mark.parametrize(
    ("key", "label", "status"),
    [
        ("sk-plain", "files", 424),
        ("sk-tooled", "shop-1", 424),
        ("sk-tooled", "files", 403),
        ("sk-untooled", "shop-1", 403),
        ("sk-untooled", "nobody", 403),  # what there is, is not told either
    ],
)
def test_a_key_has_tools_of_its_mcp_servers_run_and_of_no_others(ask, path, key, label, status):
    tool = {"type": "mcp", "server_label": label, "require_approval": "never"}
    words = [{"role": "user", "content": "hello"}]
    body = {
        "model": "lively",
        "tools": [tool],
        ("input" if path.endswith("responses") else "messages"): words,
    }
    answer = ask(key, path, "POST", json=body)
    assert answer.status_code == status, answer.text
    if status == 403:
        assert f"may not use tools of MCP server '{label}'" in answer.json()["error"]["message"]


def test_every_path_needs_a_key_but_those_that_say_whether_the_server_is_well(runtime, ask):
    found = routes(runtime)
    assert len(found) > 20
    for method, path in found:
        for key in (None, "sk-wrong", "sk-plai", "Bearer", "sk-plain2"):
            answer = ask(key, path, method)
            if path in OPEN:
                assert answer.status_code == 200, path
                assert answer.json() == {"status": "ok"}, "and nothing else"
            else:
                assert answer.status_code == 401, (method, path, key)
                assert answer.headers["www-authenticate"] == "Bearer"
    for path in (
        "/v1/nothing",
        "/V1/models",
        "//v1/models",
        "/v1/models/",
        "/health/../v1/models",
        "/invocations",
    ):
        assert ask(None, path).status_code == 401


def test_a_wrong_key_is_told_in_openais_words_and_anthropics_and_quoted_in_neither(url, ask):
    answer = ask("sk-secret-guess", "/v1/models")
    assert answer.json()["error"] == {
        "message": "Incorrect API key provided.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert "You didn't provide an API key" in ask(None, "/v1/models").json()["error"]["message"]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert caught.value.request_id.startswith("req_")
    with anthropic.Anthropic(base_url=url, api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.create(model="lively", max_tokens=3, messages=[{"role": "user", "content": "x"}])
        assert caught.value.body["error"]["type"] == "authentication_error"


def test_a_key_is_taken_from_either_header_and_in_any_case_of_the_scheme(url, ask):
    for headers in (
        {"Authorization": "Bearer sk-plain"},
        {"Authorization": "bearer   sk-plain"},
        {"x-api-key": "sk-plain"},
        {"api-key": "sk-plain"},
        {"Authorization": "Bearer sk-wrong", "x-api-key": "sk-plain"},
        {"Authorization": "Basic x", "X-API-KEY": "sk-hashed"},
    ):
        assert ask(None, "/v1/models", headers=headers).status_code == 200, headers
    for headers in (
        {"Authorization": "sk-plain"},
        {"Authorization": "Basic sk-plain"},
        {"x-api-key": "Bearer sk-plain"},
        {"api_key": "sk-plain"},
    ):
        assert ask(None, "/v1/models", headers=headers).status_code == 401, headers
    assert ask(None, "/v1/models?api_key=sk-plain").status_code == 401
    with anthropic.Anthropic(base_url=url, api_key="sk-plain", max_retries=0) as client:
        assert client.messages.create(
            model="lively", max_tokens=3, messages=[{"role": "user", "content": "x"}]
        ).usage.output_tokens


def test_what_changes_the_server_takes_an_admins_key_whatever_route_is_added(runtime, ask):
    changing = [
        (method, path)
        for method, path in routes(runtime)
        if method not in ("GET", "OPTIONS") and not ASKS.fullmatch(path)
    ]
    assert len(changing) >= 6
    for method, path in changing:
        body = {"json": {"lora_name": "x", "lora_path": "y"}} if "lora" in path else {"json": {}}
        answer = ask("sk-plain", path, method, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), (method, path)
        assert ask("sk-ops", path, method, **body).status_code != 403, (method, path)
    for path in ("/v1/adapters", "/v1/adapter_watch", "/v1/cache/stats", "/metrics"):
        assert [ask(key, path).status_code for key in ("sk-plain", "sk-ops")] == [403, 200]


def test_a_key_asks_for_what_it_may_and_sees_nothing_else(runtime, ask, make_adapter):
    for name, seed in (("one", 1), ("one-more", 2), ("secret", 3)):
        path = str(make_adapter(seed))
        loaded = ask("sk-ops", "/v1/load_lora_adapter", "POST", json={"lora_name": name, "lora_path": path})
        assert loaded.status_code == 200
    status = {
        model: ask("sk-narrow", "/v1/completions", "POST", json={**SHORT, "model": model})
        for model in (
            *("one", "one@1", "one-more", "one:0.5+one-more:0.5"),
            *(
                "lively",
                "secret",
                "secret@1",
                "one:0.5+secret:0.5",
                "one:1e-9+secret:1",
                "one+secret",
                "nope",
            ),
        )
    }
    assert [answer.status_code for answer in status.values()] == [200] * 4 + [403] * 7
    assert "adds it" in status["one:0.5+secret:0.5"].json()["error"]["message"]
    for path in (
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/api/chat",
        "/tokenize",
    ):
        body = {"model": "secret", "max_tokens": 3, "messages": [{"role": "user", "content": "x"}]}
        body = {name: value for name, value in body.items() if path in CHATS or name != "max_tokens"}
        assert ask("sk-narrow", path, "POST", json=body).status_code == 403, path
    assert ask("sk-narrow", "/api/show", "POST", json={"model": "secret"}).status_code == 403
    listed = [card["id"] for card in ask("sk-narrow", "/v1/models").json()["data"]]
    assert sorted(listed) == ["one", "one-more"]
    for path in ("/health", "/api/tags", "/api/ps"):
        assert "secret" in ask("sk-ops", path).text or path == "/api/ps", path
        assert "secret" not in ask("sk-narrow", path).text, path
    assert [ask("sk-narrow", f"/v1/models/{model}").status_code for model in ("one", "secret")] == [200, 403]


def test_a_model_is_listed_by_the_name_that_a_key_may_ask_for(ask):
    def listed(key: str) -> list[str]:
        names = [card["id"] for card in ask(key, "/v1/models").json()["data"]]
        assert [each["name"] for each in ask(key, "/api/tags").json()["models"]] == names
        return names

    assert listed("sk-aliased") == ["gpt-4o"]
    assert "lively" in listed("sk-plain")
    assert "gpt-4o" not in listed("sk-plain")
    for name, status in (("gpt-4o", 200), ("gpt-4", 403), ("lively", 403)):
        answer = ask("sk-aliased", "/v1/completions", "POST", json={**SHORT, "model": name})
        assert answer.status_code == status, name


def test_a_key_that_may_do_everything_needs_no_list(ask):
    assert ask("sk-plain", "/v1/completions", "POST", json=SHORT).status_code == 200


def test_requests_are_their_keys_tenants_and_a_header_may_only_repeat_it(runtime, ask):
    prompt = "a prompt of this test alone, which is long enough to be kept as a prefix, so it is"

    def cached(key: str, **headers: str) -> int:
        answer = ask(key, "/v1/completions", "POST", json={**SHORT, "prompt": prompt}, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("sk-plain") == 0
    assert cached("sk-plain", **{"X-Tenant": "plain"}) > 0
    assert cached("sk-hashed") == 0, "another key's prefixes are its own"
    assert cached("sk-proxy", **{"X-Tenant": "team"}) > 0, "a proxy speaks for whom it names"
    for headers in ({"X-Tenant": "team"}, {"X-APC-Tenant": "team"}):
        answer = ask("sk-plain", "/v1/completions", "POST", json=SHORT, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_more_requests_than_a_minute_allows_are_429_in_openais_words_failed_ones_too(ask):
    bad = ask("sk-few", "/v1/completions", "POST", json={**SHORT, "temperature": -1})
    assert (bad.status_code, bad.headers["x-ratelimit-remaining-requests"]) == (400, "2")
    good = [ask("sk-few", "/v1/completions", "POST", json=SHORT) for _ in range(2)]
    assert [answer.status_code for answer in good] == [200, 200]
    assert good[-1].headers["x-ratelimit-limit-requests"] == "3"
    refused = ask("sk-few", "/v1/completions", "POST", json=SHORT)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert ask("sk-few", "/v1/models").status_code == 200, "looking costs nothing"
    assert ask("sk-plain", "/v1/completions", "POST", json=SHORT).status_code == 200, "others have their own"


def test_tokens_of_streams_count_as_those_of_whole_answers_do(ask):
    """A gateway that counted whole answers alone let streams have everything."""
    with_stream = {**SHORT, "max_tokens": 60, "stream": True}
    assert ask("sk-tokens", "/v1/completions", "POST", json=with_stream).text.endswith("data: [DONE]\n\n")
    refused = ask("sk-tokens", "/v1/completions", "POST", json=SHORT)
    assert refused.status_code == 429
    assert "40 tokens a minute" in refused.json()["error"]["message"]
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


def test_headers_say_what_is_left_of_tokens_and_requests(ask):
    before = ask("sk-both", "/v1/completions", "POST", json={**SHORT, "max_tokens": 50})
    after = ask("sk-both", "/v1/completions", "POST", json={**SHORT, "max_tokens": 50})
    left = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in (before, after)]
    used = after.json()["usage"]["total_tokens"]
    assert used - 5 <= left[0] - left[1] <= used, "less what came back meanwhile"


def test_a_request_that_is_refused_for_want_of_room_does_not_count(model_folder, keys_file):
    config = ServeConfig(
        model=str(model_folder), name="lively", api_keys=keys_file, max_rows=1, max_waiting=0
    )
    runtime = Runtime.start(config)
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
            few, plain = ({"x-api-key": f"sk-{name}"} for name in ("few", "plain"))
            long = {**SHORT, "max_tokens": 900, "stream": True}
            with http.stream("POST", "/v1/completions", json=long, headers=plain) as answer:
                lines = answer.iter_lines()
                next(lines)
                refused = [http.post("/v1/completions", json=SHORT, headers=few) for _ in range(6)]
            assert [each.status_code for each in refused] == [503] * 6
            assert refused[-1].headers["x-ratelimit-remaining-requests"] == "3"
    finally:
        runtime.close()


def test_status_shows_a_key_its_own_and_an_admin_everybodys(url, ask):
    with httpx.Client(base_url=url, timeout=60) as http:
        long = {**SHORT, "max_tokens": 900, "stream": True}
        headers = {"x-api-key": "sk-plain", "X-Request-Id": "my-own-id"}
        with http.stream("POST", "/v1/completions", json=long, headers=headers) as answer:
            lines = answer.iter_lines()
            next(lines)
            mine, admins, others = (
                ask(key, "/v1/status").json() for key in ("sk-plain", "sk-ops", "sk-hashed")
            )
    assert (
        [one["id"] for one in mine["requests"]] == [one["id"] for one in admins["requests"]] == ["my-own-id"]
    )
    assert others["requests"] == []
    entry = mine["requests"][0]
    assert (entry["phase"], entry["tenant"], entry["key"], entry["served"]) == (
        "decode",
        "plain",
        "plain",
        "lively",
    )
    assert entry["num_prompt_tokens"] == 5
    assert entry["rows"][0]["num_generated_tokens"] >= entry["num_generated_tokens"] - 1 >= 0
    assert entry["age_s"] >= entry["ttft_s"] > 0
    assert "server" in admins
    assert "server" not in mine


def test_a_page_of_an_allowed_origin_may_ask_and_reads_refusals_and_others_may_not(ask):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = ("https://a.example", "app://notes.md", "chrome-extension://abcd", "https://x.c.example")
    others = (
        "https://b.example",
        "http://a.example",
        "https://c.example",
        "https://x.c.example.org",
        "https://x.c.example:8000",
        "null",
    )
    for origin, is_allowed in [*((each, True) for each in allowed), *((each, False) for each in others)]:
        preflight = ask(None, "/v1/completions", "OPTIONS", headers={"Origin": origin, **asked})
        assert (preflight.status_code == 200) is is_allowed, "it has no key yet"
        refusal = ask(None, "/v1/models", headers={"Origin": origin})
        assert refusal.status_code == 401
        assert (refusal.headers.get("access-control-allow-origin") == origin) is is_allowed
    exposed = ask("sk-plain", "/v1/models", headers={"Origin": "https://a.example"})
    assert "X-Request-Id" in exposed.headers["access-control-expose-headers"]


def test_a_page_of_an_allowed_origin_may_use_every_method_and_read_every_header_of_ours(runtime, ask):
    for method in {method for method, _ in routes(runtime)}:
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": method}
        assert ask(None, "/v1/responses/x", "OPTIONS", headers=asked).status_code == 200, method
    answer = ask("sk-plain", "/v1/completions", "POST", json=SHORT, headers={"Origin": "https://a.example"})
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    ours = {name for name in answer.headers if name.startswith("x-") and name != "x-content-type-options"}
    assert "x-lathe-model" in ours
    assert ours <= set(exposed)
    assert {"x-lathe-context-overflow", "x-should-retry", "retry-after"} <= set(exposed)


def knock(url: str, num: int) -> None:
    """So many requests on one connection, each with a wrong key of its own, of 4,000 characters."""
    parts = httpx.URL(url)
    with (
        socket.create_connection((parts.host, parts.port), timeout=60) as opened,
        opened.makefile("rb") as read,
    ):
        for which in range(num):
            key = f"sk-{which}-".ljust(4000, "x")
            opened.sendall(
                f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n".encode()
            )
            assert b" 401 " in read.readline()
            length = next(int(line[15:]) for line in read if line.lower().startswith(b"content-length:"))
            assert b"Incorrect API key" in next(read.read(length) for line in read if not line.strip())


def test_thousands_of_wrong_keys_leave_no_trace_and_slow_nobody(url):
    """Their texts would be 16 MB."""
    process = psutil.Process()
    knock(url, 500)  # what is made once is there
    before, started_s = process.memory_info().rss, time.process_time()
    knock(url, 4000)
    assert process.memory_info().rss - before < 2**23
    assert (time.process_time() - started_s) / 4000 < 0.02, "of client and server together"


def test_how_long_until_something_is_full_is_written_as_openai_does():
    assert [duration(s) for s in (0, 0.1204, 1.5, 59.96, 60, 61.2, 3600, 86399)] == [
        *("0ms", "120ms", "1.5s", "1m0s", "1m0s", "1m1s", "1h0m0s", "23h59m59s"),
    ]


def test_the_one_key_of_the_command_line_may_do_everything_for_any_tenant(model_folder):
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", api_key="sk-one"))
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
            assert http.get("/v1/models").status_code == 401
            http.headers["x-api-key"] = "sk-one"
            assert http.get("/v1/models", headers={"X-Tenant": "anyone"}).status_code == 200
            assert http.post("/v1/cache/reset").json() == {"status": "cleared", "tenant": None}
            assert "sk-one" not in repr(runtime.config)
    finally:
        runtime.close()
