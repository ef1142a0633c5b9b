// The functions that every instruction set provides, behind one table of pointers.
//
// This header is included by the translation units that are compiled for AVX2, AVX-512, ...: nothing in it, and
// nothing that those units include, may define an inline function with external linkage. The linker keeps one copy of
// such a function and might keep the one that a plain CPU cannot execute.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/linear.h"
#include "kernels/moe_ffn.h"

namespace sida::cpu {

// Tokens are held in fp32 panels in the order in which a tile reads them. n tokens of width k form
// ceil(n / tile_tokens) tiles of nearly equal width N; a tile is [padded k / group][N][group], so tile i begins
// at float first_token(i) * padded k. Columns past k are zero (int4, mxfp4: up to a multiple of 32). Within a group of
// 2 * lanes elements the order is that in which the weights unfold: natural, or for bfloat16, int4 and mxfp4 even
// elements first (see kernel_tile.h). Kernels that multiply bfloat16 by bfloat16 hold the tokens in panels of their own
// form (kernel_amx.h, kernel_dot.h), and so do those that multiply bytes (kernel_bytes.h).
struct Panel {
  float* data;
  int64_t tokens, width;
  int64_t padded_width;  // floats of memory for each token
  // 0: fp32; above: the bfloat16 terms that each value is the sum of (bf16_terms.h); quantised_terms: 8-bit integers
  // and scales (kernel_bytes.h)
  int terms;
};

inline constexpr int quantised_terms = -1;

struct PanelForm {
  int64_t padded_width;
  int terms;
};

struct Pack {
  DType x_dtype, w_dtype;
  const void* x;
  int64_t x_row_stride;
  const int64_t* entries;  // [panel.tokens]: token * top_k + k
  int64_t top_k;
  Panel panel;
};

// sums[t * sums_stride + r] = w[r] . x[t], before scales
struct Project {
  DType w_dtype;
  const void* w;      // first row
  int64_t row_bytes;  // from one row to the next
  int64_t rows;
  int64_t rows_after;  // of the same matrix, that the caller will want next: worth a prefetch
  Panel x;
  float* sums;
  int64_t sums_stride;
  // For int4 and mxfp4 only.
  const void* group_scales = nullptr;  // of the first row
  int64_t scale_row_bytes = 0;         // from one row's to the next
  float* unfolded = nullptr;           // Kernels::unfolded_floats of memory
};

// Rows [row_begin, row_begin + rows) of h = activation(sums * scale + bias) [* (up_sums * up_scale + up_bias)], for all
// tokens (swiglu_oai combines the two in its own way).
// row_begin is a multiple of `group`.
struct Activate {
  Activation activation;
  DType w_dtype;
  float* sums;     // [tokens, sums_stride], sums_stride at least `rows` rounded up to `group`
  float* up_sums;  // gated, else null
  int64_t sums_stride;
  const float* scale;  // at row_begin; null: 1
  const float* up_scale;
  const float* bias;  // at row_begin; null: 0
  const float* up_bias;
  int64_t row_begin, rows;
  Panel h;
};

struct Kernels {
  const char* name;
  int64_t group;            // elements of a panel's group
  int64_t tile_tokens;      // most tokens in a tile
  int64_t tile_rows;        // a multiple of every tile's rows
  int64_t unfolded_floats;  // memory of Project::unfolded
  // How a panel of `width` columns must be held to be multiplied with weights of w_dtype; values: x's dtype, or f32 for
  // the hidden layer.
  PanelForm (*panel_form)(DType values, DType w_dtype, int64_t width);
  void (*pack)(const Pack&);
  void (*project)(const Project&);
  void (*activate)(const Activate&);
  // out[r] = (sums[r] * scale[r] + bias[r]) * gate, rounded to out_dtype; scale null: 1, bias null: 0
  void (*finish)(const float* sums, int64_t rows, const float* scale, const float* bias, float gate, DType out_dtype,
                 void* out);
  // out[i] = sum over k of partials[k * width + i] in the order of k, rounded to out_dtype
  void (*combine)(const float* partials, int64_t top_k, int64_t width, DType out_dtype, void* out);
  // `rounds` times multiply_adds fused multiply-adds of one lane each, all in registers. For measuring.
  float (*multiply_add)(int64_t rounds);
  int64_t multiply_adds;
};

const Kernels* scalar_kernels() noexcept;
const Kernels* avx2_kernels() noexcept;
const Kernels* avx2_bytes_kernels() noexcept;
const Kernels* avx512_kernels() noexcept;
const Kernels* avx512_vnni_kernels() noexcept;
const Kernels* avx512_bf16_kernels() noexcept;
const Kernels* amx_kernels() noexcept;
const Kernels* amx_fast_kernels() noexcept;
const Kernels* neon_kernels() noexcept;
const Kernels* neon_dot_kernels() noexcept;

// The table of the instruction set and the precision in force; see moe_ffn.h.
const Kernels& kernels();

// moe_ffn, moe_ffn_combine and linear with a table that is not the one in force.
void moe_ffn_with(const Kernels& kernels, const MoeFfnArgs& args, const ParallelFor& parallel);
void moe_ffn_combine_with(const Kernels& kernels, const MoeFfnArgs& args, const ParallelFor& parallel);
void linear_with(const Kernels& kernels, const LinearArgs& args, const ParallelFor& parallel);

}  // namespace sida::cpu
