"""Each family with media, in the engine and in the trainer, beside mlx-vlm's own code on each row alone.

README's table is printed by `python tests/test_vlm_families.py`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "support")]

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from vision_rows import Batch
from vlm_families import (
    FAMILIES,
    LARGE_VLM_FAMILIES,
    Reference,
    Row,
    chats_of,
    message,
    picture,
    write_random_lora,
    write_vlm,
)

from serve.adapters.versions.version import AdapterVersion
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request, Sampling
from serve.media.content import Clip, Content, Picture, Sound
from serve.media.processor import MediaProcessor, load_processor
from serve.model.loading import LoadedModel, load
from serve.model.packed import packing_problem
from serve.model.prompt import Media, Prompt
from serve.model.vision import Features, Vision
from train.adapters.adapt import AdapterSettings, add_lora, checkpointed_layers
from train.data.batches import Batch as TrainingBatch
from train.data.batches import collate
from train.data.packing import Layout, collate_packed
from train.data.row_media import RowMedia
from train.data.tokens import TokenizedExample
from train.loop.eyes import Eyes
from train.loop.loss import hidden_states
from train.loop.step import Stepper
from train.objectives.sft import SFT

NEAR = 1e-3
"""How far logits of the same row may be apart in other shapes, as a share of the largest."""
ANSWER_TOKENS = 8
Chat = Sequence[Mapping[str, Any]]


@dataclass
class Answer:
    """What the engine said to one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0


class Case:
    """One family: mlx-vlm's own code, an engine, a trainer, each over the same folder."""

    def __init__(self, family: str, root: Path) -> None:
        self.family = family
        self.root = root
        self.folder = write_vlm(family, root / family)
        self.reference = Reference(self.folder)

    @cached_property
    def served(self) -> LoadedModel:
        """The model that engines run: its layers are wrapped."""
        return load(str(self.folder), name=self.family)

    @cached_property
    def processor(self) -> MediaProcessor:
        assert self.served.vision is not None
        return MediaProcessor(self.folder, load_processor(self.folder), self.served.vision)

    @cached_property
    def engine(self) -> Engine:
        """A small one, so that rows are computed in pieces and wait for each other. It keeps prefixes."""
        return Engine(self.served, EngineLimits(prefill_chunk_tokens=48, max_rows=6))

    @cached_property
    def rows(self) -> dict[str, tuple[Row, Prompt]]:
        """One of each kind of chat: as mlx-vlm's processor has it, and as pieces."""
        return {name: self.row(chat) for name, chat in chats_of(self.family).items()}

    def row(self, chat: Chat) -> tuple[Row, Prompt]:
        row = self.reference.row(chat)
        processed = [self.processor.process(content) for content in contents_of(chat)]
        prompt = self.processor.prompt(row.token_ids, processed)
        counts_seconds = self.served.vision is not None and self.served.vision.positions_per_s is not None
        return replace(row, rope=prompt.rope if counts_seconds else None), prompt

    @cached_property
    def adapters(self) -> dict[str, Path]:
        """Two LoRAs of the language part."""
        return {
            name: write_random_lora(self.folder, self.root / name, seed=seed)
            for seed, name in enumerate(("one", "two"), 1)
        }

    @cached_property
    def examples(self) -> list[TokenizedExample]:
        """Rows that train: each kind of chat with an answer of random words."""
        rng = np.random.default_rng(0)
        found = []
        for line, (row, prompt) in enumerate(self.rows.values()):
            answer = rng.integers(60, 250, 5 + 3 * line)
            tokens = np.array([*row.token_ids, *answer], np.int32)
            media = RowMedia.of(prompt) if prompt.media else None
            is_target = np.arange(len(tokens)) >= len(row.token_ids)
            found.append(TokenizedExample(tokens, is_target, "f", line, media=media))
        return found

    def trainer(self) -> tuple[LoadedModel, Eyes]:
        """A model of its own, and its frozen towers."""
        model = load(str(self.folder), name=self.family)
        assert model.vision is not None
        return model, Eyes(model.network, model.vision, trains=False)


def contents_of(chat: Chat) -> Iterator[Content]:
    """The media of a chat, as users' media are once decoded."""
    for part in (part for turn in chat for part in turn["content"]):
        if part["type"] == "image":
            yield Picture(np.asarray(part["image"]))
        elif part["type"] == "video":
            frames = part["video"].transpose(0, 2, 3, 1)
            yield Clip(tuple(map(Picture, frames)), tuple(i / 2 for i in range(len(frames))))
        elif part["type"] == "audio":
            yield Sound(part["audio"], 16_000)


