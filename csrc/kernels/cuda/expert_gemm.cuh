// The tensor-core kernel of both phases: a tile of an expert's weight rows times a tile of its tokens, gathered in the
// prologue, through a cp.async pipeline of swizzled stages, with the epilogues of epilogue.cuh.
//
//   sums[weight row, token] = sum over k of W[row, k] * X[token, k]
//
// Both operands are contiguous along k, as mma's "row.col" wants them. int8 weights stay int8 in shared memory and
// become 16-bit in registers, exactly; their scale is applied to the sums. So do int4 and mxfp4 weights, whose groups
// of 32 have a factor each: a group's sum is made apart and added to the row's sum times the factor, in fp32, so that
// neither is rounded to 16 bits. The order of the additions of one sum does not depend on the tile shape, only on
// `splits`.
#pragma once

#include <type_traits>

#include "kernels/cuda/epilogue.cuh"

namespace sida::cuda {

template <class Weight>
inline constexpr bool has_groups = is_grouped(ElementOf<Weight>::dtype);

// Weights in an object of type Weight.
template <class Weight>
inline constexpr int weights_of_object = has_groups<Weight> ? 2 : 1;

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
// The medium tile of 4-bit weights, whose warps have half as many sums: the groups' sums and what unfolds want
// registers.
using MediumGroupsShape = GemmShape<128, 64, 4, 2, 3, 2>;

// A stage's tiles hold rows of 64 elements: 128 bytes of 16-bit ones, 64 bytes of int8, 32 bytes (two groups) of 4-bit
// ones. The 16-byte chunks of a row are exchanged by an exclusive or with the row's number, so that the eight rows of
// one ldmatrix lie in different banks.
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

template <class Weight>
struct FourBitTile {
  static constexpr int row_bytes = 32;
  __device__ static int at(int row, int chunk) { return row * row_bytes + ((chunk ^ ((row >> 2) & 1)) << 4); }
};
template <>
struct WeightTile<int4_pair> : FourBitTile<int4_pair> {};
template <>
struct WeightTile<mxfp4_pair> : FourBitTile<mxfp4_pair> {};

// With int8 weights a lane needs four neighbouring elements of a token (see load_token_fragments), with 4-bit ones
// eight: as many bytes at once, for which other exchanges are free of bank conflicts.
template <class Weight>
struct TokenTileLayout {
  static constexpr int row_bytes = 128;
  __device__ static int at(int row, int chunk) {
    const int exchange = has_groups<Weight> ? (row & 1) << 2 : sizeof(Weight) == 1 ? (row & 3) << 1 : row & 7;
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
  // The factors of a stage's two groups for each weight row, of this stage and of the next.
  static constexpr int factors_bytes = has_groups<Weight> ? 2 * Shape::block_w * 8 : 0;
  static constexpr int bytes = tile_bytes + factors_bytes + tables_bytes + 16;
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
  constexpr int per_object = weights_of_object<Weight>;
  constexpr int weight_elements = 16 / static_cast<int>(sizeof(Weight)) * per_object;
#pragma unroll
  for (int i = 0; i < Shape::block_w * weight_chunks / Shape::threads; ++i) {
    const int copy = thread + i * Shape::threads;
    const int row = copy / weight_chunks, chunk = copy % weight_chunks;
    const int64_t offset = weight_offset[row];
    const int k = depth_begin + chunk * weight_elements;
    const bool inside = offset >= 0 && k < depth;
    cp_async16(stage + WeightTile<Weight>::at(row, chunk), inside ? weights + offset + k / per_object : weights,
               inside);
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

// Eight 4-bit weights of one lane as four registers of two 16-bit floats, in their order, without their factor.
//
// First a shift brings every second weight into the other half of its byte; a permutation of bytes then puts two
// neighbours into the same place of two 16-bit halves.
template <class Token>
__device__ inline void unfold(uint32_t eight, Token, int4_pair, uint32_t (&pair)[4]) {
  constexpr bool is_bf16 = std::is_same_v<Token, bf16>;
  const uint32_t odd = eight >> 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = permute_bytes(eight, odd, 0x4400u + static_cast<uint32_t>(i) * 0x1111u);
    // Bits 0 to 3 of the mantissa of 128 (1024 in fp16) are the weight plus 8: its sign bit is flipped.
    if constexpr (is_bf16) {
      pair[i] = add_bf16x2((low & 0x000F000Fu) ^ 0x43084308u, 0xC308C308u);
    } else {
      pair[i] = add_f16x2((low & 0x000F000Fu) ^ 0x64086408u, 0xE408E408u);
    }
  }
}

template <class Token>
__device__ inline void unfold(uint32_t eight, Token, mxfp4_pair, uint32_t (&pair)[4]) {
  constexpr bool is_bf16 = std::is_same_v<Token, bf16>;
  const uint32_t even = eight << 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t high = permute_bytes(even, eight, 0x4400u + static_cast<uint32_t>(i) * 0x1111u);
    // The sign is in its place. Exponent and mantissa go to the lowest exponents and the highest bit of the mantissa:
    // e2m1's subnormal is the wider type's, and all are 2^-126 (fp16: 2^-14) times too small.
    const uint32_t sign = high & 0x80008000u;
    if constexpr (is_bf16) {
      pair[i] = multiply_bf16x2(((high >> 6) & 0x01C001C0u) | sign, 0x7E807E80u);
    } else {
      pair[i] = multiply_f16x2(((high >> 3) & 0x0E000E00u) | sign, 0x74007400u);
    }
  }
}

// A thread's share of the factors of 4-bit weights on their way from global memory, two for each weight row and step,
// through registers to shared memory.
template <class Shape, class Weight, Phase phase>
struct Factors {
  using Stored = std::conditional_t<std::is_same_v<Weight, int4_pair>, f16, uint8_t>;
  static constexpr int count = Shape::block_w * 2 / Shape::threads;
  static_assert(Shape::block_w * 2 % Shape::threads == 0 && Shape::threads % 2 == 0);
  const Stored* row[count];  // null where the tile's row is outside the matrix
  Stored coming[count];
  int groups;

