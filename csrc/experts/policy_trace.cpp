#include "experts/policy_trace.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <set>
#include <utility>

#include "base/error.h"

namespace sida {
namespace {

// Does the next command; a copy is done the moment it starts. False if there is none.
bool run_command(Residency& residency) {
  const auto command = residency.next_command();
  if (!command) return false;
  if (command->kind == Command::Kind::give_back) {
    residency.given_back(command->slot, command->count);
  } else {
    residency.copy_done(command->slot);
  }
  return true;
}

// What is there is computed before the next copy ends: reading is what takes time.
void serve(Residency& residency, const AnnouncedBatch::Layer& layer, BatchId batch) {
  const DemandId demand = residency.demand(layer.layer, layer.experts, batch);
  residency.set_waiting(demand, true);
  while (true) {
    residency.release(demand, residency.take_ready(demand));
    if (residency.exhausted(demand)) break;
    if (!run_command(residency)) fail(ErrorKind::internal, "a demand of MoE layer ", layer.layer, " cannot be served");
  }
  residency.finish(demand);
  while (run_command(residency)) {
  }
}

}  // namespace

PolicyResult run_policy(const RoutingTrace& trace, const PolicyOptions& options,
                        const std::vector<AnnouncedBatch>& predicted) {
  if (!predicted.empty() && predicted.size() != trace.batches.size()) {
    fail(ErrorKind::invalid, "the trace has ", trace.batches.size(), " batches, but ", predicted.size(),
         " tables are predicted for it");
  }
  if (options.lookahead < 0) fail(ErrorKind::invalid, "lookahead is ", options.lookahead, ", expected 0 or more");
  const auto& tables = predicted.empty() ? trace.batches : predicted;
  Residency residency({.layers = trace.layers,
                       .experts = trace.experts,
                       .slots = options.slots,
                       .lanes = 1,
                       .eviction = options.eviction,
                       .prefetch_layers = options.prefetch_layers});
  std::vector<BatchId> numbers;
  for (size_t i = 0; i < trace.batches.size(); ++i) {
    if (options.lookahead > 0) {
      const size_t until = std::min(tables.size(), i + static_cast<size_t>(options.lookahead) + 1);
      while (numbers.size() < until) numbers.push_back(residency.announce(tables[numbers.size()]));
    }
    while (run_command(residency)) {
    }
    const BatchId batch = numbers.empty() ? 0 : numbers[i];
    for (const auto& layer : trace.batches[i].layers) serve(residency, layer, batch);
    if (batch != 0) residency.retire(batch);
  }
  PolicyResult result;
  for (const LayerCounters& counters : residency.counters()) {
    result.wanted += counters.unique;
    result.loads += counters.loads;
    result.demanded_loads += counters.misses;
    result.wasted_prefetches += counters.wasted_prefetches;
  }
  return result;
}

PolicyResult run_optimal(const RoutingTrace& trace, int64_t slots) {
  const auto all = static_cast<size_t>(trace.layers) * trace.experts;
  if (slots < 1 || slots > static_cast<int64_t>(all)) {
    fail(ErrorKind::invalid, "the budget is ", slots, " slots, expected 1 to ", all, ", the number of experts");
  }
  // Each layer of each batch is a step of time; uses[e] are the steps that use expert e, the last first.
  std::vector<const AnnouncedBatch::Layer*> steps;
  std::vector<std::vector<size_t>> uses(all);
  for (const AnnouncedBatch& batch : trace.batches) {
    for (const auto& layer : batch.layers) steps.push_back(&layer);
  }
  const auto id = [&](const AnnouncedBatch::Layer& layer, int32_t index) {
    if (layer.layer < 0 || layer.layer >= trace.layers || index < 0 || index >= trace.experts) {
      fail(ErrorKind::invalid, "the trace names expert ", index, " of MoE layer ", layer.layer, "; there are ",
           trace.layers, " layers of ", trace.experts, " experts");
    }
    return static_cast<size_t>(layer.layer) * trace.experts + index;
  };
  for (size_t step = steps.size(); step-- > 0;) {
    for (const int32_t index : steps[step]->experts) uses[id(*steps[step], index)].push_back(step);
  }
  PolicyResult result;
  std::set<std::pair<size_t, size_t>> resident;  // (step of the next use, expert)
  const auto next_use = [&](size_t expert) {
    return uses[expert].empty() ? std::numeric_limits<size_t>::max() : uses[expert].back();
  };
  for (size_t step = 0; step < steps.size(); ++step) {
    std::vector<size_t> missing;
    for (const int32_t index : steps[step]->experts) {
      const size_t expert = id(*steps[step], index);
      ++result.wanted;
      const bool had = resident.erase({step, expert}) == 1;
      uses[expert].pop_back();
      if (had) {
        resident.insert({next_use(expert), expert});
      } else {
        missing.push_back(expert);
      }
    }
    // The last one stays for sure: it had better be the one that is used soonest.
    std::sort(missing.begin(), missing.end(), [&](size_t a, size_t b) { return next_use(a) > next_use(b); });
    for (const size_t expert : missing) {
      ++result.loads;
      if (static_cast<int64_t>(resident.size()) == slots) resident.erase(std::prev(resident.end()));
      resident.insert({next_use(expert), expert});
    }
  }
  result.demanded_loads = result.loads;
  return result;
}

}  // namespace sida
