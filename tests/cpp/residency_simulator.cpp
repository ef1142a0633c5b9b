#include "residency_simulator.h"

#include <algorithm>
#include <random>
#include <sstream>
#include <utility>

#include "residency_model.h"

namespace sida::test {
namespace {

using Kind = Step::Kind;

constexpr std::pair<Kind, const char*> kind_names[] = {
    {Kind::announce, "announce"},
    {Kind::retire, "retire"},
    {Kind::demand, "demand"},
    {Kind::wait, "wait"},
    {Kind::stop_waiting, "stop_waiting"},
    {Kind::take, "take"},
    {Kind::take_low_bit, "take_low_bit"},
    {Kind::release, "release"},
    {Kind::finish, "finish"},
    {Kind::copy_done, "copy_done"},
    {Kind::copy_failed, "copy_failed"},
    {Kind::given_back, "given_back"},
    {Kind::set_budget, "set_budget"},
    {Kind::wrong_call, "wrong_call"},
};

// A number from a seed: the same on every machine, unlike the standard's distributions.
class Dice {
 public:
  explicit Dice(uint64_t seed) : random_(seed) {}
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }
  bool one_in(uint32_t n) { return below(n) == 0; }
  uint32_t any() { return static_cast<uint32_t>(random_()); }

 private:
  std::mt19937_64 random_;
};

std::vector<int32_t> draw_experts(Dice& dice, int32_t experts) {
  std::vector<int32_t> all(experts);
  for (int32_t i = 0; i < experts; ++i) all[i] = i;
  // Small ones more often: routing is skewed, and reuse is what a cache lives on.
  const int32_t wanted = static_cast<int32_t>(1 + dice.below(static_cast<uint32_t>(experts)));
  std::vector<int32_t> drawn;
  while (static_cast<int32_t>(drawn.size()) < wanted) {
    const uint32_t at =
        std::min(dice.below(static_cast<uint32_t>(all.size())), dice.below(static_cast<uint32_t>(all.size())));
    drawn.push_back(all[at]);
    all.erase(all.begin() + at);
  }
  return drawn;
}

class Run {
 public:
  explicit Run(const Scenario& scenario) : options_(scenario.options), real_(options_), model_(options_) {
    set_low_bit(scenario.low_bit_millionths);
    pump();
  }

  void step(const Step& step) {
    switch (step.kind) {
      case Kind::announce:
        announce(step);
        break;
      case Kind::retire:
        retire(step);
        break;
      case Kind::demand:
        demand(step);
        break;
      case Kind::wait:
        wait(step, true);
        break;
      case Kind::stop_waiting:
        wait(step, false);
        break;
      case Kind::take:
        take(step);
        break;
      case Kind::take_low_bit:
        take_low_bit(step);
        break;
      case Kind::release:
        release(step);
        break;
      case Kind::finish:
        finish(step);
        break;
      case Kind::copy_done:
        complete(step, false);
        break;
      case Kind::copy_failed:
        complete(step, true);
        break;
      case Kind::given_back:
        give_back(step);
        break;
      case Kind::set_budget:
        set_budget(1 + step.a % capacity());
        break;
      case Kind::wrong_call:
        wrong_call(step);
        break;
    }
    ++events_;
    pump();
    if (events_ % 16 == 0) model_.check_counters(real_);
  }

  // Every demand must come to its end when everybody plays fair: waits, takes, releases.
  void drain() {
    int64_t bound = 0;
    for (const auto& [number, held] : demands_) {
      real_.set_waiting(number, true);
      model_.set_waiting(number, true);
      bound += 2 + 2 * static_cast<int64_t>(model_.demands.at(number).wanted.size());
    }
    pump();
    bound += 4 * static_cast<int64_t>(capacity());
    while (!demands_.empty()) {
      if (--bound < 0) throw Violation("demands are not served to their end");
      while (!returning_.empty()) give_back({Kind::given_back, 0, 0});
      while (!loading_.empty()) complete({Kind::copy_done, 0, 0}, false);
      std::vector<DemandId> over;
      for (auto& [number, waves] : demands_) {
        take_wave(number);
        for (const Wave& wave : waves) release_wave(number, wave);
        waves.clear();
        if (model_.demands.at(number).failed || real_.exhausted(number)) over.push_back(number);
      }
      for (const DemandId number : over) finish_demand(number);
      pump();
    }
    while (!batches_.empty()) retire({Kind::retire, 0, 0});
    pump();
    while (!loading_.empty()) complete({Kind::copy_done, 0, 0}, false);
    while (!returning_.empty()) give_back({Kind::given_back, 0, 0});
    pump();
    model_.check_counters(real_);
    if (real_.committed() > real_.budget()) throw Violation("an idle engine holds more slots than its budget");
    if (real_.pinned() != 0) throw Violation("an idle engine has pinned slots");
  }

