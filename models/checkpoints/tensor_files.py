"""Files of named tensors, opened without reading or running what they hold."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.awq.formats import QUANTIZED_SUFFIXES, TensorHeader
from models.errors import CheckpointError

OLDEST_SAFE_TORCH = (2, 10)
"""`weights_only` could be got round before 2.6, and corrupt memory before 2.10 (CVE-2025-32434,
CVE-2026-24747)."""

CHUNK = 16 * 2**20
"""Bytes that are in memory besides the tensor that they are copied into."""

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

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SHARD = re.compile(r"(?P<stem>.+)-\d+-of-\d+")


@dataclass(frozen=True)
class Extent:
    """Where a tensor's data lie in a file.

    Attributes:
        offset: of its first element, in bytes.
        stride: in elements, where they do not lie in their own order.
    """

    header: TensorHeader
    offset: int
    stride: tuple[int, ...] | None = None


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
        """On the CPU and in the file's dtype; not to be written to."""

    @abstractmethod
    def copy_into(self, name: str, out: Tensor) -> None:
        """
        Args:
            out: a row-major tensor or rows of one, of the same shape, in any dtype and on any
                device.
        """


class MappableFile(TensorFile):
    """A file that holds its tensors' bytes as they are in memory.

    They are read, rather than mapped: pages of a mapped file count as the process's, which would
    hold every weight twice while it packs them, and a file that is cut under a running server would
    take the server with it. For each tensor the file is opened anew: some checkpoints are of more
    files than a process may keep open.
    """

    extents: Mapping[str, Extent]

    def read(self, name: str) -> Tensor:
        extent = self.extents[name]
        if extent.stride is not None:
            return self._read_strided(extent, extent.stride)
        out = torch.empty(extent.header.shape, dtype=extent.header.dtype)
        with self.path.open("rb") as file:
            file.seek(extent.offset)
            self._fill(file, out.view(-1))
        return out

    def copy_into(self, name: str, out: Tensor) -> None:
        extent = self.extents[name]
        if extent.stride is not None:
            out.copy_(self._read_strided(extent, extent.stride))
            return
        dtype, flat = extent.header.dtype, out.view(-1)
        size = max(1, min(flat.numel(), CHUNK // dtype.itemsize))
        chunk = torch.empty(size, dtype=dtype)
        with self.path.open("rb") as file:
            file.seek(extent.offset)
            for start in range(0, flat.numel(), size):
                part = flat[start : start + size]
                self._fill(file, chunk[: part.numel()])
                part.copy_(chunk[: part.numel()])

    def _read_strided(self, extent: Extent, stride: tuple[int, ...]) -> Tensor:
        shape = extent.header.shape
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        span = torch.empty(last + 1, dtype=extent.header.dtype)
        with self.path.open("rb") as file:
            file.seek(extent.offset)
            self._fill(file, span)
        return span.as_strided(shape, stride).contiguous()

    def _fill(self, file: BufferedReader, flat: Tensor) -> None:
        octets = flat.view(torch.uint8).numpy().data
        while octets:
            count = file.readinto(octets)
            if not count:
                raise CheckpointError(f"{self.label} ends early: it was cut while it was read")
            octets = octets[count:]


class SafetensorsFile(MappableFile):
    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        try:
            with safe_open(path, framework="pt", device="cpu"):  # checks it, and tells no offsets
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{label} is not a readable safetensors file; is it damaged, or cut off? ({error})"
            ) from error
        entries.pop("__metadata__", None)
        self.extents = {
            name: Extent(
                TensorHeader(tuple(entry["shape"]), self._dtype(name, entry["dtype"])),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        }
        self.headers = {name: extent.header for name, extent in self.extents.items()}

    def _dtype(self, name: str, dtype: str) -> torch.dtype:
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{name} in {self.label} has the unknown dtype {dtype}")
        return SAFETENSORS_DTYPES[dtype]


class NotTensors(CheckpointError):
    """A torch file that is harmless and whole, and holds something else than named tensors."""


class TorchFile(MappableFile):
    """A `.pt` or `.bin` file: a flat dict of tensors. Any other pickle is refused, not run."""

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        # Under this mode torch reads where tensors lie, and not the tensors.
        with FakeTensorMode():
            tensors = load_tensors(path, label)
            self.extents = {name: _extent(tensor) for name, tensor in tensors.items()}
        self.headers = {name: extent.header for name, extent in self.extents.items()}


class OldTorchFile(TensorFile):
    """A torch file from before torch 1.6, which was no zip archive. All of it is held."""

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        self._tensors = load_tensors(path, label)
        self.headers = {
            name: TensorHeader(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def copy_into(self, name: str, out: Tensor) -> None:
        out.copy_(self._tensors[name])


def load_tensors(path: Path, label: str) -> dict[str, Tensor]:
    """A torch file's content.

    Raises:
        CheckpointError: it is damaged, or holds anything but a flat dict of dense tensors.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_SAFE_TORCH:
        raise CheckpointError(
            f"{label} needs torch {'.'.join(map(str, OLDEST_SAFE_TORCH))} or later, since "
            f"older ones can be made to run code by such files; this is {torch.__version__}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{label} is refused: it holds pickled objects other than tensors, and loading those "
            "can run code"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{label} is not a readable torch file; is it damaged, or cut off?"
        ) from error
    if not isinstance(content, Mapping):
        raise NotTensors(f"{label} must hold a dict of tensors")
    for name, value in content.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided
        if not isinstance(name, str) or not dense:
            raise NotTensors(f"{name!r} in {label} is not a dense tensor")
    return {name: value.detach() for name, value in content.items()}


def _extent(tensor: Tensor) -> Extent:
    """
    Args:
        tensor: of a file that was loaded under `FakeTensorMode`.
    """
    header = TensorHeader(tuple(tensor.shape), tensor.dtype)
    start = tensor.untyped_storage()._checkpoint_offset
    assert start is not None, "torch sets it for every storage under that mode"
    offset = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
    strided = tensor.numel() > 0 and not tensor.is_contiguous()
    return Extent(header, offset, tuple(tensor.stride()) if strided else None)


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
    """
    Raises:
        CheckpointError: it is damaged, or could run code, or holds something else than tensors.
    """
    if _is_lfs_pointer(path):
        raise CheckpointError(
            f"{label} is only Git LFS's pointer to the file, as `git clone` without git-lfs leaves "
            "it; fetch the file itself, by `git lfs pull` or `hf download`"
        )
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, label)
    return (TorchFile if zipfile.is_zipfile(path) else OldTorchFile)(path, label)


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False  # whoever reads the tensors says why they cannot


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
