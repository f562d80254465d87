"""A picture's bytes -> its pixels: upright, sRGB, on white where it is transparent, the first frame of several.

Whatever container they came in, the same pixels give the same Picture. What is too large is refused by its header.
Knows Pillow; no addresses, no models.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from serve.errors import RequestError
from serve.media.content import Picture
from serve.media.settings import MediaLimits

Image.init()
FORMATS = tuple(
    form
    for form in ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
    if form in Image.OPEN  # not every Pillow is built with all
)
"""What is decoded. Formats that hold programs (EPS) or links are not among them."""
_READ = "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF"
_WHITE = (255, 255, 255, 255)
_SIGNS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg[^>]*>\s*)?<svg", re.I | re.S),
        "SVG, a drawing",
    ),
    (re.compile(rb"\s*<(!doctype html|html|head|body)", re.I), "a web page"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"%!PS"), "PostScript"),
    (re.compile(rb"....ftyp(heic|heix|heif|mif1|msf1)", re.S), "HEIC"),
    (re.compile(rb"....ftyp", re.S), "a film (MP4)"),
    (re.compile(rb"\x1aE\xdf\xa3"), "a film (Matroska)"),
    (re.compile(rb"\s*[\[{]"), "JSON"),
)


def read_picture(data: bytes, name: str, limits: MediaLimits = MediaLimits()) -> Picture:
    """The picture in a file's bytes. RequestError that begins with `name` and has it as its param."""
    if not data:
        raise RequestError(f"{name}: found no bytes; expected a picture ({_READ})", name)
    if len(data) > limits.max_image_bytes:
        raise RequestError(
            f"{name}: found {len(data):,} bytes; a picture may have {limits.max_image_bytes:,}", name
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image, name, limits)
            image.load()
            return picture_of(image)
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(f"{name}: found {_found(data)}; expected a picture ({_READ})", name) from None
    except (
        Image.DecompressionBombError
    ) as error:  # Pillow's own bound comes before anybody can ask for the size
        found = re.search(r"\d+ pixels", str(error))
        raise RequestError(
            f"{name}: found a picture of {found.group() if found else 'too many pixels'}; at most "
            f"{limits.max_image_pixels:,} are read",
            name,
        ) from None
    except Exception as error:  # a decoder is foreign code: whatever a broken file makes it raise
        raise RequestError(f"{name}: the picture cannot be decoded: {said_by(error)}", name) from error


def check_size(image: Image.Image, name: str, limits: MediaLimits) -> None:
    """RequestError for an image, not yet decoded, of more pixels than are allowed."""
    width, height = image.size
    if width * height > limits.max_image_pixels:
        raise RequestError(
            f"{name}: found a picture of {width} x {height} pixels; at most {limits.max_image_pixels:,} are read",
            name,
        )


def picture_of(image: Image.Image) -> Picture:
    """An image of Pillow's as it is seen. Whatever Pillow raises for what it cannot decode."""
    seen = _rgb(_upright(image))
    pixels = np.array(seen, dtype=np.uint8)  # [H, W, 3]
    pixels.flags.writeable = False
    return Picture(pixels)


def image_of(picture: Picture) -> Image.Image:
    """For processors, which take Pillow's."""
    return Image.fromarray(picture.pixels)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # what cannot be read says nothing about which side is up
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        if profile:
            layers = _standard(layers, profile, "RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, _WHITE), layers).convert("RGB")
    if profile and image.mode in ("RGB", "L", "CMYK"):
        return _standard(image, profile, "RGB").convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits or in floating point, whose high bits are kept; Pillow would cut it off at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        top = 1.0 if values.size and np.nanmax(values) <= 1 else 255.0
        grey = np.nan_to_num(values.astype(np.float64) * (255.0 / top)).clip(0, 255).round()
    else:
        grey = values.astype(np.int64).clip(0, 0xFFFF) >> 8
    return Image.fromarray(grey.astype(np.uint8))


def _standard(image: Image.Image, profile: bytes, mode: str) -> Image.Image:
    """The image's colours in sRGB. One whose profile does not fit it, or is sRGB already, stays as it is."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return image
        changed: Any = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode=mode)
        return changed
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image


def _found(data: bytes) -> str:
    """What a file that no decoder knows looks like."""
    begin = data[:2048]
    known = next((what for sign, what in _SIGNS if sign.match(begin)), None)
    if known is not None:
        return known
    if begin.isascii() and begin.decode().isprintable():
        return f"text ({begin[:24].decode()!r})"
    return f"bytes of no format that is read ({begin[:8].hex(' ')} …)"


def said_by(error: BaseException) -> str:
    """The first line of what foreign code says."""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
