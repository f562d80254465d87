"""What quantized keys and values save: bytes of a row against 16 bit, and the peak of a long prompt against plain.

Bytes are counted for a model that computes in 16 bit; the peak is measured in what the machine serves in.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.bench.finding import Finding
from serve.bench.precision_child import Measured
from serve.bench.servers import PYTHON
from serve.errors import StoppedError

ASKED_BYTES: Mapping[int, float] = {8: 0.55, 4: 0.30}
"""Bits → share of 16-bit bytes."""
ASKED_PEAK = 1.0
QUOTED_LINES = 15


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    num_prompt_tokens: int = 4096
    rounds: int = 1


def run(setting: Setting, model: Path, progress: Callable[[str], None]) -> list[Finding]:
    """A process for each precision and question."""
    plain_row = _child(model, "bfloat16", {}, setting, is_prefilled=False).row_bytes
    rows, plain = {}, []
    peaks: dict[int, list[Measured]] = {bits: [] for bits in ASKED_BYTES}
    for bits in ASKED_BYTES:
        progress(f"bytes of {bits}-bit keys and values")
        rows[bits] = _child(model, "bfloat16", _affine(bits), setting, is_prefilled=False).row_bytes
    for number in range(setting.rounds):
        progress(f"round {number + 1} of {setting.rounds}: {setting.num_prompt_tokens} tokens, plain")
        plain.append(_child(model, None, {}, setting, is_prefilled=True))
        for bits, measured in peaks.items():
            progress(
                f"round {number + 1} of {setting.rounds}: {setting.num_prompt_tokens} tokens, {bits} bit"
            )
            measured.append(_child(model, None, _affine(bits), setting, is_prefilled=True))
    return [
        *(_bytes_finding(bits, row, plain_row, setting) for bits, row in rows.items()),
        *(_peak_finding(bits, measured, plain, setting) for bits, measured in peaks.items()),
    ]


def _bytes_finding(bits: int, row: int, plain: int, setting: Setting) -> Finding:
    return Finding(
        what=f"bytes of a row of {setting.num_prompt_tokens:,} tokens, {bits} bit over 16",
        ratios=(row / plain,),
        asked=ASKED_BYTES[bits],
        sense="at most",
        values={f"{bits} bit MiB": [row / 2**20], "16 bit MiB": [plain / 2**20]},
    )


def _peak_finding(bits: int, measured: list[Measured], plain: list[Measured], setting: Setting) -> Finding:
    def mib(of: list[Measured]) -> list[float]:
        return [each.prefill_peak_bytes / 2**20 for each in of]

    return Finding(
        what=f"peak memory of a prefill of {setting.num_prompt_tokens:,} tokens, {bits} bit over plain",
        ratios=tuple(a / b for a, b in zip(mib(measured), mib(plain), strict=True)),
        asked=ASKED_PEAK,
        sense="at most",
        values={
            f"{bits} bit MiB": mib(measured),
            "plain MiB": mib(plain),
            f"rows at {bits} bit MiB": [each.held_bytes / 2**20 for each in measured],
            "plain rows MiB": [each.held_bytes / 2**20 for each in plain],
            f"process at {bits} bit MiB": [each.resident_peak_bytes / 2**20 for each in measured],
            "plain process MiB": [each.resident_peak_bytes / 2**20 for each in plain],
            f"prefill at {bits} bit s": [each.prefill_s for each in measured],
            "plain prefill s": [each.prefill_s for each in plain],
        },
    )


def _affine(bits: int) -> dict[str, Any]:
    return {"scheme": "affine", "key_bits": bits, "value_bits": bits}


def _child(
    model: Path, dtype: str | None, precision: Mapping[str, Any], setting: Setting, *, is_prefilled: bool
) -> Measured:
    """Raises StoppedError with the end of what it said, if it fails."""
    asked = {
        "model": str(model),
        "dtype": dtype,
        "precision": precision,
        "num_row_tokens": setting.num_prompt_tokens,
        "num_prompt_tokens": setting.num_prompt_tokens if is_prefilled else 0,
    }
    words = [*PYTHON, "serve.bench.precision_child", json.dumps(asked)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-QUOTED_LINES:])
        raise StoppedError(
            f"a process that measures {precision or 'plain'} ended with {done.returncode}:\n{said}"
        )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))
