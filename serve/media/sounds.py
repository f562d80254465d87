"""A sound's bytes -> one channel of samples, at the rate it has; `resampled` brings it to a model's.

wav, flac and mp3, by miniaudio, which mlx-vlm brings. Knows no models.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np

from serve.errors import RequestError
from serve.media.content import Sound
from serve.media.settings import MediaLimits

_READ = "wav, flac and mp3"
MAX_RATE = 384_000
MAX_RATIO = 48_000
"""Of two rates in lowest terms: the filter between them has 128 times as many taps."""


def read_sound(data: bytes, name: str, limits: MediaLimits = MediaLimits()) -> Sound:
    """The sound in a file's bytes, channels averaged. RequestError that begins with `name`."""
    import miniaudio

    try:
        info = _info(data)
    except miniaudio.MiniaudioError as error:
        raise RequestError(f"{name}: the sound cannot be decoded: {error}", name) from None
    if info is None:
        raise RequestError(f"{name}: found no sound that is read; expected {_READ}", name)
    rate, channels = info.sample_rate, info.nchannels
    if not 1 <= rate <= MAX_RATE or not 1 <= channels <= 32:
        raise RequestError(f"{name}: found {rate} samples a second in {channels} channels", name)
    length_s = info.num_frames / rate
    if length_s > limits.max_audio_s:
        raise RequestError(
            f"{name}: found {length_s:,.0f} s of sound; at most {limits.max_audio_s:,.0f} are read", name
        )
    try:
        decoded = miniaudio.decode(
            data, output_format=miniaudio.SampleFormat.FLOAT32, nchannels=channels, sample_rate=rate
        )
    except miniaudio.MiniaudioError as error:
        raise RequestError(f"{name}: the sound cannot be decoded: {error}", name) from None
    samples = np.asarray(decoded.samples, dtype=np.float32).reshape(-1, channels)
    return sound_of(samples, name, rate)


def sound_of(samples: np.ndarray, name: str, rate: int = 16_000) -> Sound:
    """Samples that are decoded already, [n] or [n, channels]. RequestError for none, or what is no number."""
    mono = samples.astype(np.float32)
    if mono.ndim == 2:
        mono = mono.mean(axis=1, dtype=np.float32)
    if mono.ndim != 1 or not mono.size:
        raise RequestError(f"{name}: found no samples; expected a sound", name)
    if not np.isfinite(mono).all():
        raise RequestError(f"{name}: found samples that are no numbers", name)
    mono.flags.writeable = False
    return Sound(mono, rate)


def resampled(sound: Sound, rate: int) -> Sound:
    """The same sound at another rate, by the filter that mlx-vlm uses. ValueError for rates too far from a ratio."""
    if rate == sound.rate:
        return sound
    if max(rate, sound.rate) // gcd(rate, sound.rate) > MAX_RATIO:
        raise ValueError(
            f"{sound.rate} samples a second cannot be brought to {rate}; send it at a usual rate"
        )
    from mlx_audio.resample import resample_audio_array

    samples = np.ascontiguousarray(resample_audio_array(sound.samples, sound.rate, rate))
    samples.flags.writeable = False
    return Sound(samples, rate)


def _info(data: bytes) -> Any:
    """What its header says; None for no format that is read. miniaudio's error for a broken one."""
    import miniaudio

    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return miniaudio.wav_get_info(data)
    if data[:4] == b"fLaC":
        return miniaudio.flac_get_info(data)
    if data[:3] == b"ID3" or (len(data) > 2 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0):
        return miniaudio.mp3_get_info(data)
    return None
