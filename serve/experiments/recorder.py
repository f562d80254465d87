"""Writes to the store one after another on a thread of its own, so that no request waits for a disk it need not.

Order is kept: an exposure is there before its completion and before feedback that was sent later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from serve.errors import LatheError
from serve.experiments.records import Exposure

if TYPE_CHECKING:
    from serve.experiments.store import Store

logger = logging.getLogger(__name__)


class Recorder:
    """The only writer of a serving process. Owns its store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.num_failed_writes = 0
        """Exposures lost to a store that could not be written; answers go out all the same."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lathe-recorder")

    def expose(self, exposure: Exposure) -> Future[None]:
        """Queue an exposure. The future never raises: a failure is logged and counted."""
        return self._thread.submit(self._logged, lambda: self.store.expose(exposure))

    def complete(self, completion_id: str, *, latency_s: float, num_tokens: int, finish: str) -> Future[None]:
        """Queue how an exposed completion ended. The future never raises."""

        def write() -> None:
            self.store.complete(completion_id, latency_s=latency_s, num_tokens=num_tokens, finish=finish)

        return self._thread.submit(self._logged, write)

    def outcome(self, completion_id: str, name: str, value: float) -> Future[None]:
        """Queue feedback. The future raises what Store.record_outcome does."""
        return self._thread.submit(self.store.record_outcome, completion_id, name, value)

    def close(self) -> None:
        """Write what is queued, then close the store."""
        self._thread.shutdown(wait=True)
        self.store.close()

    def _logged(self, write: Callable[[], None]) -> None:
        try:
            write()
        except LatheError as error:
            self.num_failed_writes += 1
            logger.error("an exposure is lost: %s", error)
