"""What the documentation says is so: its examples run, and its links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.awq.backends import BACKENDS
from models.awq.formats import FORMATS
from models.prompts.templates import TEMPLATES
from models.vision.projectors import PROJECTORS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
EXAMPLE = re.compile(
    r"^## (?P<title>.+?)\n(?:(?!^## ).*\n)*?```python\n(?P<code>(?:.*\n)*?)```", re.M
)
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {match["title"]: match["code"] for match in EXAMPLE.finditer(EXTENDING)}


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is forgotten after it."""
    for registry in (BACKENDS, FORMATS, PROJECTORS, TEMPLATES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def test_every_way_to_extend_it_has_an_example() -> None:
    assert len(EXAMPLES) == EXTENDING.count("\n## ") == EXTENDING.count("```python\n") == 4


@pytest.mark.parametrize("title", EXAMPLES)
@pytest.mark.usefixtures("own_registries")
def test_an_example_of_an_extension_runs_as_it_stands(title: str) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(EXAMPLES[title], title, "exec"), names)


def links() -> Iterator[Any]:
    for page in PAGES:
        for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
            if "://" not in target:
                yield pytest.param(page, target, id=f"{page.relative_to(ROOT)}: {target}")


@pytest.mark.parametrize(("page", "target"), links())
def test_a_link_leads_to_a_file_that_is_there(page: Path, target: str) -> None:
    assert (page.parent / target).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_second_application_joins_the_first_and_does_not_stop_it(page: Path) -> None:
    """`serve run` without an address may start a Ray of its own, in which there is no model; and
    one that blocks stops all of Serve, the model included, when it is interrupted."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if "serve run" in line and "docs.examples" in line:
            assert "--address auto" in line and "--non-blocking" in line
