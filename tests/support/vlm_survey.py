"""Every folder of mlx-vlm's models, tried: does a tiny random one build, and do its rows share a batch here?

No family is named but where its code asks for numbers that hang together. What comes out is a verdict a folder; the
table of them is printed by `python tests/support/vlm_survey.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[2]))

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import numpy as np
from vlm_families import FAMILIES

from serve.cache.capacity import Bucket
from serve.cache.families import make_rows
from serve.cache.precision import PLAIN
from serve.cache.spans import Span, SpanPart
from serve.model.network import Network
from serve.model.prompt import Media
from serve.model.towers import build_with_towers
from serve.model.vision import Features, Placed, Vision

TOWERS = ("vision_config", "audio_config", "sound_config", "thinker_config")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "patch_size": 14,
    "image_size": 56,
    "num_channels": 3,
    "in_channels": 3,
    "depth": 2,
    "embed_dim": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "projection_dim": 64,
    "mm_hidden_size": 64,
    "projector_hidden_size": 64,
    "layers": 2,
    "width": 64,
    "heads": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [],
    "fullatt_block_indexes": [1],
    "mm_tokens_per_image": 4,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "_sliding_window_pattern": 2,
}
"""What every configuration gets where it has a field of that name."""
TEXT_NAMES = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "vocab_size", "rope_theta", "max_position_embeddings", "tie_word_embeddings"),
)
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma4_unified": {"text_config.num_kv_shared_layers": 0},
    "mistral3": {"text_config.model_type": "mistral", "model_type": "mistral3"},
    "lfm2_vl": {"text_config.layer_types": ["conv", "full_attention"]},
    "internvl": {"text_config": {"model_type": "qwen2", **{name: SIZES[name] for name in TEXT_NAMES}}},
    "mimo_v2": {"text_config.hybrid_layer_pattern": [0, 1], "text_config.moe_layer_freq": [0, 1]},
    "cohere_compass": {
        "text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
        }
    },
    "glm5_next": {"text_config.num_key_value_heads": 4},
    "mage_vl": {"vision_config.num_attention_heads": 2},
    "glm4v": {"text_config.eos_token_id": [2]},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_scaling": None},
    "gemma4": {
        "text_config.layer_types": ["sliding_attention", "full_attention"],
        "text_config.num_kv_shared_layers": 0,
    },
    "gemma3n": {"text_config.layer_types": ["sliding_attention", "full_attention"]},
    "step3p7": {"text_config.num_attention_groups": 2},
}
"""By folder and path: numbers that must fit others there."""
ANSWER = "verdict: "
MAX_CPU_S = 40
PLACEHOLDER = 7
"""The token that pictures stand at."""
EDGES = (56, 64, 112)
COUNTS = (1, 2, 4, 5, 8, 9, 12, 16, 17, 20, 25, 32, 36, 49, 64, 65, 81, 128, 144, 196, 256)


class Verdict(NamedTuple):
    """What became of a folder.

    kind  "batches": rows of text and pictures of several lengths share a forward; "text rows": those of text do, and
          `reason` says why no picture was among them; "no rows"; "no tiny config": the numbers above do not make one
          of this family, or a slow one; "crashes"; "writes no text"; "text alone"; "in the family table"
    """

    folder: str
    kind: str
    reason: str = ""


def folders() -> list[str]:
    """Of all model packages that mlx-vlm has."""
    import mlx_vlm.models

    return sorted(found.name for found in pkgutil.iter_modules(mlx_vlm.models.__path__) if found.ispkg)


def survey(folder: str) -> Verdict:
    """Tries one. Whatever its code raises is the reason."""
    try:
        own = importlib.import_module(f"mlx_vlm.models.{folder}")
    except Exception as error:
        return Verdict(folder, "no tiny config", _said(error))
    config_class, model_class = getattr(own, "ModelConfig", None), getattr(own, "Model", None)
    if not (dataclasses.is_dataclass(config_class) and isinstance(model_class, type)):
        return Verdict(folder, "writes no text", "no language model in it")
    names = {item.name for item in dataclasses.fields(config_class)}
    if folder in FAMILIES:
        return Verdict(folder, "in the family table")
    if not names & set(TOWERS):
        return Verdict(folder, "text alone", "loads by mlx-lm, where that has it")
    if not hasattr(model_class, "get_input_embeddings"):
        return Verdict(folder, "writes no text", "no get_input_embeddings: embeds, detects or speaks")
    try:
        config = {**tiny(config_class, own), "model_type": folder}
        for path, value in OVERRIDES.get(folder, {}).items():
            _set(config, path.split("."), value)
        mx.random.seed(0)
        module = build_with_towers(config)
        module.eval()
    except Exception as error:
        return Verdict(folder, "no tiny config", _said(error))
    try:
        network = Network(module)
        network.check()
        make_rows(network, prefill_chunk_tokens=8).prove()
    except Exception as error:
        return Verdict(folder, "no rows", _said(error))
    try:
        _prove_pictures(network, config)
    except Exception as error:
        return Verdict(folder, "text rows", _said(error))
    return Verdict(folder, "batches")


def tiny(config_class: type, own: Any) -> dict[str, Any]:
    """A configuration of small numbers, by the names of the fields; what has a default and another name keeps it."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config_class):
        if item.name.endswith("_config") and (inner := _class_of(item, own)) not in (None, config_class):
            found[item.name] = tiny(inner, own)
        elif item.name in SIZES:
            found[item.name] = SIZES[item.name]
        elif re.fullmatch(r"(image|img|media_placeholder)_token_(id|index)", item.name):
            found[item.name] = PLACEHOLDER
        elif item.name == "model_type":
            if item.default is dataclasses.MISSING:
                found[item.name] = _model_type(config_class, own)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            found[item.name] = _of_type(str(item.type))
    return found


