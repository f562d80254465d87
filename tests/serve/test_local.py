"""The Python API: what it answers is what the server answers, from any thread, and nothing of it outlives its end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from embedders import write_embedder
from PIL import Image

import lathe
from serve import LocalModel, Reply, load
from serve.api.bases import Bases
from serve.api.server import serving
from serve.config import ServeConfig
from serve.errors import (
    AdapterError,
    ConfigError,
    ContextLengthError,
    NotFoundError,
    OverloadedError,
    RequestError,
    StoppedError,
)
from serve.runtime import Runtime

ROOT = Path(lathe.__file__).parent
GREEDY = {"temperature": 0, "max_tokens": 16}
ASKED = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "once upon"},
}


@pytest.fixture(scope="module")
def folders(model_folder, make_adapter):
    return {"first": make_adapter(1), "second": make_adapter(2)}


@pytest.fixture(scope="module")
def model(model_folder, folders):
    with lathe.load(
        model_folder, folders, name="base", max_rows=4, max_waiting=4, prefix_cache_gib=0
    ) as made:
        yield made


def test_import_lathe_loads_neither_mlx_nor_our_packages():
    script = (
        "import sys, lathe; print(lathe.load, sorted({'mlx', 'serve', 'train', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().endswith("[]")


def test_it_answers_as_the_server_does(model_folder, folders):
    adapters = [{"name": name, "path": str(path)} for name, path in folders.items()]
    runtime = Runtime.start(
        ServeConfig(model=str(model_folder), name="base", adapters=adapters, prefix_cache_gib=0)
    )
    texts = set()
    with serving(runtime) as url, LocalModel(Bases.around(runtime)) as model:
        for name in ("base", "first", "second"):
            for path, asked in ASKED.items():
                body = {
                    "model": name,
                    **asked,
                    **GREEDY,
                    "logprobs": True if "messages" in asked else 2,
                    "n": 2,
                }
                served = httpx.post(f"{url}/v1/{path}", json=body, timeout=60).json()
                fields = {key: value for key, value in body.items() if key not in ("messages", "prompt")}
                reply = (
                    model.chat("hi", **fields)
                    if "messages" in asked
                    else model.generate("once upon", **fields)
                )
                assert {**reply.body, "id": 0, "created": 0} == {**served, "id": 0, "created": 0}
                texts.add(reply.text)
    assert len(texts) == 6


def test_pieces_of_a_stream_are_the_whole_answer_and_its_reply_says_how_it_ended(model):
    for asked in (
        {"messages": "hi"},
        {"prompt": "once upon"},
        {"messages": [{"role": "user", "content": "hi"}]},
    ):
        stream = model.stream(**asked, model="first", **GREEDY)
        pieces = list(stream)
        whole = model.chat(asked["messages"], model="first", **GREEDY) if "messages" in asked else None
        whole = whole or model.generate(asked["prompt"], model="first", **GREEDY)
        assert len(pieces) > 2
        assert "".join(pieces) == whole.text == stream.reply.text == str(stream.reply)
        assert (stream.reply.finish, stream.reply.model) == (whole.finish, "first")
        assert stream.reply.usage["completion_tokens"] == whole.usage["completion_tokens"]


def test_a_reply_goes_on_as_a_message(model):
    first = model.chat("hi", **GREEDY)
    assert first.message == {"role": "assistant", "content": first.text}
    messages = [{"role": "user", "content": "hi"}, first.message, {"role": "user", "content": "more"}]
    assert model.chat(messages, **GREEDY).usage["prompt_tokens"] > first.usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("kind", "said", "fields"),
    [
        (RequestError, "temperatur", {"temperatur": 1}),
        (RequestError, "temperature", {"temperature": "warm"}),
        (RequestError, "JSON", {"temperature": float("nan")}),
        (RequestError, "JSON", {"user": {1, 2}}),
        (RequestError, "images", {"images": [3]}),
        (RequestError, "stream", {"stream": True}),
        (NotFoundError, "'nobody'", {"model": "nobody"}),
        (ContextLengthError, "maximum context length", {"messages": "x" * 10_000}),
        (RequestError, "messages", {"messages": []}),
        (RequestError, "surrogate|half|pair", {"messages": "\ud800"}),
    ],
)
def test_what_the_server_refuses_is_raised_as_what_it_is(model, kind, said, fields):
    with pytest.raises(kind, match=said) as raised:
        model.chat(**{"messages": "hi", **fields})
    assert type(raised.value) is kind
    if "stream" not in fields:
        with pytest.raises(kind, match=said):
            list(model.stream(**{"messages": "hi", **fields}))
    if kind is RequestError and "user" not in fields and said not in ("JSON", "surrogate|half|pair"):
        assert raised.value.param == said


def test_a_stream_is_of_one_answer_to_one_thing(model):
    for wrong in (
        {"messages": "hi", "n": 2},
        {},
        {"messages": "hi", "prompt": "hi"},
        {"prompt": "a", "best_of": 3},
    ):
        with pytest.raises(RequestError):
            model.stream(**wrong)


def test_a_batch_of_any_size_keeps_its_order(model):
    chats = [{"messages": "x" * n, "model": ("base", "first", "second")[n % 3]} for n in range(1, 40)]
    replies = model.batch([*chats, "y"], max_tokens=3)
    lengths = [reply.usage["prompt_tokens"] for reply in replies]
    assert lengths == [lengths[0] + n for n in range(39)] + [lengths[0]]
    assert [reply.model for reply in replies[:-1]] == [each["model"] for each in chats]
    assert replies[-1].model == "base"
    assert all(isinstance(each, Reply) and each.usage["completion_tokens"] <= 3 for each in replies)
    assert model.batch([]) == []


def test_a_batch_ends_with_the_first_that_fails_and_says_which(model):
    chats = ["long"] * 5 + [{"messages": "hi", "temperatur": 1}] + ["never"] * 50
    with pytest.raises(RequestError, match="temperatur") as raised:
        model.batch(chats, max_tokens=1500, ignore_eos=True)
    assert raised.value.__notes__ == ["request 5 of the batch"]
    assert model.chat("hi", max_tokens=1).finish == "length"


def test_a_stream_that_is_closed_or_dropped_leaves_the_engine(model_folder):
    with load(model_folder, max_rows=1, max_waiting=0, prefix_cache_gib=0) as model:
        for end in ("close", "drop", "with"):
            stream = model.stream("hi", max_tokens=1900, ignore_eos=True)
            assert next(stream)
            if end == "close":
                stream.close()
            elif end == "with":
                with stream:
                    next(stream)
            del stream
            # Its row is free, or this would wait for 1,900 tokens and be refused.
            for _ in range(200):
                try:
                    model.chat("hi", max_tokens=1)
                    break
                except OverloadedError:
                    threading.Event().wait(0.02)
            else:
                pytest.fail("the row is not free")


def test_threads_ask_side_by_side_and_each_has_its_own_answer(model):
    names = ["base", "first", "second"] * 4
    alone = {name: model.chat(name, model=name, **GREEDY).usage["prompt_tokens"] for name in set(names)}
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda name: model.chat(name, model=name, timeout=60, **GREEDY), names))
    assert [reply.model for reply in replies] == names
    assert [reply.usage["prompt_tokens"] for reply in replies] == [alone[name] for name in names]


def test_a_notebooks_running_loop_is_no_matter(model):
    async def cell() -> str:
        return model.chat("hi", **GREEDY).text

    assert asyncio.run(cell()) == model.chat("hi", **GREEDY).text


def test_adapters_come_and_go_while_it_runs(model, folders):
    model.load_adapter("third", folders["second"])
    assert model.models == ["base", "first", "second", "third"]
    assert model.chat("hi", model="third", **GREEDY).text == model.chat("hi", model="second", **GREEDY).text
    with pytest.raises(AdapterError, match="third"):
        model.load_adapter("third", folders["first"])
    model.load_adapter("third", folders["first"], replace=True)
    assert model.chat("hi", model="third", **GREEDY).text == model.chat("hi", model="first", **GREEDY).text
    model.unload_adapter("third")
    for act in (lambda: model.chat("hi", model="third"), lambda: model.unload_adapter("third")):
        with pytest.raises(NotFoundError, match="third"):
            act()
    with pytest.raises(NotFoundError, match="gone"):
        model.load_adapter("fourth", "gone")


def test_keys_of_serving_are_checked_as_a_file_of_them(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="max_row") as raised:
        lathe.load(model_folder, max_row=3)
    assert "max_rows" in str(raised.value)
    with pytest.raises(NotFoundError, match="no-such-model"):
        lathe.load(tmp_path / "no-such-model")


def test_a_configuration_of_a_server_with_keys_needs_none_here(model_folder, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(f"model: {model_folder}\nname: base\napi_key: secret\n")
    with load(file) as model:
        assert model.chat("hi", max_tokens=1).finish == "length"


def test_after_its_end_it_says_so_and_whoever_waited_is_told(model_folder):
    model = load(model_folder)
    stream = model.stream("hi", max_tokens=1900, ignore_eos=True)
    next(stream)
    model.close()
    with pytest.raises(StoppedError):
        list(stream)
    for act in (lambda: model.chat("hi"), lambda: model.models, lambda: model.stream("hi")):
        with pytest.raises(StoppedError, match="closed"):
            act()
    model.close()


def test_a_program_that_closes_nothing_ends_by_itself_and_one_without_experiments_imports_no_sql(
    model_folder,
):
    script = (
        "import sys, lathe\nfrom serve.local import ending\n"
        "ending.TIMEOUT_S = 3600.0  # whoever waits for a thread that does not end is seen\n"
        f"model = lathe.load({str(model_folder)!r})\n"
        "stream = model.stream('hi', max_tokens=1900, ignore_eos=True)\nprint(repr(next(stream)))\n"
        "assert 'sqlalchemy' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_texts_are_embedded_as_over_http(model_folder, tmp_path):
    oracle = write_embedder(tmp_path / "tiny", "bert", is_matryoshka=True)
    texts = ["The lamp arrived broken.", "a", "Where is my parcel?"]
    embedders = [{"name": "tiny", "model": str(tmp_path / "tiny")}]
    with load(model_folder, name="base", embedding_models=embedders) as model:
        vectors = model.embed(texts)
        assert vectors.shape[0] == 3
        np.testing.assert_allclose(vectors, oracle.encode(texts), atol=1e-5)
        assert model.embed("a", dimensions=4).shape == (1, 4)
        with pytest.raises(NotFoundError, match="nobody"):
            model.embed("a", model="nobody")
    with load(model_folder, name="base") as model, pytest.raises(RequestError, match="embedding_models"):
        model.embed("a")


def test_a_picture_is_a_path_an_address_bytes_or_pils(tmp_path):
    picture = Image.new("RGB", (56, 56), "red")
    written = BytesIO()
    picture.save(written, "PNG")
    (tmp_path / "red.png").write_bytes(written.getvalue())
    with load(ROOT / "data" / "shapes") as model:
        forms = (picture, written.getvalue(), tmp_path / "red.png", str(tmp_path / "red.png"))
        replies = [model.chat("Which bin?", images=[each], **GREEDY) for each in forms]
        none = model.chat("Which bin?", **GREEDY)
        assert len({reply.text for reply in replies}) == 1
        assert len({reply.usage["prompt_tokens"] for reply in replies}) == 1
        assert replies[0].usage["prompt_tokens"] > none.usage["prompt_tokens"]
        with pytest.raises(RequestError, match="parts"):
            model.chat([{"role": "user", "content": "hi"}], images=[picture])
