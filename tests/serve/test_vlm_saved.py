"""Folders that see as transformers 5 writes them: its names of settings and tensors, its own logits.

What is fine-tuned elsewhere today comes so. paligemma's, and those of older transformers, have the same names but for
the tower's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sighted import Alone, Eyes, shown

from serve.engine.request import Request, Sampling
from serve.model.loading import load
from serve.model.prompt import Prompt

torch = pytest.importorskip("torch")

ANSWER = [60, 61, 62, 63]
TESTED = ("qwen2_vl", "qwen2_5_vl", "gemma3", "idefics3", "llava")
BATCHED = ("idefics3",)
"""Families whose pixels have an axis of prompts before that of pictures."""


def saved(family: str, source: Path, folder: Path) -> Any:
    """transformers' own model of the tiny family's sizes, of random numbers, saved beside the family's processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source)
    if family == "gemma3":
        config.vision_config.vision_use_head = False
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, value in model.named_parameters():
            is_scale = value.ndim == 1 and "norm" in name and name.endswith("weight") and family != "gemma3"
            value.copy_(torch.randn_like(value) * (0.15 if value.ndim > 1 else 0.02) + is_scale)
    model.save_pretrained(folder)
    return model


def logits_of(model: Any, family: str, prompt: Prompt) -> np.ndarray:
    """[4, V] before each token of the answer."""
    ids = torch.tensor([[*prompt.token_ids, *ANSWER]])
    names = {name for media in prompt.media for name in media.inputs}
    axis = int(family in BATCHED)
    inputs = {
        name: torch.from_numpy(np.concatenate([media.inputs[name] for media in prompt.media], axis=axis))
        for name in names
    }
    config = model.config
    is_picture = (ids == getattr(config, "image_token_id", -1)).int()
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = is_picture
    if family == "gemma3":
        inputs["token_type_ids"] = is_picture.long()
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits[0, len(prompt.token_ids) - 1 : -1].numpy()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, marks=() if each in ("qwen2_5_vl", "llava") else pytest.mark.large)
        for each in TESTED
    ],
)
def test_a_folder_that_transformers_saved_sees_as_it_does_there(family, vlm_folder, tmp_path):
    """unsloth and TRL save so: the first had its settings where nobody looked, the tower of the second no names."""
    theirs = saved(family, vlm_folder(family), tmp_path / family)
    ours, eyes = load(str(tmp_path / family)), Eyes(family, tmp_path / family)
    assert ours.vision is not None, ours.notes
    for size in ((56, 56), (84, 56)):
        prompt = eyes.prompt([40, 41], shown(1), [42, 43], shown(2, *size), [44] * 6)
        expected = logits_of(theirs, family, prompt)
        found = np.array(Alone(ours).logits(Request("r", prompt, Sampling()), ANSWER))
        assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
