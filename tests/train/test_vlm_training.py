"""Laws of training on rows with pictures, over families: the losses are those of mlx-vlm's own code under a causal
mask, no target sees its future, neighbours and packing change nothing, and gradients reach what is to train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from rich.console import Console
from vlm_families import FAMILIES, Reference, picture

from serve.errors import ConfigError
from serve.model.loading import LoadedModel
from serve.model.packed import packing_problem
from train.adapters.adapt import checkpointed_layers, trains_towers
from train.adapters.base import load_base
from train.adapters.build import build_adapted
from train.data.batches import Batch, collate
from train.data.packing import Layout, collate_packed
from train.data.tokens import TokenizedExample
from train.foresee import preflight
from train.foresee.preflight import Preflight
from train.loop.build import eyes_of
from train.loop.eyes import Eyes
from train.loop.loss import hidden_states
from train.loop.step import mean_loss
from train.objectives.sft import SFT
from train.recipe.recipe import Recipe

QUICK = ("qwen3_vl", "gemma3")
"""One with positions and deepstack, one with blocks."""
SLOW = tuple(family for family in FAMILIES if family not in (*QUICK, "qwen3_omni_moe"))
EACH = [*QUICK, *(pytest.param(family, marks=pytest.mark.large) for family in SLOW)]
ROUNDING = 2e-4
"""Of a loss of some nats a token; a wrong position, mask or feature moves it by 0.02 and more."""


@dataclass(frozen=True)
class Case:
    """A family's model, and rows that were read as a run reads them."""

    model: LoadedModel
    flight: Preflight
    messages: list[list[dict]]
    pictures: list[list]

    @property
    def rows(self) -> Sequence[TokenizedExample]:
        return self.flight.train.rows

    @property
    def eyes(self) -> Eyes:
        eyes = eyes_of(self.flight.recipe, self.model)
        assert eyes is not None
        return eyes

    def loss(self, batch: Batch) -> float:
        """The sum over its targets."""
        found = mean_loss(self.model.network, [batch], SFT(), eyes=self.eyes)
        return found.loss * batch.num_targets


def asked(text: str, *answers: str) -> list[dict]:
    turns = [{"role": "user", "content": text}]
    for number, answer in enumerate(answers):
        turns += [{"role": "user", "content": "and now?"}] if number else []
        turns.append({"role": "assistant", "content": answer})
    return turns


def rows_of(family: str) -> tuple[list[list[dict]], list[list]]:
    one, two, three = picture(1), picture(2, 84, 56), picture(3, 56, 84)
    rows = [(asked("what is <image>?", "a lamp"), [one]), (asked("hi", "a word", "no"), [])]
    if FAMILIES[family].max_pictures is None:
        rows += [
            (asked("<image> or <image>?", "this one", "yes"), [two, one]),
            (asked("<image><image>then<image>", "three"), [three, two, one]),
        ]
    return [turns for turns, _ in rows], [pictures for _, pictures in rows]


