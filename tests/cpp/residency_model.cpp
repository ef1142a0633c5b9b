#include "residency_model.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <tuple>
#include <utility>
#include <vector>

namespace sida::test {
namespace {

constexpr std::pair<BatchId, int64_t> no_time{std::numeric_limits<BatchId>::max(), 0};

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw Violation(text.str());
}

}  // namespace

ResidencyModel::ResidencyModel(const ResidencyOptions& given)
    : options(given),
      budget(given.slots),
      slots(static_cast<size_t>(given.layers) * given.experts),
      history(slots.size()),
      layer_clock_(given.layers),
      counters_(given.layers) {
  if (!given.populated) return;
  for (int64_t slot = 0; slot < budget; ++slot) slots[slot].content = Content::warm;
}

void ResidencyModel::announce(BatchId id, const AnnouncedBatch& batch) {
  batches[id] = {batch, 0};
}

void ResidencyModel::pass(Batch& batch, size_t until) {
  while (batch.passed < until) {
    const auto& layer = batch.announced.layers[batch.passed++];
    for (const int32_t index : layer.experts) {
      const int32_t expert = id(layer.layer, index);
      if (slot_of(expert) < 0 && !wanted(expert)) ++counters_[layer.layer].cancelled_prefetches;
    }
  }
}

void ResidencyModel::retire(BatchId id) {
  const auto found = batches.find(id);
  if (found == batches.end()) return;
  pass(found->second, found->second.announced.layers.size());
  batches.erase(found);
}

void ResidencyModel::demand(DemandId number, int32_t layer, const std::vector<int32_t>& experts, BatchId batch,
                            const std::vector<int64_t>& choices) {
  Demand demand{layer, {}, {}, {}};
  int64_t sum = 0;
  for (size_t i = 0; i < choices.size(); ++i) {
    sum += choices[i];
    if (low_bit_ > 0) demand.choices[id(layer, experts[i])] = choices[i];
  }
  counters_[layer].choices += sum;
  credit_ = std::min(credit_ + sum * low_bit_, low_bit_ * std::max<int64_t>(sum, 8192));
  ++counters_[layer].requested;
  layer_clock_.run(layer, static_cast<double>(experts.size()) / options.experts);
  for (const int32_t index : experts) {
    const int32_t expert = id(layer, index);
    ++counters_[layer].unique;
    if (is_ready(expert)) {
      ++counters_[layer].hits;
    } else if (slot_of(expert) >= 0) {
      ++counters_[layer].late;
    } else {
      ++counters_[layer].misses;
    }
    History& past = history[expert];
    if (past.prefetched) ++counters_[layer].useful_prefetches;
    past.prefetched = false;
    ++past.demands;
    past.weight = layer_clock_.used(layer, past.weight);
    past.last_use = ++clock_;
    demand.wanted.push_back(expert);
  }
  demands[number] = demand;
  const auto found = batches.find(batch);
  if (found != batches.end()) {
    const auto& layers = found->second.announced.layers;
    for (size_t i = found->second.passed; i < layers.size(); ++i) {
      if (layers[i].layer == layer) {
        counters_[layer].named += static_cast<int64_t>(layers[i].experts.size());
        for (const int32_t index : experts) {
          counters_[layer].named_wanted += std::count(layers[i].experts.begin(), layers[i].experts.end(), index);
        }
        pass(found->second, i + 1);
        break;
      }
    }
  }
  if (options.eviction != Eviction::next_use) return;
  std::vector<int32_t>& list = demands[number].wanted;
  for (size_t i = 0; i < list.size(); ++i) {
    for (size_t j = i; j > 0 && next_time(list[j - 1]) < next_time(list[j]); --j) std::swap(list[j - 1], list[j]);
  }
}

void ResidencyModel::take(DemandId number, const Wave& wave) {
  Demand& demand = demands.at(number);
  require(wave.experts.size() == wave.slots.size(), "a wave of ", wave.experts.size(), " experts has ",
          wave.slots.size(), " slots");
  std::vector<int32_t> expected;
  for (const int32_t expert : demand.wanted) {
    if (is_ready(expert)) expected.push_back(expert);
  }
  require(expected.size() == wave.experts.size(), "a wave has ", wave.experts.size(), " experts, ", expected.size(),
          " are ready");
  for (size_t i = 0; i < wave.experts.size(); ++i) {
    const int32_t expert = id(demand.layer, wave.experts[i]);
    const auto at = std::find(demand.wanted.begin(), demand.wanted.end(), expert);
    require(at != demand.wanted.end(), "expert ", expert, " was handed out without being wanted, or twice");
    const int32_t slot = wave.slots[i];
    require(slot >= 0 && slot < static_cast<int32_t>(slots.size()), "slot ", slot, " does not exist");
    require(slots[slot].content == Content::ready && slots[slot].expert == expert, "slot ", slot,
            " was handed out as expert ", expert, " and holds ", slots[slot].expert);
    demand.wanted.erase(at);
    demand.pinned.insert(expert);
  }
}

