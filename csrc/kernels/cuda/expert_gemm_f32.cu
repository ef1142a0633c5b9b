// Both phases in fp32 without tensor cores: every product and sum is an fp32 fused multiply-add, whatever the stored
// types are. Taken for fp32 activations, for mixed types, and for shapes whose rows are not 16-byte aligned.
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/kernels.h"

namespace sida::cuda {

namespace {

constexpr int block_w = SimtShape::block_w, block_k = SimtShape::block_k, threads = SimtShape::threads;

// Slices of both operands, transposed to [k][row], so that a thread's rows are neighbours. Padded to whole float4.
template <int block_t>
struct SimtMemory {
  static constexpr int weight_floats = block_w + 4, token_floats = block_t + 4;
  static constexpr int row_floats = block_w + 4;  // of the sums, which are laid over the slices
  static constexpr int slices_bytes = block_k * (weight_floats + token_floats) * 4;
  static constexpr int sums_bytes = block_t * row_floats * 4;
  static constexpr int tile_bytes = slices_bytes > sums_bytes ? slices_bytes : sums_bytes;
  static constexpr int bytes = tile_bytes + (2 * block_w + block_t) * 8 + 16;
  static_assert(bytes <= 48 * 1024);
};

// One thread's share of a slice on its way through registers: units of eight elements along k.
template <int rows>
struct Share {
  static constexpr int units = (rows * block_k / 8 + threads - 1) / threads;
  float value[units][8];

  __device__ void load(const void* data, DType dtype, bool vector, const int64_t* row_offset, int depth_begin,
                       int depth) {
#pragma unroll
    for (int i = 0; i < units; ++i) {
      const int unit = static_cast<int>(threadIdx.x) + i * threads;
      if (rows * block_k / 8 % threads != 0 && unit >= rows * block_k / 8) continue;
      const int64_t offset = row_offset[unit % rows];
      const int k = depth_begin + unit / rows * 8;
      load_eight(data, offset + k, dtype, offset < 0 ? 0 : max(0, min(8, depth - k)), vector, value[i]);
    }
  }

  // The same of 4-bit weights: `row_offset` is in bytes, `scale_offset` in factors.
  __device__ void load_groups(const ExpertMatrix& w, DType dtype, bool vector, const int64_t* row_offset,
                              const int64_t* scale_offset, int depth_begin, int depth) {
#pragma unroll
    for (int i = 0; i < units; ++i) {
      const int unit = static_cast<int>(threadIdx.x) + i * threads;
      if (rows * block_k / 8 % threads != 0 && unit >= rows * block_k / 8) continue;
      const int64_t offset = row_offset[unit % rows];
      const int k = depth_begin + unit / rows * 8;
      if (offset < 0 || k >= depth) {
#pragma unroll
        for (int j = 0; j < 8; ++j) value[i][j] = 0.0f;
        continue;
      }
      const int64_t group = scale_offset[unit % rows] + k / static_cast<int>(group_columns);
      load_eight_of_group(w.data, offset + k / 2, dtype, load_group_scale(w.group_scale, group, dtype), depth - k,
                          vector, value[i]);
    }
  }

  __device__ void store(float* slice, int floats) const {
#pragma unroll
    for (int i = 0; i < units; ++i) {
      const int unit = static_cast<int>(threadIdx.x) + i * threads;
      if (rows * block_k / 8 % threads != 0 && unit >= rows * block_k / 8) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) slice[(unit / rows * 8 + j) * floats + unit % rows] = value[i][j];
    }
  }
};

}  // namespace

