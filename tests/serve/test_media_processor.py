"""Laws of MediaProcessor: a picture alone is what the family's own processor makes of it in company, and is known by
what it holds."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from vlm_families import FAMILIES, LARGE_VLM_FAMILIES, chats_of, clip, message, picture, sound

from serve.errors import ModelError, RequestError
from serve.media.content import Clip, Picture, Sound
from serve.media.parts import MediaPart, media_part
from serve.media.processor import MediaProcessor, Processed, load_processor
from serve.media.settings import MediaSettings
from serve.media.sources import Sources
from serve.model.family_template import PALIGEMMA
from serve.model.loading import load
from serve.model.retold import Retold
from serve.model.template import ChatTemplate

WORDS = "is it <|image_pad|> or <image> or <start_of_image> or [IMG] or <IMG_CONTEXT> or <|video_pad|> now?"
"""Words that look like the placeholders of all families."""


class Unknown:
    """A tower whose placeholder no processor writes."""

    image_token_id = 40
    video_token_id = None
    audio_token_id = None
    block_kind = None

    def blocks(self, token_ids, media):
        return ()

    def rope_index(self, token_ids, media):
        return None


class Eyes(NamedTuple):
    processor: MediaProcessor
    template: ChatTemplate
    folder: Path
    vision: Any

    def remade(self, **options: Any) -> MediaProcessor:
        """Another that has seen nothing."""
        return MediaProcessor(self.folder, load_processor(self.folder), self.vision, **options)

    def process(self, messages: list[dict[str, Any]]) -> list[Processed]:
        return [self.processor.process(content_of(part), name=part.name) for part in parts_of(messages)]

    def prompt(self, messages: list[dict[str, Any]]):
        processed = self.process(messages)
        ids = self.template.render(messages, media=[item.expansion for item in processed])
        return self.processor.prompt(ids, processed)


def parts_of(messages: list[dict[str, Any]]) -> list[MediaPart]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [
        media_part(part, f"messages.{i}.content.{number}")
        for i, content in enumerate(contents)
        for number, part in enumerate(content)
        if part["type"] != "text"
    ]


def content_of(part: MediaPart):
    """Clips of these tests are arrays [T, 3, H, W], which the reference takes for frames at 2 a second."""
    if part.kind == "video":
        frames = [Picture(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in part.source]
        return Clip(tuple(frames), tuple(number / 2 for number in range(len(frames))))
    return Sources().load(part)


@pytest.fixture(scope="module")
def eyes(vlm_folder):
    @cache
    def made(family: str) -> Eyes:
        folder = vlm_folder(family)
        model = load(str(folder))
        assert model.vision is not None
        processor = MediaProcessor(folder, load_processor(folder), model.vision)
        # Google's folders of PaliGemma have no template, and this is how it was trained.
        tokenizer = Retold(model.tokenizer, PALIGEMMA) if family == "paligemma" else model.tokenizer
        return Eyes(processor, ChatTemplate(tokenizer), folder, model.vision)

    return made


def chats(family: str) -> dict[str, list[dict[str, Any]]]:
    """Pictures in one turn and in several, none, and between words; one size each where a family needs it."""
    found = dict(chats_of(family))
    if "clip" in found:  # of an odd number of frames the reference, told no times, makes up the last one's
        found["clip"] = [message("look: ", clip(1, 4), "what is this?")]
    if FAMILIES[family].max_pictures == 1:
        return found
    second = picture(5) if family == "pixtral" else picture(5, 80, 56)
    found["turns"] = [
        message(picture(4), "what is this?"),
        {"role": "assistant", "content": "a thing."},
        message("and", second, "\n\n", picture(6), "\nwhich is second?"),
        {"role": "assistant", "content": [{"type": "text", "text": "the red one."}]},
        message("thank you."),
    ]
    found["same twice"] = [message(picture(4), picture(4)), message("the same?")]
    if family == "pixtral":
        found["picture"] = [message(picture(1), "what is this?")]
        found["pictures"] = [message(picture(1), "a", picture(2), "b", picture(3), "which is second?")]
    return found


def joined(pieces: list[np.ndarray], whole: np.ndarray) -> np.ndarray:
    """Pieces side by side, along the axis on which the whole is longer."""
    axis = next((i for i, size in enumerate(whole.shape) if size != pieces[0].shape[i]), 0)
    return np.concatenate(pieces, axis=axis)


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_prompts_and_pixels_are_those_of_the_familys_own_processor_over_the_whole_chat(
    family, eyes, vlm_reference
):
    reference = vlm_reference(family)
    for name, messages in chats(family).items():
        row = reference.row(messages)
        processed = eyes(family).process(messages)
        ids = eyes(family).template.render(messages, media=[item.expansion for item in processed])
        assert ids == row.token_ids, name
        seen = {key for item in processed for piece in item.pieces for key in piece.inputs}
        assert seen == {key for key in row.inputs if key not in ("num_patches_list", "video_second_per_grid")}
        for key in seen:
            if key == "video_grid_thw":
                continue  # of a clip that is cut into its temporal patches
            pieces = [p.inputs[key] for item in processed for p in item.pieces if key in p.inputs]
            whole = np.array(row.inputs[key])
            if key == "input_features":  # a spectrum is a product, rounded otherwise in another shape
                np.testing.assert_allclose(joined(pieces, whole), whole, atol=1e-5, err_msg=f"{name} {key}")
            else:
                np.testing.assert_array_equal(joined(pieces, whole), whole, err_msg=f"{name} {key}")


def one_colour(height: int, width: int, colour: tuple[int, int, int]) -> Picture:
    return Picture(np.full((height, width, 3), colour, np.uint8))


TINY = [(1, 1), (3, 3), (1, 40), (40, 1), (3, 22), (22, 3), (2, 5), (13, 13), (27, 257)]
"""(height, width), among them those of which an array looks as if its rows were colours."""


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_tiny_pictures_keep_their_colour_and_their_count(family, eyes):
    """Red, green and blue each as anywhere in a large picture of that colour."""
    processor = eyes(family).processor
    expected = colours(processor.process(one_colour(56, 56, (250, 128, 5))).pieces[0])
    for size in TINY:
        found = processor.process(one_colour(*size, (250, 128, 5)))
        (piece,) = found.pieces
        assert found.expansion.text.count(found.expansion.placeholder) == piece.num_placeholders > 0
        np.testing.assert_allclose(colours(piece), expected, atol=1e-2, err_msg=str(size))


def colours(piece) -> np.ndarray:
    """[3, 2]: the least and the most of each colour in what a tower is given."""
    pixels = piece.inputs["pixel_values"]
    flat = pixels.reshape(len(pixels), 3, -1) if pixels.ndim == 2 else np.moveaxis(pixels, -3, 1)
    each = np.moveaxis(flat, 1, 0).reshape(3, -1)
    return np.stack([each.min(axis=1), each.max(axis=1)], axis=1)


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_what_no_processor_takes_is_refused_by_name_or_taken(family, eyes):
    """A strip of 1 x 3000 pixels."""
    for size in ((1, 3000), (3000, 1)):
        refused = None
        try:
            eyes(family).processor.process(one_colour(*size, (1, 2, 3)), name="messages.0.content.0.image")
        except RequestError as error:
            refused = error
        if refused is not None:
            assert refused.param == "messages.0.content.0.image"
            assert f"a picture of {size[1]} x {size[0]} pixels" in str(refused)


def test_a_strip_of_a_clip_is_refused_before_it_is_made_larger(eyes):
    """Enlarged until its short side is a patch's, this one would take 5 GB a frame."""
    strip = Clip((one_colour(1, 2_000_000, (1, 2, 3)),) * 2, (0.0, 0.5))
    with pytest.raises(RequestError, match="one side is more than 200 times the other"):
        eyes("qwen2_vl").processor.process(strip)


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_a_key_is_of_what_the_tower_is_given(family, eyes):
    processor = eyes(family).processor
    same = [Picture(np.asarray(picture(1, 56, 80)).copy()) for _ in range(2)]
    other = Picture(np.asarray(picture(2, 56, 80)))
    (first,), (again,) = (MediaProcessor.process(processor, one).pieces for one in same)
    assert first.key == again.key
    assert processor.process(other).pieces[0].key != first.key
    small = processor.process(same[0], MediaSettings(max_pixels=30 * 30)).pieces[0]
    assert small.key != first.key
    assert processor.process(same[0], MediaSettings(resize=(28, 28))).pieces[0].key != first.key