void ResidencyModel::set_low_bit(int64_t millionths) {
  low_bit_ = millionths;
  credit_ = 0;
}

void ResidencyModel::take_low_bit(DemandId number, const Wave& wave) {
  Demand& demand = demands.at(number);
  require(wave.low_bit && wave.slots.empty(), "a low-bit wave has slots");
  std::vector<int32_t> expected;
  // The cheapest that nobody reads, one after the other, then the cheapest of those under way.
  for (const bool loading : {false, true}) {
    std::set<int32_t> seen;
    while (!demand.failed) {
      int32_t cheapest = -1;
      for (const int32_t expert : demand.wanted) {
        if (seen.count(expert) > 0 || is_ready(expert) || history[expert].failed) continue;
        if (demand.choices.count(expert) == 0 || (slot_of(expert) >= 0) != loading) continue;
        if (cheapest < 0 || demand.choices.at(expert) < demand.choices.at(cheapest)) cheapest = expert;
      }
      if (cheapest < 0) break;
      seen.insert(cheapest);
      const int64_t price = demand.choices.at(cheapest) * 1'000'000;
      if (price > credit_) continue;
      credit_ -= price;
      expected.push_back(cheapest % options.experts);
      counters_[demand.layer].low_bit_choices += demand.choices.at(cheapest);
      if (!loading && std::count(owed_.begin(), owed_.end(), cheapest) == 0) owed_.push_back(cheapest);
    }
  }
  require(wave.experts == expected, "low-bit copies serve ", wave.experts.size(), " experts, expected ",
          expected.size());
  for (const int32_t index : expected) std::erase(demand.wanted, id(demand.layer, index));
}

void ResidencyModel::release(DemandId number, const Wave& wave) {
  Demand& demand = demands.at(number);
  for (const int32_t index : wave.experts) demand.pinned.erase(demand.pinned.find(id(demand.layer, index)));
}

void ResidencyModel::copy_done(int32_t slot) {
  const int32_t expert = slots[slot].expert;
  slots[slot].content = Content::ready;
  history[expert].loaded = ++clock_;
  history[expert].failed = false;
  if (!wanted(expert)) history[expert].last_use = clock_;
  ++counters_[expert / options.experts].loads;
}

void ResidencyModel::copy_failed(int32_t slot) {
  const int32_t expert = slots[slot].expert;
  for (auto& [number, demand] : demands) {
    if (std::count(demand.wanted.begin(), demand.wanted.end(), expert) > 0) demand.failed = true;
  }
  history[expert].failed = true;
  history[expert].prefetched = false;
  slots[slot] = {Content::warm, -1};
  ++counters_[expert / options.experts].failed_loads;
}

void ResidencyModel::given_back(int32_t slot, int32_t number) {
  for (int32_t i = slot; i < slot + number; ++i) slots[i] = {};
}

int64_t ResidencyModel::count(Content content) const {
  return std::count_if(slots.begin(), slots.end(), [&](const Slot& slot) { return slot.content == content; });
}

int ResidencyModel::slot_of(int32_t expert) const {
  for (size_t slot = 0; slot < slots.size(); ++slot) {
    if (slots[slot].expert == expert) return static_cast<int>(slot);
  }
  return -1;
}

bool ResidencyModel::is_ready(int32_t expert) const {
  const int slot = slot_of(expert);
  return slot >= 0 && slots[slot].content == Content::ready;
}

int64_t ResidencyModel::pins(int32_t expert) const {
  int64_t total = 0;
  for (const auto& [number, demand] : demands) total += static_cast<int64_t>(demand.pinned.count(expert));
  return total;
}

int64_t ResidencyModel::total_pins() const {
  int64_t total = 0;
  for (const auto& [number, demand] : demands) total += static_cast<int64_t>(demand.pinned.size());
  return total;
}

bool ResidencyModel::wanted(int32_t expert) const {
  return std::any_of(demands.begin(), demands.end(), [&](const auto& entry) {
    return std::count(entry.second.wanted.begin(), entry.second.wanted.end(), expert) > 0;
  });
}

