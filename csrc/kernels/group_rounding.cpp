#include "kernels/group_rounding.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace sida {
namespace {

// Four lanes: every machine has them.
using Lanes = float __attribute__((vector_size(16)));
using Bits = int32_t __attribute__((vector_size(16)));
constexpr int64_t lanes = 4, vectors = group_columns / lanes, pairs = group_columns / 2;
// Rows that a thread takes at once.
constexpr int64_t rows_at_once = 16;

struct Group {
  std::array<Lanes, vectors> v;
};

Lanes all(float value) {
  return Lanes{value, value, value, value};
}

Lanes least(Lanes a, Lanes b) {
  return a < b ? a : b;
}

Lanes most(Lanes a, Lanes b) {
  return a > b ? a : b;
}

Lanes magnitude(Lanes x) {
  return std::bit_cast<Lanes>(std::bit_cast<Bits>(x) & 0x7fffffff);
}

// To the nearest integer, ties to the even one; |x| at most 2^21. The sum has no bits for a fraction.
Lanes rounded(Lanes x) {
  constexpr float no_fraction = 12582912.0f;
  return (x + no_fraction) - no_fraction;
}

float sum(Lanes x) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

Group load(const float* from, int64_t count) {
  Group group{};
  std::memcpy(&group, from, count * sizeof(float));
  return group;
}

// IEEE binary16 of a finite number, ties to even; beyond its range infinity.
uint16_t half_of(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  // Below 2^-14 steps are 2^-24, those of numbers from 0.5.
  if (size < 0x38800000) {
    const float shifted = std::bit_cast<float>(size) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

// Of a finite one.
float float_of(uint16_t half) {
  const float size = std::bit_cast<float>(uint32_t{half & 0x7fffu} << 13) * 0x1p112f;
  return half & 0x8000 ? -size : size;
}

float squared_error(const Group& found, float scale, const Group& exact, const Group* importance) {
  Lanes total{};
  for (int64_t i = 0; i < vectors; ++i) {
    const Lanes off = found.v[i] * scale - exact.v[i];
    total += importance == nullptr ? off * off : off * off * importance->v[i];
  }
  return sum(total);
}

Group int4_values(const Group& exact, float scale) {
  const float inverse = scale == 0 ? 0.0f : 1.0f / scale;
  Group values;
  for (int64_t i = 0; i < vectors; ++i) {
    values.v[i] = rounded(least(most(exact.v[i] * inverse, all(-8)), all(7)));
  }
  return values;
}

// The value of e2m1 nearest to each of `exact / scale`, a power of two; at a tie the one with an even mantissa.
Group e2m1_values(const Group& exact, float scale) {
  Group values;
  for (int64_t i = 0; i < vectors; ++i) {
    const Lanes quotient = exact.v[i] / scale, size = magnitude(quotient);
    // Neighbours lie 0.5 apart below 2, 1 below 4 and 2 beyond.
    const Lanes step = size < 2.0f ? all(0.5f) : (size < 4.0f ? all(1) : all(2));
    const Lanes nearest = least(rounded(least(size, all(16)) / step) * step, all(6));
    values.v[i] = std::bit_cast<Lanes>(std::bit_cast<Bits>(nearest) | (std::bit_cast<Bits>(quotient) & INT32_MIN));
  }
  return values;
}

// Keeps the scale with the least error of those it is shown.
struct Best {
  const Group& exact;
  const Group* importance;
  float scale = 0, error = std::numeric_limits<float>::infinity();
  Group values{};

  void show(const Group& shown, float with) {
    const float shown_error = squared_error(shown, with, exact, importance);
    if (!(shown_error < error)) return;
    scale = with;
    error = shown_error;
    values = shown;
  }
};

// A smaller factor rounds the many finer and cuts the largest value off.
constexpr std::array<float, 8> int4_factors{1.0f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f, 0.76f, 0.72f};

void store_pairs(const std::array<uint8_t, group_columns>& codes, uint8_t* to) {
  for (int64_t i = 0; i < pairs; ++i) to[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
}

uint16_t round_int4(const Group& exact, const Group* importance, uint8_t* to) {
  Lanes low = exact.v[0], high = exact.v[0];
  for (int64_t i = 1; i < vectors; ++i) {
    low = least(low, exact.v[i]);
    high = most(high, exact.v[i]);
  }
  const float lowest = std::min({low[0], low[1], low[2], low[3]});
  const float highest = std::max({high[0], high[1], high[2], high[3]});
  // A negative scale puts a positive end at -8, where the range is longest.
  const float end = -lowest > highest ? lowest : highest;
  Best best{exact, importance};
  const auto show = [&](float scale) { best.show(int4_values(exact, scale), scale); };
  for (const float factor : int4_factors) show(float_of(half_of(end / -8 * factor)));
  // The scale that is best for these values, and then the values that are best for it.
  Lanes products{}, squares{};
  for (int64_t i = 0; i < vectors; ++i) {
    const Lanes weighted = importance == nullptr ? best.values.v[i] : best.values.v[i] * importance->v[i];
    products += weighted * exact.v[i];
    squares += weighted * best.values.v[i];
  }
  if (const float size = sum(squares); size > 0) {
    const uint16_t fitted = half_of(sum(products) / size);
    if ((fitted & 0x7fff) < 0x7c00) show(float_of(fitted));
  }
  std::array<uint8_t, group_columns> codes;
  for (int64_t i = 0; i < group_columns; ++i) {
    codes[i] = static_cast<uint8_t>(static_cast<int>(best.values.v[i / lanes][i % lanes]) & 15);
  }
  store_pairs(codes, to);
  return half_of(best.scale);
}

uint8_t round_mxfp4(Group exact, const Group* importance, uint8_t* to) {
  Lanes sizes{};
  for (const Lanes& x : exact.v) sizes = most(sizes, magnitude(x));
  const float largest = std::max({sizes[0], sizes[1], sizes[2], sizes[3]});
  int exponent = 0;
  if (largest > 0) {
    std::frexp(largest, &exponent);
    exponent = std::clamp(exponent - 3, -126, 126);
    // Largest values between 4 and 8: no square can underflow.
    const float to_eight = std::ldexp(1.0f, -exponent);
    for (Lanes& x : exact.v) x *= to_eight;
  }
  Best best{exact, importance};
  for (const float scale : {1.0f, 2.0f, 0.5f}) best.show(e2m1_values(exact, scale), scale);
  std::array<uint8_t, group_columns> codes;
  for (int64_t i = 0; i < group_columns; ++i) {
    const float value = best.values.v[i / lanes][i % lanes], size = std::fabs(value);
    const float code = size <= 2 ? 2 * size : size <= 4 ? size + 2 : 7;
    codes[i] = static_cast<uint8_t>(static_cast<int>(code) | (std::signbit(value) ? 8 : 0));
  }
  store_pairs(codes, to);
  return static_cast<uint8_t>(exponent + std::ilogb(best.scale) + 127);
}

// Runs body(first row, last row) on the threads of `parallel`.
template <class Body>
void over_rows(int64_t rows, const ParallelFor& parallel, const Body& body) {
  struct Context {
    const Body& body;
    int64_t rows;
  } context{body, rows};
  parallel.run((rows + rows_at_once - 1) / rows_at_once,
               [](void* given, int64_t block) {
                 const auto& [each, all_rows] = *static_cast<const Context*>(given);
                 each(block * rows_at_once, std::min((block + 1) * rows_at_once, all_rows));
               },
               &context);
}

}  // namespace

void round_groups(const GroupRounding& args, const ParallelFor& parallel) {
  const int64_t groups = groups_of(args.columns);
  over_rows(args.rows, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * group_columns, count = std::min(group_columns, args.columns - first);
        const Group exact = load(args.weight + row * args.columns + first, count);
        const Group weights = args.importance == nullptr ? Group{} : load(args.importance + first, count);
        const Group* const importance = args.importance == nullptr ? nullptr : &weights;
        const int64_t at = row * groups + g;
        uint8_t* const to = args.values + at * pairs;
        if (args.to == DType::int4) {
          static_cast<uint16_t*>(args.scale)[at] = round_int4(exact, importance, to);
        } else {
          static_cast<uint8_t*>(args.scale)[at] = round_mxfp4(exact, importance, to);
        }
      }
    }
  });
}

