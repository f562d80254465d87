"""The serving configuration: what is refused and by what name, and where its paths lead."""

from pathlib import Path

import pytest

from serve.config import ServeConfig, load_config
from serve.errors import ConfigError
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
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box.example", False)],
)
def test_only_loopback_addresses_are_loopback(host, is_loopback):
    assert ServeConfig(model="m", host=host).is_loopback is is_loopback
