// Argument checks that the ops of every device share.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "bindings/op_error.h"
#include "bindings/tensors.h"
#include "kernels/activation.h"
#include "kernels/linear.h"
#include "kernels/moe_ffn.h"

namespace sida {

inline DType dtype_of(const Tensor& tensor, const char* op, const char* name, bool weights) {
  switch (type_of(tensor)) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Char:
      if (weights) return DType::i8;
      [[fallthrough]];
    default:
      CHECK_TYPE(false, op, ": ", name, " has dtype ", type_of(tensor), ", expected float32, bfloat16",
                 weights ? ", float16, int8 or uint8 (4 bits)" : " or float16");
  }
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* op, const char* name) {
  CHECK_VALUE(Place(tensor) == Place(like), op, ": ", name, " is on ", Place(tensor), ", expected ", Place(like),
              ", the device of x");
}

inline void check_dims(const Tensor& tensor, int64_t dims, const char* op, const char* name, const char* shape) {
  CHECK_VALUE(tensor.dim() == dims, op, ": ", name, " has shape ", Text(tensor), ", expected ", dims, " dimensions, ",
              shape);
}

inline void check_size(const Tensor& tensor, int64_t dim, int64_t expected, const char* op, const char* name,
                       const char* meaning) {
  CHECK_VALUE(tensor.size(dim) == expected, op, ": ", name, " has shape ", Text(tensor), ", expected ", expected, " (",
              meaning, ") in dimension ", dim);
}

inline void check_rows(const Tensor& tensor, const char* op, const char* name) {
  CHECK_VALUE(tensor.size(-1) <= 1 || tensor.stride(-1) == 1, op, ": rows of ", name, " are not contiguous (stride ",
              tensor.stride(-1), " in the last dimension), expected stride 1; ", "call .contiguous()");
}

// [T, K] of any integer type as contiguous int32, every value checked against [-1, limit) before it is narrowed.
inline Tensor checked_index(const Tensor& index, int64_t limit, const char* op, const char* name, const char* of) {
  const auto type = type_of(index);
  CHECK_TYPE(is_integral(type), op, ": ", name, " has dtype ", type, ", expected an integer type");
  const auto check = [&](const auto* value, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      CHECK_INDEX(value[i] >= -1 && value[i] < limit, op, ": ", name, " holds ", value[i], " at flat position ", i,
                  ", expected a value from -1 to ", limit - 1, " (", of, ")");
    }
  };
  if (type == ScalarType::Int) {
    const Tensor narrow = contiguous(index);
    check(narrow.const_data_ptr<int32_t>(), narrow.numel());
    return narrow;
  }
  const Tensor wide = contiguous(as_type(index, ScalarType::Long));
  check(wide.const_data_ptr<int64_t>(), wide.numel());
  return as_type(wide, ScalarType::Int);
}

// The type of weights. uint8 weights are pairs of 4-bit values, whose kind the type of their scales tells.
inline DType weight_dtype(const Tensor& weight, const std::optional<Tensor>& scale, const char* op, const char* name,
                          const char* scale_name) {
  if (type_of(weight) != ScalarType::Byte) return dtype_of(weight, op, name, /*weights=*/true);
  CHECK_VALUE(scale.has_value(), op, ": ", name, " has dtype uint8, pairs of 4-bit values, and needs ", scale_name,
              ": float16 for int4, uint8 for mxfp4");
  const auto type = type_of(*scale);
  CHECK_TYPE(type == ScalarType::Half || type == ScalarType::Byte, op, ": ", scale_name, " has dtype ", type,
             ", expected float16 (int4) or uint8 (mxfp4) with weights of dtype uint8");
  return type == ScalarType::Half ? DType::int4 : DType::mxfp4;
}

// How many elements of its tensor a row of `columns` weights takes, in words for an error.
inline std::pair<int64_t, const char*> stored_columns(DType dtype, int64_t columns, const char* plain,
                                                      const char* grouped) {
  return is_grouped(dtype) ? std::pair{row_bytes(dtype, columns), grouped} : std::pair{columns, plain};
}

