"""Tiny real models and adapters, made once a session: folders on disk, loaded by the code under test."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import trustme
from cores import keep_to_one

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, and so are the children it starts
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    keep_to_one()

# Laws about floats: MLX multiplies float32 on CUDA with a half's digits unless told otherwise.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import transformers
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from sighted import Alone
from tiny import QWEN3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.import_utils import create_import_structure_from_path
from vlm_families import Reference, write_random_lora, write_vlm

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import write_adapter
from serve.cache.precision import PLAIN, KvPrecision
from serve.constraints.edit import GrammarEdit
from serve.engine.edited import edited
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request, Sampling
from serve.engine.sampler import Sampler
from serve.engine.thinking import Thinking
from serve.model.loading import LoadedModel, load
from serve.model.prompt import Prompt
from serve.model.weights import linear_modules, linear_shape


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--law-cases",
        type=lambda text: range(*map(int, text.split(":"))),
        default=range(0),
        metavar="START:STOP",
        help="further cases of test_composition.py's full product, under -m large: from this number on up to that",
    )
    parser.addoption(
        "--soak-times", type=int, default=1, help="so many times the requests of test_soak.py, under -m large"
    )


NEAR_TIE = 1e-4
"""Logits that are nearer than this may change places: the same sum over other shapes, or by another kernel, rounds
otherwise. That moves the lively models' logits by 3e-6; a wrong mask, position or slot moves
them by 0.1 and more. The likeliest two tokens are 0.13 apart in the median."""

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

RECURRENT = {
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 8,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "time_step_limit": [0.0, 10.0],
        "time_step_rank": "auto",
        "max_position_embeddings": 1024,
    },
    "qwen3_next": {
        **QWEN3,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
        "full_attention_interval": 2,
    },
}
"""Families whose layers keep recurrent state: all of them (mamba2), or beside attention (qwen3_next)."""


BEGIN_AT_ZERO = (
    "gate.weight",
    ".attn.x_",
    ".attn.k_",
    ".attn.r_k",
    "g_norm.weight",
    "ffn.x_k",
    "conv_1d.",
    "rg_lru.",
)
"""Parts of names of what a trained model has and a new one does not."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that several processes end together."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Of what comes with the tests hardly anything goes again: to look for it takes as long as all the rest."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.set_threshold(10_000)
        gc.enable()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, three special ones: enough for any text, no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_model(
    folder: Path,
    config: dict,
    *,
    seed: int = 0,
    is_lively: bool = True,
    louder: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """A random model of an mlx-lm family as a Hugging Face folder.

    A plain random model repeats one token and so hides cache and mask faults; these scales make its greedy text
    depend on every token before it (about 35 distinct tokens of 40). `louder`: more of them, by a part of the
    weight's name.
    """
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    module = model_class(args_class.from_dict(config))
    if is_lively:
        scales = {"o_proj": 4, "down_proj": 4, "q_norm": 8, "embed_tokens": 8}  # attention and its MLP
        scales |= {"in_proj": 4, "out_proj": 4, "w2": 4, **louder}  # recurrent layers
        scaled = tree_map_with_path(
            lambda path, w: w * next((k for part, k in scales.items() if part in path), 1),
            module.parameters(),
        )
        module.update(scaled)
        # Routers that begin at zero (deepseek) would send every token to the same experts, and recurrent layers that
        # do (rwkv7, recurrent_gemma) would remember nothing.
        asleep = [
            (path, weight)
            for path, weight in tree_flatten(scaled)
            if any(part in path for part in BEGIN_AT_ZERO) and not weight.any().item()
        ]
        module.load_weights(
            [(p, mx.random.normal(w.shape) / w.shape[-1] ** 0.5) for p, w in asleep], strict=False
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def children_have_what_users_have(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that tests start find this checkout and no torch, and know the names of transformers' models: see
    tests/children. The tests' own keeps it."""
    path = os.pathsep.join([str(Path(__file__).parent / "children"), str(Path(__file__).parents[1])])
    if inherited := os.environ.get("PYTHONPATH"):
        path += os.pathsep + inherited
    names = tmp_path_factory.mktemp("names") / "transformers.pickle"
    found = create_import_structure_from_path(Path(transformers.__file__).parent / "models")
    names.write_bytes(pickle.dumps(found))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("TEST_NAMES", str(names))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Clients find one certificate in place of the machine's hundreds, which each of them reads in 20 ms whatever it
    will speak. No test asks the network."""
    file = tmp_path_factory.mktemp("authority") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(file))
        yield


@pytest.fixture(scope="module", autouse=True)
def packages_are_set_aside() -> None:
    """As by a server: what is there by now is looked through no more, at each collection, for what could go."""
    if not gc.get_freeze_count():  # or a test has thawed it
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def own_randomness() -> None:
    """A test's random numbers are its own, whatever ran before it in the same process."""
    mx.random.seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes that test find what test_demo.py has trained, name by name, once it has."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "demo-runs"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lively random qwen3."""
    return write_model(tmp_path_factory.mktemp("models") / "lively", QWEN3)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model(name, config, seed=0, is_lively=True) → folder of a random model of any mlx-lm family."""
    root = tmp_path_factory.mktemp("families")
    return lambda name, config, **options: write_model(root / name, config, **options)


@pytest.fixture
def model(model_folder: Path) -> LoadedModel:
    """The lively model, freshly loaded: an engine wraps its layers, so tests do not share it."""
    return load(str(model_folder), name="lively")


@pytest.fixture
def fresh_engine(model_folder: Path) -> Callable[..., Engine]:
    """fresh_engine(**limits) → an engine over its own copy of the lively model: the reference to compare with."""
    return lambda **limits: Engine(load(str(model_folder), name="lively"), EngineLimits(**limits))


@pytest.fixture(scope="session")
def recurrent_folder(make_model: Callable[..., Path]) -> Callable[[str], Path]:
    """recurrent_folder("mamba2" | "qwen3_next") → folder of a lively random model, made once."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = make_model(f"lively-{name}", {**RECURRENT[name], "model_type": name})
        return folders[name]

    return folder


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """vlm_folder(family) → folder of a lively random model of one of VLM_FAMILIES, made once."""
    root = tmp_path_factory.mktemp("vlm")
    return cache(lambda family: write_vlm(family, root / family))


@pytest.fixture(scope="session")
def vlm_reference(vlm_folder: Callable[[str], Path]) -> Callable[..., Reference]:
    """vlm_reference(family, adapter=None) → mlx-vlm's own code over that model, the adapter's folder merged into it.

    The plain one is shared, and holds the model as mlx-vlm loads it: nobody wraps its layers.
    """
    plain = cache(lambda family: Reference(vlm_folder(family)))
    return lambda family, adapter=None: Reference(vlm_folder(family), adapter) if adapter else plain(family)


@pytest.fixture(scope="session")
def make_vlm_adapter(
    vlm_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """make_vlm_adapter(family, seed, **as write_random_lora) → folder of a random adapter of that model."""
    root = tmp_path_factory.mktemp("vlm-adapters")

    def make(family: str, seed: int, **options: object) -> Path:
        name = "-".join([family, str(seed), *(f"{key}={value}" for key, value in sorted(options.items()))])
        folder = root / name.replace("/", "_")
        if not folder.exists():
            write_random_lora(vlm_folder(family), folder, seed=seed, **options)
        return folder

    return make


@pytest.fixture(scope="session")
def make_adapter_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_adapter_of(model_folder, seed, rank=4, scale=2.0, keys=None, size=0.3) → folder of a random adapter.

    The same words name the same folder, written once; whoever changes a file works on a copy.
    """
    root = tmp_path_factory.mktemp("adapters")
    modules = cache(lambda folder: linear_modules(load(str(folder)).network.module))

    def make(
        model_folder: Path,
        seed: int,
        *,
        rank: int = 4,
        scale: float = 2.0,
        keys: Sequence[str] | None = None,
        size: float = 0.3,
    ) -> Path:
        folder = root / f"{model_folder.name}-{seed}-{rank}-{scale}-{size}-{'-'.join(keys or ())}"
        if folder.exists():
            return folder
        linears, tensors = modules(model_folder), {}  # loading draws random numbers too, so before the seed
        mx.random.seed(seed)
        for path, linear in linears.items():
            # Of model.layers.0.self_attn.q_proj the last two; of lm_head nothing.
            inside = path.partition("layers.")[2].split(".", 1)[1:]
            if inside and (keys is None or inside[0] in keys):
                inputs, outputs = linear_shape(linear)
                tensors[f"{path}.lora_a"] = mx.random.normal((inputs, rank)) * size
                tensors[f"{path}.lora_b"] = mx.random.normal((rank, outputs)) * size
        write_adapter(folder, tensors, AdapterConfig("lora", -1, rank, scale, keys=tuple(keys or ())))
        return folder

    return make


@pytest.fixture(scope="session")
def make_adapter(model_folder: Path, make_adapter_of: Callable[..., Path]) -> Callable[..., Path]:
    """make_adapter(seed, **as make_adapter_of) → folder of a random adapter of the lively model."""
    return partial(make_adapter_of, model_folder)


@pytest.fixture(scope="session")
def free_ports() -> Callable[..., int]:
    """free_ports(count=1) → the first of neighbouring ports that nobody listens on and the system hands to nobody.

    For a server that binds later: it is below the range from which every other test and client gets its port.
    """

    def find(count: int = 1) -> int:
        while True:
            first = random.SystemRandom().randrange(15_000, 32_000)
            with ExitStack() as stack:
                try:
                    for port in range(first, first + count):
                        stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                except OSError:
                    continue
                return first

    return find


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """make_request(id, text, max_tokens=24, adapter=None, **sampling); greedy unless told otherwise."""
    tokenizer = byte_tokenizer()

    def make(
        id: str, text: str = "hello there", *, max_tokens: int = 24, adapter=None, **sampling: object
    ) -> Request:
        settings = {"temperature": 0.0, "ignore_eos": True, **sampling}
        return Request(
            id=id,
            prompt=Prompt(tuple(tokenizer.encode(text))),
            sampling=Sampling(max_tokens=max_tokens, **settings),
            adapter=adapter,
        )

    return make


EDITING = ("logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")
UNEDITED = Sampling()


def _has_edits(request: Request) -> bool:
    """Whether anything of it changes logits. Where nothing does, mlx-lm's processor of a penalty of 1 would take as
    long as all else here."""
    asked = request.sampling
    has_settings = any(getattr(asked, name) != getattr(UNEDITED, name) for name in EDITING)
    return has_settings or request.thinking is not None or request.grammar is not None


def _edited(logits: mx.array, request: Request, answer: Sequence[int]) -> mx.array:
    """Logits [N, V] of the token after `answer` as the request's penalties have them, by mlx-lm's own processors; as
    its budget has them, of an answer that begins inside a thought; and as its grammar has them, from the answer's
    beginning on."""
    if not _has_edits(request):
        return logits
    asked, everything = request.sampling, 1 << 30
    reaches: dict[bool, dict[str, Any]] = {True: {"logit_bias": dict(asked.logit_bias)}, False: {}}
    reaches[True]["repetition_penalty"] = asked.repetition_penalty
    reaches[True]["repetition_context_size"] = asked.repetition_context_size or everything
    for name in ("presence", "frequency"):
        window = getattr(asked, f"{name}_context_size")
        reaches[window is not None][f"{name}_penalty"] = getattr(asked, f"{name}_penalty")
        reaches[window is not None][f"{name}_context_size"] = window or everything
    for has_prompt, settings in reaches.items():
        history = [*(request.prompt.token_ids if has_prompt else ()), *answer]
        for processor in make_logits_processors(**settings):
            logits = processor(mx.array(history), logits) if history else logits
    if len(answer) < asked.min_tokens:
        logits[:, list(asked.stop_token_ids)] = -mx.inf
    due = _due(request.thinking, tuple(answer))
    if due is not None:
        logits = mx.where(mx.arange(logits.shape[1])[None] == due, 0.0, -mx.inf)
    if request.grammar is not None:
        logits = _constrained(logits, request, tuple(answer))
    return logits


def _due(thinking: Thinking | None, answer: tuple[int, ...]) -> int | None:
    """The token that a thought's budget asks for next. A mark that the answer has begun by itself is gone on with."""
    if thinking is None or thinking.budget is None or not thinking.thoughts.begins_inside:
        return None
    mark, budget = thinking.thoughts.close_ids, thinking.budget
    if len(answer) < budget or _num_thought(thinking, answer) is not None:
        return None
    begun = max(
        count
        for count in range(min(budget, len(mark) - 1) + 1)
        if mark[:count] == answer[budget - count : budget]
    )
    return mark[begun + len(answer) - budget]


def _num_thought(thinking: Thinking, answer: tuple[int, ...]) -> int | None:
    """Tokens before the answer's text, where it begins inside a thought; None: it is there still."""
    mark = thinking.thoughts.close_ids
    ends = (at + len(mark) for at in range(len(answer)) if answer[at : at + len(mark)] == mark)
    return next(ends, None)


def _constrained(logits: mx.array, request: Request, answer: tuple[int, ...]) -> mx.array:
    """As the request's grammar has them: inside a thought, no silent token that ends an answer comes."""
    assert request.grammar is not None
    thinking, stops = request.thinking, request.sampling.stop_token_ids
    start = 0 if thinking is None else _num_thought(thinking, answer)
    if start is None:
        barred = sorted(request.grammar.vocabulary.silent.intersection(stops))
        if barred:
            logits[:, barred] = -mx.inf
        return logits
    is_first = thinking is None or all(each in thinking.thoughts.controls for each in answer[:start])
    edit = GrammarEdit(request.grammar, stops, begins_text=is_first and not request.continues_prompt)
    edit.advance(answer[start:])
    change = edit.change()
    assert change is not None, "the answer goes on behind its end"
    return edited(logits, dict.fromkeys(range(len(logits)), change))


def _could_draw(logits: mx.array, request: Request, answer: Sequence[int], token_id: int) -> bool:
    """Whether rounding can make the token after `answer` this one: logits [V], shaken by a near-tie."""
    number, width = len(answer), NEAR_TIE * mx.abs(logits).max()
    shaken = logits + width * mx.random.normal((64, logits.size), key=mx.random.key(number))
    shaken = _edited(shaken, request, answer)
    return token_id in Sampler([request.sampling] * 64).tokens(shaken, [number] * 64).tolist()


class StoredCache(KVCache):
    """mlx-lm's cache, whose keys and values are what a precision makes of them: they are stored, and then seen.

    `nudge`: they are shaken by so much before, as a share of their vector's largest number.
    """

    def __init__(self, precision: KvPrecision, nudge: float) -> None:
        super().__init__()
        self._precision, self._nudge = precision, nudge

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        precision = self._precision
        if self.offset == precision.start_after and self.offset:  # from now on all that there is
            self.keys = self._stored(self.keys, precision.key_bits, seed=0)
            self.values = self._stored(self.values, precision.value_bits, seed=1)
        if self.offset >= precision.start_after:
            keys = self._stored(keys, precision.key_bits, seed=0)
            values = self._stored(values, precision.value_bits, seed=1)
        return super().update_and_fetch(keys, values)

    def _stored(self, vectors: mx.array, bits: float, *, seed: int) -> mx.array:
        if self._nudge:
            size = mx.abs(vectors).max(axis=-1, keepdims=True)
            vectors = vectors + self._nudge * size * mx.random.normal(vectors.shape)
        if self._precision.scheme == "turbo":
            return _by_turbo(vectors, int(bits), seed)
        options = {"group_size": self._precision.group_size, "bits": int(bits)}
        packed, *scales = mx.quantize(vectors, **options)
        scales = [scale.astype(mx.float16).astype(vectors.dtype) for scale in scales]
        return mx.dequantize(packed, *scales, **options)


def _by_turbo(vectors: mx.array, bits: int, seed: int) -> mx.array:
    """[..., D] as mlx-vlm's codec stores and reads it."""
    from mlx_vlm.turboquant import _TurboQuantMSECodec

    norms = mx.linalg.norm(vectors, axis=-1, keepdims=True)
    codec = _TurboQuantMSECodec(vectors.shape[-1], bits, seed)
    _, units = codec._quantize_unit_with_estimate(vectors / mx.maximum(norms, 1e-6))
    return (norms.astype(mx.float16) * units).astype(vectors.dtype)


def _logits(
    request: Request, token_ids: Sequence[int], module: nn.Module, nudges: Sequence[float]
) -> mx.array:
    """[N, T, V] before each token of an answer, once for every nudge: by the family's own code and cache.

    Keys and values are of the request's precision.
    """
    if isinstance(module, Alone):
        caches = [_stored(request, module.model.network.make_cache(), nudge) for nudge in nudges]
        return mx.stack([module.logits(request, token_ids, each) for each in caches])
    cache = make_prompt_cache(module)
    cache = _stored(request, cache, nudges[-1]) or cache
    precision = request.precision or PLAIN
    prompt = request.prompt.token_ids
    tokens = mx.array([[*prompt, *token_ids]] * len(nudges))
    cut = min(0 if precision.is_plain else precision.start_after, tokens.shape[1])
    parts = [module(part, cache=cache) for part in (tokens[:, :cut], tokens[:, cut:]) if part.size]
    logits = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
    return logits[:, len(prompt) - 1 : -1].astype(mx.float32)


def _stored(request: Request, cache: list[Any], nudge: float) -> list[Any] | None:
    """Of the family's own cache, with full attention's layers in the request's precision; None where it is plain."""
    precision = request.precision or PLAIN
    if precision.is_plain:
        return None
    full = [index for index, layer in enumerate(cache) if type(layer).__name__ == "KVCache"]
    for index in full[: len(full) - precision.num_plain_layers]:
        cache[index] = StoredCache(precision, nudge)
    return cache


def _could_be_stored(request: Request, token_ids: Sequence[int], module: nn.Module, number: int) -> bool:
    """Whether rounding can make it this token by way of a quantized key: one that lies between two codes may have
    either, which moves the logits of all that comes by what a code is worth."""
    shaken = _logits(request, token_ids[: number + 1], module, [3e-6] * 48)[:, number]
    return any(_could_draw(logits, request, token_ids[:number], token_ids[number]) for logits in shaken)


def _assert_drawn(request: Request, token_ids: Sequence[int], module: nn.Module) -> None:
    count, is_plain = len(token_ids), request.precision is None or request.precision.is_plain
    logits = _logits(request, token_ids, module, [0.0])[0]
    changed = logits
    if _has_edits(request):
        rows = [_edited(logits[number][None], request, token_ids[:number]) for number in range(count)]
        changed = mx.concatenate(rows)
    expected = Sampler([request.sampling] * count).tokens(changed, range(count)).tolist()
    for number, (found, wanted) in enumerate(zip(token_ids, expected, strict=True)):
        is_drawn = (
            found == wanted
            or _could_draw(logits[number], request, token_ids[:number], found)
            or (not is_plain and _could_be_stored(request, token_ids, module, number))
        )
        assert is_drawn, f"{request.id}: token {number} is {found}, the whole model draws {wanted}"


@pytest.fixture(scope="session")
def assert_drawn() -> Callable[[Request, Sequence[int], nn.Module], None]:
    """assert_drawn(request, token_ids, module): each token is what the module draws after all those before it.

    The oracle of every law about tokens: one forward of the family's own code over the whole text, with the request's
    settings and precision. A near-tie may fall either way, since a row in company, in chunks or with its adapter
    beside it runs products of other shapes. What two runs of the same shapes give is compared with ==.
    """
    return _assert_drawn