bool ResidencyModel::awaited(int32_t expert) const {
  return std::any_of(demands.begin(), demands.end(), [&](const auto& entry) {
    return entry.second.waiting && std::count(entry.second.wanted.begin(), entry.second.wanted.end(), expert) > 0;
  });
}

std::optional<ResidencyModel::Use> ResidencyModel::next_use(int32_t expert) const {
  for (const auto& [number, batch] : batches) {
    for (size_t i = batch.passed; i < batch.announced.layers.size(); ++i) {
      const auto& layer = batch.announced.layers[i];
      for (size_t rank = 0; rank < layer.experts.size(); ++rank) {
        if (id(layer.layer, layer.experts[rank]) == expert) return Use{{number, static_cast<int64_t>(i)}, rank};
      }
    }
  }
  return std::nullopt;
}

ResidencyModel::Time ResidencyModel::next_time(int32_t expert) const {
  const auto use = next_use(expert);
  return use ? use->time : no_time;
}

int64_t ResidencyModel::committed() const {
  return static_cast<int64_t>(slots.size()) - count(Content::cold);
}

bool ResidencyModel::may_go(const Slot& slot, bool wanted_ones) const {
  return slot.content == Content::ready && pins(slot.expert) == 0 && wanted(slot.expert) == wanted_ones &&
         !awaited(slot.expert);
}

int32_t ResidencyModel::choose_unannounced(bool wanted_ones) const {
  struct Layer {
    int32_t head = -1;  // its least wanted
    int64_t may_go = 0;
  };
  std::vector<Layer> all(static_cast<size_t>(options.layers));
  for (const Slot& slot : slots) {
    if (!may_go(slot, wanted_ones) || next_time(slot.expert) != no_time) continue;
    Layer& its = all[static_cast<size_t>(slot.expert / options.experts)];
    ++its.may_go;
    const History& past = history[slot.expert];
    if (its.head < 0 || std::tie(past.weight, past.last_use, slot.expert) <
                            std::tie(history[its.head].weight, history[its.head].last_use, its.head)) {
      its.head = slot.expert;
    }
  }
  const auto layer_of = [&](int32_t expert) { return expert / options.experts; };
  const auto wait = [&](int32_t expert) { return layer_clock_.wait(layer_of(expert), history[expert].weight); };
  const auto chance = [&](int32_t expert) { return layer_clock_.chance(layer_of(expert), history[expert].weight); };
  int32_t latest = -1;
  for (const Layer& its : all) {
    if (its.head < 0) continue;
    if (latest < 0 || wait(its.head) > wait(latest) ||
        (wait(its.head) == wait(latest) && history[its.head].last_use <= history[latest].last_use)) {
      latest = its.head;
    }
  }
  if (latest < 0) return -1;
  // Of the layers with as rare a head that are half a turn away or more, or the latest: the fullest, then the farthest.
  const auto away = [&](int32_t expert) {
    return layer_clock_.until_run(layer_of(expert)) / layer_clock_.turn(layer_of(expert));
  };
  const auto key = [&](const Layer& its) { return std::pair(its.may_go, away(its.head)); };
  Layer victim = all[static_cast<size_t>(layer_of(latest))];
  for (const Layer& its : all) {
    if (its.head < 0 || chance(its.head) > chance(latest) || away(its.head) <= 0.5) continue;
    if (key(its) > key(victim)) victim = its;
  }
  return victim.head;
}

int32_t ResidencyModel::choose_victim(bool wanted_ones, std::optional<Time> after) const {
  if (options.eviction == Eviction::next_use) {
    if (const int32_t unannounced = choose_unannounced(wanted_ones); unannounced >= 0) return unannounced;
  }
  int32_t victim = -1;
  const auto goes_before = [&](int32_t a, int32_t b) {
    const History &x = history[a], &y = history[b];
    switch (options.eviction) {
      case Eviction::fifo:
        return x.loaded < y.loaded;
      case Eviction::lru:
        return x.last_use < y.last_use;
      case Eviction::lfu:
        return std::tie(x.demands, x.last_use) < std::tie(y.demands, y.last_use);
      case Eviction::next_use:
        break;
    }
    const Time use_a = next_time(a), use_b = next_time(b);
    if (use_a != use_b) return use_a > use_b;
    return std::tie(x.demands, x.last_use) < std::tie(y.demands, y.last_use);
  };
  for (const Slot& slot : slots) {
    if (!may_go(slot, wanted_ones)) continue;
    if (after && next_time(slot.expert) <= *after) continue;
    if (victim < 0 || goes_before(slot.expert, victim)) victim = slot.expert;
  }
  return victim;
}

