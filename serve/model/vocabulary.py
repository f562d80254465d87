"""Which text each token id stands for, as one hash: what an adapter learned on one tokenizer means on another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def vocabulary_hash(tokenizer: Any) -> str:
    """`sha256:…` over every token and its id, added ones included. `tokenizer` is mlx_lm's TokenizerWrapper."""
    known: Mapping[str, int] = tokenizer.get_vocab()
    listed = json.dumps(sorted(known.items(), key=lambda item: (item[1], item[0])))
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"
