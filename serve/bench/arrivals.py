"""When requests come: the seconds after the start at which each is sent, whatever the server does.

The words are vLLM's: a request rate, and how bursty arrivals are. Gaps are gamma distributed with the shape
`burstiness`: 1 is a Poisson process, less is burstier, more is steadier, and inf is one request every 1/rate seconds.
"""

from __future__ import annotations

import math
import random


def offsets(count: int, request_rate: float, burstiness: float, drawn: random.Random) -> list[float]:
    """[count], from 0 on, never decreasing. A rate of inf is a burst: all at once."""
    if math.isinf(request_rate):
        return [0.0] * count
    mean_s = 1 / request_rate
    gaps = (
        mean_s if math.isinf(burstiness) else drawn.gammavariate(burstiness, mean_s / burstiness)
        for _ in range(count - 1)
    )
    found = [0.0]
    for gap_s in gaps:
        found.append(found[-1] + gap_s)
    return found[:count]
