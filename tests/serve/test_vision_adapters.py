"""Adapters of models that see: whatever prefix their names have, in the language part, tower and projector."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from vision_rows import Batch, always, away, messages_for, prompt_of
from vlm_families import Reference, picture

from serve.adapters.bank.bank import Bank
from serve.adapters.fitting.own import own_layout
from serve.adapters.fitting.paths import own_paths
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import read_config, read_tensors, write_adapter
from serve.adapters.registry.registry import Registry
from serve.errors import AdapterError
from serve.model.loading import LoadedModel, load
from serve.model.weights import expert_modules, linear_modules, linear_shape

EYES = ("vision_tower", "vision_model", "merger", "connector", "projector", "mlp1")
"""Parts of names of towers and of what leads from them to the language part."""
ANSWER_TOKENS = 6
PREFIXES = (
    "",
    "model.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
    "base_model.model.model.",
)


def registry_of(model: LoadedModel) -> Registry:
    return Registry(model, Bank(model.network), max_bytes=1 << 30)


@pytest.mark.parametrize("family", always("qwen2_vl", "smolvlm", "gemma3"))
def test_a_layers_name_means_the_same_layer_under_every_prefix(
    family: str, opened: Callable[[str], LoadedModel]
):
    network = opened(family).network
    inside = [path for path in linear_modules(network.module) if ".layers.1." in path and "language" in path]
    assert len(inside) >= 5
    for path in inside:
        end = path[path.index("layers.1.") :]
        names = [f"{prefix}{end}" for prefix in PREFIXES]
        assert own_paths(names, network) == dict.fromkeys(names, path)
    heads = own_paths(["lm_head", "base_model.model.lm_head"], network)
    own = [path for path in linear_modules(network.module) if path.endswith("lm_head")]
    assert set(heads.values()) == set(own or network.tied_head)


def test_two_names_of_one_tensor_are_refused(opened: Callable[[str], LoadedModel]):
    names = [
        "model.layers.0.self_attn.q_proj.lora_a",
        "language_model.model.layers.0.self_attn.q_proj.lora_a",
    ]
    with pytest.raises(AdapterError, match="two tensors are the same layer's lora_a"):
        own_layout(dict.fromkeys(names, mx.zeros(3)), AdapterConfig("lora", -1), opened("qwen2_vl").network)


def renamed(folder: Path, source: Path, old: str, new: str) -> Path:
    """An adapter folder whose tensors' names begin otherwise."""
    tensors = {name.replace(old, new, 1): value for name, value in read_tensors(source).items()}
    config = read_config(source)
    write_adapter(folder, tensors, AdapterConfig("lora", -1, config.rank, config.scale))
    return folder


def test_an_adapter_named_by_mlx_lm_is_the_one_named_by_mlx_vlm(
    opened: Callable[[str], LoadedModel], make_vlm_adapter: Callable[..., Path], tmp_path: Path
):
    theirs = make_vlm_adapter("qwen2_vl", 1)
    ours = renamed(tmp_path / "lm", theirs, "language_model.model.", "model.")
    model = opened("qwen2_vl")
    registry = registry_of(model)
    slots = [
        registry.slot_of(registry.load(name, each)) for name, each in (("theirs", theirs), ("ours", ours))
    ]
    tokens = mx.array([[5, 6, 7, 8]] * 3)
    registry.residency._bank.rows.set([0, *slots])
    base, one, other = model.network.logits(model.network.hidden(tokens))
    assert away(one, base) > 0.1
    assert away(one, other) < 1e-5


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_that_mlx_vlm_saved_is_the_one_it_trained(
    use_dora: bool, opened: Callable[[str], LoadedModel], vlm_folder: Callable[[str], Path], tmp_path: Path
):
    from mlx_vlm.trainer.peft import get_peft_model, save_adapter

    theirs = load(str(vlm_folder("qwen2_vl"))).network
    plain = opened("qwen2_vl").network
    get_peft_model(theirs.module, rank=4, alpha=16, dropout=0.0, verbose=False, use_dora=use_dora)
    mx.random.seed(3)
    learned = [
        (path, mx.random.normal(value.shape) * 0.2)
        for path, value in tree_flatten(theirs.module.trainable_parameters())
        if path.endswith("lora_b")
    ]
    assert len(learned) >= 14
    theirs.module.load_weights(learned, strict=False)
    theirs.module.eval()
    save_adapter(theirs.module, tmp_path / "theirs" / "adapters.safetensors")
    model = opened("qwen2_vl")
    registry = registry_of(model)
    slot = registry.slot_of(registry.load("theirs", tmp_path / "theirs"))
    tokens = mx.array([[5, 6, 7, 8, 9]])
    registry.residency._bank.rows.set([slot])
    found = model.network.hidden(tokens)
    assert away(found, theirs.hidden(tokens)) < 1e-4
    assert away(found, plain.hidden(tokens)) > 0.1


