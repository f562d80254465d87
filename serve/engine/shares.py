"""Whose turn it is, by what each has had: weighted fair queueing over tenants, and over adapters inside a tenant.

Each class is charged for the tokens that its rows run, over its weight, and the one with the least charged is next
(virtual token counters, Sheng et al. 2024). Who comes back after a while begins where the others are: time in which
nothing was asked saves nothing up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from serve.engine.plan import SequenceState

Class = tuple[str, ...]
"""(tenant,) or (tenant, adapter); "" where nobody has said weights of that kind."""


class Shares:
    """What each class has been charged. A kind without weights makes no classes: all are one."""

    def __init__(
        self, adapters: Mapping[str, float] | None = None, tenants: Mapping[str, float] | None = None
    ) -> None:
        """Weights by name, of the base by ""; those left out have 1."""
        self._adapters = adapters or {}
        self._tenants = tenants or {}
        self._charged: dict[Class, float] = {}
        self._num_open: Counter[Class] = Counter()

    @property
    def is_used(self) -> bool:
        """Somebody has said weights."""
        return bool(self._adapters or self._tenants)

    def enter(self, sequence: SequenceState) -> None:
        """One more of its classes. A class that had none begins where the least charged of the others is."""
        for one in self._classes(sequence):
            if not self._num_open[one]:
                others = [
                    charged
                    for other, charged in self._charged.items()
                    if self._num_open[other] and len(other) == len(one) and other[:-1] == one[:-1]
                ]
                self._charged[one] = max(self._charged.get(one, 0.0), min(others, default=0.0))
            self._num_open[one] += 1

    def leave(self, sequence: SequenceState) -> None:
        """One fewer. What nobody is in is forgotten, but for how far it was ahead of those that are."""
        for one in self._classes(sequence):
            self._num_open[one] -= 1
            if not self._num_open[one]:
                del self._num_open[one]
        if not self._num_open:
            self._charged.clear()
        elif len(self._charged) > 1000 + 2 * len(self._num_open):
            self._charged = {one: charged for one, charged in self._charged.items() if one in self._num_open}

    def charge(self, sequences: Iterable[tuple[SequenceState, int]]) -> None:
        """Tokens that each has run."""
        for sequence, num_tokens in sequences:
            tenant, adapter = self._classes(sequence)
            self._charged[tenant] += num_tokens / self._tenants.get(tenant[0], 1.0)
            self._charged[adapter] += num_tokens / self._adapters.get(adapter[1], 1.0)

    def turn(self, sequence: SequenceState) -> tuple[float, ...]:
        """The lower, the earlier: of its tenant, then of its adapter there."""
        return tuple(self._charged[one] for one in self._classes(sequence))

    def _classes(self, sequence: SequenceState) -> tuple[Class, Class]:
        request = sequence.request
        tenant = request.tenant if self._tenants else ""
        adapter = request.adapter.name if self._adapters and request.adapter is not None else ""
        return (tenant,), (tenant, adapter)
