"""A picture, a clip or a sound -> what its place in the text becomes, and what the tower is given of it.

The family's own processor does the work, with one item at a time: its pixels are those it has in company, and the
text around a placeholder is as the processor writes it. No family is known here but by its processor. Host data
alone, so any thread will do; a processor's own use of the tokenizer is kept to one at a time.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from serve.errors import ModelError, RequestError
from serve.media.content import Clip, Content, Picture, Sound
from serve.media.pictures import image_of
from serve.media.settings import MediaSettings
from serve.media.sounds import resampled
from serve.model.clip_steps import step_of
from serve.model.expansion import Expansion
from serve.model.prompt import Media, MediaKind, Prompt, Rope

CACHE_BYTES = 256 << 20
_BEFORE, _AFTER = "\ue000", "\ue001"
"""Around a marker while its processor expands it."""
_TEXT_NAMES = frozenset(
    ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "special_tokens_mask")
)
_NOT_SEEN = frozenset(("video_second_per_grid", "second_per_grid_ts", "num_patches_list", "num_crops"))
"""What processors say of a clip's time, which they are not told, and of their own crops; no tower reads it."""
_NO_GLUE = frozenset(("paligemma",))
_MAX_RATIO = 200
"""Of a frame's sides, by the processors of families that take clips whole."""
_PROBED = 112
"""Edge of the pictures by which a processor is tried, in pixels."""


class Tower(Protocol):
    """What is asked of a loaded model's `Vision`."""

    @property
    def image_token_id(self) -> int | None:
        """The placeholder of pictures; None: it takes none."""

    @property
    def video_token_id(self) -> int | None:
        """Of clips."""

    @property
    def audio_token_id(self) -> int | None:
        """Of sounds."""

    @property
    def block_kind(self) -> Literal["picture", "prompt"] | None:
        """Whose tokens see one another: nobody's, each picture's, or the whole prompt's."""

    @property
    def positions_per_s(self) -> float | None:
        """How far apart a clip's frames stand; None: it does not count seconds."""

    def blocks(self, token_ids: Sequence[int], media: Sequence[Media]) -> tuple[tuple[int, int], ...]:
        """Ranges of a prompt's tokens that see one another."""

    def rope_index(self, token_ids: Sequence[int], media: Sequence[Media]) -> Rope | None:
        """Positions of a prompt's tokens; None where each stands at its index."""


@dataclass(frozen=True, eq=False)
class Piece:
    """What a tower encodes in one call, before it is known where its placeholders stand; see Media."""

    kind: MediaKind
    key: str
    inputs: Mapping[str, np.ndarray] = field(repr=False)
    num_placeholders: int
    num_patches: int
    step: float = 1.0


@dataclass(frozen=True, eq=False)
class Processed:
    """One item as a prompt takes it.

    size  (height, width) of each picture as the tower sees it, before it is cut into crops; None of a sound
    """

    kind: MediaKind
    expansion: Expansion
    pieces: tuple[Piece, ...] = field(repr=False)
    size: tuple[int, int] | None = None

    @property
    def num_placeholders(self) -> int:
        return sum(piece.num_placeholders for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for piece in self.pieces for array in piece.inputs.values())


@dataclass(frozen=True)
class _Way:
    """How one kind of media stands in a family's text."""

    marker: str
    placeholder: str
    token_id: int


