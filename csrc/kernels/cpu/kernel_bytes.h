// int8, int4 and mxfp4 weights times activations of 8 bits: integer dot products of 32 columns, each scaled once.
//
// A token's columns are quantised in groups of 32, in which weights of 4 bits have their scales too:
//
//     s = max |x| / 127,   q = x / s to the nearest integer, -127 to 127.
//
// The dot product of a group is an integer below 2^21, exact in fp32 and in every way of adding it up. Its contribution
// is fma(dot, s * weight's scale, sum), in the order of the groups: one chain for each (row, token), whatever the
// number of tokens, rows or threads, and whichever instructions multiply. mxfp4's weights are taken twice over, as
// integers, and its scales half. int8's scale, of the whole row, is applied after the sum as ever.
//
// A group whose largest |x| is below 2^-119, whose s would lose bits, counts as zero. A group with an infinite x or a
// NaN makes every sum NaN that it is part of.
//
// Lanes are rows. A step takes the same 16 bytes of each of S::lanes rows, transposes them, so that a lane has four
// bytes of its row, and multiplies them with four bytes of a token, broadcast. So no sum ever crosses lanes, and the
// rows' scales are a vector.
//
//      16 bytes of a row                  part j, lanes are rows                   weights 2j and 2j + 1
//      | 0..3 | 4..7 | 8..11 | 12..15 | ->  bytes 4j..4j+3 of each row   ->   low halves (even columns), high (odd)
//
// Where the instruction wants one operand unsigned, S::offset is added to the weights and taken off again by where the
// integer sum starts: at -offset times the sum of the token's q, which the panel holds.
//
// A panel holds, for each tile of N tokens and each group: [N][32] bytes, in the order of the weights (`unit`), N
// scales, N starts.
#pragma once

#include "kernels/cpu/kernel_set.h"

namespace sida::cpu {

// S: a Simd with `byte_tile_tokens`, `offset`, `load_group` and so on (simd_avx512_vnni.h says what they are); base:
// the kernels for weights of other dtypes.
template <class S, const Kernels* (*base)() noexcept>
struct ByteKernels {
  using Set = KernelSet<S>;
  using F = typename S::F;
  using I = typename S::I;
  using U = typename S::Types::U;
  using B = typename S::B;
  using Cut = typename Set::Tiles;

  static constexpr int64_t lanes = S::lanes;
  static constexpr int64_t segment = 32;                    // groups whose unfolded weights stay in the L1 cache
  static constexpr int64_t record = group_columns + 4 + 4;  // bytes of a token's group: q, scale, start
  static constexpr int units = 8;                           // of four columns
  // Groups whose scales lie in 16 bytes of a row.
  template <DType dtype>
  static constexpr int64_t scales_together =
      is_grouped(dtype) ? 16 / group_scale_bytes(is_grouped(dtype) ? dtype : DType::int4) : 1;

  static constexpr bool has_bytes(DType dtype) { return dtype == DType::i8 || is_grouped(dtype); }
  static constexpr int64_t group_bytes(DType dtype) { return dtype == DType::i8 ? group_columns : group_columns / 2; }

  static PanelForm panel_form(DType values, DType w_dtype, int64_t width) {
    if (!has_bytes(w_dtype)) return base()->panel_form(values, w_dtype, width);
    return {groups_of(width) * record / 4, quantised_terms};
  }

  // op over all lanes, in pairs; any order gives the same integer.
  template <class Op>
  [[gnu::always_inline]] static int32_t over_lanes(I value, Op op) {
    unroll<S::lanes == 16  ? 4
           : S::lanes == 8 ? 3
                           : 2>([&](auto power) SIDA_INLINE {
      I other;
      for (int lane = 0; lane < S::lanes; ++lane) other[lane] = lane ^ (1 << power.value);
      value = op(value, __builtin_shuffle(value, other));
    });
    return value[0];
  }

  // Each eight integers of a group with the even ones first.
  static void evens_first(I (&value)[group_columns / lanes]) {
    if constexpr (lanes == 4) {
      for (int64_t v = 0; v < group_columns / lanes; v += 2) {
        const I even = __builtin_shuffle(value[v], value[v + 1], I{0, 2, 4, 6});
        value[v + 1] = __builtin_shuffle(value[v], value[v + 1], I{1, 3, 5, 7});
        value[v] = even;
      }
    } else {
      I from;
      for (int lane = 0; lane < S::lanes; ++lane) from[lane] = lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
      for (I& eight : value) eight = __builtin_shuffle(eight, from);
    }
  }

