#include "bindings/measure_compute.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <string_view>

#include "base/error.h"
#include "kernels/activation.h"

namespace sida {
namespace {

using at::Tensor;

// More than most caches hold; a cache of several hundred MiB makes the measured rate too high.
constexpr int64_t walked_bytes = 192ll << 20;
constexpr int fewest_calls = 3;
// Every format reads this byte as a small positive number: 0.0115 in float32 and bfloat16, 1.06 in float16, 60 in int8;
// of two 4-bit weights int4 reads 3 and -4.
constexpr int filler = 0x3c;

at::ScalarType torch_dtype(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  fail(ErrorKind::invalid, "dtype is '", name, "', expected float32, bfloat16 or float16");
}

void check_count(const char* name, int64_t value) {
  if (value < 1) fail(ErrorKind::invalid, name, " is ", value, ", expected at least 1");
}

// Uninitialised pages would be one page of zeros, which no memory is read for.
Tensor filled(at::IntArrayRef shape, at::ScalarType dtype) {
  const Tensor tensor = at::empty(shape, dtype);
  std::memset(tensor.mutable_data_ptr(), filler, tensor.nbytes());
  return tensor;
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
  const at::NoGradGuard no_grad;
  const int64_t wi_rows = known->gated ? 2 * d_ff : d_ff;
  const bool grouped = dtype == "int4" || dtype == "mxfp4";
  const at::ScalarType type = grouped ? at::kByte : dtype == "int8" ? at::kChar : torch_dtype(dtype);
  const int64_t packed = grouped ? 2 : 1;  // weights in an element
  const int64_t item = static_cast<int64_t>(c10::elementSize(type));
  const int64_t expert_bytes = std::max<int64_t>(1, (wi_rows + d_ff) * d_model * item / packed);
  const int64_t slots = std::max(experts, (walked_bytes + expert_bytes - 1) / expert_bytes / experts * experts);
  const Tensor x = filled({experts * tokens, d_model}, type == at::kFloat ? at::kFloat : at::kBFloat16);
  const Tensor wi = filled({slots, wi_rows, d_model / packed}, type);
  const Tensor wo = filled({slots, d_model, d_ff / packed}, type);
  c10::IValue wi_scale, wo_scale;
  if (grouped) {
    const at::ScalarType scales = dtype == "int4" ? at::kHalf : at::kByte;
    wi_scale = filled({slots, wi_rows, (d_model + 31) / 32}, scales);
    wo_scale = filled({slots, d_model, (d_ff + 31) / 32}, scales);
  } else if (type == at::kChar) {
    wi_scale = at::full({slots, wi_rows}, 1e-3, at::kFloat);
    wo_scale = at::full({slots, d_model}, 1e-3, at::kFloat);
  }
  const Tensor index = at::arange(experts, at::kInt).repeat_interleave(tokens).unsqueeze(1);
  const Tensor gate = at::ones({experts * tokens, 1}, at::kFloat);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("sida::moe_ffn", "");
  return timed(seconds, [&](int64_t number) {
    const int64_t first = number * experts % slots;
    torch::jit::Stack stack;
    for (const c10::Argument& argument : op.schema().arguments()) {
      const std::string_view name = argument.name();
      if (name == "x") {
        stack.emplace_back(x);
      } else if (name == "expert_index") {
        stack.emplace_back(index);
      } else if (name == "gate") {
        stack.emplace_back(gate);
      } else if (name == "wi") {
        stack.emplace_back(wi);
      } else if (name == "wo") {
        stack.emplace_back(wo);
      } else if (name == "slot_of_expert") {
        stack.emplace_back(at::arange(first, first + experts, at::kInt));
      } else if (name == "wi_scale") {
        stack.emplace_back(wi_scale);
      } else if (name == "wo_scale") {
        stack.emplace_back(wo_scale);
      } else if (name == "activation") {
        stack.emplace_back(activation);
      } else {
        stack.emplace_back(argument.default_value().value());
      }
    }
    op.callBoxed(&stack);
  });
}

std::vector<double> measure_linear(int64_t rows, int64_t columns, const std::string& dtype, int64_t tokens,
                                   double seconds) {
  check_count("rows", rows);
  check_count("columns", columns);
  check_count("tokens", tokens);
  const at::NoGradGuard no_grad;
  const at::ScalarType type = torch_dtype(dtype);
  const int64_t matrix_bytes = rows * columns * static_cast<int64_t>(c10::elementSize(type));
  const int64_t matrices = std::max<int64_t>(1, walked_bytes / matrix_bytes);
  const Tensor x = filled({tokens, columns}, type);
  const Tensor weights = filled({matrices, rows, columns}, type);
  return timed(seconds, [&](int64_t number) { at::linear(x, weights[number % matrices]); });
}

}  // namespace sida