// The scales of weights [slots, rows, ...] or [rows, ...], `columns` columns wide: one for each row of an int8 matrix,
// one for each group of a 4-bit one, none for the other types.
inline void set_scale(ExpertMatrix& matrix, const std::optional<Tensor>& scale, const Tensor& weight, DType dtype,
                      int64_t columns, const char* op, const char* name, const char* scale_name) {
  if (dtype != DType::i8 && !is_grouped(dtype)) {
    CHECK_VALUE(!scale.has_value(), op, ": ", scale_name, " was given, but ", name, " has dtype ", type_of(weight),
                "; scales go with int8 and 4-bit weights only");
    return;
  }
  std::vector<int64_t> shape = shape_of(weight);
  shape.pop_back();
  if (is_grouped(dtype)) shape.push_back(groups_of(columns));
  CHECK_VALUE(scale.has_value(), op, ": ", name, " has dtype int8 and needs ", scale_name,
              ", a float32 tensor of shape ", Text(shape));
  const auto type = dtype == DType::i8 ? ScalarType::Float : dtype == DType::int4 ? ScalarType::Half : ScalarType::Byte;
  CHECK_TYPE(type_of(*scale) == type, op, ": ", scale_name, " has dtype ", type_of(*scale), ", expected ", type);
  CHECK_VALUE(Place(*scale) == Place(weight), op, ": ", scale_name, " is on ", Place(*scale), ", expected ",
              Place(weight), ", the device of x");
  CHECK_VALUE(shape_of(*scale) == shape, op, ": ", scale_name, " has shape ", Text(*scale), ", expected ", Text(shape));
  CHECK_VALUE(scale->size(-1) <= 1 || scale->stride(-1) == 1, op, ": rows of ", scale_name,
              " are not contiguous (stride ", scale->stride(-1), "), expected stride 1");
  if (dtype == DType::i8) {
    matrix.scale = scale->const_data_ptr<float>();
    matrix.scale_slot_stride = weight.dim() == 3 ? scale->stride(0) : 0;
  } else {
    matrix.group_scale = scale->const_data_ptr();
    matrix.group_scale_slot_stride = weight.dim() == 3 ? scale->stride(0) : 0;
    matrix.group_scale_row_stride = scale->stride(-2);
  }
}

// One bias for each row of weights [slots, rows, ...] or [rows, ...], or none.
inline void set_bias(ExpertMatrix& matrix, const std::optional<Tensor>& bias, const Tensor& weight, const char* op,
                     const char* name) {
  if (!bias.has_value()) return;
  std::vector<int64_t> shape = shape_of(weight);
  shape.pop_back();
  CHECK_TYPE(type_of(*bias) == ScalarType::Float, op, ": ", name, " has dtype ", type_of(*bias), ", expected float32");
  CHECK_VALUE(Place(*bias) == Place(weight), op, ": ", name, " is on ", Place(*bias), ", expected ", Place(weight),
              ", the device of x");
  CHECK_VALUE(shape_of(*bias) == shape, op, ": ", name, " has shape ", Text(*bias), ", expected ", Text(shape));
  CHECK_VALUE(bias->size(-1) <= 1 || bias->stride(-1) == 1, op, ": rows of ", name, " are not contiguous (stride ",
              bias->stride(-1), "), expected stride 1");
  matrix.bias = bias->const_data_ptr<float>();
  matrix.bias_slot_stride = weight.dim() == 3 ? bias->stride(0) : 0;
}

inline ActivationName checked_activation(std::string_view name, const char* op) {
  const std::optional<ActivationName> known = parse_activation(name);
  CHECK_VALUE(known.has_value(), op, ": activation is '", name, "', expected one of ", activation_names());
  return *known;
}

