"""Log-probabilities of a prompt, scored by its first choice alone and told with each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from serve.engine.request import Event, TokenLogprob


class PromptScores:
    """Of one HTTP request's rows, which are numbered over prompts, then over choices."""

    def __init__(self, num_choices: int) -> None:
        self._num_choices = num_choices
        self._scored: dict[int, tuple[TokenLogprob, ...]] = {}  # by prompt
        self._told: set[int] = set()  # rows
        self._waiting: defaultdict[int, list[tuple[int, Event]]] = defaultdict(list)  # by prompt

    def pass_on(self, row: int, event: Event) -> Sequence[tuple[int, Event]]:
        """What may be told now that a row's event has come: other choices' first ones wait for the first choice's."""
        prompt, choice = divmod(row, self._num_choices)
        if choice:
            self._waiting[prompt].append((row, event))
        elif prompt in self._scored:
            return [(row, event)]
        else:
            self._scored[prompt] = event.prompt_logprobs
        if prompt not in self._scored:
            return []
        others = [(each, self._with_scores(each, told)) for each, told in self._waiting.pop(prompt, ())]
        return others if choice else [(row, event), *others]

    def _with_scores(self, row: int, event: Event) -> Event:
        if row in self._told:
            return event
        self._told.add(row)
        return event._replace(prompt_logprobs=self._scored[row // self._num_choices])
