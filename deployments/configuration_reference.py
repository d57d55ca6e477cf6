"""Writes docs/configuration.md from AppConfig: its fields, their defaults and descriptions."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from deployments.config import AppConfig
from models.command_line import HelpFormatter

PROGRAM = "python -m deployments.configuration_reference"
REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
SECTION = re.compile(r" +# ---- (.+?) -+$")
FIELD = re.compile(r" {4}(\w+): ")
KIBI = 1024
SERVE_OPTIONS = "https://docs.ray.io/en/latest/serve/configure-serve-deployment.html"
HEAD = f"""\
# Configuration

<!-- Written by `{PROGRAM}` from deployments/config.py; a test says when it is not current. -->

[`serve_config.yaml`](../serve_config.yaml) is what `serve run` and `serve deploy` read. What is
under `args:` is the application's, all else is Ray Serve's own:

| place | what belongs there |
|---|---|
| `http_options:` | `host` and `port` to listen on |
| `applications:` `- args:` | everything below: the model, the engine, requests, the controller |
| `applications:` `- deployments:` | `name: ModelWorker` with [Ray Serve's\
 options]({SERVE_OPTIONS}): replicas, autoscaling,\
 `max_ongoing_requests`, `ray_actor_options` |
| `logging_config:` | the level of Ray Serve's logs |

A key that is unknown, or in the wrong place, is refused with a hint. `python -m deployments` sets
some of them by [TinyChat's flags](tinychat.md) and leaves the others at their defaults.
"""
TAIL = """\
## Environment variables

| variable | meaning |
|---|---|
| `RAY_ADDRESS` | the Ray cluster to use; without it one is started on this machine |
| `CUDA_VISIBLE_DEVICES` | the GPUs that a Ray started here may use |
| `RAY_SERVE_ENABLE_HA_PROXY` | `0`: Ray Serve's own proxy, not HAProxy, which `make serve` and\
 `python -m deployments` take where it is there |
| `RAY_USAGE_STATS_ENABLED` | `0`: Ray sends no usage statistics; `make serve` sets it |
| `HF_HOME`, `HF_HUB_OFFLINE` | where Hub ids are cached; `1`: from there only |
"""


def render() -> str:
    """docs/configuration.md's text."""
    parts = [HEAD]
    for section, names in sections():
        rows = [_row(name, AppConfig.model_fields[name]) for name in names]
        title = section[0].upper() + section[1:]
        parts.append(
            "\n".join(
                [f"## {title}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
            )
            + "\n"
            + "".join(rows)
        )
    return "\n".join([*parts, TAIL])


def sections() -> list[tuple[str, list[str]]]:
    """AppConfig's fields by the comments that head them in its source, which is where they are
    grouped for readers of the code as well."""
    found: list[tuple[str, list[str]]] = []
    for line in inspect.getsource(AppConfig).splitlines():
        if section := SECTION.match(line):
            found.append((section[1], []))
        elif (field := FIELD.match(line)) and field[1] in AppConfig.model_fields:
            found[-1][1].append(field[1])
    return found


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _value(name, field), _default(name, field), field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _value(name: str, field: FieldInfo) -> str:
    """What may be written, with its unit and bounds."""
    kind = _without_none(field.annotation)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    words = {
        str: "text", bool: "`true` or `false`", int: "integer", float: "number",
        list[str]: "list of texts",
    }[kind]  # fmt: skip
    return ", ".join([_with_unit(name, words), *_bounds(field)])


def _with_unit(name: str, words: str) -> str:
    if name.endswith("_per_s"):
        return f"{words} per second"
    for ending, unit in (
        ("_s", "seconds"),
        ("_bytes", "bytes"),
        ("_pixels", "pixels"),
        ("_side", "pixels"),
    ):
        if name.endswith(ending):
            return unit
    return words


def _bounds(field: FieldInfo) -> Iterator[str]:
    for bound in field.metadata:
        if isinstance(bound, Ge):
            yield f"at least {bound.ge}"
        elif isinstance(bound, Gt):
            yield f"above {bound.gt}"
        elif isinstance(bound, Le):
            yield f"at most {bound.le}"
        elif isinstance(bound, Lt):
            yield f"below {bound.lt}"
        elif not isinstance(bound, MinLen):
            raise TypeError(f"{bound!r}: no words for this bound yet")


def _default(name: str, field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if value is None:
        return ""  # the description says what happens then
    if value == []:
        return "none"
    if isinstance(value, bool):
        return f"`{value}`".lower()
    if name.endswith("_bytes"):
        return f"{value} ({_size(value)})"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}" if value < KIBI else f"{value}"


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    return annotation


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < KIBI or unit == "GiB":
            break
        count //= KIBI
    return f"{count} {unit}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Write docs/configuration.md, the reference of every setting, from\n"
        "deployments/config.py, where names, defaults, bounds and descriptions are.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if the file is not current"
    )
    options = parser.parse_args(arguments)
    text = render()
    if options.check:
        current = REFERENCE.is_file() and REFERENCE.read_text(encoding="utf-8") == text
        if not current:
            print(f"{REFERENCE} is not current; write it with {PROGRAM}", file=sys.stderr)
        return 0 if current else 1
    REFERENCE.write_text(text, encoding="utf-8")
    print(REFERENCE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
