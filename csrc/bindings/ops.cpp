// TORCH_LIBRARY(sida): schemas, argument checks and the CPU kernels. Fake implementations are in sida_ext/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/layers.h"
#include "bindings/op_checks.h"
#include "kernels/linear.h"
#include "kernels/moe_ffn.h"
#include "kernels/route.h"
#include "serving/cpu_serving.h"

namespace sida {
namespace {

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "at::parallel_for would run on one thread: compile this file with -fopenmp"
#endif

// Set in a child of fork(): the threads of torch's pool stayed with the parent, and GNU's OpenMP runtime would wait for
// them for ever.
std::atomic<bool> is_forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

ParallelFor torch_threads() {
  if (is_forked || at::in_parallel_region()) {
    return ParallelFor{1, [](int64_t count, void (*body)(void*, int64_t), void* context) {
                         for (int64_t i = 0; i < count; ++i) body(context, i);
                       }};
  }
  return ParallelFor{at::get_num_threads(), [](int64_t count, void (*body)(void*, int64_t), void* context) {
                       at::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) body(context, i);
                       });
                     }};
}

// The tokens with every index checked.
Tokens checked_tokens(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t num_experts,
                      const char* op) {
  check_device(expert_index, x, op, "expert_index");
  check_device(gate, x, op, "gate");
  const DType dtype = check_tokens(x, expert_index, gate, op);
  return {checked_index(expert_index, num_experts, op, "expert_index", "experts of the layer"), gate.contiguous(),
          dtype};
}

Tensor moe_ffn_cpu(const Tensor& x, const Tensor& expert_index, const Tensor& gate, const Tensor& wi, const Tensor& wo,
                   const Tensor& slot_of_expert, const std::optional<Tensor>& wi_scale,
                   const std::optional<Tensor>& wo_scale, c10::string_view activation,
                   const std::optional<Tensor>& wi_bias, const std::optional<Tensor>& wo_bias,
                   c10::string_view missing) {
  constexpr const char* op = "moe_ffn";
  const auto [function, gated] = checked_activation(activation, op);
  TORCH_CHECK_VALUE(missing == "error" || missing == "skip", op, ": missing is '", missing,
                    "', expected 'error' or 'skip'");
  check_dims(slot_of_expert, 1, op, "slot_of_expert", "[experts]");
  const Tokens tokens = checked_tokens(x, expert_index, gate, slot_of_expert.size(0), op);
  const DType w_dtype = check_weights(x, wi, wo, slot_of_expert, wi_scale, wo_scale, gated, op);
  const Tensor slots = checked_index(slot_of_expert, wi.size(0), op, "slot_of_expert", "slots of wi");

  MoeFfnArgs args{};
  Tensor out, partials;
  set_tokens(args, x, tokens, out, partials);
  args.num_experts = slots.size(0);
  set_weights(args, w_dtype, wi, wo, wi_scale, wo_scale, wi_bias, wo_bias, gated, op);
  args.slot_of_expert = slots.const_data_ptr<int32_t>();
  args.activation = function;
  if (missing == "error") {
    for (int64_t i = 0; i < args.tokens * args.top_k; ++i) {
      const int32_t expert = args.expert_index[i];
      TORCH_CHECK_VALUE(expert < 0 || args.slot_of_expert[expert] >= 0, op, ": expert ", expert, ", wanted by token ",
                        i / args.top_k, ", is not resident (slot_of_expert[", expert, "] is -1); load it first, or ",
                        "pass missing='skip' to leave its contribution out");
    }
  }
  if (args.tokens == 0 || args.d_model == 0 || args.d_ff == 0) return out;
  return with_python_errors([&] {
    cpu::moe_ffn(args, torch_threads());
    if (args.top_k > 1) cpu::moe_ffn_combine(args, torch_threads());
    return out;
  });
}

