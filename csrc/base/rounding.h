// Division and rounding upwards, for host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SIDA_HOST_DEVICE __host__ __device__
#else
#define SIDA_HOST_DEVICE
#endif

namespace sida {

// value >= 0, by >= 1.
SIDA_HOST_DEVICE constexpr int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}
SIDA_HOST_DEVICE constexpr int64_t round_up(int64_t value, int64_t to) {
  return divide_up(value, to) * to;
}

}  // namespace sida
