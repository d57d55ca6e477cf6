"""Files of named tensors, opened without reading or running what they hold."""

from __future__ import annotations

import json
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.awq.formats import TensorHeader
from models.errors import CheckpointError

OLDEST_SAFE_TORCH = (2, 10)
"""`weights_only` could be got round before 2.6, and corrupt memory before 2.10 (CVE-2025-32434,
CVE-2026-24747)."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

FILE_KINDS = (
    ("*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
"""Pattern and index of a folder's own 16-bit weights; the first kind that is there is taken."""


class TensorFile(ABC):
    """
    Attributes:
        path: as it was given.
        label: how messages call the file.
        headers: shape and dtype of each tensor.
    """

    path: Path
    label: str
    headers: Mapping[str, TensorHeader]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """On the CPU, in the file's dtype; mapped, where the file allows it."""


class SafetensorsFile(TensorFile):
    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{label} is not a readable safetensors file: {error}") from error
        self.headers = {
            name: TensorHeader(tuple(part.get_shape()), self._dtype(name, part.get_dtype()))
            for name, part in slices.items()
        }

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def _dtype(self, name: str, dtype: str) -> torch.dtype:
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{name} in {self.label} has the unknown dtype {dtype}")
        return SAFETENSORS_DTYPES[dtype]


class TorchFile(TensorFile):
    """A `.pt` or `.bin` file: a flat dict of tensors. Any other pickle is refused, not run."""

    def __init__(self, path: Path, label: str) -> None:
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if version < OLDEST_SAFE_TORCH:
            raise CheckpointError(
                f"{label} needs torch {'.'.join(map(str, OLDEST_SAFE_TORCH))} or later, since "
                f"older ones can be made to run code by such files; this is {torch.__version__}"
            )
        self.path, self.label = path, label
        try:
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{label} is refused: it holds pickled objects other than tensors, and loading "
                "those can run code"
            ) from error
        except (
            RuntimeError,
            OSError,
            EOFError,
            ValueError,
            KeyError,
            zipfile.BadZipFile,
        ) as error:
            raise CheckpointError(f"{label} is not a readable torch file") from error
        self._tensors = self._flat(content)
        self.headers = {
            name: TensorHeader(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def _flat(self, content: object) -> dict[str, Tensor]:
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{self.label} must hold a dict of tensors")
        for name, value in content.items():
            dense = isinstance(value, Tensor) and value.layout is torch.strided
            if not isinstance(name, str) or not dense:
                raise CheckpointError(f"{name!r} in {self.label} is not a dense tensor")
        return {name: value.detach() for name, value in content.items()}


@dataclass(frozen=True)
class TensorStore:
    """The tensors of several files as one.

    Attributes:
        where: how messages call the place, for tensors that are not there.
        files: the file of each tensor.
        absent: tensors that an index promises, and the file that is not there.
    """

    where: str
    files: Mapping[str, TensorFile]
    absent: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        where: str,
        files: Iterable[TensorFile],
        absent: Mapping[str, str] | None = None,
    ) -> TensorStore:
        """
        Raises:
            CheckpointError: two files hold the same tensor.
        """
        found: dict[str, TensorFile] = {}
        for file in files:
            for name in file.headers:
                if name in found:
                    raise CheckpointError(
                        f"{name} is both in {found[name].label} and in {file.label}; "
                        "remove the one that does not belong there"
                    )
                found[name] = file
        return cls(where, found, absent or {})


def open_tensor_file(path: Path, label: str) -> TensorFile:
    return (SafetensorsFile if path.suffix == ".safetensors" else TorchFile)(path, label)


def open_folder(folder: Path, root: Path, exclude: TensorStore | None = None) -> TensorStore:
    """A folder's own weights: `*.safetensors`, or else `pytorch_model*.bin`.

    An index is followed if all its files are there. If not, it may be stale (the released AWQ
    checkpoints have such): the files that exist are read, and a tensor that is really missing is
    then reported with the file that the index promised.

    Args:
        root: the checkpoint's folder, which files are named relative to.
        exclude: the AWQ file, should it lie among the folder's own.
    """
    where = label_of(folder, root)
    others = set() if exclude is None else {file.path for file in exclude.files.values()}
    for pattern, index_name in FILE_KINDS:
        paths = [
            path
            for path in sorted(folder.glob(pattern))
            if path.is_file() and not any(path.samefile(other) for other in others)
        ]
        if not paths:
            continue
        weight_map = _weight_map(folder / index_name, root)
        indexed = {folder / name for name in weight_map.values()}
        if indexed and indexed <= set(paths):
            paths = sorted(indexed)
        names = {path.name for path in paths}
        absent = {tensor: name for tensor, name in weight_map.items() if name not in names}
        files = [open_tensor_file(path, label_of(path, root)) for path in paths]
        return TensorStore.of(files[0].label if len(files) == 1 else where, files, absent)
    return TensorStore(where, {}, _weight_map(folder / FILE_KINDS[0][1], root))


def label_of(path: Path, root: Path) -> str:
    """A path as messages name it: relative to the checkpoint, where it lies inside."""
    if path == root:
        return path.name
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _weight_map(index: Path, root: Path) -> dict[str, str]:
    if not index.is_file():
        return {}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): Path(name).name for tensor, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{label_of(index, root)} is not an index of weights") from error
