"""Adapters between PEFT and mlx-lm: the same bytes on the way back, the same answers from either library and ours."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import qwen3_moe
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from serve.adapters.fitting.fit import check_fit, fit
from serve.adapters.fitting.own import own_layout
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.files import read_adapter
from serve.adapters.formats.layouts import as_mlx
from serve.adapters.formats.manifest import write_adapter, write_files
from serve.adapters.formats.peft.writing import alpha_of, our_names, their_name
from serve.adapters.tools.writing import convert
from serve.errors import AdapterError, ConfigError
from serve.model.loading import load
from serve.model.network import Network
from train.adapters.place import place_adapter

TOKENS = list(b"the same answer, whoever asks")
MOE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
SAME = 2e-4
"""Logits of two libraries apart, of the largest one; a scale that is forgotten moves them by 0.1 and more."""


@pytest.fixture(scope="session")
def moe_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3_moe as transformers saves it, a head and routers loud enough to tell experts apart."""
    torch = pytest.importorskip("torch", reason="PEFT runs on torch: pip install '.[dev]'")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("moe") / "layouts-moe"
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())  # mlx-lm reads keys by their earlier names
    (folder / "config.json").write_text(json.dumps(MOE | config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, folder / name)
    return folder


def in_torch(folder: Path):
    """transformers' own model of a folder that mlx-lm wrote."""
    pytest.importorskip("torch", reason="PEFT runs on torch: pip install '.[dev]'")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def peft_folder(folder: Path, out: Path, *, seed: int = 0, dtype: str = "float32", **options) -> np.ndarray:
    """An adapter that PEFT made and saved. Returns its logits."""
    torch = pytest.importorskip("torch", reason="PEFT runs on torch: pip install '.[dev]'")
    peft = pytest.importorskip("peft", reason="the oracle: pip install '.[dev]'")
    config = peft.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="some/base", **options)
    model = peft.get_peft_model(in_torch(folder), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape))
            elif "lora_" in name:
                size = 0.1 if options.get("target_parameters") else 0.2
                parameter.copy_((size * torch.randn(parameter.shape)).to(getattr(torch, dtype)).float())
    model.save_pretrained(out)
    if dtype != "float32":  # as after training in half precision
        tensors = mx.load(str(out / "adapter_model.safetensors"))
        half = {name: each.astype(getattr(mx, dtype)) for name, each in tensors.items()}
        mx.save_safetensors(str(out / "adapter_model.safetensors"), half, metadata={"format": "pt"})
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def pefts_logits(folder: Path, adapter: Path) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="PEFT runs on torch: pip install '.[dev]'")
    peft = pytest.importorskip("peft", reason="the oracle: pip install '.[dev]'")
    model = peft.PeftModel.from_pretrained(in_torch(folder), str(adapter)).eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def our_logits(folder: Path, adapter: Path) -> np.ndarray:
    """The network with the adapter in place, after it passed what a server asks."""
    model = load(str(folder), dequantize=True)
    files = read_adapter(adapter)
    tensors = files.read()
    check_fit("it", files.specs, files.config, model.network, max_rank=256)
    assert fit("it", tensors, files.config, model.network)
    place_adapter(model.network, tensors, files.config, "it")
    model.network.module.eval()
    return np.array(model.network.module(mx.array([TOKENS]))[0].astype(mx.float32))


def mlx_lms_logits(folder: Path, adapter: Path) -> np.ndarray:
    module, _ = load_model(folder)
    load_adapters(module, str(adapter)).eval()
    return np.array(module(mx.array([TOKENS]))[0].astype(mx.float32))


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def tensors_in(folder: Path, name: str) -> dict[str, mx.array]:
    return mx.load(str(folder / name))


