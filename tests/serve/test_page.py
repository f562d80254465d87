"""The page at /ui/, in a real browser against a real server. Skipped where there is no Chromium to run it in."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from opened_page import WAIT_MS, Opened
from playwright.sync_api import Page, expect
from waiting import until

import lathe
from serve.api.page import FILES, FOLDER
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

pytestmark = pytest.mark.long

ROOT = Path(lathe.__file__).parent
SEED = str(2**62 + 1)
"""JavaScript's own numbers are 2^62 and 2^62 + 512 there."""
EVIL = (
    "**bold** <img src=http://127.0.0.1:1/x onerror=alert(1)> <script>alert(2)</script> [a](javascript:alert(3)) "
    "![b](http://127.0.0.1:1/y.png) [c](https://example.org/z)\n\n```html\n<b>&amp;</b>\n```"
)


@pytest.fixture(scope="module")
def served(model_folder, make_adapter) -> Iterator[str]:
    adapters = [
        {"name": name, "path": str(make_adapter(seed))} for name, seed in (("first", 1), ("second", 2))
    ]
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="base", adapters=adapters))
    with closing(runtime), serving(runtime) as url:
        yield url


@pytest.fixture(scope="module")
def seeing() -> Iterator[str]:
    runtime = Runtime.start(ServeConfig(model=str(ROOT / "data/shapes"), name="shapes"))
    with closing(runtime), serving(runtime) as url:
        yield url


@pytest.fixture
def opened(open_page):
    return open_page


@pytest.fixture(scope="module")
def drawn_page(browser, served) -> Iterator[Page]:
    """One page for all that ask its modules, since opening it takes half a second."""
    opened = Opened(browser.new_page(), served)
    yield opened.page
    opened.page.context.close()
    assert opened.faults == opened.elsewhere == []


@pytest.fixture(scope="module")
def drawn(drawn_page) -> Callable[[str], str]:
    """drawn(Markdown) → HTML of what the page makes of it."""
    return lambda text: drawn_page.evaluate(
        "async text => (await import('./markdown.js')).nodesOf(text).map(each => each.outerHTML).join('')",
        text,
    )


# Over HTTP, without a browser.


def test_the_page_is_files_of_its_own_under_a_strict_policy(served):
    for path in ("/ui", "/ui/"):
        index = httpx.get(served + path, follow_redirects=True, timeout=60)
        assert index.status_code == 200
        assert str(index.url) == f"{served}/ui/"
    named = re.findall(r'(?:src|href)="([^"]+)"', index.text) + [
        name for file in FILES.values() for name in re.findall(r'from "\./([^"]+)"', file.content.decode())
    ]
    assert len(named) > 8
    assert set(named) | {"index.html"} == set(FILES) == {path.name for path in FOLDER.iterdir()}
    for name in FILES:
        answer = httpx.get(f"{served}/ui/{name}", timeout=60)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert httpx.head(f"{served}/ui/{name}", timeout=60).headers["etag"] == answer.headers["etag"]
        again = httpx.get(
            f"{served}/ui/{name}", headers={"If-None-Match": answer.headers["etag"]}, timeout=60
        )
        assert (again.status_code, again.content) == (304, b"")
    for path in ("nothing.js", "../config.py", "%2e%2e/config.py", "index.html/x"):
        assert httpx.get(f"{served}/ui/{path}", timeout=60).status_code == 404
    assert "/ui" not in httpx.get(f"{served}/openapi.json", timeout=60).text


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_of_the_page_has_a_way_to_make_html_of_text(name):
    text = FILES[name].content.decode()
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|eval\(|srcdoc"
    assert not re.findall(rf"{ways}|new Function|style=\"|\son[a-z]+=\"", text)


def test_a_server_may_have_no_page(model_folder):
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="base", ui=False))
    with closing(runtime), serving(runtime) as url:
        assert (
            httpx.get(f"{url}/ui/", timeout=60).status_code
            == httpx.get(f"{url}/ui", timeout=60).status_code
            == 404
        )


# In the browser.


