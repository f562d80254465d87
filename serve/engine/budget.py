"""What one step, and all rows together, may take: the bounds of the scheduler, made of an engine's limits. No mlx."""

from __future__ import annotations

from dataclasses import dataclass

from serve.cache.capacity import RowCost


@dataclass(frozen=True)
class Budget:
    """Bounds that hold as long as the engine does."""

    max_rows: int
    prefill_chunk_tokens: int
    """Tokens of prompts in one step, padding included."""
    max_bytes: int
    """Memory of all rows together, their buffers' rounding included."""
    row_cost: RowCost
    row_chunk_tokens: int | None = None
    """Of one prompt among them; None: all."""
    encode_patches: int = 1024

    @property
    def is_recurrent(self) -> bool:
        """Rows keep a state that takes in every token of a forward, padding too."""
        return self.row_cost.state_bytes > 0
