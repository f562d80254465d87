"""PEFT's folders: PEFT on torch is the oracle, feature by feature, on tiny models of several families."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PEFT runs on torch: pip install '.[dev]'")
peft = pytest.importorskip("peft", reason="the oracle: pip install '.[dev]'")

from peft_bases import adaptable, logits_of, network_of, torch_logits_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from serve.adapters.bank.bank import Bank  # noqa: E402
from serve.adapters.fitting.fit import check_fit, fit  # noqa: E402
from serve.adapters.fitting.paths import adaptable_modules, module_at  # noqa: E402
from serve.adapters.fitting.update import LowRank  # noqa: E402
from serve.adapters.formats.files import AdapterFiles, read_adapter  # noqa: E402
from serve.errors import AdapterError  # noqa: E402
from serve.model.network import Network  # noqa: E402
from serve.model.weights import dense_weight  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CLOSE = 2e-4
"""How far logits of the two libraries may be apart, as a share of the largest."""
TENSORS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Case:
    """An adapter that PEFT makes, over one family."""

    family: str
    options: Mapping[str, Any]
    targets: int
    """How many layers here it is of."""
    changed: Callable[[Any], None] = lambda model: None
    """What training would have moved, beside A, B and m."""
    saved: Mapping[str, Any] = field(default_factory=dict)
    """How it is saved."""


def shaken(*ends: str) -> Callable[[Any], None]:
    """Moves parameters whose names end so."""

    def change(model: Any) -> None:
        with torch.no_grad():
            found = [p for name, p in model.named_parameters() if name.endswith(ends)]
            assert found, f"no parameter is called {ends}"
            for parameter in found:
                parameter.add_(0.1 * torch.randn_like(parameter))

    return change


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
HEAD = "modules_to_save.default.weight"
BIASES = ("q_proj.base_layer.bias", "v_proj.base_layer.bias")
CASES: dict[str, Case] = {
    "plain": Case("qwen3", {"target_modules": ATTENTION}, 8),
    "every linear layer": Case("qwen3", {"target_modules": "all-linear"}, 14),
    "an expression": Case("qwen3", {"target_modules": r".*\.1\..*(q|up)_proj"}, 2),
    "rsLoRA": Case("qwen3", {"target_modules": ATTENTION, "use_rslora": True}, 8),
    "rank and alpha by pattern": Case(
        "qwen3",
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 5, "^model.layers.0.self_attn.v_proj": 1},
            "alpha_pattern": {"self_attn.q_proj": 3.5, "^layers.0.self_attn.k_proj|up_proj": 11},
        },
        10,
    ),
    "patterns with rsLoRA": Case(
        "qwen3",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {".*1.*v_proj": 6},
            "alpha_pattern": {"v_proj": 9},
            "use_rslora": True,
        },
        8,
    ),
    "some layers": Case("qwen3", {"target_modules": ATTENTION, "layers_to_transform": 1}, 4),
    "some layers by a pattern": Case(
        "qwen3", {"target_modules": ATTENTION, "layers_to_transform": [0], "layers_pattern": "layers"}, 4
    ),
    "excluded": Case(
        "qwen3", {"target_modules": "all-linear", "exclude_modules": ["up_proj", "0.self_attn.q_proj"]}, 11
    ),
    "excluded by an expression": Case(
        "qwen3", {"target_modules": ATTENTION, "exclude_modules": r".*layers\.0\..*"}, 4
    ),
    "DoRA": Case("qwen3", {"target_modules": ATTENTION, "use_dora": True}, 8),
    "DoRA, rsLoRA and patterns": Case(
        "qwen3",
        {
            "target_modules": ATTENTION,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 7},
            "alpha_pattern": {"o_proj": 2},
        },
        8,
    ),
    "a whole head": Case(
        "qwen3", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, 9, shaken(f"lm_head.{HEAD}")
    ),
    "a whole head, named by how it ends": Case(
        "qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["head"]}, 3, shaken(f"lm_head.{HEAD}")
    ),
    "a whole head, saved with the embeddings": Case(
        "qwen3",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        3,
        shaken(f"lm_head.{HEAD}"),
        {"save_embedding_layers": True},
    ),
    "a layer that trained whole": Case(
        "qwen3",
        {"target_modules": ["q_proj"], "modules_to_save": ["0.mlp.up_proj"]},
        3,
        shaken(f"up_proj.{HEAD}"),
    ),
    "LoRA on the head": Case("qwen3", {"target_modules": ["q_proj", "lm_head"]}, 3),
    "DoRA on the head": Case("qwen3", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, 3),
    "LoRA on a head that was changed": Case(
        "qwen3", {"target_modules": ["q_proj", "lm_head"]}, 3, shaken("lm_head.base_layer.weight")
    ),
    "LoRA on a tied head": Case("llama", {"target_modules": ["q_proj", "lm_head"]}, 3),
    "DoRA on a tied head": Case("llama", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, 3),
    "a whole head where it is tied": Case(
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 3, shaken(f"lm_head.{HEAD}")
    ),
    "biases of what is adapted": Case(
        "llama", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}, 4, shaken(*BIASES)
    ),
    "biases under DoRA": Case(
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "use_dora": True},
        4,
        shaken(*BIASES),
    ),
    "all biases": Case(
        "llama", {"target_modules": ["q_proj"], "bias": "all"}, 8, shaken("proj.bias", "layer.bias")
    ),
    "all biases, unchanged": Case("llama", {"target_modules": ["q_proj"], "bias": "all"}, 2),
    "a bias of B": Case("llama", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}, 4),
    "a bias of B where there is none": Case("qwen3", {"target_modules": ["q_proj"], "lora_bias": True}, 2),
    "fused layers": Case("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}, 6),
    "fused layers under DoRA": Case("phi3", {"target_modules": "all-linear", "use_dora": True}, 8),
    "weights stored the other way": Case(
        "gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}, 8
    ),
    "weights stored the other way under DoRA": Case(
        "gpt2", {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True, "use_dora": True}, 3
    ),
    "a random beginning": Case(
        "qwen3", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}, 8, shaken("default.weight")
    ),
    "an orthogonal beginning": Case(
        "qwen3",
        {"target_modules": ATTENTION, "init_lora_weights": "orthogonal", "r": 4},
        8,
        shaken("lora_B.default.weight"),
    ),
    "experts": Case("qwen3_moe", {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}, 8),
    "experts' first matrix": Case("qwen3_moe", {"target_parameters": EXPERTS[:1], "target_modules": []}, 4),
    "experts' second matrix": Case("qwen3_moe", {"target_parameters": EXPERTS[1:], "target_modules": []}, 2),
    "experts with ranks of their own": Case(
        "qwen3_moe",
        {
            "target_parameters": ["gate_up_proj", "down_proj"],
            "target_modules": ["o_proj"],
            "rank_pattern": {"experts.down_proj": 2, "0.mlp.experts.gate_up_proj": 5},
            "alpha_pattern": {"gate_up_proj": 1.5},
            "use_rslora": True,
        },
        8,
    ),
    "experts and their router": Case(
        "qwen3_moe", {"target_parameters": [*EXPERTS, "gate.weight"], "target_modules": []}, 8
    ),
    "experts as wide as they are deep": Case(
        "square_moe", {"target_parameters": EXPERTS[1:], "target_modules": []}, 2
    ),
    "experts of mixtral": Case(
        "mixtral", {"target_parameters": EXPERTS, "target_modules": ["gate", "q_proj"]}, 10
    ),
    "experts that alternate": Case(
        "gpt_oss", {"target_parameters": [*EXPERTS, "mlp.router.weight"], "target_modules": ["q_proj"]}, 10
    ),
    "experts stored the other way": Case(
        "llama4",
        {
            "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
            "target_modules": ["q_proj"],
        },
        16,
    ),
}


@dataclass(frozen=True)
class Made:
    folder: Path
    expected: np.ndarray
    """PEFT's logits of TOKENS, with what it read back from the folder."""
    base: np.ndarray


