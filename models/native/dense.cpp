// y = x W^T for bf16 x and W, both as they lie in memory, y in fp32: for outputs of so many rows
// of W that reading them is all the work, which a language model's head is for a few tokens.
// A row's result does not depend on the rows beside it.

#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr int64_t MOST_ROWS = 4;
constexpr int64_t OUTPUTS = 4;  // at a time: so many rows of W stay in the nearest cache
constexpr int64_t LANES = 32;

template <int64_t ROWS>
void multiply(const uint16_t* w, const uint16_t* x, int64_t k, float* y, int64_t n,
              int64_t outputs) {
    __m512 sum[ROWS][OUTPUTS];
#pragma GCC unroll 4
    for (int64_t row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int64_t output = 0; output < OUTPUTS; ++output) sum[row][output] = _mm512_setzero_ps();
    for (int64_t at = 0; at < k; at += LANES) {
        const __mmask32 mask = k - at >= LANES ? ~0u : (1u << (k - at)) - 1;
        __m512bh values[ROWS];
#pragma GCC unroll 4
        for (int64_t row = 0; row < ROWS; ++row)
            values[row] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + row * k + at);
#pragma GCC unroll 4
        for (int64_t output = 0; output < OUTPUTS; ++output) {
            // Where outputs run out, the last one is computed again.
            const uint16_t* from = w + (output < outputs ? output : outputs - 1) * k + at;
            _mm_prefetch(from + OUTPUTS * k, _MM_HINT_T0);  // for the next call
            const __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
#pragma GCC unroll 4
            for (int64_t row = 0; row < ROWS; ++row)
                sum[row][output] = _mm512_dpbf16_ps(sum[row][output], weights, values[row]);
        }
    }
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t output = 0; output < outputs && output < OUTPUTS; ++output)
            y[row * n + output] = _mm512_reduce_add_ps(sum[row][output]);
}

using Multiply = void (*)(const uint16_t*, const uint16_t*, int64_t, float*, int64_t, int64_t);
constexpr Multiply MULTIPLY[MOST_ROWS + 1] = {nullptr, multiply<1>, multiply<2>, multiply<3>,
                                              multiply<4>};

}  // namespace

// x: bf16 [m][k], w: bf16 [n][k] -> y: fp32 [m][n].
extern "C" void dense_matmul(const uint16_t* x, const uint16_t* w, int64_t m, int64_t n, int64_t k,
                             float* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (n + OUTPUTS - 1) / OUTPUTS; ++block) {
        const int64_t start = block * OUTPUTS;
        const int64_t outputs = n - start < OUTPUTS ? n - start : OUTPUTS;
        for (int64_t row = 0; row < m; row += MOST_ROWS)
            MULTIPLY[m - row < MOST_ROWS ? m - row : MOST_ROWS](
                w + start * k, x + row * k, k, y + row * n + start, n, outputs);
    }
}
