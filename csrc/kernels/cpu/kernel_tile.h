// The tile: dot products of R rows of weights with N tokens, every sum in a vector register.
//
// Batch invariance. The sum of one (row, token) pair is always taken in the same order, whatever R and N are:
//   lane l adds, by fused multiply-adds in ascending order, the products of the elements that the panel's order gives
//   it; after each segment of Simd::segment columns the lanes are added as a fixed tree (Simd::fold, sum_each) and the
//   segments' sums are added in order. Segments keep the error of long rows small, and a tile's tokens in the L1 cache.
// Columns past the end of a row are zero in both operands and change no sum.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace sida::cpu {

// How a group of 2 * lanes weights unfolds into two vectors.
template <class S, DType dtype>
struct Weights {
  static constexpr int64_t group = 2 * S::lanes;
  static constexpr int64_t bytes = dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2;
  // bfloat16 pairs share a 32-bit lane: a shift gives the even elements, a mask the odd ones, and the tokens' panel
  // has them in the same order. One operation for a vector, where widening in natural order takes two.
  static constexpr bool paired = dtype == DType::bf16;

  template <int half>
  [[gnu::always_inline]] static typename S::F unfold(const char* at) {
    if constexpr (paired) {
      using U = typename S::Types::U;
      const U pairs = *reinterpret_cast<const typename S::Types::BitsAnywhere*>(at);
      return bits_as<typename S::F>(half == 0 ? pairs << 16 : S::upper_halves(pairs));
    } else {
      const char* const from = at + half * S::lanes * bytes;
      if constexpr (dtype == DType::f32) return load<S>(from);
      if constexpr (dtype == DType::f16) return S::load_f16(from);
      if constexpr (dtype == DType::i8) return S::load_i8(from);
    }
  }
};

template <class S, DType dtype, int R, int N>
struct Tile {
  using W = Weights<S, dtype>;
  using F = typename S::F;
  static constexpr int64_t group_bytes = W::group * W::bytes;

  F sum[R * N];  // [n * R + r], only ever indexed by constants: a sum in memory would cost its store and load

  template <int half>
  [[gnu::always_inline]] void step(const char* w, int64_t row_bytes, const float* x) {
    // The shorter side is held in registers, the longer one passes by: R * N sums, min(R, N) operands and one more.
    // Left alone, the compiler would load an operand again in each multiply-add, and loads would be what bounds it.
    if constexpr (N <= R) {
      F token[N];
      unroll<N>([&](auto n) SIDA_INLINE { token[n.value] = S::load_held(x + n.value * W::group + half * S::lanes); });
      unroll<R>([&](auto r) SIDA_INLINE {
        const F weight = S::in_register(W::template unfold<half>(w + r.value * row_bytes));
        unroll<N>([&](auto n) SIDA_INLINE { S::accumulate(sum[n.value * R + r.value], weight, token[n.value]); });
      });
    } else {
      F weight[R];
      unroll<R>([&](auto r) SIDA_INLINE {
        weight[r.value] = S::in_register(W::template unfold<half>(w + r.value * row_bytes));
      });
      unroll<N>([&](auto n) SIDA_INLINE {
        const F token = S::load_held(x + n.value * W::group + half * S::lanes);
        unroll<R>([&](auto r) SIDA_INLINE { S::accumulate(sum[n.value * R + r.value], weight[r.value], token); });
      });
    }
  }

  // Adds the lanes of every sum: out[n * stride + r] = or += that.
  [[gnu::always_inline]] void reduce(float* out, int64_t stride, bool first) {
    float flat[(R * N + 3) / 4 * 4];
    unroll<(R * N + 3) / 4>([&](auto quarter) SIDA_INLINE {
      constexpr int last = R * N - 1, i = quarter.value * 4;
      const Float4 four =
          sum_each(S::fold(sum[i]), S::fold(sum[i + 1 < last ? i + 1 : last]),
                   S::fold(sum[i + 2 < last ? i + 2 : last]), S::fold(sum[i + 3 < last ? i + 3 : last]));
      __builtin_memcpy(flat + i, &four, sizeof(four));
    });
    unroll<R * N>([&](auto i) SIDA_INLINE {
      float& to = out[i.value / R * stride + i.value % R];
      to = first ? flat[i.value] : to + flat[i.value];
    });
  }

