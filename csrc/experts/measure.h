// What the machine can do: rates measured now, for floors and for choices.
#pragma once

#include <cstdint>
#include <string>

namespace sida {

struct DiskRate {
  double bytes_per_second;
  bool direct;  // false: the file system has no O_DIRECT, the rate is the page cache's
};

// Reads a temporary file of `bytes` in `folder` (made and removed by this call) with `readers` concurrent 16 MiB reads.
DiskRate measure_disk_rate(const std::string& folder, int64_t bytes = 1ll << 30, int readers = 4);

// Bytes a second of `threads` threads that sum an array larger than any cache; the best of three passes.
double measure_memory_bandwidth(int threads, int64_t bytes = 2ll << 30);

}  // namespace sida
