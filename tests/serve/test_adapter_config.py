"""adapter_config.json and the header of the tensors' file: what is wrong is named, and never read otherwise."""

from __future__ import annotations

import json
import os
import struct
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.lora import CONFIG_DEFAULTS

from serve.adapters.formats.config import PARAMETERS, AdapterConfig, config_json, parse_config
from serve.adapters.formats.header import read_specs
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE, read_config, read_tensors
from serve.adapters.formats.named import naming_notes
from serve.errors import AdapterError

PATH = Path("adapter_config.json")
PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
GOOD = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0},
}
HUGE = 10**400
ODD = ["8", [], [8], {"a": 1}, True, -1, HUGE, float("nan"), float("inf"), "\ud800", 10**30]
"""Values that no number in a config may have; what is right for a key is taken out where it is tried."""
WRONG = {
    "rank": [*ODD, 8.0, 0, None, 2**31],
    "scale": [*(v for v in ODD if v != 10**30), 0, 0.0, -2.0],
    "alpha": [*(v for v in ODD if v != 10**30), 0, 0.0, -2.0],
    "dropout": [*ODD, None, 1, 1.5, -0.1],
    "keys": [8, "q_proj", {"a": 1}, True, [], [""], [3], [None], ["\ud800"], [["q_proj"]]],
    "init_lora_weights": ["gaussian", "", True, 1, ["pissa"], "pissa_niter_0", "pissa_niter_", "olora"],
    "use_rslora": [True, 1, "yes"],
    "use_dora": [True, "yes"],
    "rank_pattern": [{"q_proj": 4}],
    "alpha_pattern": [{"q_proj": 4}],
    "lora_alpha": [17, "16", HUGE],
    "r": [4, True, "8"],
    "num_layers": ["2", 2.5],
    "target_modules": [["q_proj"], "all-linear"],
    "of_a_later_version": [1, "x", [0]],
    "line\nbreak": [1],
}
WRONG_AT_THE_TOP = {
    "fine_tune_type": ["vera", "", None, 1, ["lora"], {}],
    "num_layers": ["2", 2.0, True, -2, [2], 2**31],
    "lora_parameters": [None, [], "x", 3, {}, {"rank": 8}, {"scale": 2.0}, {"rank": 8, "alpha": None}],
    "peft_type": ["IA3", None, 3],
    "rank": [4, True, "8"],
    "r": [16, 8.5],
    "alpha": [17, "16"],
    "lora_alpha": [32, HUGE, float("nan")],
    "scale": [2.5, "2.0"],
    "init_lora_weights": ["pissa", "gaussian", 1.5],
    "target_modules": [3, [3]],
    "unsloth_mlx_lora_module_ranks": [[8], {"a": 0}, {"a": "8"}],
    "unsloth_mlx_lora_module_scales": [2.0, {"a": 0}, {"a": True}],
    "use_rslora": [True],
    "use_dora": [True],
    "rank_pattern": [{"q_proj": 4}],
    "modules_to_save": [["lm_head"]],
    "layer_replication": [[[0, 2]]],
    "bias": ["all", "lora_only"],
    "lineage": [[], "x", 3, True, {}, {"base_model": "m"}],
}
LINEAGE = {
    "base_model": "m",
    "base_fingerprint": "",
    "template_hash": "",
    "recipe_hash": "",
    "data_hash": "",
    "created": "",
    "lathe_version": "0",
}
WRONG_LINEAGE = {
    **{
        name: [None, 3, [], {}, True, "\ud800"]
        for name in (*LINEAGE, "content_hash", "parent", "vocabulary_hash")
    },
    "metrics": [None, 3, [1.0], {"loss": "low"}, {"loss": None}],
    "quantize": [3, "4 bit", [4], {"bits": 9}, {"of_a_later_version": 1}],
}


def parsed(raw: object) -> AdapterConfig:
    return parse_config(json.dumps(raw), PATH)


def inside(**parameters: object) -> dict:
    return {**GOOD, "lora_parameters": {**GOOD["lora_parameters"], **parameters}}


CASES = [
    *((f"lora_parameters.{k}", k, inside(**{k: v})) for k, values in WRONG.items() for v in values),
    *((k, k, {**GOOD, k: v}) for k, values in WRONG_AT_THE_TOP.items() for v in values),
    *(
        (f"lineage.{k}", k, {**GOOD, "lineage": {**LINEAGE, k: v}})
        for k, values in WRONG_LINEAGE.items()
        for v in values
    ),
]