void ResidencyModel::evict(int32_t expert, Content leaves) {
  LayerCounters& counters = counters_[expert / options.experts];
  ++counters.evictions;
  if (history[expert].prefetched) ++counters.wasted_prefetches;
  history[expert].prefetched = false;
  slots[slot_of(expert)] = {leaves, -1};
}

void ResidencyModel::begin_commands() {
  committed_before_ = committed();
  while (committed() - count(Content::returning) > budget) {
    int32_t warm = -1;
    for (size_t i = 0; i < slots.size(); ++i) {
      if (slots[i].content == Content::warm) warm = static_cast<int32_t>(i);
    }
    if (warm < 0) {
      int32_t victim = choose_victim(false, {});
      if (victim < 0) victim = choose_victim(true, {});
      if (victim < 0) return;
      warm = slot_of(victim);
      evict(victim, Content::returning);
    }
    slots[warm].content = Content::returning;
    to_give_back_.insert(warm);
  }
}

int32_t ResidencyModel::choose_prefetch_victim(Time time) const {
  std::vector<Time> ahead;
  for (const auto& [number, batch] : batches) {
    for (size_t i = batch.passed; i < batch.announced.layers.size(); ++i) ahead.emplace_back(number, i);
  }
  const auto position = std::find(ahead.begin(), ahead.end(), time) - ahead.begin();
  const bool near = position < options.prefetch_layers;
  if (options.eviction != Eviction::next_use) {
    return near ? choose_victim(false, Time{no_time.first - 1, 0}) : -1;
  }
  const int32_t victim = choose_victim(false, time);
  if (victim < 0 || (near && early_prefetch)) return victim;
  for (const Slot& slot : slots) {
    if (slot.expert < 0) continue;
    Time later = no_time;
    int64_t demands = history[slot.expert].demands;
    for (const Time& use : ahead) {
      const auto& layer = batches.at(use.first).announced.layers[static_cast<size_t>(use.second)];
      const bool used = std::any_of(layer.experts.begin(), layer.experts.end(),
                                    [&](int32_t index) { return id(layer.layer, index) == slot.expert; });
      if (used && use <= time) ++demands;
      if (used && use > time && later == no_time) later = use;
    }
    if (later > next_time(victim)) return -1;
    if (!near && later == next_time(victim) && demands < history[victim].demands) return -1;
  }
  return victim;
}

// What the next copy must be; nothing if there must be none.
std::optional<ResidencyModel::Choice> ResidencyModel::choose() const {
  if (count(Content::loading) >= options.lanes) return std::nullopt;
  if (committed() - count(Content::returning) > budget) return std::nullopt;
  Choice choice;
  bool for_waiting = false;
  for (const bool waiting : {true, false}) {
    for (const auto& [number, demand] : demands) {
      if (choice.expert >= 0 || demand.waiting != waiting || demand.failed) continue;
      for (const int32_t expert : demand.wanted) {
        if (choice.expert < 0 && slot_of(expert) < 0) {
          choice.expert = expert;
          for_waiting = waiting;
        }
      }
    }
  }
  Time use_of_prefetch{};
  for (const int32_t expert : owed_) {
    if (choice.expert < 0 && !wanted(expert)) choice.expert = expert;
  }
  if (choice.expert < 0) {
    std::optional<Use> best;
    for (int32_t expert = 0; expert < static_cast<int32_t>(slots.size()); ++expert) {
      if (slot_of(expert) >= 0 || history[expert].failed || wanted(expert)) continue;
      const auto use = next_use(expert);
      if (!use || (best && std::tie(best->time, best->rank) <= std::tie(use->time, use->rank))) continue;
      best = use;
      choice.expert = expert;
    }
    if (!best) return std::nullopt;
    choice.prefetch = true;
    use_of_prefetch = best->time;
  }
  for (const Content wanted_content : {Content::warm, Content::cold}) {
    if (wanted_content == Content::cold && committed() >= budget) continue;
    for (size_t i = 0; i < slots.size() && choice.slot < 0; ++i) {
      if (slots[i].content == wanted_content) choice.slot = static_cast<int32_t>(i);
    }
  }
  if (choice.slot >= 0) return choice;
  if (choice.prefetch) {
    choice.victim = choose_prefetch_victim(use_of_prefetch);
  } else {
    choice.victim = choose_victim(false, {});
    if (choice.victim < 0 && for_waiting) choice.victim = choose_victim(true, {});
  }
  if (choice.victim < 0) return std::nullopt;
  choice.slot = slot_of(choice.victim);
  return choice;
}

