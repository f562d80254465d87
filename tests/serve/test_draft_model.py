"""A draft model by itself: its guesses are what it says of the whole text, whatever rows, company and past it has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from serve.draft.model import CATCH_UP_TOKENS, DraftModel
from serve.engine.drafts import Wanted
from serve.engine.engine import Engine, EngineLimits
from serve.engine.plan import SequenceState
from serve.engine.request import Request
from serve.errors import AdapterError, ConfigError, LatheError
from serve.model.loading import LoadedModel, load
from serve.model.prompt import Media, Prompt

ROOM = 64 << 20
LONG = "a prompt that is longer than what is taken in of all rows in one round. " * 10
SETTINGS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.2, "top_k": 9, "min_p": 0.02},
)


@dataclass
class Watched:
    """An engine without drafts, whose rows a drafter guesses for between two steps; its guesses are kept."""

    engine: Engine
    drafter: DraftModel
    most: int = 4
    asks: Callable[[SequenceState], bool] = lambda sequence: True
    """Whether guesses are wanted of it now."""
    sequences: dict[str, SequenceState] = field(default_factory=dict)
    rounds: list[dict[str, tuple[int, list[int]]]] = field(default_factory=list)
    """By request, how long its answer was and what was guessed, of each round."""

    def run(self, *requests: Request) -> None:
        """From beginning to end."""
        self.add(*requests)
        while self.engine.has_work:
            self.step()

    def add(self, *requests: Request) -> None:
        for request in requests:
            if request.adapter is not None:
                self.engine.registry.acquire(request.adapter.id)
            self.engine.add(self.engine.check(request))
            self.sequences[request.id] = self.engine.scheduler.waiting[-1]

    def step(self) -> None:
        ended = [event.request_id for event in self.engine.step() if event.finish]
        running = [sequence for sequence in self.engine.scheduler.decoding if self.asks(sequence)]
        wanted = [
            Wanted(each, self.most) for each in running if each.num_planned_tokens == each.num_tokens - 1
        ]
        guesses = self.drafter.propose(wanted)
        self.drafter.check_integrity()
        self.rounds.append(
            {
                each.sequence.request.id: (len(each.sequence.generated), found)
                for each, found in zip(wanted, guesses, strict=True)
            }
        )
        for request_id in ended:
            self.drafter.forget(self.sequences[request_id])

    def cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)
        self.drafter.forget(self.sequences[request_id])

    def guesses(self) -> Iterator[tuple[Request, Sequence[int], Sequence[int]]]:
        """(request, its answer before, what was guessed to follow) of each guess that was made."""
        for each in self.rounds:
            for request_id, (num_tokens, found) in each.items():
                sequence = self.sequences[request_id]
                if found:
                    yield sequence.request, sequence.generated[:num_tokens], found

    def share_right(self) -> float:
        """Of the guesses that an answer got to."""
        right = reached = 0
        for request, before, found in self.guesses():
            said = self.sequences[request.id].generated[len(before) : len(before) + len(found)]
            reached += len(said)
            right += sum(guess == token for guess, token in zip(found, said, strict=False))
        assert reached > 100, "hardly anything was guessed"
        return right / reached


def make_watched(
    target: Path | str, draft: Path | str, *, limits: Mapping[str, object] = {}, **options: object
) -> Watched:
    engine = Engine(load(str(target), name="target"), EngineLimits(**limits))
    own = {name: options.pop(name) for name in ("most", "asks") if name in options}
    drafter = DraftModel(load(str(draft), name="draft"), engine.model, **{"max_bytes": ROOM, **options})
    return Watched(engine, drafter, **own)


def in_all_settings(make_request, texts: Sequence[str], **options: object) -> list[Request]:
    return [
        make_request(f"{number}", text, seed=100 + number, **SETTINGS[number % len(SETTINGS)], **options)
        for number, text in enumerate(texts)
    ]


TEXTS = (
    "hello there",
    LONG,
    "x",
    "another prompt, of some words",
    "short",
    LONG[:100],
    "one more",
    "and a last one",
)


def test_the_targets_twin_guesses_what_the_target_says_at_any_temperature(model_folder, make_request):
    watched = make_watched(model_folder, model_folder)
    watched.run(*in_all_settings(make_request, TEXTS, max_tokens=40))
    assert watched.share_right() > 0.995  # a near-tie may fall either way
    assert all(len(set(each.generated)) > 20 for each in watched.sequences.values())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["full", "sliding"])
def test_a_guess_is_what_the_draft_model_says_of_the_whole_text_whatever_it_guessed_before(
    name, every, lively, make_model, make_request, assert_drawn
):
    """Another model's guesses are wrong all the time, so its rows go back all the time. Asked for every third token,
    they go back to before the first wrong one of several."""
    folder = make_model(
        f"other-{name}", json.loads((lively.folder(name) / "config.json").read_text()), seed=7
    )
    watched = make_watched(lively.folder(name), folder)
    watched.asks = lambda sequence: len(sequence.generated) % every == 0
    texts = ("hello there", LONG[:300], "x")
    watched.run(
        *(make_request(f"{number}", text, max_tokens=24 * every) for number, text in enumerate(texts))
    )
    module, guessed = load(str(folder)).network.module, set()
    for request, before, found in watched.guesses():
        prompt = Prompt((*request.prompt.token_ids, *before))
        assert_drawn(replace(request, prompt=prompt), found, module)
        guessed.update(found)
    assert len(guessed) > 30
    assert watched.share_right() < 0.2


def test_rows_come_back_right_after_rounds_without_them(model_folder, make_request):
    """As where guesses are off for a row, and tried again now and then."""
    watched = make_watched(model_folder, model_folder)
    watched.asks = lambda sequence: (len(sequence.generated) // 12 + len(sequence.request.id)) % 2 == 0
    watched.run(*in_all_settings(make_request, TEXTS, max_tokens=60))
    assert watched.share_right() > 0.99


def test_who_comes_leaves_or_is_preempted_changes_nobodys_guesses(model_folder, make_request):
    watched = make_watched(model_folder, model_folder, limits={"max_rows": 4})
    requests = in_all_settings(make_request, [*TEXTS, *TEXTS], max_tokens=50)
    watched.add(*(replace(request, group="many rows") for request in requests[:6]))
    for number, request in enumerate(requests[6:], 6):
        watched.step()
        watched.step()
        watched.add(request)
        if number in (8, 11):
            watched.cancel(requests[number - 4].id)
    while watched.engine.has_work:
        watched.step()
    assert watched.engine.stats().num_preempted > 0
    assert watched.share_right() > 0.99


def test_a_long_prompt_is_taken_in_over_rounds_in_which_others_guess(model_folder, make_request):
    watched = make_watched(model_folder, model_folder, limits={"prefill_chunk_tokens": 4096})
    watched.run(make_request("long", LONG, max_tokens=30), make_request("short", "hello", max_tokens=30))
    with_long = [each for each in watched.rounds if "long" in each]
    before = [each for each in with_long if not each["long"][1]]
    assert len(before) == -(-(len(LONG) - 1) // CATCH_UP_TOKENS) - 1 == 2
    assert before == with_long[: len(before)]
    assert all(each["short"][1] for each in with_long if "short" in each)


def test_a_rounds_tokens_are_bounded_however_many_are_behind(model_folder, make_request):
    watched = make_watched(model_folder, model_folder, catch_up_tokens=64)
    texts = [LONG[number:] for number in range(8)]
    watched.add(*in_all_settings(make_request, texts, max_tokens=200))
    taken_in, known = [], {}
    while not (
        watched.rounds and len(watched.rounds[-1]) == 8 and all(f for _, f in watched.rounds[-1].values())
    ):
        watched.step()
        rows = [watched.drafter._rows.find(each) for each in watched.sequences.values()]
        now = {row.sequence.request.id: row.num_known for row in rows if row is not None}
        taken_in.append([now[each] - known.get(each, 0) for each in now if not watched.rounds[-1][each][1]])
        known = now
    assert len(taken_in) > 40
    assert max(sum(each) for each in taken_in) <= 64
    assert watched.engine.has_work


def test_rows_are_as_many_as_may_be_and_those_that_end_make_room(model_folder, make_request):
    watched = make_watched(model_folder, model_folder, max_rows=2)
    lengths = (10, 20, 30, 40)
    watched.run(
        *(make_request(f"{number}", max_tokens=count) for number, count in enumerate(lengths)),
    )
    served = [sum(bool(found) for _, found in each.values()) for each in watched.rounds]
    assert max(served) == 2
    asked = [len(each) for each in watched.rounds]
    assert served[:-1] == [min(each, 2) for each in asked[:-1]]
    assert watched.share_right() > 0.99


def test_rows_are_within_their_bytes_and_rows_that_nobody_asks_for_give_way(model_folder, make_request):
    a_row = 2 * 2 * 2 * 16 * 4 * 256  # layers, keys and values, heads, channels, bytes, positions
    watched = make_watched(model_folder, model_folder, max_bytes=2 * a_row)
    watched.add(*in_all_settings(make_request, ["one", "two", "three"], max_tokens=60))
    for turn in range(30):
        names = ("0", "1") if turn // 10 % 2 == 0 else ("2",)
        watched.asks = lambda sequence, names=names: sequence.request.id in names
        watched.step()
        assert watched.drafter.num_bytes <= 2 * a_row
        assert all(found for _, found in watched.rounds[-1].values())
    watched.asks = lambda sequence: True
    watched.step()
    assert sum(bool(found) for _, found in watched.rounds[-1].values()) == 2
    assert watched.drafter._rows.find(watched.sequences["1"]) is not None


def test_a_row_that_outgrows_the_bytes_gives_up_and_memory_comes_back_at_the_end(model_folder, make_request):
    a_row = 2 * 2 * 2 * 16 * 4 * 256
    watched = make_watched(model_folder, model_folder, max_bytes=a_row)
    watched.run(make_request("long", "x" * 200, max_tokens=100))
    known = [num_tokens for each in watched.rounds for num_tokens, found in each.values() if found]
    assert max(known) == 256 - 200 - watched.most
    assert watched.drafter._rows.num_bytes == 0
    watched.run(make_request("next", "hello there", max_tokens=40))
    assert watched.rounds[-2]["next"][1]


def test_what_was_computed_of_a_text_is_not_computed_again_for_its_tenant(model_folder, make_request):
    watched = make_watched(model_folder, model_folder, limits={"prefill_chunk_tokens": 4096})
    first = replace(make_request("first", LONG, max_tokens=24), tenant="us")
    again = replace(make_request("again", LONG + "and more", max_tokens=24), tenant="us")
    others = replace(make_request("others", LONG, max_tokens=24), tenant="them")
    for request in (first, again, others):
        watched.run(request)
    watched.drafter.clear("us")
    watched.run(replace(first, id="later"), replace(others, id="theirs"))
    unready = {
        name: sum(name in each and not each[name][1] for each in watched.rounds) for name in watched.sequences
    }
    assert unready == {"first": 2, "again": 0, "others": 2, "later": 2, "theirs": 0}
    assert watched.share_right() > 0.95
    assert 0 < watched.drafter.num_bytes <= ROOM
    watched.drafter.clear()
    assert watched.drafter.num_bytes == 0


def test_an_adapter_of_the_draft_model_guesses_for_the_targets_of_that_name(
    model_folder, make_adapter, make_request
):
    paths = {name: make_adapter(seed, rank=3 + seed) for seed, name in enumerate("ab")}
    watched = make_watched(model_folder, model_folder, adapters={"a": paths["a"], "b": paths["b"]})
    versions = [watched.engine.registry.load(name, paths[name]) for name in "ab"]
    requests = in_all_settings(make_request, TEXTS, max_tokens=40)
    adapters = [None, *versions, None, *versions, *versions]
    watched.run(*(replace(each, adapter=adapter) for each, adapter in zip(requests, adapters, strict=True)))
    assert watched.share_right() > 0.99
    without = make_watched(model_folder, model_folder)
    version = without.engine.registry.load("a", paths["a"])
    without.run(*(replace(each, adapter=version) for each in requests))
    assert without.share_right() < 0.5


def test_a_draft_adapter_stays_its_names_when_the_targets_version_changes(
    model_folder, make_adapter, make_request
):
    watched = make_watched(model_folder, model_folder, adapters={"a": make_adapter(1)})
    watched.engine.registry.load("a", make_adapter(2))
    version = watched.engine.registry.load("a", make_adapter(1), replace=True)
    assert version.number == 2
    watched.run(
        *(replace(each, adapter=version) for each in in_all_settings(make_request, TEXTS, max_tokens=40))
    )
    assert watched.share_right() > 0.99


def test_two_adapters_share_no_prefix(model_folder, make_adapter, make_request):
    adapters = {name: make_adapter(seed) for seed, name in enumerate("ab")}
    watched = make_watched(model_folder, model_folder, adapters=adapters)
    for name, path in adapters.items():
        version = watched.engine.registry.load(name, path)
        watched.run(make_request(name, LONG, max_tokens=60, adapter=version))
    assert watched.share_right() > 0.99


def test_nothing_is_guessed_behind_a_picture(model_folder, make_request):
    watched = make_watched(model_folder, model_folder)
    seen = make_request("seen")
    shown = Media("image", "a picture", np.arange(1, 3), {}, num_patches=1)
    sequence = SequenceState(replace(seen, prompt=replace(seen.prompt, media=(shown,))))
    text = SequenceState(make_request("text"))
    assert [len(each) for each in watched.drafter.propose([Wanted(sequence, 3), Wanted(text, 3)])] == [0, 3]
    watched.drafter.forget(sequence)


def test_nothing_is_guessed_beyond_what_the_draft_model_was_made_for(make_model, model_folder, make_request):
    config = json.loads((model_folder / "config.json").read_text())
    short = make_model("short-sighted", {**config, "max_position_embeddings": 40})
    watched = make_watched(model_folder, short)
    watched.run(make_request("it", "hello there", max_tokens=60))
    assert max(len(before) for _, before, _ in watched.guesses()) == 40 - len("hello there") - watched.most


def test_a_draft_model_may_pad_its_vocabulary_otherwise(make_model, model_folder, make_request):
    config = json.loads((model_folder / "config.json").read_text())
    for size in (259 + 61, 264):
        padded = make_model(f"padded-{size}", {**config, "vocab_size": size}, seed=3)
        watched = make_watched(model_folder, padded)
        watched.run(*in_all_settings(make_request, TEXTS[:4], max_tokens=30))
        assert max(max(found) for _, _, found in watched.guesses()) < 259


# What cannot be, at start


def with_tokenizer(folder: Path, target: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a model with another tokenizer."""
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))
    return target


