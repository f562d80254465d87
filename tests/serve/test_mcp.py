"""Tools of MCP servers: real ones, over standard streams and HTTP, asked by themselves and through a chat."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from tiny import QWEN3, running
from waiting import until

import lathe
from serve.api.rounds import offered
from serve.api.schemas import ChatBody
from serve.api.server import serving
from serve.config import ServeConfig
from serve.errors import ConfigError, RequestError, ToolServerError
from serve.mcp.config import McpServerConfig, read_servers
from serve.mcp.servers import McpServers
from serve.runtime import Runtime

PROGRAM = Path(__file__).parents[1] / "support" / "mcp_server.py"
RAW = PROGRAM.with_name("mcp_raw.py")
OVER_STREAMS = McpServerConfig(command=sys.executable, args=(str(PROGRAM),))
CONFIG = {**QWEN3, "max_position_embeddings": 16384}
MESSAGES = [{"role": "user", "content": "What is two and three?"}]


@pytest.fixture(scope="module")
def http_address(free_ports):
    port = free_ports()
    with subprocess.Popen([sys.executable, str(PROGRAM), str(port)], stderr=subprocess.DEVNULL) as program:
        try:
            wait_for(port)
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            program.kill()


def wait_for(port: int) -> None:
    """Until it answers: an attempt is refused at once until then."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
            probe.settimeout(0.05)
    raise AssertionError("the server did not come up")


@pytest.fixture(scope="module")
def servers(http_address):
    config = {
        "streams": OVER_STREAMS,
        "web": McpServerConfig(url=http_address),
        "gone": McpServerConfig(url="http://127.0.0.1:9/mcp"),
        "elsewhere": McpServerConfig(url=f"{http_address}/elsewhere?key=secret"),
        "nothing": McpServerConfig(command="/does/not/exist"),
        "ends": McpServerConfig(command=sys.executable, args=("-c", "raise SystemExit(3)")),
        "mute": McpServerConfig(command=sys.executable, args=("-c", "import sys; sys.stdin.read()")),
    }
    opened = McpServers(config, timeout_s=20, max_result_chars=1000)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", ["streams", "web"])
def test_tools_are_listed_and_called(servers, name):
    async def talk() -> None:
        tools = await servers.tools(name)
        assert {"add", "fail", "much"} <= {tool.name for tool in tools}
        (add,) = [tool for tool in tools if tool.name == "add"]
        assert add.description == "Add two numbers."
        assert set(add.parameters["properties"]) == {"a", "b"}
        sums = await asyncio.gather(*(servers.call(name, "add", {"a": n, "b": 1}) for n in range(8)))
        assert sums == [f"the sum is {n + 1}" for n in range(8)]
        assert (await servers.call(name, "fail", {})).startswith("Error: ")
        assert (await servers.call(name, "add", {"a": "x"})).startswith("Error: ")
        much = await servers.call(name, "much", {"count": 5000})
        assert len(much) < 1100
        assert much.endswith("[cut off: 5,000 characters]")

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("link", "notes\nfile:///notes.md\nOf May."),
        ("file", "# Notes"),
        ("packed", "[resource file:///notes.md]"),
        ("data", '{"total": 36}'),
        ("picture", '[image]\n{"total": 36}'),
        ("both", '{ "total": 36 }'),
        ("refused", 'Error: ask a human\n{"code": "NEEDS_HUMAN"}'),
    ],
)
def test_whatever_a_tool_gives_is_told(servers, kind, told):
    """llama.cpp 26410, claude-code 86032 and others: links, files and data beside texts were lost on the model."""
    assert asyncio.run(servers.call("streams", "odd", {"kind": kind})) == told


