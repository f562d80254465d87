"""References of rows -> what serving's own processor makes of them: decoded, checked and hashed by content.

What was made is kept within a bound of bytes and made again when it is asked for later: pixels of a whole data set
are never held. Threads decode ahead.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np

from serve.errors import DataError, RequestError
from serve.media.content import Content, Sound
from serve.media.parts import MediaPart
from serve.media.processor import MediaProcessor, Processed, Tower, load_processor
from serve.media.settings import MediaLimits, MediaSettings
from serve.media.sources import Sources
from serve.model.loading import read_config, resolve, sketch_vision
from serve.model.prompt import Media
from serve.model.towers import has_towers
from train.data.coordinates import Coordinates
from train.data.media import MediaRef
from train.data.row_media import RowMedia
from train.recipe.recipe import Recipe
from train.recipe.vision import ImageConfig

MAX_BYTES = 1 << 29
"""Of pixels that are kept."""
SMALL = 256
"""Elements up to which an input is no pixels, and is held with the row: grids, sizes."""
NO_LIMITS = MediaLimits(
    max_items=1 << 30,
    max_image_bytes=1 << 31,
    max_image_pixels=1 << 29,
    max_video_bytes=1 << 36,
    max_video_frames=1 << 20,
    max_video_pixels=1 << 34,
    max_audio_bytes=1 << 34,
    max_audio_s=1e6,
    fetch_s=300.0,
    allow_private_hosts=True,
    decode_s=3600.0,
)
"""A person's own data are read whatever their size, but for bombs."""


class MediaReader:
    """What rows show, as a model takes it. Threads may share it; the processor is loaded when it is first needed.

    folder       of the model that trains
    settings     how pictures and clips are made ready
    coordinates  how boxes and points follow; None: they do not
    max_bytes    of what was made and is kept; the longest unused goes first
    num_threads  that decode ahead
    """

    def __init__(
        self,
        folder: Path,
        settings: MediaSettings = MediaSettings(),
        coordinates: Coordinates | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        num_threads: int = 2,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.coordinates = coordinates
        self.max_bytes = max_bytes
        self._sources = Sources(NO_LIMITS, roots=(Path("/"),))
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="media")
        self._lock = Lock()
        self._opening = Lock()
        self._made: OrderedDict[str, Future[Processed]] = OrderedDict()
        self._bytes: dict[str, int] = {}
        self._num_bytes = 0
        self._stored: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, recipe: Recipe) -> MediaReader | None:
        """Of a recipe's model; None where it reads text alone, as it does of what a teacher answers."""
        if recipe.block is not None and recipe.block.teacher is not None:
            return None
        folder = resolve(recipe.model)
        return cls.of_model(folder, recipe.image)

    @classmethod
    def of_model(cls, folder: Path, image: ImageConfig, num_threads: int = 2) -> MediaReader | None:
        """Of a model's folder, by a recipe's block."""
        if not has_towers(read_config(folder)):
            return None
        said = image.coordinates
        coordinates = Coordinates(said.rows, said.model, said.keys, said.tags) if said is not None else None
        return cls(folder, image.settings, coordinates, num_threads=num_threads)

    @cached_property
    def identity(self) -> str:
        """A name for all that what it makes depends on, besides the media: settings, and the model's own files."""
        digest = hashlib.sha256(repr((self.settings, self.coordinates)).encode())
        for file in sorted(self.folder.glob("*.json")):
            if "token" not in file.name and not file.name.endswith(".index.json"):
                digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    def open(self) -> None:
        """Load the processor now. It draws random numbers, so not while a step does."""
        with self._opening:
            _ = self._opened

    @property
    def processor(self) -> MediaProcessor:
        """Of the model. ModelError where it cannot be loaded."""
        return self._opened[0]

    @property
    def vision(self) -> Tower:
        """What its network is told of media; without weights."""
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[MediaProcessor, Tower]:
        vision = sketch_vision(self.folder)
        return MediaProcessor(self.folder, load_processor(self.folder), vision, cache_bytes=0), vision

    @property
    def sees_prompts(self) -> bool:
        """Whether the model sees a whole prompt both ways."""
        return self.vision.block_kind == "prompt"

    def read(self, ref: MediaRef) -> Processed:
        """What a reference leads to. RequestError, beginning with its place, if it cannot be read or used."""
        try:
            made = self._future(ref).result()
        except RequestError as error:
            with self._lock:
                self._made.pop(ref.identity, None)
            if not str(error).startswith(ref.place):  # another row's, which shows the same
                made = self._make(ref)
            raise
        with self._lock:
            if ref.identity in self._made:
                self._made.move_to_end(ref.identity)
        return made

    def sizes(self, ref: MediaRef) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """(height, width) of a picture or frame as it is stored, and as the tower sees it; None of a sound."""
        seen = self.read(ref).size
        stored = self._stored.get(ref.identity)
        return (stored, seen) if stored is not None and seen is not None else None

    def read_ahead(self, refs: Iterable[MediaRef]) -> None:
        """Begin to read these, in order; what is wrong with one is raised where it is read."""
        for ref in refs:
            self._future(ref)

    def row_media(
        self, token_ids: Sequence[int], refs: Sequence[MediaRef], processed: Sequence[Processed]
    ) -> RowMedia | None:
        """What a sequence shows: the first of these that its placeholders are of. None: nothing.

        RequestError where placeholders and media do not come out even.
        """
        shown = self._shown(token_ids, processed)
        if not shown:
            return None
        prompt = self.processor.prompt(token_ids, processed[:shown])
        owners = {
            piece.key: (ref, place, number)
            for place, (ref, made) in enumerate(zip(refs, processed[:shown], strict=False))
            for number, piece in enumerate(made.pieces)
        }
        pieces = [
            replace(media, inputs=LaterInputs.of(media, self, *owners[media.key])) for media in prompt.media
        ]
        return RowMedia(tuple(pieces), prompt.rope, prompt.blocks)

    def _shown(self, token_ids: Sequence[int], processed: Sequence[Processed]) -> int:
        """How many of the media a sequence holds: one that ends before the conversation does has fewer."""
        vision = self.vision
        named = (vision.image_token_id, vision.video_token_id, vision.audio_token_id)
        places = int(np.isin(token_ids, [number for number in named if number is not None]).sum())
        count = 0
        for number, made in enumerate(processed):
            if count >= places:
                return number
            count += made.num_placeholders
        return len(processed)

    def content(self, ref: MediaRef) -> Content:
        """A reference, decoded. RequestError that begins with its place."""
        return self._sources.load(MediaPart(ref.kind, ref.place, ref.source), self.settings)

    def _future(self, ref: MediaRef) -> Future[Processed]:
        with self._lock:
            found = self._made.get(ref.identity)
            if found is None:
                found = self._made[ref.identity] = self._pool.submit(self._make, ref)
        return found

    def _make(self, ref: MediaRef) -> Processed:
        with self._opening:
            processor = self.processor
        content = self.content(ref)
        made = processor.process(content, self.settings, ref.place)
        with self._lock:
            if not isinstance(content, Sound):
                self._stored[ref.identity] = content.size
            self._bytes[ref.identity] = made.num_bytes
            self._num_bytes += self._bytes[ref.identity]
            for identity in list(self._made):
                if self._num_bytes <= self.max_bytes or identity == ref.identity:
                    break
                if identity in self._bytes:  # else it is being made
                    self._num_bytes -= self._bytes.pop(identity)
                    del self._made[identity]
        return made


