"""Answers come from the serving engine, with the layers of training in place."""

from __future__ import annotations

from datetime import date

import mlx.core as mx
import mlx.optimizers as mlx_optim
import mlx_lm
import pytest

from serve.adapters.layers.lora import LoRALinear
from serve.errors import DataError
from serve.model.template import ChatTemplate
from train.adapters.adapt import AdapterSettings, add_lora
from train.data.batches import collate
from train.data.example import Example
from train.data.rules import TokenRules
from train.data.tokens import tokenize
from train.loop.step import Stepper, StepSettings
from train.objectives.sft import SFT
from train.recipe.recipe import Recipe
from train.watch.exact_match import exact_match, questions_of


def conversation(*turns: str, line: int = 1) -> Example:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))
    return Example("rows.jsonl", line, messages=messages)


EXAMPLES = [
    conversation("red cat?", "cat, red", line=1),
    conversation("hello", "hi", "blue dog?", "dog, blue", line=2),
    conversation("green owl?", "owl, green", line=3),
]


def test_a_question_is_everything_before_the_last_assistant_turn(model):
    template = ChatTemplate(model.tokenizer)
    trailing = conversation("a", " b ", "c")
    questions = questions_of([*EXAMPLES, trailing, Example("t", 9, text="words")], template)
    assert [question.answer for question in questions] == ["cat, red", "dog, blue", "owl, green", "b"]
    said = model.tokenizer.decode(list(questions[1].prompt.token_ids))
    assert said.endswith("<|im_start|>user\nblue dog?<|im_end|>\n<|im_start|>assistant\n")
    assert "dog, blue" not in said


def test_rows_learned_by_heart_are_answered_exactly_by_the_engine_while_training(model, model_folder):
    template = ChatTemplate(model.tokenizer)
    assert exact_match(model, template, EXAMPLES, max_tokens=16).num_exact == 0
    mx.random.seed(0)
    add_lora(model.network, AdapterSettings(rank=16, scale=4.0, dropout=0.02))
    recipe = Recipe.model_validate({"model": "m", "data": "d"})
    rows, _ = tokenize(EXAMPLES, template, TokenRules.of_recipe(recipe, date(2026, 1, 1)))
    batch = collate(rows, range(len(rows)))
    stepper = Stepper(model.network, mlx_optim.Adam(4e-3), SFT(), StepSettings(max_grad_norm=1.0))
    module = model.network.module.train()
    answers = None
    for step in range(400):
        stepper.step([batch], step)
        if step % 50 == 49:
            answers = exact_match(model, template, EXAMPLES, max_tokens=16)
            assert module.training
            if answers.exact_match == 1.0:
                break
    assert answers.exact_match == 1.0
    assert answers.texts == ("cat, red", "dog, blue", "owl, green")
    assert isinstance(model.network.layers[0].self_attn.q_proj, LoRALinear)
    module.eval()
    question = questions_of(EXAMPLES, template)[1]
    assert (
        mlx_lm.generate(module, model.tokenizer, list(question.prompt.token_ids), max_tokens=16)
        == "dog, blue"
    )


def test_rows_without_answers_are_an_error_not_a_hundred_percent(model):
    with pytest.raises(DataError, match="nothing to answer"):
        exact_match(model, ChatTemplate(model.tokenizer), [Example("t", 1, text="words")])


def test_only_the_first_rows_are_asked(model):
    assert len(exact_match(model, ChatTemplate(model.tokenizer), EXAMPLES, max_tokens=2, rows=2).texts) == 2
