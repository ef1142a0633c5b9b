#include "experts/eviction.h"

#include "base/error.h"

namespace sida {

Eviction parse_eviction(std::string_view name) {
  if (name == "fifo") return Eviction::fifo;
  if (name == "lru") return Eviction::lru;
  if (name == "lfu") return Eviction::lfu;
  if (name == "next_use") return Eviction::next_use;
  fail(ErrorKind::invalid, "eviction is '", name, "', expected fifo, lru, lfu or next_use");
}

EvictionOrder::Rank EvictionOrder::rank(const Resident& resident) const {
  const auto [expert, layer, next_use, weight, frequency, last_use, loaded] = resident;
  switch (policy_) {
    case Eviction::fifo:
      return {0, loaded, 0, expert, next_use};
    case Eviction::lru:
      return {0, last_use, 0, expert, next_use};
    case Eviction::lfu:
      return {0, frequency, last_use, expert, next_use};
    case Eviction::next_use:
      return {never - next_use, frequency, last_use, expert, next_use};
  }
  fail(ErrorKind::internal, "unknown eviction ", static_cast<int>(policy_));
}

bool EvictionOrder::is_unannounced(const Resident& resident) const {
  return policy_ == Eviction::next_use && resident.next_use == never;
}

void EvictionOrder::insert(const Resident& resident) {
  if (is_unannounced(resident)) {
    const auto layer = static_cast<size_t>(resident.layer);
    unannounced_[layer].insert({resident.weight, resident.last_use, resident.expert});
    ++unannounced_count_;
    return;
  }
  order_.insert(rank(resident));
  times_.insert(resident.next_use);
}

void EvictionOrder::erase(const Resident& resident) {
  if (is_unannounced(resident)) {
    const auto layer = static_cast<size_t>(resident.layer);
    if (unannounced_[layer].erase({resident.weight, resident.last_use, resident.expert}) != 1) {
      fail(ErrorKind::internal, "expert ", resident.expert, " is not in the order of eviction");
    }
    --unannounced_count_;
    return;
  }
  const auto time = times_.find(resident.next_use);
  if (order_.erase(rank(resident)) != 1 || time == times_.end()) {
    fail(ErrorKind::internal, "expert ", resident.expert, " is not in the order of eviction");
  }
  times_.erase(time);
}

int32_t EvictionOrder::latest_layer() const {
  int32_t found = -1;
  double latest = 0;
  int64_t used = 0;
  for (int32_t layer = 0; layer < static_cast<int32_t>(unannounced_.size()); ++layer) {
    const std::set<Unannounced>& its = unannounced_[static_cast<size_t>(layer)];
    if (its.empty()) continue;
    const double wait = clock_.wait(layer, its.begin()->weight);
    if (found >= 0 && (wait < latest || (wait == latest && its.begin()->last_use > used))) continue;
    found = layer;
    latest = wait;
    used = its.begin()->last_use;
  }
  return found;
}

// Where turns do not fit, the latest is always one of the layer that has just run: alone it would lose all it has, and
// whole layers be missing beside others that lose nothing. As many reads come of it, but a layer computes while it
// waits for its own: most are hidden where each layer misses a few. So the fullest layer goes first among those that
// run half a turn from now or later and whose first is wanted as rarely.
std::optional<int32_t> EvictionOrder::first_unannounced() const {
  const int32_t latest = latest_layer();
  if (latest < 0) return std::nullopt;
  const auto chance = [&](int32_t layer) {
    return clock_.chance(layer, unannounced_[static_cast<size_t>(layer)].begin()->weight);
  };
  const double rarest = chance(latest);
  const std::set<Unannounced>* found = &unannounced_[static_cast<size_t>(latest)];
  double longest = clock_.until_run(latest) / clock_.turn(latest);
  for (int32_t layer = 0; layer < static_cast<int32_t>(unannounced_.size()); ++layer) {
    const std::set<Unannounced>& its = unannounced_[static_cast<size_t>(layer)];
    if (its.size() < found->size() || its.empty() || chance(layer) > rarest) continue;
    const double until = clock_.until_run(layer) / clock_.turn(layer);
    if (until <= 0.5 || (its.size() == found->size() && until <= longest)) continue;
    found = &its;
    longest = until;
  }
  return found->begin()->expert;
}

std::optional<int32_t> EvictionOrder::first() const {
  if (unannounced_count_ > 0) return first_unannounced();
  if (order_.empty()) return std::nullopt;
  return order_.begin()->expert;
}

std::optional<int32_t> EvictionOrder::first_used_after(UseTime time) const {
  if (unannounced_count_ > 0) return first_unannounced();
  if (times_.empty() || *times_.rbegin() <= time) return std::nullopt;
  for (const Rank& rank : order_) {
    if (rank.next_use > time) return rank.expert;
  }
  return std::nullopt;
}

}  // namespace sida
