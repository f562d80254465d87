"""What the parts of `lathe demo` share: a recipe trained, held-out prompts asked over HTTP, answers scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from serve.errors import StoppedError, TrainingError
from train.recipe.recipe import Recipe, load_recipe
from train.run import run as run_recipe
from train.watch.summary import RunSummary

CLIENTS = 16
MAX_TOKENS = 64
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class HeldOut:
    """One prompt that no adapter was trained on, and its right answer."""

    messages: list[dict[str, Any]]
    answer: str

    def is_met_by(self, text: str) -> bool:
        """Equal, white space around it aside."""
        return text.strip() == self.answer.strip()


@dataclass(frozen=True)
class Reply:
    """What the server said to one prompt."""

    id: str
    text: str
    num_tokens: int


@dataclass(frozen=True)
class Score:
    """Exact answers of one model to the held-out prompts."""

    exact_match: float
    num_exact: int
    num_rows: int


def recipe_of(home: Path, folder: Path, name: str, **more: str | int) -> Recipe:
    """The recipe of that name, its model and data read from the checkout `home`, its run written into `folder`; with
    `more` of its keys changed."""
    path = home / "recipes" / f"{name}.yaml"
    asked = load_recipe(path)
    changes = {"model": home / asked.model, "data": home / str(asked.data), "adapter_path": folder / name}
    # JSON quoting is YAML's too, whatever the path holds.
    overrides = [f"{key}={json.dumps(str(path))}" for key, path in changes.items()]
    overrides += [f"{key}={json.dumps(value)}" for key, value in more.items()]
    return load_recipe(path, overrides)


def trained(recipe: Recipe, console: Console) -> RunSummary:
    """Train it to its end. KeyboardInterrupt if a signal ended it, TrainingError if something else did."""
    console.rule(f"Training {Path(recipe.adapter_path).name}", align="left")
    summary = run_recipe(recipe, console=console)
    if summary.signal is not None:
        raise KeyboardInterrupt
    if summary.status != "finished":
        raise TrainingError(f"{recipe.adapter_path}: the run ended as {summary.status!r}")
    return summary


def held_out(home: Path, data: str) -> list[HeldOut]:
    """The test rows of a folder of the checkout's `data/`, as they stand: pictures are data URIs."""
    lines = (home / "data" / data / "test.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    return [HeldOut(messages[:-1], str(messages[-1]["content"])) for messages in chats]


async def ask(
    http: httpx.AsyncClient, model: str, row: HeldOut, told: Callable[[], None], user: str | None = None
) -> Reply:
    """One prompt's greedy answer; `told` is called when it is there. StoppedError if the server refuses."""
    body = {
        "model": model,
        "messages": row.messages,
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0,
        "user": user,
    }
    reply = checked(await http.post("/v1/chat/completions", json=body))
    told()
    text = str(reply["choices"][0]["message"]["content"])
    return Reply(str(reply["id"]), text, int(reply["usage"]["completion_tokens"]))


def checked(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON. Raises StoppedError with the server's words if it refused."""
    if response.status_code != 200:
        where = f"{response.request.method} {response.request.url.path}"
        raise StoppedError(f"{where} answered {response.status_code}: {response.text[:500]}")
    is_json = response.headers.get("content-type", "").startswith("application/json")
    body = response.json() if is_json else {}
    return body if isinstance(body, dict) else {}


def score_of(hits: Sequence[bool]) -> Score:
    return Score(exact_match=sum(hits) / len(hits), num_exact=sum(hits), num_rows=len(hits))


def client(url: str) -> httpx.AsyncClient:
    """The pool keeps the rest waiting: CLIENTS requests at once, and no limit on how long one waits for its turn."""
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(TIMEOUT_S, pool=None), limits=limits)


class Bar:
    """A progress bar in a terminal, one line elsewhere; gives a function that counts one more."""

    def __init__(self, title: str, total: int, console: Console) -> None:
        self._title, self._total, self._console = title, total, console
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Callable[[], None]:
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: {self._total} requests", highlight=False)
        self._progress.start()
        task = self._progress.add_task(self._title, total=self._total)
        return lambda: self._progress.advance(task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
