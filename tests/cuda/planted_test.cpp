// Every bug of kernel_mutations.cmake must be caught, and by the check that is made for it. The table below is the
// list.
#include <algorithm>
#include <functional>
#include <iostream>
#include <set>
#include <string>
#include <vector>

#include "cpp/check.h"
#include "cpp/mutants/mutants.h"
#include "kernels/cuda/kernels.h"
#include "layer_case.h"
#include "route_case.h"

namespace sida::cuda_test {
namespace {

struct Planted {
  const char* bug;
  const char* variant;  // of the case that shows it, or empty
  // A fault's name, "wrong" (outside the bound) or "schedule" (bits that depend on timing). Two names where the
  // schedule decides which of two faults comes first.
  const char* caught_by;
  std::function<std::string(uint64_t schedule)> attempt;  // how it was caught, or empty
};

// What a run of the layer shows under one schedule.
std::string outcome_of(const LayerCase& layer, uint64_t schedule) {
  try {
    const Outcome first = run(layer, schedule);
    if (!first.wrong.empty()) return "wrong: " + first.wrong;
    const Outcome second = run(layer, schedule + 500);
    if (first.bytes != second.bytes) return "schedule: bits differ between two schedules";
    return "";
  } catch (const harness::KernelError& error) {
    return error.what();
  }
}

std::string outcome_of(const RouteCase& shape, uint64_t schedule) {
  try {
    const Routed routed = run(shape, schedule);
    return routed.wrong.empty() ? "" : "wrong: " + routed.wrong;
  } catch (const harness::KernelError& error) {
    return error.what();
  }
}

LayerCase layer(const std::function<void(LayerCase&)>& change) {
  LayerCase one;
  one.d_model = 144;
  one.d_ff = 272;
  one.tokens = 21;
  change(one);
  return one;
}

std::function<std::string(uint64_t)> over(const LayerCase& one) {
  return [one](uint64_t schedule) { return outcome_of(one, schedule); };
}

std::vector<Planted> all_planted() {
  const LayerCase plain = layer([](LayerCase&) {});
  const LayerCase deep = layer([](LayerCase& l) {
    l.d_ff = 640;
    l.multiprocessors = 1;
  });
  const LayerCase strided = layer([](LayerCase& l) { l.strided = true; });
  const LayerCase tail = layer([](LayerCase& l) {
    l.d_ff = 40;
    l.d_model = 24;
    l.strided = true;
  });
  const LayerCase one_slot = layer([](LayerCase& l) {
    l.experts = 1;
    l.tokens = 3;
  });
  const LayerCase split = layer([](LayerCase& l) {
    l.d_ff = 640;
    l.experts = 2;
    l.tokens = 5;
  });
  // Three slices or more, and sums that are not rounded to 16 bits: the order of two cannot be seen.
  const LayerCase split_f32 = layer([](LayerCase& l) {
    l.x = l.w = DType::f32;
    l.d_ff = 640;
    l.experts = 2;
    l.tokens = 5;
  });
  const LayerCase two_choices = layer([](LayerCase& l) { l.top_k = 2; });
  // Three choices, and sums that are not rounded to 16 bits, for the same reason.
  const LayerCase three_choices_f32 = layer([](LayerCase& l) {
    l.x = l.w = DType::f32;
    l.top_k = 3;
    l.tokens = 9;
  });
  const LayerCase absent_choices = layer([](LayerCase& l) {
    l.top_k = 2;
    l.absent = true;
  });
  const LayerCase int8 = layer([](LayerCase& l) { l.w = DType::i8; });
  const LayerCase int4 = layer([](LayerCase& l) { l.w = DType::int4; });
  const LayerCase mxfp4 = layer([](LayerCase& l) { l.w = DType::mxfp4; });
  const LayerCase int4_medium = layer([](LayerCase& l) {
    l.w = DType::int4;
    l.experts = 1;
    l.tokens = 40;
  });
  const LayerCase int4_strided = layer([](LayerCase& l) {
    l.w = DType::int4;
    l.strided = true;
  });
  const LayerCase mxfp4_f32 = layer([](LayerCase& l) {
    l.x = DType::f32;
    l.w = DType::mxfp4;
  });
  const LayerCase split_biased = layer([](LayerCase& l) {
    l.w = DType::mxfp4;
    l.biased = true;
    l.d_ff = 640;
    l.experts = 2;
    l.tokens = 5;
  });
  const LayerCase gated_biased = layer([](LayerCase& l) { l.gated = l.biased = true; });
  const LayerCase absent = layer([](LayerCase& l) { l.absent = true; });
  const LayerCase f32 = layer([](LayerCase& l) { l.x = l.w = DType::f32; });
  const RouteCase routed{DType::f32, DType::f32, 2, 40, 8, 3, 1};
  const RouteCase few_experts{DType::f32, DType::f32, 1, 8, 5, 8, 1};
  return {
      {"gemm_no_barrier", "", "race", over(deep)},
      {"gemm_lax_wait", "", "copy_in_flight", over(deep)},
      {"gemm_swapped_fragment", "", "wrong", over(plain)},
      {"gemm_swapped_fragment", " (int8)", "wrong", over(int8)},
      {"gemm_no_swizzle", "", "wrong", over(plain)},
      {"gemm_no_depth_guard", "", "uninitialised", over(tail)},
      {"gemm_no_row_guard", "", "out_of_bounds", over(one_slot)},
      {"gemm_no_token_guard", "", "uninitialised", over(one_slot)},
      {"gemm_wrong_row_stride", "", "uninitialised", over(strided)},
      {"gemm_no_epilogue_barrier", "", "race", over(plain)},
      {"gemm_uninitialised_table", "", "uninitialised", over(plain)},
      {"epilogue_no_column_guard", "", "out_of_bounds", over(one_slot)},
      {"epilogue_gate_by_position", "", "wrong", over(plain)},
      {"epilogue_scale_of_tile", "", "wrong", over(int8)},
      {"groups_swapped_fragment", "", "wrong", over(int4)},
      {"groups_wrong_token_chunk", "", "wrong", over(mxfp4)},
      {"groups_no_swizzle", "", "wrong", over(mxfp4)},
      {"groups_no_swizzle", " (medium)", "wrong", over(int4_medium)},
      {"groups_factor_of_upper_rows", "", "wrong", over(int4)},
      {"groups_factor_of_upper_rows", " (medium)", "wrong", over(int4_medium)},
      {"groups_factors_not_doubled", "", "race", over(mxfp4)},
      {"groups_no_factor_guard", "", "uninitialised", over(int4_strided)},
      {"groups_wrong_factor_stride", "", "uninitialised", over(int4_strided)},
      {"groups_wrong_code", "", "wrong", over(int4)},
      {"groups_wrong_code", " (mxfp4)", "wrong", over(mxfp4)},
      {"epilogue_bias_of_every_slice", "", "wrong", over(split_biased)},
      {"epilogue_bias_of_gate", "", "wrong", over(gated_biased)},
      {"epilogue_misaligned_store", "", "misaligned", over(plain)},
      {"split_by_arrival", "", "schedule", over(split_f32)},
      {"split_no_barrier", "", "race|uninitialised", over(split)},
      {"split_no_fence", "", "global_conflict", over(split)},
      {"split_short_slice", "", "wrong", over(split)},
      {"combine_no_fence", "", "global_conflict", over(two_choices)},
      {"combine_early_arrival", "", "global_conflict", over(two_choices)},
      {"combine_no_barrier", "", "race", over(two_choices)},
      {"combine_by_arrival", "", "schedule", over(three_choices_f32)},
      {"combine_counts_absent", "", "wrong", over(absent_choices)},
      {"combine_reads_counter", "", "global_conflict", over(two_choices)},
      {"combine_always", "", "global_conflict", over(two_choices)},
      {"plan_counters_not_cleared", "", "uninitialised", over(split)},
      {"plan_counters_not_cleared", " (choices)", "uninitialised", over(two_choices)},
      {"plan_no_warp_barrier", "", "race", over(plain)},
      {"plan_inclusive_scan", "", "out_of_bounds", over(one_slot)},
      {"plan_zero_missing", "", "wrong", over(absent)},
      {"route_capacity_off_by_one", "", "wrong", [routed](uint64_t schedule) { return outcome_of(routed, schedule); }},
      {"route_divergent_shuffle", "", "divergence",
       [few_experts](uint64_t schedule) { return outcome_of(few_experts, schedule); }},
      {"simt_factors_of_first_row", "", "wrong", over(mxfp4_f32)},
      {"simt_misaligned_slice", "", "misaligned", over(f32)},
      {"simt_no_barrier", "", "race", over(f32)},
  };
}

bool is_one_of(const std::string& kind, const std::string& expected) {
  return !kind.empty() && ("|" + expected + "|").find("|" + kind + "|") != std::string::npos;
}

SIDA_TEST(nothing_is_reported_without_a_bug) {
  for (const Planted& planted : all_planted()) CHECK_EQ(planted.attempt(1), "");
}

SIDA_TEST(every_planted_bug_is_caught) {
  for (const Planted& planted : all_planted()) {
    std::string caught;
    int schedules = 0;
    {
      const test::Mutant mutant(planted.bug);
      while (caught.empty() && schedules < 5) caught = planted.attempt(static_cast<uint64_t>(++schedules));
    }
    const std::string name = std::string(planted.bug) + planted.variant;
    std::cout << name << ": schedule " << schedules << ": " << caught << std::endl;
    if (!is_one_of(caught.substr(0, caught.find_first_of(" :")), planted.caught_by)) {
      test::report(__FILE__, __LINE__, name + " gave '" + caught + "', expected " + planted.caught_by);
    }
  }
}

SIDA_TEST(the_list_is_complete) {
  std::set<std::string> seen;
  for (const Planted& planted : all_planted()) seen.insert(planted.bug);
  for (const std::string& bug : test::mutants()) {
    if (!seen.contains(bug)) test::report(__FILE__, __LINE__, "planted bug " + bug + " has no test");
  }
  CHECK_EQ(seen.size(), 44u);
  CHECK_EQ(test::mutants().size(), seen.size());
}

// Reports of races name both places, as file:line.
SIDA_TEST(a_race_names_both_source_lines) {
  const std::vector<Planted> all = all_planted();
  const std::string bug = "gemm_no_epilogue_barrier";
  const test::Mutant mutant(bug);
  const std::string caught =
      std::find_if(all.begin(), all.end(), [&](const Planted& one) { return one.bug == bug; })->attempt(1);
  CHECK(caught.find("\n  at ") != std::string::npos && caught.find("\n  and at ") != std::string::npos);
  CHECK(caught.find("expert_gemm.cuh:") != std::string::npos);
}

}  // namespace
}  // namespace sida::cuda_test

// No case above is in fp16: those kernels are left out of the mutants.
namespace sida::cuda {

LayerKernels f16_kernels(int) {
  fail(ErrorKind::internal, "the mutants have no kernels for fp16");
}
LayerKernels f16_int8_kernels(int) {
  fail(ErrorKind::internal, "the mutants have no kernels for fp16");
}
LayerKernels f16_int4_kernels(int) {
  fail(ErrorKind::internal, "the mutants have no kernels for fp16");
}
LayerKernels f16_mxfp4_kernels(int) {
  fail(ErrorKind::internal, "the mutants have no kernels for fp16");
}

}  // namespace sida::cuda

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
