// Products of few or many rows with weights that lie row-major as [outputs, inputs], read once where they lie.
//
// Both operands are contiguous along the contraction. Few rows need nothing packed: a tile of rows times a tile of
// outputs is kept in registers while one goes along both, and summed over its lanes. Many rows are turned around once,
// so that a vector's lanes are rows; a weight is then a factor of whole vectors, and nothing is done to the weights.
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
constexpr int kLanes = 16, kRows = 6, kWide = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 3, kWide = 4;
#else
constexpr int kLanes = 4, kRows = 4, kWide = 4;
#endif
constexpr int kOutputs = 4;  // of a tile of kRows rows; one of many rows has kWide
constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int64_t kPage = 4096;  // bytes along which processors fetch ahead well enough by themselves
constexpr int64_t kBlock = 64;  // outputs of a piece of work
constexpr int64_t kDepth = 64;  // inputs of as many bfloat16 weights as are made float32 at once
constexpr int64_t kManyRows = 20;  // from which to turn them around pays
static_assert(kManyRows > kLanes, "many rows are two vectors at least");
constexpr int64_t kMostRows = std::max<int64_t>(3 * kLanes, kManyRows - 1);  // of a `Rows`

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

// `count` rows of weights, which lie one behind the other, a line at each step; nothing where there are none.
template <class T>
Fetch rows_of(const T* first, int64_t count, int64_t stride) {
  const char* begin = reinterpret_cast<const char*>(first);
  return {begin, first ? begin + count * stride * static_cast<int64_t>(sizeof(T)) : begin, kLine};
}

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

// All rows go along a tile of outputs before the next, whose weights are fetched meanwhile; `ahead` comes after the
// last.
template <class T, class Store>
void few_rows(const float* const* a, int64_t rows, const T* w, int64_t stride, int64_t size, int64_t first, int64_t last,
              const T* ahead, Store store) {
  float out[kRows][kOutputs];
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t n = first, outputs; n < last; n += outputs) {
    outputs = last - n >= kOutputs ? kOutputs : 1;
    Fetch fetch = rows_of(n + outputs < last ? w + (n + outputs) * stride : ahead, outputs, stride);
    fetch.bytes = std::max<int64_t>(kLine, outputs * kLanes * sizeof(T) / tiles);
    if (stride * sizeof(T) >= kPage) fetch.at = fetch.end;
    for (int64_t t = 0, m = 0; t < tiles; ++t) {
      const int some = static_cast<int>((rows - m + tiles - t - 1) / (tiles - t));
      if (outputs == 1) {
        tile<1>(some, a + m, w + n * stride, stride, size, fetch, out);
        for (int i = 0; i < some; ++i) store(m + i, n, out[i], std::integral_constant<int, 1>());
      } else {
        tile<kOutputs>(some, a + m, w + n * stride, stride, size, fetch, out);
        for (int i = 0; i < some; ++i) store(m + i, n, out[i], std::integral_constant<int, kOutputs>());
      }
      m += some;
    }
  }
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

// Rows that are multiplied by the same matrix, at most kMostRows.
struct Rows {
  const float* const* at;
  int64_t count, start;  // start: the first one's place among those of all groups
  int64_t place;         // among the vectors of all that are turned around, or -1
  Vec* turned;           // [size][vectors()], or null

  int64_t vectors() const { return (count + kLanes - 1) / kLanes; }
};

// turned[k][v] = element k of each row, a row in each lane; lanes of no row are zero.
inline void turn_around(const Rows& rows, int64_t size) {
  const std::vector<float> none(size);
  for (int64_t v = 0, vectors = rows.vectors(); v < vectors; ++v) {
    const float* from[kLanes];
    for (int64_t i = 0, m = v * kLanes; i < kLanes; ++i, ++m) from[i] = m < rows.count ? rows.at[m] : none.data();
    int64_t k = 0;
    for (; k + 4 <= size; k += 4) {
      Vec x[4];
      for (int j = 0; j < 4; ++j) x[j] = quads(from + j, k);
      transpose_squares(x);
      for (int j = 0; j < 4; ++j) rows.turned[(k + j) * vectors + v] = x[j];
    }
    for (; k < size; ++k)
      for (int i = 0; i < kLanes; ++i) rows.turned[k * vectors + v][i] = from[i][k];
  }
}

// Rows of several groups, cut as products take them: the many of a group in twos and threes of vectors.
struct Sorted {
  std::vector<Rows> each;
  int64_t rows = 0, vectors = 0;
  std::unique_ptr<Vec[]> turned;

