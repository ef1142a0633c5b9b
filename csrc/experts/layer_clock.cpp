#include "experts/layer_clock.h"

#include <algorithm>
#include <cmath>

namespace sida {

void LayerClock::run(int32_t layer, double wanted) {
  Layer& its = layers_[static_cast<size_t>(layer)];
  ++now_;
  if (its.runs > 0) its.period = now_ - its.last;
  its.last = now_;
  its.age += wanted;
  its.runs = its.runs * std::exp2(-wanted / half_life) + 1;
}

UseWeight LayerClock::used(int32_t layer, UseWeight before) const {
  const double fresh = layers_[static_cast<size_t>(layer)].age / half_life;
  return fresh + std::log2(1 + std::exp2(before - fresh));
}

double LayerClock::chance(int32_t layer, UseWeight weight) const {
  const Layer& its = layers_[static_cast<size_t>(layer)];
  return its.runs == 0 ? 0 : std::min(1.0, std::exp2(weight - its.age / half_life) / its.runs);
}

double LayerClock::turn(int32_t layer) const {
  const Layer& its = layers_[static_cast<size_t>(layer)];
  const int64_t period = its.period > 0 ? its.period : static_cast<int64_t>(layers_.size());
  return static_cast<double>(std::max(period, now_ - its.last));
}

double LayerClock::until_run(int32_t layer) const {
  const auto since = static_cast<double>(now_ - layers_[static_cast<size_t>(layer)].last);
  const double its_turn = turn(layer);
  // A layer whose turn has passed without it (an encoder's, while the decoder writes) may stay away as long again.
  return since < its_turn ? its_turn - since : since;
}

double LayerClock::wait(int32_t layer, UseWeight weight) const {
  const double chance_now = chance(layer, weight);
  if (chance_now == 0) return std::numeric_limits<double>::infinity();
  return until_run(layer) + turn(layer) * (1 / chance_now - 1);
}

}  // namespace sida