def make(case: Case, folder: Path) -> Made:
    torch.manual_seed(7)
    base = torch_logits_of(adaptable(case.family))
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **case.options}
    model = peft.get_peft_model(adaptable(case.family), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.mul_(0.5)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    case.changed(model)
    model.save_pretrained(folder, **case.saved)
    return Made(folder, read_back(case.family, folder), base)


def read_back(family: str, folder: Path) -> np.ndarray:
    return torch_logits_of(peft.PeftModel.from_pretrained(adaptable(family), folder).eval())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Made]:
    """made(name of a case) → what PEFT made of it, once."""
    root = tmp_path_factory.mktemp("peft")
    return cache(lambda name: make(CASES[name], root / name.replace(" ", "-").replace("'", "")))


@pytest.fixture(scope="module")
def network() -> Callable[[str], Network]:
    """network(family) → our side of the base; whoever wraps or changes it takes `fresh`."""
    return cache(fresh)


def fresh(family: str) -> Network:
    return network_of(family, adaptable(family))


def updates_of(files: AdapterFiles, network: Network) -> dict[str, LowRank]:
    sizes = check_fit("x", files.specs, files.config, network, max_rank=64)
    updates = fit("x", files.read(), files.config, network)
    assert updates.keys() <= sizes.keys()
    for path, update in updates.items():
        # What turns out to be the base's own takes less than was said.
        assert update.size.rank <= sizes[path].rank or sizes[path].is_dense, path
    return updates


