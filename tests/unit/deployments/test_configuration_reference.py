"""docs/configuration.md is generated, and current."""

from __future__ import annotations

import re

import pytest

from deployments import configuration_reference
from deployments.config import AppConfig
from deployments.configuration_reference import REFERENCE, main, render, sections


def test_the_reference_is_current() -> None:
    """Else: python -m deployments.configuration_reference"""
    assert REFERENCE.read_text(encoding="utf-8") == render()


def test_every_setting_has_its_place() -> None:
    names = [name for _, section in sections() for name in section]
    assert names == list(AppConfig.model_fields)
    assert all(section for _, section in sections())


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("model_path", ["text", "required"]),
        ("precision", ["`W4A16`, `W16A16`", "`W4A16`"]),
        ("max_image_bytes", ["bytes, at least 1024", "20971520 (20 MiB)"]),
        ("gpu_memory_utilization", ["number, above 0, at most 1", "0.9"]),
        ("max_image_side", ["pixels, at least 32", "10000"]),
        ("heartbeat_interval_s", ["seconds, above 0, at most 60", "15"]),
        ("enable_prefix_caching", ["`true` or `false`", "`true`"]),
        ("allowed_image_hosts", ["list of texts", "none"]),
    ],
)
def test_a_row_has_what_may_be_written_its_unit_and_its_default(
    name: str, cells: list[str]
) -> None:
    (row,) = re.findall(rf"^\| `{name}` \|.*$", render(), re.MULTILINE)
    assert row.startswith(f"| `{name}` | {' | '.join(cells)} | ")
    assert AppConfig.model_fields[name].description in row


def test_a_setting_without_a_default_says_what_happens_then() -> None:
    for name, field in AppConfig.model_fields.items():
        if not field.is_required() and field.default is None:
            assert field.description and "default" in field.description.lower(), name


def test_check_tells_a_stale_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "configuration.md"
    monkeypatch.setattr(configuration_reference, "REFERENCE", stale)
    assert main(["--check"]) == 1
    assert "is not current" in capsys.readouterr().err
    assert main([]) == 0
    assert main(["--check"]) == 0
