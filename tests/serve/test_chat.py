"""`lathe chat`: in a real pseudo-terminal against real servers, through a pipe, and as a conversation by itself."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from typer.testing import CliRunner, Result

import lathe
from serve.api.schemas import ChatBody
from serve.api.server import serving
from serve.bench.process import ServerProcess
from serve.chat import CONTROLS, Keyboard, at_terminal, from_pipe
from serve.config import ServeConfig
from serve.conversation import Conversation, Speaker
from serve.errors import LatheError, OverloadedError, RequestError, StoppedError
from serve.runtime import Runtime

LATHE = [sys.executable, "-P", "-m", "lathe"]
PASTE_START, PASTE_END = "\x1b[200~", "\x1b[201~"
ALT_ENTER, ENTER, CTRL_C, CTRL_D, CTRL_J = "\x1b\r", "\r", "\x03", "\x04", "\n"
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|.)")
WAIT_S = 60
TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Makes standard input the terminal that Ctrl-C comes from, as a shell does."""


class Terminal:
    """A program in a pseudo-terminal of its own; a context manager, after which it has ended."""

    def __init__(self, *words: str) -> None:
        self._master, slave = os.openpty()
        self.settings = termios.tcgetattr(slave)
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200"}
        command = [sys.executable, "-c", TAKE_TERMINAL, *LATHE, "chat", "--no-history", *words]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        self._slave = slave
        self._unread = ""
        self._brackets_pastes = False

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def paste(self, *lines: str) -> None:
        """Paste lines as terminals do: with carriage returns, in brackets where the program has asked for them."""
        while select.select([self._master], [], [], 0)[0]:
            self._read()
        text = "\r".join(lines)
        self.type(f"{PASTE_START}{text}{PASTE_END}" if self._brackets_pastes else text)

    def expect(self, text: str) -> str:
        """Wait until `text` is written, and return everything up to it since the last `expect`."""
        while text not in self._unread:
            self._read()
        before, self._unread = self._unread.split(text, 1)
        return before

    def expect_flow(self, num_characters: int = 400) -> str:
        """Wait until so much more is written, and return it: an answer is under way."""
        while len(self._unread) < num_characters:
            self._read()
        flow, self._unread = self._unread, ""
        return flow

    def ended(self) -> int:
        """Wait for the program's end; its exit status."""
        deadline_s = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, f"it does not end; unread: {self._unread[-2000:]!r}"
            if select.select([self._master], [], [], 0.05)[0]:
                self._read()
        return self.process.wait()

    def _read(self) -> None:
        ready, _, _ = select.select([self._master], [], [], WAIT_S)
        assert ready, f"nothing more is written; unread: {self._unread[-2000:]!r}"
        self._unread += os.read(self._master, 65536).decode(errors="replace")
        for is_on in re.findall(r"\x1b\[\?2004([hl])", self._unread):
            self._brackets_pastes = is_on == "h"
        self._unread = ESCAPES.sub("", self._unread)

    def is_restored(self) -> bool:
        """True when the terminal is set as it was before."""
        return termios.tcgetattr(self._slave) == self.settings

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


# A server that is a script: what it was asked is there to be looked at.


