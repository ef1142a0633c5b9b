// What all vector types share: loads and stores without alignment, shuffles, bit casts.
//
// `Simd` classes (simd_*.h) live in unnamed namespaces of the units that are compiled for an instruction set.
// Everything here is a template over them, so that every instantiation has internal linkage.
#pragma once

#include <cstdint>
#include <utility>

#include "base/dtype.h"

namespace sida::cpu {

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));

// Vectors of n elements, and the same where the address may be any. (typedef: GCC drops the attributes of a dependent
// alias declaration.)
template <int n>
struct VectorOf {
  typedef float F __attribute__((vector_size(n * 4)));
  typedef int32_t I __attribute__((vector_size(n * 4)));
  typedef uint32_t U __attribute__((vector_size(n * 4)));
  typedef uint16_t HalfWords __attribute__((vector_size(n * 2)));
  typedef int8_t Bytes __attribute__((vector_size(n)));
  typedef float FloatAnywhere __attribute__((vector_size(n * 4), aligned(1), may_alias));
  typedef uint32_t BitsAnywhere __attribute__((vector_size(n * 4), aligned(1), may_alias));
  typedef uint16_t HalfWordsAnywhere __attribute__((vector_size(n * 2), aligned(1), may_alias));
  typedef int8_t BytesAnywhere __attribute__((vector_size(n), aligned(1), may_alias));
};

#define SIDA_INLINE __attribute__((always_inline))

template <int i>
struct Index {
  static constexpr int value = i;
};

template <class Body, int... i>
SIDA_INLINE static inline void unroll_indices(Body&& body, std::integer_sequence<int, i...>) {
  (body(Index<i>()), ...);
}

// body(Index<0>()), ..., body(Index<count - 1>()). Unlike a loop that the optimiser unrolls, it leaves no variable
// index behind for the passes that come before unrolling.
template <int count, class Body>
SIDA_INLINE static inline void unroll(Body&& body) {
  unroll_indices(body, std::make_integer_sequence<int, count>());
}

template <class S>
[[gnu::always_inline]] static inline typename S::F load(const void* from) {
  return *static_cast<const typename S::Types::FloatAnywhere*>(from);
}

template <class S>
[[gnu::always_inline]] static inline void store(void* to, typename S::F value) {
  *static_cast<typename S::Types::FloatAnywhere*>(to) = value;
}

template <class S>
[[gnu::always_inline]] static inline typename S::F broadcast(float value) {
  return value - typename S::F{};  // 0 + value would be an addition: it is not -0 for -0
}

template <class To, class From>
[[gnu::always_inline]] static inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return reinterpret_cast<To>(value);
}

// 16-bit elements at `from`, each widened into the upper half of a 32-bit lane: bfloat16 to fp32.
template <class S>
[[gnu::always_inline]] static inline typename S::F load_bf16(const void* from) {
  using T = typename S::Types;
  if constexpr (requires { S::load_u16(from); }) {
    return bits_as<typename S::F>(S::load_u16(from) << 16);
  } else {
    const typename T::HalfWords half = *static_cast<const typename T::HalfWordsAnywhere*>(from);
    return bits_as<typename S::F>(__builtin_convertvector(half, typename T::U) << 16);
  }
}

template <class S>
[[gnu::always_inline]] static inline void store_bf16(void* to, typename S::F value) {
  using T = typename S::Types;
  const auto bits = bits_as<typename T::U>(value);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN into an infinity
  const auto chosen = value == value ? rounded : nan;
  *static_cast<typename T::HalfWordsAnywhere*>(to) = __builtin_convertvector(chosen, typename T::HalfWords);
}

// float16 to fp32 without F16C. The multiplication moves the exponent's bias and is exact, denormals included.
template <class S>
[[gnu::always_inline]] static inline typename S::F widen_f16(typename S::Types::HalfWords half) {
  using T = typename S::Types;
  const auto bits = __builtin_convertvector(half, typename T::U);
  const auto magnitude = bits_as<typename S::F>((bits & 0x7fffu) << 13) * 0x1p112f;
  auto result = bits_as<typename T::U>(magnitude);
  result |= (bits & 0x7c00u) == 0x7c00u ? typename T::U{} + 0x7f800000u : typename T::U{};
  return bits_as<typename S::F>(result | ((bits & 0x8000u) << 16));
}

