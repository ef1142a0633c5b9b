// Tests of the harness itself: what it must report on wrong kernels, and that right ones give the right values.
#include "harness/harness.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "cpp/check.h"
#include "harness/half.h"
#include "kernels/cuda/launch.h"
#include "toy_kernels.h"

namespace sida::cuda_test {
namespace {

// Runs a toy on inputs 0, 1, 2, ... and returns its output, or the name of the fault.
struct Toy {
  void (*kernel)(ToyParams);
  unsigned blocks = 1;
  int threads = 64;
  size_t inputs = 64, outputs = 64;
  size_t shared_bytes = 4096;
  bool zero_output = false, read_only = true;

  // `message`: receives the last report as a whole.
  std::string fault(int variant, std::vector<int32_t>* result = nullptr, std::string* message = nullptr) const {
    std::string worst;
    for (uint64_t schedule = 1; schedule <= 8; ++schedule) {
      harness::global_reset();
      harness::seed(schedule);
      std::vector<int32_t> numbers(inputs);
      for (size_t i = 0; i < inputs; ++i) numbers[i] = read_only ? static_cast<int32_t>(i) : 0;
      auto* const in = static_cast<int32_t*>(harness::global_allocate(inputs * 4));
      harness::global_fill(in, numbers.data(), inputs * 4);
      if (read_only) harness::global_read_only(in, inputs * 4);
      auto* const out = static_cast<int32_t*>(harness::global_allocate(outputs * 4));
      const std::vector<int32_t> zeros(outputs);
      if (zero_output) harness::global_fill(out, zeros.data(), outputs * 4);
      try {
        cuda::launch("toy", kernel, {static_cast<int64_t>(blocks), threads, static_cast<int64_t>(shared_bytes)},
                     ToyParams{variant, in, out}, nullptr);
        if (result != nullptr) result->assign(out, out + outputs);
      } catch (const harness::KernelError& error) {
        worst = harness::fault_name(error.fault());
        if (message != nullptr) *message = error.what();
      }
    }
    return worst;
  }
};

SIDA_TEST(barriers_and_shared_memory) {
  Toy toy{barrier_kernel};
  toy.shared_bytes = 256;
  std::vector<int32_t> out;
  CHECK_EQ(toy.fault(0, &out), "");
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[static_cast<size_t>(i)], 63 - i);
  // Without a barrier the order of the run decides whether the read meets nothing or an unordered write.
  const std::string unordered = toy.fault(1);
  CHECK(unordered == "race" || unordered == "uninitialised");
  CHECK_EQ(toy.fault(2), "divergence");
  CHECK_EQ(toy.fault(3), "uninitialised");
  CHECK_EQ(toy.fault(4), "out_of_bounds");
  CHECK_EQ(toy.fault(5), "race");
  CHECK_EQ(toy.fault(6), "race");
  CHECK_EQ(toy.fault(7), "misaligned");
  CHECK_EQ(toy.fault(8), "out_of_bounds");
  CHECK_EQ(toy.fault(9), "out_of_bounds");
  CHECK_EQ(toy.fault(10), "divergence");
}

// The number of the line of toy_kernels.cu that carries a comment.
std::string line_with(const std::string& comment) {
  std::ifstream source(TOY_SOURCE);
  std::string line;
  for (int number = 1; std::getline(source, line); ++number) {
    if (line.find("// " + comment) != std::string::npos) return "toy_kernels.cu:" + std::to_string(number);
  }
  return "no line with " + comment;
}

SIDA_TEST(a_race_names_both_lines) {
  Toy toy{barrier_kernel};
  toy.shared_bytes = 256;
  std::string message;
  CHECK_EQ(toy.fault(5, nullptr, &message), "race");
  CHECK(message.find("\n  at " + line_with("the first write") + "\n  and at " + line_with("the first write")) !=
        std::string::npos);
  CHECK_EQ(toy.fault(6, nullptr, &message), "race");
  // Whichever of the two comes second reports.
  const std::string read = line_with("the read"), write = line_with("the second write");
  CHECK(message.find("\n  at " + read + "\n  and at " + write) != std::string::npos ||
        message.find("\n  at " + write + "\n  and at " + read) != std::string::npos);
}

// Seeds give different orders of lanes, of warps and of blocks, and mix blocks; the same seed gives the same order.
SIDA_TEST(the_schedule_is_random) {
  constexpr unsigned blocks = 4;
  constexpr int threads = 96, numbers = static_cast<int>(blocks) * threads * 2;
  const auto order = [&](uint64_t seed) {
    harness::global_reset();
    harness::seed(seed);
    const int32_t zero = 0;
    auto* const counter = static_cast<int32_t*>(harness::global_allocate(4));
    harness::global_fill(counter, &zero, 4);
    auto* const out = static_cast<int32_t*>(harness::global_allocate(numbers * 4));
    cuda::launch("order", order_kernel, {blocks, threads, 0}, ToyParams{0, counter, out}, nullptr);
    return std::vector<int32_t>(out, out + numbers);
  };
  std::set<std::vector<int>> lanes, warps, block_orders;
  int mixed = 0;
  for (uint64_t seed = 1; seed <= 24; ++seed) {
    const std::vector<int32_t> taken = order(seed);
    CHECK(taken == order(seed));
    const auto sorted = [&](int count, int stride) {
      std::vector<int> ids;
      for (int i = 0; i < count; ++i) ids.push_back(i);
      std::sort(ids.begin(), ids.end(), [&](int a, int b) {
        return taken[static_cast<size_t>(a * stride)] < taken[static_cast<size_t>(b * stride)];
      });
      return ids;
    };
    lanes.insert(sorted(32, 2));
    warps.insert(sorted(threads / 32, 64));
    block_orders.insert(sorted(static_cast<int>(blocks), threads * 2));
    // Two blocks at the same time: each takes a number before the other's last one.
    const auto first = [&](int block) { return taken[static_cast<size_t>(block * threads * 2)]; };
    const auto last = [&](int block) {
      const auto begin = taken.begin() + block * threads * 2;
      return *std::max_element(begin, begin + threads * 2);
    };
    bool any = false;
    for (int a = 0; a < static_cast<int>(blocks); ++a) {
      for (int b = 0; b < a; ++b) any = any || (first(a) < last(b) && first(b) < last(a));
    }
    mixed += any ? 1 : 0;
  }
  CHECK(lanes.size() >= 12);
  CHECK_EQ(warps.size(), size_t{6});
  CHECK(block_orders.size() >= 8);
  CHECK(mixed >= 6 && mixed <= 22);  // and some runs have one block after another
}

SIDA_TEST(warps) {
  Toy toy{warp_kernel};
  toy.threads = 32;
  toy.outputs = 32;
  std::vector<int32_t> out;
  CHECK_EQ(toy.fault(0, &out), "");
  for (int i = 0; i < 32; ++i) CHECK_EQ(out[static_cast<size_t>(i)], (i ^ 1) * 7);
  const std::string unordered = toy.fault(1);
  CHECK(unordered == "race" || unordered == "uninitialised");
  CHECK_EQ(toy.fault(2), "divergence");
  CHECK_EQ(toy.fault(3), "divergence");
  CHECK_EQ(toy.fault(4, &out), "");
  for (int i = 0; i < 32; ++i) {
    const int peers = i % 5 < 2 ? 7 : 6;
    CHECK_EQ(out[static_cast<size_t>(i)], (i >= 3 ? i - 3 : i) * 1000000 + (i ^ 1) * 1000 + peers * 10 + (i % 3 == 0));
  }
  toy.threads = 64;
  toy.outputs = 64;
  const std::string other_warp = toy.fault(5);
  CHECK(other_warp == "race" || other_warp == "uninitialised");
}

SIDA_TEST(asynchronous_copies) {
  Toy toy{copy_kernel};
  toy.inputs = 256;
  std::vector<int32_t> out;
  CHECK_EQ(toy.fault(0, &out), "");
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[static_cast<size_t>(i)], ((63 - i) * 4 + 2) + ((63 - i) * 4 + 3));
  CHECK_EQ(toy.fault(1), "copy_in_flight");
  CHECK_EQ(toy.fault(2), "copy_in_flight");
  const std::string unordered = toy.fault(3);
  CHECK(unordered == "race" || unordered == "uninitialised" || unordered == "copy_in_flight");
  CHECK_EQ(toy.fault(4), "copy_in_flight");
  CHECK_EQ(toy.fault(5), "misaligned");
  CHECK_EQ(toy.fault(6, &out), "");
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[static_cast<size_t>(i)], (63 - i) % 2 == 0 ? (63 - i) * 4 + 2 : 0);
  CHECK_EQ(toy.fault(7), "out_of_bounds");
  CHECK_EQ(toy.fault(8), "copy_in_flight");
}

