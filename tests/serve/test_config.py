"""The serving configuration: what is refused and by what name, and where its paths lead."""

import json
from pathlib import Path

import pytest
from mlx_vlm.turboquant import resolve_kv_bits, turboquant_enabled

from serve.cache.precision import PLAIN, KvPrecision
from serve.config import ServeConfig
from serve.config_file import load_config
from serve.errors import ConfigError
from serve.media_config import MediaLimitsConfig
from serve.settings import dump, load_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENT = """
model: m
experiments:
  - name: tickets
    variants:
      - {model: a, weight: 1}
      - {model: b, weight: 3}
"""


def test_every_yaml_in_configs_loads_and_comes_back_from_its_own_dump():
    files = sorted(CONFIGS.glob("*.yaml"))
    assert files
    for file in files:
        config = load_config(file)
        assert load_yaml(dump(config) + "\n", ServeConfig) == config


def test_paths_in_a_file_are_relative_to_it_and_hub_names_are_left_alone(tmp_path):
    (tmp_path / "models" / "m").mkdir(parents=True)
    folder = tmp_path / "configs"
    folder.mkdir()
    file = folder / "c.yaml"
    file.write_text(
        "model: ../models/m\nadapters: [{name: a, path: ../a}]\nallowed_adapter_roots: [roots]\nstore: sqlite:///x.db\n"
    )
    config = load_config(file)
    assert config.model == str(tmp_path / "models" / "m")
    assert config.base_name == "m"
    assert config.adapters[0].path == tmp_path / "a"
    assert config.allowed_adapter_roots == (folder / "roots",)
    assert config.store == f"sqlite:///{folder / 'x.db'}"
    (folder / "org" / "here").mkdir(parents=True)
    file.write_text("model: org/here\n")
    assert load_config(file).model == str(folder / "org" / "here")
    file.write_text("model: some-org/some-model\n")
    assert load_config(file).model == load_config(file).base_name == "some-org/some-model"
    assert load_config(file).store == "sqlite:///lathe.sqlite"


IS_LIST = {
    name: "tuple" in str(field.annotation)
    for name, field in ServeConfig.model_fields.items()
    if "Path" in str(field.annotation)
}
"""Keys that hold paths."""


@pytest.mark.parametrize("key", IS_LIST)
def test_every_path_in_a_file_is_relative_to_it(key, tmp_path):
    written = {"model": "m", key: ["here"] if IS_LIST[key] else "here"}
    if key.startswith("ssl_"):
        written = {"ssl_certfile": "cert", "ssl_keyfile": "key", **written}
    (tmp_path / "c.yaml").write_text(json.dumps(written))
    found = getattr(load_config(tmp_path / "c.yaml"), key)
    assert (found[0] if isinstance(found, tuple) else found) == tmp_path / "here"


def test_a_model_path_makes_a_config_and_the_command_line_adds_to_either(tmp_path):
    config = load_config("it's/here", port=0, adapters=[{"name": "a", "path": "x"}], host=None)
    assert (config.model, config.port, config.host) == ("it's/here", 0, "127.0.0.1")
    assert [a.name for a in config.adapters] == ["a"]
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nadapters: [{name: a, path: x}]\n")
    more = load_config(file, ["max_rows=2"], adapters=[{"name": "b", "path": "y"}])
    assert ([a.name for a in more.adapters], more.max_rows) == (["a", "b"], 2)
    with pytest.raises(ConfigError, match="'a' is already the name of"):
        load_config(file, adapters=[{"name": "a", "path": "y"}])


