"""The embedded model that sees: adapters trained by the recipes, asked over HTTP by OpenAI's client with real PNGs,
beside the base and rows of text; and mlx-vlm's own code on one row alone, with merged weights, as what is right.

It is not marked as long, so that it starts when `test_demo.py` has trained one of the two."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from rich.console import Console
from vlm_families import Reference

import lathe
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime
from train.asking import held_out, recipe_of
from train.data.picture_chats import ORDINALS, describe, list_all
from train.data.shapes import COLOURS, data_uri, draw_move, draw_scene, film, paint
from train.run import run

ROOT = Path(lathe.__file__).parent
MODEL = ROOT / "data" / "shapes"
TASKS = {"shapes-vlm": "bins", "shapes-moves": "moves"}
"""Recipe, which is its adapter's name, → its rows."""
LARGE_PICTURES = ROOT.parent / "shared" / "data" / "images"
CLEAR = 0.01
"""Logits: two ways to one answer agree where the likeliest two tokens are further apart."""
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_runs):
    """The folder they are in, and name → summary of those that nobody had trained yet."""
    folder, summaries = tmp_path_factory.mktemp("pictures"), {}
    for name in TASKS:
        if (demo_runs / name).exists():
            shutil.copytree(demo_runs / name, folder / name)
        else:
            summaries[name] = run(recipe_of(ROOT, folder, name), console=Console(quiet=True))
    return folder, summaries


@pytest.fixture(scope="module")
def client(runs):
    folder, _ = runs
    adapters = [{"name": name, "path": str(folder / name)} for name in TASKS]
    runtime = Runtime.start(ServeConfig(model=str(MODEL), adapters=adapters))
    with (
        closing(runtime),
        serving(runtime) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def offline(runs):
    """model → mlx-vlm's own code with that adapter's weights merged."""
    folder, _ = runs
    return {"shapes": Reference(MODEL), **{name: Reference(MODEL, folder / name) for name in TASKS}}


def answer(
    client: openai.OpenAI, model: str, messages: list[dict[str, Any]], max_tokens: int = MAX_TOKENS
) -> str:
    made = client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0
    )
    return made.choices[0].message.content


def answers(
    client: openai.OpenAI, asked: list[tuple[str, list[dict[str, Any]]]], max_tokens: int = MAX_TOKENS
) -> list[str]:
    """All at once, so that they share batches."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda one: answer(client, *one, max_tokens), asked))


def as_pil(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same chat with the pictures decoded, as mlx-vlm takes it."""

    def part_of(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        file = io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
        return {"type": "image", "image": Image.open(file).convert("RGB")}

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part_of(part) for part in message["content"]]}
        for message in messages
    ]


def answer_offline(reference: Reference, messages: list[dict[str, Any]]) -> tuple[str, float]:
    """(the greedy answer, how far its likeliest two tokens are apart where they are nearest)"""
    row = reference.row(as_pil(messages))
    end = reference.tokenizer.eos_token_id
    tokens = reference.greedy(row, MAX_TOKENS)
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    logits = np.sort(np.array(reference.logits(row, tokens)), axis=-1)
    return reference.tokenizer.decode(tokens), float((logits[:, -1] - logits[:, -2]).min())


