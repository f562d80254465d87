"""What was trained is what is served: one adapter, its logits in the trainer and in the engine."""

from __future__ import annotations

import mlx.core as mx
import pytest

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import write_adapter
from serve.engine.engine import Engine
from serve.engine.generate import generate
from serve.model.loading import load
from train.adapters.adapt import AdapterSettings, adapter_tensors, add_lora
from train.loop.loss import target_logits


@pytest.mark.parametrize(
    "options",
    [
        {"keys": None},
        {"keys": ["self_attn.q_proj", "mlp.down_proj"]},
        {"fine_tune_type": "dora", "keys": ["all-linear", "lm_head"]},
        {"init": "pissa", "keys": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_a_trained_adapter_gives_the_same_logits_in_trainer_and_engine(
    model, model_folder, make_request, tmp_path, options, assert_drawn
):
    mx.random.seed(2)  # makes every one of these adapters lively
    trained = load(str(model_folder)).network
    adapted = add_lora(trained, AdapterSettings(rank=5, scale=3.0, **options))
    for module in trained.module.modules():
        if "lora_b" in module:
            module.lora_b = module.lora_b + mx.random.normal(module.lora_b.shape) * 0.2
        if "m" in module:
            module.m = module.m * mx.random.uniform(0.8, 1.3, module.m.shape)
    trained.module.eval()
    config = AdapterConfig(adapted.fine_tune_type, adapted.num_layers, adapted.rank, 3.0, keys=adapted.keys)
    write_adapter(tmp_path / "a", adapter_tensors(trained), config)

    engine = Engine(model)
    request = make_request("r", adapter=engine.registry.load("a", tmp_path / "a"), num_logprobs=0)
    answer = generate(engine, [request, make_request("base beside it")])[0]

    prompt = request.prompt.token_ids
    tokens = mx.array([[*prompt, *answer.token_ids]])
    positions = mx.arange(len(prompt) - 1, tokens.shape[1] - 1)
    logits = target_logits(trained, tokens, positions)
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert len(set(answer.token_ids)) > 10
    assert_drawn(request, answer.token_ids, trained.module)
    for step, entry in enumerate(answer.logprobs):
        assert entry.logprob == pytest.approx(expected[step, entry.token_id].item(), abs=2e-3)