def test_a_drafter_is_a_word_or_a_block_and_its_folders_are_relative_to_the_file(tmp_path):
    (tmp_path / "small").mkdir()
    file = tmp_path / "c.yaml"

    def drafter(words: str):
        file.write_text(f"model: m\ndrafter: {words}\n")
        config = load_config(file)
        assert load_yaml(dump(config) + "\n", ServeConfig) == config
        return config.drafter

    assert drafter("none") == drafter("null") == ServeConfig(model="m").drafter
    assert drafter("ngram") == drafter("{kind: ngram}") == ServeConfig(model="m", drafter="ngram").drafter
    assert drafter("{kind: ngram, max_tokens: 4, min_match: 3}").max_tokens == 4
    found = drafter("{kind: model, model: small, adapters: {support: ./support}}")
    assert (found.model, found.adapters) == (str(tmp_path / "small"), {"support": tmp_path / "support"})
    assert drafter("{kind: model, model: some-org/some-model}").model == "some-org/some-model"
    assert drafter("{kind: heads, model: ./small}").model == str(tmp_path / "small")
    assert drafter("heads").model is None


def test_an_experiment_becomes_plain_values_with_its_defaults_filled_in():
    experiment = load_yaml(EXPERIMENT, ServeConfig).experiments[0].build()
    assert (experiment.name, experiment.salt) == ("tickets", "tickets")
    assert [(v.name, v.model, v.weight) for v in experiment.variants] == [("a", "a", 1.0), ("b", "b", 3.0)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("weight: 3", "weight: 0"), r"experiments\.0\.variants\.1\.weight"),
        (("      - {model: b, weight: 3}\n", ""), r"experiments\.0\.variants"),
        (("model: b", "model: a"), "two variants are called 'a'"),
        (("name: tickets", "name: m"), "'m' is already the name of the base"),
        (("model: b", "model: tickets, name: t"), "found the experiment 'tickets'"),
        (("model: m", "model: m\nadapters: [{name: tickets, path: x}]"), "already the name of adapters.0"),
        (("model: m", "model: m\nadapters: [{name: a@2, path: x}]"), "'@' separates"),
        (("model: m", 'model: m\nadapters: [{name: "a\\nb", path: x}]'), r"adapters\.0\.name.*printable"),
        (("model: m", 'model: m\nname: "a\\nb"'), r"name: found 'a\\nb'; a name holds printable"),
        (("name: tickets", 'name: "tickets "'), r"experiments\.0\.name.*ends with a space"),
        (("model: b", 'model: "b\\r@1"'), r"experiments\.0\.variants\.1\.model.*printable"),
        (("model: b", 'model: b, name: "\\u202eb"'), r"experiments\.0\.variants\.1\.name.*printable"),
        (("model: m", "model: m\nadapter_budget_gib: 0"), "adapter_budget_gib"),
        (("model: m", "model: m\nmax_row: 3"), "did you mean max_rows"),
        (("model: m", "model: m\nport: 99999"), "port"),
        (("model: m", "model: m\nmodel: n"), "written twice"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(change, told):
    assert change[0] in EXPERIMENT
    with pytest.raises(ConfigError, match=told):
        load_yaml(EXPERIMENT.replace(*change), ServeConfig)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"memory_budget_gib": 1, "kv_budget_gib": 2},
            "kv_budget_gib: found 2, which is a part of memory_bud",
        ),
        ({"memory_budget_gib": 1, "adapter_budget_gib": 2}, "adapter_budget_gib: found 2.* at most 1"),
        ({"memory_budget_gib": 1, "prefix_cache_gib": 2}, "prefix_cache_gib: found 2"),
        ({"kv_budget_gib": 1, "prefix_cache_gib": 1.5}, "prefix_cache_gib: found 1.5.*kv_budget_gib.*most 1"),
        ({"prefix_cache_gib": 0, "prefix_cache_dir": "p"}, "prefix_cache_dir: .*prefix_cache_gib is 0"),
        ({"feature_cache_gib": 0, "feature_cache_dir": "p"}, "feature_cache_dir: .*feature_cache_gib is 0"),
        ({"feature_cache_disk_gib": 1}, "feature_cache_disk_gib: .*no feature_cache_dir"),
        ({"kv_budget_gib": 1, "feature_cache_gib": 2}, "feature_cache_gib: found 2.*kv_budget_gib.*most 1"),
        (
            {"feature_cache_dir": "p", "prefix_cache_dir": "p"},
            "feature_cache_dir: found prefix_cache_dir's folder",
        ),
        ({"encode_patches": 0}, "encode_patches"),
        ({"prefix_cache_disk_gib": 1}, "prefix_cache_disk_gib: .*no prefix_cache_dir"),
        ({"memory_budget_gib": 0}, "memory_budget_gib"),
        ({"prefix_cache_gib": -1}, "prefix_cache_gib"),
        ({"prefix_cache_dir": "p", "prefix_cache_disk_gib": 0}, "prefix_cache_disk_gib"),
        ({"kv_bits": 7}, "kv_bits is 7"),
        ({"kv_bits": 0}, "kv_bits is 0"),
        ({"kv_bits": 3.7}, "kv_bits is 3.7; expected a multiple of 0.5"),
        ({"kv_bits": 9.5}, "kv_bits is 9.5"),
        ({"kv_bits": 3.5, "kv_scheme": "affine"}, "kv_bits is 3.5"),
        ({"kv_bits": 16, "kv_scheme": "turbo"}, "kv_scheme is turbo, and kv_bits does not say"),
        ({"kv_value_bits": 4}, "kv_value_bits is 4"),
        ({"kv_bits": 8, "kv_value_bits": 7}, "kv_value_bits is 7"),
        ({"kv_bits": 8, "kv_scheme": "uniform"}, "kv_scheme"),
        ({"kv_group_size": 48}, "kv_group_size"),
        ({"kv_quantize_after": -1}, "kv_quantize_after"),
        ({"kv_plain_layers": 1.5}, "kv_plain_layers"),
        ({"one_step_ahead": True}, "one_step_ahead"),
        (
            {"drafter": "eagle"},
            r"drafter\.kind: found 'eagle'; expected one of 'none', 'ngram', 'model', 'heads'",
        ),
        (
            {"drafter": {"max_tokens": 3}},
            r"drafter\.kind: found nothing; expected one of 'none', 'ngram', 'model', 'heads'$",
        ),
        ({"drafter": 3}, "drafter: found 3; expected an object"),
        ({"drafter": {"kind": "none", "max_tokens": 3}}, r"max_tokens: unknown key; expected one of kind$"),
        ({"drafter": {"kind": "ngram", "max_tokens": 0}}, r"drafter\.max_tokens: found 0"),
        ({"drafter": {"kind": "ngram", "max_tokens": 16}}, r"drafter\.max_tokens: found 16"),
        ({"drafter": {"kind": "ngram", "min_match": 1}}, r"drafter\.min_match: found 1"),
        ({"drafter": {"kind": "ngram", "model": "x"}}, r"drafter\.model: unknown key"),
        ({"drafter": {"kind": "ngram", "remembered_tokens": -1}}, r"drafter\.remembered_tokens: found -1"),
        ({"drafter": "model"}, r"drafter\.model: missing; expected: A local folder or a hub name\.$"),
        ({"drafter": {"kind": "heads", "adapters": {}}}, r"drafter\.adapters: unknown key"),
        ({"draft_model": "x"}, r"draft_model: unknown key; write drafter: {kind: model, model: …}"),
        ({"num_draft_tokens": 3}, r"num_draft_tokens: unknown key; write drafter\.max_tokens"),
        (
            {"speculative_config": {"method": "ngram"}},
            "speculative_config: unknown key; write drafter: ngram",
        ),
        ({"media": {"min_pixels": 9, "max_pixels": 5}}, r"media\.min_pixels: found 9.* above max_pixels 5"),
        ({"media": {"max_pixel": 5}}, r"media\.max_pixel: unknown key; did you mean max_pixels"),
        ({"media": {"fps": 0}}, r"media\.fps"),
        ({"media_limits": {"fetch_s": 0}}, r"media_limits\.fetch_s"),
        ({"media_limits": {"max_items": -1}}, r"media_limits\.max_items"),
        ({"quantized_kv_start": 5}, "quantized_kv_start: unknown key; write kv_quantize_after"),
    ],
)
def test_budgets_that_cannot_be_and_bits_that_nothing_has_are_refused_by_their_key(keys, told, tmp_path):
    written = [f"{key}: {json.dumps(value)}" for key, value in keys.items()]
    file = tmp_path / "c.yaml"
    for lines, overrides in ((written, []), ([], [line.replace(": ", "=", 1) for line in written])):
        file.write_text("\n".join(["model: m", *lines]))
        with pytest.raises(ConfigError, match=told):
            load_config(file, overrides)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_yaml("model: m\nkv_bits: 7\nprefix_cache_disk_gib: 1\nname: a@b\n", ServeConfig)
    for key in ("kv_bits", "prefix_cache_disk_gib", "name"):
        assert f": {key}: " in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, PLAIN),
        ({"kv_bits": 16}, PLAIN),
        ({"kv_group_size": 32, "kv_quantize_after": 5}, PLAIN),
        ({"kv_bits": 8}, KvPrecision("affine", 8, 8)),
        ({"kv_bits": 8, "kv_value_bits": 4}, KvPrecision("affine", 8, 4)),
        ({"kv_bits": 3.5}, KvPrecision("turbo", 3, 4)),
        ({"kv_bits": 4, "kv_scheme": "turbo"}, KvPrecision("turbo", 4, 4)),
        ({"kv_bits": 3.5, "kv_value_bits": 3}, KvPrecision("turbo", 3, 3)),
        (
            {"kv_bits": 4, "kv_group_size": 32, "kv_quantize_after": 500, "kv_plain_layers": 2},
            KvPrecision("affine", 4, 4, 32, 500, 2),
        ),
    ],
)
def test_bits_mean_one_precision(keys, expected):
    assert ServeConfig(model="m", **keys).kv_precision == expected


