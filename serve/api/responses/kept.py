"""The responses of one app: those that are streamed or made in the background now, and those that are kept."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from serve.api.responses.store import ResponseStore
from serve.config import ServeConfig


class Running(Protocol):
    """A response that is being made; serve/api/responses/writer.py has it."""

    @property
    def response(self) -> dict[str, Any]:
        """The object as it is now."""

    def cancel(self) -> None:
        """End it."""

    def forget(self) -> None:
        """End it, and do not keep it."""


class Responses:
    """One app's."""

    def __init__(self, config: ServeConfig) -> None:
        self.running: dict[tuple[str, str], Running] = {}
        """By tenant and id."""
        self.tasks: set[asyncio.Future[None]] = set()
        """That make responses in the background."""
        self.store = ResponseStore(
            int(config.response_store_mib * 2**20),
            config.response_store_count,
            config.response_store_hours * 3600,
        )
