"""What a model sees and hears with: media in, vectors that stand in for their placeholders out.

mlx-vlm's towers and projectors, called as each family calls them, one piece of media at a time. Nothing is kept: not
on the model, not here. Owned by the thread that runs the network; what any thread may call says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from serve.errors import ModelError
from serve.model.clip_steps import positions_per_second, stepped
from serve.model.network import Network, evaluating
from serve.model.prompt import Media, MediaKind, Rope
from serve.model.towers import NESTED

BlockKind = Literal["picture", "prompt"]

BLOCK_KINDS: dict[str, BlockKind] = {"gemma3": "picture", "paligemma": "prompt"}
"""Families, by model_type, that were trained with attention both ways: among the tokens of a picture, or of the whole
prompt. mlx-vlm's gemma3 leaves it out, Hugging Face's has it."""
PLACEHOLDERS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
"""What configurations call the token that stands for a part of a picture, a clip, a sound."""
GRIDS: dict[str, str] = {"image": "image_grid_thw", "video": "video_grid_thw"}
"""Inputs that say of how many patches a piece is: in time, height and width."""
SPLICING = ("internvl_chat", "llava")
"""Families that put vectors in their places by a list of places, which no gradient passes."""
PROBE_TOKENS = (1, 2, 3)
MAX_ERROR = 1e-2


class Features(NamedTuple):
    """One piece of media as the network takes it. Lazy until somebody evaluates it.

    embeddings  [n, D], one a placeholder, beside embedded tokens
    deepstack   of the first layers of some families, one each: [n, D], added to the layer's output there
    """

    embeddings: mx.array
    deepstack: tuple[mx.array, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Memory of all of it."""
        return sum(array.nbytes for array in (self.embeddings, *self.deepstack))

    def part(self, start: int, stop: int) -> Features:
        """Of placeholders [start, stop)."""
        return Features(self.embeddings[start:stop], tuple(array[start:stop] for array in self.deepstack))


class Placed(NamedTuple):
    """Features, and where in a batch they stand.

    columns  [k], ascending: places in the row, one for each of the features
    """

    row: int
    columns: np.ndarray
    features: Features


