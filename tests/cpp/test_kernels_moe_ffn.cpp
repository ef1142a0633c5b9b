// moe_ffn on the CPU: against float64, at the edges, and bit for bit over threads, waves, slots and batches.
#include <algorithm>
#include <cstdlib>

#include "kernels_case.h"

using namespace sida;
using namespace sida::test;

namespace {

constexpr DType all_x[] = {DType::f32, DType::bf16, DType::f16};
constexpr DType all_w[] = {DType::f32, DType::bf16, DType::f16, DType::i8, DType::int4, DType::mxfp4};

// Every case_share()-th of the counts, the largest among them.
std::vector<int64_t> share_of(std::vector<int64_t> counts) {
  std::vector<int64_t> kept;
  for (auto i = static_cast<int64_t>(counts.size()) - 1; i >= 0; i -= case_share()) kept.push_back(counts[i]);
  return kept;
}

std::string describe(const Shape& s) {
  std::ostringstream text;
  text << "T " << s.tokens << " K " << s.top_k << " d_model " << s.d_model << " d_ff " << s.d_ff << " E " << s.experts
       << " S " << s.slots << " x " << dtype_name(s.x_dtype) << " w " << dtype_name(s.w_dtype) << " activation "
       << static_cast<int>(s.activation) << (s.gated ? " gated" : "") << " misalign " << s.misalign;
  return text.str();
}

void check_against_reference(Call& call, int thread_count) {
  call.reset();
  call.run(thread_count);
  std::vector<double> expected, allowed;
  call.reference(expected, allowed);
  for (size_t i = 0; i < expected.size(); ++i) {
    const double found = element(call.out.data(), call.shape.x_dtype, i);
    if (std::fabs(found - expected[i]) <= allowed[i]) continue;
    std::ostringstream text;
    text << describe(call.shape) << ": element " << i << " is " << found << ", expected " << expected[i] << " +- "
         << allowed[i];
    report(__FILE__, __LINE__, text.str());
    break;
  }
  if (!call.is_intact()) report(__FILE__, __LINE__, describe(call.shape) + ": wrote outside a buffer");
}

Shape random_shape(std::mt19937_64& random) {
  const auto upto = [&](int64_t n) { return static_cast<int64_t>(random() % n) + 1; };
  const int64_t experts = upto(9);
  Shape s{upto(40),
          random() % 3 == 0 ? upto(3) : 1,
          upto(150),
          upto(200),
          experts,
          random() % 2 ? experts : upto(experts),
          all_x[random() % 3],
          all_w[random() % std::size(all_w)],
          static_cast<Activation>(random() % activation_count),
          random() % 3 == 0};
  if (random() % 3 == 0) s.tokens = upto(150);
  s.misalign = static_cast<int>(random() % 8);
  s.slot_padding = random() % 2 ? static_cast<int64_t>(random() % 100) : 0;
  s.row_padding = random() % 2 ? static_cast<int64_t>(random() % 40) : 0;
  s.biased = random() % 3 == 0;
  if (s.gated && random() % 4 == 0) s.activation = Activation::swiglu_oai;
  return s;
}

// The same token n times over one expert: every column of every tile must give the same bits.
void check_equal_tokens(int64_t d_model, int64_t d_ff, DType w, const std::vector<int64_t>& counts) {
  const Shape shape{1, 1, d_model, d_ff, 1, 1, DType::f32, w, Activation::gelu, false};
  std::vector<char> first;
  for (const int64_t n : counts) {
    Shape several = shape;
    several.tokens = n;
    Call call(several, 3);
    const Call one(shape, 3);
    call.wi = one.wi;
    call.wo = one.wo;
    call.wi_scale = one.wi_scale;
    call.wo_scale = one.wo_scale;
    const int64_t row = d_model * 4;
    for (int64_t t = 0; t < n; ++t) {
      std::memcpy(call.x.data() + t * row, one.x.data(), row);
      call.expert_index[t] = 0;
      call.gate[t] = 0.75f;
    }
    call.run(1 + static_cast<int>(n % 3));
    if (first.empty()) first = call.bits();
    for (int64_t t = 0; t < n; ++t) CHECK(std::memcmp(call.out.data() + t * row, first.data(), row) == 0);
  }
}

}  // namespace

