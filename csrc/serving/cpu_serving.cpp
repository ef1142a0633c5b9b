#include "serving/cpu_serving.h"

#include <functional>
#include <vector>

#include "base/at_end.h"
#include "serving/moe_layer.h"

namespace sida::cpu {
namespace {

// Computes the experts of a wave; `args` are of the engine that it came from.
template <class Profiled>
void compute(TransferEngine& traced, MoeFfnArgs& args, std::vector<int32_t>& slot_of_expert, const Wave& wave,
             const LayerForward& layer, const Profiled& profiled) {
  for (size_t i = 0; i < wave.experts.size(); ++i) {
    slot_of_expert[static_cast<size_t>(wave.experts[i])] = wave.slots[i];
  }
  const int64_t begin = Trace::now_ns();
  profiled("sida::moe_ffn", [&] { moe_ffn(args, layer.threads); });
  traced.trace().record({.kind = TraceEvent::Kind::compute,
                         .lane = 0,
                         .layer = layer.layer,
                         .expert = static_cast<int32_t>(wave.experts.size()),
                         .batch = layer.batch,
                         .begin_ns = begin,
                         .end_ns = Trace::now_ns()});
  for (const int32_t expert : wave.experts) slot_of_expert[static_cast<size_t>(expert)] = -1;
}

}  // namespace

void forward(TransferEngine& engine, const LayerForward& layer) {
  MoeFfnArgs args = layer.args;
  set_slots(args, engine);
  std::vector<int32_t> slot_of_expert(static_cast<size_t>(args.num_experts), -1);
  args.slot_of_expert = slot_of_expert.data();
  // By reference: a function made of the body itself would be an allocation at each wave.
  const auto profiled = [&](const char* name, const auto& body) {
    if (layer.profiled == nullptr) return body();
    layer.profiled(name, std::cref(body));
  };

  const auto rows = static_cast<size_t>(args.tokens * args.top_k);
  const std::vector<int32_t> experts = distinct_experts({args.expert_index, rows}, args.num_experts);
  const std::vector<int64_t> choices = choices_of(experts, {args.expert_index, rows}, args.num_experts);
  const DemandId demand = engine.demand(layer.layer, experts, layer.batch, choices);
  const AtEnd finish([&] { engine.finish(demand); });
  while (true) {
    Wave wave;
    profiled("sida::demand", [&] { wave = engine.next_wave(demand, layer.interrupted); });
    if (wave.experts.empty()) break;
    if (!wave.low_bit) {
      compute(engine, args, slot_of_expert, wave, layer, profiled);
      engine.release(demand, wave);
      continue;
    }
    if (layer.low_bit == nullptr) {
      fail(ErrorKind::internal, "low-bit copies are to serve ", wave.experts.size(), " experts, and there are none");
    }
    TransferEngine& copies = *layer.low_bit;
    MoeFfnArgs low_args = args;
    set_slots(low_args, copies);
    const DemandId lent = copies.demand(layer.layer, wave.experts);  // pins them, so that close() waits for the kernels
    const AtEnd returned([&] { copies.finish(lent); });
    while (true) {
      const Wave held = copies.next_wave(lent, layer.interrupted);
      if (held.experts.empty()) break;
      compute(engine, low_args, slot_of_expert, held, layer, profiled);
    }
  }
  if (args.top_k > 1 && args.tokens > 0) moe_ffn_combine(args, layer.threads);
}

}  // namespace sida::cpu