def ask(
    engine: Engine,
    prompts: Mapping[str, tuple[Prompt, AdapterVersion | None]],
    *,
    max_tokens: int = ANSWER_TOKENS,
    draw: random.Random | None = None,
) -> dict[str, Answer]:
    """Greedy answers, to the last token. `draw`: they come one after another, a few steps apart."""
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, num_logprobs=0)
    pending = [engine.check(Request(name, *asked[:1], sampling, asked[1])) for name, asked in prompts.items()]
    answers = {name: Answer() for name in prompts}
    while pending or engine.has_work:
        while pending and (draw is None or draw.random() < 0.5):
            engine.add(pending.pop(0))
        for event in engine.step():
            if event.error is not None:
                raise event.error
            answer = answers[event.request_id]
            answer.token_ids += event.token_ids
            answer.logprobs += [each.logprob for each in event.logprobs]
            answer.num_cached_tokens = max(answer.num_cached_tokens, event.num_cached_tokens)
    return answers


def assert_is(answer: Answer, row: Row, reference: Reference) -> None:
    """Every token is the likeliest in mlx-vlm's own code after those before it, and as likely there."""
    logits = np.array(reference.logits(row, answer.token_ids[:-1]), np.float64)
    near = NEAR * np.abs(logits).max()
    drawn = logits[np.arange(len(logits)), answer.token_ids]
    peak = logits.max(-1)
    assert (peak - drawn < near).all()
    expected = drawn - peak - np.log(np.exp(logits - peak[:, None]).sum(-1))
    np.testing.assert_allclose(answer.logprobs, expected, atol=near)


# What is proven, one function a column. Each raises AssertionError, or returns what the table says.


def rows_are_mlx_vlms(case: Case) -> str:
    """Each kind of row alone in the engine: tokens, and their log-probabilities."""
    for name, (row, prompt) in case.rows.items():
        assert_is(ask(case.engine, {name: (prompt, None)})[name], row, case.reference)
    return ", ".join(case.rows)


def batches_are_rows_alone(case: Case) -> str:
    """All kinds of rows with different adapters, coming and going, are each alone on the merged model."""
    draw = random.Random(1)
    versions = {
        name: case.engine.registry.load(name, folder, replace=True) for name, folder in case.adapters.items()
    }
    references = {name: Reference(case.folder, folder) for name, folder in case.adapters.items()}
    kinds = [(kind, adapter) for kind in case.rows for adapter in (None, *versions)]
    draw.shuffle(kinds)
    asked = {
        f"{kind} {adapter}": (case.rows[kind][1], versions[adapter] if adapter else None)
        for kind, adapter in kinds
    }
    answers = ask(case.engine, asked, draw=draw)
    for kind, adapter in kinds:
        reference = references[adapter] if adapter else case.reference
        assert_is(answers[f"{kind} {adapter}"], case.rows[kind][0], reference)
    return "equal, 2 adapters"


def prefixes_are_cut_anywhere(case: Case) -> str:
    """A prompt that parts from a known one at any of its words, or at any of its pictures, is as if it were new."""
    chat = list(chats_of(case.family).values())[-1]
    row, prompt = case.row(chat)
    # By its control tokens a family's own code tells where media are.
    control = set(case.reference.tokenizer.get_added_vocab().values())
    edges = {at + by for media in prompt.media for at in (media.start, media.stop) for by in (-2, -1, 0, 1)}
    length = len(prompt.token_ids)
    cuts = [
        at for at in range(1, length) if prompt.token_ids[at] not in control and (at in edges or at % 5 == 0)
    ]
    ask(case.engine, {"first": (prompt, None)}, max_tokens=1)
    num_cached = []
    for cut in [*cuts, length]:
        ids = list(prompt.token_ids)
        if cut < length:
            ids[cut] = 100 if ids[cut] != 100 else 101
        parted = Prompt(tuple(ids), prompt.media, prompt.rope, prompt.blocks)
        answer = ask(case.engine, {"parted": (parted, None)}, max_tokens=3)["parted"]
        assert answer.num_cached_tokens <= cut
        num_cached.append(answer.num_cached_tokens)
        assert_is(answer, replace(row, token_ids=tuple(ids)), case.reference)
    for changed, first in _with_another_picture(case.family):
        row, prompt = case.row(changed)
        answer = ask(case.engine, {"other": (prompt, None)}, max_tokens=3)["other"]
        assert answer.num_cached_tokens <= prompt.media[first].start
        assert_is(answer, row, case.reference)
    if prompt.blocks and prompt.blocks[0] == (0, length):
        assert not any(num_cached)
        return "none: a prompt sees itself whole"
    assert max(num_cached) > length // 2
    return f"{len(num_cached)} cuts"


