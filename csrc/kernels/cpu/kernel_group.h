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

  // Calls use(g, vector) for the scales of `groups` groups as fp32, a vector from group g on. The last vector ends with
  // them: what it shares with the one before comes twice. After fewer than a vector there are scales of 0 or 1.
  template <class Use>
  [[gnu::always_inline]] static void each_scale(const char* scales, int64_t groups, Use use) {
    if (groups < S::lanes) {
      char some[scale_bytes * S::lanes];
      __builtin_memset(some, dtype == DType::int4 ? 0 : 127, sizeof(some));
      for (int64_t g = 0; g < groups; ++g)
        __builtin_memcpy(some + g * scale_bytes, scales + g * scale_bytes, scale_bytes);
      return use(0, load_scales(some));
    }
    int64_t g = 0;
    for (; g + S::lanes <= groups; g += S::lanes) use(g, load_scales(scales + scale_bytes * g));
    if (g < groups) use(groups - S::lanes, load_scales(scales + scale_bytes * (groups - S::lanes)));
  }

  // There is room for a vector at `out`.
  [[gnu::always_inline]] static void unfold_scales(float* out, const char* scales, int64_t groups) {
    each_scale(scales, groups, [&](int64_t g, F scale) SIDA_INLINE { store<S>(out + g, scale); });
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

  // A Simd may have a shorter way to a weight's value, `unfold_units`, for scales that are not extreme. A single row,
  // one of the last few, goes the other way.
  static constexpr bool has_units = R > 1 && requires(F scale) { S::template units<dtype>(scale); };
  static constexpr int64_t segment_groups = S::segment / group_columns;

  // The scales of a segment, converted once: in a group's own turn one would cost as much as its weights.
  struct Scales {
    alignas(64) float scale[R][segment_groups];
    alignas(64) float offset[has_units ? R : 1][segment_groups];  // scale is the unit then

    // Whether rows can be multiplied as they unfold.
    [[gnu::always_inline]] bool convert(const char* scales, int64_t row_bytes, int64_t groups) {
      if constexpr (has_units) {
        typename S::I extreme{};
        for (int r = 0; r < R; ++r, scales += row_bytes) {
          G::each_scale(scales, groups, [&](int64_t g, F its) SIDA_INLINE {
            const auto units = S::template units<dtype>(its);
            extreme |= S::template is_extreme<dtype>(its);
            store<S>(scale[r] + g, units.unit);
            store<S>(offset[r] + g, units.offset);
          });
        }
        return !S::any(extreme);
      } else {
        for (int r = 0; r < R; ++r) G::unfold_scales(scale[r], scales + r * row_bytes, groups);
        return true;
      }
    }

    [[gnu::always_inline]] void unfold(F (&weight)[G::vectors], const char* at, int64_t r, int64_t g) const {
      if constexpr (has_units) {
        S::template unfold_units<dtype>(weight, at, {scale[r][g] - F{}, offset[r][g] - F{}});
      } else {
        G::unfold(weight, at, scale[r][g]);
      }
    }
  };

  // One segment of `groups` groups. Meanwhile it asks for as many bytes at `next`, and for the scales of the R rows
  // after these; null: for nothing. False: nothing was done, as the scales are extreme.
  [[gnu::noinline]] static bool run_segment(const char* w, int64_t row_bytes, const char* scales,
                                            int64_t scale_row_bytes, int64_t groups, const float* x, const char* next,
                                            float* out, int64_t stride, bool first) {
    Scales converted;
    if (!converted.convert(scales, scale_row_bytes, groups)) return false;
    if (next != nullptr) {
      // Everything waits for scales, and no row of them is long enough for the machine to see what comes.
      const char* after = scales + R * scale_row_bytes;
      for (int r = 0; r < R; ++r, after += scale_row_bytes) {
        for (int64_t byte = 0; byte < groups * G::scale_bytes; byte += 64) __builtin_prefetch(after + byte, 0, 3);
      }
    }
    T tile{};
    const auto step = [&](int64_t g) SIDA_INLINE {
      unroll<R>([&](auto r) SIDA_INLINE {
        F weight[G::vectors];
        converted.unfold(weight, w + r.value * row_bytes, r.value, g);
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
    return true;
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
