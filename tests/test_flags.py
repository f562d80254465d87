"""README's tables of other servers' flags: none is left out, and what stands beside it is really there."""

from __future__ import annotations

import re
from pathlib import Path

import mlx_vlm.server.cli
import pytest
import typer

import lathe
from serve.config import ServeConfig
from serve.settings import Strict

README = Path(lathe.__file__).parent / "README.md"
FLAG = re.compile(r"--[a-z][a-z-]+")


def tables() -> dict[str, list[tuple[str, str]]]:
    """By its first heading, a table's rows: their flags, our words."""
    text = README.read_text().split("<!-- flags -->")[1].split("<!-- /flags -->")[0]
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| "):
            continue
        if cells[1] == "`lathe serve`":
            rows = found.setdefault(cells[0].strip("`"), [])
        else:
            rows.append((cells[0], cells[1]))
    return found


def ours() -> set[str]:
    command = typer.main.get_command(lathe.app).commands["serve"]
    return {name for option in command.params for name in option.opts if name.startswith("--")}


def test_every_flag_of_mlx_vlms_server_has_its_line():
    source = Path(mlx_vlm.server.cli.__file__).read_text()
    theirs = set(re.findall(r'"(--[a-z0-9-]+)"', source))
    told = {flag for their, _ in tables()["mlx_vlm.server"] for flag in FLAG.findall(their)}
    assert len(theirs) > 30
    assert theirs - told == set()
    assert told - theirs == set()


def test_no_flag_is_told_twice_and_every_line_has_an_answer():
    for rows in tables().values():
        flags = [flag for their, _ in rows for flag in FLAG.findall(their)]
        assert len(flags) == len(set(flags))
        assert all(our for _, our in rows)


def test_every_flag_of_ours_that_is_named_is_one():
    named = {flag for rows in tables().values() for _, our in rows for flag in FLAG.findall(our)}
    assert len(named) > 25
    assert named - ours() == set()


def key_exists(model: type[Strict], path: list[str]) -> bool:
    field = model.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return field is not None
    return key_exists(field.annotation, path[1:])


@pytest.mark.parametrize(
    "key",
    sorted(
        {key for rows in tables().values() for _, our in rows for key in re.findall(r"key:([a-z_.]+)", our)}
    ),
)
def test_every_key_that_is_named_is_one(key):
    assert key_exists(ServeConfig, key.split("."))
    assert not key_exists(ServeConfig, ["no_such_key"])
