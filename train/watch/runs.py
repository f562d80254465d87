"""`lathe runs`: the runs found under some folders, newest first: how far, how good, and where each came from.

Reads run.json, summary.json, metrics.jsonl and adapter_config.json, as far as they are there.
A folder that cannot be read is listed with the reason. Loads no weights and changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from serve.adapters.formats.header import read_specs
from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE
from serve.adapters.formats.published import CHECKPOINTS
from serve.errors import AdapterError, NotFoundError
from serve.tables import Table, numbers, words
from train.recipe.objectives import OBJECTIVES
from train.watch import curve, metrics, record, summary
from train.watch.progress import duration

DEFAULT_FOLDERS = ("runs", "adapters")
MAX_DEPTH = 5
INSIDE_A_RUN = frozenset({CHECKPOINTS, metrics.TENSORBOARD_FOLDER, "wandb"})
HASH_LETTERS = 8


@dataclass(frozen=True)
class Run:
    """One run's folder. Hashes as in the manifest; seconds of wall clock; None is not known."""

    folder: str
    name: str
    status: str
    """finished, stopped_early, interrupted (by a signal or a kill), running, failed, or broken."""
    problem: str = ""
    """Of a failed or broken one."""
    steps: int = 0
    judged_by: str = "loss"
    """What a person asks of its validations: the loss, or a measure of its objective (grpo: reward)."""
    best_value: float | None = None
    """Its best: the lowest loss, or the highest of a measure."""
    best_step: int | None = None
    metric: str | None = None
    metric_value: float | None = None
    base_model: str = ""
    base_fingerprint: str = ""
    objective: str = ""
    fine_tune_type: str = ""
    data_hash: str = ""
    content_hash: str = ""
    """Of the published adapter; what a warm start of another run names."""
    parent: str = ""
    """Of a warm start: the adapter it began with."""
    parent_hash: str = ""
    resumed_from: str = ""
    created: str = ""
    seconds: float | None = None


def find(folders: Sequence[Path]) -> list[Run]:
    """All runs under the folders, newest first; those of no known date last. NotFoundError names a missing folder."""
    for folder in folders:
        if not folder.is_dir():
            raise NotFoundError(f"no folder {folder}; `lathe runs FOLDER` looks for runs under FOLDER")
    found = {path.resolve(): path for folder in folders for path in _run_folders(folder)}
    return sorted((describe(path) for path in found.values()), key=lambda run: run.created, reverse=True)


def _run_folders(root: Path) -> Iterator[Path]:
    for path, names, files in os.walk(root):
        here = Path(path)
        if _is_run(here, files):
            yield here
        deep = len(here.relative_to(root).parts) >= MAX_DEPTH
        names[:] = [] if deep else [n for n in names if n not in INSIDE_A_RUN and not n.startswith(".")]


def _is_run(folder: Path, files: Sequence[str]) -> bool:
    names = set(files)
    if record.FILE in names or {metrics.FILE, summary.FILE} <= names:
        return True
    return CONFIG_FILE in names and (metrics.FILE in names or "lineage" in _text(folder / CONFIG_FILE))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def describe(folder: Path) -> Run:
    """What is known of a run's folder. Never raises for what it finds there."""
    problems: list[str] = []
    said = _json(folder / record.FILE, problems)
    ended = _json(folder / summary.FILE, problems)
    manifest = _json(folder / CONFIG_FILE, problems)
    lineage = manifest.get("lineage") if isinstance(manifest.get("lineage"), dict) else {}
    known = {**(lineage or {}), **{name: value for name, value in said.items() if value}}
    history, last_s, first_s = curve.read(folder), 0.0, 0.0
    for row in metrics.rows_of(folder):
        at_s = row.get("time")
        if isinstance(at_s, int | float):
            first_s, last_s = first_s or at_s, at_s
    entry = OBJECTIVES.get(_word(known.get("objective")))
    judged_by = entry.shown if entry else "loss"
    best = _best(history, judged_by, ended)
    points = [*history.train_loss, *history.valid_loss]
    status = "broken" if problems else _status(folder, ended, said)
    if status in summary.ENDED:
        problems += _adapter_problems(folder, ended, lineage or {})
        status = "broken" if problems else status
    return Run(
        folder=str(folder),
        name=folder.resolve().name,
        status=status,
        problem="; ".join(problems) or str(known.get("error", "")) * (status == "failed"),
        steps=_number(ended.get("steps")) or max((step for step, _ in points), default=0),
        judged_by=judged_by,
        best_value=best[1],
        best_step=best[0],
        metric=_word(ended.get("metric")) or None,
        metric_value=_float(ended.get("exact_match", ended.get("metric_after"))),  # its name until 0.1
        base_model=_word(known.get("base_model")),
        base_fingerprint=_word(known.get("base_fingerprint")),
        objective=_word(known.get("objective")),
        fine_tune_type=_word(known.get("fine_tune_type") or manifest.get("fine_tune_type")),
        data_hash=_word(known.get("data_hash")),
        content_hash=_word((lineage or {}).get("content_hash")),
        parent=_word(known.get("parent")),
        parent_hash=_word(known.get("parent_hash")),
        resumed_from=_word(known.get("resumed_from")),
        created=_word(known.get("created")),
        seconds=_float(ended.get("seconds"), last_s - first_s if last_s else None),
    )


