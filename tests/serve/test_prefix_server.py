"""A real server over a folder of prefixes: killed while it streams, and started again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serve.cache.disk import NAME

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


@contextmanager
def served(
    model_folder: Path, folder: Path, **fields: object
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server process of its own, killed at the end."""
    config = folder / "c.yaml"
    settings = {
        "model": str(model_folder),
        "name": "lively",
        "port": 0,
        "prefix_cache_dir": "prefixes",
        **fields,
    }
    config.write_text(json.dumps(settings))
    code = "import sys; from serve.config_file import load_config; from serve.api.server import run; "
    command = [sys.executable, "-c", f"{code}run(load_config(sys.argv[1]))", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            url = process.stdout.readline().split()[-1].removesuffix("/v1")
            with httpx.Client(base_url=url, timeout=120) as http:
                yield process, http
        finally:
            process.kill()


def ask(http: httpx.Client, prompt: str, **fields: object) -> tuple[str, int]:
    """The answer's text, and how many tokens of the prompt nobody computed."""
    body = {
        "model": "lively",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 16,
        "ignore_eos": True,
        **fields,
    }
    answer = http.post("/v1/completions", json=body).raise_for_status().json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_server_killed_in_the_middle_of_a_stream_finds_what_it_had_written(model_folder, tmp_path):
    """What was on disk is found to its last token and gives the same text; what was not is computed."""
    prompts = [f"{number}: the quick brown fox jumps over the lazy dog " * 12 for number in range(4)]
    with served(model_folder, tmp_path) as (process, http):
        before = [ask(http, prompt) for prompt in prompts]
        assert [cached for _, cached in before] == [0] * 4
        # Four files a prompt (three chunks, the answer's tokens), written in order.
        while len([path for path in (tmp_path / "prefixes").iterdir() if NAME.fullmatch(path.name)]) < 13:
            ask(http, "tick", max_tokens=1)
        body = {
            "model": "lively",
            "prompt": prompts[0] + "and",
            "max_tokens": 300,
            "stream": True,
            "ignore_eos": True,
        }
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(5):
                next(lines)
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
    with served(model_folder, tmp_path) as (process, http):
        after = [ask(http, prompt) for prompt in prompts]
        assert [cached for _, cached in after[:3]] == [len(prompt) - 1 for prompt in prompts[:3]]
        assert [text for text, _ in after] == [text for text, _ in before]
        assert len({text for text, _ in after}) == 4
        stats = http.get("/v1/cache/stats").json()
        assert stats["num_disk_hit_tokens"] >= sum(len(prompt) - 1 for prompt in prompts[:3])
        assert stats["num_disk_errors"] == 0