  int64_t events() const { return events_; }

 private:
  uint32_t capacity() const { return static_cast<uint32_t>(options_.layers * options_.experts); }

  void announce(const Step& step) {
    if (batches_.size() >= 6) return retire(step);
    Dice dice(step.a);
    AnnouncedBatch batch;
    for (int32_t layer = 0; layer < options_.layers; ++layer) {
      if (!dice.one_in(8)) batch.layers.push_back({layer, draw_experts(dice, options_.experts)});
    }
    if (dice.one_in(8) && !batch.layers.empty()) batch.layers.push_back(batch.layers.front());
    const BatchId number = real_.announce(batch);
    model_.announce(number, batch);
    batches_.push_back(number);
  }

  void retire(const Step& step) {
    if (batches_.empty()) return;
    // Mostly in order; sometimes a batch that will never be used.
    const size_t at = step.b % 4 == 0 ? step.a % batches_.size() : 0;
    real_.retire(batches_[at]);
    model_.retire(batches_[at]);
    last_retired_ = batches_[at];
    batches_.erase(batches_.begin() + static_cast<std::ptrdiff_t>(at));
  }

  void demand(const Step& step) {
    if (demands_.size() >= 5) return finish(step);
    Dice dice(step.a);
    BatchId batch = 0;
    if (!batches_.empty() && !dice.one_in(5)) batch = batches_[dice.one_in(3) ? dice.below(batches_.size()) : 0];
    if (batch == 0 && dice.one_in(4)) batch = last_retired_;
    int32_t layer = static_cast<int32_t>(dice.below(options_.layers));
    std::vector<int32_t> experts;
    const auto known = model_.batches.find(batch);
    if (known != model_.batches.end() && known->second.passed < known->second.announced.layers.size()) {
      const auto& announced = known->second.announced.layers;
      const auto& next = announced[dice.one_in(6) ? dice.below(announced.size()) : known->second.passed];
      layer = next.layer;
      if (!dice.one_in(3)) experts = next.experts;  // the table was right
      if (dice.one_in(2)) std::reverse(experts.begin(), experts.end());
      if (dice.one_in(3) && experts.size() > 1) experts.resize(experts.size() / 2);  // it named too many
    }
    if (experts.empty()) experts = draw_experts(dice, options_.experts);  // it was wrong, or there was none
    if (dice.one_in(30)) experts.clear();
    std::vector<int64_t> choices;
    if (!dice.one_in(5)) {
      for (size_t i = 0; i < experts.size(); ++i) choices.push_back(1 + dice.below(dice.one_in(8) ? 9000 : 4));
    }
    const DemandId number = real_.demand(layer, experts, batch, choices);
    model_.demand(number, layer, experts, batch, choices);
    demands_[number];
    if (!dice.one_in(4)) set_waiting(number, true);
  }

  std::optional<DemandId> pick(uint32_t a) const {
    if (demands_.empty()) return std::nullopt;
    return std::next(demands_.begin(), static_cast<std::ptrdiff_t>(a % demands_.size()))->first;
  }

  void set_waiting(DemandId number, bool waiting) {
    real_.set_waiting(number, waiting);
    model_.set_waiting(number, waiting);
  }

  void wait(const Step& step, bool waiting) {
    if (const auto number = pick(step.a)) set_waiting(*number, waiting);
  }

  void take_wave(DemandId number) {
    const Wave wave = real_.take_ready(number);
    model_.take(number, wave);
    if (real_.exhausted(number) != model_.demands.at(number).wanted.empty()) {
      throw Violation("exhausted() is wrong");
    }
    if ((real_.failure(number) != nullptr) != model_.demands.at(number).failed) throw Violation("failure() is wrong");
    if (!wave.experts.empty()) demands_[number].push_back(wave);
  }

  void take(const Step& step) {
    if (const auto number = pick(step.a)) {
      take_wave(*number);
      if (step.b % 2 == 0) set_waiting(*number, false);
    }
  }

  void take_low_bit(const Step& step) {
    if (step.b % 64 == 1) return set_early_prefetch(step.a % 2 == 0);
    if (step.b % 64 == 0) return set_low_bit(step.a % 3 == 0 ? 0 : step.a % 1'000'001);
    const auto number = pick(step.a);
    if (!number) return;
    model_.take_low_bit(*number, real_.take_low_bit(*number));
    if (real_.exhausted(*number) != model_.demands.at(*number).wanted.empty()) throw Violation("exhausted() is wrong");
  }

