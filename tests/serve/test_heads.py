"""Drafters that read the target's states: guesses are those of mlx-vlm's code on one row, answers the target's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from drafting import Eager
from either_way import either_way
from heads import (
    DEEP,
    DEEPSEEK_V3,
    GEMMA4,
    GEMMA4_LOUDER,
    GLM4,
    GLM4_LITE,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_NEXT,
    Tokens,
    dflash_guesses,
    eagle3_guesses,
    gemma4_guesses,
    mtp_guesses,
    qwen_mtp_guesses,
    write_dflash,
    write_eagle3,
    write_gemma4,
    write_mtp,
    write_qwen_mtp,
)
from mlx.utils import tree_flatten

from serve.cache.capacity import Bucket
from serve.cache.precision import PLAIN
from serve.config import ServeConfig
from serve.draft.make_heads import heads_of, own_heads_of
from serve.draft.mtp import own_mtp
from serve.engine.drafts import Reader, Wanted
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Event, Request
from serve.engine.sampler import Sampler
from serve.errors import ModelError
from serve.model.loading import LoadedModel, load
from serve.model.network import Network
from serve.runtime import Runtime

NEAR_TIE = 1e-4
"""As in tests/conftest.py."""
TEXTS = (
    "hello there",
    "a prompt that is longer than a chunk of sixteen tokens, and is computed in several steps",
    "x",
    "yes, and then?",
    "sixteen tokens!!",
)
SETTINGS: Sequence[dict[str, Any]] = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 6, "top_k": 20},
    {},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9},
)


class Kind(NamedTuple):
    """A target and a drafter of it."""

    target: Path
    open: Callable[[LoadedModel], Reader]
    guesses: Callable[..., list[int]]
    """(network, row, pick) → what mlx-vlm's own code guesses on that row alone."""
    token_ids: Sequence[int]
    """Of the outputs of the drafter's head."""
    folder: Path | None = None
    """The drafter's, where that is another than the target's."""
    growth: int = 1
    """Of rounding, from one guess of a block to the next, which reads what the last one made."""


@pytest.fixture(scope="session")
def kind_of(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Kind]:
    """kind_of(one of KINDS) → it, made once."""
    root, everything = tmp_path_factory.mktemp("heads"), range(259)

    def eagle3(name: str, **options: Any) -> Kind:
        folder = write_eagle3(root / name, inputs=(1, 2, 4), **options)
        ids = everything
        if "draft_vocab" in options:
            offsets = mx.load(str(folder / "model.safetensors"))["d2t"]
            ids = (offsets + mx.arange(len(offsets))).tolist()
        return Kind(
            make_model("deep", DEEP),
            partial(heads_of, str(folder)),
            partial(eagle3_guesses, folder),
            ids,
            folder,
        )

    def dflash(name: str, **options: Any) -> Kind:
        is_gemma = "kind" in options
        folder = write_dflash(root / name, taps=(0, 2), num_target_layers=6 if is_gemma else 4, **options)
        return Kind(
            make_model("gemma4", GEMMA4, louder=GEMMA4_LOUDER) if is_gemma else make_model("deep", DEEP),
            partial(heads_of, str(folder)),
            partial(dflash_guesses, folder),
            everything,
        )

    def gemma4(name: str, **options: Any) -> Kind:
        folder = write_gemma4(root / name, **options)
        return Kind(
            make_model("gemma4", GEMMA4, louder=GEMMA4_LOUDER),
            partial(heads_of, str(folder)),
            partial(gemma4_guesses, folder),
            everything,
            growth=8,  # a loud one: other matrix kernels move its fourth logits by 1, and its first by 1e-4
        )

    def mtp(name: str, config: dict[str, Any]) -> Kind:
        target = make_model(name, config)
        return Kind(target, own_heads_of, partial(mtp_guesses, write_mtp(target, config)), everything)

    def qwen_mtp(name: str, config: dict[str, Any], **options: Any) -> Kind:
        target = make_model(name, config)
        drafter = write_qwen_mtp(target, config, **options)
        return Kind(target, own_heads_of, partial(qwen_mtp_guesses, drafter), everything)

    makers: dict[str, Callable[[], Kind]] = {
        "EAGLE-3": partial(eagle3, "eagle3"),
        "EAGLE-3 of two layers and few tokens": partial(eagle3, "few", layers=2, draft_vocab=100),
        "DFlash": partial(dflash, "dflash"),
        "DFlash that sees what came before": partial(dflash, "causal", is_causal=True),
        "DFlash of gemma-4": partial(dflash, "gemma4-dflash", kind="gemma4"),
        "gemma-4 assistant": partial(gemma4, "assistant"),
        "gemma-4 assistant that looks at few tokens": partial(
            gemma4,
            "clusters",
            use_ordered_embeddings=True,
            num_centroids=37,
            centroid_intermediate_top_k=12,
        ),
        "MTP of glm4_moe": partial(mtp, "glm4", GLM4),
        "MTP of glm4_moe_lite": partial(mtp, "glm4-lite", GLM4_LITE),
        "MTP of deepseek_v3": partial(mtp, "deepseek", DEEPSEEK_V3),
        "MTP of qwen3_next": partial(qwen_mtp, "qwen3-next", QWEN3_NEXT),
        "MTP of qwen3_5": partial(qwen_mtp, "qwen3-5", QWEN3_5),
        "MTP of qwen3_5_moe": partial(qwen_mtp, "qwen3-5-moe", QWEN3_5_MOE, is_mlx=True),
    }
    return cache(lambda name: makers[name]())