SIDA_TEST(global_memory) {
  Toy toy{global_kernel};
  CHECK_EQ(toy.fault(0), "");
  CHECK_EQ(toy.fault(1), "read_only");
  CHECK_EQ(toy.fault(2), "out_of_bounds");
  CHECK_EQ(toy.fault(3), "misaligned");
  CHECK_EQ(toy.fault(4), "uninitialised");
  CHECK_EQ(toy.fault(5), "out_of_bounds");
  CHECK_EQ(toy.fault(6), "out_of_bounds");
}

SIDA_TEST(blocks_order_each_other_by_fence_and_atomic) {
  Toy toy{ticket_kernel};
  toy.blocks = 3;
  toy.inputs = 1;
  toy.outputs = 256;
  toy.zero_output = true;
  toy.read_only = false;
  std::vector<int32_t> out;
  CHECK_EQ(toy.fault(0, &out), "");
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[static_cast<size_t>(i)], 3 + 3 * i);
  for (int variant = 1; variant <= 5; ++variant) CHECK_EQ(toy.fault(variant), "global_conflict");
}

// Every lane's registers against the table of PTX ISA's ldmatrix: register j, lane l: matrix j, row l / 4, elements
// 2 * (l % 4) and the next.
SIDA_TEST(ldmatrix_follows_the_table) {
  Toy toy{ldmatrix_kernel};
  toy.threads = 32;
  toy.outputs = 128;
  std::vector<int32_t> out;
  CHECK_EQ(toy.fault(0, &out), "");
  for (int lane = 0; lane < 32; ++lane) {
    for (int j = 0; j < 4; ++j) {
      const int first = (j * 8 + lane / 4) * 8 + lane % 4 * 2;
      CHECK_EQ(out[static_cast<size_t>(lane * 4 + j)], first | (first + 1) << 16);
    }
  }
  CHECK_EQ(toy.fault(1), "misaligned");
  CHECK_EQ(toy.fault(2), "uninitialised");
  CHECK_EQ(toy.fault(3), "out_of_bounds");
}

