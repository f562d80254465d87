"""Memory and prefixes over HTTP: bits a request, tenants and salts, cached tokens in usage, stats and reset."""

import itertools
import json
import re
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest

from serve.api.schemas import ChatBody, CompletionBody, GenerationBody
from serve.api.server import serving
from serve.cache.precision import PLAIN, KvPrecision
from serve.config import ServeConfig
from serve.errors import LatheError, RequestError
from serve.runtime import Runtime

PROMPT = "a system prompt that everybody shares, long enough to be worth keeping. " * 4
PLAIN_SERVER = ServeConfig(model="m")
SMALL_SERVER = ServeConfig(model="m", kv_bits=3.5, kv_group_size=32, kv_quantize_after=7, kv_plain_layers=2)


def body(**fields) -> CompletionBody:
    return CompletionBody.model_validate({"model": "m", "prompt": "x", **fields})


@pytest.mark.parametrize(
    ("fields", "config", "expected"),
    [
        ({}, PLAIN_SERVER, None),
        ({}, SMALL_SERVER, None),
        ({"kv_bits": None}, SMALL_SERVER, None),
        ({"kv_bits": 16}, PLAIN_SERVER, PLAIN),
        ({"kv_bits": 16}, SMALL_SERVER, PLAIN),
        ({"kv_bits": 8}, PLAIN_SERVER, KvPrecision("affine", 8, 8)),
        ({"kv_bits": 8}, SMALL_SERVER, KvPrecision("affine", 8, 8, 32, 7, 2)),
        ({"kv_bits": 8, "kv_value_bits": 4.0}, PLAIN_SERVER, KvPrecision("affine", 8, 4)),
        ({"kv_bits": 4, "kv_scheme": "turbo"}, PLAIN_SERVER, KvPrecision("turbo", 4, 4)),
        ({"kv_bits": 4, "kv_quant_scheme": "turboquant"}, PLAIN_SERVER, KvPrecision("turbo", 4, 4)),
        ({"kv_bits": 4, "kv_quant_scheme": "uniform"}, PLAIN_SERVER, KvPrecision("affine", 4, 4)),
        ({"kv_bits": 3.5}, PLAIN_SERVER, KvPrecision("turbo", 3, 4)),
        ({"kv_bits": 4, "kv_group_size": 128}, SMALL_SERVER, KvPrecision("affine", 4, 4, 128, 7, 2)),
        ({"kv_bits": 4, "kv_quantize_after": 0}, SMALL_SERVER, KvPrecision("affine", 4, 4, 32, 0, 2)),
        ({"kv_bits": 4, "quantized_kv_start": 9}, SMALL_SERVER, KvPrecision("affine", 4, 4, 32, 9, 2)),
        ({"kv_bits": 4, "kv_plain_layers": 0.0}, SMALL_SERVER, KvPrecision("affine", 4, 4, 32, 7, 0)),
    ],
)
def test_a_requests_bits_take_the_place_of_the_servers_and_the_rest_is_the_servers(fields, config, expected):
    assert body(**fields).precision(config) == expected


BAD = {
    "kv_bits": [0, 1, 7, 9, 32, -4, 3.7, 0.5, 8.5, 1e308, "8", True, [8]],
    "kv_value_bits": [0, 7, 16, 3.5, "4", False],
    "kv_scheme": ["uniform", "turboquant", "", "AFFINE", 4],
    "kv_quant_scheme": ["affine", "turbo", "", 4],
    "kv_group_size": [0, 16, 48, -64, 32.5, "64", True],
    "kv_quantize_after": [-1, 0.5, "0", True],
    "quantized_kv_start": [-1, 0.5, "0", True],
    "kv_plain_layers": [-1, 0.5, "0", True],
    "cache_salt": ["", "s" * 1025, 5, ["s"]],
}
WITH_BITS = {"kv_bits": 8}


def test_the_bad_values_below_are_of_every_field_of_the_cache():
    assert set(BAD) == {
        name for name in GenerationBody.model_fields if name.startswith(("kv_", "quantized", "cache"))
    }


