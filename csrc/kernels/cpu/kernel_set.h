// The table of kernels for one `Simd`, made by including this after a simd_*.h.
#pragma once

#include "kernels/cpu/kernel_group.h"
#include "kernels/cpu/kernel_tile.h"
#include "kernels/cpu/simd_math.h"

namespace sida::cpu {

template <class S>
struct KernelSet {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int64_t group = 2 * S::lanes;

  static_assert(S::tile_tokens <= 6, "with_tokens and project_typed know tiles of one to six tokens");

  // A block's tiles: tile i covers tokens [first(i), first(i + 1)).
  struct Tiles {
    int64_t tokens, count;
    explicit Tiles(int64_t n, int64_t most = S::tile_tokens) : tokens(n), count((n + most - 1) / most) {}
    int64_t first(int64_t i) const { return tokens * i / count; }
  };

  static bool is_paired(DType w_dtype) { return w_dtype == DType::bf16 || is_grouped(w_dtype); }

  // Two vectors in natural order into the panel's order, and stored.
  static void store_group(float* to, F low, F high, bool paired) {
    if (paired) {
      I even, odd;
      for (int i = 0; i < S::lanes; ++i) {
        even[i] = 2 * i;
        odd[i] = 2 * i + 1;
      }
      const F first = __builtin_shuffle(low, high, even);
      high = __builtin_shuffle(low, high, odd);
      low = first;
    }
    store<S>(to, low);
    store<S>(to + S::lanes, high);
  }

  // Calls store(first, n, t, k, low, high) for every group of columns: token t of the tile of n tokens that begins at
  // token `first`, columns [k, k + group) as two vectors in natural order, zeros past the end.
  template <class Store>
  static void gather(const Pack& args, const Tiles& tiles, Store store) {
    const int64_t element = args.x_dtype == DType::f32 ? 4 : 2;
    const int64_t whole = args.panel.width / group * group;
    const auto widened = [&](const char* from, int64_t i) {
      return load_as_float<S>(args.x_dtype, from + i * S::lanes * element);
    };
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t begin = tiles.first(i), n = tiles.first(i + 1) - begin;
      for (int64_t t = 0; t < n; ++t) {
        const char* row =
            static_cast<const char*>(args.x) + args.entries[begin + t] / args.top_k * args.x_row_stride * element;
        for (int64_t k = 0; k < whole; k += group, row += group * element) {
          store(begin, n, t, k, widened(row, 0), widened(row, 1));
        }
        if (whole < args.panel.width) {
          char tail[group * 4] = {};
          __builtin_memcpy(tail, row, (args.panel.width - whole) * element);
          store(begin, n, t, whole, widened(tail, 0), widened(tail, 1));
        }
      }
    }
  }

  // Where gather and activate_into put their vectors in a panel of fp32.
  static auto into_panel(const Panel& panel, DType w_dtype) {
    return [panel, paired = is_paired(w_dtype)](int64_t first, int64_t n, int64_t t, int64_t k, F low, F high) {
      store_group(panel.data + first * panel.padded_width + k * n + t * group, low, high, paired);
    };
  }

  static PanelForm panel_form(DType, DType w_dtype, int64_t width) {
    const int64_t whole = is_grouped(w_dtype) && group < group_columns ? group_columns : group;
    return {(width + whole - 1) / whole * whole, 0};
  }

