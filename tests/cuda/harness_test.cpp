// Tests of the harness itself: what it must report on wrong kernels, and that right ones give the right values.
#include "harness/harness.h"

#include <cmath>
#include <limits>
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

  std::string fault(int variant, std::vector<int32_t>* result = nullptr) const {
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
  CHECK_EQ(toy.fault(1), "global_conflict");
  CHECK_EQ(toy.fault(2), "global_conflict");
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
}

SIDA_TEST(mma_follows_the_table) {
  Toy toy{mma_kernel};
  toy.threads = 32;
  toy.inputs = 384;
  toy.outputs = 128;
  std::vector<int32_t> out;
  CHECK_EQ(toy.fault(0, &out), "");
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      // bf16 holds integers up to 256 exactly; the inputs go to 383, so they are rounded as the kernel rounds them.
      double sum = 1 + (row >= 8 ? 2 : 0) + column % 2;
      for (int k = 0; k < 16; ++k) {
        const auto widened = [](int v) {
          return harness::bf16_to_float(harness::float_to_bf16(static_cast<float>(v)));
        };
        sum += static_cast<double>(widened(row * 16 + k)) * widened(256 + k * 8 + column);
      }
      CHECK_EQ(out[static_cast<size_t>(row * 8 + column)], static_cast<int>(static_cast<float>(sum)));
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
