"""Pictures in chats over real HTTP with the official client: the model sees those that were sent, in their order.

What it sees is held to mlx-vlm's own code on the same messages alone. Ten faults that others had stand here by what
went wrong in them.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import openai
import pytest
from PIL import Image

from serve.api.server import serving
from serve.config import ServeConfig
from serve.conversation import Conversation, Speaker
from serve.runtime import Runtime

FAMILY = "qwen2_vl"
IMAGES = Path(__file__).parents[3] / "shared" / "data" / "images"
FREE = {"ignore_eos": True}
NEAR = 5e-3
"""Of log-probabilities: products of other shapes round otherwise."""
APART = 0.05
"""What another picture moves them by at least."""
COLOURS = {"red": (220, 30, 30), "green": (30, 190, 60), "blue": (40, 60, 220)}


def noise(seed: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (56, 56), COLOURS[colour])


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def data_uri(content: bytes | Image.Image, kind: str = "image/png") -> str:
    content = file_of(content) if isinstance(content, Image.Image) else content
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown(source: Image.Image | str | bytes) -> dict:
    """A picture as the official client sends it."""
    url = source if isinstance(source, str) else data_uri(source)
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts: dict | str) -> dict:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def seen_by(
    client: openai.OpenAI, messages: Sequence[dict], model: str = "sees", **changes: Any
) -> list[float]:
    """Log-probabilities of the five likeliest first tokens."""
    fields = {"model": model, "messages": messages, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    answer = client.chat.completions.create(**{**fields, "temperature": 0, "extra_body": FREE, **changes})
    (first,) = answer.choices[0].logprobs.content
    return sorted((each.logprob for each in first.top_logprobs), reverse=True)


def expected(reference: Any, messages: Sequence[dict]) -> list[float]:
    """The same by mlx-vlm's own code; a picture's part holds Pillow's image."""
    logits = reference.logits(reference.row(messages))[0]
    found = logits - mx.logsumexp(logits)
    return sorted(found.tolist(), reverse=True)[:5]