SIDA_TEST(every_dtype_and_activation_is_within_the_bound) {
  uint64_t seed = 1;
  for (const DType x : all_x) {
    for (const DType w : all_w) {
      for (int a = 0; a < activation_count; ++a) {
        for (const bool gated : {false, true}) {
          Call call({7, 1, 72, 136, 4, 4, x, w, static_cast<Activation>(a), gated}, seed++);
          check_against_reference(call, 2);
        }
      }
    }
  }
}

SIDA_TEST(biases_and_swiglu_oai_are_within_the_bound) {
  uint64_t seed = 500;
  for (const DType x : all_x) {
    for (const DType w : all_w) {
      for (const bool biased : {false, true}) {
        Shape shape{7, 2, 72, 136, 4, 4, x, w, Activation::swiglu_oai, true};
        shape.biased = biased;
        Call gpt_oss(shape, seed++);
        // Far enough for both clamps.
        for (int64_t i = 0; i < 72; ++i) set_element(gpt_oss.x.data(), x, i, 30.0f * (i % 2 ? 1.0f : -1.0f));
        check_against_reference(gpt_oss, 2);
        shape.activation = Activation::silu;
        shape.gated = false;
        Call plain(shape, seed++);
        check_against_reference(plain, 2);
      }
    }
  }
}

SIDA_TEST(swiglu_oai_needs_gated_weights) {
  Call call({2, 1, 8, 8, 2, 2, DType::f32, DType::f32, Activation::swiglu_oai, false}, 1);
  CHECK_THROWS(Call::run_wave(call.args(), threads(1)), Error, "expected gated weights");
}

SIDA_TEST(random_shapes_are_within_the_bound) {
  for (int64_t seed = 0; seed < 150 / case_share(); ++seed) {
    std::mt19937_64 random(seed);
    Call call(random_shape(random), seed);
    check_against_reference(call, 1 + static_cast<int>(seed % 4));
  }
}

SIDA_TEST(rows_longer_than_a_segment_are_within_the_bound) {
  for (const DType w : all_w) {
    Call wide({4, 1, 4500, 60, 2, 2, DType::f32, w, Activation::gelu, false}, 7);
    check_against_reference(wide, 2);
    for (const int64_t tokens : share_of({1, 2, 4, 8, 26})) {  // rows whole, by segment, in blocks
      Call deep({tokens, 1, 60, 4500, 1, 1, DType::f32, w, Activation::gelu, false}, 7);
      check_against_reference(deep, 2);
    }
  }
}

SIDA_TEST(no_tokens_and_no_residents_write_nothing) {
  Call empty({0, 1, 16, 16, 2, 2, DType::f32, DType::f32, Activation::relu, false}, 1);
  empty.run(2);
  CHECK(empty.is_intact());
  Call absent({6, 1, 16, 16, 2, 2, DType::f32, DType::f32, Activation::relu, false}, 1);
  std::fill(absent.slot_of_expert.begin(), absent.slot_of_expert.end(), -1);
  std::memset(absent.out.data(), 0x5C, absent.out.bytes());
  absent.run(2);
  for (const char byte : absent.bits()) CHECK_EQ(int(byte), 0x5C);
  CHECK(absent.is_intact());
}

SIDA_TEST(threads_do_not_change_bits) {
  for (int64_t seed = 0; seed < 40 / case_share(); ++seed) {
    std::mt19937_64 random(1000 + seed);
    Call call(random_shape(random), seed);
    call.run(1);
    const std::vector<char> one = call.bits();
    for (const int count : {2, 3, 5, 8}) {
      call.reset();
      call.run(count);
      if (call.bits() != one) {
        report(__FILE__, __LINE__, describe(call.shape) + ": other bits with " + std::to_string(count) + " threads");
      }
    }
  }
}

SIDA_TEST(a_call_of_little_work_wakes_no_thread) {
  static int handed_over;
  const ParallelFor parallel{4, [](int64_t count, void (*body)(void*, int64_t), void* context) {
                               ++handed_over;
                               for (int64_t i = 0; i < count; ++i) body(context, i);
                             }};
  const auto times_handed_over = [&](int64_t d_ff) {
    Call call({1, 8, 32, d_ff, 8, 8, DType::f32, DType::int4, Activation::silu, true}, 3);
    handed_over = 0;
    const MoeFfnArgs args = call.args();
    cpu::moe_ffn_with(kernels_under_test(), args, parallel);
    cpu::moe_ffn_combine_with(kernels_under_test(), args, parallel);
    return handed_over;
  };
  // 8 experts of three matrices: 24,576 and 49,152 multiply-adds.
  CHECK(times_handed_over(32) == 0);
  CHECK(times_handed_over(64) == 1);
}

