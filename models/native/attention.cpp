// One query of each sequence over a paged cache of keys and values, all in bf16. Keys and values
// are read where they lie, once for all heads that share them. Scores, weights and sums are fp32;
// a sequence's result does not depend on the sequences beside it.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#include "bf16.h"
#include "sums.h"

namespace {

constexpr int64_t LANES = WIDTH;

// e^x for x <= 0, to 2 units of fp32's last place.
__m512 exponential(__m512 x) {
    // e^-104 is less than fp32 can tell from 0. In this order what is no number stays none.
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // ln 2 in two parts, the first short enough for n times it to be exact.
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    constexpr float TERMS[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    for (const float term : TERMS) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
    return _mm512_scalef_ps(sum, n);
}

// Scores -> their exponentials, less the largest's, 0 beyond `length`; returns the sum.
float weights_of(float* scores, int64_t length) {
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    for (int64_t at = 0; at < length; at += LANES)
        most = _mm512_mask_max_ps(most, mask_of(length - at), most, _mm512_loadu_ps(scores + at));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < length; at += LANES) {
        const __m512 value = _mm512_maskz_mov_ps(
            mask_of(length - at),
            exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + at), largest)));
        _mm512_storeu_ps(scores + at, value);
        sum = _mm512_add_ps(sum, value);
    }
    return _mm512_reduce_add_ps(sum);
}

struct Cache {
    const uint16_t *keys, *values;  // [parts][block_size][head_dim], a part a block's one head
    int64_t block_size;             // a multiple of 16
};

// `next`: the keys that come after these, wherever they lie.
template <int64_t HEAD_DIM>
__m512 scores_of(const uint16_t* q, const uint16_t* keys, const uint16_t* next) {
    constexpr int64_t REGISTERS = HEAD_DIM / 32;
    __m512bh query[REGISTERS];
#pragma GCC unroll 8
    for (int64_t i = 0; i < REGISTERS; ++i) query[i] = (__m512bh)_mm512_loadu_si512(q + 32 * i);
    __m512 dot[LANES];
#pragma GCC unroll 16
    for (int64_t position = 0; position < LANES; ++position) {
        dot[position] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int64_t i = 0; i < REGISTERS; ++i) {
            const int64_t at = position * HEAD_DIM + 32 * i;
            _mm_prefetch(next + at, _MM_HINT_T1);
            dot[position] = _mm512_dpbf16_ps(dot[position], query[i],
                                             (__m512bh)_mm512_loadu_si512(keys + at));
        }
    }
    return sums_of(dot);
}

// HEADS heads' weighted sums of the values. weights: fp32, `stride` apart; sums: of the weights.
template <int64_t HEAD_DIM, int64_t HEADS>
void weigh(const Cache& cache, const int64_t* table, int64_t length, const float* weights,
           int64_t stride, const float* sums, uint16_t* out) {
    constexpr int64_t REGISTERS = HEAD_DIM / LANES;
    __m512 total[HEADS][REGISTERS];
    for (int64_t head = 0; head < HEADS; ++head)
        for (int64_t i = 0; i < REGISTERS; ++i) total[head][i] = _mm512_setzero_ps();
    for (int64_t start = 0; start < length; start += cache.block_size) {
        const int64_t block = start / cache.block_size;
        const int64_t end =
            length - start < cache.block_size ? length : start + cache.block_size;
        const uint16_t* value = cache.values + table[block] * cache.block_size * HEAD_DIM;
        const uint16_t* next =
            cache.values + table[end < length ? block + 1 : block] * cache.block_size * HEAD_DIM;
        for (int64_t position = start; position < end;
             ++position, value += HEAD_DIM, next += HEAD_DIM) {
#pragma GCC unroll 4
            for (int64_t i = 0; i < HEAD_DIM; i += 32) _mm_prefetch(next + i, _MM_HINT_T1);
            __m512 weight[HEADS];
#pragma GCC unroll 2
            for (int64_t head = 0; head < HEADS; ++head)
                weight[head] = _mm512_set1_ps(weights[head * stride + position]);
#pragma GCC unroll 16
            for (int64_t i = 0; i < REGISTERS; ++i) {
                const __m512 wide = load(value + i * LANES);
#pragma GCC unroll 2
                for (int64_t head = 0; head < HEADS; ++head)
                    total[head][i] = _mm512_fmadd_ps(weight[head], wide, total[head][i]);
            }
        }
    }
    for (int64_t head = 0; head < HEADS; ++head) {
        const __m512 factor = _mm512_set1_ps(1.0f / sums[head]);
        for (int64_t i = 0; i < REGISTERS; ++i)
            store(out + head * HEAD_DIM + i * LANES, _mm512_mul_ps(total[head][i], factor));
    }
}

