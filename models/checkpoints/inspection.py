"""What a checkpoint holds and needs, and whether it can be served, from its headers alone.

Everything that loading checks is checked here, by the loaders themselves (`skeleton`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from models.awq import select_backend
from models.checkpoints.opening import open_checkpoint
from models.checkpoints.skeleton import decoder_skeleton, group_size, vision_skeleton
from models.checkpoints.spec import Checkpoint, ModelSpec, Precision
from models.engine.options import EngineOptions
from models.engine.sizing import keeps_bf16_copy
from models.errors import CheckpointError
from models.language.decoder import Decoder
from models.language.kv_cache import KVCacheShape, head_dim
from models.language.loading import linear_shapes
from models.language.vocabulary import check_vocabulary
from models.prompts import load_template, load_tokenizer, stop_token_ids
from models.vision import VisionEncoder

Section: TypeAlias = dict[str, Any]

PRECISIONS: tuple[Precision, ...] = ("W4A16", "W16A16")
DEFAULT_GROUP_SIZE = 128
NIBBLE_BYTES = 0.5
SCALE_BYTES = 4
"""Of a group of 4-bit weights: its scale and its zero point, as the fast backends hold them."""
PROJECTION = re.compile(r"_proj\.|^rotary\.")
"""Tensors of the decoder that are counted as layers, or are no weights."""
CPU_WITH_COPY = "cpu_int4_bf16"
CONCURRENCY = {"cpu": 8, "cuda": 64}
"""The engine's own choice."""


@dataclass(frozen=True)
class Inspection:
    """
    Attributes:
        name: the checkpoint's.
        sections: what it holds, ready for JSON.
    """

    name: str
    sections: dict[str, Section]


def inspect_checkpoint(
    model_path: str | Path,
    quant_path: str | Path | None = None,
    precision: Precision | None = None,
    *,
    context: int | None = None,
    concurrency: int | None = None,
) -> Inspection:
    """Reads headers and configs; downloads nothing.

    Args:
        precision: default: W4A16 where that can be served, else W16A16.
        context: tokens of each request; default: as many as the model takes.
        concurrency: requests at a time; default: the engine's choice for this machine.

    Raises:
        CheckpointError: it cannot be served; says why.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint, refused = _open(model_path, quant_path, precision)
    spec = checkpoint.spec
    context = min(context or spec.context_length, spec.context_length)
    concurrency = concurrency or CONCURRENCY[device]
    tokenizer = load_tokenizer(spec.tokenizer_path, spec.prompt.tokenization)
    check_vocabulary(tokenizer, spec.language)
    template = load_template(spec.prompt, spec.tokenizer_path, tokenizer)
    stops = sorted(stop_token_ids(template, tokenizer))
    vision = vision_skeleton(checkpoint, torch.float16)
    decoder = decoder_skeleton(checkpoint, torch.float16)
    grouping = group_size(checkpoint.language)
    dtype = _activations(device, checkpoint)
    copies = keeps_bf16_copy(EngineOptions(), spec.language)
    backend = "torch"
    if spec.precision == "W4A16":
        backend = select_backend(torch.device(device), dtype, bf16_copy=copies)
    first = checkpoint.language.quantized_linears()[:1]
    sections: dict[str, Section] = {
        "checkpoint": {
            "layout": spec.layout,
            "precision": spec.precision,
            "path": str(spec.root),
            "not served as": refused,
        },
        "language model": _language(spec),
        "vision tower": _tower(spec),
        "projector": _projector(spec),
        "preprocessing": _preprocessing(spec, vision),
        "prompts": {
            "template": template.name,
            "stop tokens": [tokenizer.decode([i], skip_special_tokens=False) for i in stops],
            "stop token ids": stops,
            "tokenizer": type(tokenizer).__name__.removesuffix("Tokenizer"),
            "tokens": tokenizer.vocab_size,
        },
        "quantisation": {
            "format": checkpoint.language.format_of(first[0]) if first else None,
            "group size": grouping,
        },
        "files": {
            source.component: sorted({source.file_of(name) for name in source.names()})
            for source in (checkpoint.language, checkpoint.projector, checkpoint.vision)
        },
        "memory": _memory(
            spec,
            decoder,
            vision,
            grouping or DEFAULT_GROUP_SIZE,
            dtype,
            context,
            concurrency,
            copied=backend == CPU_WITH_COPY,
        ),
        "this machine": {
            "device": device,
            "dtype": str(dtype).removeprefix("torch."),
            "backend": backend,
        },
    }
    return Inspection(spec.name, sections)


def render(inspection: Inspection) -> str:
    """Aligned plain text."""
    width = max(map(len, inspection.sections)) + 2
    lines = [inspection.name]
    for name, section in inspection.sections.items():
        for index, text in enumerate(RENDERERS[name](section)):
            lines.append(f"  {name if index == 0 else '':<{width}}{text}")
    return "\n".join(lines)


def _open(
    model_path: str | Path, quant_path: str | Path | None, precision: Precision | None
) -> tuple[Checkpoint, dict[str, str]]:
    """In the first precision that can be served, and why the ones before it cannot."""
    problems: dict[str, str] = {}
    for candidate in (precision,) if precision else PRECISIONS:
        try:
            checkpoint = open_checkpoint(model_path, quant_path, candidate, may_download=False)
            return checkpoint, problems
        except CheckpointError as error:
            problems[candidate] = str(error)
    if len(set(problems.values())) == 1:
        raise CheckpointError(next(iter(problems.values())))
    raise CheckpointError("; ".join(f"as {name}: {text}" for name, text in problems.items()))


def _activations(device: str, checkpoint: Checkpoint) -> torch.dtype:
    """`load_engine`'s dtype: auto."""
    if device == "cpu":
        return torch.bfloat16
    stored = checkpoint.language.get("model.norm.weight").dtype
    return stored if stored in {torch.float16, torch.bfloat16} else torch.float16


