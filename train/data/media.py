"""Pictures, clips and sounds of a row: columns and parts in, references in the order of their places out.

A part says where it stands; of a column, `<image>` in the text does, or a part without a value of its own
(`{"type": "image"}`); where neither does, all of it stands before the first user's words. No file is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from serve.model.messages import MEDIA_PARTS
from serve.model.prompt import MediaKind
from train.data.example import Message

COLUMNS: dict[str, MediaKind] = {
    "images": "image",
    "image": "image",
    "videos": "video",
    "video": "video",
    "audios": "audio",
    "audio": "audio",
}
"""Keys beside a row's words."""
PLACES: dict[str, MediaKind] = {"<image>": "image", "<video>": "video", "<audio>": "audio"}
"""What stands in a text where a column's next one belongs."""
HINTS = ("type", "detail", "uuid", "cache_control", "index")
"""Keys of a part that say nothing of where its medium lies; by `index` it is that one of the row's column."""
VALUES = ("bytes", "base64", "data", "url", "path")
"""Keys of what holds a medium; of several, the first: beside bytes, a path is where they once lay."""

Source = str | bytes | tuple["Source", ...]
"""An absolute path, an address or a data URI; a file's bytes; or the frames of a clip, one by one."""


@dataclass(frozen=True)
class MediaRef:
    """One picture, clip or sound, as its row names it.

    place  where it stands in the row: `images.1`, `messages.0.content.2`
    """

    kind: MediaKind
    source: Source
    place: str

    @cached_property
    def identity(self) -> str:
        """Another one for other content: of a file its path, size and time; of bytes their hash."""
        return repr((self.kind, identity_of(self.source)))

    @property
    def shown(self) -> str:
        """As messages name it."""
        if isinstance(self.source, str) and not self.source.startswith("data:"):
            return f"{self.place} ({self.source})"
        return self.place

    def missing(self) -> Iterator[str]:
        """A line for each file of it that is not there."""
        for path in paths_of(self.source):
            if not os.path.isfile(path):
                yield f"{self.place}: no file {path}"


def identity_of(source: Source) -> Any:
    """See `MediaRef.identity`."""
    if isinstance(source, tuple):
        return tuple(identity_of(part) for part in source)
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=20).hexdigest()
    if is_address(source):
        is_data = source.startswith("data:")
        return hashlib.blake2b(source.encode(), digest_size=20).hexdigest() if is_data else source
    try:
        found = os.stat(source)
    except OSError:
        return (source, None)
    return (source, found.st_size, found.st_mtime_ns)


def is_address(source: str) -> bool:
    """Whether a text is a URL or holds its own data; else it is a path."""
    return source.startswith(("http://", "https://", "data:"))


def paths_of(source: Source) -> Iterator[str]:
    """The files that a source is read from."""
    if isinstance(source, tuple):
        for part in source:
            yield from paths_of(part)
    elif isinstance(source, str) and not is_address(source):
        yield source


# What a row says