def test_turboquants_bits_are_split_as_mlx_vlm_splits_them():
    for half in range(2, 17):
        bits = half / 2
        found = ServeConfig(model="m", kv_bits=bits, kv_scheme="turbo").kv_precision
        assert (found.key_bits, found.value_bits) == resolve_kv_bits(bits)[1:]
        if turboquant_enabled(bits):
            assert ServeConfig(model="m", kv_bits=bits).kv_precision == found


def test_what_media_may_be_is_told_in_mib_and_millions_and_means_bytes_and_pixels():
    block = {"max_items": 3, "max_image_mib": 0.5, "max_image_megapixels": 1.5, "max_video_megapixels": 2}
    built = ServeConfig(
        model="m", media_limits={**block, "fetch_s": 2, "allow_private_hosts": True}
    ).media_limits
    limits = built.build()
    assert (limits.max_items, limits.max_image_bytes, limits.max_image_pixels) == (3, 2**19, 1_500_000)
    assert (limits.max_video_pixels, limits.fetch_s, limits.allow_private_hosts) == (2_000_000, 2, True)
    every = {name: getattr(limits, name) for name in vars(limits)}
    other = MediaLimitsConfig(
        **{name: 7 for name in MediaLimitsConfig.model_fields if name != "allow_private_hosts"}
    )
    same = [name for name, value in vars(other.build()).items() if value == every[name]]
    assert same == ["max_redirects"], "a limit that no key changes"


def test_files_may_be_shown_everywhere_on_loopback_and_elsewhere_only_under_roots(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for host, roots, expected in (
        ("127.0.0.1", None, (Path("/"),)),
        ("0.0.0.0", None, ()),
        ("127.0.0.1", [tmp_path / "link"], (tmp_path / "real",)),
        ("0.0.0.0", [tmp_path / "link"], (tmp_path / "real",)),
        ("127.0.0.1", [], ()),
    ):
        config = ServeConfig(model="m", host=host, allowed_media_roots=roots)
        assert config.media_roots == expected
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nallowed_media_roots: [real]\n")
    assert load_config(file).allowed_media_roots == (tmp_path / "real",)


def test_a_folder_of_prefixes_is_relative_to_its_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nprefix_cache_dir: prefixes\nfeature_cache_dir: features\n")
    assert load_config(file).prefix_cache_dir == tmp_path / "prefixes"
    assert load_config(file).feature_cache_dir == tmp_path / "features"


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box.example", False)],
)
def test_only_loopback_addresses_are_loopback(host, is_loopback):
    assert ServeConfig(model="m", host=host).is_loopback is is_loopback
