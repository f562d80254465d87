"""`lathe bench constraints`: what schemas cost a batch, every row with one of its own, over the same rows without.

Both sides are engines of this process that take a step each in turns (`lockstep.py`), on a random model whose
vocabulary is learned from Python's own library, so that its pieces are as long as real ones.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from serve.bench import lockstep, standin
from serve.bench.finding import Finding, Keep
from serve.bench.lockstep import Cost, Side
from serve.bench.prompts import PromptMaker
from serve.constraints.compiler import GrammarCompiler
from serve.constraints.spec import ConstraintSpec
from serve.engine.engine import Engine, EngineLimits
from serve.model.loading import load

ASKED = 1.15
NUM_FIELDS = 8
NUM_ITEMS = 50
"""An answer is longer than any row's."""
PROMPT_WORDS = 16
MAX_CHARS = 6_000_000
KINDS: tuple[dict[str, Any], ...] = (
    {"type": "string"},
    {"type": "integer"},
    {"type": "number"},
    {"enum": ["red", "green", "blue"]},
    {"type": "array", "items": {"type": "string"}},
    {"type": "boolean"},
    {
        "type": "object",
        "properties": {"x": {"type": "string"}, "y": {"type": "number"}},
        "required": ["x", "y"],
    },
)


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    num_rows: int = 16
    vocabulary: int = 32_768
    max_tokens: int = 64
    rounds: int = 5
    size: str = "29M"
    """One of SIZES, but for its vocabulary."""


def run(setting: Setting, folder: Path, progress: Callable[[str], None], keep: Keep) -> list[Finding]:
    """Write the model into `folder`, compile a schema a row, and measure."""
    progress(f"a model whose vocabulary has {setting.vocabulary:,} tokens")
    size = replace(standin.SIZES[setting.size], vocabulary=setting.vocabulary)
    model = folder / "model"
    standin.write_model(model, standin.default_dtype(), size, texts=library())
    free, schemas = (Engine(load(str(model)), EngineLimits(max_rows=setting.num_rows)) for _ in range(2))
    compiler = GrammarCompiler(schemas.model.tokenizer, schemas.token_bytes, setting.vocabulary)
    grammars, compile_s = [], []
    for number in range(setting.num_rows):
        progress(f"schema {number + 1} of {setting.num_rows}")
        begun_s = time.perf_counter()
        grammars.append(compiler.compile(ConstraintSpec.of_schema(schema(number), "schema")))
        compile_s.append(time.perf_counter() - begun_s)
    sides = [Side(free), Side(schemas, grammars=grammars)]
    prompts = [
        schemas.model.tokenizer.encode(PromptMaker(row).prompt(PROMPT_WORDS))
        for row in range(setting.num_rows)
    ]
    costs: list[list[Cost]] = []
    for number in range(setting.rounds + 1):
        progress(f"round {number} of {setting.rounds}")
        costs.append(lockstep.run(sides, prompts, setting.max_tokens, number, temperature=1.0))
    findings = [_finding(setting, costs[1:], compile_s[1:])]  # the first of each warms up
    keep(findings)
    return findings


def schema(number: int) -> dict[str, Any]:
    """The row's own: a list of objects whose fields are of all kinds, in an order and of names of its own."""
    kinds = islice(cycle(KINDS), number % len(KINDS), number % len(KINDS) + NUM_FIELDS)
    fields = {f"f{number}_{place}": kind for place, kind in enumerate(kinds)}
    item = {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": NUM_ITEMS}


def library() -> Iterator[str]:
    """Texts of Python's own library."""
    left = MAX_CHARS
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")[:left]
        left -= len(text)
        yield text
        if not left:
            return


def _finding(setting: Setting, costs: list[list[Cost]], compile_s: list[float]) -> Finding:
    def step_ms(side: int) -> list[float]:
        return [1e3 * each[side].cpu_s / each[side].num_steps for each in costs]

    free, constrained = step_ms(0), step_ms(1)
    return Finding(
        what=f"{setting.num_rows} rows with {setting.num_rows} schemas over free rows, CPU time a step",
        ratios=tuple(ours / bare for ours, bare in zip(constrained, free, strict=True)),
        asked=ASKED,
        sense="at most",
        values={
            "free ms": free,
            "with schemas ms": constrained,
            "compiling one ms": [1e3 * (median(compile_s) if compile_s else 0.0)],
        },
    )
