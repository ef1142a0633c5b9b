// bfloat16 weights through AMX tiles: the first operand is weights as they lie in memory, the second is tokens.
//
//            32 columns of weights            N <= 16 tokens, pairs of columns            N tokens
//          +----------------------+          +------------------------------+          +------------+
//   16     |  w[row][k]           |    16    | x[t][2j], x[t][2j+1]         |    16    | sum[row][t]|
//   rows   |  bf16, 64 bytes      |  x pairs | bf16, 4 N bytes a pair       |  +=rows  | fp32       |
//          |  read in place       |          | from the panel, a term each  |          | in a tile  |
//          +----------------------+          +------------------------------+          +------------+
//
// Two tiles of rows and two of tokens are worked on together: four of sums (0-3), two of weights (4, 5), two of tokens
// (6, 7), so that a loaded tile is used twice.
//
// A panel holds, for each tile of tokens, [padded width / 32][terms][16 pairs][N][2] bfloat16: the tiles of a segment
// in the order in which they are multiplied. A value is the sum of its terms, exactly (bf16_terms.h), or one rounded
// term where `rounds`.
//
// Batch invariance. The sum of one (row, token) pair never depends on how many other rows or tokens there are:
//   for each block of 32 columns in ascending order, for each term from the largest down, TDPBF16PS adds to the sum
//   what it makes of 16 pairs (a chain of fused multiply-adds over the even columns and one over the odd ones, added);
//   after each segment of 1024 columns the sum goes to memory, and the segments' sums are added in order.
// The instruction takes denormal operands for zero and makes denormal results zero, which moves a sum by at most
// 2^-126 (sum |w| + sum |x| + 4 * width); it does not consult the caller's rounding mode.
// A sum that comes out infinite or NaN is taken again in double precision from the same weights and terms: an infinite
// weight times a term that is zero is NaN where weight times token is infinite, and a sum may leave fp32 on its way.
#pragma once

#include "kernels/cpu/bf16_terms.h"
#include "kernels/cpu/kernel_set.h"
#include "kernels/cpu/tile_config.h"

namespace sida::cpu {

// S has 16 lanes; Tiles: amx_tiles.h, or an emulation of it; base: the kernels for weights of other dtypes, over the
// same S.
template <class S, class Tiles, const Kernels* (*base)() noexcept, bool rounds>
struct AmxKernels {
  using Set = KernelSet<S>;
  using F = typename S::F;
  using U = typename S::Types::U;
  using Cut = typename Set::Tiles;

  static constexpr int64_t tile = 16;     // rows of weights, tokens, pairs of columns
  static constexpr int64_t columns = 32;  // of a tile of weights: 64 bytes
  static constexpr int64_t segment = 1024;
  static_assert(S::lanes == tile && Set::group == columns);

  static Cut cut(int64_t tokens) { return Cut(tokens, tile); }

  static PanelForm panel_form(DType values, DType w_dtype, int64_t width) {
    if (w_dtype != DType::bf16) return base()->panel_form(values, w_dtype, width);
    const int terms = rounds ? 1 : exact_terms(values);
    return {(width + columns - 1) / columns * columns * terms / 2, terms};
  }

  // Where gather and activate_into put two vectors of a token's columns.
  static auto into_panel(const Panel& panel) {
    return [panel](int64_t first, int64_t n, int64_t t, int64_t k, F low, F high) {
      const int64_t terms = panel.terms;
      auto* to = reinterpret_cast<uint32_t*>(panel.data + first * panel.padded_width) + k / 2 * terms * n + t;
      for (int64_t term = 0; term < terms; ++term, to += tile * n) {
        alignas(64) uint16_t halves[columns];
        if constexpr (rounds) {
          store_bf16<S>(halves, low);
          store_bf16<S>(halves + tile, high);
        } else {
          const U low_term = take_term<S>(low), high_term = take_term<S>(high);
          store_upper_halves<S>(halves, low_term, high_term);
        }
        for (int64_t pair = 0; pair < tile; ++pair) __builtin_memcpy(to + pair * n, halves + 2 * pair, 4);
      }
    };
  }

  static void pack(const Pack& args) {
    if (args.w_dtype != DType::bf16) return base()->pack(args);
    Set::gather(args, cut(args.panel.tokens), into_panel(args.panel));
  }

  static void activate(const Activate& args) {
    if (args.w_dtype != DType::bf16) return base()->activate(args);
    Set::activate_into(args, cut(args.h.tokens), into_panel(args.h));
  }

  // A tile without rows or columns stays unconfigured: LDTILECFG refuses one without the other.
  static void shape(TileConfig& config, int number, int64_t rows, int64_t row_bytes) {
    const bool is_used = rows > 0 && row_bytes > 0;
    config.rows[number] = static_cast<uint8_t>(is_used ? rows : 0);
    config.row_bytes[number] = static_cast<uint16_t>(is_used ? row_bytes : 0);
  }

