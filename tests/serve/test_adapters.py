"""Adapter folders, admission checks, versions and slots."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load
from mlx_lm.tuner.utils import linear_to_lora_layers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import (
    CONFIG_FILE,
    TENSORS_FILE,
    content_hash,
    read_config,
    read_tensors,
    write_adapter,
)
from serve.adapters.tools.inspection import inspect
from serve.beside import PIECE_BYTES, evaluate, pieces
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.errors import AdapterError, NotFoundError
from serve.model.loading import LoadedModel, load
from serve.model.template import ChatTemplate
from serve.model.vocabulary import vocabulary_hash

ODD_NAMES = [
    *(f"a{char}b" for char in "\n\r\t\0\x1b\x7f\x85\xa0\u200b\u2028\u202e\ufeff\ud800\udfff\ue000"),
    *(" a", "a ", "\u3000a", "\n", " ", "x" * 257, "票" * 300),
]


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_our_folder_loads_in_mlx_lm_and_gives_the_same_tokens(
    model, model_folder, make_adapter, make_request, assert_drawn
):
    folder = make_adapter(3, keys=["self_attn.q_proj", "mlp.down_proj"])
    engine = Engine(model)
    version = engine.registry.load("ours", folder)
    request = make_request("r", adapter=version)
    ours = generate(engine, [request])[0].token_ids
    theirs, _ = mlx_lm_load(str(model_folder), adapter_path=str(folder))
    theirs.set_dtype(mx.float32)
    assert_drawn(request, ours, theirs)
    assert len(set(ours)) > 10


def test_an_mlx_lm_adapter_loads_here_and_gives_the_same_tokens(
    model, model_folder, make_request, tmp_path, assert_drawn
):
    theirs, _ = mlx_lm_load(str(model_folder))
    theirs.freeze()
    parameters = {"rank": 5, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.v_proj", "mlp.gate_proj"]}
    linear_to_lora_layers(theirs, 2, parameters)
    theirs.apply_to_modules(
        lambda _, m: m.update({"lora_b": mx.random.normal(m.lora_b.shape) * 0.3}) if "lora_b" in m else None
    )
    theirs.eval()
    mx.save_safetensors(str(tmp_path / TENSORS_FILE), dict(tree_flatten(theirs.trainable_parameters())))
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "whatever"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    engine = Engine(model)
    request = make_request("r", adapter=engine.registry.load("theirs", tmp_path))
    ours = generate(engine, [request])[0].token_ids
    assert_drawn(request, ours, theirs)


def test_a_base_row_beside_adapter_rows_is_the_base(
    model, model_folder, make_adapter, make_request, assert_drawn
):
    engine = Engine(model)
    request, version = make_request("base", num_logprobs=0), engine.registry.load("a", make_adapter(1))
    answer, _ = generate(engine, [request, make_request("other", adapter=version)])
    base = load(str(model_folder)).network.module
    assert_drawn(request, answer.token_ids, base)
    prompt, drawn = request.prompt.token_ids, mx.array(answer.token_ids)
    logits = base(mx.array([[*prompt, *answer.token_ids]]))[0, len(prompt) - 1 : -1]
    expected = mx.take_along_axis(nn.log_softmax(logits, axis=-1), drawn[:, None], axis=-1)[:, 0]
    assert [e.logprob for e in answer.logprobs] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_replaced_version_serves_its_requests_to_their_end_and_new_ones_get_the_new(
    model, model_folder, make_adapter, make_request, merged, assert_drawn
):
    engine = Engine(model)
    registry = engine.registry
    registry.load("x", make_adapter(1))
    old = registry.acquire("x")
    engine.add(make_request("old", adapter=old))
    tokens: dict[str, list[int]] = {"old": [], "new": []}
    for step in range(40):
        if step == 6:
            registry.load("x", make_adapter(2), replace=True)
            new = registry.acquire("x")
            assert (old.id, new.id) == ("x@1", "x@2")
            assert registry.resolve("x@1") == old
            engine.add(make_request("new", adapter=new))
        for event in engine.step() if engine.has_work else []:
            tokens[event.request_id] += event.token_ids
    for name, seed in (("old", 1), ("new", 2)):
        assert len(tokens[name]) == 24
        assert_drawn(make_request(name), tokens[name], merged(model_folder, make_adapter(seed)))
    registry.release(old)
    assert (registry.slot_of(old), registry.resolve("x@1")) == (None, old), "known, and not on the device"
    registry.check_integrity()


def test_an_adapter_that_left_makes_room_and_leaves_no_trace_in_the_next(
    model, model_folder, make_adapter, make_request, merged, assert_drawn
):
    engine = Engine(model, EngineLimits(max_adapters=1))
    registry = engine.registry
    registry.load("wide", make_adapter(1, rank=9))
    held = registry.acquire("wide")
    registry.unload("wide")
    with pytest.raises(NotFoundError, match="no adapter 'wide'"):
        registry.acquire("wide")
    registry.release(held)
    narrow = make_adapter(2, keys=["self_attn.q_proj"])
    request = make_request("r", adapter=registry.load("narrow", narrow))
    assert_drawn(request, generate(engine, [request])[0].token_ids, merged(model_folder, narrow))
    registry.check_integrity()


def test_a_retired_version_stays_until_the_last_of_several_requests_has_ended(model, make_adapter):
    registry = Engine(model).registry
    registry.load("a", make_adapter(1))
    held = registry.acquire("a")
    assert registry.acquire("a") == held
    registry.unload("a")
    registry.release(held)
    assert registry.resolve("a@1") == held
    registry.check_integrity()
    registry.release(held)
    assert registry.versions() == []
    registry.check_integrity()


def test_an_adapter_of_another_model_is_refused_by_tensor(model, make_model, make_adapter, tmp_path):
    folder = copy_of(make_adapter(1, keys=["self_attn.q_proj"]), tmp_path / "other")
    tensors = read_tensors(folder)
    tensors["model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((128, 4))
    tensors["model.layers.7.self_attn.q_proj.lora_a"] = mx.zeros((64, 4))
    lineage = Lineage("Qwen3-1.7B", model.fingerprint, "", "", "", "", "0")
    write_adapter(folder, tensors, AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))
    engine = Engine(model)
    with pytest.raises(AdapterError) as caught:
        engine.registry.load("support", folder)
    message = str(caught.value)
    assert "layers.0.self_attn.q_proj.lora_a is (128, 4), the model needs (64, 4)" in message
    assert "layers.7.self_attn.q_proj: the model has no linear layer of that name" in message
    assert "trained on Qwen3-1.7B" in message
    assert engine.registry.names() == []
    engine.registry.check_integrity()


def test_an_adapter_of_the_same_shape_but_other_weights_is_refused_unless_allowed(
    model, make_adapter, tmp_path
):
    folder = copy_of(make_adapter(1), tmp_path / "other")
    lineage = Lineage("other-base", "sha256:0000", "", "", "", "", "0")
    write_adapter(folder, read_tensors(folder), AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))
    with pytest.raises(
        AdapterError, match="trained on other weights than these: its manifest names other-base"
    ):
        Engine(model).registry.load("a", folder)
    assert Engine(model, EngineLimits(allow_other_base=True)).registry.load("a", folder).id == "a@1"


def lineage_of(model: LoadedModel, **changes: str) -> Lineage:
    known = {
        "base_model": model.name,
        "base_fingerprint": model.fingerprint,
        "template_hash": ChatTemplate(model.tokenizer).hash,
        "vocabulary_hash": vocabulary_hash(model.tokenizer),
        **dict.fromkeys(("recipe_hash", "data_hash", "created", "lathe_version"), ""),
    }
    return Lineage(**{**known, **changes})


@pytest.fixture
def with_lineage(model, make_adapter, tmp_path):
    """with_lineage(**changes) → folder of an adapter whose manifest says it was trained here, but for the changes."""

    def make(**changes: str) -> Path:
        folder = copy_of(make_adapter(1), tmp_path / "-".join(["with", *changes]))
        config = AdapterConfig("lora", -1, 4, 2.0, lineage=lineage_of(model, **changes))
        write_adapter(folder, read_tensors(folder), config)
        return folder

    return make


def test_an_adapter_of_another_tokenizer_is_refused_unless_allowed(model, with_lineage):
    folder = with_lineage(vocabulary_hash="sha256:" + "7" * 64)
    with pytest.raises(AdapterError, match=r"trained with another tokenizer: .*777.*allow_other_base"):
        Engine(model).registry.load("a", folder)
    version = Engine(model, EngineLimits(allow_other_base=True)).registry.load("a", folder)
    assert "another tokenizer" in version.notes[0]
    both = with_lineage(vocabulary_hash="sha256:1", base_fingerprint="sha256:2")
    with pytest.raises(AdapterError) as caught:
        Engine(model).registry.load("a", both)
    assert "another tokenizer" in str(caught.value)
    assert "other weights than these" in str(caught.value)


def own_tokenizer(kind: str, model_folder: Path, folder: Path) -> None:
    """A tokenizer that knows two tokens more, left in `folder` as libraries do."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<mine>"], special_tokens=True)
    tokenizer.add_tokens(["<yours>"])
    if kind == "the tokenizers library's":
        tokenizer.save_pretrained(folder)
    elif kind == "transformers' before 5":
        decoder = {str(size): {"content": "<mine>"}, str(size + 1): {"content": "<yours>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    else:
        (folder / "added_tokens.json").write_text(json.dumps({"<mine>": size, "<yours>": size + 1}))


@pytest.mark.parametrize("kind", ["the tokenizers library's", "transformers' before 5", "a slow one's"])
def test_tokens_that_the_base_lacks_are_told_and_refused_beside_an_adapted_head(
    kind, model, model_folder, make_adapter, tmp_path, caplog
):
    registry = Engine(model).registry
    folder = copy_of(make_adapter(1), tmp_path / "own")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    assert registry.load("same", folder).notes == ()
    own_tokenizer(kind, model_folder, folder)
    (note,) = registry.load("a", folder).notes
    size = len(model.tokenizer.get_vocab())
    assert f"lacks: '<mine>' ({size}), '<yours>' ({size + 1}): prompts" in note
    assert note in caplog.text
    rows, width = model.network.module.model.embed_tokens.weight.shape
    head = {"lm_head.lora_a": mx.ones((width, 4)), "lm_head.lora_b": mx.ones((4, rows)) / 100}
    write_adapter(folder, read_tensors(folder) | head, AdapterConfig("lora", -1, 4, 2.0))
    with pytest.raises(AdapterError, match=r"adapts the head, and has .*<mine>.*allow_other_base"):
        registry.load("b", folder)
    assert Engine(model, EngineLimits(allow_other_base=True)).registry.load("b", folder).notes


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"added_tokens": [{"id": "x"}, 3, {"content": "a"}]', "\0" * 99]
)
def test_a_tokenizer_beside_an_adapter_that_is_none_harms_nobody(text, model, make_adapter, tmp_path):
    folder = copy_of(make_adapter(1), tmp_path / "own")
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (folder / name).write_text(text)
    assert Engine(model).registry.load("a", folder).notes == ()


def test_a_module_that_is_named_and_has_no_tensors_is_told_by_name(model, make_adapter, tmp_path):
    folder = copy_of(make_adapter(1, keys=["self_attn.q_proj"]), tmp_path / "named")
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["lora_parameters"]["keys"].append("self_attn.v_proj")
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    told = "lora_parameters.keys names self_attn.v_proj, of which there are no tensors"
    assert Engine(model).registry.load("a", folder).notes == (f"adapter 'a': {told}",)
    assert inspect(folder).notes == (told,)


def test_another_chat_template_is_told_in_the_log_and_to_whoever_loads(model, with_lineage, caplog):
    registry = Engine(model).registry
    version = registry.load("a", with_lineage(template_hash="sha256:" + "7" * 64))
    assert "trained with another chat template (sha256:777" in version.notes[0]
    assert version.notes[0] in caplog.text
    caplog.clear()
    for name, changes in (("b", {}), ("c", {"template_hash": "", "vocabulary_hash": ""})):
        assert registry.load(name, with_lineage(**changes)).notes == ()
    assert caplog.text == ""


def test_a_vocabulary_is_known_by_what_each_id_stands_for():
    names = set()
    for vocabulary in (
        {"a": 0, "b": 1},
        {"a": 1, "b": 0},
        {"a": 0, "b": 2},
        {"a": 0, "b": 1, "c": 2},
        {"a": 0},
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)))
        reordered = dict(reversed(vocabulary.items()))
        same = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(reordered)))
        assert vocabulary_hash(same) == vocabulary_hash(tokenizer)
        names.add(vocabulary_hash(tokenizer))
        tokenizer.add_special_tokens({"eos_token": "</s>"})
        names.add(vocabulary_hash(tokenizer))
    assert len(names) == 10