class Vision:
    """The towers of a model of mlx-vlm, and what its network wants to be told of the media in a prompt."""

    def __init__(self, network: Network, config: dict[str, Any], *, is_sketch: bool = False) -> None:
        """ModelError where the family's own code cannot be asked for the vectors of one piece of media.

        config     the model's config.json
        is_sketch  the network has no weights: nothing is evaluated, and nothing but host data can be asked for
        """
        module = network.module
        self._module = module
        self._network = network
        if not hasattr(module, "get_input_embeddings"):
            raise ModelError(f"{type(module).__module__} has no get_input_embeddings")
        own, said = _innermost(module.config, config)
        self.token_ids = _token_ids(own, said)
        """The token whose embedding each kind's vectors take the place of; of a clip, where it has none of its own,
        a picture's."""
        self.positions = network.takes_positions
        """Prompts with media have a Rope."""
        self.positions_per_s = positions_per_second(config) if self.positions else None
        """How far apart a clip's frames stand; None: their pieces stand one after the other."""
        self.deepstack = _has_deepstack(network, own)
        """Features have more than embeddings."""
        self._is_deepstack_dense = _innermost(module.config, config)[0] is not module.config
        """The family with a thinker takes what is added as [B, T, L, D], zeros elsewhere; others a list."""
        self.block_kind = _block_kind(config, network)
        """What of a prompt is a block: each picture's placeholders, all of it, or nothing."""
        network.placeholder_ids = tuple(sorted(set(self.token_ids.values())))
        if config.get("model_type") in SPLICING:
            module._merge_input_ids_with_image_features = _vectors_alone
        if not is_sketch:
            self._embedder = _find_embedder(network)

    @property
    def kinds(self) -> frozenset[MediaKind]:
        """What it takes."""
        return frozenset(self.token_ids)

    @property
    def image_token_id(self) -> int | None:
        """None: it takes no pictures."""
        return self.token_ids.get("image")

    @property
    def video_token_id(self) -> int | None:
        """None: a clip is so many pictures."""
        return self.token_ids.get("video")

    @property
    def audio_token_id(self) -> int | None:
        """None: it takes no sound."""
        return self.token_ids.get("audio")

    def encode(self, media: Media) -> Features:
        """One piece of media, by itself; lazy, where the family's code is. Gradients pass.

        ModelError where the family makes another number of vectors of it than it has placeholders.
        """
        token = self.token_ids.get(media.kind, self.token_ids.get("image"))
        if token is None:
            raise ModelError(f"{type(self._module).__module__} takes no {media.kind}")
        # Nothing but its placeholders: what the family puts in their places are the vectors.
        ids = mx.full((1, len(media.positions)), token, dtype=mx.int32)
        inputs = {name: mx.array(value) for name, value in media.inputs.items()}
        made = self._module.get_input_embeddings(ids, mask=mx.ones_like(ids), **inputs)
        features = Features(made.inputs_embeds[0], _layers_of(made.deepstack_visual_embeds))
        for array in (features.embeddings, *features.deepstack):
            if array.shape[0] != len(media.positions):
                raise ModelError(
                    f"{type(self._module).__module__}: a piece of {media.kind} became {array.shape[0]} vectors; "
                    f"it has {len(media.positions)} placeholders"
                )
        return features

    def embed(self, tokens: mx.array) -> mx.array:
        """[B, T] → [B, T, D]: what the network would make of these tokens, into which features are put."""
        return self._embedder(tokens)

    def inputs(self, tokens: mx.array, placed: Sequence[Placed]) -> tuple[mx.array | None, dict[str, Any]]:
        """What `Network.hidden` takes for a batch of tokens [B, T] with features among them, but for positions.

        Returns embeddings [B, T, D] and extras; None and nothing where no features are in it.
        """
        if not placed:
            return None, {}
        # The family's code counts features row by row, from the left.
        placed = sorted(placed, key=lambda one: (one.row, int(one.columns[0])))
        rows = np.concatenate([np.full(len(one.columns), one.row, dtype=np.int32) for one in placed])
        columns = np.concatenate([np.asarray(one.columns, dtype=np.int32) for one in placed])
        order = rows.astype(np.int64) * tokens.shape[1] + columns
        assert (np.diff(order) > 0).all(), "two features at one place, or not in its order"
        embeddings = self.embed(tokens)
        features = mx.concatenate([one.features.embeddings for one in placed])
        assert len(features) == len(rows), "as many features as places"
        embeddings[mx.array(rows), mx.array(columns)] = features.astype(embeddings.dtype)
        if not self.deepstack:
            return embeddings, {}
        layers = zip(*(one.features.deepstack for one in placed), strict=True)
        deepstack = [mx.concatenate(list(parts)) for parts in layers]  # [n, D] each
        # With one too few, the family's code would leave out a whole row's, and say nothing.
        assert deepstack, "features without their deepstack"
        assert all(len(layer) == len(rows) for layer in deepstack)
        if self._is_deepstack_dense:
            dense = mx.zeros((*tokens.shape, len(deepstack), embeddings.shape[-1]), embeddings.dtype)
            dense[mx.array(rows), mx.array(columns)] = mx.stack(deepstack, axis=1).astype(dense.dtype)
            return embeddings, {"deepstack_visual_embeds": dense}
        mask = np.zeros(tokens.shape, dtype=bool)
        mask[rows, columns] = True
        return embeddings, {"visual_pos_masks": mx.array(mask), "deepstack_visual_embeds": deepstack}

    def blocks(self, token_ids: Sequence[int], media: Sequence[Media]) -> tuple[tuple[int, int], ...]:
        """What of a prompt sees one another. From any thread."""
        if self.block_kind == "prompt":
            return ((0, len(token_ids)),)
        if self.block_kind is None:
            return ()
        return tuple(
            (int(run[0]), int(run[-1]) + 1)
            for piece in media
            if piece.kind != "audio"
            for run in np.split(piece.positions, np.flatnonzero(np.diff(piece.positions) != 1) + 1)
        )

    def rope_index(self, token_ids: Sequence[int], media: Sequence[Media]) -> Rope | None:
        """Where a prompt's tokens stand, by the family's own rule; None where each stands at its index.

        From any thread: it computes on the CPU, and touches nothing of the model's.
        """
        grids: dict[str, list[tuple[int, int, int]]] = {}
        found = _grids(media) if self.positions else []
        for grid in found:
            grids.setdefault(grid.name, []).append(grid.sizes)
        if not grids:
            return None
        with mx.stream(mx.cpu):
            positions, delta = self._network.text.get_rope_index(
                mx.array([list(token_ids)], dtype=mx.int32),
                **{name: mx.array(rows, dtype=mx.int32) for name, rows in grids.items()},
            )
            own = np.array(positions.astype(mx.int32)).reshape(3, -1, len(token_ids))[:, 0]
            rope = Rope(np.ascontiguousarray(own), int(delta.reshape(-1)[0].item()))
        return stepped(rope, [(grid.start, grid.stop, grid.step) for grid in found if grid.step != 1])


