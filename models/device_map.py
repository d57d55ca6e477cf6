"""Where a model's parts go: on one device, or spread over several GPUs by accelerate's device map.

Layers that follow one another lie together, so that hidden states cross from GPU to GPU once for
each of them and step. Spreading makes room; it does not make a step faster.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, TypeAlias, get_args

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn

from models.checkpoints import Checkpoint
from models.checkpoints.skeleton import decoder_skeleton, vision_skeleton
from models.engine.options import EngineOptions
from models.engine.sizing import gpu_budget
from models.errors import ConfigurationError
from models.language.decoder import Decoder, DecoderLayer
from models.language.kv_cache import KVCacheShape
from models.placement import Placement
from models.vision import VisionEncoder

DeviceMap: TypeAlias = Literal["auto", "single", "balanced"]
WHOLE = (DecoderLayer.__name__, VisionEncoder.__name__)
"""Modules that are never split."""


class Skeleton(nn.Module):
    """The whole model without data, each layer with its part of the KV cache: what accelerate
    measures."""

    def __init__(self, vision: VisionEncoder, decoder: Decoder, layer_kv_bytes: int) -> None:
        super().__init__()
        self.vision = vision
        self.decoder = decoder
        self.kv_bytes = layer_kv_bytes * len(decoder.model.layers)
        for layer in decoder.model.layers:
            cache = torch.empty(layer_kv_bytes, dtype=torch.uint8, device="meta")
            layer.register_buffer("kv_cache", cache)

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers())) - (
            self.kv_bytes
        )


def choose_placement(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    device_map: DeviceMap,
    options: EngineOptions,
) -> Placement:
    """
    Args:
        device: "cuda" without a number stands for all GPUs that are visible.
        device_map: "single"; "balanced" (over all GPUs); or "auto": balanced where the weights and
            the KV cache of one request do not fit one GPU.

    Raises:
        CheckpointError: what loading would raise for the headers.
        ConfigurationError: the model does not fit, or there is nothing to spread it over.
    """
    if device_map not in get_args(DeviceMap):
        raise ConfigurationError(
            f"device_map is {device_map!r}; it must be one of {get_args(DeviceMap)}"
        )
    count = torch.cuda.device_count() if device == torch.device("cuda") else 1
    if device_map == "balanced" and count < 2:
        raise ConfigurationError(
            "device_map is balanced, which spreads a model over several GPUs, but "
            + (
                "torch sees only one here; use device_map: auto"
                if device == torch.device("cuda")
                else f"device is {device}; use device: cuda, or device_map: auto"
            )
        )
    if device.type != "cuda":
        return Placement.single(device, checkpoint.spec.language.num_hidden_layers)
    gpus = [torch.device("cuda", i) for i in range(count)] if count > 1 else [device]
    memory = {gpu: gpu_budget(gpu, options.gpu_memory_utilization) for gpu in gpus}
    return place(_skeleton(checkpoint, dtype, options), memory, device_map)


def gpus_needed(
    checkpoint: Checkpoint, dtype: str, options: EngineOptions, gpu_bytes: int, most: int
) -> int:
    """How many GPUs of that size, otherwise unused, `choose_placement` would take.

    Args:
        dtype: of activations, by its name; "auto" is one of 16 bits.
        most: GPUs that there are.

    Raises:
        CheckpointError: what loading would raise for the headers.
        ConfigurationError: they would not do.
    """
    width = torch.float32 if dtype == "float32" else torch.bfloat16
    skeleton = _skeleton(checkpoint, width, options)
    usable = int(gpu_bytes * options.gpu_memory_utilization)
    if skeleton.weight_bytes + skeleton.kv_bytes <= usable:
        return 1
    for count in range(min(2, most), most):
        with suppress(ConfigurationError):
            place(skeleton, _alike(count, usable), "auto")
            return count
    place(skeleton, _alike(most, usable), "auto")
    return most


def _alike(count: int, usable: int) -> dict[torch.device, int]:
    return {torch.device("cuda", index): usable for index in range(count)}


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype, options: EngineOptions) -> Skeleton:
    """With the KV cache of one request, or the one that is asked for."""
    spec = checkpoint.spec
    shape = KVCacheShape.of(spec.language, options.block_size, dtype)
    context_length = min(options.max_model_len or spec.context_length, spec.context_length)
    blocks = -(-context_length // shape.block_size)
    if options.kv_cache_bytes is not None:
        blocks = options.kv_cache_bytes // shape.bytes_per_block
    return Skeleton(
        vision_skeleton(checkpoint, dtype),
        decoder_skeleton(checkpoint, dtype),
        blocks * shape.layer_bytes_per_block,
    )


def place(
    skeleton: Skeleton, memory: Mapping[torch.device, int], device_map: DeviceMap
) -> Placement:
    """
    Args:
        memory: bytes that may be used on each GPU, the first being the one that is taken alone.

    Raises:
        ConfigurationError: the model does not fit.
    """
    gpus = [*memory]
    num_layers = len(skeleton.decoder.model.layers)
    weights, alone = skeleton.weight_bytes, memory[gpus[0]]
    if device_map != "balanced":
        if weights + skeleton.kv_bytes <= alone:
            return Placement.single(gpus[0], num_layers)
        if device_map == "single" or len(gpus) == 1:
            if weights <= alone:  # with a KV cache that is smaller
                return Placement.single(gpus[0], num_layers)
            raise ConfigurationError(_too_large(skeleton, memory, gpus[:1]))
    return _spread(skeleton, memory)


def _spread(skeleton: Skeleton, memory: Mapping[torch.device, int]) -> Placement:
    gpus = [*memory]
    limits: dict[int | str, int | str] = {i: max(0, memory[gpu]) for i, gpu in enumerate(gpus)}
    with _accelerate_quiet():
        balanced = get_balanced_memory(skeleton, {**limits}, no_split_module_classes=[*WHOLE])
        # Of very unequal GPUs the balance takes too little.
        for most in (balanced, limits):
            found = infer_auto_device_map(
                skeleton,
                most,
                no_split_module_classes=[*WHOLE],
                offload_buffers=True,  # else room for the KV cache, of buffers, is kept elsewhere
            )
            if set(found.values()) <= set(range(len(gpus))):  # and nothing is left for the disk
                break
        else:
            raise ConfigurationError(_too_large(skeleton, memory, gpus))

    def of(name: str) -> torch.device:
        """By the longest part of its name that is listed."""
        while name not in found:
            name = name.rpartition(".")[0]
        return gpus[int(found[name])]

    num_layers = len(skeleton.decoder.model.layers)
    return Placement(
        vision=of("vision"),
        embedding=of("decoder.model.embed_tokens"),
        layers=tuple(of(f"decoder.model.layers.{index}") for index in range(num_layers)),
        norm=of("decoder.model.norm"),
        head=of("decoder.lm_head"),
    )


@contextmanager
def _accelerate_quiet() -> Iterator[None]:
    """It warns of GPUs that are not on this machine, even where only a plan for another is made."""
    log = logging.getLogger(infer_auto_device_map.__module__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _too_large(
    skeleton: Skeleton, memory: Mapping[torch.device, int], used: Sequence[torch.device]
) -> str:
    have = " + ".join(_gib(memory[gpu]) for gpu in used)
    message = (
        f"the model does not fit: its weights take {_gib(skeleton.weight_bytes)} GiB and the KV "
        f"cache of one request {_gib(skeleton.kv_bytes)}, and {', '.join(map(str, used))} "
        f"{'has' if len(used) == 1 else 'have'} {have} GiB for them"
    )
    if len(used) < len(memory):
        return f"{message}; device_map: auto spreads it over the {len(memory)} GPUs that are here"
    remedies = "4-bit weights (precision: W4A16), a smaller max_model_len" + (
        ", or more GPUs" if len(used) > 1 else ", or several GPUs (device: cuda, device_map: auto)"
    )
    return f"{message}; what would help: {remedies}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