def test_a_server_gets_nothing_of_this_processs_environment_but_what_all_need(servers, monkeypatch):
    monkeypatch.setenv("A_SECRET_OF_OURS", "x")
    names = asyncio.run(servers.call("streams", "secrets", {})).split(",")
    assert "PATH" in names
    assert "A_SECRET_OF_OURS" not in names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone", "http://127.0.0.1:9: ConnectError: .*connect.*"),
        ("elsewhere", r"http://127.0.0.1:\d+ answered 404 Not Found"),
        ("nothing", "FileNotFoundError: .*/does/not/exist.*"),
        ("ends", "its program ended, with status 3"),
    ],
)
def test_a_server_that_is_not_there_is_an_error_of_who_asked_alone_and_says_why(servers, name, reason):
    async def talk() -> None:
        failing = asyncio.ensure_future(servers.tools(name))
        assert await servers.call("streams", "add", {"a": 1, "b": 2}) == "the sum is 3"
        with pytest.raises(ToolServerError, match=f"^MCP server '{name}': {reason}$"):
            await failing

    asyncio.run(talk())


def test_a_server_that_says_nothing_is_given_up_in_time():
    servers = McpServers(
        {"mute": McpServerConfig(command=sys.executable, args=("-c", "import sys; sys.stdin.read()"))},
        timeout_s=1,
    )
    with pytest.raises(ToolServerError, match="takes more than 1 s"):
        asyncio.run(servers.tools("mute"))
    servers.close()


def test_a_server_that_ended_is_started_again():
    async def talk() -> None:
        with pytest.raises(ToolServerError):
            await servers.call("one", "end", {})
        assert await servers.call("one", "add", {"a": 1, "b": 2}) == "the sum is 3"

    servers = McpServers({"one": OVER_STREAMS}, timeout_s=20)
    asyncio.run(talk())
    servers.close()


def test_a_program_that_ended_while_nobody_asked_is_started_again():
    servers = McpServers({"one": OVER_STREAMS}, timeout_s=20)
    known = set(psutil.Process().children())
    assert len(asyncio.run(servers.tools("one"))) == 8
    for program in set(psutil.Process().children()) - known:
        program.kill()
    until(servers._servers["one"]._line.lost.is_set)
    assert asyncio.run(servers.call("one", "add", {"a": 1, "b": 2})) == "the sum is 3"
    servers.close()


def test_a_session_that_an_address_knows_no_more_is_begun_anew_and_cuts_no_call_off(free_ports):
    """What meets it is asked again, once; a call that runs in the old one ends there."""
    port = free_ports()
    config = {"raw": McpServerConfig(url=f"http://127.0.0.1:{port}/mcp")}
    servers, fresh = (McpServers(config, timeout_s=20) for _ in range(2))

    async def talk() -> None:
        assert len(await servers.tools("raw")) == 7
        held = asyncio.ensure_future(servers.call("raw", "hold", {}))
        for grown in ("8", "9"):
            await servers.call("raw", "forget", {})
            assert await servers.call("raw", "grow", {}) == grown
        assert len(await servers.tools("raw")) == 9
        assert not held.done()
        await servers.call("raw", "release", {})
        assert await held == "9"
        with pytest.raises(ToolServerError, match="calling 'vanish' failed: it has forgotten its session"):
            await fresh.call("raw", "vanish", {})
        assert await servers.call("raw", "grow", {}) == "11", "what was done is not done again"
        await servers.call("raw", "lock", {})
        with pytest.raises(ToolServerError, match="calling 'grow' failed: it has forgotten its session"):
            await servers.call("raw", "grow", {})

    with subprocess.Popen([sys.executable, str(RAW), str(port)], stderr=subprocess.DEVNULL) as program:
        try:
            wait_for(port)
            asyncio.run(talk())
        finally:
            servers.close()
            fresh.close()
            program.kill()


def test_an_answer_that_is_none_ends_no_connection():
    """A server's own state would be gone with it."""

    async def talk() -> None:
        await servers.call("raw", "grow", {})
        with pytest.raises(ToolServerError, match="CallToolResult"):
            await servers.call("raw", "odd", {})
        assert await servers.call("raw", "grow", {}) == "9"

    servers = McpServers({"raw": McpServerConfig(command=sys.executable, args=(str(RAW),))}, timeout_s=20)
    asyncio.run(talk())
    servers.close()


def test_tools_that_have_changed_are_listed_anew():
    async def talk() -> None:
        for count in (7, 8, 9):
            assert len(await servers.tools("raw")) == count
            await servers.call("raw", "grow", {})

    servers = McpServers({"raw": McpServerConfig(command=sys.executable, args=(str(RAW),))}, timeout_s=20)
    asyncio.run(talk())
    servers.close()