@pytest.fixture(scope="module")
def runtime(model_folder, make_adapter):
    started = Runtime.start(
        ServeConfig(
            model=str(model_folder),
            name="lively",
            adapters=[{"name": "a", "path": make_adapter(1)}],
            max_rows=8,
            max_waiting=8,
            prefill_chunk_tokens=64,
        )
    )
    yield started
    started.close()


@pytest.fixture(scope="module")
def url(runtime):
    with serving(runtime) as found:
        yield found


def complete(client, prompt=PROMPT, *, model="lively", headers=None, max_tokens=4, **fields):
    return client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, **fields},
        extra_headers=headers,
    )


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_value_that_is_none_of_a_fields_is_400_and_names_it(client, name, value):
    fields = {name: value} if name in ("kv_bits", "cache_salt") else {**WITH_BITS, name: value}
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.body["param"] == name
    assert name in caught.value.body["message"]


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"kv_group_size": 64}, "kv_group_size", "beside a kv_bits that quantizes"),
        ({"kv_quantize_after": 5, "kv_bits": 16}, "kv_quantize_after", "beside a kv_bits that quantizes"),
        ({"kv_scheme": "affine"}, "kv_scheme", "beside a kv_bits that quantizes"),
        ({"kv_bits": 3.5, "kv_scheme": "affine"}, "kv_bits", "3.5"),
        ({"kv_bits": 3.5, "kv_group_size": 64}, "kv_group_size", "has no groups"),
        (
            {"kv_bits": 8, "kv_quantize_after": 5, "quantized_kv_start": 6},
            "quantized_kv_start",
            "found 6, but kv_quantize_after is 5; they mean the same, send one",
        ),
        (
            {"kv_bits": 8, "kv_scheme": "turbo", "kv_quant_scheme": "uniform"},
            "kv_quant_scheme",
            "found uniform, but kv_scheme is turbo",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_400(client, fields, param, told):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.body["param"] == param
    assert told in caught.value.body["message"]


def test_chats_take_the_same_fields_as_completions():
    fields = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 9}
    chat = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
    assert chat.precision(PLAIN_SERVER) == body(**fields).precision(PLAIN_SERVER)
    with pytest.raises(RequestError):
        ChatBody.model_validate({**chat.model_dump(exclude_none=True), "kv_bits": 7}).precision(PLAIN_SERVER)


HEADERS = ("X-Tenant", "X-APC-Tenant")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/cache/reset"])
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("tenant", ["", "a b", "x" * 129, b"\xe9", b"caf\xc3\xa9", "a\tb"])
def test_a_tenant_that_cannot_be_one_is_400_and_names_its_header(http, path, header, tenant):
    fields = {"model": "lively", "max_tokens": 1, "prompt": "x"}
    if "chat" in path:
        fields = {"model": "lively", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    answer = http.post(path, json=fields, headers=[(header, tenant)])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == header
    assert "1 to 128 characters" in answer.json()["error"]["message"]


def test_two_headers_that_name_two_tenants_are_400(http):
    for first, second in itertools.product(HEADERS, HEADERS):
        fields = {"model": "lively", "prompt": "x", "max_tokens": 1}
        answer = http.post("/v1/completions", json=fields, headers=[(first, "a"), (second, "b")])
        assert answer.status_code == 400
        assert "send one tenant" in answer.json()["error"]["message"]
        same = http.post("/v1/completions", json=fields, headers=[(first, "a"), (second, "a")])
        assert same.status_code == 200


def test_a_request_is_served_as_by_a_server_whose_default_it_asks_for(client, model_folder):
    """Alone on the same shapes, so text for text."""
    asked = {"headers": {"X-Tenant": "of-precisions"}, "max_tokens": 24, "logprobs": 0}
    runtime = Runtime.start(
        ServeConfig(model=str(model_folder), name="lively", prefill_chunk_tokens=64, kv_bits=3.5)
    )
    with closing(runtime), serving(runtime) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as other:
        plain = [complete(client, **asked), complete(other, **asked, kv_bits=16)]
        small = [complete(client, **asked, kv_bits=3.5), complete(other, **asked)]
    for one, two in (plain, small):
        assert one.choices[0].text == two.choices[0].text
        assert one.choices[0].logprobs.token_logprobs == two.choices[0].logprobs.token_logprobs
        assert len(set(one.choices[0].text)) > 8
    assert plain[0].choices[0].logprobs.token_logprobs != small[0].choices[0].logprobs.token_logprobs


def test_bits_that_a_models_heads_cannot_have_are_400_and_say_what_would_do(client):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, kv_bits=8)
    assert caught.value.body["param"] == "kv_group_size"
    assert "does not divide the 16 channels" in caught.value.body["message"]


