"""Laws of MediaProcessor: a picture alone is what the family's own processor makes of it in company, and is known by
what it holds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from vlm_families import FAMILIES, LARGE_VLM_FAMILIES, chats_of, clip, message, picture

from serve.media.content import Clip, Picture
from serve.media.parts import media_parts
from serve.media.processor import MediaProcessor, Processed, load_processor
from serve.media.settings import MediaLimits, MediaSettings
from serve.media.sources import Sources
from serve.model.loading import load
from serve.model.template import ChatTemplate

WORDS = "is it <|image_pad|> or <image> or <start_of_image> or [IMG] or <IMG_CONTEXT> or <|video_pad|> now?"
"""Words that look like the placeholders of all families."""


class Eyes(NamedTuple):
    processor: MediaProcessor
    template: ChatTemplate
    folder: Path

    def process(self, messages: list[dict[str, Any]], **settings: Any) -> list[Processed]:
        sources = Sources(MediaLimits())
        told = MediaSettings(**settings)
        return [
            self.processor.process(content_of(sources, part), told, part.name)
            for part in media_parts(messages)
        ]

    def prompt(self, messages: list[dict[str, Any]]):
        processed = self.process(messages)
        ids = self.template.render(messages, media=[item.expansion for item in processed])
        return self.processor.prompt(ids, processed)


def content_of(sources: Sources, part):
    """Clips of these tests are arrays [T, 3, H, W], which the reference takes for frames at 2 a second."""
    if part.kind == "video":
        frames = [Picture(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in part.source]
        return Clip(tuple(frames), tuple(number / 2 for number in range(len(frames))))
    return sources.load(part)


@pytest.fixture(scope="module")
def eyes(vlm_folder):
    @cache
    def made(family: str) -> Eyes:
        folder = vlm_folder(family)
        model = load(str(folder))
        assert model.vision is not None
        processor = MediaProcessor(folder, load_processor(folder), model.vision)
        return Eyes(processor, ChatTemplate(model.tokenizer), folder)

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
        if (
            family == "paligemma"
        ):  # its processor ends every text by a new line; here that is the template's to write
            decode = reference.tokenizer.decode
            assert decode(ids) + "\n" == decode(row.token_ids), name
        else:
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
