"""The front door: what it loads, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import SecretStr
from typer.testing import CliRunner

import lathe
from serve.commands import serving
from serve.config import ServeConfig
from serve.config_file import load_config
from serve.errors import ConfigError
from serve.experiments.assignment import Experiment, Variant
from serve.experiments.records import Exposure
from serve.experiments.store import Store

ROOT = Path(lathe.__file__).parent
COMMANDS = (
    "train",
    "runs",
    "serve",
    "chat",
    "generate",
    "ab",
    "ab report",
    "ab runs",
    "ab drop",
    "data",
    "data show",
    "adapters",
    "adapters inspect",
    "adapters convert",
    "adapters diff",
    "adapters merge",
    "adapters extract",
    "adapters list",
    "adapters load",
    "adapters unload",
    "adapters rollback",
    "adapters pin",
    "adapters unpin",
    "export",
    "bench",
    "bench serve",
    "bench compare",
    "bench adapters",
    "bench step",
    "bench cache",
    "bench constraints",
    "bench conversations",
    "bench images",
    "bench drafters",
    "bench hostile",
    "bench overhead",
    "bench train",
    "demo",
    "doctor",
)


def run_lathe(*words: str, cwd: Path = ROOT, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "lathe", *words]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, check=False)


def test_help_loads_neither_mlx_nor_our_packages():
    script = (
        "import sys, lathe\n"
        "sys.argv = ['lathe', '--help']\n"
        "try:\n    lathe.main()\nexcept SystemExit as stop:\n    assert stop.code in (0, None)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'mlx', 'serve', 'train', 'numpy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "doctor" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(lathe.app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if each not in ("ab", "adapters", "bench", "data")]
)
def test_help_cuts_no_option_and_no_default(command, width):
    found = typer.main.get_command(lathe.app)
    for word in command.split():
        found = found.commands[word]
    environment = {"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)}
    output = CliRunner().invoke(lathe.app, [*command.split(), "--help"], env=environment).output
    options = [each for each in found.params if each.opts[0].startswith("-")]
    assert {name for option in options for name in option.opts} <= set(output.replace(",", " ").split())
    told = "".join(output.split())  # a default that is longer than its column goes on in the next line
    defaults = [
        o.default for o in options if isinstance(o.default, str | int | float) and o.default is not ...
    ]
    assert not [value for value in defaults if not isinstance(value, bool) and str(value) not in told]


def test_the_list_of_commands_here_is_complete():
    there = typer.main.get_command(lathe.app).commands
    within = {f"{group} {name}" for group in there for name in getattr(there[group], "commands", ())}
    assert {*there, *within} == set(COMMANDS)


def test_what_help_says_of_a_command_is_what_the_command_says_of_itself():
    there = typer.main.get_command(lathe.app).commands
    said = {name: there[name].get_short_help_str(1000) for name in there}
    assert said == {name: said for name, (_, said) in lathe.COMMANDS.items()}


def test_no_commands_help_loads_mlx():
    """Options are read before what they are for is loaded."""
    script = (
        "import sys, lathe\n"
        "from typer.testing import CliRunner\n"
        f"for command in {COMMANDS!r}:\n"
        "    result = CliRunner().invoke(lathe.app, [*command.split(), '--help'])\n"
        "    assert 'Usage:' in result.output, command\n"
        "print(sorted({'serve', 'train', 'mlx', 'numpy', 'httpx', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "['serve', 'train']"


def test_what_needs_no_model_waits_for_no_model_library(make_adapter, tmp_path):
    """mlx-lm and transformers take a second and more."""
    adapter, missing = str(make_adapter(1)), str(tmp_path / "missing.yaml")
    commands = {
        ("runs",): 0,
        ("adapters", "inspect", adapter): 0,
        ("adapters", "diff", adapter, adapter): 0,
        ("ab", "report", "x", "--store", f"sqlite:///{tmp_path}/none.db"): 2,
        ("train", missing): 2,
        ("serve", missing): 2,
        ("chat", missing): 2,
        ("generate", missing, "-p", "x"): 2,
    }
    script = (
        "import sys, lathe\n"
        f"for command, status in {commands!r}.items():\n"
        "    try:\n        lathe.main(command)\n"
        "    except SystemExit as stop:\n        assert (stop.code or 0) == status, (command, stop.code)\n"
        "    print('loaded', command[:2], {'mlx_lm', 'mlx_vlm', 'transformers', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("loaded")]
    assert [line for line in told if not line.endswith(" set()")] == [], done.stderr
    assert len(told) == len(commands), done.stderr


def test_the_flags_of_serve_are_keys_of_its_configuration():
    flags = {each.name: each for each in typer.main.get_command(lathe.app).commands["serve"].params}
    flags = {
        name: each
        for name, each in flags.items()
        if name not in ("model", "adapter", "embedding_model", "also", "overrides")
    }
    for name, key in serving.KEYS_OF.items():
        assert not flags.pop(name).default, "what is not given is the file's"
        group, _, inside = key.rpartition(".")
        annotation = ServeConfig.model_fields[group].annotation if group else ServeConfig
        assert any(inside in kind.model_fields for kind in get_args(annotation) or (annotation,))
    assert set(flags) <= set(ServeConfig.model_fields)
    memory = [
        name
        for name in ServeConfig.model_fields
        if name.startswith(("memory_", "prefix_", "kv_", "one_", "feature_", "encode_"))
    ]
    assert set(memory) - set(flags) == {"kv_budget_gib"}
    readme = (ROOT / "README.md").read_text()
    example = load_config(ROOT / "configs" / "memory.yaml").model_fields_set
    for name in (*memory, "adapter_budget_gib"):
        assert f"`{name}`" in readme
        assert name in example
    for name, flag in flags.items():
        assert flag.opts == [f"--{name.replace('_', '-')}"]
        assert flag.default is None, "what is not given is the file's"


FLAGS_GIVEN = {
    "alias": ["gpt-4o", "other"],
    "model_dir": [Path("d")],
    "max_loaded_models": 3,
    "models_budget_gib": 4.0,
    "idle_unload_s": 9.0,
    "context_overflow": "truncate",
    "adapter_dir": [Path("a"), Path("b")],
    "max_adapters": 3,
    "adapter_watch": [Path("w")],
    "memory_budget_gib": 3.0,
    "prefix_cache_gib": 0.5,
    "prefix_cache_dir": Path("p"),
    "prefix_cache_disk_gib": 1.5,
    "encode_patches": 64,
    "feature_cache_gib": 0.25,
    "feature_cache_dir": Path("f"),
    "feature_cache_disk_gib": 2.5,
    "kv_bits": 8.0,
    "kv_value_bits": 4.0,
    "kv_scheme": "affine",
    "kv_group_size": 32,
    "kv_quantize_after": 7,
    "kv_plain_layers": 2,
    "one_step_ahead": "off",
    "allowed_media_root": [Path("a"), Path("b")],
    "allow_private_hosts": True,
    "max_media": 3,
    "max_pixels": 50_000,
    "drafter": "ngram",
    "drafter_model": "d",
    "drafter_max_tokens": 3,
    "drafter_min_match": 4,
    "generation_config": "none",
    "temperature": 0.0,
    "top_p": 0.5,
    "top_k": 0,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "reasoning_parser": "deepseek_r1",
    "enable_thinking": True,
    "thinking_budget": 0,
    "tool_call_parser": "hermes",
    "mcp_servers": Path("m"),
    "thinking_start_token": "<a>",
    "thinking_end_token": "</a>",
    "api_key": "sk-a",
    "api_keys": Path("k"),
    "allowed_origin": ["https://a.example", "*"],
    "drain_timeout_s": 5.0,
    "log_format": "json",
    "log_level": "debug",
    "log_prompts": True,
    "otlp_endpoint": "http://h:4318/v1/traces",
    "ssl_certfile": Path("c"),
    "ssl_keyfile": Path("k"),
    "ssl_keyfile_password": "secret",
    "ssl_ca_certs": Path("a"),
}


def serve_config(*words: str) -> ServeConfig:
    """What `lathe serve m` and these words ask for."""
    command = typer.main.get_command(lathe.app).commands["serve"]
    return load_config("m", serving.keys_given(command.make_context("serve", ["m", *words]).params))


def test_every_flag_of_serve_arrives_in_its_key_and_no_other_key_changes():
    flags = {each.name for each in typer.main.get_command(lathe.app).commands["serve"].params}
    assert set(FLAGS_GIVEN) == flags - set(serving.NOT_KEYS)
    plain = load_config("m")
    assert serve_config() == plain, "what is not given is the file's"
    for flag, value in FLAGS_GIVEN.items():
        name = f"--{flag.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        words = [name] if value is True else [word for each in values for word in (name, str(each))]
        needed = ["--prefix-cache-dir", "p"] if flag == "prefix_cache_disk_gib" else []
        needed = ["--feature-cache-dir", "p"] if flag == "feature_cache_disk_gib" else needed
        needed = (
            ["--drafter", "model" if flag.endswith("model") else "ngram"] if "drafter_" in flag else needed
        )
        needed += ["--drafter-model", "m"] if flag == "drafter_model" else []
        needed = ["--kv-bits", "8"] if flag.startswith("kv_") and flag != "kv_bits" else needed
        if flag.startswith("ssl_") and flag != "ssl_certfile":
            needed = ["--ssl-certfile", "c"]
        before, after = serve_config(*needed).model_dump(), serve_config(*needed, *words).model_dump()
        *groups, key = serving.KEYS_OF.get(flag, flag).split(".")
        inside_before, inside_after = before, after
        for group in groups:
            inside_before, inside_after = inside_before[group], inside_after[group]
        was, found = inside_before.pop(key), inside_after.pop(key)
        assert found != was, f"{flag}: another value would tell more"
        if isinstance(values[0], Path):
            assert [Path(each) for each in (found if isinstance(value, list) else [found])] == [
                each.absolute() for each in values
            ]
        else:
            wanted = tuple(value) if isinstance(value, list) else value
            found = found.get_secret_value() if isinstance(found, SecretStr) else found
            assert (found["kind"] if flag == "drafter" else found) == wanted, flag
        assert before == after, f"{flag} changes another key"
    assert serve_config("--no-enable-thinking").enable_thinking is False


def test_a_drafter_is_named_in_place_of_the_files_in_whatever_order_it_is_described(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndrafter: {kind: model, model: d, max_tokens: 2}\n")
    command = typer.main.get_command(lathe.app).commands["serve"]

    def drafter(*words: str) -> dict[str, Any]:
        given = command.make_context("serve", [str(file), *words]).params
        return load_config(file, serving.keys_given(given)).drafter.model_dump(exclude_unset=True)

    assert drafter("--drafter", "none") == {"kind": "none"}
    assert drafter("--drafter-max-tokens", "3", "--drafter", "ngram") == {"kind": "ngram", "max_tokens": 3}
    assert drafter("--drafter-model", "e") == {"kind": "model", "model": "e", "max_tokens": 2}
    with pytest.raises(ConfigError, match=r"drafter\.min_match: unknown key"):
        drafter("--drafter-min-match", "3")


BROKEN_RECIPE = "model: nowhere/at-all/here\nlerning_rate: 1e-4\ndata: rows\niters: many\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train {tmp}/missing.yaml", ("missing.yaml",)),
        ("train {tmp}/broken.yaml", ("lerning_rate", "learning_rate", "iters")),
        ("train {tmp}/broken.yaml --set batch_size", ("batch_size",)),
        ("serve {tmp}/no-such-model", ("no-such-model",)),
        ("serve {tmp}/missing.yaml", ("missing.yaml",)),
        ("serve {tmp}/no-such-model --adapter nameless", ("NAME=PATH",)),
        ("serve {tmp}/no-such-model --also =x", ("--also", "NAME=MODEL")),
        ("serve {tmp}/no-such-model --also a=x --also a=y", ("models.1.name", "'a' is already the name")),
        (
            "serve {tmp}/no-such-model --kv-bits 7 --prefix-cache-disk-gib 1",
            ("kv_bits is 7", "prefix_cache_dir"),
        ),
        ("serve {tmp}/no-such-model --kv-bits 3.5 --prefix-cache-dir p", ("no-such-model", "no model")),
        ("serve {tmp}/no-such-model --one-step-ahead maybe", ("one_step_ahead", "maybe")),
        ("serve {tmp}/no-such-model --drafter eagle", ("drafter.kind: found 'eagle'", "'ngram', 'model'")),
        ("doctor --adapter {tmp}", ("--model",)),
        ("doctor --model {tmp}/no-such-model", ("no-such-model",)),
        ("chat --url http://127.0.0.1:1", ("http://127.0.0.1:1", "lathe serve")),
        ("chat", ("--url",)),
        ("chat {tmp}/no-such-model", ("no-such-model",)),
        ("chat {tmp}/no-such-model --url http://127.0.0.1:1", ("--url",)),
        ("chat --url http://127.0.0.1:1 --adapter a={tmp}", ("--adapter", "--model")),
        ("generate --url http://127.0.0.1:1 -p hello", ("http://127.0.0.1:1", "lathe serve")),
        ("generate -p hello", ("MODEL, --url",)),
        ("generate {tmp}/no-such-model -p hello", ("no-such-model",)),
        ("generate {tmp}/m --prompt=", ("--prompt", "found none")),
        ("generate {tmp}/m", ("--prompt", "found none")),
        ("generate {tmp}/m -p hello --field =3", ("--field", "NAME=VALUE")),
        ("generate {tmp}/m -p hello --chat-template-config []", ("--chat-template-config", "JSON object")),
        ("generate {tmp}/m -p hello --image {tmp}/none.png", ("none.png", "cannot be read")),
        ("generate {tmp}/m -p hello --ignore-chat-template --system be", ("--system", "of chats")),
        (
            "generate {tmp}/m -p hello --json /dev/null/answer.json",
            ("/dev/null/answer.json", "cannot be written"),
        ),
        ("generate --url http://127.0.0.1:1 -p hello --set max_rows=3", ("--set", "loaded here")),
        ("ab report nothing --store sqlite:///{tmp}/none.sqlite", ("none.sqlite",)),
        ("ab runs nothing --store sqlite:///{tmp}/none.sqlite", ("none.sqlite",)),
        ("ab drop nothing --outcome x --store sqlite:///{tmp}/none.sqlite", ("none.sqlite",)),
        ("export {tmp}/no-such-adapter {tmp}/out", ("no-such-adapter",)),
        ("export {tmp}/no-such-adapter {tmp}/out --bits 3", ("--bits", "4 or 8")),
        ("bench serve --url http://127.0.0.1:1", ("http://127.0.0.1:1",)),
        ("bench serve --concurrency 1,none", ("--concurrency", "1,4,16")),
        ("bench train --batch-size 0", ("--batch-size", "found 0", "1 or more")),
        ("bench train --iters 1", ("--iters", "found 1", "2 or more")),
        ("bench train --model nowhere/at-all", ("nowhere/at-all",)),
        ("bench train --json /dev/null/numbers.json", ("/dev/null/numbers.json", "cannot be written")),
        ("bench serve --endpoint mail", ("--endpoint", "completions")),
        ("bench serve --prompt-tokens 0", ("--prompt-tokens", "'0'", "uniform:64:512")),
        ("bench serve --max-tokens uniform:9:3", ("--max-tokens", "uniform:9:3")),
        ("bench serve --request-rate 0", ("--request-rate", "0.5,4,inf")),
        ("bench serve --request-rate nan", ("--request-rate", "nan")),
        ("bench serve --burstiness 2", ("--burstiness", "--request-rate")),
        ("bench serve --request-rate 1 --burstiness nan", ("--burstiness", "above 0")),
        ("bench serve --time-limit 0", ("--time-limit", "above 0")),
        ("bench serve --goodput itl:5", ("--goodput", "itl:5", "ttft:500")),
        ("bench serve --goodput ttft:5,ttft:6", ("--goodput", "twice")),
        ("bench serve --model a --adapters 3", ("--model", "--adapters")),
        ("bench serve --model ,", ("--model", "a,b,c")),
        ("bench serve --prefix-tokens 64", ("--prefix-tokens", "--num-prefixes")),
        ("bench serve --prefix-zipf 2", ("--prefix-zipf", "--num-prefixes")),
        ("bench serve --frames 3", ("--frames", "--videos")),
        ("bench serve --images 1 --endpoint completions", ("--images", "chats")),
        ("bench serve --set max_rows=3", ("--set", "--start")),
        ("bench serve --start tiny --url http://127.0.0.1:1", ("--start", "--url")),
        ("bench serve --png /dev/null/picture.png", ("--png", "/dev/null/picture.png")),
        ("bench compare --only lathe", ("--only", "lathe", "mixed32")),
        ("bench compare --only lathe,ollama", ("--only", "ollama", "vllm_mlx")),
        ("bench compare --time-limit -1", ("--time-limit", "above 0")),
        ("bench compare --png /dev/null/picture.png", ("--png", "/dev/null/picture.png")),
        ("bench adapters --parts mixes,none", ("--parts", "none", "ranks")),
        ("bench adapters --size 3B", ("--size", "29M")),
        ("demo --folder {tmp}", ("another folder",)),
        ("no-such-command", ("no-such-command",)),
    ],
)
def test_bad_input_ends_with_status_2_and_one_clear_message(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as where whoever starts it has closed it
    (tmp_path / "broken.yaml").write_text(BROKEN_RECIPE)
    with pytest.raises(SystemExit) as stop:
        lathe.main([word.format(tmp=tmp_path) for word in words.split()])
    assert stop.value.code == 2
    out, told = capsys.readouterr()
    assert not out
    flat = " ".join(told.replace("│", " ").split())
    for word in said:
        assert word in flat


def test_the_installed_command_ends_the_same_way(tmp_path):
    done = run_lathe("train", "missing.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "missing.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_messages_keep_their_brackets(tmp_path, capsys):
    """Rich markup in a message would swallow `[…]`."""
    with pytest.raises(SystemExit):
        lathe.main(["train", f"{tmp_path}/[bold]x[bold].yaml"])
    assert "[bold]x[bold].yaml" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_name_can_be_printed(encoding, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", f"{encoding}:strict")
    names = (":key:", "日", os.fsdecode(b"not-\xff-utf-8"))
    for name in names:
        (tmp_path / name).mkdir()
    command = [sys.executable, "-P", "-m", "lathe", "runs", *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = names[1].encode(encoding, errors="backslashreplace")
    assert done.stdout.replace(b"\n", b" ").startswith(
        b"no runs under :key:, " + shown + b", not-\\udcff-utf-8"
    )


def test_doctor_measures_the_machine_and_writes_every_number(tmp_path):
    done = run_lathe("doctor", "--json", str(tmp_path / "deep" / "doctor.json"))
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "deep" / "doctor.json").read_text())
    assert numbers["matmul_gflops"] > 0
    assert numbers["device"]["memory_bytes"] > 2**28
    assert numbers["packages"]["mlx-lm"]
    assert numbers["weights_gb_s"] > 0
    assert numbers["hardware"]["chip"] in done.stdout
    assert numbers["hardware"]["memory_bytes"] > 2**28
    for shown in (numbers["device"]["mlx_version"], f"{numbers['matmul_gflops']:.1f} GFLOP/s"):
        assert shown in done.stdout


def test_doctor_says_what_combines_for_a_model(tmp_path):
    done = run_lathe("doctor", "--model", "data/tickets", "--json", str(tmp_path / "c.json"))
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "c.json").read_text())["cells"]
    assert {cell["row"] for cell in cells} == {"base", "LoRA", "DoRA"}
    assert [cell for cell in cells if not cell["is_possible"]] == []
    lines = done.stdout.splitlines()
    assert [line.split().count("yes") for line in lines if line.startswith(("base", "LoRA", "DoRA"))] == [
        8
    ] * 3


def test_a_json_file_that_cannot_be_written_is_a_foreseen_failure(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_lathe("doctor", "--json", str(tmp_path / "file" / "doctor.json"))
    assert done.returncode == 1
    assert "doctor.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status"), [("runs", 1), ("bench step", 2), ("bench adapters", 2), ("adapters list", 2)]
)
@pytest.mark.parametrize("is_linked", [False, True])
def test_numbers_do_not_take_the_place_of_what_is_no_file(words, status, is_linked, tmp_path, capsys):
    """A pipe, as /dev/stdout may be one; a device would be gone for everybody on the machine."""
    pipe, named = tmp_path / "pipe", tmp_path / "named"
    os.mkfifo(pipe)
    if is_linked:
        named.symlink_to(pipe)
    with pytest.raises(SystemExit) as stop:
        lathe.main([*words.split(), "--json", str(named if is_linked else pipe)])
    assert stop.value.code == status
    assert "cannot be written" in capsys.readouterr().err
    assert pipe.is_fifo()
    assert named.is_symlink() == is_linked


def test_numbers_go_where_a_link_leads(tmp_path, capsys):
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            lathe.main(["runs", str(tmp_path), "--json", str(tmp_path / "link.json")])
        assert not stop.value.code, capsys.readouterr().err
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "there.json").read_text()) is not None


@pytest.fixture
def experiment_store(tmp_path):
    """The URL of a store with two runs of `tickets`: slow answers, long names, and a misspelled outcome."""
    url = f"sqlite:///{tmp_path}/e.sqlite"
    store = Store(url)
    variants = (
        Variant("customer-support-router-rank-8", "a"),
        Variant("customer-support-router-rank-64", "b"),
    )
    for salt in ("old", "new"):
        run = store.begin_run(Experiment("tickets", salt, variants)).id
        for i in range(60):
            arm, completion = i % 2, f"{salt}-{i}"
            model = f"{variants[arm].model}@1"
            store.expose(
                Exposure(completion, run, variants[arm].name, f"u{i}", model, "abc", float(i), 1.276)
            )
            store.complete(completion, latency_s=12.345 if arm else 123.456, num_tokens=5, finish="stop")
            store.record_outcome(completion, "exact_match", float(arm))
    store.record_outcome("new-7", "exct_match", 1.0)
    store.close()
    return url


@pytest.fixture
def run_at(capsys):
    """run_at(width, *words) → status, output and errors of a command in a pipe whose lines have so many columns."""

    def run(width: int, *words: str) -> tuple[int, str, str]:
        before = os.environ.get("COLUMNS")
        os.environ["COLUMNS"] = str(width)
        try:
            with pytest.raises(SystemExit) as stop:
                lathe.main(words)
        finally:
            del os.environ["COLUMNS"]
            if before is not None:
                os.environ["COLUMNS"] = before
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_report_in_a_pipe_cuts_no_digit_and_no_name(width, experiment_store, run_at):
    words = ("ab", "report", "tickets", "--outcome", "exact_match", "--store", experiment_store)
    status, output, told = run_at(width, *words)
    assert status == 0, told
    shown = output.split()
    for word in (
        "1,276",
        "12,345",
        "123,456",
        "customer-support-router-rank-8",
        "customer-support-router-rank-64",
    ):
        assert word in shown, output
    assert "better, difference +1.000" in output
    assert "exct_match 1." in output


def test_runs_are_listed_and_reported_on_by_number(experiment_store, run_at):
    store = ("--store", experiment_store)
    _, listed, _ = run_at(200, "ab", "runs", "tickets", *store)
    newest, *_, oldest = [line.split() for line in listed.splitlines()[2:] if line[0] != " "]
    assert (newest[0], oldest[0]) == ("2", "1")
    assert "run 1 (exposures: 60" in run_at(200, "ab", "report", "tickets", *store)[1]
    _, first, _ = run_at(200, "ab", "report", "tickets", "--run", "1", *store)
    assert first.startswith("tickets, run 1,")
    assert "better" in first
    assert run_at(200, "ab", "report", "tickets", "--run", "3", *store)[0] == 2


def test_an_outcome_is_dropped_only_if_somebody_says_yes(experiment_store, run_at):
    words = ("ab", "drop", "tickets", "--outcome", "exct_match", "--store", experiment_store)
    status, _, told = run_at(200, *words)
    assert status == 2
    assert "--yes" in told
    status, unclear, _ = run_at(200, "ab", "report", "tickets", "--store", experiment_store)
    assert status == 0
    assert "exact_match 60, exct_match 1; nothing is compared" in unclear
    assert run_at(200, *words, "--yes")[1] == "deleted 1 of outcome exct_match in run 2 of tickets\n"
    _, clear, _ = run_at(200, "ab", "report", "tickets", "--store", experiment_store)
    assert "better, difference +1.000" in clear
    assert "Dropped by hand: 1 of outcome exct_match" in clear
    status, _, told = run_at(200, *words, "--yes")
    assert status == 2
    assert "exact_match 60" in told


@pytest.mark.parametrize(("answer", "status", "left"), [("n", 1, 2), ("y", 0, 1)])
def test_in_a_terminal_the_question_is_asked(answer, status, left, experiment_store):
    mine, theirs = pty.openpty()
    words = ("ab", "drop", "tickets", "--outcome", "exct_match", "--store", experiment_store)
    os.write(mine, f"{answer}\n".encode())
    command = [sys.executable, "-P", "-m", "lathe", *words]
    done = subprocess.run(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, check=False, timeout=120
    )
    os.close(theirs)
    asked = os.read(mine, 10_000).decode()
    os.close(mine)
    assert "Delete 1 of outcome exct_match in run 2 of tickets for good? [y/N]" in asked
    assert done.returncode == status
    store = Store(experiment_store, create=False)
    assert len(store.runs("tickets")[0].outcomes) == left
    store.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("words", [["runs"], ["ab", "--help"]])
def test_a_disk_that_is_full_is_told_in_a_line_and_by_the_status(words, tmp_path):
    command = [sys.executable, "-P", "-m", "lathe", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: what was being written: No space left on device\n")
