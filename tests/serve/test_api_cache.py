"""Memory and prefixes over HTTP: bits a request, tenants and salts, cached tokens in usage, stats and reset."""

import itertools

import httpx
import openai
import pytest

from serve.api.schemas import ChatBody, CompletionBody, GenerationBody
from serve.api.server import serving
from serve.cache.precision import PLAIN, KvPrecision
from serve.config import ServeConfig
from serve.errors import RequestError
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


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


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