def for_reference(messages: Sequence[dict], pictures: Sequence[Image.Image]) -> list[dict]:
    """The same messages, whose parts of pictures hold these."""
    rest = iter(pictures)
    return [
        {
            **message,
            "content": message["content"]
            if isinstance(message["content"], str)
            else [
                part if part["type"] == "text" else {"type": "image", "image": next(rest)}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def assert_sees(
    client: openai.OpenAI,
    reference: Any,
    messages: Sequence[dict],
    pictures: Sequence[Image.Image],
    **changes: Any,
) -> None:
    wanted = expected(reference, for_reference(messages, pictures))
    np.testing.assert_allclose(seen_by(client, messages, **changes), wanted, atol=NEAR)


@pytest.fixture(scope="module")
def runtime(vlm_folder: Callable[[str], Path], make_vlm_adapter, tmp_path_factory) -> Iterator[Runtime]:
    adapters = [{"name": f"a{seed}", "path": make_vlm_adapter(FAMILY, seed)} for seed in (1, 2)]
    experiment = {"name": "ab", "variants": [{"model": "a1"}, {"model": "a2"}]}
    config = ServeConfig(
        model=str(vlm_folder(FAMILY)),
        name="sees",
        adapters=adapters,
        experiments=[experiment],
        store=f"sqlite:///{tmp_path_factory.mktemp('store')}/s.sqlite",
        media_limits={"allow_private_hosts": True},
    )
    started = Runtime.start(config)
    yield started
    assert started.worker.failure is None
    started.close()


@pytest.fixture(scope="module")
def client(runtime: Runtime) -> Iterator[openai.OpenAI]:
    with (
        serving(runtime) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def reference(vlm_reference) -> Any:
    return vlm_reference(FAMILY)


@pytest.fixture(scope="module")
def web(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A web server's address, and the folder that it serves."""
    folder = tmp_path_factory.mktemp("web")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_picture_is_seen_as_the_familys_own_code_sees_it_and_counted(client, reference):
    words = [{"role": "user", "content": "what is it?"}]
    assert_sees(client, reference, words, [])
    messages = [user(shown(noise(1)), "what is it?")]
    assert_sees(client, reference, messages, [noise(1)])
    row = reference.row(for_reference(messages, [noise(1)]))
    answer = client.chat.completions.create(model="sees", messages=messages, max_tokens=1)
    assert answer.usage.prompt_tokens == len(row.token_ids)
    differs = np.abs(
        np.subtract(seen_by(client, [user(shown(noise(2)), "what is it?")]), seen_by(client, messages))
    )
    assert differs.max() > APART


def test_two_pictures_whose_base64_begins_alike_are_two_pictures(client, reference):
    """vllm-mlx 197: pictures were known by the first 1,000 characters of their base64."""
    rng = np.random.default_rng(3)
    above = rng.integers(0, 256, (48, 112, 3), np.uint8)
    pair = [
        Image.fromarray(np.concatenate([above, rng.integers(0, 256, (64, 112, 3), np.uint8)]))
        for _ in range(2)
    ]
    files = [file_of(each, "JPEG", quality=95) for each in pair]
    starts = {base64.b64encode(each)[:1000] for each in files}
    assert len(starts) == 1
    answers = []
    for content in files:
        messages = [user(shown(data_uri(content, "image/jpeg")), "what is it?")]
        answers.append(seen_by(client, messages))
        wanted = expected(reference, for_reference(messages, [Image.open(io.BytesIO(content))]))
        np.testing.assert_allclose(answers[-1], wanted, atol=NEAR)
    assert np.abs(np.subtract(*answers)).max() > APART


def test_three_pictures_are_seen_in_their_order_in_one_message_and_in_three_turns(client, reference):
    """mlx-vlm 1084: only the last of several pictures was used; 833: pictures of earlier turns were not."""
    answers = {}
    for order in (("red", "green", "blue"), ("red", "blue", "green"), ("green", "red", "blue")):
        pictures = [plain(colour) for colour in order]
        together = [user(*map(shown, pictures), "which is second?")]
        turns = [
            turn
            for picture in pictures
            for turn in (user(shown(picture), "and this?"), {"role": "assistant", "content": "seen"})
        ]
        turns.append(user("which is second?"))
        for name, messages in (("together", together), ("turns", turns)):
            assert_sees(client, reference, messages, pictures)
            answers[name, order] = seen_by(client, messages)
    for name in ("together", "turns"):
        first, *others = (found for (kind, _), found in answers.items() if kind == name)
        assert all(np.abs(np.subtract(first, other)).max() > NEAR * 4 for other in others)


def test_eleven_pictures_are_seen(client, reference):
    """llama.cpp 14111: the eleventh was a 500."""
    pictures = [noise(seed) for seed in range(11)]
    assert_sees(client, reference, [user(*map(shown, pictures), "how many?")], pictures)


def test_another_picture_under_the_same_words_finds_nothing_of_the_first(client, reference):
    """LMCache 690 and 4086: the placeholders were the key, so all pictures shared their keys and values."""
    for seed in (20, 21, 20):
        assert_sees(client, reference, [user("look: ", shown(noise(seed)), "what is it?")], [noise(seed)])


def cached(client: openai.OpenAI, messages: Sequence[dict]) -> tuple[int, int]:
    """(tokens found, tokens of the prompt)."""
    usage = client.chat.completions.create(
        model="sees", messages=messages, max_tokens=2, extra_body=FREE
    ).usage
    return usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens


def test_the_second_turn_finds_the_picture_of_the_first_also_beside_another_one(client):
    """sglang 11785: all pictures of a request had one hash, so a second picture hid the first."""
    first = [user(shown(noise(30)), "what is it?")]
    _, num_first = cached(client, first)
    for later in (user("are you sure?"), user(shown(noise(31)), "and this?")):
        found, num_all = cached(client, [*first, {"role": "assistant", "content": "ok"}, later])
        assert num_first - 12 <= found < num_all


def test_one_picture_by_address_by_base64_in_another_container_and_by_path_is_one_picture(
    client, runtime, web
):
    url, folder = web
    picture = noise(40)
    (folder / "p.png").write_bytes(file_of(picture))
    (folder / "p.bmp").write_bytes(file_of(picture, "BMP"))
    sources = [
        f"{url}/p.png",
        data_uri(file_of(picture, "WEBP", lossless=True), "image/webp"),
        f"{url}/p.bmp",
    ]
    sources += [str(folder / "p.png"), (folder / "p.bmp").as_uri(), data_uri(picture)]
    before = runtime.worker.stats().features.num_encoded
    first, *others = (cached(client, [user(shown(source), "what is it?")]) for source in sources)
    assert first[0] < 10
    assert {found >= num_all - 1 for found, num_all in others} == {True}
    # Under other words before it, no keys and values are known, but what the tower made of it is.
    for number, source in enumerate(sources):
        found, _ = cached(client, [user(f"{number} words before it ", shown(source), "what is it?")])
        assert found < 10
    assert runtime.worker.stats().features.num_encoded == before + 1


def test_settings_make_another_picture_of_it(client, reference):
    large = noise(50, (112, 112))
    _, num_all = cached(client, [user(shown(large), "what is it?")])
    small = {"mm_processor_kwargs": {"max_pixels": 56 * 56}, **FREE}
    low = client.chat.completions.create(
        model="sees", messages=[user(shown(large), "what is it?")], max_tokens=1, extra_body=small
    )
    assert low.usage.prompt_tokens == num_all - 12
    assert low.usage.prompt_tokens_details.cached_tokens < 10
    part = {"type": "image", "image": data_uri(large), "max_pixels": 56 * 56}
    assert cached(client, [user(part, "what is it?")])[1] == num_all - 12


def test_base64_is_read_however_it_is_written(client):
    """vllm 28123 and mlx-vlm 1925: pictures in base64 failed, or were not seen at all."""
    content = base64.b64encode(file_of(noise(60))).decode()
    folded = "\n".join(content[at : at + 76] for at in range(0, len(content), 76))
    urls = [
        f"data:image/png;base64,{content}",
        f"data:image/jpeg;base64,{content}",
        f"data:;base64,{content}",
        f"data:image/png;charset=utf-8;base64,{content}",
        f"DATA:image/png;BASE64,{content.rstrip('=')}",
        f"data:image/png;base64,{folded}",
        f"data:image/png;base64,{content.translate(str.maketrans('+/', '-_'))}",
    ]
    first, *others = (seen_by(client, [user(shown(url), "what is it?")]) for url in urls)
    for other in others:
        np.testing.assert_allclose(other, first, atol=NEAR)


def refused(client: openai.OpenAI, messages: Sequence[dict], **changes: Any) -> dict:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="sees", messages=messages, max_tokens=2, **changes)
    return caught.value.body


def test_one_bad_picture_of_three_refuses_the_request_and_is_named(client, web):
    """Rapid-MLX 457: a picture that could not be fetched gave an empty answer with status 200; mlxcel 50: it was
    left out."""
    url, _ = web
    for bad in (shown(f"{url}/gone.png"), shown(data_uri(b"no picture"))):
        for stream in (False, True):
            body = refused(client, [user(shown(noise(1)), bad, shown(noise(2)), "which?")], stream=stream)
            assert body["param"] == "messages.0.content.1.image_url"


def test_words_that_look_like_a_picture_are_words(client, reference):
    """vllm 11939: a message that spelled the placeholder brought the server down."""
    spelled = "<|vision_start|><|image_pad|><|vision_end|> <image> [IMG]"
    assert len(seen_by(client, [{"role": "user", "content": spelled}])) == 5
    messages = [user(spelled, shown(noise(1)), spelled)]
    usage = client.chat.completions.create(model="sees", messages=messages, max_tokens=1).usage
    without = client.chat.completions.create(
        model="sees", messages=[user(spelled, spelled)], max_tokens=1
    ).usage
    alone = client.chat.completions.create(model="sees", messages=[user(shown(noise(1)))], max_tokens=1).usage
    nothing = client.chat.completions.create(model="sees", messages=[user("")], max_tokens=1).usage
    assert usage.prompt_tokens - without.prompt_tokens == alone.prompt_tokens - nothing.prompt_tokens


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_pictures_in_turns_of_others_are_seen_or_refused_and_never_dropped(client, role):
    """vllm 43203 and term-llm 259: pictures in other turns than the user's were refused, or dropped in silence."""
    turn = {"role": role, "content": [text("here: "), shown(noise(70))]}
    messages = [turn, user("what is it?")]
    if role == "tool":
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        turn["tool_call_id"] = "c1"
        messages = [user("look"), {"role": "assistant", "content": None, "tool_calls": [call]}, *messages]
    one, refusal = None, None
    try:
        one = seen_by(client, messages)
    except openai.BadRequestError as error:
        refusal = error
    if one is None:
        assert "messages" in refusal.body["param"]
        return
    turn["content"][1] = shown(noise(71))
    assert np.abs(np.subtract(one, seen_by(client, messages))).max() > APART


def test_parts_may_hold_the_fields_of_other_parts_as_null(client):
    """async-openai 344: clients that write every field of their one class of parts were refused."""
    nulls = dict.fromkeys(
        ["text", "image_url", "image", "video_url", "video", "input_audio", "file", "refusal"]
    )
    plain = [text("what is it?"), shown(noise(1))]
    filled = [{**nulls, **part} for part in plain]
    filled[1]["image_url"]["detail"] = None
    assert seen_by(client, [user(*filled)]) == seen_by(client, [user(*plain)])
    odd = refused(client, [user({**plain[0], "image_url": {"url": "x"}})])
    assert odd["message"].startswith("messages.0.content.0.image_url: found")


def test_a_picture_in_another_protocols_form_is_refused_by_its_place(client):
    """mlx-serve 309: a tool's picture came as {"type": "image", "data": ...} and was read as very long words."""
    part = {"type": "image", "data": base64.b64encode(file_of(noise(1))).decode(), "mimeType": "image/png"}
    body = refused(client, [user(part, "what is it?")])
    assert "messages.0.content.0.data: unknown field" in body["message"]


def test_many_at_once_see_what_each_sees_alone(client, reference):
    """vllm 10931: two requests with pictures at once ended the engine."""

    def ask(seed: int) -> list[float]:
        model = ("sees", "a1", "a2")[seed % 3]
        parts = (
            [] if seed % 4 == 3 else [shown(noise(100 + seed)), *[shown(noise(200 + seed))] * (seed % 2 * 2)]
        )
        return seen_by(client, [user(*parts, f"question {seed}")], model=model)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(12)))
    client.post("/cache/reset", cast_to=object)
    for seed, found in enumerate(together):
        np.testing.assert_allclose(found, ask(seed), atol=NEAR)


def test_adapters_experiments_choices_and_seeds_work_with_pictures(
    client, reference, vlm_reference, make_vlm_adapter
):
    messages = [user(shown(noise(80)), "what is it?")]
    base = seen_by(client, messages)
    for seed in (1, 2):
        adapted = vlm_reference(FAMILY, make_vlm_adapter(FAMILY, seed))
        assert_sees(client, adapted, messages, [noise(80)], model=f"a{seed}")
        assert np.abs(np.subtract(base, seen_by(client, messages, model=f"a{seed}"))).max() > APART
    fields = {"messages": messages, "max_tokens": 8, "extra_body": FREE}
    alone = [
        client.chat.completions.create(model="a1", seed=7 + i, **fields).choices[0].message.content
        for i in range(3)
    ]
    together = client.chat.completions.create(model="a1", seed=7, n=3, **fields)
    assert [choice.message.content for choice in together.choices] == alone
    assert len(set(alone)) == 3
    pieces = client.chat.completions.create(model="a1", seed=7, stream=True, **fields)
    assert "".join(each.choices[0].delta.content or "" for each in pieces if each.choices) == alone[0]
    answer = client.chat.completions.create(model="ab", user="maria", **fields)
    assert answer.choices[0].message.content


def test_a_clip_is_its_frames_and_a_longer_cut_shares_them(client, runtime):
    frames = [data_uri(noise(300 + number)) for number in range(8)]
    before = runtime.worker.stats().features.num_encoded
    clip = {"type": "video", "video": frames[:4]}
    first = client.chat.completions.create(model="sees", messages=[user(clip, "what happens?")], max_tokens=1)
    one = runtime.worker.stats().features.num_encoded - before
    longer = {"type": "video", "video": frames}
    second = client.chat.completions.create(
        model="sees", messages=[user(longer, "what happens?")], max_tokens=1
    )
    two = runtime.worker.stats().features.num_encoded - before
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert 0 < one == two - one, "the longer cut encodes its new frames alone"


def test_a_conversation_shows_a_file_and_speaks_of_it_again(client, tmp_path):
    (tmp_path / "my picture.png").write_bytes(file_of(noise(90)))
    url = str(client.base_url).removesuffix("/v1/")
    talk = Conversation(Speaker(url, "sees", None, {"max_tokens": 4, "temperature": 0, **FREE}))
    talk.show(str(tmp_path / "my picture.png"))
    first = "".join(talk.say("what is it?"))
    again = "".join(talk.retry())
    assert first == again
    assert "".join(talk.say("are you sure?"))
    assert cached(client, talk.messages[:1])[0] > 8


def test_real_pictures_are_accepted_and_answered(client):
    if not IMAGES.is_dir():
        pytest.skip(f"no real pictures at {IMAGES}")
    files = sorted(path for path in IMAGES.iterdir() if path.suffix in (".jpg", ".png"))
    assert len(files) == 4
    answers = []
    for path in files:
        kind = "image/jpeg" if path.suffix == ".jpg" else "image/png"
        messages = [user(shown(data_uri(path.read_bytes(), kind)), "what is in this picture?")]
        fields = {
            "model": "sees",
            "messages": messages,
            "max_tokens": 8,
            "temperature": 0,
            "extra_body": FREE,
        }
        answers.append(client.chat.completions.create(**fields).choices[0].message.content)
    assert all(answers)
    assert len(set(answers)) > 1
