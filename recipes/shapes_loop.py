"""The weights in data/shapes, from random ones: two stages of plain mlx over the rows of train.data.picture_chats.

    python -m train.data.picture_chats build/shapes
    python recipes/shapes_loop.py build/shapes data/shapes

It knows what the rows are: each picture is 56 x 56 pixels, so all of a batch go through the tower as one array, and
their positions follow from the tokens alone.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_vlm.models.qwen2_vl import Model, ModelConfig
from mlx_vlm.models.qwen2_vl.config import TextConfig, VisionConfig
from PIL import Image
from transformers import AutoTokenizer

from train.loop.optim import build_optimizer, build_schedule

INIT = Path(__file__).resolve().parent.parent / "data" / "shapes-init"
BATCH = 64
EDGE, PATCH = 56, 14
PATCHES, PLACES = 16, 4  # of a picture: in the tower, and in the text
EMBEDDING = "language_model.model.embed_tokens.weight"


class Stage(NamedTuple):
    rows: str
    steps: int
    rate: float
    final: float  # of the rate
    warmup: int


STAGES = (
    Stage("single", 350, 2.0e-3, 0.05, 30),
    Stage("base", 350, 1.2e-3, 0.02, 20),
)


class Row(NamedTuple):
    """One chat as tokens. `is_target` [T]: those of answers; `pictures`: numbers of its pictures in Rows."""

    tokens: np.ndarray
    is_target: np.ndarray
    pictures: list[int]
    positions: np.ndarray  # [3, T]


class Rows:
    """A file's chats, and their pictures [N, 56, 56, 3]."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self._found: list[np.ndarray] = []
        self._tokenizer = tokenizer
        self._pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        lines = path.read_text(encoding="utf-8").splitlines()
        self.rows = [self._row(json.loads(line)["messages"]) for line in lines]
        self.pictures = np.stack(self._found)

    def _row(self, messages: Sequence[dict[str, Any]]) -> Row:
        tokens: list[int] = []
        is_target: list[bool] = []
        pictures: list[int] = []

        def add(text: str, targets: bool = False) -> None:
            new = self._tokenizer.encode(text)
            tokens.extend(new)
            is_target.extend([targets] * len(new))

        for message in messages:
            answers, content = message["role"] == "assistant", message["content"]
            add(f"<|im_start|>{message['role']}\n")
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    add(part["text"], answers)
                    continue
                pictures.append(len(self._found))
                self._found.append(picture_of(part["image_url"]["url"]))
                add(f"#{len(pictures)}<|vision_start|>{'<|image_pad|>' * PLACES}<|vision_end|>")
            add("<|im_end|>", answers)
            add("\n")
        ids = np.array(tokens)
        return Row(ids, np.array(is_target), pictures, positions_of(ids, self._pad))


def picture_of(uri: str) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    return np.asarray(image.resize((EDGE, EDGE), Image.Resampling.BICUBIC))


def positions_of(tokens: np.ndarray, pad: int) -> np.ndarray:
    """M-RoPE's [3, T]: a picture's four places are two by two, and what follows is two further on."""
    positions, here, index = np.zeros((3, len(tokens)), np.int32), 0, 0
    while index < len(tokens):
        if tokens[index] == pad:
            square = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
            positions[:, index : index + PLACES] = here + square
            here, index = here + 2, index + PLACES
        else:
            positions[:, index] = here
            here, index = here + 1, index + 1
    return positions


def patches_of(pictures: np.ndarray) -> np.ndarray:
    """[N, 56, 56, 3] bytes -> [N, 16, 1176] as the family's processor makes them, two equal frames each."""
    pixels = (pictures.astype(np.float32) / 255 - 0.5) / 0.5
    count = len(pixels)
    cut = pixels.transpose(0, 3, 1, 2).reshape(count, 3, 2, 2, PATCH, 2, 2, PATCH)
    cut = cut.transpose(0, 2, 5, 3, 6, 1, 4, 7)
    return np.repeat(cut[:, :, :, :, :, :, None], 2, axis=6).reshape(count, PATCHES, -1)


class Batch(NamedTuple):
    tokens: mx.array  # [B, T]
    positions: mx.array  # [3, B, T]
    sources: mx.array  # flat index of the token before each target
    targets: mx.array
    patches: mx.array | None
    places: mx.array  # flat indices of the pictures' places


