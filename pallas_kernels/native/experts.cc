// The routed experts on a CPU: `fused_moe` of few tokens, and rows sorted by group times each group's matrix.

#include <vector>

#include "products.h"

namespace native {
namespace {

int64_t blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

// Rows, sorted by group, and the group's matrix of each piece of them.
struct Groups {
  struct One {
    int64_t matrix;
    size_t first, last;  // of sorted.each
  };
  std::vector<One> each;
  Sorted sorted;

  Groups(int64_t most, int64_t size) : sorted{size} { each.reserve(most), sorted.each.reserve(most); }

  void add(int64_t matrix, const float* at, int64_t count) {
    const size_t first = sorted.each.size();
    sorted.add(at, count);
    if (count > 0) each.push_back({matrix, first, sorted.each.size()});
  }
};

auto on(ffi::ThreadPool& pool) {
  return [&pool](int64_t count, const auto& work) { parallel(pool, count, work); };
}

// out[row] = the group's matrix times the row, or the swiglu of that and what the second matrix gives.
template <class T>
void expand(ffi::ThreadPool& pool, Groups& groups, const T* matrices, const T* second_matrices, int64_t inputs,
            int64_t columns, float* out) {
  const int64_t of_each = blocks(columns);
  groups.sorted.turn_around(on(pool));
  parallel(pool, static_cast<int64_t>(groups.each.size()) * of_each, [&](int64_t i) {
    const Groups::One& one = groups.each[i / of_each];
    const int64_t first = i % of_each * kBlock, count = std::min(kBlock, columns - first);
    const int64_t matrix = (one.matrix * columns + first) * inputs;
    alignas(64) float ups[kMostRows * kBlock];
    for (size_t c = one.first; c < one.last; ++c) {
      const Rows& rows = groups.sorted.each[c];
      float* mine = out + rows.start * columns + first;
      products(rows, matrices + matrix, inputs, inputs, count, mine, columns);
      if (!second_matrices) continue;
      products(rows, second_matrices + matrix, inputs, inputs, count, ups, kBlock);
      for (int64_t m = 0; m < rows.count; ++m) swiglu(mine + m * columns, &ups[m * kBlock], count);
    }
  });
}

// What the router chose, sorted by expert: how many rows each has, and of each row its token and that one's weight.
struct Chosen {
  std::vector<int64_t> sizes, token;
  std::vector<float> share;
};

Chosen by_expert(const int32_t* indices, const float* weights, int64_t count, int64_t top_k, int64_t experts,
                 int64_t offset) {
  Chosen out{std::vector<int64_t>(experts, 0)};
  auto is_here = [&](int64_t i) { return indices[i] >= offset && indices[i] < offset + experts; };
  for (int64_t i = 0; i < count; ++i)
    if (is_here(i)) ++out.sizes[indices[i] - offset];
  std::vector<int64_t> place(experts + 1, 0);
  for (int64_t e = 0; e < experts; ++e) place[e + 1] = place[e] + out.sizes[e];
  out.token.resize(place[experts]), out.share.resize(place[experts]);
  for (int64_t i = 0; i < count; ++i) {
    if (!is_here(i)) continue;
    const int64_t row = place[indices[i] - offset]++;
    out.token[row] = i / top_k, out.share[row] = weights[i];
  }
  return out;
}

template <class T>
ffi::Error fused_moe(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32> x, const T* gate, const T* up, const T* down,
                     int64_t experts, int64_t width, const int32_t* indices, const float* weights, int64_t top_k,
                     int64_t offset, float* out) {
  const int64_t tokens = x.dimensions()[0], dim = x.dimensions()[1];
  const Chosen chosen = by_expert(indices, weights, tokens * top_k, top_k, experts, offset);
  const size_t count = chosen.token.size();
  std::unique_ptr<float[]> in(new float[count * dim]), inner(new float[count * width]);
  for (size_t row = 0; row < count; ++row)
    std::copy_n(x.typed_data() + chosen.token[row] * dim, dim, in.get() + row * dim);
  Groups widening(experts, dim), narrowing(experts, width);
  for (int64_t e = 0; e < experts; ++e) {
    widening.add(e, in.get(), chosen.sizes[e]), narrowing.add(e, inner.get(), chosen.sizes[e]);
  }
  expand(pool, widening, gate, up, dim, width, inner.get());

  narrowing.sorted.turn_around(on(pool));
  parallel(pool, blocks(dim), [&](int64_t i) {
    const int64_t first = i * kBlock, size = std::min(kBlock, dim - first);
    alignas(64) float outs[kMostRows * kBlock];
    for (int64_t t = 0; t < tokens; ++t) std::fill_n(out + t * dim + first, size, 0.0f);
    for (const Groups::One& one : narrowing.each)
      for (size_t c = one.first; c < one.last; ++c) {
        const Rows& rows = narrowing.sorted.each[c];
        products(rows, down + (one.matrix * dim + first) * width, width, width, size, outs, kBlock);
        for (int64_t m = 0; m < rows.count; ++m) {
          const float share = chosen.share[rows.start + m];
          float* sum = out + chosen.token[rows.start + m] * dim + first;
          for (int64_t n = 0; n < size; ++n) sum[n] += share * outs[m * kBlock + n];
        }
      }
  });
  return ffi::Error::Success();
}

// out[row] = rows of group g times matrix g (and the swiglu of it with a second one); zero for rows of no group.
template <class T>
ffi::Error grouped(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32> lhs, const T* matrices, const T* second_matrices,
                   int64_t columns, ffi::Buffer<ffi::S32> sizes, int64_t first_row, float* out) {
  const int64_t rows = lhs.dimensions()[0], inputs = lhs.dimensions()[1], count = sizes.dimensions()[0];
  const int64_t before = std::min(std::max<int64_t>(first_row, 0), rows);
  Groups groups(count, inputs);
  for (int64_t g = 0; g < count; ++g) {
    const int64_t left = rows - before - groups.sorted.rows;
    groups.add(g, lhs.typed_data() + before * inputs, std::min<int64_t>(std::max(sizes.typed_data()[g], 0), left));
  }
  const int64_t end = before + groups.sorted.rows;
  std::fill(out, out + before * columns, 0.0f);
  std::fill(out + end * columns, out + rows * columns, 0.0f);
  expand(pool, groups, matrices, second_matrices, inputs, columns, out + before * columns);
  return ffi::Error::Success();
}

template <class T>
const T* layer_of(const ffi::AnyBuffer& stack, int64_t layer) {
  auto dims = stack.dimensions();  // [L, E, outputs, inputs]
  layer = std::min<int64_t>(std::max<int64_t>(layer, 0), dims[0] - 1);
  return static_cast<const T*>(stack.untyped_data()) + layer * dims[1] * dims[2] * dims[3];
}

ffi::Error fused_moe_of(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer gate, ffi::AnyBuffer up,
                        ffi::AnyBuffer down, ffi::Buffer<ffi::S32> indices, ffi::Buffer<ffi::F32> weights,
                        ffi::Buffer<ffi::S32> places, ffi::ResultBuffer<ffi::F32> out) {
  auto dims = gate.dimensions();
  const int64_t layer = places.typed_data()[0], offset = places.typed_data()[1];
  auto run = [&](auto type) {
    using T = decltype(type);
    return fused_moe<T>(pool, x, layer_of<T>(gate, layer), layer_of<T>(up, layer), layer_of<T>(down, layer), dims[1],
                        dims[2], indices.typed_data(), weights.typed_data(), indices.dimensions()[1], offset,
                        out->typed_data());
  };
  return gate.element_type() == ffi::F32 ? run(float{}) : run(BFloat16{});
}

ffi::Error grouped_of(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> lhs, ffi::AnyBuffer first, ffi::AnyBuffer second,
                      ffi::Buffer<ffi::S32> sizes, ffi::Buffer<ffi::S32> places, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t layer = places.typed_data()[0], first_row = places.typed_data()[1];
  const bool has_second = second.dimensions().size() == 4;
  auto run = [&](auto type) {
    using T = decltype(type);
    return grouped<T>(pool, lhs, layer_of<T>(first, layer), has_second ? layer_of<T>(second, layer) : nullptr,
                      first.dimensions()[2], sizes, first_row, out->typed_data());
  };
  return first.element_type() == ffi::F32 ? run(float{}) : run(BFloat16{});
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(glm45_fused_moe, native::fused_moe_of,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(glm45_grouped, native::grouped_of,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
