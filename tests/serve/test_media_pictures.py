"""Pictures: one picture is one whatever container holds it, upright and on white; what is refused, by its name."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from serve.errors import RequestError
from serve.media.pictures import FORMATS, read_picture
from serve.media.settings import MediaLimits

NAME = "messages.0.content.1.image_url"


def stored(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def coloured(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """Of few colours, so that a palette holds them all; no two rows or columns are alike."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (60, 3), dtype=np.uint8)
    return Image.fromarray(colours[rng.integers(0, 60, (height, width))])


def smooth(width: int = 64, height: int = 48) -> Image.Image:
    """What lossy containers hardly change."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 3, y * 4, 255 - x * 2], axis=-1).clip(0, 255).astype(np.uint8))


def pixels(data: bytes) -> np.ndarray:
    return read_picture(data, NAME).pixels


def refusal(data: bytes, limits: MediaLimits = MediaLimits()) -> str:
    with pytest.raises(RequestError) as caught:
        read_picture(data, NAME, limits)
    assert caught.value.param == NAME
    assert str(caught.value).startswith(f"{NAME}: ")
    return str(caught.value)[len(NAME) + 2 :]


LOSSLESS = {
    "PNG": lambda image: stored(image, "PNG"),
    "PNG, other compression": lambda image: stored(image, "PNG", compress_level=1),
    "PNG of a palette": lambda image: stored(image.quantize(256, method=Image.Quantize.FASTOCTREE), "PNG"),
    "PNG with opaque alpha": lambda image: stored(image.convert("RGBA"), "PNG"),
    "BMP": lambda image: stored(image, "BMP"),
    "TIFF": lambda image: stored(image, "TIFF"),
    "TIFF, packed": lambda image: stored(image, "TIFF", compression="tiff_lzw"),
    "PPM": lambda image: stored(image, "PPM"),
    "WebP": lambda image: stored(image, "WEBP", lossless=True, exact=True),
    "GIF": lambda image: stored(image.quantize(256, method=Image.Quantize.FASTOCTREE), "GIF"),
}


@pytest.mark.parametrize("container", LOSSLESS)
def test_one_picture_has_one_key_in_every_lossless_container(container):
    image = coloured()
    if "palette" in container or container == "GIF":
        image = image.quantize(256, method=Image.Quantize.FASTOCTREE).convert("RGB")
    picture = read_picture(LOSSLESS[container](image), NAME)
    np.testing.assert_array_equal(picture.pixels, np.asarray(image))
    assert picture.sha256 == read_picture(LOSSLESS["PNG"](image), NAME).sha256


def test_pictures_of_the_same_bytes_in_another_shape_have_other_keys():
    flat = np.arange(96, dtype=np.uint8)
    shapes = [flat.reshape(shape) for shape in ((4, 8, 3), (8, 4, 3), (2, 16, 3))]
    assert len({read_picture(stored(Image.fromarray(s), "PNG"), NAME).sha256 for s in shapes}) == 3


def test_jpegs_that_begin_alike_have_other_keys():
    """Some servers key a picture by the first thousand characters of its base64."""
    image = smooth(256, 256)
    other = image.copy()
    other.paste((255, 0, 0), (0, 200, 256, 256))
    first, second = (stored(i, "JPEG", quality=90) for i in (image, other))
    assert first[:750] == second[:750]
    assert read_picture(first, NAME).sha256 != read_picture(second, NAME).sha256


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_stands_upright_whatever_its_exif_says(turn):
    image = coloured()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = turn
    lying = image.transpose(undo[turn]) if turn in undo else image
    for form in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        np.testing.assert_array_equal(pixels(stored(lying, form, exif=exif, **options)), np.asarray(image))


def test_exif_that_cannot_be_read_does_not_matter():
    data = stored(smooth(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01" * 40)
    assert pixels(data).shape == (48, 64, 3)


def test_what_is_transparent_is_white():
    solid, clear = np.array(coloured()), np.zeros((16, 24), np.uint8)
    clear[:, :12] = 255
    white = solid.copy()
    white[:, 12:] = 255
    layered = Image.fromarray(np.dstack([solid, clear]))
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        np.testing.assert_array_equal(pixels(stored(layered, form, **options)), white)
    half = Image.fromarray(np.dstack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4), 128, np.uint8)]))
    np.testing.assert_allclose(pixels(stored(half, "PNG")), 127, atol=1)


def test_grey_and_palettes_with_transparent_colours_are_on_white_too():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    layered = Image.merge("LA", (grey, Image.new("L", (8, 8), 0)))
    assert (pixels(stored(layered, "PNG")) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for form in ("PNG", "GIF"):
        assert (pixels(stored(palette, form, transparency=1)) == 255).all()
        assert (pixels(stored(palette, form, transparency=0)) == (0, 255, 0)).all()
    assert (pixels(stored(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == 255).all()
    assert (pixels(stored(Image.new("L", (4, 4), 7), "PNG", transparency=7)) == 255).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_high_eight(form):
    """Pillow's own conversion makes nearly all of such a picture white."""
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    found = pixels(stored(Image.fromarray(values), form))
    np.testing.assert_array_equal(found, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1))


