// The tensor-core kernel of both phases: a tile of an expert's weight rows times a tile of its tokens, gathered in the
// prologue, through a cp.async pipeline of swizzled stages, with the epilogues of epilogue.cuh.
//
//   sums[weight row, token] = sum over k of W[row, k] * X[token, k]
//
// Both operands are contiguous along k, as mma's "row.col" wants them. int8 weights stay int8 in shared memory and
// become 16-bit in registers, exactly; their scale is applied to the sums. The order of the additions of one sum does
// not depend on the tile shape, only on `splits`.
#pragma once

#include "kernels/cuda/epilogue.cuh"

namespace sida::cuda {

template <int block_w_, int block_t_, int warps_w_, int warps_t_, int stages_, int blocks_per_sm_>
struct GemmShape {
  static constexpr int block_w = block_w_, block_t = block_t_, block_k = 64;
  static constexpr int warps_w = warps_w_, warps_t = warps_t_, stages = stages_, blocks_per_sm = blocks_per_sm_;
  static constexpr int threads = warps_w * warps_t * 32;
  static constexpr int warp_w = block_w / warps_w / 16;  // m16 tiles of a warp
  static constexpr int warp_t = block_t / warps_t / 8;   // n8 tiles of a warp
  static_assert(warp_t % 2 == 0, "two token tiles are loaded by one ldmatrix");
};

// For 1-16 tokens an expert: many small blocks, which stream weights; then for more.
using DecodeShape = GemmShape<64, 16, 4, 1, 4, 2>;
using MediumShape = GemmShape<128, 64, 2, 2, 3, 1>;
using LargeShape = GemmShape<128, 128, 2, 4, 3, 1>;

// A stage's tiles hold rows of 64 elements: 128 bytes of 16-bit ones, 64 bytes of int8. The 16-byte chunks of a row are
// exchanged by an exclusive or with the row's number, so that the eight rows of one ldmatrix lie in different banks.
template <class Element>
struct WeightTile;

template <class Element>
struct SixteenBitTile {
  static constexpr int row_bytes = 128;
  __device__ static int at(int row, int chunk) { return row * row_bytes + ((chunk ^ (row & 7)) << 4); }
};
template <>
struct WeightTile<bf16> : SixteenBitTile<bf16> {};
template <>
struct WeightTile<f16> : SixteenBitTile<f16> {};
template <>
struct WeightTile<int8_t> {
  static constexpr int row_bytes = 64;
  __device__ static int at(int row, int chunk) { return row * row_bytes + ((chunk ^ ((row >> 1) & 3)) << 4); }
};

// With int8 weights a lane needs four neighbouring elements of a token (see load_token_fragments): eight bytes at once,
// for which another exchange is free of bank conflicts.
template <class Weight>
struct TokenTileLayout {
  static constexpr int row_bytes = 128;
  __device__ static int at(int row, int chunk) {
    const int exchange = sizeof(Weight) == 1 ? (row & 3) << 1 : row & 7;
    return row * row_bytes + ((chunk ^ exchange) << 4);
  }
};

template <class Shape, class Weight>
struct GemmMemory {
  static constexpr int weight_bytes = Shape::block_w * WeightTile<Weight>::row_bytes;
  static constexpr int token_bytes = Shape::block_t * 128;
  static constexpr int stage_bytes = weight_bytes + token_bytes;
  static constexpr int pipeline_bytes = Shape::stages * stage_bytes;
  // Rows of sums are padded by four floats: lanes that store to eight rows then hit different banks.
  static constexpr int row_floats = Shape::block_w + 4;
  static constexpr int sums_bytes = Shape::block_t * row_floats * 4;
  static constexpr int tile_bytes = pipeline_bytes > sums_bytes ? pipeline_bytes : sums_bytes;
  static constexpr int tables_bytes = (Shape::block_w + Shape::block_t) * 8;
  static constexpr int bytes = tile_bytes + tables_bytes + 16;
};

// Starts the copies of one stage: elements [depth_begin, depth_begin + 64) of every row of the tile, zeros where the
// row or the depth ends.
template <class Shape, class Token, class Weight>
__device__ inline void load_stage(unsigned char* stage, const Token* tokens, const Weight* weights,
                                  const int64_t* token_offset, const int64_t* weight_offset, int depth_begin,
                                  int depth) {
  using Memory = GemmMemory<Shape, Weight>;
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int weight_chunks = WeightTile<Weight>::row_bytes / 16;
  constexpr int weight_elements = 16 / static_cast<int>(sizeof(Weight));
#pragma unroll
  for (int i = 0; i < Shape::block_w * weight_chunks / Shape::threads; ++i) {
    const int copy = thread + i * Shape::threads;
    const int row = copy / weight_chunks, chunk = copy % weight_chunks;
    const int64_t offset = weight_offset[row];
    const int k = depth_begin + chunk * weight_elements;
    const bool inside = offset >= 0 && k < depth;
    cp_async16(stage + WeightTile<Weight>::at(row, chunk), inside ? weights + offset + k : weights, inside);
  }
  unsigned char* token_stage = stage + Memory::weight_bytes;
#pragma unroll
  for (int i = 0; i < (Shape::block_t * 8 + Shape::threads - 1) / Shape::threads; ++i) {
    const int copy = thread + i * Shape::threads;
    const int row = copy / 8, chunk = copy % 8;
    const int64_t offset = token_offset[row];
    const int k = depth_begin + chunk * 8;
    const bool inside = offset >= 0 && k < depth;
    cp_async16(token_stage + TokenTileLayout<Weight>::at(row, chunk), inside ? tokens + offset + k : tokens, inside);
  }
}

// Four int8 as two registers of two 16-bit floats: elements 0 and 1, then 2 and 3.
__device__ inline void widen(uint32_t bytes, bf16, uint32_t& first, uint32_t& second) {
  // With u the byte as unsigned: 128 + (u & 127) and -128 - (u & 128) are both bf16 with the byte's bits in the
  // mantissa and the exponent; their sum is the signed value, exactly.
  const uint32_t low = permute_bytes(bytes, 0, 0x4140), high = permute_bytes(bytes, 0, 0x4342);
  first = add_bf16x2((low & 0x007F007Fu) | 0x43004300u, (low & 0x00800080u) | 0xC300C300u);
  second = add_bf16x2((high & 0x007F007Fu) | 0x43004300u, (high & 0x00800080u) | 0xC300C300u);
}

__device__ inline void widen(uint32_t bytes, f16, uint32_t& first, uint32_t& second) {
  // The byte plus 128 in the mantissa of 1024: 0x64uu is 1024 + u; 1152 comes off again.
  const uint32_t shifted = bytes ^ 0x80808080u;
  first = add_f16x2(permute_bytes(shifted, 0x64646464u, 0x4140), 0xE480E480u);
  second = add_f16x2(permute_bytes(shifted, 0x64646464u, 0x4342), 0xE480E480u);
}

// The fragments of 16 weight rows for two steps of k16.
template <class Token>
__device__ inline void load_weight_fragments(uint32_t (&fragment)[2][4], const unsigned char* stage, int first_row,
                                             int k32, Token, const Token*) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    ldmatrix4(fragment[step], stage + WeightTile<Token>::at(first_row + lane % 16, (k32 * 2 + step) * 2 + lane / 16));
  }
}

