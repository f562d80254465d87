"""Requests that have ended in, spans at an OpenTelemetry collector out. Needs the extra `otel`.

Attributes have the names of OpenTelemetry's conventions for generative AI, and vLLM's for times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serve.errors import ConfigError

if TYPE_CHECKING:
    from serve.api.exchange import Exchange

SERVICE = "lathe"
ROOM = 2048
"""Spans that wait to be sent; more are dropped."""
NS = 1_000_000_000


class Tracer:
    """Sends a span of each request, from a thread of its own; `close` sends what waits."""

    def __init__(self, endpoint: str, version: str) -> None:
        """endpoint: of traces, by OTLP over HTTP. ConfigError where the packages are missing."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.propagate import extract
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode
        except ImportError as error:
            raise ConfigError(
                f"otlp_endpoint: found {endpoint}, but {error.name} is not installed; pip install 'mlx-lathe[otel]'"
            ) from None
        resource = Resource.create({"service.name": SERVICE, "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=ROOM))
        self._tracer = self._provider.get_tracer("lathe", version)
        self._extract = extract
        self._kind = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)

    def __call__(self, exchange: Exchange) -> None:
        """The span of a request that has just ended."""
        parent = self._extract({"traceparent": exchange.traceparent}) if exchange.traceparent else None
        started_ns = int(exchange.started_at * NS)
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.route or 'unknown'}",
            context=parent,
            kind=self._kind,
            attributes=attributes_of(exchange),
            start_time=started_ns,
        )
        if (exchange.status or 0) >= 500 or exchange.finish == "error":
            span.set_status(self._failed)
        span.end(started_ns + int(exchange.age_s * NS))

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def attributes_of(exchange: Exchange) -> Mapping[str, Any]:
    """What a span says; nothing of prompts and answers."""
    problem = exchange.problem
    found: dict[str, Any] = {
        "http.request.method": exchange.method,
        "http.route": exchange.route,
        "http.response.status_code": exchange.status,
        "gen_ai.system": SERVICE,
        "gen_ai.request.id": exchange.id,
        "gen_ai.request.model": exchange.asked,
        "gen_ai.response.model": exchange.served,
        "gen_ai.usage.input_tokens": exchange.num_prompt_tokens or None,
        "gen_ai.usage.output_tokens": exchange.num_answer_tokens or None,
        "gen_ai.response.finish_reasons": None if exchange.finish is None else [exchange.finish],
        "gen_ai.latency.time_to_first_token": exchange.ttft_s,
        "gen_ai.latency.e2e": exchange.age_s,
        "lathe.tenant": exchange.tenant or None,
        "lathe.key": exchange.key_name,
        "error.type": problem.code if problem else None,
    }
    return {name: value for name, value in found.items() if value is not None}
