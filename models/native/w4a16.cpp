// y = x W^T for 4-bit weights W and bf16 activations x, on a CPU with AVX-512 and its bf16 dot
// product (Zen 4, Cooper Lake, Sapphire Rapids and later).
//
// W[n][k] = (q - zero) * scale, with a scale and a zero point for each group of inputs. A group's
// products are summed first, over q - 8, which bf16 holds exactly:
//
//     y[n] = 2^e * sum over groups of scale * (sum (q - 8) x + (8 - zero) * sum x)
//
// Sums are in fp32. No weight is rounded, and a row's result does not depend on the rows beside it.
//
// A buffer of packed weights is a Header and then, for each 64 outputs and each group of inputs,
//
//     words   uint8 [group / 8][4][64]   for each 8 inputs and 16 outputs, one register
//     scales  fp16 [64]                  times 2^-e
//     zeros   uint8 [64]
//
// so that a thread reads one unbroken stream. A register has 32 bits for each output: the even
// inputs' nibbles in the low half, the odd inputs' in the high half. Shifted right by 0, 4, 8 or
// 12, the low nibbles of the halves belong to neighbouring inputs, as the dot product wants them;
// a table of 32 entries, all values twice, turns them into bf16 whatever the fifth bit is.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t PANELS = 4;
constexpr int64_t COLUMNS = PANELS * LANES;
constexpr int64_t DEPTH = 8;  // inputs in a register
constexpr int64_t PAIRS = DEPTH / 2;
constexpr int64_t STEP_BYTES = PANELS * 64;
constexpr int64_t PARAMETER_BYTES = COLUMNS * 3;
constexpr int64_t MOST_ROWS = 4;  // that share a register of weights. More leave too few for the rest
constexpr int64_t PREFETCH_BYTES = 6144;

struct Header {
    int64_t n, k, group;
    float multiplier;  // 2^e
    char padding[36];
};
static_assert(sizeof(Header) == 64, "what follows is aligned to cache lines");

int64_t blocks(int64_t n) { return (n + COLUMNS - 1) / COLUMNS; }

int64_t group_bytes(int64_t group) { return group / DEPTH * STEP_BYTES + PARAMETER_BYTES; }

int64_t block_bytes(int64_t k, int64_t group) { return k / group * group_bytes(group); }

// bf16 of 0 - 8 to 15 - 8, twice.
__m512i centred_values() {
    uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
        float value = (i & 15) - 8;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        values[i] = bits >> 16;
    }
    return _mm512_loadu_si512(values);
}

uint32_t interleave(const uint8_t* q) {
    uint64_t octet;
    memcpy(&octet, q, sizeof octet);
    const uint32_t even = _pext_u64(octet, 0x000f000f000f000f);
    const uint32_t odd = _pext_u64(octet, 0x0f000f000f000f00);
    return even | odd << 16;
}

float sum_of(const uint16_t* x, int64_t count) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 32)
        sum = _mm512_dpbf16_ps(sum, ones, (__m512bh)_mm512_loadu_si512(x + i));
    return _mm512_reduce_add_ps(sum);
}

__m512bh broadcast_pair(const uint16_t* x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// ROWS rows of x (k values apart) by 64 outputs. sums: of x, by row and group. y: n values apart.
template <int64_t ROWS>
void multiply(const Header& header, const uint8_t* weights, const uint16_t* x, const float* sums,
              uint16_t* y, int64_t columns) {
    const int64_t k = header.k, group = header.group, groups = k / group;
    const __m512i table = centred_values();
    __m512 total[ROWS][PANELS];
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t panel = 0; panel < PANELS; ++panel) total[row][panel] = _mm512_setzero_ps();

    for (int64_t g = 0; g < groups; ++g) {
        __m512 dot[ROWS][PANELS];
#pragma GCC unroll 4
        for (int64_t row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int64_t panel = 0; panel < PANELS; ++panel) dot[row][panel] = _mm512_setzero_ps();
        for (int64_t step = 0; step < group / DEPTH; ++step) {
            const uint16_t* at = x + g * group + step * DEPTH;
#pragma GCC unroll 4
            for (int64_t panel = 0; panel < PANELS; ++panel) {
                const __m512i word = _mm512_loadu_si512(weights + panel * 64);
                _mm_prefetch(weights + panel * 64 + PREFETCH_BYTES, _MM_HINT_T0);
#pragma GCC unroll 4
                for (int64_t pair = 0; pair < PAIRS; ++pair) {
                    const __m512i nibbles = _mm512_srli_epi16(word, 4 * pair);
                    const __m512bh q = (__m512bh)_mm512_permutexvar_epi16(nibbles, table);
#pragma GCC unroll 4
                    for (int64_t row = 0; row < ROWS; ++row)
                        dot[row][panel] = _mm512_dpbf16_ps(
                            dot[row][panel], q, broadcast_pair(at + row * k + 2 * pair));
                }
            }
            weights += STEP_BYTES;
        }
        const uint8_t* zeros = weights + COLUMNS * 2;
#pragma GCC unroll 4
        for (int64_t panel = 0; panel < PANELS; ++panel) {
            const __m512 scale =
                _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(weights + panel * 32)));
            const __m512i zero =
                _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(zeros + panel * LANES)));
            const __m512 offset = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(8), zero));