def _best(history: curve.History, judged_by: str, ended: dict[str, Any]) -> tuple[int | None, float | None]:
    """(step, value) of the best validation. By loss, what the summary says holds: it may be by another measure."""
    if judged_by != "loss":
        return history.highest(judged_by) or (None, None)
    step, value = history.best or (None, None)
    return _number(ended.get("best_step")) or step, _float(ended.get("best_valid_loss"), value)


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    """An object, {} where there is no such file; what is wrong with one that is there goes to `problems`."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name}: holds {type(value).__name__}, an object was expected")
        return {}
    return value


def _status(folder: Path, ended: dict[str, Any], said: dict[str, Any]) -> str:
    if _word(ended.get("status")):
        return _word(ended.get("status"))
    if said.get("error"):
        return "failed"
    mine = record.read(folder)
    if mine is not None and mine.is_alive:
        return "running"
    # An adapter whose run left no summary: published, or never trained by us.
    return "interrupted" if said or (folder / metrics.FILE).exists() else "finished"


def _adapter_problems(folder: Path, ended: dict[str, Any], lineage: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the adapter of a run that has ended, as far as headers and hashes tell."""
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            yield f"{name} is missing"
            return
    try:
        read_specs(folder / TENSORS_FILE)
    except AdapterError as error:
        yield str(error)
    published, here = _word(ended.get("content_hash")), _word(lineage.get("content_hash"))
    if published and here and published != here:
        yield f"{CONFIG_FILE} is of another adapter than {summary.FILE}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _float(value: Any, otherwise: float | None = None) -> float | None:
    return float(value) if isinstance(value, int | float) else otherwise


def tables(runs: Sequence[Run]) -> Iterator[Table]:
    """For a terminal of 80 columns: how far and how good, then where from. Hashes are cut to eight letters."""
    has_metric = any(run.metric for run in runs)
    has_measure = any(run.judged_by != "loss" for run in runs)
    best = "best validation" if has_measure else "valid loss"
    measures = numbers("steps", best, *(["metric"] if has_metric else []))
    results = Table("run", "status", *measures, "began", *numbers("time"))
    styles = {"failed": "red", "broken": "red", "running": "green", "interrupted": "yellow"}
    for run in runs:
        value = f"{run.best_value:.4f}" if run.best_value is not None else ""
        at = f" @{run.best_step:,}" if run.best_step is not None and value else ""
        name = f"{run.judged_by} " if has_measure and value else ""
        metric = f"{run.metric} {run.metric_value:.1%}" if run.metric and run.metric_value is not None else ""
        status = Text(run.status, style=styles.get(run.status, ""))
        time = duration(run.seconds) if run.seconds is not None else ""
        began = run.created[:16].replace("T", " ")
        measured = (name + value + at, metric) if has_metric else (name + value + at,)
        results.add(Text(run.folder), status, f"{run.steps:,}", *measured, began, time)
    yield results
    origins = Table("run", words("trained"), words("base"), "data", words("began with"))
    for run in runs:
        base = f"{Path(run.base_model).name} {_short(run.base_fingerprint)}".strip()
        trained = " ".join(word for word in (run.fine_tune_type, run.objective) if word)
        origins.add(*map(Text, (run.folder, trained, base, _short(run.data_hash), _origin(run, runs))))
    yield origins


def _origin(run: Run, runs: Sequence[Run]) -> str:
    """The run a warm start came from, by name if it is in the list; and whether it was continued."""
    words = []
    if run.parent or run.parent_hash:
        same = [other for other in runs if run.parent_hash and other.content_hash == run.parent_hash]
        same.sort(key=lambda other: Path(other.folder).resolve() != Path(run.parent).resolve())
        words.append(f"{same[0].name if same else run.parent} {_short(run.parent_hash)}".strip())
    if run.resumed_from:
        words.append(f"resumed at {Path(run.resumed_from).name}")
    return ", ".join(words)


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:HASH_LETTERS]


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything, for `--json`."""
    return {"runs": [asdict(run) for run in runs]}
