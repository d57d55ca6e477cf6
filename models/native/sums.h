// Sums over registers' lanes, in an order that is the same for each of them.

#pragma once

#include <immintrin.h>

// The 16 vectors' sums, in their order.
inline __m512 sums_of(const __m512* v) {
    __m512 pair[8], four[4], eight[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                                _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d low = (__m512d)pair[2 * i], high = (__m512d)pair[2 * i + 1];
        four[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(low, high),
                                (__m512)_mm512_unpackhi_pd(low, high));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                         _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}