KINDS = (
    "EAGLE-3",
    "EAGLE-3 of two layers and few tokens",
    "DFlash",
    "DFlash that sees what came before",
    "DFlash of gemma-4",
    "gemma-4 assistant",
    "gemma-4 assistant that looks at few tokens",
    "MTP of glm4_moe",
    "MTP of glm4_moe_lite",
    pytest.param("MTP of deepseek_v3", marks=pytest.mark.large),  # which has 61 layers
    "MTP of qwen3_next",
    "MTP of qwen3_5",
    "MTP of qwen3_5_moe",
)


class Company(NamedTuple):
    """An engine whose rows draft, and what its adapters are merged."""

    engine: Engine
    reader: Reader
    requests: list[Request]
    modules: list[Any]
    """The whole model of each request's."""
    answers: dict[str, list[int]]


@pytest.fixture
def in_company(
    kind_of: Callable[[str], Kind],
    make_adapter_of: Callable[..., Path],
    make_request: Callable[..., Request],
    merged: Callable[..., Any],
) -> Callable[..., Company]:
    """in_company(kind, **limits) → rows of three adapters and the base, greedy and not, none added yet."""

    def make(name: str, *, max_tokens: int = 24, ahead: bool = False, **limits: Any) -> Company:
        kind = kind_of(name)
        model = load(str(kind.target), name="target")
        reader = kind.open(model)
        limits = {"prefill_chunk_tokens": 16, "row_chunk_tokens": 16, "max_rows": 4, **limits}
        engine = Engine(
            model,
            EngineLimits(ahead=ahead, **limits),
            drafters={"heads": reader},
            drafter="heads",
            gains=Eager(3),
        )
        folders = [make_adapter_of(kind.target, seed, keys=["self_attn.o_proj"]) for seed in (1, 2)]
        versions = [engine.registry.load(f"a{n}", str(folder)) for n, folder in enumerate(folders)]
        plain = load(str(kind.target)).network.module
        alone = [plain, *(merged(kind.target, folder) for folder in folders)]
        requests = [
            engine.check(
                make_request(
                    f"r{number}",
                    text,
                    max_tokens=max_tokens - number,
                    adapter=(None, *versions)[number % 3],
                    **SETTINGS[number],
                )
            )
            for number, text in enumerate(TEXTS)
        ]
        return Company(engine, reader, requests, [alone[number % 3] for number in range(len(requests))], {})

    return make


def could_guess(logits: mx.array, request: Request, number: int, token_id: int, growth: int = 1) -> bool:
    """Whether rounding, by so much more than of one product, can make the guess of an answer's token `number` this
    one, of logits [V]."""
    width = NEAR_TIE * growth * mx.abs(mx.where(logits < -1e8, 0, logits)).max()
    shaken = logits + width * mx.random.normal((64, logits.size), key=mx.random.key(number))
    shaken = mx.concatenate([logits[None], shaken])
    return token_id in Sampler([request.sampling] * 65).tokens(shaken, [number] * 65).tolist()


