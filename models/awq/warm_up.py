"""What has to happen to 4-bit layers before a server may call itself ready."""

from __future__ import annotations

import logging
import time
from collections import Counter

import torch
from torch import nn

from models.awq.backends.choice import ROWS, rows_measured
from models.awq.linear import W4A16Linear

logger = logging.getLogger(__name__)


@torch.inference_mode()
def warm_up_linears(
    model: nn.Module, dtype: torch.dtype, max_rows: int, *, device_type: str = "cuda"
) -> None:
    """Runs a layer of each kind that is on a GPU, for every number of rows that has a plan.

    Afterwards no kernel is compiled or tuned any more in a step of up to `max_rows` tokens, and
    steps of 1, 2, 4, ... tokens can be captured in CUDA graphs.

    Args:
        dtype: of the activations.
        device_type: of the layers that need it.
    """
    started = time.monotonic()
    kinds = {
        (layer.shape, layer.backend, device): layer
        for layer in model.modules()
        if isinstance(layer, W4A16Linear) and (device := layer.device).type == device_type
    }
    for (shape, _, device), layer in kinds.items():
        for rows in ROWS:
            if rows <= rows_measured(max_rows):
                layer(torch.zeros(rows, shape.in_features, device=device, dtype=dtype))
    for device in {device for _, _, device in kinds if device.type == "cuda"}:
        torch.cuda.synchronize(device)
    if kinds:
        logger.info(
            "%d kinds of 4-bit layers are warm after %.1f s", len(kinds), time.monotonic() - started
        )


def backends_of(model: nn.Module) -> str:
    """Of its 4-bit layers: "cuda_triton", or "cuda_triton (96 layers), reference (32 layers)"."""
    counts = Counter(m.backend for m in model.modules() if isinstance(m, W4A16Linear))
    if len(counts) <= 1:
        return next(iter(counts), "torch")
    return ", ".join(f"{name} ({count} layers)" for name, count in counts.most_common())