@pytest.mark.parametrize("family", always("qwen2_vl", "paligemma", "internvl_chat"))
def test_a_picture_through_a_banked_tower_is_what_the_merged_tower_makes_of_it(
    family: str,
    opened: Callable[[str], LoadedModel],
    make_vlm_adapter: Callable[..., Path],
    vlm_reference: Callable[..., Reference],
):
    folder = make_vlm_adapter(family, 3, parts=EYES, size=0.1)
    merged = vlm_reference(family, folder)
    model = opened(family)
    assert model.vision is not None
    row, prompt = prompt_of(merged, model.vision, picture(0), "what?")
    [media] = prompt.media
    plain = model.vision.encode(media)
    registry = registry_of(model)
    version = registry.load("eyes", folder)
    registry.residency._bank.rows.set([registry.slot_of(version)])
    found = model.vision.encode(media)
    ids = mx.array([row.token_ids])
    inputs = dict(row.inputs)
    expected = merged.model.get_input_embeddings(
        ids, inputs.pop("pixel_values"), mask=mx.ones_like(ids), **inputs
    )
    at = mx.array(media.positions)
    assert away(found.embeddings, expected.inputs_embeds[0][at]) < 1e-5
    assert away(found.embeddings, plain.embeddings) > 0.02
    for number, layer in enumerate(found.deepstack):
        whole = expected.deepstack_visual_embeds
        other = whole[0, at, number] if isinstance(whole, mx.array) and whole.ndim == 4 else whole[number]
        assert away(layer, other) < 1e-5


def test_versions_with_one_tower_hash_make_the_same_features(
    opened: Callable[[str], LoadedModel], make_vlm_adapter: Callable[..., Path], tmp_path: Path
):
    """It is of tower and projector alone, and empty where an adapter leaves them as they are."""
    eyes, words = make_vlm_adapter("qwen2_vl", 3, parts=EYES), make_vlm_adapter("qwen2_vl", 1)
    both = {**read_tensors(eyes), **read_tensors(words)}
    config = read_config(eyes)
    write_adapter(tmp_path / "both", both, AdapterConfig("lora", -1, config.rank, config.scale))
    write_adapter(
        tmp_path / "louder", read_tensors(eyes), AdapterConfig("lora", -1, config.rank, 2 * config.scale)
    )
    registry = registry_of(opened("qwen2_vl"))
    folders = {"eyes": eyes, "words": words, "both": tmp_path / "both", "louder": tmp_path / "louder"}
    hashes = {name: registry.load(name, folder).tower_hash for name, folder in folders.items()}
    assert hashes["words"] == ""
    assert hashes["eyes"] == hashes["both"] != ""
    assert hashes["louder"] not in ("", hashes["eyes"])