def batch_of(rows: Sequence[Row], pictures: np.ndarray, pad: int) -> Batch:
    width = -(-max(len(row.tokens) for row in rows) // 4) * 4
    tokens = np.zeros((len(rows), width), np.int32)
    positions = np.zeros((3, len(rows), width), np.int32)
    sources, targets, places, numbers = [], [], [], []
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        positions[:, number, : len(row.tokens)] = row.positions
        at = np.flatnonzero(row.is_target)
        sources.append(number * width + at - 1)
        targets.append(row.tokens[at])
        places.append(number * width + np.flatnonzero(row.tokens == pad))
        numbers += row.pictures
    return Batch(
        mx.array(tokens),
        mx.array(positions),
        mx.array(np.concatenate(sources)),
        mx.array(np.concatenate(targets).astype(np.int32)),
        mx.array(patches_of(pictures[numbers])) if numbers else None,
        mx.array(np.concatenate(places).astype(np.int32)),
    )


def features_of(model: Model, patches: mx.array) -> mx.array:
    """The family's tower over [N, 16, 1176] at once, each picture by itself: [N * 4, D]."""
    tower, count = model.vision_tower, patches.shape[0]
    filters = tower.patch_embed.proj.weight
    hidden = patches @ filters.transpose(0, 4, 1, 2, 3).reshape(filters.shape[0], -1).T
    angles = tower.rot_pos_emb(mx.array([[1, 4, 4]]))
    cos, sin = (mx.tile(f(angles)[:, None, :], (1, 1, 2))[None] for f in (mx.cos, mx.sin))

    def turned(x: mx.array) -> mx.array:
        first, second = mx.split(x, 2, axis=-1)
        return x * cos + mx.concatenate([-second, first], axis=-1) * sin

    for block in tower.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).reshape(count, PATCHES, 3, attention.num_heads, -1)
        q, k, v = turned(qkv[:, :, 0]), turned(qkv[:, :, 1]), qkv[:, :, 2]
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        seen = mx.fast.scaled_dot_product_attention(q, k, v, scale=attention.scale)
        hidden = hidden + attention.proj(seen.transpose(0, 2, 1, 3).reshape(count, PATCHES, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden.reshape(count * PATCHES, -1))


def loss_of(model: Model, batch: Batch) -> mx.array:
    """Nats a target."""
    language = model.language_model.model
    embeddings = language.embed_tokens(batch.tokens)
    if batch.patches is not None:
        flat = embeddings.reshape(-1, embeddings.shape[-1])
        flat[batch.places] = features_of(model, batch.patches)
        embeddings = flat.reshape(embeddings.shape)
    hidden = language(batch.tokens, inputs_embeds=embeddings, position_ids=batch.positions)
    hidden = hidden.reshape(-1, hidden.shape[-1])[batch.sources]
    logits = language.embed_tokens.as_linear(hidden)
    return nn.losses.cross_entropy(logits, batch.targets, reduction="mean")


def batches_of(rows: Sequence[Row], rng: random.Random) -> Iterator[list[Row]]:
    """Without end; rows of like length together."""
    while True:
        order = list(range(len(rows)))
        rng.shuffle(order)
        epoch = []
        for start in range(0, len(order), BATCH * 8):
            near = sorted(order[start : start + BATCH * 8], key=lambda number: len(rows[number].tokens))
            epoch += [near[first : first + BATCH] for first in range(0, len(near), BATCH)]
        rng.shuffle(epoch)
        while epoch:
            yield [rows[number] for number in epoch.pop()]


def train(model: Model, stage: Stage, data: Rows, pad: int) -> None:
    spec = {"name": "linear_schedule", "warmup": stage.warmup, "final_ratio": stage.final}
    schedule = build_schedule(spec, learning_rate=stage.rate, num_steps=stage.steps)
    optimizer = build_optimizer(
        "muon",
        {"adamw": {"betas": [0.9, 0.98]}},
        schedule,
        learning_rate=stage.rate,
        embedding_names=frozenset({EMBEDDING}),
    )
    value_and_grad = nn.value_and_grad(model, loss_of)
    batches, losses, start_s = batches_of(data.rows, random.Random(0)), [], time.perf_counter()
    for step in range(1, stage.steps + 1):
        loss, gradients = value_and_grad(model, batch_of(next(batches), data.pictures, pad))
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
        losses.append(loss.item())
        if step % 25 == 0:
            seconds = time.perf_counter() - start_s
            print(
                f"{stage.rows} {step}/{stage.steps}  loss {np.mean(losses[-25:]):.4f}  {seconds:.0f} s",
                flush=True,
            )


def build() -> Model:
    """The architecture of data/shapes-init with random weights."""
    told = json.loads((INIT / "config.json").read_text())
    config = ModelConfig.from_dict(dict(told))
    config.vision_config = VisionConfig.from_dict(told["vision_config"])
    config.text_config = TextConfig.from_dict(config.text_config)
    mx.random.seed(0)
    model = Model(config)
    model.set_dtype(mx.float32)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="what train.data.picture_chats wrote")
    parser.add_argument("out", type=Path, help="model folder to write")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(INIT)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    read = {
        name: Rows(arguments.rows / name / "train.jsonl", tokenizer)
        for name in dict.fromkeys(stage.rows for stage in STAGES)
    }
    model = build()
    for stage in STAGES:
        train(model, stage, read[stage.rows], pad)
    shutil.copytree(INIT, arguments.out, dirs_exist_ok=True)
    model.set_dtype(mx.float16)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(arguments.out / "model.safetensors"), weights, metadata={"format": "mlx"})


if __name__ == "__main__":
    main()
