// What happens to a block's fp32 sums, once they lie in shared memory as [block_t tokens][block_w weight rows]:
// scale, activation and a store to the hidden buffer in the first phase; scale, gate and a scatter in the second, and
// for top_k > 1 the sum over a token's choices.
#pragma once

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/routed_row.cuh"
#include "kernels/cuda/work.cuh"

namespace sida::cuda {

// Eight neighbouring columns of one token: every thread's share at a time.
struct Unit {
  int token, column, count;  // within the tile; within the result; how many columns are inside the matrix
  int tile_row;              // the weight tile's row of the first column
};

template <int block_w, Phase phase>
__device__ inline Unit locate_unit(const LayerParams& p, const Work& work, int unit) {
  const int units_of_token = columns_of_tile<block_w, phase>(p.gated) / 8;
  const int local = unit % units_of_token * 8;
  const bool gated = phase == Phase::hidden && p.gated;
  const int tile_row = gated ? local / 16 * 32 + local % 16 : local;
  const int column = weight_row<block_w, phase>(p, work.weight_tile, tile_row).column;
  const int columns = phase == Phase::hidden ? p.d_ff : p.d_model;
  const int inside = max(0, min(8, columns - column));
  return {unit / units_of_token, column, inside, tile_row};
}

// Eight sums of a token times the scales of their rows (int8 alone has them).
__device__ inline void scaled_sums(const float* sums, const ExpertMatrix& w, int slot, int matrix_row, int count,
                                   float (&value)[8]) {
  const float* scale = w.scale == nullptr ? nullptr : w.scale + slot * w.scale_slot_stride + matrix_row;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    value[i] = sums[i];
    if (scale != nullptr && i < count) value[i] *= scale[i];
  }
}

__device__ inline void add_bias(const ExpertMatrix& w, int slot, int matrix_row, int count, float (&value)[8]) {
  if (w.bias == nullptr) return;
  const float* bias = w.bias + slot * w.bias_slot_stride + matrix_row;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) value[i] += bias[i];
  }
}

// A finished sum: times its row's scale, plus its row's bias.
__device__ inline float finished(float sum, const ExpertMatrix& w, int slot, int matrix_row) {
  if (w.scale != nullptr) sum *= w.scale[slot * w.scale_slot_stride + matrix_row];
  if (w.bias != nullptr) sum += w.bias[slot * w.bias_slot_stride + matrix_row];
  return sum;
}

template <int block_w, int block_t, int row_floats>
__device__ inline void store_hidden(const LayerParams& p, const Work& work, float* sums, DType hidden_dtype) {
  const int units = block_t * columns_of_tile<block_w, Phase::hidden>(p.gated) / 8;
  for (int i = static_cast<int>(threadIdx.x); i < units; i += static_cast<int>(blockDim.x)) {
    const Unit unit = locate_unit<block_w, Phase::hidden>(p, work, i);
    if (unit.token >= work.tokens.count || unit.column >= p.hidden_row_stride) continue;
    float* own = sums + unit.token * row_floats + unit.tile_row;
    // One after the other, in their place in shared memory: the activations are long, and eight copies of them take the
    // compiler longer than the rest of the kernel. Rows are padded to whole units, and the padding is zero: the second
    // phase may read whole units too.
#pragma unroll 1
    for (int j = 0; j < 8; ++j) {
      float value = 0.0f;
      if (j < unit.count) {
        value = activate(finished(own[j], p.wi, work.tokens.slot, unit.column + j), p.activation);
        if (p.gated) {
          const float up = finished(own[16 + j], p.wi, work.tokens.slot, p.d_ff + unit.column + j);
          value *= other_half(up, p.activation);
        }
      }
      own[j] = value;
    }
    float value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = own[j];
    store_eight(p.hidden, (work.tokens.first + unit.token) * p.hidden_row_stride + unit.column, hidden_dtype, 8, true,
                value);
  }
}

// Adds the bias to eight finished sums, gates them and scatters them to their token's row.
__device__ inline void store_gated(const LayerParams& p, const Work& work, int position, int column, int count,
                                   DType dtype, float (&value)[8]) {
  const int row = p.plan.row_of_position[position];
  add_bias(p.wo, work.tokens.slot, column, count, value);
  if (p.gate != nullptr) {
    const float gate = p.gate[row];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] *= gate;
  }
  if (p.top_k == 1) {
    store_eight(p.out, static_cast<int64_t>(row) * p.d_model + column, dtype, count, p.vector_out, value);
  } else {
    store_eight(p.partials, static_cast<int64_t>(row) * p.d_model + column, DType::f32, count, p.vector_partials,
                value);
  }
}

