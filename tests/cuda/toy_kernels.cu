// The harness's own test kernels; compiled and instrumented like the real ones.
#include "toy_kernels.h"

#include "kernels/cuda/expert_gemm.cuh"

namespace sida::cuda_test {

using namespace sida::cuda;

// 0: reverse through shared memory; 1: without the barrier; 2: half of the block at the barrier, the rest ended;
// 3: reads one word that nobody wrote; 4: writes past the end; 5: two threads write the same word;
// 6: a second round without a barrier before it overwrites what others still read; 7: a 16-byte store one word late;
// 8: reads the word before shared memory; 9: reads a word past its end; 10: half of the block waits at one barrier,
// half at another of the same warp's operations.
__global__ void barrier_kernel(ToyParams p) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (p.variant == 2 && thread >= threads / 2) return;
  if (p.variant == 7) {
    *reinterpret_cast<float4*>(shared + 1) = make_float4(0, 0, 0, 0);
    return;
  }
  if (p.variant == 8 || p.variant == 9) {
    p.out[thread] = shared[p.variant == 8 ? -1 : threads];
    return;
  }
  if (p.variant == 10) {
    if (thread % 2 == 0) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    return;
  }
  if (p.variant != 3 || thread != 5)
    shared[p.variant == 5 ? thread / 2 : thread + (p.variant == 4 ? 1 : 0)] = p.in[thread];  // the first write
  if (p.variant == 5) return;
  if (p.variant != 1) __syncthreads();
  p.out[thread] = shared[threads - 1 - thread];  // the read
  if (p.variant == 6) shared[thread] = 0;        // the second write
}

// One warp. 0: neighbours exchange through shared memory with __syncwarp; 1: without it; 2: a shuffle that lane 3 does
// not reach; 3: lanes with different masks; 4: shuffle and match results; 5: __syncwarp where other *warps* read.
__global__ void warp_kernel(ToyParams p) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  if (p.variant == 4) {
    const int up = __shfl_up_sync(0xffffffffu, thread, 3u);
    const int swapped = __shfl_xor_sync(0xffffffffu, thread, 1);
    const unsigned peers = __match_any_sync(0xffffffffu, thread % 5);
    const unsigned votes = __ballot_sync(0xffffffffu, thread % 3 == 0);
    p.out[thread] = up * 1000000 + swapped * 1000 + __popc(peers) * 10 + static_cast<int>(votes >> thread & 1u);
    return;
  }
  if (p.variant == 2 && thread == 3) return;
  if (p.variant == 3) {
    p.out[thread] = __shfl_sync(thread < 16 ? 0xffffffffu : 0xffff0000u, thread, 20);
    return;
  }
  if (p.variant == 2) {
    p.out[thread] = __shfl_sync(0xffffffffu, thread, 0);
    return;
  }
  shared[thread] = thread * 7;
  if (p.variant != 1) __syncwarp();
  const int threads = static_cast<int>(blockDim.x);
  p.out[thread] = shared[p.variant == 5 ? (thread + 32) % threads : thread ^ 1];
}

// 0: cp.async, wait, barrier, read; 1: read before the wait; 2: wait for all but one of two groups, read both;
// 3: no barrier after the wait; 4: overwrites the target while the copy is under way; 5: a misaligned source;
// 6: 16 zeros where `inside` is false; 7: source past the buffer; 8: ends with a copy that nobody waited for.
__global__ void copy_kernel(ToyParams p) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int* source = p.in + thread * 4 + (p.variant == 5 ? 1 : p.variant == 7 ? 4 : 0);
  cp_async16(shared + thread * 4, source, p.variant != 6 || thread % 2 == 0);
  cp_async_commit();
  if (p.variant == 8) return;
  if (p.variant == 4) shared[thread * 4 + 1] = 5;
  cp_async16(shared + (threads + thread) * 4, p.in + thread * 4, true);
  cp_async_commit();
  if (p.variant == 2) {
    cp_async_wait<1>();
  } else if (p.variant != 1) {
    cp_async_wait<0>();
  }
  if (p.variant != 3) __syncthreads();
  const int from = threads - 1 - thread;
  p.out[thread] = shared[from * 4 + 2] + (p.variant == 6 ? 0 : shared[(threads + from) * 4 + 3]);
  if (p.variant == 1 || p.variant == 2) cp_async_wait<0>();
}

// 0: copies; 1: writes its input; 2: reads past it; 3: a 16-byte load one word late; 4: reads its own output before it
// wrote it; 5: copies 32-byte pieces past the end; 6: null.
__global__ void global_kernel(ToyParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  if (p.variant == 1) p.in[thread] = 1;
  if (p.variant == 3) {
    *reinterpret_cast<float4*>(p.out + thread / 4 * 4) = *reinterpret_cast<const float4*>(p.in + thread / 4 * 2 + 1);
    return;
  }
  if (p.variant == 4) p.out[thread] += 1;
  if (p.variant == 5) {
    *reinterpret_cast<Eight<int32_t>*>(p.out + thread * 8) =
        *reinterpret_cast<const Eight<int32_t>*>(p.in + thread * 8);
    return;
  }
  const int* in = p.variant == 6 ? nullptr : p.in;
  p.out[thread] = in[thread + (p.variant == 2 ? 1 : 0)];
}

