"""What `lathe bench serve` sends and when, and what it makes of the answers; in the end against a real server."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections import Counter
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

import lathe
from serve.api.server import serving
from serve.bench import goodput as good
from serve.bench import lengths, plots
from serve.bench.arrivals import offsets
from serve.bench.client import Answer, Ask
from serve.bench.dataset import read
from serve.bench.goodput import Objective, goodput
from serve.bench.lengths import Fixed, Lognormal, Uniform
from serve.bench.load import Round, TimeLimit, drive, drive_open
from serve.bench.prompts import WORDS, WordCost
from serve.bench.summary import notes, summarize
from serve.bench.sweep import Sweep
from serve.bench.workload import Prefixes, Shown, Workload, WorkloadMaker
from serve.bench.zipf import Zipf
from serve.config import ServeConfig
from serve.errors import ConfigError
from serve.runtime import Runtime

ROOT = Path(lathe.__file__).parent
WORD = WordCost(fixed=8, per_word=1)


def requests_of(workload: Workload, count: int) -> list:
    return list(islice(WorkloadMaker(workload, WORD), count))


# Lengths.


@pytest.mark.parametrize(
    ("text", "low", "high", "median"),
    [
        ("128", 128, 128, 128),
        ("uniform:64:512", 64, 512, 288),
        ("lognormal:100:0.8", 1, 1600, 100),
        ("lognormal:100:0.8:300", 1, 300, 100),
        ("lognormal:7:0", 7, 7, 7),
    ],
)
def test_lengths_are_drawn_as_they_are_written(text, low, high, median):
    found = lengths.parse(text, "--prompt-tokens")
    drawn = random.Random(0)
    values = [found.draw(drawn) for _ in range(4000)]
    assert low <= min(values) <= max(values) <= high
    assert np.median(values) == pytest.approx(median, rel=0.06)
    assert lengths.parse(str(found), "--prompt-tokens") == found
    if "lognormal:100" in text:
        assert np.std(np.log([v for v in values if v < high])) > 0.3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "1.5",
        "uniform",
        "uniform:1",
        "uniform:9:3",
        "uniform:1:2:3",
        "lognormal:10",
        "normal:1:2",
        "lognormal:10:-1",
        "lognormal:10:nan",
        "lognormal:10:1:5",
        "lognormal:0:1",
        "99999999",
        "lognormal:10:9",
    ],
)
def test_lengths_that_mean_nothing_are_refused_by_the_options_name(text):
    with pytest.raises(ConfigError, match="--max-tokens: found"):
        lengths.parse(text, "--max-tokens")


# Arrivals, and Zipf's law.


@pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5), (math.inf, 0.0)])
def test_arrivals_have_their_rate_and_are_as_bursty_as_asked(burstiness, spread):
    at_s = offsets(4000, 20.0, burstiness, random.Random(3))
    gaps = np.diff(at_s)
    assert at_s[0] == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.1, abs=1e-6)


def test_a_burst_comes_all_at_once():
    assert offsets(5, math.inf, 1.0, random.Random(0)) == [0.0] * 5


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_zipf_draws_the_kth_as_often_as_it_says(exponent):
    zipf, drawn = Zipf(50, exponent), random.Random(1)
    counts = Counter(zipf.draw(drawn) for _ in range(40_000))
    for rank in (0, 1, 4, 9):
        assert counts[rank] / counts[0] == pytest.approx((rank + 1) ** -exponent, rel=0.15)
    assert zipf.share(50) == pytest.approx(1)
    assert zipf.share(8) == pytest.approx(sum(counts[k] for k in range(8)) / 40_000, rel=0.03)


# Workloads.


def test_the_same_seed_gives_the_same_requests_and_another_one_others():
    workload = Workload(("a", "b"), Uniform(20, 60), Lognormal(9, 0.5, 30), 1.0, Prefixes(3, 16))
    assert requests_of(workload, 40) == requests_of(workload, 40)
    other = Workload(**{**vars(workload), "seed": 1})
    assert requests_of(workload, 40) != requests_of(other, 40)


def test_models_take_turns_or_are_drawn_as_zipf_has_it():
    names = tuple(f"m{i}" for i in range(5))
    turns = requests_of(Workload(names, Fixed(20), Fixed(4)), 10)
    assert [each.model for each in turns] == [*names, *names]
    counts = Counter(each.model for each in requests_of(Workload(names, Fixed(20), Fixed(4), 1.0), 6000))
    for rank, name in enumerate(names):
        assert counts[name] * (rank + 1) == pytest.approx(counts["m0"], rel=0.2)


def test_prompts_behind_shared_prefixes_have_words_of_their_own():
    workload = Workload(("m",), Fixed(30), Fixed(4), prefixes=Prefixes(3, 40, exponent=1.0))
    prompts = [each.prompt.split() for each in requests_of(workload, 300)]
    assert {len(words) for words in prompts} == {40 + 22}
    starts = Counter(tuple(words[:40]) for words in prompts)
    assert len(starts) == 3
    assert len({tuple(words[40:]) for words in prompts}) == 300
    assert max(starts.values()) > 1.4 * min(starts.values())
    assert set().union(*prompts) <= set(WORDS)


LINES = [
    {"prompt": "hello there", "output_tokens": 3, "label": "not read"},
    {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "max_tokens": 5,
    },
    {"prompt_tokens": 50},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "left out"}]},
]


def test_a_file_gives_texts_chats_and_lengths_over_and_over(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    found = requests_of(Workload(("m",), Fixed(99), Fixed(7), dataset=read(path)), 8)
    assert [each.max_tokens for each in found] == [3, 5, 7, 7] * 2
    assert [each.prompt for each in found[:2]] == ["hello there", "hi"]
    assert [len(each.history) for each in found[:4]] == [0, 1, 0, 0]
    assert found[1].history[0] == {"role": "system", "content": "be brief"}
    assert len(found[2].prompt.split()) == 42
    assert found[2].prompt != found[6].prompt
    assert found[3].prompt == "hi"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{half", "no JSON"),
        ("[1]", "JSON object"),
        ("{}", "found none of"),
        ('{"prompt": "a", "prompt_tokens": 3}', "expected one"),
        ('{"prompt": ""}', "expected text"),
        ('{"prompt": 5}', "expected text"),
        ('{"prompt": "a", "output_tokens": 1, "max_tokens": 1}', "one of them"),
        ('{"prompt": "a", "output_tokens": true}', "output_tokens is True"),
        ('{"prompt_tokens": 0}', "prompt_tokens is 0"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "messages"),
    ],
)
def test_a_line_that_is_no_request_is_named_by_its_number(line, said, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ConfigError, match=r"lines\.jsonl:2") as refused:
        read(path)
    assert said in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_lines_is_refused_by_its_name(content, tmp_path):
    path = tmp_path / "none.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--dataset-path: .*none.jsonl"):
        read(path)


# Goodput, gaps and errors.


def answer(first_s: float | None, last_s: float | None, tokens: int, kind: str | None = None) -> Answer:
    arrivals = () if first_s is None else tuple(np.linspace(first_s, last_s, tokens))
    return Answer(
        "m", first_s, last_s, 9, tokens, "usage", "", "length", kind and f"{kind}: x", None, arrivals, kind
    )


def test_goodput_counts_those_that_kept_every_bound_over_all_requests():
    objective = good.parse(["ttft:500", "tpot:100,e2el:3000"])
    assert objective == Objective(0.5, 0.1, 3.0)
    cases = {
        True: [answer(0.5, 1.5, 11), answer(0.2, 0.2, 1), answer(0.1, 3.0, 41)],
        False: [
            answer(0.51, 1.0, 11),  # first token
            answer(0.2, 1.3, 11),  # time per token
            answer(0.4, 3.1, 41),  # the whole
            answer(0.1, 0.2, 11, "HTTP 503"),
            answer(None, None, 0),
        ],
    }
    for expected, answers in cases.items():
        assert [objective.is_met(each) for each in answers] == [expected] * len(answers)
    found = goodput([*cases[True], *cases[False]], 2.0, objective)
    assert (found.requests_per_s, found.share, found.objective) == (1.5, 3 / 8, "ttft:500 tpot:100 e2el:3000")
    assert Objective().is_met(answer(99.0, 999.0, 2))


@pytest.mark.parametrize("texts", [["ttft"], ["ttft:"], ["ttft:0"], ["ttft:nan"], ["p:5"], ["tpot:1 tpot:2"]])
def test_an_objective_that_says_nothing_is_refused(texts):
    with pytest.raises(ConfigError, match="--goodput: "):
        good.parse(texts)


def test_gaps_are_within_streams_and_errors_are_counted_by_kind():
    answers = (
        answer(1.0, 2.0, 11),
        answer(5.0, 5.4, 2),
        answer(0.1, 9.9, 2, "HTTP 503"),
        answer(None, None, 0, "HTTP 503"),
        answer(None, None, 0, "ReadError"),
    )
    found = summarize("x", [Round(4, 2.0, answers, 2.5, (0.0, 0.2))], Objective(1.0))
    assert found.gap_s.p50 == pytest.approx(0.1)
    assert found.gap_s.max == pytest.approx(0.4)
    assert found.gap_s.p50 <= found.gap_s.p95 <= found.gap_s.p99 <= found.gap_s.max
    assert found.errors_by_kind == {"HTTP 503": 2, "ReadError": 1}
    assert (found.num_errors, found.goodput.share, found.request_rate) == (3, 0.2, 2.5)
    said = notes([found])
    assert "errors: 2 HTTP 503, 1 ReadError" in said
    assert any("200 ms after their time" in note for note in said)
    burst = summarize("x", [Round(4, 2.0, answers, math.inf)])
    assert json.loads(json.dumps(burst.as_json(), allow_nan=False))["request_rate"] == "inf"


# When requests are sent.


class Recorder(BaseHTTPRequestHandler):
    """Notes when requests come and how many are inside; answers once `gate` is open, in pieces."""

    protocol_version = "HTTP/1.1"
    gate: threading.Event
    arrived: list[float]
    lock = threading.Lock()
    inside = 0
    most = 0
    pieces = 2

    def do_POST(self) -> None:
        kind = type(self)
        self.rfile.read(int(self.headers["Content-Length"]))
        with kind.lock:
            kind.arrived.append(time.perf_counter())
            kind.inside += 1
            kind.most = max(kind.most, kind.inside)
        kind.gate.wait(30)
        with kind.lock:
            kind.inside -= 1
        piece = {"choices": [{"delta": {"content": "a"}}]}
        last = {"choices": [{"delta": {"content": "a"}, "finish_reason": "length"}]}
        text = "".join(
            f"data: {json.dumps(each)}\n\n" for each in [piece] * (kind.pieces - 1) + [last]
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def recording():
    """recording(is_open) → (address, the handler's class)."""
    servers = []

    def start(is_open: bool = True):
        handler = type("Handler", (Recorder,), {"gate": threading.Event(), "arrived": []})
        if is_open:
            handler.gate.set()
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread, handler))
        return f"http://127.0.0.1:{server.server_port}", handler

    yield start
    for server, thread, handler in servers:
        handler.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


