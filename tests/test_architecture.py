"""Laws about the source itself: who may import whom, where the environment is read, and files that must load."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from serve import errors
from serve.config_file import load_config
from train.data import cache
from train.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("serve/**/*.py"), *ROOT.glob("train/**/*.py")])
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES
}
YAML_FILES = sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("configs/**/*.yaml")])
MAY_TOUCH_ENVIRONMENT = {"serve/blas.py", "serve/device.py", "serve/mcp/config.py"}
"""The last one what a file of its names, and nothing else."""
WALKS = {
    "serve/adapters": (
        *("layers", "formats", "fitting", "bank", "versions"),
        *("residency", "registry", "sums", "tools"),
    ),
    "train": ("recipe", "data", "adapters", "loop", "objectives", "watch", "foresee", "after"),
}
"""By folder its rooms, in the order of its walk: a room imports only itself and rooms before it. Of train/, the files
on top, and the bench, wire them."""
SCHEDULER = ROOT / "serve/engine/scheduler.py"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def nodes(path: Path) -> list[ast.Import | ast.ImportFrom | ast.Attribute]:
    """What a file imports and the attributes it names, wherever in the file: parsed once for all laws."""
    kinds = (ast.Import, ast.ImportFrom, ast.Attribute)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


def modules_imported(path: Path) -> set[str]:
    """Full names of the modules of ours that a file imports, wherever in the file, for types alone or not."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES


def steps(folder: str, rooms: tuple[str, ...]) -> list[tuple[str, str, str, str]]:
    """Imports within `folder`, from its rooms: the file, its room, the module, and that one's room, or its name if it
    stands on top."""
    within = folder.replace("/", ".") + "."
    return [
        (name_of(path), path.relative_to(ROOT / folder).parts[0], module, module[len(within) :].split(".")[0])
        for path in SOURCES
        if path.is_relative_to(ROOT / folder) and path.relative_to(ROOT / folder).parts[0] in rooms
        for module in modules_imported(path)
        if module.startswith(within)
    ]


def folders_of(folder: str) -> set[str]:
    return {path.parent.name for path in SOURCES if path.parent.parent == ROOT / folder}


@pytest.mark.parametrize(("folder", "rooms"), WALKS.items(), ids=WALKS)
def test_a_room_imports_only_rooms_before_it(folder, rooms):
    edges, order = steps(folder, rooms), {room: number for number, room in enumerate(rooms)}
    last = len(rooms)
    back = [
        f"{file} imports {module}" for file, room, module, to in edges if order.get(to, last) > order[room]
    ]
    assert len(edges) > 90
    assert not back, back


def test_every_folder_of_train_is_a_room_or_the_bench():
    assert folders_of("train") == {*WALKS["train"], "bench"}


def test_every_file_of_the_adapters_is_in_a_room():
    assert folders_of("serve/adapters") == {*WALKS["serve/adapters"]}
    assert [path.name for path in SOURCES if path.parent == ROOT / "serve/adapters"] == ["__init__.py"]


def test_serve_imports_neither_train_nor_the_front_door():
    wrong = {name_of(p): imported(p) & {"train", "lathe"} for p in SOURCES if name_of(p).startswith("serve/")}
    assert len(wrong) > 10
    assert not {name: names for name, names in wrong.items() if names}


def test_train_does_not_import_the_front_door():
    assert not [name_of(p) for p in SOURCES if "lathe" in imported(p)]


def test_the_scheduler_knows_no_arrays():
    assert not imported(SCHEDULER) & {"mlx", "numpy", "mlx_lm"}


def test_gather_mm_is_called_where_its_lanes_are_filled_and_nowhere_else():
    """On CUDA a stack whose rows fill no whole lane costs the process its GPU."""
    calls = {
        name_of(path)
        for path in SOURCES
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr == "gather_mm"
    }
    assert calls == {"serve/adapters/layers/lora.py"}


def test_adapters_are_evaluated_in_pieces_but_in_the_bank():
    """Elsewhere that is done beside a running engine; see serve/beside.py."""
    calls = {
        path.parent.name
        for path in SOURCES
        if path.is_relative_to(ROOT / "serve/adapters")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("eval", "async_eval")
    }
    assert calls == {"bank"}