def test_no_two_tools_are_offered_by_one_name(servers):
    own = {"type": "function", "function": {"name": "streams__add"}}
    tools = [
        own,
        *(entry(label, allowed_tools=["add"]) for label in ("web", "streams", "streams", "streams")),
    ]
    offer = asyncio.run(offered(servers, ChatBody(messages=MESSAGES, tools=tools)))
    names = ["streams__add", "add", "streams__add_2", "streams__add_3", "streams__add_4"]
    assert [tool.function.name for tool in offer.body.tools] == names
    assert offer.owners == {name: ("web" if name == "add" else "streams", "add") for name in names[1:]}


def test_a_name_that_the_configuration_has_not_is_refused(servers):
    with pytest.raises(RequestError, match="found no MCP server 'sh'; there are streams, web"):
        asyncio.run(servers.tools("sh"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ("{}", "mcpServers: Field required"),
        ('{"mcpServers": {"a": {}}}', "expected either command or url"),
        ('{"mcpServers": {"a": {"command": "x", "url": "http://x"}}}', "expected either command or url"),
        (
            '{"mcpServers": {"a": {"command": "x", "shell": true}}}',
            "mcpServers.a.shell: unknown key; there are com",
        ),
        ('{"mcpServers": {"a": {"command": "x", "autoApprove": []}}}', "allowed_tools"),
        ('{"mcpServers": {"a": {"url": "http://x", "type": "sse"}}}', "type: found 'sse'; expected http or"),
        ('{"mcpServers": {"a": {"command": "x", "type": "http"}}}', "expected stdio beside command"),
        ('{"servers": {}}', "servers: unknown key; there are mcpServers"),
        ('{"mcpServers": {"a": {"url": "file:///etc"}}}', "mcpServers.a.url"),
        ('{"mcpServers": {"a": {"command": "x", "headers": {"k": "v"}}}}', "headers are an address's"),
    ],
)
def test_a_file_that_is_wrong_is_told_of(tmp_path, content, told):
    path = tmp_path / "mcp.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="mcp_servers: ") as error:
        read_servers(path)
    assert told in str(error.value)


def test_a_file_may_name_what_the_environment_has(tmp_path):
    """qwen-code 11499, claude-code 916 and others: secrets stood in files, or `Bearer ${TOKEN}` was sent as it is."""
    path = tmp_path / "mcp.json"
    path.write_text(
        """{"mcpServers": {
        "web": {"url": "${BASE:-http://localhost:1}/mcp", "headers": {"Authorization": "Bearer ${TOKEN}"}},
        "own": {"command": "${env:TOOL}", "args": ["-k", "$TOKEN ${TOKEN}${EMPTY:-none}"],
            "env": {"KEY": "${TOKEN}"}},
        "off": {"command": "${MISSING}", "disabled": true}}}"""
    )
    environ = {"TOKEN": "s3cret", "TOOL": "tool", "EMPTY": ""}
    found = read_servers(path, environ)
    assert (found["web"].url, found["web"].headers) == (
        "http://localhost:1/mcp",
        {"Authorization": "Bearer s3cret"},
    )
    own = found["own"]
    assert (own.command, own.args, own.env) == ("tool", ("-k", "$TOKEN s3cretnone"), {"KEY": "s3cret"})
    with pytest.raises(ConfigError) as error:
        read_servers(path, {"TOOL": "tool"})
    for place in ("web.headers.Authorization", "own.args.1", "own.env.KEY"):
        assert f"mcpServers.{place}: environment variable TOKEN is not set" in str(error.value)


def test_servers_that_are_disabled_are_none(tmp_path):
    path = tmp_path / "mcp.json"
    path.write_text(
        '{"mcpServers": {"a": {"command": "x", "disabled": true}, "b": {"command": "y", "type": "stdio"}}}'
    )
    assert set(read_servers(path)) == {"b"}


