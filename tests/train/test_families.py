"""Each text family, proven on a tiny random model of its own config class; run as a script it prints README's table.

.venv/bin/python tests/train/test_families.py
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.optimizers as mlx_optim
import numpy as np
import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import write_adapter
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.engine.request import Request, Sampling
from serve.model.loading import load
from serve.model.network import Network
from serve.model.packed import packing_problem
from serve.model.prompt import Prompt
from train.adapters.adapt import Adapted, AdapterSettings, adapter_tensors, add_lora, checkpointed_layers
from train.data.batches import Batch, collate
from train.data.packing import Layout, collate_packed
from train.data.tokens import TokenizedExample
from train.loop.step import Stepper
from train.objectives.sft import SFT

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
MLA = {
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "rope_scaling": {
        "type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
FAMILIES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": QWEN_MOE,
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": {},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": None,
    },
    "olmo2": {},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "deepseek_v2": MLA,
    "deepseek_v3": {**MLA, "topk_method": "noaux_tc", "norm_topk_prob": True, "rope_scaling": None},
    "smollm3": {"no_rope_layer_interval": 2},
    "qwen3_next": {
        **QWEN_MOE,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 16,
        "full_attention_interval": 2,
        "partial_rotary_factor": 0.5,
    },
    "mamba2": {
        "num_heads": 8,
        "state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": "auto",
        "layer_norm_epsilon": 1e-5,
    },
}
RECURRENT = ("qwen3_next", "mamba2")
DOCUMENTS = [
    TokenizedExample(
        np.random.default_rng(line).integers(3, 259, length).astype(np.int32),
        np.arange(length) >= length // 3,
        "f",
        line,
    )
    for line, length in enumerate((21, 12, 17))
]
PROMPT = "the quick brown fox"


@dataclass
class Trained:
    """A family after a few steps of LoRA over every linear layer, and its adapter's folder."""

    family: str
    base: Path
    folder: Path
    network: Network
    adapted: Adapted
    losses: list[float]
    start: dict[str, mx.array]
    """Every parameter before the first step."""


def train(family: str, base: Path, folder: Path) -> Trained:
    network = load(str(base)).network
    mx.random.seed(0)
    adapted = add_lora(network, AdapterSettings(rank=4, scale=4.0))
    start = {name: mx.array(np.array(value)) for name, value in tree_flatten(network.module.parameters())}
    stepper = Stepper(network, mlx_optim.Adam(learning_rate=1e-2), SFT())
    network.module.train()
    batch = collate(DOCUMENTS, range(len(DOCUMENTS)))
    losses = [float(stepper.step([batch], index).loss) for index in range(6)]
    network.module.eval()
    config = AdapterConfig("lora", adapted.num_layers, adapted.rank, 4.0, keys=adapted.keys)
    write_adapter(folder, adapter_tensors(network), config)
    return Trained(family, base, folder, network, adapted, losses, start)


# What is proven, one function a column. Each raises AssertionError, or returns what the table says.


def lora_trains(trained: Trained) -> str:
    """The loss falls; every trainable tensor has moved and no frozen one."""
    assert trained.losses[-1] < trained.losses[0] - 0.1
    trainable = dict(tree_flatten(trained.network.module.trainable_parameters()))
    for name, value in tree_flatten(trained.network.module.parameters()):
        moved = not mx.array_equal(value, trained.start[name]).item()
        assert moved == (name in trainable), f"{name} {'moved' if moved else 'did not move'}"
    with_experts = any("experts" in key or "switch" in key for key in trained.adapted.keys)
    return "yes, experts too" if with_experts else "yes"


def mlx_lm_reads_it(trained: Trained) -> str:
    """The folder gives the trainer's logits in mlx-lm, and other ones than the base."""
    tokens = mx.array(DOCUMENTS[0].token_ids[None])
    theirs, _ = mlx_lm.load(str(trained.base), adapter_path=str(trained.folder))
    logits, ours = np.array(theirs(tokens)), np.array(trained.network.module(tokens))
    np.testing.assert_allclose(logits, ours, atol=1e-3 * np.abs(ours).max())
    plain = np.array(mlx_lm.load(str(trained.base))[0](tokens))
    assert np.abs(plain - ours).max() > 0.05 * np.abs(ours).max()
    return "same logits"


def the_engine_serves_it(trained: Trained) -> str:
    """The engine's greedy tokens and their log-probabilities are the trainer's own, beside a row of the base."""
    model = load(str(trained.base))
    engine = Engine(model, EngineLimits(prefill_chunk_tokens=16))
    version = engine.registry.load("tuned", trained.folder)
    prompt = tuple(model.tokenizer.encode(PROMPT))
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, num_logprobs=0)
    requests = [Request(str(a), Prompt(prompt), sampling, adapter=a) for a in (version, None)]
    ours, base = generate(engine, requests)
    module = trained.network.module
    tokens = mx.array([[*prompt, *ours.token_ids]])
    logits = module(tokens, cache=make_prompt_cache(module))[0, len(prompt) - 1 : -1]
    expected = np.array(nn.log_softmax(logits.astype(mx.float32), axis=-1))
    drawn = expected[np.arange(len(ours.token_ids)), ours.token_ids]
    # A near-tie may fall either way in another batch shape; nothing further from the top may be drawn.
    assert (expected.max(-1) - drawn < 1e-2).all()
    np.testing.assert_allclose([e.logprob for e in ours.logprobs], drawn, atol=1e-2)
    assert np.abs(np.subtract(drawn, [e.logprob for e in base.logprobs])).max() > 0.05
    return "same tokens"


