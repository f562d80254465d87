"""A model that sees is exported with its eyes: what `mlx_vlm.load` opens answers as base + adapter does there."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from rich.console import Console
from vlm_families import VLM_FAMILIES, Reference, Row, message, picture

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_config, read_tensors, write_adapter
from serve.errors import AdapterError, ConfigError
from train.after.export import Form, check_still_sees, export, load_adapted
from train.after.fidelity import Rows, eyes_of, features_apart, held_out

ALWAYS = ("qwen3_vl", "gemma3")
"""With three positions a token and deepstack; with attention both ways inside a picture."""
EVERY = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.large) for name in VLM_FAMILIES]
MLX_LM_TOO = [
    pytest.param(name, marks=() if name == "gemma3" else pytest.mark.large)
    for name in ("gemma3", "qwen3_vl", "pixtral")
]
"""Those whose text part mlx-lm loads from the same folder."""


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TIED = {"gemma3": {"keys": LAYERS}}
"""mlx-vlm takes the head of these from the embeddings whenever it loads them."""
PARTS = {"gemma3": ("language_model.model", "vision_tower", "multi_modal_projector")}
"""Everything but that."""


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def picture_rows(tmp_path_factory) -> Path:
    """Six questions about pictures of several shapes, and two without."""
    folder = tmp_path_factory.mktemp("picture-rows")
    lines = []
    for number, size in enumerate(((56, 56), (84, 56), (56, 112), (70, 70), (56, 56), (112, 84))):
        picture(number, *size).save(folder / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "what is this?"}]
        lines.append(
            [{"role": "user", "content": content}, {"role": "assistant", "content": f"that {number}"}]
        )
    for number in range(2):
        lines.append(
            [{"role": "user", "content": f"and {number}?"}, {"role": "assistant", "content": "nothing"}]
        )
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    return file


@pytest.fixture
def run_export(vlm_folder, picture_rows, tmp_path) -> Callable:
    """run_export(family, adapter, form=None, out="out", **options) → the report of an export compared on pictures."""

    def run(family: str, adapter: Path, form: Form | None = None, out: str = "out", **options):
        options = {"base": str(vlm_folder(family)), "rows": Rows(picture_rows), "console": quiet(), **options}
        return export(adapter, tmp_path / out, form, **options)

    return run


def question(reference: Reference) -> Row:
    return reference.row([message(picture(3), "what is ", "this?")])


def distance(found: mx.array, expected: mx.array) -> float:
    """The largest difference of logits, over the largest logit."""
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def outside(reference: Reference) -> dict[str, mx.array]:
    """Arrays of towers and projectors."""
    named = tree_flatten(reference.model.parameters())
    return {name: value for name, value in named if "language_model" not in name.split(".")}


def assert_same(one: dict[str, mx.array], other: dict[str, mx.array]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not mx.array_equal(one[name], other[name])] == []


@pytest.mark.parametrize("family", EVERY)
def test_a_fused_folder_answers_in_mlx_vlm_as_base_and_adapter_do(
    run_export, make_vlm_adapter, vlm_reference, tmp_path, family
):
    adapter = make_vlm_adapter(family, 1, **TIED.get(family, {}))
    report = run_export(family, adapter)
    assert (report.num_rows, report.num_rows_showing, report.towers) == (8, 6, "plain")
    assert report.kl_max < 1e-4
    exported, expected, base = (
        Reference(tmp_path / "out"),
        vlm_reference(family, adapter),
        vlm_reference(family),
    )
    row = question(base)
    logits = expected.logits(row, [5, 7])
    assert distance(exported.logits(question(exported), [5, 7]), logits) < 1e-4
    assert distance(base.logits(row, [5, 7]), logits) > 1e-2
    blind = expected.row([message("what is ", "this?")])
    assert distance(expected.logits(blind, [5, 7]), logits) > 1e-2
    assert_same(outside(exported), outside(base))


@pytest.mark.parametrize("family", EVERY)
def test_towers_are_packed_where_that_is_asked_and_stay_as_they_are_where_not(
    run_export, make_vlm_adapter, vlm_reference, tmp_path, family
):
    adapter = make_vlm_adapter(family, 1, **TIED.get(family, {}))
    kept = run_export(family, adapter, Form(8, 32), "kept")
    packed = run_export(family, adapter, Form(8, 32, quantize_vision=True), "packed")
    seeing = Reference(tmp_path / "kept")
    assert_same(outside(seeing), outside(vlm_reference(family)))
    inside = dict(seeing.model.language_model.named_modules())
    assert not [path for path, m in inside.items() if type(m) is nn.Linear and path not in kept.unpacked]
    logits = vlm_reference(family, adapter).logits(question(seeing), [5, 7])
    assert 0 < distance(seeing.logits(question(seeing), [5, 7]), logits) < 0.15
    small = Reference(tmp_path / "packed")
    assert distance(small.logits(question(small), [5, 7]), logits) < 0.2
    left = {path for path, m in small.model.named_modules() if type(m) is nn.Linear}
    assert left <= set(packed.unpacked)
    assert {name.rpartition(".")[0] for name in outside(small) if name.endswith(".scales")}
    assert packed.num_bytes < kept.num_bytes
    assert (kept.towers, packed.towers) == ("plain", "quantized")
    assert kept.features_apart == 0.0
    assert 0 < packed.features_apart < 0.2
    assert kept.kl_mean < 0.1
    assert packed.kl_mean < 0.1
    # A convolution, a table or a bare matrix has no packed form.
    shown = [name for name in packed.unpacked if not name.startswith("language_model.")]
    assert shown
    assert not [path for path in kept.unpacked if not path.startswith("language_model.")]


@pytest.mark.parametrize("family", EVERY)
def test_an_adapter_of_tower_and_projector_is_fused_into_them(
    run_export, make_vlm_adapter, vlm_reference, tmp_path, family
):
    adapter = make_vlm_adapter(family, 2, parts=PARTS.get(family, ("",)), size=0.05)
    report = run_export(family, adapter)
    assert report.kl_max < 1e-4
    exported, base = Reference(tmp_path / "out"), vlm_reference(family)
    row = question(base)
    assert distance(exported.logits(row, [5, 7]), vlm_reference(family, adapter).logits(row, [5, 7])) < 1e-4
    one, other = outside(exported), outside(base)
    assert [name for name in one if not mx.array_equal(one[name], other[name])]


@pytest.mark.parametrize("family", MLX_LM_TOO)
def test_an_adapter_that_mlx_lm_trained_on_the_text_part_is_exported_with_its_eyes(
    run_export, vlm_folder, vlm_reference, tmp_path, family
):
    """Its names know no language_model in front."""
    base = tmp_path / "base"
    shutil.copytree(vlm_folder(family), base)
    if family in TIED:
        file = str(base / "model.safetensors")
        weights = {name: w for name, w in mx.load(file).items() if not name.endswith("lm_head.weight")}
        mx.eval(weights)
        mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    module, _ = mlx_lm.load(str(base))
    module.freeze()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(module, len(module.layers), parameters)
    mx.random.seed(0)
    grown = {
        name: mx.random.normal(value.shape) * 0.1 if name.endswith("lora_b") else value
        for name, value in tree_flatten(module.trainable_parameters())
    }
    folder = tmp_path / "theirs"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), grown)
    said = {"fine_tune_type": "lora", "num_layers": len(module.layers), "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    assert run_export(family, folder, base=str(base)).kl_max < 1e-4
    theirs, tokenizer = mlx_lm.load(str(base), adapter_path=str(folder))
    ids = mx.array([tokenizer.encode("what is this?")])
    exported, plain = Reference(tmp_path / "out"), vlm_reference(family)
    positions = {"position_ids": mx.broadcast_to(mx.arange(ids.shape[1]), (3, 1, ids.shape[1]))}
    takes = positions if "vl" in family else {}
    found = exported.model.language_model(ids, **takes).logits
    assert distance(found, theirs(ids)) < 1e-4
    assert distance(plain.model.language_model(ids, **takes).logits, theirs(ids)) > 1e-2
    assert_same(outside(exported), outside(plain))


def test_a_full_fine_tune_of_everything_and_one_of_the_text_part_become_whole_folders(
    run_export, vlm_folder, vlm_reference, tmp_path
):
    family = "qwen3_vl"
    base = vlm_reference(family)
    moved = {name: value * 1.1 for name, value in tree_flatten(base.model.parameters())}
    language = {name: value for name, value in moved.items() if name.startswith("language_model.")}
    as_text = {name.removeprefix("language_model."): value for name, value in language.items()}
    expected = Reference(vlm_folder(family))
    for name, tensors, applied in (("all", moved, moved), ("text", as_text, language)):
        write_adapter(tmp_path / name, tensors, AdapterConfig("full", -1))
        report = run_export(family, tmp_path / name, out=f"{name}-out")
        assert report.kl_max < 1e-5
        exported = Reference(tmp_path / f"{name}-out")
        expected.model.load_weights(list({**dict(tree_flatten(base.model.parameters())), **applied}.items()))
        assert (
            distance(exported.logits(question(base), [5, 7]), expected.logits(question(base), [5, 7])) < 1e-5
        )


def test_a_fine_tune_from_random_weights_needs_its_tower(run_export, vlm_folder, vlm_reference, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(vlm_folder("qwen3_vl"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = dict(tree_flatten(vlm_reference("qwen3_vl").model.parameters()))
    write_adapter(tmp_path / "all", weights, AdapterConfig("full", -1))
    assert run_export("qwen3_vl", tmp_path / "all", base=str(bare)).kl_max < 1e-6
    assert_same(outside(Reference(tmp_path / "out")), outside(vlm_reference("qwen3_vl")))
    language = {name: value for name, value in weights.items() if name.startswith("language_model.")}
    write_adapter(tmp_path / "text", language, AdapterConfig("full", -1))
    with pytest.raises(AdapterError, match=r"of its towers the fine-tune has not all: vision_tower\."):
        run_export("qwen3_vl", tmp_path / "text", out="other", base=str(bare))


def test_a_packed_base_with_a_packed_tower_is_fused_in_full_precision(
    run_export, make_vlm_adapter, vlm_reference, tmp_path
):
    family = "qwen3_vl"
    first = make_vlm_adapter(family, 1)
    run_export(family, first, Form(8, 32, quantize_vision=True), "packed")
    run_export(family, make_vlm_adapter(family, 2), base=str(tmp_path / "packed"), out="plain")
    said = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & said.keys()
    exported = Reference(tmp_path / "plain")
    assert not [name for name, _ in tree_flatten(exported.model.parameters()) if name.endswith(".scales")]
    both = vlm_reference(family, first)
    from vlm_families import merge_lora

    merge_lora(both.model, make_vlm_adapter(family, 2))
    row = question(exported)
    assert distance(exported.logits(row, [5, 7]), both.logits(row, [5, 7])) < 0.1


def test_every_file_beside_the_weights_goes_with_it(run_export, make_vlm_adapter, vlm_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(vlm_folder("gemma3"), base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "terse.jinja").write_text("{{ messages[-1].content }}")
    (base / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    run_export("gemma3", make_vlm_adapter("gemma3", 1, keys=LAYERS), base=str(base))
    there = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    copied = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    # Of the base's own packing nothing is true of the export.
    assert there - copied == {"hf_quant_config.json"}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == {**before, "torch_dtype": "float32"}


def test_an_adapters_own_chat_template_is_the_one_that_mlx_vlm_renders(
    run_export, make_vlm_adapter, vlm_folder, tmp_path
):
    """Though processors look into three other files before they look into the one that is written."""
    base, own = tmp_path / "base", "{% for m in messages %}[{{ m.role }}]{% endfor %}"
    shutil.copytree(vlm_folder("qwen3_vl"), base)
    for name in ("chat_template.json", "processor_config.json"):
        (base / name).write_text(json.dumps({"chat_template": "old"}))
    made = make_vlm_adapter("qwen3_vl", 1)
    lineage = Lineage("base", "", "", "", "", "", "", chat_template=own)
    config = AdapterConfig("lora", -1, 4, 2.0, lineage=lineage)
    write_adapter(tmp_path / "adapter", read_tensors(made, read_config(made)), config)
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "some words of a text"}) + "\n")
    run_export("qwen3_vl", tmp_path / "adapter", base=str(base), rows=Rows(file), force=True)
    processor = Reference(tmp_path / "out").processor
    for renders in (processor, processor.tokenizer):
        assert renders.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[user]"


def test_what_cannot_be_is_refused_by_its_option(
    run_export, make_vlm_adapter, make_adapter, model_folder, tmp_path
):
    with pytest.raises(ConfigError, match="--quantize-vision: without --bits nothing is quantized"):
        run_export("gemma3", make_vlm_adapter("gemma3", 1, keys=LAYERS), Form(quantize_vision=True))
    with pytest.raises(ConfigError, match=r"--quantize-vision: .* is a text model"):
        run_export("gemma3", make_adapter(1), Form(8, 32, quantize_vision=True), base=str(model_folder))
    stray = {
        **read_tensors(make_vlm_adapter("gemma3", 1, keys=LAYERS)),
        "vision_tower.nowhere.weight": mx.ones((2, 2)),
    }
    write_adapter(tmp_path / "stray", stray, AdapterConfig("lora", -1, 4, 2.0))
    with pytest.raises(
        AdapterError, match=r"vision_tower\.nowhere\.weight: the model has no weights of that name"
    ):
        run_export("gemma3", tmp_path / "stray")
    assert not (tmp_path / "out").exists()


def test_weights_that_mlx_vlm_would_not_read_back_are_named_and_nothing_is_written(
    run_export, make_vlm_adapter, tmp_path
):
    with pytest.raises(
        AdapterError, match=r"loader of gemma3 puts other weights in place of language_model\.lm_head"
    ):
        run_export("gemma3", make_vlm_adapter("gemma3", 1))
    assert not (tmp_path / "out").exists()


def test_a_tower_that_sees_something_else_is_refused_and_one_that_was_only_rounded_is_not(
    vlm_folder, make_vlm_adapter, picture_rows
):
    """gemma4's tower casts pictures to the dtype of a weight, which is of integers when that is packed."""
    adapter = make_vlm_adapter("qwen3_vl", 1)
    one, other = (load_adapted(adapter, read_config(adapter), str(vlm_folder("qwen3_vl"))) for _ in range(2))
    batches = held_out(adapter, Rows(picture_rows), one).batches
    check_still_sees(features_apart(batches, (eyes_of(one), eyes_of(other))))
    check_still_sees(None)
    merger = other.network.module.vision_tower.merger.linear_fc2
    merger.weight = -merger.weight
    with pytest.raises(ConfigError, match="--quantize-vision: packed, its towers see something else"):
        check_still_sees(features_apart(batches, (eyes_of(one), eyes_of(other))))
    merger.weight = merger.weight * mx.nan
    with pytest.raises(ConfigError, match="see something else"):
        check_still_sees(features_apart(batches, (eyes_of(one), eyes_of(other))))


