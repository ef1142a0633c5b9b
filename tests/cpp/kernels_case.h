// A random call of moe_ffn with guarded, misaligned, strided buffers, and its float64 reference.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string_view>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "emulated/emulated_kernels.h"
#include "emulated/emulated_tiles.h"
#include "kernels/cpu/kernels.h"
#include "kernels/moe_ffn.h"

namespace sida::test {

// One random case in so many is run: what SIDA_TEST_SHARE says (`make test` runs a fifth, `make check` all of them),
// else all. ThreadSanitizer slows a kernel fifty times and asks only how its threads meet: a fifteenth answers that.
#if defined(__SANITIZE_THREAD__)
inline const char* const default_share = "15";
#else
inline const char* const default_share = "1";
#endif
inline int64_t case_share() {
  const char* const wish = std::getenv("SIDA_TEST_SHARE");
  const int64_t share = std::strtoll(wish != nullptr ? wish : default_share, nullptr, 10);
  if (share < 1) fail(ErrorKind::invalid, "SIDA_TEST_SHARE is '", wish, "', expected a number from 1");
  return share;
}

// What the tests run: the kernels in force, or an emulated set that the program's main has chosen.
inline EmulatedSet& set_under_test() {
  static EmulatedSet set{nullptr, false};
  return set;
}

inline const cpu::Kernels& kernels_under_test() {
  return set_under_test().kernels != nullptr ? *set_under_test().kernels : cpu::kernels();
}

// Runs the tests on the emulated set that SIDA_TEST_SET names, else on the instruction set in force; with the
// precision that SIDA_TEST_PRECISION names. 77: this machine lacks it.
inline int run_all_on_chosen_set(int argc, char** argv) {
  const char* const emulated = std::getenv("SIDA_TEST_SET");
  const char* const precision = std::getenv("SIDA_TEST_PRECISION");
  try {
    if (emulated != nullptr) {
      set_under_test() = emulated_set(emulated);
      if (set_under_test().kernels == nullptr) fail(ErrorKind::invalid, "SIDA_TEST_SET is '", emulated, "'");
    } else if (precision != nullptr && std::string_view(precision) == "fast") {
      cpu::set_precision(cpu::Precision::fast);
      set_under_test() = {&cpu::kernels(), true};
    }
    std::cout << (emulated != nullptr ? "emulated: " : "instruction set: ") << kernels_under_test().name << std::endl;
  } catch (const Error& error) {
    std::cout << "skipped: " << error.what() << std::endl;
    return emulated != nullptr ? 1 : 77;
  }
  const int result = run_all(argc, argv);
  for (const std::string& fault : take_faults()) {
    std::cerr << "fault: " << fault << std::endl;
    return 1;
  }
  return result;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline double from_f16(uint16_t half) {
  const int exponent = (half >> 10) & 31, fraction = half & 1023;
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

// The nearest float16, by search over the values: slow and obvious.
inline uint16_t to_f16(double value) {
  if (std::isnan(value)) return 0x7e00;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520.0) return sign | 0x7c00;
  uint16_t low = 0, high = 0x7bff;  // positive finite float16 values ascend with their bits
  while (low < high) {
    const uint16_t middle = (low + high + 1) / 2;
    if (from_f16(middle) <= magnitude)
      low = middle;
    else
      high = middle - 1;
  }
  const double below = magnitude - from_f16(low),
               above = low == 0x7bff ? 65536.0 - magnitude : from_f16(low + 1) - magnitude;
  const bool up = above < below || (above == below && (low & 1));
  return sign | static_cast<uint16_t>(low + up);
}

inline double element(const void* data, DType dtype, int64_t index) {
  const char* const at = static_cast<const char*>(data) + index * element_bytes(dtype);
  uint16_t half;
  switch (dtype) {
    case DType::f32: {
      float value;
      std::memcpy(&value, at, 4);
      return value;
    }
    case DType::bf16:
      std::memcpy(&half, at, 2);
      return from_bf16(half);
    case DType::f16:
      std::memcpy(&half, at, 2);
      return from_f16(half);
    case DType::i8:
      return *reinterpret_cast<const int8_t*>(at);
    case DType::int4:
    case DType::mxfp4:  // see grouped_element
      break;
  }
  return NAN;
}

inline void set_element(void* data, DType dtype, int64_t index, float value) {
  char* const at = static_cast<char*>(data) + index * element_bytes(dtype);
  uint16_t half;
  switch (dtype) {
    case DType::f32:
      std::memcpy(at, &value, 4);
      break;
    case DType::bf16:
      half = to_bf16(value);
      std::memcpy(at, &half, 2);
      break;
    case DType::f16:
      half = to_f16(value);
      std::memcpy(at, &half, 2);
      break;
    case DType::i8:
      *reinterpret_cast<int8_t*>(at) = static_cast<int8_t>(value);
      break;
    case DType::int4:
    case DType::mxfp4:
      fail(ErrorKind::internal, "int4 and mxfp4 are filled by the byte");
  }
}

// Element `column` of the row of pairs at `row`, with the scales of the row's groups.
inline double grouped_element(const char* row, const char* scales, DType dtype, int64_t column) {
  const int both = static_cast<uint8_t>(row[column / 2]), code = column % 2 == 0 ? both & 15 : both >> 4;
  const char* const scale = scales + column / group_columns * group_scale_bytes(dtype);
  if (dtype == DType::int4) return (code < 8 ? code : code - 16) * element(scale, DType::f16, 0);
  const double magnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const int exponent = static_cast<uint8_t>(*scale);
  const double value = exponent == 255 ? NAN : std::ldexp(magnitudes[code & 7], exponent - 127);
  return code & 8 ? -value : value;
}

// Half a unit in the last place at `value`.
inline double half_unit(DType dtype, double value) {
  const int digits = dtype == DType::f32 ? 24 : dtype == DType::bf16 ? 8 : 11;
  const int lowest = dtype == DType::f16 ? -24 : -149;
  if (!std::isfinite(value)) return 0.0;
  if (value == 0.0) return std::ldexp(0.5, lowest);
  return std::ldexp(0.5, std::max(std::ilogb(value) - digits + 1, lowest));
}

inline double reference_activation(Activation activation, double x) {
  const auto gelu = [](double v) { return v * 0.5 * std::erfc(-v / std::sqrt(2.0)); };
  const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
  const auto softplus = [](double v) { return v > 20.0 ? v : std::log1p(std::exp(v)); };
  switch (activation) {
    case Activation::relu:
      return x < 0 ? 0 : x;
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_new:
      return x * sigmoid(2.0 * std::sqrt(2.0 / M_PI) * (x * (1.0 + 0.044715 * x * x)));
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::gelu_10: {
      const double g = gelu(x);
      return g < -10 ? -10 : g > 10 ? 10 : g;
    }
    case Activation::quick_gelu:
      return x * sigmoid(1.702 * x);
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::tanh:
      return std::tanh(x);
    case Activation::relu2:
      return x < 0 ? 0 : x * x;
    case Activation::relu6:
      return x < 0 ? 0 : x > 6 ? 6 : x;
    case Activation::leaky_relu:
      return x < 0 ? 0.01 * x : x;
    case Activation::mish:
      return x * std::tanh(softplus(x));
    case Activation::hardswish: {
      const double r = x + 3 < 0 ? 0 : x + 3 > 6 ? 6 : x + 3;
      return x * r / 6;
    }
    case Activation::laplace:
      return 0.5 * std::erfc(-(x - 0.707107) / (0.282095 * std::sqrt(2.0)));
    case Activation::linear:
      return x;
    case Activation::softplus:
      return softplus(x);
    case Activation::sqrtsoftplus:
      return std::sqrt(softplus(x));
    case Activation::swiglu_oai: {  // of the gate; its other half is below
      const double g = x > 7 ? 7 : x;
      return g * sigmoid(1.702 * g);
    }
  }
  return NAN;
}

// Those of one argument; swiglu_oai, which is gated always, comes after them.
constexpr int activation_count = static_cast<int>(Activation::sqrtsoftplus) + 1;

// What a gated hidden layer multiplies the activation with.
inline double reference_up(Activation activation, double up) {
  if (activation != Activation::swiglu_oai) return up;
  return (up < -7 ? -7 : up > 7 ? 7 : up) + 1;
}

// Bytes with a guard of known bytes before and after, the payload starting `misalign` bytes off a 64-byte line.
class Guarded {
 public:
  explicit Guarded(int64_t bytes = 0, int misalign = 0)
      : bytes_(bytes), storage_(bytes + 3 * guard, static_cast<char>(pattern)) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data()) + guard;
    offset_ = (address + 63) / 64 * 64 + misalign - reinterpret_cast<uintptr_t>(storage_.data());
    if (bytes > 0) std::memset(data(), 0, bytes);
  }
  char* data() { return storage_.data() + offset_; }
  const char* data() const { return storage_.data() + offset_; }
  int64_t bytes() const { return bytes_; }
  bool is_intact() const {
    for (int64_t i = 0; i < static_cast<int64_t>(storage_.size()); ++i) {
      const bool inside = i >= offset_ && i < offset_ + bytes_;
      if (!inside && storage_[i] != static_cast<char>(pattern)) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t guard = 128;
  static constexpr int pattern = 0xA5;
  int64_t bytes_, offset_;
  std::vector<char> storage_;
};

// A ParallelFor over threads of its own, as many as asked for; indices are taken in any order.
inline ParallelFor threads(int count) {
  static thread_local int wanted = 1;
  wanted = count;
  return {count, [](int64_t tasks, void (*body)(void*, int64_t), void* context) {
            std::atomic<int64_t> next{0};
            const auto take = [&] {
              for (int64_t i = next++; i < tasks; i = next++) body(context, i);
            };
            std::vector<std::thread> pool;
            for (int t = 1; t < wanted; ++t) pool.emplace_back(take);
            take();
            for (std::thread& thread : pool) thread.join();
          }};
}

struct Shape {
  int64_t tokens, top_k, d_model, d_ff, experts, slots;
  DType x_dtype, w_dtype;
  Activation activation;
  bool gated;
  int misalign = 0;  // bytes, in units of the element where hardware asks for it
  int64_t slot_padding = 0, row_padding = 0;
  bool biased = false;
};

struct Call {
  Shape shape;
  Guarded x, wi, wo, wi_scale, wo_scale, wi_bias, wo_bias, out, partials;
  std::vector<int32_t> expert_index, slot_of_expert;
  std::vector<float> gate;
  int64_t x_stride, wi_row, wo_row, wi_slot, wo_slot;

  Call(const Shape& s, uint64_t seed) : shape(s) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const int64_t wi_rows = s.gated ? 2 * s.d_ff : s.d_ff;
    x_stride = s.d_model + s.row_padding;
    const auto stored = [&](int64_t columns) { return row_bytes(s.w_dtype, columns) / element_bytes(s.w_dtype); };
    wi_row = stored(s.d_model) + s.row_padding;
    wo_row = stored(s.d_ff) + s.row_padding;
    wi_slot = wi_rows * wi_row + s.slot_padding;
    wo_slot = s.d_model * wo_row + s.slot_padding;
    const auto fill = [&](Guarded& to, DType dtype, int64_t count, float deviation) {
      to = Guarded(count * element_bytes(dtype), s.misalign);
      if (is_grouped(dtype)) {
        for (int64_t i = 0; i < count; ++i) to.data()[i] = static_cast<char>(random());
        return;
      }
      for (int64_t i = 0; i < count; ++i) {
        const float value = dtype == DType::i8 ? static_cast<float>(static_cast<int>(random() % 255) - 127)
                                               : normal(random) * deviation;
        set_element(to.data(), dtype, i, value);
      }
    };
    fill(x, s.x_dtype, s.tokens == 0 ? 0 : (s.tokens - 1) * x_stride + s.d_model, 1.0f);
    // The last row of the last slot ends the buffer: a read past it hits the guard (or AddressSanitizer).
    fill(wi, s.w_dtype, s.slots * wi_slot - s.slot_padding - s.row_padding, 1.0f / std::sqrt(float(s.d_model)));
    fill(wo, s.w_dtype, s.slots * wo_slot - s.slot_padding - s.row_padding, 1.0f / std::sqrt(float(s.d_ff)));
    if (s.w_dtype == DType::i8) {
      wi_scale = Guarded(s.slots * wi_rows * 4);
      wo_scale = Guarded(s.slots * s.d_model * 4);
      for (int64_t i = 0; i < s.slots * wi_rows; ++i)
        set_element(wi_scale.data(), DType::f32, i, 0.001f + 0.0005f * (random() % 8));
      for (int64_t i = 0; i < s.slots * s.d_model; ++i)
        set_element(wo_scale.data(), DType::f32, i, 0.001f + 0.0005f * (random() % 8));
    }
    if (is_grouped(s.w_dtype)) {
      const auto fill_scales = [&](Guarded& to, int64_t rows, int64_t columns) {
        const int64_t count = s.slots * rows * groups_of(columns);
        to = Guarded(count * group_scale_bytes(s.w_dtype), s.misalign);
        for (int64_t i = 0; i < count; ++i) {
          if (s.w_dtype == DType::int4) {
            set_element(to.data(), DType::f16, i, normal(random) * 0.25f / std::sqrt(float(columns)));
          } else {
            to.data()[i] = static_cast<char>(127 - 2 + random() % 3 - std::ilogb(columns) / 2);
          }
        }
      };
      fill_scales(wi_scale, wi_rows, s.d_model);
      fill_scales(wo_scale, s.d_model, s.d_ff);
    }
    if (s.biased) {
      fill(wi_bias, DType::f32, s.slots * wi_rows, 0.5f);
      fill(wo_bias, DType::f32, s.slots * s.d_model, 0.5f);
    }
    // Slots in random order; where there are fewer than experts, the others are not resident.
    slot_of_expert.assign(s.experts, -1);
    std::vector<int32_t> order(s.experts);
    for (int64_t e = 0; e < s.experts; ++e) order[e] = static_cast<int32_t>(e);
    std::shuffle(order.begin(), order.end(), random);
    for (int64_t i = 0; i < std::min(s.slots, s.experts); ++i) slot_of_expert[order[i]] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < s.tokens * s.top_k; ++i) {
      expert_index.push_back(random() % 8 == 0 ? -1 : static_cast<int32_t>(random() % s.experts));
      gate.push_back(normal(random));
    }
    reset();
  }

