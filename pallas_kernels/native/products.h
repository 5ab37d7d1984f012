// Products of few or many rows with weights that lie row-major as [outputs, inputs], read once where they lie.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace native {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 64;     // outputs of a piece of work
constexpr int64_t kManyRows = 20;  // from which to turn them around pays
static_assert(kManyRows > kLanes, "many rows are two vectors at least");
constexpr int64_t kMostRows = std::max<int64_t>(3 * kLanes, kManyRows - 1);  // of a `Rows`

// Rows that are multiplied by the same matrix, at most kMostRows, one behind the other.
struct Rows {
  const float* at;
  int64_t count, start;  // start: the first one's place among those of all groups
  int64_t place;         // among the vectors of all that are turned around, or -1
  Vec* turned;           // [size][vectors()], or null

  int64_t vectors() const { return (count + kLanes - 1) / kLanes; }
};

// turned[k][v] = element k of each row, a row in each lane; lanes of no row are zero.
void turn_around(const Rows& rows, int64_t size);

// Rows of several groups, cut as products take them: the many of a group in twos and threes of vectors.
struct Sorted {
  int64_t size;  // of a row
  std::vector<Rows> each;
  int64_t rows = 0, vectors = 0;
  std::unique_ptr<Vec[]> turned;

  // The next `count` of the rows `at`, one group's.
  void add(const float* at, int64_t count) {
    if (count < kManyRows) {
      if (count > 0) each.push_back({at + rows * size, count, rows, -1, nullptr});
    } else {
      const int64_t all = (count + kLanes - 1) / kLanes, parts = (all + 2) / 3;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = all * part / parts, to = all * (part + 1) / parts, first = from * kLanes;
        const int64_t some = std::min(to * kLanes, count) - first;
        each.push_back({at + (rows + first) * size, some, rows + first, vectors + from, nullptr});
      }
      vectors += all;
    }
    rows += count;
  }

  // To be called before the products, when all are there; run(n, work) does work(i) for all i below n.
  template <class Run>
  void turn_around(Run run) {
    if (vectors == 0) return;
    turned.reset(new Vec[vectors * size]);
    for (Rows& one : each) one.turned = one.place < 0 ? nullptr : turned.get() + one.place * size;
    run(static_cast<int64_t>(each.size()), [&](int64_t i) {
      if (each[i].turned) native::turn_around(each[i], size);
    });
  }
};

// out[m * out_stride + n] = row m times output n of w, for all rows and the first `count` outputs, which lie `stride`
// apart. T: float or BFloat16.
template <class T>
void products(const Rows& a, const T* w, int64_t stride, int64_t size, int64_t count, float* out, int64_t out_stride);

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
