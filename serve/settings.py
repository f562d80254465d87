"""Strict YAML -> one frozen pydantic model; every problem at once, each with file, line and key.

What PyYAML would do quietly is not done here: a repeated key is refused with both lines, `1e-5` is a float,
`no` and `on` are words, `010` and `1:30` are not numbers. A known key whose value is null counts as not
written.
Recipes and serving configurations share this; it knows no key of either.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from serve.errors import ConfigError

T = TypeVar("T", bound=BaseModel)
Key = tuple[str | int, ...]


class Strict(BaseModel):
    """Base of every configuration: frozen, no unknown keys, the meaning of a knob written under it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )


class Problems(ValueError):
    """Raised by a model's own validator to report several (key, message) pairs at once."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {message}" for key, message in problems))
        self.problems = list(problems)


def load_yaml(
    path_or_text: Path | str,
    model: type[T],
    overrides: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
    foreign: Mapping[str, str] | None = None,
) -> T:
    """Read and check a configuration.

    path_or_text  a Path, or a one-line string ending in .yaml or .yml, is a file; any other string is YAML
    overrides     `a.b=value` each, as --set gives them; the value is YAML; `datasets.0.path=x` enters a list
    aliases       top-level spellings that are accepted -> the dotted key they stand for
    foreign       spellings from elsewhere that are refused -> what to write instead, for the message
    Raises ConfigError that lists all problems.
    """
    source, text = _read(path_or_text)
    document = _parse(text, source)
    problems = _rename(document, aliases or {})
    for override in overrides:
        problems += _override(document, override, aliases or {})
    data = _without_nulls(document.data, [model])
    known = {**(foreign or {}), **{k: f"write {v}" for k, v in (aliases or {}).items()}}
    try:
        loaded = model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += list(_explain(error, document, data, model, known))
        raise ConfigError(_listing(source, problems)) from None
    if problems:
        raise ConfigError(_listing(source, problems))
    return loaded


def dump(model: BaseModel) -> str:
    """The resolved configuration as YAML that `load_yaml` reads back to an equal model."""
    data = model.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


# Reading: YAML 1.2's core schema on PyYAML's machinery.


@dataclass
class _Document:
    """A parsed file; `origins` says where each key stands: a line number, or the --set that gave it."""

    source: str
    data: dict[str, Any]
    origins: dict[Key, int | str]

    def origin(self, key: Key) -> str:
        """`file:line`, of the key or of the nearest thing around it."""
        for length in range(len(key), -1, -1):
            found = self.origins.get(key[:length])
            if found is not None:
                return found if isinstance(found, str) else f"{self.source}:{found}"
        return self.source


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = [
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", r"^<<$", "<"),
]
for _schema in (_Loader, _Dumper):
    _schema.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _schema.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def _read(path_or_text: Path | str) -> tuple[str, str]:
    if isinstance(path_or_text, str) and (
        "\n" in path_or_text or not path_or_text.endswith((".yaml", ".yml"))
    ):
        return "<text>", path_or_text
    path = Path(path_or_text)
    try:
        return str(path), path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _parse(text: str, source: str) -> _Document:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        origins: dict[Key, int | str] = {}
        repeated = list(_walk(node, (), origins)) if node is not None else []
        data = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{source}:{line}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not YAML: {error}") from None
    finally:
        loader.dispose()
    if repeated:
        raise ConfigError(_listing(source, [f"{source}:{message}" for message in repeated]))
    if not isinstance(data, dict):
        raise ConfigError(f"{source}:1: found {_show(data)}; expected a mapping of keys to values")
    return _Document(source, data, origins)


def _walk(node: yaml.Node, key: Key, origins: dict[Key, int | str]) -> Iterator[str]:
    """Note each key's line in `origins`; yields one message for each repeated key."""
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for name_node, value in node.value:
            name, line = str(name_node.value), name_node.start_mark.line + 1
            if name in first and name != "<<":
                dotted = _dotted((*key, name))
                yield f"{line}: {dotted}: written twice, first on line {first[name]}; keep one"
                continue
            first[name] = line
            origins[(*key, name)] = line
            yield from _walk(value, (*key, name), origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*key, index)] = item.start_mark.line + 1
            yield from _walk(item, (*key, index), origins)