def _with_another_picture(family: str) -> Iterator[tuple[Chat, int]]:
    """The chat with pictures, one of them another one of the same size; and its number."""
    known = [picture(1), picture(2, 80, 56), picture(3)]
    if FAMILIES[family].max_pictures == 1:
        yield [message(picture(7), "is it the same as before?")], 0
        return
    for number in range(3):
        shown = list(known)
        shown[number] = picture(7 + number, *shown[number].size)
        yield [message(shown[0], "a", shown[1], "b", shown[2], "which is second?")], number


def nothing_is_seen_ahead(case: Case) -> str:
    """Another last token moves nothing before it: in rows of the engine, and in the trainer."""
    model, eyes = case.trainer()
    rows = [prompt for _, prompt in case.rows.values()]
    batch = Batch(model, rows)
    for index, prompt in enumerate(rows):

        def answered(words: list[int], index: int = index, prompt: Prompt = prompt) -> np.ndarray:
            length = len(prompt.token_ids)
            batch.forward([(index, 0, length)], [prompt.token_ids])
            return np.array(batch.forward([(index, length, length + len(words))], [words]))

        one, two = answered([60, 61, 62, 63]), answered([60, 61, 62, 99])
        assert np.abs(one[:, 3] - two[:, 3]).max() > 0.1
        np.testing.assert_array_equal(one[:, :3], two[:, :3])
    rows_of_text = [[*example.token_ids[:-1], 7] for example in case.examples]
    lengths = [len(tokens) for tokens in rows_of_text]
    changed = [
        TokenizedExample(np.array(tokens, np.int32), example.is_target, "f", 0, media=example.media)
        for tokens, example in zip(rows_of_text, case.examples, strict=True)
    ]
    one, two = (_hidden(model, eyes, examples) for examples in (case.examples, changed))
    for index, length in enumerate(lengths):
        assert np.abs(one[index, length - 1] - two[index, length - 1]).max() > 0.1
        np.testing.assert_allclose(one[index, : length - 1], two[index, : length - 1], atol=1e-5)
    return "engine, trainer"


def _hidden(model: LoadedModel, eyes: Eyes, examples: Sequence[TokenizedExample]) -> np.ndarray:
    """[B, T, D] in the trainer, all tokens of all rows."""
    batch = collate(examples, range(len(examples)))
    seen = eyes.see(batch.media, batch.tokens.shape) if batch.media is not None else None
    return np.array(hidden_states(model.network, mx.array(batch.tokens), seen=seen))


def the_trainer_is_mlx_vlm(case: Case) -> str:
    """Logits at the answers' tokens, all rows in one padded batch, are those of mlx-vlm's own code row by row."""
    model, eyes = case.trainer()
    hidden = _hidden(model, eyes, case.examples)
    for index, (example, (row, _)) in enumerate(zip(case.examples, case.rows.values(), strict=True)):
        start = len(row.token_ids)
        answer = example.token_ids[start:].tolist()
        expected = np.array(case.reference.logits(row, answer))
        found = np.array(model.network.logits(mx.array(hidden[None, index, start - 1 : len(example)]))[0])
        np.testing.assert_allclose(found, expected, atol=NEAR * np.abs(expected).max())
    return "equal"


