// The routed experts on a CPU: `fused_moe` of few tokens, and rows sorted by group times each group's matrix.

#include <vector>

#include "products.h"

namespace native {
namespace {

constexpr int64_t kPanel = 384;  // rows of a piece at a time: a quarter of the second cache

template <int count>
void put(float* at, const float* x) {
  std::memcpy(at, x, count * sizeof(float));
}

int64_t blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

// One expert's rows: the tokens they come from and their weights.
struct Chosen {
  int64_t expert, first, rows;
};

template <class T>
ffi::Error fused_moe(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32> x, const T* gate, const T* up, const T* down,
                     int64_t experts, int64_t width, const int32_t* indices, const float* weights, int64_t top_k,
                     int64_t offset, float* out) {
  const int64_t tokens = x.dimensions()[0], dim = x.dimensions()[1];
  std::vector<int64_t> place(experts + 1, 0);
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    int64_t expert = indices[i] - offset;
    if (expert >= 0 && expert < experts) ++place[expert + 1];
  }
  std::vector<Chosen> chosen;
  for (int64_t e = 0; e < experts; ++e) {
    if (place[e + 1] > 0) chosen.push_back({e, place[e], place[e + 1]});
    place[e + 1] += place[e];
  }
  const int64_t rows = place[experts];
  std::vector<int64_t> token(rows);
  std::vector<float> share(rows);
  std::vector<const float*> in(rows), hidden(rows);
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    int64_t expert = indices[i] - offset;
    if (expert < 0 || expert >= experts) continue;
    int64_t row = place[expert]++;
    token[row] = i / top_k, share[row] = weights[i];
    in[row] = x.typed_data() + token[row] * dim;
  }
  std::unique_ptr<float[]> inner(new float[rows * width]);
  for (int64_t row = 0; row < rows; ++row) hidden[row] = inner.get() + row * width;

  const int64_t inner_blocks = blocks(width), pieces = static_cast<int64_t>(chosen.size()) * inner_blocks;
  auto piece_of = [&](const T* matrices, int64_t i) {
    return i < pieces ? matrices + (chosen[i / inner_blocks].expert * width + i % inner_blocks * kBlock) * dim : nullptr;
  };
  parallel(pool, pieces, [&](int64_t i) {
    const Chosen& one = chosen[i / inner_blocks];
    const int64_t first = i % inner_blocks * kBlock, last = std::min(first + kBlock, width), size = last - first;
    std::vector<float> ups(one.rows * kBlock);
    float* mine = inner.get() + one.first * width;
    const int64_t matrix = one.expert * width * dim;
    products(&in[one.first], one.rows, gate + matrix, dim, dim, first, last, piece_of(up, i),
             [&](int64_t m, int64_t n, const float* x, auto count) { put<count>(mine + m * width + n, x); });
    products(&in[one.first], one.rows, up + matrix, dim, dim, first, last, piece_of(gate, i + 1),
             [&](int64_t m, int64_t n, const float* x, auto count) { put<count>(&ups[m * kBlock + n - first], x); });
    for (int64_t m = 0; m < one.rows; ++m) {
      float* at = mine + m * width + first;
      swiglu(at, &ups[m * kBlock], size);
      for (int64_t n = 0; n < size; ++n) at[n] *= share[one.first + m];
    }
  });
  parallel(pool, blocks(dim), [&](int64_t i) {
    const int64_t first = i * kBlock, last = std::min(first + kBlock, dim);
    for (int64_t t = 0; t < tokens; ++t) std::fill(out + t * dim + first, out + t * dim + last, 0.0f);
    for (size_t c = 0; c < chosen.size(); ++c) {
      const Chosen& one = chosen[c];
      const T* after = c + 1 < chosen.size() ? down + (chosen[c + 1].expert * dim + first) * width : nullptr;
      products(&hidden[one.first], one.rows, down + one.expert * width * dim, width, width, first, last, after,
               [&](int64_t m, int64_t n, const float* x, auto count) {
                 float* sum = out + token[one.first + m] * dim + n;
                 for (int i = 0; i < count; ++i) sum[i] += x[i];
               });
    }
  });
  return ffi::Error::Success();
}

// out[row] = rows of group g times matrix g (and the swiglu of it with a second one); zero for rows of no group.
template <class T>
ffi::Error grouped(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32> lhs, const T* first_matrices, const T* second_matrices,
                   int64_t columns, ffi::Buffer<ffi::S32> sizes, int64_t first_row, float* out) {
  const int64_t rows = lhs.dimensions()[0], inputs = lhs.dimensions()[1], groups = sizes.dimensions()[0];
  std::vector<const float*> in(rows);
  for (int64_t row = 0; row < rows; ++row) in[row] = lhs.typed_data() + row * inputs;
  std::vector<Chosen> chosen;
  int64_t at = std::min(std::max<int64_t>(first_row, 0), rows);
  std::fill(out, out + at * columns, 0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    int64_t size = std::min<int64_t>(sizes.typed_data()[g], rows - at);
    if (size > 0) chosen.push_back({g, at, size}), at += size;
  }
  std::fill(out + at * columns, out + rows * columns, 0.0f);

  const int64_t of_each = blocks(columns), pieces = static_cast<int64_t>(chosen.size()) * of_each;
  auto piece_of = [&](const T* matrices, int64_t i) {
    return i < pieces ? matrices + (chosen[i / of_each].expert * columns + i % of_each * kBlock) * inputs : nullptr;
  };
  parallel(pool, pieces, [&](int64_t i) {
    const Chosen& one = chosen[i / of_each];
    const int64_t first = i % of_each * kBlock, last = std::min(first + kBlock, columns);
    const int64_t matrix = one.expert * columns * inputs;
    std::vector<float> ups(second_matrices ? std::min(kPanel, one.rows) * kBlock : 0);
    const int64_t panels = (one.rows + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t start = one.first + one.rows * p / panels, count = one.first + one.rows * (p + 1) / panels - start;
      float* mine = out + start * columns;
      const T* after = piece_of(first_matrices, i + 1);
      products(&in[start], count, first_matrices + matrix, inputs, inputs, first, last,
               second_matrices ? piece_of(second_matrices, i) : after,
               [&](int64_t m, int64_t n, const float* x, auto count) { put<count>(mine + m * columns + n, x); });
      if (!second_matrices) continue;
      products(&in[start], count, second_matrices + matrix, inputs, inputs, first, last, after,
               [&](int64_t m, int64_t n, const float* x, auto count) { put<count>(&ups[m * kBlock + n - first], x); });
      for (int64_t m = 0; m < count; ++m) swiglu(mine + m * columns + first, &ups[m * kBlock], last - first);
    }
  });
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
