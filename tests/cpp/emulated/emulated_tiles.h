// The tile instructions of AMX in plain code, in place of csrc/kernels/cpu/amx_tiles.h: what they compute, and where
// they fault (Intel SDM volume 2: LDTILECFG, TILELOADD, TILEZERO, TDPBF16PS, TILESTORED, TILERELEASE; the conditions of
// exceptions are in each one's section and in volume 2, 2.10, exception classes AMX-E1 to AMX-E6).
//
// A fault is recorded and the instruction does nothing: a thread of a pool has nobody to throw to.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/tile_config.h"

namespace sida::test {

// The eight tiles of one thread.
class TileUnit {
 public:
  static constexpr int tiles = 8, max_rows = 16, max_row_bytes = 64;

  void configure(const cpu::TileConfig& config);
  void release();
  void zero(int tile);
  void load(int tile, const void* from, int64_t stride);
  void store(int tile, void* to, int64_t stride);
  void multiply_add(int sum, int a, int b);
  bool is_configured() const { return is_configured_; }

 private:
  struct Tile {
    int rows = 0, row_bytes = 0;
    alignas(64) unsigned char data[max_rows][max_row_bytes] = {};
  };

  bool is_usable(int tile, const char* instruction);

  bool is_configured_ = false;
  Tile tile_[tiles];
};

// The calling thread's.
TileUnit& tile_unit();

// From now on, a load that begins within these bytes and does not end within them is a fault.
void watch_loads_from(const void* data, int64_t bytes);

// What faulted in any thread since the last call, and a note for each thread that ended with its tiles configured.
std::vector<std::string> take_faults();

struct EmulatedTiles {
  static void configure(const cpu::TileConfig& config) { tile_unit().configure(config); }
  static void release() { tile_unit().release(); }
  template <int tile>
  static void zero() {
    tile_unit().zero(tile);
  }
  template <int tile>
  static void load(const void* from, int64_t stride) {
    tile_unit().load(tile, from, stride);
  }
  template <int tile>
  static void store(void* to, int64_t stride) {
    tile_unit().store(tile, to, stride);
  }
  template <int sum, int a, int b>
  static void multiply_add() {
    tile_unit().multiply_add(sum, a, b);
  }
};

}  // namespace sida::test
