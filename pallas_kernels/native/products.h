// Products of few or many rows with weights that lie row-major as [outputs, inputs], read once where they lie.
//
// Both operands are contiguous along the contraction. Few rows need nothing packed: a tile of rows times a tile of
// outputs is kept in registers while one goes along both, and summed over its lanes. Many rows pay for turning weights
// around, a piece at a time, so that lanes are outputs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace native {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6, kOutputs = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 3, kOutputs = 4;
#else
constexpr int kLanes = 4, kRows = 4, kOutputs = 4;
#endif
constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int64_t kBlock = 64;  // outputs of a piece of work
constexpr int64_t kDepth = 64;  // inputs of as many weights as are turned around at once: a third of the first cache
constexpr int64_t kManyRows = 20;  // from which that pays
constexpr int kWide = 4;  // vectors of outputs that are kept in registers

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

// What to bring near while something else is computed: `bytes` at each step, up to `end`.
struct Fetch {
  const char *at, *end;
  int64_t bytes;

  void step() {
    for (const char* last = std::min(at + bytes, end); at < last; at += kLine) __builtin_prefetch(at, 0, 2);
  }
};

// M rows times N outputs: out[m][n] = sum over k of a[m][k] w[n * stride + k].
template <int M, int N, class T>
inline void tile(const float* const* a, const T* w, int64_t stride, int64_t size, Fetch& fetch,
                 float (*out)[kOutputs]) {
  Vec totals[M][N] = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    fetch.step();
    Vec b[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) b[n] = load(w + n * stride + k);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec x = load(a[m] + k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) totals[m][n] += x * b[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    Vec four[4] = {};
    for (int n = 0; n < N; ++n) four[n] = totals[m][n];
    Four sum = sums(four);
    for (int n = 0; n < N; ++n) {
      out[m][n] = sum[n];
      for (int64_t i = k; i < size; ++i) out[m][n] += a[m][i] * wide(w[n * stride + i]);
    }
  }
}

template <int N, class T>
inline void tile(int rows, const float* const* a, const T* w, int64_t stride, int64_t size, Fetch& fetch,
                 float (*out)[kOutputs]) {
  switch (rows) {
    case 1: return tile<1, N>(a, w, stride, size, fetch, out);
    case 2: return tile<2, N>(a, w, stride, size, fetch, out);
    case 3: return tile<3, N>(a, w, stride, size, fetch, out);
    case 4: return tile<std::min(4, kRows), N>(a, w, stride, size, fetch, out);
    case 5: return tile<std::min(5, kRows), N>(a, w, stride, size, fetch, out);
    default: return tile<kRows, N>(a, w, stride, size, fetch, out);
  }
}

// A tile of rows stays in the first cache, the outputs' weights in the second: a few dozen of them at a time are best.
//
// Memory never rests: while the first tile of rows goes along the weights, the next outputs' are fetched, and while the
// other tiles do, as many bytes of `ahead`, which is read next.
template <class T, class Store>
void few_rows(const float* const* a, int64_t rows, const T* w, int64_t stride, int64_t size, int64_t first, int64_t last,
              const T* ahead, Store store) {
  float out[kRows][kOutputs];
  const int64_t tiles = (rows + kRows - 1) / kRows, a_step = kOutputs * kLanes * sizeof(T);
  auto from = [&](const T* at, int64_t count) {
    const char* begin = reinterpret_cast<const char*>(at);
    return Fetch{begin, at ? begin + count * stride * static_cast<int64_t>(sizeof(T)) : begin, a_step};
  };
  Fetch fetch = from(w + (first + kOutputs) * stride, last - first - kOutputs), later = from(ahead, last - first);
  later.bytes = std::max<int64_t>(kLine, a_step / std::max<int64_t>(1, tiles - 1));
  for (int64_t t = 0, m = 0; t < tiles; ++t) {
    const int some = static_cast<int>((rows - m + tiles - t - 1) / (tiles - t));
    for (int64_t n = first; n < last;) {
      const int outputs = last - n >= kOutputs ? kOutputs : 1;
      if (t == 0 && n + kOutputs >= last) fetch = later, fetch.bytes = a_step;
      if (outputs == 1) {
        tile<1>(some, a + m, w + n * stride, stride, size, fetch, out);
        for (int i = 0; i < some; ++i) store(m + i, n, out[i], std::integral_constant<int, 1>());
      } else {
        tile<kOutputs>(some, a + m, w + n * stride, stride, size, fetch, out);
        for (int i = 0; i < some; ++i) store(m + i, n, out[i], std::integral_constant<int, kOutputs>());
      }
      n += outputs;
    }
    fetch.bytes = later.bytes;
    m += some;
  }
}

