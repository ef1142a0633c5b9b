// Random programs of fills and readers over CudaSlots on the recording runtime.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "recording_runtime.h"

namespace sida::cuda_test {

constexpr size_t slot_bytes = 64;

struct Program {
  int slots = 3, lanes = 2, streams = 2, steps = 60;
  // Whether what was copied into a slot may be overwritten once the slot's memory was given back.
  bool reuse_given_back = true;
  uint64_t seed = 1;
};

// What a recorded program wanted: the value that each kernel must have seen in each slot it read.
struct Wanted {
  std::vector<std::unique_ptr<std::vector<uint8_t>>> seen;  // one buffer for each kernel, slot by slot
  std::vector<std::vector<uint8_t>> expected;
};

// Records a random program as a transfer engine makes it: sources in a few pinned buffers that are filled again once
// they are free, slots filled and read by kernels on the caller's streams, also read twice, by both streams, or not at
// all.
void record(Recording& recording, const Program& program, Wanted& wanted);

bool as_wanted(const Wanted& wanted);

}  // namespace sida::cuda_test
