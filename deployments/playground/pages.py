"""The playground's files over HTTP."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import RedirectResponse, Response

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml"}
"""Python asks the operating system for the others, and some say text/plain for these."""
HEADERS = {
    "Content-Security-Policy": "; ".join((
        "default-src 'none'", "script-src 'self'", "style-src 'self'",
        "img-src 'self' blob: data:", "connect-src 'self'", "base-uri 'none'",
        "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}  # fmt: skip
"""No script but the page's own files, and no text is ever made into HTML. `no-cache` lets browsers
keep a file, but has them ask whether it is still the one."""


@dataclass(frozen=True)
class StaticFile:
    """One file in memory."""

    content: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:24]}"'

    def response(self, request: Request, vary: str | None = None) -> Response:
        """The file, or 304 where the browser has it already."""
        headers = HEADERS | {"ETag": self.etag} | ({"Vary": vary} if vary else {})
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


@cache
def static_files() -> dict[str, StaticFile]:
    """All files by their path below `static/`. Others cannot be asked for, however they are
    spelled."""
    return {
        path.relative_to(STATIC).as_posix(): StaticFile(path.read_bytes(), _media_type(path))
        for path in sorted(STATIC.rglob("*"))
        if path.is_file()
    }


def accepts_html(request: Request) -> bool:
    """Whether a browser asks: text/html is named, and no less welcome than JSON. Programs that
    take anything (`*/*`) get JSON."""
    welcome: dict[str, float] = {}
    for entry in request.headers.get("accept", "").split(","):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            welcome[kind] = float(quality)
        except ValueError:
            welcome[kind] = 0.0
    html = welcome.get("text/html", 0.0)
    return html > 0 and html >= welcome.get("application/json", 0.0)


def index_page(request: Request) -> Response:
    """The page. Its links are relative, so its own address has to end with a slash."""
    if not request.url.path.endswith("/"):
        return RedirectResponse(request.url.path.rsplit("/", 1)[-1] + "/", headers=HEADERS)
    return static_files()["index.html"].response(request, vary="Accept")


def playground_routes() -> APIRouter:
    """`/playground/...`: the files that the page loads."""
    router = APIRouter(include_in_schema=False)

    @router.get("/playground/{path:path}")
    async def static_file(path: str, request: Request) -> Response:
        file = static_files().get(path)
        if file is None:
            raise HTTPException(404)
        return file.response(request)

    return router


def _media_type(path: Path) -> str:
    guessed = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return MEDIA_TYPES.get(path.suffix, guessed)
