"""What others measure a server by: metrics in vLLM's names, labels that stay few, spans at a collector, /version."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from serve.api.server import serving
from serve.api.vllm_metrics import GAP_BUCKETS_S, Gaps
from serve.config import ServeConfig
from serve.runtime import Runtime

SHORT = {"model": "lively", "prompt": "hello there", "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def browse(model_folder):
    """browse(**config): inside, a client of a server."""

    @contextmanager
    def opened(**fields) -> Iterator[httpx.Client]:
        runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", **fields))
        try:
            with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
                yield http
        finally:
            runtime.close()

    return opened


def samples_of(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_in_vllms_names_say_what_ours_do(browse):
    with browse() as http:
        for max_tokens in (6, 1, 4):
            http.post("/v1/completions", json={**SHORT, "max_tokens": max_tokens})
        http.post("/v1/completions", json={**SHORT, "model": "nope"})
        with http.stream(
            "POST", "/v1/completions", json={**SHORT, "max_tokens": 900, "stream": True}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            during = samples_of(http.get("/metrics").text)
    model = (("model_name", "lively"),)
    assert during["vllm:num_requests_running", model] == 1
    assert during["vllm:num_requests_waiting", model] == 0
    assert 0 < during["vllm:kv_cache_usage_perc", model] < 1
    assert during["vllm:prompt_tokens_total", model] == 3 * len("hello there")
    assert during["vllm:generation_tokens_total", model] == 11
    assert during["vllm:request_success_total", (("finished_reason", "length"), *model)] == 3
    assert during["vllm:prefix_cache_queries_total", model] == during["lathe_prefix_query_tokens_total", ()]
    assert during["vllm:prefix_cache_hits_total", model] > 0
    for theirs, ours in (
        ("time_to_first_token", "lathe_ttft"),
        ("e2e_request_latency", "lathe_request"),
        ("request_time_per_output_token", "lathe_tpot"),
    ):
        for end in ("count", "sum"):
            mine = during[f"{ours}_seconds_{end}", (("model", "lively"),)]
            assert during[f"vllm:{theirs}_seconds_{end}", model] == mine > 0
    for name in ("vllm:inter_token_latency", "vllm:time_per_output_token"):
        assert during[f"{name}_seconds_count", model] == 5 + 0 + 3, "every token but the first of each answer"
        assert during[f"{name}_seconds_bucket", (("le", "+Inf"), *model)] == 8


def test_gaps_stand_in_their_buckets():
    gaps, others = Gaps(), Gaps()
    gaps.add(0.002, 1)
    gaps.add(0.09, 3)  # three tokens that came together
    gaps.add(99, 1)
    others.join(gaps)
    others.join(gaps)
    found = dict(others.buckets)
    assert found["0.0025"] == 2
    assert found["0.025"] == 2
    assert found["0.05"] == 8
    assert (found["10"], found["+Inf"]) == (8, 10)
    assert others.sum_s == pytest.approx(2 * 99.092)
    assert list(found) == [*map(str, GAP_BUCKETS_S), "+Inf"]


def test_names_beyond_the_bound_are_counted_together(browse, make_adapter):
    with browse(metrics_max_models=3) as http:
        path = str(make_adapter(1))
        for number in range(6):
            http.post("/v1/load_lora_adapter", json={"lora_name": f"a-{number}", "lora_path": path})
            http.post("/v1/completions", json={**SHORT, "model": f"a-{number}", "max_tokens": 2})
        http.post("/v1/completions", json={**SHORT, "max_tokens": 2})
        text = http.get("/metrics").text
        found = samples_of(text)
        labels = set(re.findall(r'model(?:_name)?="([^"]+)"', text))
        assert labels == {"lively", "a-0", "a-1", "a-2", "other"}
        assert found["lathe_request_answer_tokens_total", (("model", "other"),)] == 6
        # Whose place is free is told apart.
        http.post("/v1/unload_lora_adapter", json={"lora_name": "a-0"})
        http.get("/metrics")
        http.post("/v1/completions", json={**SHORT, "model": "a-5", "max_tokens": 2})
        assert 'model="a-5"' in http.get("/metrics").text


class Collector(BaseHTTPRequestHandler):
    """Keeps the spans that it gets."""

    def do_POST(self) -> None:
        asked = ExportTraceServiceRequest()
        asked.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
        self.server.spans += [
            span for each in asked.resource_spans for scope in each.scope_spans for span in scope.spans
        ]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """It says nothing."""


@pytest.fixture
def collector() -> Iterator[HTTPServer]:
    """An OTLP collector; `spans` are what it has got."""
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        server.spans = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_span_of_each_request_comes_to_the_collector_under_its_callers(browse, collector):
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with browse(otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/v1/traces") as http:
        headers = {"traceparent": parent, "X-Request-Id": "mine"}
        stream = http.post("/v1/completions", json={**SHORT, "stream": True}, headers=headers)
        http.post("/v1/completions", json={**SHORT, "model": "nope"})
        http.get("/health")
    spans = {span.name + str(i): span for i, span in enumerate(collector.spans)}
    assert [name[:-1] for name in spans] == ["POST /v1/completions"] * 2, "probes have none"
    first, second = collector.spans
    assert first.trace_id.hex() == parent.split("-")[1]
    assert first.parent_span_id.hex() == parent.split("-")[2]
    said = {each.key: each.value for each in first.attributes}
    assert said["gen_ai.request.id"].string_value == "mine"
    assert said["gen_ai.usage.input_tokens"].int_value == len("hello there")
    assert said["gen_ai.usage.output_tokens"].int_value == 6
    assert said["gen_ai.response.finish_reasons"].array_value.values[0].string_value == "length"
    length_s = (first.end_time_unix_nano - first.start_time_unix_nano) / 1e9
    assert 0 < said["gen_ai.latency.time_to_first_token"].double_value <= length_s
    assert said["http.response.status_code"].int_value == stream.status_code == 200
    assert {each.key: each.value for each in second.attributes}[
        "error.type"
    ].string_value == "model_not_found"
    assert "hello there" not in str(collector.spans)


def test_without_the_packages_an_endpoint_is_refused_by_name_before_anything_is_loaded():
    code = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None\n"
        "from serve.api.server import run; from serve.config import ServeConfig\n"
        "run(ServeConfig(model='no model here', port=0, otlp_endpoint='http://127.0.0.1:1/v1/traces'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "opentelemetry.sdk.trace is not installed; pip install 'mlx-lathe[otel]'" in done.stderr


def test_version_says_what_everything_stands_on(browse):
    with browse() as http:
        found = http.get("/version").json()
    assert found["version"] == found["lathe"] == version("mlx-lathe")
    assert (found["mlx"], found["mlx_lm"], found["mlx_vlm"]) == tuple(
        map(version, ("mlx", "mlx-lm", "mlx-vlm"))
    )
    assert (found["python"], found["backend"]) == (platform.python_version(), "cpu")


def test_status_tells_waiting_from_running(browse):
    with browse(max_rows=1, stream_keep_alive_s=0.02) as http:
        long = {**SHORT, "max_tokens": 900, "stream": True}
        with (
            http.stream("POST", "/v1/completions", json=long) as first,
            http.stream("POST", "/v1/completions", json={**long, "max_tokens": 1}) as second,
        ):
            lines = first.iter_lines()
            next(lines)
            found = http.get("/v1/status").json()
            assert [one["phase"] for one in found["requests"]] == ["decode", "waiting"]
            assert [one["num_prompt_tokens"] for one in found["requests"]] == [11, 11]
            assert found["requests"][0]["rows"][0]["num_computed_tokens"] >= 11
            assert found["server"]["num_waiting"] == 1
            assert second.status_code == 200, "it sends comments meanwhile"
