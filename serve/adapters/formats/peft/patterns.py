"""Which modules a PEFT config names: PEFT's own rules, word for word, under a time limit.

The expressions come from a stranger's file, and Python's `re` may look for hours, holding every thread up meanwhile;
`regex` matches alike and can be told when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import regex

from serve.errors import AdapterError

TIMEOUT_S = 2.0
"""Of this thread's own time, for all that one config asks: a file of experts asks often, and others may be busy."""
QUICK_S = 0.01
"""For so long a match may hold other threads up: to give way at each of thousands is to wait for them at each."""
EVERY_LINEAR = "all-linear"


class Matcher:
    """`re.match` and `re.fullmatch` for the expressions of one config. AdapterError where one takes too long."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._left_s = timeout_s

    def match(self, pattern: str, name: str) -> regex.Match[str] | None:
        """At the beginning of `name`."""
        return self._timed(regex.match, pattern, name)

    def fullmatch(self, pattern: str, name: str) -> regex.Match[str] | None:
        """All of `name`."""
        return self._timed(regex.fullmatch, pattern, name)

    def _timed(self, search: Callable[..., Any], pattern: str, name: str) -> Any:
        start = time.thread_time()
        try:
            if self._left_s <= 0:
                raise TimeoutError
            try:
                return search(pattern, name, timeout=min(QUICK_S, self._left_s))
            except TimeoutError:
                return search(pattern, name, timeout=self._left_s, concurrent=True)
        except TimeoutError:
            raise AdapterError(
                f"the expression {pattern!a:.80} takes too long to match {name!a:.80}"
            ) from None
        finally:
            self._left_s -= time.thread_time() - start


def is_expression(pattern: str) -> bool:
    """Whether it can be matched at all."""
    try:
        regex.compile(f"(.*\\.)?({pattern})$")
    except (regex.error, RecursionError, OverflowError):
        return False
    return True


def pattern_of(patterns: Iterable[str], name: str, matcher: Matcher) -> str | None:
    """The first of `patterns` (of rank_pattern, of alpha_pattern) that means the module `name`."""
    return next((key for key in patterns if matcher.match(rf"(.*\.)?({key})$", name)), None)


@dataclass(frozen=True)
class Targets:
    """What a PEFT config adapts, in its words."""

    modules: tuple[str, ...] | str | None = None
    """Ends of names, or an expression for whole ones."""
    parameters: tuple[str, ...] = ()
    """Ends of names of parameters."""
    exclude: tuple[str, ...] | str = ()
    save: tuple[str, ...] = ()
    """Modules that train whole."""
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    matcher: Matcher = field(default_factory=Matcher, compare=False)

    def is_module(self, name: str) -> bool:
        """Whether the module gets an update as a module."""
        match, fullmatch = self.matcher.match, self.matcher.fullmatch
        if isinstance(self.exclude, str):
            if fullmatch(self.exclude, name):
                return False
        elif _ends_as(name, self.exclude):
            return False
        if any(match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.save):
            return False
        if self.modules is None:
            return False
        if isinstance(self.modules, str):
            return self.modules == EVERY_LINEAR or fullmatch(self.modules, name) is not None
        # As PEFT has it: a whole name is meant, whatever `layers` say.
        return name in self.modules or (_ends_as(name, self.modules) and self._is_in_layers(name))

    def parameters_of(self, name: str) -> tuple[str, ...]:
        """Its parameters that get an update, first to last as the module has them."""
        ends = [tuple(target.rpartition(".")[::2]) for target in self.parameters]
        own = {leaf for module, leaf in ends if not module or _ends_as(name, (module,))}
        return tuple(sorted(own, key=lambda leaf: (PARAMETER_ORDER.get(leaf, 0), leaf)))

    def _is_in_layers(self, name: str) -> bool:
        if not self.layers:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        found = (self.matcher.match(rf"{pattern}\.(?P<idx>\d+)\.", name) for pattern in patterns)
        first = next((match for match in found if match), None)
        return first is not None and int(first["idx"]) in self.layers


PARAMETER_ORDER: Mapping[str, int] = {"gate_up_proj": 1, "up_proj": 1, "gate_up_proj_bias": 2, "down_proj": 3}
"""In which order transformers' stacks of experts have their parameters."""


def _ends_as(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
