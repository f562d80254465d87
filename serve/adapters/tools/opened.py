"""An adapter, read by a tool: its files, its tensors, and each module's update. Knows the base where one is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.files import AdapterFiles, read_adapter
from serve.adapters.formats.tensors import check_distinct, others_of, without_containers
from serve.adapters.tools.factors import Factors, factors_of
from serve.errors import AdapterError

if TYPE_CHECKING:
    from serve.model.network import Network


@dataclass(frozen=True)
class Opened:
    """Tensors by mlx-lm's names and orientation; by the base's own names where it is known."""

    files: AdapterFiles
    tensors: Mapping[str, mx.array]
    config: AdapterConfig

    @property
    def name(self) -> str:
        """For messages: the folder, as it was typed."""
        return str(self.files.path)

    @cached_property
    def modules(self) -> dict[str, Factors]:
        """Updates of low rank, by module path."""
        return factors_of(self.tensors, self.config)

    @cached_property
    def others(self) -> list[str]:
        """Whole weights and biases, by name."""
        return others_of(self.tensors)

    def check_finite(self) -> None:
        """AdapterError names tensors with values that are no numbers."""
        if broken := self.broken():
            raise AdapterError(f"{self.name}: {', '.join(broken)} hold NaN or infinite values")

    def broken(self) -> list[str]:
        """Tensors with values that are no numbers."""
        return [name for name, tensor in sorted(self.tensors.items()) if not bool(mx.isfinite(tensor).all())]

    def modules_by_end(self) -> dict[str, tuple[str, Factors]]:
        """By what all libraries call a module: where other adapters name the same ones otherwise. AdapterError where
        two of its modules are one."""
        ends = {path: without_containers(path) for path in self.modules}
        check_distinct(self.name, ends)
        return {end: (path, self.modules[path]) for path, end in ends.items()}


def open_adapter(path: Path, network: Network | None = None) -> Opened:
    """Read all of it. AdapterError, NotFoundError; AdapterError for a full fine-tune, which is no update."""
    files = read_adapter(path)
    if files.config.fine_tune_type == "full":
        raise AdapterError(
            f"{path} is a full fine-tune, not an adapter; `lathe adapters extract` makes one of it"
        )
    tensors, config = files.read(), files.config
    if network is not None:
        from serve.adapters.fitting.own import own_layout  # with mlx-lm and transformers, a second

        tensors, config = own_layout(tensors, config, network)
    return Opened(files, tensors, config)
