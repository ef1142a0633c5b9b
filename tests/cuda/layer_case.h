// One layer with random contents in the emulated global memory, run through the kernels and compared with a float64
// reference. Shared by the property tests and by the tests with planted bugs.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "harness/harness.h"
#include "kernels/cuda/moe_ffn_cuda.h"

namespace sida::cuda_test {

struct LayerCase {
  DType x = DType::bf16, w = DType::bf16;
  int64_t tokens = 5, top_k = 1, d_model = 64, d_ff = 64, experts = 4;
  bool gated = false;
  Activation activation = Activation::relu;
  bool strided = false;  // rows and slots with gaps, slots in another order than the experts
  bool waves = false;    // half of the experts in a first call, the others in a second
  bool absent = false;   // some rows have expert -1, one expert is never resident
  bool twice = false;    // every second token names one expert for all its choices
  bool nan = false;      // one element of token 1 is NaN
  bool skewed = false;   // most rows go to one expert
  bool biased = false;   // both products have biases
  // Of 4-bit weights alone:
  bool crooked = false;     // their first byte is at an odd address
  bool extreme = false;     // zero, subnormal and negative factors among the others
  bool nan_factor = false;  // the last group of one row of each wo has NaN
  int multiprocessors = 108;
  uint64_t seed = 1;

  std::string name() const;
};

// What a 4-bit code stands for without its group's factor.
double of_code(int code, DType dtype);

struct Outcome {
  std::string wrong;                 // empty if every value is within the bound and rows that must be left alone were
  std::vector<unsigned char> bytes;  // the result, to compare runs bit by bit
  std::string launches;              // kernels by name
  cuda::Choice choice;
};

// One matrix times tokens, without a layer.
struct LinearCase {
  DType x = DType::bf16, w = DType::bf16;
  int64_t tokens = 5, columns = 64, rows = 64;
  bool strided = false, biased = false, crooked = false, extreme = false;
  int multiprocessors = 108;
  uint64_t seed = 1;

  std::string name() const;
};

// Runs the case under the schedule of `schedule`, or with the blocks in the order that `rearrange` gives (see
// harness::order_blocks), and compares every value with a float64 reference and with the CPU backend. Throws
// harness::KernelError where the harness stops it.
using Rearrange = std::function<void(std::vector<unsigned>&)>;
Outcome run(const LayerCase& layer, uint64_t schedule, const Rearrange& rearrange = nullptr);
// The same for cuda::linear.
Outcome run(const LinearCase& linear, uint64_t schedule);

}  // namespace sida::cuda_test