// Adds the slices' sums in the order of the slices: whichever block comes last does it, so no order of arrival shows.
template <int block_w, int block_t>
__device__ inline void add_slices(const LayerParams& p, const Work& work, DType dtype) {
  const int64_t slice = p.positions * p.split_row_stride;
  for (int i = static_cast<int>(threadIdx.x); i < block_t * block_w / 8; i += static_cast<int>(blockDim.x)) {
    const Unit unit = locate_unit<block_w, Phase::output>(p, work, i);
    if (unit.token >= work.tokens.count || unit.count == 0) continue;
    const int position = work.tokens.first + unit.token;
    const float* own = p.split_sums + position * p.split_row_stride + unit.column;
    float sum[8] = {};
    for (int split = 0; split < p.splits; ++split) {
      const Eight<float> part = *reinterpret_cast<const Eight<float>*>(own + split * slice);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] += part.element[j];
    }
    store_gated(p, work, position, unit.column, unit.count, dtype, sum);
  }
}

// Announces the block's slice; true for the block that is the last of its tile, which then sees all slices.
// `flag`: an int of shared memory that nothing else uses.
__device__ inline bool is_last_slice(const LayerParams& p, const Work& work, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(&p.tickets[work.token_tile * work.weight_tiles + work.weight_tile], 1);
  __syncthreads();
  if (*flag != p.splits - 1) return false;
  __threadfence();
  return true;
}

// For top_k > 1: the block whose row is the last of its token's rows in this wave adds the token's choices, in their
// order and rounded once, whichever block that is. Choices of earlier waves lie in `partials` already, those of later
// waves and those without an expert are zero there: every wave leaves the sum of what there is so far, the last one all
// of it. `completes`: block_t ints of shared memory that nothing else uses any more.
template <int block_w, int block_t>
__device__ inline void combine_choices(const LayerParams& p, const Work& work, DType dtype, int* completes) {
  __threadfence();
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < work.tokens.count; i += static_cast<int>(blockDim.x)) {
    const int token = p.plan.row_of_position[work.tokens.first + i] / p.top_k;
    int rows = 0;
    for (int choice = 0; choice < p.top_k; ++choice) {
      const RoutedRow routed = locate_expert(p.routing, token * p.top_k + choice);
      if (routed.found == Found::resident) ++rows;
    }
    int* const arrivals = &p.arrivals[static_cast<int64_t>(token) * work.weight_tiles + work.weight_tile];
    completes[i] = atomicAdd(arrivals, 1) == rows - 1;
  }
  __syncthreads();
  __threadfence();
  for (int i = static_cast<int>(threadIdx.x); i < block_t * block_w / 8; i += static_cast<int>(blockDim.x)) {
    const Unit unit = locate_unit<block_w, Phase::output>(p, work, i);
    if (unit.token >= work.tokens.count || unit.count == 0 || completes[unit.token] == 0) continue;
    const int row = p.plan.row_of_position[work.tokens.first + unit.token];
    const int token = row / p.top_k;
    float sum[8] = {};
    for (int choice = 0; choice < p.top_k; ++choice) {
      const int64_t first = (static_cast<int64_t>(token) * p.top_k + choice) * p.d_model + unit.column;
      float part[8];
      load_eight(p.partials, first, DType::f32, unit.count, p.vector_partials, part);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] += part[j];
    }
    store_eight(p.out, static_cast<int64_t>(token) * p.d_model + unit.column, dtype, unit.count, p.vector_out, sum);
  }
}

// `flag`: an int of shared memory that nothing else uses; `completes`: as above.
template <int block_w, int block_t, int row_floats>
__device__ inline void store_output(const LayerParams& p, const Work& work, const float* sums, DType dtype, int* flag,
                                    int* completes) {
  const int64_t slice = p.positions * p.split_row_stride;
  for (int i = static_cast<int>(threadIdx.x); i < block_t * block_w / 8; i += static_cast<int>(blockDim.x)) {
    const Unit unit = locate_unit<block_w, Phase::output>(p, work, i);
    if (unit.token >= work.tokens.count || unit.count == 0) continue;
    const int position = work.tokens.first + unit.token;
    float value[8];
    scaled_sums(sums + unit.token * row_floats + unit.tile_row, p.wo, work.tokens.slot, unit.column, unit.count, value);
    if (p.splits == 1) {
      store_gated(p, work, position, unit.column, unit.count, dtype, value);
    } else {
      store_eight(p.split_sums, work.split * slice + position * p.split_row_stride + unit.column, DType::f32, 8, true,
                  value);
    }
  }
  if (p.splits > 1) {
    if (!is_last_slice(p, work, flag)) return;
    add_slices<block_w, block_t>(p, work, dtype);
  }
  if (p.top_k > 1) combine_choices<block_w, block_t>(p, work, dtype, completes);
}

}  // namespace sida::cuda
