"""The runtime: models, prompts, adapters, engine, HTTP, experiments. It never imports `train`.

Importing it prepares the machine (a real BLAS on CPU-only Linux) before anything imports mlx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve import device

if TYPE_CHECKING:
    from serve.local.model import LocalModel, load
    from serve.local.reply import Reply, Stream
    from serve.remote_answer import Thought

__all__ = ["LocalModel", "Reply", "Stream", "Thought", "load"]

device.prepare()


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is asked for."""
    if name in ("LocalModel", "load"):
        from serve.local import model as where
    elif name in ("Reply", "Stream"):
        from serve.local import reply as where  # type: ignore[no-redef]
    elif name == "Thought":
        from serve import remote_answer as where  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(where, name)