def assert_guessed(kind: Kind, network: Network, wanted: Wanted, guesses: Sequence[int]) -> None:
    """Each guess is drawn, by the row's own settings, from what mlx-vlm's code says after those before it."""
    sequence = wanted.sequence
    ids = np.asarray(kind.token_ids)
    left = list(guesses)

    def pick(logits: mx.array) -> int:
        before = len(guesses) - len(left)
        number, token_id = len(sequence.generated) + before, left.pop(0)
        logits = logits.astype(mx.float32)
        least = logits == logits.min()
        if least.sum().item() > 1:  # of tokens that the head does not look at
            logits = mx.where(least, -1e9, logits)
        everything = mx.full((259,), -1e9)
        everything[mx.array(ids)] = logits
        can = could_guess(everything, sequence.request, number, token_id, kind.growth**before)
        assert can, (sequence.request.id, number)
        return int(np.flatnonzero(ids == token_id)[0])

    kind.guesses(network, Tokens(sequence.tokens(0, sequence.num_tokens), len(guesses)), pick)
    assert not left


def run(company: Company, waiting: Sequence[Request] = ()) -> dict[str, list[int]]:
    """Answers so far by request, once all have ended; of those waiting, one joins every few steps."""
    engine, left, steps = company.engine, list(waiting), 0
    while engine.has_work or left:
        if left and steps % 3 == 0:
            engine.add(left.pop(0))
        collect(company, engine.step())
        steps += 1
    return company.answers


def collect(company: Company, events: Sequence[Event]) -> None:
    """Put events' tokens behind those before them."""
    for event in events:
        assert event.error is None, event.error
        company.answers.setdefault(event.request_id, []).extend(event.token_ids)


@pytest.mark.parametrize("name", KINDS)
def test_guesses_are_those_of_a_row_by_itself(name, kind_of, in_company):
    kind, company = kind_of(name), in_company(name, max_tokens=14, prefix_cache_bytes=0)
    engine, waiting = company.engine, list(company.requests)
    networks = {
        request.id: Network(each) for request, each in zip(company.requests, company.modules, strict=True)
    }
    seen = set()
    while engine.has_work or waiting:
        if waiting and not engine.scheduler.waiting:
            engine.add(waiting.pop(0))
        engine.step()
        same = name.startswith("DFlash")  # guesses of a block depend on its length
        wanted = [Wanted(one, 4 if same else 1 + n) for n, one in enumerate(engine.scheduler.decoding)]
        wanted = [each for each in wanted if each.sequence.generated]
        for one, guesses in zip(wanted, company.reader.propose(wanted) if wanted else (), strict=True):
            assert len(guesses) == one.most
            assert_guessed(kind, networks[one.sequence.request.id], one, guesses)
            seen.add(tuple(guesses))
    assert len(seen) > 30, "guesses that do not vary prove nothing"


@pytest.mark.parametrize("name", ["EAGLE-3", "DFlash", "MTP of glm4_moe_lite"])
def test_scratch_stays_in_its_row_where_that_ends(name, kind_of, in_company, make_request):
    kind, company = (
        kind_of(name),
        in_company(name, prefill_chunk_tokens=256, row_chunk_tokens=256, prefix_cache_bytes=0),
    )
    engine, network = company.engine, Network(company.modules[0])
    texts = ("z" * 250, "so " * 80, "short", "y" * 249)
    for number, text in enumerate(texts):
        engine.add(engine.check(make_request(f"b{number}", text, max_tokens=16)))
    cut = 0
    while engine.has_work:
        engine.step()
        wanted = [Wanted(one, 4) for one in engine.scheduler.decoding if one.generated]
        for one, guesses in zip(wanted, company.reader.propose(wanted) if wanted else (), strict=True):
            cut += len(guesses) < 4
            if guesses and one.sequence.num_tokens % 3 == 0:
                assert_guessed(kind, network, one, guesses)
    assert cut > 2


