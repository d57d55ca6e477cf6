"""Who gets the page and who the description, and with which headers; browsers are elsewhere."""

from __future__ import annotations

import json

import pytest

from deployments.http_app import build_http_app
from deployments.playground.draw_examples import EXAMPLES
from deployments.playground.pages import STATIC, static_files
from tests.unit.deployments.harness import Connection, ask, make_worker

CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


async def get(path: str, **headers: str) -> Connection:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await ask(build_http_app(make_worker()), path, b"", method="GET", headers=named)


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (CHROME, True), ("text/html", True), ("TEXT/HTML ; q=0.5", True),
        ("application/json, text/html", True), ("text/html;q=0.5, application/json", False),
        ("text/html;q=0", False), ("text/html;q=x", False), ("*/*", False), ("", False),
        ("application/json", False), ("text/*", False), (";;,,=", False),
    ],
)  # fmt: skip
async def test_browsers_get_the_page_and_programs_the_description(accept: str, html: bool) -> None:
    answer = await get("/", accept=accept)
    assert answer.status == 200
    if html:
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["vary"] == "Accept"
        assert answer.body.startswith(b"<!doctype html>")
    else:
        assert json.loads(answer.body)["service"] == "tinychat-serve"


@pytest.mark.parametrize("path", ["/", "/playground/main.js", "/playground/icon.svg"])
async def test_the_policy_allows_nothing_but_the_pages_own_files(path: str) -> None:
    policy = (await get(path, accept=CHROME)).headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert not any("unsafe" in rule or "http" in rule or "*" in rule for rule in policy)


async def test_modules_are_javascript_and_not_sent_twice() -> None:
    first = await get("/playground/main.js")
    assert first.headers["content-type"].startswith("text/javascript")
    assert first.headers["x-content-type-options"] == "nosniff"
    again = await get("/playground/main.js", if_none_match=f"W/{first.headers['etag']}")
    assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize(
    "path", ["../pages.py", "..%2fpages.py", "/etc/passwd", "examples", "", "index.html/", "x.js"]
)
async def test_other_files_cannot_be_had(path: str) -> None:
    assert (await get(f"/playground/{path}")).status == 404


def test_everything_that_the_page_names_is_there() -> None:
    page = static_files()["index.html"].content.decode()
    scripts = {name for name in static_files() if name.endswith(".js")}
    for name in ("style.css", "icon.svg", "early.js", "main.js"):
        assert f'"playground/{name}"' in page
        assert name in static_files()
    for script in scripts:
        source = static_files()[script].content.decode()
        imported = {part.split('"')[0] for part in source.split('from "./')[1:]}
        assert imported <= scripts, script


def test_the_example_pictures_are_those_that_are_drawn() -> None:
    shown = {path.stem for path in (STATIC / "examples").iterdir()}
    assert shown == set(EXAMPLES)
    assert all(path.stat().st_size < 4096 for path in (STATIC / "examples").iterdir())
    source = static_files()["examples.js"].content.decode()
    assert all(f'file: "{name}"' in source for name in EXAMPLES)