std::tuple<Tensor, Tensor> route_top1_cpu(const Tensor& router_logits, int64_t capacity,
                                          std::optional<at::ScalarType> probs_dtype) {
  constexpr const char* op = "route_top1";
  dtype_of(router_logits, op, "router_logits", /*weights=*/false);
  check_dims(router_logits, 3, op, "router_logits", "[batch, sequence, experts]");
  TORCH_CHECK_VALUE(router_logits.size(2) >= 1, op, ": router_logits has shape ", router_logits.sizes(),
                    ", expected at least one expert");
  TORCH_CHECK_VALUE(capacity >= 0, op, ": capacity is ", capacity, ", expected 0 or more");
  const at::ScalarType rounded = probs_dtype.value_or(router_logits.scalar_type());
  TORCH_CHECK_TYPE(rounded == at::kFloat || rounded == at::kBFloat16 || rounded == at::kHalf, op, ": probs_dtype is ",
                   rounded, ", expected float32, bfloat16 or float16");
  // ATen's own softmax and maximum, so that near ties fall as they fall in transformers.
  const Tensor probs = at::softmax(router_logits, -1, at::kFloat).to(rounded);
  const auto [best, index] = at::max(probs, -1);
  const Tensor chosen = index.contiguous();
  Tensor expert_index = at::empty(chosen.sizes(), chosen.options().dtype(at::kInt));
  apply_capacity(chosen.const_data_ptr<int64_t>(), chosen.size(0), chosen.size(1), router_logits.size(2), capacity,
                 expert_index.mutable_data_ptr<int32_t>());
  return {expert_index, best.to(at::kFloat)};
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& bias) {
  constexpr const char* op = "linear";
  LinearArgs args{};
  args.x_dtype = dtype_of(x, op, "x", /*weights=*/false);
  args.w_dtype = weight_dtype(weight, scale, op, "weight", "scale");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, op, ": x has shape ", x.sizes(),
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
  const Tensor tokens = is_flat ? x : x.reshape({-1, args.columns}).contiguous();
  args.tokens = tokens.size(0);
  args.x = tokens.const_data_ptr();
  args.x_row_stride = args.tokens > 1 ? tokens.stride(0) : args.columns;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = args.rows;
  Tensor out = at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  args.out = out.mutable_data_ptr();
  return with_python_errors([&] {
    cpu::linear(args, torch_threads());
    return out;
  });
}

// Runs `body` as a named range of torch's profiler.
void profiled(const char* name, const std::function<void()>& body) {
  RECORD_USER_SCOPE(name);
  body();
}

Tensor moe_layer_cpu(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t handle) {
  constexpr const char* op = "moe_layer";
  return with_python_errors([&] {
    const auto layer = find_layer(handle);
    TORCH_CHECK_VALUE(layer->cuda == nullptr, op,
                      ": x is on cpu, but this layer's experts are computed on a CUDA device");
    const Tokens tokens = checked_tokens(x, expert_index, gate, layer->num_experts, op);
    check_size(x, 1, layer->engine->format().d_model, op, "x", "d_model of the expert store");

    cpu::LayerForward forward{};
    Tensor out, partials;
    set_tokens(forward.args, x, tokens, out, partials);
    forward.args.num_experts = layer->num_experts;
    forward.args.activation = layer->activation;
    forward.layer = layer->index;
    forward.batch = current_batch();
    forward.threads = torch_threads();
    forward.interrupted = signal_raised;
    forward.profiled = profiled;
    const WithoutGil waits_and_kernels;
    cpu::forward(*layer->engine, forward);
    return out;
  });
}

// Experts and routers are frozen: a backward through them is an error, not a silent zero.
template <class Op>
struct NoBackward : torch::autograd::Function<NoBackward<Op>> {
  using torch::autograd::Function<NoBackward<Op>>::apply;

  // `inputs` are the tensors that a gradient could be asked for; `compute` calls the op below autograd.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                [[maybe_unused]] at::TensorList inputs,
                                                const std::function<torch::autograd::variable_list()>& compute) {
    const at::AutoDispatchBelowADInplaceOrView below;
    torch::autograd::variable_list outputs = compute();
    torch::autograd::variable_list integers;
    for (const Tensor& output : outputs) {
      if (!output.is_floating_point()) integers.push_back(output);
    }
    context->mark_non_differentiable(integers);
    return outputs;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "sida::", Op::name,
        " has no backward: swapped weights are frozen; train the model before they are swapped, "
        "or run it under torch.no_grad()");
  }
};

template <class Function>
auto typed_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Function>();
}

// Whether autograd would record the op. Where it would not, NoBackward's bookkeeping is saved: it costs as much as a
// few of the op's checks.
bool is_recorded(at::TensorList inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(), [](const Tensor& input) { return input.requires_grad(); });
}

struct MoeFfn {
  static constexpr const char* name = "moe_ffn";
};

