"""The world of tickets: seeded, disjoint, and laid out so that an adapter can learn what the base cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import serve as serve  # before mlx: it brings a real BLAS
from serve.model.loading import load_tokenizer
from train.data.tickets import ROUTE, SEED, write_all
from train.data.tokenizer_bpe import contents, train_tokenizer
from train.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "data" / "tickets"
ROUTING = ROOT / "data" / "routing"
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tickets")
    write_all(out)
    return out


def rows(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def letters(path: Path) -> set[str]:
    """The ticket texts of a file, without what is asked about them."""
    lines = (line for row in rows(path) for message in row for line in message["content"].splitlines())
    return {line.removeprefix("Ticket: ") for line in lines if line.startswith("Ticket: ")}


def answers(path: Path) -> list[str]:
    return [m["content"] for row in rows(path) for m in row if m["role"] == "assistant"]


def test_a_seed_gives_the_same_bytes_and_another_seed_others(made, tmp_path):
    write_all(tmp_path / "again", SEED)
    write_all(tmp_path / "other", SEED + 1)
    for path in sorted(made.rglob("*.jsonl")):
        name = path.relative_to(made)
        assert path.read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_committed_routing_rows_are_what_the_generator_makes(made, split):
    assert (ROUTING / f"{split}.jsonl").read_bytes() == (made / "routing" / f"{split}.jsonl").read_bytes()


def test_committed_tokenizer_is_what_the_generator_s_rows_make(made, tmp_path):
    train_tokenizer(contents(made / "base" / "train.jsonl")).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes()


def test_no_ticket_stands_in_two_files(made):
    seen = [letters(path) for path in sorted(made.rglob("*.jsonl"))]
    assert all(seen), "every file holds tickets"
    assert len(set().union(*seen)) == sum(len(texts) for texts in seen)


def test_every_token_of_a_routing_answer_was_a_target_in_pretraining(made):
    tokenizer = load_tokenizer(str(MODEL))

    def tokens(path: Path) -> set[int]:
        return {token for text in answers(path) for token in tokenizer.encode(text)}

    targets = tokens(made / "base" / "train.jsonl")
    for split in SPLITS:
        assert tokens(made / "routing" / f"{split}.jsonl") <= targets


def test_pretraining_never_asks_for_routing_nor_ties_a_team_to_a_ticket(made):
    for row in rows(made / "base" / "train.jsonl"):
        text = "\n".join(message["content"] for message in row)
        assert ROUTE not in text
        assert not ("Ticket: " in text and '"team"' in text)


def test_each_routing_answer_follows_from_its_ticket(made):
    for user, assistant in rows(made / "routing" / "test.jsonl"):
        answer = json.loads(assistant["content"])
        assert list(answer) == ["team", "product", "priority", "customer"]
        assert answer["product"] in user["content"]
        assert answer["customer"] in user["content"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_in_recipes_loads(path):
    assert load_recipe(path).model


def test_the_embedded_model_is_small_and_opens_in_plain_mlx_lm():
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import load

    model, tokenizer = load(str(MODEL))
    weights = dict(tree_flatten(model.parameters()))
    assert (MODEL / "model.safetensors").stat().st_size < 3_000_000
    assert {tensor.dtype for tensor in weights.values()} == {mx.float16}
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert type(tokenizer.detokenizer).__name__ == "BPEStreamingDetokenizer"


def test_the_embedded_model_answers_its_own_tasks_but_cannot_route(made):
    own = [row for row in rows(made / "base" / "test.jsonl") if "Ticket: " in row[0]["content"]][:30]
    routing = rows(made / "routing" / "test.jsonl")[:10]
    assert share_right(own) >= 0.8
    assert share_right(routing) <= 0.1


def share_right(chats: list[list[dict[str, str]]]) -> float:
    """Share of chats whose first answer plain mlx-lm gives word for word, greedily."""
    import mlx.core as mx
    from mlx_lm import batch_generate, load

    model, tokenizer = load(str(MODEL))
    model.set_dtype(mx.float32)  # CPUs multiply float16 sixty times slower
    firsts = [next(i for i, m in enumerate(chat) if m["role"] == "assistant") for chat in chats]
    prompts = [
        tokenizer.apply_chat_template(chat[:first], add_generation_prompt=True, return_dict=False)
        for chat, first in zip(chats, firsts, strict=True)
    ]
    texts = batch_generate(model, tokenizer, prompts, max_tokens=64).texts
    wanted = [chat[first]["content"] for chat, first in zip(chats, firsts, strict=True)]
    return sum(text == want for text, want in zip(texts, wanted, strict=True)) / len(chats)
