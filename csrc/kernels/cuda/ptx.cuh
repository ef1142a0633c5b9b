// One small function for each PTX instruction that the kernels use. The harness replaces this file by host twins
// with the same names (tests/cuda/harness/ptx_twins.h), so nothing else in this folder may contain assembly.
#pragma once

#ifdef SIDA_HARNESS
#include "harness/ptx_twins.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/numbers.h"

namespace sida::cuda {

// The block's dynamic shared memory, the only kind that these kernels use.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char sida_dynamic_shared[];
  return sida_dynamic_shared;
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts copying 16 bytes from global to shared memory; where `inside` is false, 16 zero bytes are written instead
// and `global` is not read (it must still be a valid address).
__device__ inline void cp_async16(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}

__device__ inline void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `newest` of this thread's committed groups are unfinished.
template <int newest>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8; register j then holds elements
// 2 * (l % 4) and the next of row l / 4 of matrix j.
__device__ inline void ldmatrix4(uint32_t (&fragment)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// sums[16 x 8] += a[16 x 16] * b[16 x 8], fp32 sums. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16
// with floating point type". With group = lane / 4 and pair = lane % 4: a[0] holds row group, columns 2 * pair and the
// next; a[1] row group + 8; a[2] and a[3] the same rows, columns + 8; b0 rows 2 * pair and the next of column group,
// b1 rows + 8; sums[0..1] row group, columns 2 * pair and the next, sums[2..3] row group + 8.
template <class Element>
__device__ inline void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma_m16n8k16<bf16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma_m16n8k16<f16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Byte n of the result is byte `selector` nibble n of the eight bytes {high, low}.
__device__ inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// Two bf16 sums a + b in one instruction. (add.bf16x2 begins with sm_90, fma.rn.bf16x2 with sm_80.)
__device__ inline uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
  return sum;
}

__device__ inline uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

// Two bf16 products a * b in one instruction. Subnormal numbers count. (mul.bf16x2 begins with sm_90.)
__device__ inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}

__device__ inline uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

__device__ inline float to_float(f16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

__device__ inline f16 to_f16(float value) {
  f16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
}

__device__ inline bf16 to_bf16(float value) {
  bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
}

__device__ inline float to_float(bf16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

}  // namespace sida::cuda

#endif  // SIDA_HARNESS
