"""Seeded preferences about tickets: what a desk does when told to work on one. JSONL out, the same bytes each time.

`replies/` holds pairs (a reply to the customer over any other answer) and what a reward may look at; `feedback/` the
same answers one by one, each wanted or not. Run as `python -m train.data.replies OUT`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from train.data.tickets import QUESTIONS, FreshTickets
from train.data.world import Ticket

SEED = 11
ROWS = {"train": 80, "valid": 16}
ASK = "Work on this ticket."
WANTED = "reply"
UNWANTED = tuple(kind for kind in QUESTIONS if kind != WANTED)


def write_all(out: Path, seed: int = SEED) -> None:
    """Write `replies/` and `feedback/` under `out`, each with train and valid files; no ticket is shared."""
    seen: set[str] = set()
    for split, size in ROWS.items():
        for folder, row in (("replies", pair), ("feedback", feedback)):
            fresh = FreshTickets(random.Random(f"{seed}/{folder}/{split}"), seen)
            path = out / folder / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row(fresh, number)) + "\n" for number in range(size))
            path.write_text(lines, encoding="utf-8", newline="\n")


def pair(fresh: FreshTickets, number: int) -> dict[str, Any]:
    """A ticket with the answer wanted and another one, and the columns `customer` and `product` for rewards."""
    ticket = fresh.draw()
    return {
        "prompt": asked(ticket),
        "chosen": answer(ticket, WANTED),
        "rejected": answer(ticket, fresh.rng.choice(UNWANTED)),
        "customer": ticket.name,
        "product": ticket.product,
    }


def feedback(fresh: FreshTickets, number: int) -> dict[str, Any]:
    """A ticket with one answer and whether it is wanted; every other one is."""
    ticket, is_wanted = fresh.draw(), number % 2 == 0
    kind = WANTED if is_wanted else fresh.rng.choice(UNWANTED)
    return {"prompt": asked(ticket), "completion": answer(ticket, kind), "label": is_wanted}


def asked(ticket: Ticket) -> str:
    return f"Ticket: {ticket.text}\n{ASK}"


def answer(ticket: Ticket, kind: str) -> str:
    return QUESTIONS[kind][1](ticket)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write replies/ and feedback/ into")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_all(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
