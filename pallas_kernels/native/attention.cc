// Paged attention on a CPU: new tokens written into their pages, then each attends over the pages of its row.

#include <limits>
#include <vector>

#include "products.h"

namespace native {
namespace {

constexpr int64_t kTokens = 8;    // of a piece of work
constexpr int64_t kChunk = 256;   // positions whose scores are held at a time, at least
constexpr int kQueries = 4, kWide = 4;  // a tile of the sum over values: queries times vectors

inline void narrow(const float* from, float* to, int64_t size) { std::memcpy(to, from, size * sizeof(float)); }
inline void narrow(const float* from, BFloat16* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i].bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// Where everything lies. T is what the pages hold.
template <class T>
struct Batch {
  const float *q, *k, *v;
  T* pages;  // of the layer: [num_pages, kv_heads, page_size, 2 dim]
  const int32_t *table, *lengths, *starts;
  int64_t tokens, heads, kv_heads, dim, num_pages, page_size, rows, width;
  float scale;
  float* out;

  T* at(int64_t row, int64_t head, int64_t position) const {
    int64_t page = table[row * width + std::min(position / page_size, width - 1)];
    page = std::min<int64_t>(std::max<int64_t>(page, 0), num_pages - 1);
    return pages + ((page * kv_heads + head) * page_size + position % page_size) * 2 * dim;
  }
};

struct Piece {
  int64_t row, first, tokens, position;
};

template <class T>
std::vector<Piece> write_and_cut(const Batch<T>& b) {
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < b.rows; ++row) {
    const int64_t first = b.starts[row], last = std::min<int64_t>(b.starts[row + 1], b.tokens);
    for (int64_t i = first; i < last; ++i) {
      const int64_t position = b.lengths[row] - b.starts[row + 1] + i;
      if (position < 0 || position >= b.width * b.page_size) continue;
      for (int64_t head = 0; head < b.kv_heads; ++head) {
        T* to = b.at(row, head, position);
        narrow(b.k + (i * b.kv_heads + head) * b.dim, to, b.dim);
        narrow(b.v + (i * b.kv_heads + head) * b.dim, to + b.dim, b.dim);
      }
    }
    for (int64_t i = first; i < last; i += kTokens)
      pieces.push_back({row, i, std::min(kTokens, last - i), b.lengths[row] - b.starts[row + 1] + i});
  }
  return pieces;
}

// out[m][d] += sum over s of weights[m][s] values[s][d], of M queries and N vectors' worth of d.
template <int M, int N, class T>
inline void add_values(const float* weights, int64_t stride, const T* values, int64_t step, int64_t size, float* out,
                       int64_t dim) {
  Vec sums[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = load(out + m * dim + n * kLanes);
  for (int64_t s = 0; s < size; ++s) {
    Vec v[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) v[n] = load(values + s * step + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec weight = Vec{} + weights[m * stride + s];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] += weight * v[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) put(out + m * dim + n * kLanes, sums[m][n]);
}

template <int M, class T>
void add_values(const float* weights, int64_t stride, const T* values, int64_t step, int64_t size, float* out,
                int64_t dim) {
  int64_t d = 0;
  for (; d + kWide * kLanes <= dim; d += kWide * kLanes)
    add_values<M, kWide>(weights, stride, values + d, step, size, out + d, dim);
  for (; d + kLanes <= dim; d += kLanes) add_values<M, 1>(weights, stride, values + d, step, size, out + d, dim);
  for (; d < dim; ++d)
    for (int m = 0; m < M; ++m)
      for (int64_t s = 0; s < size; ++s) out[m * dim + d] += weights[m * stride + s] * wide(values[s * step + d]);
}

// Turns the scores of one query into weights; what was summed before is made smaller where the highest has grown.
inline void soften(float* scores, int64_t size, int64_t seen, float* highest, float* total, float* out, int64_t dim) {
  seen = std::max<int64_t>(std::min(seen, size), 0);
  float now = *highest;
  for (int64_t s = 0; s < seen; ++s) now = std::max(now, scores[s]);
  if (now > *highest) {
    const float less = std::exp(*highest - now);
    *total *= less;
    for (int64_t d = 0; d < dim; ++d) out[d] *= less;
    *highest = now;
  }
  int64_t s = 0;
  Vec sums = {};
  for (; s + kLanes <= seen; s += kLanes) {
    const Vec weight = exp(load(scores + s) - now);
    put(scores + s, weight);
    sums += weight;
  }
  for (int i = 0; i < kLanes; ++i) *total += sums[i];
  for (; s < seen; ++s) *total += scores[s] = std::exp(scores[s] - now);
  for (; s < size; ++s) scores[s] = 0;
}

template <class T>
void attend(const Batch<T>& b, const Piece& piece, int64_t head) {
  const int64_t group = b.heads / b.kv_heads, queries = piece.tokens * group, dim = b.dim;
  const int64_t end = std::min(piece.position + piece.tokens, b.width * b.page_size);
  const int64_t chunk = (kChunk + b.page_size - 1) / b.page_size * b.page_size;
  std::vector<float> scaled(queries * dim), scores(queries * chunk), sums(queries * dim, 0.0f), totals(queries, 0.0f);
  std::vector<float> highest(queries, -std::numeric_limits<float>::infinity());
  for (int64_t m = 0; m < queries; ++m) {
    const float* from = b.q + ((piece.first + m / group) * b.heads + head * group + m % group) * dim;
    for (int64_t d = 0; d < dim; ++d) scaled[m * dim + d] = from[d] * b.scale;
  }
  Sorted sorted{dim};
  sorted.add(scaled.data(), queries);
  sorted.turn_around([](int64_t count, auto work) {
    for (int64_t i = 0; i < count; ++i) work(i);
  });
  for (int64_t from = 0; from < end; from += chunk) {
    const int64_t size = std::min(chunk, end - from);
    for (int64_t p = 0; p < size; p += b.page_size)
      for (const Rows& some : sorted.each)
        products(some, b.at(piece.row, head, from + p), 2 * dim, dim, std::min(b.page_size, size - p),
                 &scores[some.start * chunk + p], chunk);
    for (int64_t m = 0; m < queries; ++m)
      soften(&scores[m * chunk], size, piece.position + m / group + 1 - from, &highest[m], &totals[m], &sums[m * dim],
             dim);
    for (int64_t p = 0; p < size; p += b.page_size) {
      const T* values = b.at(piece.row, head, from + p) + dim;
      const int64_t count = std::min(b.page_size, size - p);
      int64_t m = 0;
      for (; m + kQueries <= queries; m += kQueries)
        add_values<kQueries>(&scores[m * chunk + p], chunk, values, 2 * dim, count, &sums[m * dim], dim);
      for (; m < queries; ++m) add_values<1>(&scores[m * chunk + p], chunk, values, 2 * dim, count, &sums[m * dim], dim);
    }
  }
  for (int64_t m = 0; m < queries; ++m) {
    if (piece.position + m / group < 0) continue;
    float* to = b.out + ((piece.first + m / group) * b.heads + head * group + m % group) * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = sums[m * dim + d] / totals[m];
  }
}

ffi::Error paged_attention_of(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                              ffi::Buffer<ffi::F32> v, ffi::AnyBuffer pages, ffi::Buffer<ffi::S32> table,
                              ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> layer,
                              ffi::ResultBuffer<ffi::F32> out, ffi::Result<ffi::AnyBuffer> new_pages, float scale) {
  auto run = [&](auto type) {
    using T = decltype(type);
    auto dims = pages.dimensions();  // [L, num_pages, kv_heads, page_size, 2 dim]
    T* to = static_cast<T*>(new_pages->untyped_data());
    if (to != pages.untyped_data()) std::memcpy(to, pages.untyped_data(), pages.size_bytes());
    const int64_t which = std::min<int64_t>(std::max(layer.typed_data()[0], 0), dims[0] - 1);
    Batch<T> batch{q.typed_data(), k.typed_data(), v.typed_data(),
                   to + which * dims[1] * dims[2] * dims[3] * dims[4],
                   table.typed_data(), lengths.typed_data(), starts.typed_data(),
                   q.dimensions()[0], q.dimensions()[1], dims[2], q.dimensions()[2], dims[1], dims[3],
                   lengths.dimensions()[0], table.dimensions()[1], scale, out->typed_data()};
    std::fill(batch.out, batch.out + q.element_count(), 0.0f);
    const std::vector<Piece> pieces = write_and_cut(batch);
    parallel(pool, static_cast<int64_t>(pieces.size()) * batch.kv_heads,
             [&](int64_t i) { attend(batch, pieces[i / batch.kv_heads], i % batch.kv_heads); });
  };
  if (pages.element_type() == ffi::F32)
    run(float{});
  else
    run(BFloat16{});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(glm45_paged_attention, native::paged_attention_of,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale"));
