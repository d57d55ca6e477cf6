"""A folder on disk (or a Hub id) -> a running engine."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from models.awq import backends_of, select_backend, warm_up_linears
from models.checkpoints import Checkpoint, open_checkpoint
from models.device_map import DeviceMap, choose_placement
from models.engine.allocator import keep_freed_memory
from models.engine.core import EngineCore
from models.engine.decode_graphs import capture_decodes
from models.engine.engine import Engine
from models.engine.host import EngineHost, ThreadHost
from models.engine.image_cache import ImageEmbeddingCache
from models.engine.loop import EngineLoop
from models.engine.messages import ServedModel
from models.engine.options import EngineOptions
from models.engine.preparation import RequestPreparer
from models.engine.process import ProcessHost
from models.engine.runner import ModelRunner
from models.engine.sizing import GPU_STEP_TOKENS, keeps_bf16_copy, resolve_sizes, threads_for
from models.errors import ConfigurationError
from models.language.attention_backends import ATTENTION_BACKENDS, select_attention
from models.language.kv_cache import KVCache, KVCacheShape
from models.language.loading import load_decoder
from models.language.paged_batch import PagedBatch
from models.language.vocabulary import check_vocabulary
from models.placement import Placement
from models.prompts import Tokenizer, load_template, load_tokenizer, stop_token_ids
from models.vision import ImagePreprocessor, load_vision

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class LoadedCore:
    """A model in memory and the core that runs it, without a thread yet.

    Attributes:
        num_threads: of the CPU, for its steps.
    """

    core: EngineCore
    model: ServedModel
    tokenizer: Tokenizer
    num_threads: int


def load_engine(
    model_path: str | Path,
    quant_path: str | Path | None = None,
    precision: Literal["W4A16", "W16A16"] = "W4A16",
    *,
    tinychat_prompt_rewrite: bool = False,
    own_process: bool = False,
    **options: Any,
) -> Engine:
    """Loads a checkpoint and starts its engine.

    Args:
        model_path: a checkpoint's folder, or a Hub id.
        quant_path: the AWQ weights, a file or a folder; by default found in `model_path`.
        precision: "W4A16" (AWQ weights) or "W16A16".
        tinychat_prompt_rewrite: put TinyChat's backslash, "n" and space behind each picture.
        own_process: steps run in a child process. A server wants that: its own Python code does
            not slow the model's down then, nor the other way round. It takes some 300 MB more.
        options: see `load_core`.

    Raises:
        CheckpointError: the files cannot be served; says which and why.
        ConfigurationError: the options cannot be fulfilled.
        EngineDead: the child process ended while it was loading.
    """
    arguments = {
        "model_path": model_path, "quant_path": quant_path, "precision": precision, **options,
    }  # fmt: skip
    host: EngineHost
    if own_process:
        host = child = ProcessHost(arguments)
        model = child.model
        tokenizer = load_tokenizer(model.spec.tokenizer_path, model.spec.prompt.tokenization)
    else:
        loaded = load_core(**arguments)
        host = ThreadHost(EngineLoop(loaded.core, loaded.num_threads))
        model, tokenizer = loaded.model, loaded.tokenizer
    preparer = RequestPreparer(
        model.spec, tokenizer, model.preprocessor, model.max_model_len, tinychat_prompt_rewrite
    )
    template = load_template(model.spec.prompt, model.spec.tokenizer_path, tokenizer)
    return Engine(
        host,
        preparer,
        template,
        stop_token_ids=model.stop_token_ids,
        description=model.description,
    )


def load_core(
    model_path: str | Path,
    quant_path: str | Path | None = None,
    precision: Literal["W4A16", "W16A16"] = "W4A16",
    *,
    device: str = "auto",
    device_map: DeviceMap = "auto",
    dtype: str = "auto",
    num_threads: int | None = None,
    cpus: int | None = None,
    template: str | None = None,
    token_order: Literal["row", "column"] | None = None,
    **engine_options: Any,
) -> LoadedCore:
    """
    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        device_map: "auto" (over several GPUs where the model does not fit one), "single" (never),
            or "balanced" (over all GPUs that are visible). CPUs have none.
        dtype: "auto", "float32" (exact; slow), "bfloat16" or "float16". Auto is bfloat16 on a CPU,
            and the checkpoint's own on a GPU.
        num_threads: of the CPU; default: `cpus`, or fewer where the model's layers are too small
            to be shared out.
        cpus: cores to count on; default: all that this process may use.
        template, token_order: see `open_checkpoint`.
        engine_options: see `EngineOptions`.

    Raises:
        CheckpointError, ConfigurationError: see `load_engine`.
    """
    options = EngineOptions(**engine_options)
    target = _device(device)
    checkpoint = open_checkpoint(
        model_path, quant_path, precision, template=template, token_order=token_order
    )
    kind = _dtype(dtype, target, checkpoint)
    if kind == torch.float32:
        torch.backends.cudnn.allow_tf32 = False  # the tower's first layer is a convolution
    available = cpus or len(os.sched_getaffinity(0))
    threads = num_threads or threads_for(checkpoint.spec.language, available)
    torch.set_num_threads(threads)

    started = time.monotonic()
    spec = checkpoint.spec
    context_length = min(options.max_model_len or spec.context_length, spec.context_length)
    backend = select_backend(target, kind, bf16_copy=keeps_bf16_copy(options, spec.language))
    tokenizer = load_tokenizer(spec.tokenizer_path, spec.prompt.tokenization)
    check_vocabulary(tokenizer, spec.language)
    conversation_template = load_template(spec.prompt, spec.tokenizer_path, tokenizer)
    placement = choose_placement(checkpoint, target, kind, device_map, options)
    vision = load_vision(checkpoint, placement.vision, kind)
    decoder = load_decoder(
        checkpoint.language,
        spec.language,
        max_positions=context_length,
        device=placement,
        dtype=kind,
        backend=backend,
    )
    shape = KVCacheShape.of(spec.language, options.block_size, kind)
    attention_name = select_attention(target, options.attention_backend)
    attention = ATTENTION_BACKENDS[attention_name]
    warm_up_linears(decoder, kind, options.max_num_batched_tokens or GPU_STEP_TOKENS)
    sizes = resolve_sizes(
        options, shape, context_length, decoder, vision, placement, tokenizer, attention
    )
    cache = KVCache(shape, sizes.num_blocks, placement.layers)
    graphs = None
    if attention is PagedBatch and len(placement.devices) == 1 and not options.enforce_eager:
        graphs = capture_decodes(
            decoder, cache, max_rows=sizes.max_num_seqs, max_tokens=sizes.max_model_len
        )
    runner = ModelRunner(
        decoder,
        ImageEmbeddingCache(vision, options.image_cache_bytes),
        cache,
        placement.embedding,
        attention=attention,
        graphs=graphs,
    )
    core = EngineCore(
        runner,
        tokenizer,
        stop_token_ids(conversation_template, tokenizer),
        max_model_len=sizes.max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        enable_prefix_caching=options.enable_prefix_caching,
        max_prefill_slowdown=options.max_prefill_slowdown,
        async_scheduling=(
            target.type == "cuda" if options.async_scheduling is None else options.async_scheduling
        ),
    )
    preprocessor = ImagePreprocessor(
        spec.vision.preprocessing, vision.num_tokens_per_tile, spec.projector.merge
    )
    kv_tokens = sizes.num_blocks * shape.block_size
    picture_bytes = preprocessor.min_tokens * spec.language.hidden_size * kind.itemsize
    description = {
        "model": spec.name,
        "layout": spec.layout,
        "precision": precision,
        "device": _device_names(placement),
        "dtype": str(kind).removeprefix("torch."),
        "backend": backends_of(decoder),
        "attention": attention_name,
        "cuda_graphs": "none" if graphs is None else f"up to {graphs.sizes[-1]} sequences",
        "threads": str(threads),
        "context": f"{sizes.max_model_len} tokens",
        "kv_cache": f"{kv_tokens} tokens, "
        f"{sizes.num_blocks * shape.bytes_per_block / 2**20:.0f} MiB, "
        f"{kv_tokens / sizes.max_model_len:.1f} full contexts",
        "max_num_seqs": str(sizes.max_num_seqs),
        "prefix_cache": "on" if options.enable_prefix_caching else "off",
        "image_cache": f"{options.image_cache_bytes / 2**20:.0f} MiB, "
        f"{options.image_cache_bytes // picture_bytes} pictures of one tile",
        "loaded_in": f"{time.monotonic() - started:.1f} s",
    }
    if target.type == "cpu":
        keep_freed_memory()  # after the weights, whose loading leaves gaps behind
    model = ServedModel(
        spec,
        preprocessor,
        core.max_model_len,
        core.scheduler.eos_token_ids,
        description,
    )
    return LoadedCore(core, model, tokenizer, threads)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        target = torch.device("meta")
    if target.type not in {"cpu", "cuda"}:
        raise ConfigurationError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"device is {device!r}, but torch sees no GPU here; use device: cpu or auto"
        )
    return target


def _dtype(dtype: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    if dtype == "auto":
        if device.type == "cpu":
            return torch.bfloat16  # the only 16-bit type that CPUs multiply fast
        stored = checkpoint.language.get("model.norm.weight").dtype
        return stored if stored in {torch.float16, torch.bfloat16} else torch.float16
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; it must be auto or one of {list(DTYPES)}")
    return DTYPES[dtype]


def _device_names(placement: Placement) -> str:
    """The processor's kind; of several, each with its share of the layers."""
    names = {
        device: torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        for device in placement.devices
    }
    if len(names) == 1:
        return next(iter(names.values()))
    return ", ".join(
        f"{device}: {name} ({placement.layers.count(device)} layers)"
        for device, name in names.items()
    )
