"""How a full-precision base is packed as it is loaded: the recipe's and the server's `quantize`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from serve.settings import Problems, Strict

Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
BITS: dict[Mode, tuple[int, ...]] = {
    "affine": (4, 2, 3, 5, 6, 8),
    "mxfp4": (4,),
    "nvfp4": (4,),
    "mxfp8": (8,),
}
GROUP_SIZES: dict[Mode, tuple[int, ...]] = {
    "affine": (64, 32, 128),
    "mxfp4": (32,),
    "nvfp4": (16,),
    "mxfp8": (32,),
}
"""What each of MLX's modes takes, its default first."""


class Quantization(Strict):
    """How a base is packed: the fields of mlx-lm's `quantization` in config.json, each mode with its own defaults."""

    mode: Mode = "affine"
    """affine has a scale and an offset a group; mxfp4, nvfp4 and mxfp8 are small floats with a shared scale."""
    bits: int = Field(default_factory=lambda seen: BITS[seen.get("mode", "affine")][0])
    """Of one weight: 2 to 6, or 8; mxfp4 and nvfp4 have 4, mxfp8 has 8."""
    group_size: int = Field(default_factory=lambda seen: GROUP_SIZES[seen.get("mode", "affine")][0])
    """Weights that share a scale: 32, 64 or 128; mxfp4 and mxfp8 have 32, nvfp4 has 16."""

    def __str__(self) -> str:
        return f"{self.bits} bit {self.mode} in groups of {self.group_size}"

    @model_validator(mode="after")
    def _mlx_has_it(self) -> Quantization:
        problems = []
        for name, table in (("bits", BITS), ("group_size", GROUP_SIZES)):
            if getattr(self, name) not in table[self.mode]:
                allowed = " or ".join(str(value) for value in sorted(table[self.mode]))
                problems.append((name, f"found {getattr(self, name)}; mode {self.mode} takes {allowed}"))
        if problems:
            raise Problems(problems)
        return self