@pytest.mark.parametrize(
    ("where", "key", "raw"), CASES, ids=[f"{w!a}-{i}" for i, (w, _, _) in enumerate(CASES)]
)
def test_a_wrong_value_is_refused_by_its_key_in_one_printable_line(where, key, raw):
    if where == "lora_parameters.alpha":
        del raw["lora_parameters"]["scale"]
    with pytest.raises(AdapterError) as caught:
        parsed(raw)
    message = str(caught.value)
    assert key.partition("\n")[0] in message
    assert message.startswith(str(PATH))
    assert len(message) < 400
    assert message.encode("utf-8").decode().replace("\n", "").isprintable()


def test_all_problems_are_told_at_once():
    raw = {**inside(rank="8", scale=-1, use_rslora=True), "num_layers": "all", "bias": "all"}
    with pytest.raises(AdapterError) as caught:
        parsed(raw)
    for told in ("rank is", "scale is -1", "use_rslora is true", "num_layers is", "bias is"):
        assert told in str(caught.value)


def test_the_factor_is_scale_or_alpha_over_rank_and_never_a_default():
    assert parsed(GOOD).scale == 2.0
    assert parsed({"lora_parameters": {"rank": 8, "alpha": 16}}).scale == 2.0
    assert parsed({"lora_parameters": {"rank": 3, "alpha": 1}}).scale == pytest.approx(1 / 3)
    assert parsed(inside(alpha=16)).scale == 2.0
    for parameters in ({"rank": 8}, {"rank": 8, "dropout": 0.0}, {"rank": 8, "scale": None, "alpha": None}):
        with pytest.raises(AdapterError, match="neither scale nor alpha"):
            parsed({"lora_parameters": parameters})
    with pytest.raises(
        AdapterError, match="scale is 20 and alpha / rank is 2; they are the same factor, keep one"
    ):
        parsed({"lora_parameters": {"rank": 8, "scale": 20.0, "alpha": 16}})


# What mlx_lm.lora of some versions wrote, of its defaults, and the factor that its LoRALinear had (tuner/lora.py).
OF_MLX_LM = {
    "0.12.1": ({"lora_layers": 16}, 16, 20.0),
    "0.13.0 or 0.18.2": ({"lora_layers": 16, "use_dora": False}, 16, None),
    "either, the same": ({"lora_layers": 16, "use_dora": False}, 8, 10.0),
    "0.19.0 to 0.22.1": ({"num_layers": 16, "fine_tune_type": "lora"}, 16, 10.0),
}


@pytest.mark.parametrize(("beside", "alpha", "factor"), OF_MLX_LM.values(), ids=list(OF_MLX_LM))
def test_a_config_of_an_old_mlx_lm_means_what_that_version_did_or_is_refused(beside, alpha, factor):
    parameters = {"rank": 8, "alpha": alpha, "dropout": 0.0, "scale": 10.0}
    raw = {"model": "m", "seed": 0, **beside, "lora_parameters": parameters}
    if factor is not None:
        assert parsed(raw).scale == factor
        return
    with pytest.raises(AdapterError, match=r"multiplied by scale \* alpha / rank, 20, .* by scale, 10, and"):
        parsed(raw)


def test_a_whole_config_in_another_tools_layout_is_refused():
    """mlx-vlm's old layout, PEFT's without its peft_type."""
    with pytest.raises(AdapterError, match=r"alpha is 16, beside lora_parameters") as caught:
        parsed({"rank": 8, "alpha": 16, "dropout": 0.0})
    assert "rank is 8" in str(caught.value)
    assert "lora_parameters is missing" in str(caught.value)
    with pytest.raises(
        AdapterError, match=r"lora_alpha is 16.* make an alpha of 160\n.*r is 4.*rank is 8 there"
    ):
        parsed({"r": 4, "lora_alpha": 16, "lora_parameters": {"rank": 8, "scale": 20.0}})


