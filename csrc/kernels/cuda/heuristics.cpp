// Tile shapes by tokens an expert, the slices of d_ff by how many blocks the device can hold.
#include "kernels/cuda/heuristics.h"

#include <algorithm>

#include "base/rounding.h"

namespace sida::cuda {
namespace {

bool multiple(int64_t elements, DType dtype, int64_t bytes) {
  return elements * element_bytes(dtype) % bytes == 0;
}

bool pointer_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Why the tensor cores cannot take products of these types, or null.
const char* obstacle(DType x_dtype, DType w_dtype) {
  if (x_dtype == DType::f32) return "float32 activations keep float32 products";
  if (w_dtype != x_dtype && w_dtype != DType::i8 && !is_grouped(w_dtype)) {
    return "the weights' type is neither that of the activations nor one of fewer bits";
  }
  return nullptr;
}

constexpr const char* crooked = "rows are not 16-byte aligned";

const char* obstacle(const MoeFfnArgs& args) {
  if (const char* const types = obstacle(args.x_dtype, args.w_dtype)) return types;
  if (!multiple(args.d_model, args.x_dtype, 16) || !multiple(args.d_ff, args.x_dtype, 16) ||
      !multiple(args.x_row_stride, args.x_dtype, 16) || !pointer_aligned(args.x, 16) ||
      !rows_aligned(args.wi, args.d_model, args.w_dtype, 16) || !rows_aligned(args.wo, args.d_ff, args.w_dtype, 16) ||
      !pointer_aligned(args.out, 16)) {
    return crooked;
  }
  return nullptr;
}

const char* obstacle(const LinearArgs& args) {
  if (const char* const types = obstacle(args.x_dtype, args.w_dtype)) return types;
  if (!multiple(args.columns, args.x_dtype, 16) || !multiple(args.x_row_stride, args.x_dtype, 16) ||
      !pointer_aligned(args.x, 16) || !rows_aligned(args.w, args.columns, args.w_dtype, 16)) {
    return crooked;
  }
  return nullptr;
}

// Tile and slices of products whose last one has `depth` columns and `columns` rows of weights.
Choice chosen(const char* why_not, DType w_dtype, int64_t rows, int64_t experts, int64_t depth, int64_t columns,
              const Architecture& architecture) {
  const int64_t rows_of_expert = divide_up(rows, experts);
  Choice choice{why_not == nullptr ? Path::tensor_core : Path::f32, why_not == nullptr ? "" : why_not, 16, 1};
  if (choice.path == Path::f32) {
    choice.block_t = rows_of_expert <= 16 ? 16 : 64;
  } else if (rows_of_expert <= 16) {
    choice.block_t = 16;
  } else if (rows_of_expert <= 96 || is_grouped(w_dtype)) {
    choice.block_t = 64;
  } else {
    // The large tile pays where its stages leave room for no second medium block either, and where the layer has
    // enough of them to fill the device.
    const int64_t large_blocks = divide_up(columns, 128) * max_tiles(rows, experts, 128);
    choice.block_t = large_blocks >= architecture.multiprocessors ? 128 : 64;
  }

  // Decoding streams wo once: too few tiles of d_model leave most of the device idle, so d_ff is cut as well. A slice
  // keeps at least four steps of the pipeline, or its prologue would dominate.
  if (choice.block_t == 16) {
    const int64_t block_k = choice.path == Path::f32 ? 32 : 64;
    const int64_t blocks = std::max<int64_t>(1, divide_up(columns, 64) * experts);
    const int64_t wanted = divide_up(2 * static_cast<int64_t>(architecture.multiprocessors), blocks);
    const int64_t most = std::max<int64_t>(1, divide_up(depth, block_k) / 4);
    choice.splits = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::min<int64_t>(most, 16)));
  }
  return choice;
}

}  // namespace

bool rows_aligned(const ExpertMatrix& matrix, int64_t row_elements, DType dtype, int64_t bytes) {
  return pointer_aligned(matrix.data, bytes) && row_bytes(dtype, row_elements) % bytes == 0 &&
         multiple(matrix.row_stride, dtype, bytes) && multiple(matrix.slot_stride, dtype, bytes);
}

int64_t max_tiles(int64_t rows, int64_t experts, int block_t) {
  // Every expert with a row has at most one tile that is not full.
  const int64_t partial = std::min(rows, experts);
  return partial + (rows - partial) / block_t;
}

Choice choose(const MoeFfnArgs& args, const Architecture& architecture) {
  const int64_t rows = args.tokens * args.top_k;
  const int64_t experts = std::max<int64_t>(1, std::min(rows, args.num_experts));
  return chosen(obstacle(args), args.w_dtype, rows, experts, args.d_ff, args.d_model, architecture);
}

Choice choose(const LinearArgs& args, const Architecture& architecture) {
  return chosen(obstacle(args), args.w_dtype, args.tokens, 1, args.columns, args.rows, architecture);
}

}  // namespace sida::cuda
