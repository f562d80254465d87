"""What `lathe bench serve` measures: a server that is started for it, and which of a server's models are asked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from serve.bench import servers, standin
from serve.errors import NotFoundError
from serve.remote import choose_model, served_adapters


@contextmanager
def started(
    model: str, adapters: int | None, overrides: Sequence[str], progress: Callable[[str], None]
) -> Iterator[str]:
    """The address of a server that is there inside the `with`. Raises StoppedError if it does not start.

    model     what `lathe serve` takes, or one of `standin.SIZES`: a random model
    adapters  of a random model: how many are written and loaded
    """
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary:
        folder, served, paths = Path(temporary), model, {}
        if model in standin.SIZES:
            progress("writing a random model")
            served, size = str(folder / "model"), standin.SIZES[model]
            standin.write_model(Path(served), standin.default_dtype(), size)
            if adapters is not None:
                progress(f"writing {adapters} adapters")
                paths = standin.write_adapters(folder / "adapters", adapters, size)
        progress(f"starting a server for {model}")
        with servers.lathe(served, folder / "lathe.log", adapters=paths, overrides=overrides) as server:
            yield server.url


def models_of(url: str, named: Sequence[str], adapters: int | None, api_key: str | None) -> tuple[str, ...]:
    """Whom requests name: those that were named, so many of the server's adapters, or what it lists first.

    Raises NotFoundError if it has fewer adapters, ConfigError if it does not answer.
    """
    if named:
        return tuple(named)
    if adapters is None:
        return (choose_model(url, None, api_key),)
    found = served_adapters(url, api_key)
    if len(found) < adapters:
        raise NotFoundError(f"{url} lists {len(found)} adapters; --adapters asks for {adapters}")
    return tuple(found[:adapters])
