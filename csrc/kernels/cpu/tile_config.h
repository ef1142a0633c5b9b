// The 64 bytes that LDTILECFG reads (Intel SDM volume 2, LDTILECFG; palette 1 of CPUID leaf 1DH).
#pragma once

#include <cstdint>

namespace sida::cpu {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace sida::cpu
