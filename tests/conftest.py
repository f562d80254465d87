"""Tiny real models and adapters, made once a session: folders on disk, loaded by the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten, tree_map_with_path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve.adapters.fit import linear_modules
from serve.adapters.lora import linear_shape
from serve.adapters.manifest import AdapterConfig, write_adapter
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request, Sampling
from serve.model.loading import LoadedModel, load
from serve.model.prompt import Prompt

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, three special ones: enough for any text, no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_model(folder: Path, config: dict, *, seed: int = 0, is_lively: bool = True) -> Path:
    """A random model of an mlx-lm family as a Hugging Face folder.

    A plain random model repeats one token and so hides cache and mask faults; these scales make its greedy text
    depend on every token before it (about 35 distinct tokens of 40).
    """
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    module = model_class(args_class.from_dict(config))
    if is_lively:
        louder = {"o_proj": 4, "down_proj": 4, "q_norm": 8, "embed_tokens": 8}
        scaled = tree_map_with_path(
            lambda path, w: w * next((k for part, k in louder.items() if part in path), 1),
            module.parameters(),
        )
        module.update(scaled)
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lively random qwen3."""
    return write_model(tmp_path_factory.mktemp("models") / "lively", QWEN3)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model(name, config, seed=0, is_lively=True) → folder of a random model of any mlx-lm family."""
    root = tmp_path_factory.mktemp("families")
    return lambda name, config, **options: write_model(root / name, config, **options)


@pytest.fixture
def model(model_folder: Path) -> LoadedModel:
    """The lively model, freshly loaded: an engine wraps its layers, so tests do not share it."""
    return load(str(model_folder), name="lively")


@pytest.fixture
def fresh_engine(model_folder: Path) -> Callable[..., Engine]:
    """fresh_engine(**limits) → an engine over its own copy of the lively model: the reference to compare with."""
    return lambda **limits: Engine(load(str(model_folder), name="lively"), EngineLimits(**limits))


@pytest.fixture(scope="session")
def make_adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_adapter(seed, rank=4, scale=2.0, keys=None, size=0.3) → folder of a random adapter of the lively model."""
    root = tmp_path_factory.mktemp("adapters")
    modules = linear_modules(load(str(model_folder)).network.module)

    def make(
        seed: int,
        *,
        rank: int = 4,
        scale: float = 2.0,
        keys: Sequence[str] | None = None,
        size: float = 0.3,
        config: AdapterConfig | None = None,
    ) -> Path:
        mx.random.seed(seed)
        tensors = {}
        for path, linear in modules.items():
            if path.startswith("model.layers.") and (keys is None or path.split(".", 3)[3] in keys):
                inputs, outputs = linear_shape(linear)
                tensors[f"{path}.lora_a"] = mx.random.normal((inputs, rank)) * size
                tensors[f"{path}.lora_b"] = mx.random.normal((rank, outputs)) * size
        folder = root / f"adapter-{seed}-{rank}-{scale}-{size}-{'-'.join(keys or ())}"
        write_adapter(
            folder, tensors, config or AdapterConfig("lora", -1, rank, scale, keys=tuple(keys or ()))
        )
        return folder

    return make


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """make_request(id, text, max_tokens=24, adapter=None, **sampling); greedy unless told otherwise."""
    tokenizer = byte_tokenizer()

    def make(
        id: str, text: str = "hello there", *, max_tokens: int = 24, adapter=None, **sampling: object
    ) -> Request:
        settings = {"temperature": 0.0, "ignore_eos": True, **sampling}
        return Request(
            id=id,
            prompt=Prompt(tuple(tokenizer.encode(text))),
            sampling=Sampling(max_tokens=max_tokens, **settings),
            adapter=adapter,
        )

    return make
