"""Chunks of prompts against everything before them in the paged cache, and themselves causally.

All chunks of a step go in one launch, whatever their lengths and contexts; they read their own keys
from the cache as well, where they have just been written. A program computes some rows of one chunk
for one query head. Those of heads that share a KV head run side by side and find its keys in the
GPU's cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.gpu.attention_tile import attend_tile
from models.gpu.tiles import LOG2_E, padded_dim, tile_size

ROWS, ROWS_IN_FLOAT32 = 64, 16
"""Of queries in one program."""
TILE_BYTES = 8 << 10
"""Of keys."""


@triton.jit(do_not_specialize=["width", "first_sequence"])
def prefill_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    lengths_ptr,
    row_starts_ptr,
    out_ptr,
    scale,
    width,
    first_sequence,
    Q_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(0)
    # The last rows see most, so they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    chunk = tl.program_id(2)
    chunk_start = tl.load(row_starts_ptr + chunk)
    num_rows = tl.load(row_starts_ptr + chunk + 1) - chunk_start
    first_row = block * ROWS
    if first_row >= num_rows:
        return
    sequence = (first_sequence + chunk).to(tl.int64)
    length = tl.load(lengths_ptr + sequence)
    context = length - num_rows

    rows = first_row + tl.arange(0, ROWS)
    query_tokens = context + rows
    dims = tl.arange(0, PADDED_DIM)
    real = (rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    packed = (chunk_start + rows).to(tl.int64)
    q_at = packed[:, None] * Q_STRIDE + head * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=real, other=0.0)

    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    table_ptr = tables_ptr + sequence * width
    kv_head = head // GROUP
    # Tiles that all rows see whole, then those that the diagonal or the end runs through. Token 0,
    # which every row sees, lies in the first tile, so that no row's highest score is ever -inf.
    num_whole = (context + first_row + 1) // TILE
    num_tiles = tl.cdiv(tl.minimum(context + first_row + ROWS, length), TILE)
    for tile in tl.range(0, num_whole):
        top, total, acc = attend_tile(
            q, query_tokens, top, total, acc, tile, keys_ptr, values_ptr, table_ptr, length,
            kv_head, scale, KV_HEADS, HEAD_DIM, BLOCK_SIZE, PADDED_DIM, TILE, False,
        )  # fmt: skip
    for tile in tl.range(num_whole, num_tiles):
        top, total, acc = attend_tile(
            q, query_tokens, top, total, acc, tile, keys_ptr, values_ptr, table_ptr, length,
            kv_head, scale, KV_HEADS, HEAD_DIM, BLOCK_SIZE, PADDED_DIM, TILE, True,
        )  # fmt: skip

    out_at = packed[:, None] * (KV_HEADS * GROUP * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    result = acc / total[:, None]
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=real)


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    row_starts: Tensor,
    max_rows: int,
    first_sequence: int,
    out: Tensor,
) -> None:
    """
    Args:
        q: (rows, heads, head_dim), all rows of the step; only they may lie apart.
        keys, values: (blocks, kv_heads, block_size, head_dim), contiguous, of q's dtype; the
            chunks' own are there already.
        tables: (sequences, width) int32, contiguous: each sequence's blocks in order.
        lengths: (sequences,) int32, keys of each sequence, its chunk's included.
        row_starts: (chunks + 1,) int32, where in `q` each chunk begins, and where the last ends.
        max_rows: of the longest chunk.
        first_sequence: the first chunk's, in `tables` and `lengths`.
        out: like q, contiguous; the chunks' rows are written.
    """
    _, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    dim = padded_dim(head_dim)
    rows = ROWS_IN_FLOAT32 if q.dtype == torch.float32 else ROWS
    with torch.cuda.device_of(q):
        prefill_kernel[(heads, triton.cdiv(max_rows, rows), row_starts.shape[0] - 1)](
            q, keys, values, tables, lengths, row_starts, out, head_dim**-0.5 * LOG2_E,
            tables.shape[1], first_sequence,
            Q_STRIDE=q.stride(0), KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size, PADDED_DIM=dim, ROWS=rows,
            TILE=tile_size(dim, q.dtype, TILE_BYTES), num_warps=4 if dim <= 128 else 8,
            num_stages=3,
        )  # fmt: skip
