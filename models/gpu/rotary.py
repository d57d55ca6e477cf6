"""Rotary positions and the KV cache's new entries, from the packed output of the qkv projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS_PER_PROGRAM = 8


@triton.jit
def rotate_and_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PROGRAM_HEADS: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL_HEADS: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * PROGRAM_HEADS + tl.arange(0, PROGRAM_HEADS)
    dims = tl.arange(0, PADDED_HALF)
    inside = (heads < ALL_HEADS)[:, None] & (dims < HALF)[None, :]

    at = token * (ALL_HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :]
    first = tl.load(qkv_ptr + at, mask=inside, other=0.0)
    second = tl.load(qkv_ptr + at + HALF, mask=inside, other=0.0)
    # The tables' second half repeats the first.
    cos = tl.load(cos_ptr + token * HEAD_DIM + dims, mask=dims < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HEAD_DIM + dims, mask=dims < HALF, other=0.0)
    cos, sin = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]

    # Each product is rounded before they are added, as separate operations would round it.
    a, b = first.to(tl.float32), second.to(tl.float32)
    a_cos, b_sin = (a * cos).to(first.dtype), (b * sin).to(first.dtype)
    b_cos, a_sin = (b * cos).to(first.dtype), (a * sin).to(first.dtype)
    turned_first = (a_cos.to(tl.float32) - b_sin.to(tl.float32)).to(first.dtype)
    turned_second = (b_cos.to(tl.float32) + a_sin.to(tl.float32)).to(first.dtype)

    is_query = inside & (heads < HEADS)[:, None]
    tl.store(qkv_ptr + at, turned_first, mask=is_query)
    tl.store(qkv_ptr + at + HALF, turned_second, mask=is_query)

    slot = tl.load(slots_ptr + token).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    stored = inside & (slot >= 0)
    is_key = (heads >= HEADS) & (heads < HEADS + KV_HEADS)
    key_row = (block * KV_HEADS + heads - HEADS) * BLOCK_SIZE + offset
    key_at = key_row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(keys_ptr + key_at, turned_first, mask=stored & is_key[:, None])
    tl.store(keys_ptr + key_at + HALF, turned_second, mask=stored & is_key[:, None])
    is_value = heads >= HEADS + KV_HEADS
    value_row = (block * KV_HEADS + heads - HEADS - KV_HEADS) * BLOCK_SIZE + offset
    value_at = value_row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(values_ptr + value_at, first, mask=stored & is_value[:, None])
    tl.store(values_ptr + value_at + HALF, second, mask=stored & is_value[:, None])


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotates the queries where they are, and writes rotated keys and the values to the cache.

    Args:
        qkv: (tokens, heads + 2 * kv_heads, head_dim), contiguous; its queries are overwritten.
        cos, sin: (tokens, 1, head_dim), contiguous, of qkv's dtype; see `RotaryEmbedding.at`.
        slots: (tokens,) int32, block * block_size + offset; -1: neither key nor value is written.
        keys, values: (blocks, kv_heads, block_size, head_dim) of qkv's dtype.

    Returns:
        The queries, (tokens, heads, head_dim): a view of `qkv`.
    """
    tokens, all_heads, head_dim = qkv.shape
    _, kv_heads, block_size, _ = keys.shape
    heads = all_heads - 2 * kv_heads
    with torch.cuda.device_of(qkv):
        rotate_and_store_kernel[(tokens, triton.cdiv(all_heads, HEADS_PER_PROGRAM))](
            qkv, cos, sin, slots, keys, values,
            HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
            PADDED_HALF=triton.next_power_of_2(head_dim // 2), PROGRAM_HEADS=HEADS_PER_PROGRAM,
        )  # fmt: skip
    return qkv[:, :heads]