Tensor moe_ffn_autograd(const Tensor& x, const Tensor& expert_index, const Tensor& gate, const Tensor& wi,
                        const Tensor& wo, const Tensor& slot_of_expert, const std::optional<Tensor>& wi_scale,
                        const std::optional<Tensor>& wo_scale, c10::string_view activation,
                        const std::optional<Tensor>& wi_bias, const std::optional<Tensor>& wo_bias,
                        c10::string_view missing) {
  static const auto op = typed_op<decltype(moe_ffn_cpu)>("sida::moe_ffn");
  if (!is_recorded({x, gate, wi, wo})) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(x, expert_index, gate, wi, wo, slot_of_expert, wi_scale, wo_scale, activation, wi_bias, wo_bias,
                   missing);
  }
  const std::function<torch::autograd::variable_list()> compute = [&]() -> torch::autograd::variable_list {
    return {op.call(x, expert_index, gate, wi, wo, slot_of_expert, wi_scale, wo_scale, activation, wi_bias, wo_bias,
                    missing)};
  };
  return NoBackward<MoeFfn>::apply(at::TensorList({x, gate, wi, wo}), compute)[0];
}

struct Linear {
  static constexpr const char* name = "linear";
};

Tensor linear_autograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& bias) {
  static const auto op = typed_op<decltype(linear_cpu)>("sida::linear");
  if (!is_recorded({x, weight}) && !(bias.has_value() && is_recorded({*bias}))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(x, weight, scale, bias);
  }
  const std::function<torch::autograd::variable_list()> compute = [&]() -> torch::autograd::variable_list {
    return {op.call(x, weight, scale, bias)};
  };
  const Tensor third = bias.value_or(weight);
  return NoBackward<Linear>::apply(at::TensorList({x, weight, third}), compute)[0];
}

struct MoeLayer {
  static constexpr const char* name = "moe_layer";
};

Tensor moe_layer_autograd(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t handle) {
  static const auto op = typed_op<decltype(moe_layer_cpu)>("sida::moe_layer");
  if (!is_recorded({x, gate})) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(x, expert_index, gate, handle);
  }
  const std::function<torch::autograd::variable_list()> compute = [&]() -> torch::autograd::variable_list {
    return {op.call(x, expert_index, gate, handle)};
  };
  return NoBackward<MoeLayer>::apply(at::TensorList({x, gate}), compute)[0];
}

struct RouteTop1 {
  static constexpr const char* name = "route_top1";
};

std::tuple<Tensor, Tensor> route_top1_autograd(const Tensor& router_logits, int64_t capacity,
                                               std::optional<at::ScalarType> probs_dtype) {
  static const auto op = typed_op<decltype(route_top1_cpu)>("sida::route_top1");
  if (!is_recorded({router_logits})) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(router_logits, capacity, probs_dtype);
  }
  const std::function<torch::autograd::variable_list()> compute = [&]() -> torch::autograd::variable_list {
    auto [expert_index, gate] = op.call(router_logits, capacity, probs_dtype);
    return {expert_index, gate};
  };
  const auto outputs = NoBackward<RouteTop1>::apply(at::TensorList({router_logits}), compute);
  return {outputs[0], outputs[1]};
}

}  // namespace
}  // namespace sida

TORCH_LIBRARY(sida, m) {
  m.def(
      "moe_ffn(Tensor x, Tensor expert_index, Tensor gate, Tensor wi, Tensor wo, Tensor slot_of_expert, "
      "Tensor? wi_scale=None, Tensor? wo_scale=None, str activation=\"relu\", *, Tensor? wi_bias=None, "
      "Tensor? wo_bias=None, str missing=\"error\") -> Tensor");
  m.def("route_top1(Tensor router_logits, int capacity, *, ScalarType? probs_dtype=None) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? scale=None, Tensor? bias=None) -> Tensor");
  m.def("moe_layer(Tensor x, Tensor expert_index, Tensor gate, int handle) -> Tensor");
}

TORCH_LIBRARY_IMPL(sida, CPU, m) {
  m.impl("moe_ffn", &sida::moe_ffn_cpu);
  m.impl("route_top1", &sida::route_top1_cpu);
  m.impl("linear", &sida::linear_cpu);
  m.impl("moe_layer", &sida::moe_layer_cpu);
}

TORCH_LIBRARY_IMPL(sida, Autograd, m) {
  m.impl("moe_ffn", &sida::moe_ffn_autograd);
  m.impl("route_top1", &sida::route_top1_autograd);
  m.impl("linear", &sida::linear_autograd);
  m.impl("moe_layer", &sida::moe_layer_autograd);
}