  // Adds the products of the `groups` whole groups at w and x.
  template <class Prefetch>
  [[gnu::always_inline]] void multiply(const char* w, int64_t row_bytes, const float* x, int64_t groups,
                                       Prefetch prefetch) {
    for (int64_t g = 0; g < groups; ++g) {
      prefetch(w, g);
      step<0>(w, row_bytes, x);
      step<1>(w, row_bytes, x);
      w += group_bytes;
      x += W::group * N;
    }
  }

  // The columns after the last whole group. Never reads past the end of a row. (Nothing here may take the address of
  // `this` out of line: the sums would move from registers to memory for good.)
  [[gnu::always_inline]] void multiply_tail(const char* w, int64_t row_bytes, const float* x, int64_t columns) {
    alignas(64) char tail[R * group_bytes];
    copy_tail(tail, w, row_bytes, columns * W::bytes);
    step<0>(tail, group_bytes, x);
    step<1>(tail, group_bytes, x);
  }

  [[gnu::noinline]] static void copy_tail(char* tail, const char* w, int64_t row_bytes, int64_t bytes) {
    __builtin_memset(tail, 0, R * group_bytes);
    for (int r = 0; r < R; ++r) __builtin_memcpy(tail + r * group_bytes, w + r * row_bytes, bytes);
  }

  // One segment of `width` columns, for tokens of which all tiles pass by while the rows are in the cache. Meanwhile
  // it asks for `lines` cache lines at `next`, weights that will be wanted soon.
  [[gnu::noinline]] static void run_segment(const char* w, int64_t row_bytes, int64_t width, const float* x,
                                            const char* next, int64_t lines, float* out, int64_t stride, bool first) {
    Tile tile{};
    const int64_t groups = width / W::group;
    const int64_t asking = lines < groups ? lines : groups;
    tile.multiply(w, row_bytes, x, asking, [&](const char*, int64_t g) { __builtin_prefetch(next + g * 64, 0, 2); });
    tile.multiply(w + asking * group_bytes, row_bytes, x + asking * W::group * N, groups - asking,
                  [](const char*, int64_t) {});
    const int64_t whole = groups * W::group;
    if (whole < width) tile.multiply_tail(w + whole * W::bytes, row_bytes, x + whole * N, width - whole);
    tile.reduce(out, stride, first);
  }

  // What a tile asks for while it runs: of every `period` groups of columns the one at `phase`, `ahead` bytes on, so
  // that the tiles over the same rows spread their requests over all of their time. ahead 0: nothing.
  struct Ahead {
    int64_t ahead, phase, period;
  };

  // All segments of R rows.
  [[gnu::noinline]] static void run(const char* w, int64_t row_bytes, int64_t width, const float* x, Ahead next,
                                    float* out, int64_t stride) {
    int64_t until = next.phase;
    for (int64_t begin = 0; begin < width; begin += S::segment) {
      const int64_t columns = width - begin < S::segment ? width - begin : S::segment;
      const char* const at = w + begin * W::bytes;
      const float* const token = x + begin * N;
      const int64_t groups = columns / W::group;
      Tile tile{};
      if (next.ahead != 0) {
        tile.multiply(at, row_bytes, token, groups, [&](const char* now, int64_t) {
          if (until-- != 0) return;
          until = next.period - 1;
          uintptr_t wanted = reinterpret_cast<uintptr_t>(now) + next.ahead;
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r, wanted += row_bytes) {
            // From row to row, and the compiler may not know: all rows' offsets, made ahead of the loop, would not fit
            // in the registers.
            asm("" : "+r"(wanted));
#pragma GCC unroll 4
            for (int64_t line = 0; line < group_bytes; line += 64) {
              __builtin_prefetch(reinterpret_cast<const char*>(wanted + line), 0, 2);
            }
          }
        });
      } else {
        tile.multiply(at, row_bytes, token, groups, [](const char*, int64_t) {});
      }
      const int64_t whole = groups * W::group;
      if (whole < columns) tile.multiply_tail(at + whole * W::bytes, row_bytes, token + whole * N, columns - whole);
      tile.reduce(out, stride, begin == 0);
    }
  }
};

}  // namespace sida::cpu