def test_the_adapter_that_is_picked_answers_with_what_the_settings_say(opened, served):
    page = opened(served)
    groups = page.page.eval_on_selector_all("#model optgroup", "all => all.map(each => each.label)")
    assert groups == ["on base"]
    page.page.select_option("#model", "second")
    page.page.fill("#system", "Be brief.")
    for name, value in (("temperature", "0"), ("max_tokens", "12"), ("top_k", "5"), ("seed", SEED)):
        page.page.fill(f"[data-field={name}]", value)
    page.page.select_option("[data-field=enable_thinking]", "false")
    page.page.fill("#other", '{"user": "maria"}')
    page.page.fill("#other", "")
    page.page.select_option("[data-field=enable_thinking]", "")
    page.say("hi")
    text = page.ended()
    sent = {**page.asked[0]}
    assert sent.pop("messages") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert sent.pop("stream_options") == {"include_usage": True}
    assert sent == {
        "model": "second",
        "stream": True,
        "temperature": 0,
        "max_tokens": 12,
        "top_k": 5,
        "seed": int(SEED),
    }
    body = {**page.asked[0], "stream": False, "stream_options": None}
    alone = httpx.post(f"{served}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    raw = page.page.evaluate("JSON.parse(localStorage['lathe.chat'])[1].text")
    assert raw == alone["message"]["content"]
    assert len(text) > 3
    assert page.page.locator(".message.assistant .who").inner_text() == "second"
    assert "12 tokens" in page.page.locator(".usage").inner_text()


def test_numbers_keep_all_of_their_digits(drawn_page):
    text = f'{{"seed": {SEED}, "in": [-{SEED}, 7, -0, 0.1, 1.50, 1e400, "{SEED}", "1\\"2"], "{SEED}": {{}}}}'
    again = drawn_page.evaluate(
        "async text => { const {parse, stringify} = await import('./numbers.js'); return stringify(parse(text), 2) }",
        text,
    )
    assert repr(json.loads(again)) == repr(json.loads(text))


def test_nothing_that_a_model_writes_is_html(opened, served):
    page = opened(served)
    page.answers(EVIL)
    page.say("hi")
    page.ended()
    answer = page.page.locator(".message.assistant .body > .text")
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("img, script, iframe, style, svg, object, form").count() == 0
    assert answer.locator("a").evaluate_all("all => all.map(each => each.href)") == [
        "http://127.0.0.1:1/x",
        "http://127.0.0.1:1/y.png",
        "https://example.org/z",
    ]
    assert answer.locator("a").first.get_attribute("rel") == "noopener noreferrer"
    assert answer.locator("pre code").inner_text() == "<b>&amp;</b>"
    assert "<script>alert(2)</script>" in answer.inner_text()
    assert "[a](javascript:alert(3))" in answer.inner_text()


MARKS = (
    *(
        "# ",
        "## h\n",
        "- ",
        "* ",
        "1. ",
        "2) ",
        "  ",
        "    ",
        "> ",
        "```",
        "```py\n",
        "~~~\n",
        "`",
        "``",
        "**",
        "*",
    ),
    *(
        "_",
        "__",
        "~~",
        "[",
        "](",
        "](http://a.b/c)",
        "](javascript:x)",
        ")",
        "!",
        "<",
        ">",
        "<b>",
        "<script>",
        "|",
    ),
    *(
        "|-|-|\n",
        "a|b\n-|-\n",
        "---\n",
        "\\",
        "\\*",
        "\n",
        "\n\n",
        "\r\n",
        "http://x.y/z?q=(1)",
        "<http://a>",
    ),
    *("\\[", "\\]", "\\(", "\\)", "$", "$$", "\\[\n", "\n\\]\n", "$$\n"),
    *("word", "wörter ", "日本", "🙂", "&amp;", "- [x] ", "\t", "\x00", " "),
)
ALLOWED = {
    *(
        "p",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "ul",
        "ol",
        "li",
        "blockquote",
        "hr",
        "br",
        "a",
        "code",
        "pre",
        "em",
    ),
    *("strong", "del", "div", "span", "button", "table", "thead", "tbody", "tr", "th", "td"),
}
DRAW = """async texts => {
  const { MarkdownView, nodesOf } = await import("./markdown.js");
  const shape = node => node.outerHTML;
  return texts.map(({ text, cuts }) => {
    const whole = new MarkdownView(), grown = new MarkdownView();
    whole.show(text);
    for (const cut of cuts) grown.show(text.slice(0, cut));
    grown.show(text);
    return {
      same: shape(whole.node) === shape(grown.node),
      names: [...whole.node.querySelectorAll("*")].map(each => each.localName),
      links: [...whole.node.querySelectorAll("[href]")].map(each => each.protocol),
      attributes: [...whole.node.querySelectorAll("*")].flatMap(each => each.getAttributeNames()),
      text: whole.node.textContent,
    };
  });
}"""


def test_any_markdown_in_any_cuts_is_drawn_as_the_whole_of_it_by_safe_nodes_alone(opened, served):
    rng = random.Random(14)
    texts = []
    for _ in range(1000):
        text = "".join(rng.choices(MARKS, k=rng.randrange(1, 40)))
        texts.append({"text": text, "cuts": sorted(rng.randrange(len(text) + 1) for _ in range(6))})
    found = opened(served).page.evaluate(DRAW, texts)
    assert all(each["same"] for each in found)
    assert {name for each in found for name in each["names"]} <= ALLOWED
    assert {link for each in found for link in each["links"]} == {"http:"}
    attributes = {name for each in found for name in each["attributes"]}
    assert attributes <= {"href", "target", "rel", "class", "type", "start"}
    # Words are all there, whatever stands around them.
    for each, asked in zip(found, texts, strict=True):
        for word in ("word", "日本", "🙂"):
            assert each["text"].count(word) == asked["text"].count(word), asked["text"]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a *b* **c** ***d*** _e_ snake_case_word ~~f~~ `g*h*`", "a <em>b</em> <strong>c</strong> "),
        (
            "1. a\n2. b\n   - c\n   - d\n3. e",
            "<ol><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ol>",
        ),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("- a\n\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("- a\n\n  more\n- b", "<ul><li>a<p>more</p></li><li>b</li></ul>"),
        ("para\n- a\n- b\n\nend", "<p>para</p><ul><li>a</li><li>b</li></ul><p>end</p>"),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        ("# A\ntext\n---\n## B", "<h1>A</h1><p>text</p><hr><h2>B</h2>"),
        (
            "|a|b|\n|-|:-:|\n|1|`x|y`|\n|2|",
            "<tbody><tr><td>1</td><td><code>x|y</code></td></tr><tr><td>2</td><td></td>",
        ),
        ("```python\na\n\n- b\n```\nend", "<code>a\n\n- b</code></pre></div><p>end</p>"),
        ("```\nopen\n# no heading", "<code>open\n# no heading</code>"),
        ("- a\n  ```\n  x\n\n  y\n  ```\n- b", "<pre><code>x\n\ny</code></pre></div></li><li>b</li>"),
        ("see https://a.b/c_d_e, and <https://x.y>.", 'href="https://a.b/c_d_e"'),
        ('[a *b*](https://x.y/(z) "t")', "<em>b</em></a>"),
        ("2 * 3 * 4 and a_b_c and 5*6*7", "<p>2 * 3 * 4 and a_b_c and "),
        ("\\*not\\* &lt;", "<p>*not* &amp;lt;</p>"),
        ("- [ ] to do\n- [x] done", "<li>☐ to do</li><li>☑ done</li>"),
        ("1986\\. A year", "<p>1986. A year</p>"),
        ("|a|\n|-|\n|- x<br>- y<br/>z|", "<td>- x<br>- y<br>z</td>"),
        ('```python\nfoo = "\\(bar\\)" # not **bold**\n```', '<code>foo = "\\(bar\\)" # not **bold**</code>'),
        ("The answer is\n42. And more", "<p>The answer is\n42. And more</p>"),
        ("so \\(a_1 * b_1 * c\\) is", '<p>so <code class="math">\\(a_1 * b_1 * c\\)</code> is</p>'),
        ("with $x_1 * y * z_1$, $$a * b * c$$", ">$x_1 * y * z_1$</code>, <code"),
        ("*from* $5 to $10 *a* day", "<em>from</em> $5 to $10 <em>a</em> day</p>"),
        (
            "we get\n\\[\na * b * c\n= d_1\n\n- e_1\n\\]\nso",
            '<div class="math">\\[\na * b * c\n= d_1\n\n- e_1\n\\]</div><p>so',
        ),
        ("$$\nx * y * z\n$$", '<div class="math">$$\nx * y * z\n$$</div>'),
        ("\\[x\\] is *escaped*", "<p>[x] is <em>escaped</em></p>"),
    ],
)
def test_markdown_is_drawn_as_people_write_it(text, html, drawn):
    assert html in drawn(text)


