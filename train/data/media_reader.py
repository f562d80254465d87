"""References of rows -> what serving's own processor makes of them: decoded, checked and hashed by content.

What was made is kept within a bound of bytes and made again when it is asked for later: pixels of a whole data set
are never held. Threads decode ahead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from serve.errors import DataError, RequestError
from serve.media.content import Content
from serve.media.parts import MediaPart
from serve.media.processor import MediaProcessor, Processed, Tower, load_processor
from serve.media.settings import MediaLimits, MediaSettings
from serve.media.sources import Sources
from serve.model.loading import read_config, resolve, sketch_vision
from serve.model.prompt import Media
from serve.model.towers import has_towers
from train.data.example import Example
from train.data.media import MediaRef
from train.data.row_media import RowMedia
from train.recipe.recipe import Recipe

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
    max_bytes    of what was made and is kept; the longest unused goes first
    num_threads  that decode ahead
    """

    def __init__(
        self,
        folder: Path,
        settings: MediaSettings = MediaSettings(),
        *,
        max_bytes: int = MAX_BYTES,
        num_threads: int = 2,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.max_bytes = max_bytes
        self._sources = Sources(NO_LIMITS, roots=(Path("/"),))
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="media")
        self._lock = Lock()
        self._opening = Lock()
        self._made: OrderedDict[str, Future[Processed]] = OrderedDict()
        self._bytes: dict[str, int] = {}
        self._num_bytes = 0

    @classmethod
    def of(cls, recipe: Recipe) -> MediaReader | None:
        """Of a recipe's model; None where it reads text alone."""
        folder = resolve(recipe.model)
        return cls(folder, recipe.image.settings) if has_towers(read_config(folder)) else None

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
        made = self._future(ref).result()
        with self._lock:
            if ref.identity in self._made:
                self._made.move_to_end(ref.identity)
        return made

    def adjusted(self, example: Example, processed: Sequence[Processed]) -> Example:
        """The row with its boxes and points in the pictures' new size, where the recipe names their form."""
        return example

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
            piece.key: (ref, number)
            for ref, made in zip(refs, processed[:shown], strict=False)
            for number, piece in enumerate(made.pieces)
        }
        pieces = [
            replace(media, inputs=LaterInputs(media, self, *owners[media.key])) for media in prompt.media
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
        made = processor.process(self.content(ref), self.settings, ref.place)
        with self._lock:
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

    DataError where what is read then is not what the row was made of.
    """

    def __init__(self, media: Media, reader: MediaReader, ref: MediaRef, piece: int) -> None:
        """media: as it was made just now; of it, what is small is held."""
        self._known = {name: array for name, array in media.inputs.items() if array.size <= SMALL}
        self._names = tuple(media.inputs)
        self._key = media.key
        self._reader: MediaReader | None = reader
        self._ref = ref
        self._piece = piece

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._known:
            return self._known[name]
        if name not in self._names:
            raise KeyError(name)
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def bind(self, reader: MediaReader) -> None:
        """Read by this reader of the same model from now on; what came from another process has none."""
        self._reader = reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def read_ahead(self) -> None:
        """Begin to read them, on another thread."""
        assert self._reader is not None, "bound to no reader"
        self._reader.read_ahead([self._ref])

    def _read(self) -> Mapping[str, np.ndarray]:
        assert self._reader is not None, "bound to no reader"
        try:
            pieces = self._reader.read(self._ref).pieces
        except RequestError as error:
            raise DataError(f"read again: {error}") from error
        if self._piece >= len(pieces) or pieces[self._piece].key != self._key:
            raise DataError(f"{self._ref.shown} holds something else now than when its row was read")
        return pieces[self._piece].inputs
