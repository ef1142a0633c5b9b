// AVX-512 with AVX512_BF16: a lane is a pair of bfloat16 values in the operands and an fp32 sum in the result.
#pragma once

#include "kernels/cpu/simd_avx512.h"

namespace sida::cpu {
namespace {

struct SimdDot : Simd {
  static constexpr int64_t segment = 2048;  // words
  // sum += the products of the odd elements, then those of the even ones, each fused (Intel SDM volume 2, VDPBF16PS).
  static void accumulate(F& sum, F a, F b) { asm volatile("vdpbf16ps %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b)); }
};

}  // namespace
}  // namespace sida::cpu
