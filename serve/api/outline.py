"""What a list of models says of a base, be it loaded or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve.config import ServeConfig
from serve.errors import LatheError
from serve.model.loading import found_here, max_context_of, read_config
from serve.model.prompt import MediaKind
from serve.runtime import Runtime
from serve.sight import kinds_of

SHOWN_BY: dict[str, MediaKind] = {"vision_config": "image", "audio_config": "audio"}
"""Parts of a model's configuration that take in something else than text."""


@dataclass(frozen=True)
class Outline:
    """A base, from afar."""

    root: str
    max_context: int
    """Tokens of prompt and answer together."""
    kinds: tuple[MediaKind, ...]
    """What it reads beside text."""

    @classmethod
    def of(cls, runtime: Runtime) -> Outline:
        """Of one that is loaded."""
        return cls(str(runtime.model.path), runtime.max_context, tuple(sorted(kinds_of(runtime.sight))))

    @classmethod
    def guessed(cls, config: ServeConfig) -> Outline | None:
        """Of one that is not, by its folder: what memory leaves of its context is not known yet. None where it is not
        here. Reads a file."""
        try:
            path = found_here(config.model)
            if path is None:
                return None
            written = read_config(path)
        except LatheError:
            return None
        most = max_context_of(written)
        kinds = tuple(sorted(kind for part, kind in SHOWN_BY.items() if written.get(part)))
        return cls(str(Path(path)), min(most, config.max_context or most), kinds)
