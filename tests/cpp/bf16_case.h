// Random products of bfloat16 weights with tokens through pack and project, and what every bit of the sums must be.
#pragma once

#include <optional>

#include "emulated/bf16_arithmetic.h"
#include "kernels_case.h"

namespace sida::test {

// The three tables that multiply bfloat16 pairs.
struct PairKernels {
  const cpu::Kernels *amx, *amx_fast, *dot;  // null: not to be had
};

// The documented order of a sum, element by element: kernel_amx.h.
inline float amx_sum(const std::vector<std::vector<float>>& terms, const std::vector<float>& w) {
  const int64_t width = static_cast<int64_t>(w.size());
  const auto at = [&](const std::vector<float>& of, int64_t k) { return k < width ? of[k] : 0.0f; };
  float total = 0.0f;
  for (int64_t begin = 0; begin < width; begin += 1024) {
    float sum = 0.0f;
    for (int64_t block = begin; block < std::min(begin + 1024, width); block += 32) {
      for (const std::vector<float>& term : terms) {
        float even = 0.0f, odd = 0.0f;
        for (int64_t k = block; k < block + 32; k += 2) {
          even = flushed_multiply_add(at(w, k), at(term, k), even);
          odd = flushed_multiply_add(at(w, k + 1), at(term, k + 1), odd);
        }
        sum = flushed_sum(sum, flushed_sum(even, odd));
      }
    }
    total = begin == 0 ? sum : total + sum;
  }
  return total;
}

// The documented order of a sum in lanes of pairs: kernel_dot.h and kernel_tile.h.
inline float dot_sum(const std::vector<float>& x, const std::vector<float>& w) {
  const int64_t width = static_cast<int64_t>(w.size());
  float total = 0.0f;
  for (int64_t begin = 0; begin < width; begin += 4096) {
    float lane[16] = {};
    for (int64_t k = begin; k < std::min(begin + 4096, width); k += 2) {
      float& sum = lane[k / 2 % 16];
      sum = flushed_multiply_add(w[k + 1], x[k + 1], sum);
      sum = flushed_multiply_add(w[k], x[k], sum);
    }
    float four[4];
    for (int i = 0; i < 4; ++i) four[i] = (lane[i] + lane[i + 8]) + (lane[i + 4] + lane[i + 12]);
    const float sum = (four[0] + four[2]) + (four[1] + four[3]);
    total = begin == 0 ? sum : total + sum;
  }
  return total;
}

// A value as terms, by arithmetic in double where the kernels use bits.
inline std::vector<float> terms_of(float value, int count) {
  std::vector<float> terms;
  double rest = value;
  for (int i = 0; i < count; ++i) {
    const double size = std::fabs(rest);
    // To zero, at eight significant bits or at the last place of bfloat16's denormals.
    const int place = size == 0.0 ? 0 : std::max(std::ilogb(size) - 7, -133);
    const double term =
        size == 0.0 ? rest : std::copysign(std::ldexp(std::floor(std::ldexp(size, -place)), place), rest);
    terms.push_back(static_cast<float>(term));
    rest -= term;
  }
  return terms;
}

struct PairCase {
  int64_t rows, tokens, width, row_stride, x_stride;
  DType x_dtype;
  Guarded w, x;
  std::vector<int64_t> entries;

  PairCase(int64_t rows_, int64_t tokens_, int64_t width_, int64_t padding, DType x_dtype_, uint64_t seed)
      : rows(rows_),
        tokens(tokens_),
        width(width_),
        row_stride(width_ + padding),
        x_stride(width_ + padding),
        x_dtype(x_dtype_),
        w((rows_ * row_stride - padding) * 2, 2),
        x((tokens_ * x_stride - padding) * element_bytes(x_dtype_), static_cast<int>(element_bytes(x_dtype_))) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    // Between the rows lies NaN: a kernel that takes a weight or a token from there shows.
    const auto fill = [&](Guarded& of, DType dtype, int64_t count, int64_t stride) {
      for (int64_t i = 0; i * element_bytes(dtype) < of.bytes(); ++i) {
        set_element(of.data(), dtype, i, i % stride < width && i < count * stride ? normal(random) : NAN);
      }
    };
    fill(w, DType::bf16, rows, row_stride);
    fill(x, x_dtype, tokens, x_stride);
    for (int64_t t = 0; t < tokens; ++t) entries.push_back(t);
    std::shuffle(entries.begin(), entries.end(), random);
  }

