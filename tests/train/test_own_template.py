"""An adapter that brings its own chat template and its own end token: trained, served, exported, continued."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
from datetime import date
from pathlib import Path

import httpx
import mlx_lm
import pytest
from rich.console import Console
from typer.testing import CliRunner

import lathe
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_config, read_tensors, write_adapter
from serve.api.server import serving
from serve.config import ServeConfig
from serve.engine.engine import Engine
from serve.engine.generate import generate
from serve.errors import AdapterError, ConfigError
from serve.model.loading import load
from serve.runtime import Runtime
from train.after.export import Form, export
from train.foresee.preflight import Preflight, prepare, show
from train.loop import checkpoint
from train.recipe.recipe import load_recipe
from train.run import run

pytestmark = pytest.mark.long

END = 2
"""<|im_end|>, which ends nothing for this base."""
THINKS = (
    "{{ style if style is defined else 'plain' }}\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '(hm)\n' if m.role == 'assistant' and loop.last }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Thoughts in the last answer alone, as reasoning models' templates put them; and a variable."""
MARKED = THINKS.replace("<|im_end|>", "")
BARE = MARKED.replace("<|im_start|>", "# ")
OPENS = THINKS.replace("(hm)\n", "").replace(
    "assistant\n{% endif %}", "assistant\n{{ '<think>' if thinking is not defined or thinking }}{% endif %}"
)
"""A prompt that opens a thought, where nobody says not to."""
DATED = "{{ strftime_now('%d %B %Y') }}\n" + THINKS
SAID = {"red cat?": "cat, red", "blue dog?": "dog, blue", "green owl?": "owl, green", "old hen?": "hen, old"}
RECIPE = """
num_layers: -1
batch_size: 4
iters: 200
learning_rate: 4.0e-3
lora_parameters: {rank: 16, scale: 4.0}
steps_per_eval: 100
save_every: 100
chat_template: own.jinja
chat_template_kwargs: {style: terse}
"""
METRIC = "metric={name: exact_match, rows: 4, max_tokens: 24}"


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def bare(model_folder, tmp_path_factory) -> Path:
    """The lively model as a base: no chat template, and an end token that no chat has."""
    folder = tmp_path_factory.mktemp("bases") / "bare"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|pad|>"}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    return folder


@pytest.fixture(scope="module")
def make_recipe(bare, tmp_path_factory):
    """folder of the run, *overrides, template → a recipe beside its template file and rows."""
    home = tmp_path_factory.mktemp("recipe")
    for split in ("train", "valid"):
        rows = [
            {"messages": [*asked(q), {"role": "assistant", "content": a}], "n": n}
            for n, (q, a) in enumerate(SAID.items())
        ]
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(folder: Path, *overrides: str, template: str = THINKS):
        (home / "own.jinja").write_text(template)
        (home / "recipe.yaml").write_text(RECIPE)
        places = (f"model={bare}", f"data={home}", f"adapter_path={folder}")
        return load_recipe(home / "recipe.yaml", (*places, *overrides))

    return make


@pytest.fixture(scope="module")
def trained(make_recipe, tmp_path_factory):
    """(folder, summary) of a run that has learned its rows by heart."""
    folder = tmp_path_factory.mktemp("runs") / "terse"
    return folder, run(make_recipe(folder, METRIC), console=quiet())


@pytest.fixture(scope="module")
def runtime(bare, trained):
    config = ServeConfig(
        model=str(bare), name="bare", adapters=[{"name": "terse", "path": str(trained[0])}], max_context=256
    )
    started = Runtime.start(config)
    yield started
    started.close()


@pytest.fixture(scope="module")
def http(runtime):
    with serving(runtime) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


def chat(http, model: str, question: str = "red cat?", **more) -> httpx.Response:
    body = {"model": model, "messages": asked(question), "temperature": 0, "max_tokens": 40, **more}
    return http.post("/v1/chat/completions", json=body)


def test_exact_match_compares_what_training_supervised_with_thoughts_and_ends_where_it_ended(trained):
    _, summary = trained
    assert summary.exact_match == 1.0


def test_the_manifest_keeps_the_template_its_variables_and_the_end_it_learned(trained):
    for folder in (trained[0], *checkpoint.existing(trained[0])):
        lineage = read_config(folder).lineage
        assert lineage.chat_template == THINKS
        assert lineage.chat_template_kwargs == {"style": "terse"}
        assert lineage.stop_ids == (END,)
        assert lineage.template_day == ""


