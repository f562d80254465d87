"""Several adapters in one request, at the engine: its tokens are those of the model into which the sum was fused."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from serve.adapters.bank.bank import Bank
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_tensors, write_adapter
from serve.adapters.registry.registry import Registry
from serve.adapters.sums.combination import Combination, Weighted, added_up
from serve.adapters.tools.merging import Merge
from serve.adapters.tools.writing import merge
from serve.adapters.versions.version import AdapterVersion
from serve.engine.engine import Engine, EngineLimits
from serve.errors import AdapterError, AdapterGoneError, NotFoundError, RequestError
from serve.model.loading import load
from serve.model.template_rules import TemplateRules, make_template


def combined(registry: Registry, *terms: tuple[str, float]) -> AdapterVersion:
    """The sum of what these names stand for now, held."""
    held: list[AdapterVersion] = []
    try:
        held += (registry.acquire(name) for name, _ in terms)
        parts = added_up(Weighted(version, weight) for version, (_, weight) in zip(held, terms, strict=True))
        source = Combination(parts, registry.contents)
        registry.add(source.name, source, is_found=True, is_combined=True)
        return registry.acquire(source.name)
    finally:
        for version in held:
            registry.release(version)


def drawn(engine: Engine, *requests) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(engine.check(request))
    for _ in range(2000):
        if not engine.has_work:
            return tokens
        for event in engine.step():
            assert event.error is None, event.error
            tokens[event.request_id] += event.token_ids
    raise AssertionError(f"they never end: {engine.stats()}")


def summed(base: Sequence, fused: Sequence[tuple[float, Sequence]], module):
    """W + Σ w (W' − W), over modules that whole adapters were fused into."""
    weights = dict(tree_flatten(base.parameters()))
    wide = {name: np.array(value.astype(mx.float32), np.float64) for name, value in weights.items()}
    made = {name: value.copy() for name, value in wide.items()}
    for weight, each in fused:
        for name, value in tree_flatten(each.parameters()):
            made[name] += weight * (np.array(value.astype(mx.float32), np.float64) - wide[name])
    module.load_weights([(name, mx.array(value).astype(weights[name].dtype)) for name, value in made.items()])
    return module


CASES = {
    "lora and lora": (("lora", 0, 0.7), ("lora", 1, 0.3)),
    "lora and dora": (("lora", 0, 0.5), ("dora", 1, 0.5)),
    "dora and dora": (("dora", 0, 0.6), ("dora", 1, -0.2)),
    "experts and lora": (("experts", 0, 1.0), ("lora", 0, 0.4)),
    "experts and experts": (("experts", 0, 0.5), ("experts", 1, -0.5)),
    "all three": (("experts", 0, 0.5), ("lora", 1, -0.5), ("dora", 0, 0.5)),
    "one, weighted": (("dora", 0, 0.25),),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_model_with_the_sum_fused_in(
    case, lively, make_engine, make_request, assert_drawn
):
    terms = CASES[case]
    engine = make_engine(load(str(lively.folder("full")), name="full"))
    names = {}
    for kind, number, weight in terms:
        names[f"{kind}{number}"] = weight
        engine.registry.load(f"{kind}{number}", lively.adapter("full", kind, number))
    version = combined(engine.registry, *names.items())
    first = engine.registry.acquire(next(iter(names)))
    requests = [
        make_request("combined", adapter=version),
        make_request("plain", text="something else"),
        make_request("part", text="a third prompt", adapter=first),
        make_request("again", text="sampled, too", adapter=version, temperature=1.0, seed=7),
    ]
    tokens = drawn(engine, *requests)
    fused = [(weight, lively.module("full", kind, number)) for kind, number, weight in terms]
    module = summed(lively.module("full", "base"), fused, load(str(lively.folder("full"))).network.module)
    for request in (requests[0], requests[3]):
        assert_drawn(request, tokens[request.id], module)
        assert len(set(tokens[request.id])) > 8
    assert_drawn(requests[1], tokens["plain"], lively.module("full", "base"))
    assert_drawn(requests[2], tokens["part"], fused[0][1])
    for held in (version, first):
        engine.registry.release(held)
    engine.registry.check_integrity()
    engine.close()


@pytest.fixture
def engine(model):
    made = Engine(model, EngineLimits())
    yield made
    made.registry.check_integrity()
    made.close()


@pytest.fixture
def registry(engine, make_adapter) -> Registry:
    for number, name in enumerate(("a", "b", "c"), 1):
        engine.registry.load(name, make_adapter(number, rank=2 + number))
    return engine.registry


def test_order_and_repetition_do_not_matter(registry):
    wanted = combined(registry, ("a", 0.75), ("b", 0.5))
    for terms in (
        (("b", 0.5), ("a", 0.75)),
        (("a", 0.5), ("b", 0.5), ("a", 0.25)),
        (("a@1", 0.75), ("c", 0.0), ("b", 0.5)),
        (("c", 1.0), ("a", 0.75), ("b", 0.5), ("c", -1.0)),
    ):
        found = combined(registry, *terms)
        assert found is wanted, terms
        registry.release(found)
    others = [
        combined(registry, *terms)
        for terms in ((("a", 0.5), ("b", 0.75)), (("a", 0.75), ("c", 0.5)), (("a", 0.75),))
    ]
    hashes = {each.effect_hash for each in (wanted, *others, *registry.current())}
    assert len(hashes) == 7
    for version in (wanted, *others):
        registry.release(version)


def test_parts_that_do_the_same_are_one(registry, make_adapter):
    copy = registry.load("copy", make_adapter(1, rank=3))
    assert copy.effect_hash == registry.resolve("a").effect_hash
    both = [Weighted(registry.resolve("a"), 0.25), Weighted(copy, 0.5)]
    for parts in (added_up(both), added_up(reversed(both))):
        assert [(part.version.id, part.weight) for part in parts] == [("a@1", 0.75)]


def test_an_update_of_a_part_makes_another_and_leaves_the_old_one(registry, make_adapter):
    old = combined(registry, ("a", 0.5), ("b", 0.5))
    registry.load("a", make_adapter(7, rank=3), replace=True)
    new = combined(registry, ("a", 0.5), ("b", 0.5))
    assert (old.id, new.id) == ("a@1:0.5+b@1:0.5", "a@2:0.5+b@1:0.5")
    assert old.effect_hash != new.effect_hash
    again = combined(registry, ("a@1", 0.5), ("b", 0.5))
    assert again is old
    for version in (old, new, again):
        registry.release(version)


def test_what_a_request_holds_outlives_its_parts(engine, registry, make_request):
    version = combined(registry, ("a", 0.5), ("b", 0.5))
    before = drawn(engine, make_request("before", adapter=version))["before"]
    for name in ("a", "b", "c"):
        registry.unload(name)
    # Its place in host memory goes to others: it comes back from a file of its own.
    registry.contents.shelf.make_room(0)
    assert registry.contents.shelf.tier(version.effect_hash) == "file"
    registry.acquire(version.id)
    assert drawn(engine, make_request("after", adapter=version))["after"] == before
    registry.release(version)
    registry.release(version)


def test_whoever_holds_a_sum_that_is_in_no_memory_holds_its_parts(registry):
    version = combined(registry, ("a", 0.5), ("b", 0.5))
    registry.release(version)
    registry.contents.shelf.make_room(0)
    assert registry.contents.tier(version) == "source"
    registry.acquire(version.id)
    for name in ("a", "b", "c"):
        registry.unload(name)
    assert registry.read(version)
    registry.release(version)
    assert registry.versions() == []
    registry.check_integrity()


def test_content_is_made_again_of_its_parts(registry):
    version = combined(registry, ("a", 0.5), ("b", -1.0))
    first = registry.read(version)
    registry.contents.let_go(version)  # as if nobody held it: what can be made again needs no file
    registry.contents.shelf.make_room(0)
    assert registry.contents.shelf.tier(version.effect_hash) is None
    registry.contents.hold(version)
    again = registry.read(version)
    for path, update in first.items():
        for name, array in update.arrays().items():
            assert mx.array_equal(array, again[path].arrays()[name]), f"{path}.{name}"
    registry.release(version)


def test_without_its_parts_it_cannot_be_made_again(registry):
    version = combined(registry, ("a", 0.5), ("b", -1.0))
    source = Combination(
        [Weighted(registry.resolve("a"), 0.5), Weighted(registry.resolve("b"), -1.0)], registry.contents
    )
    registry.release(version)
    assert source.is_intact
    registry.unload("a")
    registry.contents.shelf.make_room(0)
    assert not source.is_intact
    with pytest.raises(AdapterGoneError, match="a@1"):
        source.read(version.name, registry._fitting)


def test_a_bounded_number_is_kept(model, make_adapter):
    registry = Registry(model, Bank(model.network), max_bytes=1 << 30, max_combined=4)
    for number, name in enumerate(("a", "b"), 1):
        registry.load(name, make_adapter(number))
    held = combined(registry, ("a", 0.5), ("b", 0.5))
    for weight in (2.0, 3.0, 4.0, 5.0, 6.0, 2.0, 7.0):
        registry.release(combined(registry, ("b", weight)))
        registry.check_integrity()
    assert registry.combinations() == [held.id, *(f"b@1:{weight}" for weight in (6.0, 2.0, 7.0))]
    assert registry.names() == ["a", "b"]
    registry.release(held)
    registry.release(combined(registry, ("b", 8.0)))
    assert registry.combinations() == [f"b@1:{weight}" for weight in (6.0, 2.0, 7.0, 8.0)]
    assert len(registry.contents.keys) == 2 + 4
    registry.close()


def test_ranks_that_add_up_to_too_much_are_refused(model, make_adapter):
    engine = Engine(model, EngineLimits(max_rank=8))
    for number, name in enumerate(("a", "b", "c"), 1):
        engine.registry.load(name, make_adapter(number))
    engine.registry.release(combined(engine.registry, ("a", 1.0), ("b", 1.0)))
    before = engine.registry.combinations()
    with pytest.raises(AdapterError, match=r"adds up to rank 12 at model\.layers\.0.*up to 8 \(max_rank\)"):
        combined(engine.registry, ("a", 1.0), ("b", 1.0), ("c", 1.0))
    assert engine.registry.combinations() == before
    engine.registry.check_integrity()
    engine.close()


def test_weights_that_no_number_holds_are_refused(registry):
    with pytest.raises(AdapterError, match="values that float32, which the model computes in, cannot hold"):
        combined(registry, ("a", 1e39))
    with pytest.raises(RequestError, match="the weights of adapter 'a@1' add up to inf"):
        combined(registry, ("a", 1.7e308), ("a", 1.7e308))
    with pytest.raises(NotFoundError):
        combined(registry, ("a", 1.0), ("nobody", 1.0))
    assert registry.combinations() == []
    for name in ("a", "b", "c"):
        assert registry.num_pins(registry.resolve(name)) == 0


OWN_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def lineage(**changes) -> Lineage:
    words = dict.fromkeys(("base_fingerprint", "template_hash", "recipe_hash", "data_hash", "created"), "")
    return Lineage(**{"base_model": "lively", "lathe_version": "0", **words, **changes})


def test_templates_must_agree_and_stop_ids_are_joined(engine, make_adapter, tmp_path):
    tensors = read_tensors(make_adapter(1))
    hash = make_template(engine.model.tokenizer, TemplateRules(source=OWN_TEMPLATE)).hash
    said = {
        "plain": None,
        "stops": lineage(stop_ids=(5, 7)),
        "more": lineage(stop_ids=(7, 9)),
        "thinks": lineage(chat_template=OWN_TEMPLATE, template_hash=hash),
    }
    for number, (name, words) in enumerate(said.items()):
        other = {key: value + number for key, value in tensors.items()}
        write_adapter(tmp_path / name, other, AdapterConfig("lora", -1, 4, 2.0, lineage=words))
        engine.registry.load(name, tmp_path / name)
    registry = engine.registry
    version = combined(registry, ("stops", 0.5), ("plain", 0.1), ("more", 0.5))
    assert set(version.stop_ids) == {5, 7, 9}
    registry.release(version)
    told = "'plain@1' and 'thinks@1' cannot be added: they bring other chat templates"
    with pytest.raises(AdapterError, match=told):
        combined(registry, ("thinks", 0.5), ("plain", 0.5))
    registry.release(combined(registry, ("thinks", 0.5), ("plain", 0.0)))


def test_a_combination_does_what_the_merged_folder_does(
    engine, registry, make_adapter, make_request, tmp_path
):
    """`lathe adapters merge --method cat`, whose updates PEFT's are."""
    parts = [f"{make_adapter(1, rank=3)}:0.7", f"{make_adapter(2, rank=4)}:-0.3"]
    merge(parts, tmp_path / "merged", Merge("cat"), "peft")
    offline = registry.load("merged", tmp_path / "merged")
    version = combined(registry, ("a", 0.7), ("b", -0.3))
    ours, theirs = registry.read(version), registry.read(offline)
    assert ours.keys() == theirs.keys()
    for path, update in ours.items():
        found, wanted = (np.array(each.a @ each.b) for each in (update, theirs[path]))
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    registry.release(version)
