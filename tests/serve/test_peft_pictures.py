"""PEFT's adapters of models that see: language part and tower under transformers' names; PEFT is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from vlm_families import Reference, message, picture

from serve.adapters.fitting.fit import check_fit, fit
from serve.adapters.fitting.update import LowRank
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.files import read_adapter
from serve.adapters.formats.manifest import write_adapter
from serve.model.loading import LoadedModel

torch = pytest.importorskip("torch", reason="PEFT runs on torch: pip install '.[dev]'")
peft = pytest.importorskip("peft", reason="the oracle: pip install '.[dev]'")

from vlm_hugging_face import hugging_face_gemma3, hugging_face_qwen2_vl  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CLOSE = 1e-3
THEIRS: Mapping[str, Callable[[Path], torch.nn.Module]] = {
    "gemma3": hugging_face_gemma3,
    "qwen2_vl": hugging_face_qwen2_vl,
}
INSIDE = {"gemma3": r"model\.language_model\..*_proj", "qwen2_vl": r"model\.language_model\..*_proj"}
OUTSIDE = {
    "gemma3": r"model\.vision_tower\..*(_proj|fc1|fc2)",
    "qwen2_vl": r"model\.visual\..*(qkv|attn\.proj|fc1|fc2|mlp\.0|mlp\.2)",
}


def written(updates: Mapping[str, LowRank], folder: Path) -> Path:
    """The updates as a folder in mlx-lm's layout, their ranks padded to one."""
    rank = max(update.a.shape[1] for update in updates.values())
    tensors = {}
    for path, update in updates.items():
        more = rank - update.a.shape[1]
        tensors[f"{path}.lora_a"] = mx.pad(update.a, [(0, 0), (0, more)])
        tensors[f"{path}.lora_b"] = mx.pad(update.b, [(0, more), (0, 0)])
    write_adapter(folder, tensors, AdapterConfig("lora", -1, rank, 1.0))
    return folder


@pytest.mark.parametrize("part", ["inside", "outside", "both"])
@pytest.mark.parametrize("family", THEIRS)
def test_an_adapter_of_a_model_that_sees_says_here_what_it_says_there(
    family: str,
    part: str,
    vlm_folder: Callable[[str], Path],
    vlm_reference: Callable[..., Reference],
    opened: Callable[[str], LoadedModel],
    tmp_path: Path,
):
    folder = vlm_folder(family)
    wanted = {"inside": INSIDE[family], "outside": OUTSIDE[family]}
    targets = wanted.get(part, "|".join(wanted.values()))
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=targets, init_lora_weights=False, rank_pattern={"q_proj|qkv": 2}
    )
    model = peft.get_peft_model(THEIRS[family](folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.5)
    model.save_pretrained(tmp_path / "theirs")

    files, network = read_adapter(tmp_path / "theirs"), opened(family).network
    sizes = check_fit("x", files.specs, files.config, network, max_rank=64)
    updates = fit("x", files.read(), files.config, network)
    assert updates.keys() == sizes.keys()
    assert len(updates) == sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    assert len({path.startswith(f"{network.text_path}.") for path in updates}) == (2 if part == "both" else 1)

    plain, ours = vlm_reference(family), vlm_reference(family, written(updates, tmp_path / "ours"))
    row = ours.row([message(picture(1), "what is this?")])
    ids = torch.tensor([row.token_ids])
    pixels = {name: torch.from_numpy(np.array(value)) for name, value in row.inputs.items()}
    types = (ids == model.config.image_token_id).long()
    names = {"gemma3": "token_type_ids", "qwen2_vl": "mm_token_type_ids"}
    with torch.no_grad():
        expected = model(input_ids=ids, **{names[family]: types}, **pixels).logits[0, -1].numpy()
    found, base = (np.array(each.logits(row)[0]) for each in (ours, plain))
    largest = np.abs(expected).max()
    assert np.abs(base - expected).max() > 20 * CLOSE * largest, "the adapter changes nothing"
    assert np.abs(found - expected).max() < CLOSE * largest