@pytest.mark.parametrize("question", SAID)
def test_a_served_answer_is_the_trained_one_and_ends_where_training_ended_it(http, question):
    response = chat(http, "terse", question)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["message"]["content"] == f"(hm)\n{SAID[question]}"
    assert choice["finish_reason"] == "stop"


def test_serving_renders_the_tokens_that_training_saw(runtime, trained, make_recipe):
    rows = prepare(make_recipe(trained[0])).train.rows
    template = runtime.template_of(runtime.registry.resolve("terse"))
    served = {template.render(asked(question)) for question in SAID}
    seen = {tuple(row.token_ids[: row.is_target.argmax()].tolist()) for row in rows}
    assert served == seen


def test_a_request_may_set_the_variables_otherwise(http, runtime):
    def num_prompt_tokens(**more) -> int:
        return chat(http, "terse", max_tokens=1, **more).json()["usage"]["prompt_tokens"]

    longer = num_prompt_tokens(chat_template_kwargs={"style": "terse and then some"})
    assert longer - num_prompt_tokens() == len(" and then some")
    assert num_prompt_tokens(chat_template_kwargs={"style": "terse"}) == num_prompt_tokens()
    refused = chat(http, "terse", chat_template_kwargs={"stile": 1})
    assert refused.status_code == 400
    assert "reads these variables from requests: style" in refused.json()["error"]["message"]


def test_lathe_chat_talks_to_the_one_adapter_that_it_is_given(bare, trained):
    words = ["chat", str(bare), "--adapter", f"terse={trained[0]}", "--temperature", "0"]
    result = CliRunner().invoke(lathe.app, words, input="red cat?\n")
    assert (result.exit_code, result.output) == (0, "> red cat?\n(hm)\ncat, red\n")


def test_the_base_without_a_template_says_so_by_its_name_and_completes_texts(http):
    refused = chat(http, "bare")
    assert refused.status_code == 400
    assert "model 'bare' has no chat template" in refused.json()["error"]["message"]
    body = {"model": "bare", "prompt": "red", "max_tokens": 4, "temperature": 0}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_adapters_of_two_templates_are_served_side_by_side_each_with_its_own(
    http, runtime, trained, tmp_path
):
    config = read_config(trained[0])
    other = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    changed = dataclasses.replace(config.lineage, chat_template=other, chat_template_kwargs={})
    write_adapter(tmp_path / "a", read_tensors(trained[0]), dataclasses.replace(config, lineage=changed))
    with pytest.raises(AdapterError, match="not the one it was trained with"):
        runtime.registry.load("other", tmp_path / "a")
    assert "other" not in runtime.registry.names()
    hashed = dataclasses.replace(changed, template_hash=hash_of(other))
    write_adapter(tmp_path / "a", read_tensors(trained[0]), dataclasses.replace(config, lineage=hashed))
    version = runtime.registry.load("other", tmp_path / "a")
    assert not version.notes
    counts = [chat(http, name, max_tokens=1).json()["usage"]["prompt_tokens"] for name in ("other", "terse")]
    terse = runtime.template_of(runtime.registry.resolve("terse"))
    assert counts == [len("[user] red cat?"), len(terse.render(asked("red cat?")))]


def hash_of(source: str) -> str:
    return f"sha256:{hashlib.sha256(source.encode()).hexdigest()}"


@pytest.mark.parametrize("bits", [None, 8])
def test_an_export_brings_template_and_end_to_mlx_lm(trained, bare, tmp_path, bits):
    out = tmp_path / "out"
    export(trained[0], out, Form(bits, group_size=32), console=quiet())
    module, tokenizer = mlx_lm.load(str(out))
    assert tokenizer.chat_template == '{% set style = "terse" %}\n' + THINKS
    assert tokenizer.eos_token_ids == {0, END}
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [END, 0]
    prompt = tokenizer.apply_chat_template(asked("red cat?"), add_generation_prompt=True)
    assert tokenizer.decode(prompt).startswith("terse\n<|im_start|>user\nred cat?")
    assert mlx_lm.generate(module, tokenizer, prompt, max_tokens=40) == "(hm)\ncat, red"
    exported = load(str(out))
    assert exported.tokenizer.eos_token_ids == {0, END}


