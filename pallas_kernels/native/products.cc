// Both operands are contiguous along the contraction. Few rows need nothing packed: a tile of rows times a tile of
// outputs is kept in registers while one goes along both, and summed over its lanes. Many rows are turned around once,
// so that a vector's lanes are rows; a weight is then a factor of whole vectors, and nothing is done to the weights.

#include "products.h"

#include <type_traits>

namespace native {
namespace {

// A tile's sums fill the registers, but for a few. Of few rows it has up to kRows and kSums of rows times outputs; of
// many, up to three vectors of rows times kWide outputs.
#if defined(__AVX512F__)
constexpr int kRows = 6, kSums = 24, kWide = 8;
#else
constexpr int kRows = 3, kSums = 12, kWide = 4;
#endif
constexpr int64_t kPage = 4096;  // bytes; a processor's prefetch follows one row of weights in each
constexpr int64_t kDepth = 64;   // inputs of as many bfloat16 weights as are made float32 at once

// Up to eight rows, `apart` from one another, along which one goes together. Two pointers and two distances stand for
// all: a pointer for each would be more than there are registers for. The `asm` keep a compiler from making them.
template <class T>
struct Along {
  const T *low, *high;
  int64_t apart, thrice;

  Along(const T* first, int64_t apart) : low(first), high(first + 4 * apart), apart(apart), thrice(3 * apart) {
    asm("" : "+r"(thrice));
  }
  const T* operator[](int i) const { return (i < 4 ? low : high) + (i % 4 == 3 ? thrice : i % 4 * apart); }
  void step(int64_t by) {
    low += by, high += by;
    asm("" : "+r"(low));
    asm("" : "+r"(high));
  }
};

// run(n, step, N) for tiles of the outputs n, n + step, ..., N of them or, of what is left, fewer; each of `count` is in
// one. The weights of an output have `bytes`, and those of a tile lie a page apart where there are enough of them.
template <int N, class Run>
void in_tiles(int64_t count, int64_t bytes, Run run, int64_t n = 0) {
  while (count - n >= N) {
    const int64_t step = std::min(kPage / std::clamp<int64_t>(bytes, 1, kPage), (count - n) / N);
    for (int64_t i = 0; i < step; ++i) run(n + i, step, std::integral_constant<int, N>());
    n += step * N;
  }
  if constexpr (N > 1) in_tiles<(N > 4 ? 4 : 1)>(count, bytes, run, n);
}

// M rows times N outputs, `step` apart: out[m * out_stride + n * step] = sum over k of a[m * size + k] w[n * stride + k].
template <int M, int N, class T>
__attribute__((noinline)) void tile(const float* a, int64_t size, const T* w, int64_t stride, float* out,
                                    int64_t out_stride, int64_t step) {
  static_assert(M <= 8 && N <= 8, "as many as Along has");
  Vec totals[M][N] = {};
  Along<float> rows(a, size);
  Along<T> weights(w, stride);
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    Vec b[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) b[n] = load(weights[n]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = load(rows[m]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) totals[m][n] += x * b[n];
    }
    rows.step(kLanes), weights.step(kLanes);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m, a += size, out += out_stride) {
#pragma GCC unroll 8
    for (int first = 0; first < N; first += 4) {
      Vec four[4] = {};
#pragma GCC unroll 8
      for (int n = first; n < std::min(first + 4, N); ++n) four[n - first] = totals[m][n];
      const Four sum = sums(four);
      for (int n = first; n < std::min(first + 4, N); ++n) out[n * step] = sum[n - first];
    }
    for (int64_t i = k; i < size; ++i)
      for (int n = 0; n < N; ++n) out[n * step] += a[i] * wide(w[n * stride + i]);
  }
}

// All rows, in `tiles` of M and M - 1, go along a tile of outputs before the next.
template <int M, class T>
void few_rows(const Rows& a, int64_t tiles, const T* w, int64_t stride, int64_t size, int64_t count, float* out,
              int64_t out_stride) {
  in_tiles<std::min(8, kSums / M)>(count, stride * sizeof(T), [&](int64_t n, int64_t step, auto outputs) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = a.count * t / tiles, some = a.count * (t + 1) / tiles - m;
      const auto run = some == M ? tile<M, outputs, T> : tile<std::max(M - 1, 1), outputs, T>;
      run(a.at + m * size, size, w + n * stride, step * stride, out + m * out_stride + n, out_stride, step);
    }
  });
}

