// TORCH_LIBRARY(sida): schemas, argument checks and the CPU kernels. Fake implementations are in sida_ext/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <pthread.h>

#include <atomic>
#include <functional>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/layers.h"
#include "bindings/python_errors.h"
#include "kernels/activation.h"
#include "kernels/moe_ffn.h"
#include "kernels/route.h"

namespace sida {
namespace {

using at::Tensor;

// Runs `body` and turns an engine error into the Python exception of its kind.
template <class Body>
auto with_python_errors(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    const PyGILState_STATE state = PyGILState_Ensure();
    // A signal that ended a wait has left its own exception (KeyboardInterrupt), which says more than ours.
    if (PyErr_Occurred() == nullptr) set_python_error(error);
    python_error raised;
    raised.persist();
    PyGILState_Release(state);
    throw raised;
  }
}

DType dtype_of(const Tensor& tensor, const char* op, const char* name, bool weights) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    case at::kChar:
      if (weights) return DType::i8;
      [[fallthrough]];
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, " has dtype ", tensor.scalar_type(), ", expected float32, bfloat16",
                       weights ? ", float16 or int8" : " or float16");
  }
}

void check_device(const Tensor& tensor, const Tensor& like, const char* op, const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": ", name, " is on ", tensor.device(), ", expected ",
                    like.device(), ", the device of x");
}

void check_dims(const Tensor& tensor, int64_t dims, const char* op, const char* name, const char* shape) {
  TORCH_CHECK_VALUE(tensor.dim() == dims, op, ": ", name, " has shape ", tensor.sizes(), ", expected ", dims,
                    " dimensions, ", shape);
}

void check_size(const Tensor& tensor, int64_t dim, int64_t expected, const char* op, const char* name,
                const char* meaning) {
  TORCH_CHECK_VALUE(tensor.size(dim) == expected, op, ": ", name, " has shape ", tensor.sizes(), ", expected ",
                    expected, " (", meaning, ") in dimension ", dim);
}

void check_rows(const Tensor& tensor, const char* op, const char* name) {
  TORCH_CHECK_VALUE(tensor.size(-1) <= 1 || tensor.stride(-1) == 1, op, ": rows of ", name,
                    " are not contiguous (stride ", tensor.stride(-1), " in the last dimension), expected stride 1; ",
                    "call .contiguous()");
}

// [T, K] of any integer type as contiguous int32, every value checked against [-1, limit) before it is narrowed.
Tensor checked_index(const Tensor& index, int64_t limit, const char* op, const char* name, const char* of) {
  const auto type = index.scalar_type();
  TORCH_CHECK_TYPE(at::isIntegralType(type, /*includeBool=*/false), op, ": ", name, " has dtype ", type,
                   ", expected an integer type");
  const Tensor wide = index.to(at::kLong).contiguous();
  const int64_t* value = wide.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < wide.numel(); ++i) {
    TORCH_CHECK_INDEX(value[i] >= -1 && value[i] < limit, op, ": ", name, " holds ", value[i], " at flat position ", i,
                      ", expected a value from -1 to ", limit - 1, " (", of, ")");
  }
  return wide.to(at::kInt);
}

// One scale for each row of an int8 matrix; none for the other types.
const float* checked_scale(const std::optional<Tensor>& scale, const Tensor& weight, DType dtype, const char* op,
                           const char* name, const Tensor& x, int64_t* slot_stride) {
  *slot_stride = 0;
  if (dtype != DType::i8) {
    TORCH_CHECK_VALUE(!scale.has_value(), op, ": ", name, "_scale was given, but ", name, " has dtype ",
                      weight.scalar_type(), "; scales go with int8 weights only");
    return nullptr;
  }
  TORCH_CHECK_VALUE(scale.has_value(), op, ": ", name, " has dtype int8 and needs ", name,
                    "_scale, a float32 tensor of shape [", weight.size(0), ", ", weight.size(1), "]");
  TORCH_CHECK_TYPE(scale->scalar_type() == at::kFloat, op, ": ", name, "_scale has dtype ", scale->scalar_type(),
                   ", expected float32");
  check_device(*scale, x, op, name);
  TORCH_CHECK_VALUE(scale->dim() == 2 && scale->size(0) == weight.size(0) && scale->size(1) == weight.size(1), op, ": ",
                    name, "_scale has shape ", scale->sizes(), ", expected [", weight.size(0), ", ", weight.size(1),
                    "]");
  TORCH_CHECK_VALUE(scale->size(1) <= 1 || scale->stride(1) == 1, op, ": rows of ", name,
                    "_scale are not contiguous (stride ", scale->stride(1), "), expected stride 1");
  *slot_stride = scale->stride(0);
  return scale->const_data_ptr<float>();
}