def environment_reads(path: Path) -> Iterator[str]:
    for node in nodes(path):
        is_os = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        if is_os and node.attr in ("environ", "getenv", "putenv", "environb"):
            yield f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names} & {"environ", "getenv", "putenv"}
            yield from (f"{name_of(path)}:{node.lineno}" for _ in names)


def test_only_what_prepares_the_machine_or_is_told_so_by_name_reads_the_environment():
    places = [place for path in SOURCES for place in environment_reads(path)]
    assert not [place for place in places if place.partition(":")[0] not in MAY_TOUCH_ENVIRONMENT]
    assert places, "the scan finds what it looks for, in serve/device.py"


MACHINE_PATH = re.compile(r"""["'](/(?:work|home|Users|root|opt|mnt|tmp|var)/[^"'\s]*)["']""")


@pytest.mark.parametrize("folder", ["configs", "data", "recipes"])
def test_no_file_that_is_made_by_a_run_remembers_whose_machine_that_was(folder):
    """Exports, manifests and rows: what was written with an absolute path is made again from the root, or mended."""
    files = [
        path for path in (ROOT / folder).rglob("*") if path.suffix in (".json", ".jsonl", ".md", ".yaml")
    ]
    found = {name_of(path): match[1] for path in files if (match := MACHINE_PATH.search(path.read_text()))}
    assert len(files) > 2
    assert not found


def tree_lines(kind: type, indent: str = "") -> Iterator[str]:
    children = kind.__subclasses__()
    for number, child in enumerate(children):
        is_last = number == len(children) - 1
        inherited = [base.__name__ for base in child.__bases__ if not issubclass(base, errors.LatheError)]
        stdlib = f" ({inherited[0]})" if inherited else ""
        yield f"{indent}{'└── ' if is_last else '├── '}{child.__name__}{stdlib} {child.status} {child.code}"
        yield from tree_lines(child, indent + ("    " if is_last else "│   "))


def test_the_drawing_of_the_error_tree_is_true():
    root = errors.LatheError
    drawn = [line for line in errors.__doc__.splitlines()[1:] if line.strip()]
    wanted = [f"{root.__name__} {root.status} {root.code}", *tree_lines(root)]
    # Columns are aligned by hand; indentation counts, runs of spaces inside a line do not.
    assert [squeeze(line) for line in drawn] == [squeeze(line) for line in wanted]


def squeeze(line: str) -> tuple[int, str]:
    bare = line.lstrip(" │├└─")
    return len(line) - len(bare), " ".join(bare.split())


def test_every_deliberate_error_is_also_one_python_users_know():
    for kind in (errors.LatheError, *errors.LatheError.__subclasses__()):
        assert not issubclass(kind, KeyError)
        assert kind is errors.LatheError or len(kind.__bases__) == 2, kind


@pytest.mark.parametrize("path", YAML_FILES, ids=name_of)
def test_every_yaml_in_recipes_and_configs_loads(path):
    if path.parent.name == "recipes":
        load_recipe(path)
    else:
        load_config(path)


def test_there_are_recipes_and_they_are_yaml_mappings():
    assert len([path for path in YAML_FILES if path.parent.name == "recipes"]) >= 2
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in YAML_FILES)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_file_opens_by_saying_what_it_is(path):
    tree = ast.parse(path.read_text())
    if tree.body:
        said = ast.get_docstring(tree)
        assert said
        assert len(said.splitlines()) <= 30


def test_whatever_writes_prompts_is_part_of_what_tokenized_rows_are_called_by():
    hashed = {module.__name__ for module in cache.CODE}
    writers = modules_imported(ROOT / "serve/model/template.py") - {"serve.errors"}
    assert "serve.model.turns" in writers
    assert writers <= hashed


def test_readmes_tree_has_a_line_for_every_file_and_none_for_files_that_are_gone():
    block = next(b for b in (ROOT / "README.md").read_text().split("```") if "\nlathe.py" in b)
    shown, folders = set(), []
    for line in block.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name] if name.endswith("/") else []
        if name.endswith(".py"):
            shown.add("".join(folders) + name)
    there = {name_of(path) for path in SOURCES if path.name != "__init__.py"} | {"lathe.py"}
    assert shown == there
