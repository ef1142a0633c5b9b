// A known routing on a virtual clock: the engine's own Residency with copies and computation that take modelled time.
// The same every time, on every machine.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "experts/policy_trace.h"
#include "experts/residency.h"

namespace sida {

// Seconds. A copy takes `read` while it is alone; of n under way at once each takes at least n times `shared`, what one
// expert occupies the disk for. With 0, copies on different lanes do not slow each other down.
struct ModelledTime {
  double read = 1e-3;     // one expert, on one lane
  double before = 1e-3;   // what a model computes before each of its MoE layers
  double compute = 1e-4;  // one expert of a layer, on all of its tokens
  int lanes = 1;
  double shared = 0;  // at most `read`
};

struct ClockResult {
  double seconds = 0;  // of the whole run
  double stalled = 0;  // of these, a layer had nothing to compute for want of experts
  int64_t wanted = 0, loads = 0, demanded_loads = 0, late = 0, wasted_prefetches = 0;
};

// How far a run has come, as the engine's own counters tell it.
struct ClockProgress {
  double seconds = 0;
  Pace pace;
};

// How many experts of a table may be announced, the first layers' first; 0: none, and the tables that wait are taken
// back. And whether they are read early (Residency::set_early_prefetch).
struct Admitted {
  int64_t experts = 0;
  bool early = false;
};

struct Admission {
  std::function<Admitted(const ClockProgress&)> admit;  // asked before a table is announced
  // Asked after each layer of a batch whose table was announced; empty: never. With true the table, and those that
  // wait, are taken back.
  std::function<bool(const ClockProgress&)> in_vain;
};

// As `run_policy`, over time. A table is announced as soon as there is room for it in the look-ahead: what predicting
// takes is not part of the model.
ClockResult run_clock(const RoutingTrace& trace, const PolicyOptions& options, const ModelledTime& time,
                      const std::vector<AnnouncedBatch>& predicted = {}, const Admission& admission = {});

}  // namespace sida