@pytest.mark.parametrize(("name", "ahead"), either_way(KINDS))
def test_answers_are_the_targets_whatever_is_guessed(name, ahead, in_company, assert_drawn):
    company = in_company(name, ahead=ahead)
    answers = run(company, company.requests)
    for request, module in zip(company.requests, company.modules, strict=True):
        assert len(answers[request.id]) == request.sampling.max_tokens
        assert_drawn(request, answers[request.id], module)
    drafts = company.engine.stats().drafts
    assert sum(each.num_drafted for each in drafts.values()) > 0
    assert len({token for answer in answers.values() for token in answer}) > 30


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_are_preempted_and_restored_draft_on(name, in_company, assert_drawn):
    company = in_company(name)
    engine = company.engine
    for request in company.requests:
        engine.add(request)
    while engine.stats().num_generated_tokens < 20:
        collect(company, engine.step())
    room = engine.scheduler.max_bytes
    engine.scheduler.max_bytes = 2 * engine.scheduler.budget.row_cost.row_bytes(Bucket(PLAIN, 256))
    collect(company, engine.step())
    assert engine.stats().num_preempted > 1
    engine.scheduler.max_bytes = room
    run(company)
    for request, module in zip(company.requests, company.modules, strict=True):
        assert len(company.answers[request.id]) == request.sampling.max_tokens
        assert_drawn(request, company.answers[request.id], module)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_goes_on_from_a_prefix_and_its_guesses_are_of_this_text(
    name, in_company, make_request, assert_drawn
):
    company = in_company(name)
    engine, text = company.engine, TEXTS[1]
    for number, more in enumerate(("", " and so on", " or not")):
        request = engine.check(make_request(f"p{number}", text + more, max_tokens=12))
        answer = run(company, [request])[request.id]
        assert_drawn(request, answer, company.modules[0])
    assert engine.stats().prefixes.num_hit_tokens > 2 * 32


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_right_guesses_are_taken_at_any_temperature(temperature, make_model, make_request, assert_drawn):
    quiet = {"o_proj": 0.3, "down_proj": 0.3, "lm_head": 3}
    folder = make_model("wordy", GLM4, louder=quiet)
    write_mtp(folder, GLM4, repeats_words=True)
    model = load(str(folder))
    reader = own_heads_of(model)
    engine = Engine(model, drafters={"heads": reader}, drafter="heads", gains=Eager(3))
    requests = [
        engine.check(make_request(f"r{n}", text, max_tokens=40, temperature=temperature, seed=n))
        for n, text in enumerate(TEXTS)
    ]
    company = Company(engine, reader, requests, [], {})
    run(company, requests)
    for request in requests:
        assert_drawn(request, company.answers[request.id], load(str(folder)).network.module)
    stats = engine.stats()
    assert stats.drafts[""].num_accepted > 0.2 * stats.drafts[""].num_drafted > 0
    assert len({token for answer in company.answers.values() for token in answer}) > 20


def test_a_server_drafts_by_its_checkpoints_heads_or_a_folders_and_says_the_same(kind_of, served):
    for name, block in (("MTP of glm4_moe", "heads"), ("EAGLE-3", {"kind": "heads", "max_tokens": 4})):
        kind, told = kind_of(name), {}
        if isinstance(block, dict):
            block["model"] = str(kind.folder)
        for drafter in ("none", block):
            with served(kind.target, drafter=drafter) as (runtime, http):
                asked = {
                    "prompt": TEXTS[0],
                    "max_tokens": 30,
                    "temperature": 0.7,
                    "seed": 11,
                    "ignore_eos": True,
                }
                body = http.post("/v1/completions", json={**asked, "model": "lively"}).json()
                told[str(drafter)] = body["choices"][0]["text"], body["usage"]["completion_tokens"]
                drafts = runtime.engine.stats().drafts
                assert (sum(each.num_drafted for each in drafts.values()) > 0) == (drafter != "none")
        assert len(set(told.values())) == 1
        assert told["none"][1] == 30


def test_a_server_whose_checkpoint_has_no_heads_does_not_start(model_folder):
    with pytest.raises(ModelError, match="a head in a folder of its own is named by `model`"):
        Runtime.start(ServeConfig(model=str(model_folder), drafter="heads"))


def test_rows_cost_what_heads_keep_and_prefixes_of_other_heads_are_others(kind_of, model):
    kind = kind_of("EAGLE-3")
    plain, seen = load(str(kind.target)), load(str(kind.target))
    engines = Engine(plain), Engine(seen, drafters={"heads": kind.open(seen)}, drafter="heads")
    bytes_of = [engine.scheduler.budget.row_cost.row_bytes(Bucket(PLAIN, 256)) for engine in engines]
    assert (
        bytes_of[1] - bytes_of[0] == 256 * 2 * 2 * 16 * 4
    )  # positions, keys and values, heads, channels, float32
    bases = [engine.prefixes._base for engine in engines]
    assert bases[0] != bases[1]