class Untied(nn.Module):
    """Embeddings whose head is another matrix."""

    def __init__(self, embeddings: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.embeddings, self.head = embeddings, head

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embeddings(tokens)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.head(x)


def merged(network: Network, updates: Mapping[str, LowRank]) -> Network:
    """The definition: each update put into its layer's own weights."""
    modules = adaptable_modules(network)
    for path, update in updates.items():
        layer = modules[path]
        weight = np.array(dense_weight(layer).astype(mx.float32), np.float64)
        b = np.array(update.b, np.float64)
        delta = b if update.a is None else np.array(update.a, np.float64) @ b
        weight = weight + np.swapaxes(delta, -1, -2)
        if update.gain is not None:
            weight *= 1 + np.array(update.gain, np.float64)[:, None]
        if path in network.tied_head:
            head = nn.Linear(1, 1, bias=update.bias is not None)
            head.weight = mx.array(weight.astype(np.float32))
            parent, _, name = network.tied_head[path].rpartition(".")
            module_at(network.module, parent)[name] = Untied(layer, head)
            continue
        layer.weight = mx.array(weight.astype(np.float32))
        if update.bias is not None:
            layer.bias = update.bias + (layer.bias if "bias" in layer else 0)
    return network


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_pefts_says_here_what_it_says_there(name, made, network):
    case, there = CASES[name], made(name)
    files = read_adapter(there.folder)
    assert files.format == "peft"
    updates = updates_of(files, network(case.family))
    assert len(updates) == case.targets
    assert apart(logits_of(network(case.family)), there.base) < CLOSE
    assert apart(there.expected, there.base) > 30 * CLOSE, "the adapter changes nothing"
    assert apart(logits_of(merged(fresh(case.family), updates)), there.expected) < CLOSE


MIXTRAL_ONE_BY_ONE = {"w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}


def write_peft(folder: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """A PEFT folder by hand."""
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS)
    whole = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": [], "peft_version": "0.21.2"}
    (folder / "adapter_config.json").write_text(json.dumps({**whole, **config}))
    return folder


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3)])
def test_experts_that_were_adapted_one_by_one_make_a_stack(numbers, network, tmp_path):
    """As PEFT wrote them when transformers had its experts as modules; PEFT converts them as it reads them."""
    torch.manual_seed(3)
    tensors = {}
    for layer in range(2):
        for number in numbers:
            for leaf, (inputs, outputs) in MIXTRAL_ONE_BY_ONE.items():
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{number}.{leaf}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(3, inputs) * 0.3
                tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, 3) * 0.3
    write_peft(tmp_path / "old", tensors, target_modules=["w1", "w2", "w3"])
    updates = updates_of(read_adapter(tmp_path / "old"), network("mixtral"))
    assert len(updates) == 6
    expected = read_back("mixtral", tmp_path / "old")
    assert apart(logits_of(merged(fresh("mixtral"), updates)), expected) < CLOSE


def test_an_expert_that_was_left_out_stays_as_it_is(network, tmp_path):
    torch.manual_seed(3)
    path = "base_model.model.model.layers.0.block_sparse_moe.experts.2.w1"
    tensors = {f"{path}.lora_A.weight": torch.randn(3, 32), f"{path}.lora_B.weight": torch.randn(48, 3)}
    write_peft(tmp_path / "one", tensors, target_modules=["w1"])
    (update,) = updates_of(read_adapter(tmp_path / "one"), network("mixtral")).values()
    delta = np.array(update.a @ update.b).swapaxes(1, 2)
    wanted = (tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]).numpy() * 5 / 3
    assert np.abs(delta[2] - wanted).max() < 1e-4
    assert not delta[[0, 1, 3]].any()