def test_a_server_refuses_such_bits_at_start(model_folder):
    with pytest.raises(LatheError, match="kv_group_size is 128, which does not divide"):
        Runtime.start(ServeConfig(model=str(model_folder), name="lively", kv_bits=4, kv_group_size=128))


# Prefixes


@pytest.fixture
def tenant(request):
    """A tenant of the test's own, so that what other tests keep is not found."""
    return {"X-Tenant": re.sub(r"[^!-~]", "-", request.node.name)[-128:]}


def cached(usage) -> int:
    return usage.prompt_tokens_details.cached_tokens


def chat(client, text=PROMPT, *, headers=None, **fields):
    return client.chat.completions.create(
        model="lively",
        messages=[{"role": "user", "content": text}],
        **{"max_tokens": 4, "temperature": 0, **fields},
        extra_body={"ignore_eos": True},
        extra_headers=headers,
    )


def test_a_prompt_asked_again_is_not_computed_but_for_its_last_token_and_every_usage_says_so(client, tenant):
    cold = complete(client, headers=tenant)
    warm = complete(client, headers=tenant)
    assert (cached(cold.usage), cached(warm.usage)) == (0, len(PROMPT) - 1)
    assert warm.choices[0].text == cold.choices[0].text
    assert warm.usage.prompt_tokens == len(PROMPT)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model="lively",
            prompt=PROMPT,
            max_tokens=4,
            stream=True,
            stream_options=options,
            extra_headers=tenant,
        )
    )
    assert [cached(chunk.usage) for chunk in chunks] == [len(PROMPT) - 1] * len(chunks)
    assert (chunks[-1].choices, chunks[-1].usage.prompt_tokens) == ([], len(PROMPT))


def test_a_chat_goes_on_from_its_own_answer(client, tenant):
    first = chat(client, headers=tenant)
    assert cached(first.usage) == 0
    again = chat(client, headers=tenant, stream=True, stream_options={"include_usage": True})
    assert cached(list(again)[-1].usage) == first.usage.prompt_tokens - 1
    longer = client.chat.completions.create(
        model="lively",
        messages=[
            {"role": "user", "content": PROMPT},
            first.choices[0].message.model_dump(include={"role", "content"}),
            {"role": "user", "content": "and then?"},
        ],
        max_tokens=4,
        extra_headers=tenant,
    )
    assert cached(longer.usage) >= first.usage.prompt_tokens


def test_a_prompt_counts_once_however_many_choices_share_it(client, tenant):
    cold = complete(client, headers=tenant, n=4)
    assert (cold.usage.prompt_tokens, cached(cold.usage)) == (len(PROMPT), 0)
    warm = complete(client, headers=tenant, n=4)
    assert (warm.usage.prompt_tokens, cached(warm.usage)) == (len(PROMPT), len(PROMPT) - 1)
    both = complete(client, [PROMPT, "z" * 80], headers=tenant, n=2)
    assert (both.usage.prompt_tokens, cached(both.usage)) == (len(PROMPT) + 80, len(PROMPT) - 1)


APART = {
    "another tenant": {"headers": {"X-Tenant": "others"}},
    "no tenant": {"headers": {}},
    "a salt": {"cache_salt": "pepper"},
    "an adapter": {"model": "a"},
    "fewer bits": {"kv_bits": 3.5},
}


