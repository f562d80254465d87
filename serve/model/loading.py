"""A folder or hub name in, a LoadedModel out. Knows mlx-lm's loaders and the dtype policy, not serving."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as mlx_lm_load_tokenizer

from serve import device
from serve.beside import evaluate
from serve.errors import ModelError, NotFoundError
from serve.model.family_template import template_beside
from serve.model.network import Network
from serve.model.quantization import Quantization
from serve.model.retold import Retold
from serve.model.rope import in_older_words
from serve.model.towers import NESTED, build_with_towers, has_towers, load_with_towers
from serve.model.vision import Vision
from serve.model.weights import QUANTIZED
from serve.model.weights import dequantize as dequantize_all

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
"""transformers' name for a warning that it has given already."""
FINGERPRINT_SAMPLE_BYTES = 1 << 16
DEFAULT_MAX_CONTEXT = 4096
LOAD_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, ImportError)


@dataclass(frozen=True)
class LoadedModel:
    """A base model ready to train or serve. `fingerprint` names its weights; `max_context` is in tokens."""

    name: str
    path: Path
    network: Network
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    fingerprint: str
    max_context: int
    vision: Vision | None = None
    """What it sees and hears with; None: a text model."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the weights were made."""


def load(
    path_or_repo: str,
    *,
    name: str | None = None,
    dequantize: bool | None = None,
    dtype: str | None = None,
    quantize: Quantization | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load weights and tokenizer of a local folder or a hub repository.

    dequantize  None: as the device's policy says (yes on CPU, where quantized matmuls are 100 times slower)
    dtype       float32 | float16 | bfloat16; None: float32 on CPU, as stored elsewhere
    quantize    pack the weights first, from the dtype they are stored in; what `dequantize` then unpacks are the
                packed weights' values
    Raises NotFoundError when there is nothing at that name, ModelError when it cannot be used.
    """
    path = resolve(path_or_repo, revision)
    notes: list[str] = []
    module, config = _load_module(path, path_or_repo, trust_remote_code, notes)
    on_cpu = device.backend() == "cpu"
    is_unpacked = dequantize if dequantize is not None else on_cpu
    if quantize is not None:
        config = pack(module, config, quantize, path_or_repo, notes)
        if is_unpacked:
            notes.append(
                f"quantize: the weights are rounded to {quantize} and computed with in full precision; quantized "
                f"matmuls are far slower on CPU, so this saves no memory here"
            )
    if is_unpacked:
        dequantize_all(module)
    target = DTYPES[dtype] if dtype else (mx.float32 if on_cpu else None)
    if target is not None:
        cast(module, target)
    return _finish(path, name or path_or_repo, module, config, trust_remote_code, quantize, notes)


def _load_module(
    path: Path, name: str, trust_remote_code: bool, notes: list[str]
) -> tuple[nn.Module, dict[str, Any]]:
    """Lazy weights: with towers by mlx-vlm, where the folder has any, else by mlx-lm."""
    config = read_config(path)
    problem, seeing = "", None
    if has_towers(config):
        try:
            seeing = load_with_towers(path, trust_remote_code=trust_remote_code)
            if Network(seeing).has_towers:
                return seeing, config
        except LOAD_ERRORS as error:
            problem = str(error)
    try:
        module, config = mlx_lm_utils.load_model(
            path, lazy=True, model_config=config, trust_remote_code=trust_remote_code
        )
    except LOAD_ERRORS as error:
        if seeing is None:
            raise ModelError(f"{name}: cannot be loaded: {problem or error}{_own_code(error)}") from error
        module = seeing
    if has_towers(config):
        problem = problem or "it has no weights"
        notes.append(
            f"{name} runs on text alone: its encoder of pictures or sounds cannot be loaded: {problem}"
        )
    return module, config


def cast(module: nn.Module, dtype: mx.Dtype) -> None:
    """Floating weights in another dtype, in place. A narrower one leaves out what the family keeps as it is.

    mlx-lm's families say by `cast_predicate` which arrays (biases of routers, decays) have no digits to lose.
    """
    keeps_cast = getattr(module, "cast_predicate", lambda path: True)

    def converted(path: str, value: mx.array) -> mx.array:
        is_wider = dtype.size >= value.dtype.size and dtype == mx.float32
        moves = mx.issubdtype(value.dtype, mx.floating) and (is_wider or keeps_cast(path))
        return value.astype(dtype) if moves else value

    module.update(tree_map_with_path(converted, module.parameters()))


def pack(
    module: nn.Module, config: dict[str, Any], quantize: Quantization, name: str, notes: list[str]
) -> dict[str, Any]:
    """Quantize a model in place, layer by layer as mlx-lm would, but for towers. Returns the config with
    `quantization`.

    Layers that cannot be packed stay, and `notes` says which. ModelError if the model is quantized already, or
    nothing of it can be.
    """
    if "quantization" in config or any(isinstance(m, QUANTIZED) for m in module.modules()):
        raise ModelError(
            f"quantize: {name} is quantized already; leave it out, or name the model in full precision"
        )
    wanted = _of_language(module)
    before = sorted(p for p, m in module.named_modules() if hasattr(m, "to_quantized") and wanted(p, m))
    with contextlib.redirect_stdout(None):  # mlx-lm prints the bits per weight
        _, packed = mlx_lm_utils.quantize_model(
            module,
            config,
            quantize.group_size,
            quantize.bits,
            mode=quantize.mode,
            quant_predicate=wanted,
        )
    modules = dict(module.named_modules())
    left = [path for path in before if not isinstance(modules[path], QUANTIZED)]
    if len(left) == len(before):
        raise ModelError(f"quantize: no layer of {name} can be packed in groups of {quantize.group_size}")
    if left:
        notes.append(f"quantize: {len(left)} of {len(before)} layers stay as they are, {left[0]} first")
    return packed


def _of_language(module: nn.Module) -> Callable[[str, nn.Module], Any]:
    """Whether, and how, a layer is packed: as the family says, and of towers and projectors nothing."""
    network = Network(module)
    prefix = f"{network.text_path}." if network.has_towers else ""
    own = getattr(module, "quant_predicate", None) or (lambda path, layer: True)
    return lambda path, layer: path.startswith(prefix) and own(path, layer)


def build_random(path: Path, seed: int, *, name: str | None = None) -> LoadedModel:
    """A model with the architecture of `path`/config.json and random float32 weights, and its tokenizer."""
    config = read_config(path)
    try:
        mx.random.seed(seed)
        if has_towers(config):
            module = build_with_towers(config)
        else:
            model_class, args_class = mlx_lm_utils._get_classes(config)
            module = model_class(args_class.from_dict(config))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be built: {error}") from error
    module.set_dtype(mx.float32)
    return _finish(path, name or str(path), module, config, False, None, [])


def _finish(
    path: Path,
    name: str,
    module: nn.Module,
    config: dict[str, Any],
    trust_remote_code: bool,
    quantize: Quantization | None,
    notes: list[str],
) -> LoadedModel:
    module.eval()
    evaluate(module.parameters())
    network = Network(module)
    network.check()
    vision = None
    if has_towers(config) and network.has_towers:
        try:
            vision = Vision(network, config)
        except ModelError as error:
            notes.append(f"{name} runs on text alone: {error}")
    tokenizer = load_tokenizer(str(path), config=config, trust_remote_code=trust_remote_code)
    return LoadedModel(
        name=name,
        path=path,
        network=network,
        tokenizer=tokenizer,
        config=config,
        fingerprint=fingerprint(path, quantize),
        max_context=max_context_of(config),
        vision=vision,
        notes=tuple(notes),
    )


def sketch_vision(path: Path) -> Vision:
    """What a model's network wants to be told of media, without its weights. ModelError if it cannot be built."""
    config = read_config(path)
    try:
        module = build_with_towers(config)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be built: {error}") from error
    return Vision(Network(module), config, is_sketch=True)


def load_tokenizer(
    path_or_repo: str, *, config: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> TokenizerWrapper:
    """The tokenizer alone, without weights."""
    path = resolve(path_or_repo)
    config = config if config is not None else read_config(path)
    ends = config.get("eos_token_id") or _text_config(config).get("eos_token_id")
    try:
        tokenizer = mlx_lm_load_tokenizer(path, {"trust_remote_code": trust_remote_code}, eos_token_ids=ends)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"{path_or_repo}: its tokenizer cannot be loaded: {error}{_own_code(error)}"
        ) from error
    if has_towers(config):
        source = template_beside(path, config, tokenizer.has_chat_template)
        tokenizer = Retold(tokenizer, source) if source is not None else tokenizer
    # It warns of "indexing errors" once for a long text; what is too long is cut, dropped or refused here, and told.
    tokenizer.deprecation_warnings[TOO_LONG] = True
    return tokenizer


def found_here(path_or_repo: str, revision: str | None = None) -> Path | None:
    """The local folder of a model, be it one of the hub's that was downloaded; None where there is none. Asks nobody,
    and does not say that the folder is whole. NotFoundError for a path at which nothing is."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if not is_hub_name(path_or_repo):
        raise NotFoundError(f"no model folder at {path_or_repo}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path_or_repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None


def _is_whole(folder: Path) -> bool:
    """Whether a download has ended: all of the weights that it names are there, and a configuration."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shards = {str(name) for name in index["weight_map"].values()}
    except FileNotFoundError:
        shards = {file.name for file in folder.glob("*.safetensors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(shards) and all((folder / name).exists() for name in {"config.json", *shards})


def expected_bytes(
    folder: Path, dtype: str | None, quantize: Quantization | None, dequantize: bool | None
) -> int:
    """What the weights in a folder will take once they are loaded so, about: by its files' sizes and its config."""
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = read_config(folder)
    stored = DTYPES.get(str(config.get("torch_dtype") or config.get("dtype")), mx.float32).size * 8.0
    packed = config.get("quantization")
    on_cpu = device.backend() == "cpu"
    is_unpacked = dequantize if dequantize is not None else on_cpu
    computed = DTYPES[dtype].size * 8.0 if dtype else (32.0 if on_cpu else stored)
    bits = computed
    if isinstance(packed, dict) and isinstance(packed.get("bits"), int):
        stored = packed["bits"] + 0.5  # a scale and a bias for each group
        bits = computed if is_unpacked else stored
    elif quantize is not None and not is_unpacked:
        bits = quantize.bits + 0.5
    return int(num_bytes * bits / stored)


def is_hub_name(path_or_repo: str) -> bool:
    """Whether it reads as `owner/name`, and as no path."""
    is_path = Path(path_or_repo).expanduser().is_absolute() or path_or_repo.startswith((".", "~"))
    return not is_path and path_or_repo.count("/") == 1


def resolve(path_or_repo: str, revision: str | None = None) -> Path:
    """The local folder of a model. One of the hub's that was downloaded is taken as it is here, and the hub is not
    asked; what is not here, or not whole, is downloaded, unless HF_HUB_OFFLINE says not to."""
    here = found_here(path_or_repo, revision)
    if here is not None and (Path(path_or_repo).expanduser().is_dir() or _is_whole(here)):
        return here
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if is_offline_mode():
        found = "the hub's cache has a part of it alone" if here is not None else "nor in the hub's cache"
        raise NotFoundError(
            f"no model {path_or_repo!r}: not a folder here, {found}, and HF_HUB_OFFLINE says not to ask the hub"
        )
    try:
        return Path(
            snapshot_download(
                path_or_repo, revision=revision, allow_patterns=list(mlx_lm_utils.DEFAULT_ALLOW_PATTERNS)
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise NotFoundError(
            f"no model {path_or_repo!r}: not a folder here, nor whole in the hub's cache, and the hub said: {error}"
        ) from error


def _own_code(error: BaseException | str) -> str:
    """What to say of a model that brings its own code; empty where it is something else."""
    if "trust_remote_code" not in str(error):
        return ""
    return (
        "; it is made of code of its own, which would have to be run: Lathe runs no code that comes with a model "
        "(trust_remote_code stays off)"
    )


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a model folder, in the words that all classes read."""
    try:
        return in_older_words(mlx_lm_utils.load_config(path))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is not a model folder: it has no config.json") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path / 'config.json'}: {error}") from error


def fingerprint(path: Path, quantize: Quantization | None = None) -> str:
    """A name for the weights in a folder: sha256 over each file's header, size and three samples of its bytes.

    Reads kilobytes of a checkpoint of any size. Two folders with the same fingerprint hold the same tensors for
    every purpose but a deliberate forgery. Packed as they are loaded, they are other weights with another name.
    """
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header_bytes, size)))
            for offset in (8 + header_bytes, size // 2, max(size - FINGERPRINT_SAMPLE_BYTES, 0)):
                stream.seek(offset)
                digest.update(stream.read(FINGERPRINT_SAMPLE_BYTES))
    if quantize is not None:
        digest.update(f"quantized:{quantize.mode}:{quantize.bits}:{quantize.group_size}".encode())
    return f"sha256:{digest.hexdigest()}"


def max_context_of(config: dict[str, Any]) -> int:
    """Tokens of prompt and answer together that a model's config allows."""
    text = _text_config(config)
    return int(text.get("max_position_embeddings") or text.get("n_positions") or DEFAULT_MAX_CONTEXT)


def vocab_size_of(config: dict[str, Any]) -> int:
    """Logits of a model, by its config."""
    return int(config.get("vocab_size") or _text_config(config)["vocab_size"])


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Where a model with towers, or of several parts, says what its language part is; else the whole."""
    inside = next((config[name] for name in NESTED if isinstance(config.get(name), dict)), config)
    return inside.get("text_config") or config
