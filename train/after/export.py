"""An adapter and its base become one ordinary Hugging Face folder, with a measured proof of what was lost.

The fuse is done in full precision (a quantized base is dequantized first) and nothing is re-quantized unless
asked. The folder is then read back from disk and compared with base + adapter, which was never fused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm import utils as mlx_lm_utils
from rich.console import Console

from serve.adapters.manifest import AdapterConfig, Lineage, check_whole, read_config, read_tensors
from serve.errors import AdapterError, ConfigError, DataError, StorageError
from serve.model.loading import DTYPES, LoadedModel, build_random, cast, load, resolve
from serve.model.loading import read_config as read_model_config
from serve.model.network import TextNetwork
from serve.model.quantization import Quantization
from serve.model.template_rules import make_template
from serve.model.weights import dequantize as dequantize_all
from serve.tables import Table, show, words
from train.adapters.adapt import AdapterSettings, adapted_layers, add_lora, set_tensors, train_all
from train.after.chat_files import chat_notes, write_chat_files
from train.data.batches import Batch, collate, validation_rows
from train.data.rules import TokenRules
from train.data.sources import read
from train.data.tokens import tokenize
from train.loop import checkpoint
from train.loop.loss import find_targets, target_logits
from train.recipe.recipe import Recipe, load_recipe

FIDELITY_FILE = "fidelity.json"
WEIGHTS_FILES = "model*.safetensors"
ROWS_PER_BATCH = 8
COPIED = ("*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "*.json")
NOT_COPIED = ("config.json", "model.safetensors.index.json", FIDELITY_FILE)
SPLITS: tuple[Literal["test", "valid", "train"], ...] = ("test", "valid", "train")
Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class ExportReport:
    """`fidelity.json`. Agreement of the exported folder with base + adapter, at the targets of held-out rows.

    KL is KL(base + adapter ‖ exported) in nats a token.
    """

    out: str
    adapter: str
    base: str
    bits: int | None
    group_size: int | None
    dtype: str
    top1_agreement: float
    kl_mean: float
    kl_max: float
    num_tokens: int
    num_rows: int
    num_bytes: int
    seconds: float
    split: str
    """Where the rows are from: test, else valid, else train."""


@dataclass(frozen=True)
class HeldOut:
    """Token rows to compare on, and the split they are from."""

    split: str
    batches: list[Batch]


def export(
    adapter: Path,
    out: Path,
    *,
    bits: Literal[4, 8] | None = None,
    group_size: int = 64,
    dtype: Dtype | None = None,
    base: str | None = None,
    data: Path | None = None,
    max_rows: int = 64,
    force: bool = False,
    console: Console | None = None,
) -> ExportReport:
    """Fuse, write, read back, compare.

    bits   quantize the fused weights (affine, in groups of `group_size`); None: full precision
    dtype  of the weights that are not quantized; None: as the base stores them
    base   where the base is; None: the one the adapter's manifest names
    data   a recipe, a .jsonl file or a folder with one to compare on; None: the recipe saved beside the adapter
    force  overwrite an earlier export, and take an adapter made for another base
    Raises AdapterError, ConfigError, ModelError, DataError, StorageError; a failed export leaves `out` as it was.
    """
    start_s = time.perf_counter()
    console = console or Console()
    _check_out(out, force)
    config = read_config(adapter)
    name = base or (config.lineage.base_model if config.lineage else None)
    if name is None:
        raise ConfigError(f"{adapter} does not say what its base is; name it with base")
    reference = load_adapted(adapter, config, name, is_other_base_fine=force)
    rows = held_out(adapter, data, reference, max_rows, config.lineage)
    partial = out.with_name(f".new-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        console.print(f"fusing {adapter} into {name}", highlight=False, soft_wrap=True)
        stored = write_fused(partial, adapter, config, name, bits=bits, group_size=group_size, dtype=dtype)
        exported = load(str(partial))
        agreement = compare(reference.network, exported.network, rows.batches)
        report = ExportReport(
            out=str(out),
            adapter=str(adapter),
            base=name,
            bits=bits,
            group_size=group_size if bits else None,
            dtype=stored,
            split=rows.split,
            num_bytes=sum(file.stat().st_size for file in partial.glob(WEIGHTS_FILES)),
            seconds=time.perf_counter() - start_s,
            **agreement,
        )
        checkpoint.write_synced(
            partial / FIDELITY_FILE, json.dumps(dataclasses.asdict(report), indent=2) + "\n"
        )
        checkpoint.publish(partial, out)
    except OSError as error:
        raise StorageError(f"{out}: the export could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    show(console, _table(report))
    for note in chat_notes(config.lineage, reference):
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return report


def load_adapted(
    adapter: Path,
    config: AdapterConfig,
    base: str,
    *,
    dequantize: bool | None = None,
    is_other_base_fine: bool = False,
) -> LoadedModel:
    """The base with the adapter in place, unfused. AdapterError if it was trained on other weights."""
    tensors = read_tensors(adapter, config)
    if config.fine_tune_type == "full":
        return _load_full(tensors, config, base, adapter, is_other_base_fine)
    model = load(base, dequantize=dequantize, quantize=_packing_of(config, base))
    _check_base(model, config, base, is_other_base_fine)
    settings = AdapterSettings(
        rank=config.rank,
        scale=config.scale,
        keys=config.keys or None,
        num_layers=config.num_layers,
        fine_tune_type=config.fine_tune_type,
    )
    add_lora(model.network, settings)
    set_tensors(model.network, tensors, str(adapter))
    model.network.module.eval()
    return model


def _packing_of(config: AdapterConfig, base: str) -> Quantization | None:
    """How the base was packed when the adapter was trained; None too where `base` is a packed folder already."""
    how = config.lineage.quantize if config.lineage else None
    return Quantization(**how) if how and "quantization" not in read_model_config(resolve(base)) else None


def _load_full(
    tensors: dict[str, mx.array], config: AdapterConfig, base: str, adapter: Path, is_other_base_fine: bool
) -> LoadedModel:
    path = resolve(base)
    has_weights = any(path.glob("*.safetensors"))
    model = load(base) if has_weights else build_random(path, 0, name=base)
    _check_base(model, config, base, is_other_base_fine)
    train_all(model.network, num_layers=config.num_layers)
    set_tensors(model.network, tensors, str(adapter))
    return model


def _check_base(model: LoadedModel, config: AdapterConfig, base: str, is_other_base_fine: bool) -> None:
    lineage = config.lineage
    if is_other_base_fine or lineage is None or lineage.base_fingerprint == model.fingerprint:
        return
    raise AdapterError(
        f"the adapter was trained on {lineage.base_model} ({lineage.base_fingerprint[:19]}…), but {base} holds "
        f"other weights ({model.fingerprint[:19]}…); name the right base, or force it"
    )


def fuse(network: TextNetwork) -> None:
    """Fold every adapted layer into a plain one, and dequantize the rest, in place."""
    fused = [(path, layer.fuse()) for path, layer in adapted_layers(network).items()]
    network.module.update_modules(tree_unflatten(fused))
    dequantize_all(network.module)


def write_fused(
    folder: Path,
    adapter: Path,
    config: AdapterConfig,
    base: str,
    *,
    bits: Literal[4, 8] | None,
    group_size: int,
    dtype: Dtype | None,
) -> str:
    """Write the fused model as a Hugging Face folder. Returns the dtype of its unquantized weights."""
    model = load_adapted(adapter, config, base, dequantize=True, is_other_base_fine=True)
    fuse(model.network)
    module = model.network.module
    stored = dtype or _stored_dtype(model.path)
    cast(module, DTYPES[stored])
    saved = {key: value for key, value in model.config.items() if not key.startswith("quantization")}
    saved["torch_dtype"] = stored
    if "dtype" in saved:
        saved["dtype"] = stored
    if bits is not None:
        _check_group_size(module, group_size)
        with contextlib.redirect_stdout(None):  # mlx-lm prints the bits per weight
            module, saved = mlx_lm_utils.quantize_model(module, saved, group_size, bits)
    folder.mkdir(parents=True)
    _copy_beside(model.path, folder)
    if config.lineage is not None:
        write_chat_files(folder, config.lineage, model)
    try:
        mlx_lm_utils.save_model(folder, module)
    except RuntimeError as error:
        raise StorageError(f"{folder}: {error}") from error
    mlx_lm_utils.save_config(saved, folder / "config.json")
    for file in folder.glob(WEIGHTS_FILES):
        check_whole(file)
        checkpoint.sync(file)
    return stored


def _stored_dtype(path: Path) -> Dtype:
    """What most of the base's floating weights are stored as; float32 where there are none."""
    sizes = dict.fromkeys(DTYPES, 0)
    for file in path.glob("*.safetensors"):
        for tensor in _lazily(file).values():
            name = str(tensor.dtype).removeprefix("mlx.core.")
            if name in sizes:
                sizes[name] += tensor.size
    best: Any = max(sizes, key=lambda name: sizes[name])
    return best if sizes[best] else "float32"