ELSEWHERE = {
    "Unsloth's": {
        "peft_type": "LORA",
        "rank": 8,
        "scale": 2.0,
        "dropout": 0.0,
        "base_quantization": {"a": 1},
    },
    "Unsloth's without a kind": {"peft_type": "LORA", "fine_tune_type": None, "num_layers": None, "rank": 8},
    "both words": {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "use_dora": False,
    },
    "rsLoRA's": {"use_rslora": True, "r": 8, "lora_alpha": 2.0 * 8**0.5, "init_lora_weights": True},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_said_once_more_in_other_words_is_read(name):
    told = {key: value for key, value in {**GOOD, **ELSEWHERE[name]}.items() if value is not None}
    config = parsed(told)
    assert (config.fine_tune_type, config.rank, config.scale) == ("lora", 8, 2.0)


def test_ranks_and_scales_by_module_are_unsloths():
    told = {"unsloth_mlx_lora_module_ranks": {"model.layers.0.a": 4, "model.layers.1.a": 8}}
    config = parsed({**GOOD, **told, "unsloth_mlx_lora_module_scales": {"model.layers.0.a": 5}})
    assert [config.rank_of(f"base_model.model.layers.{n}.a") for n in (0, 1, 2)] == [4, 8, 8]
    assert [config.scale_of(f"layers.{n}.a") for n in (0, 1, 2)] == [5, 2.0, 2.0]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_mlx_lm_lora_writes_is_read(kind):
    train = pytest.importorskip("mlx_lm_lora.train", reason="pip install '.[dev]'")
    given = SimpleNamespace(train_type=kind, num_layers=-1, lora_parameters={"rank": 4, "scale": 3.0})
    inside = train.build_lora_config(given)  # what its from_pretrained writes, beside num_layers
    config = parsed({"lora_parameters": inside, "num_layers": inside["num_layers"]})
    assert (config.fine_tune_type, config.rank, config.scale, config.num_layers) == (kind, 4, 3.0, -1)


def test_what_mlx_lm_writes_is_read_and_options_that_are_off_ask_nothing():
    written = {**CONFIG_DEFAULTS, "num_layers": 4, "of_the_users_yaml": {"any": ["thing"]}}
    config = parsed(written)
    assert (config.fine_tune_type, config.num_layers, config.rank, config.scale) == ("lora", 4, 8, 20.0)
    off = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": None, "init_lora_weights": None}
    assert parsed({**inside(**off), "use_dora": False, "bias": "none", "modules_to_save": None}) == parsed(
        GOOD
    )
    full = parsed({**written, "fine_tune_type": "full", "lora_parameters": None})
    assert full.fine_tune_type == "full"


NAMED = {
    "mlx-lm's": ({"lora_parameters": {"keys": ["self_attn.q_proj", "mlp.up_proj"]}}, []),
    "mlx-vlm's": (
        {"lora_parameters": {"keys": [f"language_model.{path}" for path in PATHS]}},
        [],
    ),
    "Unsloth's": ({"lora_parameters": {}, "target_modules": ["q_proj", "up_proj"]}, []),
    "for all": ({"target_modules": "all-linear"}, []),
    "an expression": ({"target_modules": ".*of_another_library.*"}, []),
    "with a parameter": ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj"]}, []),
    "too many": (
        {"lora_parameters": {"keys": ["q_proj", "up_proj", "mlp.down_proj"]}, "keys": ["proj"]},
        [
            "lora_parameters.keys names mlp.down_proj, of which",
            "keys names proj, of which there",
            "keys leaves model.layers.0.self_attn.q_proj, model.layers.1.mlp.up_proj out",
        ],
    ),
    "too few": (
        {"target_modules": ["up_proj"]},
        ["target_modules leaves model.layers.0.self_attn.q_proj out"],
    ),
    "many": (
        {"target_modules": [*"abcdefgh", "q_proj", "up_proj"]},
        ["names a, b, c, d, e and 3 more, of which"],
    ),
}


@pytest.mark.parametrize(("raw", "told"), NAMED.values(), ids=list(NAMED))
def test_modules_that_are_named_and_modules_that_have_tensors_are_compared(raw, told):
    notes = naming_notes(raw, PATHS)
    assert len(notes) == len(told)
    assert all(words in note for words, note in zip(told, notes, strict=True)), notes


def test_every_config_that_can_be_written_is_read_back_equal():
    lineages = (None, Lineage(**LINEAGE), Lineage(**LINEAGE, metrics={"loss": 0.5}, quantize={"bits": 4}))
    kinds, keys = ("lora", "dora"), ((), ("self_attn.q_proj", "lm_head"))
    inits = ("default", "pissa", "pissa_niter_16")
    for kind, key, init, lineage in product(kinds, keys, inits, lineages):
        config = AdapterConfig(kind, -1, 4, 0.1, 0.05, key, init, lineage)
        assert parsed(config_json(config)) == config
    assert parsed(config_json(AdapterConfig("full", 3))) == AdapterConfig("full", 3)
    assert set(config_json(AdapterConfig("lora", 1, keys=("a",)))["lora_parameters"]) <= set(PARAMETERS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"num_layers": 1, "num_layers": 2}', "'num_layers' stands twice"),
        ("[]", "an object was expected"),
        ("3", "an object was expected"),
        ("null", "an object was expected"),
        ('{"peft_type": "LORA"}', "PEFT"),
        ('{"peft_type": null}', "PEFT"),
    ],
    ids=range(9),
)
def test_what_is_no_config_at_all_says_so(text, told):
    with pytest.raises(AdapterError, match=told):
        parse_config(text, PATH)