std::pair<Activation, bool> checked_activation(std::string_view name, const char* op) {
  Activation activation;
  bool gated;
  TORCH_CHECK_VALUE(parse_activation(name, &activation, &gated), op, ": activation is '", name, "', expected one of ",
                    activation_names());
  return {activation, gated};
}

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

// The tokens, their experts and their gates, as both ops take them.
struct Tokens {
  Tensor index, gate;  // int32 [T, K] and fp32 [T, K], contiguous
  DType dtype;
};

Tokens checked_tokens(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t num_experts,
                      const char* op) {
  const DType dtype = dtype_of(x, op, "x", /*weights=*/false);
  check_dims(x, 2, op, "x", "[tokens, d_model]");
  check_rows(x, op, "x");
  check_device(expert_index, x, op, "expert_index");
  check_device(gate, x, op, "gate");
  check_dims(expert_index, 2, op, "expert_index", "[tokens, top_k]");
  check_size(expert_index, 0, x.size(0), op, "expert_index", "tokens, as in x");
  TORCH_CHECK_VALUE(expert_index.size(1) >= 1, op, ": expert_index has shape ", expert_index.sizes(),
                    ", expected top_k of at least 1");
  TORCH_CHECK_TYPE(gate.scalar_type() == at::kFloat, op, ": gate has dtype ", gate.scalar_type(), ", expected float32");
  TORCH_CHECK_VALUE(gate.sizes() == expert_index.sizes(), op, ": gate has shape ", gate.sizes(), ", expected ",
                    expert_index.sizes(), ", the shape of expert_index");
  return {checked_index(expert_index, num_experts, op, "expert_index", "experts of the layer"), gate.contiguous(),
          dtype};
}

void set_tokens(MoeFfnArgs& args, const Tensor& x, const Tokens& tokens, Tensor& out, Tensor& partials) {
  args.tokens = x.size(0);
  args.top_k = tokens.index.size(1);
  args.d_model = x.size(1);
  args.x_dtype = tokens.dtype;
  args.x = x.const_data_ptr();
  args.x_row_stride = x.size(0) > 1 ? x.stride(0) : x.size(1);
  args.expert_index = tokens.index.const_data_ptr<int32_t>();
  args.gate = tokens.gate.const_data_ptr<float>();
  out = at::zeros({args.tokens, args.d_model}, x.options().memory_format(at::MemoryFormat::Contiguous));
  args.out = out.mutable_data_ptr();
  if (args.top_k > 1) {
    partials = at::zeros({args.tokens, args.top_k, args.d_model}, x.options().dtype(at::kFloat));
    args.partials = partials.mutable_data_ptr<float>();
  }
}

