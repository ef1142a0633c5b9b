#include "experts/residency.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/check.h"

namespace sida {
namespace {

UseTime use_time(BatchId batch, size_t position) {
  return batch << position_bits | position;
}

constexpr int64_t millionths = 1'000'000;  // of one choice

template <class... Parts>
void must_hold(bool condition, const Parts&... parts) {
  if (!condition) fail(ErrorKind::internal, "residency's invariant is broken: ", parts...);
}

const ResidencyOptions& checked(const ResidencyOptions& options) {
  if (options.layers < 1 || options.experts < 1) {
    fail(ErrorKind::invalid, "a model of ", options.layers, " MoE layers with ", options.experts,
         " experts has nothing to serve");
  }
  if (options.lanes < 1) fail(ErrorKind::invalid, "lanes is ", options.lanes, ", expected at least 1");
  if (options.prefetch_layers < 0) {
    fail(ErrorKind::invalid, "prefetch_layers is ", options.prefetch_layers, ", expected 0 or more");
  }
  return options;
}

}  // namespace

Residency::Residency(const ResidencyOptions& options)
    : options_(checked(options)),
      budget_(0),
      clock_(options.layers),
      evictable_(options.eviction, options.layers, clock_),
      last_resort_(options.eviction, options.layers, clock_) {
  const size_t all = static_cast<size_t>(options.layers) * options.experts;
  experts_.resize(all);
  expert_in_slot_.assign(all, -1);
  counters_.resize(options.layers);
  for (size_t slot = 0; slot < all; ++slot) cold_.insert(cold_.end(), static_cast<int32_t>(slot));
  set_budget(options.slots);
  if (!options.populated) return;
  while (committed_ < budget_) {
    warm_.insert(warm_.end(), *cold_.begin());
    cold_.erase(cold_.begin());
    ++committed_;
  }
  peak_committed_ = committed_;
}

void Residency::check_experts(const char* event, int32_t layer, std::span<const int32_t> experts) const {
  if (layer < 0 || layer >= options_.layers) {
    fail(ErrorKind::invalid, event, ": there is no MoE layer ", layer, "; the store has ", options_.layers);
  }
  std::vector<bool> seen(options_.experts, false);
  for (const int32_t index : experts) {
    if (index < 0 || index >= options_.experts) {
      fail(ErrorKind::invalid, event, ": there is no expert ", index, " in MoE layer ", layer, "; it has ",
           options_.experts);
    }
    if (seen[index]) {
      fail(ErrorKind::invalid, event, ": expert ", index, " of MoE layer ", layer, " stands there twice");
    }
    seen[index] = true;
  }
}

BatchId Residency::announce(AnnouncedBatch batch) {
  for (const auto& layer : batch.layers) check_experts("announce", layer.layer, layer.experts);
  if (batch.layers.size() >= size_t{1} << position_bits) {
    fail(ErrorKind::invalid, "announce: the batch has ", batch.layers.size(), " layers, expected less than ",
         1 << position_bits);
  }
  const BatchId number = ++last_batch_;
  for (size_t position = 0; position < batch.layers.size(); ++position) {
    const auto& layer = batch.layers[position];
    for (size_t rank = 0; rank < layer.experts.size(); ++rank) {
      const int32_t expert = id(layer.layer, layer.experts[rank]);
      experts_[expert].uses.push_back({use_time(number, position), static_cast<int32_t>(rank)});
      reindex(expert);
    }
  }
  batches_.emplace(number, Batch{.announced = std::move(batch)});
  end_event();
  return number;
}

void Residency::retire(BatchId number) {
  if (number == 0 || number > last_batch_) {
    fail(ErrorKind::invalid, "retire: batch ", number, " was not announced; the latest is ", last_batch_);
  }
  const auto found = batches_.find(number);
  if (found == batches_.end()) return;
  pass_layers(number, found->second, found->second.announced.layers.size());
  batches_.erase(found);
  end_event();
}

UseTime Residency::next_use(int32_t expert) const {
  const auto& uses = experts_[expert].uses;
  return uses.empty() ? never : uses.front().time;
}

void Residency::pass_layers(BatchId number, Batch& batch, size_t until) {
  for (; batch.passed < until; ++batch.passed) {
    const auto& layer = batch.announced.layers[batch.passed];
    for (const int32_t index : layer.experts) {
      const int32_t expert = id(layer.layer, index);
      Expert& state = experts_[expert];
      std::erase_if(state.uses, [&](const Use& use) { return use.time == use_time(number, batch.passed); });
      if (state.state == State::absent && state.wanted == 0) ++count(expert).cancelled_prefetches;
      reindex(expert);
    }
  }
}

void Residency::count_choices(Demand& demand, std::span<const int32_t> experts, std::span<const int64_t> choices) {
  int64_t sum = 0;
  for (size_t i = 0; i < choices.size(); ++i) {
    sum += choices[i];
    if (low_bit_millionths_ > 0) demand.choices.emplace_back(id(demand.layer, experts[i]), choices[i]);
  }
  counters_[demand.layer].choices += sum;
  low_bit_earned_ += low_bit_millionths_ * sum;
  low_bit_credit_ =
      std::min(low_bit_credit_ + low_bit_millionths_ * sum, low_bit_millionths_ * std::max(sum, low_bit_window));
}

DemandId Residency::demand(int32_t layer, std::span<const int32_t> experts, BatchId batch,
                           std::span<const int64_t> choices) {
  check_experts("demand", layer, experts);
  if (!choices.empty() && choices.size() != experts.size()) {
    fail(ErrorKind::invalid, "demand: ", choices.size(), " numbers of choices stand beside ", experts.size(),
         " experts");
  }
  for (const int64_t chosen : choices) {
    if (chosen < 1) fail(ErrorKind::invalid, "demand: an expert has ", chosen, " choices, expected 1 or more");
  }
  if (batch > last_batch_) {
    fail(ErrorKind::invalid, "demand: batch ", batch, " was not announced; the latest is ", last_batch_);
  }
  LayerCounters& counters = counters_[layer];
  ++counters.requested;
  counters.unique += static_cast<int64_t>(experts.size());
  Demand demand;
  demand.layer = layer;
  count_choices(demand, experts, choices);
  clock_.run(layer, static_cast<double>(experts.size()) / options_.experts);
  demand.batch = batch;
  for (const int32_t index : experts) {
    const int32_t expert = id(layer, index);
    Expert& state = experts_[expert];
    switch (state.state) {
      case State::ready:
        ++counters.hits;
        break;
      case State::loading:
        ++counters.late;
        break;
      case State::absent:
        ++counters.misses;
        break;
    }
    if (state.prefetched) ++counters.useful_prefetches;
    state.prefetched = false;
    ++state.frequency;
    state.weight = clock_.used(layer, state.weight);
    state.last_use = ++tick_;
    ++state.wanted;
    demand.wanted.push_back(expert);
    reindex(expert);
  }
  const auto announced = batches_.find(batch);
  if (announced != batches_.end()) {
    const auto& layers = announced->second.announced.layers;
    const auto at = std::find_if(layers.begin() + static_cast<std::ptrdiff_t>(announced->second.passed), layers.end(),
                                 [&](const auto& later) { return later.layer == layer; });
    if (at != layers.end()) {
      std::vector<bool> wanted(options_.experts, false);
      for (const int32_t index : experts) wanted[index] = true;
      counters.named += static_cast<int64_t>(at->experts.size());
      counters.named_wanted +=
          std::count_if(at->experts.begin(), at->experts.end(), [&](int32_t index) { return wanted[index]; });
      pass_layers(batch, announced->second, at - layers.begin() + 1);
    }
  }
  if (options_.eviction == Eviction::next_use) {
    // Where slots are few, what comes in last is what stays: it had better be what is used again soonest.
    std::stable_sort(demand.wanted.begin(), demand.wanted.end(),
                     [&](int32_t a, int32_t b) { return next_use(a) > next_use(b); });
  }
  demands_.emplace(++last_demand_, std::move(demand));
  end_event();
  return last_demand_;
}

void Residency::set_waiting(DemandId number, bool waiting) {
  Demand& demand = find(number);
  if (demand.waiting == waiting) return;
  demand.waiting = waiting;
  for (const int32_t expert : demand.wanted) {
    experts_[expert].awaited += waiting ? 1 : -1;
    reindex(expert);
  }
  end_event();
}

Wave Residency::take_ready(DemandId number) {
  Demand& demand = find(number);
  Wave wave;
  const auto taken = std::stable_partition(demand.wanted.begin(), demand.wanted.end(),
                                           [&](int32_t expert) { return experts_[expert].state != State::ready; });
  for (auto at = taken; at != demand.wanted.end(); ++at) {
    Expert& state = experts_[*at];
    --state.wanted;
    if (demand.waiting) --state.awaited;
    ++state.pins;
    ++pinned_;
    demand.pinned.push_back(*at);
    wave.experts.push_back(key(*at).index);
    wave.slots.push_back(state.slot);
    reindex(*at);
  }
  demand.wanted.erase(taken, demand.wanted.end());
  end_event();
  return wave;
}

Wave Residency::take_low_bit(DemandId number) {
  Demand& demand = find(number);
  Wave wave;
  wave.low_bit = true;
  if (demand.failure || demand.choices.empty()) return wave;
  struct Candidate {
    bool loading;
    int64_t choices;
    int32_t expert;
  };
  std::vector<Candidate> candidates;  // in the demand's order, and sorted below
  for (const int32_t expert : demand.wanted) {
    const Expert& state = experts_[expert];
    const auto found = std::find_if(demand.choices.begin(), demand.choices.end(),
                                    [&](const auto& chosen) { return chosen.first == expert; });
    if (state.state == State::ready || state.failed || found == demand.choices.end()) continue;
    candidates.push_back({state.state == State::loading, found->second, expert});
  }
  std::stable_sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(a.loading, a.choices) < std::tie(b.loading, b.choices);
  });
  for (const Candidate& candidate : candidates) {
    const int64_t price = candidate.choices * millionths;
    if (price > low_bit_credit_) continue;
    low_bit_credit_ -= price;
    counters_[demand.layer].low_bit_choices += candidate.choices;
    Expert& state = experts_[candidate.expert];
    --state.wanted;
    if (demand.waiting) --state.awaited;
    std::erase(demand.wanted, candidate.expert);
    if (state.state == State::absent && state.owed == 0) state.owed = ++last_owed_;
    wave.experts.push_back(key(candidate.expert).index);
    reindex(candidate.expert);
  }
  end_event();
  return wave;
}

