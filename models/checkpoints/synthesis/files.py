"""Files of tensors, written one tensor at a time: no more than a shard is ever held."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.awq.formats import TensorHeader
from models.checkpoints.synthesis.tokenizers.base import write_json

SHARD_BYTES = 1 << 30
STEMS = {"safetensors": "model", "bin": "pytorch_model"}


class TensorWriter(ABC):
    """A context: what was added is complete on disk when it ends without an error."""

    @abstractmethod
    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; the caller keeps no other reference to it."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is still held."""

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()


class ShardWriter(TensorWriter):
    """`model.safetensors` or `pytorch_model.bin`, or shards of it with their index."""

    def __init__(self, folder: Path, file_format: str, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._suffix = file_format
        self._stem = STEMS[file_format]
        self._shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        tensor = tensor.contiguous()
        if any(tensor.data_ptr() == held.data_ptr() for held in self._held.values()):
            tensor = tensor.clone()  # safetensors refuses tensors that share their memory
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes

    def close(self) -> None:
        if self._held:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._temporary(1).rename(self._folder / f"{self._stem}.{self._suffix}")
            return
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = shard_name(self._stem, self._suffix, number, count)
            self._temporary(number).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json(self._folder / f"{self._stem}.{self._suffix}.index.json", index)

    def _flush(self) -> None:
        self._shards.append(list(self._held))
        path = self._temporary(len(self._shards))
        if self._suffix == "safetensors":
            save_file(self._held, path, metadata={"format": "pt"})
            path.chmod(0o644)  # safetensors leaves it to its owner alone
        else:
            torch.save(self._held, path)
        self._total_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        """How many shards there will be is known at the end only."""
        return self._folder / f"{self._stem}-{number:05d}.{self._suffix}.part"


class TorchFileWriter(TensorWriter):
    """One `.pt` file of any size: a dict of tensors, as `torch.save` writes it.

    Tensors are put aside on disk, then torch lays the file out without their data, and those are
    copied into their places. So the file's check sums are those of zeros; torch ignores them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._headers: dict[str, TensorHeader] = {}
        self._spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed in close)

    def add(self, name: str, tensor: Tensor) -> None:
        self._headers[name] = TensorHeader(tuple(tensor.shape), tensor.dtype)
        self._spool.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        with FakeTensorMode():
            empty = {
                name: torch.empty(header.shape, dtype=header.dtype)
                for name, header in self._headers.items()
            }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, self._path)
        with FakeTensorMode():
            places = torch.load(self._path, weights_only=True)
        self._spool.seek(0)
        with self._path.open("r+b") as file:
            for tensor in places.values():  # in the order of `add`
                file.seek(tensor.untyped_storage()._checkpoint_offset)
                file.write(self._spool.read(tensor.nbytes))
        self._spool.close()


def shard_name(stem: str, suffix: str, number: int, count: int) -> str:
    """transformers' name of a shard."""
    return f"{stem}-{number:05d}-of-{count:05d}.{suffix}"
