// The ops on CUDA devices: on the caller's current stream, with no wait but those of cuda::CudaServing.
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <deque>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include "bindings/layers.h"
#include "bindings/op_checks.h"
#include "kernels/cuda/moe_ffn_cuda.h"
#include "serving/cuda_serving.h"
#include "serving/moe_layer.h"

namespace sida {
namespace {

using cuda::Architecture;
using cuda::RuntimeTable;

void check_status(int status, const char* what) {
  if (status != RuntimeTable::success) {
    fail(ErrorKind::internal, what, " failed: ", cuda::runtime_table().error_text(status), " (status ", status, ")");
  }
}

const Architecture& architecture_of(int device) {
  static std::mutex mutex;
  static std::deque<std::pair<int, Architecture>> known;  // addresses stay
  const std::lock_guard lock(mutex);
  for (const auto& [number, architecture] : known) {
    if (number == device) return architecture;
  }
  cuda::DeviceFacts facts{};
  check_status(cuda::runtime_table().device_facts(device, &facts), "asking for the device's properties");
  if (facts.compute_capability < 80) {
    fail(ErrorKind::invalid, "cuda:", device, " has compute capability ", facts.compute_capability / 10, ".",
         facts.compute_capability % 10, ", expected 8.0 or later");
  }
  known.push_back({device, {facts.compute_capability, facts.multiprocessors, facts.shared_per_block}});
  return known.back().second;
}

// Error words of moe_ffn calls whose kernels may not have run yet.
class PendingErrors {
 public:
  // Copies two error words to the host behind the kernels on `stream`.
  void add(int device, const Tensor& words, int64_t top_k, bool missing_is_error, cuda::Stream stream) {
    const auto& runtime = cuda::runtime_table();
    Call call{device, at::empty({2}, at::TensorOptions().dtype(at::kInt).pinned_memory(true)), nullptr, top_k,
              missing_is_error};
    call.words.copy_(words, /*non_blocking=*/true);
    check_status(runtime.event_create(&call.event, false), "creating an event");
    check_status(runtime.event_record(call.event, stream), "recording an event");
    const std::lock_guard lock(mutex_);
    calls_.push_back(std::move(call));
  }

  // Raises what calls on `device` that are over by now have reported.
  void raise(int device) {
    const auto& runtime = cuda::runtime_table();
    const std::lock_guard lock(mutex_);
    for (auto call = calls_.begin(); call != calls_.end();) {
      if (call->device != device) {
        ++call;
        continue;
      }
      // Calls of a device mostly end in order; one that waits stands for those behind it, up to a bound.
      int status = runtime.event_query(call->event);
      if (status == RuntimeTable::not_ready && calls_.size() > most) status = runtime.event_synchronize(call->event);
      if (status == RuntimeTable::not_ready) return;
      const Call done = std::move(*call);
      call = calls_.erase(call);
      runtime.event_destroy(done.event);
      check_status(status, "an earlier call of moe_ffn");
      const int32_t wrong = done.words.const_data_ptr<int32_t>()[0], missing = done.words.const_data_ptr<int32_t>()[1];
      TORCH_CHECK_INDEX(wrong == none, "moe_ffn: an earlier call on cuda:", device, " had an expert_index or a ",
                        "slot_of_expert out of range, first for token ", wrong / done.top_k, ", choice ",
                        wrong % done.top_k, "; its rows were left at 0");
      TORCH_CHECK_VALUE(missing == none || !done.missing_is_error, "moe_ffn: in an earlier call on cuda:", device,
                        " the expert wanted by token ", missing / done.top_k, ", choice ", missing % done.top_k,
                        " was not resident (slot_of_expert is -1); load it first, or pass missing='skip' to leave ",
                        "its contribution out");
    }
  }

  static constexpr int32_t none = std::numeric_limits<int32_t>::max();

 private:
  static constexpr size_t most = 64;
  struct Call {
    int device;
    Tensor words;  // pinned
    cuda::Event event;
    int64_t top_k;
    bool missing_is_error;
  };
  std::mutex mutex_;
  std::deque<Call> calls_;
};

PendingErrors& pending_errors() {
  static auto* all = new PendingErrors;  // never destroyed: the driver may be gone before it would be
  return *all;
}

// What every op does first: the device of its arguments, the caller's stream on it, what earlier calls have to say.
struct OnDevice {
  c10::cuda::CUDAGuard guard;
  int device;
  cudaStream_t stream;
  bool capturing = false;

