"""A watch over a folder, the registry it loads into, and what it has loaded; the clock stands until told to go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from serve.adapters.registry.copies import Copies
from serve.adapters.registry.registry import Registry
from serve.adapters.registry.watch import STILL_S, AdapterWatch, Watched


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Setting:
    """A watch over a folder, its registry, and what it loaded."""

    def __init__(self, folder: Path, registry: Registry, **options: object) -> None:
        self.folder, self.registry, self.clock = folder, registry, Clock()
        self.loaded: list[str] = []
        self.before_load: Callable[[], None] = lambda: None
        self.copies = copies = Copies(self._is_known)
        folders = options.pop("folders", (folder,))
        self.watch = AdapterWatch(folders, self._load, copies, clock=self.clock, **options)

    def _load(self, name: str, path: Path):
        self.before_load()
        version = self.registry.load(name, path, replace=True)
        self.loaded.append(version.id)
        return version

    def _is_known(self, name: str, path: Path) -> bool:
        shown = self.registry.find(name)
        known = [each.version for each in shown.versions] if shown else []
        return any(each.path == str(path) for each in (*known, *self.registry.versions()))

    def look(self, *, after_s: float = 0.0) -> list[str]:
        """What is loaded by one look, so many seconds later."""
        self.clock.now += after_s
        before = len(self.loaded)
        self.watch.look()
        return self.loaded[before:]

    def settle(self) -> list[str]:
        """What is loaded by two looks, between which files stay the same long enough."""
        return [*self.look(), *self.look(after_s=STILL_S)]

    def of(self, name: str) -> Watched:
        return next(each for each in self.watch.watched() if each.name == name)