@pytest.fixture(scope="module")
def folder_of(vlm_folder: Callable[[str], Path], tmp_path_factory) -> Callable[[str], Path]:
    """folder_of(family): a mask that is handed to gemma3's code stands for all its layers, so no window is to hide
    anything where mlx-vlm's own code is compared with."""

    def find(family: str) -> Path:
        if family != "gemma3":
            return vlm_folder(family)
        folder = tmp_path_factory.mktemp("wide") / family
        shutil.copytree(vlm_folder(family), folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["sliding_window"] = 1024
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return cache(find)


@pytest.fixture(scope="module")
def case(folder_of: Callable[[str], Path], tmp_path_factory) -> Callable[..., Case]:
    """case(family, **keys of the recipe) → a model loaded anew, and a few rows."""

    def make(family: str, **keys) -> Case:
        folder = tmp_path_factory.mktemp(family)
        messages, pictures = rows_of(family)
        lines = []
        for number, (turns, shown) in enumerate(zip(messages, pictures, strict=True)):
            names = [f"{number}-{place}.png" for place in range(len(shown))]
            for name, image in zip(names, shown, strict=True):
                image.save(folder / name)
            lines.append(json.dumps({"messages": turns, "images": names}))
        (folder / "train.jsonl").write_text("\n".join(lines))
        recipe = Recipe(
            model=str(folder_of(family)),
            datasets=[{"path": str(folder)}],
            adapter_path=str(folder / "out"),
            **{"val_batches": 0, "batch_size": len(lines), "num_layers": -1, **keys},
        )
        flight = preflight.prepare(recipe, Console(quiet=True))
        return Case(load_base(recipe), flight, messages, pictures)

    return make


def parts_of(turns: Sequence[dict], pictures: Sequence) -> list[dict]:
    """The turns with the pictures themselves at their places, as mlx-vlm's processor takes them."""
    shown = iter(pictures)
    found = []
    for turn in turns:
        parts: list[dict] = []
        for number, text in enumerate(turn["content"].split("<image>")):
            parts += [{"type": "image", "image": next(shown)}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        found.append({"role": turn["role"], "content": parts})
    return found


def reference_loss(reference: Reference, row: TokenizedExample, turns: list[dict], pictures: list) -> float:
    """Σ over targets of a row alone by mlx-vlm's own code: embeddings and extras of `get_input_embeddings`, no cache,
    and of masks only those that say whom a picture, or a prompt, is seen by."""
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    theirs = reference.row(parts_of(turns[:first], pictures))
    ids = row.token_ids.tolist()
    is_prefix = reference.model.config.model_type == "paligemma"
    if not is_prefix:  # whose processor puts pictures first, whatever a chat says
        assert ids[: len(theirs.token_ids)] == list(theirs.token_ids), "the prompt is mlx-vlm's own"
    model, language = reference.model, reference.model.language_model
    for name in ("_position_ids", "_rope_deltas"):
        if hasattr(language, name):
            setattr(language, name, None)
    inputs, tokens = dict(theirs.inputs), mx.array([ids])
    made = model.get_input_embeddings(
        tokens, inputs.pop("pixel_values", None), mask=mx.ones_like(tokens), **inputs
    ).to_dict()
    extras = {name: value for name, value in made.items() if value is not None and "mask_4d" not in name}
    embeddings = extras.pop("inputs_embeds")
    if is_prefix and row.media is not None:  # it puts a picture at the first places, wherever it stands
        places = mx.array(row.media.placeholders)
        features = model.get_input_embeddings(
            tokens[:, places], theirs.inputs["pixel_values"], mask=mx.ones((1, len(places)), mx.int32)
        ).inputs_embeds
        embeddings = language.model.embed_tokens(tokens)
        embeddings[0, places] = features[0]
    blocks = row.media.blocks if row.media is not None else ()
    if blocks or is_prefix:  # which without a mask would have none
        places = np.arange(len(ids))
        seen = places[None] <= places[:, None]
        for start, stop in blocks:
            seen[start:stop, start:stop] = True
        extras["mask"] = mx.array(seen)[None, None]
    logits = language(tokens, inputs_embeds=embeddings, **extras).logits[0].astype(mx.float32)
    losses = nn.losses.cross_entropy(logits[:-1], tokens[0, 1:])
    return float((losses * mx.array(row.is_target[1:])).sum().item())


@pytest.mark.parametrize("family", EACH)
def test_losses_are_those_of_mlx_vlms_own_code_under_the_rows_own_masks(family, case):
    one = case(family)
    reference = Reference(one.model.path)
    expected = [
        reference_loss(reference, row, turns, shown)
        for row, turns, shown in zip(one.rows, one.messages, one.pictures, strict=True)
    ]
    batch = collate(one.rows, range(len(one.rows)))
    assert one.loss(batch) == pytest.approx(sum(expected), abs=ROUNDING * batch.num_targets)
    blind = replace(batch, media=None)
    assert abs(one.loss(blind) - sum(expected)) > 0.02 * batch.num_targets


@pytest.mark.parametrize("family", EACH)
def test_no_target_sees_its_future(family, case):
    one = case(family)
    row = one.rows[0]
    changed = row.token_ids.copy()
    changed[-1] = (changed[-1] + 7) % 200
    hidden = []
    for ids in (row.token_ids, changed):
        seen = one.eyes.see([collate(one.rows, [0]).media[0]], (1, len(ids)))
        hidden.append(hidden_states(one.model.network, mx.array(ids[None]), seen=seen)[0])
    moved = np.array(mx.abs(hidden[0] - hidden[1]).max(axis=-1))
    assert moved[:-1].max() == pytest.approx(0, abs=1e-4)
    assert moved[-1] > 1e-2


@pytest.mark.parametrize("family", EACH)
def test_a_row_learns_alike_alone_beside_others_and_packed_with_them(family, case):
    one = case(family)
    numbers = range(len(one.rows))
    alone = sum(one.loss(collate(one.rows, [number])) for number in numbers)
    together = collate(one.rows, numbers)
    assert one.loss(together) == pytest.approx(alone, abs=ROUNDING * together.num_targets)
    in_parts = mean_loss(one.model.network, [together], SFT(), max_positions=1, eyes=one.eyes).loss
    assert in_parts * together.num_targets == pytest.approx(alone, abs=ROUNDING * together.num_targets)
    problem = packing_problem(one.model.network, 256)
    if problem is not None:
        with pytest.raises(ConfigError, match="sample_packing"):
            load_base(one.flight.recipe.model_copy(update={"sample_packing": True}))
        return
    lengths = [len(row) for row in one.rows]
    packed = collate_packed(one.rows, Layout(sum(lengths), (tuple(numbers),)))
    assert packed.segments is not None
    assert one.loss(packed) == pytest.approx(alone, abs=2 * ROUNDING * packed.num_targets)


PARTS = {
    "lora": {
        "lora_parameters": {"rank": 2, "scale": 4.0},
        "train_vision": {"tower": "lora", "projector": "lora"},
    },
    "full": {"fine_tune_type": "full", "train_vision": {"tower": "full", "projector": "full"}},
}


@pytest.mark.parametrize("how", PARTS)
@pytest.mark.parametrize("family", EACH)
def test_gradients_of_tower_and_projector_are_the_slope_of_the_loss(family, how, case):
    one = case(family, **PARTS[how])
    network = one.model.network
    build_adapted(one.flight.recipe, network)
    assert trains_towers(network)
    if how == "lora":  # B begins at zero, where A has no gradient
        network.module.update(
            tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape), network.module.trainable_parameters())
        )
    batch = collate(one.rows, range(len(one.rows)))
    inputs = SFT().prepare(batch).seen_by(one.eyes).arrays(1)

    def total() -> mx.array:
        return SFT().loss(network, inputs)[0]

    gradients = nn.value_and_grad(network.module, total)()[1]
    named = dict(tree_flatten(gradients))
    unreached = [name for name, value in named.items() if not mx.any(value != 0).item()]
    # llava's features are those before its tower's last layer.
    assert len(unreached) <= len(named) // (3 if family == "llava" else 10), unreached
    with checkpointed_layers(network):
        again = nn.value_and_grad(network.module, total)()[1]
    pairs = zip(named.values(), dict(tree_flatten(again)).values(), strict=True)
    worst = max(float(mx.abs(a - b).max()) for a, b in pairs)
    assert worst <= 1e-3 * max(float(mx.abs(value).max()) for value in named.values())
    seeing = {name: value for name, value in named.items() if not name.startswith(f"{network.text_path}.")}
    norm = float(mx.sqrt(sum(value.square().sum() for value in seeing.values())))
    start = network.module.trainable_parameters()
    step = 3e-3 / norm
    slopes = []
    for sign in (1, -1):
        moved = [
            (name, value + sign * step * seeing[name] / norm if name in seeing else value)
            for name, value in tree_flatten(start)
        ]
        network.module.load_weights(moved, strict=False)
        slopes.append(float(total()))
    network.module.update(start)
    assert (slopes[0] - slopes[1]) / (2 * step) == pytest.approx(norm, rel=0.1)


@pytest.mark.parametrize("family", QUICK)
def test_frozen_features_are_computed_once_and_those_of_one_picture_are_shared(family, case):
    one = case(family)
    batch = collate(one.rows, range(len(one.rows)))
    inside = one.loss(batch)  # nothing is frozen yet: features are made in the loss, several in a call
    build_adapted(one.flight.recipe, one.model.network)
    assert one.loss(batch) == pytest.approx(inside, abs=ROUNDING * batch.num_targets)
    eyes = one.eyes
    for _ in range(3):
        SFT().prepare(batch).seen_by(eyes)
    assert eyes.num_encoded == 3  # three pictures, shown six times in a batch
    small = eyes_of(one.flight.recipe.model_copy(update={"feature_cache_threshold": 1}), one.model)
    for _ in range(2):
        SFT().prepare(batch).seen_by(small)
    assert small.num_encoded == 6
