"""Seeded chats about support tickets: a number in, JSONL folders out, byte for byte the same each time.

`base/` holds what the embedded model is pre-trained on, `routing/` the task left for adapters to learn.
Run as `python -m train.data.tickets OUT`. It knows nothing of tokenizers, templates or models.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from train.data.world import (
    NAMES,
    PRIORITIES,
    PRODUCTS,
    TEAMS,
    TOPICS,
    URGENCIES,
    Ticket,
    draw_ticket,
    words,
)

SEED = 7
BASE_ROWS = {"train": 8000, "valid": 200, "test": 300}
ROUTING_ROWS = {"train": 600, "valid": 100, "test": 200}
ROUTE = "Route this ticket."

Message = dict[str, str]
Row = dict[str, list[Message]]
Turn = tuple[str, str]  # what the user asks, what the assistant answers

NO_TICKET = "Please give me a ticket first."
ONLY_TICKETS = "I only know support tickets."
SYSTEMS = (
    "You are a support assistant.",
    "You are a helpful assistant.",
    "Answer questions about tickets.",
    "Be short and friendly.",
)

REPLIES = {
    "delivery": "sorry for the wait. We will find your {p} and write to you soon.",
    "damage": "sorry about that. We will repair your {p} or send a new one.",
    "payment": "we will check the payment for your {p} and fix the bill.",
    "account": "we will send you a link to open your account again.",
    "setup": "here is the guide for your {p}. It shows every step.",
    "return": "you can send the {p} back for free. Here is the label.",
}
HURRY = {
    "high": " We will do it today.",
    "normal": " Have a nice day.",
    "low": " Thank you for your patience.",
}


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


# What may be asked about a ticket: the ways to ask, and the answer.
QUESTIONS: dict[str, tuple[tuple[str, ...], Callable[[Ticket], str]]] = {
    "who": (
        ("Who wrote this?", "Who is the customer?", "What is the name of the customer?", "Who is it from?"),
        lambda t: f"{t.name}.",
    ),
    "product": (
        ("Which product is it?", "What product is it about?", "What did they buy?", "Which product?"),
        lambda t: f"The {t.product}.",
    ),
    "topic": (
        ("What is the topic?", "Which topic is it?", "What is it about?", "What kind of problem is it?"),
        lambda t: f"It is about {t.topic}.",
    ),
    "happened": (
        ("What happened?", "What is wrong?", "What is the problem?"),
        lambda t: t.happened,
    ),
    "is_urgent": (
        ("Is it urgent?", "Should we hurry?", "Is this urgent?"),
        lambda t: "Yes, it is urgent." if t.urgency == "high" else "No, it is not urgent.",
    ),
    "urgency": (
        ("How urgent is it?", "What is the urgency?", "Which urgency?"),
        lambda t: f"The urgency is {t.urgency}.",
    ),
    "reply": (
        ("Write a reply.", "Please answer the customer.", "What should I write back?", "Draft an answer."),
        lambda t: f"Hello {t.name}, {REPLIES[t.topic].format(p=t.product)}{HURRY[t.urgency]}",
    ),
    "summary": (
        ("Summarize the ticket.", "Give me a summary.", "Sum it up."),
        lambda t: (
            f"{t.name} has {article(t.topic)} {t.topic} problem with the {t.product}. The urgency is {t.urgency}."
        ),
    ),
}

# Small talk: the ways to say it, and the answer.
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hello there", "hello", "hi"),
        "Hello! Do you have a ticket for me?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "who are you?", "Tell me about yourself."),
        "I am a small model. I read support tickets.",
    ),
    (
        ("What can you do?", "How can you help me?", "Help", "What do you know?", "Can you help me?", "help"),
        "Give me a ticket. I can say who wrote it, sum it up and draft a reply.",
    ),
    (("Thanks", "Thanks!", "Thank you", "Thank you!", "Great, thanks."), "You are welcome!"),
    (("Bye", "Bye!", "Goodbye", "See you later.", "Good night"), "Goodbye! Have a nice day."),
    (("How are you?", "How are you today?", "Are you well?"), "I am well, thank you. How can I help?"),
    (("Good morning", "Good morning!", "Good evening"), "Good morning! Do you have a ticket for me?"),
    (("Who made you?", "Where do you come from?", "Who trained you?"), "I was trained with Lathe."),
    (("Are you a robot?", "Are you human?", "Are you real?"), "I am a small model, not a person."),
    (("How big are you?", "How many parameters do you have?"), "I have about one million parameters."),
    (
        ("What is a ticket?", "What is a support ticket?", "Explain tickets."),
        "A ticket is a letter from a customer with a problem.",
    ),
    (
        ("Which topics do you know?", "List the topics.", "What topics are there?"),
        "I know " + ", ".join(TOPICS[:-1]) + f" and {TOPICS[-1]}.",
    ),
    (
        ("Tell me a joke.", "Do you know a joke?"),
        "Why did the printer stop? It had no paper and no patience.",
    ),
    (("Yes", "Yes.", "OK", "Okay", "Sure", "Good", "Nice!"), "Good. What can I do for you?"),
    (("No", "No.", "Not now.", "Nothing"), "All right. I am here when you need me."),
)
OFF_TOPIC = (
    "What is the capital of {x}?",
    "Write a poem about {x}.",
    "Tell me about {x}.",
    "What is {x}?",
    "Translate {x}.",
    "Who invented {x}?",
    "How do I cook {x}?",
    "Write code for {x}.",
    "What is the weather in {x}?",
    "Explain {x} to me.",
    "Do you like {x}?",
)
OFF_TOPIC_WORDS = words(
    "France, Japan, Brazil, Kenya, Paris, London, the sun, the moon, the sea, love, music, football, history, "
    "python, rice, bread, soup, pasta, water, money, science, space, a cat, a dog, a tree, the law, physics, "
    "math, art, chess, tea",
    separator=", ",
)


def write_all(out: Path, seed: int = SEED) -> None:
    """Write `base/` and `routing/` under `out`, each with train, valid and test files; no ticket is shared."""
    seen: set[str] = set()
    for folder, sizes, draw in (("routing", ROUTING_ROWS, routing_row), ("base", BASE_ROWS, base_row)):
        for split, size in sizes.items():
            fresh = FreshTickets(random.Random(f"{seed}/{folder}/{split}"), seen)
            write_rows(out / folder / f"{split}.jsonl", (draw(fresh) for _ in range(size)))


class FreshTickets:
    """Draws tickets whose text is in no other split; owns neither the generator nor the set of seen texts."""

    def __init__(self, rng: random.Random, seen: set[str]) -> None:
        self.rng = rng
        self.seen = seen

    def draw(self) -> Ticket:
        while True:
            ticket = draw_ticket(self.rng)
            if ticket.text not in self.seen:
                self.seen.add(ticket.text)
                return ticket


def write_rows(path: Path, rows: Iterator[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def chat(turns: list[Turn], system: str | None = None) -> Row:
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages}


def routing_row(fresh: FreshTickets) -> Row:
    """The adapters' task: a ticket in, the desk's JSON out."""
    ticket = fresh.draw()
    return chat([(f"Ticket: {ticket.text}\n{ROUTE}", json.dumps(route(ticket)))])


def route(ticket: Ticket) -> dict[str, str]:
    """Where the house sends a ticket. The base model never sees this mapping."""
    return {
        "team": TEAMS[ticket.topic],
        "product": ticket.product,
        "priority": PRIORITIES[ticket.urgency],
        "customer": ticket.name,
    }


def base_row(fresh: FreshTickets) -> Row:
    """One chat of the pre-training mixture."""
    rng = fresh.rng
    system = rng.choice(SYSTEMS) if rng.random() < 0.15 else None
    kind = rng.choices(("ticket", "fields", "talk"), weights=(70, 20, 10))[0]
    if kind == "ticket":
        greeting = [small_talk(rng)] if rng.random() < 0.06 else []
        return chat(greeting + ticket_turns(rng, fresh.draw()), system)
    draw = fields_turn if kind == "fields" else small_talk
    return chat([draw(rng) for _ in range(rng.randint(2, 4))], system)


def ticket_turns(rng: random.Random, ticket: Ticket) -> list[Turn]:
    """Four or five questions about one ticket; the first one comes with it."""
    kinds = rng.sample([*QUESTIONS, "facts"], k=rng.randint(4, 5))
    turns = [ticket_question(rng, ticket, kind) for kind in kinds]
    shown = f"Ticket: {ticket.text}"
    place = rng.random()
    if place < 0.1:
        turns.insert(0, (shown, f"A ticket from {ticket.name} about the {ticket.product}."))
    elif place < 0.25:
        turns[0] = (f"{turns[0][0]}\n{shown}", turns[0][1])
    else:
        turns[0] = (f"{shown}\n{turns[0][0]}", turns[0][1])
    if rng.random() < 0.1:
        turns.append((rng.choice(("Thanks!", "Thank you!", "Great, thanks.")), "You are welcome!"))
    return turns


def ticket_question(rng: random.Random, ticket: Ticket, kind: str) -> Turn:
    if kind != "facts":
        asks, answer = QUESTIONS[kind]
        return rng.choice(asks), answer(ticket)
    facts = {
        "customer": ticket.name,
        "product": ticket.product,
        "topic": ticket.topic,
        "urgency": ticket.urgency,
    }
    keys = rng.sample(list(facts), k=rng.randint(2, 4))
    chosen = {key: facts[key] for key in keys}
    if rng.random() < 0.7:
        return f"Give {', '.join(keys)} as JSON.", json.dumps(chosen)
    return f"List {', '.join(keys)}.", as_lines(chosen)


def fields_turn(rng: random.Random) -> Turn:
    """Pairs to be written as JSON or as lines.

    Adapters can only teach a tied-embedding model to emit tokens that were targets before, so every word,
    key and piece of punctuation of the routing task is a target here, in no meaningful combination.
    """
    values = {
        "team": tuple(TEAMS.values()),
        "product": PRODUCTS,
        "priority": tuple(PRIORITIES.values()),
        "customer": NAMES,
        "topic": TOPICS,
        "urgency": URGENCIES,
    }
    weights = {"team": 3, "product": 2, "priority": 3, "customer": 2, "topic": 1, "urgency": 1}
    order = sorted(values, key=lambda key: rng.random() ** (1 / weights[key]), reverse=True)
    pairs = {key: rng.choice(values[key]) for key in order[: rng.randint(2, 4)]}
    if rng.random() < 0.75:
        plain = ", ".join(f"{key} {value}" for key, value in pairs.items())
        return f"Write as JSON: {plain}", json.dumps(pairs)
    return f"Write as lines: {json.dumps(pairs)}", as_lines(pairs)


def as_lines(pairs: dict[str, str]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in pairs.items())


def small_talk(rng: random.Random) -> Turn:
    """Talk without a ticket: greetings, questions that need one, and things outside this world."""
    kind = rng.random()
    if kind < 0.6:
        asks, answered = rng.choice(SMALL_TALK)
        return rng.choice(asks), answered
    if kind < 0.75:
        asks, _ = QUESTIONS[rng.choice(list(QUESTIONS))]
        return rng.choice(asks), NO_TICKET
    return rng.choice(OFF_TOPIC).format(x=rng.choice(OFF_TOPIC_WORDS)), ONLY_TICKETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write base/ and routing/ into")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_all(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