// Vectors of which every four lanes are four numbers of a row: lanes 4 g to 4 g + 3 those of the row 4 g rows on.
inline Vec quads(const float* at, int64_t stride) {
  Four first;
  std::memcpy(&first, at, sizeof first);
#if defined(__AVX512F__)
  __m512 all = _mm512_castps128_ps512(first);
  all = _mm512_insertf32x4(all, _mm_loadu_ps(at + 4 * stride), 1);
  all = _mm512_insertf32x4(all, _mm_loadu_ps(at + 8 * stride), 2);
  return _mm512_insertf32x4(all, _mm_loadu_ps(at + 12 * stride), 3);
#elif defined(__AVX__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(first), _mm_loadu_ps(at + 4 * stride), 1);
#else
  return first;
#endif
}

// panel[n / (kWide * kLanes)][k][n % (kWide * kLanes)] = w[n * stride + k], for k below `depth`, n below `outputs`.
template <class T>
void turn_around(const T* w, int64_t stride, int64_t outputs, int64_t depth, float* panel) {
  float widened[kLanes * kDepth];
  for (int64_t n = 0; n < outputs; n += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, outputs - n);
    const float* from = widened;
    int64_t apart = kDepth, k = 0;
    if constexpr (std::is_same_v<T, float>) {
      from = w + n * stride, apart = stride;
    } else {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < depth; ++j) widened[i * kDepth + j] = wide(w[(n + i) * stride + j]);
    }
    float* to = panel + n / (kWide * kLanes) * kDepth * kWide * kLanes + n % (kWide * kLanes);
    for (; rows == kLanes && k + 4 <= depth; k += 4, to += 4 * kWide * kLanes) {
      Vec r[4];
      for (int j = 0; j < 4; ++j) r[j] = quads(from + j * apart + k, apart);
      Vec low = pairs(r[0], r[1], false), low2 = pairs(r[2], r[3], false);
      Vec high = pairs(r[0], r[1], true), high2 = pairs(r[2], r[3], true);
      put(to, evens(low, low2));
      put(to + kWide * kLanes, odds(low, low2));
      put(to + 2 * kWide * kLanes, evens(high, high2));
      put(to + 3 * kWide * kLanes, odds(high, high2));
    }
    for (; k < depth; ++k, to += kWide * kLanes)
      for (int64_t i = 0; i < kLanes; ++i) to[i] = i < rows ? from[i * apart + k] : 0.0f;
  }
}

// The weights that are turned around next: `each` rows of them at each step.
struct FetchRows {
  const char* at;
  int64_t stride, bytes, left, each;

  void step() {
    for (int64_t i = std::min(each, left); i > 0; --i, --left, at += stride)
      for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(at + b, 0, 2);
  }
};

