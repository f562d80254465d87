"""lathe doctor --model: what it tries is really tried, on tiny models of several kinds."""

import shutil

import mlx.core as mx
import pytest
from vision_rows import always

from serve.adapters.formats.manifest import read_config, read_tensors, write_adapter
from serve.combinations import BASE, COLUMNS, DISK, MEDIA, MEMORY, ONE_BLOCK, TOGETHER, probe
from serve.errors import LatheError

MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def by_pair(found) -> dict:
    return {(cell.row, cell.column): cell for cell in found.cells}


def test_every_adapter_kind_combines_with_everything_on_a_model_of_experts(make_model):
    found = probe(str(make_model("combining-moe", MOE)))
    assert [(cell.row, cell.column) for cell in found.cells] == [
        (row, column) for row in (BASE, "LoRA", "DoRA", "experts") for column in COLUMNS
    ]
    assert {(cell.is_possible, cell.note) for cell in found.cells} == {(True, "")}


def test_heads_too_narrow_for_a_group_are_told_and_the_rest_combines(model_folder, make_adapter):
    folder = make_adapter(1)
    found = by_pair(probe(str(model_folder), folder))
    assert {row for row, _ in found} == {BASE, f"{folder.name} (adapter)"}
    for (_, column), cell in found.items():
        assert cell.is_possible == (column not in ("8 bit", "4 bit"))
        if not cell.is_possible:
            assert "kv_group_size is 64, which does not divide the 16 channels" in cell.note


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
def test_recurrent_families_keep_prefixes_and_say_what_is_not_quantized(recurrent_folder, family):
    found = by_pair(probe(str(recurrent_folder(family))))
    for row in {row for row, _ in found}:
        for column in ("plain", TOGETHER, MEMORY, DISK, "one step ahead"):
            assert found[row, column].is_possible, found[row, column]
        has_keys = family == "qwen3_next"
        assert ("nothing is quantized" in found[row, "TurboQuant 3.5"].note) != has_keys


def test_an_adapter_that_does_not_fit_says_so_in_every_column(model_folder, make_adapter, tmp_path):
    tensors, config = read_tensors(make_adapter(1)), read_config(make_adapter(1))
    bad = tmp_path / "base"
    write_adapter(bad, {f"nowhere.{name}": value for name, value in tensors.items()}, config)
    found = by_pair(probe(str(model_folder), bad))
    for column in COLUMNS:
        assert not found["base (adapter)", column].is_possible
        assert "nowhere" in found["base (adapter)", column].note
    assert found[BASE, TOGETHER].is_possible


def test_no_model_is_one_error(tmp_path):
    with pytest.raises(LatheError, match="no-such"):
        probe(str(tmp_path / "no-such"))


@pytest.mark.parametrize("family", always("qwen2_vl"))
def test_a_model_that_sees_has_columns_of_what_it_takes(vlm_folder, family):
    found = by_pair(probe(str(vlm_folder(family))))
    takes = {column for _, column in found} - set(COLUMNS)
    assert takes <= set(MEDIA.values())
    assert MEDIA["image"] in takes
    for row in {row for row, _ in found}:
        for column in (*takes, "plain", TOGETHER):
            assert found[row, column].is_possible, found[row, column]
        cell = found[row, MEMORY]
        assert (cell.is_possible, cell.note) == (
            (False, ONE_BLOCK) if family == "paligemma" else (True, "")
        ), cell


def test_eyes_that_see_nothing_are_found(vlm_folder, tmp_path):
    blind = tmp_path / "blind"
    shutil.copytree(vlm_folder("qwen2_vl"), blind)
    file = str(blind / "model.safetensors")
    weights = {name: w * ("merger.mlp.2" not in name) for name, w in mx.load(file).items()}
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    cell = by_pair(probe(str(blind)))[BASE, MEDIA["image"]]
    assert (cell.is_possible, cell.note) == (False, "it answers the same whatever it is shown")
