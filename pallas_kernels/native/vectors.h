// Vectors as wide as the processor's, and what is computed with one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace native {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline Vec load(const float* at) {
  Vec out;
  std::memcpy(&out, at, sizeof out);
  return out;
}
inline Vec load(const BFloat16* at) {
  Halves halves;
  std::memcpy(&halves, at, sizeof halves);
  Words words = __builtin_convertvector(halves, Words) << 16;
  return reinterpret_cast<Vec&>(words);
}
inline void put(float* at, Vec x) { std::memcpy(at, &x, sizeof x); }

typedef float Four __attribute__((vector_size(16)));

// Within each four lanes, the first two or the last two of `a`, and of `b` behind them.
#if defined(__AVX512F__)
inline Vec pairs(Vec a, Vec b, bool last) {
  return last ? __builtin_shuffle(a, b, Ints{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31})
              : __builtin_shuffle(a, b, Ints{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
}
inline Vec evens(Vec a, Vec b) {
  return __builtin_shuffle(a, b, Ints{0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30});
}
inline Vec odds(Vec a, Vec b) {
  return __builtin_shuffle(a, b, Ints{1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31});
}
#elif defined(__AVX__)
inline Vec pairs(Vec a, Vec b, bool last) {
  return last ? __builtin_shuffle(a, b, Ints{2, 3, 10, 11, 6, 7, 14, 15})
              : __builtin_shuffle(a, b, Ints{0, 1, 8, 9, 4, 5, 12, 13});
}
inline Vec evens(Vec a, Vec b) { return __builtin_shuffle(a, b, Ints{0, 2, 8, 10, 4, 6, 12, 14}); }
inline Vec odds(Vec a, Vec b) { return __builtin_shuffle(a, b, Ints{1, 3, 9, 11, 5, 7, 13, 15}); }
#else
inline Vec pairs(Vec a, Vec b, bool last) {
  return last ? __builtin_shuffle(a, b, Ints{2, 3, 6, 7}) : __builtin_shuffle(a, b, Ints{0, 1, 4, 5});
}
inline Vec evens(Vec a, Vec b) { return __builtin_shuffle(a, b, Ints{0, 2, 4, 6}); }
inline Vec odds(Vec a, Vec b) { return __builtin_shuffle(a, b, Ints{1, 3, 5, 7}); }
#endif

// The sums over the lanes of four vectors, together: a fourth of the shuffles.
inline Four sums(const Vec* x) {
  Vec ab = pairs(x[0], x[1], false) + pairs(x[0], x[1], true);
  Vec cd = pairs(x[2], x[3], false) + pairs(x[2], x[3], true);
  Vec each = evens(ab, cd) + odds(ab, cd);
  Four parts[kLanes / 4];
  std::memcpy(parts, &each, sizeof parts);
  for (int i = kLanes / 8; i > 0; i /= 2)
    for (int j = 0; j < i; ++j) parts[j] += parts[j + i];
  return parts[0];
}

// Of each four lanes of four vectors, a square: its columns become its rows.
inline void transpose_squares(Vec (&x)[4]) {
  const Vec low = pairs(x[0], x[1], false), low2 = pairs(x[2], x[3], false);
  const Vec high = pairs(x[0], x[1], true), high2 = pairs(x[2], x[3], true);
  x[0] = evens(low, low2), x[1] = odds(low, low2), x[2] = evens(high, high2), x[3] = odds(high, high2);
}

// The numbers at `k` and after it of every fourth row, four of each.
inline Vec quads(const float* const* at, int64_t k) {
  Four first;
  std::memcpy(&first, at[0] + k, sizeof first);
#if defined(__AVX512F__)
  __m512 all = _mm512_castps128_ps512(first);
  all = _mm512_insertf32x4(all, _mm_loadu_ps(at[4] + k), 1);
  all = _mm512_insertf32x4(all, _mm_loadu_ps(at[8] + k), 2);
  return _mm512_insertf32x4(all, _mm_loadu_ps(at[12] + k), 3);
#elif defined(__AVX__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(first), _mm_loadu_ps(at[4] + k), 1);
#else
  return first;
#endif
}

// e^x to about one unit in the last place; 0 far below zero.
inline Vec exp(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number in the low bits
  Vec whole = shifted - 12582912.0f;
  Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints bits = (__builtin_convertvector(whole, Ints) + 127) << 23;
  return p * reinterpret_cast<Vec&>(bits);
}

}  // namespace native
