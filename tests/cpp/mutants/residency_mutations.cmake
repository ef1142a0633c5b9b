# Bugs in copies of residency.cpp and eviction.cpp: the simulator must find each.
sida_mutants(residency)

sida_mutation("a release is forgotten" experts/residency.cpp
              [=[--experts_[expert].pins;]=] [=[]=])
sida_mutation("an expert is handed out without a pin" experts/residency.cpp
              [=[++state.pins;]=] [=[]=])
sida_mutation("the budget is off by one" experts/residency.cpp
              [=[if (!may_commit()) return std::nullopt;]=] [=[if (committed_ > budget_) return std::nullopt;]=])
sida_mutation("a shrunk budget keeps one slot too many" experts/residency.cpp
              [=[budget_ = slots;]=]
              [=[budget_ = slots < budget_ ? slots + 1 : slots;]=])
sida_mutation("a slot given back is reused before it is back" experts/residency.cpp
              [=[returning_ -= slots;]=]
              [=[returning_ -= slots; returning_ += slots - 1;]=])
sida_mutation("a failed copy keeps its slot" experts/residency.cpp
              [=[warm_.insert(slot);]=] [=[]=])
sida_mutation("a failed copy is taken for a good one" experts/residency.cpp
              [=[state.failed = true;]=] [=[]=])
sida_mutation("a failure is told to nobody" experts/residency.cpp
              [=[if (!demand.failure) demand.failure = failure;]=] [=[]=])
sida_mutation("a finished demand still wants its experts" experts/residency.cpp
              [=[--experts_[expert].wanted;]=] [=[]=])
sida_mutation("a finished demand is still waited for" experts/residency.cpp
              [=[if (demand.waiting) --experts_[expert].awaited;]=] [=[]=])
sida_mutation("a passed layer is still announced" experts/residency.cpp
              [=[std::erase_if(state.uses, [&](const Use& use) { return use.time == use_time(number, batch.passed); });]=]
              [=[]=])
sida_mutation("demand waits behind prefetch" experts/residency.cpp
              [=[if (!expert) continue;]=]
              [=[if (auto command = prefetch()) return command;
                 if (!expert) continue;]=])
sida_mutation("a caller starves beside experts that nobody waits for" experts/residency.cpp
              [=[if (!slot && waiting && wanted) slot = evict(*wanted);]=] [=[]=])
sida_mutation("demands that nobody waits for evict each other's experts" experts/residency.cpp
              [=[if (!slot && idle) slot = evict(*idle);]=]
              [=[if (!slot && idle) slot = evict(*idle);
                 if (const auto last = last_resort_.first(); !slot && last) slot = evict(*last);]=])
sida_mutation("a prefetch evicts what is used sooner" experts/residency.cpp
              [=[if (victim) slot = evict(*victim);]=]
              [=[if (const auto first = evictable_.first()) slot = evict(*first);]=])
sida_mutation("a prefetch does not wait for a better victim" experts/residency.cpp
              [=[if (later > use || (!near && later == use && frequency < experts_[*victim].frequency)) return std::nullopt;]=] [=[]=])
sida_mutation("far layers are read early too" experts/residency.cpp
              [=[if (near && (use == never || early_prefetch_)) return victim;]=]
              [=[if ((near && use == never) || early_prefetch_) return victim;]=])
sida_mutation("nothing is read early" experts/residency.cpp
              [=[early_prefetch_ = early;]=] [=[early_prefetch_ = false;]=])
sida_mutation("the near layers are one too many" experts/residency.cpp
              [=[if (left <= ahead) return left == 0 ? 0 : use_time(number, batch.passed + static_cast<size_t>(left) - 1);]=]
              [=[if (left <= ahead) return use_time(number, batch.passed + static_cast<size_t>(left));]=])
sida_mutation("one copy too many at once" experts/residency.cpp
              [=[if (in_flight_ >= options_.lanes || committed_ - returning_ > budget_) return std::nullopt;]=]
              [=[if (in_flight_ > options_.lanes || committed_ - returning_ > budget_) return std::nullopt;]=])