  void reset() {
    out = Guarded(shape.tokens * shape.d_model * element_bytes(shape.x_dtype), shape.misalign);
    partials = shape.top_k > 1 ? Guarded(shape.tokens * shape.top_k * shape.d_model * 4) : Guarded();
  }

  MoeFfnArgs args() {
    const auto floats = [](Guarded& of) { return of.bytes() ? reinterpret_cast<const float*>(of.data()) : nullptr; };
    const auto scales = [&](Guarded& of) { return is_grouped(shape.w_dtype) ? nullptr : floats(of); };
    const auto groups = [&](Guarded& of) { return is_grouped(shape.w_dtype) ? of.data() : nullptr; };
    const int64_t wi_groups = groups_of(shape.d_model), wo_groups = groups_of(shape.d_ff);
    const int64_t wi_rows = shape.gated ? 2 * shape.d_ff : shape.d_ff;
    return {shape.tokens,
            shape.top_k,
            shape.d_model,
            shape.d_ff,
            shape.experts,
            shape.slots,
            shape.x_dtype,
            shape.w_dtype,
            x.data(),
            x_stride,
            expert_index.data(),
            gate.data(),
            {wi.data(), wi_slot, wi_row, scales(wi_scale), wi_rows, floats(wi_bias), wi_rows, groups(wi_scale),
             wi_rows * wi_groups, wi_groups},
            {wo.data(), wo_slot, wo_row, scales(wo_scale), shape.d_model, floats(wo_bias), shape.d_model,
             groups(wo_scale), shape.d_model * wo_groups, wo_groups},
            slot_of_expert.data(),
            shape.activation,
            shape.gated,
            out.data(),
            shape.top_k > 1 ? reinterpret_cast<float*>(partials.data()) : nullptr};
  }

