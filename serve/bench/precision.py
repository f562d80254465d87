"""What quantized keys and values save: bytes of a row against 16 bit, and the peak of a long prompt against plain.

Bytes are counted for a model that computes in 16 bit; the peak is measured in what the machine serves in.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.bench.finding import Finding
from serve.bench.precision_child import Measured
from serve.bench.servers import PYTHON
from serve.cache.capacity import Bucket, positions_capacity
from serve.cache.families import make_rows
from serve.cache.precision import PLAIN, KvPrecision
from serve.engine.engine import EngineLimits
from serve.errors import StoppedError
from serve.model.loading import load

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
    """Bytes are counted here, and each prompt is computed in a process of its own."""
    progress("bytes of rows")
    forms = {bits: KvPrecision(**_affine(bits)) for bits in ASKED_BYTES}
    plain_row, *rows = _row_bytes(model, [PLAIN, *forms.values()], setting.num_prompt_tokens)
    plain: list[Measured] = []
    peaks: dict[int, list[Measured]] = {bits: [] for bits in ASKED_BYTES}
    for number in range(setting.rounds):
        progress(f"round {number + 1} of {setting.rounds}: {setting.num_prompt_tokens} tokens, plain")
        plain.append(_child(model, {}, setting))
        for bits, measured in peaks.items():
            progress(
                f"round {number + 1} of {setting.rounds}: {setting.num_prompt_tokens} tokens, {bits} bit"
            )
            measured.append(_child(model, _affine(bits), setting))
    return [
        *(_bytes_finding(bits, row, plain_row, setting) for bits, row in zip(forms, rows, strict=True)),
        *(_peak_finding(bits, measured, plain, setting) for bits, measured in peaks.items()),
    ]


def _row_bytes(model: Path, precisions: Sequence[KvPrecision], num_tokens: int) -> list[int]:
    """Of a row of so many tokens in each, as the rows count them where the model computes in 16 bit."""
    network = load(str(model), dtype="bfloat16").network
    cost = make_rows(network, prefill_chunk_tokens=EngineLimits().window_chunk_tokens).cost
    positions = positions_capacity(num_tokens)
    return [cost.row_bytes(Bucket(form.at(num_tokens), positions)) for form in precisions]


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


def _child(model: Path, precision: Mapping[str, Any], setting: Setting) -> Measured:
    """Raises StoppedError with the end of what it said, if it fails."""
    asked = {"model": str(model), "precision": precision, "num_tokens": setting.num_prompt_tokens}
    words = [*PYTHON, "serve.bench.precision_child", json.dumps(asked)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-QUOTED_LINES:])
        raise StoppedError(
            f"a process that measures {precision or 'plain'} ended with {done.returncode}:\n{said}"
        )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))