def test_only_plain_text_files_of_a_sensible_size_are_read(tmp_path):
    path = tmp_path / CONFIG_FILE
    os.mkfifo(path)
    with pytest.raises(AdapterError, match="is no file"):
        read_config(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(AdapterError, match="is no file"):
        read_config(tmp_path)
    path.rmdir()
    path.write_bytes(b'{"fine_tune_type": "\xff"}')
    with pytest.raises(AdapterError, match="not JSON"):
        read_config(tmp_path)
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(AdapterError, match=r"which no adapter_config\.json needs"):
        read_config(tmp_path)


def with_header(folder: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / TENSORS_FILE).write_bytes(struct.pack("<Q", len(head)) + head + data)
    return folder


def entry(shape: object = (2, 2), dtype: object = "F32", offsets: object = (0, 16)) -> dict:
    return {"shape": shape, "dtype": dtype, "data_offsets": offsets}


BROKEN_HEADERS = [
    [],
    3,
    None,
    "x",
    b"[" * 100_000,
    {"a": None},
    {"a": 3},
    {"a": []},
    {"a": {}},
    *(
        {"a": entry(shape=s)}
        for s in ((2, 3), (1000000, 1000000), (-2, -2), (2.0, 2), ("2", 2), None, 4, [[4]], (True, 4))
    ),
    *({"a": entry(dtype=d)} for d in ("F64", "F16", "X", None, 4, [])),
    *(
        {"a": entry(offsets=o)}
        for o in ((0, 16, 32), (16, 0), (-16, 0), (0,), None, "ab", (0.0, 16.0), (0, 1 << 70))
    ),
    {"a": entry(), "b": entry()},
    {"a": entry((2,), offsets=(8, 16))},
    {"a": entry((2, 1), offsets=(0, 8)), "b": entry((1,), offsets=(12, 16))},
]


@pytest.mark.parametrize("header", BROKEN_HEADERS, ids=range(len(BROKEN_HEADERS)))
def test_a_header_that_does_not_describe_its_file_is_refused_before_anything_is_read(tmp_path, header):
    with pytest.raises(AdapterError, match=r"adapters\.safetensors: (not a safetensors file|truncated)"):
        read_tensors(with_header(tmp_path, header))


def test_a_header_says_what_the_tensors_are(tmp_path):
    tensors = {
        "a": mx.zeros((3, 4)),
        "b": mx.zeros((0, 4), dtype=mx.float16),
        "c": mx.zeros((5,), dtype=mx.bfloat16),
        "d": mx.zeros((2,), dtype=mx.int32),
    }
    mx.save_safetensors(str(tmp_path / TENSORS_FILE), tensors, metadata={"format": "mlx"})
    specs = read_specs(tmp_path / TENSORS_FILE)
    assert {name: (spec.shape, spec.is_floating) for name, spec in specs.items()} == {
        "a": ((3, 4), True),
        "b": ((0, 4), True),
        "c": ((5,), True),
        "d": ((2,), False),
    }
    assert sorted(read_tensors(tmp_path)) == sorted(tensors)