  void set_early_prefetch(bool early) {
    real_.set_early_prefetch(early);
    model_.set_early_prefetch(early);
  }

  void set_low_bit(int64_t millionths) {
    real_.set_low_bit(millionths);
    model_.set_low_bit(millionths);
  }

  void release_wave(DemandId number, const Wave& wave) {
    real_.release(number, wave);
    model_.release(number, wave);
  }

  void release(const Step& step) {
    const auto number = pick(step.a);
    if (!number || demands_[*number].empty()) return;
    auto& waves = demands_[*number];
    const size_t at = step.b % waves.size();
    const Wave wave = waves[at];
    waves.erase(waves.begin() + static_cast<std::ptrdiff_t>(at));
    release_wave(*number, wave);
  }

  void finish_demand(DemandId number) {
    real_.finish(number);
    model_.finish(number);
    demands_.erase(number);
  }

  void finish(const Step& step) {
    if (const auto number = pick(step.a)) finish_demand(*number);
  }

  void complete(const Step& step, bool fails) {
    if (loading_.empty()) return;
    // Any of those under way: copies end in any order.
    const size_t at = step.a % loading_.size();
    const int32_t slot = loading_[at];
    loading_.erase(loading_.begin() + static_cast<std::ptrdiff_t>(at));
    if (fails) {
      model_.copy_failed(slot);
      real_.copy_failed(slot, {ErrorKind::io, "injected"});
    } else {
      model_.copy_done(slot);
      real_.copy_done(slot);
    }
    pump();
  }

  void give_back(const Step& step) {
    if (returning_.empty()) return;
    const size_t at = step.a % returning_.size();
    const auto [slot, count] = returning_[at];
    returning_.erase(returning_.begin() + static_cast<std::ptrdiff_t>(at));
    real_.given_back(slot, count);
    model_.given_back(slot, count);
    pump();
  }

  void set_budget(int64_t slots) {
    real_.set_budget(slots);
    model_.set_budget(slots);
  }

  template <class Call>
  void must_throw(const char* what, const Call& call) {
    try {
      call();
    } catch (const Error&) {
      return;
    }
    throw Violation(std::string("not refused: ") + what);
  }

  void wrong_call(const Step& step) {
    const std::vector<int32_t> twice{0, 0}, beyond{options_.experts};
    switch (step.a % 11) {
      case 0:
        must_throw("demand of a layer beyond the last", [&] { (void)real_.demand(options_.layers, {}, 0); });
        break;
      case 1:
        must_throw("demand of the same expert twice", [&] { (void)real_.demand(0, twice, 0); });
        break;
      case 2:
        must_throw("demand of an expert beyond the last", [&] { (void)real_.demand(0, beyond, 0); });
        break;
      case 3:
        must_throw("a budget of 0", [&] { real_.set_budget(0); });
        break;
      case 4:
        must_throw("a budget beyond all experts", [&] { real_.set_budget(capacity() + 1); });
        break;
      case 5:
        must_throw("announcing an expert beyond the last", [&] { real_.announce({{{0, beyond}}}); });
        break;
      case 7:
        must_throw("choices that are not as many as experts",
                   [&] { (void)real_.demand(0, std::vector<int32_t>{0}, 0, std::vector<int64_t>{1, 1}); });
        break;
      case 8:
        must_throw("an expert that nobody chose",
                   [&] { (void)real_.demand(0, std::vector<int32_t>{0}, 0, std::vector<int64_t>{0}); });
        break;
      case 9:
        must_throw("a share above 1", [&] { real_.set_low_bit(1'000'001); });
        break;
      case 6:
        if (const auto number = pick(step.b); number && demands_[*number].empty()) {
          must_throw("release of what was not handed out", [&] { real_.release(*number, {{0}, {0}}); });
        }
        break;
      default:
        for (uint32_t slot = 0; slot < capacity(); ++slot) {
          if (std::count(loading_.begin(), loading_.end(), static_cast<int32_t>(slot)) > 0) continue;
          must_throw("completion of a slot without a copy", [&] { real_.copy_done(static_cast<int32_t>(slot)); });
        }
    }
  }

  void pump() {
    model_.begin_commands();
    int left = static_cast<int>(capacity()) + options_.lanes + 4;
    while (const auto command = real_.next_command()) {
      if (--left < 0) throw Violation("the commands do not end");
      model_.command(*command);
      if (command->kind == Command::Kind::give_back) {
        returning_.emplace_back(command->slot, command->count);
      } else {
        loading_.push_back(command->slot);
      }
    }
    model_.no_more_commands();
  }

