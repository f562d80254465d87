"""Temporary folders of a server: its own while it lives, and nobody's for long after it was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable

import mlx.core as mx
import pytest

from serve.adapters.fitting.update import LowRank
from serve.adapters.registry import copies
from serve.adapters.registry.copies import Copies
from serve.adapters.residency import shelf
from serve.adapters.residency.shelf import Shelf, packed_of
from serve.own_folder import ABANDONED_S


def copying() -> Callable[[], None]:
    return Copies(lambda name, path: False).close


def leaving_memory() -> Callable[[], None]:
    kept = Shelf(1 << 20, lambda key: False)
    kept.put("a", packed_of({"layer": LowRank(mx.ones((4, 2)), mx.ones((2, 4)))}))
    kept.make_room(0)
    assert kept.tier("a") == "file"
    return kept.close


@pytest.mark.parametrize(("prefix", "use"), [(copies.PREFIX, copying), (shelf.PREFIX, leaving_memory)])
def test_what_a_killed_server_left_is_cleared_by_the_next_and_nothing_else(
    prefix, use, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    close_ours = use()
    [ours] = tmp_path.glob(f"{prefix}*")
    dead, young = (ours.with_name(f"{prefix}{word}-{os.getpid()}") for word in ("dead", "young"))
    for folder in (dead, young):
        (folder / "a").mkdir(parents=True)
    long_ago = time.time() - ABANDONED_S - 1
    for folder in (dead, ours):
        os.utime(folder, (long_ago, long_ago))
    use()()
    assert (dead.exists(), young.exists(), ours.exists()) == (False, True, True)
    shutil.rmtree(young)
    close_ours()
    assert not ours.exists()