class Gatherer:
    """A row's media: `columns` first, then each conversation of it, in order. Collects what is wrong.

    root  where relative paths begin
    """

    def __init__(self, row: Mapping[str, Any], root: Path) -> None:
        self.problems: list[str] = []
        self._root = root
        self._waiting: dict[str, list[MediaRef]] = {"image": [], "video": [], "audio": []}
        self._columns: dict[str, tuple[MediaRef, ...]] = {}
        self._number: dict[str, int] = {}
        for name, kind in COLUMNS.items():
            value = row.get(name)
            if not _is_there(value):
                continue
            if self._waiting[kind]:
                twice = " and ".join(other for other in COLUMNS if COLUMNS[other] == kind)
                self.problems.append(f"{name}: found beside another key of the same kind ({twice}); keep one")
                continue
            items = list(value) if isinstance(value, (list, tuple)) else [value]
            alone = not isinstance(value, (list, tuple))
            if kind == "video" and not alone and name == "video":
                items, alone = [items], True  # the frames of one clip
            for index, item in enumerate(items):
                place = name if alone else f"{name}.{index}"
                if (ref := self._ref(kind, item, place)) is not None:
                    self._waiting[kind].append(ref)
        self._number = {kind: len(found) for kind, found in self._waiting.items()}
        self._columns = {kind: tuple(found) for kind, found in self._waiting.items()}

    def take(self, turns: Sequence[Message], name: str) -> tuple[tuple[Message, ...], tuple[MediaRef, ...]]:
        """(the turns, each medium a bare part of its kind, and the media in the order of those parts)."""
        found: list[MediaRef] = []
        taken = []
        missing = dict.fromkeys(self._waiting, 0)
        has_places = any(_places(turn, self._number) for turn in turns)
        for index, turn in enumerate(turns):
            content = turn.get("content")
            if not has_places and turn.get("role") == "user" and any(self._waiting.values()):
                content = [*_bare(self._waiting), *_as_parts(content)]
            parts = list(self._parts(content, f"{name}.{index}.content", found, missing))
            if any(part["type"] != "text" for part in parts):
                if turn.get("role") == "assistant":
                    kind = next(part["type"] for part in parts if part["type"] != "text")
                    self.problems.append(
                        f"{name}.{index}.content: found {_a(kind)} in the assistant's turn; answers are words"
                    )
                taken.append({**turn, "content": parts})
            else:
                taken.append(dict(turn))
        for kind, count in missing.items():
            if count:
                self.problems.append(
                    f"{name}: found {count + self._number[kind]} places for {kind}s and {self._number[kind]} {kind}s"
                )
        return tuple(taken), tuple(found)

    def finish(self) -> None:
        """Take note of what no place was found for."""
        for kind, left in self._waiting.items():
            if left:
                total, column = self._number[kind], left[0].place.partition(".")[0]
                self.problems.append(
                    f"{column}: found {total} {kind}s and {total - len(left)} places for them"
                )

    def _parts(
        self, content: Any, place: str, found: list[MediaRef], missing: dict[str, int]
    ) -> Iterator[dict[str, Any]]:
        for index, part in enumerate(_as_parts(content)):
            kind = MEDIA_PARTS.get(str(part.get("type")))
            if kind is None:
                yield from self._text(str(part.get("text", "")), found)
                continue
            ref = self._own(part, kind, f"{place}.{index}")
            if ref is None and not self._has_value(part):
                ref = self._next(kind, part.get("index"), f"{place}.{index}", missing)
            if ref is not None:
                found.append(ref)
            yield {"type": kind}

    def _next(self, kind: MediaKind, index: Any, place: str, missing: dict[str, int]) -> MediaRef | None:
        """What a bare part stands for: of the column the one with that index, else the next that waits."""
        waiting, column = self._waiting[kind], self._columns[kind]
        if index is None:
            missing[kind] += not waiting
            return waiting.pop(0) if waiting else None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(column):
            many = "" if len(column) == 1 else "s"
            self.problems.append(
                f"{place}: found index {index}, and {len(column)} {kind}{many} in the row's column"
            )
            return None
        if column[index] in waiting:
            waiting.remove(column[index])
        return column[index]

    def _text(self, text: str, found: list[MediaRef]) -> Iterator[dict[str, Any]]:
        """A text parted at the places that it names, where a column waits to fill them."""
        marks = [mark for mark, kind in PLACES.items() if self._number[kind]]
        at = [(text.find(mark), mark) for mark in marks if mark in text]
        if not at:
            yield {"type": "text", "text": text}
            return
        begin, mark = min(at)
        kind = PLACES[mark]
        if begin:
            yield {"type": "text", "text": text[:begin]}
        if self._waiting[kind]:
            found.append(self._waiting[kind].pop(0))
            yield {"type": kind}
        else:
            self.problems.append(
                f"found more {mark} in the text than the {self._number[kind]} {kind}s there are"
            )
        if rest := text[begin + len(mark) :]:
            yield from self._text(rest, found)

    def _has_value(self, part: Mapping[str, Any]) -> bool:
        return any(_is_there(value) for key, value in part.items() if key not in HINTS)

    def _own(self, part: Mapping[str, Any], kind: MediaKind, place: str) -> MediaRef | None:
        """What a part holds itself; None if it holds nothing, or nothing that can be used."""
        said = {key: value for key, value in part.items() if key not in HINTS and _is_there(value)}
        names = [key for key in said if key in MEDIA_PARTS or key in VALUES]
        other = [key for key in said if key not in names]
        if other:
            self.problems.append(
                f"{place}: found {', '.join(map(str, other))}; how media are read stands in the recipe, for all rows"
            )
        if len(names) > 1:
            self.problems.append(f"{place}: found {' and '.join(names)}; expected one of them")
        if len(names) != 1:
            return None
        name = names[0]
        value = said[name] if name in MEDIA_PARTS else {name: said[name]}
        return self._ref(kind, value, place)

    def _ref(self, kind: MediaKind, value: Any, place: str) -> MediaRef | None:
        try:
            return MediaRef(kind, source_of(value, self._root, is_clip=kind == "video"), place)
        except ValueError as error:
            self.problems.append(f"{place}: {error}")
            return None


def source_of(value: Any, root: Path, *, is_clip: bool = False) -> Source:
    """What a row gives for one medium, in one form. ValueError, in words, for what is none."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, (str, Path)) and str(value):
        return _located(str(value), root)
    if isinstance(value, (list, tuple)) and is_clip and value:
        return tuple(source_of(frame, root) for frame in value)
    if isinstance(value, Mapping):
        for name in VALUES:
            if not _is_there(value.get(name)):
                continue
            if name in ("bytes", "url", "path"):
                return source_of(value[name], root, is_clip=is_clip)
            return f"data:application/octet-stream;base64,{value[name]}"
    raise ValueError(
        f"found {type(value).__name__}; expected a path, an address, a data URI or a file's bytes"
    )


def _located(value: str, root: Path) -> str:
    if is_address(value):
        return value
    if value.startswith("file:"):
        value = unquote(urlparse(value).path)
    return os.path.normpath(root / Path(value).expanduser())


def _as_parts(content: Any) -> list[Mapping[str, Any]]:
    if isinstance(content, (list, tuple)):
        return list(content)
    return [{"type": "text", "text": content}] if content else []


def _bare(waiting: Mapping[str, Sequence[MediaRef]]) -> list[dict[str, Any]]:
    return [{"type": kind} for kind, refs in waiting.items() for _ in refs]


def _places(turn: Message, number: Mapping[str, int]) -> bool:
    """Whether a turn says where the columns' media stand."""
    for part in _as_parts(turn.get("content")):
        kind = MEDIA_PARTS.get(str(part.get("type")))
        if kind is not None and not any(_is_there(v) for key, v in part.items() if key not in HINTS):
            return True
        text = str(part.get("text") or "")
        if kind is None and any(mark in text for mark, kind in PLACES.items() if number[kind]):
            return True
    return False


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aio" else f"a {kind}"


def _is_there(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, bytes, list, tuple, dict)) and len(value) == 0)