class MediaProcessor:
    """One model's own processor, asked for one item at a time.

    folder      of the model, whose config says the tower's patch size
    processor   as `load_processor` gives it; its tokenizer is not used by anybody else
    cache_bytes of processed items that are kept, the least recently used left out first
    ModelError for a processor in which no placeholder of a kind that the tower takes is found.
    """

    def __init__(self, folder: Path, processor: Any, vision: Tower, cache_bytes: int = CACHE_BYTES) -> None:
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._vision = vision
        self._config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._tokenizing = threading.Lock()
        self._kept = _Kept(cache_bytes)
        token_ids: dict[MediaKind, int | None] = {
            "image": vision.image_token_id,
            "video": vision.video_token_id,
            "audio": vision.audio_token_id,
        }
        taken = {kind: number for kind, number in token_ids.items() if number is not None}
        self._ways: dict[MediaKind, _Way] = {}
        for kind, token_id in taken.items():
            way = self._way(kind, token_id)
            if way is not None:
                self._ways[kind] = way
        if not self._ways:
            raise ModelError(
                f"{folder.name}: its processor ({type(processor).__name__}) writes no placeholder for "
                f"{', '.join(taken) or 'any media'}"
            )
        self.kinds: frozenset[MediaKind] = frozenset(self._ways)
        """What `process` takes."""

    @property
    def max_items(self) -> int | None:
        """How many items one prompt may show, where the family bounds that itself."""
        return 1 if self._vision.block_kind == "prompt" else None

    def process(
        self, content: Content, settings: MediaSettings = MediaSettings(), name: str = "media"
    ) -> Processed:
        """One item, from the cache if it was processed alike before.

        RequestError that begins with `name`, for a kind that the model does not take and for what its processor
        refuses.
        """
        way = self._ways.get(content.kind)
        if way is None:
            takes = ", ".join(sorted(self.kinds))
            raise RequestError(f"{name}: found {_called(content.kind)}; this model takes {takes}", name)
        key = (content.kind, content.sha256, settings.min_pixels, settings.max_pixels, settings.resize)
        kept = self._kept.get(key)
        if kept is None:
            try:
                kept = self._processed(content, settings, way)
            except Exception as error:  # a processor is foreign code: what it raises is how it refuses
                raise RequestError(
                    f"{name}: this model's processor refuses {_described(content)}: {_said(error)}", name
                ) from error
            self._kept.put(key, kept)
        return kept

    def prompt(self, token_ids: Sequence[int], processed: Sequence[Processed]) -> Prompt:
        """The prompt of these tokens, whose placeholders the items fill in order.

        RequestError if there are more or fewer placeholders than they need, or more items than the family takes.
        """
        if self.max_items is not None and len(processed) > self.max_items:
            raise RequestError(
                f"messages: found {len(processed)} pictures; this model takes {self.max_items} in a prompt",
                "messages",
            )
        ids = np.asarray(token_ids, dtype=np.int64)
        media = self._placed(ids, processed)
        rope = self._vision.rope_index(tuple(token_ids), media) if media else None
        return Prompt(tuple(token_ids), media, rope, self._vision.blocks(token_ids, media))

    # Where things stand

    def _placed(self, ids: np.ndarray, processed: Sequence[Processed]) -> tuple[Media, ...]:
        found = {
            way.token_id: np.flatnonzero(ids == way.token_id).astype(np.int32) for way in self._ways.values()
        }
        taken = dict.fromkeys(found, 0)
        media: list[Media] = []
        for item in processed:
            token_id = self._ways[item.kind].token_id
            for piece in item.pieces:
                start = taken[token_id]
                taken[token_id] = stop = start + piece.num_placeholders
                positions = found[token_id][start:stop]
                if len(positions) == piece.num_placeholders:
                    known = (piece.kind, piece.key, positions, piece.inputs, piece.num_patches, piece.step)
                    media.append(Media(*known))
        for token_id, positions in found.items():
            if len(positions) != taken[token_id]:
                raise RequestError(
                    f"messages: the prompt holds {len(positions)} placeholders where its media need "
                    f"{taken[token_id]}",
                    "messages",
                )
        return tuple(sorted(media, key=lambda piece: piece.start))

    # One item

    def _processed(self, content: Content, settings: MediaSettings, way: _Way) -> Processed:
        text, inputs = self._expand(content, settings, way.marker)
        expansion = Expansion(content.kind, way.marker, way.placeholder, text, self._glue())
        num_placeholders = text.count(way.placeholder)
        if not num_placeholders:
            raise ValueError("it becomes no placeholder")
        step = self._step(content)
        pieces = tuple(
            Piece(content.kind, _key(content.kind, part), part, number, self._num_patches(part, number), step)
            for part, number in _parts(inputs, num_placeholders)
        )
        return Processed(content.kind, expansion, pieces, self._seen_size(content, inputs))

    def _expand(
        self, content: Content, settings: MediaSettings, marker: str
    ) -> tuple[str, dict[str, np.ndarray]]:
        """What the family's processor makes of the marker and of the item: (text, what the tower is given)."""
        processor = copy.copy(self._processor)
        recorder = _Recorder(self._tokenizer, self._tokenizing)
        processor.tokenizer = recorder
        given = _bounded(processor, settings) if isinstance(content, Picture) else settings
        told = processor(text=[_BEFORE + marker + _AFTER], **self._given(processor, content, given))
        if not recorder.texts:
            raise ModelError(f"{type(processor).__name__} does not call its tokenizer")
        text = recorder.texts[-1]
        start, stop = text.index(_BEFORE) + len(_BEFORE), text.rindex(_AFTER)
        return text[start:stop], dict(_arrays(told))

    def _given(self, processor: Any, content: Content, settings: MediaSettings) -> dict[str, Any]:
        """The item, by the keyword and in the form in which processors take it."""
        if isinstance(content, Picture):
            return {"images": [_resized(image_of(content), settings)]}
        if isinstance(content, Clip):
            least = _least_edge(getattr(processor, "video_processor", None))
            frames = [
                np.asarray(_enlarged(_resized(image_of(frame), settings), least)) for frame in content.frames
            ]
            video = np.stack(frames).transpose(0, 3, 1, 2)  # [T, 3, H, W]
            given: dict[str, Any] = {"videos": [video]}
            if "video_metadata" in _parameters(processor):
                given["video_metadata"] = [{"fps": 1.0, "frames_indices": list(content.times_s)}]
            return given
        extractor = getattr(processor, "feature_extractor", None)
        rate = int(getattr(extractor, "sampling_rate", 16_000))
        samples = resampled(content, rate).samples
        most = _most_samples(extractor)
        if most is not None and len(samples) > most:
            raise ValueError(f"at most {most / rate:g} s are read, and a longer one would be cut")
        name = "audio" if "audio" in _parameters(processor) else "audios"
        return {name: [samples], "sampling_rate": rate}

    def _step(self, content: Content) -> float:
        rate = self._vision.positions_per_s
        if rate is None or not isinstance(content, Clip):
            return 1.0
        frames = getattr(getattr(self._processor, "video_processor", None), "temporal_patch_size", 2)
        return step_of(content.times_s, int(frames), rate)

    def _glue(self) -> str:
        return "" if self._config.get("model_type") in _NO_GLUE else "\n"

    def _num_patches(self, inputs: Mapping[str, np.ndarray], num_placeholders: int) -> int:
        """What encoding these costs, in the tower's tokens."""
        for name in ("image_grid_thw", "video_grid_thw"):
            if name in inputs:
                return int(inputs[name].astype(np.int64).prod(axis=-1).sum())
        pixels = inputs.get("pixel_values", inputs.get("pixel_values_videos"))
        if pixels is None:  # of sound, which is padded: what comes out of it
            return num_placeholders
        patch = self._patch_size()
        return max(1, pixels.size // (3 * patch * patch))

    def _patch_size(self) -> int:
        told = getattr(getattr(self._processor, "image_processor", None), "patch_size", None)
        if isinstance(told, int):
            return told
        vision = self._config.get("vision_config") or {}
        size = vision.get("patch_size") or getattr(self._processor, "patch_size", None) or 14
        return int(size[0] if isinstance(size, (list, tuple)) else size)

    def _seen_size(self, content: Content, inputs: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
        if isinstance(content, Sound):
            return None
        for name in ("image_grid_thw", "video_grid_thw"):
            if name in inputs:
                _, height, width = inputs[name].reshape(-1, 3)[0].tolist()
                return height * self._patch_size(), width * self._patch_size()
        if "image_sizes" in inputs:
            height, width = inputs["image_sizes"].reshape(-1, 2)[0].tolist()
            return int(height), int(width)
        shape = inputs["pixel_values"].shape
        return int(shape[-2]), int(shape[-1])

    # How a kind is written, found by trying

    def _way(self, kind: MediaKind, token_id: int) -> _Way | None:
        placeholder = str(self._tokenizer.convert_ids_to_tokens(token_id))
        for marker in self._markers(kind, placeholder):
            try:
                text, _ = self._expand(_probe(kind), MediaSettings(), marker)
            except Exception:  # a processor is foreign code: this marker is not its own
                continue
            if placeholder in text and marker != text:
                return _Way(marker, placeholder, token_id)
        return None

    def _markers(self, kind: MediaKind, placeholder: str) -> Iterator[str]:
        """What a family's templates may write in an item's place; the first that its processor expands is theirs."""
        names = {
            "image": ("boi_token", "image_token"),
            "video": ("video_token",),
            "audio": ("boa_token", "audio_token"),
        }[kind]
        owners = (self._processor, self._tokenizer)
        told = (getattr(owner, name, None) for name in names for owner in owners)
        candidates = [text for text in told if isinstance(text, str) and text]
        if kind == "video":
            begin, end = (self._token(f"vision_{side}_token") for side in ("start", "end"))
            if begin and end and "video_metadata" in _parameters(self._processor):
                yield begin + placeholder + end  # each frame has its own, with its time before it
        yield from dict.fromkeys([*candidates, placeholder, f"<{kind}>"])

    def _token(self, name: str) -> str | None:
        value = getattr(self._processor, name, None) or getattr(self._tokenizer, name, None)
        return value if isinstance(value, str) else None


def load_processor(folder: Path) -> Any:
    """A model's processor by mlx-vlm's class for its family, transformers' where mlx-vlm has none.

    Asked directly, for mlx-vlm's way through AutoProcessor hides what went wrong. ModelError.
    """
    from importlib import import_module
    from pkgutil import iter_modules

    from mlx_vlm.utils import MODEL_REMAPPING
    from transformers import AutoProcessor, ProcessorMixin

    config = json.loads((folder / "config.json").read_text())
    model_type = str(config.get("model_type", ""))
    family = MODEL_REMAPPING.get(model_type, model_type).replace("-", "_")
    own: list[Any] = []
    try:
        package = import_module(f"mlx_vlm.models.{family}")
        modules = [
            package,
            *(import_module(f"{package.__name__}.{m.name}") for m in iter_modules(package.__path__)),
        ]
    except ImportError:
        modules = []
    for module in modules:
        for value in vars(module).values():
            is_own = (
                isinstance(value, type) and issubclass(value, ProcessorMixin) and value is not ProcessorMixin
            )
            if is_own and value.__module__.startswith("mlx_vlm.") and "from_pretrained" in vars(value):
                own.append(value)
    maker = own[0] if own else AutoProcessor
    try:
        # A relative path is looked up on the hub too, for each file that is not there.
        return maker.from_pretrained(str(folder.absolute()))
    except Exception as error:  # foreign code over foreign files
        raise ModelError(f"{folder.name}: its processor cannot be loaded: {_said(error)}") from error


class _Recorder:
    """A tokenizer that keeps the texts it is given; for one call of a processor."""

    def __init__(self, tokenizer: Any, lock: threading.Lock) -> None:
        self._tokenizer = tokenizer
        self._lock = lock
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        (whole,) = [text] if isinstance(text, str) else text
        self.texts.append(whole)
        asked = {name: value for name, value in options.items() if name.startswith("return_token_type")}
        with self._lock:
            return self._tokenizer([whole], add_special_tokens=False, **asked)


class _Kept:
    """Processed items in a budget of bytes, the least recently used left out first. For several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._items: OrderedDict[Any, Processed] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Processed | None:
        with self._lock:
            item = self._items.get(key)
            if item is not None:
                self._items.move_to_end(key)
            return item

    def put(self, key: Any, item: Processed) -> None:
        with self._lock:
            if key in self._items or item.num_bytes > self._max_bytes:
                return
            self._items[key] = item
            self._num_bytes += item.num_bytes
            while self._num_bytes > self._max_bytes:
                _, gone = self._items.popitem(last=False)
                self._num_bytes -= gone.num_bytes


def _parts(inputs: Mapping[str, np.ndarray], num: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """(what the tower is given, how many placeholders it fills) of each piece: a clip's are its temporal patches."""
    grid = inputs.get("video_grid_thw")
    if grid is None or int(grid.reshape(-1, 3)[0, 0]) == 1:
        yield dict(inputs), num
        return
    times, height, width = grid.reshape(-1, 3)[0].tolist()
    rows = inputs["pixel_values_videos"].reshape(times, height * width, -1)
    alone = np.array([[1, height, width]], dtype=grid.dtype)
    for patches in rows:
        yield {**inputs, "pixel_values_videos": patches, "video_grid_thw": alone}, num // times


def _key(kind: MediaKind, inputs: Mapping[str, np.ndarray]) -> str:
    """Of all that the tower is given: decoded content and every setting are in it, and nothing else is."""
    told = hashlib.sha256(kind.encode())
    for name in sorted(inputs):
        array = np.ascontiguousarray(inputs[name])
        told.update(repr((name, array.shape, array.dtype.str)).encode())
        told.update(array.data)
    return told.hexdigest()


def _arrays(told: Any) -> Iterator[tuple[str, np.ndarray]]:
    """What a processor gives for the tower, on the host."""
    for name, value in dict(told).items():
        if name in _TEXT_NAMES or name in _NOT_SEEN or value is None or isinstance(value, (str, int, float)):
            continue
        array = np.asarray(value)
        if array.dtype == object:
            raise ModelError(f"the processor's {name} has no shape of its own")
        yield name, array


def _bounded(processor: Any, settings: MediaSettings) -> MediaSettings:
    """Tells a processor that has bounds of its own what they are; gives what is left to be done before it."""
    owner = getattr(processor, "image_processor", None)
    if owner is None or not (hasattr(owner, "min_pixels") and hasattr(owner, "max_pixels")):
        return settings
    own = copy.copy(owner)
    if settings.resize is not None:  # to that size and no other, but for what the patches round
        area = settings.resize[0] * settings.resize[1]
        own.min_pixels, own.max_pixels = 1, max(4 * area, own.max_pixels)
    if settings.min_pixels is not None:
        own.min_pixels = settings.min_pixels
        own.max_pixels = max(own.min_pixels, own.max_pixels)
    if settings.max_pixels is not None:
        own.max_pixels = settings.max_pixels
        own.min_pixels = min(own.min_pixels, own.max_pixels)
    processor.image_processor = own
    return MediaSettings(resize=settings.resize)


def _resized(image: Image.Image, settings: MediaSettings) -> Image.Image:
    """A picture at the size that was asked for, and within the bounds."""
    width, height = image.size
    if settings.resize is not None:
        height, width = settings.resize
    area = width * height
    scale = 1.0
    if settings.max_pixels is not None and area > settings.max_pixels:
        scale = math.sqrt(settings.max_pixels / area)
    elif settings.min_pixels is not None and area < settings.min_pixels:
        scale = math.sqrt(settings.min_pixels / area)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _least_edge(video_processor: Any) -> int:
    """Of a clip's frames, for mlx-vlm's processors enlarge small pictures, but refuse small clips."""
    patch, merge = (getattr(video_processor, name, None) for name in ("patch_size", "merge_size"))
    return patch * merge if isinstance(patch, int) and isinstance(merge, int) else 8


def _enlarged(image: Image.Image, least: int) -> Image.Image:
    width, height = image.size
    scale = least / min(width, height)
    if scale <= 1:
        return image
    if max(width, height) > _MAX_RATIO * min(
        width, height
    ):  # which these processors refuse, but enlarged first
        raise ValueError(f"one side is more than {_MAX_RATIO} times the other")
    return image.resize(
        (max(least, round(width * scale)), max(least, round(height * scale))), Image.Resampling.BICUBIC
    )


def _most_samples(extractor: Any) -> int | None:
    """How many samples an extractor reads before it cuts off the rest; None: all."""
    known = getattr(extractor, "n_samples", None)
    if known is None and extractor is not None:
        parameter = inspect.signature(type(extractor).__call__).parameters.get("max_length")
        known = parameter.default if parameter is not None else None
    return known if isinstance(known, int) and known > 0 else None


def _parameters(processor: Any) -> frozenset[str]:
    return frozenset(inspect.signature(type(processor).__call__).parameters)


def _probe(kind: MediaKind) -> Content:
    picture = Picture(np.full((_PROBED, _PROBED, 3), 127, np.uint8))
    if kind == "image":
        return picture
    if kind == "video":
        return Clip((picture,) * 4, (0.0, 0.5, 1.0, 1.5))
    return Sound(np.zeros(16_000, np.float32), 16_000)


def _called(kind: MediaKind) -> str:
    return {"image": "a picture", "video": "a clip", "audio": "a sound"}[kind]


def _described(content: Content) -> str:
    if isinstance(content, Sound):
        return f"a sound of {len(content.samples) / content.rate:.3g} s"
    height, width = content.size
    return f"{_called(content.kind)} of {width} x {height} pixels"


def _said(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__