def test_broken_files_are_named_and_nothing_changes(model, make_adapter, tmp_path):
    registry = Engine(model).registry
    no_folders = (tmp_path / "nowhere", "~nosuchuser/a", "a\0b", "x" * 10_000, "/dev/null")
    for path in no_folders:
        with pytest.raises(NotFoundError, match="no adapter folder at"):
            registry.load("a", path)
    with pytest.raises(AdapterError, match=r"a folder or a \.safetensors file was expected"):
        registry.load("a", make_adapter(1) / CONFIG_FILE)
    cut = copy_of(make_adapter(1), tmp_path / "cut")
    whole = (cut / TENSORS_FILE).read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (cut / TENSORS_FILE).write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=r"adapters\.safetensors: (truncated|not a safetensors)"):
            registry.load("a", cut)
    (cut / TENSORS_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(AdapterError, match="not a safetensors file"):
        registry.load("a", cut)
    (cut / CONFIG_FILE).write_text("{")
    with pytest.raises(AdapterError, match="not JSON"):
        registry.load("a", cut)
    (cut / CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterError, match="PEFT"):
        registry.load("a", cut)
    (cut / CONFIG_FILE).write_text('{"fine_tune_type": "vera"}')
    with pytest.raises(AdapterError, match="fine_tune_type is 'vera'"):
        registry.load("a", cut)
    assert registry.versions() == []
    registry.check_integrity()


def test_nan_weights_and_too_high_ranks_are_refused_by_tensor(model, make_adapter, tmp_path):
    folder = copy_of(make_adapter(1, rank=40), tmp_path / "nan")
    tensors = read_tensors(folder)
    name = "model.layers.1.mlp.up_proj.lora_b"
    tensors[name] = mx.where(mx.arange(tensors[name].shape[1]) == 3, mx.nan, tensors[name])
    write_adapter(folder, tensors, AdapterConfig("lora", -1, 40, 2.0))
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj\.lora_b holds NaN or infinite values"):
        Engine(model).registry.load("a", folder)
    with pytest.raises(AdapterError, match="has rank 40, this server takes up to 16"):
        Engine(model, EngineLimits(max_rank=16)).registry.load("a", folder)
    whole = read_tensors(make_adapter(1))
    write_adapter(folder, whole, AdapterConfig("lora", -1, 8, 2.0))
    with pytest.raises(AdapterError, match=r"q_proj has rank 4, its adapter_config\.json says 8"):
        Engine(model).registry.load("a", folder)
    write_adapter(folder, {**whole, name: whole[name].astype(mx.int32)}, AdapterConfig("lora", -1, 4, 2.0))
    with pytest.raises(AdapterError, match="lora_b holds I32, floating-point"):
        Engine(model).registry.load("a", folder)


def test_tensors_swapped_under_a_manifest_are_noticed(make_adapter, tmp_path):
    folder = copy_of(make_adapter(1), tmp_path / "swapped")
    lineage = Lineage("base", "", "", "", "", "", "0")
    config = write_adapter(folder, read_tensors(folder), AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))
    assert read_config(folder) == config
    assert content_hash(read_tensors(folder, config)) == config.lineage.content_hash
    shutil.copy(make_adapter(2) / TENSORS_FILE, folder / TENSORS_FILE)
    with pytest.raises(AdapterError, match="a save was interrupted or a file was replaced"):
        read_tensors(folder, read_config(folder))