void Residency::unpin(int32_t expert) {
  --experts_[expert].pins;
  --pinned_;
  reindex(expert);
}

void Residency::release(DemandId number, const Wave& wave) {
  Demand& demand = find(number);
  std::vector<int32_t> left = demand.pinned;
  for (const int32_t index : wave.experts) {
    const auto found = std::find(left.begin(), left.end(), id(demand.layer, index));
    if (found == left.end()) {
      fail(ErrorKind::invalid, "release: expert ", index, " of MoE layer ", demand.layer,
           " was not handed out to this demand, or was released before");
    }
    left.erase(found);
  }
  demand.pinned = std::move(left);
  for (const int32_t index : wave.experts) unpin(id(demand.layer, index));
  end_event();
}

void Residency::finish(DemandId number) {
  const auto found = demands_.find(number);
  if (found == demands_.end()) return;
  const Demand demand = std::move(found->second);
  demands_.erase(found);
  for (const int32_t expert : demand.wanted) {
    --experts_[expert].wanted;
    if (demand.waiting) --experts_[expert].awaited;
    reindex(expert);
  }
  for (const int32_t expert : demand.pinned) unpin(expert);
  end_event();
}

void Residency::copy_done(int32_t slot) {
  const int32_t expert = expert_in_slot_.at(slot);
  if (expert < 0 || experts_[expert].state != State::loading) {
    fail(ErrorKind::internal, "copy_done: slot ", slot, " has no copy under way");
  }
  Expert& state = experts_[expert];
  state.state = State::ready;
  state.failed = false;
  state.loaded = ++tick_;
  if (state.wanted == 0) state.last_use = tick_;  // a prefetch is not the oldest the moment it arrives
  --in_flight_;
  ++count(expert).loads;
  reindex(expert);
  end_event();
}

