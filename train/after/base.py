"""The base of an adapter: its name in the manifest → where it is. Reads headers, loads nothing."""

from __future__ import annotations

import re
from pathlib import Path

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.header import read_specs
from serve.errors import ConfigError, NotFoundError
from serve.model.loading import fingerprint, resolve
from serve.model.quantization import Quantization

TOWER = re.compile(r"(^|[._])(vision|visual|image|audio|speech|multi_modal|mm)(?=[._])")
"""In the names of tensors that look at something other than text."""


def find_base(adapter: Path, config: AdapterConfig, named: str | None) -> str:
    """`named`, or the manifest's base: a relative one in the folders around the adapter and here, then on the hub.

    Of several places the one that holds the weights it was trained on. ConfigError or NotFoundError name --base.
    """
    if named is not None:
        return named
    if config.lineage is None:
        raise ConfigError(f"{adapter} does not say what its base is; name it with --base")
    name = config.lineage.base_model
    around = adapter.resolve()
    folders = [folder / name for folder in (around, *around.parents, Path.cwd())]
    found = list(dict.fromkeys(folder for folder in folders if (folder / "config.json").is_file()))
    for folder in found:
        if _fingerprint(folder, config) == config.lineage.base_fingerprint:
            return str(folder)
    if found:
        return str(found[0])
    try:
        return str(resolve(name))
    except NotFoundError as error:
        raise NotFoundError(
            f"{adapter}: its base {name} is neither in a folder around the adapter nor in {Path.cwd()}, nor on the "
            f"hub; name the base with --base ({error})"
        ) from error


def _fingerprint(folder: Path, config: AdapterConfig) -> str:
    how = config.lineage.quantize if config.lineage else None
    return fingerprint(folder, Quantization(**how) if how else None)


def check_nothing_is_lost(base: str, *, has_towers: bool) -> None:
    """ConfigError if the base's folder can look at more than text and its model, as it is loaded, cannot.

    has_towers  the model comes with its towers
    """
    if has_towers:
        return
    path = resolve(base)
    names = [name for file in sorted(path.glob("*.safetensors")) for name in read_specs(file)]
    others = [name for name in names if TOWER.search(name)]
    if others:
        raise ConfigError(
            f"{base} has {len(others)} tensors beside its text part, {others[0]} first, that its model here does not "
            f"take, so an export would lose them; serve the adapter on its base instead, or name a base of text "
            f"alone with --base"
        )
