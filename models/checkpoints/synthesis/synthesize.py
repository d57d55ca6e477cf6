"""Writes random-weight checkpoints, tensor by tensor, so that any size fits into memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from tqdm import tqdm

from models.awq.quantized_weight import QuantizedWeight
from models.checkpoints.synthesis import configs
from models.checkpoints.synthesis.components import Item
from models.checkpoints.synthesis.families import FAMILIES
from models.checkpoints.synthesis.family import Family, tiny
from models.checkpoints.synthesis.files import (
    SHARD_BYTES,
    ShardWriter,
    TensorWriter,
    TorchFileWriter,
)
from models.checkpoints.synthesis.formats import OUTPUT_FORMATS, OutputFormat
from models.checkpoints.synthesis.layouts import HF_NAMES, LAYOUT_WRITERS, Job
from models.checkpoints.synthesis.tokenizers import TOKENIZERS
from models.checkpoints.synthesis.tokenizers.base import write_json
from models.checkpoints.synthesis.weights import EqualLayers, RandomWeights
from models.errors import ConfigurationError

Scale: TypeAlias = Literal["tiny", "full"]

GROUP_SIZES = (32, 64, 128)
DEFAULT_FORMATS = ("16bit", "llm-awq-v2")


def synthesize(
    like: str | Family,
    out: Path,
    *,
    scale: Scale = "tiny",
    formats: Sequence[str] = DEFAULT_FORMATS,
    group_size: int = 128,
    seed: int = 0,
    naming: str = "released",
    shard_bytes: int = SHARD_BYTES,
    equal_layers: bool = False,
    progress: bool = False,
) -> list[Path]:
    """A checkpoint of random weights in a family's layout, names, dtypes and files.

    All formats of one seed hold the same weights, and the 16-bit ones are what the 4-bit ones
    stand for; "compressed-tensors-sym" alone has others, since its zero points are all 8.

    Args:
        like: a name in `FAMILIES`, or a family of the caller's own.
        out: the checkpoint's folder, new or empty.
        formats: names in `OUTPUT_FORMATS`. "16bit" and llm-awq's lie together in `out`. Each of
            the others is a checkpoint of its own: `out` if it is the only one that is asked for,
            otherwise a folder beside it, "<out>-<format>".
        naming: of the tensors in transformers' layout, a name in `HF_NAMES`.
        equal_layers: all layers hold the first one's weights, for those who need the sizes only:
            it takes a fraction of the time.
        progress: show a bar.

    Returns:
        The folders that were written.

    Raises:
        ConfigurationError: an argument is none of its choices, or a folder is not empty.
    """
    family = FAMILIES[like] if isinstance(like, str) else like
    family = tiny(family) if scale == "tiny" else family
    entries = [OUTPUT_FORMATS[name] for name in dict.fromkeys(formats)]
    if not entries:
        raise ConfigurationError(f"no format; known: {', '.join(OUTPUT_FORMATS)}")
    if group_size not in GROUP_SIZES:
        raise ConfigurationError(f"group size {group_size}; known: 32, 64, 128")
    HF_NAMES[naming]
    draw = EqualLayers if equal_layers else RandomWeights
    jobs = [
        Job(
            family, folder, together,
            draw(seed, group_size, together[0].symmetric), group_size, naming,
        )
        for folder, together in _folders(out, entries)
    ]  # fmt: skip
    for job in jobs:
        _check_empty(job.root)
    for job in jobs:
        _write(job, shard_bytes, progress)
    return [job.root for job in jobs]


def _folders(
    out: Path, entries: Sequence[OutputFormat]
) -> list[tuple[Path, tuple[OutputFormat, ...]]]:
    if len(entries) == 1:
        return [(out, (entries[0],))]
    together = tuple(entry for entry in entries if not entry.stands_apart)
    apart = [entry for entry in entries if entry.stands_apart]
    return [
        *([(out, together)] if together else []),
        *((out.with_name(f"{out.name}-{entry.name}"), (entry,)) for entry in apart),
    ]


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} is not an empty folder; name a new one")


def _write(job: Job, shard_bytes: int, progress: bool) -> None:
    family, layout = job.family, LAYOUT_WRITERS[job.family.layout]
    main = layout.main_folder(job)
    main.mkdir(parents=True, exist_ok=True)
    tokenizer = TOKENIZERS[family.tokenizer].write(
        main, family.vocabulary, family.model_max_length, family.frame
    )
    layout.write_configs(job, tokenizer)
    write_json(main / "generation_config.json", configs.generation(tokenizer))
    with tqdm(
        desc=job.root.name, total=_num_weights(job, tokenizer.vocab_size), unit="weight",
        unit_scale=True, disable=not progress,
    ) as bar:  # fmt: skip
        for folder, items in layout.companions(job):
            with ShardWriter(folder, family.file_format, shard_bytes) as writer:
                _copy(items, writer, OUTPUT_FORMATS["16bit"], family.dtype, bar)
        for entry in job.formats:
            with _writer(job, entry, main, shard_bytes) as writer:
                items = layout.main(job, entry, tokenizer.vocab_size)
                _copy(items, writer, entry, entry.dtype or family.dtype, bar)


def _writer(job: Job, entry: OutputFormat, folder: Path, shard_bytes: int) -> TensorWriter:
    if entry.file_ending is not None:
        name = f"{job.root.name}-w4-g{job.group_size}-{entry.file_ending}"
        return TorchFileWriter(folder / name)
    file_format = "safetensors" if entry.is_quantized else job.family.file_format
    return ShardWriter(folder, file_format, shard_bytes)


def _copy(
    items: Iterable[Item],
    writer: TensorWriter,
    entry: OutputFormat,
    dtype: torch.dtype,
    bar: tqdm[Any],
) -> None:
    packed: WeakKeyDictionary[QuantizedWeight, dict[str, Tensor]] = WeakKeyDictionary()
    for name, value in items:
        if isinstance(value, QuantizedWeight):
            if value not in packed:
                packed[value] = entry.pack(value, dtype)
            for suffix, tensor in packed[value].items():
                writer.add(f"{name}.{suffix}", tensor)
        else:
            writer.add(name, value.to(dtype))
        bar.update(_count(value))


def _num_weights(job: Job, vocab_size: int) -> int:
    """That will be written, for the bar's end."""
    layout, job = LAYOUT_WRITERS[job.family.layout], replace(job, weights=job.weights.sizes_only())
    parts = [
        *(items for _, items in layout.companions(job)),
        *(layout.main(job, entry, vocab_size) for entry in job.formats),
    ]
    return sum(_count(value) for _, value in chain.from_iterable(parts))


def _count(value: Tensor | QuantizedWeight) -> int:
    return (value.q if isinstance(value, QuantizedWeight) else value).numel()
