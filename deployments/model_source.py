"""`model_path` and `quant_path` as the configuration gives them -> a folder, or a Hub id."""

from __future__ import annotations

from pathlib import Path

import deployments
from models.errors import ConfigurationError
from models.hub import HUB_ID

PACKAGE_ROOT = Path(deployments.__file__).resolve().parent.parent
"""The folder that holds the `deployments` package: a checkout, or site-packages."""
AWQ_SUFFIX = "-4bit-AWQ"
"""What TinyChat appends to the names of models with 4-bit weights."""


def find_path(given: str) -> Path | None:
    """An existing file or folder: absolute, from the working directory, or beside the package."""
    path = Path(given).expanduser()
    for candidate in (path, PACKAGE_ROOT / path):
        if candidate.exists():
            return candidate.absolute()
    return None


def resolve_model(model_path: str, *, elsewhere: bool) -> str:
    """An absolute path, or a Hub id.

    Args:
        elsewhere: the folder may exist only on the nodes where replicas will run, so an absolute
            path that is not here is not yet wrong.

    Raises:
        ConfigurationError: it is neither folder nor Hub id.
    """
    found = find_path(model_path)
    if found is not None:
        if not found.is_dir():
            raise ConfigurationError(
                f"model_path {model_path!r} is a file; give the checkpoint's folder, and an AWQ "
                "file as quant_path"
            )
        return str(found)
    if HUB_ID.fullmatch(model_path) or (elsewhere and Path(model_path).is_absolute()):
        return model_path
    looked = "" if Path(model_path).is_absolute() else f" in {Path.cwd()}"
    if looked and Path.cwd().resolve() != PACKAGE_ROOT:
        looked += f" or {PACKAGE_ROOT}"
    raise ConfigurationError(
        f"model_path {model_path!r} is neither a folder{looked} nor a Hub id (owner/name)"
    )


def resolve_quant(quant_path: str | None) -> str | None:
    """An absolute path where there is one here; otherwise as given, relative to the checkpoint."""
    if quant_path is None:
        return None
    found = find_path(quant_path)
    return quant_path if found is None else str(found)


def default_name(model_path: str) -> str:
    """TinyChat's: the last part of the path; `checkpoint-<n>` keeps its parent's name."""
    parts = [part for part in Path(model_path).parts if part != "/"]
    last = parts[-1] if parts else model_path
    if last.startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{last}"
    return last


def registered_name(model_path: str, model_name: str | None, precision: str) -> str:
    """The name that controllers and clients see: `-4bit-AWQ` is appended for W4A16."""
    name = model_name or default_name(model_path)
    return f"{name}{AWQ_SUFFIX}" if precision == "W4A16" else name
