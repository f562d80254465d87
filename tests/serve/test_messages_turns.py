"""What Anthropic's clients send, as a chat: turns, results of tools, thoughts, tools, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve.api.messages.body import MessagesBody
from serve.api.messages.translation import chat_of
from serve.errors import ContextLengthError, RequestError

PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
PASSAGE = {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "x"}]}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "x"}}
SCHEMA = {"type": "json_schema", "schema": {}}
SHOWN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def use(id: str, name: str = "look", **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": given}


def result(id: str, content: Any = None, **more: Any) -> dict[str, Any]:
    said = {} if content is None else {"content": content}
    return {"type": "tool_result", "tool_use_id": id, **said, **more}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": blocks[0] if isinstance(blocks[0], str) else list(blocks)}


def answer(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": blocks[0] if isinstance(blocks[0], str) else list(blocks)}


def body(*messages: dict[str, Any], **fields: Any) -> MessagesBody:
    return MessagesBody.model_validate({"model": "m", "max_tokens": 5, "messages": list(messages), **fields})


def turns(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """As the template gets them."""
    chat = chat_of(body(*messages, **fields)).chat
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def refusal(*messages: dict[str, Any], **fields: Any) -> str:
    with pytest.raises((RequestError, ValidationError)) as caught:
        chat_of(body(*messages, **fields))
    error = caught.value
    if isinstance(error, ValidationError):
        return str(error)
    return str(error)


def test_words_are_words_in_either_form():
    assert turns(user("Hi"), answer("Yes?"), user(text("Go on."))) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go on."},
    ]


@pytest.mark.parametrize(
    "system", ["Be kind.", [text("Be kind.")], [text("Be kind.", cache_control={"type": "ephemeral"})]]
)
def test_the_system_speaks_first(system):
    assert turns(user("Hi"), system=system)[0] == {"role": "system", "content": "Be kind."}


def test_the_line_that_changes_with_every_request_is_not_for_the_model():
    blocks = [text("x-anthropic-billing-header: cc_version=2.1; cch=fa690;"), text("You are."), text("Do.")]
    found = turns(user("Hi"), system=blocks)
    blocks[0] = text("x-anthropic-billing-header: cc_version=2.1; cch=00000;")
    assert found == turns(user("Hi"), system=blocks)
    assert found[0]["content"] == "You are.\n\nDo."


def test_turns_of_one_role_become_one():
    found = turns(user("a"), user(text("b"), text("c")), answer("d"), answer(text("e"), text("f")), user("g"))
    assert [turn["content"] for turn in found] == ["a\n\nb\n\nc", "d\n\nef", "g"]


def test_what_the_system_says_later_is_said_where_it_stands():
    late = {"role": "system", "content": "Mind the gap."}
    found = turns(
        {"role": "system", "content": "First."}, user("a"), late, answer("b"), late, user("c"), system="Zero."
    )
    assert [(turn["role"], turn["content"]) for turn in found] == [
        ("system", "Zero.\n\nFirst."),
        ("user", "a\n\n<system>\nMind the gap.\n</system>"),
        ("assistant", "b"),
        ("user", "<system>\nMind the gap.\n</system>\n\nc"),
    ]
    passing = {**late, "clear_at": "next_user_message"}
    assert turns(user("a"), passing)[0]["content"].endswith("</system>")
    assert [turn["content"] for turn in turns(user("a"), passing, answer("b"), user("c"))] == ["a", "b", "c"]


def test_calls_and_their_results_become_turns_of_their_own():
    found = turns(
        user("Look."),
        answer(
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            text("I look."),
            use("t1", at="/"),
            use("t2", "go"),
        ),
        user(result("t1", "a file"), result("t2", [text("one"), text("two")]), text("Well?")),
    )
    assert found[1] == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "look", "arguments": {"at": "/"}}},
            {"id": "t2", "type": "function", "function": {"name": "go", "arguments": {}}},
        ],
    }
    assert found[2:] == [
        {"role": "tool", "tool_call_id": "t1", "name": "look", "content": "a file"},
        {"role": "tool", "tool_call_id": "t2", "name": "go", "content": "one\n\ntwo"},
        {"role": "user", "content": "Well?"},
    ]


def test_results_come_before_words_wherever_they_stand_in_the_turn():
    found = turns(answer(use("t1")), user(text("by the way")), user(result("t1", "done")))
    assert [turn["role"] for turn in found] == ["assistant", "tool", "user"]


@pytest.mark.parametrize(
    ("content", "is_error", "expected"),
    [
        ("no such file", True, "Error: no such file"),
        ("Error: no such file", True, "Error: no such file"),
        ("<tool_use_error>no</tool_use_error>", True, "<tool_use_error>no</tool_use_error>"),
        ("fine", False, "fine"),
        (None, None, ""),
        ([], True, "Error: "),
    ],
)
def test_a_failed_call_says_so(content, is_error, expected):
    told = result("t1", content, **({} if is_error is None else {"is_error": is_error}))
    assert turns(answer(use("t1")), user(told))[1]["content"] == expected


def test_pictures_stand_where_they_were_shown_and_those_of_tools_in_the_turn_after():
    assert turns(user(text("a"), PICTURE, text("b"), text("c")))[0]["content"] == [
        text("a"),
        SHOWN,
        text("b\n\nc"),
    ]
    found = turns(answer(use("t1")), user(result("t1", [text("see"), PICTURE]), text("Well?")))
    assert found[1]["content"] == "see\n\n[image: see below]"
    assert found[2] == {"role": "user", "content": [SHOWN, text("Well?")]}
    by_address = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    assert turns(user(by_address))[0]["content"] == [
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    ]


def test_documents_and_passages_are_text():
    paper = {
        "type": "document",
        "title": "T",
        "context": "C",
        "source": {"type": "text", "media_type": "text/plain", "data": "D"},
    }
    pages = {"type": "document", "source": {"type": "content", "content": [text("p"), PICTURE]}}
    found = {
        "type": "search_result",
        "source": "s",
        "title": "t",
        "content": [text("x")],
        "citations": {"enabled": False},
    }
    assert turns(user(paper, found))[0]["content"] == "T\nC\n\nD\n\nt\ns\n\nx"
    assert turns(user(pages))[0]["content"] == [text("p"), SHOWN]


def test_thoughts_nobody_here_can_read_are_left_out():
    found = turns(user("a"), answer({"type": "redacted_thinking", "data": "xx"}, text("b")), user("c"))
    assert found[1] == {"role": "assistant", "content": "b"}


def test_what_anthropics_server_ran_is_told_as_calls_and_results_between_the_words():
    def used(id: str, kind: str = "server_tool_use", **more: Any) -> dict[str, Any]:
        return {
            "type": kind,
            "id": id,
            "name": "find",
            "input": {"q": id},
            "caller": {"type": "direct"},
            **more,
        }

    def came(id: str, kind: str, content: Any, **more: Any) -> dict[str, Any]:
        return {"type": kind, "tool_use_id": id, "content": content, **more}

    def call(id: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": "find", "arguments": {"q": id}}}

    page = {
        "type": "web_search_result",
        "title": "T",
        "url": "u",
        "encrypted_content": "xx",
        "page_age": None,
    }
    pdf = {"type": "document", "source": PDF["source"]}
    found = turns(
        user("a"),
        answer(
            {**THOUGHT},
            text("I look. "),
            used("1"),
            used("2", "mcp_tool_use", server_name="s"),
            came("1", "web_search_tool_result", [page]),
            came("2", "mcp_tool_result", [text("no"), text("way")], is_error=True),
            text("So "),
            text("far."),
            used("3"),
            came("3", "web_fetch_tool_result", {"type": "web_fetch_result", "url": "u", "content": pdf}),
            text("Done.", citations=[{"type": "web_search_result_location"}]),
        ),
        user("b"),
    )

    def spoken(content: str, **more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": content, **more}

    def told(id: str, content: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": id, "name": "find", "content": content}

    source = '{"type": "base64", "media_type": "application/pdf"}'
    assert found[1:-1] == [
        spoken("I look. ", reasoning_content="Hm.", tool_calls=[call("1"), call("2")]),
        told("1", '[{"type": "web_search_result", "title": "T", "url": "u"}]'),
        told("2", "Error: no\n\nway"),
        spoken("So far.", tool_calls=[call("3")]),
        told(
            "3",
            f'{{"type": "web_fetch_result", "url": "u", "content": {{"type": "document", "source": {source}}}}}',
        ),
        spoken("Done."),
    ]
    ends = turns(user("a"), answer(used("1"), came("1", "web_search_tool_result", "x")))
    assert [turn["role"] for turn in ends] == ["user", "assistant", "tool"]
    assert "the last turn calls tools" in refusal(user("a"), answer(used("1")))


def test_a_last_turn_of_the_assistant_is_gone_on_from():
    chat = chat_of(body(user("a"), answer("The answer is ("))).chat
    assert chat.continue_final_message is True
    assert chat.messages[-1].content == "The answer is ("
    assert chat_of(body(user("a"))).chat.continue_final_message is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop_sequences": ["a", "b"]}, {"stops": ("a", "b")}),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.9}, {"temperature": 0.5, "top_k": 4, "top_p": 0.9}),
        ({"metadata": {"user_id": "u"}}, {"user": "u"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, {"enable_thinking": True, "budget": 2000}),
        ({"thinking": {"type": "enabled"}}, {"enable_thinking": True, "budget": None}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "include_reasoning": False}),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": None, "include_reasoning": None}),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, {"include_reasoning": False}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "xhigh"}),
        ({"seed": 3, "min_p": 0.1, "drafter": "none"}, {"seed": 3, "min_p": 0.1, "drafter": "none"}),
        ({"max_tokens": 0}, {"answer_limit": 1}),
    ],
)
def test_fields_mean_what_the_chats_mean(fields, expected):
    chat = chat_of(body(user("a"), **fields)).chat
    assert {name: getattr(chat, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["output_format", "output_config"])
def test_a_schema_is_the_chats(name):
    form = {"type": "json_schema", "schema": {"type": "object"}}
    chat = chat_of(body(user("a"), **{name: form if name == "output_format" else {"format": form}})).chat
    assert chat.constraint is not None
    assert chat.constraint.place == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("messages", "fields", "named"),
    [
        ([user({"type": "server_tool_use", "id": "x", "name": "web_search", "input": {}})], {}, "server_tool_use"),
        ([user(PDF)], {}, "application/pdf"),
        ([user({"type": "document", "source": {"type": "file", "file_id": "f"}})], {}, "'file'"),
        ([answer(PICTURE)], {}, "content.0"),
        ([user(use("t1"))], {}, "content.0"),
        ([user("a"), answer(text("b"), use("t1"))], {}, "messages.1"),
        ([user("a")], {"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ([user("a")], {"container": "c"}, "container"),
        ([user("a")], {"stop_sequences": [""]}, "stop_sequences"),
        ([user("a")], {"stop_sequences": ["x"], "stop": "y"}, "stop"),
        ([user("a")], {"max_tokens": None}, "max_tokens"),
        ([user("a")], {"n": 2}, "n"),
        ([user("a")], {"tool_choice": {"type": "any"}}, "tool_choice"),
        ([user("a")], {"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ([], {}, "messages"),
        ([{"role": "system", "content": ""}], {}, "messages"),
        ([user("a")], {"response_format": {"type": "json_object"}, "output_format": SCHEMA}, "output_config"),
        ([user({**PASSAGE, "citations": {"enabled": True}})], {}, "citations"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(messages, fields, named):
    assert named in refusal(*messages, **fields)


def test_an_error_names_a_turn_as_it_was_sent():
    sent = [user("a"), answer(use("t1")), user(result("t1", [text("x"), PICTURE]), text("y"), PICTURE)]
    translated = chat_of(body(*sent, system="s"))
    # system, user, assistant, tool, user
    for told, name in [
        ("messages.0: no", "system: no"),
        ("messages.2.tool_calls: no", "messages.1.tool_calls: no"),
        ("messages.4.content.0: no", "messages.2.content.0.content.1: no"),
        ("messages.4.content.2: no", "messages.2.content.2: no"),
        ("messages: no", "messages: no"),
    ]:
        with pytest.raises(ContextLengthError, match=f"^{name}$") as caught, translated.named_as_sent():
            raise ContextLengthError(told, "messages")
        assert caught.value.param == "messages"
