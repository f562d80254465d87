"""Which modules a config means: PEFT's own functions are the oracle, over generated names and configs."""

from __future__ import annotations

import random
import threading

import pytest

peft = pytest.importorskip("peft", reason="the oracle: pip install '.[dev]'")

from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

from serve.adapters.formats.peft.patterns import Matcher, Targets, is_expression, pattern_of  # noqa: E402
from serve.errors import AdapterError  # noqa: E402

NAMES = [
    f"{prefix}{stack}.{layer}.{block}"
    for prefix in ("", "model.", "model.language_model.", "base_model.model.model.")
    for stack in ("layers", "h", "visual.blocks")
    for layer in (0, 1, 10)
    for block in ("self_attn.q_proj", "self_attn.qq_proj", "mlp.up_proj", "mlp.experts.1.up_proj", "attn")
] + ["lm_head", "model.lm_head", "score", "q_proj"]
ENDS = [
    "q_proj",
    "up_proj",
    "self_attn.q_proj",
    "0.mlp.up_proj",
    "attn",
    "lm_head",
    "layers.1.self_attn.q_proj",
    "proj",
]
EXPRESSIONS = [
    r".*q_proj",
    r".*\.1\..*",
    "q_proj",
    r".*(q|up)_proj",
    r"^model.layers.0.*",
    "lm_head",
    r".*layers\.\d\..*",
]
PATTERNS = [
    *ENDS,
    *EXPRESSIONS,
    r"^model.layers.0.self_attn.q_proj",
    r"layers\.1\..*",
    "q_proj|up_proj",
    "1",
    ".*",
]


def some(draw: random.Random, values: list[str]) -> list[str]:
    return draw.sample(values, draw.randint(1, 3))


def config_of(draw: random.Random) -> dict:
    modules = draw.choice([some(draw, ENDS), some(draw, ENDS), draw.choice(EXPRESSIONS)])
    layers = pattern = None
    if isinstance(modules, list):
        layers = draw.choice([None, None, 1, [0, 10], []])
        pattern = draw.choice([None, "layers", ["h", "layers"], "blocks"]) if layers is not None else None
    return {
        "target_modules": modules,
        "exclude_modules": draw.choice([None, None, some(draw, ENDS), draw.choice(EXPRESSIONS)]),
        "modules_to_save": draw.choice([None, None, ["lm_head"], ["mlp"], ["1"], ["layers.0"]]),
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }


def as_tuple(value: object) -> tuple:
    return tuple(value) if isinstance(value, list) else (value,)


def targets_of(config: dict) -> Targets:
    modules, exclude, layers = (
        config[k] for k in ("target_modules", "exclude_modules", "layers_to_transform")
    )
    return Targets(
        modules if isinstance(modules, str) else tuple(modules),
        exclude=exclude if isinstance(exclude, str) else tuple(exclude or ()),
        save=tuple(config["modules_to_save"] or ()),
        layers=None if layers is None else as_tuple(layers),
        layers_pattern=() if config["layers_pattern"] is None else as_tuple(config["layers_pattern"]),
    )


def test_the_same_modules_are_meant_as_pefts_own_rule_means():
    draw, meant = random.Random(0), set()
    for _ in range(300):
        config = config_of(draw)
        theirs = peft.LoraConfig(**config)
        ours = targets_of(config)
        for name in NAMES:
            found = bool(check_target_module_exists(theirs, name))
            assert ours.is_module(name) == found, (name, config)
            meant.add((found, name))
    assert sum(found for found, _ in meant) > len(NAMES) / 2, "the configs mean next to nothing"
    assert sum(not found for found, _ in meant) > len(NAMES) / 2


def test_the_first_pattern_that_pefts_own_rule_finds_is_the_one():
    draw, found = random.Random(1), set()
    for _ in range(300):
        patterns = draw.sample(PATTERNS, draw.randint(1, 5))
        for name in NAMES:
            expected = get_pattern_key(patterns, name)  # the name itself where there is none
            assert pattern_of(patterns, name, Matcher()) in (
                (expected, None) if expected == name else (expected,)
            )
            found.add(expected)
    assert set(PATTERNS) - found == {"1", "proj"}, "parts of a name's last word mean nothing"


def test_a_server_that_is_busy_takes_as_many_names_as_an_idle_one():
    """What other threads do meanwhile is not counted: a file of experts may have 18,432 names."""
    is_over, matcher = threading.Event(), Matcher(timeout_s=0.5)

    def work() -> None:
        while not is_over.is_set():
            sum(range(1000))

    others = [threading.Thread(target=work) for _ in range(4)]
    for thread in others:
        thread.start()
    try:
        names = (f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(3000))
        assert all(matcher.match(r"(.*\.)?(up_proj)$", name) for name in names)
    finally:
        is_over.set()
        for thread in others:
            thread.join()


def test_an_expression_that_would_match_for_ages_is_refused_in_time():
    assert is_expression(r"(?:(?:\w|\.)|(?:\w|\.|_)|.)+[A-Z]")
    matcher = Matcher(timeout_s=0.2)
    assert matcher.fullmatch(".*q_proj", "model.layers.0.self_attn.q_proj")
    for _ in range(2):  # the time is one for all that a config asks
        with pytest.raises(AdapterError, match="takes too long to match"):
            matcher.fullmatch(
                r"(?:(?:\w|\.)|(?:\w|\.|_)|.)+[A-Z]", "model.layers.0.self_attn.q_proj.and.so.on"
            )
