// Conversions between fp32 and the bits of bf16 and fp16, written from the formats' definitions: the host twins of the
// cvt instructions.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace sida::harness {

inline float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest, ties to even; NaN becomes the canonical NaN, as cvt.rn.bf16.f32 gives it.
inline uint16_t float_to_bf16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | (fraction << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
  return sign != 0 ? -magnitude : magnitude;
}

inline uint16_t float_to_f16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const auto sign = static_cast<uint16_t>((std::bit_cast<uint32_t>(value) >> 16) & 0x8000u);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
  int exponent;
  std::frexp(magnitude, &exponent);
  // One unit in the last place at this magnitude; subnormals share the smallest.
  const int unit = magnitude == 0.0f || exponent - 11 < -24 ? -24 : exponent - 11;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // `units` carries the implicit bit of normal numbers; adding, not joining, lets a rounded-up 2048 carry over.
  return static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(unit + 24) << 10)));
}

}  // namespace sida::harness
