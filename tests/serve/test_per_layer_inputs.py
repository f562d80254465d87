"""gemma4: inputs of each layer that follow from tokens, layers that share keys, a picture and a sound in one row."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from vision_rows import Batch, away

from serve.model.network import Network
from serve.model.prompt import Media, Prompt
from serve.model.towers import build_with_towers
from serve.model.vision import Vision

IMAGE, AUDIO, BEGIN, END = 290, 291, 292, 293
CONFIG: dict[str, Any] = {
    "model_type": "gemma4",
    "vocab_size": 300,
    "image_token_id": IMAGE,
    "audio_token_id": AUDIO,
    "hidden_size": 64,
    "text_config": {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 32,
        "vocab_size": 300,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "patch_size": 4,
        "position_embedding_size": 64,
        "pooling_kernel_size": 2,
        "default_output_length": 4,
    },
    "audio_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "subsampling_conv_channels": (8, 4),
        "attention_chunk_size": 4,
        "attention_context_left": 5,
        "output_proj_dims": 48,
    },
}
PICTURE_TOKENS, SOUND_TOKENS = 4, 6


@dataclass
class Model:
    """As much of a LoadedModel as rows need."""

    network: Network
    vision: Vision


def lively(both_ways: str | None) -> Model:
    """A random model whose answers rest on every token and all media."""
    config = copy.deepcopy(CONFIG)
    config["text_config"]["use_bidirectional_attention"] = both_ways
    mx.random.seed(0)
    module = build_with_towers(copy.deepcopy(config))
    module.eval()
    changed = []
    for path, weight in tree_flatten(module.parameters()):
        if path.endswith("embed_tokens.weight"):
            changed.append((path, mx.random.normal(weight.shape) / 8))
        elif path.endswith("per_layer.weight"):
            changed.append((path, mx.random.normal(weight.shape)))
        elif "language_model" in path and any(
            part in path for part in ("o_proj", "down_proj", "q_proj", "k_proj")
        ):
            changed.append((path, weight * 3))
    module.load_weights(changed, strict=False)
    network = Network(module)
    network.check()
    return Model(network, Vision(network, config))


@pytest.mark.parametrize("both_ways", [None, "vision"])
def test_a_row_with_a_picture_and_a_sound_is_what_mlx_vlm_makes_of_it_alone(both_ways: str | None):
    model = lively(both_ways)
    assert model.vision.kinds == {"image", "audio"}
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(1, 3, 16, 16)).astype(np.float32)
    sound, valid = rng.normal(size=(1, 24, 128)).astype(np.float32), np.ones((1, 24), dtype=bool)
    ids = [5, 6, BEGIN, *[IMAGE] * PICTURE_TOKENS, END, 7, 8, BEGIN, *[AUDIO] * SOUND_TOKENS, END, 9, 10, 11]
    places = {kind: np.flatnonzero(np.array(ids) == kind).astype(np.int32) for kind in (IMAGE, AUDIO)}
    media = (
        Media("image", "picture", places[IMAGE], {"pixel_values": pixels}, 16),
        Media("audio", "sound", places[AUDIO], {"input_features": sound, "input_features_mask": valid}, 24),
    )
    seen = Prompt(tuple(ids), media, None, model.vision.blocks(ids, media))
    text = Prompt(tuple(range(9, 36)))
    assert len(seen.blocks) == (both_ways is not None)
    found = Batch(model, [seen, text]).prefill(random.Random(1), is_recurrent=False)  # type: ignore[arg-type]

    own = model.network.module
    features = own.get_input_embeddings(
        mx.array([ids]), mx.array(pixels), input_features=mx.array(sound), input_features_mask=mx.array(valid)
    )
    kinds = {"mm_token_type_ids": mx.array([[int(token == IMAGE) for token in ids]])} if both_ways else {}
    alone = own.language_model(
        None,
        inputs_embeds=features.inputs_embeds,
        per_layer_inputs=features.per_layer_inputs,
        cache=own.make_cache(),
        **kinds,
    )
    assert away(found[0], alone.logits[0, -1]) < 1e-4
    words = own.language_model(mx.array([text.token_ids]), cache=own.make_cache())
    assert away(found[1], words.logits[0, -1]) < 1e-4
    # The tokens' own inputs at placeholders are not what the family gives them there.
    named = own.language_model.model.get_per_layer_inputs(mx.array([ids]))
    other = own.language_model(
        None, inputs_embeds=features.inputs_embeds, per_layer_inputs=named, cache=own.make_cache(), **kinds
    )
    assert away(other.logits[0, -1], alone.logits[0, -1]) > 0.01