void Residency::copy_failed(int32_t slot, const Failure& failure) {
  const int32_t expert = expert_in_slot_.at(slot);
  if (expert < 0 || experts_[expert].state != State::loading) {
    fail(ErrorKind::internal, "copy_failed: slot ", slot, " has no copy under way");
  }
  Expert& state = experts_[expert];
  --in_flight_;
  ++count(expert).failed_loads;
  state.failed = true;
  for (auto& [number, demand] : demands_) {
    if (std::find(demand.wanted.begin(), demand.wanted.end(), expert) == demand.wanted.end()) continue;
    if (!demand.failure) demand.failure = failure;
  }
  state.prefetched = false;
  leave_slot(expert);
  warm_.insert(slot);
  reindex(expert);
  end_event();
}

void Residency::given_back(int32_t slot, int32_t slots) {
  for (int32_t i = 0; i < slots; ++i) cold_.insert(slot + i);
  committed_ -= slots;
  returning_ -= slots;
  end_event();
}

void Residency::set_budget(int64_t slots) {
  const auto all = static_cast<int64_t>(experts_.size());
  if (slots < 1 || slots > all) {
    fail(ErrorKind::invalid, "the budget is ", slots, " slots, expected 1 to ", all, ", the number of experts");
  }
  budget_ = slots;
}

