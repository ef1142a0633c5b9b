// The host twins of kernels/cuda/ptx.cuh: the same names and meaning, executed by the harness.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

#include "harness/half.h"
#include "kernels/cuda/numbers.h"

namespace sida::cuda {

inline unsigned char* dynamic_shared() {
  return harness::shared_memory();
}

inline void cp_async16(void* shared, const void* global, bool inside) {
  harness::cp_async16(shared, global, inside);
}
inline void cp_async_commit() {
  harness::cp_async_commit();
}
template <int newest>
inline void cp_async_wait() {
  harness::cp_async_wait(newest);
}
inline void ldmatrix4(uint32_t (&fragment)[4], const void* shared_row) {
  harness::ldmatrix4(fragment, shared_row);
}

template <class Element>
inline void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  harness::mma_m16n8k16(sums, a, b0, b1, ElementOf<Element>::dtype == DType::bf16);
}

inline float to_float(bf16 value) {
  return harness::bf16_to_float(value.bits);
}
inline float to_float(f16 value) {
  return harness::f16_to_float(value.bits);
}
inline bf16 to_bf16(float value) {
  return {harness::float_to_bf16(value)};
}
inline f16 to_f16(float value) {
  return {harness::float_to_f16(value)};
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = (static_cast<uint64_t>(high) << 32) | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = (selector >> (i * 4)) & 7;
    result |= static_cast<uint32_t>((bytes >> (from * 8)) & 0xFF) << (i * 8);
  }
  return result;
}

template <class Element, class Operation, class Round>
inline uint32_t of_pairs(uint32_t a, uint32_t b, Operation operation, Round round) {
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    const float left = to_float(Element{static_cast<uint16_t>(a >> (i * 16))});
    const float right = to_float(Element{static_cast<uint16_t>(b >> (i * 16))});
    result |= static_cast<uint32_t>(round(operation(left, right)).bits) << (i * 16);
  }
  return result;
}
inline uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  return of_pairs<bf16>(a, b, std::plus<float>(), to_bf16);
}
inline uint32_t add_f16x2(uint32_t a, uint32_t b) {
  return of_pairs<f16>(a, b, std::plus<float>(), to_f16);
}
inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  return of_pairs<bf16>(a, b, std::multiplies<float>(), to_bf16);
}
inline uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  return of_pairs<f16>(a, b, std::multiplies<float>(), to_f16);
}

}  // namespace sida::cuda
