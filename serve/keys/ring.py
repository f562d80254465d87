"""All keys of a server at a time: a presented text in, its Key out, in one time whatever the text."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import replace

from serve.errors import ConfigError
from serve.keys.key import Key

BLIND_BYTES = 32


class KeyRing:
    """Finds keys by a keyed hash of their hash, so how long it takes tells nothing of how near a guess was, and is
    the same for one key and for ten thousand. Keeps nothing of what it does not know."""

    def __init__(self, keys: Iterable[Key], before: KeyRing | None = None) -> None:
        """before: who was known until now; who has the same name goes on with what is left of the allowance."""
        self._blind = secrets.token_bytes(BLIND_BYTES)
        self.by_name: dict[str, Key] = {}
        for key in keys:
            if key.name in self.by_name:
                raise ConfigError(f"two keys are called {key.name!r}; give each its own name")
            self.by_name[key.name] = key
        for name in self.by_name.keys() & (before.by_name.keys() if before else ()):
            assert before is not None
            new, limits = self.by_name[name], before.by_name[name].limits
            limits.allow(new.limits.allowance)  # whose requests run now go on taking from it
            self.by_name[name] = replace(new, limits=limits)
        self._by_hash = {self._hash(key.digest): key for key in self.by_name.values()}

    def find(self, text: str) -> Key | None:
        """The key of that text."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        key = self._by_hash.get(self._hash(digest))
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def _hash(self, digest: bytes) -> bytes:
        return hmac.digest(self._blind, digest, "sha256")
