"""litellm and langchain-openai against the real server: whatever they ask, they get what OpenAI's own client does."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import numpy as np
import openai
import pytest
from embedders import write_classifier, write_embedder
from PIL import Image
from pydantic import BaseModel

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

pytestmark = pytest.mark.long

MESSAGES = [{"role": "user", "content": "How warm is it in Paris?"}]
DRAWN = {"temperature": 0.0, "max_tokens": 24, "seed": 3}
FREE = {"ignore_eos": True}
LONG = "word " * 2000
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How warm it is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
        },
    },
}
ARGUMENTS = {"city": "Paris", "days": 2}
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {json.dumps(ARGUMENTS)}}}\n</tool_call>'
CALLED = {"structured_outputs": {"choice": [CALL]}}
"""A random model says this and nothing else."""


class Weather(BaseModel):
    """How warm it is."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2]


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    """The package, which would ask the network for prices as it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        import litellm

        litellm.telemetry = False
        yield litellm


@pytest.fixture(scope="module")
def runtime(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    folders = tmp_path_factory.mktemp("encoders")
    write_embedder(folders / "tiny", "bert")
    write_classifier(folders / "judge", "bert")
    models = [{"name": name, "model": str(folders / name)} for name in ("tiny", "judge")]
    config = ServeConfig(
        model=str(model_folder), name="m", tool_call_parser="hermes", embedding_models=models, max_rows=8
    )
    started = Runtime.start(config)
    yield started
    assert started.worker.failure is None
    started.close()


@pytest.fixture(scope="module")
def url(runtime: Runtime) -> Iterator[str]:
    with serving(runtime) as opened:
        yield f"{opened}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0)


@pytest.fixture
def lite(litellm: Any, url: str) -> Callable[..., Any]:
    """litellm's completion, of this server's model."""

    def complete(**fields: Any) -> Any:
        told = {
            "model": "openai/m",
            "messages": MESSAGES,
            "api_base": url,
            "api_key": "none",
            "num_retries": 0,
        }
        return litellm.completion(**{**told, **fields})

    return complete


@pytest.fixture
def chain(url: str) -> Callable[..., Any]:
    """LangChain's chat of this server's model."""
    from langchain_openai import ChatOpenAI

    def chat(**fields: Any) -> Any:
        told = {"model": "m", "base_url": url, "api_key": "none", "max_retries": 0, "timeout": 60}
        return ChatOpenAI(**{**told, **fields})

    return chat


def plain_answer(client: openai.OpenAI) -> str:
    answer = client.chat.completions.create(model="m", messages=MESSAGES, **DRAWN, extra_body=FREE)
    return answer.choices[0].message.content or ""


def until_idle(runtime: Runtime) -> None:
    """Ends once no row is left."""
    while runtime.worker.stats().num_decoding or runtime.worker.stats().num_prefilling:
        pass


def test_litellm_answers_whole_and_streamed_as_openais_client(lite: Any, client: openai.OpenAI) -> None:
    wanted = plain_answer(client)
    whole = lite(**DRAWN, extra_body=FREE)
    assert whole.choices[0].message.content == wanted
    assert whole.usage.completion_tokens == DRAWN["max_tokens"]
    chunks = list(lite(**DRAWN, extra_body=FREE, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == wanted
    assert (
        next(c.usage for c in chunks if getattr(c, "usage", None)).prompt_tokens == whole.usage.prompt_tokens
    )


def test_litellm_calls_tools_whole_and_streamed(lite: Any, litellm: Any) -> None:
    fields = {"tools": [WEATHER], "extra_body": CALLED, "temperature": 0, "max_tokens": 200}
    whole = lite(**fields).choices[0]
    streamed = litellm.stream_chunk_builder(list(lite(**fields, stream=True))).choices[0]
    for choice in (whole, streamed):
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == ARGUMENTS
    back = [
        *MESSAGES,
        whole.message.model_dump(),
        {"role": "tool", "tool_call_id": whole.message.tool_calls[0].id, "content": "20 degrees"},
    ]
    assert lite(messages=back, tools=[WEATHER], max_tokens=4, temperature=0).usage.completion_tokens > 0


def test_litellm_keeps_to_a_schema(lite: Any) -> None:
    answer = lite(response_format=Weather, temperature=1.0, seed=1, max_tokens=100).choices[0]
    Weather.model_validate_json(answer.message.content)


def test_litellm_names_what_went_wrong(lite: Any, litellm: Any) -> None:
    for fields, kind in (
        ({"model": "openai/nobody"}, litellm.NotFoundError),
        ({"messages": [{"role": "user", "content": LONG}]}, litellm.ContextWindowExceededError),
        ({"temperature": -1.0}, litellm.BadRequestError),
        ({"extra_body": {"temprature": 1}}, litellm.BadRequestError),
    ):
        with pytest.raises(kind):
            lite(**fields)


def test_a_stream_that_litellm_closes_frees_its_row(lite: Any, runtime: Runtime) -> None:
    stream = lite(stream=True, temperature=0, extra_body=FREE)
    next(iter(stream))
    stream.completion_stream.close()
    until_idle(runtime)


def test_litellm_embeds_and_reranks(litellm: Any, url: str, client: openai.OpenAI) -> None:
    texts = ["a lamp", "The lamp arrived broken."]
    found = litellm.embedding(model="openai/tiny", input=texts, api_base=url, api_key="none")
    wanted = client.embeddings.create(model="tiny", input=texts)
    np.testing.assert_allclose(
        [each["embedding"] for each in found.data], [each.embedding for each in wanted.data], atol=1e-6
    )
    best = []
    for provider, base in (("hosted_vllm", url), ("cohere", f"{url[:-3]}/v2/rerank"), ("jina_ai", url)):
        told = {"query": "lamp", "documents": texts, "top_n": 1, "api_base": base, "api_key": "none"}
        answer = litellm.rerank(model=f"{provider}/judge", **told)
        best.append((answer.results[0]["index"], round(answer.results[0]["relevance_score"], 5)))
    assert len(set(best)) == 1, best


def test_langchain_answers_whole_and_streamed_as_openais_client(chain: Any, client: openai.OpenAI) -> None:
    wanted = plain_answer(client)
    model = chain(**DRAWN, extra_body=FREE)
    whole = model.invoke("How warm is it in Paris?")
    assert whole.content == wanted
    assert whole.usage_metadata["output_tokens"] == DRAWN["max_tokens"]
    chunks = list(model.stream("How warm is it in Paris?", stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == wanted
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 24


def test_langchain_calls_tools_whole_and_streamed(chain: Any) -> None:
    model = chain(temperature=0, max_tokens=200, extra_body=CALLED).bind_tools([WEATHER])
    whole = model.invoke("How warm is it in Paris?")
    joined = None
    for chunk in model.stream("How warm is it in Paris?"):
        joined = chunk if joined is None else joined + chunk
    for message in (whole, joined):
        (call,) = message.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", ARGUMENTS)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_keeps_to_a_schema(method: str, chain: Any) -> None:
    model = chain(temperature=1.0, seed=2, max_tokens=200).with_structured_output(Weather, method=method)
    assert isinstance(model.invoke("How warm is it in Paris?"), Weather)


def test_langchain_speaks_responses_too(chain: Any) -> None:
    model = chain(temperature=0, max_tokens=16, use_responses_api=True)
    whole = model.invoke("How warm is it in Paris?")
    assert whole.text
    assert "".join(chunk.text for chunk in model.stream("How warm is it in Paris?")) == whole.text


def test_langchain_names_what_went_wrong(chain: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        chain(model="nobody").invoke("a")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chain().invoke(LONG)


def test_a_stream_that_langchain_leaves_frees_its_row(chain: Any, runtime: Runtime) -> None:
    stream = chain(temperature=0, extra_body=FREE).stream("a")
    next(stream)
    stream.close()
    until_idle(runtime)


def test_langchain_embeds(url: str, client: openai.OpenAI) -> None:
    from langchain_openai import OpenAIEmbeddings

    texts = ["a lamp", "The lamp arrived broken."]
    embeddings = OpenAIEmbeddings(
        model="tiny", base_url=url, api_key="none", check_embedding_ctx_length=False
    )
    wanted = [each.embedding for each in client.embeddings.create(model="tiny", input=texts).data]
    np.testing.assert_allclose(embeddings.embed_documents(texts), wanted, atol=1e-6)
    np.testing.assert_allclose(embeddings.embed_query(texts[0]), wanted[0], atol=1e-6)


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_anthropics_client_pages_through_the_models_forwards_and_backwards(
    limit: int, url: str, client: openai.OpenAI
) -> None:
    names = [model.id for model in client.models.list()]
    assert len(names) == 3
    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="x", max_retries=0) as claude:
        assert [model.id for model in claude.models.list(limit=limit)] == names
        pages = claude.models.list(limit=limit, before_id=names[-1]).iter_pages()
        assert [model.id for page in reversed(list(pages)) for model in page.data] == names[:-1]
        for wrong in ({"limit": 0}, {"limit": 1001}, {"after_id": "gone"}, {"before_id": "gone"}):
            with pytest.raises(anthropic.BadRequestError, match=next(iter(wrong))):
                claude.models.list(**wrong)


def test_pictures_reach_the_model_through_every_client(
    litellm: Any, vlm_folder: Callable[[str], Path]
) -> None:
    from langchain_openai import ChatOpenAI

    messages = [
        [{"role": "user", "content": [shown(seed), {"type": "text", "text": "what is it?"}]}]
        for seed in (1, 2)
    ]
    fields = {"temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    runtime = Runtime.start(ServeConfig(model=str(vlm_folder("qwen2_vl")), name="sees"))
    try:
        with serving(runtime) as address:
            url = f"{address}/v1"
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            wanted = [
                first(client.chat.completions.create(model="sees", messages=each, **fields))
                for each in messages
            ]
            assert np.abs(np.subtract(*wanted)).max() > 0.05
            told = {"model": "openai/sees", "api_base": url, "api_key": "none", **fields}
            found = [first(litellm.completion(messages=each, **told)) for each in messages]
            np.testing.assert_allclose(found, wanted, atol=5e-3)
            model = ChatOpenAI(model="sees", base_url=url, api_key="none", **fields)
            for each, values in zip(messages, wanted, strict=True):
                (token,) = model.invoke(each).response_metadata["logprobs"]["content"]
                seen = sorted(one["logprob"] for one in token["top_logprobs"])
                np.testing.assert_allclose(seen, values, atol=5e-3)
    finally:
        runtime.close()


def shown(seed: int) -> dict[str, Any]:
    """A picture of noise."""
    written = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)
    Image.fromarray(pixels).save(written, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"},
    }


def first(answer: Any) -> list[float]:
    """Log-probabilities of the five likeliest first tokens."""
    (token,) = answer.choices[0].logprobs.content
    return sorted(each.logprob for each in token.top_logprobs)
