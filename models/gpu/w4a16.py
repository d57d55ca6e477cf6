"""4-bit weights times 16-bit activations on GPUs, by Triton kernels of our own.

One packed form serves every number of rows. Inputs are taken in chunks of 128, of which an output
has 16 words of 32 bits: nibble j of word i (bits 4 j to 4 j + 3) is input 16 j + i of its chunk.
So four words, which a thread loads at once, lie next to one another, and so do the inputs that
belong to one nibble of neighbouring words. A last chunk that is not full is filled with zeros.

How a product is computed is a `Plan`; `plans` proposes some, the likeliest to be fast first.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
WORDS = CHUNK // 8
GROUP_SIZES = (16, 32, 64)
"""Besides multiples of 128 and a single group."""

SKINNY = 16
"""Rows of the smallest tile of the tensor cores."""
DENSE_ROWS = 128
"""Beyond, unmeasured: dequantise and multiply by cuBLAS. Tiles of more rows there are none."""
MOST_ROWS = 512
"""Beyond, nothing else than that is proposed."""
GEMV_INPUTS = 1024
"""That a warp takes at a time, of each of its outputs."""
BUSY_WARPS = 12
"""For each processor, which together ask the memory for enough at a time: with 512 bytes for each
of eight outputs, twice what 4 TB/s and 700 ns come to on 132 processors."""
FEW_PLANS = 6
PARTIAL_SUMS = 1 << 22
"""float32 sums that the programs of a product may hold among them: 16 MiB."""
FEWEST_CHUNKS = 4
"""Of a program's share, below which it has hardly begun when it is done."""
MOST_SPLITS = 16


