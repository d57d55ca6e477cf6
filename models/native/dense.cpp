// y = x W^T for bf16 x and W, y in fp32, W as it lies in memory: for outputs of so many rows of W
// that reading them is all the work for a few tokens, which a language model's head is. A row's
// result does not depend on the rows beside it.
//
// Rows of x are copied into groups of 4, whose values for the same inputs lie side by side: rows of
// x and of W that are a power of two apart compete for the same lines of the nearest cache.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#include "sums.h"

namespace {

constexpr int64_t MOST_ROWS = 4;
constexpr int64_t OUTPUTS = 4;  // at a time: so many rows of W stay in the nearest cache
constexpr int64_t LANES = 32;

// x: [steps][ROWS][LANES]. w: rows of k values.
template <int64_t ROWS>
void multiply(const uint16_t* w, const uint16_t* x, int64_t k, float* y, int64_t n,
              int64_t outputs, bool ahead) {
    __m512 sum[ROWS * OUTPUTS];
#pragma GCC unroll 16
    for (int64_t i = 0; i < ROWS * OUTPUTS; ++i) sum[i] = _mm512_setzero_ps();
    const uint16_t* from[OUTPUTS];
    // Where outputs run out, the last one is computed again.
    for (int64_t output = 0; output < OUTPUTS; ++output)
        from[output] = w + (output < outputs ? output : outputs - 1) * k;
    const auto step = [&](int64_t at, __mmask32 mask) {
        __m512bh values[ROWS];
#pragma GCC unroll 4
        for (int64_t row = 0; row < ROWS; ++row)
            values[row] = (__m512bh)_mm512_loadu_si512(x + at * ROWS + row * LANES);
#pragma GCC unroll 4
        for (int64_t output = 0; output < OUTPUTS; ++output) {
            const __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(mask, from[output] + at);
#pragma GCC unroll 4
            for (int64_t row = 0; row < ROWS; ++row)
                sum[row * OUTPUTS + output] =
                    _mm512_dpbf16_ps(sum[row * OUTPUTS + output], weights, values[row]);
        }
    };
    int64_t at = 0;
    for (; at + LANES <= k; at += LANES) {
        if (ahead) {  // for the next call
#pragma GCC unroll 4
            for (int64_t output = 0; output < OUTPUTS; ++output)
                _mm_prefetch(from[output] + OUTPUTS * k + at, _MM_HINT_T1);
        }
        step(at, ~0u);
    }
    if (at < k) step(at, (1u << (k - at)) - 1);

    __m512 all[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) all[i] = i < ROWS * OUTPUTS ? sum[i] : _mm512_setzero_ps();
    alignas(64) float result[16];
    _mm512_store_ps(result, sums_of(all));
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t output = 0; output < outputs && output < OUTPUTS; ++output)
            y[row * n + output] = result[row * OUTPUTS + output];
}

using Multiply = void (*)(const uint16_t*, const uint16_t*, int64_t, float*, int64_t, int64_t,
                          bool);
constexpr Multiply MULTIPLY[MOST_ROWS + 1] = {nullptr, multiply<1>, multiply<2>, multiply<3>,
                                              multiply<4>};

// `rows` rows of k values -> [steps][rows][LANES], zeros behind them.
void group(const uint16_t* x, int64_t rows, int64_t k, uint16_t* out) {
    for (int64_t at = 0; at < k; at += LANES) {
        const __mmask32 mask = k - at >= LANES ? ~0u : (1u << (k - at)) - 1;
        for (int64_t row = 0; row < rows; ++row, out += LANES)
            _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(mask, x + row * k + at));
    }
}

}  // namespace

// x: bf16 [m][k], w: bf16 [n][k] -> y: fp32 [m][n]. Returns 0, or -1 if there is no memory.
extern "C" int dense_matmul(const uint16_t* x, const uint16_t* w, int64_t m, int64_t n, int64_t k,
                            float* y, int threads) {
    const int64_t width = (k + LANES - 1) / LANES * LANES;
    uint16_t* groups = (uint16_t*)malloc((m * width + 1) * sizeof(uint16_t));
    if (groups == nullptr) return -1;
    const auto rows_at = [m](int64_t row) { return m - row < MOST_ROWS ? m - row : MOST_ROWS; };
    for (int64_t row = 0; row < m; row += MOST_ROWS)
        group(x + row * k, rows_at(row), k, groups + row * width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (n + OUTPUTS - 1) / OUTPUTS; ++block) {
        const int64_t start = block * OUTPUTS;
        const int64_t outputs = n - start < OUTPUTS ? n - start : OUTPUTS;
        for (int64_t row = 0; row < m; row += MOST_ROWS)
            MULTIPLY[rows_at(row)](w + start * k, groups + row * width, k, y + row * n + start, n,
                                   outputs, row == 0);
    }
    free(groups);
    return 0;
}