void expand_groups(const GroupExpansion& args, const ParallelFor& parallel) {
  static constexpr std::array<float, 16> int4{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  static constexpr std::array<float, 16> e2m1{0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  const bool is_int4 = args.from == DType::int4;
  const std::array<float, 16>& table = is_int4 ? int4 : e2m1;
  const int64_t groups = groups_of(args.columns);
  const auto scale_of = [&](int64_t at) {
    if (is_int4) {
      const uint16_t half = static_cast<const uint16_t*>(args.scale)[at];
      if ((half & 0x7fff) < 0x7c00) return float_of(half);
      return half & 0x3ff ? std::numeric_limits<float>::quiet_NaN()
                          : std::copysign(HUGE_VALF, half & 0x8000 ? -1.0f : 1.0f);
    }
    const uint8_t exponent = static_cast<const uint8_t*>(args.scale)[at];
    return exponent == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, exponent - 127);
  };
  over_rows(args.rows, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = row * groups + g, first = g * group_columns;
        const float scale = scale_of(at);
        const uint8_t* const values = args.values + at * pairs;
        float* const out = args.out + row * args.columns + first;
        for (int64_t i = 0, count = std::min(group_columns, args.columns - first); i < count; ++i) {
          out[i] = table[values[i / 2] >> (i % 2 * 4) & 15] * scale;
        }
      }
    }
  });
}

}  // namespace sida
