"""A tiny checkpoint's 4-bit weights, written anew in another format and at another place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.awq import QuantizedWeight, quantize_rtn
from models.awq.formats import FORMATS
from tests.checkpoint_files import Tensors, awq_file, read_tensors, write_tensors

V2 = ("qweight", "scales", "scaled_zeros")


def take_awq(folder: Path) -> Tensors:
    """The tensors of the checkpoint's llm-awq v2 file, which is then removed."""
    path = awq_file(folder)
    tensors = read_tensors(path)
    path.unlink()
    return tensors


def in_format(tensors: Tensors, name: str, *, symmetric: bool = False) -> Tensors:
    """llm-awq v2's tensors in another format; all the rest as it is.

    Args:
        symmetric: the weights are first quantised again, with no other zero point than 8.
    """
    dtype = tensors["model.norm.weight"].dtype
    out: Tensors = {}
    for key, tensor in tensors.items():
        linear, _, suffix = key.rpartition(".")
        if suffix == "qweight":
            parts = {part: tensors[f"{linear}.{part}"] for part in V2}
            weight = FORMATS["llm-awq-v2"].unpack(parts)
            if symmetric:
                weight = symmetrical(weight, dtype)
            packed = FORMATS[name].pack(weight, dtype)
            out |= {f"{linear}.{part}": value for part, value in packed.items()}
        elif suffix not in V2:
            out[key] = tensor
    return out


def symmetrical(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    return quantize_rtn(weight.dequantize(dtype), weight.group_size, symmetric=True)


def language_folder(folder: Path) -> Path:
    """Where the language model's own files lie."""
    return folder / "llm" if (folder / "llm").is_dir() else folder


def as_torch_file(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, language_folder(folder) / "weights.pt")


def as_one_tensor_files(folder: Path, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        torch.save({name: tensor}, language_folder(folder) / f"{name}.pt")


def as_own_files(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """With what the checkpoint's own file holds besides: LLaVA's projector and tower."""
    own = language_folder(folder) / "model.safetensors"
    rest = read_tensors(own) if own.exists() else {}
    own.unlink(missing_ok=True)
    write_tensors(own.parent, {**tensors, **rest}, shards=shards)


def as_shards(folder: Path, tensors: Tensors) -> None:
    as_own_files(folder, tensors, shards=3)


def as_shards_without_an_index(folder: Path, tensors: Tensors) -> None:
    as_shards(folder, tensors)
    (language_folder(folder) / "model.safetensors.index.json").unlink()


def as_shards_beside_a_stale_index(folder: Path, tensors: Tensors) -> None:
    as_shards(folder, tensors)
    weight_map = dict.fromkeys(("lm_head.weight", "other"), "model-00001-of-00009.safetensors")
    index = language_folder(folder) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def as_safetensors_beside(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, language_folder(folder) / "weights-w4.safetensors")


PLACES: dict[str, Callable[[Path, Tensors], None]] = {
    "one .pt file": as_torch_file,
    "one-tensor files": as_one_tensor_files,
    "the checkpoint's own file": as_own_files,
    "its own shards": as_shards,
    "shards without an index": as_shards_without_an_index,
    "shards beside a stale index": as_shards_beside_a_stale_index,
    "safetensors beside its own files": as_safetensors_beside,
}
"""All of them are found without a `quant_path`."""
