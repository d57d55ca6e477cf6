"""`--help` of every command: it ends well, says what the command does, and explains each option."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTED_BY_PROGRAMS = {
    "models.engine.child",
    "benchmarks.engine_arm",
    "benchmarks.transformers_arm",
}
TAKE_THEIR_NAMES_FROM_TORCH_CODE = {
    "models.checkpoints",
    "models.demo.train",
    "models.demo.evaluate",
    "benchmarks.cpu_attention",
    "benchmarks.cpu_end_to_end",
    "benchmarks.cpu_peers",
}
"""Their help lists registries of code that needs torch, or they are made of it."""


def commands() -> Iterator[str]:
    """What can be run as `python -m`."""
    for package in ("models", "deployments", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                yield ".".join(part for part in parts if part != "__main__")


COMMANDS = [name for name in commands() if name not in STARTED_BY_PROGRAMS]


def module_of(command: str) -> str:
    is_package = (ROOT / command.replace(".", "/")).is_dir()
    return f"{command}.__main__" if is_package else command


class Parsed(Exception):
    """Carries a command's parser out of its `main`."""


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    def parse_args(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed) as caught:
        importlib.import_module(module_of(command)).main([])
    parser: argparse.ArgumentParser = caught.value.args[0]
    return parser


def joined(text: str) -> str:
    """Without the lines and spaces of a layout."""
    return "".join(text.split())


def with_subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                yield from with_subcommands(choice)


def test_every_command_is_found() -> None:
    assert {"deployments", "deployments.client", "models.checkpoints", "benchmarks.serving"} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_the_command_and_each_of_its_options(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parser in with_subcommands(parser_of(command, monkeypatch)):
        assert parser.prog.startswith(f"python -m {command}")
        assert parser.description and len(parser.description.split()) > 5
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            name = "/".join(action.option_strings) or action.dest
            assert action.help and len(action.help.split()) >= 2, f"{name} has no help"
            told = action.default in (None, False, "") or "default" in action.help
            if action.option_strings and not told and name != "-h/--help":
                assert joined(f"(default: {action.default})") in joined(parser.format_help())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_well(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(module_of(command)).main(["--help"])
    assert caught.value.code == 0
    assert f"usage: python -m {command}" in capsys.readouterr().out


def test_help_does_not_wait_for_torch() -> None:
    """One process for all, since each import of Ray takes a second."""
    quick = [name for name in COMMANDS if name not in TAKE_THEIR_NAMES_FROM_TORCH_CODE]
    program = f"""
import contextlib, importlib, io, sys
for name in {[module_of(name) for name in quick]}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        importlib.import_module(name).main(["--help"])
    assert not {{"torch", "transformers"}} & set(sys.modules), name
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
