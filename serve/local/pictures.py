"""A picture as Python has it in, an address that a request can hold out."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from serve.conversation import address_of
from serve.errors import RequestError


def as_address(picture: Any) -> str:
    """Of a path, an address, a file's bytes, or one of PIL's images. RequestError for anything else."""
    from PIL import Image

    if isinstance(picture, Path):
        return address_of(str(picture))
    if isinstance(picture, str):
        return address_of(picture)
    if isinstance(picture, Image.Image):
        written = BytesIO()
        picture.save(written, "PNG")
        picture = written.getvalue()
    if isinstance(picture, bytes):
        return f"data:application/octet-stream;base64,{base64.b64encode(picture).decode()}"
    raise RequestError(
        f"images: found a {type(picture).__name__}; expected a path, an address, bytes or a PIL image",
        "images",
    )
