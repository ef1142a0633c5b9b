// The forward of a MoE layer on the CPU over an engine, without torch: the same bits for every budget, and those of one
// call of the kernels with every expert in memory; whatever ends it, nothing stays pinned.
#include "serving/cpu_serving.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "device/host_device.h"
#include "serve.h"
#include "serving/moe_layer.h"
#include "store_file.h"

namespace sida::test {
namespace {

constexpr int32_t layers = 2, experts = 6;

ParallelFor serial() {
  return {1, [](int64_t count, void (*body)(void*, int64_t), void* context) {
            for (int64_t i = 0; i < count; ++i) body(context, i);
          }};
}

// Small fp32 numbers, or whole bytes with scales, in every part of a record.
std::vector<char> make_record(const ExpertFormat& format, int64_t record) {
  std::mt19937_64 random(static_cast<uint64_t>(record));
  std::vector<char> bytes(static_cast<size_t>(format.record_bytes()));
  for (char& byte : bytes) byte = static_cast<char>(random());
  const auto floats = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at + 4 <= end; at += 4) {
      const float value = (static_cast<float>(random() % 2001) - 1000.0f) / 8000.0f;
      std::memcpy(bytes.data() + at, &value, 4);
    }
  };
  floats(format.dtype == DType::f32 ? 0 : format.wi_scale_offset(), format.record_bytes());
  return bytes;
}

class Weights final : public RecordSource {
 public:
  explicit Weights(const ExpertFormat& format) : format_(format) {}
  void read(int64_t record, void* into) override {
    const std::vector<char> bytes = make_record(format_, record);
    std::memcpy(into, bytes.data(), bytes.size());
  }

 private:
  const ExpertFormat format_;
};

struct Tokens {
  int64_t count = 9, top_k = 2;
  std::vector<int32_t> expert_index;
  std::vector<float> x, gate, out, partials;

  explicit Tokens(int64_t d_model, uint64_t seed = 1) {
    std::mt19937_64 random(seed);
    for (int64_t i = 0; i < count * top_k; ++i) {
      expert_index.push_back(static_cast<int32_t>(random() % (experts + 1)) - 1);
      gate.push_back(0.25f + static_cast<float>(random() % 100) / 100);
    }
    for (int64_t i = 0; i < count * d_model; ++i) x.push_back(static_cast<float>(random() % 2001) / 1000.0f - 1.0f);
  }

  MoeFfnArgs args(int64_t d_model, Activation activation) {
    out.assign(x.size(), 0.0f);
    partials.assign(x.size() * static_cast<size_t>(top_k), 0.0f);
    MoeFfnArgs args{};
    args.tokens = count;
    args.top_k = top_k;
    args.d_model = d_model;
    args.num_experts = experts;
    args.x_dtype = DType::f32;
    args.x = x.data();
    args.x_row_stride = d_model;
    args.expert_index = expert_index.data();
    args.gate = gate.data();
    args.activation = activation;
    args.out = out.data();
    args.partials = top_k > 1 ? partials.data() : nullptr;
    return args;
  }
};

std::unique_ptr<TransferEngine> engine_over(const StoreFile& file, int64_t slots) {
  const ExpertFormat& format = file.layout().format;
  auto device =
      std::make_shared<HostDevice>(std::make_shared<Weights>(format), int64_t{layers} * experts, format.record_bytes());
  EngineOptions options{};
  options.slots = slots;
  options.lanes = 2;
  return std::make_unique<TransferEngine>(file.open(), std::move(device), options);
}

std::vector<float> served(TransferEngine& engine, int32_t layer, Tokens tokens, Activation activation) {
  cpu::LayerForward forward{};
  forward.layer = layer;
  forward.args = tokens.args(engine.format().d_model, activation);
  forward.threads = serial();
  cpu::forward(engine, forward);
  return tokens.out;
}

