// The price of the fixed order of sums: the shipped tiles and the shipped cut of an expert beside variants that are
// free.
//
//   bench_fixed_order [rounds]
//
// What a kernel without the promise may do, and ours may not:
//   - add a row's products in as many chains as suit the tile's shape, and the lanes once, at the row's end (ours: one
//     chain for each sum and the lanes after every segment, whatever the shape);
//   - cut an expert for two threads through the sums of wo: each multiplies the hidden rows that it has made itself and
//     the two partial results are added (ours: whole sums, so all hidden rows must be there first: one barrier).
// Experts stream from memory, two threads, each round another expert, the variants turn and turn about; medians.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "kernels/cpu/simd_avx2.h"

#include "kernels/cpu/kernel_tile.h"

using namespace sida;
using namespace sida::cpu;

namespace {

constexpr int64_t d_model = 768, d_ff = 3072, threads = 2;
constexpr int64_t memory_bytes = int64_t(1) << 30;

template <DType dtype, int R, int N>
struct FreeTile {
  using T = Tile<Simd, dtype, R, N>;
  using W = Weights<Simd, dtype>;
  static constexpr bool has_two_chains = R * N <= 6;  // registers for a second set of sums

  [[gnu::noinline]] static void run(const char* w, int64_t row_bytes, int64_t width, const float* x, float* out,
                                    int64_t stride) {
    T even{};
    [[maybe_unused]] T odd{};
    for (int64_t g = 0; g < width / W::group; ++g) {
      for (int r = 0; r < R; ++r) {
        for (int64_t line = 0; line < T::group_bytes; line += 64) {
          __builtin_prefetch(w + (R + r) * row_bytes + line, 0, 2);
        }
      }
      even.template step<0>(w, row_bytes, x);
      if constexpr (has_two_chains) {
        odd.template step<1>(w, row_bytes, x);
      } else {
        even.template step<1>(w, row_bytes, x);
      }
      w += T::group_bytes;
      x += W::group * N;
    }
    if constexpr (has_two_chains) {
      unroll<R * N>([&](auto i) SIDA_INLINE { even.sum[i.value] += odd.sum[i.value]; });
    }
    even.reduce(out, stride, true);
  }
};

template <DType dtype, int N, bool is_fixed>
void project(const char* w, int64_t row_bytes, int64_t rows, int64_t width, const float* x, float* out,
             int64_t stride) {
  constexpr int R = Simd::tile_rows(N);
  for (int64_t row = 0; row + R <= rows; row += R, w += R * row_bytes) {
    if constexpr (is_fixed) {
      Tile<Simd, dtype, R, N>::run(w, row_bytes, width, x, {R * row_bytes, 0, 1}, out + row, stride);
    } else {
      FreeTile<dtype, R, N>::run(w, row_bytes, width, x, out + row, stride);
    }
  }
}

// A thread's part of one expert over a panel of N tokens. The values are not those of a layer, the work is.
struct Expert {
  const char *wi, *wo;
  const float* x;
  float *h, *out;  // [N, d_ff], [threads, N, d_model]
  std::atomic<int>* arrived;
};

template <DType dtype, int N, bool is_fixed, bool is_cut_by_rows>
void compute(const Expert& e, int64_t thread) {
  constexpr int64_t bytes = Weights<Simd, dtype>::bytes, up = d_ff / threads, down = d_model / threads;
  project<dtype, N, is_fixed>(e.wi + thread * up * d_model * bytes, d_model * bytes, up, d_model, e.x,
                              e.h + thread * up, d_ff);
  if constexpr (is_cut_by_rows) {
    ++*e.arrived;
    while (*e.arrived < threads) __builtin_ia32_pause();
    project<dtype, N, is_fixed>(e.wo + thread * down * d_ff * bytes, d_ff * bytes, down, d_ff, e.h,
                                e.out + thread * down, d_model);
  } else {
    project<dtype, N, is_fixed>(e.wo + thread * up * bytes, d_ff * bytes, d_model, up, e.h + thread * up * N,
                                e.out + thread * N * d_model, d_model);
  }
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

template <DType dtype, int N>
void compare(const char* name, const char* memory, int rounds) {
  constexpr int64_t matrix = d_model * d_ff * Weights<Simd, dtype>::bytes;
  const int64_t experts = memory_bytes / (2 * matrix) - 1;  // the last rows' prefetch stays inside
  std::vector<float> x(N * d_model, 0.01f), h(N * d_ff), out(threads * N * d_model);
  std::atomic<int> arrived{0}, ready{0}, done{0};
  std::atomic<int> round{-1};
  const auto part = [&](int i, int64_t thread) {
    const char* const at = memory + i % experts * 2 * matrix;
    const Expert expert{at, at + matrix, x.data(), h.data(), out.data(), &arrived};
    if (i % 3 == 0) return compute<dtype, N, true, true>(expert, thread);
    if (i % 3 == 1) return compute<dtype, N, false, true>(expert, thread);
    compute<dtype, N, false, false>(expert, thread);
  };
  std::thread other([&] {
    for (int i = 0; i < 3 * rounds; ++i) {
      while (round < i) __builtin_ia32_pause();
      part(i, 1);
      ++done;
    }
  });
  std::vector<double> times[3];
  for (int i = 0; i < 3 * rounds; ++i) {
    arrived = 0;
    const double begin = seconds();
    round = i;
    part(i, 0);
    while (done <= i) __builtin_ia32_pause();
    if (i % 3 == 2) {  // the partial results of the free cut
      for (int64_t k = 0; k < N * d_model; ++k) out[k] += out[N * d_model + k];
    }
    times[i % 3].push_back(seconds() - begin);
  }
  other.join();
  const double fixed = median(times[0]), chains = median(times[1]), cut = median(times[2]);
  std::printf("%5s %7d %10.3f %12.3f %14.3f %8.3f\n", name, N, fixed * 1e3, chains * 1e3, cut * 1e3,
              fixed / std::min(chains, cut));
  std::fflush(stdout);
}

template <DType dtype>
void compare_all(const char* name, const char* memory, int rounds) {
  compare<dtype, 1>(name, memory, rounds);
  compare<dtype, 2>(name, memory, rounds);
  compare<dtype, 3>(name, memory, rounds);
  compare<dtype, 4>(name, memory, rounds);
  compare<dtype, 6>(name, memory, rounds);
}

}  // namespace

int main(int argc, char** argv) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::puts("this CPU has no AVX2");
    return 77;
  }
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 201;
  void* const at = mmap(nullptr, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) std::abort();
  madvise(at, memory_bytes, MADV_HUGEPAGE);
  char* const memory = static_cast<char*>(at);
  std::memset(memory, 0x3c, memory_bytes);  // a small normal number in every dtype
  std::printf("one expert %ld x %ld, %ld threads, avx2\n%5s %7s %10s %12s %14s %8s\n", long(d_model), long(d_ff),
              long(threads), "w", "tokens", "fixed, ms", "chains, ms", "and cut, ms", "price");
  compare_all<DType::f32>("f32", memory, rounds);
  compare_all<DType::bf16>("bf16", memory, rounds);
  compare_all<DType::i8>("i8", memory, rounds);
  return 0;
}
