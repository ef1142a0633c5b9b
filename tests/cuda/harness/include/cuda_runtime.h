// Stands for the CUDA runtime's header when the harness compiles the kernels as host C++: the same names, executed by
// harness.cpp on the CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "harness/harness.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

using std::isnan;

// Vectors tell the harness when they are loaded or stored as a whole: the host's compiler may split such an access into
// its elements, and a misaligned one would then look right.
struct alignas(8) uint2 {
  unsigned x, y;
  uint2(unsigned x_, unsigned y_) : x(x_), y(y_) {}
  uint2(const uint2& other) : x((sida::harness::vector_access(&other, 8), other.x)), y(other.y) {}
  uint2& operator=(const uint2& other) {
    sida::harness::vector_access(this, 8);
    sida::harness::vector_access(&other, 8);
    x = other.x;
    y = other.y;
    return *this;
  }
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
  uint4() = default;
  uint4& operator=(const uint4& other) {
    sida::harness::vector_access(this, 16);
    sida::harness::vector_access(&other, 16);
    x = other.x;
    y = other.y;
    z = other.z;
    w = other.w;
    return *this;
  }
};
struct alignas(16) float4 {
  float x, y, z, w;
  float4(float x_, float y_, float z_, float w_) : x(x_), y(y_), z(z_), w(w_) {}
  float4(const float4& other)
      : x((sida::harness::vector_access(&other, 16), other.x)), y(other.y), z(other.z), w(other.w) {}
  float4& operator=(const float4& other) {
    sida::harness::vector_access(this, 16);
    sida::harness::vector_access(&other, 16);
    x = other.x;
    y = other.y;
    z = other.z;
    w = other.w;
    return *this;
  }
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

#define threadIdx (::sida::harness::current_thread().index)
#define blockIdx (::sida::harness::current_launch().block)
#define blockDim (::sida::harness::current_launch().threads)
#define gridDim (::sida::harness::current_launch().blocks)

inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
inline int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Each is a call of the harness that names its own place in the kernel.
#define __syncthreads() ::sida::harness::block_barrier()
#define __threadfence() ::sida::harness::thread_fence()

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  sida::harness::warp_barrier(mask);
}

template <class Value>
Value sida_shuffle(unsigned mask, Value value, int source) {
  static_assert(sizeof(Value) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = sida::harness::shuffle(mask, bits, source);
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source) {
  return sida_shuffle(mask, value, source % 32);
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned step) {
  const int lane = sida::harness::lane();
  return sida_shuffle(mask, value, lane >= static_cast<int>(step) ? lane - static_cast<int>(step) : lane);
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int bits) {
  return sida_shuffle(mask, value, sida::harness::lane() ^ bits);
}
inline unsigned __match_any_sync(unsigned mask, int key) {
  return sida::harness::match_any(mask, key);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return sida::harness::ballot(mask, predicate != 0);
}

inline int atomicAdd(int* address, int value) {
  return sida::harness::atomic_add(address, value);
}
inline int atomicMin(int* address, int value) {
  return sida::harness::atomic_min(address, value);
}

// The few runtime calls that launching makes.
using cudaStream_t = struct SidaHarnessStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline const char* cudaGetErrorName(cudaError_t) {
  return "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid argument";
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidValue;  // the smallest limit of the supported devices
}
