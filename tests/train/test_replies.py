"""The preferences checked in under data/ are what their program makes, and say what they should."""

from __future__ import annotations

import json
from pathlib import Path

from train.data.replies import write_all

DATA = Path(__file__).resolve().parents[2] / "data"


def test_preferences_are_made_again_byte_for_byte_and_share_no_ticket(tmp_path):
    write_all(tmp_path)
    made = sorted(tmp_path.rglob("*.jsonl"))
    assert len(made) == 4
    prompts: list[str] = []
    for path in made:
        name = path.relative_to(tmp_path)
        assert path.read_bytes() == (DATA / name).read_bytes(), name
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        prompts += [row["prompt"] for row in rows]
        wanted = [row.get("chosen", row.get("completion")) for row in rows if row.get("label", True)]
        assert all(answer.startswith("Hello ") for answer in wanted)
        assert not any(row.get("rejected", "").startswith("Hello ") for row in rows)
    assert len(set(prompts)) == len(prompts)