def test_sixteen_bits_of_colour_keep_their_high_eight():
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    data = png(7, 5, 16, 2, rows)
    np.testing.assert_array_equal(pixels(data), (values >> 8).astype(np.uint8))


def test_floating_point_grey_is_read_as_parts_of_white_or_as_levels():
    parts = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    for values in (parts, parts * 255):
        found = pixels(stored(Image.fromarray(values), "TIFF"))
        np.testing.assert_array_equal(found[..., 0], (parts * 255).round())


def test_print_colours_are_those_one_sees():
    found = pixels(stored(smooth().convert("CMYK"), "JPEG", quality=95))
    assert np.abs(found.astype(int) - np.asarray(smooth())).mean() < 4


def test_one_bit_and_grey_are_what_they_show():
    bits = Image.fromarray((np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("1")
    np.testing.assert_array_equal(pixels(stored(bits, "PNG")), np.asarray(bits.convert("RGB")))


def test_the_first_frame_stands_for_an_animation():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = stored(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == (255, 0, 0)).all(), form


def test_colours_of_another_space_are_brought_to_srgb():
    standard = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = standard.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    swapped = swapped.replace(b"\0s\0R\0G\0B", b"\0x\0R\0G\0B")
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    np.testing.assert_allclose(pixels(stored(red, "PNG", icc_profile=swapped))[0, 0], (0, 255, 0), atol=3)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (pixels(stored(clear, "PNG", icc_profile=swapped)) == 255).all()
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(pixels(stored(coloured(), "PNG", icc_profile=same)), np.asarray(coloured()))
    np.testing.assert_array_equal(
        pixels(stored(coloured(), "PNG", icc_profile=b"no profile at all")), np.asarray(coloured())
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 2)])
def test_tiny_pictures_are_pictures(size):
    assert pixels(stored(Image.new("RGB", size, (9, 8, 7)), "PNG")).shape == (size[1], size[0], 3)


# What is refused


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG of these rows, whatever its header promises."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_a_picture_is_refused_by_the_size_in_its_header():
    assert "400000000 pixels; at most 50,000,000" in refusal(png(20_000, 20_000, 8, 2, b""))
    assert "10000 x 10000 pixels" in refusal(png(10_000, 10_000, 8, 2, b""))
    gif = bytearray(stored(Image.new("P", (2, 2)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    assert "4294836225 pixels" in refusal(bytes(gif))
    bmp = bytearray(stored(Image.new("RGB", (2, 2)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30000, 30000)
    assert "900000000 pixels" in refusal(bytes(bmp))
    assert "at most 90 " in refusal(stored(coloured(10, 10), "PNG"), MediaLimits(max_image_pixels=90))


def test_more_bytes_than_allowed_are_refused_unread():
    assert "a picture may have 100" in refusal(b"x" * 101, MediaLimits(max_image_bytes=100))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "no bytes"),
        (b"hello there, this is no picture", "text ('hello there"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<!-- made by hand -->\n<svg width='10'></svg>", "SVG"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"%PDF-1.7 ...", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a film"),
        (b'{"error": "not found"}', "JSON"),
        (bytes(range(200, 256)), "bytes of no format"),
    ],
)
def test_what_is_no_picture_is_named_for_what_it_looks_like(data, found):
    assert found in refusal(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_picture_that_ends_too_soon_is_refused(form):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = stored(image, form)
    for part in (0.2, 0.5, 0.9):
        refusal(data[: int(len(data) * part)])


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("MPO",)])
def test_broken_bytes_give_a_picture_or_a_refusal_and_nothing_else(form):
    rng = random.Random(form)
    whole = stored(coloured(40, 30), form)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = read_picture(bytes(data), NAME, MediaLimits(max_image_pixels=1_000_000))
        except RequestError:
            continue
        assert found.pixels.dtype == np.uint8
        assert found.pixels.ndim == 3
