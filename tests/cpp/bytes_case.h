// Random products of int8, int4 and mxfp4 weights with tokens of 8 bits through pack, activate and project, and what
// every bit of the sums must be (kernel_bytes.h).
#pragma once

#include <optional>

#include "kernels_case.h"

namespace sida::test {

// A token's group of 32 columns.
struct ByteGroup {
  int q[group_columns];
  float scale;

  explicit ByteGroup(const float (&values)[group_columns]) : q(), scale(0.0f) {
    float largest = 0.0f;
    bool is_finite = true;
    for (const float value : values) {
      is_finite = is_finite && std::isfinite(value);
      largest = std::max(largest, std::fabs(value));
    }
    if (!is_finite) scale = NAN;
    if (!is_finite || largest < 0x1p-119f) return;
    scale = largest * (1.0f / 127.0f);
    const float inverse = 127.0f / largest;
    for (int64_t k = 0; k < group_columns; ++k) {
      const float steps = values[k] * inverse;
      q[k] = static_cast<int>(std::nearbyint(steps));
    }
  }
};

struct ByteCase {
  int64_t rows, tokens, width, stored, groups, row_stride, scale_stride, rows_after;
  DType w_dtype;
  Guarded w, scales;
  std::vector<float> x;

  ByteCase(DType dtype, uint64_t seed) : w_dtype(dtype) {
    std::mt19937_64 random(seed);
    const auto upto = [&](int64_t n) { return static_cast<int64_t>(random() % n) + 1; };
    const bool is_long = random() % 3 == 0;
    rows = random() % 4 == 0 ? 96 : upto(50);
    tokens = upto(random() % 2 ? 4 : 33);
    // Whole segments of 32 groups, parts of them, groups that are not whole.
    width = is_long ? 900 + upto(1500) : upto(700);
    if (random() % 2) width = groups_of(width) * group_columns;
    groups = groups_of(width);
    stored = row_bytes(dtype, width);
    const int64_t padding = random() % 2 ? upto(40) : 0;
    row_stride = stored + padding;
    scale_stride = (groups + (random() % 2 ? upto(5) : 0)) * group_scale_bytes(dtype);
    rows_after = random() % 2 ? 0 : upto(40);
    w = Guarded(rows * row_stride - padding, static_cast<int>(random() % 2));
    // The largest weights beside the largest tokens: sums in 16 bits come close to their end.
    const bool is_extreme = random() % 4 == 0;
    const int64_t kind = static_cast<int64_t>(random() % 8);
    for (int64_t i = 0; i < w.bytes(); ++i) {
      const int byte = dtype == DType::i8     ? (random() % 2 ? -128 : 127)
                       : dtype == DType::int4 ? (random() % 2 ? 0x77 : 0x88)
                                              : (random() % 2 ? 0x77 : 0xff);
      w.data()[i] = static_cast<char>(is_extreme ? byte : static_cast<int>(random()));
    }
    scales = Guarded(rows * scale_stride);
    for (int64_t i = 0; i * group_scale_bytes(dtype) < scales.bytes(); ++i) {
      if (dtype == DType::int4) {
        set_element(scales.data(), DType::f16, i, std::normal_distribution<float>()(random));
        if (kind == 1 && random() % 500 == 0) set_element(scales.data(), DType::f16, i, INFINITY);
      } else {
        scales.data()[i] = static_cast<char>(kind == 1 ? random() : 120 + random() % 10);
      }
    }
    for (int64_t i = 0; i < tokens * width; ++i) {
      float value = std::normal_distribution<float>()(random);
      if (is_extreme) value = value < 0 ? -1.0f : 1.0f;
      if (kind == 2 && random() % 300 == 0) value = random() % 2 ? INFINITY : NAN;
      if (kind == 3 && i % width / group_columns % 2 == 0) value = i % 5 ? 0.0f : 0x1p-120f;
      if (kind == 4) value = std::ldexp(value, -static_cast<int>(i % width / group_columns % 90));
      if (kind == 5) value = static_cast<float>(static_cast<int>(random() % 255) - 127) / 2;  // ties
      x.push_back(value);
    }
  }

  cpu::Panel panel(const cpu::Kernels& kernels, Guarded& memory) const {
    const cpu::PanelForm form = kernels.panel_form(DType::f32, w_dtype, width);
    memory = Guarded(tokens * form.padded_width * 4);
    std::memset(memory.data(), 0xff, memory.bytes());
    return {reinterpret_cast<float*>(memory.data()), tokens, width, form.padded_width, form.terms};
  }