  const ResidencyOptions options_;
  Residency real_;
  ResidencyModel model_;
  int64_t events_ = 0;
  BatchId last_retired_ = 0;
  std::vector<BatchId> batches_;
  std::map<DemandId, std::vector<Wave>> demands_;  // and the waves they hold
  std::vector<int32_t> loading_;
  std::vector<std::pair<int32_t, int32_t>> returning_;
};

}  // namespace

Scenario make_scenario(uint64_t seed) {
  Dice dice(seed * 0x9E3779B97F4A7C15u + 1);
  Scenario scenario{seed, {}, 0, {}};
  ResidencyOptions& options = scenario.options;
  options.layers = static_cast<int32_t>(1 + dice.below(4));
  options.experts = static_cast<int32_t>(1 + dice.below(8));
  const uint32_t all = static_cast<uint32_t>(options.layers * options.experts);
  options.slots = 1 + (dice.one_in(3) ? dice.below(std::min(all, 3u)) : dice.below(all));
  options.lanes = static_cast<int>(1 + dice.below(4));
  options.eviction = static_cast<Eviction>(dice.below(4));
  options.prefetch_layers = static_cast<int>(dice.below(4));
  options.populated = dice.one_in(3);
  // Each scenario has habits of its own: few or many faults, a fast or a slow disk, a steady or a moving budget.
  const uint32_t faults = dice.one_in(2) ? 0 : 1 + dice.below(10), disk = 5 + dice.below(60);
  const uint32_t budgets = dice.one_in(2) ? 0 : 1 + dice.below(8), stops = dice.below(6);
  if (dice.one_in(2)) scenario.low_bit_millionths = 1 + dice.below(1'000'000);
  const std::pair<Kind, uint32_t> weights[] = {
      {Kind::announce, dice.one_in(4) ? 0 : 8},
      {Kind::retire, 7},
      {Kind::demand, 12},
      {Kind::wait, 8},
      {Kind::stop_waiting, stops},
      {Kind::take, 20},
      {Kind::release, 20},
      {Kind::finish, 8},
      {Kind::copy_done, disk},
      {Kind::copy_failed, faults},
      {Kind::given_back, 6},
      {Kind::set_budget, budgets},
      {Kind::wrong_call, 1},
      {Kind::take_low_bit, scenario.low_bit_millionths == 0 ? 0 : 3 + dice.below(20)},
  };
  uint32_t total = 0;
  for (const auto& [kind, weight] : weights) total += weight;
  const uint32_t length = 100 + dice.below(400);
  for (uint32_t i = 0; i < length; ++i) {
    uint32_t at = dice.below(total);
    for (const auto& [kind, weight] : weights) {
      if (at < weight) {
        scenario.steps.push_back({kind, dice.any(), dice.any()});
        break;
      }
      at -= weight;
    }
  }
  return scenario;
}

Outcome simulate(const Scenario& scenario) {
  Outcome outcome;
  try {
    Run run(scenario);
    try {
      for (const Step& step : scenario.steps) run.step(step);
      run.drain();
    } catch (const std::exception& error) {
      outcome.violation = error.what();
    }
    outcome.events = run.events();
  } catch (const std::exception& error) {
    outcome.violation = error.what();
  }
  return outcome;
}

Scenario shrink(Scenario scenario) {
  for (size_t part = std::max<size_t>(1, scenario.steps.size() / 2); part > 0; part /= 2) {
    for (size_t begin = 0; begin < scenario.steps.size();) {
      Scenario shorter = scenario;
      const auto from = shorter.steps.begin() + static_cast<std::ptrdiff_t>(begin);
      const size_t length = std::min(part, scenario.steps.size() - begin);
      shorter.steps.erase(from, from + static_cast<std::ptrdiff_t>(length));
      if (simulate(shorter).violation) {
        scenario = std::move(shorter);
      } else {
        begin += length;
      }
    }
  }
  return scenario;
}

std::string describe(const Scenario& scenario) {
  const ResidencyOptions& options = scenario.options;
  std::ostringstream text;
  text << "seed " << scenario.seed << ": layers " << options.layers << " experts " << options.experts << " slots "
       << options.slots << " lanes " << options.lanes << " eviction " << static_cast<int>(options.eviction)
       << " prefetch_layers " << options.prefetch_layers << " populated " << options.populated << " low_bit "
       << scenario.low_bit_millionths << "\n";
  for (const Step& step : scenario.steps) {
    for (const auto& [kind, name] : kind_names) {
      if (kind == step.kind) text << "  " << name << " " << step.a << " " << step.b << "\n";
    }
  }
  return text.str();
}

}  // namespace sida::test
