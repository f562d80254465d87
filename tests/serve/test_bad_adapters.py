"""Bad adapters over HTTP, kind by kind: each is a 4xx that names it, and nothing of the running server changes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.files import PEFT_TENSORS_FILE
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE, read_tensors, write_adapter
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

ASKED = {"prompt": "hello there", "max_tokens": 12, "seed": 1, "temperature": 0, "ignore_eos": True}
LAYER = "model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_a", f"{LAYER}.lora_b"
THEIRS = f"base_model.model.{LAYER}"

Change = Callable[[Path], "Path | None"]
"""Makes a good adapter's folder a bad one; returns the path to load where that is another."""


def tensors(change: Callable[[dict[str, mx.array]], object]) -> Change:
    """The tensors changed, the config left."""

    def bad(folder: Path) -> None:
        changed = read_tensors(folder)
        change(changed)
        mx.save_safetensors(str(folder / TENSORS_FILE), changed)

    return bad


def one(name: str, made: Callable[[mx.array], mx.array]) -> Change:
    return tensors(lambda all: all.update({name: made(all[name])}))


def with_value(value: float) -> Callable[[mx.array], mx.array]:
    return lambda old: mx.where(mx.arange(old.size).reshape(old.shape) == 3, value, old)


def config(**changes: Any) -> Change:
    """Keys of the config; of lora_parameters where the name begins with it; ... for one that is not there."""

    def bad(folder: Path) -> None:
        raw = json.loads((folder / CONFIG_FILE).read_text())
        for key, value in changes.items():
            outer, _, inner = key.partition("__")
            if inner:
                raw[outer][inner] = value
            elif value is ...:
                del raw[outer]
            else:
                raw[outer] = value
        (folder / CONFIG_FILE).write_text(json.dumps(raw))

    return bad