void Residency::set_low_bit(int64_t share) {
  if (share < 0 || share > millionths) {
    fail(ErrorKind::invalid, "the share of choices for low-bit copies is ", share, " millionths, expected 0 to ",
         millionths);
  }
  low_bit_millionths_ = share;
  low_bit_credit_ = 0;
  end_event();
}

void Residency::set_early_prefetch(bool early) {
  early_prefetch_ = early;
  end_event();
}

void Residency::leave_slot(int32_t expert) {
  Expert& state = experts_[expert];
  expert_in_slot_[state.slot] = -1;
  state.slot = -1;
  state.state = State::absent;
}

int32_t Residency::evict(int32_t expert) {
  Expert& state = experts_[expert];
  SIDA_ASSERT(state.state == State::ready && state.pins == 0 && state.awaited == 0, "expert ", expert, " is evicted");
  const int32_t slot = state.slot;
  ++count(expert).evictions;
  if (state.prefetched) ++count(expert).wasted_prefetches;
  state.prefetched = false;
  leave_slot(expert);
  reindex(expert);
  return slot;
}

void Residency::reindex(int32_t expert) {
  Expert& state = experts_[expert];
  switch (state.standing) {
    case Standing::none:
      break;
    case Standing::evictable:
      evictable_.erase(state.resident);
      break;
    case Standing::last_resort:
      last_resort_.erase(state.resident);
      break;
    case Standing::to_fetch:
      to_fetch_.erase({state.owed, expert});
      break;
    case Standing::to_prefetch:
      to_prefetch_.erase({state.prefetch.time, state.prefetch.rank, expert});
      break;
  }
  state.standing = Standing::none;
  if (state.state == State::ready && state.pins == 0 && state.awaited == 0) {
    state.resident = {.expert = expert,
                      .layer = expert / options_.experts,
                      .next_use = next_use(expert),
                      .weight = state.weight,
                      .frequency = state.frequency,
                      .last_use = state.last_use,
                      .loaded = state.loaded};
    state.standing = state.wanted == 0 ? Standing::evictable : Standing::last_resort;
    (state.wanted == 0 ? evictable_ : last_resort_).insert(state.resident);
  } else if (state.state == State::absent && state.owed > 0 && state.wanted == 0) {
    state.standing = Standing::to_fetch;
    to_fetch_.emplace(state.owed, expert);
  } else if (state.state == State::absent && state.wanted == 0 && !state.uses.empty() && !state.failed) {
    state.prefetch = state.uses.front();
    state.standing = Standing::to_prefetch;
    to_prefetch_.insert({state.prefetch.time, state.prefetch.rank, expert});
  }
}

// A shrunk budget takes empty slots first, then experts that nobody waits for or computes from.
void Residency::shrink() {
  while (committed_ - returning_ > budget_) {
    if (!warm_.empty()) {
      give_back_later(*warm_.rbegin());
      warm_.erase(std::prev(warm_.end()));
    } else if (const auto idle = evictable_.first()) {
      give_back_later(evict(*idle));
    } else if (const auto wanted = last_resort_.first()) {
      give_back_later(evict(*wanted));
    } else {
      return;
    }
  }
}

void Residency::give_back_later(int32_t slot) {
  to_give_back_.insert(slot);
  ++returning_;
}

std::optional<int32_t> Residency::take_free_slot() {
  if (!warm_.empty()) {
    const int32_t slot = *warm_.begin();
    warm_.erase(warm_.begin());
    return slot;
  }
  if (!may_commit()) return std::nullopt;
  const int32_t slot = *cold_.begin();  // the lowest: memory in use lies close together
  cold_.erase(cold_.begin());
  ++committed_;
  SIDA_ASSERT(committed_ <= budget_, committed_, " slots hold memory, the budget is ", budget_);
  peak_committed_ = std::max(peak_committed_, committed_);
  return slot;
}