# Renaming and overriding, on plain dictionaries.


def _rename(document: _Document, aliases: Mapping[str, str]) -> list[str]:
    """Move accepted foreign spellings to the keys they stand for; two spellings of one knob are a problem."""
    problems = []
    for spelled, ours in aliases.items():
        if spelled not in document.data:
            continue
        value, origin = document.data.pop(spelled), document.origins.get((spelled,))
        target = tuple(ours.split("."))
        if _get(document.data, target) is not None:
            where = document.origin((spelled,))
            problems.append(f"{where}: {spelled}: the same knob as {ours}, which is also written; keep one")
            continue
        problem = _set(document.data, target, value)
        if problem:
            problems.append(f"{document.origin((spelled,))}: {spelled}: {problem}")
        elif origin is not None:
            document.origins[target] = origin
    return problems


def _override(document: _Document, override: str, aliases: Mapping[str, str]) -> list[str]:
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted:
        return [f"--set {override}: expected key=value, for example --set iters=100"]
    dotted = aliases.get(dotted, dotted)
    key: Key = tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return [f"--set {override}: the value is not YAML; quote it"]
    problem = _set(document.data, key, value)
    if problem:
        return [f"--set {override}: {problem}"]
    for stale in [origin for origin in document.origins if origin[: len(key)] == key]:
        del document.origins[stale]
    for length in range(1, len(key) + 1):
        document.origins.setdefault(key[:length], f"--set {override}")
    return []


def _get(data: Any, key: Key) -> Any:
    try:
        for part in key:
            data = data[part]
    except (LookupError, TypeError):
        return None
    return data


def _set(data: dict[str, Any], key: Key, value: Any) -> str | None:
    """Put `value` at `key`, making mappings on the way. Returns what stood in the way, if anything."""
    here: Any = data
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                return f"{_dotted(key[:depth])} has {len(here)} items, numbered from 0; found {part}"
        elif isinstance(here, dict):
            part = str(part)
            if not last and here.get(part) is None:
                here[part] = {}
        else:
            return f"{_dotted(key[:depth])} is {_show(here)}, which has no key {part}"
        if last:
            here[part] = value
        else:
            here = here[part]
    return None


def _without_nulls(data: Any, models: Sequence[type[BaseModel]]) -> Any:
    """The same tree, less the known keys that are null; unknown ones stay, to be refused by name."""
    if isinstance(data, list):
        return [_without_nulls(item, models) for item in data]
    if not isinstance(data, dict):
        return data
    known = {name for model in models for name in model.model_fields}
    return {
        str(name): _without_nulls(value, _models_under(models, str(name)))
        for name, value in data.items()
        if value is not None or str(name) not in known
    }


# Explaining what pydantic found.


def _models_under(models: Sequence[type[BaseModel]], name: str) -> list[type[BaseModel]]:
    """The models a value of field `name` may be, looking through lists, unions and annotations."""
    found: list[type[BaseModel]] = []
    pending = [model.model_fields[name].annotation for model in models if name in model.model_fields]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            pending.extend(get_args(annotation))
    return found


