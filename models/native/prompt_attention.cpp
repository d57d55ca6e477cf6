// A prompt's chunk over the paged cache of its sequence, its own keys and values included, all in
// bf16: blocked attention with a running softmax (FlashAttention-2; Dao, 2023) that reads keys and
// values where they lie. Scores, sums and results are fp32; weights are bf16 for the product with
// the values. Neither how a prompt is cut into chunks nor who computes what beside it changes a
// row's bits: tiles of keys begin at multiples of TILE_KEYS from the sequence's beginning. (A chunk
// of one token is `paged_attention`'s, which rounds otherwise.)
//
// A tile of up to 64 queries, the heads that share keys beside one another, meets tiles of 64 keys:
//
//     queries  bf16 [head_dim / 2][lanes][2]   packed once; a register is 16 queries' same two values
//     scores   fp32 [keys][lanes]              S^T = K Q^T, with pairs of K broadcast from the cache,
//                                              so that keys need no other order than they have, and
//                                              a softmax goes from register to register
//     weights  bf16 [keys / 2][lanes][2]
//     values   bf16 [keys / 2][head_dim][2]    two keys' values side by side, as dot products want
//     sums     fp32 [lanes][head_dim]          O = P V, with pairs of P broadcast

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "bf16.h"

namespace {

constexpr int64_t LANES = WIDTH;
constexpr int64_t TILE_LANES = 64;
constexpr int64_t TILE_KEYS = 64;
constexpr int64_t KEYS = 8;      // of one product: with two registers of queries, 16 sums
constexpr int64_t QUERIES = 6;   // of one product with values: with four registers, 24 sums
constexpr int64_t LINE = 32;     // bf16 values in a cache line

struct Cache {
    const uint16_t *keys, *values;  // [parts][block_size][head_dim], a part a block's one head
    const int64_t* table;           // parts, in order
    int64_t block_size;             // a multiple of 16

    const uint16_t* at(const uint16_t* vectors, int64_t position, int64_t head_dim) const {
        const int64_t part = table[position / block_size];
        return vectors + (part * block_size + position % block_size) * head_dim;
    }
};

// What one thread works in; fits the second-nearest cache several times.
template <int64_t HEAD_DIM>
struct alignas(64) Workspace {
    uint32_t queries[HEAD_DIM / 2 * TILE_LANES];
    float scores[TILE_KEYS * TILE_LANES];
    uint32_t weights[TILE_KEYS / 2 * TILE_LANES];
    uint32_t values[TILE_KEYS / 2 * HEAD_DIM];
    float sums[TILE_LANES * HEAD_DIM];
    float largest[TILE_LANES], totals[TILE_LANES], factors[TILE_LANES];
    int32_t positions[TILE_LANES];
};

__m512bh broadcast(const void* pair) {
    int32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

// KEYS keys, from the position `first` on, by REGISTERS registers of queries -> scores times `scale`,
// where masked -inf for a key that comes after the query; `largest` grows. ahead: KEYS keys and
// values to fetch meanwhile, or null.
template <int64_t HEAD_DIM, int64_t REGISTERS>
void score(const uint16_t* keys, const uint32_t* queries, float scale, bool masked, int64_t first,
           const int32_t* positions, const uint16_t* keys_ahead, const uint16_t* values_ahead,
           float* scores, float* largest) {
    __m512 dot[KEYS][REGISTERS];
#pragma GCC unroll 8
    for (int64_t key = 0; key < KEYS; ++key)
#pragma GCC unroll 2
        for (int64_t i = 0; i < REGISTERS; ++i) dot[key][i] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < HEAD_DIM / 2; ++pair) {
        __m512bh query[REGISTERS];
#pragma GCC unroll 2
        for (int64_t i = 0; i < REGISTERS; ++i)
            query[i] = (__m512bh)_mm512_load_si512(queries + pair * TILE_LANES + i * LANES);
#pragma GCC unroll 8
        for (int64_t key = 0; key < KEYS; ++key) {
            const __m512bh value = broadcast(keys + key * HEAD_DIM + 2 * pair);
#pragma GCC unroll 2
            for (int64_t i = 0; i < REGISTERS; ++i)
                dot[key][i] = _mm512_dpbf16_ps(dot[key][i], query[i], value);
        }
        // A line at a time, and not into the nearest cache: more wait for one another, and for them
        // everything else.
        if (keys_ahead != nullptr)
            _mm_prefetch((pair % 2 ? values_ahead : keys_ahead) + pair / 2 * LINE, _MM_HINT_T1);
    }
    const __m512 factor = _mm512_set1_ps(scale);
#pragma GCC unroll 2
    for (int64_t i = 0; i < REGISTERS; ++i) {
        const __m512i position = _mm512_load_si512(positions + i * LANES);
        __m512 most = _mm512_load_ps(largest + i * LANES);
#pragma GCC unroll 8
        for (int64_t key = 0; key < KEYS; ++key) {
            __m512 value = _mm512_mul_ps(dot[key][i], factor);
            if (masked) {
                const __mmask16 seen =
                    _mm512_cmple_epi32_mask(_mm512_set1_epi32(first + key), position);
                value = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), seen, value);
            }
            most = _mm512_max_ps(most, value);
            _mm512_store_ps(scores + key * TILE_LANES + i * LANES, value);
        }
        _mm512_store_ps(largest + i * LANES, most);
    }
}

