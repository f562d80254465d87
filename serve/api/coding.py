"""A body as it was sent, and what its Content-Encoding says → its bytes, no more of them than allowed.

Codex packs long requests by zstd, gateways and some clients by gzip. A body that promises little and unpacks to much
costs no more than a plain one: nothing is unpacked beyond the limit.
"""

from __future__ import annotations

import asyncio
import io
import zlib
from collections.abc import Callable

import zstandard
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from serve.errors import RequestError

MAX_WINDOW_BYTES = 8 * 2**20
"""What a decoder of zstd must have at least, and a sender over HTTP must not exceed (RFC 9659)."""
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
"""Either header is read: many call gzip's bytes deflate, or the other way round."""


def coding_of(headers: Headers) -> str | None:
    """How the body is packed; None: it is not. HTTPException (415) for what cannot be unpacked here."""
    found = ", ".join(headers.getlist("content-encoding")).strip()
    name = found.lower()
    if name in ("", "identity"):
        return None
    if name not in UNPACKED_BY:
        raise HTTPException(
            415,
            f"Content-Encoding: found {found[:80]!a}; send the body as it is, or by one of {', '.join(UNPACKED_BY)}",
            {"Accept-Encoding": ", ".join(UNPACKED_BY)},
        )
    return name


async def unpacked(raw: bytes, coding: str, limit: int) -> bytes:
    """The body, or limit + 1 bytes of a longer one, unpacked beside the loop. RequestError: it is not so packed."""
    try:
        return await asyncio.to_thread(UNPACKED_BY[coding], raw, limit + 1)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        told = str(error)[:200]
        wrong = RequestError(f"the body is not {coding}, as its Content-Encoding says: {told}")
        wrong.code = "invalid_json"
        raise wrong from None


def _inflated(raw: bytes, most: int) -> bytes:
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    body = unpacker.decompress(raw, most)
    if len(body) < most and not (unpacker.eof and not unpacker.unused_data):
        raise EOFError("it ends too soon" if not unpacker.eof else "something follows its end")
    return body


def _of_zstd(raw: bytes, most: int) -> bytes:
    unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    with unpacker.stream_reader(io.BytesIO(raw), read_across_frames=True) as reader:
        return reader.read(most)


UNPACKED_BY: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _inflated,
    "x-gzip": _inflated,
    "deflate": _inflated,
    "zstd": _of_zstd,
}
"""The codings, and what unpacks at most so many bytes of each."""
