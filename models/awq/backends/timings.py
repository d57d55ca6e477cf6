"""How long each way to multiply takes on one kind of GPU: as measured, in a file.

Files of the GPUs that were measured for this repository lie in `models/gpu/tuned`; what another
start measured on this machine lies in the user's cache. Both have one format, and both hold only
for the GPU and for the kernels that they name; the cache's also for the versions of torch, triton
and the kernel libraries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.awq.backends.base import Shape

logger = logging.getLogger(__name__)

FORMAT = 1
TUNED = Path(__file__).parents[2] / "gpu" / "tuned"
KERNELS = Path(__file__).parents[2] / "gpu" / "w4a16_kernels.py"
PACKAGES = ("torch", "triton", "gemlite", "humming-kernels")


class Timing(NamedTuple):
    """A backend's fastest plan for some number of rows."""

    plan: str
    microseconds: float


@dataclass(frozen=True)
class Environment:
    """What timings hold for.

    Attributes:
        kernels: a digest of our own kernels' source.
        packages: version by name; those that are not installed are not there.
    """

    gpu: str
    capability: tuple[int, int]
    kernels: str
    packages: dict[str, str]

    @classmethod
    def of(cls, device: torch.device) -> Environment:
        packages = {}
        for package in PACKAGES:
            try:
                packages[package] = version(package)
            except PackageNotFoundError:
                continue
        on_gpu = device.type == "cuda"
        return cls(
            torch.cuda.get_device_name(device) if on_gpu else device.type,
            torch.cuda.get_device_capability(device) if on_gpu else (0, 0),
            hashlib.sha256(KERNELS.read_bytes()).hexdigest()[:16],
            packages,
        )

    @property
    def file_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-") + ".json"

    def as_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu,
            "capability": list(self.capability),
            "kernels": self.kernels,
            "packages": self.packages,
        }


Layers = dict[str, dict[int, dict[str, Timing]]]
"""By `layer_key`, by number of rows, by backend."""


@dataclass
class Timings:
    """
    Attributes:
        layers: what is known, of whichever source.
        path: of the file that `save` writes, or None where nothing is to be kept.
    """

    environment: Environment
    layers: Layers = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def load(cls, environment: Environment) -> Timings:
        """The committed file's and the cache's, of which the latter knows this machine better."""
        path = cache_folder() / environment.file_name
        layers = _read(TUNED / environment.file_name, environment, same_packages=False)
        for key, rows in _read(path, environment, same_packages=True).items():
            layers.setdefault(key, {}).update(rows)
        return cls(environment, layers, path)

    def of(self, shape: Shape, dtype: torch.dtype) -> dict[int, dict[str, Timing]]:
        """By number of rows, by backend. What is written into it is kept."""
        return self.layers.setdefault(layer_key(shape, dtype), {})

    def save(self) -> None:
        """Whole or not at all. A folder that cannot be written is no failure, only slower."""
        if self.path is None:
            return
        try:
            write(self.path, self.environment, self.layers)
        except OSError as error:
            logger.warning("measured timings could not be kept in %s: %s", self.path, error)


def layer_key(shape: Shape, dtype: torch.dtype) -> str:
    n, k, group = shape
    return f"{n}x{k} g{group} {str(dtype).removeprefix('torch.')}"


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tinychat-serve" / "w4a16"


def write(path: Path, environment: Environment, layers: Layers) -> None:
    """
    Raises:
        OSError: it cannot be written.
    """
    content = {"format": FORMAT, **environment.as_json(), "layers": layers}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, encoding="utf-8", delete=False
    ) as file:
        try:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _read(path: Path, environment: Environment, *, same_packages: bool) -> Layers:
    """A file that is not of this environment, or is damaged, counts as none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("the timings in %s are not used: %s", path, error)
        return {}
    try:
        content = json.loads(text)
        expected = {"format": FORMAT, **environment.as_json()}
        if not same_packages:
            del expected["packages"]
        for name, value in expected.items():
            if content[name] != value:
                logger.info(
                    "the timings in %s are not used: they are of %s %r, and this is %r",
                    path, name, content[name], value,
                )  # fmt: skip
                return {}
        return {
            str(key): {
                int(rows): {str(b): Timing(str(t[0]), float(t[1])) for b, t in backends.items()}
                for rows, backends in by_rows.items()
            }
            for key, by_rows in content["layers"].items()
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        logger.warning("the timings in %s are not used: the file is damaged (%r)", path, error)
        return {}
