// Counts and ranks keys (experts) in order, one contiguous segment of items for each warp, without atomics: every warp
// has counters of its own, and within a step of 32 items __match_any_sync finds the lanes with equal keys. The rank
// of an item therefore depends on its place alone, never on timing.
#pragma once

#include "kernels/cuda/ptx.cuh"

namespace sida::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

// The items [begin, end) of one warp; begin is a multiple of 32.
struct Segment {
  int begin, end;
};

__device__ inline Segment segment_of_warp(int items, int warp, int warps) {
  const int steps = (items + 31) / 32;
  const int each = (steps + warps - 1) / warps * 32;
  const int begin = min(warp * each, items);
  return {begin, min(begin + each, items)};
}

// Adds each lane's key (-1: none) to the warp's counters; returns the key's count before this lane's item.
// All lanes of the warp call it together.
__device__ inline int count_key(int* warp_counts, int key) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned peers = __match_any_sync(all_lanes, key);
  const int rank = __popc(peers & ((1u << lane) - 1));
  const int before = key >= 0 ? warp_counts[key] : 0;
  __syncwarp();
  if (key >= 0 && rank == 0) warp_counts[key] = before + __popc(peers);
  __syncwarp();
  return before + rank;
}

// Turns counts[warp][key] into the number of equal keys in earlier warps' segments, for the keys of this thread;
// calls total(key, count of all warps). A barrier is needed before and after.
template <class Total>
__device__ inline void scan_over_warps(int* counts, int keys, int warps, Total&& total) {
  for (int key = static_cast<int>(threadIdx.x); key < keys; key += static_cast<int>(blockDim.x)) {
    int running = 0;
    for (int warp = 0; warp < warps; ++warp) {
      const int count = counts[warp * keys + key];
      counts[warp * keys + key] = running;
      running += count;
    }
    total(key, running);
  }
}

}  // namespace sida::cuda
