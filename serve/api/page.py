"""GET /ui/: the page, a chat on this server's own API. Files of serve/ui/, read once; none comes from elsewhere.

It needs no key to be read: it asks for one, and sends it as every client does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).resolve().parent.parent / "ui"
INDEX = "index.html"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""No script but the page's own, no address but this server's, and no text that becomes HTML."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked for again each time, and not sent again unless it is another: a server that was updated has its own page.
    "Cache-Control": "no-cache",
}

router = APIRouter()


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    content: bytes
    kind: str

    @property
    def tag(self) -> str:
        """By which browsers know that they have it."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


def read_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """By name."""
    paths = [path for path in folder.iterdir() if path.suffix in KINDS]
    return {path.name: PageFile(path.read_bytes(), KINDS[path.suffix]) for path in paths}


FILES = read_files()


@router.get("/ui", include_in_schema=False)
async def enter() -> Response:
    """Its addresses are relative to /ui/, behind any proxy's path."""
    return RedirectResponse("ui/")


@router.get("/ui/{name:path}", include_in_schema=False)
async def show(name: str, http: Request) -> Response:
    """A file of the page."""
    found = FILES.get(name or INDEX)
    if found is None:
        raise HTTPException(404)
    headers = {**HEADERS, "ETag": found.tag}
    if http.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.kind, headers=headers)
