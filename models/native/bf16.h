// bf16 in memory, fp32 in registers.

#pragma once

#include <immintrin.h>
#include <stdint.h>

constexpr int64_t WIDTH = 16;  // of a register

inline __mmask16 mask_of(int64_t count) { return count >= WIDTH ? 0xffff : (1 << count) - 1; }

inline __m512 load(const uint16_t* from, __mmask16 mask = 0xffff) {
    const __m512i half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return (__m512)_mm512_slli_epi32(half, 16);
}

inline void store(uint16_t* to, __m512 values, __mmask16 mask = 0xffff) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// What is left of values that are stored.
inline __m512 rounded(__m512 values) {
    const __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
    return (__m512)_mm512_slli_epi32(half, 16);
}

// 2^x to 2^-18 of it; a NaN stays one.
inline __m512 power_of_two(__m512 x) {
    // fp32 cannot tell 2^-160 from 0, nor 2^160 from infinity.
    x = _mm512_min_ps(_mm512_set1_ps(160.0f), _mm512_max_ps(_mm512_set1_ps(-160.0f), x));
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    // ln(2)^i / i!
    constexpr float TERMS[] = {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    __m512 sum = _mm512_set1_ps(1.3333558e-3f);
    for (const float term : TERMS) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
    return _mm512_scalef_ps(sum, n);
}

constexpr float LOG2_E = 1.44269504f;
