"""The step that attention over the paged cache consists of, whoever asks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tile(
    q,
    query_tokens,
    top,
    total,
    acc,
    tile,
    keys_ptr,
    values_ptr,
    table_ptr,
    length,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One tile of keys more in each row's softmax (running, in powers of two) and sum.

    Args:
        q: (rows, PADDED_DIM).
        query_tokens: (rows,), the positions up to which the rows attend.
        top, total, acc: (rows,), (rows,) and (rows, PADDED_DIM) float32: the highest score so far,
            the sum of the weights, and of the weighted values.
        length: how many tokens there are; no key behind them is read.
        scale: of the scores, log2 e included.
        CAUSAL: False where all rows see the whole tile.

    Returns:
        top, total, acc.
    """
    dims = tl.arange(0, PADDED_DIM)
    tokens = tile * TILE + tl.arange(0, TILE)
    there = tokens < length
    blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    rows = ((blocks * KV_HEADS + kv_head) * BLOCK_SIZE + tokens % BLOCK_SIZE) * HEAD_DIM
    k = tl.load(
        keys_ptr + rows[None, :] + dims[:, None],
        mask=there[None, :] & (dims < HEAD_DIM)[:, None],
        other=0.0,
    )
    v = tl.load(
        values_ptr + rows[:, None] + dims[None, :],
        mask=there[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if CAUSAL:
        seen = (tokens[None, :] <= query_tokens[:, None]) & there[None, :]
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(weights, axis=1)
    acc = acc * fade[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return higher, total, acc
