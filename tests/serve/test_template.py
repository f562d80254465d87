"""Laws of the prompt renderer, on templates in the style of real families and a tiny byte-level BPE tokenizer."""

from __future__ import annotations

import random

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from serve.errors import RequestError
from serve.model.template import ChatTemplate

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]"),
]
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set words = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}{% if '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}<|im_start|>assistant\n<think>\n{{ thought }}\n</think>\n\n{{ words }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\n{{ words }}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ words }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}"
    "{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
THINK_OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Where is my order?"},
    {"role": "assistant", "content": "It left on Monday.\nAnything else?"},
    {"role": "user", "content": "Größe ändern: 42 → 43 🙂"},
    {"role": "assistant", "content": "Erledigt. 🙂"},
]
FAMILIES = {
    "chatml": (CHATML, "<|im_end|>", TURNS),
    "chatml with markers": (CHATML_MARKED, "<|im_end|>", TURNS),
    "chatml and system": (CHATML, "<|im_end|>", [{"role": "system", "content": "Be brief."}, *TURNS]),
    "llama3": (LLAMA3, "<|eot_id|>", TURNS),
    "gemma": (GEMMA, "<end_of_turn>", TURNS),
    "mistral": (MISTRAL, "</s>", TURNS),
}


@pytest.fixture(scope="module")
def bpe() -> str:
    """tokenizer.json of a small byte-level BPE, with merges over words and newlines."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"{m['role']}:\n{m['content']}\n\n" for m in TURNS] * 4 + [
        "user\n",
        "assistant\n",
        "\n\n",
        "\n\nIt",
    ] * 8
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


@pytest.fixture
def make_tokenizer(bpe):
    def make(template: str | None, eos: str = "<|im_end|>", eos_is_known: bool = True) -> TokenizerWrapper:
        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe), chat_template=template)
        if eos_is_known:
            fast.eos_token = eos
        return TokenizerWrapper(fast)

    return make


def supervised_text(tokenizer: TokenizerWrapper, sequence) -> list[str]:
    return [tokenizer.decode(list(sequence.token_ids[start:stop])) for start, stop in sequence.spans]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_assistant_turn_is_supervised_through_its_end_token_and_nothing_else(family, make_tokenizer):
    template, eos, messages = FAMILIES[family]
    tokenizer = make_tokenizer(template, eos)
    (sequence,) = ChatTemplate(tokenizer).supervise(messages)
    space = " " if family == "mistral" else ""
    answers = [space + m["content"] + eos for m in messages if m["role"] == "assistant"]
    assert supervised_text(tokenizer, sequence) == answers


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_as_served_and_answer_are_the_training_sequence(family, make_tokenizer):
    template, eos, messages = FAMILIES[family]
    chat = ChatTemplate(make_tokenizer(template, eos))
    (sequence,) = chat.supervise(messages)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(sequence.spans) == len(turns)
    for i, (start, _) in zip(turns, sequence.spans, strict=True):
        assert sequence.token_ids[:start] == chat.render(messages[:i])


@pytest.mark.parametrize("family", FAMILIES)
def test_render_gives_the_tokens_that_the_tokenizer_itself_gives(family, make_tokenizer):
    template, eos, messages = FAMILIES[family]
    tokenizer = make_tokenizer(template, eos)
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)
        assert ChatTemplate(tokenizer).render(messages, add_generation_prompt=prompt) == tuple(expected)


class WithoutOffsets(PreTrainedTokenizerFast):
    """Answers as tokenizers written in Python do: ids and no offsets."""

    def __call__(self, *args, **kwargs):
        return BatchEncoding({"input_ids": super().__call__(*args, **kwargs)["input_ids"]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_without_offsets_gives_the_same_sequences(family, bpe, make_tokenizer):
    template, eos, messages = FAMILIES[family]
    slow = WithoutOffsets(tokenizer_object=Tokenizer.from_str(bpe), chat_template=template, eos_token=eos)
    for choice in ("turn", "none"):
        expected = ChatTemplate(make_tokenizer(template, eos)).supervise(messages, train_on_eos=choice)
        assert ChatTemplate(TokenizerWrapper(slow)).supervise(messages, train_on_eos=choice) == expected


def test_an_end_token_the_tokenizer_does_not_call_eos_is_still_supervised(make_tokenizer):
    tokenizer = make_tokenizer(GEMMA, eos_is_known=False)
    (sequence,) = ChatTemplate(tokenizer).supervise(TURNS)
    assert all(text.endswith("<end_of_turn>") for text in supervised_text(tokenizer, sequence))


def test_a_template_that_rewrites_history_gives_one_sequence_a_turn_as_served(make_tokenizer):
    tokenizer = make_tokenizer(QWEN3)
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
        {"role": "user", "content": "and 3+3?"},
        {"role": "assistant", "content": "6"},
    ]
    chat = ChatTemplate(tokenizer)
    first, second = chat.supervise(messages)
    assert supervised_text(tokenizer, first) == ["<think>\neasy\n</think>\n\n4<|im_end|>"]
    assert supervised_text(tokenizer, second) == ["<think>\n\n</think>\n\n6<|im_end|>"]
    assert first.token_ids[: first.spans[0][0]] == chat.render(messages[:1])
    assert second.token_ids[: second.spans[0][0]] == chat.render(messages[:3])
    assert "easy" not in tokenizer.decode(list(second.token_ids))


def test_an_answer_that_would_melt_into_its_prompt_is_tokenized_as_served(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN)
    chat = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nIt left"}]
    prompt, melted = chat.render(messages[:1]), chat.render(messages, add_generation_prompt=False)
    assert melted[: len(prompt)] != prompt  # the tokenizer joins the two newlines: what this test is about
    (sequence,) = chat.supervise(messages)
    assert sequence.token_ids[: sequence.spans[0][0]] == prompt
    assert tokenizer.decode(list(sequence.token_ids)) == tokenizer.decode(list(melted))


def test_without_an_end_token_the_newlines_after_a_turn_are_not_supervised(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}]
    (sequence,) = ChatTemplate(tokenizer).supervise(messages)
    assert supervised_text(tokenizer, sequence) == ["Hello you"]


def test_what_a_template_marks_as_generated_is_what_is_supervised(make_tokenizer):
    tokenizer = make_tokenizer(CHATML_MARKED.replace("{% generation %}", "(a note) {% generation %}"))
    (sequence,) = ChatTemplate(tokenizer).supervise(TURNS)
    assert "(a note) It left" in tokenizer.decode(list(sequence.token_ids))
    assert supervised_text(tokenizer, sequence)[0] == "It left on Monday.\nAnything else?<|im_end|>"


def test_train_on_eos_chooses_which_end_tokens_count(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    ends = {}
    for choice in ("turn", "last", "none"):
        (sequence,) = ChatTemplate(tokenizer).supervise(TURNS, train_on_eos=choice)
        ends[choice] = [text.endswith("<|im_end|>") for text in supervised_text(tokenizer, sequence)]
    assert ends == {"turn": [True, True], "last": [False, True], "none": [False, False]}


def test_other_roles_are_supervised_without_their_headers(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    (sequence,) = ChatTemplate(tokenizer).supervise(TURNS, roles=("user", "assistant"))
    assert supervised_text(tokenizer, sequence) == [m["content"] + "<|im_end|>" for m in TURNS]


def test_a_conversation_without_such_a_turn_gives_no_sequence(make_tokenizer):
    assert ChatTemplate(make_tokenizer(CHATML)).supervise(TURNS[:1]) == []


def test_an_answer_that_quotes_the_end_token_is_supervised_to_its_real_end(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    messages = [TURNS[0], {"role": "assistant", "content": "it is <|im_end|> and then"}, *TURNS[2:]]
    (sequence,) = ChatTemplate(tokenizer).supervise(messages)
    assert supervised_text(tokenizer, sequence)[0] == "it is <|im_end|> and then<|im_end|>"


def test_a_prompt_that_the_answer_does_not_continue_is_refused_not_trained(make_tokenizer):
    with pytest.raises(RequestError, match="serving would never see"):
        ChatTemplate(make_tokenizer(THINK_OPENS)).supervise(TURNS[:2])


def test_what_the_template_refuses_is_a_request_error_with_its_words(make_tokenizer):
    chat = ChatTemplate(make_tokenizer(GEMMA, "<end_of_turn>"))
    with pytest.raises(RequestError, match="System role not supported") as caught:
        chat.render([{"role": "system", "content": "x"}])
    assert caught.value.param == "messages"


def test_no_template_and_no_messages_are_request_errors(make_tokenizer):
    bare = ChatTemplate(make_tokenizer(None))
    assert not bare.exists
    with pytest.raises(RequestError, match="no chat template"):
        bare.render(TURNS)
    with pytest.raises(RequestError, match="at least one message"):
        ChatTemplate(make_tokenizer(CHATML)).render([])


def test_parts_null_content_and_json_arguments_render_as_their_plain_forms(make_tokenizer):
    chat = ChatTemplate(
        make_tokenizer(
            "{% for m in messages %}{{ m.content }}|{% for c in m.tool_calls or [] %}"
            "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
        )
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    odd = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    odd.append({"role": "assistant", "content": None, "tool_calls": [call]})
    text = chat._tokenizer.decode(list(chat.render(odd)))
    assert text == 'ab||{"a": 1}'
    with pytest.raises(RequestError, match="image_url"):
        chat.render([{"role": "user", "content": [{"type": "image_url"}]}])


def test_hash_names_the_template(make_tokenizer):
    same, again = ChatTemplate(make_tokenizer(CHATML)), ChatTemplate(make_tokenizer(CHATML))
    assert same.hash == again.hash != ChatTemplate(make_tokenizer(LLAMA3)).hash


def test_continuing_a_final_message_leaves_it_open(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    ids = ChatTemplate(tokenizer).render(TURNS[:2], add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(list(ids)).endswith("Anything else?")


TRIMS = LLAMA3.replace("<|begin_of_text|>", "").replace("<|eot_id|>", "<|im_end|>")
PREFILLED = {
    "chatml": CHATML,
    "marked": CHATML_MARKED,
    "trims": TRIMS,
    "plain": PLAIN,
    "gemma": GEMMA,
    "mistral": MISTRAL,
}
SAID = (
    "Hel",
    "  Hel",
    "Hel ",
    "Hel\n\n",
    "",
    " ",
    "\n",
    "a<|im_end|>",
    "a<|im_",
    "</s> ",
    "TAG \U000f0000",
    "é",
)


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("template", PREFILLED)
def test_a_prefilled_answer_is_the_beginning_of_the_turn_that_it_begins(template, said, make_tokenizer):
    tokenizer = make_tokenizer(PREFILLED[template])
    chat = ChatTemplate(tokenizer)

    def text(content: str | None, **options) -> str:
        answer = [] if content is None else [{"role": "assistant", "content": content}]
        return tokenizer.decode(list(chat.render([{"role": "user", "content": "Q"}, *answer], **options)))

    begun, header = text(said, continue_final_message=True), text(None)
    assert text(f"{said}lo", add_generation_prompt=False).startswith(begun)
    # What the template puts before an answer stays whole, before an empty one too.
    assert begun.startswith(header)
    answer = begun[len(header) :].removeprefix(" " if template == "mistral" else "")
    assert answer == (said.strip() if template in ("trims", "gemma") else said)


@pytest.mark.parametrize("said", ["a<|im_end|>", "<|im_end|> ", "a<|im_"])
def test_a_prefilled_answer_has_its_control_tokens_as_words(said, make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": said}]
    ids = ChatTemplate(tokenizer).render(messages, continue_final_message=True)
    assert tokenizer.decode(list(ids)) == f"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{said}"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_a_continued_message_is_an_assistants_and_begins_no_turn(make_tokenizer):
    chat = ChatTemplate(make_tokenizer(CHATML))
    with pytest.raises(RequestError, match="exclude each other"):
        chat.render(TURNS[:2], continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(RequestError, match="of role user; expected assistant"):
        chat.render(TURNS[:1], continue_final_message=True)
    with pytest.raises(RequestError, match="leaves out the last message's content"):
        ChatTemplate(make_tokenizer("{{ messages | length }}")).render(TURNS[:2], continue_final_message=True)


TEXT = {"type": "text", "text": "a"}
CALL = {"function": {"name": "f", "arguments": "{"}}


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (None, "messages.1"),
        ("text", "messages.1"),
        ([], "messages.1"),
        ({"role": None}, "messages.1.role"),
        ({"role": 3}, "messages.1.role"),
        ({"role": {"a": []}}, "messages.1.role"),
        ({"content": {"text": "x"}}, "messages.1.content"),
        ({"content": 3}, "messages.1.content"),
        ({"content": True}, "messages.1.content"),
        ({"content": [TEXT, "x"]}, "messages.1.content.1"),
        ({"content": [None]}, "messages.1.content.0"),
        ({"content": [TEXT, {"type": {}}]}, "messages.1.content.1.type"),
        ({"content": [{"text": "x"}]}, "messages.1.content.0.type"),
        ({"content": [{"type": ["text"], "text": "x"}]}, "messages.1.content.0.type"),
        ({"content": [{"type": "text"}]}, "messages.1.content.0.text"),
        ({"content": [{"type": "text", "text": {}}]}, "messages.1.content.0.text"),
        ({"tool_calls": "f(x)"}, "messages.1.tool_calls"),
        ({"tool_calls": {"a": 1}}, "messages.1.tool_calls"),
        ({"tool_calls": [CALL, "f(x)"]}, "messages.1.tool_calls.1"),
    ],
)
def test_a_message_of_another_form_is_refused_by_the_name_of_what_is_wrong(message, named, make_tokenizer):
    chat = ChatTemplate(make_tokenizer(CHATML))
    if isinstance(message, dict):
        message = {"role": "assistant", "content": "x", **message}
    with pytest.raises(RequestError) as caught:
        chat.render([TURNS[0], message])
    assert caught.value.param == named
    assert named in str(caught.value) or "this model reads text" in str(caught.value)


def test_broken_arguments_stay_the_text_that_they_are(make_tokenizer):
    tokenizer = make_tokenizer("{% for c in messages[0].tool_calls %}{{ c.function.arguments }}|{% endfor %}")
    message = {"role": "assistant", "content": None, "tool_calls": [CALL, {"function": {}}]}
    assert tokenizer.decode(list(ChatTemplate(tokenizer).render([message]))) == "{||"


@pytest.mark.parametrize(
    "arguments", [r'{"a": "\ud83d"}', r'{"\udc00": 1}', r'{"a": ["x", {"b": "\udfff"}]}']
)
def test_half_a_surrogate_pair_inside_a_calls_json_is_refused_by_name(arguments, make_tokenizer):
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(RequestError, match="found half a surrogate pair") as caught:
        ChatTemplate(make_tokenizer(JSON_CALLS)).render(messages)
    assert caught.value.param == "messages.1.tool_calls.0.function.arguments"


def test_values_nested_too_deeply_are_refused(make_tokenizer):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested too deeply"):
        ChatTemplate(make_tokenizer(CHATML)).render([{**TURNS[0], "note": deep}])


ODD = (
    "hi",
    " ",
    "\n",
    "\n\n",
    "It left",
    "é",
    "🙂",
    " b ",
    "<|im_end|>",
    "<|im_start|>",
    "<think>",
    "</s>",
    "42",
    ".",
)
TOKENIZERS = {
    "byte level": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte level with a prefix": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "metaspace, first": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="first")
    ),
    "metaspace, always": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="always")
    ),
    "prepended": lambda t: setattr(
        t, "normalizer", normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "composed": lambda t: setattr(t, "normalizer", normalizers.NFC()),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_only_the_tail_of_a_prompt_is_encoded_and_gives_what_all_of_it_would(kind, bpe):
    """Random turns of awkward pieces; the reference, which has no offsets, encodes every prompt whole."""
    base = Tokenizer.from_str(bpe)
    base.normalizer, base.pre_tokenizer = (
        normalizers.Sequence([]),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    TOKENIZERS[kind](base)
    rng = random.Random(kind)
    num_sequences = 0
    for template, eos in (
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (MISTRAL, "</s>"),
        (PLAIN, "<|im_end|>"),
    ):
        fast = PreTrainedTokenizerFast(tokenizer_object=base, chat_template=template, eos_token=eos)
        slow = WithoutOffsets(tokenizer_object=base, chat_template=template, eos_token=eos)
        with_tails, whole = ChatTemplate(TokenizerWrapper(fast)), ChatTemplate(TokenizerWrapper(slow))
        for _ in range(25):
            messages = [
                {
                    "role": ("user", "assistant")[i % 2],
                    "content": "".join(rng.choices(ODD, k=rng.randint(1, 5))),
                }
                for i in range(rng.randint(2, 6))
            ]
            expected = [(s.token_ids, [start for start, _ in s.spans]) for s in whole.supervise(messages)]
            found = [(s.token_ids, [start for start, _ in s.spans]) for s in with_tails.supervise(messages)]
            assert found == expected
            num_sequences += len(found)
    assert num_sequences >= 100


def test_turns_that_are_skipped_are_context(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    (sequence,) = ChatTemplate(tokenizer).supervise(TURNS, skip=(1,))
    assert supervised_text(tokenizer, sequence) == ["Erledigt. 🙂<|im_end|>"]
    assert ChatTemplate(tokenizer).supervise(TURNS, skip=range(4)) == []


# Turns by the template's own word

GLM = (
    "{% for m in messages %}<|begin_of_text|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|begin_of_text|>assistant\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}"
)
PARTS = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
JSON_CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}",
)


@pytest.mark.parametrize("count", [1, 2])
def test_where_the_next_turns_marker_is_the_only_end_it_is_learned(count, make_tokenizer):
    tokenizer = make_tokenizer(GLM, eos="</s>")
    (sequence,) = ChatTemplate(tokenizer).supervise(TURNS[: 2 * count])
    answers = [m["content"] + "<|begin_of_text|>" for m in TURNS[: 2 * count] if m["role"] == "assistant"]
    assert supervised_text(tokenizer, sequence) == answers


def test_a_turn_ends_at_its_first_end_token_and_turns_are_one_sequence(make_tokenizer):
    tokenizer = make_tokenizer(PHI3, eos="</s>")
    (sequence,) = ChatTemplate(tokenizer).supervise(TURNS)
    assert supervised_text(tokenizer, sequence) == [TURNS[i]["content"] + "<|im_end|>" for i in (1, 3)]


@pytest.mark.parametrize("content", ["user", "i", "u", "assistant", "s", "<|im_start|>", "m"])
@pytest.mark.parametrize("first", ["user", "assistant"])
def test_a_turns_words_are_never_looked_for_in_its_header(content, first, make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    other = "assistant" if first == "user" else "user"
    messages = [{"role": first, "content": content}, {"role": other, "content": content}]
    (sequence,) = ChatTemplate(tokenizer).supervise(messages, roles=("user", "assistant"))
    assert supervised_text(tokenizer, sequence) == [f"{content}<|im_end|>"] * 2
    assert sequence.token_ids == ChatTemplate(tokenizer).render(messages, add_generation_prompt=False)


def test_a_first_turn_that_is_refused_alone_is_rendered_with_its_conversation(make_tokenizer):
    needs_user = (
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
        "{{ raise_exception('No user query') }}{% endif %}" + CHATML
    )
    tokenizer = make_tokenizer(needs_user)
    messages = [{"role": "assistant", "content": "Hello there."}, *TURNS[:2]]
    (sequence,) = ChatTemplate(tokenizer).supervise(messages)
    answers = ["Hello there.<|im_end|>", TURNS[1]["content"] + "<|im_end|>"]
    assert supervised_text(tokenizer, sequence) == answers


BLOCKS = {
    "two blocks a turn": CHATML_MARKED.replace(
        "{{ m.content }}<|im_end|>{% endgeneration %}",
        "{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}",
    ),
    "the header inside": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
        "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "the end outside": CHATML_MARKED.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_all_marks_count_but_never_a_header_and_always_the_end(kind, make_tokenizer):
    tokenizer = make_tokenizer(BLOCKS[kind])
    (sequence,) = ChatTemplate(tokenizer).supervise(TURNS)
    (plain,) = ChatTemplate(make_tokenizer(CHATML)).supervise(TURNS)
    assert "".join(supervised_text(tokenizer, sequence)) == "".join(supervised_text(tokenizer, plain))
    assert sequence.token_ids == ChatTemplate(tokenizer).render(TURNS, add_generation_prompt=False)


def test_marks_do_not_excuse_a_turn_that_goes_on_from_no_prompt(make_tokenizer):
    opens = CHATML_MARKED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(RequestError, match="serving would never see"):
        ChatTemplate(make_tokenizer(opens)).supervise(TURNS[:2])


def test_calls_that_are_null_are_none_also_where_marks_stand(make_tokenizer):
    tokenizer = make_tokenizer(
        CHATML_MARKED.replace(
            "{{ m.content }}", "{% for c in m.tool_calls or [] %}{% endfor %}{{ m.content }}"
        )
    )
    for calls in (None, []):
        (sequence,) = ChatTemplate(tokenizer).supervise([TURNS[0], {**TURNS[1], "tool_calls": calls}])
        assert supervised_text(tokenizer, sequence) == [TURNS[1]["content"] + "<|im_end|>"]


def test_a_template_is_given_the_form_that_it_renders_right(make_tokenizer):
    tokenizer = make_tokenizer(PARTS)
    assert ChatTemplate(tokenizer).render(TURNS) == ChatTemplate(make_tokenizer(CHATML)).render(TURNS)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    messages = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat = ChatTemplate(make_tokenizer(JSON_CALLS))
    assert 'f{"a": "é"}<|im_end|>' in chat.write(messages).text
    assert (chat.forms.renders_calls, ChatTemplate(make_tokenizer(CHATML)).forms.renders_calls) == (
        True,
        False,
    )


def calls_written(words: str, refuses: str = "false") -> str:
    """ChatML that refuses some turns, and writes each call by the given words."""
    return CHATML.replace(
        "{{ m.content }}",
        "{% if m.tool_calls %}{% if "
        + refuses
        + " %}{{ raise_exception('no') }}{% endif %}{% endif %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ " + words + " }}{% endfor %}",
    )


AS_OBJECT, AS_TEXT = "c.function.arguments | tojson", "c.function.arguments"
FORMS = {  # template -> (arguments, content of a turn that only calls, whether calls are rendered)
    "an object as JSON": (calls_written(AS_OBJECT), ("object", "empty", True)),
    "printed as it is, which Python would print an object": (calls_written(AS_TEXT), ("text", "empty", True)),
    "text alone": (calls_written(AS_TEXT + " + ''"), ("text", "empty", True)),
    "no content beside calls": (calls_written(AS_OBJECT, "m.content is defined"), ("object", "absent", True)),
    "text, and no content": (calls_written(AS_TEXT, "m.content is defined"), ("text", "absent", True)),
    "JSON of JSON": (
        calls_written(AS_OBJECT, "m.tool_calls[0].function.arguments is not string"),
        ("object", "empty", False),
    ),
    "no call": (CHATML, ("object", "empty", False)),
}


@pytest.mark.parametrize("kind", FORMS)
def test_calls_are_given_in_the_first_form_in_which_they_are_read_back(kind, make_tokenizer):
    source, expected = FORMS[kind]
    chat = ChatTemplate(make_tokenizer(source))
    assert (chat.forms.arguments, chat.forms.no_content, chat.forms.renders_calls) == expected
    if not chat.forms.renders_calls:
        return
    for arguments in ({"a": "é", "n": [1]}, '{"a": "é", "n": [1]}'):
        for content in (None, ""):
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            turn = {"role": "assistant", "content": content, "tool_calls": [call]}
            assert chat.write([TURNS[0], turn]).text.endswith(
                'f{"a": "é", "n": [1]}<|im_end|>\n<|im_start|>assistant\n'
            )
            (sequence,) = chat.supervise([TURNS[0], turn])
            assert supervised_text(chat.tokenizer, sequence) == ['f{"a": "é", "n": [1]}<|im_end|>']
