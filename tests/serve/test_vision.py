"""Media among text on this project's own rows: every family's row is what mlx-vlm's code makes of it alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from vision_rows import Batch, always, away, messages_for, prompt_of
from vlm_families import VLM_FAMILIES, Reference, picture

from serve.errors import ModelError
from serve.model.loading import LoadedModel
from serve.model.prompt import Media, Rope
from serve.model.vision import Vision

ANSWER_TOKENS = 8
M_ROPE = tuple(family for family in VLM_FAMILIES if family.startswith("qwen"))


@pytest.mark.parametrize("family", always("qwen3_vl", "paligemma", without=("gemma3",)))
def test_rows_with_media_in_one_batch_are_each_alone_in_mlx_vlm(
    family: str, opened: Callable[[str], LoadedModel], vlm_reference: Callable[..., Reference]
):
    reference, model = vlm_reference(family), opened(family)
    assert model.vision is not None
    pairs = [prompt_of(reference, model.vision, *parts) for parts in messages_for(family)]
    answers = [reference.greedy(row, ANSWER_TOKENS) for row, _ in pairs]
    expected = [reference.logits(row, answer) for (row, _), answer in zip(pairs, answers, strict=True)]
    batch = Batch(model, [prompt for _, prompt in pairs])
    found = [batch.prefill(random.Random(0), is_recurrent=family == "qwen3_5"), *batch.decode(answers)]
    for row in range(len(pairs)):
        for step in range(ANSWER_TOKENS + 1):
            assert away(found[step][row], expected[row][step]) < 1e-4, f"{family}: row {row}, token {step}"


@pytest.mark.parametrize("family", always("qwen2_vl", "qwen3_5", families=M_ROPE))
def test_what_the_model_keeps_of_the_last_prompt_is_neither_read_nor_written(
    family: str, opened: Callable[[str], LoadedModel], vlm_reference: Callable[..., Reference]
):
    """mlx-vlm keeps positions and delta on its modules, and gives them to the next batch of the same shape."""
    model = opened(family)
    network, vision = model.network, model.vision
    assert vision is not None
    language = network.text
    tokens = mx.array([[9, 8, 7, 6, 5], [4, 3, 9, 2, 2]])
    before = network.logits(network.hidden(tokens))
    _, prompt = prompt_of(vlm_reference(family), vision, picture(0), "what?")
    stale = mx.full((3, 2, 5), 40), mx.full((2, 1), 7)
    language._position_ids, language._rope_deltas = stale
    kept = language._position_ids, language._rope_deltas
    assert away(network.logits(network.hidden(tokens)), before) == 0
    vision.encode(prompt.media[0])
    vision.rope_index(prompt.token_ids, prompt.media)
    network.check()
    assert (language._position_ids, language._rope_deltas) == kept, "the very same objects"


@pytest.mark.parametrize("family", always("qwen2_vl", "gemma3", "smolvlm"))
def test_embedded_tokens_lead_where_the_tokens_lead_and_stay_what_they_are(
    family: str, opened: Callable[[str], LoadedModel]
):
    """gemma3 multiplies what it is given in place."""
    model = opened(family)
    assert model.vision is not None
    tokens = mx.array([[9, 8, 7, 6, 5]])
    embedded = model.vision.embed(tokens)
    expected = np.array(embedded)
    found = model.network.hidden(tokens, embeddings=embedded)
    assert away(found, model.network.hidden(tokens)) < 1e-5
    assert (np.array(embedded) == expected).all()


def grid(kind: str, start: int, time: int, height: int, width: int) -> Media:
    count = time * height * width // 4
    positions = np.arange(start, start + count, dtype=np.int32)
    name = f"{kind}_grid_thw"
    return Media(kind, f"{kind}-{start}", positions, {name: np.array([[time, height, width]])}, 4 * count)  # type: ignore[arg-type]


def random_prompt(
    vision: Vision, config: dict, rng: random.Random, *, splits_clips: bool
) -> tuple[list[int], list[Media], dict]:
    """Texts, pictures and clips as the family's processor lays them out; clips in pieces of one temporal patch, and
    the grids that the family itself is given."""
    text = lambda: [rng.randint(20, 60) for _ in range(rng.randint(0, 4))]  # noqa: E731
    tokens, media = text(), []
    grids: dict[str, list[list[int]]] = {}
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["image", "video"])
        height, width = (2 * rng.randint(1, 4) for _ in range(2))
        frames = 1 if kind == "image" else rng.randint(1, 4)
        token = vision.token_ids[kind]
        grids.setdefault(f"{kind}_grid_thw", []).append([frames, height, width])
        start, end = [config["vision_start_token_id"]], [60]
        tokens += start
        for number in range(frames):
            if number and splits_clips:
                tokens += [*end, *text(), *start]
            piece = grid(kind, len(tokens), 1, height, width)
            media.append(piece)
            tokens += [token] * len(piece.positions)
        tokens += end + text()
    return tokens, media, grids


def ropes(model: LoadedModel, family: str) -> Iterator[tuple[Rope | None, Rope]]:
    """What a thread that is not the engine's is told, and what the family's code says of the whole prompt."""
    vision, rng = model.vision, random.Random(5)
    assert vision is not None
    for _ in range(12):
        tokens, media, grids = random_prompt(
            vision,
            model.config.get("thinker_config", model.config),
            rng,
            splits_clips=family.startswith(("qwen3_vl", "qwen3_5")),
        )
        found: list[Rope | None] = []
        thread = threading.Thread(target=lambda: found.append(vision.rope_index(tokens, media)))  # noqa: B023
        thread.start()
        thread.join()
        positions, delta = model.network.text.get_rope_index(
            mx.array([tokens]), **{name: mx.array(rows) for name, rows in grids.items()}
        )
        yield found[0], Rope(np.array(positions)[:, 0], int(delta.item()))


@pytest.mark.parametrize("family", always("qwen2_vl", "qwen3_vl", families=M_ROPE))
def test_pieces_of_clips_stand_where_the_family_puts_the_whole(
    family: str, opened: Callable[[str], LoadedModel]
):
    deltas = set()
    for found, expected in ropes(opened(family), family):
        assert found is not None
        np.testing.assert_array_equal(found.positions, expected.positions)
        assert found.delta == expected.delta
        deltas.add(found.delta)
    assert len(deltas) > 5


def test_features_that_are_not_as_many_as_their_placeholders_are_refused(
    opened: Callable[[str], LoadedModel], vlm_reference: Callable[..., Reference]
):
    vision = opened("paligemma").vision
    assert vision is not None
    _, prompt = prompt_of(vlm_reference("paligemma"), vision, picture(0), "what?")
    [media] = prompt.media
    short = Media("image", media.key, media.positions[:-3], media.inputs, media.num_patches)
    with pytest.raises((ModelError, ValueError)):
        vision.encode(short)


@pytest.mark.parametrize("family", always("internvl_chat", "qwen3_vl", "llava"))
def test_gradients_pass_through_an_encoding_into_the_tower(
    family: str, opened: Callable[[str], LoadedModel], vlm_reference: Callable[..., Reference]
):
    model = opened(family)
    vision, module = model.vision, model.network.module
    assert vision is not None
    _, prompt = prompt_of(vlm_reference(family), vision, picture(0), "what?")
    outside = {
        path: value
        for path, value in tree_flatten(module.parameters())
        if not path.startswith(f"{model.network.text_path}.") and "audio_tower" not in path
    }

    def size(weights: dict[str, mx.array]) -> mx.array:
        module.load_weights(list(weights.items()), strict=False)
        return vision.encode(prompt.media[0]).embeddings.square().sum()

    gradients = mx.grad(size)(outside)
    reached = [path for path, gradient in gradients.items() if mx.any(gradient != 0).item()]
    assert len(reached) > len(outside) / 2
    assert all(bool(mx.all(mx.isfinite(gradient))) for gradient in gradients.values())