def test_long_answers_stay_quick_to_draw(opened, served):
    """Marks that open and never close, by the thousand: each look for a partner is bounded."""
    page = opened(served).page
    for text in (
        "$a " * 20_000,
        "$$\n" * 9_999,
        "\\[\n" * 9_999,
        "\\(" * 20_000,
        "**a " * 20_000,
        "[" * 20_000,
        "*" * 20_000,
        "_a" * 20_000,
        "`" * 9_999,
        "> " * 9_999,
        "|" * 20_000,
    ):
        took_ms = page.evaluate(
            "async text => { const { nodesOf } = await import('./markdown.js'); const start = performance.now(); "
            "nodesOf(text); return performance.now() - start; }",
            text,
        )
        assert took_ms < 20_000, text[:10]


def test_thoughts_are_folded_above_the_answer(opened, model_folder):
    config = ServeConfig(
        model=str(model_folder), name="base", reasoning_parser="deepseek_r1",
        thinking_start_token="<think>", thinking_end_token="</think>",
    )  # fmt: skip
    runtime = Runtime.start(config)
    with closing(runtime), serving(runtime) as url:
        page = opened(url)
        page.page.fill("[data-field=thinking_budget]", "9")
        page.answers("So be it.")
        page.say("hi")
        assert page.ended() == "So be it."
        thought = page.page.locator("details.thought")
        assert not thought.evaluate("node => node.open")
        thought.locator("summary").click()
        assert len(thought.locator(".text").inner_text()) > 3
        page.page.evaluate("window.before = [...document.querySelectorAll('.message')]")
        page.say("again")
        page.ended(2)
        # What was opened, or selected, stays so while others come: its nodes are the same.
        assert thought.first.evaluate("node => node.open")
        assert page.page.evaluate(
            "window.before.length == 2 && window.before.every(each => each.isConnected)"
        )
        assert page.page.evaluate(AT_END)
        assert page.asked[1]["messages"][1]["reasoning_content"]