@pytest.fixture(scope="module")
def client(make_model, tmp_path_factory, http_address):
    path = tmp_path_factory.mktemp("mcp") / "servers.json"
    one = {"command": sys.executable, "args": [str(PROGRAM)]}
    gone = {"url": "http://127.0.0.1:9/mcp"}
    path.write_text(json.dumps({"mcpServers": {"one": one, "web": {"url": http_address}, "gone": gone}}))
    keys = {"mcp_servers": path, "mcp_max_rounds": 3, "mcp_timeout_s": 30}
    runtime = Runtime.start(
        ServeConfig(model=str(make_model("talker", CONFIG)), name="m", max_rows=8, **keys)
    )
    try:
        with (
            serving(runtime) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as opened,
        ):
            yield opened
    finally:
        runtime.close()


def entry(label: str = "one", **fields) -> dict:
    return {"type": "mcp", "server_label": label, "require_approval": "never", **fields}


def asked(**fields) -> dict:
    """A call of `add` is all that the first answer may be; the next one is free."""
    choice = {"type": "function", "function": {"name": "add"}}
    said = {
        "model": "m",
        "messages": MESSAGES,
        "tools": [entry(allowed_tools=["add"])],
        "tool_choice": choice,
    }
    more = {"max_tokens": 120, "seed": 3, "parallel_tool_calls": False, "extra_body": {"min_tokens": 8}}
    return {**said, **more, **fields}


@pytest.mark.parametrize("label", ["one", "web"])
def test_tools_are_run_and_the_answer_goes_on_with_what_they_gave(client, label):
    fields = asked(tools=[entry(label, allowed_tools={"tool_names": ["add"]})])
    answer = client.chat.completions.create(**fields)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert message.tool_calls is None
    assert message.content
    ran = message.mcp_calls[0]
    arguments = json.loads(ran["arguments"])
    assert (ran["server_label"], ran["name"]) == (label, "add")
    assert ran["output"] == f"the sum is {arguments['a'] + arguments['b']}"
    text, calls, usage = "", [], None
    for chunk in client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **fields
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            assert not choice.delta.tool_calls
            calls += getattr(choice.delta, "mcp_calls", None) or []
    assert text == message.content
    assert [(each["arguments"], each["output"]) for each in calls] == [
        (each["arguments"], each["output"]) for each in message.mcp_calls
    ]
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def said(text: str, **fields) -> dict:
    return asked(
        tool_choice="auto", max_tokens=300, extra_body={"structured_outputs": {"choice": [text]}}, **fields
    )


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    path = tmp_path_factory.mktemp("seeing") / "servers.json"
    path.write_text(json.dumps({"mcpServers": {"one": {"command": sys.executable, "args": [str(PROGRAM)]}}}))
    keys = {"tool_call_parser": "hermes", "mcp_servers": path, "mcp_max_rounds": 1}
    with (
        running(Path(lathe.__file__).parent / "data/shapes", **keys) as (_, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as opened,
    ):
        yield opened


@pytest.mark.parametrize(
    ("arguments", "told", "num_shown"),
    [
        ({"side": 8}, "[image]", 1),
        ({"side": 16, "packed": True}, "[resource file:///notes.md]", 1),
        ({"side": 0}, "[image]", 0),
    ],
)
def test_pictures_of_a_tool_are_shown_to_a_model_that_sees(client, seeing, arguments, told, num_shown):
    """mlx-serve 309, copilot-cli 4536 and others: they were told of, and nobody saw them. What is no picture hurts no
    answer, and none hurts a model that sees nothing."""
    call = json.dumps({"name": "draw", "arguments": arguments})
    fields = said(f"<tool_call>\n{call}\n</tool_call>", tools=[entry(allowed_tools=["draw"])])
    before = num_pictures(seeing)
    for to in (client, seeing):
        message = to.chat.completions.create(**fields).choices[0].message
        assert message.mcp_calls[0]["output"] == told
    assert num_pictures(seeing) - before == num_shown


def num_pictures(of: openai.OpenAI) -> float:
    """That its model was shown."""
    text = httpx.get(f"{str(of.base_url).removesuffix('/v1/')}/metrics", timeout=60).text
    return sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("lathe_feature_queries_total")
    )


def test_rounds_are_bounded(client):
    message = client.chat.completions.create(**said(CALL)).choices[0].message
    assert [each["output"] for each in message.mcp_calls] == ["the sum is 3"] * 3
    assert message.content == CALL, "the last answer is text"