// int8: seen as 16-bit elements, a row of 32 bytes is two matrices, and every lane gets four neighbouring bytes. They
// stand for mma's k = 2 * pair, + 1, + 8 and + 9: any order of k will do if both operands have the same.
template <class Token>
__device__ inline void load_weight_fragments(uint32_t (&fragment)[2][4], const unsigned char* stage, int first_row,
                                             int k32, Token token, const int8_t*) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t bytes[4];
  ldmatrix4(bytes, stage + WeightTile<int8_t>::at(first_row + lane % 16, k32 * 2 + lane / 16));
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    widen(bytes[step * 2], token, fragment[step][0], fragment[step][2]);
    widen(bytes[step * 2 + 1], token, fragment[step][1], fragment[step][3]);
  }
}

// The fragments of 16 tokens (two n8 tiles) for one step of k16: registers 0 and 1 of the first tile, then the second.
template <class Weight>
__device__ inline void load_token_fragments(uint32_t (&fragment)[4], const unsigned char* stage, int first_row,
                                            int k16) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  using Layout = TokenTileLayout<Weight>;
  if constexpr (sizeof(Weight) == 1) {
    const int group = lane / 4, pair = lane % 4;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const unsigned char* four = stage + Layout::at(first_row + tile * 8 + group, k16 * 2 + pair / 2) + pair % 2 * 8;
      const uint2 both = *reinterpret_cast<const uint2*>(four);
      fragment[tile * 2] = both.x;
      fragment[tile * 2 + 1] = both.y;
    }
  } else {
    ldmatrix4(fragment, stage + Layout::at(first_row + lane / 16 * 8 + lane % 8, k16 * 2 + lane / 8 % 2));
  }
}