// M rows times a panel's outputs: sums[m][n] += sum over k of a[m][k] panel[k][n].
template <int M>
inline void wide_tile(const float* const* a, int64_t start, int64_t depth, const float* panel, float* sums,
                      FetchRows& fetch) {
  const float* row[M];
  Vec totals[M][kWide];
  for (int m = 0; m < M; ++m) {
    row[m] = a[m] + start;
    for (int n = 0; n < kWide; ++n) totals[m][n] = load(sums + m * kBlock + n * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k, panel += kWide * kLanes) {
    if (k % 4 == 0) fetch.step();
    Vec b[kWide];
#pragma GCC unroll 8
    for (int n = 0; n < kWide; ++n) b[n] = load(panel + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec x = row[m][k] - Vec{};  // in every lane
#pragma GCC unroll 8
      for (int n = 0; n < kWide; ++n) totals[m][n] += x * b[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < kWide; ++n) put(sums + m * kBlock + n * kLanes, totals[m][n]);
}

inline void wide_tile(int rows, const float* const* a, int64_t start, int64_t depth, const float* panel, float* sums,
                      FetchRows& fetch) {
  switch (rows) {
    case 1: return wide_tile<1>(a, start, depth, panel, sums, fetch);
    case 2: return wide_tile<2>(a, start, depth, panel, sums, fetch);
    case 3: return wide_tile<3>(a, start, depth, panel, sums, fetch);
    case 4: return wide_tile<std::min(4, kRows)>(a, start, depth, panel, sums, fetch);
    case 5: return wide_tile<std::min(5, kRows)>(a, start, depth, panel, sums, fetch);
    default: return wide_tile<kRows>(a, start, depth, panel, sums, fetch);
  }
}

// At most kBlock outputs. While one piece of the weights is computed with, the next is fetched.
template <class T, class Store>
void many_rows(const float* const* a, int64_t rows, const T* w, int64_t stride, int64_t size, int64_t first,
               int64_t last, const T* ahead, Store store) {
  const int64_t tiles = (rows + kRows - 1) / kRows, outputs = last - first;
  alignas(64) float panel[kDepth * kBlock] = {};
  std::unique_ptr<float[]> sums(new float[rows * kBlock]());
  for (int64_t k = 0; k < size; k += kDepth) {
    const int64_t depth = std::min(kDepth, size - k);
    turn_around(w + first * stride + k, stride, outputs, depth, panel);
    const T* next = k + kDepth < size ? w + first * stride + k + kDepth : ahead;
    FetchRows fetch{reinterpret_cast<const char*>(next), stride * static_cast<int64_t>(sizeof(T)),
                    kDepth * static_cast<int64_t>(sizeof(T)), next ? outputs : 0,
                    (outputs + tiles * (kDepth / 4) - 1) / (tiles * (kDepth / 4))};
    for (int64_t t = 0, m = 0; t < tiles; ++t) {
      const int some = static_cast<int>((rows - m + tiles - t - 1) / (tiles - t));
      for (int64_t n = 0; n < outputs; n += kWide * kLanes)
        wide_tile(some, a + m, k, depth, panel + n * kDepth, &sums[m * kBlock + n], fetch);
      m += some;
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    const float* at = &sums[m * kBlock];
    int64_t n = first;
    for (; n + kOutputs <= last; n += kOutputs, at += kOutputs) store(m, n, at, std::integral_constant<int, kOutputs>());
    for (; n < last; ++n) store(m, n, at++, std::integral_constant<int, 1>());
  }
}

// store(m, n, values, count) for rows a[0 : rows] and outputs [first, last) of w, at most kBlock of them, `count` of
// them at a time. `ahead` is read next.
template <class T, class Store>
void products(const float* const* a, int64_t rows, const T* w, int64_t stride, int64_t size, int64_t first, int64_t last,
              const T* ahead, Store store) {
  return rows < kManyRows ? few_rows(a, rows, w, stride, size, first, last, ahead, store)
                          : many_rows(a, rows, w, stride, size, first, last, ahead, store);
}

// x[i] = silu(x[i]) * y[i]
inline void swiglu(float* x, const float* y, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Vec gate = load(x + i);
    put(x + i, gate / (1.0f + exp(-gate)) * load(y + i));
  }
  for (; i < size; ++i) x[i] = x[i] / (1.0f + std::exp(-x[i])) * y[i];
}

// work(i) for all i below `count`, on the threads of the pool and this one; returns when all are done.
//
// Each thread begins with a share of its own, whose pieces follow one another, and then takes of the others'. One that
// comes late finds nothing left to do and touches no `work`, which may be gone by then.
template <class Work>
void parallel(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), count));
  struct State {
    std::atomic<int64_t> done{0};
    std::vector<std::atomic<int64_t>> next;
  };
  auto state = std::make_shared<State>();
  state->next = std::vector<std::atomic<int64_t>>(threads);
  for (int64_t t = 0; t < threads; ++t) state->next[t] = count * t / threads;
  auto run = [state, count, threads, &work](int64_t mine) {
    for (int64_t other = 0; other < threads; ++other) {
      const int64_t share = (mine + other) % threads, end = count * (share + 1) / threads;
      for (int64_t i; (i = state->next[share].fetch_add(1)) < end;) {
        work(i);
        state->done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([run, t] { run(t); });
  run(0);
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace native