Tensor moe_ffn_cpu(const Tensor& x, const Tensor& expert_index, const Tensor& gate, const Tensor& wi, const Tensor& wo,
                   const Tensor& slot_of_expert, const std::optional<Tensor>& wi_scale,
                   const std::optional<Tensor>& wo_scale, c10::string_view activation, c10::string_view missing) {
  constexpr const char* op = "moe_ffn";
  const auto [function, gated] = checked_activation(activation, op);
  TORCH_CHECK_VALUE(missing == "error" || missing == "skip", op, ": missing is '", missing,
                    "', expected 'error' or 'skip'");
  check_dims(slot_of_expert, 1, op, "slot_of_expert", "[experts]");
  const Tokens tokens = checked_tokens(x, expert_index, gate, slot_of_expert.size(0), op);
  const DType w_dtype = dtype_of(wi, op, "wi", /*weights=*/true);
  TORCH_CHECK_TYPE(wo.scalar_type() == wi.scalar_type(), op, ": wo has dtype ", wo.scalar_type(), ", expected ",
                   wi.scalar_type(), ", the dtype of wi");
  check_device(wi, x, op, "wi");
  check_device(wo, x, op, "wo");
  check_device(slot_of_expert, x, op, "slot_of_expert");
  check_dims(wi, 3, op, "wi", "[slots, d_ff (gated: 2 * d_ff), d_model]");
  check_dims(wo, 3, op, "wo", "[slots, d_model, d_ff]");
  check_size(wi, 2, x.size(1), op, "wi", "d_model, as in x");
  check_size(wo, 1, x.size(1), op, "wo", "d_model, as in x");
  check_size(wo, 0, wi.size(0), op, "wo", "slots, as in wi");
  check_size(wi, 1, wo.size(2) * (gated ? 2 : 1), op, "wi", gated ? "2 * d_ff, d_ff as in wo" : "d_ff, as in wo");
  check_rows(wi, op, "wi");
  check_rows(wo, op, "wo");
  TORCH_CHECK_TYPE(slot_of_expert.scalar_type() == at::kInt, op, ": slot_of_expert has dtype ",
                   slot_of_expert.scalar_type(), ", expected int32");
  const Tensor slots = checked_index(slot_of_expert, wi.size(0), op, "slot_of_expert", "slots of wi");

  MoeFfnArgs args{};
  Tensor out, partials;
  set_tokens(args, x, tokens, out, partials);
  args.d_ff = wo.size(2);
  args.num_experts = slots.size(0);
  args.num_slots = wi.size(0);
  args.w_dtype = w_dtype;
  args.wi = {wi.const_data_ptr(), wi.stride(0), wi.stride(1), nullptr, 0};
  args.wo = {wo.const_data_ptr(), wo.stride(0), wo.stride(1), nullptr, 0};
  args.wi.scale = checked_scale(wi_scale, wi, w_dtype, op, "wi", x, &args.wi.scale_slot_stride);
  args.wo.scale = checked_scale(wo_scale, wo, w_dtype, op, "wo", x, &args.wo.scale_slot_stride);
  args.slot_of_expert = slots.const_data_ptr<int32_t>();
  args.activation = function;
  args.gated = gated;
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

// Ends a demand whatever happens to the computation.
class ScopedDemand {
 public:
  ScopedDemand(TransferEngine& engine, int32_t layer, const std::vector<int32_t>& experts)
      : engine_(engine), id_(engine.demand(layer, experts, current_batch())) {}
  ~ScopedDemand() { engine_.finish(id_); }
  ScopedDemand(const ScopedDemand&) = delete;
  ScopedDemand& operator=(const ScopedDemand&) = delete;

  Wave next() {
    RECORD_USER_SCOPE("sida::demand");
    return engine_.next_wave(id_, signal_raised);
  }
  void release(const Wave& wave) { engine_.release(id_, wave); }

 private:
  TransferEngine& engine_;
  DemandId id_;
};

Tensor moe_layer_cpu(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t handle) {
  constexpr const char* op = "moe_layer";
  return with_python_errors([&] {
    const auto layer = find_layer(handle);
    TransferEngine& engine = *layer->engine;
    const ExpertFormat& format = engine.format();
    const Tokens tokens = checked_tokens(x, expert_index, gate, layer->num_experts, op);
    check_size(x, 1, format.d_model, op, "x", "d_model of the expert store");

    MoeFfnArgs args{};
    Tensor out, partials;
    set_tokens(args, x, tokens, out, partials);
    const auto* base = static_cast<const std::byte*>(engine.slot_base());
    const int64_t element = element_bytes(format.dtype);
    const auto scale_at = [&](int64_t offset) {
      return format.dtype == DType::i8 ? reinterpret_cast<const float*>(base + offset) : nullptr;
    };
    args.d_ff = format.d_ff;
    args.num_experts = layer->num_experts;
    args.num_slots = engine.capacity();
    args.w_dtype = format.dtype;
    args.wi = {base + format.wi_offset(), format.record_bytes() / element, format.d_model,
               scale_at(format.wi_scale_offset()), format.record_bytes() / 4};
    args.wo = {base + format.wo_offset(), format.record_bytes() / element, format.d_ff,
               scale_at(format.wo_scale_offset()), format.record_bytes() / 4};
    args.activation = layer->activation;
    args.gated = format.gated;

    std::vector<int32_t> slot_of_expert(layer->num_experts, -1);
    std::vector<int32_t> wanted;
    std::vector<bool> seen(layer->num_experts, false);
    for (int64_t i = 0; i < args.tokens * args.top_k; ++i) {
      const int32_t expert = args.expert_index[i];
      if (expert >= 0 && !seen[expert]) {
        seen[expert] = true;
        wanted.push_back(expert);
      }
    }
    args.slot_of_expert = slot_of_expert.data();

    const WithoutGil waits_and_kernels;
    ScopedDemand demand(engine, layer->index, wanted);
    for (Wave wave = demand.next(); !wave.experts.empty(); wave = demand.next()) {
      for (size_t i = 0; i < wave.experts.size(); ++i) slot_of_expert[wave.experts[i]] = wave.slots[i];
      const int64_t begin = Trace::now_ns();
      {
        RECORD_USER_SCOPE("sida::moe_ffn");
        cpu::moe_ffn(args, torch_threads());
      }
      engine.trace().record({TraceEvent::Kind::compute, 0, layer->index, static_cast<int32_t>(wave.experts.size()),
                             current_batch(), begin, Trace::now_ns()});
      for (const int32_t expert : wave.experts) slot_of_expert[expert] = -1;
      demand.release(wave);
    }
    if (args.top_k > 1 && args.tokens > 0) cpu::moe_ffn_combine(args, torch_threads());
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
    TORCH_CHECK_NOT_IMPLEMENTED(false, "sida::", Op::name,
                                " has no backward: offloaded experts are frozen; train the model before its experts "
                                "are swapped, or run it under torch.no_grad()");
  }
};

template <class Function>
auto typed_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Function>();
}

struct MoeFfn {
  static constexpr const char* name = "moe_ffn";
};

Tensor moe_ffn_autograd(const Tensor& x, const Tensor& expert_index, const Tensor& gate, const Tensor& wi,
                        const Tensor& wo, const Tensor& slot_of_expert, const std::optional<Tensor>& wi_scale,
                        const std::optional<Tensor>& wo_scale, c10::string_view activation, c10::string_view missing) {
  static const auto op = typed_op<decltype(moe_ffn_cpu)>("sida::moe_ffn");
  const std::function<torch::autograd::variable_list()> compute = [&]() -> torch::autograd::variable_list {
    return {op.call(x, expert_index, gate, wi, wo, slot_of_expert, wi_scale, wo_scale, activation, missing)};
  };
  return NoBackward<MoeFfn>::apply(at::TensorList({x, gate, wi, wo}), compute)[0];
}

struct MoeLayer {
  static constexpr const char* name = "moe_layer";
};

Tensor moe_layer_autograd(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t handle) {
  static const auto op = typed_op<decltype(moe_layer_cpu)>("sida::moe_layer");
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
      "Tensor? wi_scale=None, Tensor? wo_scale=None, str activation=\"relu\", *, str missing=\"error\") -> Tensor");
  m.def("route_top1(Tensor router_logits, int capacity, *, ScalarType? probs_dtype=None) -> (Tensor, Tensor)");
  m.def("moe_layer(Tensor x, Tensor expert_index, Tensor gate, int handle) -> Tensor");
}

TORCH_LIBRARY_IMPL(sida, CPU, m) {
  m.impl("moe_ffn", &sida::moe_ffn_cpu);
  m.impl("route_top1", &sida::route_top1_cpu);
  m.impl("moe_layer", &sida::moe_layer_cpu);
}

TORCH_LIBRARY_IMPL(sida, Autograd, m) {
  m.impl("moe_ffn", &sida::moe_ffn_autograd);
  m.impl("route_top1", &sida::route_top1_autograd);
  m.impl("moe_layer", &sida::moe_layer_autograd);
}
