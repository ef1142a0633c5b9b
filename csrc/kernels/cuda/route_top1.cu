// Top-1 routing with an expert capacity in one launch, a block for each sequence: softmax in fp32, rounded to the
// given type *before* the maximum is taken (so that ties fall as in transformers 5), then the tokens of each expert
// are counted in their order, and those beyond the capacity get expert -1 and keep their gate.
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/warp_rank.cuh"

namespace sida::cuda {

namespace {

struct Best {
  float probability;
  int expert;
};

// The larger probability, the lower expert among equals.
__device__ inline Best better(const Best& a, const Best& b) {
  if (a.probability != b.probability) return a.probability > b.probability ? a : b;
  return a.expert < b.expert ? a : b;
}

// The most probable expert of one token; the whole warp works on it and every lane gets the result.
__device__ inline Best best_expert(const RouteParams& p, int64_t first_logit) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float largest = -INFINITY;
  for (int expert = lane; expert < p.experts; expert += 32) {
    largest = fmaxf(largest, load_element(p.logits, first_logit + expert, p.dtype));
  }
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, step));
  float sum = 0.0f;
  for (int expert = lane; expert < p.experts; expert += 32) {
    sum += expf(load_element(p.logits, first_logit + expert, p.dtype) - largest);
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(all_lanes, sum, step);
  // A NaN or an infinite logit makes every probability NaN, and the first of equals is expert 0.
  if (isnan(sum)) return {sum, 0};
  Best best{-1.0f, p.experts};
  for (int expert = lane; expert < p.experts; expert += 32) {
    const float probability = expf(load_element(p.logits, first_logit + expert, p.dtype) - largest) / sum;
    best = better(best, {round_to(probability, p.rounded), expert});
  }
  for (int step = 16; step > 0; step /= 2) {
    best = better(best,
                  {__shfl_xor_sync(all_lanes, best.probability, step), __shfl_xor_sync(all_lanes, best.expert, step)});
  }
  return best;
}

}  // namespace

// One block a multiprocessor is asked for: left to itself the compiler makes room for two, and spills.
__global__ void __launch_bounds__(1024, 1) route_top1_kernel(const RouteParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int warp = thread / 32, lane = thread % 32;
  const int64_t sequence = static_cast<int64_t>(blockIdx.x) * p.length;
  int* counts = reinterpret_cast<int*>(dynamic_shared());  // [warps][experts]

  for (int i = thread; i < p.warps * p.experts; i += threads) counts[i] = 0;
  for (int token = warp; token < p.length; token += p.warps) {
    const Best best = best_expert(p, (sequence + token) * p.experts);
    if (lane == 0) {
      p.expert_index[sequence + token] = best.expert;
      p.gate[sequence + token] = best.probability;
    }
  }
  __syncthreads();

  const Segment segment = segment_of_warp(p.length, warp, p.warps);
  for (int first = segment.begin; first < segment.end; first += 32) {
    const int token = first + lane;
    count_key(counts + warp * p.experts, token < p.length ? p.expert_index[sequence + token] : -1);
  }
  __syncthreads();
  scan_over_warps(counts, p.experts, p.warps, [](int, int) {});
  __syncthreads();
  for (int first = segment.begin; first < segment.end; first += 32) {
    const int token = first + lane;
    const int expert = token < p.length ? p.expert_index[sequence + token] : -1;
    const int rank = count_key(counts + warp * p.experts, expert);
    if (expert >= 0 && rank >= p.capacity) p.expert_index[sequence + token] = -1;
  }
}

}  // namespace sida::cuda
