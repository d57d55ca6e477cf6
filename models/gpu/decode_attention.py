"""One query of each sequence against its keys and values in the paged cache (flash-decoding).

A sequence's keys are shared out among `num_splits` programs for each of its KV heads, which keeps a
GPU busy however small the batch; a second kernel joins their results. Query heads that share a KV
head are the rows of one product, padded to the 16 that tensor cores take: the arithmetic that the
padding wastes is far below what they do in the time that the keys take to arrive, and all group
sizes go the same way, which Triton's pipelining of loads into products serves best.

How many splits there are depends on shapes alone, so that a captured CUDA graph stays right while
contexts grow; each split's share is cut from the sequence's length when it runs. A sequence's
result depends on its own tokens and on the number of splits, never on what other rows hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.gpu.attention_tile import attend_tile
from models.gpu.tiles import LOG2_E, MAX_SPLITS, SMALLEST, padded_dim, tile_size

TILE_BYTES = 16 << 10
"""Of keys."""


@triton.jit(do_not_specialize=["width", "num_splits"])
def decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    lengths_ptr,
    out_ptr,
    log_sums_ptr,
    scale,
    width,
    num_splits,
    Q_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    HEADS: tl.constexpr = KV_HEADS * GROUP

    length = tl.load(lengths_ptr + sequence)
    num_tiles = tl.cdiv(length, TILE)
    tiles_per_split = tl.cdiv(num_tiles, num_splits)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)
    if SPLIT:  # noqa: SIM102, this is decided when compiling, the other when running
        if first_tile >= last_tile:
            return

    group = tl.arange(0, PADDED_GROUP)
    heads = kv_head * GROUP + group
    dims = tl.arange(0, PADDED_DIM)
    real = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_at = sequence * Q_STRIDE + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=real, other=0.0)

    top = tl.full((PADDED_GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    acc = tl.zeros((PADDED_GROUP, PADDED_DIM), tl.float32)
    table_ptr = tables_ptr + sequence * width
    query_tokens = tl.zeros((PADDED_GROUP,), tl.int32) + (length - 1)
    # Each tile has a token, so that a row's highest score is never -inf.
    for tile in tl.range(first_tile, last_tile):
        top, total, acc = attend_tile(
            q, query_tokens, top, total, acc, tile, keys_ptr, values_ptr, table_ptr, length,
            kv_head, scale, KV_HEADS, HEAD_DIM, BLOCK_SIZE, PADDED_DIM, TILE, True,
        )  # fmt: skip

    # With any token the total is at least 1, the weight of the highest score. A row of length 0,
    # the padding of a captured batch, comes out as zeros.
    result = acc / tl.maximum(total, 1.0)[:, None]
    if SPLIT:
        part = (sequence * HEADS + heads) * num_splits + split
        tl.store(out_ptr + part[:, None] * HEAD_DIM + dims[None, :], result, mask=real)
        tl.store(log_sums_ptr + part, top + tl.log2(total), mask=group < GROUP)
    else:
        out_at = (sequence * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["num_splits"])
def join_kernel(
    parts_ptr,
    log_sums_ptr,
    lengths_ptr,
    out_ptr,
    num_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weighs the splits' results by their shares of the whole softmax."""
    sequence = tl.program_id(0).to(tl.int64)
    head = sequence * HEADS + tl.program_id(1)
    length = tl.load(lengths_ptr + sequence)
    num_tiles = tl.cdiv(length, TILE)
    tiles_per_split = tl.cdiv(num_tiles, num_splits)

    split = tl.arange(0, MAX_SPLITS)
    used = split * tiles_per_split < num_tiles  # the others have written nothing
    used = used & (split < num_splits)
    dims = tl.arange(0, PADDED_DIM)
    log_sums = tl.load(log_sums_ptr + head * num_splits + split, mask=used, other=-float("inf"))
    top = tl.where(length > 0, tl.max(log_sums, axis=0), 0.0)
    weights = tl.exp2(log_sums - top)
    parts = tl.load(
        parts_ptr + (head * num_splits + split)[:, None] * HEAD_DIM + dims[None, :],
        mask=used[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    total = tl.maximum(tl.sum(weights, axis=0), 1.0)  # as in `decode_kernel`
    result = tl.sum(weights[:, None] * parts, axis=0) / total
    tl.store(
        out_ptr + head * HEAD_DIM + dims, result.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM
    )


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    num_splits: int,
    out: Tensor,
) -> None:
    """
    Args:
        q: (sequences, heads, head_dim); only its sequences may lie apart.
        keys, values: (blocks, kv_heads, block_size, head_dim), contiguous, of q's dtype.
        tables: (at least sequences, width) int32, contiguous: each sequence's blocks in order. What
            lies behind its last one is not read.
        lengths: (at least sequences,) int32, keys of each sequence; 0: its row becomes zeros.
        num_splits: see `models.gpu.tiles.split_count`.
        out: like q, contiguous; written.
    """
    sequences, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    parts, log_sums = out, lengths  # unused pointers where there is but one split
    if num_splits > 1:
        parts = q.new_empty((sequences, heads, num_splits, head_dim), dtype=torch.float32)
        log_sums = q.new_empty((sequences, heads, num_splits), dtype=torch.float32)
    group, dim = heads // kv_heads, padded_dim(head_dim)
    tile = tile_size(dim, q.dtype, TILE_BYTES)
    with torch.cuda.device_of(q):
        decode_kernel[(sequences, kv_heads, num_splits)](
            q, keys, values, tables, lengths, parts, log_sums, head_dim**-0.5 * LOG2_E,
            tables.shape[1], num_splits,
            Q_STRIDE=q.stride(0), KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size, PADDED_GROUP=max(SMALLEST, triton.next_power_of_2(group)),
            PADDED_DIM=dim, TILE=tile, SPLIT=num_splits > 1, num_warps=4, num_stages=3,
        )  # fmt: skip
        if num_splits > 1:
            join_kernel[(sequences, heads)](
                parts, log_sums, lengths, out, num_splits,
                HEADS=heads, HEAD_DIM=head_dim, PADDED_DIM=dim, MAX_SPLITS=MAX_SPLITS, TILE=tile,
                num_warps=4,
            )  # fmt: skip