def _lazily(file: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict), "a safetensors file is a dict of tensors"
    return tensors


def _check_group_size(module: nn.Module, group_size: int) -> None:
    if group_size not in (32, 64, 128):
        raise ConfigError(f"group_size: found {group_size}; MLX quantizes in groups of 32, 64 or 128")
    odd = [
        f"{path} has {child.weight.shape[-1]} inputs"
        for path, child in module.named_modules()
        if hasattr(child, "to_quantized") and child.weight.shape[-1] % group_size
    ]
    if odd:
        raise ConfigError(
            f"group_size: {group_size} does not divide all layers: {odd[0]} ({len(odd)} such layers)"
        )


def _copy_beside(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation settings and model code, as the base has them."""
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            if file.name not in NOT_COPIED:
                shutil.copyfile(file, folder / file.name)


def held_out(
    adapter: Path, data: Path | None, model: LoadedModel, max_rows: int, lineage: Lineage | None = None
) -> HeldOut:
    """Token rows to compare on: test rows, else validation rows, else training rows of a recipe or a data file.

    lineage  the adapter's, whose chat template they are rendered with
    """
    recipe = _recipe_for(adapter, data, model)
    rules = TokenRules.of_adapter(recipe, lineage)
    template = make_template(model.tokenizer, rules.template)
    rows, split, problems = [], "", []
    for name in SPLITS:
        try:
            rows, split = tokenize(read(recipe, name), template, rules)[0], name
        except DataError as error:  # a data set without test rows says so by this
            problems.append(str(error))
        if rows:
            break
    if not rows:
        raise DataError("\n".join([f"{data or adapter}: no rows to compare the export on", *problems]))
    num_batches = math.ceil(max_rows / ROWS_PER_BATCH)
    chosen = validation_rows([len(row) for row in rows], ROWS_PER_BATCH, num_batches)
    return HeldOut(split, [collate(rows, ids) for ids in chosen])


def _recipe_for(adapter: Path, data: Path | None, model: LoadedModel) -> Recipe:
    if data is not None and data.suffix not in (".yaml", ".yml"):
        return Recipe.model_validate({"model": model.name, "datasets": ({"path": str(data)},)})
    path = data or adapter / "recipe.yaml"
    if not path.exists():
        raise DataError(
            f"{adapter} has no recipe.yaml to find held-out rows by; name a file of rows with data"
        )
    return load_recipe(path)


def compare(reference: TextNetwork, exported: TextNetwork, batches: Sequence[Batch]) -> dict[str, Any]:
    """Agreement at the targets: what the two networks would say there."""
    same, divergences = 0, []
    for batch in batches:
        found = find_targets(batch.tokens, batch.is_target)
        tokens, positions = mx.array(batch.tokens), mx.array(found.positions)
        p, q = (log_probabilities(network, tokens, positions) for network in (reference, exported))
        same += int(np.sum(np.array(p.argmax(-1) == q.argmax(-1))))
        divergences.append(np.array((mx.exp(p) * (p - q)).sum(-1)))
    kl = np.maximum(np.concatenate(divergences), 0.0)  # rounding can leave −1e-9
    return {
        "top1_agreement": same / len(kl),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "num_tokens": len(kl),
        "num_rows": sum(len(batch.row_ids) for batch in batches),
    }


def log_probabilities(network: TextNetwork, tokens: mx.array, positions: mx.array) -> mx.array:
    """[N, V] float32, normalised."""
    logits = target_logits(network, tokens, positions).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _check_out(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; an export is a folder")
    if not any(out.iterdir()):
        return
    if not (out / FIDELITY_FILE).exists():
        raise ConfigError(
            f"{out} is not empty and not an export (it has no {FIDELITY_FILE}); it is left alone"
        )
    if not force:
        raise ConfigError(f"{out} holds an export already; force replaces it")


def _table(report: ExportReport) -> Table:
    table = Table("what", words("measured"), title=f"{report.out}", has_headings=False)
    form = f"{report.bits} bit, groups of {report.group_size}" if report.bits else report.dtype
    table.add("weights", f"{form}, {report.num_bytes / 1e6:,.1f} MB")
    table.add("top-1 agreement", f"{report.top1_agreement:.2%} of {report.num_tokens:,} target tokens")
    table.add("KL(base + adapter ‖ export)", f"mean {report.kl_mean:.2e}, max {report.kl_max:.2e} nats")
    table.add("rows", f"{report.num_rows:,}, {report.split} split")
    return table