  // One group of a token: values in natural order; q, scale and start go to their places in the panel.
  static void quantise(const float* values, bool paired, int32_t offset, char* q, float* scale, int32_t* start) {
    constexpr int vectors = static_cast<int>(group_columns / lanes);
    F value[vectors];
    I most{};
    for (int v = 0; v < vectors; ++v) {
      value[v] = load<S>(values + v * lanes);
      const I magnitude = bits_as<I>(bits_as<U>(value[v]) & 0x7fffffffu);  // in the order of the numbers, NaN last
      most = magnitude > most ? magnitude : most;
    }
    const auto greater = [](I a, I b) SIDA_INLINE { return a > b ? a : b; };
    const int32_t bits = over_lanes(most, greater);
    const float largest = __builtin_bit_cast(float, bits);
    const bool is_finite = bits < 0x7f800000;
    if (!is_finite || largest < 0x1p-119f) {
      __builtin_memset(q, 0, group_columns);
      *scale = is_finite ? 0.0f : __builtin_nanf("");
      *start = 0;
      return;
    }
    *scale = largest * (1.0f / 127.0f);
    const float inverse = 127.0f / largest;
    I sum{}, integer[vectors];
    for (int v = 0; v < vectors; ++v) {
      // The addend leaves integers alone among the bits of the fraction, rounded to even.
      integer[v] = bits_as<I>(value[v] * inverse + 0x1.8p23f) - 0x4b400000;
      sum += integer[v];
    }
    *start = -offset * over_lanes(sum, [](I a, I b) SIDA_INLINE { return a + b; });
    if (paired) evens_first(integer);
    for (int v = 0; v < vectors; ++v) S::store_bytes(q + v * lanes, integer[v]);
  }

  // Collects vectors of a token until a group is whole. They come in ascending order, from the beginning of a group.
  struct IntoPanel {
    Panel panel;
    bool paired;
    int32_t offset;
    alignas(64) float values[group_columns] = {};

    void operator()(int64_t first, int64_t n, int64_t t, int64_t k, F low, F high) {
      const int64_t at = k % group_columns, end = at + Set::group;
      store<S>(values + at, low);
      store<S>(values + at + lanes, high);
      if (end < group_columns) {
        if (k + Set::group < panel.width) return;
        __builtin_memset(values + end, 0, (group_columns - end) * sizeof(float));
      }
      char* const group =
          reinterpret_cast<char*>(panel.data + first * panel.padded_width) + k / group_columns * n * record;
      char* const scales = group + n * group_columns;
      quantise(values, paired, offset, group + t * group_columns, reinterpret_cast<float*>(scales) + t,
               reinterpret_cast<int32_t*>(scales) + n + t);
    }
  };

  static IntoPanel into_panel(const Panel& panel, DType w_dtype) {
    const int32_t offset = w_dtype == DType::i8     ? S::template offset<DType::i8>
                           : w_dtype == DType::int4 ? S::template offset<DType::int4>
                                                    : S::template offset<DType::mxfp4>;
    return {panel, is_grouped(w_dtype), offset};
  }

  static Cut cut(int64_t tokens) { return Cut(tokens, S::byte_tile_tokens); }

  static void pack(const Pack& args) {
    if (args.panel.terms != quantised_terms) return base()->pack(args);
    Set::gather(args, cut(args.panel.tokens), into_panel(args.panel, args.w_dtype));
  }

  static void activate(const Activate& args) {
    if (args.h.terms != quantised_terms) return base()->activate(args);
    Set::activate_into(args, cut(args.h.tokens), into_panel(args.h, args.w_dtype));
  }

  // Up to S::lanes rows of a matrix, and the groups of them that are multiplied in one go.
  struct Rows {
    const char* w;
    const char* next;  // of the rows after these, as many bytes on as these rows had before their groups
    int64_t row_bytes;
    const char* scales;
    int64_t scale_row_bytes;
    int64_t rows, groups, groups_before;
    bool has_next;  // as many rows after these will be wanted next
  };