SIDA_TEST(mma_follows_the_table) {
  for (const int variant : {0, 1}) {
    Toy toy{mma_kernel};
    toy.threads = 32;
    toy.inputs = 384;
    toy.outputs = 128;
    std::vector<int32_t> out;
    CHECK_EQ(toy.fault(variant, &out), "");
    // fp16 holds the inputs, up to 383, exactly; bf16 from 256 on not, so they are rounded as the kernel rounds them.
    const auto widened = [&](int v) {
      const auto value = static_cast<float>(v);
      return variant == 0 ? harness::bf16_to_float(harness::float_to_bf16(value))
                          : harness::f16_to_float(harness::float_to_f16(value));
    };
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        double sum = 1 + (row >= 8 ? 2 : 0) + column % 2;
        for (int k = 0; k < 16; ++k) {
          sum += static_cast<double>(widened(row * 16 + k)) * widened(256 + k * 8 + column);
        }
        CHECK_EQ(out[static_cast<size_t>(row * 8 + column)], static_cast<int>(static_cast<float>(sum)));
      }
    }
  }
}

SIDA_TEST(bytes_are_widened_exactly) {
  for (const int variant : {0, 1}) {
    Toy toy{widen_kernel};
    toy.threads = 32;
    toy.outputs = 256;
    std::vector<int32_t> out;
    CHECK_EQ(toy.fault(variant, &out), "");
    for (int byte = 0; byte < 256; ++byte) {
      CHECK_EQ(out[static_cast<size_t>(byte)], static_cast<int>(static_cast<int8_t>(byte)));
    }
  }
}

SIDA_TEST(sixteen_bit_conversions) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto narrow = static_cast<uint16_t>(bits);
    const float from_f16 = harness::f16_to_float(narrow), from_bf16 = harness::bf16_to_float(narrow);
    if (!std::isnan(from_f16)) CHECK_EQ(harness::float_to_f16(from_f16), narrow);
    if (!std::isnan(from_bf16)) CHECK_EQ(harness::float_to_bf16(from_bf16), narrow);
#ifdef __FLT16_MAX__
    _Float16 same;
    std::memcpy(&same, &narrow, 2);
    if (!std::isnan(from_f16)) CHECK_EQ(from_f16, static_cast<float>(same));
#endif
  }
#ifdef __FLT16_MAX__
  // Between the values too, against the compiler's own conversion.
  for (uint32_t i = 0; i < 400000; ++i) {
    const float value = std::ldexp(static_cast<float>(i * 2654435761u % 8388608u), static_cast<int>(i % 44) - 50);
    const auto expected = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &expected, 2);
    CHECK_EQ(harness::float_to_f16(value), bits);
    CHECK_EQ(harness::float_to_f16(-value), bits | 0x8000);
  }
#endif
  CHECK_EQ(harness::float_to_f16(65519.9f), 0x7BFF);
  CHECK_EQ(harness::float_to_f16(65520.0f), 0x7C00);
  CHECK_EQ(harness::float_to_bf16(std::numeric_limits<float>::max()), 0x7F80);
}

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
