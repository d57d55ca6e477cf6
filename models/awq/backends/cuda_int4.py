"""torch's own 4-bit product for GPUs (tinygemm, `aten::_weight_int4pack_mm`), bf16 activations.

Fast for a few rows. Many rows (a prefill) are multiplied with the weights widened to bf16 by
cuBLAS: tinygemm's packing is undone on the GPU, so that weights are held once, in 4 bits.

The packed order is torch's internal matter. So each layer is checked when it is packed, against
the canonical weights: both the product and the undoing. Where they disagree, `BackendMismatch`
is raised and the layer is given to the reference backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.awq.backends.base import Backend, BackendMismatch, Packed, Shape
from models.awq.backends.cpu_int4 import group_size_problem, scale_and_offset
from models.awq.quantized_weight import QuantizedWeight

INNER_K_TILES = 8
K_MULTIPLE = 16 * INNER_K_TILES
N_MULTIPLE = 8
FEW_ROWS = 16
"""Up to here tinygemm; beyond it cuBLAS. A tile of tinygemm has 16 rows."""
LARGEST_ERROR = 0.02
"""Of the self-check, relative to the product's largest value. bf16 rounds by 0.004; a wrong
nibble order is off by the product's own size."""


class CudaInt4(Backend):
    """Buffers: weight (N / 8, K / 128, 32, 4) int32 in tinygemm's order; scale_offset (K / G, N, 2)
    bf16."""

    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" or dtype != torch.bfloat16:
            return f"it runs bfloat16 on a GPU only, not {dtype} on {device.type}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 (Ampere) or later"
        if shape.out_features % N_MULTIPLE or shape.in_features % K_MULTIPLE:
            return (
                f"a layer of {shape.out_features} x {shape.in_features} is no multiple of "
                f"{N_MULTIPLE} x {K_MULTIPLE}"
            )
        return group_size_problem(shape)

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        q = weight.q.to(device)
        pairs = (q[:, 0::2] << 4 | q[:, 1::2]).contiguous()
        packed = {
            "weight": torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES),
            "scale_offset": scale_and_offset(weight).to(device=device, dtype=dtype),
        }
        self._check(weight, q, packed)
        return packed

    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        if x.shape[0] > FEW_ROWS:
            return F.linear(x, _dequantize(packed, shape))
        out: Tensor = torch.ops.aten._weight_int4pack_mm(
            x.contiguous(), packed["weight"], shape.group_size, packed["scale_offset"]
        )
        return out

    def _check(self, weight: QuantizedWeight, q: Tensor, packed: Packed) -> None:
        shape = Shape.of(weight)
        if not torch.equal(unpack_tinygemm(packed["weight"]), q):
            raise BackendMismatch("torch packs 4-bit weights in another order than is known here")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, shape.in_features, generator=generator).to(q.device, torch.bfloat16)
        expected = F.linear(x, _dequantize(packed, shape)).float()
        error = (self.matmul(x, packed, shape).float() - expected).abs().max()
        if not bool(error <= LARGEST_ERROR * expected.abs().max()):
            raise BackendMismatch("torch's 4-bit product disagrees with the dequantised weights")


def unpack_tinygemm(packed: Tensor) -> Tensor:
    """(N / 8, K / 128, 32, 4) int32 -> q (N, K) uint8.

    A word belongs to lane 4 * row + column of a tile of 8 rows, and holds inputs
    `2 * column + {0, 1, 8, 9, 16, 17, 24, 25}` of one 32nd; the even of these (in this list's
    order) lie in its low half, the odd in its high half.
    """
    n_tiles, k_tiles, _, words = packed.shape
    octets = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1)
    # Words are low nibble first: v0 v2 v4 v6 v1 v3 v5 v7, v's index being (16s, 8s, 1s) of k.
    nibbles = nibbles.view(n_tiles, k_tiles, 8, 4, words, 2, 2, 2)
    # n tile, k tile, row, column, word, k's 1, k's 16, k's 8
    ordered = nibbles.permute(0, 2, 1, 4, 6, 7, 3, 5)
    return ordered.reshape(n_tiles * 8, k_tiles * words * 32)


def _dequantize(packed: Packed, shape: Shape) -> Tensor:
    """(N, K) bf16, in the product's own convention."""
    scale, offset = packed["scale_offset"].permute(2, 1, 0).unsqueeze(-1)
    q = unpack_tinygemm(packed["weight"])
    centred = q.view(*scale.shape[:2], shape.group_size).to(torch.bfloat16) - 8
    return torch.addcmul(offset, centred, scale).reshape(shape.out_features, shape.in_features)
