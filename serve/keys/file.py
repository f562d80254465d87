"""A file of keys in, Keys out. ConfigError lists what is wrong with it and never quotes a key."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, SecretStr, model_validator

from serve.keys.key import ANY_TENANT, Key
from serve.keys.limits import Allowance, Limits
from serve.operating_config import key_problem
from serve.settings import Problems, Strict, load_yaml

MAX_NAME_CHARS = 64
NAME = re.compile(rf"[A-Za-z0-9._@/-]{{1,{MAX_NAME_CHARS}}}\Z")
SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class KeyConfig(Strict):
    """One key."""

    name: str
    """What logs and messages call it."""
    key: SecretStr | None = None
    """Its text; or key_sha256."""
    key_sha256: str | None = None
    """SHA-256 of its text in lower-case hex, so that the file opens nothing to who reads it."""
    tenant: str | None = Field(None, min_length=1, max_length=128)
    """Whose prefixes and shares its requests have: its own name, if left out; `*`: whose X-Tenant says, for a
    proxy, and for an admin where this is left out."""
    requests_per_minute: int | None = Field(None, ge=1)
    """More answer 429 with Retry-After. No bound, if left out; so of the others."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Of prompts and answers together."""
    tokens_per_day: int | None = Field(None, ge=1)
    """The same over 24 hours; a restart forgets what was used."""
    adapters: tuple[str, ...] | None = Field(None, min_length=1)
    """What `model` may be: adapters, the base, experiments, by names or patterns (`support-*`). All, if left out."""
    mcp_servers: tuple[str, ...] | None = None
    """Whose tools its requests may have this server run, by names or patterns; `[]`: nobody's. All, if left out."""
    admin: bool = False
    """May load, unload, roll back, pin and reset, and see everybody's requests."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of its text."""
        if self.key is not None:
            return hashlib.sha256(self.key.get_secret_value().encode()).digest()
        return bytes.fromhex(self.key_sha256 or "")

    def build(self) -> Key:
        """The plain value."""
        allowance = Allowance(self.requests_per_minute, self.tokens_per_minute, self.tokens_per_day)
        return Key(
            self.name,
            self.digest,
            self.tenant or (ANY_TENANT if self.admin else self.name),
            self.admin,
            self.adapters,
            self.mcp_servers,
            Limits(self.name, allowance),
        )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Of this key alone."""
        if not NAME.match(self.name):
            yield "name", f"found {self.name!a:.80}; expected 1 to {MAX_NAME_CHARS} of A-Z a-z 0-9 . _ @ / -"
        if (self.key is None) == (self.key_sha256 is None):
            yield "key", "expected either key or key_sha256"
        elif self.key is not None and (expected := key_problem(self.key.get_secret_value())):
            yield "key", f"it cannot be a key; {expected}"
        elif self.key_sha256 is not None and not SHA256.match(self.key_sha256):
            yield "key_sha256", "expected 64 digits of lower-case hex"
        if self.tenant is not None and not all("!" <= character <= "~" for character in self.tenant):
            yield "tenant", f"found {self.tenant!a:.80}; expected characters from ! to ~, without spaces"


class KeyFile(Strict):
    """A file of keys."""

    keys: tuple[KeyConfig, ...]
    """The keys that are let in."""

    @model_validator(mode="after")
    def _differ(self) -> KeyFile:
        problems = [
            (f"keys.{index}.{name}", message)
            for index, each in enumerate(self.keys)
            for name, message in each.problems()
        ]
        if not problems:
            problems = [*self._repeated()]
        if problems:
            raise Problems(problems)
        return self

    def _repeated(self) -> Iterator[tuple[str, str]]:
        names: dict[str, int] = {}
        digests: dict[bytes, int] = {}
        for index, each in enumerate(self.keys):
            if (first := names.setdefault(each.name, index)) != index:
                yield f"keys.{index}.name", f"found {each.name!r}, which is keys.{first}'s too"
            if (first := digests.setdefault(each.digest, index)) != index:
                yield f"keys.{index}.key", f"found the text of keys.{first} again; give each its own"


def read_keys(path: Path) -> list[Key]:
    """The keys of a file, each with a full allowance. Raises ConfigError."""
    return [each.build() for each in load_yaml(path, KeyFile).keys]


def the_one_key(text: str) -> Key:
    """A single key that may do everything, in whosever name a header says."""
    digest = hashlib.sha256(text.encode()).digest()
    return Key("api_key", digest, ANY_TENANT, True, None, None, Limits("api_key", Allowance()))
