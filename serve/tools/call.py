"""A call of a tool, as an answer holds it: whole, and in the pieces that a stream brings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallPiece:
    """What became known of one call. The first piece of a call has its id and its name; `arguments` of all pieces
    join to the JSON text."""

    index: int
    """Of the call among the answer's calls."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class Call:
    """One call, as it grows."""

    id: str
    name: str
    arguments: str = ""
    """JSON text."""


def add_pieces(calls: list[Call], pieces: tuple[CallPiece, ...]) -> None:
    """Append what `pieces` brought to the calls they belong to. A call's first piece names it."""
    for piece in pieces:
        if piece.index == len(calls):
            calls.append(Call(piece.id or "", piece.name or ""))
        calls[piece.index].arguments += piece.arguments