  static void run_wave(const MoeFfnArgs& args, const ParallelFor& parallel) {
    cpu::moe_ffn_with(kernels_under_test(), args, parallel);
  }

  void run(int thread_count) {
    const MoeFfnArgs all = args();
    const ParallelFor parallel = threads(thread_count);
    run_wave(all, parallel);
    if (shape.top_k > 1) cpu::moe_ffn_combine_with(kernels_under_test(), all, parallel);
  }

  std::vector<char> bits() const { return {out.data(), out.data() + out.bytes()}; }

  bool is_intact() const {
    return x.is_intact() && wi.is_intact() && wo.is_intact() && out.is_intact() && partials.is_intact() &&
           wi_scale.is_intact() && wo_scale.is_intact() && wi_bias.is_intact() && wo_bias.is_intact();
  }

  double weight(const Guarded& of, const Guarded& scale, int64_t slot, int64_t slot_stride, int64_t row_stride,
                int64_t rows, int64_t row, int64_t column) const {
    if (is_grouped(shape.w_dtype)) {
      const int64_t columns = &of == &wi ? shape.d_model : shape.d_ff;
      return grouped_element(of.data() + slot * slot_stride + row * row_stride,
                             scale.data() + (slot * rows + row) * row_scale_bytes(shape.w_dtype, columns),
                             shape.w_dtype, column);
    }
    const double value = element(of.data(), shape.w_dtype, slot * slot_stride + row * row_stride + column);
    return shape.w_dtype == DType::i8 ? value * element(scale.data(), DType::f32, slot * rows + row) : value;
  }