  // The scales as fp32, [groups][lanes], of 16 bytes of each row at a time. The last 16 end with the segment, and what
  // comes of those before it is written before `out`: there is room for it.
  template <DType dtype>
  [[gnu::noinline]] static void unfold_scales(const Rows& at, float* out) {
    constexpr int64_t bytes = group_scale_bytes(dtype), together = scales_together<dtype>;
    for (int64_t g = 0; g < at.groups; g += together) {
      const int64_t left = at.groups - g < together ? at.groups - g : together;
      const bool reaches_back = at.groups_before + at.groups >= together;
      const int64_t first = reaches_back ? g + left - together : g;
      const char* from = at.scales + first * bytes;
      int64_t row_bytes = at.scale_row_bytes;
      char copy[lanes * 16];
      if (at.rows < lanes || !reaches_back) {
        const int64_t copied = reaches_back ? 16 : left * bytes;
        __builtin_memset(copy, 0, sizeof(copy));
        for (int64_t r = 0; r < at.rows; ++r) copy_bytes(copy + r * 16, from + r * row_bytes, copied);
        from = copy;
        row_bytes = 16;
      } else if (at.has_next) {
        const char* next = from + lanes * row_bytes;
        for (int64_t r = 0; r < lanes; ++r, next += row_bytes) __builtin_prefetch(next, 0, 2);
      }
      F scale[together];
      S::template load_scales<dtype>(scale, from, row_bytes);
      for (int64_t i = 0; i < together; ++i) store<S>(out + (first + i) * lanes, scale[i]);
    }
  }

  // Up to 16 bytes, without a call.
  [[gnu::always_inline]] static void copy_bytes(char* to, const char* from, int64_t count) {
    if (count == 16) {
      __builtin_memcpy(to, from, 16);
      return;
    }
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }

  // The operands of all groups: [groups][units].
  template <DType dtype>
  [[gnu::noinline]] static void unfold(const Rows& at, B* out) {
    const char* w = at.w;
    for (int64_t g = 0; g < at.groups; ++g, w += group_bytes(dtype), out += units) {
      ask_ahead<dtype>(at, g);
      B parts[S::template parts<dtype>];
      S::template load_group<dtype>(parts, w, at.row_bytes);
      unroll<units>([&](auto i) SIDA_INLINE { out[i.value] = S::template weight<dtype, i.value>(parts); });
    }
  }

  // Asks for the rows after these, which usually lie behind them, line after line: as much as a group of these rows.
  template <DType dtype>
  [[gnu::always_inline]] static void ask_ahead(const Rows& at, int64_t g) {
    if (!at.has_next) return;
    constexpr int64_t bytes = lanes * group_bytes(dtype);
    const char* next = at.next + g * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
  }

  // Adds one group's contribution to the sums of N tokens.
  template <DType dtype, int N, class Weight>
  [[gnu::always_inline]] static void add_group(F (&sum)[N], Weight weight, const float* scale, const char* x) {
    const auto* const scales = reinterpret_cast<const float*>(x + N * group_columns);
    const auto* const starts = reinterpret_cast<const int32_t*>(scales) + N;
    I dot[N];
    S::template dot<dtype, N>(dot, weight, x, starts);
    F row_scale{};
    if constexpr (is_grouped(dtype)) row_scale = load<S>(scale);
    unroll<N>([&](auto n) SIDA_INLINE {
      F factor = scales[n.value] - F{};
      if constexpr (is_grouped(dtype)) factor *= row_scale;
      sum[n.value] = S::fma(__builtin_convertvector(dot[n.value], F), factor, sum[n.value]);
    });
  }

  // The groups of `at` for one tile of N tokens at x. unfolded null: the rows unfold as they are multiplied.
  template <DType dtype, int N, bool is_unfolded>
  [[gnu::noinline]] static void run(const Rows& at, const B* unfolded, const float* scale, const char* x, float* out,
                                    int64_t stride, bool is_first) {
    F sum[N];
    unroll<N>([&](auto n)
                  SIDA_INLINE { sum[n.value] = is_first ? F{} : Set::load_some(out + n.value * stride, at.rows); });
    const char* w = at.w;
    for (int64_t g = 0; g < at.groups; ++g) {
      if constexpr (is_unfolded) {
        add_group<dtype, N>(sum, [&](auto i) SIDA_INLINE { return unfolded[i.value]; }, scale, x);
        unfolded += units;
      } else {
        ask_ahead<dtype>(at, g);
        B parts[S::template parts<dtype>];
        S::template load_group<dtype>(parts, w, at.row_bytes);
        add_group<dtype, N>(
            sum, [&](auto i) SIDA_INLINE { return S::template weight<dtype, i.value>(parts); }, scale, x);
        w += group_bytes(dtype);
      }
      scale += lanes;
      x += N * record;
    }
    unroll<N>([&](auto n) SIDA_INLINE {
      Set::store_some(DType::f32, reinterpret_cast<char*>(out + n.value * stride), sum[n.value], at.rows);
    });
  }