class _Grid(NamedTuple):
    name: str
    sizes: tuple[int, int, int]
    """In time, height and width."""
    start: int
    stop: int
    step: float


def _grids(media: Sequence[Media]) -> list[_Grid]:
    """What the family's rule is told: one grid a picture, one a clip, whose pieces follow each other."""
    grids: list[_Grid] = []
    for piece in media:
        name = GRIDS.get(piece.kind)
        if name is None or name not in piece.inputs:
            continue
        for time, height, width in np.asarray(piece.inputs[name]).reshape(-1, 3).tolist():
            before = grids[-1] if grids else None
            goes_on = before is not None and (before.name, before.stop) == (name, piece.start)
            if (
                before is not None
                and goes_on
                and piece.kind == "video"
                and before.sizes[1:] == (height, width)
            ):
                grids[-1] = before._replace(sizes=(before.sizes[0] + time, height, width), stop=piece.stop)
            else:
                grids.append(_Grid(name, (time, height, width), piece.start, piece.stop, piece.step))
    return grids


def _token_ids(own: Any, config: Mapping[str, Any]) -> dict[MediaKind, int]:
    """own: the family's configuration object. It may hold a default beside what the file says, under another name."""
    found: dict[MediaKind, int] = {}
    for kind, names in PLACEHOLDERS.items():
        said = [name for name in names if config.get(name) is not None]
        # A clip's and a sound's must be in the file: some families have defaults of what they do not take.
        known = said or (
            [name for name in names if getattr(own, name, None) is not None] if kind == "image" else []
        )
        if known and _has_tower(own, kind):
            found[kind] = int(getattr(own, known[0]))
    return found


def _has_tower(own: Any, kind: MediaKind) -> bool:
    name = "audio_config" if kind == "audio" else "vision_config"
    return getattr(own, name, None) is not None


def _vectors_alone(vectors: mx.array, embeddings: mx.array, ids: mx.array, *_: object) -> mx.array:
    """What a family puts in the places of ids that are all placeholders: ValueError unless they are as many."""
    return vectors.reshape(embeddings.shape).astype(embeddings.dtype)


def _layers_of(deepstack: Any) -> tuple[mx.array, ...]:
    """[n, D] a layer, of a list of those or of [1, n, L, D]."""
    if deepstack is None:
        return ()
    if isinstance(deepstack, mx.array) and deepstack.ndim == 4:
        return tuple(deepstack[0, :, layer] for layer in range(deepstack.shape[2]))
    return tuple(deepstack)


def _innermost(own: Any, config: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The family's configuration object, and the file's, that speak of towers."""
    for name in NESTED:
        if isinstance(config.get(name), dict) and hasattr(own, name):
            return getattr(own, name), config[name]
    return own, config


def _has_deepstack(network: Network, own: Any) -> bool:
    indexes = getattr(getattr(own, "vision_config", None), "deepstack_visual_indexes", None)
    return bool(indexes) and network.takes("deepstack_visual_embeds")


def _block_kind(config: dict[str, Any], network: Network) -> BlockKind | None:
    own: Any = getattr(network.backbone, "config", None)
    both_ways = getattr(own, "use_bidirectional_attention", None)
    kind = BLOCK_KINDS.get(str(config.get("model_type")))
    if both_ways == "vision":
        kind = "picture"
    if kind == "prompt" and both_ways:
        # Its code would attend both ways at every step and ask nobody; the rows' own mask says where.
        own.use_bidirectional_attention = False
    return kind


def _find_embedder(network: Network) -> Callable[[mx.array], mx.array]:
    """Whichever way of embedding tokens leads to what the network makes of the tokens themselves: some families
    scale in their backbone, some before it, and mlx-vlm's own way forgets to in gemma3n."""
    module, backbone = network.module, network.backbone

    def scaled(tokens: mx.array) -> mx.array:
        embedded = backbone.embed_tokens(tokens)
        return embedded * math.sqrt(embedded.shape[-1])

    ways: list[Callable[[mx.array], mx.array]] = [
        lambda tokens: module.get_input_embeddings(tokens).inputs_embeds
    ]
    if "embed_tokens" in backbone:
        ways += [backbone.embed_tokens, scaled]
    tokens = mx.array([list(PROBE_TOKENS)], dtype=mx.int32)
    with evaluating(network):
        expected = network.hidden(tokens)
        scale = mx.maximum(mx.abs(expected).max(), 1e-6)
        for way in ways:
            found = network.hidden(tokens, embeddings=way(tokens))
            if bool(mx.abs(found - expected).max() <= MAX_ERROR * scale):
                return way
    raise ModelError(f"{type(module).__module__}: tokens embedded beforehand lead to other hidden states")
