// fp32 values as bfloat16 terms, for instructions that multiply bfloat16 by bfloat16.
//
// Exact. Cutting off the lower 16 bits of an fp32 value leaves a bfloat16 value with its leading 8 significant bits.
// What was cut off is an fp32 value with at most 16 significant bits; cut once more, it leaves one with at most 8,
// which is a bfloat16 value itself. So
//     x = x1 + x2 + x3,   |x| = |x1| + |x2| + |x3|,
// without any rounding, the terms all of x's sign: sum |w x1| + |w x2| + |w x3| is sum |w x|, and an error bound over
// the terms is one over x. A float16 value has 11 significant bits and needs two terms, a bfloat16 value is one. That
// holds from |x| = 2^-110 up, where x has no bits below bfloat16's last one, 2^-133; smaller values lose less than
// that. From 2^-103 up no term is denormal but zero, so that instructions which take denormals for zero lose nothing.
// Infinities and NaN are a first term; the others are zero.
//
// Rounded. One term, to nearest even: off by at most 2^-8 |x| (eight significant bits).
#pragma once

#include "kernels/cpu/simd.h"

namespace sida::cpu {

// Terms that add up to any value of the dtype.
static inline int exact_terms(DType values) {
  return values == DType::bf16 ? 1 : values == DType::f16 ? 2 : 3;
}

// Takes the leading term off `rest` and returns it in the upper halves of the lanes.
template <class S>
[[gnu::always_inline]] static inline typename S::Types::U take_term(typename S::F& rest) {
  using F = typename S::F;
  using U = typename S::Types::U;
  const U bits = bits_as<U>(rest);
  const U quiet = rest == rest ? U{} : U{} + 0x00400000u;  // a NaN may have all its bits in the lower half
  const U term = (bits & 0xffff0000u) | quiet;
  const F left = rest - bits_as<F>(term);
  rest = (bits & 0x7f800000u) == 0x7f800000u ? F{} : left;
  return term;
}

// Stores the upper halves of the lanes of two vectors as 2 * lanes bfloat16 values in order.
template <class S>
[[gnu::always_inline]] static inline void store_upper_halves(uint16_t* to, typename S::Types::U low,
                                                             typename S::Types::U high) {
  using T = typename S::Types;
  auto* const at = reinterpret_cast<typename T::HalfWordsAnywhere*>(to);
  at[0] = __builtin_convertvector(low >> 16, typename T::HalfWords);
  at[1] = __builtin_convertvector(high >> 16, typename T::HalfWords);
}

}  // namespace sida::cpu