  // How far a dot product of `weights` with values that are off by at most `off` may be from that of exact values.
  // Sums: 1e-5 of the magnitudes. Rounding a value to bfloat16 moves it by 2^-8 of its size, to 8 bits by half a step,
  // of which a group's largest value has 127 (kernel_bytes.h).
  double allowed_error(const std::vector<double>& weights, const std::vector<double>& values,
                       const std::vector<double>& off) const {
    const auto width = static_cast<int64_t>(values.size());
    const int terms = kernels_under_test().panel_form(DType::f32, shape.w_dtype, width).terms;
    double error = 0.0;
    for (int64_t first = 0; first < width; first += group_columns) {
      const int64_t end = std::min(first + group_columns, width);
      double largest = 0.0;
      for (int64_t k = first; k < end; ++k) largest = std::max(largest, std::fabs(values[k]) + off[k]);
      for (int64_t k = first; k < end; ++k) {
        const double size = std::fabs(values[k]) + off[k];
        const double rounding = terms == cpu::quantised_terms ? largest / 254 * (1 + 0x1p-14) + 0x1p-119
                                : terms == 1                  ? size * 0x1p-8
                                                              : 0.0;
        error += std::fabs(weights[k]) * (off[k] + rounding + 1e-5 * (size + rounding));
      }
    }
    return error;
  }

