"""Clips: which frames are taken, from films, animations and lists; and sounds, one channel whatever held them."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from serve.errors import RequestError
from serve.media.clips import clip_of, numbers_of, read_clip
from serve.media.content import Picture
from serve.media.settings import MediaLimits, MediaSettings
from serve.media.sounds import read_sound, resampled, sound_of

NAME = "messages.0.content.1.video_url"
RATE = 10.0


def shade(number: int) -> np.ndarray:
    """[32, 48, 3] of one grey a frame number, far enough apart to be told after compression."""
    return np.full((32, 48, 3), 30 + 5 * number, np.uint8)


def film(num_frames: int, folder: Path, suffix: str = ".avi", code: str = "MJPG") -> bytes:
    path = folder / f"film{num_frames}{suffix}"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), RATE, (48, 32))
    for number in range(num_frames):
        writer.write(shade(number))
    writer.release()
    return path.read_bytes()


def numbers(clip) -> list[int]:
    """Which frames of `film` a clip holds."""
    return [round((float(frame.pixels.mean()) - 30) / 5) for frame in clip.frames]


def refusal(data: bytes, **limits) -> str:
    with pytest.raises(RequestError) as caught:
        read_clip(data, NAME, MediaSettings(), MediaLimits(**limits))
    assert caught.value.param == NAME
    assert str(caught.value).startswith(f"{NAME}: ")
    return str(caught.value)


@pytest.mark.parametrize(("suffix", "code"), [(".avi", "MJPG"), (".mp4", "mp4v")])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (MediaSettings(), [0, 5, 10, 15, 20, 25]),
        (MediaSettings(fps=5), list(range(0, 30, 2))),
        (MediaSettings(fps=100), list(range(30))),
        (MediaSettings(fps=0.1), [0]),
        (MediaSettings(max_frames=3), [0, 14, 29]),
        (MediaSettings(fps=4, max_frames=40), [0, 2, 5, 8, 10, 12, 15, 18, 20, 22, 25, 28]),
    ],
)
def test_frames_are_taken_at_the_rate_asked_for(settings, expected, suffix, code, tmp_path):
    data = film(30, tmp_path, suffix, code)
    whole = [frame.sha256 for frame in read_clip(data, NAME, MediaSettings(fps=RATE)).frames]
    assert len(set(whole)) == 30
    clip = read_clip(data, NAME, settings)
    assert [whole.index(frame.sha256) for frame in clip.frames] == expected
    np.testing.assert_allclose(clip.times_s, [number / RATE for number in expected])


def test_a_longer_cut_begins_with_the_same_frames(tmp_path):
    short, long = (read_clip(film(n, tmp_path), NAME, MediaSettings(fps=3)) for n in (20, 40))
    assert len(short.frames) < len(long.frames)
    shared = len(short.frames)
    assert [f.sha256 for f in short.frames] == [f.sha256 for f in long.frames[:shared]]
    assert short.times_s == long.times_s[:shared]
    assert short.sha256 != long.sha256


def test_numbers_never_leave_the_film_and_ascend():
    rng = random.Random(0)
    for _ in range(2000):
        count, rate = rng.randint(1, 5000), rng.uniform(0.5, 240)
        settings = MediaSettings(fps=rng.uniform(0.01, 240), max_frames=rng.choice((None, 1, 7, 768)))
        found = numbers_of(count, rate, settings, MediaLimits(max_video_frames=1000))
        assert found == tuple(sorted(set(found)))
        assert found[0] == 0
        assert found[-1] < count
        assert len(found) <= min(settings.max_frames or 1000, 1000)


def test_a_film_that_ends_before_its_header_says_gives_what_there_is(tmp_path):
    data = film(30, tmp_path)
    clip = read_clip(data[: len(data) * 2 // 3], NAME, MediaSettings(fps=RATE))
    assert 1 <= len(clip.frames) < 30
    assert numbers(clip)[:-1] == list(range(len(clip.frames) - 1))


def animation(form: str, num_frames: int = 12, duration: int = 100) -> bytes:
    stream = io.BytesIO()
    frames = [Image.fromarray(shade(number)) for number in range(num_frames)]
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(
        stream, form, save_all=True, append_images=frames[1:], duration=duration, loop=0, **options
    )
    return stream.getvalue()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_a_film(form):
    """Of twelve frames of a tenth of a second each."""
    clip = read_clip(animation(form), NAME, MediaSettings(fps=5))
    assert numbers(clip) == [0, 2, 4, 6, 8, 10]
    np.testing.assert_allclose(clip.times_s, [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert len(read_clip(animation(form), NAME, MediaSettings(max_frames=2)).frames) == 2


def test_a_still_picture_is_a_clip_of_one_frame():
    stream = io.BytesIO()
    Image.fromarray(shade(3)).save(stream, "PNG")
    assert numbers(read_clip(stream.getvalue(), NAME)) == [3]


def test_frames_that_are_given_are_all_taken():
    frames = [Picture(shade(number)) for number in range(5)]
    clip = clip_of(frames, NAME, MediaSettings(fps=4))
    assert numbers(clip) == [0, 1, 2, 3, 4]
    assert clip.times_s == (0, 0.25, 0.5, 0.75, 1.0)
    for settings, given, said in (
        (MediaSettings(max_frames=4), frames, "max_frames is 4"),
        (MediaSettings(), [], "no frames"),
        (MediaSettings(), [*frames, Picture(np.zeros((8, 8, 3), np.uint8))], "expected one size"),
    ):
        with pytest.raises(RequestError, match=said):
            clip_of(given, NAME, settings)


def test_what_is_no_film_is_refused(tmp_path):
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    for data in (
        b"",
        b"hello",
        playlist,
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"\xff\xd8\xff" + b"x" * 99,
    ):
        assert "no film that is read" in refusal(data)
    assert "cannot be decoded" in refusal(b"\0\0\0\x18ftypisom" + b"\0" * 64)
    assert "cannot be decoded" in refusal(b"\x1aE\xdf\xa3" + b"\0" * 64)
    data = film(30, tmp_path)
    assert "pixels together" in refusal(data, max_video_pixels=32 * 48 * 4)
    assert "frames of 48 x 32 pixels" in refusal(data, max_image_pixels=1000)
    assert "took more than" in refusal(data, decode_s=0.0)


def test_broken_films_give_a_clip_or_a_refusal_and_nothing_else(tmp_path):
    rng = random.Random(0)
    wholes = [film(8, tmp_path), film(8, tmp_path, ".mp4", "mp4v"), animation("GIF"), animation("WEBP")]
    for whole in wholes:
        for _ in range(15):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 5, 40))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                clip = read_clip(bytes(data), NAME, MediaSettings(fps=5), MediaLimits(max_image_pixels=10**6))
            except RequestError:
                continue
            assert len(clip.frames) == len(clip.times_s) > 0


# Sounds


def wav(samples: np.ndarray, rate: int) -> bytes:
    """16-bit PCM of samples [n, channels] in [-1, 1]."""
    channels = samples.shape[1]
    body = (samples * 32767).round().astype("<i2").tobytes()
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def tone(pitch: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


def test_channels_become_one_and_keep_their_rate():
    left, right = tone(440, 22050), tone(660, 22050)
    sound = read_sound(wav(np.stack([left, right], axis=1), 22050), NAME)
    assert sound.rate == 22050
    np.testing.assert_allclose(sound.samples, (left + right) / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_a_sound_brought_to_another_rate_is_the_same_sound(rate):
    sound = resampled(read_sound(wav(tone(440, rate)[:, None], rate), NAME), 16000)
    assert sound.rate == 16000
    assert sound.samples.dtype == np.float32
    expected = tone(440, 16000)
    assert len(sound.samples) == len(expected)
    np.testing.assert_allclose(sound.samples[500:-500], expected[500:-500], atol=5e-3)


def test_rates_without_a_common_measure_are_refused():
    with pytest.raises(ValueError, match="usual rate"):
        resampled(sound_of(tone(440, 8000), NAME, 191_999), 16000)


def test_sounds_are_known_by_their_samples_and_rate():
    samples = tone(440, 8000).astype(np.float32)
    keys = {sound_of(samples, NAME, rate).sha256 for rate in (8000, 16000)}
    assert len(keys) == 2
    assert sound_of(samples.copy(), NAME, 8000).sha256 in keys


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"OggS" + b"\0" * 40, b"RIFF\0\0\0\0WAVE", b"fLaC" + b"\0" * 60, b"ID3" + b"\0" * 60],
)
def test_what_is_no_sound_is_refused(data):
    with pytest.raises(RequestError) as caught:
        read_sound(data, NAME)
    assert caught.value.param == NAME


def test_a_sound_that_is_too_long_is_refused_by_its_header():
    with pytest.raises(RequestError, match="0 s of sound; at most 0"):
        read_sound(wav(tone(440, 8000)[:, None], 8000), NAME, MediaLimits(max_audio_s=0.1))


def test_broken_sounds_give_a_sound_or_a_refusal_and_nothing_else():
    rng = random.Random(0)
    whole = wav(tone(440, 8000, 0.1)[:, None], 8000)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(60)] = rng.randrange(256)
        try:
            sound = read_sound(bytes(data), NAME)
        except RequestError:
            continue
        assert np.isfinite(sound.samples).all()