// One call of the kernels over records that lie one after the other.
std::vector<float> at_once(const ExpertFormat& format, int32_t layer, Tokens tokens, Activation activation) {
  std::vector<char> slots;
  for (int32_t expert = 0; expert < experts; ++expert) {
    const std::vector<char> record = make_record(format, int64_t{layer} * experts + expert);
    slots.insert(slots.end(), record.begin(), record.end());
  }
  MoeFfnArgs args = tokens.args(format.d_model, activation);
  std::vector<int32_t> slot_of_expert(experts);
  std::iota(slot_of_expert.begin(), slot_of_expert.end(), 0);
  args.slot_of_expert = slot_of_expert.data();
  args.num_slots = experts;
  args.d_ff = format.d_ff;
  args.w_dtype = format.dtype;
  args.gated = format.gated;
  const int64_t stride = format.record_bytes() / element_bytes(format.dtype);
  const auto matrix = [&](int64_t offset, int64_t scale, int64_t bias, int64_t columns) {
    ExpertMatrix made{};
    made.data = slots.data() + offset;
    made.slot_stride = stride;
    made.row_stride = columns;
    if (format.dtype == DType::i8) {
      made.scale = reinterpret_cast<const float*>(slots.data() + scale);
      made.scale_slot_stride = format.record_bytes() / 4;
    }
    if (format.biased) {
      made.bias = reinterpret_cast<const float*>(slots.data() + bias);
      made.bias_slot_stride = format.record_bytes() / 4;
    }
    return made;
  };
  args.wi = matrix(format.wi_offset(), format.wi_scale_offset(), format.wi_bias_offset(), format.d_model);
  args.wo = matrix(format.wo_offset(), format.wo_scale_offset(), format.wo_bias_offset(), format.d_ff);
  cpu::moe_ffn(args, serial());
  if (args.top_k > 1) cpu::moe_ffn_combine(args, serial());
  return tokens.out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

SIDA_TEST(every_budget_gives_the_bits_of_one_call) {
  for (const ExpertFormat& format : std::vector<ExpertFormat>{
           {32, 48, DType::f32, false}, {32, 48, DType::f32, true, true}, {64, 40, DType::i8, true}}) {
    const StoreFile file(layers, experts, format);
    const Activation activation = format.gated ? Activation::silu : Activation::gelu;
    for (int32_t layer = 0; layer < layers; ++layer) {
      const Tokens tokens(format.d_model, 7);
      const std::vector<float> expected = at_once(format, layer, tokens, activation);
      CHECK(std::count(expected.begin(), expected.end(), 0.0f) < static_cast<long>(expected.size() / 4));
      for (const int64_t slots : {1, 2, 5, 12}) {
        const auto engine = engine_over(file, slots);
        CHECK(same_bits(served(*engine, layer, tokens, activation), expected));
        CHECK(same_bits(served(*engine, layer, tokens, activation), expected));
        CHECK(engine->stats().peak_slots <= slots);
      }
    }
  }
}

SIDA_TEST(experts_are_named_once_in_the_order_of_their_rows) {
  const std::vector<int32_t> rows{3, -1, 0, 3, 5, 0, -1, 2};
  CHECK(distinct_experts(rows, experts) == (std::vector<int32_t>{3, 0, 5, 2}));
  CHECK(distinct_experts({}, experts).empty());
  CHECK(distinct_experts(std::vector<int32_t>{-1, -1}, experts).empty());
}

SIDA_TEST(rows_without_experts_ask_for_nothing) {
  const StoreFile file(layers, experts);
  const auto engine = engine_over(file, 2);
  Tokens tokens(32);
  tokens.expert_index.assign(tokens.expert_index.size(), -1);
  CHECK(same_bits(served(*engine, 0, tokens, Activation::relu), std::vector<float>(tokens.x.size(), 0.0f)));
  CHECK_EQ(total(engine->stats()).loads, 0);
}

// What a profiler sees: a wave for each budget's worth of experts, and each wait, the last of which says there is none.
SIDA_TEST(waits_and_waves_are_named_for_a_profiler) {
  static std::map<std::string, int> seen;
  seen.clear();
  const StoreFile file(layers, experts);
  const auto engine = engine_over(file, 1);
  Tokens tokens(32);
  cpu::LayerForward forward{};
  forward.args = tokens.args(32, Activation::relu);
  forward.threads = serial();
  forward.profiled = [](const char* name, const std::function<void()>& body) {
    ++seen[name];
    body();
  };
  cpu::forward(*engine, forward);
  const auto wanted = static_cast<int>(distinct_experts(tokens.expert_index, experts).size());
  CHECK_EQ(seen["sida::moe_ffn"], wanted);  // one slot: a wave each
  CHECK_EQ(seen["sida::demand"], wanted + 1);
}

// Weights that are read when somebody opens them, but for those of one expert.
class ShutWeights final : public RecordSource {
 public:
  ShutWeights(const ExpertFormat& format, int64_t open) : weights_(format), open_(open) {}
  void read(int64_t record, void* into) override {
    while (record != open_ && shut_ && !interrupted_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (interrupted_) fail(ErrorKind::closed, "interrupted while shut");
    weights_.read(record, into);
  }
  void interrupt() override { interrupted_ = true; }
  void open() { shut_ = false; }

 private:
  Weights weights_;
  const int64_t open_;
  std::atomic<bool> shut_{true}, interrupted_{false};
};

// Tokens whose choices of one expert, or of all others, are left out.
Tokens only(Tokens tokens, bool of_it, int32_t expert) {
  for (int32_t& chosen : tokens.expert_index) {
    if ((chosen == expert) != of_it) chosen = -1;
  }
  return tokens;
}

std::vector<float> sum(std::vector<float> a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

// A layer of which one expert is there and the others are not: those are computed from their copies, of another type,
// and read meanwhile; the next time all are exact. With one choice a token and with two.
SIDA_TEST(copies_serve_what_is_not_there_and_the_rest_is_exact) {
  const ExpertFormat exact{64, 40, DType::f32, true}, low{64, 40, DType::i8, true};
  constexpr int32_t there = 3;
  const StoreFile file(layers, experts, exact), copies_file(layers, experts, low);
  for (const int64_t top_k : {1, 2}) {
    auto weights = std::make_shared<ShutWeights>(exact, there);
    EngineOptions options{};
    options.slots = experts;
    options.lanes = 1;
    TransferEngine engine(file.open(), std::make_shared<HostDevice>(weights, layers * experts, exact.record_bytes()),
                          options);
    options.slots = layers * experts;
    TransferEngine copies(
        copies_file.open(),
        std::make_shared<HostDevice>(std::make_shared<Weights>(low), layers * experts, low.record_bytes()), options);
    copies.load_all();
    Tokens tokens(64, 5);
    if (top_k == 1) {
      tokens.top_k = 1;
      tokens.expert_index.resize(static_cast<size_t>(tokens.count));
      tokens.expert_index[0] = there;
    }
    const auto forward_of = [&](Tokens& given) {
      cpu::LayerForward forward{};
      forward.args = given.args(64, Activation::silu);
      forward.threads = serial();
      forward.low_bit = &copies;
      return forward;
    };
    Tokens first = only(tokens, true, there);
    cpu::forward(engine, forward_of(first));
    CHECK_EQ(total(engine.stats()).low_bit_choices, 0);
    engine.set_max_low_bit(1);
    Tokens mixed = tokens;
    cpu::forward(engine, forward_of(mixed));
    const auto low_choices =
        static_cast<int64_t>(std::count_if(tokens.expert_index.begin(), tokens.expert_index.end(),
                                           [](int32_t expert) { return expert >= 0 && expert != there; }));
    CHECK_EQ(total(engine.stats()).low_bit_choices, low_choices);
    const std::vector<float> expected = sum(at_once(exact, 0, only(tokens, true, there), Activation::silu),
                                            at_once(low, 0, only(tokens, false, there), Activation::silu));
    CHECK(same_bits(mixed.out, expected));
    CHECK_EQ(total(copies.stats()).hits,
             static_cast<int64_t>(distinct_experts(tokens.expert_index, experts).size()) - 1);
    weights->open();
    const auto wanted = static_cast<int64_t>(distinct_experts(tokens.expert_index, experts).size());
    CHECK(eventually([&] { return total(engine.stats()).loads == wanted; }));
    Tokens later = tokens;
    cpu::forward(engine, forward_of(later));
    CHECK(same_bits(later.out, at_once(exact, 0, tokens, Activation::silu)));
    CHECK_EQ(total(engine.stats()).low_bit_choices, low_choices);
    CHECK(!same_bits(later.out, mixed.out));
  }
}

// Copies are never there by chance: an engine that may hand them out without any is told.
SIDA_TEST(without_copies_nothing_is_served_in_their_place) {
  const StoreFile file(layers, experts);
  const auto engine = engine_over(file, 1);
  engine->set_max_low_bit(1);
  engine->set_settled(true);
  const Tokens tokens(32);
  CHECK_THROWS(served(*engine, 0, tokens, Activation::relu), Error, "and there are none");
  engine->set_max_low_bit(0);
  CHECK(same_bits(served(*engine, 0, tokens, Activation::relu),
                  at_once(file.layout().format, 0, tokens, Activation::relu)));
}

// An interrupted wait, and a kernel's error, leave no demand and no pin behind: a single slot serves the next layer.
SIDA_TEST(whatever_ends_a_layer_nothing_stays_pinned) {
  const StoreFile file(layers, experts);
  const auto engine = engine_over(file, 1);
  Tokens tokens(32);
  cpu::LayerForward forward{};
  forward.args = tokens.args(32, Activation::relu);
  forward.threads = serial();
  forward.interrupted = [] { return true; };
  forward.profiled = [](const char* name, const std::function<void()>& body) {
    body();
    if (std::string(name) == "sida::moe_ffn") fail(ErrorKind::internal, "a kernel failed");
  };
  for (int attempt = 0; attempt < 3; ++attempt) {
    CHECK_THROWS(cpu::forward(*engine, forward), Error, "");
    forward.interrupted = nullptr;  // then it comes to the kernels
  }
  CHECK_THROWS(cpu::forward(*engine, forward), Error, "a kernel failed");
  const Tokens fresh(32, 3);
  CHECK(same_bits(served(*engine, 1, fresh, Activation::relu),
                  at_once(file.layout().format, 1, fresh, Activation::relu)));
}

}  // namespace
}  // namespace sida::test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
