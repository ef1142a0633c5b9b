// Counters of the engine, for the whole and for each MoE layer.
#pragma once

#include <cstdint>
#include <vector>

namespace sida {

struct LayerCounters {
  int64_t requested = 0;  // demands
  int64_t unique = 0;     // distinct experts over all demands: hits + late + misses
  int64_t hits = 0;       // in memory when demanded
  int64_t late = 0;       // demanded while a copy was bringing them in
  int64_t misses = 0;     // neither
  int64_t evictions = 0;
  int64_t loads = 0;  // copies that ended well
  int64_t failed_loads = 0;
  int64_t bytes_read = 0;
  int64_t useful_prefetches = 0;     // prefetched and then demanded
  int64_t wasted_prefetches = 0;     // prefetched and evicted without a demand
  int64_t cancelled_prefetches = 0;  // announced, and passed or retired before their copy began
  double stall_seconds = 0;          // waits with nothing to compute
};

// One expert as it stands now. Python reads the places as numbers.
struct ExpertStanding {
  enum class Place : uint8_t { absent, arriving, here, in_use };
  Place place = Place::absent;
  int64_t demands = 0;  // that have wanted it since the start
};

// What reading ahead is judged by.
struct Pace {
  int64_t useful_prefetches = 0, wasted_prefetches = 0, loads = 0;
  double read_seconds = 0, stall_seconds = 0;
};

struct EngineStats {
  std::vector<LayerCounters> layers;
  std::vector<std::vector<float>> stalls;  // the latest waits of each layer, seconds, at most 4096
  int64_t peak_slots = 0;                  // slots in use at once, copies in flight included
  double read_seconds = 0;                 // of all lanes, checks included
  bool direct = false;                     // whether reads go past the page cache
  int64_t committed_slots = 0;             // that hold memory now
  int64_t lane_restarts = 0;               // lanes that died and were started again
  double verify_seconds = 0;               // of all lanes, in checksums
};

}  // namespace sida