  // sums[t * rows + r] for the tokens in the order of `entries`.
  std::vector<float> run(const cpu::Kernels& kernels) {
    const cpu::PanelForm form = kernels.panel_form(x_dtype, DType::bf16, width);
    Guarded panel(tokens * form.padded_width * 4), sums(tokens * rows * 4);
    std::memset(panel.data(), 0xff, panel.bytes());  // what a kernel forgets to write is NaN
    std::memset(sums.data(), 0xff, sums.bytes());
    watch_loads_from(w.data(), w.bytes());
    const cpu::Panel held{reinterpret_cast<float*>(panel.data()), tokens, width, form.padded_width, form.terms};
    kernels.pack({x_dtype, DType::bf16, x.data(), x_stride, entries.data(), 1, held});
    kernels.project(
        {DType::bf16, w.data(), row_stride * 2, rows, 0, held, reinterpret_cast<float*>(sums.data()), rows});
    watch_loads_from(nullptr, 0);
    if (!panel.is_intact() || !sums.is_intact() || !w.is_intact() || !x.is_intact()) return {};
    std::vector<float> found(tokens * rows);
    std::memcpy(found.data(), sums.data(), sums.bytes());
    return found;
  }

  std::vector<float> weights(int64_t row) const {
    std::vector<float> values;
    for (int64_t k = 0; k < width; ++k) {
      values.push_back(static_cast<float>(element(w.data(), DType::bf16, row * row_stride + k)));
    }
    return values;
  }

  float token(int64_t t, int64_t k) const {
    return static_cast<float>(element(x.data(), x_dtype, entries[t] * x_stride + k));
  }

  // The first sum that is off by more than `relative` times the sum of its products' magnitudes.
  std::optional<std::string> inaccuracy(const cpu::Kernels& kernels, double relative) {
    const std::vector<float> found = run(kernels);
    if (found.empty()) return std::string(kernels.name) + ": wrote outside a buffer";
    for (int64_t i = 0; i < tokens * rows; ++i) {
      const std::vector<float> w = weights(i % rows);
      double sum = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < width; ++k) {
        const double product = static_cast<double>(w[k]) * token(i / rows, k);
        sum += product;
        magnitude += std::fabs(product);
      }
      if (std::fabs(found[i] - sum) <= relative * magnitude) continue;
      std::ostringstream text;
      text << kernels.name << " sum " << i << " is " << found[i] << ", expected about " << sum;
      return text.str();
    }
    return std::nullopt;
  }

  // What run() must give: with the tiles of AMX in exact terms, with the tiles in one rounded term, with VDPBF16PS.
  enum class Way { amx, amx_fast, dot };
  std::vector<float> expected(Way way) const {
    const int exact = x_dtype == DType::bf16 ? 1 : x_dtype == DType::f16 ? 2 : 3;
    const int count = way == Way::amx ? exact : 1;
    std::vector<float> sums(tokens * rows);
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<std::vector<float>> terms(count, std::vector<float>(width));
      for (int64_t k = 0; k < width; ++k) {
        const std::vector<float> all =
            way == Way::amx ? terms_of(token(t, k), count) : std::vector{from_bf16(to_bf16(token(t, k)))};
        for (int i = 0; i < count; ++i) terms[i][k] = all[i];
      }
      for (int64_t r = 0; r < rows; ++r) {
        sums[t * rows + r] = way == Way::dot ? dot_sum(terms[0], weights(r)) : amx_sum(terms, weights(r));
      }
    }
    return sums;
  }
};

// Compares bits; the first difference in words.
inline std::optional<std::string> difference(const std::vector<float>& found, const std::vector<float>& expected,
                                             const std::string& what) {
  if (found.size() != expected.size()) return what + ": wrote outside a buffer";
  for (size_t i = 0; i < found.size(); ++i) {
    if (std::memcmp(&found[i], &expected[i], 4) == 0) continue;
    std::ostringstream text;
    text << what << ": sum " << i << " is " << found[i] << ", expected " << expected[i];
    return text.str();
  }
  return std::nullopt;
}