// run(n) with n, from 1 to N, as a constant.
template <int N, class Run>
void with_constant(int64_t n, Run run) {
  if constexpr (N > 1)
    if (n < N) return with_constant<N - 1>(n, run);
  run(std::integral_constant<int, N>());
}

void widen(const BFloat16* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) put(to + i, load(from + i));
  for (; i < size; ++i) to[i] = wide(from[i]);
}

// totals[n][v] += sum over k of turned[k][v] w[n * stride + k].
template <int V, int N>
__attribute__((always_inline)) inline void accumulate(const Vec* turned, const float* w, int64_t stride, int64_t size,
                                                      Vec (&totals)[N][V]) {
  Along<float> weights(w, stride);
  auto add = [&](int k) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec weight = weights[n][k] - Vec{};  // in every lane
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) totals[n][v] += weight * turned[k * V + v];
    }
  };
  for (; size >= 2; size -= 2) {
    add(0);
    add(1);
    turned += 2 * V, weights.step(2);
  }
  if (size) add(0);
}

// V vectors of rows times N outputs, `step` apart: out[n * step][v] = sum over k of turned[k][v] w[n * stride + k].
template <int V, int N, class T>
__attribute__((noinline)) void wide_tile(const Vec* turned, const T* w, int64_t stride, int64_t size, Vec (*out)[V],
                                         int64_t step) {
  Vec totals[N][V] = {};
  if constexpr (std::is_same_v<T, float>) {
    accumulate(turned, w, stride, size, totals);
  } else {
    alignas(64) float widened[N * kDepth];
    for (int64_t k = 0; k < size; k += kDepth, turned += kDepth * V) {
      const int64_t depth = std::min(kDepth, size - k);
      for (int n = 0; n < N; ++n) widen(w + n * stride + k, depth, widened + n * kDepth);
      accumulate(turned, widened, kDepth, depth, totals);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out[n * step][v] = totals[n][v];
}

template <int V, class T>
void many_rows(const Rows& a, const T* w, int64_t stride, int64_t size, int64_t count, float* out, int64_t out_stride) {
  Vec outs[kBlock][V];
  for (int64_t block = 0; block < count; block += kBlock, w += kBlock * stride, out += kBlock) {
    const int64_t some = std::min(kBlock, count - block);
    in_tiles<kWide>(some, stride * sizeof(T), [&](int64_t n, int64_t step, auto outputs) {
      wide_tile<V, outputs>(a.turned, w + n * stride, step * stride, size, outs + n, step);
    });
    int64_t n = 0;
    for (; n + 4 <= some; n += 4)
      for (int v = 0; v < V; ++v) {
        Vec x[4] = {outs[n][v], outs[n + 1][v], outs[n + 2][v], outs[n + 3][v]};
        transpose_squares(x);
        for (int64_t i = 0, m = v * kLanes; i < kLanes && m < a.count; ++i, ++m)
          std::memcpy(out + m * out_stride + n, reinterpret_cast<const float*>(&x[i % 4]) + i / 4 * 4, sizeof(Four));
      }
    for (; n < some; ++n)
      for (int64_t m = 0; m < a.count; ++m) out[m * out_stride + n] = outs[n][m / kLanes][m % kLanes];
  }
}

}  // namespace

void turn_around(const Rows& rows, int64_t size) {
  const std::vector<float> none(size);
  for (int64_t v = 0, vectors = rows.vectors(); v < vectors; ++v) {
    const float* from[kLanes];
    for (int64_t i = 0, m = v * kLanes; i < kLanes; ++i, ++m) from[i] = m < rows.count ? rows.at + m * size : none.data();
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

template <class T>
void products(const Rows& a, const T* w, int64_t stride, int64_t size, int64_t count, float* out, int64_t out_stride) {
  if (a.turned) {
    return a.vectors() == 2 ? many_rows<2>(a, w, stride, size, count, out, out_stride)
                            : many_rows<3>(a, w, stride, size, count, out, out_stride);
  }
  const int64_t tiles = (a.count + kRows - 1) / kRows;
  with_constant<kRows>((a.count + tiles - 1) / tiles, [&](auto most) {
    few_rows<most>(a, tiles, w, stride, size, count, out, out_stride);
  });
}

template void products(const Rows&, const float*, int64_t, int64_t, int64_t, float*, int64_t);
template void products(const Rows&, const BFloat16*, int64_t, int64_t, int64_t, float*, int64_t);

}  // namespace native