def test_pixels_asked_for_are_the_towers_own_bounds(eyes):
    processor = eyes("qwen3_vl").processor
    big = Picture(np.asarray(picture(1, 320, 256)))
    counts = {
        bound: processor.process(big, MediaSettings(max_pixels=bound)).num_placeholders
        for bound in (32 * 32, 64 * 64, 128 * 128)
    }
    assert counts == {32 * 32: 1, 64 * 64: 2, 128 * 128: 12}
    small = Picture(np.asarray(picture(1, 32, 32)))
    assert processor.process(small, MediaSettings(min_pixels=96 * 96)).num_placeholders == 9
    resized = processor.process(big, MediaSettings(resize=(64, 96)))
    assert resized.size == (64, 96)
    assert resized.num_placeholders == 6
    assert processor.process(big).size == (96, 128)  # within the bounds of its own


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_longer_cut_of_a_clip_shares_the_pieces_of_the_shorter(family, eyes):
    processor = eyes(family).processor
    frames = [Picture(np.ascontiguousarray(f.transpose(1, 2, 0))) for f in clip(1, 12)]
    clips = [Clip(tuple(frames[:n]), tuple(i / 2 for i in range(n))) for n in (4, 8, 7)]
    short, long, odd = (processor.process(one).pieces for one in clips)
    assert [len(pieces) for pieces in (short, long, odd)] == [2, 4, 4]
    assert [p.key for p in short] == [p.key for p in long[:2]]
    assert [p.key for p in odd[:3]] == [p.key for p in long[:3]]
    assert odd[3].key != long[3].key
    assert len({piece.key for piece in long}) == 4
    elsewhere = [Picture(np.ascontiguousarray(f.transpose(1, 2, 0))) for f in clip(2, 4)]
    other = processor.process(Clip(tuple(elsewhere), (0, 0.5, 1, 1.5))).pieces
    assert not {p.key for p in other} & {p.key for p in short}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_omni_moe"])