  // The next `count` of the rows `at`, one group's.
  void add(const float* const* at, int64_t count) {
    if (count < kManyRows) {
      if (count > 0) each.push_back({at + rows, count, rows, -1, nullptr});
    } else {
      const int64_t all = (count + kLanes - 1) / kLanes, parts = (all + 2) / 3;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = all * part / parts, to = all * (part + 1) / parts, first = from * kLanes;
        const int64_t size = std::min(to * kLanes, count) - first;
        each.push_back({at + rows + first, size, rows + first, vectors + from, nullptr});
      }
      vectors += all;
    }
    rows += count;
  }

  // To be called before the products, when all are there. Rows have `size` elements; run(n, work) does work(i) for all
  // i below n.
  template <class Run>
  void turn_around(int64_t size, Run run) {
    if (vectors == 0) return;
    turned.reset(new Vec[vectors * size]);
    for (Rows& one : each) one.turned = one.place < 0 ? nullptr : turned.get() + one.place * size;
    run(static_cast<int64_t>(each.size()), [&](int64_t i) {
      if (each[i].turned) native::turn_around(each[i], size);
    });
  }
};

inline void widen(const BFloat16* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) put(to + i, load(from + i));
  for (; i < size; ++i) to[i] = wide(from[i]);
}

// V vectors of rows times N outputs: out[n][v] = sum over k of turned[k][v] w[n * stride + k].
template <int V, int N, class T>
__attribute__((noinline)) void wide_tile(const Vec* turned, const T* w, int64_t stride, int64_t size, Fetch& fetch,
                                         Vec (*out)[V]) {
  Vec totals[N][V] = {};
  auto add = [&](const float* at, int64_t apart) __attribute__((always_inline)) {
    Vec x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = turned[v];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec weight = at[n * apart] - Vec{};  // in every lane
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) totals[n][v] += weight * x[v];
    }
    turned += V;
  };
  auto add_all = [&](const float* at, int64_t apart, int64_t count) __attribute__((always_inline)) {
    int64_t k = 0;
    for (; k + 2 <= count; k += 2) {
      fetch.step();
      add(at + k, apart);
      add(at + k + 1, apart);
    }
    if (k < count) add(at + k, apart);
  };
  if constexpr (std::is_same_v<T, float>) {
    add_all(w, stride, size);
  } else {
    alignas(64) float widened[N * kDepth];
    for (int64_t k = 0; k < size; k += kDepth) {
      const int64_t depth = std::min(kDepth, size - k);
      for (int n = 0; n < N; ++n) widen(w + n * stride + k, depth, widened + n * kDepth);
      add_all(widened, kDepth, depth);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v) out[n][v] = totals[n][v];
}

// Four outputs of vector v of the rows.
template <int V, class Store>
inline void store_squares(const Vec (*out)[V], int v, int64_t rows, int64_t n, Store store) {
  Vec x[4] = {out[0][v], out[1][v], out[2][v], out[3][v]};
  transpose_squares(x);
  for (int i = 0; i < kLanes; i += 4)
    for (int j = 0; j < 4; ++j) {
      const int64_t m = v * kLanes + i + j;
      if (m < rows) store(m, n, reinterpret_cast<const float*>(&x[j]) + i, std::integral_constant<int, 4>());
    }
}

// While one tile of outputs is computed with, the next one's weights are fetched.
template <int V, class T, class Store>
void many_rows(const Rows& a, const T* w, int64_t stride, int64_t size, int64_t first, int64_t last, const T* ahead,
               Store store) {
  Vec out[kWide][V];
  for (int64_t n = first; n < last;) {
    const int outputs = last - n >= kWide ? kWide : 1;
    Fetch fetch = rows_of(n + outputs < last ? w + (n + outputs) * stride : ahead, outputs, stride);
    if (outputs == 1) {
      wide_tile<V, 1>(a.turned, w + n * stride, stride, size, fetch, out);
      for (int64_t m = 0; m < a.count; ++m) {
        const float x = out[0][m / kLanes][m % kLanes];
        store(m, n, &x, std::integral_constant<int, 1>());
      }
    } else {
      wide_tile<V, kWide>(a.turned, w + n * stride, stride, size, fetch, out);
      for (int v = 0; v < V; ++v)
        for (int64_t part = 0; part < kWide; part += 4) store_squares(out + part, v, a.count, n + part, store);
    }
    n += outputs;
  }
}

// store(m, n, values, count) for the rows and outputs [first, last) of w, `count` outputs at a time. `ahead` is read
// next.
template <class T, class Store>
void products(const Rows& a, const T* w, int64_t stride, int64_t size, int64_t first, int64_t last, const T* ahead,
              Store store) {
  if (!a.turned) return few_rows(a.at, a.count, w, stride, size, first, last, ahead, store);
  return a.vectors() == 2 ? many_rows<2>(a, w, stride, size, first, last, ahead, store)
                          : many_rows<3>(a, w, stride, size, first, last, ahead, store);
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