  __device__ Factors(const LayerParams& p, const Work& work) {
    const ExpertMatrix& w = phase == Phase::hidden ? p.wi : p.wo;
    const int depth = phase == Phase::hidden ? p.d_model : p.d_ff;
    groups = (depth + static_cast<int>(group_columns) - 1) / static_cast<int>(group_columns);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int tile_row = (static_cast<int>(threadIdx.x) + i * Shape::threads) / 2;
      const int matrix_row = weight_row<Shape::block_w, phase>(p, work.weight_tile, tile_row).matrix_row;
      row[i] = matrix_row < 0
                   ? nullptr
                   : static_cast<const Stored*>(w.group_scale) + work.tokens.slot * w.group_scale_slot_stride +
                         matrix_row * w.group_scale_row_stride;
    }
  }

  // Asks for those of a step; what lies outside is not used.
  __device__ void load(int step) {
    const int group = step * 2 + static_cast<int>(threadIdx.x) % 2;
#pragma unroll
    for (int i = 0; i < count; ++i) coming[i] = row[i] != nullptr && group < groups ? row[i][group] : Stored{};
  }

  // Waits for them. `place`: [block_w][2].
  __device__ void store(float* place) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * Shape::threads;
      if constexpr (std::is_same_v<Weight, int4_pair>) {
        place[at] = to_float(coming[i]);
      } else {
        place[at] = power_of_two(coming[i]);
      }
    }
  }
};

struct Nothing {
  __device__ Nothing(const LayerParams&, const Work&) {}
};

// One stage of 4-bit weights. A lane's eight neighbouring weights of a group stand for mma's k = 2 * pair, + 1, + 8 and
// + 9 of two steps, and its eight elements of a token, 16 bytes at once, for the same.
template <class Token, class Weight, class Shape>
__device__ inline void multiply_groups(float (&sums)[Shape::warp_w][Shape::warp_t][4],
                                       const unsigned char* weight_stage, const unsigned char* token_stage,
                                       const float* factors, int warp_row, int warp_token) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4, pair = lane % 4;
  // One load brings both groups of 16 rows, or a group of 32 rows.
  constexpr bool both = Shape::warp_w == 1;
  static_assert(both || Shape::warp_w % 2 == 0);
  uint32_t packed[both ? 1 : Shape::warp_w / 2][4];
  if constexpr (both) {
    ldmatrix4(packed[0], weight_stage + WeightTile<Weight>::at(warp_row + lane % 16, lane / 16));
  }
  // Group by group where there is much to hold, or the compiler would fill all registers with what comes later.
