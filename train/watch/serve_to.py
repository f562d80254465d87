"""A running server is told of every adapter that a run publishes, as vLLM's API has it: load this folder, in place.

From a thread of its own, one at a time, the newest first: what was not told when a newer one came is left out. A
server that is down, slow or unwilling changes nothing of the run; a person is told why, once.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx

from serve.adapters.versions.names import name_problem
from serve.errors import ConfigError
from serve.remote import connect, message_of, trouble

LOAD_PATH = "/v1/load_lora_adapter"
ANSWER_S = 60.0
"""What an answer may take, from the question to its last byte."""
CONNECT_S = 5.0
LAST_ANSWER_S = 30.0
"""What a run that is over waits for the server to take its adapter."""
FIRST_AGAIN_S, LAST_AGAIN_S = 1.0, 30.0
"""When a server that did not answer is asked again: twice as late each time."""
MOST_ANSWER_BYTES = 1 << 16
PASSING = (404, 408, 425, 429)
"""Refusals that the same question may not meet again, beside a server's own trouble: folders that another machine has
written are seen there a while later."""


@dataclass(frozen=True)
class _Refusal:
    """Why the server did not load it."""

    reason: str
    may_pass: bool
    """Whether the same question may be answered otherwise later on."""


class ServeTo:
    """Tells one server of one run's adapters, inside a `with`.

    url   as somebody typed it
    name  what the server calls the adapter
    ConfigError where they cannot be used; nothing is asked before the first `tell`.
    """

    def __init__(self, url: str, name: str, api_key: str | None = None) -> None:
        expected = name_problem(name)
        if expected:
            raise ConfigError(f"serve_as: a server cannot call an adapter {name!a:.80}: {expected}")
        self._url, self._name = url, name
        self._http = connect(url, api_key)
        self._thread = threading.Thread(target=self._run, name="lathe-serve-to", daemon=True)
        self._changed = threading.Condition()  # guards what follows
        self._wanted: Path | None = None
        self._is_ending = False
        self._refusal: _Refusal | None = None  # of the last one that was asked for
        self._notes: list[str] = []
        self._told: set[str] = set()
        self._num_asked = self._num_loaded = 0

    def tell(self, folder: Path) -> None:
        """The newest adapter is the one in `folder`. Returns at once."""
        with self._changed:
            self._want(folder)

    def take_notes(self) -> list[str]:
        """What a person should know since the last time this was asked."""
        with self._changed:
            notes, self._notes = self._notes, []
        return notes

    def finish(self, folder: Path) -> list[str]:
        """The run is over, its adapter in `folder`. Waits for the server, not long; returns what came of it all."""
        with self._changed:
            self._is_ending = True
            self._want(folder)
            is_done = self._changed.wait_for(lambda: self._wanted is None, LAST_ANSWER_S)
            if not is_done:
                self._refusal = _Refusal(f"it did not answer within {LAST_ANSWER_S:.0f} s", True)
        return [*self.take_notes(), self._outcome(folder)]

    def _want(self, folder: Path) -> None:
        self._wanted = folder.absolute()
        self._num_asked += 1
        if self._thread.ident is None:
            self._thread.start()
        self._changed.notify_all()

    def _outcome(self, folder: Path) -> str:
        count = f"{self._num_loaded} of {self._num_asked} adapters of this run were loaded there"
        if self._refusal is None:
            return f"{self._url} serves {folder} as {self._name}; {count}"
        return f"{self._url} does not serve {folder} as {self._name}: {self._refusal.reason}; {count}"

    def _run(self) -> None:
        wait_s = FIRST_AGAIN_S
        while (folder := self._next()) is not None:
            refusal = self._ask(folder)
            with self._changed:
                is_newest = self._wanted == folder
                self._note(folder, refusal, is_newest)
                if not is_newest:
                    continue
                if refusal is None or not refusal.may_pass or self._is_ending:
                    self._wanted, wait_s = None, FIRST_AGAIN_S
                    self._changed.notify_all()
                else:
                    self._changed.wait(wait_s)
                    wait_s = min(2 * wait_s, LAST_AGAIN_S)

    def _next(self) -> Path | None:
        """What is to be told; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted is not None or self._is_ending)
            return self._wanted

    def _note(self, folder: Path, refusal: _Refusal | None, is_newest: bool) -> None:
        self._refusal = refusal
        if refusal is None:
            self._num_loaded += 1
            return
        # The same is told once, whichever checkpoint it was said of.
        reason = refusal.reason.replace(str(folder), "")
        # An older one may be refused because the run has deleted it.
        if is_newest and reason not in self._told and not self._is_ending:
            self._told.add(reason)
            self._notes.append(
                f"{self._url} has not loaded {folder.name}: {refusal.reason}; training goes on"
            )

    def _ask(self, folder: Path) -> _Refusal | None:
        """One request and its answer; None where the adapter is loaded."""
        body = {"lora_name": self._name, "lora_path": str(folder), "load_inplace": True}
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        try:
            with self._http.stream("POST", LOAD_PATH, json=body, timeout=timeout) as response:
                return _refusal_in(response)
        except httpx.HTTPError as error:
            return _Refusal(trouble(error), True)
        except (httpx.InvalidURL, httpx.StreamError, RuntimeError, OSError) as error:
            return _Refusal(str(error) or repr(error), True)

    def __enter__(self) -> ServeTo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_ending, self._wanted = True, None
            self._changed.notify_all()
        self._http.close()


def _refusal_in(response: httpx.Response) -> _Refusal | None:
    """What the server says, if it is no. httpx.HTTPError as it comes."""
    if response.status_code == 200:
        return None
    if response.has_redirect_location:
        return _Refusal(f"it sends on to {response.headers['Location']}; name that address", False)
    said = message_of(_beginning(response)) or "nothing"
    # A 403 says what it misses: a folder that the server may read, or a key of more rights.
    key = "; give its key with --api-key or LATHE_API_KEY" if response.status_code == 401 else ""
    may_pass = response.status_code >= 500 or response.status_code in PASSING
    return _Refusal(f"it answered {response.status_code}: {said}{key}", may_pass)


def _beginning(response: httpx.Response) -> str:
    """As much of an answer as is worth reading."""
    end_s, read = time.monotonic() + ANSWER_S, b""
    for some in response.iter_bytes():
        read += some
        if len(read) > MOST_ANSWER_BYTES or time.monotonic() > end_s:
            break
    return read.decode(errors="replace")