def test_stop_ends_the_answer_and_keeps_what_came(opened, talkative):
    runtime = Runtime.start(ServeConfig(model=str(talkative), name="base", max_rows=1, max_waiting=0))
    with closing(runtime), serving(runtime) as url:
        page = opened(url)
        page.page.fill("#other", '{"ignore_eos": true}')
        for number, end in enumerate(
            (lambda: page.page.click("#stop"), lambda: page.page.keyboard.press("Escape")), 1
        ):
            page.say("hi")
            expect(page.page.locator(".message.assistant .body > .text").last).not_to_be_empty(
                timeout=WAIT_MS
            )
            end()
            assert page.ended(number)
            assert "stopped" in page.page.locator(".usage").last.inner_text()
            # The row is free for somebody else.
            with httpx.Client(timeout=60) as http:
                body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
                for _ in range(300):
                    if (status := http.post(f"{url}/v1/chat/completions", json=body).status_code) == 200:
                        break
                assert status == 200


def test_stop_ends_a_thought_too(opened, talkative):
    config = ServeConfig(model=str(talkative), name="base", reasoning_parser="deepseek_r1", max_rows=1)
    config = config.model_copy(update={"thinking_start_token": "<think>", "thinking_end_token": "</think>"})
    runtime = Runtime.start(config)
    with closing(runtime), serving(runtime) as url:
        page = opened(url)
        page.page.fill("#other", '{"ignore_eos": true}')
        page.say("hi")
        expect(page.page.locator("details.thought .text")).not_to_have_text("", timeout=WAIT_MS)
        page.page.click("#stop")
        page.ended()
        assert page.page.locator("#send").is_visible()
        page.page.fill("[data-field=thinking_budget]", "3")
        page.answers("So be it.")
        page.say("and now?")
        assert page.ended(2) == "So be it."
        # An answer that is a thought alone is a turn all the same.
        roles = [message["role"] for message in page.asked[1]["messages"]]
        assert roles == ["user", "assistant", "user"]


def test_turns_are_edited_asked_again_and_deleted(opened, served):
    page = opened(served)
    inside = page.page
    page.answers("one")
    page.say("first?")
    page.ended()
    page.answers("two")
    page.say("second?")
    assert page.ended(2) == "two"

    def act(message: int, label: str) -> None:
        inside.locator(".message").nth(message).hover()
        inside.locator(".message").nth(message).get_by_role("button", name=label, exact=True).click()

    page.answers("three")
    act(3, "Retry")
    expect(inside.locator(".message.assistant .body > .text").last).to_have_text("three", timeout=WAIT_MS)
    assert contents(page.asked[-1]) == ["first?", "one", "second?"]
    act(1, "Edit")
    inside.fill(".edit textarea", "uno")
    act(1, "Save")
    act(2, "Edit")
    inside.fill(".edit textarea", "zweite?")
    page.answers("four")
    act(2, "Save and ask")
    expect(inside.locator(".message.assistant .body > .text").last).to_have_text("four", timeout=WAIT_MS)
    assert contents(page.asked[-1]) == ["first?", "uno", "zweite?"]
    act(0, "Delete")
    assert inside.locator(".message").count() == 2
    act(0, "Edit")
    act(0, "Cancel")
    page.say("third?")
    page.ended(2)
    assert contents(page.asked[-1]) == ["zweite?", "four", "third?"]
    inside.click("#new-chat")
    assert inside.locator(".message").count() == 0


