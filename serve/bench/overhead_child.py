"""One runtime that is asked in two ways: over HTTP, by whoever has its address, and by lines on standard input.

    python -m serve.bench.overhead_child CONFIG

CONFIG is a ServeConfig's keys as JSON. It writes a line, {"url": …}, and then one for each that it reads:
{"prompts": [chat message, …], "max_tokens": n, "concurrency": c} puts these chats, as token ids, to the engine and
says how long that took; {"cpu": true} says what this process has had of processors. It serves as `lathe serve` does.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from serve.api.server import bind, make_server, url_of
from serve.config import ServeConfig
from serve.engine.request import Event, Request, Sampling
from serve.logs import logging_to
from serve.model.prompt import Prompt
from serve.runtime import Runtime


@dataclass
class Direct:
    """A closed loop of requests to an engine's worker: as many as `concurrency` run, and who ends lets the next one
    in, on the worker's thread."""

    runtime: Runtime
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    ttft_s: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def run(self, concurrency: int) -> dict[str, Any]:
        """Put all of them, and wait. Raises what a request ended with."""
        self._done: Future[None] = Future()
        self._num_ended, self._num_sent = 0, min(concurrency, len(self.prompts))
        start_s = time.perf_counter()
        for number in range(self._num_sent):
            self._send(number)
        self._done.result()
        wall_s = time.perf_counter() - start_s
        return {"wall_s": wall_s, "ttft_s": self.ttft_s, "num_tokens": self.num_tokens}

    def _send(self, number: int) -> None:
        sent_s = time.perf_counter()
        is_first = True

        def hear(event: Event) -> None:
            nonlocal is_first
            if is_first and event.token_ids:
                is_first = False
                self.ttft_s.append(time.perf_counter() - sent_s)
            self.num_tokens += len(event.token_ids)
            if event.finish is not None:
                self._end(event)

        sampling = Sampling(max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True)
        prompt = Prompt(tuple(self.prompts[number]))
        self.runtime.worker.submit(
            Request(f"direct-{number}", prompt, sampling, continues_prompt=False), hear
        )

    def _end(self, event: Event) -> None:
        self._num_ended += 1
        if event.error is not None and not self._done.done():
            self._done.set_exception(event.error)
        elif self._num_sent < len(self.prompts):
            self._num_sent += 1
            self._send(self._num_sent - 1)
        elif self._num_ended == len(self.prompts) and not self._done.done():
            self._done.set_result(None)


def _ids(runtime: Runtime, messages: Sequence[str]) -> list[Sequence[int]]:
    """What the server makes of chats of one message."""
    tokenizer = runtime.model.tokenizer
    chats = [[{"role": "user", "content": message}] for message in messages]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]


def _answer(runtime: Runtime, http: threading.Thread, asked: dict[str, Any]) -> dict[str, Any]:
    if asked.get("cpu"):
        return {"cpu_s": time.process_time(), "http_cpu_s": thread_cpu_s(http)}
    return Direct(runtime, _ids(runtime, asked["prompts"]), asked["max_tokens"]).run(asked["concurrency"])


def thread_cpu_s(thread: threading.Thread) -> float | None:
    """Seconds on a processor that a running thread has had; None where the system does not say."""
    if not hasattr(time, "pthread_getcpuclockid") or thread.ident is None:
        return None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def main(config: str) -> None:
    """Serve, and answer line by line until standard input ends."""
    told = ServeConfig(**json.loads(config))
    with logging_to(told.log_level, told.log_format), bind("127.0.0.1", 0) as listener:
        runtime = Runtime.start(told)
        gc.collect()
        gc.freeze()
        server = make_server(runtime)
        http = threading.Thread(target=server.run, args=([listener],), name="lathe-http")
        http.start()
        try:
            print(json.dumps({"url": url_of(listener)}), flush=True)
            for line in sys.stdin:
                print(json.dumps(_answer(runtime, http, json.loads(line))), flush=True)
        finally:
            server.should_exit = True
            http.join()
            runtime.close()


if __name__ == "__main__":
    main(sys.argv[1])