Command Residency::start(int32_t expert, int32_t slot, bool prefetch) {
  Expert& state = experts_[expert];
  SIDA_ASSERT(state.state == State::absent && expert_in_slot_[slot] < 0, "expert ", expert, ", slot ", slot);
  state.state = State::loading;
  state.slot = slot;
  state.prefetched = prefetch;
  expert_in_slot_[slot] = expert;
  ++in_flight_;
  SIDA_ASSERT(in_flight_ <= options_.lanes, in_flight_, " copies are under way, lanes are ", options_.lanes);
  reindex(expert);
  state.owed = 0;
  return {.kind = Command::Kind::start_copy, .slot = slot, .expert = key(expert), .prefetch = prefetch};
}

std::optional<int32_t> Residency::next_missing(bool waiting) const {
  for (const auto& [number, demand] : demands_) {
    if (demand.waiting != waiting || demand.failure) continue;
    for (const int32_t expert : demand.wanted) {
      if (experts_[expert].state == State::absent) return expert;
    }
  }
  return std::nullopt;
}

// A free one, else one of an expert that goes for it.
std::optional<int32_t> Residency::slot_for_demand(bool waiting) {
  std::optional<int32_t> slot = take_free_slot();
  const std::optional<int32_t> idle = evictable_.first();
  if (!slot && idle) slot = evict(*idle);
  const std::optional<int32_t> wanted = last_resort_.first();
  if (!slot && waiting && wanted) slot = evict(*wanted);
  return slot;
}

// The last use that lies within the next `prefetch_layers` announced layers.
UseTime Residency::near_until() const {
  int left = options_.prefetch_layers;
  for (const auto& [number, batch] : batches_) {
    const auto ahead = static_cast<int64_t>(batch.announced.layers.size() - batch.passed);
    if (left <= ahead) return left == 0 ? 0 : use_time(number, batch.passed + static_cast<size_t>(left) - 1);
    left -= static_cast<int>(ahead);
  }
  return never;
}

// Which expert may go for a prefetch that is used at `time`; none, or not yet, without a value.
// With next_use the choice is the one that Belady's rule makes at that time: what is used latest after it. If that
// one is still to be used before, the prefetch waits for it, for every eviction that the rule would not make is one
// more read later. Near uses do not wait where the rule is undecided: their copies must begin now to be there in time.
// With set_early_prefetch they do not wait at all.
std::optional<int32_t> Residency::prefetch_victim(UseTime time) const {
  const bool near = time <= near_until();
  if (options_.eviction != Eviction::next_use) {
    return near ? evictable_.first_used_after(never - 1) : std::nullopt;
  }
  const std::optional<int32_t> victim = evictable_.first_used_after(time);
  if (!victim) return std::nullopt;
  const UseTime use = next_use(*victim);
  if (near && (use == never || early_prefetch_)) return victim;
  for (const int32_t expert : expert_in_slot_) {
    if (expert < 0) continue;
    const Expert& other = experts_[expert];
    const auto after = std::find_if(other.uses.begin(), other.uses.end(), [&](const Use& u) { return u.time > time; });
    const UseTime later = after == other.uses.end() ? never : after->time;
    const int64_t frequency = other.frequency + (after - other.uses.begin());  // as it will be then
    if (later > use || (!near && later == use && frequency < experts_[*victim].frequency)) return std::nullopt;
  }
  return victim;
}

std::optional<Command> Residency::prefetch() {
  if (to_prefetch_.empty()) return std::nullopt;
  const auto [time, rank, expert] = *to_prefetch_.begin();
  std::optional<int32_t> slot = take_free_slot();
  if (!slot) {
    const std::optional<int32_t> victim = prefetch_victim(time);
    if (victim) slot = evict(*victim);
  }
  if (!slot) return std::nullopt;
  return start(expert, *slot, /*prefetch=*/true);
}

