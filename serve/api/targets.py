"""The `model` field in, what serves it out: the base, an adapter version, or an experiment's variant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.adapters.version import AdapterVersion
from serve.errors import NotFoundError, OverloadedError
from serve.experiments.assignment import Variant, assign
from serve.experiments.store import Run
from serve.runtime import Runtime

VARIANT_RETRY_AFTER_S = 5.0
MAX_HEADER_CHARS = 512


@dataclass(frozen=True)
class Assignment:
    """Which arm of which experiment a unit was given."""

    run: Run
    variant: Variant
    unit: str


@dataclass(frozen=True)
class Target:
    """What one request is served by."""

    asked: str
    """The `model` field, which the response repeats."""
    base: str
    version: AdapterVersion | None
    assignment: Assignment | None = None

    @property
    def served(self) -> str:
        """`name@N`, or the base's name."""
        return self.version.id if self.version else self.base

    @property
    def label(self) -> str:
        """Name without version, for metrics."""
        return self.version.name if self.version else self.base

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that say what answered."""
        headers = {"x-lathe-model": _header(self.served)}
        if self.assignment is not None:
            headers["x-lathe-variant"] = _header(self.assignment.variant.name)
        return headers


@contextmanager
def held_target(runtime: Runtime, model: str, unit: str) -> Iterator[Target]:
    """What `model` stands for now; an adapter version is held inside the block. NotFoundError, OverloadedError."""
    target = _find(runtime, model, unit)
    try:
        yield target
    finally:
        if target.version is not None:
            runtime.registry.release(target.version)


def served_names(runtime: Runtime) -> list[str]:
    """Every name a request may ask for, without versions."""
    return [runtime.model.name, *runtime.registry.names(), *runtime.experiments]


def _find(runtime: Runtime, model: str, unit: str) -> Target:
    base = runtime.model.name
    run = runtime.experiments.get(model)
    if run is None:
        return Target(model, base, None if model == base else _acquire(runtime, model))
    variant = assign(run.experiment, unit)
    assignment = Assignment(run, variant, unit)
    if variant.model == base:
        return Target(model, base, None, assignment)
    try:
        return Target(model, base, runtime.registry.acquire(variant.model), assignment)
    except NotFoundError:
        error = OverloadedError(
            f"variant {variant.name!r} of experiment {model!r} needs adapter {variant.model!r}, which is not loaded; "
            "load it with /v1/load_lora_adapter",
            VARIANT_RETRY_AFTER_S,
        )
        error.code = "variant_not_loaded"
        raise error from None


def _acquire(runtime: Runtime, model: str) -> AdapterVersion:
    try:
        return runtime.registry.acquire(model)
    except NotFoundError:
        there = ", ".join(served_names(runtime))
        raise NotFoundError(f"model {model!r} is not served here; there are {there}") from None


def _header(value: str) -> str:
    """`value` as a header may hold it: printable ASCII, not blank at its ends; anything else is escaped."""
    escaped = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in value[:MAX_HEADER_CHARS])
    return escaped if escaped == escaped.strip() else ascii(escaped)