sida_mutation("a stale completion is believed" experts/residency.cpp
              [=[if (expert < 0 || experts_[expert].state != State::loading) {
    fail(ErrorKind::internal, "copy_done: slot ", slot, " has no copy under way");
  }]=]
              [=[if (expert < 0) return;]=])
sida_mutation("an evicted slot stays in the index" experts/residency.cpp
              [=[expert_in_slot_[state.slot] = -1;]=] [=[state.pins = 0;]=])
sida_mutation("what is used again soonest comes in first" experts/residency.cpp
              [=[return next_use(a) > next_use(b);]=]
              [=[return next_use(a) < next_use(b);]=])
sida_mutation("a use leaves no weight" experts/residency.cpp
              [=[state.weight = clock_.used(layer, state.weight);]=] [=[]=])
sida_mutation("layers run unseen" experts/residency.cpp
              [=[clock_.run(layer, static_cast<double>(experts.size()) / options_.experts);]=] [=[]=])
sida_mutation("what is expected soonest goes first" experts/eviction.cpp
              [=[(wait < latest ||]=] [=[((MUTANT ? wait > latest : wait < latest) ||]=])
sida_mutation("the emptiest layer goes first" experts/eviction.cpp
              [=[if (its.size() < found->size() ||]=]
              [=[if ((MUTANT ? its.size() > found->size() : its.size() < found->size()) ||]=])
sida_mutation("a full layer goes though it runs next" experts/eviction.cpp
              [=[if (until <= 0.5 ||]=] [=[if ((!MUTANT && until <= 0.5) ||]=])
sida_mutation("a full layer goes though its first is wanted more" experts/eviction.cpp
              [=[|| chance(layer) > rarest) continue;]=] [=[|| (!MUTANT && chance(layer) > rarest)) continue;]=])
sida_mutation("the clock stands still" experts/residency.cpp
              [=[state.last_use = ++tick_;]=] [=[state.last_use = tick_;]=])
sida_mutation("an arrival is not told to the order of eviction" experts/residency.cpp
              [=[state.loaded = ++tick_;]=] [=[]=])
sida_mutation("a useless prefetch is not counted" experts/residency.cpp
              [=[if (state.prefetched) ++count(expert).wasted_prefetches;]=] [=[]=])
sida_mutation("experts that others compute from are handed over twice" experts/residency.cpp
              [=[demand.wanted.erase(taken, demand.wanted.end());]=] [=[]=])
sida_mutation("low-bit copies cost nothing" experts/residency.cpp
              [=[low_bit_credit_ -= price;]=] [=[]=])
sida_mutation("unused credit for low-bit copies is kept for ever" experts/residency.cpp
              [=[std::max(sum, low_bit_window)]=]
              [=[std::max(sum, (MUTANT ? 1000 : 1) * low_bit_window)]=])
sida_mutation("what a low-bit copy served is not fetched" experts/residency.cpp
              [=[if (state.state == State::absent && state.owed == 0) state.owed = ++last_owed_;]=] [=[]=])
sida_mutation("what a low-bit copy served is fetched twice" experts/residency.cpp
              [=[reindex(expert);
  state.owed = 0;]=] [=[reindex(expert);]=])
sida_mutation("a low-bit copy hides that reads fail" experts/residency.cpp
              [=[if (state.state == State::ready || state.failed || found == demand.choices.end()) continue;]=]
              [=[if (state.state == State::ready || found == demand.choices.end()) continue;]=])
sida_mutation("what a low-bit copy served is still waited for" experts/residency.cpp
              [=[if (demand.waiting) --state.awaited;
    std::erase(demand.wanted, candidate.expert);]=]
              [=[std::erase(demand.wanted, candidate.expert);]=])
sida_mutation("prefetches come before what low-bit copies served" experts/residency.cpp
              [=[if (slot) return start(to_fetch_.begin()->second, *slot, /*prefetch=*/false);]=]
              [=[if (auto command = prefetch()) return command;
                 if (slot) return start(to_fetch_.begin()->second, *slot, /*prefetch=*/false);]=])

sida_write_mutants()