def assert_same_files(first: Path, second: Path, name: str) -> None:
    ours, theirs = tensors_in(first, name), tensors_in(second, name)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert mx.array_equal(tensor, theirs[key]), key
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PEFT_OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "ranks": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2, r"layers.1.*o_proj": 8},
    },
    "alphas": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ATTENTION,
        "alpha_pattern": {"q_proj": 16, "layers.0.self_attn.v_proj": 2},
    },
    "odd alphas": {
        "r": 6,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {"up_proj": 11},
    },
    "dora of several": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "use_dora": True,
        "rank_pattern": {"v_proj": 8},
        "use_rslora": True,
    },
    "some layers": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    "an expression": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.(gate|up)_proj"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", PEFT_OPTIONS)
def test_a_peft_adapter_answers_the_same_as_mlx_lms_and_comes_back_bit_for_bit(
    kind, dtype, model_folder, tmp_path
):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    wanted = peft_folder(model_folder, theirs, dtype=dtype, **PEFT_OPTIONS[kind])
    written = convert(theirs, ours, "mlx-lm")
    assert written.num_modules
    is_rounded = any("rounded" in note for note in written.notes)
    assert is_rounded == (kind in ("odd alphas", "dora of several") and dtype == "float32"), written.notes
    slack = 2e-3 if dtype == "float32" else 3e-2  # DoRA's lengths were rounded after PEFT's answer
    for logits in (
        our_logits(model_folder, theirs),
        our_logits(model_folder, ours),
        mlx_lms_logits(model_folder, ours),
    ):
        assert apart(logits, wanted) < (slack if "dora" in kind else SAME)
    convert(ours, back, "peft")
    if not is_rounded:
        assert_same_files(theirs, back, "adapter_model.safetensors")
    else:
        assert apart(pefts_logits(model_folder, back), wanted) < SAME


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("rank", "scale"), [(4, 2.0), (8, 20.0), (6, 1 / 3), (12, 1.4), (7, 0.1)])
def test_an_mlx_adapter_answers_the_same_in_peft_and_comes_back_bit_for_bit(
    kind, rank, scale, model_folder, tmp_path
):
    mine, theirs, back = tmp_path / "mine", tmp_path / "theirs", tmp_path / "back"
    write_mlx(model_folder, mine, kind=kind, rank=rank, scale=scale)
    convert(mine, theirs, "peft")
    wanted = mlx_lms_logits(model_folder, mine)
    assert apart(pefts_logits(model_folder, theirs), wanted) < 2 * SAME
    assert apart(our_logits(model_folder, theirs), wanted) < 2 * SAME
    convert(theirs, back, "mlx-lm")
    assert_same_files(mine, back, "adapters.safetensors")


def write_mlx(model_folder: Path, out: Path, *, kind: str, rank: int, scale: float) -> None:
    """A random adapter as mlx-lm's own trainer leaves it, other keys beside ours."""
    module, _ = load_model(model_folder)
    shapes = {
        path: each.weight.shape
        for path, each in module.named_modules()
        if path.endswith(("q_proj", "down_proj")) or path == "lm_head"
    }
    mx.random.seed(rank)
    tensors = {}
    for path, (outputs, inputs) in shapes.items():
        tensors[f"{path}.lora_a"] = 0.2 * mx.random.normal((inputs, rank))
        tensors[f"{path}.lora_b"] = 0.2 * mx.random.normal((rank, outputs))
        if kind == "dora":
            tensors[f"{path}.m"] = mx.random.uniform(0.5, 2, (outputs,))
    settings = {
        "fine_tune_type": kind,
        "num_layers": 16,
        "iters": 100,
        "learning_rate": 1e-5,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.05,
            "keys": ["self_attn.q_proj", "mlp.down_proj", "lm_head"],
        },
    }
    write_files(out, tensors, settings)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_experts_that_peft_packed_answer_the_same_and_come_back_bit_for_bit(targets, moe_folder, tmp_path):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": targets}
    wanted = peft_folder(moe_folder, theirs, **options)
    with pytest.raises(AdapterError, match="--base"):
        convert(theirs, ours, "mlx-lm")
    assert not ours.exists()
    base = load(str(moe_folder), dequantize=True)
    written = convert(theirs, ours, "mlx-lm", base)
    assert not written.notes
    for logits in (
        our_logits(moe_folder, theirs),
        our_logits(moe_folder, ours),
        mlx_lms_logits(moe_folder, ours),
    ):
        assert apart(logits, wanted) < SAME
    convert(ours, back, "peft")
    assert_same_files(theirs, back, "adapter_model.safetensors")


