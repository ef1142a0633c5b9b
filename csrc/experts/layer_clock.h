// When each layer will run again and how likely it wants an expert then: what the past says of experts that no
// announced table names.
//
// A model runs its layers in turns. What the layer that has just run wanted is wanted again a whole turn later, what
// the next layer wants almost at once: a rule that looks at each expert's own past alone (LRU, LFU) evicts, in turns
// that do not fit, just before use. So time is counted in runs of layers, and of an expert is known in which share of
// its layer's runs it is wanted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace sida {

// How often an expert was wanted by its layer's runs, each counting half for every `half_life` that has passed since:
// the logarithm to base 2 of that sum as it was before the layer's first run. It changes when the expert is wanted and
// never else, and of two experts of one layer the greater one is wanted more often.
using UseWeight = double;
inline constexpr UseWeight never_used = -std::numeric_limits<double>::infinity();

class LayerClock {
 public:
  // A layer ages by the share of its experts that a run wants: by 1 for a prompt that wants all of them, by 1/16 for a
  // token that wants 8 of 128. So however many a run wants, the mean expert is wanted once in an age of 1, and what is
  // known of it rests on about as many uses. Fewer ages follow a change of topic sooner, more tell rare experts apart
  // better (bench.causal.eviction has both kinds of routing).
  static constexpr double half_life = 4;

  explicit LayerClock(int32_t layers) : layers_(static_cast<size_t>(layers)) {}

  void run(int32_t layer, double wanted);  // a run begins that wants this share of the layer's experts

  // The weight of an expert after the run of its layer that has just begun has wanted it.
  UseWeight used(int32_t layer, UseWeight before) const;
  // The share of its layer's runs that want such an expert, recent ones counting more: 0 to 1.
  double chance(int32_t layer, UseWeight weight) const;
  // Runs of layers from now until such an expert is wanted again, expected.
  double wait(int32_t layer, UseWeight weight) const;
  // Runs of layers from one run of this layer to the next, and from now to the next, expected.
  double turn(int32_t layer) const;
  double until_run(int32_t layer) const;

 private:
  struct Layer {
    double age = 0;
    double runs = 0;     // each counting half for every half_life since
    int64_t last = 0;    // the clock at its latest run
    int64_t period = 0;  // runs of all layers between its last two; 0: it has not run twice
  };

  std::vector<Layer> layers_;
  int64_t now_ = 0;  // runs of all layers
};

}  // namespace sida
