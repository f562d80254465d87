"""Weights that a run starts from without continuing another: an adapter's folder, or a file of tensors."""

from __future__ import annotations

from pathlib import Path

from serve.adapters.formats.manifest import TENSORS_FILE, content_hash, load_tensors, read_tensors
from serve.errors import AdapterError
from serve.model.network import Network
from train.adapters.adapt import Adapted, set_tensors
from train.data.inherited import config_of


def warm_start(path: Path, network: Network, adapted: Adapted) -> None:
    """Put the weights of an adapter's folder or file in place; the rest of the run starts afresh.

    AdapterError where they are of another kind of fine-tune or do not fit.
    """
    if _is_adapter(path):
        tensors, config = read_tensors(_folder_of(path)), config_of(path)
        if config and config.fine_tune_type != adapted.fine_tune_type:
            raise AdapterError(
                f"resume_adapter_file: {path} is a {config.fine_tune_type} fine-tune, "
                f"this run is {adapted.fine_tune_type}"
            )
    else:
        tensors = load_tensors(path)
    set_tensors(network, tensors, f"resume_adapter_file {path}")


def hash_of(path: Path) -> str:
    """The content hash of an adapter folder, as its manifest says, or of a file's tensors."""
    config = config_of(path)
    if config is not None and config.lineage is not None and config.lineage.content_hash:
        return config.lineage.content_hash
    return content_hash(load_tensors(path / TENSORS_FILE if path.is_dir() else path))


def _is_adapter(path: Path) -> bool:
    return path.is_dir() or path.name == TENSORS_FILE


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