def test_clips_of_other_lengths_and_sizes_and_pictures_share_a_prompt(family, eyes):
    """Each has its own count of placeholders, and positions follow one another."""
    messages = [
        message(clip(1, 4), "a", picture(1), clip(2, 7, 84, 56), "b"),
        {"role": "assistant", "content": "yes."},
        message(clip(3, 1), picture(2, 80, 56), clip(4, 2, 20, 20)),
    ]
    prompt = eyes(family).prompt(messages)
    assert [media.kind for media in prompt.media] == [
        *["video"] * 2,
        "image",
        *["video"] * 4,
        "video",
        "image",
        "video",
    ]
    positions = np.concatenate([media.positions for media in prompt.media])
    assert (np.diff(positions) > 0).all()
    assert prompt.rope is not None
    assert prompt.rope.positions.shape == (3, len(prompt.token_ids))


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_words_that_look_like_placeholders_stay_words(family, eyes):
    seen = eyes(family)
    if FAMILIES[family].max_pictures == 1:
        said = [message(picture(1), f"a {WORDS}")]
    else:
        said = [
            message(f"a {WORDS}", picture(1), WORDS),
            {"role": "assistant", "content": WORDS},
            message("b"),
        ]
    prompt = seen.prompt(said)
    plain = seen.prompt([message(picture(1), "b")])
    assert [m.key for m in prompt.media] == [m.key for m in plain.media]
    assert len(prompt.media[0].positions) == len(plain.media[0].positions)
    assert seen.template.tokenizer.decode(prompt.token_ids).count(WORDS) == len(said)


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_placeholders_that_do_not_come_out_even_are_refused(family, eyes):
    seen = eyes(family)
    shown = seen.process([message(picture(1), "a")])
    ids = seen.template.render([message(picture(1), "a")], media=[shown[0].expansion])
    for token_ids, processed in ((ids, []), (ids + ids[-40:] + ids, shown), (ids[:3], shown)):
        with pytest.raises(RequestError, match="placeholders where its media need"):
            seen.processor.prompt(token_ids, processed)


def test_blocks_are_the_runs_of_a_picture_or_the_whole_prompt(eyes):
    gemma = eyes("gemma3").prompt([message(picture(1), "a", picture(2))])
    assert [b - a for a, b in gemma.blocks] == [4, 4]
    assert [a for a, _ in gemma.blocks] == [media.start for media in gemma.media]
    pali = eyes("paligemma").prompt([message(picture(1), "a")])
    assert pali.blocks == ((0, len(pali.token_ids)),)
    assert eyes("qwen2_vl").prompt([message(picture(1), "a")]).blocks == ()


def test_a_family_that_was_trained_with_one_picture_takes_one(eyes):
    with pytest.raises(RequestError, match="this model takes 1 in a prompt"):
        eyes("paligemma").prompt([message(picture(1), picture(2), "a")])


def test_kinds_that_a_family_does_not_take_are_refused_by_name(eyes):
    frames = (one_colour(56, 56, (1, 2, 3)),) * 2
    for content, said in (
        (Clip(frames, (0.0, 0.5)), "found a clip; this model takes image"),
        (Sound(np.zeros(100, np.float32), 16000), "found a sound; this model takes image"),
    ):
        with pytest.raises(RequestError, match=said) as caught:
            eyes("gemma3").processor.process(content, name="messages.0.content.2.video")
        assert caught.value.param == "messages.0.content.2.video"