// The heads of one sequence that share keys. q, out: [heads][HEAD_DIM]. scratch: fp32
// [heads][stride + 1].
template <int64_t HEAD_DIM>
void attend(const Cache& cache, const int64_t* table, int64_t length, const uint16_t* q,
            int64_t heads, float scale, float* scratch, int64_t stride, uint16_t* out) {
    float* sums = scratch + heads * stride;
    const auto keys_at = [&](int64_t position) {
        position = position < length ? position : 0;
        const int64_t block = position / cache.block_size, offset = position % cache.block_size;
        return cache.keys + (table[block] * cache.block_size + offset) * HEAD_DIM;
    };
    for (int64_t start = 0; start < length; start += LANES) {
        const uint16_t *keys = keys_at(start), *next = keys_at(start + LANES);
        for (int64_t head = 0; head < heads; ++head) {
            const __m512 scores = _mm512_mul_ps(scores_of<HEAD_DIM>(q + head * HEAD_DIM, keys, next),
                                                _mm512_set1_ps(scale));
            _mm512_storeu_ps(scratch + head * stride + start, scores);
        }
    }
    for (int64_t head = 0; head < heads; ++head)
        sums[head] = weights_of(scratch + head * stride, length);
    int64_t head = 0;
    for (; head + 2 <= heads; head += 2)
        weigh<HEAD_DIM, 2>(cache, table, length, scratch + head * stride, stride, sums + head,
                           out + head * HEAD_DIM);
    if (head < heads)
        weigh<HEAD_DIM, 1>(cache, table, length, scratch + head * stride, stride, sums + head,
                           out + head * HEAD_DIM);
}

}  // namespace

extern "C" {

// q, out: bf16 [sequences][kv_heads * group][head_dim], `q_stride` and `out_stride` values from
// sequence to sequence. keys, values: bf16 [parts][block_size][head_dim]; tables: int64
// [sequences][kv_heads][width], of parts; last: int64 [sequences], each query's own position.
// head_dim is 64, 96 or 128, block_size a multiple of 16. Returns 0, or -1 if there is no memory.
int paged_attention(const uint16_t* q, int64_t q_stride, const uint16_t* keys,
                    const uint16_t* values, const int64_t* tables, const int64_t* last,
                    int64_t sequences, int64_t kv_heads, int64_t group, int64_t head_dim,
                    int64_t block_size, int64_t width, float scale, uint16_t* out,
                    int64_t out_stride, int threads) {
    const Cache cache = {keys, values, block_size};
    const int64_t stride = width * block_size;
    int status = 0;
#pragma omp parallel num_threads(threads) reduction(min : status)
    {
        float* scratch = (float*)malloc(group * (stride + 1) * sizeof(float));
        if (scratch == nullptr) status = -1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < sequences * kv_heads; ++unit) {
            if (scratch == nullptr) continue;
            const int64_t sequence = unit / kv_heads, head = unit % kv_heads * group;
            const uint16_t* query = q + sequence * q_stride + head * head_dim;
            uint16_t* result = out + sequence * out_stride + head * head_dim;
            auto* kernel = head_dim == 64 ? attend<64> : head_dim == 96 ? attend<96> : attend<128>;
            kernel(cache, tables + unit * width, last[sequence] + 1, query, group, scale, scratch,
                   stride, result);
        }
        free(scratch);
    }
    return status;
}

}  // extern "C"
