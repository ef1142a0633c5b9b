#include "experts/layer_clock.h"

#include <algorithm>
#include <cmath>

namespace sida {

void LayerClock::run(int32_t layer) {
  Layer& its = layers_[static_cast<size_t>(layer)];
  ++now_;
  if (its.runs > 0) its.period = now_ - its.last;
  its.last = now_;
  ++its.runs;
}

UseWeight LayerClock::used(int32_t layer, UseWeight before) const {
  const double fresh = static_cast<double>(layers_[static_cast<size_t>(layer)].runs) / half_life;
  return fresh + std::log2(1 + std::exp2(before - fresh));
}

double LayerClock::chance(int32_t layer, UseWeight weight) const {
  const double runs = static_cast<double>(layers_[static_cast<size_t>(layer)].runs);
  if (runs == 0) return 0;
  const double of_all = (1 - std::exp2(-runs / half_life)) / (1 - std::exp2(-1 / half_life));
  return std::min(1.0, std::exp2(weight - runs / half_life) / of_all);
}

double LayerClock::wait(int32_t layer, UseWeight weight) const {
  const Layer& its = layers_[static_cast<size_t>(layer)];
  const double chance_now = chance(layer, weight);
  if (chance_now == 0) return std::numeric_limits<double>::infinity();
  const auto period = static_cast<double>(its.period > 0 ? its.period : static_cast<int64_t>(layers_.size()));
  const auto since = static_cast<double>(now_ - its.last);
  // A layer whose turn has passed without it (an encoder's, while the decoder writes) may stay away as long again.
  const double until_run = since < period ? period - since : since;
  return until_run + std::max(period, since) * (1 / chance_now - 1);
}

}  // namespace sida