@pytest.mark.parametrize(
    "leaves", [("gate_proj", "up_proj", "down_proj"), ("up_proj",), ("gate_proj", "down_proj")]
)
def test_experts_of_mlx_lm_answer_the_same_in_peft(leaves, moe_folder, tmp_path):
    mine, theirs, back = tmp_path / "mine", tmp_path / "theirs", tmp_path / "back"
    rank, base = 3, load(str(moe_folder), dequantize=True)
    mx.random.seed(1)
    tensors = {}
    for layer in range(2):
        for leaf in leaves:
            path = f"model.layers.{layer}.mlp.switch_mlp.{leaf}"
            inputs, outputs = (24, 32) if leaf == "down_proj" else (32, 24)
            tensors[f"{path}.lora_a"] = 0.2 * mx.random.normal((4, rank, inputs))
            tensors[f"{path}.lora_b"] = 0.2 * mx.random.normal((4, outputs, rank))
    keys = tuple(f"mlp.switch_mlp.{leaf}" for leaf in leaves)
    write_adapter(mine, tensors, AdapterConfig("lora", -1, rank, 2.0, keys=keys))
    convert(mine, theirs, "peft")
    wanted = mlx_lms_logits(moe_folder, mine)
    assert apart(pefts_logits(moe_folder, theirs), wanted) < SAME
    assert apart(our_logits(moe_folder, theirs), wanted) < SAME
    convert(theirs, back, "mlx-lm", base)
    assert apart(mlx_lms_logits(moe_folder, back), wanted) < SAME


def test_names_of_other_wrappers_come_back_as_they_were(model_folder, tmp_path):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    wanted = peft_folder(model_folder, theirs, **PEFT_OPTIONS["plain"])
    tensors = tensors_in(theirs, "adapter_model.safetensors")
    doubled = {f"base_model.model.{name}": each for name, each in tensors.items()}
    mx.save_safetensors(str(theirs / "adapter_model.safetensors"), doubled, metadata={"format": "pt"})
    convert(theirs, ours, "mlx-lm")
    assert apart(mlx_lms_logits(model_folder, ours), wanted) < SAME
    convert(ours, back, "peft")
    assert_same_files(theirs, back, "adapter_model.safetensors")


def test_a_changed_folder_is_converted_as_it_is_now(model_folder, tmp_path):
    """What it was made of counts no more once zeros that were filled in have been trained."""
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    peft_folder(model_folder, theirs, **PEFT_OPTIONS["ranks"])
    convert(theirs, ours, "mlx-lm")
    tensors = tensors_in(ours, "adapters.safetensors")
    trained = {name: each + 0.01 for name, each in tensors.items()}
    write_files(ours, trained, json.loads((ours / "adapter_config.json").read_text()))
    convert(ours, back, "peft")
    assert apart(pefts_logits(model_folder, back), mlx_lms_logits(model_folder, ours)) < SAME


def test_lineage_goes_along_and_names_the_new_files_tensors(make_adapter, tmp_path):
    from dataclasses import replace

    from serve.adapters.formats.lineage import Lineage
    from serve.adapters.formats.manifest import read_config, read_tensors

    folder = tmp_path / "mine"
    tensors = read_tensors(make_adapter(3))
    words = dict.fromkeys(("base_fingerprint", "template_hash", "recipe_hash", "data_hash", "created"), "x")
    lineage = Lineage(
        base_model="some/base", lathe_version="0", stop_ids=(2, 7), metrics={"loss": 0.5}, **words
    )
    write_adapter(folder, tensors, AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))
    convert(folder, tmp_path / "theirs", "peft")
    convert(tmp_path / "theirs", tmp_path / "back", "mlx-lm")
    configs = [read_adapter(tmp_path / name).config.lineage for name in ("theirs", "back")]
    assert [replace(each, content_hash="") for each in configs if each] == [lineage] * 2
    assert read_adapter(tmp_path / "theirs").read()
    assert read_config(tmp_path / "back").lineage == read_config(folder).lineage