  explicit OnDevice(const Tensor& x)
      : guard(x.device()), device(x.device().index()), stream(c10::cuda::getCurrentCUDAStream(x.device().index())) {
    const auto& runtime = cuda::runtime_table();
    check_status(runtime.set_device(device), "choosing the device");
    check_status(runtime.stream_capturing(stream, &capturing), "asking for graph capture");
    if (!capturing) pending_errors().raise(device);
  }
};

// As int32; a value that int32 cannot hold stays out of range.
Tensor narrowed_index(const Tensor& index, const char* op, const char* name) {
  const auto type = index.scalar_type();
  TORCH_CHECK_TYPE(at::isIntegralType(type, /*includeBool=*/false), op, ": ", name, " has dtype ", type,
                   ", expected an integer type");
  if (type == at::kInt) return index.contiguous();
  if (type != at::kLong) return index.to(at::kInt).contiguous();
  return at::clamp(index, -2, std::numeric_limits<int32_t>::max()).to(at::kInt).contiguous();
}

Tensor workspace_for(const MoeFfnArgs& args, const Architecture& architecture, const Tensor& x) {
  return at::empty({cuda::workspace_bytes(args, architecture)}, x.options().dtype(at::kByte));
}

Tensor moe_ffn_cuda(const Tensor& x, const Tensor& expert_index, const Tensor& gate, const Tensor& wi, const Tensor& wo,
                    const Tensor& slot_of_expert, const std::optional<Tensor>& wi_scale,
                    const std::optional<Tensor>& wo_scale, c10::string_view activation,
                    const std::optional<Tensor>& wi_bias, const std::optional<Tensor>& wo_bias,
                    c10::string_view missing) {
  constexpr const char* op = "moe_ffn";
  return with_python_errors([&] {
    const auto [function, gated] = checked_activation(activation, op);
    TORCH_CHECK_NOT_IMPLEMENTED(function != Activation::swiglu_oai && !wi_bias.has_value() && !wo_bias.has_value(), op,
                                ": the CUDA kernels know neither biases nor swiglu_oai; move the arguments to the CPU");
    TORCH_CHECK_VALUE(missing == "error" || missing == "skip", op, ": missing is '", missing,
                      "', expected 'error' or 'skip'");
    check_dims(slot_of_expert, 1, op, "slot_of_expert", "[experts]");
    check_device(expert_index, x, op, "expert_index");
    check_device(gate, x, op, "gate");
    const DType dtype = check_tokens(x, expert_index, gate, op);
    TORCH_CHECK_NOT_IMPLEMENTED(wi.scalar_type() != at::kByte, op,
                                ": the CUDA kernels know no 4-bit weights; expected ",
                                "float32, bfloat16, float16 or int8 there, or move the arguments to the CPU");
    const DType w_dtype = check_weights(x, wi, wo, slot_of_expert, wi_scale, wo_scale, gated, op);
    const OnDevice here(x);
    const Tokens tokens{narrowed_index(expert_index, op, "expert_index"), gate.contiguous(), dtype};
    const Tensor slots = slot_of_expert.contiguous();
    MoeFfnArgs args{};
    Tensor out, partials;
    set_tokens(args, x, tokens, out, partials);
    args.num_experts = slots.size(0);
    set_weights(args, w_dtype, wi, wo, wi_scale, wo_scale, wi_bias, wo_bias, gated, op);
    args.slot_of_expert = slots.const_data_ptr<int32_t>();
    args.activation = function;
    if (args.tokens == 0 || args.d_model == 0 || args.d_ff == 0) return out;
    const Architecture& architecture = architecture_of(here.device);
    const Tensor workspace = workspace_for(args, architecture, x);
    // A graph is replayed without this code: nobody would read its error words.
    Tensor words;
    if (!here.capturing) words = at::full({2}, PendingErrors::none, x.options().dtype(at::kInt));
    cuda::moe_ffn(args, architecture, workspace.mutable_data_ptr(),
                  here.capturing ? nullptr : words.mutable_data_ptr<int32_t>(), here.stream);
    if (!here.capturing) pending_errors().add(here.device, words, args.top_k, missing == "error", here.stream);
    return out;
  });
}

std::tuple<Tensor, Tensor> route_top1_cuda(const Tensor& router_logits, int64_t capacity,
                                           std::optional<at::ScalarType> probs_dtype) {
  constexpr const char* op = "route_top1";
  return with_python_errors([&]() -> std::tuple<Tensor, Tensor> {
    cuda::RouteArgs args{};
    args.dtype = dtype_of(router_logits, op, "router_logits", /*weights=*/false);
    check_dims(router_logits, 3, op, "router_logits", "[batch, sequence, experts]");
    TORCH_CHECK_VALUE(router_logits.size(2) >= 1, op, ": router_logits has shape ", router_logits.sizes(),
                      ", expected at least one expert");
    TORCH_CHECK_VALUE(capacity >= 0, op, ": capacity is ", capacity, ", expected 0 or more");
    const at::ScalarType rounded = probs_dtype.value_or(router_logits.scalar_type());
    TORCH_CHECK_TYPE(rounded == at::kFloat || rounded == at::kBFloat16 || rounded == at::kHalf, op, ": probs_dtype is ",
                     rounded, ", expected float32, bfloat16 or float16");
    const OnDevice here(router_logits);
    const Tensor logits = router_logits.contiguous();
    const auto shape = logits.sizes().slice(0, 2);
    Tensor expert_index = at::empty(shape, logits.options().dtype(at::kInt));
    Tensor gate = at::empty(shape, logits.options().dtype(at::kFloat));
    args.sequences = logits.size(0);
    args.length = logits.size(1);
    args.experts = logits.size(2);
    args.capacity = capacity;
    args.rounded = rounded == at::kFloat ? DType::f32 : rounded == at::kHalf ? DType::f16 : DType::bf16;
    args.logits = logits.const_data_ptr();
    args.expert_index = expert_index.mutable_data_ptr<int32_t>();
    args.gate = gate.mutable_data_ptr<float>();
    cuda::route_top1(args, here.stream);
    return {expert_index, gate};
  });
}

Tensor linear_cuda(const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "linear: there is no CUDA kernel; use torch.nn.functional.linear there, or move ",
                              "the arguments to the CPU");
}

// To the device of `x` without a wait, by way of pinned memory.
Tensor uploaded(const Tensor& tensor, const Tensor& x) {
  return tensor.is_cpu() ? tensor.contiguous().pin_memory().to(x.device(), /*non_blocking=*/true) : tensor;
}

Tensor moe_layer_cuda(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t handle) {
  constexpr const char* op = "moe_layer";
  return with_python_errors([&] {
    const auto layer = find_layer(handle);
    TORCH_CHECK_VALUE(layer->cuda != nullptr, op, ": x is on ", x.device(),
                      ", but this layer's experts are computed on ", "cpu; load the model with device='", x.device(),
                      "'");
    cuda::CudaServing& serving = *layer->cuda;
    TORCH_CHECK_VALUE(x.device().index() == serving.device(), op, ": x is on ", x.device(),
                      ", but this layer's experts are computed on cuda:", serving.device());
    const DType dtype = check_tokens(x, expert_index, gate, op);
    check_size(x, 1, serving.engine().format().d_model, op, "x", "d_model of the expert store");
    const OnDevice here(x);

    // Indices that lie on the host, as those of a hash table, are known without a wait.
    const bool on_host = expert_index.is_cpu();
    if (!on_host) check_device(expert_index, x, op, "expert_index");
    if (!gate.is_cpu()) check_device(gate, x, op, "gate");
    const Tensor narrow = narrowed_index(expert_index, op, "expert_index");
    const Tokens tokens{uploaded(narrow, x), uploaded(gate.contiguous(), x), dtype};
    MoeFfnArgs args{};
    Tensor out, partials;
    set_tokens(args, x, tokens, out, partials);
    args.num_experts = layer->num_experts;
    args.activation = layer->activation;
    set_slots(args, serving.engine());
    const Architecture& architecture = architecture_of(here.device);
    const Tensor workspace = workspace_for(args, architecture, x);
    const Tensor slot_table = at::empty({layer->num_experts}, x.options().dtype(at::kInt));

    const WithoutGil waits_and_launches;
    const int64_t rows = args.tokens * args.top_k;
    std::vector<int32_t> chosen;
    if (on_host) {
      chosen.assign(narrow.const_data_ptr<int32_t>(), narrow.const_data_ptr<int32_t>() + rows);
    } else {
      chosen = serving.fetch_indices(args.expert_index, rows, here.stream);
    }
    for (size_t i = 0; i < chosen.size(); ++i) {
      TORCH_CHECK_INDEX(chosen[i] >= -1 && chosen[i] < layer->num_experts, op, ": expert_index holds ", chosen[i],
                        " at flat position ", i, ", expected a value from -1 to ", layer->num_experts - 1,
                        " (experts of the layer)");
    }
    const std::vector<int32_t> wanted = distinct_experts(chosen, layer->num_experts);
    cuda::LayerForward forward{};
    forward.layer = layer->index;
    forward.batch = current_batch();
    forward.args = args;
    forward.slot_table = slot_table.mutable_data_ptr<int32_t>();
    forward.experts = wanted;
    forward.stream = here.stream;
    forward.interrupted = signal_raised;
    serving.forward(forward, [&](const MoeFfnArgs& wave, cuda::Stream stream) {
      cuda::moe_ffn(wave, architecture, workspace.mutable_data_ptr(), nullptr, static_cast<cudaStream_t>(stream));
    });
    return out;
  });
}

}  // namespace
}  // namespace sida

TORCH_LIBRARY_IMPL(sida, CUDA, m) {
  m.impl("moe_ffn", &sida::moe_ffn_cuda);
  m.impl("route_top1", &sida::route_top1_cuda);
  m.impl("linear", &sida::linear_cuda);
  m.impl("moe_layer", &sida::moe_layer_cuda);
}