@pytest.mark.parametrize("change", APART.values(), ids=APART.keys())
def test_a_prefix_is_shared_with_nobody_else(client, tenant, change):
    text = f"{change}" * 3
    asked = {"headers": tenant, **change}
    complete(client, text, headers=tenant)
    first = complete(client, text, **asked)
    assert cached(first.usage) == 0
    assert cached(complete(client, text, **asked).usage) == len(text) - 1
    assert cached(complete(client, text, headers=tenant).usage) == len(text) - 1


def test_either_header_names_the_same_tenant(client, tenant):
    complete(client, headers=tenant)
    again = complete(client, headers={"X-APC-Tenant": tenant["X-Tenant"]})
    assert cached(again.usage) == len(PROMPT) - 1


def test_stats_and_metrics_tell_what_prefixes_hold_and_gave(http, client, tenant):
    def counted() -> dict[str, float]:
        stats = http.get("/v1/cache/stats").json()
        lines = [line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#"]
        shown = {name: float(value) for name, value in lines}
        assert stats.pop("enabled") is True
        assert stats["num_queries"] == shown["lathe_prefix_queries_total"]
        assert stats["num_hits"] == shown["lathe_prefix_hits_total"]
        assert stats["num_query_tokens"] == shown["lathe_prefix_query_tokens_total"]
        assert stats["num_hit_tokens"] == shown['lathe_prefix_hit_tokens_total{tier="memory"}']
        assert stats["prefix_bytes"] == shown["lathe_prefix_bytes"]
        assert stats["budget_bytes"] == shown["lathe_memory_budget_bytes"]
        assert stats["adapter_bytes"] == shown["lathe_adapter_bytes"]
        return stats

    before = counted()
    complete(client, headers=tenant)
    cold = counted()
    complete(client, headers=tenant)
    warm = counted()
    assert [c["num_queries"] - before["num_queries"] for c in (cold, warm)] == [1, 2]
    assert [c["num_hits"] - before["num_hits"] for c in (cold, warm)] == [0, 1]
    assert [c["num_hit_tokens"] - before["num_hit_tokens"] for c in (cold, warm)] == [0, len(PROMPT) - 1]
    asked = [c["num_query_tokens"] - before["num_query_tokens"] for c in (cold, warm)]
    assert asked == [len(PROMPT) - 1, 2 * (len(PROMPT) - 1)]
    assert cold["prefix_bytes"] > before["prefix_bytes"]
    assert warm["adapter_bytes"] > 0
    assert warm["kv_bytes"] + warm["prefix_bytes"] + warm["adapter_bytes"] <= warm["budget_bytes"]


def test_a_reset_forgets_ones_own_prefixes_or_without_a_tenant_all(http, client, tenant):
    mine, theirs = tenant, {"X-Tenant": f"{tenant['X-Tenant']}-2"}

    def found(headers) -> int:
        return cached(complete(client, headers=headers).usage)

    for headers in (mine, theirs):
        found(headers)
    assert http.post("/v1/cache/reset", headers=mine).json() == {
        "status": "cleared",
        "tenant": mine["X-Tenant"],
    }
    assert (found(mine), found(theirs)) == (0, len(PROMPT) - 1)
    assert http.post("/v1/cache/reset").json() == {"status": "cleared", "tenant": None}
    assert http.get("/v1/cache/stats").json()["prefix_bytes"] == 0
    assert (found(mine), found(theirs)) == (0, 0)


def test_beyond_loopback_nobody_resets_what_others_keep(model_folder):
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", host="0.0.0.0"))
    with closing(runtime), serving(runtime) as url:
        refused = httpx.post(f"{url}/v1/cache/reset")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert httpx.post(f"{url}/v1/cache/reset", headers={"X-Tenant": "me"}).status_code == 200


def test_a_cache_of_nothing_finds_nothing_and_says_so(model_folder):
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", prefix_cache_gib=0))
    with (
        closing(runtime),
        serving(runtime) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client,
    ):
        assert [cached(complete(client).usage) for _ in range(2)] == [0, 0]
        stats = httpx.get(f"{url}/v1/cache/stats").json()
        assert (stats["enabled"], stats["prefix_bytes"], stats["num_queries"]) == (False, 0, 0)
        assert httpx.post(f"{url}/v1/cache/reset").status_code == 200


def test_a_folder_of_prefixes_is_found_by_the_next_server(model_folder, tmp_path):
    config = ServeConfig(
        model=str(model_folder), name="lively", prefix_cache_dir=tmp_path / "p", prefix_cache_disk_gib=0.1
    )
    texts = []
    for expected in (0, len(PROMPT) - 1):
        runtime = Runtime.start(config)
        with (
            closing(runtime),
            serving(runtime) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client,
        ):
            answer = complete(client, max_tokens=12)
            texts.append(answer.choices[0].text)
            assert cached(answer.usage) == expected
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 3


def wait_for(fact, timeout_s: float = 60) -> bool:
    end = time.monotonic() + timeout_s
    while not fact():
        if time.monotonic() > end:
            return False
    return True


def test_a_client_that_left_finds_its_prompt_when_it_comes_back(runtime, http, client, tenant):
    fields = {"model": "lively", "prompt": "y" * 900, "max_tokens": 100, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=fields, headers=tenant) as answer:
        lines = answer.iter_lines()  # dropping it would close the connection
        next(lines)
    assert wait_for(lambda: not runtime.engine.has_work)
    assert cached(complete(client, "y" * 900, headers=tenant, max_tokens=1).usage) == 899


def test_a_client_that_left_in_the_middle_of_its_prompt_finds_what_was_computed(
    runtime, http, client, tenant
):
    before = runtime.worker.stats().num_prompt_tokens
    content = json.dumps({"model": "lively", "prompt": "w" * 900, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-tenant: {tenant['X-Tenant']}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port)) as leaver:
        leaver.sendall(head.encode() + content)
        assert wait_for(lambda: runtime.worker.stats().num_prompt_tokens >= before + 64)
    assert wait_for(lambda: not runtime.engine.has_work)
    assert cached(complete(client, "w" * 900, headers=tenant, max_tokens=1).usage) >= 64


def test_one_budget_holds_whatever_comes_while_nothing_runs(model_folder, make_adapter):
    budget_gib = 4 / 1024
    runtime = Runtime.start(
        ServeConfig(
            model=str(model_folder),
            name="lively",
            memory_budget_gib=budget_gib,
            kv_budget_gib=budget_gib,
            adapter_budget_gib=3 / 1024,
        )
    )
    with closing(runtime), serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:

        def used() -> dict[str, int]:
            stats = http.get("/v1/cache/stats").json()
            assert stats["budget_bytes"] == 4 * 2**20
            parts = ("kv_bytes", "prefix_bytes", "adapter_bytes", "adapter_host_bytes")
            assert sum(stats[part] for part in parts) <= 4 * 2**20
            return stats

        for number in range(40):
            fields = {"model": "lively", "prompt": f"{number} " * 60, "max_tokens": 3}
            assert http.post("/v1/completions", json=fields).status_code == 200
            full = used()
        assert full["prefix_bytes"] > 3 * 2**20, "prefixes have what nobody else needs"
        for seed, rank in enumerate((64, 64, 64, 64, 256)):
            path = str(make_adapter(seed, rank=rank))
            answer = http.post("/v1/load_lora_adapter", json={"lora_name": f"a{seed}", "lora_path": path})
            assert answer.status_code == (200 if rank == 64 else 507), "one makes room for another, if it can"
            assert wait_for(lambda: used()["num_evicted"] > 0)
        assert used()["prefix_bytes"] < full["prefix_bytes"] - 2**20


def test_what_a_scheme_needs_is_not_imported_on_the_loop_that_serves_everyone(model_folder):
    """mlx-vlm takes seconds to import, at the first request for TurboQuant."""
    child = Path(__file__).parents[1] / "children" / "turbo_import.py"
    said = subprocess.run(
        [sys.executable, str(child), str(model_folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert said.stdout.split()[-2:] == ["200", "False"]
