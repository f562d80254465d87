"""`a:0.7+b:0.3` → the adapters it adds, and how much of each. Text only; whether a name is known, the caller says.

A name may hold `:` and `+` itself: where a text can be read in several ways, the one whose names are known is meant,
and among those the one with the longest names first. A term without a weight has weight 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from serve.errors import RequestError

MOST_TERMS = 16
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
WEIGHT = re.compile(NUMBER, re.IGNORECASE | re.ASCII)
TOKEN = re.compile(rf":{NUMBER}(?=\+|$)|[^+]|\+", re.IGNORECASE | re.ASCII | re.DOTALL)
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
    pieces = text.split("+")
    terms = _known_terms(pieces, is_known) or _plain_terms(text)
    if terms is None:
        return None
    if len(terms) > MOST_TERMS:
        raise RequestError(
            f"model {text!a:.200} adds {len(terms)} adapters; at most {MOST_TERMS} are added", "model"
        )
    return tuple(terms)


def _known_terms(pieces: Sequence[str], is_known: Callable[[str], bool]) -> list[Term] | None:
    """Terms of names that are all known, made of whole pieces; None if there is no such reading."""
    if len(pieces) > 4 * MOST_TERMS:
        return None  # a name or a weight of each term may hold a few of them
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
    parts = list(_split(text))
    has_weights = any(":" in part and _is_weight(part.rpartition(":")[2]) for part in parts)
    if not has_weights and (len(parts) == 1 or not all(parts)):
        return None  # "c++", or "llama:latest": a name like any other
    return [_term(part, text) for part in parts]


def _split(text: str) -> Iterator[str]:
    """At each `+` but those in a weight: `a:1e+3+b` is two terms."""
    part = ""
    for token in TOKEN.finditer(text):
        if token[0] == "+":
            yield part
            part = ""
        else:
            part += token[0]
    yield part


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
