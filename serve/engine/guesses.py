"""An engine's drafters at work: who is asked for guesses before a step, and what became of them. No arrays."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence

from serve.engine.drafts import MAX_DRAFT, MAX_RESTING, NONE, Drafter, Drafting, DraftStats, Wanted
from serve.engine.gains import MAX_GROUPS, Gains
from serve.engine.plan import Drawn, Plan, SequenceState
from serve.engine.request import Request
from serve.errors import RequestError

logger = logging.getLogger(__name__)


class Guesses:
    """Lives on the engine's thread, but for `check`."""

    def __init__(
        self, drafters: Mapping[str, Drafter], default: str | None, gains: Gains, *, ahead: bool
    ) -> None:
        """`default`: of requests that name none; None: they have no drafter. `ahead`: a step is planned before the
        one before it is read, unless somebody is asked: so rows of which nothing is known rest."""
        assert default is None or default in drafters, f"no drafter is called {default!r}"
        self._drafters = dict(drafters)
        self.default = default or NONE
        """By name; "none": nobody."""
        self._gains = gains
        self._ahead = ahead
        self._num_open = 0  # sequences that have a drafter
        self.stats: dict[str, DraftStats] = {}
        """By adapter's label; the base's by "". Those that drafted last."""

    @property
    def max_bytes(self) -> int:
        """Memory that drafters may come to hold beside the rows."""
        return sum(drafter.max_bytes for drafter in self._drafters.values())

    @property
    def num_bytes(self) -> int:
        """What they hold of that now."""
        return sum(drafter.num_bytes for drafter in self._drafters.values())

    def check(self, request: Request) -> None:
        """RequestError for a drafter that is not here. From any thread."""
        name = request.drafter
        if name is not None and name != NONE and name not in self._drafters:
            known = ", ".join(repr(each) for each in (*self._drafters, NONE))
            raise RequestError(f"drafter is {name!r:.80}; this server has {known}", "drafter")

    def begin(self, sequence: SequenceState) -> None:
        """Choose who drafts for it."""
        name = sequence.request.drafter or self.default
        if name != NONE:
            self._num_open += 1
            sequence.drafting = self._gains.begin(name, self._drafters[name], _adapter_of(sequence))

    def forget(self, sequence: SequenceState) -> None:
        """It has ended."""
        if sequence.drafting is None:
            return
        self._num_open -= 1
        try:
            sequence.drafting.drafter.forget(sequence)
        except Exception:  # its answer is out; what a drafter makes of it is nobody's trouble
            logger.exception("drafter %s cannot forget a sequence", sequence.drafting.name)

    def clear(self, tenant: str | None) -> None:
        """What drafters remember of a tenant's texts, or of everybody's, is dropped."""
        for drafter in self._drafters.values():
            drafter.clear(tenant)

    @property
    def names(self) -> tuple[str, ...]:
        """By which requests may choose one."""
        return tuple(self._drafters)

    def num_wanted(self, decoding: Sequence[SequenceState]) -> int:
        """Guesses for each of these rows that are worth asking for; 0: the next step may be planned as it is."""
        if not self._num_open:
            return 0
        draftings = [_awake(sequence.drafting) for sequence in decoding]
        return self._gains.wanted(draftings, _behind(decoding)) if any(draftings) else 0

    def propose(
        self, decoding: Sequence[SequenceState], ends: Mapping[str, Collection[int]], count: int
    ) -> dict[SequenceState, Sequence[int]]:
        """Guesses, `count` a row at most, as many as pay; rows without any are left out. All tokens are known.

        ends  by request, tokens that end it: nothing is guessed from there on
        """
        asked: dict[str, list[Wanted]] = {}
        for sequence in decoding:
            left = min(sequence.max_total_tokens - sequence.num_tokens - 1, MAX_DRAFT - sequence.num_behind)
            if sequence.drafting is not None and left > 0 and not sequence.drafting.num_resting:
                wanted = Wanted(sequence, min(count, left))
                asked.setdefault(sequence.drafting.name, []).append(wanted)
        drafts: dict[SequenceState, Sequence[int]] = {}
        for name, each in asked.items():
            drafts |= self._ask(name, each, ends, count)
        if not drafts:
            return {}
        counts = [len(drafts.get(sequence, ())) for sequence in decoding]
        behind = _behind(decoding)
        width = self._gains.width([sequence.drafting for sequence in decoding], counts, behind)
        cut = {one: draft[: max(width - 1 - one.num_behind, 0)] for one, draft in drafts.items()}
        return {one: draft for one, draft in cut.items() if draft}

    def _ask(
        self, name: str, wanted: Sequence[Wanted], ends: Mapping[str, Collection[int]], count: int
    ) -> dict[SequenceState, Sequence[int]]:
        began_s = time.perf_counter()
        try:
            proposed = self._drafters[name].propose(wanted)
        except Exception:  # they go on without
            logger.exception("drafter %s has failed", name)
            for sequence, _ in wanted:
                if sequence.drafting is not None:
                    sequence.drafting.num_resting = MAX_RESTING
            return {}
        self._gains.note_guessing(name, len(wanted), count, time.perf_counter() - began_s)
        drafts = {}
        for (sequence, most), guessed in zip(wanted, proposed, strict=True):
            if guessed is None:
                continue
            if sequence.drafting is not None:
                self._gains.note_asked(sequence.drafting, _adapter_of(sequence), bool(guessed))
                if self._ahead:
                    sequence.drafting.note_asked(bool(guessed))
            draft = _before(guessed[:most], ends[sequence.request.id])
            if draft:
                drafts[sequence] = draft
        return drafts

    def note(self, plan: Plan, drawn: Sequence[Drawn], seconds: float | None) -> None:
        """A step was read. `seconds`: what it took, where it did nothing but run one token a row, and guesses."""
        for one in drawn if plan.width > 1 else ():
            drafting = one.sequence.drafting
            if one.num_drafted and drafting is not None and one.token_ids:
                adapter, num_right = _adapter_of(one.sequence), len(one.token_ids) - 1
                self._gains.note_draft(drafting, adapter, one.num_drafted, num_right)
                self.stats[adapter] = self.stats.pop(adapter, DraftStats()).plus(one.num_drafted, num_right)
                if len(self.stats) > MAX_GROUPS:
                    del self.stats[next(iter(self.stats))]
        if seconds is None:
            self._gains.skip_step()
        elif self._drafters:
            num_drawn = sum(len(one.token_ids) for one in drawn)
            if plan.is_split:
                self._gains.note_rerun(plan.num_single, num_drawn, seconds)
            else:
                self._gains.note_step(plan.num_single, plan.width, num_drawn, seconds)


def _adapter_of(sequence: SequenceState) -> str:
    adapter = sequence.request.adapter
    return adapter.label if adapter is not None else ""


def _behind(decoding: Sequence[SequenceState]) -> list[int]:
    return [sequence.num_behind for sequence in decoding]


def _awake(drafting: Drafting | None) -> Drafting | None:
    """The same where it may be asked now; None for a step that it rests."""
    if drafting is None or not drafting.num_resting:
        return drafting
    drafting.num_resting -= 1
    return None


def _before(tokens: Sequence[int], ends: Collection[int]) -> Sequence[int]:
    """Those before the first that is an end."""
    for number, token in enumerate(tokens):
        if token in ends:
            return tokens[:number]
    return tokens