  // What lies past the groups that gather and activate_into write.
  static void clear_rest(const Panel& panel, const Tiles& tiles) {
    const int64_t written = (panel.width + group - 1) / group * group, rest = panel.padded_width - written;
    if (rest == 0) return;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t first = tiles.first(i), n = tiles.first(i + 1) - first;
      __builtin_memset(panel.data + first * panel.padded_width + written * n, 0, rest * n * sizeof(float));
    }
  }

  static void pack(const Pack& args) {
    const Tiles tiles(args.panel.tokens);
    gather(args, tiles, into_panel(args.panel, args.w_dtype));
    clear_rest(args.panel, tiles);
  }

  // Calls body.operator()<N>() for n tokens in tiles of R rows.
  template <int R, class Body>
  [[gnu::always_inline]] static void with_tokens(int64_t n, Body&& body) {
    const auto call = [&]<int N>() {
      // The widest tile decides R; tiles are as wide as that or one token less.
      constexpr bool is_widest = R == S::tile_rows(N), is_narrower = N < S::tile_tokens && R == S::tile_rows(N + 1);
      if constexpr (N <= S::tile_tokens && (R == 1 || is_widest || is_narrower)) body.template operator()<N>();
    };
    switch (n) {
      case 1:
        return call.template operator()<1>();
      case 2:
        return call.template operator()<2>();
      case 3:
        return call.template operator()<3>();
      case 4:
        return call.template operator()<4>();
      case 5:
        return call.template operator()<5>();
      default:
        return call.template operator()<6>();
    }
  }

  // Few tokens, bound by memory: R whole rows at a time, for all tiles of tokens, which ask for the next rows
  // meanwhile.
  template <DType dtype, int R>
  static void stream_rows(const Project& args, const Tiles& tiles, int64_t row) {
    const int64_t row_bytes = args.row_bytes;
    const char* const w = static_cast<const char*>(args.w) + row * row_bytes;
    const bool has_next = row + R < args.rows + args.rows_after;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t begin = tiles.first(i), n = tiles.first(i + 1) - begin;
      with_tokens<R>(n, [&]<int N>() {
        Tile<S, dtype, R, N>::run(w, row_bytes, args.x.width, args.x.data + begin * args.x.padded_width,
                                  {has_next ? R * row_bytes : 0, i, tiles.count},
                                  args.sums + begin * args.sums_stride + row, args.sums_stride);
      });
    }
  }

  // Many tokens, bound by arithmetic: a block of rows times one segment of columns stays in the L2 cache while all
  // tokens pass by; a tile's tokens stay in L1 while the block's rows pass by. Each tile asks for a piece of a row of
  // the block after this one.
  template <DType dtype, int R>
  static void block_rows(const Project& args, const Tiles& tiles, int64_t first_row, int64_t rows) {
    constexpr int64_t bytes = Weights<S, dtype>::bytes;
    const int64_t row_bytes = args.row_bytes, width = args.x.width;
    const char* const matrix = static_cast<const char*>(args.w);
    const int64_t pieces = tiles.count / R;  // pieces of a row that make up for rows / R * tiles.count tiles
    for (int64_t begin = 0; begin < width; begin += S::segment) {
      const int64_t columns = width - begin < S::segment ? width - begin : S::segment;
      const bool goes_down = begin + columns >= width;
      const int64_t next_row = goes_down ? first_row + rows : first_row, next_begin = goes_down ? 0 : begin + columns;
      int64_t next_rows = args.rows + args.rows_after - next_row;
      if (next_rows > rows) next_rows = rows;
      const int64_t next_columns = width - next_begin < S::segment ? width - next_begin : S::segment;
      const int64_t row_lines = (next_columns * bytes + 63) / 64, lines = (row_lines + pieces - 1) / pieces;
      const char* const next = matrix + next_row * row_bytes + next_begin * bytes;
      int64_t piece = 0;
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t token = tiles.first(i), n = tiles.first(i + 1) - token;
        with_tokens<R>(n, [&]<int N>() {
          const float* const x = args.x.data + token * args.x.padded_width + begin * N;
          for (int64_t row = first_row; row < first_row + rows; row += R, ++piece) {
            const bool asks = piece < next_rows * pieces;
            Tile<S, dtype, R, N>::run_segment(
                matrix + row * row_bytes + begin * bytes, row_bytes, columns, x,
                asks ? next + piece / pieces * row_bytes + piece % pieces * lines * 64 : nullptr, asks ? lines : 0,
                args.sums + token * args.sums_stride + row, args.sums_stride, begin == 0);
          }
        });
      }
    }
  }

  // stream_rows for int4 and mxfp4, which multiplies rows as they unfold.
  template <DType dtype, int R>
  static void stream_groups(const Project& args, const Tiles& tiles, int64_t row) {
    using G = Group<S, dtype>;
    const char* const w = static_cast<const char*>(args.w) + row * args.row_bytes;
    const char* const scales = static_cast<const char*>(args.group_scales) + row * args.scale_row_bytes;
    // The next rows usually lie behind these: asked for in the order of their addresses, memory gives them faster.
    const char* const next = row + R < args.rows + args.rows_after ? w + R * args.row_bytes : nullptr;
    const int64_t width = args.x.padded_width;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t token = tiles.first(i), n = tiles.first(i + 1) - token;
      with_tokens<R>(n, [&]<int N>() {
        for (int64_t begin = 0; begin < width; begin += S::segment) {
          const int64_t columns = width - begin < S::segment ? width - begin : S::segment;
          const int64_t before = begin / group_columns;
          const char *const segment = w + before * G::bytes, *const its_scales = scales + before * G::scale_bytes;
          const int64_t groups = columns / group_columns;
          const float* const x = args.x.data + token * width + begin * N;
          float* const out = args.sums + token * args.sums_stride + row;
          using Rows = GroupedRows<S, dtype, R, N>;
          [[maybe_unused]] const bool done = Rows::run_segment(
              segment, args.row_bytes, its_scales, args.scale_row_bytes, groups, x,
              i == 0 && next != nullptr ? next + R * before * G::bytes : nullptr, out, args.sums_stride, begin == 0);
          if constexpr (Rows::has_units) {
            if (done) continue;
            unfold_rows<S, dtype>(segment, args.row_bytes, its_scales, args.scale_row_bytes, R, groups, args.unfolded);
            Tile<S, DType::f32, R, N>::run_segment(reinterpret_cast<const char*>(args.unfolded), columns * 4, columns,
                                                   x, nullptr, 0, out, args.sums_stride, begin == 0);
          }
        }
      });
    }
  }

  // Rows of a block of unfolded weights, 16 KiB to 256 KiB in all: a block stays in the L2 cache.
  static constexpr int64_t unfolded_floats = 16 * S::segment;

  // block_rows for int4 and mxfp4, which unfolds a block once for all tiles of tokens.
  template <DType dtype, int R>
  static void block_groups(const Project& args, const Tiles& tiles, int64_t first_row, int64_t rows) {
    using G = Group<S, dtype>;
    const int64_t width = args.x.padded_width;
    for (int64_t begin = 0; begin < width; begin += S::segment) {
      const int64_t columns = width - begin < S::segment ? width - begin : S::segment;
      const int64_t before = begin / group_columns;
      unfold_rows<S, dtype>(
          static_cast<const char*>(args.w) + first_row * args.row_bytes + before * G::bytes, args.row_bytes,
          static_cast<const char*>(args.group_scales) + first_row * args.scale_row_bytes + before * G::scale_bytes,
          args.scale_row_bytes, rows, columns / group_columns, args.unfolded);
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t token = tiles.first(i), n = tiles.first(i + 1) - token;
        with_tokens<R>(n, [&]<int N>() {
          for (int64_t row = 0; row < rows; row += R) {
            Tile<S, DType::f32, R, N>::run_segment(reinterpret_cast<const char*>(args.unfolded + row * columns),
                                                   columns * 4, columns, args.x.data + token * width + begin * N,
                                                   nullptr, 0, args.sums + token * args.sums_stride + first_row + row,
                                                   args.sums_stride, begin == 0);
          }
        });
      }
    }
  }

  template <DType dtype, int R>
  static void project_groups(const Project& args, const Tiles& tiles) {
    int64_t row = 0;
    if (tiles.count > 1) {
      constexpr int64_t block = 16 / R * R;
      while (row + R <= args.rows) {
        const int64_t left = (args.rows - row) / R * R, rows = left < block ? left : block;
        block_groups<dtype, R>(args, tiles, row, rows);
        row += rows;
      }
    } else {
      for (; row + R <= args.rows; row += R) stream_groups<dtype, R>(args, tiles, row);
    }
    for (; row < args.rows; ++row) stream_groups<dtype, 1>(args, tiles, row);
  }

  template <DType dtype, int R>
  static void project_tiled(const Project& args, const Tiles& tiles) {
    if constexpr (is_grouped(dtype)) {
      project_groups<dtype, R>(args, tiles);
    } else {
      project_plain<dtype, R>(args, tiles);
    }
  }

  template <DType dtype, int R>
  static void project_plain(const Project& args, const Tiles& tiles) {
    int64_t row = 0;
    if (tiles.count >= R) {
      constexpr int64_t block = (48 + R - 1) / R * R;
      while (row + R <= args.rows) {
        const int64_t left = (args.rows - row) / R * R, rows = left < block ? left : block;
        block_rows<dtype, R>(args, tiles, row, rows);
        row += rows;
      }
    } else {
      for (; row + R <= args.rows; row += R) stream_rows<dtype, R>(args, tiles, row);
    }
    for (; row < args.rows; ++row) stream_rows<dtype, 1>(args, tiles, row);
  }

  template <DType dtype>
  static void project_typed(const Project& args) {
    const Tiles tiles(args.x.tokens);
    const int64_t widest = (tiles.tokens + tiles.count - 1) / tiles.count;
    switch (widest) {
      case 1:
        return project_tiled<dtype, S::tile_rows(1)>(args, tiles);
      case 2:
        return project_tiled<dtype, S::tile_rows(2)>(args, tiles);
      case 3:
        return project_tiled<dtype, S::tile_rows(3)>(args, tiles);
      case 4:
        return project_tiled<dtype, S::tile_rows(4)>(args, tiles);
      case 5:
        return project_tiled<dtype, S::tile_rows(5)>(args, tiles);
      default:
        return project_tiled<dtype, S::tile_rows(6)>(args, tiles);
    }
  }

  static void project(const Project& args) {
    switch (args.w_dtype) {
      case DType::f32:
        return project_typed<DType::f32>(args);
      case DType::bf16:
        return project_typed<DType::bf16>(args);
      case DType::f16:
        return project_typed<DType::f16>(args);
      case DType::i8:
        return project_typed<DType::i8>(args);
      case DType::int4:
        return project_typed<DType::int4>(args);
      case DType::mxfp4:
        return project_typed<DType::mxfp4>(args);
    }
  }

  // Loads `count` <= lanes floats, zeros after them.
  static F load_some(const float* from, int64_t count) {
    if (count >= S::lanes) return load<S>(from);
    F value{};
    if (count > 0) __builtin_memcpy(&value, from, count * sizeof(float));
    return value;
  }

  template <Activation activation>
  static F hidden(const Activate& args, const float* sums, const float* up_sums, int64_t row) {
    const int64_t left = args.rows - row;
    if (left <= 0) return F{};
    const auto product = [&](const float* sums, const float* scale, const float* bias) {
      F value = load_some(sums + row, left);
      if (scale != nullptr) value *= load_some(scale + row, left);
      if (bias != nullptr) value += load_some(bias + row, left);
      return value;
    };
    F value = product(sums, args.scale, args.bias);
    if constexpr (activation == Activation::swiglu_oai) {
      value = Math<S>::swiglu_oai(value, product(up_sums, args.up_scale, args.up_bias));
    } else {
      value = Math<S>::template apply<activation>(value);
      if (up_sums != nullptr) value *= product(up_sums, args.up_scale, args.up_bias);
    }
    // Lanes past the last row must be zero whatever the activation of zero is.
    for (int64_t i = left; i < S::lanes; ++i) value[i] = 0.0f;
    return value;
  }

  template <Activation activation, class Store>
  static void activate_as(const Activate& args, const Tiles& tiles, Store store) {
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t begin = tiles.first(i), n = tiles.first(i + 1) - begin;
      for (int64_t t = 0; t < n; ++t) {
        const float* const sums = args.sums + (begin + t) * args.sums_stride;
        const float* const up = args.up_sums == nullptr ? nullptr : args.up_sums + (begin + t) * args.sums_stride;
        for (int64_t row = 0; row < args.rows; row += group) {
          store(begin, n, t, args.row_begin + row, hidden<activation>(args, sums, up, row),
                hidden<activation>(args, sums, up, row + S::lanes));
        }
      }
    }
  }

  // The hidden layer's columns to store(first, n, t, k, low, high), as gather does.
  template <class Store>
  static void activate_into(const Activate& args, const Tiles& tiles, Store store) {
    using enum Activation;
    switch (args.activation) {
      case relu:
        return activate_as<relu>(args, tiles, store);
      case gelu:
        return activate_as<gelu>(args, tiles, store);
      case gelu_new:
        return activate_as<gelu_new>(args, tiles, store);
      case silu:
        return activate_as<silu>(args, tiles, store);
      case gelu_10:
        return activate_as<gelu_10>(args, tiles, store);
      case quick_gelu:
        return activate_as<quick_gelu>(args, tiles, store);
      case tanh:
        return activate_as<tanh>(args, tiles, store);
      case sigmoid:
        return activate_as<sigmoid>(args, tiles, store);
      case relu2:
        return activate_as<relu2>(args, tiles, store);
      case relu6:
        return activate_as<relu6>(args, tiles, store);
      case leaky_relu:
        return activate_as<leaky_relu>(args, tiles, store);
      case hardswish:
        return activate_as<hardswish>(args, tiles, store);
      case mish:
        return activate_as<mish>(args, tiles, store);
      case laplace:
        return activate_as<laplace>(args, tiles, store);
      case softplus:
        return activate_as<softplus>(args, tiles, store);
      case sqrtsoftplus:
        return activate_as<sqrtsoftplus>(args, tiles, store);
      case linear:
        return activate_as<linear>(args, tiles, store);
      case swiglu_oai:
        return activate_as<swiglu_oai>(args, tiles, store);
    }
  }

  static void activate(const Activate& args) {
    const Tiles tiles(args.h.tokens);
    activate_into(args, tiles, into_panel(args.h, args.w_dtype));
    if (args.row_begin + args.rows == args.h.width) clear_rest(args.h, tiles);
  }

  // Stores the first `count` <= lanes elements of value, rounded to dtype.
  static void store_some(DType dtype, char* to, F value, int64_t count) {
    if (count >= S::lanes) return store_rounded<S>(dtype, to, value);
    char all[S::lanes * 4];
    store_rounded<S>(dtype, all, value);
    __builtin_memcpy(to, all, count * (dtype == DType::f32 ? 4 : 2));
  }

  static void finish(const float* sums, int64_t rows, const float* scale, const float* bias, float gate,
                     DType out_dtype, void* out) {
    const int64_t element = out_dtype == DType::f32 ? 4 : 2;
    for (int64_t row = 0; row < rows; row += S::lanes) {
      F value = load_some(sums + row, rows - row);
      if (scale != nullptr) value *= load_some(scale + row, rows - row);
      if (bias != nullptr) value += load_some(bias + row, rows - row);
      store_some(out_dtype, static_cast<char*>(out) + row * element, value * gate, rows - row);
    }
  }

  static void combine(const float* partials, int64_t top_k, int64_t width, DType out_dtype, void* out) {
    const int64_t element = out_dtype == DType::f32 ? 4 : 2;
    for (int64_t i = 0; i < width; i += S::lanes) {
      F value = load_some(partials + i, width - i);
      for (int64_t k = 1; k < top_k; ++k) value += load_some(partials + k * width + i, width - i);
      store_some(out_dtype, static_cast<char*>(out) + i * element, value, width - i);
    }
  }

  static constexpr int64_t common_rows() {
    int64_t rows = 1;
    for (int tokens = 1; tokens <= S::tile_tokens; ++tokens) {
      int64_t multiple = rows;
      while (multiple % S::tile_rows(tokens) != 0) multiple += rows;
      rows = multiple;
    }
    return rows;
  }

  static constexpr int chains = 12;  // more than latency times instructions a cycle on any CPU so far

  static float multiply_add(int64_t rounds) {
    F sum[chains], factor = S::in_register(broadcast<S>(0.999f));
    unroll<chains>([&](auto i) SIDA_INLINE { sum[i.value] = factor; });
    for (int64_t round = 0; round < rounds; ++round) {
      unroll<chains>([&](auto i) SIDA_INLINE { S::accumulate(sum[i.value], factor, factor); });
    }
    F total{};
    unroll<chains>([&](auto i) SIDA_INLINE { total += sum[i.value]; });
    return total[0];
  }

  static constexpr Kernels table{S::name,    group,        S::tile_tokens,   common_rows(), unfolded_floats,
                                 panel_form, pack,         project,          activate,      finish,
                                 combine,    multiply_add, chains * S::lanes};
};

}  // namespace sida::cpu