def test_a_talk_that_has_no_room_for_what_a_tool_gave_ends_there_and_tells_what_was_run(client):
    """What was done would else be lost on the client."""
    call = '<tool_call>\n{"name": "much", "arguments": {"count": 60000}}\n</tool_call>'
    fields = said(call, tools=[entry(allowed_tools=["much"])])
    choice = client.chat.completions.create(**fields).choices[0]
    assert (choice.finish_reason, choice.message.mcp_calls[0]["output"]) == ("length", "x" * 60000)
    *_, before, last = client.chat.completions.create(stream=True, **fields)
    assert last.choices[0].finish_reason == "length" or before.choices[0].finish_reason == "length"
    response = client.responses.create(
        model="m", input="x", max_output_tokens=300, tools=fields["tools"], extra_body=fields["extra_body"]
    )
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.type for item in response.output if item.type == "mcp_call"] == ["mcp_call"]


def test_calls_of_the_clients_own_tools_are_the_clients(client):
    own = {"type": "function", "function": {"name": "mine"}}
    both = CALL + '\n<tool_call>\n{"name": "mine", "arguments": {"x": 1}}\n</tool_call>'
    fields = said(both, tools=[entry(), own])
    fields["parallel_tool_calls"] = True
    for answer in (client.chat.completions.create(**fields), client.chat.completions.create(**fields)):
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, answer.choices[0].finish_reason) == ("mine", "tool_calls")
        assert not hasattr(answer.choices[0].message, "mcp_calls")
    chunks = client.chat.completions.create(stream=True, **fields)
    indices = {
        call.index for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()
    }
    assert indices == {0}


def test_what_goes_wrong_in_a_call_is_told_to_the_model(client):
    broken = CALL.replace('{"a": 1, "b": 2}', '{"a": "x"}')
    message = client.chat.completions.create(**said(broken)).choices[0].message
    assert all(each["output"].startswith("Error: ") for each in message.mcp_calls)
    failing = CALL.replace("add", "fail")
    message = client.chat.completions.create(**said(failing, tools=[entry()])).choices[0].message
    assert all("broken" in each["output"] or "Error" in each["output"] for each in message.mcp_calls)


@pytest.mark.parametrize(
    ("tool", "status", "told"),
    [
        (entry("sh"), 400, "found no MCP server 'sh'"),
        (entry(allowed_tools=["rm"]), 400, "has no tool 'rm'"),
        (entry("gone"), 424, "MCP server 'gone'"),
        (entry(server_url="http://127.0.0.1:9"), 400, "server_url: found"),
        (entry(require_approval="always"), 400, "require_approval: found"),
        ({**entry(), "command": "sh"}, 400, "command"),
    ],
)
def test_a_request_names_a_configured_server_and_nothing_else(client, tool, status, told):
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**asked(tools=[tool], tool_choice="auto"))
    assert error.value.status_code == status
    assert told in error.value.body["message"]


def test_a_server_without_a_file_runs_nothing(model_folder):
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="m"))
    with (
        closing(runtime),
        serving(runtime) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as plain,
        pytest.raises(openai.BadRequestError, match="none is configured"),
    ):
        plain.chat.completions.create(**asked(tool_choice="auto"))


def test_a_client_that_leaves_while_a_tool_runs_leaves_nothing_and_hurts_nobody(client):
    call = '<tool_call>\n{"name": "wait", "arguments": {"seconds": 30}}\n</tool_call>'
    fields = said(call, tools=[entry("web", allowed_tools=["wait"])])
    url = str(client.base_url).removesuffix("/v1/")
    begun_s = time.monotonic()
    for stream in (True, False):
        with pytest.raises(openai.APITimeoutError):
            list(client.with_options(timeout=2).chat.completions.create(stream=stream, **fields))
    again = client.chat.completions.create(**asked())
    assert again.choices[0].message.mcp_calls[0]["output"].startswith("the sum is")
    while running := httpx.get(f"{url}/v1/status").json()["requests"]:
        assert time.monotonic() - begun_s < 25, f"they wait for a tool that nobody wants: {running}"
