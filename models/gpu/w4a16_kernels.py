"""The Triton kernels of `models.gpu.w4a16`, which says how weights are packed. Needs triton.

All of them compute `(q - zero) * scale` exactly: q and zero are whole numbers of four bits, scales
are applied in float32, and what is rounded is the activations' products' sum, once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = tl.constexpr(16)
CHUNK = tl.constexpr(128)
"""Inputs of a chunk, eight in each of its words: nibble j of word i is input 16 j + i."""


@triton.jit
def _store(total, offsets, mask, y_ptr, partial_ptr, count_ptr, size, SPLIT: tl.constexpr):
    """What a program has of a tile, to where it belongs.

    Of the programs that share a tile's inputs, the last to arrive adds up what all of them have,
    always in the same order, so that the sum has the same bits whoever was last.
    """
    if not SPLIT:
        tl.store(y_ptr + offsets, total.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + tl.program_id(1) * size + offsets, total, mask=mask)
        count = count_ptr + tl.program_id(0)
        tl.debug_barrier()  # one thread counts for all, whose stores must come before
        arrived = tl.atomic_add(count, 1, sem="acq_rel", scope="gpu")
        splits = tl.num_programs(1)
        if arrived == splits - 1:
            tl.debug_barrier()
            whole = tl.zeros_like(total)
            for split in range(splits):
                whole += tl.load(
                    partial_ptr + split * size + offsets,
                    mask=mask,
                    other=0.0,
                    cache_modifier=".cg",  # others wrote it: not what this processor has cached
                )
            tl.store(y_ptr + offsets, whole.to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(count, 0)


INTERPRETED = tl.constexpr(not isinstance(_store, triton.JITFunction))


@triton.jit
def _multiply(q, subtract, x, total):
    """total + (q - subtract) x, of 16-bit floats, whose difference is exact."""
    if INTERPRETED:  # its bfloat16 is a pattern of bits, with which it cannot compute
        difference = q.to(tl.float32) - subtract.to(tl.float32)
        return tl.dot(difference, x.to(tl.float32), total)
    return tl.dot(q - subtract, x, total)


@triton.jit
def _load_words(row_ptrs, row_mask, word, words):
    return tl.load(row_ptrs + word, mask=row_mask[:, None] & (word < words), other=0)


@triton.jit(do_not_specialize=["groups"])
def gemv(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    partial_ptr,
    count_ptr,
    n,
    k,
    words,
    groups,
    chunks_per_group,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row of x, without the tensor cores: y (N,) = W x.

    Each thread takes four words (128 bits) of each of BLOCK_N outputs at a time. That is so only
    where BLOCK_WORDS is 128 for each warp: then one distribution over threads serves weights,
    inputs and sums, and nothing is exchanged through shared memory until the very end.

    A nibble becomes a number without a conversion: masked where it lies, it is the mantissa of a
    denormal float32, q * 2^(4 j - 149). x is multiplied by 2^(96 - 4 j) in exchange, so that the
    products are normal again for any |x| from 2^-73 up to 2^32.

    Args:
        x_ptr: (K,) 16-bit.
        weight_ptr: (N, words) int32.
        scale_ptr, zero_ptr: (N, groups), the latter uint8.
        partial_ptr: (splits, N) float32, or anything where SPLIT is false.
        count_ptr: int32 zeros, one for each block of outputs; they are zeros again afterwards.
        PARTS: groups in a chunk, 1 where a group is a chunk or longer.
        SPLIT: programs share the inputs, as many as the grid has in its second dimension.
        EVEN_K: k is a multiple of CHUNK.
        STAGES: 2: a turn's weights are asked for before the turn before it is computed.
    """
    UNITS: tl.constexpr = BLOCK_WORDS // 4
    NIBBLES: tl.constexpr = 8 // PARTS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < n
    row_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * words
    group_starts = rows * groups
    lane = tl.arange(0, BLOCK_WORDS)[None, :]
    unit = tl.arange(0, UNITS)

    first = tl.program_id(1) * BLOCK_WORDS
    if STAGES > 1:
        ahead = _load_words(row_ptrs, row_mask, first + lane, words)
    total = tl.zeros((BLOCK_N, UNITS), dtype=tl.float32)
    step = tl.num_programs(1) * BLOCK_WORDS
    for start in range(first, words, step):
        word = start + lane
        if STAGES > 1:
            packed = ahead
            ahead = _load_words(row_ptrs, row_mask, word + step, words)
        else:
            packed = _load_words(row_ptrs, row_mask, word, words)
        upper = packed >> 12
        inputs = word // WORDS * CHUNK + word % WORDS
        unit_word = start + 4 * unit
        for part in tl.static_range(PARTS):
            for nibble in tl.static_range(part * NIBBLES, (part + 1) * NIBBLES):
                at = inputs + nibble * WORDS
                inside = word < words if EVEN_K else at < k
                x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
                if nibble < 5:
                    q = packed & (15 << (4 * nibble))
                    x_scaled = x * 2.0 ** (96 - 4 * nibble)
                else:
                    q = upper & (15 << (4 * nibble - 12))
                    x_scaled = x * 2.0 ** (108 - 4 * nibble)
                if nibble == part * NIBBLES:
                    x_sum = x
                    product = q.to(tl.float32, bitcast=True) * x_scaled
                else:
                    x_sum += x
                    product += q.to(tl.float32, bitcast=True) * x_scaled
            x_sums = tl.sum(tl.reshape(x_sum, (1, UNITS, 4)), axis=2)
            products = tl.sum(tl.reshape(product, (BLOCK_N, UNITS, 4)), axis=2)
            if PARTS == 1:
                group = unit_word // WORDS // chunks_per_group
            else:
                group = unit_word // WORDS * PARTS + part
            offsets = group_starts[:, None] + group[None, :]
            mask = row_mask[:, None] & (unit_word < words)[None, :]
            scale = tl.load(scale_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            zero = tl.load(zero_ptr + offsets, mask=mask, other=0).to(tl.float32)
            total += scale * (products * 2.0**53 - zero * x_sums)
    _store(tl.sum(total, axis=1), rows, row_mask, y_ptr, partial_ptr, count_ptr, n, SPLIT)


@triton.jit(do_not_specialize=["m", "groups"])
def gemm(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    partial_ptr,
    count_ptr,
    m,
    n,
    k,
    words,
    groups,
    chunks_per_group,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Several rows of x, on the tensor cores: y (M, N) = x W^T.

    Weights are the left operand, which tensor cores take from registers, where the nibbles are
    unpacked: only packed words pass through shared memory. The 16 words of a chunk make eight
    operands of 16 inputs, one for each nibble.

    A nibble becomes a number without a conversion: in the lowest bits of a mantissa it is
    1024 + q as float16, or 128 + q as bfloat16, and 1024 + zero is subtracted.

    Args:
        x_ptr: (M, K) 16-bit.
        partial_ptr: (splits, M, N) float32, or anything where SPLIT is false.
        count_ptr: int32 zeros, one for each tile of the output; they are zeros again afterwards.
    """
    NIBBLES: tl.constexpr = 8 // PARTS
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ONE: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
    tiles_m = tl.cdiv(m, BLOCK_M)
    tile = tl.program_id(0)
    rows = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < n
    token_mask = tokens < m
    lane = tl.arange(0, WORDS)
    weight_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * words + lane[None, :]
    x_ptrs = x_ptr + tokens.to(tl.int64)[None, :] * k + lane[:, None]
    group_starts = rows * groups

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    chunks = words // WORDS
    share = tl.cdiv(chunks, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for chunk in tl.range(begin, tl.minimum(begin + share, chunks), num_stages=STAGES):
        packed = tl.load(weight_ptrs + chunk * WORDS, mask=row_mask[:, None], other=0)
        for part in tl.static_range(PARTS):
            if PARTS == 1:
                group = chunk // chunks_per_group
            else:
                group = chunk * PARTS + part
            scale = tl.load(scale_ptr + group_starts + group, mask=row_mask, other=0.0)
            zero = tl.load(zero_ptr + group_starts + group, mask=row_mask, other=0)
            subtract = (zero.to(tl.int16) | ONE).to(dtype, bitcast=True)[:, None]
            product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for nibble in tl.static_range(part * NIBBLES, (part + 1) * NIBBLES):
                at = chunk * CHUNK + nibble * WORDS
                inside = token_mask[None, :]
                if not EVEN_K:
                    inside = inside & (at + lane < k)[:, None]
                x = tl.load(x_ptrs + at, mask=inside, other=0.0)
                q = ((packed >> (4 * nibble)) & 15 | ONE).to(tl.int16).to(dtype, bitcast=True)
                product = _multiply(q, subtract, x, product)
            total += product * scale.to(tl.float32)[:, None]
    offsets = tokens.to(tl.int64)[None, :] * n + rows[:, None]
    mask = row_mask[:, None] & token_mask[None, :]
    _store(total, offsets, mask, y_ptr, partial_ptr, count_ptr, m * n, SPLIT)


@triton.jit(do_not_specialize=["groups"])
def dequantize(
    weight_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    n,
    k,
    words,
    groups,
    chunks_per_group,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """out (N, K), 16-bit: computed in float32 and rounded once."""
    NIBBLES: tl.constexpr = 8 // PARTS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    mask = (rows < n)[:, None] & (word < words)[None, :]
    packed = tl.load(
        weight_ptr + rows.to(tl.int64)[:, None] * words + word[None, :], mask=mask, other=0
    )
    inputs = word // WORDS * CHUNK + word % WORDS
    out_starts = rows.to(tl.int64)[:, None] * k
    for part in tl.static_range(PARTS):
        if PARTS == 1:
            group = word // WORDS // chunks_per_group
        else:
            group = word // WORDS * PARTS + part
        offsets = (rows * groups)[:, None] + group[None, :]
        scale = tl.load(scale_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + offsets, mask=mask, other=0).to(tl.int32)
        for nibble in tl.static_range(part * NIBBLES, (part + 1) * NIBBLES):
            value = (((packed >> (4 * nibble)) & 15) - zero).to(tl.float32) * scale
            at = inputs + nibble * WORDS
            tl.store(
                out_ptr + out_starts + at[None, :],
                value.to(out_ptr.dtype.element_ty),
                mask=mask & (at < k)[None, :],
            )
