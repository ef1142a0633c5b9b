// Residency: which expert is in which slot, what to load next and what to evict. A deterministic state machine without
// threads, clock, I/O or device: it is told events and answers commands.
//
//   absent --start_copy--> loading --copy_done--> ready --evicted--> absent
//                             \--copy_failed--> absent
//
// Demands come before prefetches, demands that a caller waits for before the others, older before newer. An expert that
// arrived for a waiting caller stays until it is handed out, one that was handed out stays until it is released: so
// the oldest waiting demand always gets on, with one slot and any number of demands.
//
// Where every expert has a low-bit copy at hand, a demand may be given copies in place of experts that are not there,
// for a bounded share of all choices. Their records are still fetched: after what demands want, before prefetches.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "experts/eviction.h"
#include "experts/expert.h"
#include "experts/stats.h"

namespace sida {

// The experts that a queued batch will want, layer by layer in the order of use.
struct AnnouncedBatch {
  struct Layer {
    int32_t layer;
    std::vector<int32_t> experts;  // distinct, most wanted first
  };
  std::vector<Layer> layers;
};

using BatchId = uint64_t;  // 0: a batch that was not announced
using DemandId = uint64_t;

// Experts of one demand that are in memory now and pinned until released. Empty: the demand is done.
struct Wave {
  std::vector<int32_t> experts;
  std::vector<int32_t> slots;  // parallel to experts
  bool low_bit = false;        // to be computed from their low-bit copies: no slots, nothing to release
};

struct Command {
  enum class Kind {
    start_copy,  // bring `expert` into `slot`; answered by copy_done or copy_failed
    give_back,   // `count` slots from `slot` on are out of the budget; answered by given_back
  };
  Kind kind;
  int32_t slot;
  int32_t count = 1;
  ExpertKey expert{};
  bool prefetch = false;
};

struct Failure {
  ErrorKind kind;
  std::string why;
};

struct ResidencyOptions {
  int32_t layers, experts;  // experts per layer
  int64_t slots;            // the budget, 1 to layers * experts
  int lanes = 2;            // copies under way at once
  Eviction eviction = Eviction::next_use;
  // Prefetches for this many layers ahead begin as early as they can. Those for later ones fill free slots, and evict
  // only what would go at the time of their use in any case: an eviction put off is a better informed one.
  int prefetch_layers = 1;
  bool populated = false;  // the slots of the first budget hold memory from the start
};

class Residency {
 public:
  explicit Residency(const ResidencyOptions& options);
  Residency(const Residency&) = delete;  // its orders of eviction look at its clock
  Residency& operator=(const Residency&) = delete;

  // Events. Each may make work: the caller then asks next_command() until there is none.
  // A call that throws Error(invalid) has changed nothing.
  BatchId announce(AnnouncedBatch batch);
  void retire(BatchId batch);  // twice is once
  // `batch` tells how far it has come: its layers up to this one are no longer announced.
  // `choices`, parallel to `experts`: how many of the layer's tokens chose each; may be left out, and is then 0 for the
  // counters and keeps the demand's experts from being served by low-bit copies.
  [[nodiscard]] DemandId demand(int32_t layer, std::span<const int32_t> experts, BatchId batch = 0,
                                std::span<const int64_t> choices = {});
  void set_waiting(DemandId demand, bool waiting);  // a caller waits for the demand, or has stopped waiting
  void release(DemandId demand, const Wave& wave);
  void finish(DemandId demand);  // twice is once
  void copy_done(int32_t slot);
  void copy_failed(int32_t slot, const Failure& failure);
  void given_back(int32_t slot, int32_t count);
  void set_budget(int64_t slots);
  // Share of all choices that low-bit copies may serve from now on, in millionths: 0, as at the start, is never.
  void set_low_bit(int64_t millionths);

  // Whether prefetches for the next `prefetch_layers` layers begin as early as they can in any case. It costs reads, as
  // what goes for them is chosen too early, and saves the time in which everybody waits for a layer of which nothing is
  // there. Not so at the start: the fewest reads.
  void set_early_prefetch(bool early);

  [[nodiscard]] std::optional<Command> next_command();

  // What the demand can compute now and has not been given; pins it. Empty if nothing is ready (or left).
  [[nodiscard]] Wave take_ready(DemandId demand);
  // Hands out, to be computed from their low-bit copies, what is not there now and fits the share that is left: experts
  // that no copy is under way for before the others, those with few choices before those with many. Not one whose last
  // read failed: it is read again, and who wants it is told. Every demand with choices earns its share of credit; of
  // what is not used at once, that of the latest `low_bit_window` choices is kept. So since the last reset the share
  // is never exceeded, and a long run of hits does not pay for a burst of misses.
  [[nodiscard]] Wave take_low_bit(DemandId demand);
  static constexpr int64_t low_bit_window = 8192;
  bool is_under_way(DemandId demand) const { return demands_.count(demand) > 0; }
  bool exhausted(DemandId demand) const;          // everything was handed out
  const Failure* failure(DemandId demand) const;  // why an expert that it wants cannot come; null if none
  int32_t layer_of(DemandId demand) const;
  BatchId batch_of(DemandId demand) const;
  std::vector<int32_t> missing(DemandId demand) const;  // experts not handed out yet