def _language(spec: ModelSpec) -> Section:
    config = spec.language
    return {
        "family": config.model_type, "layers": config.num_hidden_layers,
        "hidden": config.hidden_size, "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads, "kv heads": config.num_key_value_heads,
        "head size": head_dim(config), "vocabulary": config.vocab_size,
        "context": spec.context_length,
    }  # fmt: skip


def _tower(spec: ModelSpec) -> Section:
    config = spec.vision.config
    return {
        "kind": config.model_type.removesuffix("_vision_model"), "image size": config.image_size,
        "patch": config.patch_size, "layers": config.num_hidden_layers,
        "hidden": config.hidden_size, "select layer": spec.vision.select_layer,
        "select feature": spec.vision.select_feature,
    }  # fmt: skip


def _projector(spec: ModelSpec) -> Section:
    return {
        "kind": spec.projector.kind, "from": spec.projector.in_features,
        "to": spec.projector.out_features, "token order": spec.projector.token_order,
        "merge": spec.projector.merge,
    }  # fmt: skip


def _preprocessing(spec: ModelSpec, vision: VisionEncoder) -> Section:
    settings = spec.vision.preprocessing
    return {
        "mode": settings.mode, "resize": settings.resize, "size": settings.size,
        "crop": settings.crop_size, "mean": settings.mean, "std": settings.std,
        "resolutions": [list(size) for size in settings.grid_pinpoints],
        "tokens per picture": _most_tokens(spec, vision.num_tokens_per_tile),
    }  # fmt: skip


def _most_tokens(spec: ModelSpec, per_tile: int) -> int:
    """Of a picture that is as large and as square as its tiles."""
    settings, merge = spec.vision.preprocessing, spec.projector.merge
    most = per_tile
    for width, height in settings.grid_pinpoints:
        rows, columns = height // settings.crop_size, width // settings.crop_size
        newlines = rows * int(per_tile**0.5) if merge == "spatial_unpad" else 0
        most = max(most, per_tile * (1 + rows * columns) + newlines)
    return most


