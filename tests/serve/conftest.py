"""The oracle: one request at a time, over the family's own code and cache; and models lively enough to tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import httpx
import mlx.nn as nn
import openai
from mlx_lm.models.cache import make_prompt_cache
from sighted import Alone, Eyes
from tiny import QWEN3

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import read_config, read_tensors, write_adapter
from serve.adapters.tools.writing import convert
from serve.api.server import serving
from serve.config import ServeConfig
from serve.engine.engine import Engine, EngineLimits
from serve.model.loading import LoadedModel, load
from serve.model.network import Network
from serve.model.weights import dense_weight, expert_modules, linear_modules, linear_shape
from serve.runtime import Runtime

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
LIVELY = {
    "full": {**COMMON, **QWEN3_MOE, "model_type": "qwen3_moe"},
    "sliding": {
        **COMMON,
        "model_type": "gpt_oss",
        "intermediate_size": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "hybrid": {
        **COMMON,
        **QWEN3_MOE,
        "model_type": "qwen3_next",
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    },
}
"""Mixtures of experts with full attention, with windows (and sinks) beside it, with recurrent state beside it."""
SMALL = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
LOUDER = {"sliding": {"q_proj": 8}}
KINDS = ("lora", "dora", "experts")
SCALE = 2.0


def _greedy(module: nn.Module, prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    cache, tokens, out = make_prompt_cache(module), mx.array([prompt]), []
    for _ in range(num_tokens):
        drawn = mx.argmax(module(tokens, cache=cache)[:, -1], axis=-1)
        out.append(drawn.item())
        tokens = drawn[None]
    return tuple(out)


def _merged(model_folder: Path, adapter_folder: Path) -> nn.Module:
    module = load(str(model_folder)).network.module
    _merge(module, adapter_folder)
    return module


def _merge(module: nn.Module, adapter_folder: Path) -> None:
    """The definition, in numpy: W + s·BA; of DoRA each row made as long as m says."""
    config, tensors = read_config(adapter_folder), read_tensors(adapter_folder)
    layers = {**linear_modules(module), **expert_modules(module)}
    wide = {name: np.array(value.astype(mx.float32), np.float64) for name, value in tensors.items()}
    for path in {name.rpartition(".")[0] for name in tensors}:
        a, b = wide[f"{path}.lora_a"], wide[f"{path}.lora_b"]
        old = dense_weight(layers[path])
        weight = np.array(old.astype(mx.float32), np.float64)
        weight = weight + config.scale * (b @ a if a.ndim == 3 else (a @ b).T)
        if f"{path}.m" in wide:
            weight *= (wide[f"{path}.m"] / np.linalg.norm(weight, axis=1))[:, None]
        module.load_weights([(f"{path}.weight", mx.array(weight).astype(old.dtype))], strict=False)


def _add_up(module: nn.Module, parts: Sequence[tuple[Path, float]]) -> None:
    """W + Σ w (W' − W), each W' being what one adapter alone makes of W."""
    layers = {**linear_modules(module), **expert_modules(module)}
    old = {path: np.array(dense_weight(each).astype(mx.float32), np.float64) for path, each in layers.items()}
    new = {path: weight.copy() for path, weight in old.items()}
    dtype = {path: dense_weight(each).dtype for path, each in layers.items()}

    def put(weights: Mapping[str, np.ndarray]) -> None:
        module.load_weights(
            [(f"{path}.weight", mx.array(w).astype(dtype[path])) for path, w in weights.items()], strict=False
        )

    for folder, share in parts:
        _merge(module, folder)
        for path, layer in layers.items():
            new[path] += share * (np.array(dense_weight(layer).astype(mx.float32), np.float64) - old[path])
        put(old)
    put(new)


def _summed(model_folder: Path, parts: Sequence[tuple[Path, float]]) -> nn.Module:
    module = load(str(model_folder)).network.module
    _add_up(module, parts)
    return module


@contextmanager
def _served(model_folder: Path, **settings: Any) -> Iterator[tuple[Runtime, httpx.Client]]:
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", **settings))
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=120) as http:
            yield runtime, http
        runtime.registry.check_integrity()
    finally:
        runtime.close()


def _layers_of(kind: str, module: nn.Module) -> dict[str, nn.Module]:
    """What an adapter of this kind touches: attention, of DoRA the head too; or the experts and their routers.

    Of a model that sees: the language part's, and for want of experts its eyes.
    """
    network = Network(module)
    linears = linear_modules(module)
    if network.has_towers:
        # In the model's order: a set's would be another in each process, and so would the adapter's numbers.
        inside = {path: each for path, each in linears.items() if path.startswith(f"{network.text_path}.")}
        if kind == "experts":
            return {path: each for path, each in linears.items() if path not in inside or "o_proj" in path}
        linears = inside
    if kind == "experts":
        routers = {path: each for path, each in linears.items() if path.endswith(("mlp.gate", "mlp.router"))}
        return {**expert_modules(module), **routers}
    heads = ("lm_head",) if kind == "dora" else ()
    return {path: each for path, each in linears.items() if "attn." in path or path.endswith(heads)}


def _tensors(
    path: str, layer: nn.Module, kind: str, rank: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    inputs, outputs = linear_shape(layer)
    experts = layer.weight.shape[:-2]
    a = (*experts, rank, inputs) if experts else (inputs, rank)
    b = (*experts, outputs, rank) if experts else (rank, outputs)
    size = 0.15 if experts else 0.2
    tensors = {f"{path}.lora_a": rng.normal(size=a) * size, f"{path}.lora_b": rng.normal(size=b) * size}
    if kind == "dora":
        lengths = np.linalg.norm(np.array(dense_weight(layer).astype(mx.float32)), axis=1)
        tensors[f"{path}.m"] = lengths * rng.uniform(0.7, 1.5, outputs)
    return tensors


class Lively:
    """Lively models and their adapters, each made once: folders, and the base with an adapter fused."""

    def __init__(
        self, make_model: Callable[..., Path], vlm_folder: Callable[[str], Path], root: Path
    ) -> None:
        self._root, self._make_model = root, make_model
        self.folder = cache(
            lambda name: (
                make_model(f"law-{name}", LIVELY[name], louder=LOUDER.get(name, {}))
                if name in LIVELY
                else vlm_folder(name)
            )
        )
        """folder(name of LIVELY, or one of VLM_FAMILIES) → a model."""
        self.small = cache(self._small)
        """small(name) → the folder of another model, which has that model's tokenizer and no recurrent state."""
        self.module = cache(self._module)
        """module(name, kind, number) → the whole model, that adapter fused into its weights (kind "base": none)."""
        self.eyes = cache(lambda name: Eyes(name, self.folder(name)))
        """eyes(one of VLM_FAMILIES) → what makes prompts with pictures for it."""

    def _small(self, name: str) -> Path:
        """Of "full" it is the model itself, which is right where no adapter changes what is said."""
        if name == "full":
            return self.folder(name)
        target = load(str(self.folder(name)))
        config = {**COMMON, **SMALL, "vocab_size": target.network.vocab_size}
        folder = self._make_model(f"small-{name}", config)
        for file in [*folder.glob("*token*"), *folder.glob("*template*")]:
            file.unlink()
        target.tokenizer._tokenizer.save_pretrained(folder)  # which a family's class may add tokens to
        return folder

    def adapter(self, name: str, kind: str, number: int = 0) -> Path:
        """The folder of a random adapter of that model; another number is another adapter, of another rank."""
        folder = self._root / f"{name}-{kind}-{number}"
        if not folder.exists():
            rank = 2 + KINDS.index(kind) + 3 * number
            rng = np.random.default_rng([number, KINDS.index(kind)])
            layers = _layers_of(kind, load(str(self.folder(name))).network.module)
            tensors = {
                key: mx.array(value, dtype=mx.float32)
                for path, layer in layers.items()
                for key, value in _tensors(path, layer, kind, rank, rng).items()
            }
            keys = tuple(dict.fromkeys(path.split(".", 3)[-1] for path in layers))
            tuner = "dora" if kind == "dora" else "lora"
            write_adapter(folder, tensors, AdapterConfig(tuner, -1, rank, SCALE, keys=keys))
        return folder

    def in_pefts_layout(self, name: str, kind: str, number: int = 0) -> Path:
        """The same adapter as PEFT has it on disk."""
        folder = self._root / f"{name}-{kind}-{number}-peft"
        if not folder.exists():
            convert(self.adapter(name, kind, number), folder, "peft", load(str(self.folder(name))))
        return folder

    def _module(self, name: str, kind: str, number: int = 0) -> nn.Module | Alone:
        model = load(str(self.folder(name)))
        first, _, more = kind.partition(" and ")
        if more:
            parts = [
                (self.adapter(name, each, 1 + number), share) for each, share in ((first, 0.7), ("lora", 0.4))
            ]
            _add_up(model.network.module, parts)
        elif kind != "base":
            _merge(model.network.module, self.adapter(name, kind, number))
        return model.network.module if model.vision is None else Alone(model)


@pytest.fixture(scope="session")
def lively(
    make_model: Callable[..., Path],
    vlm_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Lively:
    """Models of full attention, windows and recurrent state, with experts or eyes, and adapters of every kind."""
    return Lively(make_model, vlm_folder, tmp_path_factory.mktemp("lively-adapters"))


@pytest.fixture
def opened(vlm_folder: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """opened(family) → a lively model with towers, freshly loaded: a bank wraps its layers."""
    return lambda family: load(str(vlm_folder(family)), name=family)


@pytest.fixture(params=[False, True], ids=["in step", "one ahead"])
def ahead(request: pytest.FixtureRequest) -> bool:
    """Whether an engine builds a step before it has read the one before."""
    return bool(request.param)


@pytest.fixture
def make_engine(ahead: bool) -> Callable[..., Engine]:
    """make_engine(model, **limits) → an engine over the model, in step and one step ahead."""
    return lambda model, **limits: Engine(model, EngineLimits(ahead=ahead, **limits))


@pytest.fixture(scope="session")
def greedy_by_mlx_lm() -> Callable[[nn.Module, Sequence[int], int], tuple[int, ...]]:
    """greedy_by_mlx_lm(module, prompt, num_tokens) → tokens of the plain loop."""
    return _greedy


@pytest.fixture(scope="session")
def merged() -> Callable[[Path, Path], nn.Module]:
    """merged(model_folder, adapter_folder) → the base with one adapter fused into its weights."""
    return _merged


@pytest.fixture(scope="session")
def summed() -> Callable[[Path, Sequence[tuple[Path, float]]], nn.Module]:
    """summed(model_folder, [(adapter_folder, weight)…]) → the base with that sum fused into its weights."""
    return _summed


@pytest.fixture
def make_one(make_adapter: Callable[..., Path]) -> Callable[[int], Path]:
    """make_one(seed) → folder of an adapter of the lively model, of another rank with each seed."""
    return lambda seed: make_adapter(seed, rank=2 + seed % 3, keys=["self_attn.q_proj", "mlp.up_proj"])


@pytest.fixture
def served() -> Callable[..., AbstractContextManager[tuple[Runtime, httpx.Client]]]:
    """served(model_folder, **keys of the configuration): inside, a server and a client of it; when it is left, names,
    slots and bytes agree."""
    return _served


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    """A client of the server that a module's own `url` gives."""
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own, of the same server."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one for the module, or its tests are skipped."""
    from opened_page import launched

    with launched() as found:
        yield found


@pytest.fixture(scope="session")
def talkative(make_model: Callable[..., Path]) -> Path:
    """A model whose answer takes long enough for a slow page to do something meanwhile."""
    return make_model("talkative", {**QWEN3, "max_position_embeddings": 1 << 16})


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """open_page(url, **as the browser's contexts take it) → an Opened; after the test nothing in it has failed."""
    from opened_page import Opened

    contexts, pages = [], []

    def start(url: str, **settings: Any) -> Opened:
        contexts.append(browser.new_context(**settings))
        pages.append(Opened(contexts[-1].new_page(), url))
        return pages[-1]

    yield start
    for context in contexts:
        context.close()
    assert [fault for page in pages for fault in page.faults] == []
    assert [address for page in pages for address in page.elsewhere] == []