// Types and shapes of the tokens, their experts and their gates, as both ops take them; x's type.
inline DType check_tokens(const Tensor& x, const Tensor& expert_index, const Tensor& gate, const char* op) {
  const DType dtype = dtype_of(x, op, "x", /*weights=*/false);
  check_dims(x, 2, op, "x", "[tokens, d_model]");
  check_rows(x, op, "x");
  check_dims(expert_index, 2, op, "expert_index", "[tokens, top_k]");
  check_size(expert_index, 0, x.size(0), op, "expert_index", "tokens, as in x");
  CHECK_VALUE(expert_index.size(1) >= 1, op, ": expert_index has shape ", Text(expert_index),
              ", expected top_k of at least 1");
  CHECK_TYPE(type_of(gate) == ScalarType::Float, op, ": gate has dtype ", type_of(gate), ", expected float32");
  CHECK_VALUE(shape_of(gate) == shape_of(expert_index), op, ": gate has shape ", Text(gate), ", expected ",
              Text(expert_index), ", the shape of expert_index");
  return dtype;
}

struct Tokens {
  Tensor index, gate;  // int32 [T, K] and fp32 [T, K], contiguous
  DType dtype;
};

struct Results {
  Tensor out;
  std::optional<Tensor> partials;
};

// Sets what is the tokens' and the results'; these are zeros.
inline Results set_tokens(MoeFfnArgs& args, const Tensor& x, const Tokens& tokens) {
  args.tokens = x.size(0);
  args.top_k = tokens.index.size(1);
  args.d_model = x.size(1);
  args.x_dtype = tokens.dtype;
  args.x = x.const_data_ptr();
  args.x_row_stride = x.size(0) > 1 ? x.stride(0) : x.size(1);
  args.expert_index = tokens.index.const_data_ptr<int32_t>();
  args.gate = tokens.gate.const_data_ptr<float>();
  Results results{zeros({args.tokens, args.d_model}, type_of(x), x), std::nullopt};
  args.out = results.out.mutable_data_ptr();
  if (args.top_k > 1) {
    results.partials = zeros({args.tokens, args.top_k, args.d_model}, ScalarType::Float, x);
    args.partials = results.partials->mutable_data_ptr<float>();
  }
  return results;
}

// Types and shapes of the weights of moe_ffn; the type of both.
inline DType check_weights(const Tensor& x, const Tensor& wi, const Tensor& wo, const Tensor& slot_of_expert,
                           const std::optional<Tensor>& wi_scale, const std::optional<Tensor>& wo_scale, bool gated,
                           const char* op) {
  const DType dtype = weight_dtype(wi, wi_scale, op, "wi", "wi_scale");
  CHECK_TYPE(type_of(wo) == type_of(wi), op, ": wo has dtype ", type_of(wo), ", expected ", type_of(wi),
             ", the dtype of wi");
  const DType wo_dtype = weight_dtype(wo, wo_scale, op, "wo", "wo_scale");
  CHECK_TYPE(wo_dtype == dtype, op, ": wo is ", dtype_name(wo_dtype), " (by the dtype of wo_scale), expected ",
             dtype_name(dtype), ", as wi");
  check_device(wi, x, op, "wi");
  check_device(wo, x, op, "wo");
  check_device(slot_of_expert, x, op, "slot_of_expert");
  check_dims(wi, 3, op, "wi", "[slots, d_ff (gated: 2 * d_ff), d_model]");
  check_dims(wo, 3, op, "wo", "[slots, d_model, d_ff]");
  const auto [wi_columns, wi_meaning] =
      stored_columns(dtype, x.size(1), "d_model, as in x", "16 for each 32 columns of x");
  check_size(wi, 2, wi_columns, op, "wi", wi_meaning);
  check_size(wo, 1, x.size(1), op, "wo", "d_model, as in x");
  check_size(wo, 0, wi.size(0), op, "wo", "slots, as in wi");
  if (is_grouped(dtype)) {
    CHECK_VALUE(!gated || wi.size(1) % 2 == 0, op, ": wi has shape ", Text(wi), ", expected an even number of ",
                "rows for a gated activation, gate and up");
    const int64_t d_ff = wi.size(1) / (gated ? 2 : 1);
    check_size(wo, 2, row_bytes(dtype, d_ff), op, "wo",
               gated ? "16 for each 32 of half the rows of wi" : "16 for each 32 rows of wi");
  } else {
    check_size(wi, 1, wo.size(2) * (gated ? 2 : 1), op, "wi", gated ? "2 * d_ff, d_ff as in wo" : "d_ff, as in wo");
  }
  check_rows(wi, op, "wi");
  check_rows(wo, op, "wo");
  CHECK_TYPE(type_of(slot_of_expert) == ScalarType::Int, op, ": slot_of_expert has dtype ", type_of(slot_of_expert),
             ", expected int32");
  return dtype;
}