def _swap(said: dict) -> None:
    vocabulary = said["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def _lose(said: dict) -> None:
    del said["model"]["vocab"]["z"]


def _demote(said: dict) -> None:
    said["added_tokens"][1]["special"] = False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swap, ["2 tokens have other ids ('b' is 67 and 68)"]),
        (_lose, ["1 tokens are only in the second", "'z'"]),
        (_demote, ["token 1, '<|im_start|>', is special only in the second"]),
    ],
)
def test_another_tokenizer_is_refused_with_what_differs(change, words, model_folder, model, tmp_path):
    other = with_tokenizer(model_folder, tmp_path / "other", change)
    with pytest.raises(ConfigError) as raised:
        DraftModel(load(str(other), name="draft"), model, max_bytes=ROOM)
    assert all(word in str(raised.value) for word in ["draft model draft", *words]), raised.value


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_a_draft_model_with_recurrent_state_is_refused_by_name(name, recurrent_folder, model):
    with pytest.raises(ConfigError, match=f"draft model {name} keeps recurrent state"):
        DraftModel(load(str(recurrent_folder(name)), name=name), model, max_bytes=ROOM)


def test_an_adapter_that_does_not_fit_the_draft_model_is_refused_by_both_names(
    make_model, model_folder, make_adapter, model
):
    config = json.loads((model_folder / "config.json").read_text())
    narrow = load(str(make_model("narrow", {**config, "hidden_size": 32})), name="narrow")
    with pytest.raises(AdapterError, match=r"for draft model narrow: adapter 'support' does not fit"):
        DraftModel(narrow, model, max_bytes=ROOM, adapters={"support": make_adapter(1)})