@pytest.mark.parametrize(
    ("prefix", "inside"),
    [
        *((prefix, "") for prefix in ("", "base_model.model.base_model.model.", "_orig_mod.", "module.")),
        ("thinker.base_model.model.", ""),
        ("base_model.model.", "_checkpoint_wrapped_module."),
        ("_orig_mod.base_model.model.", "_orig_mod._fsdp_wrapped_module."),
    ],
)
@pytest.mark.parametrize("name", ["patterns with rsLoRA", "experts", "a whole head", "DoRA on a tied head"])
def test_whatever_stands_around_the_names_they_mean_the_same(prefix, inside, name, made, network, tmp_path):
    case, there = CASES[name], made(name)
    plain = updates_of(read_adapter(there.folder), network(case.family))
    shutil.copytree(there.folder, tmp_path / "x")
    tensors = load_file(there.folder / TENSORS)
    plainly = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    renamed = {
        prefix + key.replace("layers.1.", f"layers.1.{inside}"): value for key, value in plainly.items()
    }
    save_file(renamed, tmp_path / "x" / TENSORS)
    same(updates_of(read_adapter(tmp_path / "x"), network(case.family)), plain)


def same(found: Mapping[str, LowRank], expected: Mapping[str, LowRank]) -> None:
    assert found.keys() == expected.keys()
    for path, update in expected.items():
        assert found[path].size == update.size, path
        for part, value in update.arrays().items():
            assert mx.array_equal(found[path].arrays()[part], value), f"{path}.{part}"


def test_the_adapters_name_may_stand_in_the_names_and_dora_may_be_called_a_weight(made, network, tmp_path):
    there = made("DoRA")
    shutil.copytree(there.folder, tmp_path / "x")
    tensors = load_file(there.folder / TENSORS)
    renamed = {}
    for key, value in tensors.items():
        key = key.replace("lora_A.weight", "lora_A.mine.weight").replace(
            "lora_B.weight", "lora_B.mine.weight"
        )
        renamed[key.replace("magnitude_vector", "magnitude_vector.mine.weight")] = value
    save_file(renamed, tmp_path / "x" / TENSORS)
    plain = updates_of(read_adapter(there.folder), network("qwen3"))
    same(updates_of(read_adapter(tmp_path / "x"), network("qwen3")), plain)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_of_files_are_read_as_they_are(dtype, made, network, tmp_path):
    there = made("plain")
    shutil.copytree(there.folder, tmp_path / "x")
    tensors = {
        key: value.to(getattr(torch, dtype)) for key, value in load_file(there.folder / TENSORS).items()
    }
    save_file(tensors, tmp_path / "x" / TENSORS)
    updates = updates_of(read_adapter(tmp_path / "x"), network("qwen3"))
    key = "model.layers.0.self_attn.q_proj"
    wanted = tensors[f"base_model.model.{key}.lora_A.weight"].float().numpy().T
    assert np.array_equal(np.array(updates[key].a), wanted)


def test_a_single_file_has_its_config_beside_it_or_inside(made, network, tmp_path):
    there = made("rank and alpha by pattern")
    plain = updates_of(read_adapter(there.folder), network("qwen3"))
    tensors = load_file(there.folder / TENSORS)
    config = (there.folder / "adapter_config.json").read_text()
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "mine.safetensors")
    with pytest.raises(AdapterError, match=r"neither mine\.json nor adapter_config\.json is beside it"):
        read_adapter(tmp_path / "a" / "mine.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(config)
    same(updates_of(read_adapter(tmp_path / "a" / "mine.safetensors"), network("qwen3")), plain)
    (tmp_path / "a" / "adapter_config.json").write_text("[]")
    (tmp_path / "a" / "mine.json").write_text(config)
    same(updates_of(read_adapter(tmp_path / "a" / "mine.safetensors"), network("qwen3")), plain)
    inside = {key: value for key, value in json.loads(config).items() if key != "peft_type"}
    (tmp_path / "b").mkdir()
    save_file(
        tensors, tmp_path / "b" / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(inside)}
    )
    files = read_adapter(tmp_path / "b" / "x.safetensors")
    assert (files.format, files.config_path) == ("peft", files.tensors_path)
    same(updates_of(files, network("qwen3")), plain)


REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "is a PEFT adapter of type 'IA3'; this version reads LORA"),
    "no kind": ({"peft_type": None}, "is a PEFT adapter of type null"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': it changed the base's weights"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "it changed the base's weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "it changed the base's weights"),
    "CorDA": ({"init_lora_weights": "corda"}, "it changed the base's weights"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "it changed the base's weights"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "it changed the base's weights"),
    "LoftQ's settings": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is"),
    "an unknown beginning": (
        {"init_lora_weights": "of 2031"},
        "true, false, gaussian, eva, orthogonal were expected",
    ),
    "MiCA": ({"init_lora_weights": "mica"}, "init_lora_weights is 'mica'; true, false"),
    "aLoRA": (
        {"alora_invocation_tokens": [1, 2]},
        "alora_invocation_tokens is [1, 2]: it adapts the tokens behind",
    ),
    "rows of the embeddings": (
        {"trainable_token_indices": [3]},
        "trainable_token_indices is [3]: it trains rows",
    ),
    "layers again": (
        {"layer_replication": [[0, 2], [1, 2]]},
        "layer_replication is [[0, 2], [1, 2]]: it changes",
    ),
    "tied embeddings": (
        {"ensure_weight_tying": True},
        "ensure_weight_tying is true: it trains the embeddings",
    ),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, "kasa_config is"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config is"),
    "QALoRA": ({"use_qalora": True}, "use_qalora is true"),
    "VeLoRA": ({"velora_config": {"scale": 1.0}}, "velora_config is"),
    "Megatron": ({"megatron_config": {"a": 1}}, "megatron_config is"),
    "a later version's": ({"of_a_later_version": 1}, "of_a_later_version is 1: this version does not know"),
    "rank 0": ({"r": 0}, "r is 0; a whole number from 1 was expected"),
    "rank as text": ({"r": "3"}, "r is '3'; a whole number"),
    "a rank that is true": ({"r": True}, "r is true; a whole number"),
    "a huge rank": ({"r": 10**30}, "a whole number from 1 was expected"),
    "alpha as text": ({"lora_alpha": "16"}, "lora_alpha is '16'; a number above 0 was expected"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha is 0; a number above 0"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha is NaN; a number above 0"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha is Infinity"),
    "a huge alpha": ({"lora_alpha": 10**400}, "lora_alpha is"),
    "a pattern that names nothing": (
        {"rank_pattern": {"k_porj": 3}},
        "rank_pattern has 'k_porj', which names no module",
    ),
    "alphas for nothing": ({"alpha_pattern": {"x.*y": 3}}, "alpha_pattern has 'x.*y', which names no module"),
    "a list of patterns": ({"rank_pattern": ["q_proj"]}, "rank_pattern is ["),
    "a rank of a pattern": (
        {"rank_pattern": {"q_proj": 2.5}},
        "rank_pattern.'q_proj' is 2.5; a whole number from 1",
    ),
    "an alpha of a pattern": (
        {"alpha_pattern": {"q_proj": None}},
        "alpha_pattern.'q_proj' is null; a number above 0",
    ),
    "no expression": (
        {"rank_pattern": {"q_(proj": 3}},
        "rank_pattern has 'q_(proj', which is no regular expression",
    ),
    "no expression as targets": (
        {"target_modules": "*q_proj"},
        "target_modules is '*q_proj', which is no regular",
    ),
    "targets that are a number": ({"target_modules": 3}, "target_modules is 3; a list of names was expected"),
    "targets of numbers": ({"target_modules": [3]}, "target_modules is [3]; a list of names was expected"),
    "targets that leave it out": (
        {"target_modules": ["k_proj"]},
        "model.layers.0.self_attn.q_proj: has lora_a, and the",
    ),
    "it is excluded": (
        {"exclude_modules": ["q_proj"]},
        "model.layers.0.self_attn.q_proj: has lora_a, and the config's",
    ),
    "layers that leave it out": (
        {"layers_to_transform": [1]},
        "layers.0.self_attn.q_proj: has lora_a, and the config",
    ),
    "layers as text": (
        {"layers_to_transform": "0"},
        "layers_to_transform is '0'; a layer's number or a list",
    ),
    "a head that is not there": (
        {"modules_to_save": ["lm_head"]},
        "modules_to_save names lm_head, and no tensor is",
    ),
    "a flag as text": ({"use_rslora": "yes"}, "use_rslora is 'yes'; true or false was expected"),
    "a bias of another kind": ({"bias": "some"}, "bias is 'some'; none, all or lora_only was expected"),
    "an expression without an end": (
        {"target_modules": r"(?:(?:\w|\.)|(?:\w|\.|_)|.)+[A-Z]"},
        "takes too long to match",
    ),
    "lineage": ({"lineage": {"base_model": 3}}, "lineage.base_model is 3; text was expected"),
}
SMALL = "base_model.model.model.layers.0.self_attn.q_proj"


def small(**more: Any) -> dict[str, Any]:
    return {f"{SMALL}.lora_A.weight": torch.ones(3, 32), f"{SMALL}.lora_B.weight": torch.ones(32, 3), **more}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_cannot_be_applied_is_refused_by_its_key(name, tmp_path):
    config, told = REFUSED[name]
    good = {"target_modules": ["q_proj"]}
    read_adapter(write_peft(tmp_path / "x", small(), **good))
    write_peft(tmp_path / "x", small(), **{**good, **config})
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "x")
    message = str(caught.value)
    assert told in message
    assert str(tmp_path / "x") in message or "takes too long" in message
    assert len(message) < 600


