"""PEFT's folders: PEFT on torch is the oracle, feature by feature, on tiny models of families that differ in names."""

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

from serve.adapters.bank import Bank  # noqa: E402
from serve.adapters.files import AdapterFiles, read_adapter  # noqa: E402
from serve.adapters.fit import LowRank, check_fit, fit  # noqa: E402
from serve.adapters.paths import adaptable_modules, module_at  # noqa: E402
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
    config: Mapping[str, Any] = field(default_factory=dict)


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
        "qwen3", {"target_modules": ATTENTION, "init_lora_weights": "orthogonal", "r": 4}, 8
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
    model.save_pretrained(folder)
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