void ResidencyModel::command(const Command& command) {
  const auto end = static_cast<int32_t>(slots.size());
  require(command.slot >= 0 && command.count >= 1 && command.slot + command.count <= end, "slots ", command.slot, " +",
          command.count, " do not exist");
  if (command.kind == Command::Kind::give_back) {
    for (int32_t slot = command.slot; slot < command.slot + command.count; ++slot) {
      require(to_give_back_.erase(slot) == 1, "slot ", slot, " is given back without need, or twice");
    }
    return;
  }
  require(to_give_back_.empty(), "a copy starts before slots over the budget are given back");
  const int32_t expert = id(command.expert.layer, command.expert.index);
  // What must hold whatever the policy is.
  const Slot target = slots[command.slot];
  require(slot_of(expert) < 0, "expert ", expert, " is copied while it is in slot ", slot_of(expert));
  require(target.content != Content::loading, "slot ", command.slot, " is written by two copies");
  require(target.content != Content::returning, "slot ", command.slot, " is written while it is given back");
  if (target.content == Content::ready) {
    require(pins(target.expert) == 0, "slot ", command.slot, " is written while expert ", target.expert, " is read");
    require(!awaited(target.expert), "expert ", target.expert, " is evicted before its waiting demand got it");
    require(!command.prefetch || next_time(target.expert) > next_time(expert), "a prefetch evicts expert ",
            target.expert, " that is used no later");
  }
  require(count(Content::loading) < options.lanes, "more than ", options.lanes, " copies are under way");
  const bool owed = std::count(owed_.begin(), owed_.end(), expert) > 0;
  require(command.prefetch ? next_use(expert).has_value() : wanted(expert) || owed,
          "nobody asked for a copy of expert ", expert);
  // And what this very policy must do.
  const auto choice = choose();
  require(choice.has_value(), "a copy of expert ", expert, " starts that should not");
  require(choice->expert == expert && choice->slot == command.slot && choice->prefetch == command.prefetch,
          "a copy of expert ", expert, " into slot ", command.slot, " prefetch ", command.prefetch,
          " starts, expected ", choice->expert, " into ", choice->slot, " prefetch ", choice->prefetch);
  if (choice->victim >= 0) evict(choice->victim, Content::warm);
  slots[command.slot] = {Content::loading, expert};
  std::erase(owed_, expert);
  history[expert].prefetched = command.prefetch;
}

void ResidencyModel::no_more_commands() {
  require(to_give_back_.empty(), to_give_back_.size(), " slots over the budget are not given back");
  const auto choice = choose();
  require(!choice, "a copy of expert ", choice ? choice->expert : -1, " could start and does not");
  require(committed() <= std::max(budget, committed_before_), committed(), " slots hold memory, budget ", budget);
  if (count(Content::loading) > 0 || count(Content::returning) > 0 || total_pins() > 0) return;
  for (const auto& [number, demand] : demands) {
    if (!demand.waiting || demand.failed || demand.wanted.empty()) continue;
    // Somebody can be given something, or something is on its way: else all wait for ever.
    const bool some = std::any_of(demands.begin(), demands.end(), [&](const auto& entry) {
      return entry.second.waiting && std::any_of(entry.second.wanted.begin(), entry.second.wanted.end(),
                                                 [&](int32_t expert) { return is_ready(expert); });
    });
    require(some, "demand ", number, " waits for ever");
  }
}

void ResidencyModel::check_counters(const Residency& residency) const {
  for (size_t layer = 0; layer < counters_.size(); ++layer) {
    const LayerCounters &expected = counters_[layer], &found = residency.counters()[layer];
    for_each_counter(layer_counters, [&](const auto& counter) {
      require(expected.*counter.member == found.*counter.member, "counter ", counter.name, " of layer ", layer, " is ",
              found.*counter.member, ", expected ", expected.*counter.member);
    });
    require(found.unique == found.hits + found.late + found.misses, "counters of layer ", layer, " do not add up");
  }
  require(residency.committed() == committed(), "committed is ", residency.committed(), ", expected ", committed());
  require(residency.pinned() == total_pins(), "pinned is ", residency.pinned(), ", expected ", total_pins());
  require(residency.in_flight() == count(Content::loading), "in_flight is ", residency.in_flight(), ", expected ",
          count(Content::loading));
}

}  // namespace sida::test