@pytest.mark.parametrize("family", always("qwen3_vl", without=("gemma3",)))
def test_rows_with_media_and_their_own_adapters_are_each_alone_on_its_merged_model(
    family: str,
    opened: Callable[[str], LoadedModel],
    make_vlm_adapter: Callable[..., Path],
    vlm_reference: Callable[..., Reference],
):
    """One row of the base, one with an adapter of the language part, one with an adapter of the tower too."""
    folders = [
        None,
        make_vlm_adapter(family, 1),
        make_vlm_adapter(family, 2, parts=("language_model", *EYES), size=0.1),
    ]
    references = [vlm_reference(family, folder) for folder in folders]
    model = opened(family)
    assert model.vision is not None
    registry = registry_of(model)
    slots = [registry.slot_of(registry.load(str(each), each)) if each else 0 for each in folders]
    pairs = [
        prompt_of(reference, model.vision, *parts)
        for reference, parts in zip(references, messages_for(family), strict=True)
    ]
    answers = [
        reference.greedy(row, ANSWER_TOKENS) for reference, (row, _) in zip(references, pairs, strict=True)
    ]
    expected = [
        reference.logits(row, answer)
        for reference, (row, _), answer in zip(references, pairs, answers, strict=True)
    ]
    batch = Batch(model, [prompt for _, prompt in pairs], registry.residency._bank, slots)
    found = [batch.prefill(random.Random(1), is_recurrent=family == "qwen3_5"), *batch.decode(answers)]
    for row in range(len(pairs)):
        for step in range(ANSWER_TOKENS + 1):
            assert away(found[step][row], expected[row][step]) < 2e-4, f"{family}: row {row}, token {step}"


def write_experts(folder: Path, model: LoadedModel) -> Path:
    """A random update of every expert, and of attention beside them."""
    rng = np.random.default_rng(0)
    tensors = {}
    for path, stack in expert_modules(model.network.module).items():
        inputs, outputs = linear_shape(stack)
        experts = stack.weight.shape[0]
        tensors[f"{path}.lora_a"] = mx.array(rng.normal(size=(experts, 3, inputs)).astype(np.float32) * 0.15)
        tensors[f"{path}.lora_b"] = mx.array(rng.normal(size=(experts, outputs, 3)).astype(np.float32) * 0.15)
    write_adapter(folder, tensors, AdapterConfig("lora", -1, 3, 2.0))
    return folder


def merge_experts(module: nn.Module, folder: Path) -> None:
    """scale · b a of each expert, added to its weights."""
    tensors, scale = read_tensors(folder), read_config(folder).scale
    weights = dict(tree_flatten(module.parameters()))
    for path in {name.rpartition(".")[0] for name in tensors}:
        delta = scale * (tensors[f"{path}.lora_b"] @ tensors[f"{path}.lora_a"])
        module.load_weights([(f"{path}.weight", weights[f"{path}.weight"] + delta)], strict=False)


@pytest.mark.parametrize("width", [1, 5, 30], ids=["one token", "few tokens", "many tokens"])
def test_adapters_of_experts_are_merged_ones_at_every_number_of_tokens(
    width: int, opened: Callable[[str], LoadedModel], vlm_folder: Callable[[str], Path], tmp_path: Path
):
    """mlx-vlm's blocks go through two to eight tokens one by one, by calling themselves."""
    model = opened("qwen3_vl_moe")
    folder = write_experts(tmp_path / "experts", model)
    plain, merged = (load(str(vlm_folder("qwen3_vl_moe"))).network for _ in range(2))
    merge_experts(merged.module, folder)
    registry = registry_of(model)
    slot = registry.slot_of(registry.load("experts", folder))
    tokens = mx.array(np.random.default_rng(width).integers(10, 250, (4, width)))
    registry.residency._bank.rows.set([0, slot, 0, slot])
    found = model.network.hidden(tokens)
    for row in range(4):
        alone = (merged if row % 2 else plain).hidden(tokens[row : row + 1])[0]
        other = (plain if row % 2 else merged).hidden(tokens[row : row + 1])[0]
        assert away(found[row], alone) < 1e-4
        assert away(found[row], other) > 0.01
