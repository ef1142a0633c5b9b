#include "bindings/measure_compute.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <string_view>

#include "base/at_end.h"
#include "base/error.h"
#include "bindings/tensors.h"
#include "kernels/activation.h"

namespace sida {
namespace {

// More than most caches hold; a cache of several hundred MiB makes the measured rate too high.
constexpr int64_t walked_bytes = 192ll << 20;
constexpr int fewest_calls = 3;
// Every format reads this byte as a small positive number: 0.0115 in float32 and bfloat16, 1.06 in float16, 60 in int8;
// of two 4-bit weights int4 reads 3 and -4.
constexpr int filler = 0x3c;

ScalarType torch_dtype(const std::string& name) {
  if (name == "float32") return ScalarType::Float;
  if (name == "bfloat16") return ScalarType::BFloat16;
  if (name == "float16") return ScalarType::Half;
  fail(ErrorKind::invalid, "dtype is '", name, "', expected float32, bfloat16 or float16");
}

void check_count(const char* name, int64_t value) {
  if (value < 1) fail(ErrorKind::invalid, name, " is ", value, ", expected at least 1");
}

int64_t bytes_of(ScalarType type) {
  return type == ScalarType::Float ? 4 : type == ScalarType::BFloat16 || type == ScalarType::Half ? 2 : 1;
}

Tensor empty_on_cpu(const std::vector<int64_t>& shape, ScalarType type) {
  return taken(call_torch("aten::empty", "memory_format", Shape(shape), std::optional(type), std::nullopt, std::nullopt,
                          std::nullopt, std::nullopt)[0]);
}

// Uninitialised pages would be one page of zeros, which no memory is read for.
Tensor filled(const std::vector<int64_t>& shape, ScalarType type) {
  const Tensor tensor = empty_on_cpu(shape, type);
  std::memset(tensor.mutable_data_ptr(), filler, tensor.numel() * bytes_of(type));
  return tensor;
}

template <class Element, class ValueAt>
Tensor made(const std::vector<int64_t>& shape, ScalarType type, const ValueAt& value_at) {
  const Tensor tensor = empty_on_cpu(shape, type);
  auto* const elements = tensor.mutable_data_ptr<Element>();
  for (int64_t i = 0, count = tensor.numel(); i < count; ++i) elements[i] = value_at(i);
  return tensor;
}

// Runs `body` as under torch.no_grad().
template <class Body>
auto without_grad(const Body& body) {
  const AtEnd restore([before = aoti_torch_grad_mode_is_enabled()] { aoti_torch_grad_mode_set_enabled(before); });
  aoti_torch_grad_mode_set_enabled(false);
  return body();
}

std::vector<double> timed(double seconds, const std::function<void(int64_t)>& call) {
  if (!std::isfinite(seconds) || seconds < 0) fail(ErrorKind::invalid, "seconds is ", seconds, ", expected 0 or more");
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  call(0);
  std::vector<double> found;
  const auto start = Clock::now();
  for (int64_t number = 1; found.size() < fewest_calls || since(start) < seconds; ++number) {
    const auto begin = Clock::now();
    call(number);
    found.push_back(since(begin));
  }
  return found;
}

}  // namespace

std::vector<double> measure_moe_ffn(int64_t d_model, int64_t d_ff, const std::string& activation,
                                    const std::string& dtype, int64_t experts, int64_t tokens, double seconds) {
  check_count("d_model", d_model);
  check_count("d_ff", d_ff);
  check_count("experts", experts);
  check_count("tokens", tokens);
  const std::optional<ActivationName> known = parse_activation(activation);
  if (!known) fail(ErrorKind::invalid, "activation is '", activation, "', expected one of ", activation_names());
  const int64_t wi_rows = known->gated ? 2 * d_ff : d_ff;
  const bool grouped = dtype == "int4" || dtype == "mxfp4";
  const ScalarType type = grouped ? ScalarType::Byte : dtype == "int8" ? ScalarType::Char : torch_dtype(dtype);
  // Elements in a row: 4-bit weights lie in pairs, in whole groups of 32.
  const auto columns = [&](int64_t weights) { return grouped ? (weights + 31) / 32 * 16 : weights; };
  const int64_t expert_bytes = (wi_rows * columns(d_model) + d_model * columns(d_ff)) * bytes_of(type);
  const int64_t slots = std::max(experts, (walked_bytes + expert_bytes - 1) / expert_bytes / experts * experts);
  const Tensor x =
      filled({experts * tokens, d_model}, type == ScalarType::Float ? ScalarType::Float : ScalarType::BFloat16);
  const Tensor wi = filled({slots, wi_rows, columns(d_model)}, type);
  const Tensor wo = filled({slots, d_model, columns(d_ff)}, type);
  std::optional<Tensor> wi_scale, wo_scale;
  if (grouped) {
    const ScalarType scales = dtype == "int4" ? ScalarType::Half : ScalarType::Byte;
    wi_scale = filled({slots, wi_rows, (d_model + 31) / 32}, scales);
    wo_scale = filled({slots, d_model, (d_ff + 31) / 32}, scales);
  } else if (type == ScalarType::Char) {
    const auto factor = [](int64_t) { return 1e-3f; };
    wi_scale = made<float>({slots, wi_rows}, ScalarType::Float, factor);
    wo_scale = made<float>({slots, d_model}, ScalarType::Float, factor);
  }
  const Tensor index = made<int32_t>({experts * tokens, 1}, ScalarType::Int,
                                     [&](int64_t row) { return static_cast<int32_t>(row / tokens); });
  const Tensor gate = made<float>({experts * tokens, 1}, ScalarType::Float, [](int64_t) { return 1.0f; });
  const std::optional<Tensor> no_bias;
  return without_grad([&] {
    return timed(seconds, [&](int64_t number) {
      const int64_t first = number * experts % slots;
      const Tensor slot_of_expert = made<int32_t>({experts}, ScalarType::Int,
                                                  [&](int64_t expert) { return static_cast<int32_t>(first + expert); });
      taken(call_torch("sida::moe_ffn", "", x, index, gate, wi, wo, slot_of_expert, wi_scale, wo_scale, activation,
                       no_bias, no_bias, std::string("error"))[0]);
    });
  });
}

std::vector<double> measure_linear(int64_t rows, int64_t columns, const std::string& dtype, int64_t tokens,
                                   double seconds) {
  check_count("rows", rows);
  check_count("columns", columns);
  check_count("tokens", tokens);
  const ScalarType type = torch_dtype(dtype);
  const int64_t matrix_bytes = rows * columns * bytes_of(type);
  const int64_t matrices = std::max<int64_t>(1, walked_bytes / matrix_bytes);
  const Tensor x = filled({tokens, columns}, type);
  const Tensor weights = filled({matrices, rows, columns}, type);
  return without_grad([&] {
    return timed(seconds, [&](int64_t number) {
      const Tensor weight = taken(call_torch("aten::select", "int", weights, int64_t{0}, number % matrices)[0]);
      taken(call_torch("aten::linear", "", x, weight, std::nullopt)[0]);
    });
  });
}

}  // namespace sida