def _memory(
    spec: ModelSpec,
    decoder: Decoder,
    vision: VisionEncoder,
    group_size: int,
    dtype: torch.dtype,
    context: int,
    concurrency: int,
    *,
    copied: bool,
) -> Section:
    config, width = spec.language, dtype.itemsize
    linears = sum(n * k for n, k in linear_shapes(config).values())
    others = sum(parameter.numel() for parameter in vision.parameters())
    others += sum(
        tensor.numel()
        for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers())
        if name.endswith(".bias") or not PROJECTION.search(name)
    )
    shape = KVCacheShape.of(config, EngineOptions().block_size, dtype)
    blocks = -(-context // shape.block_size) * concurrency
    per_weight = NIBBLE_BYTES + SCALE_BYTES / group_size
    return {
        "weights in bytes": {
            "W4A16": int(linears * per_weight) + others * width,
            "W16A16": (linears + others) * width,
        },
        "16-bit copy in bytes": linears * width if copied else 0,
        "KV cache in bytes": blocks * shape.bytes_per_block,
        "context": context,
        "concurrency": concurrency,
    }  # fmt: skip


def _render_checkpoint(section: Section) -> list[str]:
    refused = [f"not as {name}: {reason}" for name, reason in section["not served as"].items()]
    served = f"{section['layout']} layout, served as {section['precision']}"
    return [served, section["path"], *refused]


def _render_language(section: Section) -> list[str]:
    grouped = section["kv heads"] != section["heads"]
    heads = f"{section['heads']} heads" + (f" on {section['kv heads']}" if grouped else "")
    return [
        f"{section['family']}, {section['layers']} layers of {section['hidden']} "
        f"(inside {section['intermediate']}), {heads} of {section['head size']}",
        f"vocabulary {section['vocabulary']}, context {section['context']} tokens",
    ]


def _render_tower(section: Section) -> list[str]:
    return [
        f"{section['kind']}, {section['image size']} pixels in patches of {section['patch']}, "
        f"{section['layers']} layers of {section['hidden']}",
        f"hidden state {section['select layer']}, {section['select feature']}",
    ]


def _render_projector(section: Section) -> list[str]:
    order, merge = section["token order"], section["merge"]
    tiles = "" if merge == "flat" else f", tiles {merge}"
    kind, inner, outer = section["kind"], section["from"], section["to"]
    return [f"{kind}, {inner} to {outer}, tokens {order} by {order}{tiles}"]


def _render_preprocessing(section: Section) -> list[str]:
    sizes = ", ".join(f"{width} x {height}" for width, height in section["resolutions"])
    mean, std = (" ".join(f"{value:.4g}" for value in section[key]) for key in ("mean", "std"))
    return [
        f"{section['mode']}, {section['resize']} {section['size']}, crop {section['crop']}, mean "
        f"{mean}, std {std}",
        *([f"in tiles of {sizes}"] if sizes else []),
        f"{'up to ' if sizes else ''}{section['tokens per picture']} tokens per picture",
    ]


def _render_prompts(section: Section) -> list[str]:
    ends = zip(section["stop tokens"], section["stop token ids"], strict=True)
    return [
        f"template {section['template']}, answers end at "
        + ", ".join(f"{text} ({number})" for text, number in ends),
        f"tokenizer {section['tokenizer']}, {section['tokens']} tokens",
    ]


def _render_quantisation(section: Section) -> list[str]:
    if section["format"] is None:
        return ["none"]
    return [f"{section['format']}, groups of {section['group size']}"]


def _render_files(section: Section) -> list[str]:
    width = max(map(len, section)) + 2
    lines = []
    for component, files in section.items():
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        lines.append(f"{component:<{width}}{files[0]}{more}")
    return lines


def _render_memory(section: Section) -> list[str]:
    weights = section["weights in bytes"].items()
    copy = section["16-bit copy in bytes"]
    return [
        "weights " + ", ".join(f"{_size(count)} as {name}" for name, count in weights),
        *([f"and {_size(copy)} for a 16-bit copy of 4-bit weights, for prompts"] if copy else []),
        f"KV cache {_size(section['KV cache in bytes'])} for {section['concurrency']} requests "
        f"of {section['context']} tokens",
    ]


def _render_machine(section: Section) -> list[str]:
    return [f"{section['device']}, {section['dtype']}, backend {section['backend']}"]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


RENDERERS: dict[str, Callable[[Section], list[str]]] = {
    "checkpoint": _render_checkpoint,
    "language model": _render_language,
    "vision tower": _render_tower,
    "projector": _render_projector,
    "preprocessing": _render_preprocessing,
    "prompts": _render_prompts,
    "quantisation": _render_quantisation,
    "files": _render_files,
    "memory": _render_memory,
    "this machine": _render_machine,
}
"""By section: its lines."""