#pragma unroll(both ? 2 : 1)
  for (int k32 = 0; k32 < Shape::block_k / 32; ++k32) {
    if constexpr (!both) {
#pragma unroll
      for (int i = 0; i < Shape::warp_w / 2; ++i) {
        ldmatrix4(packed[i], weight_stage + WeightTile<Weight>::at(warp_row + i * 32 + lane, k32));
      }
    }
    uint4 eight[Shape::warp_t];
#pragma unroll
    for (int j = 0; j < Shape::warp_t; ++j) {
      const unsigned char* own = token_stage + TokenTileLayout<Weight>::at(warp_token + j * 8 + group, k32 * 4 + pair);
      eight[j] = *reinterpret_cast<const uint4*>(own);
    }
    // Row by row: the unfolded weights of one tile of 16 rows are all that registers must hold.
#pragma unroll
    for (int i = 0; i < Shape::warp_w; ++i) {
      uint32_t weight_fragment[2][4];
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t unfolded[4];
        unfold(packed[i / 2][(both ? k32 : i % 2) * 2 + half], Token{}, Weight{}, unfolded);
        weight_fragment[0][half] = unfolded[0];
        weight_fragment[0][half + 2] = unfolded[1];
        weight_fragment[1][half] = unfolded[2];
        weight_fragment[1][half + 2] = unfolded[3];
        factor[half] = factors[(warp_row + i * 16 + half * 8 + group) * 2 + k32];
      }
#pragma unroll
      for (int j = 0; j < Shape::warp_t; ++j) {
        float part[4] = {};
        mma_m16n8k16<Token>(part, weight_fragment[0], eight[j].x, eight[j].y);
        mma_m16n8k16<Token>(part, weight_fragment[1], eight[j].z, eight[j].w);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sums[i][j][half * 2] = fmaf(factor[half], part[half * 2], sums[i][j][half * 2]);
          sums[i][j][half * 2 + 1] = fmaf(factor[half], part[half * 2 + 1], sums[i][j][half * 2 + 1]);
        }
      }
    }
  }
}

// One stage of the other types.
template <class Token, class Weight, class Shape>
__device__ inline void multiply(float (&sums)[Shape::warp_w][Shape::warp_t][4], const unsigned char* weight_stage,
                                const unsigned char* token_stage, int warp_row, int warp_token) {
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

template <class Token, class Weight, class Shape, Phase phase>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_sm) expert_gemm(const LayerParams p) {
  using Memory = GemmMemory<Shape, Weight>;
  const Work work = locate_work<Shape::block_w, phase>(p);
  if (!work.any) return;

  unsigned char* stages = dynamic_shared();
  float* factors = reinterpret_cast<float*>(stages + Memory::tile_bytes);
  int64_t* weight_offset = reinterpret_cast<int64_t*>(stages + Memory::tile_bytes + Memory::factors_bytes);
  int64_t* token_offset = weight_offset + Shape::block_w;
  int* flag = reinterpret_cast<int*>(token_offset + Shape::block_t);
  fill_row_tables<Shape::block_w, Shape::block_t, phase>(p, work, weight_offset, token_offset);
  __syncthreads();

  const Token* tokens = static_cast<const Token*>(phase == Phase::hidden ? p.x : p.hidden_values);
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

  // Without groups there is nothing in it.
  [[maybe_unused]] std::conditional_t<has_groups<Weight>, Factors<Shape, Weight, phase>, Nothing> own_factors(p, work);
  const auto factors_of = [&](int step) { return factors + step % 2 * Shape::block_w * 2; };
  if constexpr (has_groups<Weight>) {
    own_factors.load(steps.begin);
    own_factors.store(factors_of(steps.begin));
    own_factors.load(steps.begin + 1);
  }
  for (int ahead = 0; ahead < Shape::stages - 1; ++ahead) load(steps.begin + ahead);
  for (int step = steps.begin; step < steps.end; ++step) {
    cp_async_wait<Shape::stages - 2>();
    // One barrier does for both: everybody's copies of this stage are visible, and everybody has finished with the
    // stage that is filled next.
    __syncthreads();
    load(step + Shape::stages - 1);

    const unsigned char* weight_stage = stages + step % Shape::stages * Memory::stage_bytes;
    const unsigned char* token_stage = weight_stage + Memory::weight_bytes;
    if constexpr (has_groups<Weight>) {
      // The factors of the next step; those of the last one, in their place, are used by nobody any more.
      own_factors.store(factors_of(step + 1));
      own_factors.load(step + 2);
      multiply_groups<Token, Weight, Shape>(sums, weight_stage, token_stage, factors_of(step), warp_row, warp_token);
    } else {
      multiply<Token, Weight, Shape>(sums, weight_stage, token_stage, warp_row, warp_token);
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
