// Property tests of the CUDA kernels, executed by the harness: every shipped instance, shapes that are no multiples of
// any tile, against a float64 reference and the CPU backend, and twice under different schedules with bit-identical
// results.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "cpp/check.h"
#include "layer_case.h"
#include "route_case.h"

namespace sida::cuda_test {
namespace {

int effort() {
  const char* const text = std::getenv("SIDA_HARNESS_EFFORT");
  return text == nullptr ? 1 : std::atoi(text);
}

// Fails with the case's name if the result is wrong or differs between schedules; returns the tile that was used.
template <class Case>
cuda::Choice check_case(const Case& layer) {
  try {
    const Outcome first = run(layer, layer.seed);
    const Outcome second = run(layer, layer.seed + 1000);
    if (!first.wrong.empty()) test::report(__FILE__, __LINE__, layer.name() + ": " + first.wrong);
    if (first.bytes != second.bytes)
      test::report(__FILE__, __LINE__, layer.name() + ": result depends on the schedule");
    return first.choice;
  } catch (const harness::KernelError& error) {
    test::report(__FILE__, __LINE__, layer.name() + ": " + error.what());
    return {};
  }
}

template <class Value>
Value pick(std::mt19937_64& random, std::initializer_list<Value> from) {
  return *(from.begin() + random() % from.size());
}

// A case for tiles of `block_t` tokens, with everything else random.
LayerCase random_case(std::mt19937_64& random, DType x, DType w, int block_t) {
  LayerCase layer;
  layer.x = x;
  layer.w = w;
  layer.top_k = pick<int64_t>(random, {1, 1, 1, 2, 3});
  layer.gated = random() % 2 == 0;
  layer.activation =
      pick(random, {Activation::relu, Activation::gelu, Activation::gelu_new, Activation::silu, Activation::gelu_10,
                    Activation::quick_gelu, Activation::sigmoid, Activation::tanh, Activation::relu2, Activation::relu6,
                    Activation::leaky_relu, Activation::mish, Activation::hardswish, Activation::laplace,
                    Activation::softplus, Activation::sqrtsoftplus, Activation::linear, Activation::swiglu_oai});
  layer.gated = layer.gated || layer.activation == Activation::swiglu_oai;
  layer.biased = random() % 3 == 0;
  layer.extreme = is_grouped(w) && random() % 2 == 0;
  layer.nan_factor = is_grouped(w) && random() % 4 == 0;
  layer.strided = random() % 2 == 0;
  layer.waves = random() % 3 == 0;
  layer.absent = random() % 3 == 0;
  layer.twice = random() % 3 == 0;
  layer.seed = random() % 100000;
  // Multiples of 16 where int8 goes to tensor cores, of 8 for the other types, anything for the fp32 path.
  layer.d_model = pick<int64_t>(random, {16, 48, 64, 80, 144, 208});
  layer.d_ff = pick<int64_t>(random, {16, 64, 112, 160, 272});
  if (w != DType::i8 && random() % 2 == 0) layer.d_model += 8;
  if (w != DType::i8 && random() % 2 == 0) layer.d_ff += 8;
  if (block_t == 16) {
    layer.experts = pick<int64_t>(random, {1, 3, 8, 40});
    layer.tokens = pick<int64_t>(random, {1, 2, 3, 9, 16, 37});
    layer.tokens = std::max<int64_t>(1, std::min(layer.tokens, layer.experts * 16 / layer.top_k));
    layer.skewed = random() % 3 == 0;
    layer.multiprocessors = pick(random, {1, 20, 108});
  } else {
    layer.experts = pick<int64_t>(random, {1, 2});
    layer.tokens =
        (block_t == 64 ? 17 + static_cast<int64_t>(random() % 60) : 97 + static_cast<int64_t>(random() % 90)) *
            layer.experts / layer.top_k +
        layer.experts;
    layer.multiprocessors = 1;
    layer.d_model = std::min<int64_t>(layer.d_model, 144);
    layer.d_ff = std::min<int64_t>(layer.d_ff, 160);
  }
  return layer;
}

void check_instances(DType x, DType w, cuda::Path path, std::initializer_list<int> tiles) {
  std::mt19937_64 random(static_cast<uint64_t>(x) * 10 + static_cast<uint64_t>(w) + 77);
  for (const int block_t : tiles) {
    int seen = 0;
    const int wanted = (block_t == 16 ? 5 : block_t == 64 ? 3 : 2) * effort();
    for (int i = 0; i < wanted * 4 && seen < wanted; ++i) {
      const cuda::Choice choice = check_case(random_case(random, x, w, block_t));
      CHECK(choice.path == path);
      if (choice.block_t == block_t) ++seen;
    }
    CHECK_EQ(seen, wanted);
  }
}

SIDA_TEST(bf16_activations_and_weights) {
  check_instances(DType::bf16, DType::bf16, cuda::Path::tensor_core, {16, 64, 128});
}
SIDA_TEST(bf16_activations_int8_weights) {
  check_instances(DType::bf16, DType::i8, cuda::Path::tensor_core, {16, 64, 128});
}
SIDA_TEST(f16_activations_and_weights) {
  check_instances(DType::f16, DType::f16, cuda::Path::tensor_core, {16, 64, 128});
}
SIDA_TEST(f16_activations_int8_weights) {
  check_instances(DType::f16, DType::i8, cuda::Path::tensor_core, {16, 64, 128});
}
SIDA_TEST(bf16_activations_int4_weights) {
  check_instances(DType::bf16, DType::int4, cuda::Path::tensor_core, {16, 64});
}
SIDA_TEST(bf16_activations_mxfp4_weights) {
  check_instances(DType::bf16, DType::mxfp4, cuda::Path::tensor_core, {16, 64});
}
SIDA_TEST(f16_activations_int4_weights) {
  check_instances(DType::f16, DType::int4, cuda::Path::tensor_core, {16, 64});
}
SIDA_TEST(f16_activations_mxfp4_weights) {
  check_instances(DType::f16, DType::mxfp4, cuda::Path::tensor_core, {16, 64});
}
SIDA_TEST(f32_activations_four_bit_weights) {
  check_instances(DType::f32, DType::int4, cuda::Path::f32, {16, 64});
  check_instances(DType::f32, DType::mxfp4, cuda::Path::f32, {16});
}
SIDA_TEST(f32_activations_and_weights) {
  check_instances(DType::f32, DType::f32, cuda::Path::f32, {16, 64});
}
SIDA_TEST(f32_activations_bf16_weights) {
  check_instances(DType::f32, DType::bf16, cuda::Path::f32, {16, 64});
}
SIDA_TEST(f32_activations_int8_weights) {
  check_instances(DType::f32, DType::i8, cuda::Path::f32, {16});
}
SIDA_TEST(mixed_types) {
  check_instances(DType::bf16, DType::f16, cuda::Path::f32, {16});
  check_instances(DType::f16, DType::f32, cuda::Path::f32, {16});
}

// Every activation through both kernels of both paths.
SIDA_TEST(every_activation) {
  for (const DType x : {DType::bf16, DType::f32}) {
    for (int activation = 0; activation <= static_cast<int>(Activation::swiglu_oai); ++activation) {
      LayerCase layer;
      layer.x = layer.w = x;
      layer.activation = static_cast<Activation>(activation);
      layer.gated = activation % 2 == 0 || layer.activation == Activation::swiglu_oai;
      layer.d_model = 48;
      layer.seed = static_cast<uint64_t>(activation);
      check_case(layer);
    }
  }
}

// All choices of a token at one expert, in one tile and over several; more than one wave; nothing at all.
SIDA_TEST(duplicates_in_a_row_and_no_tokens) {
  for (const DType x : {DType::bf16, DType::f16, DType::f32}) {
    LayerCase layer;
    layer.x = layer.w = x;
    layer.top_k = 3;
    layer.twice = true;
    layer.tokens = 19;
    layer.experts = 2;
    check_case(layer);
    layer.experts = 1;
    layer.tokens = 7;  // 21 rows of one expert: choices of a token lie in two tiles of 16
    layer.multiprocessors = 1;
    check_case(layer);
    layer.waves = layer.absent = true;
    layer.experts = 5;
    check_case(layer);
    layer.tokens = 0;
    check_case(layer);
  }
}

SIDA_TEST(odd_sizes_take_the_fp32_path) {
  std::mt19937_64 random(5);
  for (int i = 0; i < 12 * effort(); ++i) {
    LayerCase layer = random_case(random, pick(random, {DType::f32, DType::bf16, DType::f16}),
                                  pick(random, {DType::f32, DType::bf16, DType::i8, DType::int4, DType::mxfp4}), 16);
    layer.crooked = random() % 2 == 0;
    layer.d_model = pick<int64_t>(random, {1, 5, 37, 67});
    layer.d_ff = pick<int64_t>(random, {1, 3, 41, 131});
    const cuda::Choice choice = check_case(layer);
    CHECK(choice.path == cuda::Path::f32);
    CHECK(std::strlen(choice.reason) > 0);
  }
}

// Weights of 4 bits at an odd address, or with rows of x that are not aligned, take the fp32 path; a row's last group
// need not be whole on the tensor cores either.
SIDA_TEST(what_is_asked_of_four_bit_weights) {
  for (const DType w : {DType::int4, DType::mxfp4}) {
    LayerCase layer;
    layer.w = w;
    layer.d_model = 72;
    layer.d_ff = 40;
    layer.gated = layer.biased = true;
    CHECK(check_case(layer).path == cuda::Path::tensor_core);
    layer.crooked = true;
    CHECK(check_case(layer).path == cuda::Path::f32);
    layer.crooked = false;
    layer.d_ff = 36;
    CHECK(check_case(layer).path == cuda::Path::f32);
  }
}

// Every code with every kind of factor, one row each: exactly the numbers that the format says, where bf16 holds them.
SIDA_TEST(codes_and_factors_are_exact) {
  for (const DType x : {DType::bf16, DType::f16, DType::f32}) {
    for (const DType w : {DType::int4, DType::mxfp4}) {
      for (const bool strided : {false, true}) {
        LinearCase one;
        one.x = x;
        one.w = w;
        one.tokens = 16;
        one.columns = 32;
        one.rows = 200;
        one.extreme = true;
        one.strided = strided;
        one.seed = 3;
        check_case(one);
      }
    }
  }
}

SIDA_TEST(linears) {
  std::mt19937_64 random(11);
  std::set<std::pair<DType, int>> seen;
  for (const DType w : {DType::f32, DType::bf16, DType::f16, DType::i8, DType::int4, DType::mxfp4}) {
    for (int i = 0; i < 9 * effort(); ++i) {
      LinearCase one;
      one.w = w;
      one.x = i % 3 == 2 ? DType::f32 : i % 3 == 1 || w == DType::f16 ? DType::f16 : DType::bf16;
      one.tokens = i < 3   ? 1 + static_cast<int64_t>(random() % 16)
                   : i < 6 ? 17 + static_cast<int64_t>(random() % 60)
                           : 1;
      one.columns = i % 3 == 0 ? pick<int64_t>(random, {80, 520}) : pick<int64_t>(random, {1, 37, 64, 144});
      one.rows = pick<int64_t>(random, {1, 5, 64, 75, 200});
      one.strided = random() % 2 == 0;
      one.biased = random() % 2 == 0;
      one.crooked = i % 3 != 0 && random() % 3 == 0;
      one.extreme = is_grouped(w) && random() % 2 == 0;
      one.multiprocessors = pick(random, {1, 20});
      one.seed = random() % 100000;
      const cuda::Choice choice = check_case(one);
      if (choice.path == cuda::Path::tensor_core) seen.insert({w, choice.splits > 1 ? 1 : choice.block_t});
    }
  }
  // Every 4-bit type was computed on the tensor cores by both tiles.
  for (const DType w : {DType::int4, DType::mxfp4}) {
    CHECK(seen.contains({w, 64}) && (seen.contains({w, 16}) || seen.contains({w, 1})));
  }
  LinearCase none;
  none.tokens = 0;
  check_case(none);
  none.tokens = 3;
  none.rows = 0;
  check_case(none);
}

#ifdef SIDA_HARNESS  // what only the harness can count
SIDA_TEST(three_launches_for_any_top_k) {
  LayerCase layer;
  CHECK_EQ(run(layer, 1).launches, "dispatch_plan,expert_gemm<decode>,expert_gemm<decode>");
  layer.x = layer.w = DType::f32;
  CHECK_EQ(run(layer, 1).launches, "dispatch_plan,expert_gemm_f32<16>,expert_gemm_f32<16>");
  layer.top_k = 2;
  CHECK_EQ(run(layer, 1).launches, "dispatch_plan,expert_gemm_f32<16>,expert_gemm_f32<16>");
  layer.tokens = 0;
  CHECK_EQ(run(layer, 1).launches, "");
  CHECK_EQ(run(LinearCase{}, 1).launches, "dispatch_plan,expert_gemm<decode>");
}

// The index-th permutation of n things.
void permute(std::vector<unsigned>& order, int64_t index) {
  for (size_t i = 0; i + 1 < order.size(); ++i) {
    const auto left = static_cast<int64_t>(order.size() - i);
    std::rotate(order.begin() + static_cast<std::ptrdiff_t>(i),
                order.begin() + static_cast<std::ptrdiff_t>(i) + static_cast<std::ptrdiff_t>(index % left),
                order.begin() + static_cast<std::ptrdiff_t>(i) + static_cast<std::ptrdiff_t>(index % left) + 1);
    index /= left;
  }
}

// The block that comes last adds a token's choices (and a tile's slices): every order of arrival gives the same bits.
SIDA_TEST(choices_are_combined_in_every_order_of_blocks) {
  struct {
    int64_t tokens, top_k, experts, d_model, d_ff;
    int multiprocessors, splits;
    bool absent;
    size_t blocks;
    int64_t orders;
  } const cases[] = {
      {1, 3, 3, 24, 16, 1, 1, false, 3, 6},     // a token's choices, one tile each
      {2, 2, 4, 24, 16, 1, 1, false, 4, 24},    // two tokens, choices that may share a tile
      {2, 2, 4, 24, 16, 1, 1, true, 4, 24},     // some choices never come
      {1, 2, 2, 80, 16, 1, 1, false, 4, 24},    // two tiles of columns
      {1, 3, 3, 24, 512, 3, 2, false, 6, 720},  // slices of d_ff, then choices
  };
  for (const auto& c : cases) {
    LayerCase layer;
    layer.x = layer.w = DType::f32;
    layer.tokens = c.tokens;
    layer.top_k = c.top_k;
    layer.experts = c.experts;
    layer.d_model = c.d_model;
    layer.d_ff = c.d_ff;
    layer.multiprocessors = c.multiprocessors;
    layer.absent = c.absent;
    layer.seed = 4;
    std::vector<unsigned char> bytes;
    std::set<std::vector<unsigned>> seen;
    for (int64_t index = 0; index < c.orders; ++index) {
      try {
        const Outcome outcome = run(layer, 1, [&](std::vector<unsigned>& order) {
          if (order.size() != c.blocks) return;
          permute(order, index);
          seen.insert(order);
        });
        CHECK_EQ(outcome.wrong, "");
        CHECK_EQ(outcome.choice.splits, c.splits);
        if (bytes.empty()) bytes = outcome.bytes;
        CHECK(outcome.bytes == bytes);
      } catch (const harness::KernelError& error) {
        test::report(__FILE__, __LINE__, layer.name() + ": " + error.what());
      }
    }
    CHECK_EQ(static_cast<int64_t>(seen.size()), c.orders);
  }
}

SIDA_TEST(fragments_are_loaded_without_bank_conflicts) {
  for (const DType w : {DType::bf16, DType::i8, DType::int4}) {
    for (const int64_t tokens : {5, 60, 400}) {
      LayerCase layer;
      layer.w = w;
      layer.tokens = tokens;
      layer.experts = 2;
      layer.multiprocessors = 1;
      layer.d_model = layer.d_ff = 192;
      harness::bank_conflicts();
      const Outcome outcome = run(layer, 1);
      const harness::BankConflicts found = harness::bank_conflicts();
      CHECK_EQ(outcome.choice.block_t, tokens == 5 ? 16 : tokens == 60 || is_grouped(w) ? 64 : 128);
      CHECK(found.phases > 100);
      CHECK_EQ(found.conflicts, 0);
    }
  }
}
#endif

// The same rows give the same bits whether their experts came in one wave or in two.
SIDA_TEST(waves_do_not_change_a_bit) {
  for (const DType w : {DType::bf16, DType::i8, DType::mxfp4}) {
    LayerCase layer;
    layer.w = w;
    layer.tokens = 23;
    layer.d_model = 144;
    layer.d_ff = 512;
    const Outcome at_once = run(layer, 3);
    layer.waves = true;
    const Outcome in_two = run(layer, 4);
    CHECK(at_once.choice.splits > 1);
    CHECK(at_once.bytes == in_two.bytes);
  }
}

// A NaN reaches every output of its own token, through every activation, and no other token's.
SIDA_TEST(nan_propagates) {
  for (const DType x : {DType::bf16, DType::f16, DType::f32}) {
    for (const Activation activation : {Activation::relu, Activation::gelu, Activation::gelu_new, Activation::silu}) {
      LayerCase layer;
      layer.x = layer.w = x;
      layer.activation = activation;
      layer.nan = true;
      check_case(layer);
    }
  }
}

SIDA_TEST(d_ff_is_split_only_where_it_pays) {
  LayerCase layer;
  layer.d_ff = 512;
  layer.tokens = 1;
  layer.experts = 1;
  const Outcome outcome = run(layer, 1);
  CHECK_EQ(outcome.choice.splits, 2);
  CHECK_EQ(outcome.wrong, "");
}

#ifdef SIDA_HARNESS
// What ships. The list is compared with the kernels in this program's symbol table, and those with what the tests above
// have launched: an instance that is added without a test, or never launched, fails here.
std::set<std::string> shipped() {
  std::set<std::string> names{"dispatch_plan_kernel(PlanParams)", "route_top1_kernel(RouteParams)"};
  for (const char* const phase : {"(Phase)0", "(Phase)1"}) {
    const auto add = [&](const char* types, const char* shape) {
      names.insert(std::string("void expert_gemm<") + types + ", GemmShape<" + shape + ">, " + phase +
                   ">(LayerParams)");
    };
    for (const char* const types : {"bf16, bf16", "bf16, signed char", "f16, f16", "f16, signed char"}) {
      for (const char* const shape : {"64, 16, 4, 1, 4, 2", "128, 64, 2, 2, 3, 1", "128, 128, 2, 4, 3, 1"}) {
        add(types, shape);
      }
    }
    for (const char* const types : {"bf16, int4_pair", "bf16, mxfp4_pair", "f16, int4_pair", "f16, mxfp4_pair"}) {
      for (const char* const shape : {"64, 16, 4, 1, 4, 2", "128, 64, 4, 2, 3, 2"}) add(types, shape);
    }
    for (const char* const tokens : {"16", "64"}) {
      names.insert(std::string("void expert_gemm_f32<") + tokens + ", " + phase + ">(LayerParams)");
    }
  }
  return names;
}

// Kernels are the functions of sida::cuda that take one struct of parameters.
std::map<std::string, const void*> built() {
  std::map<std::string, const void*> kernels;
  const std::string command = "nm -C --defined-only /proc/" + std::to_string(getpid()) + "/exe";
  FILE* const pipe = popen(command.c_str(), "r");
  char line[1024];
  while (pipe != nullptr && std::fgets(line, sizeof line, pipe) != nullptr) {
    std::string text(line);
    text.erase(text.find_last_not_of('\n') + 1);
    const size_t type = text.find(' ');
    if (type == std::string::npos || std::strchr("TtWw", text[type + 1]) == nullptr) continue;
    std::string name = text.substr(type + 3);
    if (name.find("[clone") != std::string::npos) continue;
    for (size_t at; (at = name.find("sida::cuda::")) != std::string::npos;) name.erase(at, 12);
    const bool kernel =
        name.find("::") == std::string::npos && name.find('&') == std::string::npos &&
        (name.find("(LayerParams)") != std::string::npos || name.find("(PlanParams)") != std::string::npos ||
         name.find("(RouteParams)") != std::string::npos);
    if (kernel) kernels[name] = reinterpret_cast<const void*>(std::stoull(text.substr(0, type), nullptr, 16));
  }
  if (pipe != nullptr) pclose(pipe);
  return kernels;
}

SIDA_TEST(every_shipped_instance_was_launched) {
  CHECK_EQ(run(RouteCase{}, 1).wrong, "");
  const auto kernels = built();
  std::set<std::string> names;
  for (const auto& [name, address] : kernels) {
    names.insert(name);
    if (harness::launched_kernels().count(address) == 0) test::report(__FILE__, __LINE__, name + " was never launched");
    if (shipped().count(name) == 0) test::report(__FILE__, __LINE__, name + " is built and not in the list");
  }
  for (const std::string& name : shipped()) {
    if (names.count(name) == 0) test::report(__FILE__, __LINE__, name + " is in the list and not built (is nm there?)");
  }
}
#endif

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  if (const char* const why = sida::harness::unavailable()) {
    std::puts(why);
    return 77;
  }
  return sida::test::run_all(argc, argv);
}