def test_weights_that_trained_whole_beside_an_adapter_are_taken_too(
    run_export, make_vlm_adapter, vlm_folder, vlm_reference, tmp_path
):
    made = make_vlm_adapter("qwen3_vl", 1)
    base = dict(tree_flatten(vlm_reference("qwen3_vl").model.parameters()))
    whole = {name: value * 1.2 for name, value in base.items() if "vision_tower.merger" in name}
    write_adapter(tmp_path / "both", {**read_tensors(made), **whole}, read_config(made))
    assert run_export("qwen3_vl", tmp_path / "both").kl_max < 1e-4
    expected = Reference(vlm_folder("qwen3_vl"), made)
    expected.model.load_weights(list(whole.items()), strict=False)
    exported = Reference(tmp_path / "out")
    assert distance(exported.logits(question(exported)), expected.logits(question(exported))) < 1e-4
    assert whole


def test_rows_without_pictures_are_told(run_export, make_vlm_adapter, tmp_path):
    console, file = quiet(), tmp_path / "text.jsonl"
    file.write_text(json.dumps({"prompt": "what?", "completion": "that"}) + "\n")
    report = run_export(
        "gemma3", make_vlm_adapter("gemma3", 1, keys=LAYERS), rows=Rows(file), console=console
    )
    assert report.num_rows_showing == 0
    assert "what its towers see is not compared" in console.file.getvalue()
    assert "1, " in console.file.getvalue()


def test_the_divergence_of_rows_with_pictures_is_that_of_mlx_vlms_logits(
    run_export, make_vlm_adapter, vlm_reference, picture_rows, tmp_path
):
    """Of one row with an answer of which each token counts."""
    row = picture_rows.parent / "one.jsonl"
    row.write_text(picture_rows.read_text().splitlines()[2] + "\n")
    adapter = make_vlm_adapter("smolvlm", 1)
    report = run_export("smolvlm", adapter, Form(4, 32), rows=Rows(row))
    (said,) = [json.loads(line)["messages"] for line in row.read_text().splitlines()]
    references = vlm_reference("smolvlm", adapter), Reference(tmp_path / "out")
    asked = references[0].row([message(picture(2, 56, 112), "what is this?")])
    answer = references[0].tokenizer(said[1]["content"] + "<|im_end|>")["input_ids"]
    p, q = (np.array(mx.softmax(each.logits(asked, answer[:-1]), axis=-1), np.float64) for each in references)
    kl = (p * np.log(p / q)).sum(-1)
    assert report.num_tokens == len(answer)
    assert report.kl_mean == pytest.approx(kl.mean(), rel=1e-2)