def asks(count: int) -> list[Ask]:
    return [Ask("m", f"hello {number}", 2) for number in range(count)]


def test_an_open_loop_sends_each_request_at_its_time_whatever_became_of_the_others(recording):
    url, handler = recording(is_open=False)
    at_s = [0.0, 0.1, 0.2, 0.3]
    done: list[Round] = []
    thread = threading.Thread(target=lambda: done.append(drive_open(url, asks(4), at_s, 10.0)))
    thread.start()
    # Nobody has been answered, and all of them come.
    deadline_s = time.monotonic() + 30
    while len(handler.arrived) < 4 and time.monotonic() < deadline_s:
        handler.gate.wait(0.01)
    handler.gate.set()
    thread.join(60)
    (found,) = done
    assert [each.error for each in found.answers] == [None] * 4
    assert (found.request_rate, len(found.late_s)) == (10.0, 4)
    assert all(late >= 0 for late in found.late_s)
    starts = [each.start_s for each in found.answers]
    assert all(later - earlier >= 0.05 for earlier, later in pairwise(starts))
    assert handler.most == 4


def test_an_open_loop_keeps_to_the_most_that_may_be_under_way(recording):
    url, handler = recording(is_open=False)
    done: list[Round] = []
    thread = threading.Thread(
        target=lambda: done.append(drive_open(url, asks(12), [0.0] * 12, math.inf, max_concurrency=3))
    )
    thread.start()
    deadline_s = time.monotonic() + 30
    while len(handler.arrived) < 3 and time.monotonic() < deadline_s:
        handler.gate.wait(0.01)
    handler.gate.wait(0.3)  # nobody may come, so only the clock can end this
    handler.gate.set()
    thread.join(60)
    (found,) = done
    assert len(found.answers) == 12
    assert handler.most == 3
    assert found.concurrency == 3