SIDA_TEST(waves_and_slots_do_not_change_bits) {
  for (int64_t seed = 0; seed < 40 / case_share(); ++seed) {
    std::mt19937_64 random(2000 + seed);
    Shape shape = random_shape(random);
    shape.slots = shape.experts;
    Call call(shape, seed);
    call.run(2);
    const std::vector<char> together = call.bits();
    // One expert a wave, in falling order.
    call.reset();
    const std::vector<int32_t> slots = call.slot_of_expert;
    const ParallelFor parallel = threads(2);
    for (int64_t e = shape.experts - 1; e >= 0; --e) {
      std::fill(call.slot_of_expert.begin(), call.slot_of_expert.end(), -1);
      call.slot_of_expert[e] = slots[e];
      Call::run_wave(call.args(), parallel);
    }
    if (shape.top_k > 1) cpu::moe_ffn_combine_with(kernels_under_test(), call.args(), parallel);
    if (call.bits() != together) report(__FILE__, __LINE__, describe(shape) + ": other bits in waves");
  }
}

SIDA_TEST(a_token_alone_has_the_bits_it_has_in_a_batch) {
  for (const DType w : all_w) {
    for (const DType x : all_x) {
      for (const int64_t experts : {1, 12}) {
        Shape shape{131, 2, 100, 170, experts, experts, x, w, Activation::silu, w == DType::bf16};
        Call batch(shape, 11);
        batch.run(3);
        shape.tokens = 1;
        for (const int64_t t : {0, 64, 130}) {
          Call alone(shape, 11);
          // Same weights, by the same seed or copied.
          alone.wi = batch.wi;
          alone.wo = batch.wo;
          alone.wi_scale = batch.wi_scale;
          alone.wo_scale = batch.wo_scale;
          alone.slot_of_expert = batch.slot_of_expert;
          const int64_t row_bytes = shape.d_model * element_bytes(x);
          std::memcpy(alone.x.data(), batch.x.data() + t * batch.x_stride * element_bytes(x), row_bytes);
          for (int64_t k = 0; k < 2; ++k) {
            alone.expert_index[k] = batch.expert_index[t * 2 + k];
            alone.gate[k] = batch.gate[t * 2 + k];
          }
          alone.run(2);
          CHECK(std::memcmp(alone.out.data(), batch.out.data() + t * row_bytes, row_bytes) == 0);
        }
      }
    }
  }
}

SIDA_TEST(every_tile_shape_sums_in_one_order) {
  std::vector<int64_t> counts(70);
  for (int64_t n = 1; n <= 70; ++n) counts[n - 1] = n;
  for (const DType w : all_w) check_equal_tokens(97, 203, w, share_of(counts));
}

SIDA_TEST(every_tile_shape_sums_long_rows_in_one_order) {
  // Rows of several segments take other ways through a matrix: whole, by segment, in blocks.
  for (const DType w : all_w) check_equal_tokens(61, 4500, w, share_of({1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 25, 40}));
  for (const DType w : all_w) check_equal_tokens(4500, 61, w, share_of({1, 2, 3, 4, 6, 8, 12, 31}));
}

SIDA_TEST(nan_and_infinity_reach_their_own_rows_only) {
  for (const DType w : {DType::f32, DType::bf16, DType::f16}) {
    Shape shape{12, 1, 50, 70, 3, 3, DType::f32, w, Activation::gelu, false};
    Call call(shape, 5);
    for (auto& e : call.expert_index) e = e < 0 ? 1 : e;
    call.expert_index[3] = call.expert_index[4] = 1;
    set_element(call.x.data(), DType::f32, 3 * call.x_stride + 7, NAN);
    set_element(call.x.data(), DType::f32, 4 * call.x_stride + 49, INFINITY);
    // A NaN weight in the last column of expert 2, and zero times infinity in expert 0.
    set_element(call.wi.data(), w, call.slot_of_expert[2] * call.wi_slot + 5 * call.wi_row + 49, NAN);
    set_element(call.wo.data(), w, call.slot_of_expert[0] * call.wo_slot + 8 * call.wo_row + 69, INFINITY);
    call.run(2);
    std::vector<double> expected, allowed;
    call.reference(expected, allowed);
    int64_t special = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double found = element(call.out.data(), DType::f32, i);
      special += !std::isfinite(expected[i]);
      if (std::isnan(expected[i]))
        CHECK(std::isnan(found));
      else if (std::isinf(expected[i]))
        CHECK_EQ(found, expected[i]);
      else
        CHECK(std::fabs(found - expected[i]) <= allowed[i]);
    }
    CHECK(special > 100);
  }
}

