// The library `sida` of torch's operators: schemas, argument checks and the CPU kernels. What torch's stable ABI has no
// way to register, the fake implementations and the errors of a backward, is in sida_ext/ops.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "base/at_end.h"
#include "bindings/layers.h"
#include "bindings/op_checks.h"
#include "bindings/torch_threads.h"
#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/moe_ffn.h"
#include "kernels/rms_norm.h"
#include "kernels/route.h"
#include "serving/cpu_serving.h"

namespace sida {
namespace {

// The tokens with every index checked.
Tokens checked_tokens(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t num_experts,
                      const char* op) {
  check_device(expert_index, x, op, "expert_index");
  check_device(gate, x, op, "gate");
  const DType dtype = check_tokens(x, expert_index, gate, op);
  return {checked_index(expert_index, num_experts, op, "expert_index", "experts of the layer"), contiguous(gate),
          dtype};
}

Tensor moe_ffn_cpu(const Tensor& x, const Tensor& expert_index, const Tensor& gate, const Tensor& wi, const Tensor& wo,
                   const Tensor& slot_of_expert, const std::optional<Tensor>& wi_scale,
                   const std::optional<Tensor>& wo_scale, StringHandle activation_handle,
                   const std::optional<Tensor>& wi_bias, const std::optional<Tensor>& wo_bias,
                   StringHandle missing_handle) {
  constexpr const char* op = "moe_ffn";
  const std::string activation = taken(activation_handle), missing = taken(missing_handle);
  const auto [function, gated] = checked_activation(activation, op);
  CHECK_VALUE(missing == "error" || missing == "skip", op, ": missing is '", missing, "', expected 'error' or 'skip'");
  check_dims(slot_of_expert, 1, op, "slot_of_expert", "[experts]");
  const Tokens tokens = checked_tokens(x, expert_index, gate, slot_of_expert.size(0), op);
  const DType w_dtype = check_weights(x, wi, wo, slot_of_expert, wi_scale, wo_scale, gated, op);
  const Tensor slots = checked_index(slot_of_expert, wi.size(0), op, "slot_of_expert", "slots of wi");

  MoeFfnArgs args{};
  const Results results = set_tokens(args, x, tokens);
  args.num_experts = slots.size(0);
  set_weights(args, w_dtype, wi, wo, wi_scale, wo_scale, wi_bias, wo_bias, gated, op);
  args.slot_of_expert = slots.const_data_ptr<int32_t>();
  args.activation = function;
  if (missing == "error") {
    for (int64_t i = 0; i < args.tokens * args.top_k; ++i) {
      const int32_t expert = args.expert_index[i];
      CHECK_VALUE(expert < 0 || args.slot_of_expert[expert] >= 0, op, ": expert ", expert, ", wanted by token ",
                  i / args.top_k, ", is not resident (slot_of_expert[", expert, "] is -1); load it first, or ",
                  "pass missing='skip' to leave its contribution out");
    }
  }
  if (args.tokens == 0 || args.d_model == 0 || args.d_ff == 0) return results.out;
  return with_python_errors([&] {
    cpu::moe_ffn(args, torch_threads());
    if (args.top_k > 1) cpu::moe_ffn_combine(args, torch_threads());
    return results.out;
  });
}

std::tuple<Tensor, Tensor> route_top1_cpu(const Tensor& router_logits, int64_t capacity,
                                          std::optional<ScalarType> probs_dtype) {
  constexpr const char* op = "route_top1";
  dtype_of(router_logits, op, "router_logits", /*weights=*/false);
  check_dims(router_logits, 3, op, "router_logits", "[batch, sequence, experts]");
  CHECK_VALUE(router_logits.size(2) >= 1, op, ": router_logits has shape ", Text(router_logits),
              ", expected at least one expert");
  CHECK_VALUE(capacity >= 0, op, ": capacity is ", capacity, ", expected 0 or more");
  const ScalarType rounded = probs_dtype.value_or(type_of(router_logits));
  CHECK_TYPE(rounded == ScalarType::Float || rounded == ScalarType::BFloat16 || rounded == ScalarType::Half, op,
             ": probs_dtype is ", rounded, ", expected float32, bfloat16 or float16");
  // torch's own softmax and maximum, so that near ties fall as they fall in transformers.
  const int64_t last = -1;
  const Tensor softmax =
      taken(call_torch("aten::softmax", "int", router_logits, last, std::optional(ScalarType::Float))[0]);
  const auto found = call_torch<2>("aten::max", "dim", as_type(softmax, rounded), last, /*keepdim=*/false);
  const Tensor best = taken(found[0]), chosen = contiguous(taken(found[1]));
  Tensor expert_index = empty(shape_of(chosen), ScalarType::Int, chosen);
  apply_capacity(chosen.const_data_ptr<int64_t>(), chosen.size(0), chosen.size(1), router_logits.size(2), capacity,
                 expert_index.mutable_data_ptr<int32_t>());
  return {expert_index, as_type(best, ScalarType::Float)};
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& bias) {
  constexpr const char* op = "linear";
  const LinearCall call = checked_linear(x, weight, scale, bias, op);
  return with_python_errors([&] {
    cpu::linear(call.args, torch_threads());
    return call.out;
  });
}

// [sequences, heads, tokens, dim] with contiguous rows; a dimension of size 1 in `bias` stands for all.
HeadStrides head_strides(const Tensor& tensor, bool broadcast = false) {
  const auto stride = [&](int64_t dim) { return broadcast && tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
  return {stride(0), stride(1), stride(2)};
}

// Of every sequence. With four numbers each has a row of queries to itself; with six they share the only one.
std::vector<AttentionSpan> checked_spans(const Tensor& spans, const Tensor& query, const Tensor& key,
                                         const std::optional<Tensor>& bias, const char* op) {
  check_dims(spans, 2, op, "spans", "[sequences, 4 or 6]");
  const bool packed = spans.size(1) == 6;
  if (packed) {
    check_size(query, 0, 1, op, "query", "the row that the sequences of spans with six numbers stand in");
  } else {
    check_size(spans, 0, query.size(0), op, "spans", "sequences of query");
    check_size(spans, 1, 4, op, "spans", "slot, first key, one past the last, column of the first in bias");
  }
  CHECK_TYPE(type_of(spans) == ScalarType::Long, op, ": spans has dtype ", type_of(spans), ", expected int64");
  check_device(spans, query, op, "spans");
  const Tensor given = contiguous(spans);
  const int64_t* numbers = given.const_data_ptr<int64_t>();
  std::vector<AttentionSpan> checked(spans.size(0));
  int64_t taken = 0;  // queries of the sequences before
  for (int64_t b = 0; b < spans.size(0); ++b, numbers += spans.size(1)) {
    const AttentionSpan span{numbers[0],
                             numbers[1],
                             numbers[2],
                             numbers[3],
                             packed ? 0 : b,
                             packed ? numbers[4] : 0,
                             packed ? numbers[5] : query.size(2)};
    const bool inside = span.slot >= 0 && span.slot < key.size(0) && span.first >= 0 && span.first <= span.last &&
                        span.last <= key.size(2);
    CHECK_INDEX(inside, op, ": spans[", b, "] is slot ", span.slot, ", keys ", span.first, " to ", span.last,
                ", expected a slot below ", key.size(0), " and keys within 0 to ", key.size(2));
    CHECK_INDEX(!bias || (span.bias_column >= 0 && span.bias_column + span.last - span.first <= bias->size(3)), op,
                ": spans[", b, "] takes columns ", span.bias_column, " to ", span.bias_column + span.last - span.first,
                " of bias, which has ", bias ? bias->size(3) : 0);
    CHECK_INDEX(!packed || (span.first_query >= taken && span.first_query <= span.last_query &&
                            span.last_query <= query.size(2)),
                op, ": spans[", b, "] has queries ", span.first_query, " to ", span.last_query,
                ", expected them within ", taken, " (where the sequence before ends) to ", query.size(2));
    if (packed) taken = span.last_query;
    checked[b] = span;
  }
  return checked;
}

Tensor attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& spans, double scale,
                     const std::optional<Tensor>& bias, bool causal) {
  constexpr const char* op = "attention";
  AttentionArgs args{};
  args.dtype = dtype_of(query, op, "query", /*weights=*/false);
  const auto check = [&](const Tensor& tensor, const char* name) {
    check_device(tensor, query, op, name);
    CHECK_TYPE(type_of(tensor) == type_of(query), op, ": ", name, " has dtype ", type_of(tensor), ", expected ",
               type_of(query), ", that of query");
    check_dims(tensor, 4, op, name, "[sequences, heads, tokens, dim]");
    check_rows(tensor, op, name);
  };
  check(query, "query");
  check(key, "key");
  check(value, "value");
  args.heads = query.size(1), args.queries = query.size(2), args.dim = query.size(3);
  args.kv_heads = key.size(1), args.value_dim = value.size(3);
  check_size(key, 3, args.dim, op, "key", "dim of query");
  CHECK_VALUE(args.kv_heads > 0 && args.heads % args.kv_heads == 0, op, ": query has ", args.heads,
              " heads, expected a multiple of the ", args.kv_heads, " of key");
  for (int dim = 0; dim < 3; ++dim) check_size(value, dim, key.size(dim), op, "value", "as in key");
  if (bias) check(*bias, "bias");
  const std::vector<AttentionSpan> checked = checked_spans(spans, query, key, bias, op);
  const bool packed = spans.size(1) == 6;
  args.sequences = static_cast<int64_t>(checked.size());
  if (bias) {
    const auto expect = [&](int dim, int64_t size) {
      CHECK_VALUE(bias->size(dim) == 1 || bias->size(dim) == size, op, ": bias has shape ", Text(*bias),
                  ", expected 1 or ", size, " in dimension ", dim);
    };
    expect(0, args.sequences), expect(1, args.heads);
    int64_t rows = args.queries;
    if (packed) {
      rows = 0;
      for (const AttentionSpan& span : checked) rows = std::max(rows, span.last_query - span.first_query);
    }
    expect(2, rows);
  }
  args.spans = checked.data();
  args.query = query.const_data_ptr(), args.query_strides = head_strides(query);
  args.key = key.const_data_ptr(), args.key_strides = head_strides(key);
  args.value = value.const_data_ptr(), args.value_strides = head_strides(value);
  if (bias) args.bias = bias->const_data_ptr(), args.bias_strides = head_strides(*bias, /*broadcast=*/true);
  args.scale = static_cast<float>(scale);
  args.causal = causal;
  const std::vector<int64_t> shape = {query.size(0), args.queries, args.heads, args.value_dim};
  const Tensor out = packed ? zeros(shape, type_of(query), query) : empty(shape, type_of(query), query);
  args.out = out.mutable_data_ptr();
  return with_python_errors([&] {
    cpu::attention(args, torch_threads());
    return out;
  });
}

Tensor rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps) {
  constexpr const char* op = "rms_norm";
  RmsNormArgs args{};
  args.dtype = dtype_of(x, op, "x", /*weights=*/false);
  CHECK_VALUE(x.dim() >= 1, op, ": x has 0 dimensions, expected [..., columns]");
  check_device(weight, x, op, "weight");
  check_dims(weight, 1, op, "weight", "[columns]");
  CHECK_TYPE(type_of(weight) == type_of(x), op, ": weight has dtype ", type_of(weight), ", expected ", type_of(x),
             ", that of x");
  args.columns = x.size(x.dim() - 1);
  check_size(weight, 0, args.columns, op, "weight", "columns of x");
  CHECK_VALUE(std::isfinite(eps) && eps >= 0, op, ": eps is ", eps, ", expected 0 or more");
  const Tensor given = contiguous(x), factors = contiguous(weight);
  const Tensor out = empty(shape_of(x), type_of(x), x);
  if (x.numel() == 0) return out;
  args.rows = x.numel() / args.columns;
  args.x = given.const_data_ptr(), args.weight = factors.const_data_ptr(), args.out = out.mutable_data_ptr();
  args.eps = static_cast<float>(eps);
  return with_python_errors([&] {
    cpu::rms_norm(args, torch_threads());
    return out;
  });
}

// Runs `body` as a named range of torch's profiler.
void profiled(const char* name, const std::function<void()>& body) {
  AtenRecordFunctionHandle range = nullptr;
  check_torch(aoti_record_function_start(name, nullptr, nullptr, 0, &range), "aoti_record_function_start");
  const AtEnd end([range] { aoti_record_function_end(range); });
  body();
}

Tensor moe_layer_cpu(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t handle) {
  constexpr const char* op = "moe_layer";
  return with_python_errors([&] {
    const auto layer = find_layer(handle);
    CHECK_VALUE(layer->cuda == nullptr, op, ": x is on cpu, but this layer's experts are computed on a CUDA device");
    const Tokens tokens = checked_tokens(x, expert_index, gate, layer->num_experts, op);
    check_size(x, 1, layer->engine->format().d_model, op, "x", "d_model of the expert store");

    cpu::LayerForward forward{};
    const Results results = set_tokens(forward.args, x, tokens);
    forward.args.num_experts = layer->num_experts;
    forward.args.activation = layer->activation;
    forward.layer = layer->index;
    forward.batch = current_batch();
    forward.low_bit = layer->low_bit.get();
    forward.threads = torch_threads();
    forward.interrupted = signal_raised;
    forward.profiled = profiled;
    const WithoutGil waits_and_kernels;
    cpu::forward(*layer->engine, forward);
    return results.out;
  });
}

}  // namespace
}  // namespace sida

