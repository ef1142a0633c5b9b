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

constexpr int fewest_calls = 3;
// Every format reads this byte as a small positive number: 0.0115 in float32 and bfloat16, 1.06 in float16, 60 in int8;
// of two 4-bit weights int4 reads 3 and -4.
constexpr int filler = 0x3c;

ScalarType torch_dtype(const std::string& name, const char* argument) {
  if (name == "float32") return ScalarType::Float;
  if (name == "bfloat16") return ScalarType::BFloat16;
  if (name == "float16") return ScalarType::Half;
  fail(ErrorKind::invalid, argument, " is '", name, "', expected float32, bfloat16 or float16");
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
Tensor filled(const std::vector<int64_t>& shape, ScalarType type, int byte = filler) {
  const Tensor tensor = empty_on_cpu(shape, type);
  std::memset(tensor.mutable_data_ptr(), byte, tensor.numel() * bytes_of(type));
  return tensor;
}

template <class Element, class ValueAt>
Tensor made(const std::vector<int64_t>& shape, ScalarType type, const ValueAt& value_at) {
  const Tensor tensor = empty_on_cpu(shape, type);
  auto* const elements = tensor.mutable_data_ptr<Element>();
  for (int64_t i = 0, count = tensor.numel(); i < count; ++i) elements[i] = value_at(i);
  return tensor;
}

struct Weights {
  Tensor values;
  std::optional<Tensor> scale;
};

// How weights of a type lie in memory: 4-bit ones in pairs, in whole groups of 32 with a scale; int8 with one for each
// row.
class Format {
 public:
  explicit Format(const std::string& name)
      : grouped_(name == "int4" || name == "mxfp4"),
        scales_(name == "int4" ? ScalarType::Half : ScalarType::Byte),
        type_(grouped_         ? ScalarType::Byte
              : name == "int8" ? ScalarType::Char
                               : torch_dtype(name, "dtype")) {}

  // Of a matrix, without its scales.
  int64_t bytes(int64_t rows, int64_t columns) const { return rows * row(columns) * bytes_of(type_); }

  Weights weights(int64_t count, int64_t rows, int64_t columns) const {
    std::optional<Tensor> scale;
    if (grouped_) {
      // One byte is the exponent of a power of two: 2^-5, for products of smaller ones would be denormal.
      scale = filled({count, rows, groups(columns)}, scales_, scales_ == ScalarType::Byte ? 122 : filler);
    } else if (type_ == ScalarType::Char) {
      scale = made<float>({count, rows}, ScalarType::Float, [](int64_t) { return 1e-3f; });
    }
    return {filled({count, rows, row(columns)}, type_), scale};
  }

 private:
  static int64_t groups(int64_t columns) { return (columns + 31) / 32; }
  int64_t row(int64_t columns) const { return grouped_ ? groups(columns) * 16 : columns; }  // elements of it

  const bool grouped_;
  const ScalarType scales_, type_;
};

// Calls whose weights together are at least `walked` bytes.
int64_t calls_in(int64_t walked, int64_t bytes_of_call) {
  return std::max<int64_t>(1, (walked + bytes_of_call - 1) / bytes_of_call);
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

Times measure_moe_ffn(int64_t d_model, int64_t d_ff, const std::string& activation, const std::string& dtype,
                      int64_t experts, const std::vector<int64_t>& tokens, double seconds, const std::string& x_dtype,
                      int64_t walked) {
  check_count("d_model", d_model);
  check_count("d_ff", d_ff);
  check_count("experts", experts);
  check_count("walked", walked);
  for (const int64_t count : tokens) check_count("tokens", count);
  const std::optional<ActivationName> known = parse_activation(activation);
  if (!known) fail(ErrorKind::invalid, "activation is '", activation, "', expected one of ", activation_names());
  const int64_t wi_rows = known->gated ? 2 * d_ff : d_ff;
  const Format format(dtype);
  const ScalarType x_type = torch_dtype(x_dtype, "x_dtype");
  const int64_t calls = calls_in(walked, experts * (format.bytes(wi_rows, d_model) + format.bytes(d_model, d_ff)));
  const Weights wi = format.weights(calls * experts, wi_rows, d_model);
  const Weights wo = format.weights(calls * experts, d_model, d_ff);
  const std::optional<Tensor> no_bias;
  Times found;
  for (const int64_t count : tokens) {
    const Tensor x = filled({experts * count, d_model}, x_type);
    const Tensor index = made<int32_t>({experts * count, 1}, ScalarType::Int,
                                       [&](int64_t row) { return static_cast<int32_t>(row / count); });
    const Tensor gate = made<float>({experts * count, 1}, ScalarType::Float, [](int64_t) { return 1.0f; });
    found.push_back(without_grad([&] {
      return timed(seconds, [&](int64_t number) {
        const int64_t first = number % calls * experts;
        const Tensor slot_of_expert = made<int32_t>(
            {experts}, ScalarType::Int, [&](int64_t expert) { return static_cast<int32_t>(first + expert); });
        taken(call_torch("sida::moe_ffn", "", x, index, gate, wi.values, wo.values, slot_of_expert, wi.scale, wo.scale,
                         activation, no_bias, no_bias, std::string("error"))[0]);
      });
    }));
  }
  return found;
}

Times measure_linear(int64_t rows, int64_t columns, const std::string& dtype, const std::vector<int64_t>& tokens,
                     double seconds, const std::string& x_dtype, int64_t walked) {
  check_count("rows", rows);
  check_count("columns", columns);
  check_count("walked", walked);
  for (const int64_t count : tokens) check_count("tokens", count);
  const ScalarType x_type = torch_dtype(x_dtype, "x_dtype");
  const bool torchs = dtype == "torch";
  const Format format(torchs ? x_dtype : dtype);
  const int64_t matrices = calls_in(walked, format.bytes(rows, columns));
  const Weights all = format.weights(matrices, rows, columns);
  const auto one = [](const Tensor& tensor, int64_t number) {
    return taken(call_torch("aten::select", "int", tensor, int64_t{0}, number)[0]);
  };
  const std::optional<Tensor> no_bias;
  Times found;
  for (const int64_t count : tokens) {
    const Tensor x = filled({count, columns}, x_type);
    found.push_back(without_grad([&] {
      return timed(seconds, [&](int64_t number) {
        const Tensor weight = one(all.values, number % matrices);
        if (torchs) {
          taken(call_torch("aten::linear", "", x, weight, std::nullopt)[0]);
          return;
        }
        std::optional<Tensor> scale;
        if (all.scale) scale = one(*all.scale, number % matrices);
        taken(call_torch("sida::linear", "", x, weight, scale, no_bias)[0]);
      });
    }));
  }
  return found;
}

}  // namespace sida