  static void configure(const int64_t (&rows)[2], const int64_t (&tokens)[2]) {
    TileConfig config;
    for (int a = 0; a < 2; ++a) {
      for (int b = 0; b < 2; ++b) shape(config, 2 * a + b, rows[a], 4 * tokens[b]);
      shape(config, 4 + a, rows[a], 2 * columns);
      shape(config, 6 + a, tile, 4 * tokens[a]);
    }
    Tiles::configure(config);
  }

  // One block of columns in all terms: x[b] at the tiles of tokens, moved past them.
  template <int A, int B>
  [[gnu::always_inline]] static void step(const char* w, int64_t row_bytes, const char* (&x)[2],
                                          const int64_t (&x_bytes)[2], int64_t terms) {
    Tiles::template load<4>(w, row_bytes);
    if constexpr (A == 2) Tiles::template load<5>(w + tile * row_bytes, row_bytes);
    for (int64_t term = 0; term < terms; ++term) {
      Tiles::template load<6>(x[0], x_bytes[0]);
      x[0] += tile * x_bytes[0];
      Tiles::template multiply_add<0, 4, 6>();
      if constexpr (A == 2) Tiles::template multiply_add<2, 5, 6>();
      if constexpr (B == 2) {
        Tiles::template load<7>(x[1], x_bytes[1]);
        x[1] += tile * x_bytes[1];
        Tiles::template multiply_add<1, 4, 7>();
        if constexpr (A == 2) Tiles::template multiply_add<3, 5, 7>();
      }
    }
  }

  // v[i][j] becomes v[j][i]: blocks of 1, 2, 4 and 8 lanes change places.
  static void transpose(F (&v)[tile]) {
    unroll<4>([&](auto power) SIDA_INLINE {
      constexpr int size = 1 << power.value;
      typename S::I upper, lower;
      for (int lane = 0; lane < tile; ++lane) {
        upper[lane] = lane & size ? static_cast<int>(tile) + lane - size : lane;
        lower[lane] = lane & size ? static_cast<int>(tile) + lane : lane + size;
      }
      unroll<tile>([&](auto i) SIDA_INLINE {
        if constexpr ((i.value & size) == 0) {
          const F a = v[i.value], b = v[i.value + size];
          v[i.value] = __builtin_shuffle(a, b, upper);
          v[i.value + size] = __builtin_shuffle(a, b, lower);
        }
      });
    });
  }

  static bool is_finite(F value) {
    const auto wrong = (bits_as<U>(value) & 0x7f800000u) == 0x7f800000u;
    int32_t any = 0;
    for (int lane = 0; lane < tile; ++lane) any |= wrong[lane];
    return any == 0;
  }