def test_a_sound_that_would_be_cut_is_refused(eyes):
    processor = eyes("qwen3_omni_moe").processor
    assert processor.process(Sound(sound(1, 3.9), 16000)).num_placeholders > 0
    with pytest.raises(RequestError, match="at most 4 s are read, and a longer one would be cut"):
        processor.process(Sound(sound(1, 4.1), 16000))
    slow = processor.process(Sound(sound(1, 2.0, 48000), 48000))
    assert slow.num_placeholders == processor.process(Sound(sound(1, 2.0), 16000)).num_placeholders


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_a_picture_that_is_split_has_a_placeholder_for_every_crop(
    family, eyes, vlm_folder, vlm_reference, tmp_path
):
    folder = tmp_path / family
    shutil.copytree(vlm_folder(family), folder)
    path = folder / "preprocessor_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "do_image_splitting": True, "size": {"longest_edge": 168}}))
    model = load(str(folder))
    processor = MediaProcessor(folder, load_processor(folder), model.vision)
    seen = Eyes(processor, ChatTemplate(model.tokenizer), folder, model.vision)
    prompt = seen.prompt([message(picture(1, 168, 112), "a", picture(2, 56, 168))])
    for media in prompt.media:
        assert media.inputs["pixel_values"].shape[1] * 4 == len(media.positions) > 4
        features = model.vision.encode(media)
        assert features.embeddings.shape[0] == len(media.positions)


def test_threads_share_a_processor(eyes):
    """A tokenizer of Rust cannot be borrowed twice, and each thread has other pictures."""
    processor = eyes("internvl_chat").processor
    pictures = [Picture(np.asarray(picture(seed, 56, 56 + 8 * (seed % 5)))) for seed in range(40)]
    expected = [processor.process(one) for one in pictures]
    fresh = eyes("internvl_chat").remade()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fresh.process, pictures))
    assert [f.pieces[0].key for f in found] == [e.pieces[0].key for e in expected]
    assert [f.expansion for f in found] == [e.expansion for e in expected]


def test_what_was_processed_is_kept_in_a_budget_of_bytes(eyes):
    processor = eyes("qwen3_vl").remade(cache_bytes=100_000)
    pictures = [Picture(np.asarray(picture(seed))) for seed in range(3)]
    first = processor.process(pictures[0])
    assert processor.process(Picture(pictures[0].pixels.copy())) is first
    for _ in range(2):
        for one in pictures:
            processor.process(one)
    again = processor.process(pictures[0])
    assert again is not first or 3 * first.num_bytes <= 100_000
    assert again.pieces[0].key == first.pieces[0].key


def test_a_processor_without_placeholders_is_named(eyes, vlm_folder):
    with pytest.raises(ModelError, match="writes no placeholder for image"):
        MediaProcessor(vlm_folder("qwen3_vl"), load_processor(vlm_folder("qwen3_vl")), Unknown())


def test_a_processor_that_cannot_be_loaded_is_told_of_with_the_reason(vlm_folder, tmp_path):
    folder = tmp_path / "gemma3"
    shutil.copytree(vlm_folder("gemma3"), folder)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="gemma3: its processor cannot be loaded"):
        load_processor(folder)


def test_frames_of_another_rate_are_timed_so_in_the_text(eyes):
    """Qwen3-VL reads when a frame was seen."""
    processor = eyes("qwen3_vl").processor
    frames = tuple(Picture(np.ascontiguousarray(f.transpose(1, 2, 0))) for f in clip(1, 4))
    texts = {
        fps: processor.process(Clip(frames, tuple(i / fps for i in range(4)))).expansion.text
        for fps in (1, 2)
    }
    assert "<0.2 seconds>" in texts[2]
    assert "<1.2 seconds>" in texts[2]
    assert "<0.5 seconds>" in texts[1]
    assert "<2.5 seconds>" in texts[1]


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_what_a_picture_costs_and_its_size_are_the_towers(family, eyes):
    """Four by four patches of a square picture, which each family's is made into."""
    found = eyes(family).processor.process(one_colour(56, 56, (1, 2, 3)))
    edge = 64 if family in ("qwen3_vl", "qwen3_5", "qwen3_vl_moe", "qwen3_omni_moe") else 56
    assert found.size == (edge, edge)
    assert found.pieces[0].num_patches == 16


def test_what_a_sound_costs_grows_with_it(eyes):
    processor = eyes("qwen3_omni_moe").processor
    short, long = (processor.process(Sound(sound(1, s), 16000)).pieces[0].num_patches for s in (1.0, 2.0))
    assert 0 < short < long