def test_mlx_lm_opens_the_adapter_folder(trained, bare):
    module, tokenizer = mlx_lm.load(str(bare), adapter_path=str(trained[0]))
    assert tokenizer.chat_template is None
    prompt = tokenizer.encode("terse\n<|im_start|>user\nred cat?<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.add_eos_token("<|im_end|>")
    assert mlx_lm.generate(module, tokenizer, prompt, max_tokens=40) == "(hm)\ncat, red"


def test_only_the_adapters_own_answers_end_at_its_stop_ids(
    make_adapter, model_folder, make_request, tmp_path
):
    """Beside the same weights without them, in one batch: the token that ends one row ends no other."""
    made, base = make_adapter(3), load(str(model_folder))
    engine = Engine(base)
    plain = engine.registry.load("plain", made)
    (free,) = generate(engine, [make_request("free", adapter=plain, ignore_eos=False)])
    end = free.token_ids[5]
    config = read_config(made)
    lineage = Lineage(str(model_folder), "", "", "", "", "", "", stop_ids=(end,))
    write_adapter(tmp_path / "a", read_tensors(made), dataclasses.replace(config, lineage=lineage))
    tuned = engine.registry.load("tuned", tmp_path / "a")
    requests = [
        make_request(f"r-{n}", adapter=adapter, ignore_eos=is_deaf)
        for n, (adapter, is_deaf) in enumerate(((plain, False), (tuned, False), (tuned, True)))
    ]
    same, ended, deaf = generate(engine, requests)
    first = free.token_ids.index(end)
    assert ended.token_ids == free.token_ids[: first + 1]
    assert (ended.finish, ended.stop_reason) == ("stop", None)
    assert same.token_ids == deaf.token_ids == free.token_ids


SILENT = ("chat_template=null", "chat_template_kwargs=null")


def told_before(recipe) -> list[str]:
    out = io.StringIO()
    show(prepare(recipe), Console(file=out, width=250))
    return [line for line in out.getvalue().splitlines() if "was trained" in line or "taken over" in line]


@pytest.mark.parametrize("file", ["", "adapters.safetensors"], ids=["a folder", "its file"])
@pytest.mark.parametrize("ends", ["turn", "none"])
def test_a_warm_start_goes_on_with_the_template_and_the_ends_of_its_adapter(
    file, ends, trained, bare, make_recipe, tmp_path
):
    few = ("iters=1", "learning_rate=1e-6", "val_batches=1", f"train_on_eos={ends}")
    recipe = make_recipe(tmp_path / "child", *SILENT, *few, f"resume_adapter_file={trained[0] / file}")
    result = run(recipe, console=quiet())
    if ends == "turn":  # the same targets: it is asked as the adapter learned to be asked
        assert result.first_valid_loss == pytest.approx(trained[1].valid_loss, rel=1e-4)
    parent, child = (read_config(folder).lineage for folder in (trained[0], tmp_path / "child"))
    kept = ("chat_template", "chat_template_kwargs", "template_hash", "stop_ids")
    assert [getattr(child, name) for name in kept] == [getattr(parent, name) for name in kept]
    (line,) = told_before(recipe)
    assert line == (
        f"taken over from {recipe.resume_adapter_file}: its chat_template, "
        'chat_template_kwargs {"style": "terse"}, stop ids <|im_end|>'
    )


@pytest.mark.parametrize(
    ("overrides", "template", "warning", "taken"),
    [
        ((), THINKS, "", "stop ids <|im_end|>"),
        (
            ("chat_template_kwargs={style: loud}",),
            THINKS,
            'chat_template_kwargs.style: "loud" here, "terse" when {parent} was trained',
            "stop ids <|im_end|>",
        ),
        (
            ("chat_template_kwargs=null",),
            MARKED,
            "chat_template: {template} is not the one that {parent} was trained with, and its stop ids are not "
            "taken over",
            "",
        ),
        (
            SILENT,
            THINKS,
            "",
            'its chat_template, chat_template_kwargs {"style": "terse"}, stop ids <|im_end|>',
        ),
    ],
    ids=["the same", "another variable", "another template", "silent"],
)
def test_where_a_recipe_differs_from_the_adapter_that_it_starts_from_it_is_told_by_name(
    overrides, template, warning, taken, trained, make_recipe, tmp_path
):
    more = (*overrides, f"resume_adapter_file={trained[0]}")
    recipe = make_recipe(tmp_path / "out", *more, template=template)
    lines = told_before(recipe)
    places = {"parent": trained[0], "template": recipe.chat_template}
    expected = [f"taken over from {trained[0]}: {taken}"] * bool(taken)
    assert lines == [*expected, *[warning.format(**places)] * bool(warning)]


def test_weights_from_elsewhere_bring_no_template(trained, make_recipe, tmp_path):
    shutil.copy(trained[0] / "adapters.safetensors", tmp_path / "mine.safetensors")
    recipe = make_recipe(tmp_path / "out", f"resume_adapter_file={tmp_path / 'mine.safetensors'}")
    assert told_before(recipe) == []


def test_a_run_keeps_its_day_when_it_is_continued_after_midnight(make_recipe, tmp_path):
    few = ("iters=4", "save_every=2", "steps_per_eval=2", "val_batches=1")
    first, later = date(2026, 1, 31), date(2026, 2, 1)
    whole = run(make_recipe(tmp_path / "whole", *few, template=DATED), console=quiet(), today=first)
    cut = make_recipe(tmp_path / "cut", *few, template=DATED)
    run(cut, console=quiet(), today=first)
    checkpoint.remove(checkpoint.folder_of(tmp_path / "cut", 4))
    resumed = run(cut, resume=True, console=quiet(), today=later)
    assert resumed.content_hash == whole.content_hash
    assert read_config(tmp_path / "cut").lineage.template_day == "2026-01-31"
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["template_day"] == "2026-01-31"
    fresh = run(make_recipe(tmp_path / "fresh", *few, template=DATED), console=quiet(), today=later)
    assert read_config(tmp_path / "fresh").lineage.template_day == "2026-02-01"
    assert fresh.content_hash != whole.content_hash


def test_rows_under_a_template_that_prints_the_day_are_made_again_the_next_day(make_recipe, tmp_path):
    kept = f"dataset_prepared_path={tmp_path / 'kept'}"
    days = [date(2026, 1, 31), date(2026, 1, 31), date(2026, 2, 1)]

    def flights(template: str) -> list[Preflight]:
        recipe = make_recipe(tmp_path / "out", kept, "val_batches=0", template=template)
        return [prepare(recipe, today=day) for day in days]

    def were_made(found: list[Preflight]) -> list[bool]:
        return ["rows tokenized in" in flight.train.notes[0] for flight in found]

    dated = flights(DATED)
    assert were_made(dated) == [True, False, True]
    assert dated[1].data_hash == dated[0].data_hash != dated[2].data_hash
    assert were_made(flights(THINKS)) == [True, False, False]


@pytest.mark.parametrize(
    ("template", "override", "line"),
    [
        (THINKS, "seed=0", "answers end at <|im_end|>, which ends none of the base's"),
        (THINKS.replace("<|im_end|>", "<|pad|>"), "seed=0", ""),
        (MARKED, "seed=0", "answers end at <|im_start|>, which ends none of the base's"),
        (BARE, "seed=0", "train: 4 rows end their answers with no token"),
        (BARE, "mask_prompt=false", "no token ends the answers that are trained"),
    ],
    ids=["another end", "the base's end", "the next turn's marker", "no end", "no end, prompts too"],
)
def test_before_a_run_it_is_told_where_answers_end_if_that_is_new(
    make_recipe, tmp_path, template, override, line
):
    out = io.StringIO()
    recipe = make_recipe(tmp_path / "out", override, "val_batches=0", template=template)
    show(prepare(recipe), Console(file=out, width=200))
    said = [text for text in out.getvalue().splitlines() if "answers" in text]
    assert len(said) == bool(line)
    assert line in "".join(said)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chat_template=chatml", "no file chatml; expected a file that holds a Jinja chat template"),
        ("chat_template_kwargs={stile: 1}", "found 'stile'; the chat template reads these variables: style"),
        ("chat_template=null", "chat_template_kwargs: found 'style'"),
    ],
)
def test_a_template_that_is_not_there_and_variables_that_nothing_reads_are_refused(
    make_recipe, tmp_path, override, message
):
    with pytest.raises(ConfigError, match=message):
        prepare(make_recipe(tmp_path / "out", override))


def test_what_rows_had_to_be_told_is_asked_at_validation_kept_with_the_adapter_and_served(
    bare, make_recipe, tmp_path
):
    recipe = make_recipe(tmp_path / "told", "iters=2", METRIC, "samples={rows: 1}", template=OPENS)
    told = {"style": "terse", "thinking": False}
    flight = prepare(recipe)
    (prompt,) = flight.sample_prompts
    row = next(row for row in flight.train.rows if row.line == 1)
    assert tuple(row.token_ids[: len(prompt.prompt.token_ids)]) == prompt.prompt.token_ids

    run(recipe, console=quiet())
    assert read_config(tmp_path / "told").lineage.chat_template_kwargs == told
    version = Engine(load(str(bare))).registry.load("told", str(tmp_path / "told"))
    assert version.template.render(asked("red cat?")) == prompt.prompt.token_ids
    assert "<think>" in version.template.write(asked("red cat?"), variables={"thinking": True}).text