// fp32 to float16, to nearest even, without F16C.
static inline uint16_t narrow_f16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and up
  if (magnitude < 0x38800000u) {
    // Below the smallest normal: adding 0.5 aligns the last place of fp32 with 2^-24, the unit of the denormals.
    const float aligned = __builtin_bit_cast(float, magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, aligned) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

// The values of e2m1, twice over: integers.
static constexpr int8_t doubled_e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
// The same and 12: unsigned.
alignas(16) static constexpr int8_t raised_e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
// The values of 4-bit integers in two's complement.
static constexpr int8_t signed_nibbles[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};

// Simd::load_u8 without instructions for it: bytes as integers.
template <class S>
[[gnu::always_inline]] static inline typename S::Types::U load_u8_plain(const void* from) {
  typename S::Types::U value{};
  for (int i = 0; i < S::lanes; ++i) value[i] = static_cast<const uint8_t*>(from)[i];
  return value;
}

// Simd::unfold_group without instructions for it.
template <class S, DType dtype>
[[gnu::always_inline]] static inline void unfold_plain(typename S::F (&weight)[32 / S::lanes], const char* at,
                                                       typename S::F scale) {
  constexpr const auto& values = dtype == DType::int4 ? signed_nibbles : doubled_e2m1;
  const typename S::F unit = dtype == DType::int4 ? scale : scale * 0.5f;
  for (int pair = 0; pair < 16 / S::lanes; ++pair, at += S::lanes) {
    typename S::F even{}, odd{};
    for (int i = 0; i < S::lanes; ++i) {
      const auto both = static_cast<uint8_t>(at[i]);
      even[i] = values[both & 15];
      odd[i] = values[both >> 4];
    }
    weight[2 * pair] = even * unit;
    weight[2 * pair + 1] = odd * unit;
  }
}

// 2^(e - 128) where e is byte `byte` of each lane; NaN for 255.
template <class S, int byte>
[[gnu::always_inline]] static inline typename S::F half_powers_of_two(typename S::Types::U bytes) {
  using U = typename S::Types::U;
  const U exponent = (byte < 3 ? bytes << (byte < 3 ? 23 - 8 * byte : 0) : bytes >> 1) & 0x7f800000u;
  const U lowest = U{} + 0x00400000u;  // 2^-127, which has no exponent of its own
  const auto half = bits_as<typename S::F>(exponent > lowest ? exponent : lowest) * 0.5f;
  return S::fma(half, typename S::F{}, half);  // an infinity becomes NaN
}

template <class S>
[[gnu::always_inline]] static inline typename S::F load_as_float(DType dtype, const void* from) {
  switch (dtype) {
    case DType::bf16:
      return load_bf16<S>(from);
    case DType::f16:
      return S::load_f16(from);
    default:
      return load<S>(from);
  }
}

template <class S>
[[gnu::always_inline]] static inline void store_rounded(DType dtype, void* to, typename S::F value) {
  switch (dtype) {
    case DType::bf16:
      store_bf16<S>(to, value);
      break;
    case DType::f16:
      S::store_f16(to, value);
      break;
    default:
      store<S>(to, value);
  }
}

// {sum of a, sum of b, sum of c, sum of d}, each as (0 + 2) + (1 + 3).
[[gnu::always_inline]] static inline Float4 sum_each(Float4 a, Float4 b, Float4 c, Float4 d) {
  const Int4 low{0, 4, 1, 5}, high{2, 6, 3, 7}, first{0, 1, 4, 5}, second{2, 3, 6, 7};
  const Float4 ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const Float4 cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  return __builtin_shuffle(ab, cd, first) + __builtin_shuffle(ab, cd, second);
}

}  // namespace sida::cpu
