// Counters of the engine, for the whole and for each MoE layer.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

namespace sida {

struct LayerCounters {
  int64_t requested = 0;
  int64_t unique = 0;
  int64_t hits = 0;
  int64_t late = 0;
  int64_t misses = 0;
  int64_t evictions = 0;
  int64_t loads = 0;
  int64_t failed_loads = 0;
  int64_t bytes_read = 0;
  int64_t useful_prefetches = 0;
  int64_t wasted_prefetches = 0;
  int64_t cancelled_prefetches = 0;
  int64_t choices = 0;
  int64_t low_bit_choices = 0;
  int64_t named = 0;
  int64_t named_wanted = 0;
  double stall_seconds = 0;
};

struct EngineCounters {
  int64_t peak_slots = 0;
  int64_t committed_slots = 0;
  int64_t lane_restarts = 0;
  double read_seconds = 0;
  double verify_seconds = 0;
};

// One counter: its name, what it counts, and the member that holds it.
template <class Struct, class Number>
struct Counter {
  const char* name;
  const char* text;
  Number Struct::* member;
};

// The lists of counters. Bindings, statistics in Python, metrics and tests take names and texts from here.
inline constexpr std::tuple layer_counters{
    Counter{"requested", "MoE layers computed", &LayerCounters::requested},
    Counter{"unique", "Distinct experts wanted: hits + late + misses", &LayerCounters::unique},
    Counter{"hits", "Experts that were in memory when they were wanted", &LayerCounters::hits},
    Counter{"late", "Experts wanted while they were being read", &LayerCounters::late},
    Counter{"misses", "Experts wanted that nobody was reading", &LayerCounters::misses},
    Counter{"evictions", "Experts evicted", &LayerCounters::evictions},
    Counter{"loads", "Reads of an expert that ended well", &LayerCounters::loads},
    Counter{"failed_loads", "Reads of an expert that failed", &LayerCounters::failed_loads},
    Counter{"bytes_read", "Bytes read from the expert store", &LayerCounters::bytes_read},
    Counter{"useful_prefetches", "Experts read ahead and then wanted", &LayerCounters::useful_prefetches},
    Counter{"wasted_prefetches", "Experts read ahead and evicted unused", &LayerCounters::wasted_prefetches},
    Counter{"cancelled_prefetches", "Predicted experts whose read never began", &LayerCounters::cancelled_prefetches},
    Counter{"choices", "Choices of an expert by a token, computed on the CPU", &LayerCounters::choices},
    Counter{"low_bit_choices", "Those of them that a low-bit copy served, for the expert was not there",
            &LayerCounters::low_bit_choices},
    Counter{"named", "Experts that a batch's table had named of a layer that ran", &LayerCounters::named},
    Counter{"named_wanted", "Named experts that the layer wanted", &LayerCounters::named_wanted},
    Counter{"stall_seconds", "Seconds in which the computation waited with nothing to do",
            &LayerCounters::stall_seconds},
};
inline constexpr std::tuple engine_counters{
    Counter{"peak_slots", "Most slots in use at once, reads under way included", &EngineCounters::peak_slots},
    Counter{"committed_slots", "Slots that hold memory now, reads under way included",
            &EngineCounters::committed_slots},
    Counter{"lane_restarts", "Lanes that died and were started again", &EngineCounters::lane_restarts},
    Counter{"read_seconds", "Seconds of all lanes in reads, checks included", &EngineCounters::read_seconds},
    Counter{"verify_seconds", "Seconds of all lanes in checksums", &EngineCounters::verify_seconds},
};

// Calls visit(counter) for each of a list.
template <class List, class Visit>
constexpr void for_each_counter(const List& list, const Visit& visit) {
  std::apply([&](const auto&... counter) { (visit(counter), ...); }, list);
}

template <class Struct, class List>
constexpr bool counts_all(const List&) {
  return sizeof(Struct) == std::tuple_size_v<List> * sizeof(int64_t);  // every counter has 8 bytes
}
static_assert(counts_all<LayerCounters>(layer_counters), "a member of LayerCounters is not in its list");
static_assert(counts_all<EngineCounters>(engine_counters), "a member of EngineCounters is not in its list");

// One expert as it stands now. Python reads the places as numbers.
struct ExpertStanding {
  enum class Place : uint8_t { absent, arriving, here, in_use };
  Place place = Place::absent;
  int64_t demands = 0;  // that have wanted it since the start
};

// What reading ahead is judged by.
struct Pace {
  int64_t useful_prefetches = 0, wasted_prefetches = 0, loads = 0;
  int64_t named = 0, named_wanted = 0;
  double read_seconds = 0, stall_seconds = 0;
};

// What the counters say of it; the seconds are for those who measure them.
inline Pace pace_of(const std::vector<LayerCounters>& layers) {
  Pace pace;
  for (const LayerCounters& layer : layers) {
    pace.useful_prefetches += layer.useful_prefetches;
    pace.wasted_prefetches += layer.wasted_prefetches;
    pace.loads += layer.loads;
    pace.named += layer.named;
    pace.named_wanted += layer.named_wanted;
  }
  return pace;
}

// Since the start or the last reset, but for `committed_slots`.
struct EngineStats : EngineCounters {
  std::vector<LayerCounters> layers;
  std::vector<std::vector<float>> stalls;  // the latest waits of each layer, seconds, at most 4096
  bool direct = false;                     // whether reads go past the page cache
};

}  // namespace sida
