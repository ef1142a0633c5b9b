#include "serving/cpu_serving.h"

#include <functional>
#include <vector>

#include "base/at_end.h"
#include "serving/moe_layer.h"

namespace sida::cpu {

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
  const DemandId demand = engine.demand(layer.layer, experts, layer.batch);
  const AtEnd finish([&] { engine.finish(demand); });
  while (true) {
    Wave wave;
    profiled("sida::demand", [&] { wave = engine.next_wave(demand, layer.interrupted); });
    if (wave.experts.empty()) break;
    for (size_t i = 0; i < wave.experts.size(); ++i) {
      slot_of_expert[static_cast<size_t>(wave.experts[i])] = wave.slots[i];
    }
    const int64_t begin = Trace::now_ns();
    profiled("sida::moe_ffn", [&] { moe_ffn(args, layer.threads); });
    engine.trace().record({.kind = TraceEvent::Kind::compute,
                           .lane = 0,
                           .layer = layer.layer,
                           .expert = static_cast<int32_t>(wave.experts.size()),
                           .batch = layer.batch,
                           .begin_ns = begin,
                           .end_ns = Trace::now_ns()});
    for (const int32_t expert : wave.experts) slot_of_expert[static_cast<size_t>(expert)] = -1;
    engine.release(demand, wave);
  }
  if (args.top_k > 1 && args.tokens > 0) moe_ffn_combine(args, layer.threads);
}

}  // namespace sida::cpu
