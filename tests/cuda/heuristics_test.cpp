// Tests of the choice of tiles, slices and paths: plain host code.
#include "kernels/cuda/heuristics.h"

#include <cstring>
#include <random>
#include <vector>

#include "cpp/check.h"

namespace sida::cuda_test {
namespace {

using cuda::Architecture;
using cuda::Choice;
using cuda::Path;

constexpr Architecture a100{80, 108, 163 * 1024}, l4{89, 58, 99 * 1024}, h100{90, 132, 227 * 1024};

// Switch-base-128: aligned pointers that nobody dereferences.
MoeFfnArgs switch_base(int64_t tokens, DType x = DType::bf16, DType w = DType::bf16) {
  MoeFfnArgs args{};
  args.tokens = tokens;
  args.top_k = 1;
  args.d_model = 768;
  args.d_ff = 3072;
  args.num_experts = 128;
  args.num_slots = 128;
  args.x_dtype = x;
  args.w_dtype = w;
  args.x_row_stride = 768;
  args.wi = {reinterpret_cast<const void*>(4096), 2 * 768 * 3072, 768, nullptr, 0};
  args.wo = {reinterpret_cast<const void*>(8192), 2 * 768 * 3072, 3072, nullptr, 0};
  args.out = reinterpret_cast<void*>(16384);
  args.x = reinterpret_cast<const void*>(32768);
  return args;
}

SIDA_TEST(tiles_grow_with_the_tokens_of_an_expert) {
  CHECK_EQ(cuda::choose(switch_base(1), a100).block_t, 16);
  CHECK_EQ(cuda::choose(switch_base(128 * 16), a100).block_t, 16);
  CHECK_EQ(cuda::choose(switch_base(128 * 17), a100).block_t, 64);
  CHECK_EQ(cuda::choose(switch_base(128 * 200), a100).block_t, 128);
}

SIDA_TEST(large_tiles_only_where_they_fill_the_device) {
  MoeFfnArgs args = switch_base(300);
  args.num_experts = 1;
  CHECK_EQ(cuda::choose(args, a100).block_t, 64);
  CHECK_EQ(cuda::choose(args, {80, 8, 163 * 1024}).block_t, 128);
}

SIDA_TEST(one_token_is_spread_over_the_device) {
  const Choice choice = cuda::choose(switch_base(1), h100);
  CHECK_EQ(choice.splits, 12);  // 12 tiles of d_model, 48 steps of d_ff: four steps at least in each slice
  CHECK(cuda::choose(switch_base(1), l4).splits < 12);
  CHECK_EQ(cuda::choose(switch_base(128), h100).splits, 1);
}

// The sums must not depend on how many slots a wave or a budget has.
SIDA_TEST(slots_do_not_matter) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 200; ++i) {
    MoeFfnArgs args = switch_base(1 + static_cast<int64_t>(random() % 5000));
    const Choice all = cuda::choose(args, a100);
    args.num_slots = 1 + static_cast<int64_t>(random() % 128);
    CHECK(cuda::choose(args, a100) == all);
  }
}

SIDA_TEST(why_the_fp32_path) {
  CHECK(cuda::choose(switch_base(4, DType::bf16, DType::i8), a100).path == Path::tensor_core);
  CHECK(cuda::choose(switch_base(4, DType::f16, DType::f16), a100).path == Path::tensor_core);
  const Choice f32 = cuda::choose(switch_base(4, DType::f32, DType::bf16), a100);
  CHECK(f32.path == Path::f32 && std::strstr(f32.reason, "float32 activations") != nullptr);
  const Choice mixed = cuda::choose(switch_base(4, DType::bf16, DType::f16), a100);
  CHECK(mixed.path == Path::f32 && std::strstr(mixed.reason, "neither") != nullptr);
  MoeFfnArgs args = switch_base(4);
  args.x_row_stride = 772;
  const Choice crooked = cuda::choose(args, a100);
  CHECK(crooked.path == Path::f32 && std::strstr(crooked.reason, "16-byte") != nullptr);
  args = switch_base(4);
  args.wi.data = reinterpret_cast<const void*>(4104);
  CHECK(cuda::choose(args, a100).path == Path::f32);
  args = switch_base(4, DType::bf16, DType::i8);
  args.d_model = 776;  // whole 16-byte pieces of bf16, but not of int8
  args.x_row_stride = 776;
  args.wi.row_stride = 784;
  CHECK(cuda::choose(args, a100).path == Path::f32);
}

