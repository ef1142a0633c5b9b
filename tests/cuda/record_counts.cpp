// Records what serving one sentence at a time costs in bytes, launches and runtime calls, and prints it as JSON: what
// bench/modelled_time.py turns into modelled times. Nothing here is a formula over the model's sizes:
//
//   - a layer of the model's real size runs through the kernels in the harness, which counts every launch, the distinct
//     bytes of global memory that it reads and writes, and its tensor-core instructions;
//   - the engine's own Residency serves a trace of sentences at every budget, which gives the experts copied;
//   - CudaSlots on the recording runtime gives the runtime calls of a copy and of a layer's waits.
//
//   cuda_record_counts [SENTENCES]     600 if not given; takes a minute and up to 5 GiB
//   cuda_record_counts small           a small model in a second, for the tests
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/cuda_slots.h"
#include "experts/expert.h"
#include "experts/policy_trace.h"
#include "harness/harness.h"
#include "kernels/cuda/moe_ffn_cuda.h"
#include "recording_runtime.h"
#include "route_case.h"

namespace sida::cuda_test {
namespace {

struct Model {
  const char* name;
  int32_t experts, layers;
  ExpertFormat format;
};

// Tokens of sentences drawn by a Zipf law; a token's type names its expert in a layer most of the time.
struct Traffic {
  int tokens = 32, types = 20000, sentences = 600, warm_up = 400;
  double by_type = 0.7;  // of the tokens; the others go anywhere
};

// [sentences][layers][tokens]
using Routes = std::vector<std::vector<std::vector<int32_t>>>;

Routes draw(const Model& model, const Traffic& traffic) {
  std::mt19937_64 random(2024);
  std::vector<double> weights;
  for (int type = 0; type < traffic.types; ++type) weights.push_back(1.0 / (type + 1));
  std::discrete_distribution<int> zipf(weights.begin(), weights.end());
  std::vector<std::vector<int32_t>> of_type(static_cast<size_t>(model.layers));
  const auto any = [&] { return static_cast<int32_t>(random() % static_cast<uint64_t>(model.experts)); };
  for (auto& layer : of_type) {
    for (int type = 0; type < traffic.types; ++type) layer.push_back(any());
  }
  std::uniform_real_distribution<double> uniform;
  Routes routes;
  for (int sentence = 0; sentence < traffic.sentences; ++sentence) {
    routes.emplace_back(static_cast<size_t>(model.layers));
    for (int token = 0; token < traffic.tokens; ++token) {
      const auto type = static_cast<size_t>(zipf(random));
      for (size_t layer = 0; layer < of_type.size(); ++layer) {
        routes.back()[layer].push_back(uniform(random) < traffic.by_type ? of_type[layer][type] : any());
      }
    }
  }
  return routes;
}

RoutingTrace trace_of(const Model& model, const Routes& routes, int sentences) {
  RoutingTrace trace{model.layers, model.experts, {}};
  for (int s = 0; s < sentences; ++s) {
    AnnouncedBatch batch;
    for (int32_t layer = 0; layer < model.layers; ++layer) {
      const auto& tokens = routes[static_cast<size_t>(s)][static_cast<size_t>(layer)];
      const std::set<int32_t> distinct(tokens.begin(), tokens.end());
      batch.layers.push_back({layer, {distinct.begin(), distinct.end()}});
    }
    trace.batches.push_back(std::move(batch));
  }
  return trace;
}

void print_launches(const std::vector<harness::LaunchCounts>& launches) {
  std::printf("[");
  for (size_t i = 0; i < launches.size(); ++i) {
    const harness::LaunchCounts& l = launches[i];
    std::printf(
        "%s\n        {\"kernel\": \"%s\", \"blocks\": %lld, \"threads\": %lld, \"bytes_read\": %lld, "
        "\"bytes_written\": %lld, \"mma_m16n8k16\": %lld}",
        i == 0 ? "" : ",", l.name.c_str(), static_cast<long long>(l.blocks), static_cast<long long>(l.threads),
        static_cast<long long>(l.bytes_read), static_cast<long long>(l.bytes_written), static_cast<long long>(l.mma));
  }
  std::printf("]");
}

void* filled(size_t bytes) {
  void* const memory = harness::global_allocate(bytes);
  const std::vector<unsigned char> zeros(std::min<size_t>(bytes, 1 << 20));
  for (size_t done = 0; done < bytes; done += zeros.size()) {
    harness::global_fill(static_cast<unsigned char*>(memory) + done, zeros.data(),
                         std::min(zeros.size(), bytes - done));
  }
  return memory;
}

// One layer of real size through the kernels: its router's choice, then the experts. The values do not matter.
void record_layer(const Model& model, const std::vector<int32_t>& experts) {
  const auto tokens = static_cast<int64_t>(experts.size());
  const std::set<int32_t> distinct(experts.begin(), experts.end());
  const auto slots = static_cast<int64_t>(distinct.size());
  const auto record = static_cast<size_t>(model.format.record_bytes());
  harness::global_capacity(static_cast<size_t>(slots) * (record + 16384) + (32u << 20));
  harness::seed(1);
  harness::launch_counts();
  RouteCase routed{DType::f32, DType::bf16, 1, tokens, model.experts, 64, 1};
  route(routed, std::vector<float>(static_cast<size_t>(tokens * model.experts)), 1);

  std::vector<int32_t> slot_of_expert(static_cast<size_t>(model.experts), -1);
  int32_t next = 0;
  for (const int32_t expert : distinct) slot_of_expert[static_cast<size_t>(expert)] = next++;
  auto* const memory = static_cast<unsigned char*>(filled(static_cast<size_t>(slots) * record));
  const auto upload = [](const auto& values) {
    auto* const device = harness::global_allocate(values.size() * sizeof values[0]);
    harness::global_fill(device, values.data(), values.size() * sizeof values[0]);
    return device;
  };
  const ExpertFormat& format = model.format;
  const bool grouped = is_grouped(format.dtype);
  const DType x_dtype = grouped ? DType::bf16 : format.dtype;
  const auto matrix = [&](int64_t offset, int64_t columns, int64_t scale_offset) {
    const int64_t element = element_bytes(format.dtype);
    ExpertMatrix made{memory + offset, static_cast<int64_t>(record) / element,
                      row_bytes(format.dtype, columns) / element, nullptr, 0};
    if (grouped) {
      made.group_scale = memory + scale_offset;
      made.group_scale_slot_stride = static_cast<int64_t>(record) / group_scale_bytes(format.dtype);
      made.group_scale_row_stride = groups_of(columns);
    }
    return made;
  };
  MoeFfnArgs args{};
  args.tokens = tokens;
  args.top_k = 1;
  args.d_model = model.format.d_model;
  args.d_ff = model.format.d_ff;
  args.num_experts = model.experts;
  args.num_slots = slots;
  args.x_dtype = x_dtype;
  args.w_dtype = format.dtype;
  args.x = filled(static_cast<size_t>(tokens * args.d_model * element_bytes(x_dtype)));
  args.x_row_stride = args.d_model;
  args.expert_index = static_cast<const int32_t*>(upload(experts));
  args.gate = static_cast<const float*>(filled(experts.size() * 4));
  args.wi = matrix(format.wi_offset(), args.d_model, format.wi_scale_offset());
  args.wo = matrix(format.wo_offset(), args.d_ff, format.wo_scale_offset());
  args.slot_of_expert = static_cast<const int32_t*>(upload(slot_of_expert));
  args.activation = Activation::relu;
  args.out = filled(static_cast<size_t>(tokens * args.d_model * element_bytes(x_dtype)));
  // A100, RTX 4090, H100 SXM, L4: the counts stand for all of them only if all would choose the same kernels.
  const cuda::Architecture devices[] = {
      {80, 108, 163 * 1024}, {89, 128, 99 * 1024}, {90, 132, 227 * 1024}, {89, 58, 99 * 1024}};
  for (const cuda::Architecture& device : devices) {
    if (!(cuda::choose(args, device) == cuda::choose(args, devices[0]))) {
      fail(ErrorKind::internal, "a device with ", device.multiprocessors, " multiprocessors would choose another tile");
    }
  }
  void* const scratch = harness::global_allocate(static_cast<size_t>(cuda::workspace_bytes(args, devices[0])));
  cuda::moe_ffn(args, devices[0], scratch, nullptr, nullptr);
  std::printf("{\"tokens\": %lld, \"distinct_experts\": %lld, \"launches\": ", static_cast<long long>(tokens),
              static_cast<long long>(slots));
  print_launches(harness::launch_counts());
  std::printf("}");
}

// Runtime calls of `rounds` rounds of: an expert is copied, a layer waits for its slots, runs, and is noted.
void record_transfer() {
  constexpr int rounds = 40, slots = 4, lanes = 2;
  constexpr size_t bytes = 64;
  static unsigned char pinned[rounds + slots][bytes];
  Recording recording(1);
  cuda::CudaSlots memory(recording.table(), 0, slots, bytes, lanes);
  const cuda::Stream stream = recording.user_stream();
  const std::vector<std::string> names{"stream_wait", "copy_to_device", "event_record", "event_synchronize"};
  std::vector<size_t> before(names.size());
  for (int round = 0; round < slots + rounds; ++round) {
    if (round == slots) {
      for (size_t i = 0; i < names.size(); ++i) before[i] = recording.calls(names[i]);
    }
    const int32_t slot = round % slots;
    memory.fill(slot, round % lanes, pinned[round], bytes);
    memory.before_read(stream, std::vector<int32_t>{slot});
    recording.kernel(stream, {{memory.slot(slot), bytes}}, {}, [] {});
    memory.after_read(stream, std::vector<int32_t>{slot});
  }
  std::printf("{\"copies\": %d, \"layers\": %d, \"calls\": {", rounds, rounds);
  for (size_t i = 0; i < names.size(); ++i) {
    std::printf("%s\"%s\": %zu", i == 0 ? "" : ", ", names[i].c_str(), recording.calls(names[i]) - before[i]);
  }
  std::printf("}}");
  memory.close();
  recording.finish();
  if (!recording.problems().empty()) fail(ErrorKind::internal, "the recording found: ", recording.problems().front());
}

void record(const std::vector<Model>& models, const Traffic& traffic) {
  std::printf(
      "{\n  \"traffic\": {\"tokens\": %d, \"types\": %d, \"by_type\": %.2f, \"sentences\": %d, \"warm_up\": %d},\n",
      traffic.tokens, traffic.types, traffic.by_type, traffic.sentences, traffic.warm_up);
  std::printf("  \"transfer\": ");
  record_transfer();
  std::printf(",\n  \"models\": [");
  for (size_t m = 0; m < models.size(); ++m) {
    const Model& model = models[m];
    const Routes routes = draw(model, traffic);
    const RoutingTrace whole = trace_of(model, routes, traffic.sentences);
    const RoutingTrace warm_up = trace_of(model, routes, traffic.warm_up);
    const double steps = traffic.sentences - traffic.warm_up;
    std::printf(
        "%s\n    {\"name\": \"%s\", \"experts\": %d, \"moe_layers\": %d, \"record_bytes\": %lld,\n     \"layer\": ",
        m == 0 ? "" : ",", model.name, model.experts, model.layers,
        static_cast<long long>(model.format.record_bytes()));
    record_layer(model, routes[static_cast<size_t>(traffic.warm_up)][0]);
    std::printf(",\n     \"budgets\": [");
    const int shares[] = {10, 20, 40, 60, 80, 100};
    for (const int share : shares) {
      const int64_t slots = static_cast<int64_t>(model.layers) * model.experts * share / 100;
      const auto loads = [&](Eviction eviction, int lookahead, int64_t& wanted) {
        const PolicyOptions options{eviction, slots, lookahead};
        const PolicyResult all = run_policy(whole, options), before = run_policy(warm_up, options);
        wanted = all.wanted - before.wanted;
        return static_cast<double>(all.loads - before.loads) / steps;
      };
      int64_t wanted = 0;
      const double next_use = loads(Eviction::next_use, 4, wanted), lru = loads(Eviction::lru, 0, wanted),
                   fifo = loads(Eviction::fifo, 0, wanted);
      std::printf(
          "%s\n       {\"share\": %.2f, \"slots\": %lld, \"wanted\": %.3f, \"copies\": {\"next_use\": %.3f, "
          "\"lru\": %.3f, \"fifo\": %.3f}}",
          share == shares[0] ? "" : ",", share / 100.0, static_cast<long long>(slots),
          static_cast<double>(wanted) / steps, next_use, lru, fifo);
    }
    std::printf("]}");
  }
  std::printf("\n  ]\n}\n");
}

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  using namespace sida;
  try {
    cuda_test::Traffic traffic;
    if (argc > 1 && std::strcmp(argv[1], "small") == 0) {
      traffic.tokens = 8;
      traffic.sentences = 30;
      traffic.warm_up = 10;
      cuda_test::record({{"small-16", 16, 2, {64, 128, DType::bf16, false}}}, traffic);
      return 0;
    }
    if (argc > 1) traffic.sentences = std::atoi(argv[1]);
    if (traffic.sentences <= traffic.warm_up) {
      std::fprintf(stderr, "%d sentences, expected more than the %d of the warm-up\n", traffic.sentences,
                   traffic.warm_up);
      return 2;
    }
    const ExpertFormat format{768, 3072, DType::bf16, false};
    const ExpertFormat int4{768, 3072, DType::int4, false}, mxfp4{768, 3072, DType::mxfp4, false};
    cuda_test::record({{"switch-base-128", 128, 6, format},
                       {"switch-base-256", 256, 6, format},
                       {"switch-base-128 int4", 128, 6, int4},
                       {"switch-base-128 mxfp4", 128, 6, mxfp4}},
                      traffic);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