  template <class Body, int... n>
  [[gnu::always_inline]] static void with_tokens(int64_t tokens, Body&& body, std::integer_sequence<int, n...>) {
    ((tokens == n + 1 ? body.template operator()<n + 1>() : void()), ...);
  }

  template <DType dtype>
  static void multiply(const Project& args, const Cut& tiles, const Rows& at, int64_t row, int64_t group) {
    alignas(64) float unfolded_scales[is_grouped(dtype) ? (segment + scales_together<dtype>)*lanes : 1];
    float* const scale = unfolded_scales + (is_grouped(dtype) ? scales_together<dtype> * lanes : 0);
    if constexpr (is_grouped(dtype)) unfold_scales<dtype>(at, scale);
    alignas(64) B unfolded[segment * units];
    const bool is_unfolded = tiles.count > 1;
    if (is_unfolded) unfold<dtype>(at, unfolded);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t first = tiles.first(i), n = tiles.first(i + 1) - first;
      const char* const x =
          reinterpret_cast<const char*>(args.x.data + first * args.x.padded_width) + group * n * record;
      float* const out = args.sums + first * args.sums_stride + row;
      with_tokens(
          n,
          [&]<int N>() {
            if (is_unfolded) {
              run<dtype, N, true>(at, unfolded, scale, x, out, args.sums_stride, group == 0);
            } else {
              run<dtype, N, false>(at, nullptr, scale, x, out, args.sums_stride, group == 0);
            }
          },
          std::make_integer_sequence<int, S::byte_tile_tokens>());
    }
  }

  // The same from a copy, with zeros where a block has fewer rows and the last group of int8 fewer columns: nothing
  // past the end of a row or of a matrix is read.
  template <DType dtype>
  [[gnu::noinline]] static void multiply_copy(const Project& args, const Cut& tiles, Rows at, int64_t row,
                                              int64_t group) {
    const int64_t copied = at.groups * group_bytes(dtype), before = group * group_bytes(dtype);
    const int64_t held =
        row_bytes(dtype, args.x.width) - before < copied ? row_bytes(dtype, args.x.width) - before : copied;
    alignas(64) char rows[lanes * segment * group_bytes(dtype)];
    __builtin_memset(rows, 0, lanes * copied);
    for (int64_t r = 0; r < at.rows; ++r) __builtin_memcpy(rows + r * copied, at.w + r * at.row_bytes, held);
    at.w = rows;
    at.row_bytes = copied;
    at.has_next = false;
    multiply<dtype>(args, tiles, at, row, group);
  }

  template <DType dtype>
  static void project_rows(const Project& args) {
    constexpr int64_t bytes = group_bytes(dtype);
    const Cut tiles = cut(args.x.tokens);
    const int64_t groups = groups_of(args.x.width);
    const int64_t whole = dtype == DType::i8 ? args.x.width / group_columns : groups;
    for (int64_t row = 0; row < args.rows; row += lanes) {
      const int64_t rows = args.rows - row < lanes ? args.rows - row : lanes;
      for (int64_t group = 0; group < groups;) {
        const int64_t end = group < whole ? whole : groups;
        const int64_t count = end - group < segment ? end - group : segment;
        const Rows at{
            static_cast<const char*>(args.w) + row * args.row_bytes + group * bytes,
            static_cast<const char*>(args.w) + (row + lanes) * args.row_bytes + group * bytes * lanes,
            args.row_bytes,
            static_cast<const char*>(args.group_scales) + row * args.scale_row_bytes + group * group_scale_bytes(dtype),
            args.scale_row_bytes,
            rows,
            count,
            group,
            row + 2 * lanes <= args.rows + args.rows_after};
        if (rows == lanes && group < whole) {
          multiply<dtype>(args, tiles, at, row, group);
        } else {
          multiply_copy<dtype>(args, tiles, at, row, group);
        }
        group += count;
      }
    }
  }

  static void project(const Project& args) {
    if (args.x.terms != quantised_terms) return base()->project(args);
    switch (args.w_dtype) {
      case DType::int4:
        return project_rows<DType::int4>(args);
      case DType::mxfp4:
        return project_rows<DType::mxfp4>(args);
      default:
        return project_rows<DType::i8>(args);
    }
  }

  static Kernels make() noexcept {
    Kernels table = *base();
    while (table.tile_rows % lanes != 0) table.tile_rows += base()->tile_rows;
    while (table.group % group_columns != 0) table.group += base()->group;
    table.panel_form = panel_form;
    table.pack = pack;
    table.project = project;
    table.activate = activate;
    return table;
  }
};

}  // namespace sida::cpu