REFUSED_TENSORS: dict[str, tuple[Mapping[str, tuple[int, ...]], Mapping[str, Any], str]] = {
    "embeddings": (
        {"base_model.model.model.embed_tokens.weight": (96, 32)},
        {},
        "embed_tokens.weight: trained embeddings",
    ),
    "grown embeddings": (
        {"base_model.model.model.embed_tokens.weight": (97, 32)},
        {},
        "embed_tokens.weight: trained",
    ),
    "LoRA on embeddings": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": (3, 96)},
        {},
        "embed_tokens.lora_embedding_A: is an update of the embeddings",
    ),
    "rows of embeddings": (
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 32)},
        {},
        "trains rows of the embeddings",
    ),
    "a norm": (
        {"base_model.model.model.norm.weight": (32,)},
        {},
        "model.norm: the model has no linear layer of that name",
    ),
    "a classifier": (
        {"base_model.model.score.weight": (2, 32)},
        {"modules_to_save": ["score"]},
        "score: the model has no linear layer of that name, and weights of other layers are shared",
    ),
    "a grown head": (
        {"base_model.model.lm_head.weight": (97, 32)},
        {},
        "lm_head.weight is (97, 32), the model needs (96, 32)",
    ),
    "half of a pair": (
        {"base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": (3, 32)},
        {"target_modules": ["q_proj", "k_proj"]},
        "k_proj: lora_b is missing",
    ),
    "a length without DoRA": (
        {f"{SMALL}.lora_magnitude_vector": (32,)},
        {},
        "q_proj: has m; a lora adapter has",
    ),
    "DoRA without a length": ({}, {"use_dora": True}, "q_proj: m is missing"),
    "a rank of its own": (
        {
            "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": (4, 32),
            "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight": (16, 4),
        },
        {"target_modules": ["q_proj", "k_proj"]},
        "k_proj has rank 4, its adapter_config.json says 3",
    ),
    "a layer beyond the last": (
        {
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": (3, 32),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": (32, 3),
        },
        {},
        "layers.7.self_attn.q_proj: the model has no linear layer of that name",
    ),
    "three axes": (
        {f"{SMALL[:-6]}v_proj.lora_A.weight": (1, 3, 32)},
        {"target_modules": ["q_proj", "v_proj"]},
        "two axes",
    ),
    "two adapters": (
        {f"{SMALL[:-6]}v_proj.lora_A.b.weight": (3, 32), f"{SMALL[:-6]}v_proj.lora_B.a.weight": (16, 3)},
        {"target_modules": ["q_proj", "v_proj"]},
        "holds several adapters (a, b); one a file was expected",
    ),
    "one tensor twice": ({f"{SMALL}.lora_A.x.weight": (3, 32)}, {}, "two tensors are one"),
    "a tensor of nobody's": (
        {"base_model.model.model.rotary.inv_freq": (4,)},
        {},
        "knows no tensor of that name",
    ),
    "a scalar": (
        {"base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": ()},
        {"target_modules": ["q_proj", "k_proj"]},
        "two axes",
    ),
    "experts that there are not": (
        {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": (12, 32)},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        "experts.gate_up_proj",
    ),
    "a stack of no whole rank": (
        {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": (13, 32)},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        "is (13, 32); of a stack of E experts of rank 3",
    ),
    "one of two parameters": (
        {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": (12, 32)},
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        "target_parameters names gate_up_proj, down_proj of it, and there are tensors of 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_tensors_that_cannot_be_applied_are_refused_by_name(name, network, tmp_path):
    more, config, told = REFUSED_TENSORS[name]
    tensors = small(**{key: torch.ones(shape) for key, shape in more.items()})
    write_peft(tmp_path / "x", tensors, **{"target_modules": ["q_proj"], **config})
    with pytest.raises(AdapterError) as caught:
        updates_of(read_adapter(tmp_path / "x"), network("qwen3"))
    assert told in str(caught.value)


def test_the_bases_own_embeddings_beside_an_adapter_change_nothing(network, tmp_path):
    """PEFT saves them where the head is adapted, or believes that the vocabulary has grown."""
    own = adaptable("qwen3").state_dict()["model.embed_tokens.weight"]
    tensors = small(**{"base_model.model.model.embed_tokens.weight": own})
    write_peft(tmp_path / "x", tensors, target_modules=["q_proj"])
    assert updates_of(read_adapter(tmp_path / "x"), network("qwen3")).keys() == {
        "model.layers.0.self_attn.q_proj"
    }


def test_on_which_side_a_is_in_a_stack_of_an_early_peft_is_told_by_its_shapes_or_refused(tmp_path):
    """Before 0.19 A was on the side of the first axis, whatever that was; a later one says so by its version."""
    path = "base_model.model.model.layers.0.mlp.experts"

    def update(family: str, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """What is added to the weights here, [E, O, D], and PEFT's own product of A and B."""
        a, b = torch.randn(12, width), torch.randn(height, 12)
        tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        config = {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.18.0"}
        files = read_adapter(write_peft(tmp_path / f"{width}{height}", tensors, **config))
        (found,) = updates_of(files, fresh(family)).values()
        by_expert = a.numpy().reshape(4, 3, width), b.numpy().reshape(height, 3, 4)
        whole = np.einsum("eri,ore->eoi", *by_expert) * 5 / 3
        return np.array(found.a @ found.b).swapaxes(1, 2), whole

    later, whole = update("qwen3_moe", 24, 32)
    assert np.abs(later - whole).max() < 1e-4
    early, whole = update("qwen3_moe", 32, 24)
    assert np.abs(early - whole.swapaxes(1, 2)).max() < 1e-4
    with pytest.raises(
        AdapterError, match="A has 24 inputs and B 24 outputs; the experts here have 24 and 32"
    ):
        update("qwen3_moe", 24, 24)
    with pytest.raises(
        AdapterError, match=r"its shapes do not say on which side A is; save it with a newer PEFT"
    ):
        update("square_moe", 32, 32)


def test_a_layer_that_is_one_there_and_three_here_is_cut_by_its_outputs(network, tmp_path):
    torch.manual_seed(5)
    layer = "base_model.model.model.layers.1"
    shapes = {"self_attn.qkv_proj": (64, 32), "mlp.gate_up_proj": (96, 32)}
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        tensors[f"{layer}.{name}.lora_A.weight"] = torch.randn(3, inputs)
        tensors[f"{layer}.{name}.lora_B.weight"] = torch.randn(outputs, 3)
    config = {"target_modules": ["qkv_proj", "gate_up_proj"], "alpha_pattern": {"gate_up_proj": 9}}
    updates = updates_of(read_adapter(write_peft(tmp_path / "x", tensors, **config)), network("qwen3"))
    cuts = {"self_attn": {"q_proj": (0, 32), "k_proj": (32, 48), "v_proj": (48, 64)}}
    cuts["mlp"] = {"gate_proj": (0, 48), "up_proj": (48, 96)}
    assert updates.keys() == {
        f"model.layers.1.{block}.{leaf}" for block, leaves in cuts.items() for leaf in leaves
    }
    for block, fused, scale in (("self_attn", "qkv_proj", 5 / 3), ("mlp", "gate_up_proj", 9 / 3)):
        a, b = (tensors[f"{layer}.{block}.{fused}.lora_{side}.weight"] for side in "AB")
        whole = (b @ a).numpy() * scale
        for leaf, (start, stop) in cuts[block].items():
            found = updates[f"model.layers.1.{block}.{leaf}"]
            assert np.abs(np.array(found.a @ found.b).T - whole[start:stop]).max() < 1e-4
    tensors[f"{layer}.self_attn.qkv_proj.lora_B.weight"] = torch.randn(63, 3)
    with pytest.raises(AdapterError, match=r"64 outputs were expected, for q_proj, k_proj, v_proj here"):
        updates_of(read_adapter(write_peft(tmp_path / "x", tensors, **config)), network("qwen3"))


SPLIT = {"q_proj": (32, 0), "k_proj": (16, 32), "v_proj": (16, 48), "gate_proj": (48, 0), "up_proj": (48, 48)}
"""Outputs of what is one layer in phi3, and where they begin there."""


@pytest.mark.parametrize("prefix", ["model", "language_model.model"])
@pytest.mark.parametrize("leaves", ["qkv", "qv", "k", "qkvgu", "vu"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_layers_that_are_one_here_get_the_updates_of_each_side_by_side(
    kind, leaves, prefix, network, tmp_path
):
    """As Llama's form of a Phi has them."""
    torch.manual_seed(6)
    modules = {leaf: "mlp" if leaf[0] in "gu" else "self_attn" for leaf in SPLIT if leaf[0] in leaves}
    tensors, wanted = {}, {}
    weights = {
        path: np.array(dense_weight(layer)) for path, layer in adaptable_modules(network("phi3")).items()
    }
    for number, (leaf, block) in enumerate(modules.items()):
        outputs, start = SPLIT[leaf]
        rank, alpha = 2 + number, 5 + number
        a, b = torch.randn(rank, 32), torch.randn(outputs, rank)
        path = f"{prefix}.layers.1.{block}.{leaf}"
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        whole = f"model.layers.1.{block}.{'qkv_proj' if block == 'self_attn' else 'gate_up_proj'}"
        new = wanted.setdefault(whole, weights[whole].astype(np.float64))
        rows = slice(start, start + outputs)
        new[rows] += (b @ a).numpy() * alpha / rank
        if kind == "dora":
            length = torch.rand(outputs) + 0.5
            tensors[f"{path}.lora_magnitude_vector"] = length
            new[rows] *= length.numpy()[:, None] / np.linalg.norm(new[rows], axis=1, keepdims=True)
    patterns = {
        "rank_pattern": {leaf: 2 + number for number, leaf in enumerate(modules)},
        "alpha_pattern": {leaf: 5 + number for number, leaf in enumerate(modules)},
    }
    folder = write_peft(
        tmp_path / "x", tensors, target_modules=[*modules], use_dora=kind == "dora", **patterns
    )
    if kind == "dora" and leaves not in ("qkv", "qkvgu"):
        with pytest.raises(AdapterError, match=r"is one layer here, and there is no m of"):
            updates_of(read_adapter(folder), network("phi3"))
        return
    updates = updates_of(read_adapter(folder), network("phi3"))
    changed = adaptable_modules(merged(fresh("phi3"), updates))
    assert updates.keys() == wanted.keys()
    for path, weight in wanted.items():
        assert np.abs(np.array(changed[path].weight) - weight).max() < 1e-4, path


def test_leaves_that_do_not_make_the_layer_up_are_refused(network, tmp_path):
    for sizes in (
        {"q_proj": 33},
        {"q_proj": 32, "k_proj": 16, "v_proj": 8},
        {"gate_proj": 40},
        {"k_proj": 32},
    ):
        tensors = {}
        for leaf, outputs in sizes.items():
            path = f"model.layers.0.{'mlp' if leaf == 'gate_proj' else 'self_attn'}.{leaf}"
            tensors |= {
                f"{path}.lora_A.weight": torch.randn(3, 32),
                f"{path}.lora_B.weight": torch.randn(outputs, 3),
            }
        folder = write_peft(tmp_path / "x", tensors, target_modules=[*sizes])
        with pytest.raises(AdapterError, match=r"do not make up|were expected"):
            updates_of(read_adapter(folder), network("phi3"))


@pytest.mark.parametrize("bits", [4, 8])
def test_over_packed_weights_a_head_is_what_it_was_trained_to_be_and_a_copy_is_none(bits, made, tmp_path):
    """The difference of a whole head is to what the packed one stands for; the copy that PEFT saves beside LoRA on
    the head is the base's own, packed or not."""
    there = made("a whole head")
    packed = fresh("qwen3")
    nn.quantize(packed.module, 32, bits, class_predicate=lambda path, _: path == "lm_head")
    trained = load_file(there.folder / TENSORS)["base_model.model.lm_head.weight"].numpy()
    update = updates_of(read_adapter(there.folder), packed)["lm_head"]
    assert update.a is None
    stands_for = np.array(dense_weight(packed.module.lm_head))
    assert np.abs(stands_for + np.array(update.b).T - trained).max() < 1e-6

    beside = updates_of(read_adapter(made("LoRA on the head").folder), packed)["lm_head"]
    assert (beside.a is not None, beside.size.rank) == (True, 3)
    changed = updates_of(read_adapter(made("LoRA on a head that was changed").folder), packed)["lm_head"]
    assert changed.a is None


@pytest.mark.parametrize("name", CASES)
def test_rows_of_the_base_and_of_such_an_adapter_share_a_batch(name, made, network):
    case, there = CASES[name], made(name)
    shared = fresh(case.family)
    bank = Bank(shared)
    updates = updates_of(read_adapter(there.folder), network(case.family))
    for part in bank.parts(updates):
        bank.install(1, part)
    for slots in ((1, 0), (0, 1), (1, 1)):
        bank.rows.set(slots)
        expected = np.stack([(there.expected if slot else there.base)[row] for row, slot in enumerate(slots)])
        assert apart(logits_of(shared), expected) < CLOSE, slots
    bank.leave(1)
    while bank.tidy():
        pass
    assert bank.num_bytes == 0
