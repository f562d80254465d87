"""Hugging Face's transformers, with torch, as the oracle of what mlx-vlm's own code leaves out or does by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from vlm_families import LARGE_VLM_FAMILIES, Reference, message, picture, write_vlm

from serve.media.content import Picture
from serve.media.processor import MediaProcessor, load_processor
from serve.model.loading import load

torch = pytest.importorskip("torch")

from vlm_hugging_face import hugging_face_gemma3  # noqa: E402


@pytest.mark.parametrize(
    "window",
    [
        pytest.param(16, id="window of four pictures", marks=pytest.mark.large),
        pytest.param(3, id="window within a picture"),
    ],
)
def test_gemma3_sees_its_pictures_both_ways_as_in_hugging_face(window, tmp_path):
    folder = write_vlm("gemma3", tmp_path / "gemma3")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = window
    (folder / "config.json").write_text(json.dumps(config))
    reference, theirs = Reference(folder), hugging_face_gemma3(folder)
    for parts in [
        ("hello there",),
        (picture(1), "what is this?"),
        (picture(1), "or", picture(2), picture(3), "?"),
    ]:
        row = reference.row([message(*parts)])
        ids = torch.tensor([row.token_ids])
        pixels = {name: torch.from_numpy(np.array(value)) for name, value in row.inputs.items()}
        with torch.no_grad():
            types = (ids == theirs.config.image_token_id).long()
            expected = theirs(input_ids=ids, token_type_ids=types, **pixels).logits[0, -1].numpy()
        found = np.array(reference.logits(row)[0])
        assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    "family", [each for each in LARGE_VLM_FAMILIES if "internvl_chat" not in each.values]
)
def test_a_picture_is_prepared_as_by_hugging_face(family, vlm_folder):
    """Of each size: as it is, shrunk, enlarged, and neither square nor a multiple of patches. internvl_chat's is
    remote code there."""
    from transformers import AutoImageProcessor

    folder = vlm_folder(family)
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    ours = MediaProcessor(folder, load_processor(folder), load(str(folder)).vision)
    for seed, (width, height) in enumerate([(56, 56), (300, 200), (40, 61), (33, 130)]):
        shown = picture(seed, width, height)
        (piece,) = ours.process(Picture(np.asarray(shown))).pieces
        expected = theirs(images=[shown], return_tensors="np")
        found = np.asarray(piece.inputs["pixel_values"])
        # Some batch pictures by row of text.
        wanted = np.asarray(expected["pixel_values"]).reshape(found.shape)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        for name in expected.keys() & piece.inputs.keys() - {"pixel_values"}:
            np.testing.assert_array_equal(
                np.asarray(piece.inputs[name]).ravel(), np.asarray(expected[name]).ravel()
            )
