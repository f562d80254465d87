"""The small world of support tickets: closed word lists, and `Ticket`, one letter in it with all its facts.

Everything here is written by hand for Lathe. It knows nothing of chats, files or tokenizers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def words(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


NAMES = words(
    "Maria Omar Lena Jonas Priya Kenji Sofia Pablo Nadia Erik Amina Tomas Greta Hugo Yara Felix "
    "Ines Marco Leila Anton Clara Diego Freya Ivan Julia Karim Mina Oscar Paula Rosa Samir Vera"
)
PRODUCTS = words(
    "lamp kettle router printer keyboard headset monitor charger speaker camera scanner toaster "
    "blender heater fan clock drill vacuum tablet watch mixer radio freezer phone"
)

# topic -> (what the customer writes, what happened); {p} is the product.
PROBLEMS: dict[str, tuple[tuple[str, str], ...]] = {
    "delivery": (
        ("My {p} has not arrived.", "The {p} has not arrived."),
        ("The courier lost my {p}.", "The courier lost the {p}."),
        ("You sent my {p} to the wrong address.", "The {p} went to the wrong address."),
        ("I have waited two weeks for my {p}.", "The {p} is two weeks late."),
        ("Where is the {p} I ordered?", "The {p} is missing."),
    ),
    "damage": (
        ("My {p} arrived broken.", "The {p} arrived broken."),
        ("There is a crack in my new {p}.", "The {p} has a crack."),
        ("My {p} makes smoke.", "The {p} makes smoke."),
        ("A part fell off my {p}.", "A part fell off the {p}."),
        ("My {p} stopped working.", "The {p} stopped working."),
    ),
    "payment": (
        ("I was charged twice for the {p}.", "The {p} was charged twice."),
        ("My card was refused when I bought the {p}.", "The card was refused."),
        ("The bill for my {p} is wrong.", "The bill for the {p} is wrong."),
        ("I paid too much for my {p}.", "The price of the {p} was too high."),
        ("I need an invoice for the {p}.", "An invoice for the {p} is needed."),
    ),
    "account": (
        ("I forgot the password for my {p}.", "The password is lost."),
        ("My {p} says that my account is locked.", "The account is locked."),
        ("I cannot log in with my {p}.", "The login fails."),
        ("Somebody else uses the account of my {p}.", "A stranger uses the account."),
        ("Please change the email for my {p}.", "The email must change."),
    ),
    "setup": (
        ("How do I start my {p}?", "The {p} must be started."),
        ("I cannot connect my {p} to the network.", "The {p} does not connect."),
        ("I lost the manual of my {p}.", "The manual of the {p} is lost."),
        ("My {p} asks for an update.", "The {p} asks for an update."),
        ("Which cable fits my {p}?", "A cable for the {p} is needed."),
    ),
    "return": (
        ("I want to send my {p} back.", "The {p} comes back."),
        ("I ordered the wrong {p}.", "The wrong {p} was ordered."),
        ("I do not like my {p} and want my money back.", "The money must go back."),
        ("Can I swap my {p} for a bigger one?", "The {p} is too small."),
        ("My {p} was a gift and I have one already.", "The {p} is not needed."),
    ),
}
TOPICS = tuple(PROBLEMS)

# urgency -> how the customer says it; most tickets of normal urgency say nothing.
CUES: dict[str, tuple[str, ...]] = {
    "high": ("Please hurry.", "I need help today.", "This is urgent.", "I cannot wait any longer."),
    "normal": ("", "Please help.", "Can you help me?", "Thank you."),
    "low": ("There is no rush.", "Take your time.", "It can wait.", "Answer when you can."),
}
URGENCIES = tuple(CUES)

FILLERS = ("", "", "I bought it last week.", "It is for my office.", "I tried everything.", "It was on sale.")

LAYOUTS = (
    "Hi, this is {name}. {problem} {filler} {cue}",
    "Hello, I am {name}. {problem} {filler} {cue}",
    "My name is {name}. {problem} {filler} {cue}",
    "{name} here. {problem} {cue} {filler}",
    "Hello! {problem} {filler} {cue} Best, {name}",
    "{problem} {filler} {cue} Regards, {name}",
    "{cue} {problem} {filler} Yours, {name}",
    "Good morning. {problem} {cue} {name}",
)

# What only the adapters learn: who handles a topic, and what the house calls an urgency.
TEAMS = {
    "delivery": "logistics",
    "damage": "repairs",
    "payment": "billing",
    "account": "security",
    "setup": "support",
    "return": "warehouse",
}
PRIORITIES = {"high": "P1", "normal": "P2", "low": "P3"}


@dataclass(frozen=True)
class Ticket:
    """One customer's letter and what is true about it."""

    name: str
    product: str
    topic: str
    happened: str
    urgency: str
    text: str


def draw_ticket(rng: random.Random) -> Ticket:
    """A random ticket; equal generators in equal states give equal tickets."""
    name, product = rng.choice(NAMES), rng.choice(PRODUCTS)
    topic, urgency = rng.choice(TOPICS), rng.choice(URGENCIES)
    problem, happened = rng.choice(PROBLEMS[topic])
    text = rng.choice(LAYOUTS).format(
        name=name,
        problem=problem.format(p=product),
        filler=rng.choice(FILLERS),
        cue=rng.choice(CUES[urgency]),
    )
    return Ticket(name, product, topic, happened.format(p=product), urgency, " ".join(text.split()))
