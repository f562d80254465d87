"""The whole OpenAPI description against the running server: what is generated from it never brings a 500."""

import json
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain

import httpx
import pytest
import schemathesis
from embedders import write_backbone
from schemathesis.engine import events, from_schema

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
]
GENERATING = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/responses",
    "POST /v1/responses/input_tokens",
    "POST /v1/embeddings",
    "POST /v1/rerank",
    "POST /v1/score",
    "POST /tokenize",
    "POST /api/chat",
    "POST /api/generate",
)
OWN_TIMEOUT = 504
"""What a request of a `timeout` that has passed is answered."""


@dataclass
class Findings:
    """What a run has seen."""

    failures: list[str] = field(default_factory=list)
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    """By operation."""

    def add(self, event: events.EngineEvent) -> None:
        if isinstance(event, events.NonFatalError | events.FatalError):
            self.failures.append(
                str(event.info.format()) if hasattr(event, "info") else repr(event.exception)
            )
        if not isinstance(event, events.ScenarioFinished):
            return
        recorder = event.recorder
        failed = [check.failure_info for check in chain(*recorder.checks.values()) if check.failure_info]
        failed = [info for info in failed if getattr(info.failure, "status_code", None) != OWN_TIMEOUT]
        self.failures += [f"{recorder.label}: {info.failure}\n{info.code_sample}" for info in failed]
        for interaction in recorder.interactions.values():
            response = interaction.response
            if response is None:
                self.failures.append(f"{recorder.label}: no response to {interaction.request}")
                continue
            self.statuses.setdefault(recorder.label, Counter())[response.status_code] += 1
            if response.status_code == OWN_TIMEOUT:
                asked = json.loads(interaction.request.body or b"{}")
                assert "timeout" in asked, (
                    f"{recorder.label}: {response.status_code}, and nobody asked for it"
                )
            elif response.status_code >= 400 and interaction.request.method != "HEAD":
                self._check_error(recorder.label, response.content)

    def _check_error(self, label: str, content: bytes | None) -> None:
        try:
            body = json.loads(content or b"")
            error = body["error"]
            if " /v1/messages" in label:
                is_right = set(body) == {"type", "error", "request_id"} and set(error) == {"type", "message"}
                is_right = is_right and error["type"] in ("invalid_request_error", "not_found_error")
            elif " /api/" in label:
                is_right = set(body) == {"error"} and isinstance(error, str)
            else:
                is_right = set(error) == {"message", "type", "param", "code"}
                is_right = is_right and error["type"] == "invalid_request_error"
        except (ValueError, LookupError, TypeError):
            is_right = False
        if not is_right:
            self.failures.append(f"{label}: an error in another shape than its API's: {content!r}")


@pytest.fixture(scope="module")
def url(model_folder, tmp_path_factory):
    encoder = write_backbone(tmp_path_factory.mktemp("encoders") / "bert", "bert")
    experiment = {"name": "ab", "variants": [{"model": "lively"}, {"model": "lively", "name": "twin"}]}
    runtime = Runtime.start(
        ServeConfig(
            model=str(model_folder),
            name="lively",
            max_rows=8,
            max_waiting=8,
            max_context=128,
            experiments=[experiment],
            store=f"sqlite:///{tmp_path_factory.mktemp('store')}/s.sqlite",
            embedding_models=[{"name": "tiny", "model": str(encoder), "dimensions": True}],
        )
    )
    with closing(runtime), serving(runtime) as url:
        yield url
        assert runtime.worker.failure is None
        assert not runtime.engine.has_work