def contents(body: dict) -> list[str]:
    return [message["content"] for message in body["messages"]]


AT_END = "(n => n.scrollHeight - n.scrollTop - n.clientHeight < 2)(document.querySelector('#messages'))"
DROPPED = """([place, kind, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
  const how = { bubbles: true, cancelable: true };
  const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: data, ...how })
    : new DragEvent(kind, { dataTransfer: data, ...how });
  document.querySelector(place).dispatchEvent(event);
}"""


def test_pictures_are_picked_pasted_and_dropped(opened, seeing):
    page = opened(seeing)
    picture = ROOT / "recipes" / "wikisql.png"
    page.page.set_input_files("#files", picture)
    shown = page.page.locator("#shown img")
    expect(shown).to_have_count(1)
    page.page.evaluate(DROPPED, ["#words", "paste", list(picture.read_bytes())])
    expect(shown).to_have_count(2)
    page.page.evaluate(DROPPED, ["#messages", "drop", list(picture.read_bytes())])
    expect(shown).to_have_count(3)
    page.page.click("[aria-label='Leave picture 2 out']")
    expect(shown).to_have_count(2)
    page.say("Which bin?")
    assert page.ended()
    parts = page.asked[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert len({part["image_url"]["url"] for part in parts[:2]}) == 1
    assert page.page.locator(".message.user .pictures img").count() == 2
    assert shown.count() == 0


def test_a_model_that_sees_nothing_takes_no_pictures_and_says_so(opened, served):
    page = opened(served)
    assert page.page.locator("#attach").is_disabled()
    page.page.evaluate(DROPPED, ["#messages", "drop", [1, 2, 3]])
    assert "base sees no pictures" in page.page.locator("#composer .error").inner_text()
    assert page.page.url == f"{served}/ui/"


def test_what_is_wrong_is_told_where_the_answer_would_be_and_may_be_asked_again(opened, served):
    page = opened(served)
    error = page.page.locator(".message.assistant .error:visible")
    for number, (field, typed, said) in enumerate(
        [
            ("#other", '{"temperatur": 1}', "temperatur: unknown field; did you mean temperature?"),
            ("#other", "{broken", "Other fields are no JSON"),
            ("#other", "[1]", "Other fields are an object"),
            ("[data-field=top_p]", "7", "Top p: "),
        ],
        1,
    ):
        page.page.fill(field, typed)
        page.say("hi")
        expect(error).to_have_count(number)
        assert said in error.last.inner_text()
        page.page.fill(field, "")
    page.answers("well")
    page.page.locator(".message.assistant").last.get_by_role("button", name="Retry").click()
    assert page.ended(4) == "well"
    # What never came is not sent.
    assert {message["role"] for message in page.asked[-1]["messages"]} == {"user"}
    page.faults = [fault for fault in page.faults if "400 (Bad Request)" not in fault]


def test_enter_within_an_input_method_sends_nothing_and_shift_enter_breaks_the_line(opened, served):
    page = opened(served)
    page.page.focus("#words")
    page.page.keyboard.type("に")
    for event in ("{key: 'Enter', isComposing: true}", "{key: 'Enter', keyCode: 229}"):
        made = f"new KeyboardEvent('keydown', {{...{event}, bubbles: true}})"
        page.page.evaluate(f"document.querySelector('#words').dispatchEvent({made})")
    page.page.keyboard.press("Shift+Enter")
    page.page.keyboard.type("b")
    assert page.page.input_value("#words") == "に\nb"
    assert not page.asked


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_width_makes_the_page_scroll_sideways_and_everything_can_be_read(theme, opened, served):
    page = opened(served, color_scheme=theme)
    page.answers(
        "# A\n\n"
        + "long" * 80
        + "\n\n|a|b|\n|-|-|\n|"
        + "wide" * 60
        + "|word|\n\n```\n"
        + "code " * 90
        + "\n```"
    )
    page.say("word" * 100)
    page.ended()
    assert page.page.evaluate("document.documentElement.dataset.theme") == theme
    for width in (320, 390, 600, 821, 1280, 1900):
        page.page.set_viewport_size({"width": width, "height": 700})
        assert page.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, width
        until(lambda: page.page.evaluate(AT_END))
        for place in ("#send", "#model", "#toggle-settings", ".message.assistant .body > .text"):
            box = page.page.locator(place).bounding_box()
            assert box is not None
            assert 0 <= box["x"] < box["x"] + box["width"] <= width + 1, (width, place)
    assert page.page.evaluate(CONTRASTS) == []


CONTRASTS = """() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const c = parse(getComputedStyle(node).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
  };
  return [...document.querySelectorAll("button, label, .hint, .who, .text *, .usage, legend, option, .message .body")]
    .filter(node => node.checkVisibility() && node.textContent.trim() && !node.disabled)
    .map(node => {
      const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
      return [node.textContent.trim().slice(0, 20), (a + 0.05) / (b + 0.05)];
    }).filter(([, ratio]) => ratio < 4.5);
}"""
"""Texts that have less contrast than WCAG's AA asks for."""


def test_a_chat_is_saved_as_a_training_row(opened, served):
    page = opened(served)
    page.answers("fine")
    page.page.fill("#system", "Be kind.")
    page.say("hi")
    page.ended()
    with page.page.expect_download() as download:
        page.page.click("#save")
    row = json.loads(Path(download.value.path()).read_text())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert contents(row) == ["Be kind.", "hi", "fine"]


# Answers that no model here gives: a server that is a script.


@contextmanager
def scripted(page: Opened, status: int, *events: dict | str) -> Iterator[None]:
    body = "".join(f"data: {each if isinstance(each, str) else json.dumps(each)}\n\n" for each in events)
    page.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, body=body))
    yield
    page.page.unroute("**/v1/chat/completions")


