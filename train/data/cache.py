"""Tokenized rows kept on disk, by content: the same rows, tokenizer, template, knobs and code give the same file.

A file holds tokens and masks; places, labels and fields come from the rows themselves, which are read in any case.
Files are published whole and carry a checksum: one that is damaged is told, and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from serve.errors import StorageError
from serve.media import clips, pictures, processor, sounds
from serve.model import (
    clip_steps,
    expansion,
    forms,
    jinja,
    messages,
    renderer,
    retold,
    spans,
    template_rules,
    texts,
    turns,
    words,
)
from serve.model import template as template_module
from serve.model.prompt import Media, Rope
from serve.model.template import ChatTemplate
from train.data import coordinates, looking, media_reader, row_media
from train.data import rules as rules_module
from train.data import tokens as tokens_module
from train.data.example import Example
from train.data.media_reader import LaterInputs, MediaReader
from train.data.row_media import RowMedia
from train.data.rules import TokenRules
from train.data.tokens import Outcome, TokenizedExample

FORMAT = 5
CODE = (
    *(media_reader, looking, row_media, coordinates),
    *(processor, pictures, clips, sounds, expansion, clip_steps),
    *(tokens_module, rules_module, template_module, template_rules),
    *(messages, jinja, renderer, retold, words, forms, spans, texts, turns),
)
"""Modules whose source is part of what a file is called by."""
LIBRARIES = ("tokenizers", "transformers", "mlx-lm", "mlx-vlm", "pillow")
MAX_DEFAULT_BYTES = 10 * 10**9
"""Of the default folder; the files longest unused go first."""
SUFFIX = ".tokens"
KEY_BYTES = 32
"""Of a piece of media's key."""
CONTENT = (
    *("messages", "tools", "prompt", "completion", "text", "untrained", "chosen", "rejected", "label"),
    "variables",
)


class Damaged(Exception):
    """A cache file that is not what was written."""


def default_folder() -> Path:
    """Where rows are kept if the recipe does not say."""
    return Path.home() / ".cache" / "lathe" / "tokens"


def key_of(
    examples: Sequence[Example],
    template: ChatTemplate,
    rules: TokenRules,
    reader: MediaReader | None = None,
) -> str:
    """A name for what tokenizing these rows gives; `reader` is of what they show."""
    digest = hashlib.blake2b(digest_size=20)
    libraries = [metadata.version(name) for name in LIBRARIES]
    head = [FORMAT, rules.as_json(template), identity_of(template.tokenizer), libraries, _code_hash()]
    digest.update(json.dumps(head, sort_keys=True).encode())
    for example in examples:
        said = [getattr(example, name) for name in CONTENT]
        digest.update(json.dumps(said, default=_as_json).encode() + b"\n")
        if example.media:
            seen = [reader.identity if reader is not None else "", [ref.identity for ref in example.media]]
            digest.update(json.dumps(seen).encode() + b"\n")
    return digest.hexdigest()


