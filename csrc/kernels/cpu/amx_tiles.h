// The tile instructions of AMX (Intel SDM volume 2: LDTILECFG, TILELOADD, TILEZERO, TDPBF16PS, TILESTORED,
// TILERELEASE).
//
// Written as assembly, not as the compiler's intrinsics: those take literal tile numbers only, and GCC 12's TILELOADD
// does not say that it reads memory, so that a store to what it loads could be dropped or come after it.
#pragma once

#include "kernels/cpu/tile_config.h"

namespace sida::cpu {
namespace {

struct AmxTiles {
  [[gnu::always_inline]] static void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  // Gives the registers back: while they hold nothing, the system need not save them.
  [[gnu::always_inline]] static void release() { asm volatile("tilerelease"); }
  template <int tile>
  [[gnu::always_inline]] static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  // Row i of the tile from `from` + i * stride bytes.
  template <int tile>
  [[gnu::always_inline]] static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
  }
  template <int tile>
  [[gnu::always_inline]] static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(stride) : "memory");
  }
  // sum += a * b: sum[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1] over all k.
  template <int sum, int a, int b>
  [[gnu::always_inline]] static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
  }
};

}  // namespace
}  // namespace sida::cpu