def sse(*chunks: dict | str) -> bytes:
    return "".join(f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n" for c in chunks).encode()


def piece(text: str, finish: str | None = None) -> dict:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


def whole(text: str) -> bytes:
    return sse(piece(text), piece("", "stop"), "[DONE]")


Reply = bytes | tuple[int, str]


@contextmanager
def scripted(*replies: Reply) -> Iterator[tuple[str, list[dict]]]:
    """A real HTTP server that gives its replies in turn, the last ever after; its address and what it was asked."""
    given = itertools.chain(replies, itertools.repeat(replies[-1]))
    with answering(lambda _: next(given)) as found:
        yield found


@contextmanager
def answering(reply_to: Callable[[dict], Reply]) -> Iterator[tuple[str, list[dict]]]:
    """As `scripted`, with replies to what it is asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, b'{"data": [{"id": "scripted"}]}')

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = reply_to(asked[-1])
            status, body = (200, reply) if isinstance(reply, bytes) else (reply[0], reply[1].encode())
            self._send(status, body)

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def contents(body: dict) -> list[str]:
    return [message["content"] for message in body["messages"]]


# The conversation by itself.


def converse(url: str) -> Conversation:
    return Conversation(Speaker(url, "scripted"), system="Be kind.")


BROKEN, GARBAGE, FAILED = (
    sse(piece("half")),
    sse(piece("half"), "{not json"),
    sse(piece("half"), {"error": "oh"}),
)
FAILURES: dict[Reply, type[LatheError]] = {
    BROKEN: StoppedError,
    GARBAGE: StoppedError,
    FAILED: StoppedError,
    sse("[1]"): StoppedError,
    b"": StoppedError,
    (400, "no"): RequestError,
    (429, "later"): OverloadedError,
    (503, '{"error": {"message": "the engine has failed"}}'): StoppedError,
}


def thought(text: str, name: str = "reasoning_content") -> dict:
    return {"choices": [{"delta": {name: text}, "finish_reason": None}]}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_dim_in_a_terminal_and_not_in_a_pipe_and_are_sent_back_as_such(name):
    reply = sse(thought("Is ", name), thought("it?\x07", name), piece("Yes."), piece("", "stop"), "[DONE]")
    shown = {}
    for is_terminal in (True, False):
        with scripted(reply) as (url, asked):
            console = Console(file=io.StringIO(), force_terminal=is_terminal)
            from_pipe(converse(url), [b"one\n", b"two\n"], console)
            shown[is_terminal] = console.file.getvalue()
        answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "Is it?\x07"}
        assert asked[1]["messages"][2] == answer
    assert shown[False] == "> one\nYes.\n> two\nYes.\n"
    told = "\x1b[2mIs \x1b[22m\x1b[2mit?\N{REPLACEMENT CHARACTER}\x1b[22m\n\nYes.\n"
    assert shown[True] == f"> one\n{told}> two\n{told}"


def test_what_was_said_survives_any_failure_and_is_sent_again():
    """Against a plain list kept beside: random answers and failures, random turns, retries and resets."""
    rng = random.Random(0)
    acts = rng.choices(("say", "retry", "reset"), (6, 4, 1), k=90)
    replies = [rng.choice([whole(f"w{i}"), whole(f"w{i}"), *FAILURES]) for i in range(90)]
    with scripted(*replies, whole("")) as (url, asked):
        chat, opening = converse(url), ["Be kind."]
        kept, before, question = opening, opening, None
        for i, act in enumerate(acts):
            if act == "reset":
                chat.reset()
                kept, question = opening, None
                continue
            if act == "say":
                before, question = kept, f"q{i}"
            elif question is None:
                with pytest.raises(RequestError, match="nothing has been asked"):
                    chat.retry()
                continue
            reply = replies[len(asked)]
            answer = chat.say(question) if act == "say" else chat.retry()
            if reply in FAILURES:
                with pytest.raises(FAILURES[reply]):
                    list(answer)
                came = "half" if reply in (BROKEN, GARBAGE, FAILED) else None
            else:
                came = "".join(answer)
            assert contents(asked[-1]) == [*before, question]
            kept = kept if came is None else [*before, question, came]
            assert contents({"messages": chat.messages}) == kept
    assert len(asked) > 60


def test_an_answer_that_nobody_reads_on_is_kept_as_far_as_it_was_read():
    with scripted(sse(piece("one"), piece("two"), piece("three", "stop"))) as (url, _):
        chat = converse(url)
        with closing(chat.say("count")) as answer:
            assert [next(answer), next(answer)] == ["one", "two"]
        assert contents({"messages": chat.messages})[1:] == ["count", "onetwo"]
        assert chat.finish is None


def echo(body: dict) -> bytes:
    return sse(json.dumps(piece(contents(body)[-1], "stop"), ensure_ascii=False), "[DONE]")


def test_any_text_reaches_the_server_and_comes_back():
    for text in ("\u2028 \u2029 \x85", "tab\there", "\N{GRINNING FACE}", "\ud83d half \udcff", "a\x00b"):
        with answering(echo) as (url, asked):
            answer = "".join(Conversation(Speaker(url, "scripted"), system=text).say(text))
        assert contents(asked[-1]) == [re.sub("[\ud800-\udfff]", "\ufffd", text)] * 2
        assert answer == asked[-1]["messages"][-1]["content"]


PIXELS = b"\x89PNG\r\n\x1a\n and so on"


def test_pictures_go_with_the_next_turn_before_its_words_and_again_when_it_is_asked_again(tmp_path):
    dropped = tmp_path / 'my cat\'s "best".png'
    dropped.write_bytes(PIXELS)
    url_of_it = f"data:image/png;base64,{base64.b64encode(PIXELS).decode()}"
    address = "https://host/dog.jpg"
    with answering(lambda body: whole("yes")) as (url, asked):
        chat = converse(url)
        for typed in (str(dropped), shlex.quote(str(dropped)), address):
            chat.show(typed)
        for ask in (lambda: chat.say("what are they?"), chat.retry, lambda: chat.say("and now?")):
            assert "".join(ask()) == "yes"
        chat.show(address)
        chat.reset()
        list(chat.say("hello"))
    question = [
        *({"type": "image_url", "image_url": {"url": each}} for each in (url_of_it, url_of_it, address))
    ]
    question.append({"type": "text", "text": "what are they?"})
    assert [contents(body) for body in asked] == [
        ["Be kind.", question],
        ["Be kind.", question],
        ["Be kind.", question, "yes", "and now?"],
        ["Be kind.", "hello"],
    ]


def test_a_picture_that_cannot_be_read_is_told_and_shows_nothing(tmp_path):
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(2**30)
    wrong = [str(tmp_path / "gone.png"), str(tmp_path), str(huge), "\x00", "x" * 5000, "'", "~nobody-here/x"]
    with answering(echo) as (url, asked):
        shown = printed(url, *(f"/image {each}" for each in wrong), "/image", "hello")
        pipe = Console(file=io.StringIO())
        with pytest.raises(RequestError, match="gone"):
            from_pipe(converse(url), [f"/image {wrong[0]}\n".encode(), b"two\n"], pipe)
    assert shown.count("expected a file or an address") == len(wrong) - 1
    assert "found 1,024 MiB; at most 64 are sent" in shown
    assert "/retry asks again)" not in shown
    assert [contents(body) for body in asked] == [["hello"]]


# The pipe.


def through_pipe(url: str, lines: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*LATHE, "chat", "--url", url], input=lines, capture_output=True, timeout=WAIT_S, check=False
    )


def test_a_pipe_gets_each_answer_to_the_byte():
    text = "a\tb :smile: [bold]c[/bold] \x1b[31m \u2028 \r\n  d\n"
    with scripted(whole(text)) as (url, asked):
        done = through_pipe(url, b"one\n\n  \ntw\xffo\n/reset\nthree\n/exit\nnever\n")
    assert (done.returncode, done.stderr) == (0, b"")
    answer = f"{text}\n".encode()
    assert done.stdout == (
        b"> one\n"
        + answer
        + "> tw\ufffdo\n".encode()
        + answer
        + b"> /reset\n(forgotten)\n> three\n"
        + answer
        + b"> /exit\n"
    )
    assert [contents(body) for body in asked] == [["one"], ["one", text, "tw\ufffdo"], ["three"]]


def test_a_pipe_ends_with_status_1_at_the_first_turn_that_fails():
    with scripted(whole("fine"), (503, "down"), whole("never")) as (url, asked):
        done = through_pipe(url, b"one\ntwo\nthree\n")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"> one\nfine\n> two\n", b"error: down\n")
    assert len(asked) == 2


@pytest.mark.parametrize("failure", FAILURES)
def test_every_failure_ends_a_pipe(failure):
    with scripted(failure, whole("never")) as (url, asked), pytest.raises(FAILURES[failure]):
        from_pipe(converse(url), [b"one\n", b"two\n"], Console(file=io.StringIO()))
    assert len(asked) == 1


# The terminal, in this process.


def printed(url: str, *messages: str, is_terminal: bool = True) -> str:
    """What `at_terminal` writes when these are typed."""
    out, typed = io.StringIO(), iter([*messages, "/exit"])
    console = Console(file=out, force_terminal=is_terminal, width=200, color_system=None)
    at_terminal(Conversation(Speaker(url, "scripted")), lambda: next(typed), console)
    return out.getvalue()


def test_no_answer_drives_the_terminal():
    controls = "".join(map(chr, (*range(32), *range(127, 160))))
    with scripted(whole(f"a{controls}b")) as (url, _):
        shown = printed(url, "hello")
    answer = shown[shown.index("a\ufffd") :].split("b\n")[0]
    assert set(answer) == {"a", "\ufffd", "\t", "\n"}


def test_paths_and_several_lines_are_said_and_unknown_commands_are_explained():
    with scripted(whole("yes")) as (url, asked):
        shown = printed(
            url, "/usr/bin/env is missing", "/reset\nthe table", "/nonsense", "/retryy", "/* c */"
        )
    assert [contents(body)[-1] for body in asked] == [
        "/usr/bin/env is missing",
        "/reset\nthe table",
        "/* c */",
    ]
    assert shown.count("/retry asks again") == 3


def test_an_answer_cut_by_its_length_says_so():
    with scripted(sse(piece("a", "length"), "[DONE]")) as (url, _):
        assert "--max-tokens" in printed(url, "hello")


def test_retry_before_anything_was_asked_says_so():
    with scripted(whole("yes")) as (url, asked):
        assert "nothing has been asked" in printed(url, "/retry")
    assert not asked


def typed(keys: str) -> list[str]:
    """The messages that these keys, and Ctrl-D after them, make."""
    with create_pipe_input() as keyboard:
        keyboard.send_text(keys + CTRL_D)
        read, messages = Keyboard(keyboard, DummyOutput()).read, []
        while True:
            try:
                messages.append(read())
            except EOFError:
                return messages
            except KeyboardInterrupt:
                messages.append("(interrupted)")


def test_any_lines_that_are_pasted_or_typed_are_one_message():
    rng = random.Random(2)
    keys, messages = "", []
    for _ in range(60):
        lines = ["".join(rng.choices('ab é日/ "{', k=rng.randrange(9))) for _ in range(rng.randrange(1, 6))]
        ending = rng.choice(("\n", "\r\n", "\r"))
        pasted = PASTE_START + ending.join(lines) + PASTE_END
        for text in (pasted, CTRL_J.join(lines), ALT_ENTER.join(lines)):
            keys += text + ENTER
            messages.append("\n".join(lines))
    assert typed(keys) == messages


def test_ctrl_c_at_the_prompt_drops_what_stands_there_and_goes_on():
    assert typed(f"half{CTRL_C}{CTRL_C}whole{ENTER}") == ["(interrupted)", "(interrupted)", "whole"]


# Servers with a model, and terminals with a program.


@pytest.fixture(scope="module")
def endless_folder(model_folder, tmp_path_factory) -> Path:
    """The lively model without an end token: nothing but a limit or an interrupt ends its answers."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(model_folder, folder)
    for name, changes in {
        "config.json": {"max_position_embeddings": 2**17},
        "tokenizer_config.json": {},
    }.items():
        settings = {**json.loads((folder / name).read_text()), **changes}
        left = {key: value for key, value in settings.items() if key not in ("eos_token_id", "eos_token")}
        (folder / name).write_text(json.dumps(left))
    return folder


@pytest.fixture(scope="module")
def one_row(endless_folder) -> Iterator[str]:
    """A server with a single row: an answer begins only when the one before it has left the engine."""
    runtime = Runtime.start(ServeConfig(model=str(endless_folder), name="endless", max_rows=1))
    with closing(runtime), serving(runtime) as url:
        yield url


ENDLESS = 2**17 - 2**12
"""Tokens; minutes of them."""


class Hand(io.StringIO):
    """A screen before which somebody presses Ctrl-C at every eighth piece of an answer, and once more too late."""

    num_pieces = 0

    def write(self, text: str) -> int:
        is_piece = bool(text.strip()) and not text.strip().startswith(("endless.", "("))
        self.num_pieces += is_piece
        if "(stopped)" in text or (is_piece and self.num_pieces % 8 == 0):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_takes_the_row_out_of_an_engine_in_the_same_process(one_row):
    chat = Conversation(Speaker(one_row, "endless", sampling={"max_tokens": ENDLESS}))
    messages, screen, before = (
        iter(["one", "two", "/retry", "/exit"]),
        Hand(),
        signal.getsignal(signal.SIGINT),
    )
    at_terminal(chat, lambda: next(messages), Console(file=screen, width=200))
    assert screen.getvalue().count("(stopped)") == 3
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert all(message["content"] for message in chat.messages)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("where", ["a model of its own", "a running server"])
def test_ctrl_c_in_a_terminal_ends_the_answer_and_ctrl_d_the_program(where, one_row, endless_folder):
    words = ["--url", f"{one_row}/v1"] if where == "a running server" else [str(endless_folder)]
    with Terminal(*words, "--max-tokens", str(ENDLESS)) as terminal:
        terminal.expect("you:")
        for _ in range(2):
            terminal.type(f"hello{ENTER}")
            terminal.expect_flow()
            terminal.type("typed meanwhile")
            assert "typed" not in terminal.expect_flow()
            terminal.type(CTRL_C)
            terminal.expect("(stopped)")
            terminal.expect("you:")
        terminal.type(CTRL_C)
        terminal.expect("Ctrl-D or /exit ends")
        terminal.type(CTRL_D)
        assert terminal.ended() == 0
        assert terminal.is_restored()


def test_three_pasted_lines_are_one_message_in_a_terminal():
    with scripted(whole("understood")) as (url, asked), Terminal("--url", url) as terminal:
        terminal.expect("you:")
        terminal.paste("def f():", "    return 1", "f()")
        terminal.expect("f()")
        terminal.type(ENTER)
        terminal.expect("understood")
        terminal.type(f"one{ALT_ENTER}two{CTRL_J}three{ENTER}")
        terminal.expect("understood")
        terminal.type(CTRL_D)
        assert terminal.ended() == 0
    assert [contents(body)[-1] for body in asked] == ["def f():\n    return 1\nf()", "one\ntwo\nthree"]


def test_what_is_typed_and_pasted_during_an_answer_is_the_next_message():
    is_asked, may_answer = threading.Event(), threading.Event()

    def reply(body: dict) -> bytes:
        is_asked.set()
        may_answer.wait(WAIT_S)
        return echo(body)

    with answering(reply) as (url, asked), Terminal("--url", url) as terminal:
        terminal.expect("you:")
        terminal.type(f"first{ENTER}")
        assert is_asked.wait(WAIT_S)
        terminal.type("now ")
        terminal.paste("one", "two", "three")
        terminal.type(f"!{ENTER}/exit{ENTER}")
        may_answer.set()
        assert terminal.ended() == 0
        assert terminal.is_restored()
    assert [contents(body)[-1] for body in asked] == ["first", "now one\ntwo\nthree!"]


@pytest.mark.parametrize("moment", ["prompt", "answer"])
def test_sigterm_ends_the_program_and_leaves_the_terminal_as_it_was(moment, one_row):
    with Terminal("--url", one_row, "--max-tokens", str(ENDLESS)) as terminal:
        terminal.expect("you:")
        if moment == "answer":
            terminal.type(f"hello{ENTER}")
            terminal.expect_flow()
        terminal.process.terminate()
        assert terminal.ended() == 143
        assert terminal.is_restored()


def test_a_talk_outlives_the_server(endless_folder, tmp_path):
    serve = [*LATHE, "serve", str(endless_folder), "--port", "{port}"]
    with ServerProcess("lathe", serve, tmp_path / "log") as server:
        address = re.findall(r"at (http\S+)", server.log.read_text())[-1]
        with Terminal("--url", address, "--max-tokens", str(ENDLESS)) as terminal:
            terminal.expect("you:")
            terminal.type(f"hello{ENTER}")
            terminal.expect_flow()
            os.kill(server.pid, signal.SIGKILL)
            terminal.expect("the connection broke")
            terminal.expect("kept as far as it came; /retry asks again")
            terminal.expect("you:")
            terminal.type(f"still there?{ENTER}")
            terminal.expect("Connection refused")
            terminal.expect("the conversation is as it was; /retry asks again")
            server.stop()
            server.start()
            server.wait_ready()
            terminal.type(f"/retry{ENTER}")
            terminal.expect_flow()
            terminal.type(CTRL_C)
            terminal.expect("(stopped)")
            terminal.type(CTRL_D)
            assert terminal.ended() == 0


DRAWN = {
    **{"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.125, "top_n_sigma": 1.5, "seed": 11},
    **{"xtc_probability": 0.25, "xtc_threshold": 0.0625, "repetition_penalty": 1.5, "presence_penalty": 0.5},
    **{"frequency_penalty": -0.5, "max_tokens": 9, "enable_thinking": False, "thinking_budget": 6},
}


def test_each_option_of_chat_about_drawing_reaches_the_server_and_what_is_left_out_is_not_sent():
    params = {each.name for each in typer.main.get_command(lathe.app).commands["chat"].params}
    assert params - set(DRAWN) == {"model", "adapter", "url", "to", "system", "api_key", "history"}
    for options in ({}, DRAWN):
        words = []
        for name, value in options.items():
            option = name.replace("_", "-")
            words += [f"--no-{option}"] if value is False else [f"--{option}", str(value)]
        with answering(lambda body: whole("yes")) as (url, asked):
            result = CliRunner().invoke(lathe.app, ["chat", "--url", url, *words], input="hello\n")
        assert result.exit_code == 0, result.output
        sent = {name: value for name, value in asked[-1].items() if name in DRAWN}
        assert sent == (options or {"max_tokens": 512})
        assert ChatBody(**asked[-1])


# Adapters, system prompts, rows and earlier talks.


def test_an_adapter_answers_from_the_moment_it_is_named(model_folder, make_adapter):
    config = ServeConfig(
        model=str(model_folder), name="base", adapters=[{"name": "mine", "path": str(make_adapter(1))}]
    )
    runtime, out = Runtime.start(config), io.StringIO()
    try:
        with serving(runtime) as url:
            speaker = Speaker(url, "base", sampling={"max_tokens": 12, "temperature": 0})
            talk = Conversation(speaker)
            lines = f"""hi|/adapter|/adapter mine|/reset|hi|/adapter gone|/reset|hi|/adapter other = {make_adapter(2)}
            |/reset|hi|/model|/adapter mine@1|/reset|hi|/adapter none|/reset|hi|/model other|/model gone|/reset|hi
            |/model mine@9|/adapter mine@9|/model mine:0.5+other@1|/adapter a + b|/model base|/reset|hi|/exit"""
            typed = iter(line.strip() for line in lines.split("|"))
            at_terminal(talk, lambda: next(typed), Console(file=out, force_terminal=True, width=500))
            alone = {}
            for name in ("base", "mine", "other"):
                alone[name] = "".join(Conversation(replace(speaker, model=name)).say("hi"))
    finally:
        runtime.close()
    shown = ESCAPES.sub("", out.getvalue())
    assert len(set(alone.values())) == 3
    answers = re.findall("|".join(re.escape(text.translate(CONTROLS)) for text in alone.values()), shown)
    by_text = {text.translate(CONTROLS): name for name, text in alone.items()}
    answered = ["base", "mine", "mine", "other", "mine", "base", "other", "base"]
    assert [by_text[text] for text in answers] == answered
    for told in (
        "(mine)", "'gone' is loaded; found: mine", "(base, mine, other (answers))", "(now mine@1)",
        f"{url} has no model 'gone'; it has: base, mine, other", "no model 'mine@9'", "no adapter 'mine@9'",
        "(now mine:0.5+other@1)", "no adapter 'a + b'",
    ):  # fmt: skip
        assert told in shown
    assert (talk.model, talk.num_asked) == ("base", 8)


def test_a_system_prompt_set_in_the_talk_is_sent_from_then_on_and_forgets_nothing():
    with answering(echo) as (url, asked):
        shown = printed(
            url,
            "one",
            "/system",
            "/system Be brief.",
            "two",
            "/retry",
            "/system none",
            "three",
            "/reset",
            "four",
        )
    roles = [[message["role"][0] for message in body["messages"]] for body in asked]
    assert ["".join(each) for each in roles] == ["u", "suau", "suau", "uauau", "u"]
    assert asked[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert shown.count("(system prompt: none)") == 2
    assert "(system prompt: Be brief.)" in shown


def test_a_talk_is_saved_as_rows_that_a_recipe_takes(tmp_path):
    file = tmp_path / "my talks.jsonl"
    file.write_bytes(b'{"messages": []}')
    with answering(echo) as (url, _):
        talk = (
            "/system Kind.",
            "/save nowhere",
            "h\u00e9",
            f"/save '{file}'",
            "/reset",
            "two",
            f"/save {file}",
        )
        shown = printed(url, *talk, f"/save {tmp_path}", "/save")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [[message["role"][0] for message in row["messages"]] for row in rows] == [
        [],
        ["s", "u", "a"],
        ["s", "u", "a"],
    ]
    assert rows[1]["messages"][1]["content"] == "h\u00e9"
    assert "nothing has been said yet" in shown
    assert f"{tmp_path}: cannot be written" in shown
    assert not Path("nowhere").exists()


def test_what_was_typed_in_earlier_talks_comes_back_by_the_arrow_key(tmp_path):
    history = tmp_path / "deep" / "history"
    up = "\x1b[A"
    for keys, messages in (
        (f"one{ENTER}two{CTRL_J}lines{ENTER}", ["one", "two\nlines"]),
        (f"{up}{up}{ENTER}", ["two\nlines"]),
    ):
        with create_pipe_input() as keyboard:
            keyboard.send_text(keys + CTRL_D)
            read = Keyboard(keyboard, DummyOutput(), history).read
            assert [read() for _ in messages] == messages
    assert history.stat().st_mode & 0o777 == 0o600
    assert Keyboard(history=Path("/dev/null/none/history"))


def test_a_history_that_has_grown_large_forgets_its_older_half(tmp_path):
    history = tmp_path / "history"
    entry = "\n# 2026-11-26 22:00:00\n+{:06d}\n+" + "x" * 500 + "\n"
    history.write_text("".join(entry.format(n) for n in range(4000)))
    Keyboard(history=history)
    kept = re.findall(r"^\+(\d{6})$", history.read_text(), re.MULTILINE)
    assert 1900 < len(kept) < 2100
    assert kept == [f"{n:06d}" for n in range(4000 - len(kept), 4000)]
    assert history.read_text().startswith("\n\n# ")


# lathe generate.


def generated(*words: str, stdin: str = "") -> Result:
    return CliRunner().invoke(lathe.app, ["generate", *words], input=stdin)


ANSWERED = sse(
    thought("Hm."),
    piece("Yes"),
    piece("!", "stop"),
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}},
    "[DONE]",
)


def test_generate_prints_the_answer_alone_and_tells_the_rest_where_it_is_asked_to(tmp_path):
    with scripted(ANSWERED) as (url, asked):
        plain = generated("--url", url, "-p", "hello")
        told = generated("--url", url, "--verbose", "--json", str(tmp_path / "a.json"), stdin="hello\n")
        as_json = generated("--url", url, "-p", "-", "--json", "-", stdin="hello\n")
    assert (plain.stdout, plain.stderr) == ("Yes!\n", "")
    assert told.stdout == "Yes!\n"
    assert "7 tokens of prompt, 3 of answer" in told.stderr
    for numbers in (json.loads(as_json.stdout), json.loads((tmp_path / "a.json").read_text())):
        assert (numbers["text"], numbers["reasoning"], numbers["finish_reason"]) == ("Yes!", "Hm.", "stop")
        assert numbers["usage"]["completion_tokens"] == 3
        assert 0 < numbers["first_token_s"] <= numbers["total_s"]
    assert [contents(body) for body in asked] == [["hello"]] * 3
    assert asked[0]["model"] == "scripted"


def test_each_option_of_generate_about_drawing_reaches_the_server(tmp_path):
    params = {each.name for each in typer.main.get_command(lathe.app).commands["generate"].params}
    assert params > set(DRAWN)
    words = ["--no-enable-thinking"]
    for name, value in DRAWN.items():
        words += [] if name == "enable_thinking" else [f"--{name.replace('_', '-')}", str(value)]
    words += ["--stop", "END", "--extra-eos-token", "<eos>", "--chat-template-config", '{"tone": "kind"}']
    words += [
        "--field",
        "min_tokens=3",
        "--field",
        "user=maria",
        "--prefill-response",
        "So",
        "--system",
        "Be.",
    ]
    with scripted(ANSWERED) as (url, asked):
        assert generated("--url", url, "-p", "hello", *words).exit_code == 0
    body = ChatBody(**asked[0])
    assert {name: asked[0][name] for name in DRAWN} == DRAWN
    assert (body.stop, body.min_tokens, body.user) == (["END", "<eos>"], 3, "maria")
    assert body.chat_template_kwargs == {"tone": "kind"}
    assert [message["role"] for message in asked[0]["messages"]] == ["system", "user", "assistant"]
    assert body.continue_final_message


def test_generate_shows_files_before_the_prompt(tmp_path):
    for name in ("a.png", "b.mp4", "c.wav"):
        (tmp_path / name).write_bytes(name.encode())
    media = [
        "--image",
        str(tmp_path / "a.png"),
        "--image",
        "http://host/x.png",
        "--video",
        str(tmp_path / "b.mp4"),
    ]
    with scripted(ANSWERED) as (url, asked):
        assert (
            generated("--url", url, "-p", "what?", *media, "--audio", str(tmp_path / "c.wav")).exit_code == 0
        )
    parts = asked[0]["messages"][0]["content"]
    coded = {name: base64.b64encode(name.encode()).decode() for name in ("a.png", "b.mp4", "c.wav")}
    assert parts == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded['a.png']}"}},
        {"type": "image_url", "image_url": {"url": "http://host/x.png"}},
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{coded['b.mp4']}"}},
        {"type": "input_audio", "input_audio": {"data": coded["c.wav"], "format": "wav"}},
        {"type": "text", "text": "what?"},
    ]
    ChatBody(**asked[0])