def text(content: str | bytes) -> Change:
    """The config's bytes."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / CONFIG_FILE).write_bytes(data) and None


def bytes_of(change: Callable[[bytes], bytes]) -> Change:
    """The tensors' file."""

    def bad(folder: Path) -> None:
        path = folder / TENSORS_FILE
        path.write_bytes(change(path.read_bytes()))

    return bad


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """The header of the tensors' file, its data left."""

    def bad(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        parsed = json.loads(data[8 : 8 + length])
        made = change(parsed)
        new = made if isinstance(made, bytes) else json.dumps(made if made is not None else parsed).encode()
        return struct.pack("<Q", len(new)) + new + data[8 + length :]

    return bytes_of(bad)


def entry(**changes: Any) -> Change:
    return header(lambda all: all[A].update(changes))


def in_place(make: Callable[[Path], object], *names: str) -> Change:
    """Something else where these files were."""

    def bad(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()
            make(folder / name)

    return bad


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def peft(change: Callable[[dict[str, mx.array], dict[str, Any]], object] = lambda *_: None) -> Change:
    """In PEFT's layout, and then changed."""

    def bad(folder: Path) -> None:
        old = read_tensors(folder)
        named = {f"{THEIRS}.lora_A.weight": old[A].T, f"{THEIRS}.lora_B.weight": old[B].T}
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        change(named, settings)
        (folder / TENSORS_FILE).unlink()
        mx.save_safetensors(str(folder / PEFT_TENSORS_FILE), {k: mx.contiguous(v) for k, v in named.items()})
        (folder / CONFIG_FILE).write_text(json.dumps(settings))

    return bad


def peft_config(**changes: Any) -> Change:
    return peft(lambda _, settings: settings.update(changes))


def peft_tensor(name: str, *shape: int) -> Change:
    return peft(lambda all, _: all.update({name: mx.ones(shape)}))


class Trap:
    """Writes a file wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "code ran"))


def pickled(folder: Path) -> None:
    (folder / TENSORS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(folder.parent / "ran")))


def sharded(folder: Path) -> None:
    (folder / TENSORS_FILE).rename(folder / "adapter_model-00001-of-00002.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text("{}")


def linked_folder(folder: Path) -> Path:
    link = folder.parent / f"{folder.name}-link"
    outside = folder.parent.parent / "outside" / folder.name
    shutil.copytree(folder, outside)
    link.symlink_to(outside)
    return link


def linked_file(folder: Path) -> None:
    outside = folder.parent.parent / "outside" / f"{folder.name}.safetensors"
    outside.parent.mkdir(exist_ok=True)
    shutil.move(folder / TENSORS_FILE, outside)
    (folder / TENSORS_FILE).symlink_to(outside)


def sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("wb") as stream:
            stream.write(struct.pack("<Q", size - 8))
            stream.truncate(size)

    return make


def of_another_model(folder: Path) -> None:
    lineage = Lineage("other/model", "sha256:0", "", "", "", "", "0")
    write_adapter(folder, read_tensors(folder), AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))


def swapped(folder: Path) -> None:
    lineage = Lineage("m", "", "", "", "", "", "0")
    write_adapter(folder, read_tensors(folder), AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))
    one(A, lambda old: old + 1)(folder)


def renamed(old: str, new: str) -> Change:
    return tensors(lambda all: [all.update({k.replace(old, new): all.pop(k)}) for k in list(all)])


def single_file(folder: Path) -> Path:
    (folder / CONFIG_FILE).unlink()
    return folder / TENSORS_FILE


def text_file(folder: Path) -> Path:
    (folder / "README.md").write_text("# adapter")
    return folder / "README.md"


ONE_ENTRY = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
DOUBLE_HEADER = b"{" + ONE_ENTRY + b"," + ONE_ENTRY + b"}"
BAD: dict[str, tuple[Change, int, str]] = {
    # the file of tensors
    "truncated": (bytes_of(lambda data: data[:-5]), 400, "truncated"),
    "shorter than its header": (bytes_of(lambda data: data[:50]), 400, "shorter than its own header"),
    "empty": (bytes_of(lambda _: b""), 400, "truncated: 0 bytes"),
    "longer than it says": (bytes_of(lambda data: data + b"\0"), 400, "truncated"),
    "no safetensors": (bytes_of(lambda data: b"GGUF" * 100), 400, "shorter than its own header"),
    "a header of 10 GB": (
        bytes_of(lambda data: struct.pack("<Q", 10 << 30) + data[8:]),
        400,
        "shorter than its",
    ),
    "a header of 10 GB that is there": (
        in_place(sparse(10 << 30), TENSORS_FILE),
        400,
        "one has at most 100,000,000",
    ),
    "a negative header": (bytes_of(lambda data: b"\xff" * 8 + data[8:]), 400, "shorter than its own header"),
    "a header that is a list": (header(lambda _: []), 400, "its header is no object"),
    "a header that is no JSON": (header(lambda _: b"{'a': 1}"), 400, "not a safetensors file"),
    "a header of no text": (header(lambda _: b"\xff\xfe" * 20), 400, "not a safetensors file"),
    "a header that nests": (header(lambda _: b"[" * 100_000), 400, "not a safetensors file"),
    "a name twice": (header(lambda _: DOUBLE_HEADER), 400, "the key 'a' stands twice"),
    "no tensors": (header(lambda _: b"{}"), 400, "truncated"),
    "no tensors at all": (tensors(lambda all: all.clear()), 400, "holds no tensors"),
    "a dtype of integers": (one(A, lambda old: old.astype(mx.int32)), 400, f"{A} holds I32, floating-point"),
    "an unknown dtype": (entry(dtype="F12"), 400, f"says of '{A}' what cannot be"),
    "a negative axis": (entry(shape=[-64, -4]), 400, "what cannot be"),
    "an axis that is text": (entry(shape=["64", 4]), 400, "what cannot be"),
    "a huge axis": (entry(shape=[64, 10**30]), 400, "what cannot be"),
    "nothing by a huge axis": (entry(shape=[0, 10**12], data_offsets=[0, 0]), 400, "what cannot be"),
    "negative offsets": (entry(data_offsets=[-1024, 0]), 400, "what cannot be"),
    "offsets the wrong way": (entry(data_offsets=[1024, 0]), 400, "what cannot be"),
    "offsets beyond the end": (entry(data_offsets=[10**9, 10**9 + 1024]), 400, "truncated"),
    "offsets of another": (
        header(
            lambda all: all[A].update(
                data_offsets=all["model.layers.1.self_attn.q_proj.lora_a"]["data_offsets"]
            )
        ),
        400,
        "overlap or leave gaps",
    ),
    "a pipe of tensors": (in_place(os.mkfifo, TENSORS_FILE), 400, f"{TENSORS_FILE}: is no file"),
    "a folder of tensors": (in_place(os.mkdir, TENSORS_FILE), 400, f"{TENSORS_FILE}: is no file"),
    "a link to nothing": (
        in_place(lambda path: path.symlink_to(path.parent / "nope"), TENSORS_FILE),
        400,
        "has no adapters.safetensors",
    ),
    "a device of tensors": (
        in_place(lambda path: path.symlink_to("/dev/zero"), TENSORS_FILE),
        403,
        "leads out of this server's allowed_adapter_roots",
    ),
    "missing": (
        without(TENSORS_FILE),
        400,
        f"has no {TENSORS_FILE}, mlx-lm's, and no {PEFT_TENSORS_FILE}, PEFT's",
    ),
    # what the tensors are
    "another shape": (one(A, lambda old: old[:40]), 400, f"{A} is (40, 4), the model needs (64, 4)"),
    "turned": (one(A, lambda old: mx.contiguous(old.T)), 400, f"{A} is (4, 64), the model needs (64, 64)"),
    "one axis": (one(B, lambda old: old.reshape(-1)), 400, f"{B} is (256,), the model needs"),
    "rank 0": (
        tensors(lambda all: all.update({A: all[A][:, :0], B: all[B][:0]})),
        400,
        f"{LAYER} has rank 0, its adapter_config.json says 4",
    ),
    "a zero-size tensor": (one(B, lambda old: old[:, :0]), 400, f"{B} is (4, 0), the model needs (4, 64)"),
    "two ranks": (
        one(A, lambda old: mx.pad(old, [(0, 0), (0, 1)])),
        400,
        f"{B} is (4, 64), the model needs (5, 64)",
    ),
    "another rank than the config's": (
        config(lora_parameters__rank=8),
        400,
        "has rank 4, its adapter_config.json says 8",
    ),
    "too high a rank": (
        tensors(lambda all: all.update({A: mx.ones((64, 300)), B: mx.ones((300, 64))})),
        400,
        f"{LAYER} has rank 300, this server takes up to",
    ),
    "half of a pair": (tensors(lambda all: all.pop(B)), 400, f"{LAYER}: lora_b is missing"),
    "names of another family": (
        renamed("self_attn.q_proj", "attn.c_attn"),
        400,
        "layers.0.attn.c_attn: the model has no linear layer of that name",
    ),
    "a layer beyond the last": (renamed("layers.0.", "layers.9."), 400, "layers.9."),
    "names that say nothing": (
        tensors(lambda all: all.update({"weight": all.pop(A)})),
        400,
        "the model has no linear layer of that name",
    ),
    "one layer twice": (
        tensors(lambda all: all.update({f"base_model.model.{A}": all[A]})),
        400,
        "two tensors are the same layer's lora_a",
    ),
    "tensors of nobody's": (
        tensors(lambda all: all.update({f"{LAYER}.lora_c": all[A]})),
        400,
        f"{LAYER}: has lora_c; a lora adapter has",
    ),
    "a norm": (
        tensors(lambda all: all.update({"model.norm.weight": mx.ones(64)})),
        400,
        "model.norm: the model has no linear layer of that name",
    ),
    "embeddings": (
        tensors(lambda all: all.update({"model.embed_tokens.weight": mx.ones((259, 64))})),
        400,
        "model.embed_tokens.weight: trained embeddings",
    ),
    "NaN": (one(B, with_value(float("nan"))), 400, f"{B} holds NaN or infinite values"),
    "infinite": (one(A, with_value(float("inf"))), 400, f"{A} holds NaN or infinite values"),
    "1e25": (one(B, with_value(1e25)), 400, f"{LAYER}: its update, times its scale of 2, may be"),
    "1e25 twice": (
        tensors(lambda all: all.update({A: with_value(1e25)(all[A]), B: with_value(1e25)(all[B])})),
        400,
        f"{LAYER}: its update, times its scale of 2, may be",
    ),
    "a scale that overflows": (config(lora_parameters__scale=1e38), 400, "times its scale of 1e+38"),
    "tensors of another manifest": (
        swapped,
        400,
        "its tensors are not the ones adapter_config.json was written for",
    ),
    "another base": (
        of_another_model,
        400,
        "was trained on other weights than these: its manifest names other/model",
    ),
    # the config
    "no config": (without(CONFIG_FILE), 400, f"has no {CONFIG_FILE}"),
    "a config that is a list": (text("[]"), 400, "holds [], an object was expected"),
    "a config that is null": (text("null"), 400, "holds null, an object was expected"),
    "an empty config": (text(""), 400, "not JSON"),
    "half a config": (text('{"fine_tune_type": "lora", '), 400, "not JSON"),
    "a config that nests": (text("[" * 100_000), 400, "not JSON"),
    "a key twice": (text('{"num_layers": 1, "num_layers": 2}'), 400, "the key 'num_layers' stands twice"),
    "a mark at the beginning": (text("\ufeff{}"), 400, "not JSON: Unexpected UTF-8 BOM"),
    "a config of no text": (text(b"\xff\xfe{}"), 400, "not JSON"),
    "a config of 1 GB": (in_place(sparse(1 << 30), CONFIG_FILE), 400, "which no adapter_config.json needs"),
    "a pipe of a config": (in_place(os.mkfifo, CONFIG_FILE), 400, f"{CONFIG_FILE}: is no file"),
    "an integer of 5,000 digits": (text('{"num_layers": 1' + "0" * 5000 + "}"), 400, CONFIG_FILE),
    "another kind": (
        config(fine_tune_type="vera"),
        400,
        "fine_tune_type is 'vera'; this version reads lora, dora and full",
    ),
    "a full fine-tune": (config(fine_tune_type="full"), 400, "it replaces the base's weights"),
    "DoRA without lengths": (config(fine_tune_type="dora"), 400, ": m is missing"),
    "no parameters": (config(lora_parameters=None), 400, "lora_parameters is missing"),
    "scale 0": (config(lora_parameters__scale=0), 400, "lora_parameters.scale is 0; a number above 0"),
    "scale NaN": (config(lora_parameters__scale=float("nan")), 400, "lora_parameters.scale is NaN"),
    "scale as text": (config(lora_parameters__scale="2"), 400, "lora_parameters.scale is '2'"),
    "a huge scale": (config(lora_parameters__scale=10**400), 400, "lora_parameters.scale is"),
    "alpha as text": (config(lora_parameters__alpha="16"), 400, "lora_parameters.alpha is '16'"),
    "two factors": (config(fine_tune_type=..., lora_parameters__alpha=16), 400, "keep one"),
    "rank as text": (
        config(lora_parameters__rank="4"),
        400,
        "lora_parameters.rank is '4'; a whole number from 1",
    ),
    "a huge rank": (config(lora_parameters__rank=10**30), 400, "lora_parameters.rank is"),
    # layouts
    "pickled": (pickled, 400, "adapter_model.bin: is pickled, which runs code"),
    "in shards": (sharded, 400, "adapter_model.safetensors.index.json: the adapter is in several files"),
    "both layouts": (
        lambda folder: shutil.copy(folder / TENSORS_FILE, folder / PEFT_TENSORS_FILE) and None,
        400,
        "one of them was expected",
    ),
    "PEFT's config over mlx-lm's tensors": (
        text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}'),
        400,
        "is in PEFT's layout, which goes with adapter_model.safetensors",
    ),
    "mlx-lm's config over PEFT's tensors": (
        lambda folder: (folder / TENSORS_FILE).rename(folder / PEFT_TENSORS_FILE) and None,
        400,
        "is in mlx-lm's layout, which goes with adapters.safetensors",
    ),
    "a file without a config": (
        single_file,
        400,
        "neither adapters.json nor adapter_config.json is beside it",
    ),
    "a file of text": (text_file, 400, "a folder or a .safetensors file was expected"),
    # PEFT's
    "PEFT's IA3": (
        peft_config(peft_type="IA3"),
        400,
        "is a PEFT adapter of type 'IA3'; this version reads LORA",
    ),
    "PEFT's PiSSA": (
        peft_config(init_lora_weights="pissa"),
        400,
        "init_lora_weights is 'pissa': it changed the base's",
    ),
    "PEFT's aLoRA": (peft_config(alora_invocation_tokens=[1]), 400, "alora_invocation_tokens is [1]"),
    "PEFT's r 0": (peft_config(r=0), 400, "r is 0; a whole number from 1 was expected"),
    "PEFT's alpha as text": (
        peft_config(lora_alpha="16"),
        400,
        "lora_alpha is '16'; a number above 0 was expected",
    ),
    "PEFT's alpha NaN": (peft_config(lora_alpha=float("nan")), 400, "lora_alpha is NaN"),
    "a pattern that names nothing": (
        peft_config(rank_pattern={"k_porj": 2}),
        400,
        "rank_pattern has 'k_porj', which names no module",
    ),
    "a pattern that is none": (
        peft_config(alpha_pattern={"q_(": 2}),
        400,
        "'q_(', which is no regular expression",
    ),
    "targets that leave it out": (
        peft_config(target_modules=["v_proj"]),
        400,
        f"{LAYER}: has lora_a, and the config's target_modules",
    ),
    "targets that take for ages": (
        peft_config(target_modules=r"(?:(?:\w|\.)|(?:\w|\.|_)|.)+[A-Z]"),
        400,
        "takes too long to match",
    ),
    "a saved head that is not there": (
        peft_config(modules_to_save=["lm_head"]),
        400,
        "modules_to_save names lm_head, and no tensor",
    ),
    "PEFT's embeddings": (
        peft_tensor("base_model.model.model.embed_tokens.weight", 259, 64),
        400,
        "trained embeddings",
    ),
    "PEFT's LoRA on embeddings": (
        peft_tensor("base_model.model.model.embed_tokens.lora_embedding_A", 4, 259),
        400,
        "is an update of the embeddings",
    ),
    "a classifier": (
        peft_tensor("base_model.model.score.weight", 2, 64),
        400,
        "score: the model has no linear layer of that name",
    ),
    "a convolution's": (peft_tensor(f"{THEIRS[:-6]}k_proj.lora_A.weight", 4, 3, 2, 2), 400, "k_proj"),
    "PEFT's half of a pair": (
        peft(lambda all, _: all.pop(f"{THEIRS}.lora_B.weight")),
        400,
        f"{LAYER}: lora_b is missing",
    ),
    "PEFT's NaN": (
        peft(lambda all, _: all.update({f"{THEIRS}.lora_B.weight": mx.full((64, 4), mx.nan)})),
        400,
        f"{LAYER}.lora_b holds NaN",
    ),
    # paths
    "out of the root by dots": (
        lambda folder: folder / ".." / ".." / "outside",
        403,
        "is under none of this server's allowed_adapter_roots",
    ),
    "out of the root by a link": (linked_folder, 403, "is under none of this server's allowed_adapter_roots"),
    "a file out of the root by a link": (
        linked_file,
        403,
        "is a link that leads out of this server's allowed_adapter_roots",
    ),
    "nothing there": (lambda folder: folder / "nope", 404, "there is no such folder or file"),
    "a path of a null byte": (lambda folder: Path(f"{folder}\0"), 400, "cannot be looked up"),
    "a path that is too long": (lambda folder: folder / ("x" * 5000), 400, "cannot be looked up"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The one folder that the server reads adapters from; its parent holds what it must not read."""
    found = tmp_path_factory.mktemp("bad") / "root"
    found.mkdir()
    (found.parent / "outside").mkdir()
    return found


@pytest.fixture(scope="module")
def runtime(model_folder, root) -> Iterator[Runtime]:
    config = ServeConfig(model=str(model_folder), name="lively", allowed_adapter_roots=(root,))
    started = Runtime.start(config)
    yield started
    started.registry.check_integrity()
    started.close()


@pytest.fixture(scope="module")
def http(runtime, root, make_adapter) -> Iterator[httpx.Client]:
    shutil.copytree(make_adapter(1), root / "good")
    with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as client:
        loaded = client.post(
            "/v1/load_lora_adapter", json={"lora_name": "good", "lora_path": str(root / "good")}
        )
        assert loaded.status_code == 200
        yield client


def state_of(runtime: Runtime, http: httpx.Client) -> dict[str, Any]:
    """What a load that is refused must not change."""
    registry = runtime.registry
    answers = [
        http.post("/v1/completions", json={"model": name, **ASKED}).json() for name in ("good", "lively")
    ]
    return {
        "names": registry.names(),
        "versions": registry.versions(),
        "bytes": runtime.engine.bank.num_bytes,
        "slots": runtime.engine.bank.slots,
        "answers": [answer["choices"][0]["text"] for answer in answers],
        "listed": http.get("/v1/models").json(),
        "adapters": [
            {key: version[key] for key in ("id", "state", "slot", "problem", "content_hash", "bytes")}
            for adapter in http.get("/v1/adapters").json()["data"]
            for version in adapter["versions"]
        ],
    }


@pytest.fixture(scope="module")
def untouched(runtime, http) -> dict[str, Any]:
    """The state that each refusal has to leave, and so each of them finds."""
    state = state_of(runtime, http)
    assert state["answers"][0] != state["answers"][1], "the running adapter says what the base says"
    return state


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_refused_by_what_is_wrong_with_it_and_changes_nothing(
    kind, runtime, http, root, make_adapter, untouched
):
    change, status, told = BAD[kind]
    folder = root / kind.replace(" ", "-").replace("'", "")
    shutil.copytree(make_adapter(2), folder)
    path = change(folder) or folder
    for name, inplace in (("bad", False), ("good", True)):
        fields = {"lora_name": name, "lora_path": str(path), "load_inplace": inplace}
        answer = http.post("/v1/load_lora_adapter", json=fields)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert told in error["message"], error["message"]
        assert len(error["message"]) < 2500
    assert state_of(runtime, http) == untouched
    assert not (root / "ran").exists(), "what was pickled ran"
    runtime.registry.check_integrity()


def test_there_are_forty_kinds_and_more():
    assert len(BAD) >= 40
    assert len({told for _, _, told in BAD.values()}) >= 40


def test_the_good_one_of_which_all_bad_ones_are_made_loads_in_both_layouts(http, root, make_adapter):
    for name, change in (("mlx-lm", lambda _: None), ("peft", peft())):
        folder = root / f"fine-{name}"
        shutil.copytree(make_adapter(2), folder)
        change(folder)
        fields = {"lora_name": f"fine-{name}", "lora_path": str(folder)}
        answer = http.post("/v1/load_lora_adapter", json=fields)
        assert answer.status_code == 200, answer.text
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": f"fine-{name}"}).status_code == 200