// Blocks leave a value each; the last one adds them. 0: right; 1: without a fence; 2: every block adds; 3: the value is
// written after the announcement; 4: the counter is read again instead of the atomic's result; 5: no barrier between
// the threads' writes and the announcement.
__global__ void ticket_kernel(ToyParams p) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (p.variant != 3) p.out[(1 + block) * threads + thread] = block + thread;
  if (p.variant != 1) __threadfence();
  if (p.variant != 5) __syncthreads();
  if (thread == 0) {
    shared[0] = atomicAdd(p.in, 1);
    if (p.variant == 4) shared[0] = *p.in - 1;
  }
  if (p.variant == 3) p.out[(1 + block) * threads + thread] = block + thread;
  __syncthreads();
  if (p.variant != 2 && shared[0] != blocks - 1) return;
  int sum = 0;
  for (int i = 1; i <= blocks; ++i) sum += p.out[i * threads + thread];
  p.out[thread] = sum;
}

// Every thread takes a number before a barrier and one behind it: the schedule, for all to see.
__global__ void order_kernel(ToyParams p) {
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  p.out[thread * 2] = atomicAdd(p.in, 1);
  __syncthreads();
  p.out[thread * 2 + 1] = atomicAdd(p.in, 1);
}

// Loads four matrices of numbered elements and stores every lane's registers.
__global__ void ldmatrix_kernel(ToyParams p) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) {
    const uint32_t first = static_cast<uint32_t>(lane * 8 + i * 2);  // row `lane`, elements 2 i and 2 i + 1
    shared[lane * 4 + i] = first | (first + 1) << 16;
  }
  __syncwarp();
  uint32_t fragment[4];
  const uint32_t* const row = p.variant == 1   ? shared + lane * 4 + 1     // misaligned
                              : p.variant == 2 ? shared + lane * 4 + 4     // the last row was never written
                              : p.variant == 3 ? shared + lane * 4 + 1024  // past shared memory
                                               : shared + lane * 4;
  ldmatrix4(fragment, row);
  for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = static_cast<int>(fragment[i]);
}

// One product of small integers: A in in[0, 256), B in in[256, 384) as [k][n], C to out[16][8].
template <class Element>
__device__ void multiply(const ToyParams& p) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto pair_of = [&](int low, int high) {
    return static_cast<uint32_t>(from_float<Element>(static_cast<float>(p.in[low])).bits) |
           static_cast<uint32_t>(from_float<Element>(static_cast<float>(p.in[high])).bits) << 16;
  };
  // PTX ISA's figures for mma.m16n8k16, read off lane by lane: lane 0's A registers are rows 0, 8, 0, 8 at columns 0-1,
  // 0-1, 8-9, 8-9; lane 31's are rows 7, 15, 7, 15 at columns 6-7, 6-7, 14-15, 14-15.
  const int row = lane >> 2, column = (lane & 3) << 1;
  const auto a_at = [&](int r, int c) { return pair_of(r * 16 + c, r * 16 + c + 1); };
  const uint32_t a[4] = {a_at(row, column), a_at(row + 8, column), a_at(row, column + 8), a_at(row + 8, column + 8)};
  const auto b_at = [&](int k) { return pair_of(256 + k * 8 + row, 256 + (k + 1) * 8 + row); };
  float sums[4] = {1, 2, 3, 4};
  mma_m16n8k16<Element>(sums, a, b_at(column), b_at(column + 8));
  p.out[row * 8 + column] = static_cast<int>(sums[0]);
  p.out[row * 8 + column + 1] = static_cast<int>(sums[1]);
  p.out[(row + 8) * 8 + column] = static_cast<int>(sums[2]);
  p.out[(row + 8) * 8 + column + 1] = static_cast<int>(sums[3]);
}

// 0: bf16; 1: fp16.
__global__ void mma_kernel(ToyParams p) {
  if (p.variant == 0) {
    multiply<bf16>(p);
  } else {
    multiply<f16>(p);
  }
}

// All 256 bytes through the in-register widening: 0 bf16, 1 fp16.
__global__ void widen_kernel(ToyParams p) {
  for (int i = 0; i < 2; ++i) {
    const uint32_t first = static_cast<uint32_t>(threadIdx.x * 8 + static_cast<unsigned>(i) * 4);
    uint32_t pair[2];
    const uint32_t bytes = (first & 255) | (first + 1) << 8 | (first + 2) << 16 | (first + 3) << 24;
    if (p.variant == 0) {
      widen(bytes, bf16{}, pair[0], pair[1]);
    } else {
      widen(bytes, f16{}, pair[0], pair[1]);
    }
    for (uint32_t j = 0; j < 4; ++j) {
      const auto bits = static_cast<uint16_t>(pair[j / 2] >> (j % 2 * 16));
      p.out[first + j] = static_cast<int>(p.variant == 0 ? to_float(bf16{bits}) : to_float(f16{bits}));
    }
  }
}

}  // namespace sida::cuda_test
