// What the machine can do: rates measured now, for floors and for choices.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sida {

struct DiskRate {
  double bytes_per_second;
  bool direct;  // false: the file system has no O_DIRECT, the rate is the page cache's
};

// Reads a temporary file of `bytes` (at least 16 MiB for each reader) in `folder`, made and removed by this call, with
// `readers` concurrent 16 MiB reads. How much the folder and memory have room for is the caller's to know. Throws
// Error(io) with the system's reason.
DiskRate measure_disk_rate(const std::string& folder, int64_t bytes = 1ll << 30, int readers = 4);

struct ReadRate {
  int64_t read_bytes;  // of each read
  int lanes;           // threads that each read and check one piece after the other
  double bytes_per_second;
};

struct ReadRates {
  std::vector<ReadRate> rates;  // in the order of measuring, the cheapest first; without what there was no time for
  bool direct;                  // false: the file system has no O_DIRECT, the rates are the page cache's
  double seconds;               // that all of it took
};

// What lanes get from the disk of an existing file, for some numbers of lanes and read sizes: reads at random places
// past the page cache, checksums as in a load. Takes about `seconds`, whatever the disk: a pair whose first reads would
// not end in time is left out. The file must have at least 64 MiB.
ReadRates measure_read_rates(const std::string& path, double seconds);

// Bytes a second of `threads` threads that sum an array larger than any cache; the best of three passes.
double measure_memory_bandwidth(int threads, int64_t bytes = 2ll << 30);

}  // namespace sida