class Grouping(NamedTuple):
    """How scales lie over chunks: `parts` in each, or one for `chunks_per_group`."""

    chunks: int
    parts: int
    chunks_per_group: int

    @classmethod
    def of(cls, in_features: int, group_size: int) -> Grouping | None:
        """None: the kernels know no such groups."""
        chunks = -(-in_features // CHUNK)
        if group_size in GROUP_SIZES:
            return cls(chunks, CHUNK // group_size, 1)
        if group_size % CHUNK == 0:
            return cls(chunks, 1, group_size // CHUNK)
        return cls(chunks, 1, chunks) if group_size == in_features else None


class Weights(NamedTuple):
    """A layer's weights, packed.

    Attributes:
        words: (N, 16 ceil(K / 128)) int32.
        scale: (N, groups) in the checkpoint's dtype, groups of a part-filled chunk included.
        zero: (N, groups) uint8.
        counts: int32 zeros, with which programs that share a tile tell who is the last.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor
    counts: Tensor


class Plan(NamedTuple):
    """How to compute a product.

    Attributes:
        kernel: "gemv" for one row, "gemm" for more, "dense" for cuBLAS on dequantised weights.
        block_m, block_n: rows and outputs of a tile.
        split_k: programs that share a tile's inputs.
        stages: of the pipeline that brings in what is multiplied next.
    """

    kernel: Literal["gemv", "gemm", "dense"]
    block_m: int = 1
    block_n: int = 1
    split_k: int = 1
    warps: int = 4
    stages: int = 1

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.kernel == "dense":
            return self.kernel
        return (
            f"{self.kernel} {self.block_m}x{self.block_n} "
            f"split{self.split_k} warps{self.warps} stages{self.stages}"
        )

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def parse(cls, text: str) -> Plan:
        """
        Raises:
            ValueError: it is none.
        """
        kernel, *rest = text.split(" ")
        if text == "dense":
            return cls("dense")
        if kernel not in {"gemv", "gemm"} or len(rest) != 4:
            raise ValueError(f"{text!r} is no plan of a W4A16 product")
        block_m, _, block_n = rest[0].partition("x")
        numbers = (
            part.removeprefix(name)
            for part, name in zip(rest[1:], ("split", "warps", "stages"), strict=True)
        )
        plan = cls(
            "gemv" if kernel == "gemv" else "gemm", int(block_m), int(block_n), *map(int, numbers)
        )
        if min(plan[1:]) < 1 or any(number & (number - 1) for number in plan[1:5]):
            raise ValueError(f"{text!r}: sizes are powers of two")
        return plan


def pack(q: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Weights:
    """
    Args:
        q: (N, K) uint8, 0..15, on any device.
        scale: (N, K / G).
        zero: (N, K / G) uint8.

    Raises:
        ValueError: the kernels know no such groups.
    """
    n, k = q.shape
    grouping = Grouping.of(k, group_size)
    if grouping is None:
        raise ValueError(f"groups of {group_size} among {k} inputs")
    q = F.pad(q, (0, grouping.chunks * CHUNK - k)).view(n, grouping.chunks, 4, 2, WORDS)
    octets = (q[:, :, :, 0] | q[:, :, :, 1] << 4).transpose(-1, -2).contiguous()
    missing = grouping.chunks * grouping.parts - scale.shape[1] if grouping.parts > 1 else 0
    return Weights(
        octets.view(torch.int32).view(n, grouping.chunks * WORDS),
        F.pad(scale, (0, missing)).contiguous(),
        F.pad(zero, (0, missing)).contiguous(),
        torch.zeros(n, dtype=torch.int32, device=q.device),
    )


def unpack(words: Tensor, in_features: int) -> Tensor:
    """q (N, K) uint8, the inverse of `pack`."""
    n = words.shape[0]
    octets = words.contiguous().view(torch.uint8).view(n, -1, WORDS, 4).transpose(-1, -2)
    return torch.stack((octets & 15, octets >> 4), dim=3).reshape(n, -1)[:, :in_features]


def plans(
    rows: int, out_features: int, in_features: int, processors: int, *, thorough: bool = False
) -> tuple[Plan, ...]:
    """Ways to multiply `rows` rows, the one to take unmeasured first.

    Args:
        processors: streaming multiprocessors of the GPU.
        thorough: many more than are likely to win.
    """
    if rows == 1:
        return _gemv_plans(out_features, in_features, processors, thorough)
    if rows > MOST_ROWS:
        return (Plan("dense"),)
    tiled = _gemm_plans(rows, out_features, in_features, processors, thorough)
    if rows <= SKINNY:
        return tiled
    return (*tiled, Plan("dense")) if rows <= DENSE_ROWS else (Plan("dense"), *tiled)


def _gemv_plans(n: int, k: int, processors: int, thorough: bool) -> tuple[Plan, ...]:
    """First those that keep every processor busy, and of these those whose last turn is fullest."""

    def score(plan: Plan) -> tuple[int, float, int]:
        warps = n // plan.block_n * plan.split_k * plan.warps
        turn = GEMV_INPUTS * plan.warps * plan.split_k
        idle = -(-k // turn) * turn / k
        return max(0, BUSY_WARPS * processors - warps), idle, abs(plan.block_n - 8)

    most = max(1, min(8 if thorough else 4, k // GEMV_INPUTS))
    candidates = [
        Plan("gemv", 1, block_n, split_k, warps, stages)
        for split_k in ((1, 2, 4) if thorough else (1, 2))
        for warps in (1, 2, 4, 8)
        for block_n in (4, 8, 16)
        # A second turn's weights take registers, of which a block of 16 has none left.
        for stages in ((1, 2) if k > GEMV_INPUTS * warps * split_k and block_n < 16 else (1,))
        if warps * split_k <= most
        and (thorough or split_k == 1 or block_n == 8)
        and (thorough or stages == 2 or block_n == 16 or k <= GEMV_INPUTS * warps * split_k)
    ]
    return tuple(sorted(candidates, key=score))[: None if thorough else FEW_PLANS]


def _gemm_plans(rows: int, n: int, k: int, processors: int, thorough: bool) -> tuple[Plan, ...]:
    block_m = max(SKINNY, min(DENSE_ROWS, 1 << (rows - 1).bit_length()))
    chunks = -(-k // CHUNK)
    candidates = []
    shapes = [(64, 4, 4), (128, 4, 3)] if block_m <= 32 else [(128, 8, 3), (64, 8, 3)]
    if thorough:
        shapes += [(64, 4, 3), (64, 4, 2), (128, 4, 2), (128, 8, 4), (64, 8, 4)]
    for block_n, warps, stages in shapes:
        tiles = -(-n // block_n) * -(-rows // block_m)
        split = max(1, min(2 * processors // tiles, chunks // FEWEST_CHUNKS, MOST_SPLITS))
        split = 1 << (split.bit_length() - 1)
        candidates += [
            Plan("gemm", block_m, block_n, shares, warps, stages)
            for shares in (split, 2 * split)
            if shares == 1
            or (
                shares <= MOST_SPLITS
                and shares * FEWEST_CHUNKS <= chunks
                and shares * rows * n <= PARTIAL_SUMS
            )
        ]
    return tuple(dict.fromkeys(candidates))


def matmul(x: Tensor, weights: Weights, in_features: int, group_size: int, plan: Plan) -> Tensor:
    """x (M, K), fp16 or bf16 -> (M, N), the same. M is 1 where the plan is a gemv.

    Can be captured in a CUDA graph once the same plan has run for the same shape. Calls for one
    layer must not run at the same time on several streams.
    """
    import triton

    from models.gpu import w4a16_kernels as kernels

    if plan.kernel == "dense":
        return F.linear(x, dequantize(weights, in_features, group_size, x.dtype))
    x = x.contiguous()
    rows, n = x.shape[0], weights.words.shape[0]
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    assert plan.kernel == "gemm" or rows == 1, "the plan is for one row"
    grouping = _grouping(in_features, group_size)
    tiles = triton.cdiv(n, plan.block_n) * triton.cdiv(rows, plan.block_m)
    split_k = plan.split_k if tiles <= weights.counts.numel() else 1
    partial = y
    if split_k > 1:
        partial = torch.empty((split_k, rows, n), dtype=torch.float32, device=x.device)
    tensors = (x, weights.words, weights.scale, weights.zero, y, partial, weights.counts)
    sizes = (n, in_features, weights.words.shape[1], weights.scale.shape[1])
    options: dict[str, Any] = {
        "PARTS": grouping.parts,
        "BLOCK_N": plan.block_n,
        "SPLIT": split_k > 1,
        "EVEN_K": in_features % CHUNK == 0,
        "STAGES": plan.stages,
        "num_warps": plan.warps,
    }
    with torch.cuda.device_of(x):
        if plan.kernel == "gemv":
            kernels.gemv[(tiles, split_k)](
                *tensors, *sizes, grouping.chunks_per_group,
                BLOCK_WORDS=128 * plan.warps, **options,
            )  # fmt: skip
        else:
            kernels.gemm[(tiles, split_k)](
                *tensors, rows, *sizes, grouping.chunks_per_group,
                BLOCK_M=plan.block_m, **options,
            )  # fmt: skip
    return y


def dequantize(weights: Weights, in_features: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """(N, K) in `dtype`, computed in float32 and rounded once."""
    import triton

    from models.gpu import w4a16_kernels as kernels

    n, words = weights.words.shape
    grouping = _grouping(in_features, group_size)
    out = torch.empty((n, in_features), dtype=dtype, device=weights.words.device)
    block_n, block_words = 4, 128
    with torch.cuda.device_of(out):
        kernels.dequantize[(triton.cdiv(n, block_n), triton.cdiv(words, block_words))](
            weights.words, weights.scale, weights.zero, out,
            n, in_features, words, weights.scale.shape[1], grouping.chunks_per_group,
            PARTS=grouping.parts, BLOCK_N=block_n, BLOCK_WORDS=block_words,
        )  # fmt: skip
    return out


@functools.lru_cache(maxsize=64)
def _grouping(in_features: int, group_size: int) -> Grouping:
    grouping = Grouping.of(in_features, group_size)
    assert grouping is not None, "packed before"
    return grouping