def narrowed(description: dict) -> dict:
    """The same, but what is generated from it can mostly be answered: real names, short prompts."""
    parts = description["components"]["schemas"]
    for part in parts.values():
        for name in {"model", "lora_name"} & set(part.get("properties", {})):
            part["properties"][name] = {"enum": ["lively", "ab"]}
    text = {"type": "string", "minLength": 1, "maxLength": 8}
    for name, fields in kept(text).items():
        told = parts[name]["properties"]
        parts[name]["properties"] = {key: fields[key] or told[key] for key in fields}
    for name in ("ResponsesBody", "InputTokensBody"):
        parts[name]["required"] = ["model", "input"]
    for operation in chain(*(path.values() for path in description["paths"].values())):
        for header in operation.get("parameters", ()):
            if header["name"] in ("X-Tenant", "X-APC-Tenant"):  # two tenants are a 400
                header["schema"] = {"enum": ["t"]}
    parts["CompletionBody"]["properties"]["prompt"] = text
    parts["ChatBody"]["properties"]["messages"] |= {"maxItems": 2}
    parts["Message"]["required"] = ["role", "content"]
    turn = parts["Message"]["properties"]
    for name in ("tool_calls", "tool_call_id"):
        del turn[name]
    turn["content"] = {"anyOf": [text, turn["content"]["anyOf"][1]]}
    said = {
        "anyOf": [text, {"type": "array", "items": {"$ref": "#/components/schemas/TextBlock"}, "maxItems": 2}]
    }
    parts["AnthropicMessage"]["properties"]["content"] = said
    parts["AnthropicMessage"]["properties"]["role"] = {"enum": ["user", "system"]}
    parts["AnthropicMessage"]["required"] = ["role", "content"]
    for name in ("clear_at", "output_config"):
        del parts["AnthropicMessage"]["properties"][name]
    for name in ("tools", "tool_choice", "output_config", "output_format", "system"):
        parts["MessagesBody"]["properties"][name] = {"enum": [None]}
    for name in ("MessagesBody", "OllamaChatBody"):
        parts[name]["properties"]["messages"] |= {"maxItems": 2}
    for name in ("images", "tool_calls", "tool_call_id"):
        del parts["OllamaMessage"]["properties"][name]
    for name in ("think", "tools", "format", "images"):
        for body in ("OllamaChatBody", "OllamaGenerateBody"):
            parts[body]["properties"].pop(name, None)
    for name in ("ChatBody", "CompletionBody"):
        del parts[name]["properties"]["stream_options"]
    return description


def kept(text: dict) -> dict[str, dict[str, dict | None]]:
    """Of bodies with too many fields to be right by chance, those that are generated; None: as described."""
    turns = {
        "type": "array",
        "minItems": 1,
        "maxItems": 1,
        "items": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"const": "user"}, "content": text},
            "additionalProperties": False,
        },
    }
    few = {"type": "array", "items": text, "minItems": 1, "maxItems": 3}
    tiny = {"model": {"enum": ["tiny"]}, "truncate_prompt_tokens": {"enum": [None, -1, 16, 64]}}
    return {
        "CountBody": {"model": None, "messages": turns},
        "ResponsesBody": {
            **{"model": None, "input": text, "max_output_tokens": {"enum": [1, 4]}, "instructions": text},
            **{"stream": None, "store": None, "metadata": None},
        },
        "InputTokensBody": {"model": None, "input": text, "instructions": text},
        "EmbeddingBody": {
            **tiny,
            "input": {"anyOf": [text, few]},
            "encoding_format": None,
            "dimensions": None,
            "normalize": None,
        },
        "RerankBody": {**tiny, "query": text, "documents": few, "top_n": None, "return_documents": None},
        "ScoreBody": {**tiny, "text_1": text, "text_2": few},
        "TokenizePromptBody": {"model": None, "prompt": text, "return_token_strs": None},
        "TokenizeChatBody": {"model": None, "messages": turns, "return_token_strs": None},
    }


def explore(url: str, description: dict, *, phases: list[str], max_examples: int, is_fixed: bool) -> Findings:
    """Everything that schemathesis makes of a description, sent to the server."""
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=url, workers=1)
    schema.config.phases.update(phases=phases)
    schema.config.checks.update(included_check_names=CHECKS)
    schema.config.generation.update(max_examples=max_examples, deterministic=is_fixed, database="none")
    findings = Findings()
    for event in from_schema(schema).execute():
        findings.add(event)
    return findings


def test_a_fixed_sample_of_generated_requests_is_answered_as_described(url):
    description = httpx.get(f"{url}/openapi.json", timeout=60).json()
    findings = explore(url, narrowed(description), phases=["fuzzing"], max_examples=10, is_fixed=True)
    assert findings.failures == []
    assert len(findings.statuses) >= 9, "an operation was left out"
    for operation in GENERATING:
        assert {200, 400} <= set(findings.statuses[operation]) <= {200, 400, 404}, findings.statuses


@pytest.mark.large
@pytest.mark.parametrize("narrow", [lambda whole: whole, narrowed])
def test_generated_requests_are_answered_as_described(url, narrow):
    description = narrow(httpx.get(f"{url}/openapi.json", timeout=60).json())
    phases = ["examples", "coverage", "fuzzing", "stateful"]
    findings = explore(url, description, phases=phases, max_examples=150, is_fixed=False)
    assert findings.failures == []
    assert len(findings.statuses) >= 9, "an operation was left out"
    for operation in GENERATING:
        assert findings.statuses[operation][400] > 20, findings.statuses
        if narrow is narrowed:
            assert findings.statuses[operation][200] > 20, findings.statuses
