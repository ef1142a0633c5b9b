// When each layer will run again and how likely it wants an expert then: what the past says of experts that no
// announced table names.
//
// A model runs its layers in turns. What the layer that has just run wanted is wanted again a whole turn later, what
// the next layer wants almost at once: a rule that looks at each expert's own past alone (LRU, LFU) evicts, in turns that
// do not fit, just before use. So time is counted in runs of layers, and of an expert is known in which share of its
// layer's runs it is wanted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace sida {

// How often an expert was wanted by its layer's runs, each counting half for every `half_life` runs that have followed:
// the logarithm to base 2 of that sum as it was before the layer's first run. It changes when the expert is wanted and
// never else, and of two experts of one layer the greater one is wanted more often.
using UseWeight = double;
inline constexpr UseWeight never_used = -std::numeric_limits<double>::infinity();

class LayerClock {
 public:
  // Runs after which a use counts half. Fewer follow a change of topic sooner, more tell rare experts apart better.
  // Replaying recorded and drawn routings, 32 to 128 differ by a point of the hit rate.
  static constexpr double half_life = 64;

  explicit LayerClock(int32_t layers) : layers_(static_cast<size_t>(layers)) {}

  void run(int32_t layer);  // a run begins

  // The weight of an expert after the run of its layer that has just begun has wanted it.
  UseWeight used(int32_t layer, UseWeight before) const;
  // The share of its layer's runs that want such an expert, recent ones counting more: 0 to 1.
  double chance(int32_t layer, UseWeight weight) const;
  // Runs of layers from now until such an expert is wanted again, expected.
  double wait(int32_t layer, UseWeight weight) const;

 private:
  struct Layer {
    int64_t runs = 0;
    int64_t last = 0;    // the clock at its latest run
    int64_t period = 0;  // runs of all layers between its last two; 0: it has not run twice
  };

  std::vector<Layer> layers_;
  int64_t now_ = 0;  // runs of all layers
};

}  // namespace sida