def lora_trains(case: Case) -> str:
    """The loss falls; every trainable tensor has moved and no frozen one; checkpointing changes no gradient, and
    packed rows give the gradients of rows alone, or are refused."""
    model, eyes = case.trainer()
    network = model.network
    add_lora(network, AdapterSettings(rank=4, scale=4.0))
    start = {name: np.array(value) for name, value in tree_flatten(network.module.parameters())}
    batch = collate(case.examples, range(len(case.examples)))
    plain = _gradients(model, eyes, batch)
    with checkpointed_layers(network):
        _same(plain, _gradients(model, eyes, batch))
    packs = _packs(case, model, eyes)
    stepper = Stepper(network, mlx_optim.Adam(learning_rate=1e-2), SFT(), eyes=eyes)
    network.module.train()
    losses = [float(stepper.step([batch], index).loss) for index in range(5)]
    network.module.eval()
    assert losses[-1] < losses[0] - 0.1
    trainable = dict(tree_flatten(network.module.trainable_parameters()))
    assert trainable
    for name, value in tree_flatten(network.module.parameters()):
        moved = not np.array_equal(np.array(value), start[name])
        assert moved == (name in trainable), f"{name} {'moved' if moved else 'did not move'}"
    return f"yes; {packs}"


def _packs(case: Case, model: LoadedModel, eyes: Eyes) -> str:
    if packing_problem(model.network, 512) is not None:
        return "not packed"
    lengths = [len(example) for example in case.examples]
    rows = tuple(range(len(lengths)))
    packed = collate_packed(case.examples, Layout(8 * -(-(sum(lengths) + 1) // 8), (rows,)))
    alone = collate(case.examples, rows)
    _same(_gradients(model, eyes, alone), _gradients(model, eyes, packed))
    return "packs"


def _gradients(model: LoadedModel, eyes: Eyes, batch: TrainingBatch) -> dict[str, mx.array]:
    prepared = SFT().prepare(batch).seen_by(eyes)

    def mean() -> mx.array:
        return SFT().loss(model.network, prepared.arrays(prepared.num_units))[0]

    model.network.module.train()
    loss, found = nn.value_and_grad(model.network.module, mean)()
    model.network.module.eval()
    return {"loss": loss, **dict(tree_flatten(found))}


def _same(one: dict[str, mx.array], two: dict[str, mx.array]) -> None:
    assert one.keys() == two.keys()
    largest = max(mx.abs(value).max().item() for value in one.values())
    assert largest > 1e-3
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-4 * largest, err_msg=name)


COLUMNS: dict[str, Callable[[Case], str]] = {
    "rows ≡ mlx-vlm": rows_are_mlx_vlms,
    "batch ≡ alone": batches_are_rows_alone,
    "prefix": prefixes_are_cut_anywhere,
    "causal": nothing_is_seen_ahead,
    "trainer ≡ mlx-vlm": the_trainer_is_mlx_vlm,
    "LoRA trains": lora_trains,
}


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            made[family] = Case(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
@pytest.mark.parametrize("column", COLUMNS)
def test_every_family(column, family, case_of):
    COLUMNS[column](case_of(family))


class Shallow(Vision):
    """Encodes pictures without what goes to deeper layers."""

    def encode(self, media: Media) -> Features:
        features = super().encode(media)
        return Features(features.embeddings, tuple(map(mx.zeros_like, features.deepstack)))


def test_wrong_positions_and_missing_deepstack_do_not_pass(case_of):
    """The measure by which rows are compared tells them: without that, equal rows would say nothing."""
    case = case_of("qwen3_vl")
    row, prompt = case.rows["pictures"]
    assert prompt.rope is not None
    late = Prompt(prompt.token_ids, prompt.media, prompt.rope._replace(delta=prompt.rope.delta + 1))
    with pytest.raises(AssertionError):
        assert_is(ask(case.engine, {"late": (late, None)})["late"], row, case.reference)
    model, _ = case.trainer()
    engine = Engine(replace(model, vision=Shallow(model.network, model.config)), EngineLimits())
    with pytest.raises(AssertionError):
        assert_is(ask(engine, {"shallow": (prompt, None)})["shallow"], row, case.reference)


def table(families: Sequence[str]) -> Iterator[str]:
    """The lines of the table, each cell proven now."""
    yield "| family | " + " | ".join(COLUMNS) + " |"
    yield "|---|" + "---|" * len(COLUMNS)
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(family, Path(folder))
            cells = [_cell(prove, case) for prove in COLUMNS.values()]
        yield f"| {family} | " + " | ".join(cells) + " |"


def _cell(prove: Callable[[Case], str], case: Case) -> str:
    try:
        return prove(case)
    except Exception as error:  # whatever goes wrong is what the table has to say
        said = " ".join(f"{type(error).__name__} {error}".split())
        return f"**no**: {said[:100]}"


if __name__ == "__main__":
    for line in table(sys.argv[1:] or list(FAMILIES)):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
