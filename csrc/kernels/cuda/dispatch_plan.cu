// Sorts the layer's (token, choice) rows by expert and cuts each expert's rows into tiles: histogram, exclusive scan
// and tile list in one launch of one block, so that neither the host nor another kernel is waited for.
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/routed_row.cuh"
#include "kernels/cuda/warp_rank.cuh"

namespace sida::cuda {

namespace {

constexpr int no_row = 0x7fffffff;

__device__ inline int inclusive_warp_sum(int value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(all_lanes, value, static_cast<unsigned>(step));
    if (lane >= step) value += other;
  }
  return value;
}

// The expert of `row`, or -1 if the row has none here; notes the lowest rows with a wrong value or a missing expert.
__device__ inline int resident_expert(const PlanParams& p, int row, int& wrong_row, int& missing_row) {
  if (row >= p.rows) return -1;
  const RoutedRow routed = locate_expert(p.routing, row);
  if (routed.found == Found::wrong) wrong_row = min(wrong_row, row);
  if (routed.found == Found::missing) missing_row = min(missing_row, row);
  return routed.found == Found::resident ? routed.expert : -1;
}

}  // namespace

// One block a multiprocessor is asked for: left to itself the compiler makes room for two, and spills.
__global__ void __launch_bounds__(1024, 1) dispatch_plan_kernel(const PlanParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int warp = thread / 32, lane = thread % 32;
  const int experts = p.routing.num_experts;
  int* counts = reinterpret_cast<int*>(dynamic_shared());  // [warps][experts]
  int* totals = counts + p.warps * experts;                // [experts]
  int* first_position = totals + experts;                  // [experts]
  int* first_tile = first_position + experts;              // [experts]
  int* warp_counts = counts + warp * experts;

  for (int i = thread; i < p.warps * experts; i += threads) counts[i] = 0;
  for (int i = thread; i < p.counter_count; i += threads) p.counters[i] = 0;
  __syncthreads();

  const Segment segment = segment_of_warp(p.rows, warp, p.warps);
  int wrong_row = no_row, missing_row = no_row;
  for (int first = segment.begin; first < segment.end; first += 32) {
    count_key(warp_counts, resident_expert(p, first + lane, wrong_row, missing_row));
  }
  if (p.error_rows != nullptr) {
    if (wrong_row != no_row) atomicMin(&p.error_rows[0], wrong_row);
    if (missing_row != no_row) atomicMin(&p.error_rows[1], missing_row);
  }
  __syncthreads();

  scan_over_warps(counts, experts, p.warps, [&](int expert, int total) { totals[expert] = total; });
  __syncthreads();

  if (warp == 0) {
    int positions = 0, tiles = 0;
    for (int first = 0; first < experts; first += 32) {
      const int expert = first + lane;
      const int total = expert < experts ? totals[expert] : 0;
      const int own_tiles = (total + p.block_t - 1) / p.block_t;
      const int position_end = inclusive_warp_sum(total);
      const int tile_end = inclusive_warp_sum(own_tiles);
      if (expert < experts) {
        first_position[expert] = positions + position_end - total;
        first_tile[expert] = tiles + tile_end - own_tiles;
      }
      positions += __shfl_sync(all_lanes, position_end, 31);
      tiles += __shfl_sync(all_lanes, tile_end, 31);
    }
    if (lane == 0) *p.plan.tile_count = tiles;
  }
  __syncthreads();

  for (int expert = thread; expert < experts; expert += threads) {
    const int slot = p.routing.slot_of_expert == nullptr ? 0 : p.routing.slot_of_expert[expert];
    for (int done = 0; done < totals[expert]; done += p.block_t) {
      p.plan.tiles[first_tile[expert] + done / p.block_t] = {max(slot, 0), first_position[expert] + done,
                                                             min(totals[expert] - done, p.block_t), 0};
    }
  }
  for (int first = segment.begin; first < segment.end; first += 32) {
    const int expert = resident_expert(p, first + lane, wrong_row, missing_row);
    const int rank = count_key(warp_counts, expert);
    if (expert >= 0) p.plan.row_of_position[first_position[expert] + rank] = first + lane;
  }
}

}  // namespace sida::cuda
