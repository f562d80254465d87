"""What an adapter or an experiment may be called. One rule, for configurations and for loads over HTTP."""

from __future__ import annotations

LONGEST_NAME = 256


def name_problem(name: str) -> str | None:
    """What a name should have been like; None if it is one. `name@N` is a version."""
    return "'@' separates a name from its version" if "@" in name else label_problem(name)


def new_name_problem(name: str, base: str) -> str | None:
    """The same of an adapter that is loaded under it, beside a base of that name."""
    if name in (".", ".."):
        return "in an address that means another place"
    return name_problem(name) or ("a name is not the base's" if name == base else None)


def label_problem(name: str) -> str | None:
    """The same where a version may be named: log lines, headers and metrics take one line of printable text."""
    if not name:
        return "a name is not empty"
    if len(name) > LONGEST_NAME:
        return f"a name has at most {LONGEST_NAME} characters"
    if not name.isprintable():  # line breaks, control characters, half surrogate pairs, invisible characters
        return "a name holds printable characters alone"
    if name != name.strip():
        return "a name neither begins nor ends with a space"
    return None