def delta(finish: str | None = None, **fields) -> dict:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def call(**fields) -> dict:
    return delta(tool_calls=[{"index": 0, **fields}])


def test_calls_of_tools_are_shown_with_their_arguments(opened, served):
    page = opened(served)
    events = (
        call(id="c1", type="function", function={"name": "weather", "arguments": ""}),
        call(function={"arguments": '{"city": '}),
        call(function={"arguments": f'"Oslo", "order": {SEED}}}'}),
        delta("tool_calls"),
        "[DONE]",
    )
    with scripted(page, 200, *events):
        page.say("weather?")
        page.ended()
    shown = page.page.locator("details.call")
    assert shown.locator("summary").inner_text() == "Calls weather"
    assert json.loads(shown.locator("code").inner_text()) == {"city": "Oslo", "order": int(SEED)}


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ((delta(content="half"),), "The connection broke before the answer ended."),
        ((delta(content="half"), {"error": {"message": "the engine has failed"}}), "the engine has failed"),
        ((delta(content="half"), "{not json"), "The connection broke before the answer ended."),
    ],
)
def test_an_answer_that_breaks_off_is_kept_with_the_reason(events, said, opened, served):
    page = opened(served)
    with scripted(page, 200, *events):
        page.say("hi")
        assert page.ended() == "half"
    assert page.page.locator(".message .error").inner_text() == said


def test_a_server_that_wants_a_key_is_given_one_and_it_is_forgotten_with_the_tab(opened, model_folder):
    config = ServeConfig(model=str(model_folder), name="base", api_key="a-long-secret-of-ours")
    runtime = Runtime.start(config)
    with closing(runtime), serving(runtime) as url:
        page = opened(url)
        expect(page.page.locator("#model")).to_have_text("needs a key")
        assert page.page.evaluate("document.activeElement.id") == "key"
        page.page.fill("#key", "another")
        page.page.press("#key", "Tab")
        page.say("hi")
        expect(page.page.locator(".message .error")).to_have_text("No model is picked.")
        page.page.fill("#key", "a-long-secret…")
        page.page.press("#key", "Tab")
        expect(page.page.locator("#about")).to_have_text("The API key holds characters that no key has.")
        page.page.fill("#key", "a-long-secret-of-ours")
        page.page.press("#key", "Tab")
        expect(page.page.locator("#model")).to_have_value("base")
        page.answers("well")
        page.page.locator(".message.assistant").last.get_by_role("button", name="Retry").click()
        assert page.ended() == "well"
        assert page.page.evaluate("localStorage['lathe.key'] ?? null") is None
        page.page.check("#keep-key")
        assert page.page.evaluate("localStorage['lathe.key']") == '"a-long-secret-of-ours"'
        page.faults = [fault for fault in page.faults if "401" not in fault]