template <int block_t, Phase phase>
__global__ void __launch_bounds__(SimtShape::threads, 4) expert_gemm_f32(const LayerParams p) {
  using Memory = SimtMemory<block_t>;
  const Work work = locate_work<block_w, phase>(p);
  if (!work.any) return;

  unsigned char* shared = dynamic_shared();
  float* weight_slice = reinterpret_cast<float*>(shared);
  float* token_slice = weight_slice + block_k * Memory::weight_floats;
  int64_t* weight_offset = reinterpret_cast<int64_t*>(shared + Memory::tile_bytes);
  int64_t* token_offset = weight_offset + block_w;
  int64_t* scale_offset = token_offset + block_t;
  int* flag = reinterpret_cast<int*>(scale_offset + block_w);
  fill_row_tables<block_w, block_t, phase>(p, work, weight_offset, token_offset);
  if (shares_factors(p.w_dtype)) fill_scale_table<block_w, phase>(p, work, scale_offset);
  __syncthreads();

  const void* tokens = phase == Phase::hidden ? p.x : p.hidden_values;
  const DType token_dtype = phase == Phase::hidden ? p.x_dtype : p.hidden_dtype;
  const ExpertMatrix& w = phase == Phase::hidden ? p.wi : p.wo;
  const int depth = phase == Phase::hidden ? p.d_model : p.d_ff;
  const bool vector_tokens = phase == Phase::hidden ? p.vector_x : p.vector_hidden;
  const bool vector_weights = phase == Phase::hidden ? p.vector_wi : p.vector_wo;
  const Steps steps = steps_of<block_k, phase>(p, work);

  constexpr int own_tokens = block_t / 8;  // 16 groups of four weight rows times 8 groups of tokens
  const int own_row = static_cast<int>(threadIdx.x) % 16 * 4;
  const int own_token = static_cast<int>(threadIdx.x) / 16 * own_tokens;
  float sums[own_tokens][4] = {};
  Share<block_w> weight_share;
  Share<block_t> token_share;
  const auto load = [&](int step) {
    if (shares_factors(p.w_dtype)) {
      weight_share.load_groups(w, p.w_dtype, vector_weights, weight_offset, scale_offset, step * block_k, depth);
    } else {
      weight_share.load(w.data, p.w_dtype, vector_weights, weight_offset, step * block_k, depth);
    }
    token_share.load(tokens, token_dtype, vector_tokens, token_offset, step * block_k, depth);
  };

  if (steps.begin < steps.end) load(steps.begin);
  for (int step = steps.begin; step < steps.end; ++step) {
    weight_share.store(weight_slice, Memory::weight_floats);
    token_share.store(token_slice, Memory::token_floats);
    __syncthreads();
    // The next slice is on its way to the registers while this one is used.
    if (step + 1 < steps.end) load(step + 1);
#pragma unroll 8
    for (int k = 0; k < block_k; ++k) {
      const float4 w = *reinterpret_cast<const float4*>(weight_slice + k * Memory::weight_floats + own_row);
#pragma unroll
      for (int j = 0; j < own_tokens; ++j) {
        const float x = token_slice[k * Memory::token_floats + own_token + j];
        sums[j][0] = fmaf(w.x, x, sums[j][0]);
        sums[j][1] = fmaf(w.y, x, sums[j][1]);
        sums[j][2] = fmaf(w.z, x, sums[j][2]);
        sums[j][3] = fmaf(w.w, x, sums[j][3]);
      }
    }
    __syncthreads();
  }

  float* tile_sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int j = 0; j < own_tokens; ++j) {
    *reinterpret_cast<float4*>(tile_sums + (own_token + j) * Memory::row_floats + own_row) =
        make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
  }
  __syncthreads();
  if constexpr (phase == Phase::hidden) {
    store_hidden<block_w, block_t, Memory::row_floats>(p, work, tile_sums, DType::f32);
  } else {
    static_assert(block_t <= 2 * block_w, "the table of weight rows is used again");
    store_output<block_w, block_t, Memory::row_floats>(p, work, tile_sums, p.x_dtype, flag,
                                                       reinterpret_cast<int*>(weight_offset));
  }
}

template __global__ void expert_gemm_f32<16, Phase::hidden>(LayerParams);
template __global__ void expert_gemm_f32<16, Phase::output>(LayerParams);
template __global__ void expert_gemm_f32<64, Phase::hidden>(LayerParams);
template __global__ void expert_gemm_f32<64, Phase::output>(LayerParams);

LayerKernels f32_kernels(int block_t) {
  if (block_t == 16) {
    return {
        "expert_gemm_f32<16>", expert_gemm_f32<16, Phase::hidden>, expert_gemm_f32<16, Phase::output>, block_w, threads,
        SimtMemory<16>::bytes};
  }
  return {
      "expert_gemm_f32<64>", expert_gemm_f32<64, Phase::hidden>, expert_gemm_f32<64, Phase::output>, block_w, threads,
      SimtMemory<64>::bytes};
}

}  // namespace sida::cuda
