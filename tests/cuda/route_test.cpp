// Tests of route_top1 on the harness: ties, rounding before the maximum, capacity, NaN.
#include <cmath>
#include <limits>
#include <random>

#include "base/error.h"
#include "cpp/check.h"
#include "harness/harness.h"
#include "kernels/cuda/moe_ffn_cuda.h"
#include "route_case.h"

namespace sida::cuda_test {
namespace {

SIDA_TEST(random_logits_with_ties) {
  std::mt19937_64 random(11);
  for (int i = 0; i < 24; ++i) {
    RouteCase shape;
    const DType types[] = {DType::f32, DType::bf16, DType::f16};
    shape.dtype = types[random() % 3];
    shape.rounded = types[random() % 3];
    shape.sequences = 1 + static_cast<int64_t>(random() % 3);
    shape.length = 1 + static_cast<int64_t>(random() % 150);
    const int64_t experts[] = {1, 2, 8, 31, 33, 128, 300};
    shape.experts = experts[random() % 7];
    const int64_t capacity[] = {0, 1, 2, 5, 64};
    shape.capacity = capacity[random() % 5];
    shape.seed = random() % 1000;
    const Routed first = run(shape, shape.seed);
    const Routed second = run(shape, shape.seed + 1);
    CHECK_EQ(first.wrong, "");
    CHECK(first.expert_index == second.expert_index);
    CHECK(first.gate == second.gate);
  }
}

// Two probabilities that differ in fp32 but not in bf16: the first one wins, as in transformers.
SIDA_TEST(rounding_comes_before_the_maximum) {
  RouteCase shape{DType::f32, DType::bf16, 1, 1, 2, 4, 1};
  const std::vector<float> logits{0.0f, 1e-4f};
  const int with_rounding = route(shape, logits, 1).expert_index[0];
  CHECK_EQ(with_rounding, 0);
  shape.rounded = DType::f32;
  const int without = route(shape, logits, 1).expert_index[0];
  CHECK_EQ(without, 1);
}

SIDA_TEST(nan_and_infinite_logits) {
  RouteCase shape{DType::f32, DType::f32, 1, 3, 3, 4, 1};
  const float inf = std::numeric_limits<float>::infinity();
  const Routed routed = route(shape, {0, NAN, 1, inf, 0, 0, 0, 1, -inf}, 1);
  CHECK_EQ(routed.expert_index[0], 0);
  CHECK(std::isnan(routed.gate[0]));
  CHECK_EQ(routed.expert_index[1], 0);
  CHECK(std::isnan(routed.gate[1]));
  CHECK_EQ(routed.expert_index[2], 1);
}

#ifdef SIDA_HARNESS  // what only the harness can count
SIDA_TEST(one_launch) {
  harness::launched();
  run({}, 1);
  CHECK_EQ(harness::launched(), "route_top1");
}
#endif

SIDA_TEST(too_many_experts_are_refused) {
  cuda::RouteArgs args{1, 1, 20000, 1, DType::f32, DType::f32, nullptr, nullptr, nullptr};
  CHECK_THROWS(cuda::route_top1(args, nullptr), Error, "expected at most 12288");
  args.experts = 0;
  CHECK_THROWS(cuda::route_top1(args, nullptr), Error, "at least one expert");
}

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  if (const char* const why = sida::harness::unavailable()) {
    std::puts(why);
    return 77;
  }
  return sida::test::run_all(argc, argv);
}
