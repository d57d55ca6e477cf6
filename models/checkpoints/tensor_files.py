"""Files of named tensors, opened without reading or running what they hold."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.awq.formats import QUANTIZED_SUFFIXES, TensorHeader
from models.errors import CheckpointError

OLDEST_SAFE_TORCH = (2, 10)
"""`weights_only` could be got round before 2.6, and corrupt memory before 2.10 (CVE-2025-32434,
CVE-2026-24747)."""

UNMAP_AFTER = 64 * 2**20
"""Bytes read from a torch file after which its pages are let go. It takes some milliseconds to
map it anew."""

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
"""Pattern and index of a folder's own weights; the first kind that is there is taken."""

SHARD = re.compile(r"(?P<stem>.+)-\d+-of-\d+")


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
        """On the CPU and in the file's dtype; not to be written to.

        In memory of its own, rather than mapped: pages of a mapped file count as the process's,
        which would hold every weight twice while it packs them, and a file that is replaced under
        a running server would take the server with it.
        """


class SafetensorsFile(TensorFile):
    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.headers = {
                    name: TensorHeader(tuple(part.get_shape()), self._dtype(name, part.get_dtype()))
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{label} is not a readable safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        # Opened for each tensor: that takes half a millisecond, and lets go of the pages read.
        with safe_open(self.path, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    def _dtype(self, name: str, dtype: str) -> torch.dtype:
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{name} in {self.label} has the unknown dtype {dtype}")
        return SAFETENSORS_DTYPES[dtype]


class NotTensors(CheckpointError):
    """A torch file that is harmless and whole, and holds something else than named tensors."""


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
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        self._mapped = zipfile.is_zipfile(path)
        self._tensors: dict[str, Tensor] | None = self._load()
        self._bytes_read = 0
        self._bytes = sum(tensor.nbytes for tensor in self._tensors.values())
        self.headers = {
            name: TensorHeader(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        if self._tensors is None:
            self._tensors = self._load()
        tensor = self._tensors[name]
        if not self._mapped:
            return tensor
        tensor = tensor.clone()
        self._bytes_read += tensor.nbytes
        if self._bytes_read >= min(self._bytes, UNMAP_AFTER):
            self._tensors, self._bytes_read = None, 0
        return tensor

    def _load(self) -> dict[str, Tensor]:
        try:
            content = torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=self._mapped
            )
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.label} is refused: it holds pickled objects other than tensors, and "
                "loading those can run code"
            ) from error
        except (
            RuntimeError,
            OSError,
            EOFError,
            ValueError,
            KeyError,
            zipfile.BadZipFile,
        ) as error:
            raise CheckpointError(f"{self.label} is not a readable torch file") from error
        return self._flat(content)

    def _flat(self, content: object) -> dict[str, Tensor]:
        if not isinstance(content, Mapping):
            raise NotTensors(f"{self.label} must hold a dict of tensors")
        for name, value in content.items():
            dense = isinstance(value, Tensor) and value.layout is torch.strided
            if not isinstance(name, str) or not dense:
                raise NotTensors(f"{name!r} in {self.label} is not a dense tensor")
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

    @property
    def holds_quantized(self) -> bool:
        return any(name.rpartition(".")[2] in QUANTIZED_SUFFIXES for name in self.files)

    @property
    def paths(self) -> set[Path]:
        return {file.path for file in self.files.values()}


def open_tensor_file(path: Path, label: str) -> TensorFile:
    return (SafetensorsFile if path.suffix == ".safetensors" else TorchFile)(path, label)


def open_folder(folder: Path, root: Path, exclude: TensorStore | None = None) -> TensorStore:
    """A folder's own weights: `*.safetensors`, or else `pytorch_model*.bin`.

    Where 4-bit weights lie beside 16-bit ones, the latter; `find_awq` finds the others.

    Args:
        root: the checkpoint's folder, which files are named relative to.
        exclude: the AWQ files, should they lie among the folder's own.
    """
    others = set() if exclude is None else {path.resolve() for path in exclude.paths}
    sets = [
        store
        for store in open_weight_sets(folder, root)
        if others.isdisjoint(path.resolve() for path in store.paths)
    ]
    chosen = [store for store in sets if not store.holds_quantized] or sets
    where = label_of(folder, root)
    if not chosen:
        return TensorStore(where, {}, _weight_map(folder / FILE_KINDS[0][1], root))
    if len(chosen) == 1:
        return chosen[0]
    files = [file for store in chosen for file in dict.fromkeys(store.files.values())]
    return TensorStore.of(where, files, chosen[0].absent)


def open_weight_sets(folder: Path, root: Path) -> list[TensorStore]:
    """A folder's own weights, each file or set of shards by itself.

    An index is followed if all its files are there; of the others, only 4-bit ones are then taken.
    If not, it may be stale (the released AWQ checkpoints have such): the files that exist are read,
    and a tensor that is really missing is then reported with the file that the index promised.
    """
    for pattern, index_name in FILE_KINDS:
        paths = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        if not paths:
            continue
        weight_map = _weight_map(folder / index_name, root)
        indexed = {folder / name for name in weight_map.values()}
        complete = bool(indexed) and indexed <= set(paths)
        sets: dict[str, list[Path]] = {}
        for path in paths:
            shard = SHARD.fullmatch(path.stem)
            key = index_name if complete and path in indexed else path.name
            sets.setdefault(shard["stem"] if shard and key == path.name else key, []).append(path)
        names = {path.name for path in paths}
        absent = {tensor: name for tensor, name in weight_map.items() if name not in names}
        stores = {
            key: TensorStore.of(
                label_of(members[0] if len(members) == 1 else folder, root),
                [open_tensor_file(path, label_of(path, root)) for path in members],
                absent,
            )
            for key, members in sets.items()
        }
        return [
            store
            for key, store in stores.items()
            if not complete or key == index_name or store.holds_quantized
        ]
    return []


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