  // sums[t * rows + r]; none where a kernel wrote outside a buffer.
  std::vector<float> run(const cpu::Kernels& kernels, const cpu::Panel& held, const Guarded& memory) {
    Guarded sums(tokens * rows * 4);
    std::memset(sums.data(), 0xff, sums.bytes());
    cpu::Project project{w_dtype, w.data(), row_stride, rows, 0, held, reinterpret_cast<float*>(sums.data()), rows};
    if (is_grouped(w_dtype)) {
      project.group_scales = scales.data();
      project.scale_row_bytes = scale_stride;
    }
    project.rows_after = rows_after;
    kernels.project(project);
    if (!memory.is_intact() || !sums.is_intact() || !w.is_intact() || !scales.is_intact()) return {};
    std::vector<float> found(tokens * rows);
    std::memcpy(found.data(), sums.data(), sums.bytes());
    return found;
  }

  // The tokens by pack.
  std::vector<float> packed(const cpu::Kernels& kernels) {
    Guarded memory;
    const cpu::Panel held = panel(kernels, memory);
    std::vector<int64_t> entries(tokens);
    for (int64_t t = 0; t < tokens; ++t) entries[t] = t;
    kernels.pack({DType::f32, w_dtype, x.data(), width, entries.data(), 1, held});
    return run(kernels, held, memory);
  }

  // The same tokens by activate, as a hidden layer.
  std::vector<float> activated(const cpu::Kernels& kernels) {
    Guarded memory;
    const cpu::Panel held = panel(kernels, memory);
    const int64_t step = kernels.group;
    for (int64_t begin = 0; begin < width; begin += 3 * step) {
      const int64_t columns = std::min(3 * step, width - begin);
      std::vector<float> sums(tokens * 3 * step, NAN);
      for (int64_t t = 0; t < tokens; ++t) {
        std::copy_n(x.data() + t * width + begin, columns, sums.data() + t * 3 * step);
      }
      cpu::Activate args{};
      args.activation = Activation::linear;
      args.w_dtype = w_dtype;
      args.sums = sums.data();
      args.sums_stride = 3 * step;
      args.row_begin = begin;
      args.rows = columns;
      args.h = held;
      kernels.activate(args);
    }
    return run(kernels, held, memory);
  }

  int weight(int64_t row, int64_t column) const {
    if (w_dtype == DType::i8) return static_cast<int8_t>(w.data()[row * row_stride + column]);
    const int both = static_cast<uint8_t>(w.data()[row * row_stride + column / 2]);
    const int code = column % 2 == 0 ? both & 15 : both >> 4;
    if (w_dtype == DType::int4) return code < 8 ? code : code - 16;
    const int doubled[] = {0, 1, 2, 3, 4, 6, 8, 12};
    return code & 8 ? -doubled[code & 7] : doubled[code & 7];
  }

  float row_scale(int64_t row, int64_t group) const {
    if (w_dtype == DType::i8) return 1.0f;
    const char* const at = scales.data() + row * scale_stride + group * group_scale_bytes(w_dtype);
    if (w_dtype == DType::int4) return static_cast<float>(element(at, DType::f16, 0));
    const int exponent = static_cast<uint8_t>(*at);
    return exponent == 255 ? NAN : std::ldexp(1.0f, exponent - 128);
  }

  std::vector<float> expected() const {
    std::vector<float> sums(tokens * rows, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = group * group_columns, columns = std::min(group_columns, width - begin);
        float values[group_columns] = {};
        std::copy_n(x.data() + t * width + begin, columns, values);
        const ByteGroup token(values);
        for (int64_t r = 0; r < rows; ++r) {
          int dot = 0;
          for (int64_t k = 0; k < columns; ++k) dot += token.q[k] * weight(r, begin + k);
          float& sum = sums[t * rows + r];
          sum = std::fma(static_cast<float>(dot), token.scale * row_scale(r, group), sum);
        }
      }
    }
    return sums;
  }
};

// The first sum whose bits are not those of the documented order, NaN being NaN.
inline std::optional<std::string> difference_of_sums(const std::vector<float>& found,
                                                     const std::vector<float>& expected, const std::string& what) {
  if (found.size() != expected.size()) return what + ": wrote outside a buffer";
  for (size_t i = 0; i < found.size(); ++i) {
    if (std::memcmp(&found[i], &expected[i], 4) == 0 || (std::isnan(found[i]) && std::isnan(expected[i]))) continue;
    std::ostringstream text;
    text << what << ": sum " << i << " is " << found[i] << ", expected " << expected[i];
    return text.str();
  }
  return std::nullopt;
}

// One random case of each type.
inline std::optional<std::string> byte_violation(const cpu::Kernels& kernels, uint64_t seed) {
  for (const DType dtype : {DType::i8, DType::int4, DType::mxfp4}) {
    ByteCase test(dtype, seed);
    std::ostringstream shape;
    shape << "seed " << seed << " rows " << test.rows << " tokens " << test.tokens << " width " << test.width << " "
          << dtype_name(dtype) << " " << kernels.name;
    const std::vector<float> expected = test.expected();
    auto found = difference_of_sums(test.packed(kernels), expected, shape.str() + " packed");
    if (!found) found = difference_of_sums(test.activated(kernels), expected, shape.str() + " activated");
    if (found) return found;
  }
  return std::nullopt;
}

}  // namespace sida::test