class LaterInputs(Mapping[str, np.ndarray]):
    """A piece's inputs, of which the pixels are read when they are asked for.

    ref, number  which piece of which reference
    place        the reference's number among its row's
    key          the piece's, as it was when the row was read
    known        inputs that are small enough to be held
    DataError where what is read later is not what the row was made of.
    """

    def __init__(
        self,
        reader: MediaReader | None,
        ref: MediaRef,
        place: int,
        number: int,
        key: str,
        known: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        self.ref = ref
        self.place = place
        self.number = number
        self._key = key
        self._known = dict(known)
        self._reader = reader

    @classmethod
    def of(cls, media: Media, reader: MediaReader, ref: MediaRef, place: int, number: int) -> LaterInputs:
        """Of a piece that was made just now."""
        known = {name: array for name, array in media.inputs.items() if array.size <= SMALL}
        return cls(reader, ref, place, number, media.key, known)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._known[name] if name in self._known else self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def bind(self, reader: MediaReader) -> None:
        """Read by this reader of the same model from now on; what came from another process has none."""
        self._reader = reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def read_ahead(self) -> None:
        """Begin to read them, on another thread."""
        if self._reader is not None:
            self._reader.read_ahead([self.ref])

    def _read(self) -> Mapping[str, np.ndarray]:
        assert self._reader is not None, "bound to no reader"
        try:
            pieces = self._reader.read(self.ref).pieces
        except RequestError as error:
            raise DataError(f"read again: {error}") from error
        if self.number >= len(pieces) or pieces[self.number].key != self._key:
            raise DataError(f"{self.ref.shown} holds something else now than when its row was read")
        return pieces[self.number].inputs
