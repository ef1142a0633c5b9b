#include "experts/virtual_clock.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "base/error.h"

namespace sida {
namespace {

// The lanes: commands that a Residency gives become copies with an end on the clock. Copies under way go on at one
// pace, so that they end in the order in which they began: an end is a place on a second clock, of progress, which
// counts the seconds of a copy that is alone.
class Lanes {
 public:
  Lanes(Residency& residency, const ModelledTime& time)
      : residency_(residency), read_(time.read), shared_(time.shared) {
    start();
  }

  double now() const { return now_; }

  // Takes what the Residency has to do; a copy that starts ends `read` later, if nothing slows it down.
  void start() {
    while (const auto command = residency_.next_command()) {
      if (command->kind == Command::Kind::give_back) {
        residency_.given_back(command->slot, command->count);
      } else {
        ends_.emplace(progress_ + read_, command->slot);
      }
    }
  }

  // Time passes; copies end, and others begin in their place.
  void advance(double until) {
    while (!ends_.empty() && ends_at() <= until) end_first();
    progress_ = shared_ == 0 ? until : progress_ + (until - now_) / slowdown();
    now_ = until;
  }

  bool idle() const { return ends_.empty(); }

  void end_first() {
    const auto [at, slot] = *ends_.begin();
    now_ = std::max(now_, ends_at());
    progress_ = std::max(progress_, at);
    ends_.erase(ends_.begin());
    residency_.copy_done(slot);
    start();
  }

 private:
  // How much longer a copy takes beside the others than alone.
  double slowdown() const {
    const double together = shared_ * static_cast<double>(ends_.size());
    return together <= read_ ? 1.0 : together / read_;
  }

  // When the first copy is done, if none begins before.
  double ends_at() const {
    const double end = ends_.begin()->first;
    return shared_ == 0 ? end : now_ + (end - progress_) * slowdown();  // without sharing both clocks are one
  }

  Residency& residency_;
  const double read_, shared_;
  double now_ = 0, progress_ = 0;
  std::multimap<double, int32_t> ends_;  // when a copy is done, in progress, and in which slot
};

// One MoE layer: computes what is there, wave by wave, and waits where nothing is.
double serve(Residency& residency, Lanes& lanes, const AnnouncedBatch::Layer& layer, BatchId batch, double compute) {
  double stalled = 0;
  const DemandId demand = residency.demand(layer.layer, layer.experts, batch);
  residency.set_waiting(demand, true);
  lanes.start();
  while (true) {
    const Wave wave = residency.take_ready(demand);
    if (!wave.experts.empty()) {
      lanes.advance(lanes.now() + compute * static_cast<double>(wave.experts.size()));
      residency.release(demand, wave);
      lanes.start();
      continue;
    }
    if (residency.exhausted(demand)) break;
    if (lanes.idle()) fail(ErrorKind::internal, "a demand of MoE layer ", layer.layer, " cannot be served");
    const double from = lanes.now();
    lanes.end_first();
    stalled += lanes.now() - from;
  }
  residency.finish(demand);
  lanes.start();
  return stalled;
}

// The table's first `experts` experts.
AnnouncedBatch cut(const AnnouncedBatch& table, int64_t experts) {
  AnnouncedBatch kept;
  for (const auto& [layer, wanted] : table.layers) {
    const auto count = std::min(experts, static_cast<int64_t>(wanted.size()));
    kept.layers.push_back({layer, {wanted.begin(), wanted.begin() + count}});
    experts -= count;
  }
  return kept;
}

ClockProgress progress_of(const Residency& residency, const Lanes& lanes, double read, double stalled) {
  Pace pace = pace_of(residency.counters());
  pace.stall_seconds = stalled;
  pace.read_seconds = read * static_cast<double>(pace.loads);
  return {.seconds = lanes.now(), .pace = pace};
}

void check(const char* name, double value) {
  if (!std::isfinite(value) || value < 0) fail(ErrorKind::invalid, name, " is ", value, " s, expected 0 or more");
}

}  // namespace

ClockResult run_clock(const RoutingTrace& trace, const PolicyOptions& options, const ModelledTime& time,
                      const std::vector<AnnouncedBatch>& predicted, const Admission& admission) {
  if (!predicted.empty() && predicted.size() != trace.batches.size()) {
    fail(ErrorKind::invalid, "the trace has ", trace.batches.size(), " batches, but ", predicted.size(),
         " tables are predicted for it");
  }
  if (options.lookahead < 0) fail(ErrorKind::invalid, "lookahead is ", options.lookahead, ", expected 0 or more");
  if (time.lanes < 1) fail(ErrorKind::invalid, "lanes is ", time.lanes, ", expected at least 1");
  check("read", time.read);
  check("before", time.before);
  check("compute", time.compute);
  check("shared", time.shared);
  if (time.shared > time.read) {
    fail(ErrorKind::invalid, "shared is ", time.shared, " s, expected at most read, ", time.read, " s");
  }
  const auto& tables = predicted.empty() ? trace.batches : predicted;
  Residency residency({.layers = trace.layers,
                       .experts = trace.experts,
                       .slots = options.slots,
                       .lanes = time.lanes,
                       .eviction = options.eviction,
                       .prefetch_layers = options.prefetch_layers});
  Lanes lanes(residency, time);
  ClockResult result;
  std::vector<BatchId> numbers;
  const auto take_back = [&](size_t first) {
    for (size_t waiting = first; waiting < numbers.size(); ++waiting) residency.retire(numbers[waiting]);
  };
  residency.set_early_prefetch(true);  // as long as nobody says otherwise
  for (size_t i = 0; i < trace.batches.size(); ++i) {
    if (options.lookahead > 0) {
      const size_t until = std::min(tables.size(), i + static_cast<size_t>(options.lookahead) + 1);
      while (numbers.size() < until) {
        const AnnouncedBatch& table = tables[numbers.size()];
        if (!admission.admit) {
          numbers.push_back(residency.announce(table));
          continue;
        }
        const Admitted admitted = admission.admit(progress_of(residency, lanes, time.read, result.stalled));
        if (admitted.experts < 0) {
          fail(ErrorKind::invalid, "admit gave ", admitted.experts, ", expected a number of experts");
        }
        residency.set_early_prefetch(admitted.early);
        if (admitted.experts == 0) take_back(i);
        numbers.push_back(residency.announce(cut(table, admitted.experts)));
      }
      lanes.start();
    }
    const BatchId batch = numbers.empty() ? 0 : numbers[i];
    for (const auto& layer : trace.batches[i].layers) {
      lanes.advance(lanes.now() + time.before);
      result.stalled += serve(residency, lanes, layer, batch, time.compute);
      if (batch != 0 && admission.in_vain &&
          admission.in_vain(progress_of(residency, lanes, time.read, result.stalled))) {
        take_back(i);
      }
    }
    if (batch != 0) residency.retire(batch);
    lanes.start();
  }
  result.seconds = lanes.now();
  for (const LayerCounters& counters : residency.counters()) {
    result.wanted += counters.unique;
    result.loads += counters.loads;
    result.demanded_loads += counters.misses;
    result.late += counters.late;
    result.wasted_prefetches += counters.wasted_prefetches;
  }
  return result;
}

}  // namespace sida
