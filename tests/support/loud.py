"""An adapter that no file could be: its updates are so large that what its rows compute are not numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from serve.adapters.versions.source import Content, Fitting, FolderSource


class Loud(FolderSource):
    """A folder's updates, `times` as large, past the check that refuses such files."""

    def __init__(self, path: Path, times: float = 1e30) -> None:
        super().__init__(path)
        self._times = times

    def read(self, name: str, fitting: Fitting) -> Content:
        content = super().read(name, fitting)
        louder = {path: replace(update, b=update.b * self._times) for path, update in content.updates.items()}
        return replace(content, updates=louder, effect_hash=f"{content.effect_hash} times {self._times}")
