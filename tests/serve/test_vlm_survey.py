"""The survey of mlx-vlm's folders: what it is known to find, and that no folder takes the others with it."""

from __future__ import annotations

import pytest
from vlm_survey import folders, surveyed

BATCH = (
    *("aya_vision", "dots_ocr", "glm4v", "glm4v_moe", "glm_ocr", "kimi_vl", "llmjpvl", "locateanything"),
    "step3p7",
)


@pytest.mark.large
def test_rows_of_further_families_share_a_batch():
    found = {verdict.folder: verdict for verdict in surveyed(BATCH)}
    assert {folder: found[folder].kind for folder in BATCH} == dict.fromkeys(BATCH, "batches"), found


@pytest.mark.large
def test_every_folder_is_tried_whatever_another_does():
    asked = ["no_such_family", "jina_vlm", "mllama", "siglip", "llama", "gemma3"]
    kinds = {verdict.folder: verdict.kind for verdict in surveyed(asked)}
    assert list(kinds) == asked
    assert kinds["no_such_family"] == "no tiny config"
    assert kinds["mllama"] == "no rows", "its pictures are keys and values of their own"
    assert kinds["siglip"] == "writes no text"
    assert kinds["llama"] == "text alone"
    assert kinds["gemma3"] == "in the family table"
    assert set(asked) - {"no_such_family"} < set(folders())
