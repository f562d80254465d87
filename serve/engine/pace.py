"""How long steps take, learned as they run, and how many tokens of prompts one may hold. No arrays, and no clock.

A forward takes a fixed time, for the weights are read once, and more for each row or token:

    a step = [fixed + rows · each  if rows decode] + [fixed + tokens · each  if prompts are computed]

What is noted is what a step ran and how long that took; the shortest of the last few, and medians, leave out what a
first touch, a compilation or a busy machine has cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

FIRST_TOKENS = 512
"""Of prompts beside decoding rows, while nothing is known of how long they take."""
LEAST_TOKENS = 16
"""A step has so many tokens of prompts whatever they take: prompts go on."""
GAP_FORWARDS = 28
"""What decoding rows wait where nobody says: so many times the fixed part of a forward. To stop for them costs the
prompts one such part or two, so a prompt is computed nearly as fast as if nobody decoded."""
USUAL_ROWS = 20
"""Decoding rows that take as long as the fixed part, most often."""
NUM_KEPT = 9
NUM_NEEDED = 2


class Pace:
    """What decoding rows wait for prompts, and what can be computed in that time. Driven by `note`."""

    def __init__(self, max_gap_s: float | None = None) -> None:
        """`max_gap_s`: the longest that rows are to wait in one step; None: see GAP_FORWARDS."""
        self.max_gap_s = max_gap_s
        self._decode: dict[
            int, deque[tuple[int, float]]
        ] = {}  # by bits of the number of rows: (rows, seconds)
        self._prefill: deque[tuple[int, int, float]] = deque(maxlen=NUM_KEPT)  # (rows, tokens, seconds)
        self._max_tokens: int | None = None  # None: to be worked out

    def note(self, num_rows: int, num_tokens: int, duration_s: float) -> None:
        """A step has run a token of so many rows, and so many tokens of prompts, padding included."""
        if num_tokens >= LEAST_TOKENS:
            self._prefill.append((num_rows, num_tokens, duration_s))
        elif num_rows and not num_tokens:
            self._decode.setdefault(num_rows.bit_length(), deque(maxlen=NUM_KEPT)).append(
                (num_rows, duration_s)
            )
        self._max_tokens = None

    @property
    def max_tokens(self) -> int:
        """Tokens of prompts, padding included, that a step may hold beside decoding rows."""
        if self._max_tokens is None:
            self._max_tokens = self._worked_out()
        return self._max_tokens

    @property
    def gap_s(self) -> float | None:
        """What decoding rows may wait for prompts in one step; None while that is not known."""
        if self.max_gap_s is not None:
            return self.max_gap_s
        fixed_s, _ = self._row_times()
        return GAP_FORWARDS * fixed_s if fixed_s else None

    def prompts_s(self, num_tokens: int) -> float | None:
        """How long a step would take that has so many tokens of prompts and nothing else; None while that is not
        known."""
        return self._row_times()[0] + num_tokens * self._token_s() if self._is_known else None

    @property
    def _is_known(self) -> bool:
        """How long tokens of prompts take."""
        return len(self._prefill) >= NUM_NEEDED

    def _worked_out(self) -> int:
        gap_s = self.gap_s
        if gap_s is None or not self._is_known:
            return FIRST_TOKENS
        return max(int((gap_s - self._row_times()[0]) / self._token_s()), LEAST_TOKENS)

    def _token_s(self) -> float:
        """What a token of a prompt adds to a step that has others."""
        fixed_s, row_s = self._row_times()
        times = []
        for num_rows, num_tokens, duration_s in self._prefill:
            others_s = fixed_s + (fixed_s + num_rows * row_s if num_rows else 0)
            # Something of a step is its tokens', whatever is thought of the rest.
            times.append(max(duration_s - others_s, duration_s / 4) / num_tokens)
        return _median(times)

    def _row_times(self) -> tuple[float, float]:
        """Of a decode step: its fixed part and what a row adds, in seconds; 0 while nothing is known."""
        points = [
            # The shortest: such steps are so short that a busy machine makes most of them longer.
            (sum(rows for rows, _ in kept) / len(kept), min(duration_s for _, duration_s in kept))
            for kept in self._decode.values()
            if len(kept) >= NUM_NEEDED
        ]
        if not points:
            return 0.0, 0.0
        mean_rows = sum(rows for rows, _ in points) / len(points)
        mean_s = sum(duration_s for _, duration_s in points) / len(points)
        # Where steps were of nearly equally many rows, they say little of what one adds: then it is this.
        usual_s, weight = mean_s / (mean_rows + USUAL_ROWS), (mean_rows / 2) ** 2
        spread = sum((rows - mean_rows) ** 2 for rows, _ in points) + weight
        slope = sum((rows - mean_rows) * (duration_s - mean_s) for rows, duration_s in points)
        row_s = min(max((slope + weight * usual_s) / spread, 0.0), 0.75 * mean_s / mean_rows)
        return mean_s - row_s * mean_rows, row_s


def _median(values: Sequence[float]) -> float:
    """Of two, the lower: a step is late by accident, and never early."""
    return sorted(values)[(len(values) - 1) // 2]
