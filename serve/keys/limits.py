"""What one key may have in a while: requests and tokens. The event loop's alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.errors import TenantLimitError
from serve.keys.bucket import Bucket

MINUTE_S = 60.0
DAY_S = 86_400.0


@dataclass(frozen=True)
class Allowance:
    """None: no bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


class Limits:
    """What is left of an allowance.

    Tokens are taken as they come, a prompt's and an answer's, so what runs may overdraw; the next request then waits
    until that is paid off.
    """

    def __init__(self, name: str, allowance: Allowance, clock: Callable[[], float] = time.monotonic) -> None:
        """name: the key's, for messages."""
        self._name = name
        self._clock = clock
        self.allowance = allowance
        self.requests = self._bucket(allowance.requests_per_minute, MINUTE_S)
        self._minute = self._bucket(allowance.tokens_per_minute, MINUTE_S)
        self._day = self._bucket(allowance.tokens_per_day, DAY_S)

    @property
    def tokens(self) -> Bucket | None:
        """Of the allowances of tokens, the one that has least."""
        bounded = [bucket for bucket in (self._minute, self._day) if bucket is not None]
        return min(bounded, key=lambda bucket: bucket.num_left, default=None)

    def take_request(self) -> None:
        """Count one request. TenantLimitError, and nothing is counted, where an allowance is used up."""
        waits = [
            (bucket.wait_s(), f"{bucket.size} {what}")
            for bucket, what in (
                (self.requests, "requests a minute"),
                (self._minute, "tokens a minute"),
                (self._day, "tokens a day"),
            )
            if bucket is not None
        ]
        wait_s, what = max(waits, default=(0.0, ""))
        if wait_s > 0:
            raise TenantLimitError(
                f"key {self._name!r} may have {what}, and has had them; try again in {wait_s:.1f} s", wait_s
            )
        if self.requests is not None:
            self.requests.take(1)

    def give_request_back(self) -> None:
        """A request that was counted has not been let in, for want of room."""
        if self.requests is not None:
            self.requests.take(-1)

    def take_tokens(self, count: int) -> None:
        """Tokens that a request has cost."""
        for bucket in (self._minute, self._day):
            if bucket is not None:
                bucket.take(count)

    def allow(self, allowance: Allowance) -> None:
        """Another allowance from now on; what was taken of the one before stays taken."""
        self.allowance = allowance
        self.requests = self._resized(self.requests, allowance.requests_per_minute, MINUTE_S)
        self._minute = self._resized(self._minute, allowance.tokens_per_minute, MINUTE_S)
        self._day = self._resized(self._day, allowance.tokens_per_day, DAY_S)

    def _resized(self, bucket: Bucket | None, size: int | None, period_s: float) -> Bucket | None:
        if bucket is None or size is None:
            return self._bucket(size, period_s)
        return bucket if bucket.size == size else bucket.resized(size)

    def _bucket(self, size: int | None, period_s: float) -> Bucket | None:
        return None if size is None else Bucket(size, period_s, self._clock)