def identity_of(tokenizer: Any) -> str:
    """A name for everything by which a tokenizer makes ids of text."""
    inner = tokenizer._tokenizer
    backend: Any = getattr(inner, "backend_tokenizer", None)
    said = json.dumps(inner.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    special = [type(inner).__name__, tokenizer.eos_token_id, sorted(tokenizer.eos_token_ids)]
    return hashlib.sha256(f"{said}{special}".encode()).hexdigest()


def save(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the outcomes of rows without problems. StorageError if that fails; then there is no file."""
    tensors, counts = _pack(outcomes)
    write_arrays(path, tensors, {"rows": len(outcomes), "counts": counts}, "tokenized rows")


def load(path: Path, examples: Sequence[Example], reader: MediaReader | None = None) -> list[Outcome]:
    """The outcomes of these rows, what they show read by `reader`. Damaged if the file is not whole;
    FileNotFoundError if there is none."""
    tensors, said = read_arrays(path)
    if said.get("rows") != len(examples):
        raise Damaged(f"it holds {said.get('rows')} rows")
    return _unpack(tensors, said["counts"], examples, reader)


def write_arrays(path: Path, tensors: dict[str, np.ndarray], said: dict[str, Any], what: str) -> None:
    """Publish arrays, and JSON beside them, as one file with a checksum. StorageError if that fails, which says
    `what` cannot be kept; then there is no file."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    metadata = {"said": json.dumps(said), "checksum": _checksum(tensors, said)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, new, metadata=metadata)
        with new.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(new, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            new.unlink()
        raise StorageError(f"{path}: {what} cannot be kept: {error}") from error


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_arrays` wrote, which counts as used now. Damaged if it is not whole; FileNotFoundError if there is
    none."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        said = json.loads(metadata["said"])
        if metadata["checksum"] != _checksum(tensors, said):
            raise Damaged("its checksum is another")
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise Damaged(str(error)) from error
    os.utime(path)
    return tensors, said


def prune(folder: Path, max_bytes: int = MAX_DEFAULT_BYTES, suffix: str = SUFFIX) -> None:
    """Remove the files that were longest unused until the rest fits."""
    files = sorted(folder.glob(f"*{suffix}"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > max_bytes:
            file.unlink(missing_ok=True)


def _as_json(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else str(value)


def _code_hash() -> str:
    return hashlib.sha256(b"".join(Path(str(m.__file__)).read_bytes() for m in CODE)).hexdigest()


def _checksum(tensors: dict[str, np.ndarray], said: Any) -> str:
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=20)
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}".encode() + tensors[name].tobytes())
    return digest.hexdigest()


def _pack(outcomes: Sequence[Outcome]) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Arrays of all sequences one after the other, and [row, truncated, dropped, lost, notes, told] of some rows."""
    sequences = [
        (index, place, sequence)
        for index, outcome in enumerate(outcomes)
        for row in outcome.rows
        for place, sequence in enumerate(row.sequences)
    ]
    tensors: dict[str, np.ndarray] = {
        "owners": np.array([index for index, _, _ in sequences], np.int64),
        "is_rejected": np.array([place for _, place, _ in sequences], np.uint8),
        "lengths": np.array([len(sequence) for _, _, sequence in sequences], np.int64),
        "token_ids": np.concatenate([np.zeros(0, np.int32), *(s.token_ids for _, _, s in sequences)]),
        "is_target": np.packbits(
            np.concatenate([np.zeros(0, bool), *(s.is_target for _, _, s in sequences)])
        ),
    }
    tensors |= _pack_media([sequence.media for _, _, sequence in sequences])
    counts: list[Any] = [
        [
            *(index, outcome.num_truncated, list(outcome.dropped), list(outcome.lost)),
            *(list(outcome.notes), dict(outcome.told)),
        ]
        for index, outcome in enumerate(outcomes)
        if outcome.num_truncated or outcome.dropped or outcome.lost or outcome.notes or outcome.told
    ]
    return tensors, counts


def _unpack(
    tensors: dict[str, np.ndarray],
    counts: list[Any],
    examples: Sequence[Example],
    reader: MediaReader | None,
) -> list[Outcome]:
    ends = np.cumsum(tensors["lengths"]).tolist()
    all_ids = tensors["token_ids"]
    all_targets = np.unpackbits(tensors["is_target"], count=len(all_ids)).astype(bool)
    rows: list[list[TokenizedExample]] = [[] for _ in examples]
    begin = 0
    media = _unpack_media(tensors, examples, reader)
    for number, (owner, is_rejected, end) in enumerate(
        zip(tensors["owners"].tolist(), tensors["is_rejected"].tolist(), ends, strict=True)
    ):
        example = examples[owner]
        ids, is_target = all_ids[begin:end], all_targets[begin:end]
        begin = end
        if is_rejected:
            other = TokenizedExample(ids, is_target, example.source, example.line, media=media.get(number))
            rows[owner].append(replace(rows[owner].pop(), rejected=other))
        else:
            fields = None if is_target.any() else example.fields
            rows[owner].append(
                TokenizedExample(
                    *(ids, is_target, example.source, example.line),
                    label=example.label,
                    fields=fields,
                    media=media.get(number),
                )
            )
    outcomes = [Outcome(tuple(found)) for found in rows]
    for index, num_truncated, dropped, lost, notes, told in counts:
        outcomes[index] = Outcome(
            *(tuple(rows[index]), num_truncated, tuple(dropped)),
            lost=tuple(lost),
            notes=tuple(notes),
            told=told,
        )
    return outcomes


def _pack_media(rows: Sequence[RowMedia | None]) -> dict[str, np.ndarray]:
    """What sequences show, but for pixels: a line a piece, a rope a sequence, a line a block."""
    shown = [(number, row) for number, row in enumerate(rows) if row is not None]
    pieces = [(number, piece) for number, row in shown for piece in row.media]
    inputs = [piece.inputs for _, piece in pieces]
    assert all(isinstance(each, LaterInputs) for each in inputs)
    ropes = [(number, row.rope) for number, row in shown if row.rope is not None]
    no_positions = np.zeros(0, np.int32)
    return {
        "piece_owners": np.array([number for number, _ in pieces], np.int64),
        "piece_refs": np.array([each.place for each in inputs], np.int64),  # type: ignore[attr-defined]
        "piece_numbers": np.array([each.number for each in inputs], np.int64),  # type: ignore[attr-defined]
        "piece_keys": np.array([list(bytes.fromhex(p.key)) for _, p in pieces], np.uint8).reshape(
            -1, KEY_BYTES
        ),
        "piece_patches": np.array([piece.num_patches for _, piece in pieces], np.int64),
        "piece_lengths": np.array([len(piece.positions) for _, piece in pieces], np.int64),
        "piece_positions": np.concatenate([no_positions, *(piece.positions for _, piece in pieces)]),
        "rope_owners": np.array([number for number, _ in ropes], np.int64),
        "rope_deltas": np.array([rope.delta for _, rope in ropes], np.int64),
        "rope_lengths": np.array([rope.positions.shape[1] for _, rope in ropes], np.int64),
        "rope_positions": np.concatenate(
            [no_positions, *(rope.positions.reshape(-1).astype(np.int32) for _, rope in ropes)]
        ),
        "blocks": np.array(
            [[number, *block] for number, row in shown for block in row.blocks], np.int64
        ).reshape(-1, 3),
    }


def _unpack_media(
    tensors: Mapping[str, np.ndarray], examples: Sequence[Example], reader: MediaReader | None
) -> dict[int, RowMedia]:
    """Sequence → what it shows, of those that show anything."""
    pieces: dict[int, list[Media]] = {}
    begin = 0
    names = ("piece_owners", "piece_refs", "piece_numbers", "piece_patches", "piece_lengths")
    for line, key in zip(
        zip(*(tensors[name].tolist() for name in names), strict=True), tensors["piece_keys"], strict=True
    ):
        owner, place, number, num_patches, length = line
        ref = examples[int(tensors["owners"][owner])].media[place]
        inputs = LaterInputs(reader, ref, place, number, key.tobytes().hex())
        positions = tensors["piece_positions"][begin : begin + length]
        begin += length
        found = Media(ref.kind, key.tobytes().hex(), positions, inputs, num_patches)
        pieces.setdefault(owner, []).append(found)
    ropes: dict[int, Rope] = {}
    begin = 0
    turned = ("rope_owners", "rope_deltas", "rope_lengths")
    for owner, delta, length in zip(*(tensors[name].tolist() for name in turned), strict=True):
        positions = tensors["rope_positions"][begin : begin + 3 * length].reshape(3, length)
        begin += 3 * length
        ropes[owner] = Rope(positions, delta)
    blocks: dict[int, list[tuple[int, int]]] = {}
    for owner, start, stop in tensors["blocks"].tolist():
        blocks.setdefault(owner, []).append((start, stop))
    return {
        owner: RowMedia(tuple(found), ropes.get(owner), tuple(blocks.get(owner, ())))
        for owner, found in pieces.items()
    }