template <class Token, class Weight, class Shape, Phase phase>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_sm) expert_gemm(const LayerParams p) {
  using Memory = GemmMemory<Shape, Weight>;
  const Work work = locate_work<Shape::block_w, phase>(p);
  if (!work.any) return;

  unsigned char* stages = dynamic_shared();
  int64_t* weight_offset = reinterpret_cast<int64_t*>(stages + Memory::tile_bytes);
  int64_t* token_offset = weight_offset + Shape::block_w;
  int* flag = reinterpret_cast<int*>(token_offset + Shape::block_t);
  fill_row_tables<Shape::block_w, Shape::block_t, phase>(p, work, weight_offset, token_offset);
  __syncthreads();

  const Token* tokens = static_cast<const Token*>(phase == Phase::hidden ? p.x : p.hidden);
  const Weight* weights = static_cast<const Weight*>(phase == Phase::hidden ? p.wi.data : p.wo.data);
  const int depth = phase == Phase::hidden ? p.d_model : p.d_ff;
  const Steps steps = steps_of<Shape::block_k, phase>(p, work);
  const auto load = [&](int step) {
    if (step < steps.end) {
      load_stage<Shape>(stages + step % Shape::stages * Memory::stage_bytes, tokens, weights, token_offset,
                        weight_offset, step * Shape::block_k, depth);
    }
    cp_async_commit();  // an empty group where nothing is left, so that the count of groups stays right
  };

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32;
  const int warp_row = warp / Shape::warps_t * Shape::warp_w * 16;
  const int warp_token = warp % Shape::warps_t * Shape::warp_t * 8;
  float sums[Shape::warp_w][Shape::warp_t][4] = {};

  for (int ahead = 0; ahead < Shape::stages - 1; ++ahead) load(steps.begin + ahead);
  for (int step = steps.begin; step < steps.end; ++step) {
    cp_async_wait<Shape::stages - 2>();
    // One barrier does for both: everybody's copies of this stage are visible, and everybody has finished with the
    // stage that is filled next.
    __syncthreads();
    load(step + Shape::stages - 1);

    const unsigned char* weight_stage = stages + step % Shape::stages * Memory::stage_bytes;
    const unsigned char* token_stage = weight_stage + Memory::weight_bytes;
#pragma unroll
    for (int k32 = 0; k32 < Shape::block_k / 32; ++k32) {
      uint32_t weight_fragment[Shape::warp_w][2][4];
#pragma unroll
      for (int i = 0; i < Shape::warp_w; ++i) {
        load_weight_fragments(weight_fragment[i], weight_stage, warp_row + i * 16, k32, Token{},
                              static_cast<const Weight*>(nullptr));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < Shape::warp_t; j += 2) {
          uint32_t token_fragment[4];
          load_token_fragments<Weight>(token_fragment, token_stage, warp_token + j * 8, k32 * 2 + half);
#pragma unroll
          for (int i = 0; i < Shape::warp_w; ++i) {
            mma_m16n8k16<Token>(sums[i][j], weight_fragment[i][half], token_fragment[0], token_fragment[1]);
            mma_m16n8k16<Token>(sums[i][j + 1], weight_fragment[i][half], token_fragment[2], token_fragment[3]);
          }
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float* tile_sums = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int i = 0; i < Shape::warp_w; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::warp_t; ++j) {
      const int row = warp_row + i * 16 + lane / 4;
      const int token = warp_token + j * 8 + lane % 4 * 2;
      tile_sums[token * Memory::row_floats + row] = sums[i][j][0];
      tile_sums[(token + 1) * Memory::row_floats + row] = sums[i][j][1];
      tile_sums[token * Memory::row_floats + row + 8] = sums[i][j][2];
      tile_sums[(token + 1) * Memory::row_floats + row + 8] = sums[i][j][3];
    }
  }
  __syncthreads();
  if constexpr (phase == Phase::hidden) {
    store_hidden<Shape::block_w, Shape::block_t, Memory::row_floats>(p, work, tile_sums, ElementOf<Token>::dtype);
  } else {
    static_assert(Shape::block_t <= 2 * Shape::block_w, "the table of weight rows is used again");
    store_output<Shape::block_w, Shape::block_t, Memory::row_floats>(p, work, tile_sums, ElementOf<Token>::dtype, flag,
                                                                     reinterpret_cast<int*>(weight_offset));
  }
}

}  // namespace sida::cuda
