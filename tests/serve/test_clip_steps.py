"""Where pictures and clips stand, by transformers' own get_rope_index; mlx-vlm's knows nothing of seconds.

vllm 47736, transformers 41152 and 48669, lmms-eval 1393: clips of one second and of thirty had the same positions, or
all of their frames had one.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from sighted import Eyes, shown

from serve.media.content import Clip
from serve.model.prompt import Prompt

torch = pytest.importorskip("torch")

SECONDS = (1.0, 0.5, 1 / 3, 0.25, 0.125, 1.7)
"""Between two frames of a clip."""


def of(seconds: float, num_frames: int, seed: int) -> Clip:
    frames = [shown(seed + number) for number in range(num_frames)]
    return Clip(tuple(frames), tuple(number * seconds for number in range(num_frames)))


def grids_of(prompt: Prompt, name: str) -> Any:
    """[n, 3] of pictures or of whole clips."""
    rows: list[list[int]] = []
    stop = -1
    for media in prompt.media:
        if name in media.inputs:
            row = np.asarray(media.inputs[name])[0].tolist()
            if media.start == stop:
                rows[-1][0] += row[0]
            else:
                rows.append(row)
            stop = media.stop
    return torch.tensor(rows)


def hugging_face(family: str, config: dict[str, Any], prompt: Prompt, seconds: list[float]) -> np.ndarray:
    """[3, T]. seconds: a piece of each clip."""
    from transformers import AutoConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni

    told = AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"})
    ids = torch.tensor([prompt.token_ids])
    grids = {name: grids_of(prompt, name) for name in ("image_grid_thw", "video_grid_thw")}
    if family == "qwen3_omni_moe":
        model = omni.Qwen3OmniMoeThinkerForConditionalGeneration.__new__(
            omni.Qwen3OmniMoeThinkerForConditionalGeneration
        )
        torch.nn.Module.__init__(model)
        model.config, model.spatial_merge_size = told.thinker_config, 2
        times = {"attention_mask": torch.ones_like(ids), "second_per_grids": torch.tensor(seconds)}
        return model.get_rope_index(ids, **grids, **times)[0][:, 0].numpy()
    kind = {"qwen2_5_vl": Qwen2_5_VLModel, "qwen2_vl": Qwen2VLModel}[family]
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.config = told
    types = (ids == config["image_token_id"]) * 1 + (ids == config["video_token_id"]) * 2
    times = {"second_per_grid_ts": torch.tensor(seconds)} if family == "qwen2_5_vl" else {}
    return model.get_rope_index(ids, types.int(), **grids, **times)[0][:, 0].numpy()


@pytest.fixture(scope="module")
def eyes(vlm_folder):
    return lambda family: (
        Eyes(family, vlm_folder(family)),
        json.loads((vlm_folder(family) / "config.json").read_text()),
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_omni_moe"])
def test_clips_stand_in_time_as_in_hugging_face(family, eyes):
    """Among words and pictures, several a prompt, a rate that is no whole number of positions, frames left out."""
    ours, config = eyes(family)
    different = set()
    for seconds in SECONDS:
        clips = of(seconds, 6, seed=1), of(2 * seconds, 3, seed=50)
        prompt = ours.prompt([40, 41], clips[0], [42], shown(3, 56, 84), [43, 44], clips[1], [45] * 5)
        found = prompt.rope.positions
        expected = hugging_face(family, config, prompt, [2 * seconds, 4 * seconds])
        ids = np.array(prompt.token_ids)
        edges = np.flatnonzero(np.diff(ids)) + 1  # where words, a picture, a clip begin
        for start, stop in pairwise([0, *edges.tolist(), len(ids)]):
            inside, theirs = found[:, start:stop], expected[:, start:stop]
            whole = np.floor(theirs - theirs.min() + 1e-4)  # in one of the two models positions are fractions
            np.testing.assert_array_equal(inside - inside.min(), whole, err_msg=str(seconds))
            # Behind all there was: transformers since 5.3 lets words begin in the midst of a clip that lasts.
            assert inside.min() == found[:, :start].max(initial=-1) + 1
        assert prompt.rope.delta == found.max() + 1 - len(ids)
        different.add(found.tobytes())
    assert len(different) == 1 if family == "qwen2_vl" else len(different) >= 5


def test_a_prefix_of_the_same_frames_at_another_pace_is_another_one(eyes):
    keys = {}
    for family in ("qwen2_vl", "qwen2_5_vl"):
        ours, _ = eyes(family)
        slow, fast, longer = (
            ours.prompt([40], of(seconds, count, seed=1))
            for seconds, count in ((0.5, 4), (0.25, 4), (0.5, 6))
        )
        assert [media.key for media in slow.media] == [media.key for media in fast.media], (
            "features are shared"
        )
        assert list(longer.keys[: longer.media[1].stop]) == list(slow.keys[: slow.media[1].stop])
        keys[family] = slow.keys == fast.keys
    assert keys == {"qwen2_vl": True, "qwen2_5_vl": False}