// Weights of one row and one group each, in all codes and with scales at the ends of their range, one by one.
SIDA_TEST(every_code_of_a_group_is_its_value) {
  for (const DType w : {DType::int4, DType::mxfp4}) {
    const bool is_quantised = kernels_under_test().panel_form(DType::f32, w, 32).terms == cpu::quantised_terms;
    for (int e = 0; e < 256; ++e) {
      Call call({3, 1, 32, 1, 1, 1, DType::f32, w, Activation::linear, false}, 3);
      for (int64_t i = 0; i < 16; ++i) call.wi.data()[i] = static_cast<char>(i | ((15 - i) << 4));
      uint16_t half = static_cast<uint16_t>(e << 8 | e);  // zero, denormals, infinity, NaN, both signs
      std::memcpy(call.wi_scale.data(), &half, group_scale_bytes(w));
      // wo is 1 in its first element; one column of x at a time.
      std::memset(call.wo.data(), 0, call.wo.bytes());
      const float one = 1.0f;
      for (int64_t row = 0; row < 32; ++row) call.wo.data()[row * 16] = w == DType::int4 ? 1 : 2;
      for (int64_t row = 0; row < 32; ++row) {
        if (w == DType::int4) {
          set_element(call.wo_scale.data(), DType::f16, row, one);
        } else {
          call.wo_scale.data()[row] = 127;
        }
      }
      for (int64_t t = 0; t < 3; ++t) {
        call.expert_index[t] = 0;
        call.gate[t] = one;
      }
      for (int64_t column = 0; column < 32; ++column) {
        for (int64_t i = 0; i < 3 * 32; ++i) set_element(call.x.data(), DType::f32, i, i % 32 == column ? one : 0.0f);
        call.reset();
        call.run(1);
        double expected = grouped_element(call.wi.data(), call.wi_scale.data(), w, column);
        if (std::fabs(expected) > 3.5e38) expected = std::copysign(INFINITY, expected);
        // Zeros of x times an infinite or undefined scale are NaN.
        if (w == DType::int4 ? (half & 0x7c00) == 0x7c00 : e == 255) expected = NAN;
        const double found = element(call.out.data(), DType::f32, 0);
        // 127 steps of a 127th are one but for two roundings in each product, and what is smallest counts as zero.
        const double off = is_quantised ? 1e-6 * std::fabs(expected) + 0x1p-118 : 0.0;
        const bool same =
            std::isnan(expected) ? std::isnan(found) : found == expected || std::fabs(found - expected) <= off;
        // Another weight of the group may be infinite where this one is finite: 0 times it is NaN.
        if (!same && !(w == DType::mxfp4 && e >= 253 && std::isnan(found))) {
          std::ostringstream text;
          text << dtype_name(w) << " scale " << e << " column " << column << ": " << found << ", expected " << expected;
          report(__FILE__, __LINE__, text.str());
        }
      }
    }
  }
}

SIDA_TEST(denormals_are_kept) {
  for (const DType x : all_x) {
    Shape shape{3, 1, 24, 40, 1, 1, x, DType::f32, Activation::linear, false};
    Call call(shape, 9);
    for (auto& e : call.expert_index) e = 0;
    const float tiny = x == DType::f16 ? 0x1p-24f : 0x1p-133f;
    for (int64_t i = 0; i < 3 * 24; ++i) set_element(call.x.data(), x, i, tiny * static_cast<float>(1 + i % 3));
    for (auto& g : call.gate) g = 1024.0f;
    check_against_reference(call, 1);
    double largest = 0.0;
    for (int64_t i = 0; i < 3 * 24; ++i) largest = std::max(largest, std::fabs(element(call.out.data(), x, i)));
    CHECK(largest > 0.0);
  }
}

SIDA_TEST(partials_must_go_with_top_k) {
  Call call({2, 2, 8, 8, 2, 2, DType::f32, DType::f32, Activation::relu, false}, 1);
  MoeFfnArgs args = call.args();
  args.partials = nullptr;
  CHECK_THROWS(Call::run_wave(args, threads(1)), Error, "partials is null with top_k 2");
}

int main(int argc, char** argv) {
  return run_all_on_chosen_set(argc, argv);
}
