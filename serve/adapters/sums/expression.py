"""`a:0.7+b:0.3` → the adapters it adds, and how much of each. Text only; whether a name is known, the caller says.

A name may hold `:` and `+` itself: where a text can be read in several ways, the one whose names are known is meant,
and among those the one with the longest names first. A term without a weight has weight 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve.adapters.versions.names import LONGEST_NAME
from serve.errors import RequestError

MOST_TERMS = 16
NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
"""Of one text in one way alone, so that no request is looked at for longer than it is long."""
WEIGHT = re.compile(NUMBER, re.IGNORECASE | re.ASCII)
WEIGHTED = re.compile(rf":{NUMBER}(?=\+|$)", re.IGNORECASE | re.ASCII)
MOST_PIECES = 4 * MOST_TERMS
"""Between `+`: a name or a weight of each term may hold a few of them."""
NO_NUMBERS = frozenset(("nan", "inf", "infinity"))
"""What other programs print for numbers that are none: meant as weights, whatever their sign."""
EXPECTED = "expected a finite number like 0.5 or -1"


@dataclass(frozen=True)
class Term:
    """So much of one adapter; `name` may be a version's, `name@N`."""

    name: str
    weight: float


def parse_expression(
    text: str, is_known: Callable[[str], bool] = lambda name: False
) -> tuple[Term, ...] | None:
    """The terms of an expression, as they stand. None: a plain name, which may be known or not.

    RequestError names the term whose weight is no finite number, the one without a name, and too many of them.
    """
    if is_known(text):
        return None
    if text.count("+") >= MOST_PIECES:
        raise _too_many(text, text.count("+") + 1)
    terms = _known_terms(text.split("+"), is_known) or _plain_terms(text)
    if terms is None:
        return None
    if len(terms) > MOST_TERMS:
        raise _too_many(text, len(terms))
    return tuple(terms)


def _too_many(text: str, count: int) -> RequestError:
    return RequestError(f"model {text!a:.200} adds {count} adapters; at most {MOST_TERMS} are added", "model")


def _known_terms(pieces: Sequence[str], is_known: Callable[[str], bool]) -> list[Term] | None:
    """Terms of names that are all known, made of whole pieces; None if there is no such reading."""
    if sum(map(len, pieces)) > MOST_PIECES * LONGEST_NAME:
        return None  # no names are so long
    best: list[list[Term] | None] = [None] * len(pieces) + [[]]
    for start in reversed(range(len(pieces))):
        for stop in range(len(pieces), start, -1):
            rest = best[stop]
            term = None if rest is None else _known_term("+".join(pieces[start:stop]), is_known)
            if rest is not None and term is not None:
                best[start] = [term, *rest]
                break
    return best[0]


def _known_term(text: str, is_known: Callable[[str], bool]) -> Term | None:
    if is_known(text):
        return Term(text, 1.0)
    name, colon, weight = text.rpartition(":")
    if colon and is_known(name) and WEIGHT.fullmatch(weight) and math.isfinite(float(weight)):
        return Term(name, float(weight))
    return None


def _plain_terms(text: str) -> list[Term] | None:
    """Terms of names that nobody knows, or with weights that are none."""
    parts = _split(text)
    has_weights = any(":" in part and _is_weight(part.rpartition(":")[2]) for part in parts)
    if not has_weights and (len(parts) == 1 or not all(parts)):
        return None  # "c++", or "llama:latest": a name like any other
    return [_term(part, text) for part in parts]


def _split(text: str) -> list[str]:
    """At each `+` but those in a weight: `a:1e+3+b` is two terms."""
    covered = WEIGHTED.sub(lambda weight: weight[0].replace("+", "\0"), text)  # which no name holds
    return [part.replace("\0", "+") for part in covered.split("+")]


def _is_weight(text: str) -> bool:
    return WEIGHT.fullmatch(text) is not None or text.lstrip("+-").lower() in NO_NUMBERS


def _term(part: str, text: str) -> Term:
    name, colon, weight = part.rpartition(":")
    if not colon:
        name, weight = part, "1"
    if not name:
        raise RequestError(f"model {text!a:.200}: a term is {part!a:.80}, without a name", "model")
    if not WEIGHT.fullmatch(weight) or not math.isfinite(float(weight)):
        said = f"is {weight!a:.80}" if weight else "is missing behind its ':'"
        raise RequestError(f"model {text!a:.200}: the weight of {name!a:.80} {said}; {EXPECTED}", "model")
    return Term(name, float(weight))