def test_a_failure_of_generate_ends_with_status_1_and_an_answer_cut_off_is_none():
    with scripted((503, "down"), BROKEN) as (url, _):
        for said in ("down", "the stream ended before the answer did"):
            done = subprocess.run(
                [*LATHE, "generate", "--url", url, "-p", "x"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 1
            assert said in done.stderr


def test_generate_loads_a_model_with_its_adapter_and_goes_on_from_a_prompt_as_it_is(
    model_folder, make_adapter
):
    words = [str(model_folder), "-p", "hello", "--max-tokens", "12", "--temp", "0", "--json", "-"]
    adapter = str(make_adapter(1))
    told = [
        json.loads(generated(*words, *more).stdout)
        for more in (
            (),
            ("--adapter-path", adapter),
            ("--adapter", f"mine={adapter}"),
            ("--ignore-chat-template",),
        )
    ]
    base, by_path, by_name, as_it_is = told
    assert by_path["model"] == Path(adapter).name
    assert by_name["model"] == "mine"
    assert by_path["text"] == by_name["text"] != base["text"]
    assert as_it_is["usage"]["prompt_tokens"] < base["usage"]["prompt_tokens"]
    assert as_it_is["text"] != base["text"]
    both = generated(*words, "--adapter", f"a={adapter}", "--adapter", f"b={make_adapter(2)}", "--model", "a")
    assert json.loads(both.stdout)["text"] == by_name["text"]