#pragma GCC unroll 4
            for (int64_t row = 0; row < ROWS; ++row) {
                const __m512 sum = _mm512_set1_ps(sums[row * groups + g]);
                total[row][panel] = _mm512_fmadd_ps(
                    scale, _mm512_fmadd_ps(offset, sum, dot[row][panel]), total[row][panel]);
            }
        }
        weights += PARAMETER_BYTES;
    }

    const __m512 multiplier = _mm512_set1_ps(header.multiplier);
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t panel = 0; panel < PANELS; ++panel) {
            const int64_t left = columns - panel * LANES;
            if (left <= 0) break;
            const __mmask16 mask = left >= LANES ? 0xffff : (1 << left) - 1;
            const __m512 value = _mm512_mul_ps(total[row][panel], multiplier);
            _mm256_mask_storeu_epi16(y + row * header.n + panel * LANES, mask,
                                     (__m256i)_mm512_cvtneps_pbh(value));
        }
}

using Multiply = void (*)(const Header&, const uint8_t*, const uint16_t*, const float*, uint16_t*,
                          int64_t);
constexpr Multiply MULTIPLY[MOST_ROWS + 1] = {nullptr, multiply<1>, multiply<2>, multiply<3>,
                                              multiply<4>};

}  // namespace

extern "C" {

int64_t w4a16_packed_bytes(int64_t n, int64_t k, int64_t group) {
    return sizeof(Header) + blocks(n) * block_bytes(k, group);
}

// q: [n][k]; scale: fp16 [n][k / group], times 1 / multiplier; zero: [n][k / group]. group is a
// multiple of 32. packed: w4a16_packed_bytes.
void w4a16_pack(const uint8_t* q, const uint16_t* scale, const uint8_t* zero, float multiplier,
                int64_t n, int64_t k, int64_t group, uint8_t* packed, int threads) {
    Header header = {n, k, group, multiplier, {}};
    memcpy(packed, &header, sizeof header);
    const int64_t groups = k / group;
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks(n); ++block) {
        uint8_t* out = packed + sizeof(Header) + block * block_bytes(k, group);
        for (int64_t g = 0; g < groups; ++g) {
            uint32_t* words = (uint32_t*)out;
            uint16_t* scales = (uint16_t*)(out + group_bytes(group) - PARAMETER_BYTES);
            uint8_t* zeros = (uint8_t*)(scales + COLUMNS);
            for (int64_t column = 0; column < COLUMNS; ++column) {
                const int64_t output = block * COLUMNS + column;
                const bool exists = output < n;
                const uint8_t* from = q + output * k + g * group;
                for (int64_t step = 0; step < group / DEPTH; ++step)
                    words[step * COLUMNS + column] = exists ? interleave(from + step * DEPTH) : 0;
                scales[column] = exists ? scale[output * groups + g] : 0;
                zeros[column] = exists ? zero[output * groups + g] : 0;
            }
            out += group_bytes(group);
        }
    }
}

// x: bf16 [m][k] -> y: bf16 [m][n]. Returns 0, or -1 if there is no memory.
int w4a16_matmul(const uint16_t* x, const uint8_t* packed, int64_t m, uint16_t* y, int threads) {
    const Header& header = *(const Header*)packed;
    const int64_t n = header.n, k = header.k, group = header.group, groups = k / group;
    float* sums = (float*)malloc((m * groups + 1) * sizeof(float));
    if (sums == nullptr) return -1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t row = 0; row < m; ++row)
            for (int64_t g = 0; g < groups; ++g)
                sums[row * groups + g] = sum_of(x + row * k + g * group, group);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks(n); ++block) {
            const uint8_t* weights = packed + sizeof(Header) + block * block_bytes(k, group);
            const int64_t start = block * COLUMNS;
            const int64_t columns = n - start < COLUMNS ? n - start : COLUMNS;
            for (int64_t row = 0; row < m; row += MOST_ROWS)
                MULTIPLY[m - row < MOST_ROWS ? m - row : MOST_ROWS](
                    header, weights, x + row * k, sums + row * groups, y + row * n + start,
                    columns);
        }
    }
    free(sums);
    return 0;
}

}  // extern "C"