  // The sums of one token with `rows` rows, in double precision.
  [[gnu::noinline]] static void take_again(const Project& args, int64_t row, int64_t rows, int64_t first, int64_t n,
                                           int64_t t) {
    const auto* const pairs = reinterpret_cast<const uint32_t*>(args.x.data + first * args.x.padded_width) + t;
    const int64_t terms = args.x.terms;
    float* const sums = args.sums + (first + t) * args.sums_stride;
    for (int64_t r = row; r < row + rows; ++r) {
      if (__builtin_isfinite(sums[r])) continue;
      double sum = 0.0;
      for (int64_t k = 0; k < args.x.width; ++k) {
        float token = 0.0f;
        for (int64_t term = terms - 1; term >= 0; --term) {
          const uint32_t pair = pairs[(k / columns * terms * tile + term * tile + k % columns / 2) * n];
          token += __builtin_bit_cast(float, k % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
        }
        uint16_t half;
        __builtin_memcpy(&half, static_cast<const char*>(args.w) + r * args.row_bytes + 2 * k, 2);
        sum += static_cast<double>(__builtin_bit_cast(float, uint32_t{half} << 16)) * token;
      }
      sums[r] = static_cast<float>(sum);
    }
  }

  // Adds a tile of sums, stored as [row][token], to the tokens' rows.
  [[gnu::noinline]] static void reduce(const Project& args, const float* stored, int64_t row, int64_t rows,
                                       int64_t first, int64_t n, bool is_first, bool is_last) {
    F v[tile];
    for (int i = 0; i < tile; ++i) v[i] = load<S>(stored + i * tile);
    transpose(v);
    for (int64_t t = 0; t < n; ++t) {
      float* const to = args.sums + (first + t) * args.sums_stride + row;
      F sum = v[t];
      if (!is_first) sum = Set::load_some(to, rows) + sum;
      Set::store_some(DType::f32, reinterpret_cast<char*>(to), sum, rows);
      if (is_last && !is_finite(sum)) take_again(args, row, rows, first, n, t);
    }
  }

  // rows[0] + rows[1] rows from `row` on, tokens[0] + tokens[1] tokens from `first` on. stored: four tiles of sums.
  template <int A, int B>
  [[gnu::noinline]] static void multiply(const Project& args, int64_t row, const int64_t (&rows)[2], int64_t first,
                                         const int64_t (&tokens)[2], float* stored) {
    const int64_t width = args.x.width, terms = args.x.terms, row_bytes = args.row_bytes;
    const char* w = static_cast<const char*>(args.w) + row * row_bytes;
    const char* x[2];
    int64_t x_bytes[2];
    for (int b = 0; b < 2; ++b) {
      x[b] = reinterpret_cast<const char*>(args.x.data + (first + b * tokens[0]) * args.x.padded_width);
      x_bytes[b] = 4 * tokens[b];
    }
    // Each step asks for the same columns of the rows after these.
    const bool has_next = row + 2 * A * tile <= args.rows + args.rows_after;
    const int64_t ahead = has_next ? A * tile * row_bytes : 0;
    for (int64_t begin = 0; begin < width; begin += segment) {
      const int64_t in_segment = width - begin < segment ? width - begin : segment;
      Tiles::template zero<0>();
      if constexpr (B == 2) Tiles::template zero<1>();
      if constexpr (A == 2) Tiles::template zero<2>();
      if constexpr (A == 2 && B == 2) Tiles::template zero<3>();
      for (int64_t block = 0; block < in_segment / columns; ++block, w += 2 * columns) {
        if (ahead != 0) {
          const char* next = w + ahead;
          for (int r = 0; r < A * tile; ++r, next += row_bytes) __builtin_prefetch(next, 0, 2);
        }
        step<A, B>(w, row_bytes, x, x_bytes, terms);
      }
      if (const int64_t left = in_segment % columns; left > 0) {
        alignas(64) char tail[2 * tile * 2 * columns] = {};
        for (int64_t r = 0; r < rows[0] + rows[1]; ++r) {
          __builtin_memcpy(tail + r * 2 * columns, w + r * row_bytes, 2 * left);
        }
        step<A, B>(tail, 2 * columns, x, x_bytes, terms);
      }
      Tiles::template store<0>(stored, 4 * tile);
      if constexpr (B == 2) Tiles::template store<1>(stored + tile * tile, 4 * tile);
      if constexpr (A == 2) Tiles::template store<2>(stored + 2 * tile * tile, 4 * tile);
      if constexpr (A == 2 && B == 2) Tiles::template store<3>(stored + 3 * tile * tile, 4 * tile);
      for (int a = 0; a < A; ++a) {
        for (int b = 0; b < B; ++b) {
          reduce(args, stored + (2 * a + b) * tile * tile, row + a * tile, rows[a], first + b * tokens[0], tokens[b],
                 begin == 0, begin + in_segment == width);
        }
      }
    }
  }

  // All rows with the tokens of one or two tiles.
  static void project_tokens(const Project& args, int64_t first, const int64_t (&tokens)[2], float* stored) {
    for (int64_t row = 0, configured = 0; row < args.rows;) {
      const int64_t left = args.rows - row, both = left < 2 * tile ? left : 2 * tile;
      const int64_t rows[2] = {both < tile ? both : tile, both < tile ? 0 : both - tile};
      if (both != configured) configure(rows, tokens);
      configured = both;
      if (rows[1] > 0) {
        tokens[1] > 0 ? multiply<2, 2>(args, row, rows, first, tokens, stored)
                      : multiply<2, 1>(args, row, rows, first, tokens, stored);
      } else {
        tokens[1] > 0 ? multiply<1, 2>(args, row, rows, first, tokens, stored)
                      : multiply<1, 1>(args, row, rows, first, tokens, stored);
      }
      row += both;
    }
  }

  static void project(const Project& args) {
    if (args.w_dtype != DType::bf16) return base()->project(args);
    alignas(64) float stored[4 * tile * tile] = {};
    const Cut tiles = cut(args.x.tokens);
    for (int64_t i = 0; i < tiles.count; i += 2) {
      const int64_t first = tiles.first(i), second = tiles.first(i + 1);
      const int64_t tokens[2] = {second - first, i + 1 < tiles.count ? tiles.first(i + 2) - second : 0};
      project_tokens(args, first, tokens, stored);
    }
    Tiles::release();
  }

  static Kernels make(const char* name) noexcept {
    Kernels table = *base();
    table.name = name;
    while (table.tile_rows % (2 * tile) != 0) table.tile_rows += base()->tile_rows;
    table.panel_form = panel_form;
    table.pack = pack;
    table.project = project;
    table.activate = activate;
    return table;
  }
};

}  // namespace sida::cpu