// `count` keys' values -> pairs of keys, a missing second one's zeros.
template <int64_t HEAD_DIM>
void interleave(const Cache& cache, int64_t start, int64_t count, uint32_t* out) {
    alignas(64) static constexpr uint16_t LOW[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(LOW);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t key = 0; key < count; key += 2) {
        const uint16_t* from = cache.at(cache.values, start + key, HEAD_DIM);
        const __mmask32 exists = key + 1 < count ? ~0u : 0;
#pragma GCC unroll 4
        for (int64_t i = 0; i < HEAD_DIM; i += LINE) {
            const __m512i even = _mm512_loadu_si512(from + i);
            const __m512i odd = _mm512_maskz_loadu_epi16(exists, from + HEAD_DIM + i);
            _mm512_store_si512(out + i, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(out + i + LANES, _mm512_permutex2var_epi16(even, high, odd));
        }
        out += HEAD_DIM;
    }
}

// Scores of `keys` keys, in pairs, the last one's other half being masked -> weights, and the rows' running softmax brought up to date.
// before: the largest scores without these keys.
template <int64_t HEAD_DIM>
void weigh(Workspace<HEAD_DIM>& work, int64_t keys, int64_t lane, const float* before) {
    alignas(64) static constexpr uint16_t PAIRS[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pairs = _mm512_load_si512(PAIRS);
    const __m512 largest = _mm512_load_ps(work.largest + lane);
    const __m512 factor = power_of_two(_mm512_sub_ps(_mm512_load_ps(before + lane), largest));
    __m512 total = _mm512_mul_ps(_mm512_load_ps(work.totals + lane), factor);
    for (int64_t key = 0; key < keys; key += 2) {
        const float* from = work.scores + key * TILE_LANES + lane;
        const __m512 even = power_of_two(_mm512_sub_ps(_mm512_load_ps(from), largest));
        const __m512 odd = power_of_two(_mm512_sub_ps(_mm512_load_ps(from + TILE_LANES), largest));
        total = _mm512_add_ps(_mm512_add_ps(total, even), odd);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        _mm512_store_si512(work.weights + key / 2 * TILE_LANES + lane,
                           _mm512_permutexvar_epi16(pairs, both));
    }
    _mm512_store_ps(work.totals + lane, total);
    _mm512_store_ps(work.factors + lane, factor);
}

// ROWS rows' sums times their factors, and the weighted values added. pairs: of keys.
template <int64_t HEAD_DIM, int64_t ROWS>
void add(const uint32_t* weights, const uint32_t* values, int64_t pairs, const float* factors,
         float* sums) {
    constexpr int64_t REGISTERS = HEAD_DIM % 64 ? 3 : 4;
    for (int64_t column = 0; column < HEAD_DIM; column += REGISTERS * LANES) {
        __m512 sum[ROWS][REGISTERS];
#pragma GCC unroll 8
        for (int64_t row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int64_t i = 0; i < REGISTERS; ++i)
                sum[row][i] =
                    _mm512_mul_ps(_mm512_set1_ps(factors[row]),
                                  _mm512_load_ps(sums + row * HEAD_DIM + column + i * LANES));
        for (int64_t pair = 0; pair < pairs; ++pair) {
            __m512bh value[REGISTERS];
#pragma GCC unroll 4
            for (int64_t i = 0; i < REGISTERS; ++i)
                value[i] =
                    (__m512bh)_mm512_load_si512(values + pair * HEAD_DIM + column + i * LANES);
#pragma GCC unroll 8
            for (int64_t row = 0; row < ROWS; ++row) {
                const __m512bh weight = broadcast(weights + pair * TILE_LANES + row);
#pragma GCC unroll 4
                for (int64_t i = 0; i < REGISTERS; ++i)
                    sum[row][i] = _mm512_dpbf16_ps(sum[row][i], weight, value[i]);
            }
        }
#pragma GCC unroll 8
        for (int64_t row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int64_t i = 0; i < REGISTERS; ++i)
                _mm512_store_ps(sums + row * HEAD_DIM + column + i * LANES, sum[row][i]);
    }
}

using Add = void (*)(const uint32_t*, const uint32_t*, int64_t, const float*, float*);
template <int64_t HEAD_DIM>
constexpr Add ADD[QUERIES + 1] = {nullptr,          add<HEAD_DIM, 1>, add<HEAD_DIM, 2>,
                                  add<HEAD_DIM, 3>, add<HEAD_DIM, 4>, add<HEAD_DIM, 5>,
                                  add<HEAD_DIM, 6>};

// Where a query, or its result, lies: `group` heads of each row.
struct Rows {
    int64_t stride, group;

    int64_t offset(int64_t query, int64_t head_dim) const {
        return query / group * stride + query % group * head_dim;
    }
};

// Queries `first` to `first + count` of a chunk, in the order of `Rows`. context: the position of
// the chunk's first row.
template <int64_t HEAD_DIM>
void attend(const Cache& cache, int64_t context, const uint16_t* q, Rows from, int64_t first,
            int64_t count, float scale, uint16_t* out, Rows to) {
    Workspace<HEAD_DIM> work;
    const int64_t lanes = (count + LANES - 1) / LANES * LANES;
    for (int64_t lane = 0; lane < lanes; ++lane) {
        // The lanes that are left over have the last query, too.
        const int64_t query = first + (lane < count ? lane : count - 1);
        const uint16_t* values = q + from.offset(query, HEAD_DIM);
        for (int64_t pair = 0; pair < HEAD_DIM / 2; ++pair)
            memcpy(&work.queries[pair * TILE_LANES + lane], values + 2 * pair, sizeof(uint32_t));
        work.positions[lane] = context + query / from.group;
        work.largest[lane] = -__builtin_inff();
        work.totals[lane] = 0;
    }
    memset(work.sums, 0, sizeof(float) * lanes * HEAD_DIM);

    const int64_t end = work.positions[count - 1] + 1;
    for (int64_t start = 0; start < end; start += TILE_KEYS) {
        const int64_t keys = end - start < TILE_KEYS ? end - start : TILE_KEYS;
        const bool masked = start + TILE_KEYS - 1 > work.positions[0];
        alignas(64) float before[TILE_LANES];
        memcpy(before, work.largest, sizeof before);
        for (int64_t key = 0; key < keys; key += KEYS) {
            const int64_t ahead = start + TILE_KEYS + key;
            const uint16_t* at = cache.at(cache.keys, start + key, HEAD_DIM);
            const uint16_t* keys_ahead =
                cache.at(cache.keys, ahead < end ? ahead : start + key, HEAD_DIM);
            const uint16_t* values_ahead = cache.at(cache.values, start + key, HEAD_DIM);
            for (int64_t lane = 0; lane < lanes; lane += 2 * LANES) {
                auto* kernel = lane + LANES < lanes ? score<HEAD_DIM, 2> : score<HEAD_DIM, 1>;
                kernel(at, work.queries + lane, scale * LOG2_E, masked, start + key,
                       work.positions + lane, lane ? nullptr : keys_ahead, values_ahead,
                       work.scores + key * TILE_LANES + lane, work.largest + lane);
            }
        }
        interleave<HEAD_DIM>(cache, start, keys, work.values);
        for (int64_t lane = 0; lane < lanes; lane += LANES) weigh(work, keys, lane, before);
        for (int64_t lane = 0; lane < count; lane += QUERIES)
            ADD<HEAD_DIM>[count - lane < QUERIES ? count - lane : QUERIES](
                work.weights + lane, work.values, (keys + 1) / 2, work.factors + lane,
                work.sums + lane * HEAD_DIM);
    }

    for (int64_t lane = 0; lane < count; ++lane) {
        const __m512 factor = _mm512_set1_ps(1.0f / work.totals[lane]);
        uint16_t* result = out + to.offset(first + lane, HEAD_DIM);
        for (int64_t i = 0; i < HEAD_DIM; i += LANES) {
            const __m512 value = _mm512_load_ps(work.sums + lane * HEAD_DIM + i);
            store(result + i, _mm512_mul_ps(value, factor));
        }
    }
}

}  // namespace

// q, out: bf16 [rows][kv_heads * group][head_dim], `q_stride` and `out_stride` values from row to
// row; rows are at the positions from `context` on. keys, values: bf16 [parts][block_size]
// [head_dim]; tables: int64 [kv_heads][width], of parts. head_dim is 64, 96 or 128, block_size a
// multiple of 16.
extern "C" void prompt_attention(const uint16_t* q, int64_t q_stride, const uint16_t* keys,
                                 const uint16_t* values, const int64_t* tables, int64_t context,
                                 int64_t rows, int64_t kv_heads, int64_t group, int64_t head_dim,
                                 int64_t block_size, int64_t width, float scale, uint16_t* out,
                                 int64_t out_stride, int threads) {
    const int64_t queries = rows * group;
    const int64_t tiles = (queries + TILE_LANES - 1) / TILE_LANES;
    const int64_t tile = (queries + tiles * LANES - 1) / (tiles * LANES) * LANES;
    auto* kernel = head_dim == 64 ? attend<64> : head_dim == 96 ? attend<96> : attend<128>;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t unit = 0; unit < kv_heads * tiles; ++unit) {
        const int64_t head = unit / tiles;
        const int64_t first = (tiles - 1 - unit % tiles) * tile;  // the longest first
        if (first >= queries) continue;
        const Cache cache = {keys, values, tables + head * width, block_size};
        kernel(cache, context, q + head * group * head_dim, {q_stride, group}, first,
               queries - first < tile ? queries - first : tile, scale,
               out + head * group * head_dim, {out_stride, group});
    }
}
