"""The benchmark: its client, its prompts, its arithmetic, its servers, against small real ones."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load
from mlx_lm.models import qwen3

import lathe
from serve.api.server import serving
from serve.bench import overhead, standin, wire
from serve.bench.client import Answer, Ask, ask
from serve.bench.compare import ASKED, BEST_PEER, Comparison, outcome_of
from serve.bench.contest import BARE, FEW, FEW_MIXED, LATHE, MANY, PEERS
from serve.bench.lengths import Fixed
from serve.bench.load import Round, drive
from serve.bench.process import ServerProcess
from serve.bench.prompts import PromptMaker, WordCost, fit
from serve.bench.summary import summarize
from serve.bench.sweep import Sweep, SweepRunner, count_tokens
from serve.bench.workload import Workload
from serve.config import ServeConfig
from serve.errors import ConfigError, StoppedError
from serve.model.weights import linear_modules, linear_shape
from serve.runtime import Runtime


def sse(*chunks: dict | str) -> str:
    return "".join(f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n" for c in chunks)


def piece(text: str, finish: str | None = None) -> dict:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


def answer_to(body: str, status: int = 200, endpoint: str = "chat") -> Answer:
    """What the client makes of a server that answers `body` to everything."""

    async def one() -> Answer:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=body))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return await ask(http, Ask("m", "hello", 8, endpoint))

    return asyncio.run(one())


def test_tokens_are_counted_by_the_servers_usage():
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
    got = answer_to(
        ": keep-alive\n\n" + sse(piece("one two"), piece(" three"), piece("", "length"), usage, "[DONE]")
    )
    assert (got.error, got.text, got.finish) == (None, "one two three", "length")
    assert (got.num_tokens, got.num_prompt_tokens, got.counted_by) == (5, 7, "usage")
    assert 0 <= got.first_s <= got.last_s
    assert got.tpot_s == pytest.approx((got.last_s - got.first_s) / 4)


def test_without_usage_chunks_are_counted_and_that_is_said():
    got = answer_to(sse(piece("a"), piece("b", "stop"), "[DONE]"))
    assert (got.num_tokens, got.counted_by, got.num_prompt_tokens) == (2, "chunks", None)


def test_plain_completions_are_read_too():
    got = answer_to(sse({"choices": [{"text": "x", "finish_reason": "stop"}]}), endpoint="completions")
    assert (got.error, got.text) == (None, "x")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (json.dumps({"error": {"message": "no such model"}}), 404, "HTTP 404: no such model"),
        ("<html>oops", 502, "oops"),
        (sse(piece("a")), 200, "without a finish_reason"),
        (sse(piece("a"), {"error": {"message": "engine stopped"}}), 200, "engine stopped"),
        (sse("{half"), 200, "JSONDecodeError"),
    ],
)
def test_every_failure_is_an_answer_with_an_error(body, status, said):
    assert said in answer_to(body, status).error


def test_prompts_differ_and_the_seed_repeats_them():
    one, other = PromptMaker(1), PromptMaker(1)
    prompts = [one.prompt(20) for _ in range(50)]
    assert len(set(prompts)) == 50
    assert prompts == [other.prompt(20) for _ in range(50)]


def test_word_cost_is_recovered_from_two_measurements():
    cost = WordCost(fixed=9, per_word=1.5)
    measured = [(words, round(cost.fixed + cost.per_word * words)) for words in (16, 64)]
    found = fit(*measured)
    assert found.words_for(129) == 80
    assert found.words_for(1) == 1


def made(tokens: int, first_s: float, last_s: float, error: str | None = None) -> Answer:
    return Answer("m", first_s, last_s, 10, tokens, "usage", "", "length", error)


def test_rates_count_good_answers_over_the_wall_time():
    rounds = [
        Round(2, 2.0, (made(5, 1, 2), made(5, 1, 2))),
        Round(2, 3.0, (made(5, 1, 3), made(9, 1, 2, "no"))),
    ]
    found = summarize("x", rounds)
    assert found.tokens_per_s == pytest.approx(15 / 5)
    assert (found.num_requests, found.num_errors, found.errors) == (4, 1, ("no",))
    assert found.tpot_s.max == pytest.approx(2 / 4)
    assert found.answer_tokens == {5: 3}
    assert json.dumps(found.as_json())


def test_a_comparison_cut_off_has_told_the_levels_that_all_servers_had():
    """In the second round, before the level of four clients."""
    labels = (LATHE, BARE, PEERS[0], PEERS[1], FEW_MIXED)
    rounds = {
        (label, level): [Round(level, number + 1.0, (made(5, 1, 2),))] * times
        for level, times in ((1, 2), (4, 1))
        for number, label in enumerate(labels)
    }
    told = outcome_of(rounds, ["late"]).as_json(Comparison(concurrency=(1, 4, 16), rounds=3))
    assert [(each["concurrency"], each["of"], each["to"], each["median"]) for each in told["ratios"]] == [
        (level, of, to, ratio)
        for of, to, ratio in (
            (LATHE, BARE, 2.0),
            (LATHE, PEERS[0], 3.0),
            (LATHE, PEERS[1], 4.0),
            (LATHE, BEST_PEER, 3.0),
            (FEW_MIXED, LATHE, 0.2),
        )
        for level in (1, 4)
    ]
    assert [len(each["tokens_per_s_by_round"]) for each in told["results"]] == [2] * 5 + [1] * 5
    assert json.loads(json.dumps(told))["left_out"] == ["late"]


def streamed(*arrivals_s: float) -> Answer:
    return Answer(
        "m", 1.0, 2.0, 10, len(arrivals_s), "usage", "", "length", arrivals_s=arrivals_s, start_s=0.0
    )


def test_gaps_are_of_streams_and_the_best_peer_is_the_rounds_best():
    """Two rounds in which the peers change places, in throughput and in gaps."""
    gaps = {LATHE: (2.0, 2.0), PEERS[0]: (1.0, 8.0), PEERS[2]: (4.0, 4.0)}
    walls = {LATHE: (1.0, 1.0), PEERS[0]: (2.0, 4.0), PEERS[2]: (4.0, 2.0)}
    rounds = {
        (label, 16): [
            Round(16, wall, (streamed(0.0, gap, gap + 0.5), streamed(9.0, 9.5)), cpu_s=wall / 2)
            for gap, wall in zip(gaps[label], walls[label], strict=True)
        ]
        for label in gaps
    }
    found = {(each.what, each.to): each for each in outcome_of(rounds).ratios}
    assert {what for what, _ in found} == {"tokens a second", "tokens a CPU second", "longest gap"}
    gap = found["longest gap", BEST_PEER]
    assert (gap.min, gap.max, gap.asked, gap.is_met) == (0.5, 2.0, 1.0, False)  # a median of 1.25
    speed = found["tokens a second", BEST_PEER]
    assert (speed.min, speed.max, speed.asked, speed.is_met) == (2.0, 2.0, 1.05, True)
    assert found["tokens a CPU second", PEERS[0]].max == 4.0
    assert found["tokens a CPU second", PEERS[0]].is_met is None


def test_what_is_asked_follows_the_number_of_clients():
    (best,) = (each for each in ASKED if each.to == BEST_PEER and each.what == "tokens a second")
    assert [best.bound(level) for level in (1, 4, 15, 16, 64)] == [1.0, 1.0, 1.0, 1.05, 1.05]
    assert {each.to for each in ASKED if each.of == LATHE} == {BARE, BEST_PEER, *PEERS}


class SlowServer(BaseHTTPRequestHandler):
    """Holds requests until three are inside together, and notes whether a fourth joins them."""

    gate: threading.Event
    fourth: threading.Event
    inside = 0
    most = 0
    models: list[str]
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        with kind.lock:
            kind.inside += 1
            kind.most = max(kind.most, kind.inside)
            kind.models.append(body["model"])
            is_third, is_fourth = kind.inside == 3, kind.inside == 4
        if is_fourth:
            kind.fourth.set()
        if is_third:
            kind.fourth.wait(0.3)  # nobody may come, so only the clock can end this
            kind.gate.set()
        kind.gate.wait(30)
        with kind.lock:
            kind.inside -= 1
        text = sse(piece("a", "stop")).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def test_clients_are_as_many_as_asked_for_and_no_more():
    handler = type(
        "Handler", (SlowServer,), {"gate": threading.Event(), "fourth": threading.Event(), "models": []}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        asks = [Ask(f"m{i % 2}", "x", 1) for i in range(12)]
        done = drive(f"http://127.0.0.1:{server.server_port}", asks, 3)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert handler.most == 3
    assert len(done.answers) == 12
    assert sorted(handler.models) == ["m0"] * 6 + ["m1"] * 6


@pytest.fixture(scope="module")
def url(model_folder, make_adapter):
    adapters = [{"name": f"a{i}", "path": make_adapter(i)} for i in (1, 2)]
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", adapters=adapters))
    with closing(runtime), serving(runtime) as found:
        yield found


def test_a_real_server_is_measured_with_prompts_of_the_asked_length(url, model_folder):
    extra = {"ignore_eos": True}
    workload = Workload(("lively", "a1", "a2"), Fixed(200), Fixed(6))
    runner = SweepRunner(Sweep(url, workload, extra=extra))
    runner.warm_up()
    found = summarize("x", [runner.level(2, 6)])
    assert (found.num_errors, found.answer_tokens, found.counted_by) == (0, {6: 6}, ("usage",))
    assert found.requests_by_model == {"a1": 2, "a2": 2, "lively": 2}
    assert abs(found.prompt_tokens_mean - 200) < 30  # a byte is a token here, and words differ in length
    assert 0 < found.ttft_s.p50 < found.latency_s.p50


def test_a_tokenizer_folder_counts_as_the_server_does(url, model_folder):
    prompt = PromptMaker(0).prompt(30)
    counted = drive(url, [Ask("lively", prompt, 1)], 1).answers[0].num_prompt_tokens
    assert count_tokens(model_folder, prompt, "chat") == counted


@pytest.mark.parametrize("content", [None, "", "{not json", "[]"])
def test_a_folder_without_a_tokenizer_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "tokenizer.json").write_text(content)
        (tmp_path / "folder" / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"--tokenizer: .*{tmp_path}/folder"):
        count_tokens(tmp_path / "folder", "hello", "chat")


def test_an_unknown_model_is_refused_before_anything_is_measured(url):
    with pytest.raises(ConfigError, match="nobody"):
        SweepRunner(Sweep(url, Workload(("lively", "nobody"), Fixed(20), Fixed(4)))).warm_up()


def test_bench_serve_prints_a_table_and_writes_the_same_numbers(url, tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = f"bench serve --url {url} --model lively,a1 --concurrency 1,2 --requests 4 --max-tokens 4 --ignore-eos"
    with pytest.raises(SystemExit) as stop:
        lathe.main([*words.split(), "--prompt-tokens", "60", "--json", str(out)])
    assert stop.value.code == 0
    numbers = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert [each["concurrency"] for each in numbers["results"]] == [1, 2]
    for each in numbers["results"]:
        assert each["answer_tokens"] == {"4": 4}
        assert f"{each['tokens_per_s']:.1f}" in printed


def test_chat_streams_from_a_running_server_and_takes_its_lines_from_a_pipe(url):
    command = [
        sys.executable,
        "-P",
        "-m",
        "lathe",
        "chat",
        "--url",
        url,
        "--model",
        "a1",
        "--max-tokens",
        "4",
    ]
    said = subprocess.run(
        command,
        input="hello\n/reset\n/exit\nnever\n",
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "> hello" in said.stdout
    assert "forgotten" in said.stdout
    assert "never" not in said.stdout


# The stand-in model of `bench compare`.


@pytest.fixture(scope="module")
def standin_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    standin.write_model(folder / "model", mx.float32)
    return folder


def test_the_standin_is_lively_never_stops_and_has_the_asked_size(standin_folder):
    model, tokenizer = mlx_lm_load(str(standin_folder / "model"))
    prompt = PromptMaker(1).prompt(66)
    other = " ".join(["winter", *prompt.split()[1:]])
    answers = []
    for text in (prompt, other):
        message = {"role": "user", "content": text}
        ids = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        assert len(ids) == 74
        answers.append(mlx_lm_generate(model, tokenizer, ids, max_tokens=48))
    tokens, changed = (tokenizer.encode(text) for text in answers)
    assert len(tokens) >= 40
    assert len(set(tokens)) >= 12
    assert answers[0].isascii()
    # What comes last depends on what came first, so equal answers of two servers prove something.
    assert sum(a != b for a, b in zip(tokens, changed, strict=False)) >= 20
    assert 20e6 < sum(tensor.size for _, tensor in tree_flatten(model.parameters())) < 30e6


@pytest.mark.parametrize("name", standin.SIZES)
def test_a_standins_shapes_are_those_its_config_makes(name):
    size = standin.SIZES[name]
    module = qwen3.Model(qwen3.ModelArgs.from_dict(standin.config_of(size)))  # lazy: no weight is made
    linear = {path: linear_shape(layer) for path, layer in linear_modules(module).items()}
    expected = {
        f"model.layers.{layer}.{path}": shape
        for layer in range(size.num_layers)
        for path, shape in size.shapes.items()
    }
    assert linear.pop("lm_head") == (size.hidden, size.vocabulary)
    assert linear == expected


def test_the_standins_adapters_fit_it_and_change_what_it_says(standin_folder):
    paths = standin.write_adapters(standin_folder / "adapters", 2)
    adapters = [{"name": name, "path": path} for name, path in paths.items()]
    runtime = Runtime.start(ServeConfig(model=str(standin_folder / "model"), adapters=adapters))
    try:
        with serving(runtime) as found:
            asks = [Ask(name, "time year people", 8) for name in ("model", *paths)]
            answers = drive(found, asks, 3).answers
    finally:
        runtime.close()
    assert [answer.error for answer in answers] == [None] * 3
    assert len({answer.text for answer in answers}) == 3
    assert (FEW, MANY) == (8, 32)


# Servers as processes.

HEALTHY = """
import http.server
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", {port}), Health).serve_forever()
"""


def test_a_server_process_is_up_inside_the_block_and_gone_after_it(tmp_path):
    with ServerProcess("x", [sys.executable, "-c", HEALTHY], tmp_path / "log", {"A": "1"}) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.pause()
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{server.url}/health", timeout=0.3)
        server.resume()
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.pause()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_a_server_that_does_not_start_is_quoted(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no model there')"]
    with pytest.raises(StoppedError, match="no model there"), ServerProcess("x", command, tmp_path / "log"):
        pass


@pytest.mark.parametrize(
    "words",
    [
        "bench overhead --size tiny --clients 1,3 --rounds 2 --requests 2 --alone 2 --max-tokens 6",
        "bench hostile --size tiny --rounds 1 --streams 2 --max-tokens 40",
    ],
)
def test_what_http_and_hostile_clients_cost_is_measured_with_the_same_tokens_on_both_sides(words, tmp_path):
    out = tmp_path / "numbers.json"
    with pytest.raises(SystemExit) as stop:
        lathe.main([*words.split(), "--json", str(out)])
    assert stop.value.code == 0
    written = json.loads(out.read_text())
    count = written["settings"]["rounds"]
    assert written["machine"]["system"]
    assert len(written["findings"]) == (2 * 2 if "overhead" in words else 3 * 5)
    for each in written["findings"]:
        assert len(each["ratios"]) == count
        assert all(len(values) == count for values in each["values"].values())
        assert all(value > 0 for name, values in each["values"].items() for value in values if "/s" in name)


def test_the_lean_client_counts_what_the_usage_says_and_refuses_what_is_no_stream(url):
    asked = overhead.body_of("hello there", 9) | {"model": "lively"}
    streamed = wire.stream(url, [wire.chat(url, asked)] * 5, 2)
    assert streamed.num_tokens == 45
    assert len(streamed.ttft_s) == 5
    assert 0 < min(streamed.ttft_s) <= max(streamed.ttft_s) <= streamed.wall_s
    with pytest.raises(StoppedError, match="404"):
        wire.stream(url, [wire.chat(url, asked | {"model": "nobody"})], 1)