inline void set_weights(MoeFfnArgs& args, DType dtype, const Tensor& wi, const Tensor& wo,
                        const std::optional<Tensor>& wi_scale, const std::optional<Tensor>& wo_scale,
                        const std::optional<Tensor>& wi_bias, const std::optional<Tensor>& wo_bias, bool gated,
                        const char* op) {
  args.d_ff = wi.size(1) / (gated ? 2 : 1);
  args.gated = gated;
  args.num_slots = wi.size(0);
  args.w_dtype = dtype;
  args.wi = {wi.const_data_ptr(), wi.stride(0), wi.stride(1), nullptr, 0};
  args.wo = {wo.const_data_ptr(), wo.stride(0), wo.stride(1), nullptr, 0};
  set_scale(args.wi, wi_scale, wi, dtype, args.d_model, op, "wi", "wi_scale");
  set_scale(args.wo, wo_scale, wo, dtype, args.d_ff, op, "wo", "wo_scale");
  set_bias(args.wi, wi_bias, wi, op, "wi_bias");
  set_bias(args.wo, wo_bias, wo, op, "wo_bias");
}

// [..., columns] as [rows, columns].
inline Tensor as_rows(const Tensor& x, int64_t columns) {
  const std::array<int64_t, 2> shape{-1, columns};
  return taken(call_torch("aten::reshape", "", x, Shape(shape))[0]);
}

struct LinearCall {
  LinearArgs args;
  Tensor tokens;  // what args.x points to
  Tensor out;     // not initialised
};

// Types and shapes of the arguments of linear, and memory for its result.
inline LinearCall checked_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& bias, const char* op) {
  LinearArgs args{};
  args.x_dtype = dtype_of(x, op, "x", /*weights=*/false);
  args.w_dtype = weight_dtype(weight, scale, op, "weight", "scale");
  CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, op, ": x has shape ", Text(x),
              ", expected [..., columns] with at least one column");
  args.columns = x.size(-1);
  check_device(weight, x, op, "weight");
  check_dims(weight, 2, op, "weight", "[rows, columns]");
  const auto [columns, meaning] =
      stored_columns(args.w_dtype, args.columns, "columns, as in x", "16 for each 32 columns of x");
  check_size(weight, 1, columns, op, "weight", meaning);
  check_rows(weight, op, "weight");
  args.rows = weight.size(0);
  args.w = {weight.const_data_ptr(), 0, weight.stride(0), nullptr, 0};
  set_scale(args.w, scale, weight, args.w_dtype, args.columns, op, "weight", "scale");
  set_bias(args.w, bias, weight, op, "bias");

  const bool is_flat = x.dim() == 2 && (x.size(1) == 1 || x.stride(1) == 1);
  const Tensor tokens = is_flat ? x : contiguous(as_rows(x, args.columns));
  args.tokens = tokens.size(0);
  args.x = tokens.const_data_ptr();
  args.x_row_stride = args.tokens > 1 ? tokens.stride(0) : args.columns;
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = args.rows;
  const Tensor out = empty(shape, type_of(x), x);
  args.out = out.mutable_data_ptr();
  return {args, tokens, out};
}

}  // namespace sida
