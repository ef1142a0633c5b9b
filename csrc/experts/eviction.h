// Eviction: which of the experts that may go goes first. An order kept up to date, so that a choice costs O(log n).
#pragma once

#include <compare>
#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <string_view>
#include <vector>

#include "experts/layer_clock.h"

namespace sida {

enum class Eviction { fifo, lru, lfu, next_use };

// Throws Error(invalid) that names the value and the choices.
Eviction parse_eviction(std::string_view name);

// When something is used next in the announced future: the batch's number, then the position of the layer in it.
using UseTime = uint64_t;
inline constexpr UseTime never = std::numeric_limits<UseTime>::max();
inline constexpr int position_bits = 16;

// What is known of an expert in a slot. Ticks count events: the greater, the later.
struct Resident {
  int32_t expert, layer;
  UseTime next_use;
  UseWeight weight;   // of its uses so far
  int64_t frequency;  // demands so far
  int64_t last_use;   // tick
  int64_t loaded;     // tick
};

// The experts that may be evicted, the first to go first.
//   fifo      loaded longest ago
//   lru       used longest ago
//   lfu       used least often; ties: longest ago
//   next_use  not announced: whose next use is expected latest (LayerClock), ties: longest ago; or one as rarely wanted
//             of a layer that has more to lose; then announced for latest; ties: least often, then longest ago
class EvictionOrder {
 public:
  // `clock` must outlive the order.
  EvictionOrder(Eviction policy, int32_t layers, const LayerClock& clock)
      : policy_(policy), clock_(clock), unannounced_(static_cast<size_t>(layers)) {}

  void insert(const Resident& resident);
  void erase(const Resident& resident);  // as it was inserted
  int64_t size() const { return static_cast<int64_t>(order_.size()) + unannounced_count_; }

  [[nodiscard]] std::optional<int32_t> first() const;
  // The first to go among those that are used later than `time`.
  [[nodiscard]] std::optional<int32_t> first_used_after(UseTime time) const;

 private:
  struct Rank {
    uint64_t first;
    int64_t second, third;
    int32_t expert;
    UseTime next_use;
    auto operator<=>(const Rank&) const = default;
  };
  // Of one layer, the least wanted first. What passes between two choices moves whole layers, never two of its experts.
  struct Unannounced {
    UseWeight weight;
    int64_t last_use;
    int32_t expert;
    auto operator<=>(const Unannounced&) const = default;
  };
  bool is_unannounced(const Resident& resident) const;
  Rank rank(const Resident& resident) const;
  // The layer of the expert that is expected latest, which is the first of its layer; -1: there is none.
  int32_t latest_layer() const;
  std::optional<int32_t> first_unannounced() const;

  Eviction policy_;
  const LayerClock& clock_;
  std::vector<std::set<Unannounced>> unannounced_;  // by layer; with next_use
  int64_t unannounced_count_ = 0;
  std::set<Rank> order_;          // the others
  std::multiset<UseTime> times_;  // of all in order_: tells at once that none is used late enough
};

}  // namespace sida
