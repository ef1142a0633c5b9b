// Which part of a layer a block computes: BLOCK_W rows of an expert's weights times BLOCK_T of its rows of tokens.
// Weights are the tall operand throughout, so that an expert with one token wastes 15 columns of a tile, not 127 rows.
#pragma once

#include "base/rounding.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/ptx.cuh"

namespace sida::cuda {

// Columns of the result that one tile of weight rows gives: a gated tile holds gate and up rows.
template <int block_w, Phase phase>
__host__ __device__ constexpr int columns_of_tile(bool gated) {
  return phase == Phase::hidden && gated ? block_w / 2 : block_w;
}

struct Work {
  TokenTile tokens;
  int token_tile, weight_tile, weight_tiles, split;
  bool any;
};

// Blocks are numbered weight tile first, so that neighbours share their tokens and stream different weights.
template <int block_w, Phase phase>
__device__ inline Work locate_work(const LayerParams& p) {
  const int columns = phase == Phase::hidden ? p.d_ff : p.d_model;
  Work work;
  work.weight_tiles = static_cast<int>(divide_up(columns, columns_of_tile<block_w, phase>(p.gated)));
  const int splits = phase == Phase::hidden ? 1 : p.splits;
  int rest = static_cast<int>(blockIdx.x);
  work.weight_tile = rest % work.weight_tiles;
  rest /= work.weight_tiles;
  work.split = rest % splits;
  work.token_tile = rest / splits;
  work.any = work.token_tile < *p.plan.tile_count;
  if (work.any) work.tokens = p.plan.tiles[work.token_tile];
  return work;
}

// The result column of row `row` of a weight tile, and the matrix row that it comes from (-1 outside the matrix).
// A gated tile alternates 16 gate rows and the 16 up rows of the same columns.
struct WeightRow {
  int column, matrix_row;
};

template <int block_w, Phase phase>
__device__ inline WeightRow weight_row(const LayerParams& p, int weight_tile, int row) {
  const bool gated = phase == Phase::hidden && p.gated;
  const int first = weight_tile * columns_of_tile<block_w, phase>(p.gated);
  const int columns = phase == Phase::hidden ? p.d_ff : p.d_model;
  const int column = first + (gated ? row / 32 * 16 + row % 16 : row);
  const int matrix_row = column + (gated && row / 16 % 2 == 1 ? p.d_ff : 0);
  return {column, column < columns ? matrix_row : -1};
}

// Where position `position` of the sorted rows has its activations, in elements.
template <Phase phase>
__device__ inline int64_t activation_offset(const LayerParams& p, int position) {
  if (phase == Phase::output) return position * p.hidden_row_stride;
  return p.plan.row_of_position[position] / p.top_k * p.x_row_stride;
}

// The first factors of the tile's weight rows of 4 bits, as offsets; not set where there is no row.
template <int block_w, Phase phase>
__device__ inline void fill_scale_table(const LayerParams& p, const Work& work, int64_t* scale_offset) {
  const ExpertMatrix& w = phase == Phase::hidden ? p.wi : p.wo;
  for (int row = static_cast<int>(threadIdx.x); row < block_w; row += static_cast<int>(blockDim.x)) {
    const int matrix_row = weight_row<block_w, phase>(p, work.weight_tile, row).matrix_row;
    if (matrix_row < 0) continue;
    scale_offset[row] = work.tokens.slot * w.group_scale_slot_stride + matrix_row * w.group_scale_row_stride;
  }
}

// The tile's weight rows and token rows as offsets in elements (4 bits: in pairs), -1 where there is none.
template <int block_w, int block_t, Phase phase>
__device__ inline void fill_row_tables(const LayerParams& p, const Work& work, int64_t* weight_offset,
                                       int64_t* token_offset) {
  const ExpertMatrix& w = phase == Phase::hidden ? p.wi : p.wo;
  for (int row = static_cast<int>(threadIdx.x); row < block_w; row += static_cast<int>(blockDim.x)) {
    const int matrix_row = weight_row<block_w, phase>(p, work.weight_tile, row).matrix_row;
    weight_offset[row] = matrix_row < 0 ? -1 : work.tokens.slot * w.slot_stride + matrix_row * w.row_stride;
  }
  for (int row = static_cast<int>(threadIdx.x); row < block_t; row += static_cast<int>(blockDim.x)) {
    const bool inside = row < work.tokens.count;
    token_offset[row] = inside ? activation_offset<phase>(p, work.tokens.first + row) : -1;
  }
}

// The steps of the reduction that this block makes: all of them, or its slice of d_ff.
struct Steps {
  int begin, end;
};

template <int block_k, Phase phase>
__device__ inline Steps steps_of(const LayerParams& p, const Work& work) {
  const int steps = static_cast<int>(divide_up(phase == Phase::hidden ? p.d_model : p.d_ff, block_k));
  if (phase == Phase::hidden) return {0, steps};
  return {steps * work.split / p.splits, steps * (work.split + 1) / p.splits};
}

}  // namespace sida::cuda