  // The float64 result of every output element and how far a correct kernel may be from it.
  void reference(std::vector<double>& expected, std::vector<double>& allowed) const {
    const Shape& s = shape;
    expected.assign(s.tokens * s.d_model, 0.0);
    allowed.assign(s.tokens * s.d_model, 0.0);
    const int64_t wi_rows = s.gated ? 2 * s.d_ff : s.d_ff;
    const bool rounds = kernels_under_test().panel_form(DType::f32, s.w_dtype, s.d_model).terms != 0;
    const std::vector<double> exact(s.d_model, 0.0);
    for (int64_t t = 0; t < s.tokens; ++t) {
      std::vector<double> token(s.d_model);
      for (int64_t d = 0; d < s.d_model; ++d) token[d] = element(x.data(), s.x_dtype, t * x_stride + d);
      for (int64_t k = 0; k < s.top_k; ++k) {
        const int32_t expert = expert_index[t * s.top_k + k];
        if (expert < 0 || slot_of_expert[expert] < 0) continue;
        const int64_t slot = slot_of_expert[expert];
        std::vector<double> h(s.d_ff), h_error(s.d_ff), weights(s.d_model);
        for (int64_t f = 0; f < s.d_ff; ++f) {
          const auto product = [&](int64_t row, double& error) {
            double sum = 0.0;
            for (int64_t d = 0; d < s.d_model; ++d) {
              weights[d] = weight(wi, wi_scale, slot, wi_slot, wi_row, wi_rows, row, d);
              sum += weights[d] * token[d];
            }
            error = allowed_error(weights, token, exact);
            if (s.biased) {
              const double bias = element(wi_bias.data(), DType::f32, slot * wi_rows + row);
              sum += bias;
              error += 1e-5 * std::fabs(bias);
            }
            return sum;
          };
          double error, up_error = 0.0;
          const double z = product(f, error);
          const double a = reference_activation(s.activation, z);
          h[f] = a;
          // An activation may turn within a wide interval: its ends alone do not bound it.
          const int steps = rounds ? 8 : 1;
          for (int step = -steps; step <= steps; ++step) {
            const double moved = reference_activation(s.activation, z + error * step / steps);
            h_error[f] = std::max(h_error[f], std::fabs(moved - a));
          }
          if (rounds) h_error[f] *= 1.01;
          if (s.gated) {
            const double up = reference_up(s.activation, product(s.d_ff + f, up_error));
            h[f] = a * up;
            h_error[f] = h_error[f] * (std::fabs(up) + (rounds ? up_error : 0.0)) + std::fabs(a) * up_error;
          }
        }
        const double g = gate[t * s.top_k + k];
        weights.resize(s.d_ff);
        for (int64_t d = 0; d < s.d_model; ++d) {
          double sum = 0.0;
          for (int64_t f = 0; f < s.d_ff; ++f) {
            weights[f] = weight(wo, wo_scale, slot, wo_slot, wo_row, s.d_model, d, f);
            sum += weights[f] * h[f];
          }
          double error = allowed_error(weights, h, h_error);
          if (s.biased) {
            const double bias = element(wo_bias.data(), DType::f32, slot * s.d_model + d);
            sum += bias;
            error += 1e-5 * std::fabs(bias);
          }
          expected[t * s.d_model + d] += g * sum;
          allowed[t * s.d_model + d] += std::fabs(g) * error;
        }
      }
    }
    for (size_t i = 0; i < expected.size(); ++i) allowed[i] += half_unit(s.x_dtype, expected[i]);
  }
};

}  // namespace sida::test