def test_after_the_time_limit_nothing_is_sent_and_the_running_are_cut_off(recording):
    url, handler = recording(is_open=False)
    found = drive(url, (each for each in iter(lambda: asks(1)[0], None)), 2, limit=TimeLimit(0.1, 0.4))
    assert [each.error_kind for each in found.answers] == ["cut off"] * 2
    assert len(handler.arrived) == 2
    assert 0.3 < found.wall_s < 20
    handler.gate.set()
    late = drive_open(url, asks(3), [0.0, 0.05, 60.0], 10.0, limit=TimeLimit(0.2, 30.0))
    assert [each.error for each in late.answers] == [None] * 2
    assert late.wall_s < 30


def test_an_endless_supply_ends_with_the_time_limit(recording):
    url, handler = recording()
    found = drive(url, iter(lambda: asks(1)[0], None), 2, limit=TimeLimit(0.3, 30.0))
    assert {each.error for each in found.answers} == {None}
    assert len(found.answers) == len(handler.arrived) >= 2


# The whole, against a real server.


@pytest.fixture(scope="module")
def url(model_folder, make_adapter):
    adapters = [{"name": f"a{i}", "path": make_adapter(i)} for i in (1, 2, 3)]
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", adapters=adapters))
    with closing(runtime), serving(runtime) as found:
        yield found