def test_too_little_memory_is_refused(model_folder, model, make_adapter):
    def draft() -> LoadedModel:
        return load(str(model_folder), name="draft")

    with pytest.raises(ConfigError, match="1000 bytes do not hold"):
        DraftModel(draft(), model, max_bytes=1000)
    with pytest.raises(LatheError, match="draft"):
        DraftModel(draft(), model, max_bytes=10_000, adapters={"a": make_adapter(1)})


@pytest.mark.parametrize("guesses", ["drawn", "likeliest", "learned"])
def test_the_twin_of_a_greedy_target_is_right_whichever_kind_it_guesses(guesses, model_folder, make_request):
    watched = make_watched(model_folder, model_folder, guesses=guesses)
    watched.run(*(make_request(f"{n}", text[:60], max_tokens=30) for n, text in enumerate(TEXTS)))
    assert watched.share_right() > 0.995


def test_of_a_target_that_is_surer_the_likeliest_tokens_are_guessed(make_model, model_folder, make_request):
    """The same model with a louder head: what it draws is most often the draft model's likeliest token."""
    config = json.loads((model_folder / "config.json").read_text())
    surer = make_model("surer", config, louder={"lm_head": 24})
    texts = [text[:60] for text in 3 * TEXTS]
    requests = [
        make_request(f"{n}", text, seed=n, temperature=1.0, max_tokens=40) for n, text in enumerate(texts)
    ]
    shares = {}
    for guesses in ("drawn", "likeliest", "learned"):
        watched = make_watched(surer, model_folder, guesses=guesses)
        watched.run(*requests)
        shares[guesses] = watched.share_right()
    assert shares["likeliest"] > shares["drawn"] + 0.2
    assert shares["learned"] > shares["drawn"] + 0.7 * (shares["likeliest"] - shares["drawn"])