def test_a_loaded_name_is_kept_unless_replacing_and_bad_names_are_refused(model, make_adapter):
    registry = Engine(model).registry
    registry.load("a", make_adapter(1))
    with pytest.raises(AdapterError, match="'a' has already been loaded"):
        registry.load("a", make_adapter(2))
    for name in ("", "a@2", "lively", ".", "..", *ODD_NAMES):
        with pytest.raises(AdapterError, match="cannot be called") as caught:
            registry.load(name, make_adapter(1))
        assert str(caught.value).isprintable()
    for name in ("a b", "org/name:v1.2", "été", "票", "x" * 256):
        assert registry.load(name, make_adapter(1)).name == name


def test_loads_and_releases_from_many_threads_lose_no_slot(model, make_adapter):
    registry = Engine(model, EngineLimits(max_adapters=6)).registry
    folders = [make_adapter(seed) for seed in (1, 2)]
    lock = threading.Lock()  # stands for the one thread that owns the arrays

    def run_alone(install) -> None:
        with lock:
            install()

    registry.run = run_alone

    def churn(worker: int) -> None:
        for round_ in range(8):
            registry.load(f"n{worker}", folders[round_ % 2], replace=True)
            held = registry.acquire(f"n{worker}")
            registry.release(held)

    threads = [threading.Thread(target=churn, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    registry.check_integrity()
    assert sorted(version.id for version in registry.versions()) == ["n0@8", "n1@8", "n2@8"]


def test_what_is_made_beside_an_engine_is_evaluated_a_few_megabytes_at_a_time():
    counts = [10, *[PIECE_BYTES // 16] * 9, PIECE_BYTES, 10, 10]
    arrays = [mx.ones(count) + number for number, count in enumerate(counts)]
    cut = list(pieces(arrays))
    assert [id(array) for piece in cut for array in piece] == [id(array) for array in arrays]
    assert all(len(piece) == 1 or sum(each.nbytes for each in piece) <= PIECE_BYTES for piece in cut)
    assert len(cut) == 5, "and no fewer together than may be"
    evaluate({"a": arrays, "b": [{"c": arrays[0]}, None]})
    assert list(pieces([])) == []
