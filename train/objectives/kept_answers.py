"""A teacher's answers kept on disk, by content: the same teacher, prompts, seeds and settings give the same file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from serve import device
from serve.errors import StorageError
from train.data import cache
from train.data.prepared import KEPT_FROM_S

FORMAT = 1
LIBRARIES = ("mlx", "mlx-lm", "mlx-vlm", "mlx-lathe")
SUFFIX = ".answers"

Answers = list[np.ndarray]
"""Token ids [n] int32 of each."""


class KeptAnswers:
    """A folder of answers.

    folder  None: ~/.cache/lathe/answers, for answers that took longer than a second
    """

    def __init__(self, folder: str | None) -> None:
        self._is_default = folder is None
        default = cache.default_folder().parent / "answers"
        self._folder = default if folder is None else Path(folder).expanduser()

    def get(self, who: Sequence[Any], prompts: Sequence[np.ndarray], make: Callable[[], Answers]) -> Answers:
        """The answers kept under these words (plain JSON) and prompts; made and kept where there are none, or where
        their file is damaged. A disk that refuses costs a later run time, and this one nothing."""
        path = self._folder / f"{key_of(who, prompts)}{SUFFIX}"
        try:
            return load(path, len(prompts))
        except (FileNotFoundError, cache.Damaged):
            pass
        start_s = time.perf_counter()
        answers = make()
        if self._is_default and time.perf_counter() - start_s < KEPT_FROM_S:
            return answers
        try:
            save(path, answers)
            if self._is_default:
                cache.prune(self._folder, suffix=SUFFIX)
        except (StorageError, OSError):
            return answers
        return answers


def key_of(who: Sequence[Any], prompts: Sequence[np.ndarray]) -> str:
    """A name for the answers of `who` to these prompts in this order: company decides near-ties."""
    libraries = [metadata.version(name) for name in LIBRARIES]
    head = [FORMAT, libraries, device.backend(), list(who)]
    digest = hashlib.blake2b(json.dumps(head, sort_keys=True).encode(), digest_size=20)
    for prompt in prompts:
        digest.update(f"|{len(prompt)}|".encode() + prompt.astype(np.int32).tobytes())
    return digest.hexdigest()


def save(path: Path, answers: Answers) -> None:
    """Write them whole. StorageError if that fails; then there is no file."""
    tensors: dict[str, np.ndarray] = {
        "lengths": np.array([len(ids) for ids in answers], np.int64),
        "token_ids": np.concatenate([np.zeros(0, np.int32), *answers]).astype(np.int32),
    }
    cache.write_arrays(path, tensors, {}, "a teacher's answers")


def load(path: Path, count: int) -> Answers:
    """`count` answers of a file. Damaged where it does not hold them whole; FileNotFoundError where it is not."""
    tensors, _ = cache.read_arrays(path)
    lengths, token_ids = tensors.get("lengths", np.zeros(0, np.int64)), tensors.get("token_ids")
    if token_ids is None or len(lengths) != count or lengths.sum() != len(token_ids):
        raise cache.Damaged(f"it does not hold {count} answers")
    return np.split(token_ids, np.cumsum(lengths)[:-1]) if count else []