  int64_t budget() const { return budget_; }
  // Slots that hold memory: loading, ready, empty but not given back, being given back.
  int64_t committed() const { return committed_; }
  int64_t peak_committed() const { return peak_committed_; }
  int in_flight() const { return in_flight_; }
  int64_t pinned() const { return pinned_; }  // over all waves: an expert in two waves counts twice
  int64_t queued() const;                     // experts that demands want and that no copy has been started for
  const std::vector<LayerCounters>& counters() const { return counters_; }
  void reset_counters();
  std::vector<ExpertStanding> standings() const;  // [layers * experts]

  // Throws Error(internal) that names what does not hold of slots, experts, demands and orders taken together. Every
  // event ends with it in checked builds (base/check.h).
  void check_invariants() const;

 private:
  enum class State : uint8_t { absent, loading, ready };
  // Which order it stands in.
  enum class Standing : uint8_t { none, evictable, last_resort, to_fetch, to_prefetch };

  struct Use {
    UseTime time;
    int32_t rank;  // how many experts of the same layer are wanted more
  };

  struct Expert {
    State state = State::absent;
    int32_t slot = -1;
    int32_t pins = 0;         // waves that compute from it
    int32_t wanted = 0;       // demands that want it and have not been given it
    int32_t awaited = 0;      // those of them that a caller waits for
    bool prefetched = false;  // brought in by a prefetch and not demanded since
    bool failed = false;      // its latest copy failed: only a demand tries again
    int64_t owed = 0;         // since when, of take_low_bit's calls, its record is to be fetched; 0: it is not
    int64_t frequency = 0, last_use = 0, loaded = 0;
    UseWeight weight = never_used;
    std::vector<Use> uses;  // announced, in order

    Standing standing = Standing::none;
    Resident resident{};  // as it stands in evictable_ or last_resort_
    Use prefetch{};       // as it stands in to_prefetch_
  };

  struct Demand {
    int32_t layer;
    BatchId batch;
    bool waiting = false;
    std::vector<int32_t> wanted;                       // not handed out
    std::vector<int32_t> pinned;                       // handed out and not released
    std::vector<std::pair<int32_t, int64_t>> choices;  // expert, its choices; where low-bit copies may serve
    std::optional<Failure> failure;
  };

  struct Batch {
    AnnouncedBatch announced;
    size_t passed = 0;  // of its layers
  };

  int32_t id(int32_t layer, int32_t index) const { return layer * options_.experts + index; }
  ExpertKey key(int32_t expert) const { return {expert / options_.experts, expert % options_.experts}; }
  LayerCounters& count(int32_t expert) { return counters_[expert / options_.experts]; }
  void check_experts(const char* event, int32_t layer, std::span<const int32_t> experts) const;

  UseTime next_use(int32_t expert) const;
  void pass_layers(BatchId number, Batch& batch, size_t until);
  void reindex(int32_t expert);  // after every change of an expert: puts it into the order where it belongs
  std::optional<int32_t> next_missing(bool waiting) const;
  UseTime near_until() const;
  bool may_commit() const { return committed_ < budget_; }
  std::optional<int32_t> take_free_slot();
  int32_t evict(int32_t expert);  // its slot
  void shrink();
  void give_back_later(int32_t slot);
  void unpin(int32_t expert);
  void leave_slot(int32_t expert);
  Command start(int32_t expert, int32_t slot, bool prefetch);
  void count_choices(Demand& demand, std::span<const int32_t> experts, std::span<const int64_t> choices);
  std::optional<int32_t> slot_for_demand(bool waiting);
  std::optional<int32_t> prefetch_victim(UseTime time) const;
  std::optional<Command> prefetch();
  void end_event() const;
  void check_slots() const;
  void check_counts() const;
  void check_owed() const;
  void check_orders() const;
  Demand& find(DemandId demand);
  const Demand& find(DemandId demand) const;

  const ResidencyOptions options_;
  int64_t budget_;
  int64_t committed_ = 0, peak_committed_ = 0, returning_ = 0, pinned_ = 0;
  int in_flight_ = 0;
  int64_t tick_ = 0;
  int64_t low_bit_millionths_ = 0;
  bool early_prefetch_ = false;
  int64_t low_bit_credit_ = 0, low_bit_earned_ = 0;  // millionths of a choice; earned: since the last reset
  int64_t last_owed_ = 0;
  LayerClock clock_;
  BatchId last_batch_ = 0;
  DemandId last_demand_ = 0;
  std::vector<Expert> experts_;          // [layers * experts]
  std::vector<int32_t> expert_in_slot_;  // [layers * experts]; -1: empty
  std::set<int32_t> warm_;               // empty slots that hold memory
  std::set<int32_t> cold_;               // slots without memory
  std::set<int32_t> to_give_back_;
  EvictionOrder evictable_;
  EvictionOrder last_resort_;  // wanted by demands that nobody waits for: they go before a waiting caller starves
  std::set<std::pair<int64_t, int32_t>> to_fetch_;  // (owed, expert): served by a low-bit copy, absent, not demanded
  std::set<std::tuple<UseTime, int32_t, int32_t>> to_prefetch_;  // (time, rank, expert): announced and absent
  std::map<BatchId, Batch> batches_;
  std::map<DemandId, Demand> demands_;
  std::vector<LayerCounters> counters_;
};

}  // namespace sida