def test_whole_heads_are_refused_by_name_in_mlx_lms_layout(model_folder, tmp_path):
    peft_folder(model_folder, tmp_path / "theirs", **PEFT_OPTIONS["plain"], modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"mlx-lm's layout has no place for lm_head\.weight"):
        convert(tmp_path / "theirs", tmp_path / "out", "mlx-lm")
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_bases_head_is_left_out_where_the_base_is_named(model_folder, tmp_path):
    """PEFT saves one whenever the head has an update."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
    wanted = peft_folder(model_folder, tmp_path / "theirs", **options)
    with pytest.raises(AdapterError, match=r"no place for lm_head\.base_weight; .* name it with --base"):
        convert(tmp_path / "theirs", tmp_path / "out", "mlx-lm")
    base = load(str(model_folder), dequantize=True)
    written = convert(tmp_path / "theirs", tmp_path / "out", "mlx-lm", base)
    assert any(note.startswith("lm_head.base_weight") for note in written.notes)
    assert apart(mlx_lms_logits(model_folder, tmp_path / "out"), wanted) < SAME
    convert(tmp_path / "out", tmp_path / "back", "peft")
    assert apart(pefts_logits(model_folder, tmp_path / "back"), wanted) < SAME


def test_a_folder_that_holds_something_is_not_written_to(make_adapter, tmp_path):
    convert(make_adapter(1), tmp_path / "out", "peft")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="is there already"):
        convert(make_adapter(2), tmp_path / "out", "peft")
    with pytest.raises(ConfigError, match="is in peft's layout already"):
        convert(tmp_path / "out", tmp_path / "other", "peft")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="is there already"):
        convert(make_adapter(2), tmp_path / "out", "peft")


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 48, 96, 128])
def test_alpha_gives_the_scale_back(rank):
    random = np.random.default_rng(rank)
    scales = [
        *map(float, range(1, 65)),
        *(alpha / rank for alpha in range(1, 257)),
        *random.uniform(0.01, 50, 500),
    ]
    exact = sum(alpha_of(scale, rank) / rank == scale for scale in scales)
    nearest = [abs(alpha_of(scale, rank) / rank - scale) / scale for scale in scales]
    assert max(nearest) <= 2**-52
    for scale in scales:
        ulp = math.ulp(scale * rank)
        there_is = any((scale * rank + step * ulp) / rank == scale for step in range(-3, 4))
        assert (alpha_of(scale, rank) / rank == scale) == there_is, scale
    assert exact == len(scales) or rank not in (1, 2, 4, 8, 16, 128)
    for alpha in range(1, 257):
        assert alpha_of(alpha / rank, rank) == alpha


@pytest.mark.parametrize("layers", [1, 3])
def test_names_of_models_with_towers_are_each_librarys_own(layers):
    ours = [f"language_model.model.layers.{n}.mlp.up_proj.lora_a" for n in range(layers)]
    ours.append("language_model.lm_head.lora_a")
    theirs = [f"model.language_model.layers.{n}.mlp.up_proj.lora_a" for n in range(layers)] + [
        "lm_head.lora_a"
    ]
    assert [their_name(name) for name in ours] == theirs
    assert list(our_names(theirs).values()) == ours
    assert our_names(["lm_head.lora_a", "model.layers.0.mlp.up_proj.lora_a"]) == {
        name: name for name in ("lm_head.lora_a", "model.layers.0.mlp.up_proj.lora_a")
    }
    with pytest.raises(AdapterError, match=r"vision_tower\.blocks\.0\.attn\.qkv: what Hugging Face calls it"):
        their_name("vision_tower.blocks.0.attn.qkv")


def test_keys_name_layers_that_mlx_lm_finds(make_adapter):
    from serve.adapters.formats.layouts import keys_of

    assert keys_of(["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head"]) == (
        "lm_head",
        "mlp.up_proj",
    )
    several = ["language_model.model.layers.0.mlp.up_proj", "vision_tower.blocks.0.attn.qkv"]
    assert keys_of(several) == tuple(several)


def test_an_adapter_of_several_ranks_keeps_its_update(model_folder, tmp_path):
    """Zeros beside a lower rank add nothing, and a scale that B took multiplies no more."""
    mx.random.seed(0)
    tensors, ranks, scales = {}, {"q_proj": 2, "k_proj": 5}, {"q_proj": 0.5, "k_proj": 3.0}
    for leaf, outputs in (("q_proj", 64), ("k_proj", 32)):
        tensors[f"model.layers.0.self_attn.{leaf}.lora_a"] = mx.random.normal((64, ranks[leaf]))
        tensors[f"model.layers.0.self_attn.{leaf}.lora_b"] = mx.random.normal((ranks[leaf], outputs))
    by_path = [
        {f"model.layers.0.self_attn.{leaf}": value for leaf, value in each.items()}
        for each in (ranks, scales)
    ]
    made = as_mlx(tensors, AdapterConfig("lora", -1, 5, 3.0, ranks=by_path[0], scales=by_path[1]))
    scale = made.settings["lora_parameters"]["scale"]
    assert made.settings["lora_parameters"]["rank"] == 5
    for path, factor in by_path[1].items():
        wanted = factor * (tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"])
        found = scale * (made.tensors[f"{path}.lora_a"] @ made.tensors[f"{path}.lora_b"])
        assert mx.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    write_files(tmp_path / "out", made.tensors, made.settings)
    network = load(str(model_folder), dequantize=True).network
    files = read_adapter(tmp_path / "out")
    own, config = own_layout(files.specs, files.config, network)
    assert len(check_fit("it", own, config, network, max_rank=8)) == 2


def steps_of(work: Callable[[], object]) -> int:
    """How many instructions of Python's it takes, on a machine that may be busy with others."""
    count = 0

    def traced(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += 1
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


MANY = {
    "experts one by one": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "of other ranks": {
        "target_modules": r".*_proj",
        "rank_pattern": {"up_proj": 2, r"experts\.[0-9]*[02468]\..*": 3},
        "alpha_pattern": {"up_proj": 10, r"experts\.[0-9]*[02468]\..*": 6},
    },
    "of other scales": {"target_modules": "all-linear", "alpha_pattern": {".*_proj": 3}},
    "that are none of the config's": {"target_parameters": ["experts.gate_up_proj"]},
}


@pytest.mark.parametrize("kind", MANY)
def test_what_looking_at_an_adapter_takes_grows_with_its_modules(kind, tmp_path):
    """A model of 48 layers with 128 experts has 18,432 of them, and a server has others to serve meanwhile."""

    def looked_at(layers: int) -> int:
        tensors: dict[str, mx.array] = {}
        for layer, expert, leaf in itertools.product(range(layers), range(8), ("gate", "up", "down")):
            path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj"
            rank = 4
            if "rank_pattern" in MANY[kind]:
                rank = 2 if leaf == "up" else 4 - (expert % 2 == 0)
            inputs, outputs = (24, 32) if leaf == "down" else (32, 24)
            tensors[f"{path}.lora_A.weight"] = mx.zeros((rank, inputs))
            tensors[f"{path}.lora_B.weight"] = mx.zeros((outputs, rank))
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **MANY[kind]}
        folder = tmp_path / str(layers)
        write_files(folder, tensors, config, tensors_file="adapter_model.safetensors")
        words = MOE | {"model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts": 8}
        network = Network(qwen3_moe.Model(qwen3_moe.ModelArgs(**words)))
        told: list[str] = []

        def look() -> None:
            try:
                files = read_adapter(folder)
                check_fit("it", files.specs, files.config, network, max_rank=8)
            except AdapterError as error:
                told.append(str(error))

        look()  # whatever is made once
        assert bool(told) == ("target_parameters" in MANY[kind]), told
        return steps_of(look)

    few, many = looked_at(4), looked_at(16)
    assert many < 5 * few
