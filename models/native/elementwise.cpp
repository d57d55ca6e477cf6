// What a decoder's layer computes between its products, each in one pass over bf16 values. Sums and
// functions are fp32, rounded to bf16 where transformers' models round.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "bf16.h"

namespace {

constexpr int64_t ALONE = 1 << 15;  // values that one thread has done before others have begun

// x += delta, if there is one; out = x / sqrt(mean x^2 + eps) * weight.
void normalise(uint16_t* x, const uint16_t* delta, const uint16_t* weight, float eps, int64_t size,
               uint16_t* out) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t at = 0; at < size; at += WIDTH) {
        const __mmask16 mask = mask_of(size - at);
        __m512 value = load(x + at, mask);
        if (delta != nullptr) {
            value = rounded(_mm512_add_ps(value, load(delta + at, mask)));
            store(x + at, value, mask);
        }
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / size;
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_set1_ps(mean + eps)));
    for (int64_t at = 0; at < size; at += WIDTH) {
        const __mmask16 mask = mask_of(size - at);
        const __m512 value = rounded(_mm512_mul_ps(load(x + at, mask), factor));
        store(out + at, _mm512_mul_ps(value, load(weight + at, mask)), mask);
    }
}

// One head of one token, turned: pairs are half a head apart. x may be `out`.
void rotate(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t head_dim,
            uint16_t* out) {
    const int64_t half = head_dim / 2;
    const auto turned = [](__m512 a, __m512 cos_a, __m512 b, __m512 sin_a) {
        return _mm512_add_ps(rounded(_mm512_mul_ps(a, cos_a)), rounded(_mm512_mul_ps(b, sin_a)));
    };
    for (int64_t at = 0; at < half; at += WIDTH) {
        const __m512 first = load(x + at), second = load(x + half + at);
        const __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), second);
        store(out + at, turned(first, load(cos + at), minus, load(sin + at)));
        store(out + half + at, turned(second, load(cos + half + at), first, load(sin + half + at)));
    }
}

}  // namespace

extern "C" {

// x, delta, out: bf16 [rows][size]; weight: bf16 [size]. delta may be null; x is written if it is
// not.
void rms_norm(uint16_t* x, const uint16_t* delta, const uint16_t* weight, float eps, int64_t rows,
              int64_t size, uint16_t* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > ALONE)
    for (int64_t row = 0; row < rows; ++row)
        normalise(x + row * size, delta == nullptr ? nullptr : delta + row * size, weight, eps,
                  size, out + row * size);
}

// gate_up: bf16 [rows][2][size] -> out: bf16 [rows][size], gate / (1 + e^-gate) * up.
void swiglu(const uint16_t* gate_up, int64_t rows, int64_t size, uint16_t* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > ALONE)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t at = 0; at < size; at += WIDTH) {
            const __mmask16 mask = mask_of(size - at);
            const uint16_t* from = gate_up + 2 * row * size + at;
            const __m512 gate = load(from, mask), one = _mm512_set1_ps(1.0f);
            const __m512 power = power_of_two(_mm512_mul_ps(gate, _mm512_set1_ps(-LOG2_E)));
            const __m512 silu = rounded(_mm512_div_ps(gate, _mm512_add_ps(one, power)));
            store(out + row * size + at, _mm512_mul_ps(silu, load(from + size, mask)), mask);
        }
}

// qkv: bf16 [tokens][heads + 2 * kv_heads][head_dim], whose queries are rotated in place; cos, sin:
// bf16 [tokens][head_dim]. Rotated keys, and values, go to the rows of keys and values, bf16
// [...][head_dim], that slots names, int64 [tokens][kv_heads]. head_dim is a multiple of 32.
void rotate_and_store(uint16_t* qkv, const uint16_t* cos, const uint16_t* sin, const int64_t* slots,
                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                      uint16_t* keys, uint16_t* values, int threads) {
    const int64_t all = heads + 2 * kv_heads;
#pragma omp parallel for num_threads(threads) if (tokens * all * head_dim > ALONE)
    for (int64_t token = 0; token < tokens; ++token) {
        const uint16_t *own_cos = cos + token * head_dim, *own_sin = sin + token * head_dim;
        uint16_t* vector = qkv + token * all * head_dim;
        for (int64_t head = 0; head < heads; ++head, vector += head_dim)
            rotate(vector, own_cos, own_sin, head_dim, vector);
        for (int64_t head = 0; head < kv_heads; ++head, vector += head_dim) {
            const int64_t slot = slots[token * kv_heads + head];
            rotate(vector, own_cos, own_sin, head_dim, keys + slot * head_dim);
            memcpy(values + slot * head_dim, vector + kv_heads * head_dim,
                   head_dim * sizeof(uint16_t));
        }
    }
}

}  // extern "C"
