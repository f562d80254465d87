"""`lathe bench drafters` end to end on a tiny model, and the models that it makes: what they say, not how fast."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import lathe
from serve.bench import drafters, standin
from serve.bench.walks import LEAD_TOKENS, copying_prompt, write_walking_model
from serve.bench.widened import write_widened
from serve.commands.options import EMBEDDED_MODEL
from serve.errors import ConfigError, ModelError
from serve.model.loading import load

pytestmark = pytest.mark.long


def test_the_benchmark_tells_each_ratio_with_sizes_and_shares_of_right_guesses(tmp_path):
    out = tmp_path / "numbers.json"
    words = "bench drafters --size tiny --rounds 1 --max-tokens 48 --prompt-tokens 160 --rows 4 --adapters 2"
    with pytest.raises(SystemExit) as stop:
        lathe.main([*words.split(), "--json", str(out)])
    assert stop.value.code == 0
    found = {each["what"]: each for each in json.loads(out.read_text())["findings"]}
    assert len(found) == 10
    assert all(each["median"] > 0 for each in found.values())
    copied = found["n-grams, copied answers, one row, by the wall"]["values"]
    assert copied["steps"] < copied["steps of the other"] == [48]
    of_model = "a draft model of 0.96M for a target of 28M, one row, by the wall"
    assert 0 < found[of_model]["values"]["right of guesses"][0] <= 1
    assert found["n-grams, answers that stand nowhere, one row, in CPU time"]["asked"] == 0.97


def test_a_walking_model_says_its_text_from_wherever_a_prompt_ends(tmp_path, greedy_by_mlx_lm):
    text = write_walking_model(tmp_path / "walking", mx.float32, standin.TINY)
    module = load(str(tmp_path / "walking")).network.module
    assert len(set(text)) == len(text) > 300
    rng = random.Random(0)
    for first in (5, len(text) - 20):
        prompt = copying_prompt(text, first, 40, 0.1, rng)
        begun = [text[(first + number) % len(text)] for number in range(40)]
        assert sum(a != b for a, b in zip(prompt, begun, strict=False)) < 12
        assert greedy_by_mlx_lm(module, prompt, 30) == tuple(begun[LEAD_TOKENS : LEAD_TOKENS + 30])


def test_a_widened_model_says_what_the_small_one_does_but_for_noise(tmp_path):
    base = load(str(EMBEDDED_MODEL))
    size = replace(drafters.WIDENED, num_layers=4, vocabulary=base.network.vocab_size)
    tokens = mx.array([base.tokenizer.encode("Ticket: My lamp arrived broken.")])
    said, apart = base.network.module(tokens), []
    for noise in (0.0, 0.01, 0.1):
        write_widened(EMBEDDED_MODEL, tmp_path / str(noise), size, noise, mx.float32)
        wider = load(str(tmp_path / str(noise))).network.module
        apart.append(mx.abs(wider(tokens) - said).max().item())
    assert apart[0] < 0.01 < 0.2 < apart[1] < apart[2]


def test_what_cannot_be_widened_or_is_no_small_model_for_its_target_is_refused(tmp_path, model_folder):
    with pytest.raises(ModelError, match="cannot stand in"):
        write_widened(model_folder, tmp_path / "wide", drafters.WIDENED, 0.0, mx.float32)
    setting = drafters.Setting(draft=str(EMBEDDED_MODEL), target=str(EMBEDDED_MODEL), parts=("model",))
    with pytest.raises(ConfigError, match="expected 20 times"):
        drafters.run(setting, Path(tmp_path), lambda _: None, lambda _: None)