STABLE_TORCH_LIBRARY(sida, m) {
  m.def(
      "moe_ffn(Tensor x, Tensor expert_index, Tensor gate, Tensor wi, Tensor wo, Tensor slot_of_expert, "
      "Tensor? wi_scale=None, Tensor? wo_scale=None, str activation=\"relu\", *, Tensor? wi_bias=None, "
      "Tensor? wo_bias=None, str missing=\"error\") -> Tensor");
  m.def("route_top1(Tensor router_logits, int capacity, *, ScalarType? probs_dtype=None) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? scale=None, Tensor? bias=None) -> Tensor");
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor spans, float scale, Tensor? bias=None, "
      "bool causal=False) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("moe_layer(Tensor x, Tensor expert_index, Tensor gate, int handle) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sida, CPU, m) {
  m.impl("moe_ffn", TORCH_BOX(&sida::moe_ffn_cpu));
  m.impl("route_top1", TORCH_BOX(&sida::route_top1_cpu));
  m.impl("linear", TORCH_BOX(&sida::linear_cpu));
  m.impl("attention", TORCH_BOX(&sida::attention_cpu));
  m.impl("rms_norm", TORCH_BOX(&sida::rms_norm_cpu));
  m.impl("moe_layer", TORCH_BOX(&sida::moe_layer_cpu));
}
