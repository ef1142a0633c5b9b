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
  const auto [expert, next_use, frequency, last_use, loaded] = resident;
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

void EvictionOrder::insert(const Resident& resident) {
  order_.insert(rank(resident));
  times_.insert(resident.next_use);
}

void EvictionOrder::erase(const Resident& resident) {
  const auto time = times_.find(resident.next_use);
  if (order_.erase(rank(resident)) != 1 || time == times_.end()) {
    fail(ErrorKind::internal, "expert ", resident.expert, " is not in the order of eviction");
  }
  times_.erase(time);
}

std::optional<int32_t> EvictionOrder::first() const {
  if (order_.empty()) return std::nullopt;
  return order_.begin()->expert;
}

std::optional<int32_t> EvictionOrder::first_used_after(UseTime time) const {
  if (times_.empty() || *times_.rbegin() <= time) return std::nullopt;
  for (const Rank& rank : order_) {
    if (rank.next_use > time) return rank.expert;
  }
  return std::nullopt;
}

}  // namespace sida
