// ResidencyModel: what a Residency must do, written a second time and naively: plain lists, every question answered by
// looking at everything. The simulator compares the two after every event.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "experts/residency.h"

namespace sida::test {

struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class ResidencyModel {
 public:
  explicit ResidencyModel(const ResidencyOptions& options);

  void announce(BatchId id, const AnnouncedBatch& batch);
  void retire(BatchId id);
  void demand(DemandId id, int32_t layer, const std::vector<int32_t>& experts, BatchId batch,
              const std::vector<int64_t>& choices);
  void set_waiting(DemandId id, bool waiting) { demands.at(id).waiting = waiting; }
  void take(DemandId id, const Wave& wave);
  void take_low_bit(DemandId id, const Wave& wave);
  void release(DemandId id, const Wave& wave);
  void finish(DemandId id) { demands.erase(id); }
  void copy_done(int32_t slot);
  void copy_failed(int32_t slot);
  void given_back(int32_t slot, int32_t count);
  void set_budget(int64_t slots) { budget = slots; }
  void set_low_bit(int64_t millionths);
  void set_early_prefetch(bool early) { early_prefetch = early; }

  void begin_commands();                 // before the commands that follow an event
  void command(const Command& command);  // each of them
  void no_more_commands();               // after the last
  void check_counters(const Residency& residency) const;

  enum class Content { cold, warm, loading, ready, returning };
  struct Slot {
    Content content = Content::cold;
    int32_t expert = -1;
  };
  struct Demand {
    int32_t layer;
    std::vector<int32_t> wanted;
    std::multiset<int32_t> pinned;
    std::map<int32_t, int64_t> choices;
    bool waiting = false, failed = false;
  };
  struct Batch {
    AnnouncedBatch announced;
    size_t passed = 0;
  };
  struct History {
    int64_t demands = 0, last_use = 0, loaded = 0;
    UseWeight weight = never_used;
    bool prefetched = false, failed = false;
  };

  int64_t count(Content content) const;
  int slot_of(int32_t expert) const;  // -1: in none
  bool is_ready(int32_t expert) const;
  int64_t pins(int32_t expert) const;
  int64_t total_pins() const;

  const ResidencyOptions options;
  int64_t budget;
  bool early_prefetch = false;
  std::vector<Slot> slots;
  std::vector<History> history;
  std::map<DemandId, Demand> demands;
  std::map<BatchId, Batch> batches;

 private:
  using Time = std::pair<BatchId, int64_t>;
  struct Use {
    Time time;
    size_t rank;
  };

  int32_t id(int32_t layer, int32_t index) const { return layer * options.experts + index; }
  std::optional<Use> next_use(int32_t expert) const;
  Time next_time(int32_t expert) const;
  bool wanted(int32_t expert) const;
  bool awaited(int32_t expert) const;
  bool may_go(const Slot& slot, bool wanted_ones) const;
  int32_t choose_victim(bool wanted_ones, std::optional<Time> after) const;  // an expert; -1
  int32_t choose_unannounced(bool wanted_ones) const;                        // an expert; -1
  int32_t choose_prefetch_victim(Time time) const;
  void evict(int32_t expert, Content leaves);
  int64_t committed() const;
  void pass(Batch& batch, size_t until);
  struct Choice {
    int32_t expert = -1;
    bool prefetch = false;
    int32_t slot = -1, victim = -1;
  };
  std::optional<Choice> choose() const;

  int64_t low_bit_ = 0, credit_ = 0;  // millionths
  std::vector<int32_t> owed_;         // experts that low-bit copies served and that no copy was started for since
  int64_t clock_ = 0;
  LayerClock layer_clock_;
  int64_t committed_before_ = 0;
  std::set<int32_t> to_give_back_;
  std::vector<LayerCounters> counters_;
};

}  // namespace sida::test
