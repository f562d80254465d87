"""Chat templates of models with eyes, which may lie beside the tokenizer's."""

from __future__ import annotations

import json
import shutil

import pytest

from serve.errors import ModelError
from serve.model.expansion import Expansion
from serve.model.family_template import PALIGEMMA
from serve.model.loading import load_tokenizer
from serve.model.template import ChatTemplate

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
PICTURE = Expansion("image", "<image>", "<image>", "<image><image><|bos|>")
BESIDE = "{% for m in messages %}beside {{ m.content }}{% endfor %}"


@pytest.fixture
def folder(vlm_folder, tmp_path):
    """A paligemma whose tokenizer has no template, as Google's."""
    copy = tmp_path / "paligemma"
    shutil.copytree(vlm_folder("paligemma"), copy)
    assert not (copy / "chat_template.jinja").exists()
    return copy


def shown(folder):
    tokenizer = load_tokenizer(str(folder))
    template = ChatTemplate(tokenizer)
    return tokenizer.decode(template.render([{"role": "user", "content": "what?"}]))


def test_a_family_without_a_template_is_asked_as_it_was_trained(folder):
    template = ChatTemplate(load_tokenizer(str(folder)))
    assert template.write(ASKED, media=[PICTURE]).text == "<image><image><|bos|>what?\n"
    assert template.write([{"role": "user", "content": "what?"}]).text == "<|bos|>what?\n"
    answered = [*ASKED, {"role": "assistant", "content": "a cat"}]
    (row,) = template.supervise(answered, media=[PICTURE])
    learned = [row.token_ids[i] for start, stop in row.spans for i in range(start, stop)]
    assert template.tokenizer.decode(learned) == "a cat<|im_end|>"


def test_a_template_in_a_file_of_its_own_goes_before_the_tokenizers(folder):
    (folder / "processor_config.json").write_text(json.dumps({"chat_template": BESIDE}))
    assert shown(folder) == "beside what?"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PALIGEMMA}))
    assert shown(folder) == "<|bos|>what?\n"


def test_a_template_file_that_is_broken_is_named(folder):
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match=r"chat_template\.json"):
        load_tokenizer(str(folder))