def picture(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


@pytest.mark.parametrize("name", TASKS)
def test_training_raises_exact_match_of_held_out_pictures(runs, name):
    folder, summaries = runs
    written = json.loads((folder / name / "summary.json").read_text())
    assert written["exact_match_before"] < 0.25
    assert written["exact_match"] > 0.9
    if name in summaries:
        assert written["exact_match"] == summaries[name].exact_match


def test_base_both_adapters_and_rows_of_text_in_one_batch_answer_as_each_does_alone_offline(client, offline):
    asked = []
    for name, data in TASKS.items():
        for row in held_out(ROOT, data)[:8]:
            asked += [(name, row.messages), ("shapes", row.messages)]
    asked += [
        (name, [{"role": "user", "content": text}]) for name in offline for text in ("Hello!", "Say: stay")
    ]
    random.Random(0).shuffle(asked)
    served = answers(client, asked)
    wanted = [answer_offline(offline[name], messages) for name, messages in asked]
    differing = [
        (asked[i][0], text, right)
        for i, (text, (right, gap)) in enumerate(zip(served, wanted, strict=True))
        if text != right and gap > CLEAR
    ]
    assert not differing
    assert sum(gap > CLEAR for _, gap in wanted) > 0.9 * len(wanted)
    assert len(set(served)) > 15


@pytest.mark.parametrize("name", TASKS)
def test_held_out_pictures_are_answered_over_http_as_exactly_as_after_training(client, runs, name):
    rows = held_out(ROOT, TASKS[name])[:40]
    served = answers(client, [(name, row.messages) for row in rows])
    assert sum(row.is_met_by(text) for row, text in zip(rows, served, strict=True)) > 0.9 * len(rows)


@pytest.mark.parametrize("number", [3, 5])
def test_which_of_several_plain_pictures_is_second_at_once_and_one_a_turn(client, offline, number):
    """mlx-vlm 1084: only the last of several pictures was used; 833: pictures of earlier turns were not."""
    asked, wanted = [], []
    for seed in range(4):
        colours = random.Random(seed).sample(list(COLOURS), number)
        plain = [picture(Image.new("RGB", (64, 48), COLOURS[colour])) for colour in colours]
        turns = []
        for colour, one in zip(colours, plain, strict=True):
            turns += [user(one, "What colour is it?"), {"role": "assistant", "content": colour}]
        for ordinal, colour in zip(ORDINALS, colours, strict=False):
            question = f"Which is {ordinal}?"
            asked += [[user(*plain, question)], [*turns, user(question)]]
            wanted += [f"the {colour} one"] * 2
    served = answers(client, [("shapes", messages) for messages in asked])
    differing = [pair for pair in zip(served, wanted, strict=True) if pair[0] != pair[1]]
    assert len(differing) <= 0.1 * len(asked), differing
    alone = [answer_offline(offline["shapes"], messages) for messages in asked[: 4 * number]]  # of two seeds
    assert [
        pair for pair in zip(served, alone, strict=False) if pair[0] != pair[1][0] and pair[1][1] > CLEAR
    ] == []


def test_several_shapes_are_listed_in_their_order_and_told_apart_by_number(client):
    """Pictures that differ in more than a colour, and questions about one of them; its place is what it errs in."""
    rng = random.Random(1)
    lists, listed, asked, wanted = [], [], [], []
    for _ in range(8):
        scenes = [draw_scene(rng) for _ in range(rng.randint(2, 5))]
        shown = [picture(paint(rng, scene)) for scene in scenes]
        lists.append([user(*shown, "List the pictures.")])
        listed.append(list_all(scenes))
        for ordinal, scene in zip(ORDINALS, scenes, strict=False):
            asked.append([user(*shown, f"What is in the {ordinal} picture?")])
            wanted.append(describe(scene))
    served = answers(client, [("shapes", messages) for messages in lists + asked], max_tokens=64)
    assert [text for text in served[: len(lists)] if text not in listed] == []
    described = list(zip(served[len(lists) :], wanted, strict=True))
    what = [pair for pair in described if pair[0].split(" at ")[0] != pair[1].split(" at ")[0]]
    assert len(what) <= 0.1 * len(asked), what
    where = [pair for pair in described if pair[0] != pair[1]]
    assert len(where) <= 0.4 * len(asked), where


def test_a_clip_s_colour_is_told_and_where_it_begins_and_ends_far_more_often_than_by_chance(client):
    """The same frames in the other order are the other way. Chance is a quarter; it gets three fifths right."""
    rng = random.Random(2)
    asked, moves = [], []
    for _ in range(20):
        move = draw_move(rng)
        frames = [data_uri(frame) for frame in film(rng, move)]
        back = replace(move, begin=move.end, end=move.begin)
        for one, shown in ((move, frames), (back, frames[::-1])):
            asked.append([user({"type": "video", "video": shown}, "What happens?")])
            moves.append(one)
    served = answers(client, [("shapes", messages) for messages in asked])
    told = list(zip(served, moves, strict=True))
    assert sum(f" {move.colour} " in text for text, move in told) >= 0.9 * len(told)
    begun = sum(f" from the {move.begin} " in text for text, move in told)
    ended = sum(text.endswith(f" to the {move.end}") for text, move in told)
    assert begun + ended >= 0.5 * 2 * len(told)


@pytest.mark.skipif(not LARGE_PICTURES.is_dir(), reason="no folder of large pictures beside this checkout")
def test_photographs_and_charts_are_taken_and_answered(client):
    files = sorted(path for path in LARGE_PICTURES.iterdir() if path.suffix in (".jpg", ".png"))
    assert files
    asked = [
        [
            user(
                {"type": "image_url", "image_url": {"url": path.absolute().as_uri()}},
                "Describe the picture.",
            )
        ]
        for path in files
    ]
    for text in answers(client, [("shapes", messages) for messages in asked]):
        assert text.strip()


def test_a_picture_that_is_none_is_refused_and_the_server_goes_on(client):
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.content\.0"):
        answer(client, "shapes", [user(broken, "What colour is it?")])
    assert httpx.get(f"{str(client.base_url).removesuffix('/v1/')}/health").status_code == 200