def _explain(
    error: ValidationError, document: _Document, data: Any, model: type[BaseModel], known: Mapping[str, str]
) -> Iterator[str]:
    """One line a problem. The branches of a union that failed at one key are told as one."""
    expected: dict[Key, list[str]] = {}
    seen: set[Key] = set()
    for item in error.errors():
        if item["type"] == "default_factory_not_called":
            continue  # its field was not written, and what it depends on is reported
        key, models = _locate(item["loc"], data, model)
        seen.add(key)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Problems):
            for name, message in cause.problems:
                inner = (*key, *(int(part) if part.isdigit() else part for part in name.split(".")))
                yield f"{document.origin(inner)}: {_dotted(inner)}: {message}"
        elif item["type"] == "extra_forbidden":
            yield f"{document.origin(key)}: {_dotted(key)}: unknown key{_hint(str(key[-1]), models, known)}"
        elif item["type"].startswith("union_tag"):
            tag = item["ctx"]["discriminator"].strip("'")
            found = _show(item["ctx"]["tag"]) if "tag" in item["ctx"] else "nothing"
            wanted = item["ctx"].get("expected_tags") or _tags(key, models, tag)
            inner = (*key, tag)
            yield f"{document.origin(inner)}: {_dotted(inner)}: found {found}; expected one of {wanted}"
        elif item["type"] == "missing":
            meaning = _meaning(str(key[-1]), models)
            yield f"{document.origin(key[:-1])}: {_dotted(key)}: missing{meaning}"
        elif isinstance(cause, ValueError):
            yield f"{document.origin(key)}: {_dotted(key)}: found {_show(item['input'])}; {cause}"
        else:
            text = f"{item['msg']}{_closest(item)}"
            expected.setdefault(key, []).append(
                text.removeprefix("Input should be ").removeprefix("a valid ")
            )
    for key, texts in expected.items():
        if any(deeper[: len(key)] == key and len(deeper) > len(key) for deeper in seen):
            continue  # a union's other branch; the one that was meant has told more
        found = _show(_get(data, key))
        wanted = " or ".join(dict.fromkeys(texts))
        wanted += _yaml_word(found, wanted)
        yield f"{document.origin(key)}: {_dotted(key)}: found {found}; expected {wanted}"


def _locate(
    loc: tuple[int | str, ...], data: Any, model: type[BaseModel]
) -> tuple[Key, list[type[BaseModel]]]:
    """pydantic's location, less the names of union branches, and the models that own the key."""
    key: Key = ()
    owners: list[type[BaseModel]] = [model]
    models = owners
    for part in loc:
        names = {name for one in models for name in one.model_fields}
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int)
        )
        if len(models) > 1 and (branch := [one for one in models if _is_tagged(one, part, data)]):
            models = branch
            continue
        if not inside and part not in names:
            continue
        key = (*key, part)
        data = data[part] if inside and (isinstance(data, dict) or part < len(data)) else None  # type: ignore[operator]
        if isinstance(part, str):
            owners, models = models, _models_under(models, part)
    return key, owners


def _is_tagged(model: type[BaseModel], tag: int | str, data: Any) -> bool:
    """Whether the branch of a union goes by that word, and what was written says it."""
    is_said = tag in data.values() if isinstance(data, dict) else data == tag
    return is_said and any(tag in get_args(field.annotation) for field in model.model_fields.values())


def _tags(key: Key, models: Sequence[type[BaseModel]], tag: str) -> str:
    """The words that the branches of a union go by, for an item that names none. `models` own its key."""
    name = next((part for part in reversed(key) if isinstance(part, str)), "")
    branches = reversed(_models_under(models, name))
    words = [
        get_args(branch.model_fields[tag].annotation) for branch in branches if tag in branch.model_fields
    ]
    return ", ".join(repr(word) for choice in words for word in choice)


def _hint(name: str, models: Sequence[type[BaseModel]], known: Mapping[str, str]) -> str:
    if name in known:
        return f"; {known[name]}"
    names = sorted({field for model in models for field in model.model_fields})
    key, colon, value = name.partition(":")
    if colon and key in names:
        return f"; YAML wants a space after the colon: {key}: {value}"
    close = difflib.get_close_matches(name, [*names, *known], n=1, cutoff=0.7)
    if not close:
        return f"; expected one of {', '.join(names)}"
    return f"; did you mean {close[0]}?" + (f" ({known[close[0]]})" if close[0] in known else "")


def _closest(item: Any) -> str:
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
    close = difflib.get_close_matches(item["input"], choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _yaml_word(found: str, wanted: str) -> str:
    word = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(found.strip("'").lower())
    if word is None or not wanted.startswith("boolean"):
        return ""
    return f"; write {word} (only true and false are booleans here)"


def _meaning(name: str, models: Sequence[type[BaseModel]]) -> str:
    said = [model.model_fields[name].description for model in models if name in model.model_fields]
    return f"; expected: {' '.join(said[0].split())}" if said and said[0] else ""


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _listing(source: str, problems: Sequence[str]) -> str:
    problems = sorted(
        problems, key=lambda problem: int((re.findall(r"^[^ ]*?:(\d+): ", problem) or ["0"])[0])
    )
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{source} has {len(problems)} problems:", *problems])
