"""What the page at /ui/ keeps in the browser, over reloads and other versions of itself."""

from __future__ import annotations

import json

import pytest
from opened_page import WAIT_MS, Opened
from playwright.sync_api import expect
from tiny import running

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def served(model_folder, make_adapter):
    with running(model_folder, adapters=[{"name": "first", "path": str(make_adapter(1))}]) as (_, url):
        yield url


def test_a_reload_loses_neither_the_chat_nor_what_is_typed_nor_the_settings(open_page, served):
    page = open_page(served)
    page.answers("kept")
    page.page.select_option("#model", "first")
    page.page.fill("#system", "Be kind.")
    page.page.fill("[data-field=top_p]", "0.5")
    page.say("hi")
    page.ended()
    page.page.click("#theme")
    theme = page.page.evaluate("document.documentElement.dataset.theme")
    page.page.fill("#words", "half a thou")
    page.page.reload()
    page.page.wait_for_selector("#model option", state="attached")
    assert page.ended() == "kept"
    assert page.page.input_value("#words") == "half a thou"
    assert page.page.input_value("#model") == "first"
    assert page.page.input_value("#system") == "Be kind."
    assert page.page.input_value("[data-field=top_p]") == "0.5"
    assert page.page.evaluate("document.documentElement.dataset.theme") == theme == "dark"


@pytest.mark.parametrize(
    "left",
    ["null", "{}", '"x"', "[null, 3, {}]", '[{"role": "user", "text": "a", "pictures": 1}]', "{broken"],
)
def test_what_another_version_left_in_the_browser_does_not_break_the_page(open_page, served, left):
    """llama.cpp's page did not start again before somebody cleared what it had stored."""
    page = open_page(served)
    page.page.evaluate(
        "([left, names]) => names.forEach(name => localStorage.setItem(`lathe.${name}`, left))",
        [left, ["chat", "sampling", "system", "theme", "model"]],
    )
    page.page.reload()
    page.page.wait_for_selector("#model option", state="attached")
    page.answers("fine")
    page.say("hi")
    assert page.ended() == "fine"


@pytest.fixture
def long_winded(talkative):
    with running(talkative) as (_, url):
        yield url


def test_a_reload_amid_an_answer_keeps_the_question_and_what_came(open_page, long_winded):
    page = open_page(long_winded)
    page.page.fill("#other", json.dumps({"ignore_eos": True}))
    page.say("hi")
    text = page.page.locator(".message.assistant .body > .text")
    expect(text).not_to_have_text("", timeout=WAIT_MS)
    page.page.reload()
    page.page.wait_for_selector("#model option", state="attached")
    assert "hi" in page.page.locator(".message.user").inner_text().split()
    assert text.inner_text()
    expect(page.page.locator(".usage")).to_have_text("stopped")
    expect(page.page.locator(".error:visible")).to_have_count(0)
    page.answers("whole")
    page.page.locator(".message.assistant").get_by_role("button", name="Retry").click()
    expect(text).to_have_text("whole", timeout=WAIT_MS)


def test_each_tab_finds_its_own_talk_again_and_a_new_one_begins_with_the_last(open_page, served):
    """One key of the browser's storage for all tabs: the last to write took the others' talks from them."""
    page = open_page(served)
    page.answers("one")
    page.say("in the first")
    page.ended()
    other = Opened(page.page.context.new_page(), served)
    assert other.ended() == "one"
    other.page.click("#new-chat")
    other.say("in the second")
    other.ended()
    for tab, said in ((page, "in the first"), (other, "in the second")):
        tab.page.reload()
        expect(tab.page.locator(".message.user .body")).to_have_text(said)
    assert other.faults == []
