# Bugs planted in a copy of residency.cpp, one at a time: the simulator must find each. A mutation replaces a piece of
# text that stands exactly once in the source by one that is wrong while `mutation` has its number.
set(sida_mutant_source "")
set(sida_mutant_names "")
set(sida_mutant_count 0)
file(READ ${PROJECT_SOURCE_DIR}/csrc/experts/residency.cpp sida_mutant_source)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/experts/residency.cpp)

# right: a statement; wrong: what stands in its place in the mutant.
macro(sida_mutation name right wrong)
  string(FIND "${sida_mutant_source}" "${right}" first)
  string(FIND "${sida_mutant_source}" "${right}" last REVERSE)
  if(first EQUAL -1 OR NOT first EQUAL last)
    message(FATAL_ERROR "mutation ${name}: its text must stand exactly once in residency.cpp: ${right}")
  endif()
  math(EXPR sida_mutant_count "${sida_mutant_count} + 1")
  string(REPLACE "${right}" "if (::sida::test::mutation == ${sida_mutant_count}) { ${wrong} } else { ${right} }"
         sida_mutant_source "${sida_mutant_source}")
  string(APPEND sida_mutant_names "\"${name}\",\n")
endmacro()

sida_mutation("a release is forgotten" [=[--experts_[expert].pins;]=] [=[]=])
sida_mutation("an expert is handed out without a pin" [=[++state.pins;]=] [=[]=])
sida_mutation("the budget is off by one" [=[if (!may_commit()) return -1;]=] [=[if (committed_ > budget_) return -1;]=])
sida_mutation("a shrunk budget keeps one slot too many" [=[budget_ = slots;]=]
              [=[budget_ = slots < budget_ ? slots + 1 : slots;]=])
sida_mutation("a slot given back is reused before it is back" [=[returning_ -= slots;]=]
              [=[returning_ -= slots; returning_ += slots - 1;]=])
sida_mutation("a failed copy keeps its slot" [=[warm_.insert(slot);]=] [=[]=])
sida_mutation("a failed copy is taken for a good one" [=[state.failed = true;]=] [=[]=])
sida_mutation("a failure is told to nobody" [=[if (!demand.failure) demand.failure = failure;]=] [=[]=])
sida_mutation("a finished demand still wants its experts" [=[--experts_[expert].wanted;]=] [=[]=])
sida_mutation("a finished demand is still waited for" [=[if (demand.waiting) --experts_[expert].awaited;]=] [=[]=])
sida_mutation("a passed layer is still announced"
              [=[std::erase_if(state.uses, [&](const Use& use) { return use.time == use_time(number, batch.passed); });]=]
              [=[]=])
sida_mutation("demand waits behind prefetch"
              [=[if (auto command = serve_demands(waiting, &blocked)) return command;]=]
              [=[if (auto command = prefetch()) return command;
                 if (auto command = serve_demands(waiting, &blocked)) return command;]=])
sida_mutation("a caller starves beside experts that nobody waits for"
              [=[if (slot < 0 && waiting && !last_resort_.empty()) slot = evict(last_resort_.first());]=] [=[]=])
sida_mutation("demands that nobody waits for evict each other's experts"
              [=[if (slot < 0 && !evictable_.empty()) slot = evict(evictable_.first());]=]
              [=[if (slot < 0 && !evictable_.empty()) slot = evict(evictable_.first());
                 if (slot < 0 && !last_resort_.empty()) slot = evict(last_resort_.first());]=])
sida_mutation("a prefetch evicts what is used sooner"
              [=[if (victim >= 0) slot = evict(victim);]=]
              [=[if (!evictable_.empty()) slot = evict(evictable_.first());]=])
sida_mutation("a prefetch does not wait for a better victim"
              [=[if (later > use || (!near && later == use && frequency < experts_[victim].frequency)) return -1;]=] [=[]=])
sida_mutation("the near layers are one too many"
              [=[if (left <= ahead) return left == 0 ? 0 : use_time(number, batch.passed + static_cast<size_t>(left) - 1);]=]
              [=[if (left <= ahead) return use_time(number, batch.passed + static_cast<size_t>(left));]=])
sida_mutation("one copy too many at once"
              [=[if (in_flight_ >= options_.copies || committed_ - returning_ > budget_) return std::nullopt;]=]
              [=[if (in_flight_ > options_.copies || committed_ - returning_ > budget_) return std::nullopt;]=])
sida_mutation("a stale completion is believed"
              [=[if (expert < 0 || experts_[expert].state != State::loading) {
    fail(ErrorKind::internal, "copy_done: slot ", slot, " has no copy under way");
  }]=]
              [=[if (expert < 0) return;]=])
sida_mutation("an evicted slot stays in the index" [=[expert_in_slot_[state.slot] = -1;]=] [=[state.pins = 0;]=])
sida_mutation("what is used again soonest comes in first" [=[return next_use(a) > next_use(b);]=]
              [=[return next_use(a) < next_use(b);]=])
sida_mutation("the clock stands still" [=[state.last_use = ++tick_;]=] [=[state.last_use = tick_;]=])
sida_mutation("an arrival is not told to the order of eviction" [=[state.loaded = ++tick_;]=] [=[]=])
sida_mutation("a useless prefetch is not counted" [=[if (state.prefetched) ++count(expert).wasted_prefetches;]=] [=[]=])
sida_mutation("experts that others compute from are handed over twice"
              [=[demand.wanted.erase(taken, demand.wanted.end());]=] [=[]=])

file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/residency_mutants.cpp @ONLY CONTENT [=[
// Made by tests/cpp/mutants/mutations.cmake.
namespace sida::test {
int mutation = 0;
extern const char* const mutation_names[] = {"the code as it is",
@sida_mutant_names@};
extern const int mutations = @sida_mutant_count@;
}
@sida_mutant_source@]=])