def _model_type(config_class: type, own: Any) -> str:
    """One that the module which takes this configuration accepts, by what its code compares it with."""
    part = "vision" if "Vision" in config_class.__name__ else "language"
    module = sys.modules.get(f"{own.__name__}.{part}")
    source = inspect.getsource(module) if module is not None else ""
    compared = re.findall(r"""model_type\s*(?:not in|in|!=|==)\s*[\[({]?\s*["']([\w.-]+)["']""", source)
    return compared[0] if compared else own.__name__.rsplit(".", 1)[-1]


def _set(config: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        config = config.setdefault(name, {})
    config[path[-1]] = value


def _class_of(item: dataclasses.Field, own: Any) -> type | None:
    wanted = item.name.removesuffix("_config").title().replace("_", "") + "Config"
    candidates = [*re.findall(r"\w+", str(item.type)), getattr(item.type, "__name__", ""), wanted]
    places = [own, *(sys.modules.get(f"{own.__name__}.{name}") for name in ("config",))]
    for name in candidates:
        for place in places:
            found = getattr(place, name, None)
            if dataclasses.is_dataclass(found) and isinstance(found, type):
                return found
    return None


def _of_type(said: str) -> Any:
    kinds = {
        "int": 2,
        "float": 1e-5,
        "bool": False,
        "str": "",
        "List": [],
        "list": [],
        "Dict": {},
        "dict": {},
    }
    return next((value for name, value in kinds.items() if name in said), None)


def _prove_pictures(network: Network, config: dict[str, Any]) -> None:
    """Rows of text, one picture and two, in one batch ≡ each alone in the family's own code; raises if not."""
    vision = Vision(network, config)
    inputs, count = _find_input(vision)
    rows = [(), (1,), (2, 3)]
    prompts, pictures = [], []
    for seeds in rows:
        tokens, placed = [11, 12, 13], []
        for seed in seeds:
            placed.append((len(tokens), seed))
            tokens += [PLACEHOLDER] * count + [20 + seed]
        prompts.append(tokens)
        pictures.append(placed)
    expected = [
        _alone(network, vision, tokens, placed, inputs, count)
        for tokens, placed in zip(prompts, pictures, strict=True)
    ]
    found = _together(network, vision, prompts, pictures, inputs, count)
    for index, (one, two) in enumerate(zip(found, expected, strict=True)):
        away = mx.abs(one - two).max().item() / max(mx.abs(two).max().item(), 1e-6)
        if not away < 1e-3:
            raise AssertionError(f"row {index} is {away:.1g} away from mlx-vlm's own")


def _media(vision: Vision, inputs: Mapping[str, Any], seed: int, start: int, count: int) -> Media:
    given = {
        name: np.random.default_rng(seed).normal(size=value).astype(np.float32)
        if name == "pixel_values"
        else value
        for name, value in inputs.items()
    }
    positions = np.arange(start, start + count, dtype=np.int32)
    return Media("image", str(seed), positions, given, count)


def _find_input(vision: Vision) -> tuple[dict[str, Any], int]:
    """What a picture is for this family, found by trying: (shape of pixels, other inputs), and how many vectors."""
    said = "no input tried"
    for inputs in _inputs(vision):
        for count in COUNTS:
            try:
                features = [vision.encode(_media(vision, inputs, seed, 0, count)) for seed in (1, 2)]
                mx.eval(features)
            except Exception as error:
                said = _said(error)
                continue
            one, two = (feature.embeddings for feature in features)
            moved = mx.abs(one - two).max(axis=-1)
            if moved.min().item() > 0:
                return inputs, count
            said = "another picture changes nothing"
    raise ValueError(f"no picture found that it takes; last: {said}")


def _inputs(vision: Vision) -> Iterator[dict[str, Any]]:
    module = vision._module
    own = [kind for kind in type(module).__mro__ if kind.__module__.startswith("mlx_vlm.")]
    source = "".join(map(inspect.getsource, own))
    if "grid_thw" in source:
        for patch in (14, 16):
            for channels in (3 * 2 * patch * patch, 3 * patch * patch):
                yield {"pixel_values": (16, channels), "image_grid_thw": np.array([[1, 4, 4]])}
            yield {"pixel_values": (16, 3, patch, patch), "image_grid_thw": np.array([[1, 4, 4]])}
    if "grid_hw" in source:
        yield {"pixel_values": (16, 3, 14, 14), "image_grid_hws": np.array([[4, 4]])}
    for edge in EDGES:
        sized = {"image_sizes": np.array([[edge, edge]])} if "image_sizes" in source else {}
        yield {"pixel_values": (1, 3, edge, edge), **sized}
        yield {"pixel_values": (1, 1, 3, edge, edge), **sized}
        yield {"pixel_values": (1, 2, 3, edge, edge), **sized}
        yield {"pixel_values": (1, edge, edge, 3), **sized}


def _alone(
    network: Network,
    vision: Vision,
    tokens: list[int],
    placed: list[tuple[int, int]],
    inputs: Mapping[str, Any],
    count: int,
) -> mx.array:
    """[D] behind the row, by the family's own embedding of its pictures and language model, without a cache."""
    embeddings, extras = vision.embed(mx.array([tokens])), {}
    features = [vision.encode(_media(vision, inputs, seed, start, count)) for start, seed in placed]
    placings = [
        Placed(0, np.arange(start, start + count), one)
        for (start, _), one in zip(placed, features, strict=True)
    ]
    made, extras = vision.inputs(mx.array([tokens]), placings)
    media = [_media(vision, inputs, seed, start, count) for start, seed in placed]
    rope = vision.rope_index(tokens, media)
    if rope is not None:
        extras["position_ids"] = mx.array(rope.positions)[:, None]
    out = network.text(
        mx.array([tokens]), inputs_embeds=embeddings if made is None else made, cache=None, **extras
    )
    return getattr(out, "logits", out)[0, -1]


def _together(
    network: Network,
    vision: Vision,
    prompts: list[list[int]],
    pictures: list[list[tuple[int, int]]],
    inputs: Mapping[str, Any],
    count: int,
) -> list[mx.array]:
    """[V] behind each row: all of one batch, in two chunks."""
    rows = make_rows(network, prefill_chunk_tokens=512)
    bucket = Bucket(PLAIN, 1024)
    rows.resize({bucket: len(prompts)})
    lengths = [len(tokens) for tokens in prompts]
    last: list[mx.array] = []
    is_recurrent = rows.cost.state_bytes > 0
    groups = [[index] for index in range(len(prompts))] if is_recurrent else [list(range(len(prompts)))]
    for group in groups:
        width = max(lengths[index] for index in group)
        padded = np.zeros((len(group), width), dtype=np.int32)
        positions = np.zeros((3, len(group), width), dtype=np.int32)
        placed: list[Placed] = []
        for at, index in enumerate(group):
            padded[at, : lengths[index]] = prompts[index]
            positions[:, at] = np.arange(width)
            media = [_media(vision, inputs, seed, start, count) for start, seed in pictures[index]]
            rope = vision.rope_index(prompts[index], media)
            if rope is not None:
                positions[:, at, : lengths[index]] = rope.positions
            for one in media:
                features: Features = vision.encode(one)
                placed.append(Placed(at, one.positions, features))
        rows.set_span(
            Span(
                [SpanPart(bucket, group, [0] * len(group), [True] * len(group))],
                width,
                group,
                len(prompts),
            )
        )
        embeddings, extras = vision.inputs(mx.array(padded), placed)
        if vision.positions:
            extras["position_ids"] = mx.array(positions)
        hidden = network.hidden(mx.array(padded), rows.caches, embeddings, extras)
        logits = network.logits(hidden)
        mx.eval(logits, rows.arrays())
        last += [logits[at, lengths[index] - 1] for at, index in enumerate(group)]
    return last


def _said(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.split("Traceback")[0][:160]


def surveyed(chosen: Iterable[str]) -> Iterator[Verdict]:
    """Each tried in a process beside this one: a scatter beyond an array's end takes its process with it."""
    worker: subprocess.Popen[str] | None = None
    try:
        for folder in chosen:
            if worker is None or worker.poll() is not None:
                command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
                worker = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=os.environ | {"MLX_DISABLE_COMPILE": "1"},
                )
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{folder}\n")
            worker.stdin.flush()
            line = next((line for line in worker.stdout if line.startswith(ANSWER)), None)
            if line is None:
                yield Verdict(folder, "crashes", f"its process ended with {worker.wait()}")
            else:
                yield Verdict(*json.loads(line.removeprefix(ANSWER)))
    finally:
        if worker is not None:
            worker.kill()
            worker.communicate()


def work() -> None:
    """Folders in, a line each; verdicts out, likewise."""
    signal.signal(signal.SIGPROF, _give_up)
    for line in sys.stdin:
        folder = line.strip()
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
        try:
            verdict = survey(folder)
        except TimeoutError as error:
            verdict = Verdict(folder, "no tiny config", str(error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(ANSWER + json.dumps(verdict), flush=True)


def _give_up(*_: object) -> None:
    raise TimeoutError(f"takes more than {MAX_CPU_S} s")


def main() -> None:
    """Prints the table, one line a folder that is more than text; then how many of each kind."""
    counts: Counter[str] = Counter()
    print("| folder | verdict | reason |\n|---|---|---|")
    for verdict in surveyed(sys.argv[1:] or folders()):
        counts[verdict.kind] += 1
        if verdict.kind not in ("text alone", "in the family table"):
            print(f"| {verdict.folder} | {verdict.kind} | {verdict.reason} |", flush=True)
    print(f"\n{', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))}")


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--worker"] else main()
