"""Generated traffic: whatever arrives, is cancelled, loaded, replaced or unloaded, each answer is its own.

A few seeds run always, many under `-m large`.
"""

from __future__ import annotations

import random
from functools import partial

import pytest

from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request
from serve.model.loading import load

NUM_REQUESTS = 16
WORDS = [
    "ticket",
    "lamp",
    "broken",
    "urgent",
    "hello",
    "maria",
    "please",
    "refund",
    "7",
    "Grüße",
    "日本",
    "\n",
]


def random_request(rng: random.Random, index: int, make_request, adapter) -> Request:
    text = " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 10, 40])))
    sampling = rng.choice(
        [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}, {"temperature": 1.2, "top_k": 9}]
    )
    return make_request(
        f"r{index}",
        text,
        max_tokens=rng.randint(1, 40),
        adapter=adapter,
        seed=rng.getrandbits(40),
        **sampling,
    )


def run_traffic(
    engine: Engine, rng: random.Random, folders, make_request
) -> dict[str, tuple[Request, str, list]]:
    """Random arrivals, cancellations and adapter changes. id → (request, folder, tokens) of what ended."""
    registry, answers, live = engine.registry, {}, {}
    source: dict[str, str] = {}
    index = 0
    while index < NUM_REQUESTS or engine.has_work:
        event = rng.random()
        if event < 0.15:
            name, folder = rng.choice("ab"), rng.choice(folders)
            source[registry.load(name, folder, replace=True).id] = folder
        elif event < 0.2 and registry.names():
            registry.unload(rng.choice(registry.names()))
        elif event < 0.6 and index < NUM_REQUESTS:
            name = rng.choice([None, *registry.names()])
            version = registry.acquire(name) if name else None
            request = random_request(rng, index, make_request, version)
            live[request.id] = (request, source[version.id] if version else "", [])
            engine.add(request)
            index += 1
        elif event < 0.65 and live:
            gone = rng.choice(list(live))
            assert engine.cancel(gone).finish == "cancelled"
            request, _, _ = live.pop(gone)
            if request.adapter:
                registry.release(request.adapter)
        if engine.has_work:
            for event in engine.step():
                request, _, tokens = live[event.request_id]
                tokens += event.token_ids
                if event.finish:
                    answers[event.request_id] = live.pop(event.request_id)
                    if request.adapter:
                        registry.release(request.adapter)
            engine.scheduler.check_integrity()
        registry.check_integrity()
    assert not live
    return answers


@pytest.fixture
def check_traffic(make_request, merged, assert_drawn):
    """check_traffic(seed, model_folder, adapter_folders): each answer is what its adapter draws merged and alone."""
    return partial(_check_traffic, make_request, merged, assert_drawn)


def _check_traffic(make_request, merged, assert_drawn, seed: int, model_folder, folders) -> None:
    rng = random.Random(seed)
    limits = EngineLimits(
        max_rows=rng.choice([1, 3, 8]),
        prefill_chunk_tokens=rng.choice([5, 32, 256]),
        max_adapters=24,
        ahead=seed % 2 == 1,
    )
    engine = Engine(load(str(model_folder), name="lively"), limits)
    answers = run_traffic(engine, rng, [str(folder) for folder in folders], make_request)
    modules = {str(folder): merged(model_folder, folder) for folder in folders}
    modules[""] = load(str(model_folder)).network.module
    for request, folder, tokens in answers.values():
        assert len(tokens) == request.sampling.max_tokens
        assert_drawn(request, tokens, modules[folder])


@pytest.fixture
def adapters(make_adapter):
    return [make_adapter(1), make_adapter(2, rank=7), make_adapter(3, keys=["self_attn.v_proj"])]


@pytest.fixture(params=["mamba2", "qwen3_next"])
def recurrent(request, recurrent_folder, make_adapter_of):
    """A recurrent model's folder, and its adapters'."""
    folder = recurrent_folder(request.param)
    keys = ["mixer.in_proj", "linear_attn.in_proj_qkvz", "linear_attn.out_proj"]
    return folder, [make_adapter_of(folder, 1, keys=keys), make_adapter_of(folder, 2, rank=7, keys=keys[:2])]


@pytest.mark.parametrize("seed", range(3))
def test_each_answer_in_generated_traffic_is_what_it_is_alone(seed, model_folder, adapters, check_traffic):
    check_traffic(seed, model_folder, adapters)


@pytest.mark.parametrize("seed", range(2))
def test_each_answer_of_a_recurrent_model_in_generated_traffic_is_what_it_is_alone(
    seed, recurrent, check_traffic
):
    check_traffic(seed, *recurrent)


@pytest.mark.large
@pytest.mark.parametrize("seed", range(100, 180))
def test_each_answer_in_much_generated_traffic_is_what_it_is_alone(
    seed, model_folder, adapters, check_traffic
):
    check_traffic(seed, model_folder, adapters)


@pytest.mark.large
@pytest.mark.parametrize("seed", range(200, 240))
def test_each_answer_of_a_recurrent_model_in_much_generated_traffic_is_what_it_is_alone(
    seed, recurrent, check_traffic
):
    check_traffic(seed, *recurrent)