// Rows of 4-bit weights are whole groups of 16 bytes; x and the factors decide alone.
SIDA_TEST(four_bits_go_to_the_tensor_cores) {
  for (const DType w : {DType::int4, DType::mxfp4}) {
    MoeFfnArgs args = switch_base(4, DType::f16, w);
    args.d_model = args.x_row_stride = 776;  // no whole groups
    args.wi.row_stride = row_bytes(w, 776);
    args.wo.row_stride = row_bytes(w, args.d_ff);
    CHECK(cuda::choose(args, a100).path == Path::tensor_core);
    args.wi.row_stride += 8;
    const Choice crooked = cuda::choose(args, a100);
    CHECK(crooked.path == Path::f32 && std::strstr(crooked.reason, "16-byte") != nullptr);
    // A medium tile however many tokens there are.
    CHECK_EQ(cuda::choose(switch_base(128 * 200, DType::bf16, w), a100).block_t, 64);
    CHECK(cuda::choose(switch_base(4, DType::f32, w), a100).path == Path::f32);
  }
}

SIDA_TEST(a_linear_is_chosen_as_an_output_phase) {
  LinearArgs args{};
  args.tokens = 1;
  args.columns = args.x_row_stride = 2048;
  args.rows = 768;
  args.x_dtype = DType::bf16;
  args.w_dtype = DType::int4;
  args.x = reinterpret_cast<const void*>(4096);
  args.w = {reinterpret_cast<const void*>(8192), 0, 1024, nullptr, 0};
  const Choice one = cuda::choose(args, h100);
  CHECK(one.path == Path::tensor_core && one.block_t == 16 && one.splits == 8);  // four of 32 steps in each slice
  args.tokens = 500;
  CHECK_EQ(cuda::choose(args, h100).block_t, 64);
  args.w_dtype = DType::bf16;
  args.w.row_stride = 2048;
  args.rows = 32768;
  CHECK_EQ(cuda::choose(args, h100).block_t, 128);
  args.x = reinterpret_cast<const void*>(4098);
  CHECK(cuda::choose(args, h100).path == Path::f32);
}

// max_tiles is an upper bound for every distribution of the rows, and reached.
SIDA_TEST(max_tiles_bounds_every_distribution) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 2000; ++i) {
    const int64_t experts = 1 + static_cast<int64_t>(random() % 9);
    const int64_t rows = 1 + static_cast<int64_t>(random() % 100);
    const int block_t = 16;
    std::vector<int64_t> rows_of(static_cast<size_t>(experts));
    for (int64_t row = 0; row < rows; ++row) {
      // Adversary: as many experts as possible one row beyond a full tile.
      const bool adversary = i % 2 == 0;
      const auto expert = adversary && row < experts ? row : adversary ? 0 : static_cast<int64_t>(random()) % experts;
      ++rows_of[static_cast<size_t>(std::abs(expert))];
    }
    int64_t tiles = 0;
    for (const int64_t own : rows_of) tiles += (own + block_t - 1) / block_t;
    CHECK(tiles <= cuda::max_tiles(rows, experts, block_t));
    if (i % 2 == 0 && (rows - experts) % block_t == 0 && rows > experts) {
      CHECK_EQ(tiles, cuda::max_tiles(rows, experts, block_t));
    }
  }
}

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