def test_a_head_of_another_base_is_refused_by_what_does_not_fit(model, tmp_path):
    folders = {
        "reads the inputs of layers": write_eagle3(tmp_path / "deep", inputs=(1, 2, 9)),
        "300 tokens, where the base has 259": write_eagle3(tmp_path / "words", inputs=(1, 1, 2), vocab=300),
        "7 layers, where the base has 2": write_dflash(tmp_path / "blocks", taps=(0, 1), num_target_layers=7),
    }
    for reason, folder in folders.items():
        with pytest.raises(ModelError, match=reason):
            Engine(model, drafters={"heads": heads_of(str(folder), model)}, drafter="heads")


def test_what_is_no_head_is_refused_by_name(model, model_folder, recurrent_folder, kind_of, tmp_path):
    with pytest.raises(ModelError, match="a drafter of kind 'qwen3' cannot be used"):
        heads_of(str(model_folder), model)
    sliding = write_dflash(
        tmp_path / "sliding",
        taps=(0, 1),
        num_target_layers=2,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=8,
    )
    with pytest.raises(ModelError, match="layer 1 is sliding_attention"):
        heads_of(str(sliding), model)
    code = write_eagle3(tmp_path / "code", inputs=(1, 1, 2))
    config = json.loads((code / "config.json").read_text())
    (code / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    (code / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(ModelError, match="code of its own"):
        heads_of(str(code), model)


def test_a_checkpoint_without_a_head_says_so(model, recurrent_folder, kind_of, tmp_path):
    with pytest.raises(ModelError, match="and this is qwen3"):
        own_heads_of(model)
    with pytest.raises(ModelError, match=r"has no mtp\.…, which would guess tokens ahead"):
        own_heads_of(load(str(recurrent_folder("qwen3_next"))))
    few = shutil.copytree(kind_of("MTP of qwen3_next").target, tmp_path / "few")
    weights, about = mx.load(str(few / "model-mtp.safetensors"), return_metadata=True)
    mx.eval(weights)
    more = {name.replace("layers.0", "layers.1"): weight for name, weight in weights.items()}
    mx.save_safetensors(str(few / "model-mtp.safetensors"), {**weights, **more}, about)
    with pytest.raises(ModelError, match=r"mtp\.layers has 2 layers"):
        own_heads_of(load(str(few)))
    less = {name: weight for name, weight in weights.items() if "pre_fc_norm_hidden" not in name}
    mx.save_safetensors(str(few / "model-mtp.safetensors"), less, about)
    with pytest.raises(ModelError, match="it has no pre_fc_norm_hidden"):
        own_heads_of(load(str(few)))
    target = kind_of("MTP of glm4_moe").target
    bare = shutil.copytree(target, tmp_path / "bare")
    (bare / "model-mtp.safetensors").unlink()
    with pytest.raises(ModelError, match="has no layer 2"):
        own_heads_of(load(str(bare)))
    part = shutil.copytree(target, tmp_path / "part")
    weights = mx.load(str(part / "model-mtp.safetensors"))
    weights = {name: weight for name, weight in weights.items() if "hnorm" not in name}
    mx.eval(weights)
    mx.save_safetensors(str(part / "model-mtp.safetensors"), weights)
    with pytest.raises(ModelError, match="it has no hnorm"):
        own_heads_of(load(str(part)))


def test_a_model_that_sees_guesses_by_its_own_head(vlm_folder, make_request, tmp_path):
    folder = shutil.copytree(vlm_folder("qwen3_5"), tmp_path / "seeing")
    drafter = write_qwen_mtp(folder, json.loads((folder / "config.json").read_text()), is_mlx=True)
    model, whole = load(str(folder)), load(str(folder)).network
    reader = own_heads_of(model)
    engine = Engine(model, drafters={"heads": reader}, drafter="heads", gains=Eager(3))
    for number, text in enumerate(TEXTS[:3]):
        engine.add(engine.check(make_request(f"r{number}", text, max_tokens=12)))
    found, expected = [], []
    while engine.has_work:
        engine.step()
        wanted = [Wanted(one, 3) for one in engine.scheduler.decoding if one.generated]
        for one, guesses in zip(wanted, reader.propose(wanted) if wanted else (), strict=True):
            row = Tokens(one.sequence.tokens(0, one.sequence.num_tokens), len(guesses))
            found.append(guesses)
            expected.append(qwen_mtp_guesses(drafter, whole, row, lambda logits: logits.argmax().item()))
    assert len({tuple(guesses) for guesses in found}) > 8
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1, "but for a near-tie"


def test_a_head_that_was_split_from_its_checkpoint_guesses_the_same(kind_of, make_request, model, tmp_path):
    target = kind_of("MTP of qwen3_5_moe").target
    bare, split = shutil.copytree(target, tmp_path / "bare"), tmp_path / "split"
    (bare / "model-mtp.safetensors").unlink()
    split.mkdir()
    weights = {
        name.removeprefix("mtp."): weight
        for name, weight in mx.load(str(target / "model-mtp.safetensors")).items()
    }
    mx.save_safetensors(str(split / "model.safetensors"), weights, {"format": "mlx"})
    (split / "config.json").write_text(json.dumps({"model_type": "qwen3_5_mtp"}))
    found = []
    for folder, opened in ((target, own_heads_of), (bare, partial(heads_of, str(split)))):
        loaded = load(str(folder))
        reader = opened(loaded)
        engine = Engine(loaded, drafters={"heads": reader}, drafter="heads", gains=Eager(3))
        engine.add(engine.check(make_request("r", TEXTS[1], max_tokens=20)))
        guesses = []
        while engine.has_work:
            engine.step()
            wanted = [Wanted(one, 3) for one in engine.scheduler.decoding]
            guesses += reader.propose(wanted) if wanted else []
        found.append(guesses)
    assert found[0] == found[1]
    assert len({tuple(each) for each in found[0]}) > 8
    with pytest.raises(ModelError, match="a head of qwen3_next, qwen3_5, qwen3_5_moe, and the base is qwen3"):
        heads_of(str(split), model)


def pack(folder: Path, *, is_packed: bool) -> LoadedModel:
    """The model in a folder, its head's weights packed in eight bits, or as what they stand for then."""
    file = folder / "model-mtp.safetensors"
    weights, about = mx.load(str(file), return_metadata=True)
    packed: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if weight.ndim < 2 or name.endswith("mlp.gate.weight"):  # routers are not packed
            packed[name] = weight
            continue
        parts = mx.quantize(weight, group_size=32, bits=8)
        if is_packed:
            packed |= {name.replace("weight", kind): part for kind, part in zip(PARTS, parts, strict=True)}
        else:
            packed[name] = mx.dequantize(*parts, group_size=32, bits=8)
    mx.eval(packed)
    mx.save_safetensors(str(file), packed, metadata=about)
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization": {"group_size": 32, "bits": 8}} if is_packed else {}
    (folder / "config.json").write_text(json.dumps(config))
    return load(str(folder))


PARTS = ("weight", "scales", "biases")


@pytest.mark.parametrize("name", ["MTP of glm4_moe", "MTP of qwen3_next", "MTP of qwen3_5_moe"])
def test_packed_weights_of_a_checkpoints_head_are_those_they_stand_for(name, kind_of, tmp_path):
    target, heads = kind_of(name).target, {}
    for is_packed in (True, False):
        folder = shutil.copytree(target, tmp_path / str(is_packed))
        if name == "MTP of glm4_moe":  # which may have embeddings and a head of its own
            mx.random.seed(1)
            own = {
                f"model.layers.2.{part}.weight": mx.random.normal((259, 64))
                for part in ("embed_tokens", "shared_head.head")
            }
            file = folder / "model-mtp.safetensors"
            weights = {**mx.load(str(file)), **own}
            mx.eval(weights)
            mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
        heads[is_packed] = own_mtp(pack(folder, is_packed=is_packed))
    packed, plain = (dict(tree_flatten(heads[each]._module.parameters())) for each in (True, False))
    assert packed.keys() == plain.keys()
    for path, weight in plain.items():
        assert mx.allclose(packed[path], weight, atol=1e-6).item(), path
    states = mx.random.normal((3, 64))
    if heads[True]._head is not None:
        for part in ("_embeddings", "_head"):
            given = mx.array([1, 200]) if part == "_embeddings" else states
            assert mx.allclose(
                *(getattr(heads[each], part)(given) for each in (True, False)), atol=1e-5
            ).item()
    assert (heads[True]._head is not None) == (name == "MTP of glm4_moe")