def packing_is_equal_or_refused(trained: Trained) -> str:
    """Packed loss and gradients are those of each document alone; or there is a reason why not."""
    problem = packing_problem(trained.network, 512)
    if problem is not None:
        assert trained.family in RECURRENT, problem
        assert "keeps its past as ArraysCache" in problem
        return "refused: recurrent state"
    alone = [collate(DOCUMENTS, [row]) for row in range(len(DOCUMENTS))]
    _same(
        gradients(trained.network, alone),
        gradients(trained.network, [collate_packed(DOCUMENTS, Layout(56, ((1, 0, 2),)))]),
    )
    return "equal"


def recomputing_is_equal(trained: Trained) -> str:
    """Gradient checkpointing changes no gradient."""
    batch = collate(DOCUMENTS, [0, 1])
    plain = gradients(trained.network, [batch])
    with checkpointed_layers(trained.network):
        _same(plain, gradients(trained.network, [batch]))
    return "equal"


def the_loss_is_the_whole_models(trained: Trained) -> str:
    """The loss at targets alone, head apart, is the whole model's; and the same through the family's own cache."""
    batch = collate(DOCUMENTS, range(len(DOCUMENTS)))
    prepared = SFT().prepare(batch)
    loss = SFT().loss(trained.network, prepared.arrays(1), trains=False)[0].item()
    module = trained.network.module
    for cache in (None, make_prompt_cache(module)):
        logits = np.array(module(mx.array(batch.tokens), cache=cache), np.float64)
        rows, columns = np.nonzero(batch.is_target)
        scores = logits[rows, columns - 1]
        chosen = scores[np.arange(len(rows)), batch.tokens[rows, columns]]
        peak = scores.max(-1)
        expected = (np.log(np.exp(scores - peak[:, None]).sum(-1)) + peak - chosen).sum()
        assert loss == pytest.approx(expected, rel=1e-4)
    return "equal"


def gradients(network: Network, batches: list[Batch]) -> dict[str, mx.array]:
    """Of the mean over the targets of all batches; under "loss", that mean."""
    prepared = [SFT().prepare(batch) for batch in batches]
    total = sum(part.num_units for part in prepared)

    def mean() -> mx.array:
        return sum(SFT().loss(network, part.arrays(total))[0] for part in prepared)

    network.module.train()
    loss, found = nn.value_and_grad(network.module, mean)()
    network.module.eval()
    return {"loss": loss, **dict(tree_flatten(found))}


def _same(one: dict[str, mx.array], two: dict[str, mx.array]) -> None:
    assert one.keys() == two.keys()
    largest = max(mx.abs(value).max().item() for value in one.values())
    assert largest > 1e-3
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-4 * largest, err_msg=name)


COLUMNS: dict[str, Callable[[Trained], str]] = {
    "LoRA trains": lora_trains,
    "mlx-lm": mlx_lm_reads_it,
    "engine": the_engine_serves_it,
    "packing": packing_is_equal_or_refused,
    "grad_checkpoint": recomputing_is_equal,
    "loss at targets": the_loss_is_the_whole_models,
}


@pytest.fixture(scope="session")
def trained_of(make_model, tmp_path_factory) -> Callable[[str], Trained]:
    made: dict[str, Trained] = {}

    def get(family: str) -> Trained:
        if family not in made:
            base = make_model(f"train-{family}", {"model_type": family, **COMMON, **FAMILIES[family]})
            made[family] = train(family, base, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("column", COLUMNS)
def test_every_family(column, family, trained_of):
    COLUMNS[column](trained_of(family))


def table() -> Iterator[str]:
    """The lines of the table, each cell proven now."""
    tests = Path(__file__).parents[1]
    sys.path.append(str(tests / "support"))
    spec = importlib.util.spec_from_file_location("conftest", tests / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    yield "| family | " + " | ".join(COLUMNS) + " |"
    yield "|---|" + "---|" * len(COLUMNS)
    for family, extra in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = conftest.write_model(Path(folder) / "base", {"model_type": family, **COMMON, **extra})
            trained = train(family, base, Path(folder) / "adapter")
            cells = [_cell(prove, trained) for prove in COLUMNS.values()]
        yield f"| {family} | " + " | ".join(cells) + " |"


def _cell(prove: Callable[[Trained], str], trained: Trained) -> str:
    try:
        return prove(trained)
    except Exception as error:  # whatever goes wrong is what the table has to say
        said = " ".join(f"{type(error).__name__} {error}".split())
        return f"**no**: {said[:100]}"


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
