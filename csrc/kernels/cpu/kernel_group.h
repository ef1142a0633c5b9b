// Rows of int4 and mxfp4 weights: groups of 32 columns that share a scale.
//
// A weight is unfolded to its exact fp32 value, 4 bits times a scale of at most 11, so that a sum is what it is for
// fp32 weights (kernel_tile.h), in the same order: whether rows are multiplied as they unfold (`GroupedRows`, for few
// tokens) or unfolded once for many tiles of tokens (`unfold_rows`) does not show in its bits. Only a value beyond fp32
// differs from its definition: it is infinite.
//
// Simd::unfold_group makes the vectors of a group from its 16 bytes: the elements of each panel group of 2 * lanes
// columns as two vectors, the even ones and the odd ones, as bfloat16 weights unfold.
#pragma once

#include "kernels/cpu/kernel_tile.h"

namespace sida::cpu {

template <class S, DType dtype>
struct Group {
  using F = typename S::F;
  static constexpr int vectors = static_cast<int>(group_columns / S::lanes);
  static constexpr int64_t bytes = group_columns / 2, scale_bytes = group_scale_bytes(dtype);

  // A vector of scales as fp32: int4's, and 2^(e - 127) for each byte e of mxfp4's, NaN for 255. Integers make those,
  // as 2^-127 is denormal.
  [[gnu::always_inline]] static F load_scales(const char* at) {
    if constexpr (dtype == DType::int4) {
      return S::load_f16(at);
    } else {
      using U = typename S::Types::U;
      const U exponent = S::load_u8(at) << 23;
      const U lowest = U{} + 0x00400000u;
      const U power = exponent > lowest ? exponent : lowest;
      return bits_as<F>(power | (bits_as<U>(exponent == 0x7f800000u) & lowest));
    }
  }

  // The scales of `groups` groups as fp32. The last vector ends with them: what it shares with the one before is
  // written twice.
  [[gnu::always_inline]] static void unfold_scales(float* out, const char* scales, int64_t groups) {
    if (groups < S::lanes) {
      char some[scale_bytes * S::lanes] = {};
      alignas(64) float values[S::lanes];
      for (int64_t i = 0; i < scale_bytes * groups; ++i) some[i] = scales[i];
      store<S>(values, load_scales(some));
      for (int64_t g = 0; g < groups; ++g) out[g] = values[g];
      return;
    }
    int64_t g = 0;
    for (; g + S::lanes <= groups; g += S::lanes) store<S>(out + g, load_scales(scales + scale_bytes * g));
    g = groups - S::lanes;
    store<S>(out + g, load_scales(scales + scale_bytes * g));
  }

  [[gnu::always_inline]] static void unfold(F (&weight)[vectors], const char* at, float scale) {
    S::template unfold_group<dtype>(weight, at, scale - F{});  // a difference with zero is the number itself
  }
};

// Sums of R rows with N tokens while the rows unfold.
template <class S, DType dtype, int R, int N>
struct GroupedRows {
  using G = Group<S, dtype>;
  using T = Tile<S, DType::f32, R, N>;
  using F = typename S::F;

  // One segment of `groups` groups. Meanwhile it asks for as many bytes at `next`; null: for nothing.
  [[gnu::noinline]] static void run_segment(const char* w, int64_t row_bytes, const char* scales,
                                            int64_t scale_row_bytes, int64_t groups, const float* x, const char* next,
                                            float* out, int64_t stride, bool first) {
    // Converted once for the segment: a scale in a group's own turn would cost as much as its weights.
    alignas(64) float scale[R][S::segment / group_columns];
    for (int r = 0; r < R; ++r) G::unfold_scales(scale[r], scales + r * scale_row_bytes, groups);
    T tile{};
    const auto step = [&](int64_t g) SIDA_INLINE {
      unroll<R>([&](auto r) SIDA_INLINE {
        F weight[G::vectors];
        G::unfold(weight, w + r.value * row_bytes, scale[r.value][g]);
        unroll<G::vectors / 2>([&](auto pair) SIDA_INLINE {
          unroll<N>([&](auto n) SIDA_INLINE {
            S::accumulate_two(tile.sum[n.value * R + r.value], weight[2 * pair.value], weight[2 * pair.value + 1],
                              x + (pair.value * N + n.value) * 2 * S::lanes);
          });
        });
      });
      w += G::bytes;
      x += group_columns * N;
    };
    // A cache line holds four groups.
    for (int64_t g = 0; g < groups;) {
      if (next != nullptr) {
        for (int r = 0; r < R; ++r, next += 64) __builtin_prefetch(next, 0, 2);
      }
      for (const int64_t end = g + 4 < groups ? g + 4 : groups; g < end; ++g) step(g);
    }
    tile.reduce(out, stride, first);
  }
};

// The weights of `rows` rows, a segment's `groups` groups each, as fp32 in the panel's order: [rows][groups * 32].
template <class S, DType dtype>
[[gnu::noinline]] static void unfold_rows(const char* w, int64_t row_bytes, const char* scales, int64_t scale_row_bytes,
                                          int64_t rows, int64_t groups, float* out) {
  using G = Group<S, dtype>;
  alignas(64) float scale[S::segment / group_columns];
  for (int64_t row = 0; row < rows; ++row, w += row_bytes, scales += scale_row_bytes) {
    G::unfold_scales(scale, scales, groups);
    for (int64_t g = 0; g < groups; ++g, out += group_columns) {
      typename S::F weight[G::vectors];
      G::unfold(weight, w + g * G::bytes, scale[g]);
      for (int v = 0; v < G::vectors; ++v) store<S>(out + v * S::lanes, weight[v]);
    }
  }
}

}  // namespace sida::cpu