// One random case through all tables, bit for bit against the documented orders; faults of the emulation too.
inline std::optional<std::string> violation(const PairKernels& tables, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto upto = [&](int64_t n) { return static_cast<int64_t>(random() % n) + 1; };
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
  const int64_t padding = random() % 2 ? upto(40) : 0;
  const bool is_long = random() % 6 == 0;
  PairCase test(is_long ? upto(20) : upto(80), is_long ? upto(20) : upto(70), is_long ? 1000 + upto(3400) : upto(200),
                padding, dtypes[random() % 3], seed);
  std::ostringstream shape;
  shape << "seed " << seed << " rows " << test.rows << " tokens " << test.tokens << " width " << test.width << " x "
        << dtype_name(test.x_dtype);
  const auto check = [&](const cpu::Kernels* table, PairCase::Way way, const char* name) -> std::optional<std::string> {
    if (table == nullptr) return std::nullopt;
    return difference(test.run(*table), test.expected(way), shape.str() + " " + name);
  };
  auto found = check(tables.amx, PairCase::Way::amx, "amx");
  if (!found) found = check(tables.amx_fast, PairCase::Way::amx_fast, "amx fast");
  if (!found && test.width % 2 == 0) found = check(tables.dot, PairCase::Way::dot, "dot");
  if (!found && test.width % 2 != 0 && tables.dot != nullptr) found = test.inaccuracy(*tables.dot, 1e-5);
  for (const std::string& fault : take_faults()) {
    if (!found) found = shape.str() + ": " + fault;
  }
  return found;
}

// Infinite and NaN factors and sums that leave fp32 on their way, with exact terms: the class of the float64 sum.
inline std::optional<std::string> class_violation(const cpu::Kernels* table) {
  if (table == nullptr) return std::nullopt;
  PairCase test(18, 5, 40, 0, DType::f32, 6);
  const auto set_w = [&](int64_t row, int64_t k, float value) {
    set_element(test.w.data(), DType::bf16, row * 40 + k, value);
  };
  const auto set_x = [&](int64_t row, int64_t k, float value) {
    set_element(test.x.data(), DType::f32, row * 40 + k, value);
  };
  for (int64_t k = 0; k < 40; ++k) set_x(0, k, 1.0f);  // terms two and three are zero
  set_w(3, 39, INFINITY);
  set_w(4, 0, NAN);
  for (const int64_t k : {0, 2, 4, 6}) set_w(17, k, k < 4 ? 3e38f : -3e38f);
  set_x(1, 5, INFINITY);
  set_x(2, 5, std::bit_cast<float>(0x7f800001u));  // a NaN whose upper half is that of an infinity
  const std::vector<float> found = test.run(*table);
  if (found.empty()) return "class: wrote outside a buffer";
  for (int64_t i = 0; i < 5 * 18; ++i) {
    const std::vector<float> w = test.weights(i % 18);
    double sum = 0.0;
    for (int64_t k = 0; k < 40; ++k) sum += static_cast<double>(w[k]) * test.token(i / 18, k);
    const bool same = std::isnan(sum)   ? std::isnan(found[i])
                      : std::isinf(sum) ? found[i] == sum
                                        : std::isfinite(found[i]);
    if (same) continue;
    std::ostringstream text;
    text << table->name << ": sum " << i << " is " << found[i] << ", expected the class of " << sum;
    return text.str();
  }
  return std::nullopt;
}

// A whole random layer against float64, and one of its tokens alone.
inline std::optional<std::string> layer_violation(const cpu::Kernels* table, bool rounds, uint64_t seed) {
  if (table == nullptr) return std::nullopt;
  set_under_test() = {table, rounds};
  std::mt19937_64 random(seed);
  const auto upto = [&](int64_t n) { return static_cast<int64_t>(random() % n) + 1; };
  Shape shape{upto(40),
              1,
              upto(60) * 2,
              upto(80) * 2,
              upto(3),
              3,
              random() % 2 ? DType::f32 : DType::bf16,
              DType::bf16,
              random() % 2 ? Activation::gelu : Activation::relu,
              random() % 3 == 0};
  Call call(shape, seed);
  call.run(2);
  std::vector<double> expected, allowed;
  call.reference(expected, allowed);
  const std::string what = std::string(rounds ? "fast " : "") + table->name + " layer, seed " + std::to_string(seed);
  for (size_t i = 0; i < expected.size(); ++i) {
    const double found = element(call.out.data(), shape.x_dtype, i);
    if (!(std::fabs(found - expected[i]) <= allowed[i])) return what + ": element " + std::to_string(i);
  }
  if (!call.is_intact()) return what + ": wrote outside a buffer";
  const std::vector<char> together = call.bits();
  const int64_t chosen = upto(shape.tokens) - 1, row_bytes = shape.d_model * element_bytes(shape.x_dtype);
  for (int64_t t = 0; t < shape.tokens; ++t) {
    if (t != chosen) call.expert_index[t] = -1;
  }
  call.reset();
  call.run(1);
  if (std::memcmp(call.out.data() + chosen * row_bytes, together.data() + chosen * row_bytes, row_bytes) != 0) {
    return what + ": other bits for a token alone";
  }
  for (const std::string& fault : take_faults()) return what + ": " + fault;
  return std::nullopt;
}

}  // namespace sida::test