std::optional<Command> Residency::next_command() {
  shrink();
  if (!to_give_back_.empty()) {
    const int32_t first = *to_give_back_.begin();
    int32_t next = first;
    while (!to_give_back_.empty() && *to_give_back_.begin() == next) {
      to_give_back_.erase(to_give_back_.begin());
      ++next;
    }
    return Command{.kind = Command::Kind::give_back, .slot = first, .count = next - first};
  }
  if (in_flight_ >= options_.lanes || committed_ - returning_ > budget_) return std::nullopt;
  for (const bool waiting : {true, false}) {
    const std::optional<int32_t> expert = next_missing(waiting);
    if (!expert) continue;
    const std::optional<int32_t> slot = slot_for_demand(waiting);
    if (!slot) return std::nullopt;  // what comes after it must not take what it waits for
    return start(*expert, *slot, /*prefetch=*/false);
  }
  if (!to_fetch_.empty()) {
    const std::optional<int32_t> slot = slot_for_demand(/*waiting=*/false);
    if (slot) return start(to_fetch_.begin()->second, *slot, /*prefetch=*/false);
    return std::nullopt;
  }
  return prefetch();
}

Residency::Demand& Residency::find(DemandId demand) {
  const auto found = demands_.find(demand);
  if (found == demands_.end()) fail(ErrorKind::invalid, "demand ", demand, " is not under way");
  return found->second;
}

const Residency::Demand& Residency::find(DemandId demand) const {
  return const_cast<Residency*>(this)->find(demand);
}

bool Residency::exhausted(DemandId demand) const {
  return find(demand).wanted.empty();
}

const Failure* Residency::failure(DemandId demand) const {
  const Demand& found = find(demand);
  return found.failure ? &*found.failure : nullptr;
}

int32_t Residency::layer_of(DemandId demand) const {
  return find(demand).layer;
}
BatchId Residency::batch_of(DemandId demand) const {
  return find(demand).batch;
}

std::vector<int32_t> Residency::missing(DemandId demand) const {
  std::vector<int32_t> indices;
  for (const int32_t expert : find(demand).wanted) indices.push_back(key(expert).index);
  return indices;
}

int64_t Residency::queued() const {
  std::set<int32_t> absent;
  for (const auto& [number, demand] : demands_) {
    for (const int32_t expert : demand.wanted) {
      if (experts_[expert].state == State::absent) absent.insert(expert);
    }
  }
  return static_cast<int64_t>(absent.size());
}

std::vector<ExpertStanding> Residency::standings() const {
  using Place = ExpertStanding::Place;
  std::vector<ExpertStanding> standings(experts_.size());
  for (size_t id = 0; id < experts_.size(); ++id) {
    const Expert& expert = experts_[id];
    standings[id].demands = expert.frequency;
    if (expert.state == State::loading) standings[id].place = Place::arriving;
    if (expert.state == State::ready) standings[id].place = expert.pins > 0 ? Place::in_use : Place::here;
  }
  return standings;
}

void Residency::reset_counters() {
  std::fill(counters_.begin(), counters_.end(), LayerCounters{});
  peak_committed_ = committed_;
  low_bit_credit_ = low_bit_earned_ = 0;  // the counters' share holds from here on
}

void Residency::end_event() const {
  if constexpr (checked_build) check_invariants();
}

void Residency::check_invariants() const {
  check_slots();
  check_counts();
  check_owed();
  check_orders();
}

void Residency::check_slots() const {
  std::vector<int> claims(expert_in_slot_.size(), 0);  // each slot is occupied, warm, cold or on its way back
  int64_t occupied = 0;
  for (size_t slot = 0; slot < expert_in_slot_.size(); ++slot) {
    const int32_t expert = expert_in_slot_[slot];
    if (expert < 0) continue;
    ++occupied;
    ++claims[slot];
    must_hold(experts_[expert].slot == static_cast<int32_t>(slot), "slot ", slot, " has expert ", expert,
              ", which is in slot ", experts_[expert].slot);
  }
  for (const auto* slots : {&warm_, &cold_, &to_give_back_}) {
    for (const int32_t slot : *slots) ++claims[slot];
  }
  int64_t unclaimed = 0;  // being given back
  for (size_t slot = 0; slot < claims.size(); ++slot) {
    must_hold(claims[slot] <= 1, "slot ", slot, " is in ", claims[slot], " places");
    unclaimed += claims[slot] == 0;
  }
  must_hold(returning_ == unclaimed + static_cast<int64_t>(to_give_back_.size()), "returning is ", returning_, ", ",
            unclaimed, " slots are on their way back and ", to_give_back_.size(), " are to go");
  must_hold(committed_ == occupied + static_cast<int64_t>(warm_.size()) + returning_, "committed is ", committed_, ", ",
            occupied, " slots are occupied, ", warm_.size(), " empty, ", returning_, " on their way back");
  must_hold(peak_committed_ >= committed_, "the peak is ", peak_committed_, ", committed ", committed_);
}