def run(words: str, out) -> dict:
    with pytest.raises(SystemExit) as stop:
        lathe.main([*words.split(), "--json", str(out)])
    assert stop.value.code == 0
    return json.loads(out.read_text())


def test_closed_loops_with_lengths_prefixes_and_zipf_give_numbers_and_a_picture(url, tmp_path):
    told = run(
        f"bench serve --url {url} --adapters 3 --zipf 1 --concurrency 1,3 --requests 12 --ignore-eos "
        f"--prompt-tokens uniform:150:250 --max-tokens uniform:2:6 --num-prefixes 2 --prefix-tokens 100 "
        f"--goodput ttft:60000 --png {tmp_path}/picture.png",
        tmp_path / "out.json",
    )
    assert [each["concurrency"] for each in told["results"]] == [1, 3]
    for each in told["results"]:
        assert (each["num_errors"], each["num_requests"]) == (0, 12)
        assert set(each["requests_by_model"]) <= {"a1", "a2", "a3"}
        assert sum(each["requests_by_model"].values()) == 12
        assert {int(length) for length in each["answer_tokens"]} <= set(range(2, 7))
        assert each["prompt_tokens_mean"] > 220  # a prefix, and a prompt behind it
        assert each["goodput"]["share"] == 1.0
        for spread in (each["ttft_s"], each["gap_s"]):
            assert 0 <= spread["p50"] <= spread["p95"] <= spread["p99"] <= spread["max"]
    assert told["settings"]["workload"]["prompt_tokens"] == "uniform:150:250"
    assert "api_key" not in told["settings"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_open_loops_run_at_rates_and_a_file_says_what_is_asked(url, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    told = run(
        f"bench serve --url {url} --model lively --request-rate 40,inf --requests 8 --max-tokens 4 "
        f"--dataset-path {path} --ignore-eos --time-limit 60",
        tmp_path / "out.json",
    )
    assert [each["request_rate"] for each in told["results"]] == [40.0, "inf"]
    for each in told["results"]:
        assert (each["num_errors"], each["num_requests"]) == (0, 8)
        assert each["answer_tokens"] == {"3": 2, "4": 4, "5": 2}
        assert each["late_s"]["max"] >= 0


def test_errors_of_a_real_server_are_counted_and_do_not_end_the_run(url, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "fine"}\n' + json.dumps({"prompt": "far too long " * 400}))
    told = run(
        f"bench serve --url {url} --model lively --concurrency 2 --requests 6 --max-tokens 3 --ignore-eos "
        f"--dataset-path {path}",
        tmp_path / "out.json",
    )
    (found,) = told["results"]
    assert found["errors_by_kind"] == {"HTTP 400": 3}
    assert found["answer_tokens"] == {"3": 3}


def test_more_adapters_than_the_server_lists_are_refused(url, capsys):
    with pytest.raises(SystemExit) as stop:
        lathe.main(f"bench serve --url {url} --adapters 4".split())
    assert stop.value.code == 2
    assert "lists 3 adapters" in capsys.readouterr().err


def test_a_picture_is_drawn_of_rounds_without_a_single_good_answer():
    failed = Round(2, 1.0, (answer(None, None, 0, "HTTP 503"), answer(1.0, 1.0, 1)))
    none = Round(2, 1.0, (answer(None, None, 0, "HTTP 503"),), math.inf)
    rounds = [failed, none]
    figure = plots.served("nothing", rounds, [summarize("x", [each]) for each in rounds])
    assert len(figure.axes) == 6


def test_settings_of_a_sweep_are_json_without_infinities_and_without_the_key():
    sweep = Sweep(
        "http://x", Workload(("m",), Fixed(3), Fixed(4)), (), (math.inf,), math.inf, api_key="secret"
    )
    told = json.dumps(sweep.as_json(), allow_nan=False)
    assert "secret" not in told
    assert json.loads(told)["request_rates"] == ["inf"]


def test_pictures_and_clips_stand_before_the_words_and_come_round_when_all_were_shown():
    shown = Shown(num_images=2, num_videos=1, edge=32, num_frames=3, num_distinct=4)
    asks = requests_of(Workload(("a",), Fixed(20), Fixed(4), shown=shown), 5)
    images = [part["image_url"]["url"] for each in asks for part in each.shown[:2]]
    clips = [each.shown[2]["video_url"]["url"] for each in asks]
    assert len(set(images[:4])) == 4
    assert images[4:8] == images[:4]
    assert len(set(clips[:4])) == 4
    assert clips[4] == clips[0]
    assert all(url.startswith("data:video/") for url in clips)
    assert not requests_of(Workload(("a",), Fixed(20), Fixed(4)), 1)[0].shown


def test_a_server_that_sees_is_asked_with_pictures_and_clips(tmp_path):
    runtime = Runtime.start(ServeConfig(model=str(ROOT / "data" / "shapes"), name="shapes"))
    with closing(runtime), serving(runtime) as url:
        words = ["bench", "serve", "--url", url, "--concurrency", "2", "--requests", "4", "--max-tokens", "3"]
        shown = [
            "--images",
            "1",
            "--videos",
            "1",
            "--image-size",
            "56",
            "--frames",
            "2",
            "--distinct-media",
            "4",
        ]
        with pytest.raises(SystemExit) as stop:
            lathe.main([*words, *shown, "--prompt-tokens", "16", "--json", str(tmp_path / "n.json")])
    assert not stop.value.code
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["settings"]["workload"]["shown"]["num_images"] == 1
    assert (
        numbers["results"][0]["num_requests" if "num_requests" in numbers["results"][0] else "requests"] == 4
    )
