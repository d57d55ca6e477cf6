"""Reading, writing and altering a checkpoint's files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    file_format: str = "safetensors",
    shards: int = 1,
) -> None:
    """Under transformers' file names, with an index where there are several shards."""
    stem, suffix = {
        "safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin"),
    }[file_format]  # fmt: skip
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        number = f"-{shard + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        path = folder / f"{stem}{number}.{suffix}"
        weight_map.update(dict.fromkeys(part, path.name))
        _save(part, path)
    if shards > 1:
        write_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": weight_map})


def read_tensors(path: Path) -> Tensors:
    """All tensors of one file, `.safetensors` or torch's."""
    if path.suffix == ".safetensors":
        return load_file(path)
    tensors: Tensors = torch.load(path, weights_only=True)
    return tensors


def rewrite_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Lets `change` alter the dict of a file's tensors, and writes it back."""
    tensors = read_tensors(path)
    change(tensors)
    _save(tensors, path)


def rewrite_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; `None` removes them."""
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    write_json(path, {key: value for key, value in values.items() if value is not None})


def awq_file(folder: Path) -> Path:
    """The one file of 4-bit weights in a tiny checkpoint."""
    (path,) = folder.rglob("*-awq-v2.pt")
    return path


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _save(tensors: Tensors, path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)