void Residency::check_counts() const {
  struct Counts {
    int32_t wanted = 0, awaited = 0, pins = 0;
    bool operator==(const Counts&) const = default;
  };
  std::vector<Counts> counted(experts_.size());
  for (const auto& [number, demand] : demands_) {
    for (const int32_t expert : demand.wanted) {
      ++counted[expert].wanted;
      counted[expert].awaited += demand.waiting;
    }
    for (const int32_t expert : demand.pinned) ++counted[expert].pins;
  }
  int64_t pins = 0;
  int loading = 0;
  for (size_t expert = 0; expert < experts_.size(); ++expert) {
    const Expert& state = experts_[expert];
    must_hold(counted[expert] == Counts{state.wanted, state.awaited, state.pins}, "expert ", expert, " is wanted by ",
              counted[expert].wanted, " demands, awaited by ", counted[expert].awaited, ", pinned by ",
              counted[expert].pins, "; it counts ", state.wanted, ", ", state.awaited, ", ", state.pins);
    must_hold((state.state == State::absent) == (state.slot < 0), "expert ", expert, " is in slot ", state.slot);
    must_hold(state.pins == 0 || state.state == State::ready, "expert ", expert, " is computed from and not there");
    must_hold(!state.prefetched || (state.state != State::absent && state.wanted == 0), "expert ", expert,
              " counts as prefetched, wanted by ", state.wanted);
    pins += state.pins;
    loading += state.state == State::loading;
  }
  must_hold(pinned_ == pins, "pinned is ", pinned_, ", counted are ", pins);
  must_hold(in_flight_ == loading && loading <= options_.lanes, "in flight are ", in_flight_, ", loading ", loading,
            ", lanes are ", options_.lanes);
}

void Residency::check_owed() const {
  int64_t to_fetch = 0, low_bit = 0;
  for (size_t expert = 0; expert < experts_.size(); ++expert) {
    const Expert& state = experts_[expert];
    must_hold(state.owed == 0 || (state.state == State::absent && !state.failed), "expert ", expert,
              " is owed and is there, arriving or broken");
    must_hold((state.standing == Standing::to_fetch) == (state.owed > 0 && state.wanted == 0), "expert ", expert,
              " is in the wrong order");
    to_fetch += state.standing == Standing::to_fetch;
  }
  must_hold(static_cast<int64_t>(to_fetch_.size()) == to_fetch, to_fetch_.size(), " experts are to be fetched, ",
            to_fetch, " should be");
  for (const LayerCounters& layer : counters_) low_bit += layer.low_bit_choices;
  must_hold(low_bit_credit_ >= 0 && low_bit * millionths + low_bit_credit_ <= low_bit_earned_, low_bit,
            " choices were served by low-bit copies and ", low_bit_credit_, " millionths of one are left; earned were ",
            low_bit_earned_);
}

void Residency::check_orders() const {
  int64_t evictable = 0, last_resort = 0, to_prefetch = 0;
  for (size_t expert = 0; expert < experts_.size(); ++expert) {
    const Expert& state = experts_[expert];
    const bool may_go = state.state == State::ready && state.pins == 0 && state.awaited == 0;
    must_hold((state.standing == Standing::evictable) == (may_go && state.wanted == 0), "expert ", expert,
              " is in the wrong order");
    must_hold((state.standing == Standing::last_resort) == (may_go && state.wanted > 0), "expert ", expert,
              " is in the wrong order");
    must_hold(!may_go || state.resident.next_use == next_use(static_cast<int32_t>(expert)), "expert ", expert,
              " is ordered by a use that has passed");
    evictable += state.standing == Standing::evictable;
    last_resort += state.standing == Standing::last_resort;
    to_prefetch += state.standing == Standing::to_prefetch;
  }
  must_hold(evictable_.size() == evictable && last_resort_.size() == last_resort &&
                static_cast<int64_t>(to_prefetch_.size()) == to_prefetch,
            "the orders hold ", evictable_.size(), ", ", last_resort_.size(), " and ", to_prefetch_.size(),
            " experts; ", evictable, ", ", last_resort, " and ", to_prefetch, " should stand there");
}

}  // namespace sida
