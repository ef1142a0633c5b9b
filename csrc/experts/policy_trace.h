// What each policy of eviction would have to read for a known routing, beside the least that is possible. The same
// Residency as in the engine, with copies that take no time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "experts/eviction.h"
#include "experts/residency.h"

namespace sida {

// The experts that each batch of a run used, layer by layer, in order.
struct RoutingTrace {
  int32_t layers, experts;  // experts per layer
  std::vector<AnnouncedBatch> batches;
};

struct PolicyOptions {
  Eviction eviction = Eviction::next_use;
  int64_t slots = 1;
  int lookahead = 4;        // tables announced ahead of the batch under way, its own besides; 0: none at all
  int prefetch_layers = 1;  // as in EngineOptions
};

struct PolicyResult {
  int64_t wanted = 0;             // experts demanded, each once in its batch and layer
  int64_t loads = 0;              // records read
  int64_t demanded_loads = 0;     // those of them that nothing had announced in time
  int64_t wasted_prefetches = 0;  // read ahead and evicted unused

  // Experts that did not have to be read for their use. Below 0 only where prefetches are wasted in number.
  int64_t hits() const { return wanted - loads; }
  double hit_rate() const { return wanted == 0 ? 1.0 : static_cast<double>(hits()) / static_cast<double>(wanted); }
};

// `predicted`: the tables that are announced in place of the true ones, one for each batch; empty: the true ones.
PolicyResult run_policy(const RoutingTrace& trace, const PolicyOptions& options,
                        const std::vector<AnnouncedBatch>& predicted = {});

// Belady's rule with the whole future known: evict what is used last. What a layer wants and has is computed first.
PolicyResult run_optimal(const RoutingTrace& trace, int64_t slots);

}  // namespace sida
