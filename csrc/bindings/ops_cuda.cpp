// The ops on CUDA devices: on the caller's current stream, with no wait but those of cuda::CudaServing.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>

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

// Two int32 in pinned memory.
Tensor pinned_words() {
  const std::array<int64_t, 1> shape{2};
  return taken(call_torch("aten::empty", "memory_format", Shape(shape), std::optional(ScalarType::Int), std::nullopt,
                          std::nullopt, std::optional(true), std::nullopt)[0]);
}

// The caller's stream on a device. Not linked: an extension with CUDA loads beside a torch without it, too. Where there
// is a tensor on a CUDA device, the library is loaded.
cudaStream_t current_stream(int device) {
  using Ask = AOTITorchError (*)(int32_t, void**);
  static const auto ask = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const found = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (found == nullptr)
      fail(ErrorKind::internal, "torch's library for CUDA is not loaded, or tells no current stream");
    return reinterpret_cast<Ask>(found);
  }();
  void* stream = nullptr;
  check_torch(ask(device, &stream), "asking for the current stream");
  return static_cast<cudaStream_t>(stream);
}

// Error words of moe_ffn calls whose kernels may not have run yet.
class PendingErrors {
 public:
  // Copies two error words to the host behind the kernels on `stream`.
  void add(int device, const Tensor& words, int64_t top_k, bool missing_is_error, cuda::Stream stream) {
    const auto& runtime = cuda::runtime_table();
    Call call{device, pinned_words(), nullptr, top_k, missing_is_error};
    taken(call_torch("aten::copy_", "", call.words, words, /*non_blocking=*/true)[0]);
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
      CHECK_INDEX(wrong == none, "moe_ffn: an earlier call on cuda:", device, " had an expert_index or a ",
                  "slot_of_expert out of range, first for token ", wrong / done.top_k, ", choice ", wrong % done.top_k,
                  "; its rows were left at 0");
      CHECK_VALUE(missing == none || !done.missing_is_error, "moe_ffn: in an earlier call on cuda:", device,
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
  int device;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  bool capturing = false;

  explicit OnDevice(const Tensor& x) : device(Place(x).index), guard(device), stream(current_stream(device)) {
    const auto& runtime = cuda::runtime_table();
    check_status(runtime.set_device(device), "choosing the device");
    check_status(runtime.stream_capturing(stream, &capturing), "asking for graph capture");
    if (!capturing) pending_errors().raise(device);
  }
};

// One number on the CPU, which torch's kernels of two operands take beside a tensor on a device. Never destroyed.
const Tensor& number(int64_t value) {
  auto* const made =
      new Tensor(taken(call_torch("aten::empty", "memory_format", Shape(), std::optional(ScalarType::Long),
                                  std::nullopt, std::nullopt, std::nullopt, std::nullopt)[0]));
  *made->mutable_data_ptr<int64_t>() = value;
  return *made;
}

// As int32; a value that int32 cannot hold stays out of range.
Tensor narrowed_index(const Tensor& index, const char* op, const char* name) {
  const auto type = type_of(index);
  CHECK_TYPE(is_integral(type), op, ": ", name, " has dtype ", type, ", expected an integer type");
  if (type != ScalarType::Long) return contiguous(as_type(index, ScalarType::Int));
  static const Tensor& least = number(-2);
  static const Tensor& most = number(std::numeric_limits<int32_t>::max());
  const Tensor from_below = taken(call_torch("aten::maximum", "", index, least)[0]);
  const Tensor clamped = taken(call_torch("aten::minimum", "", from_below, most)[0]);
  return contiguous(as_type(clamped, ScalarType::Int));
}

template <class Args>
Tensor workspace_for(const Args& args, const Architecture& architecture, const Tensor& x) {
  return empty({cuda::workspace_bytes(args, architecture)}, ScalarType::Byte, x);
}

Tensor moe_ffn_cuda(const Tensor& x, const Tensor& expert_index, const Tensor& gate, const Tensor& wi, const Tensor& wo,
                    const Tensor& slot_of_expert, const std::optional<Tensor>& wi_scale,
                    const std::optional<Tensor>& wo_scale, StringHandle activation_handle,
                    const std::optional<Tensor>& wi_bias, const std::optional<Tensor>& wo_bias,
                    StringHandle missing_handle) {
  constexpr const char* op = "moe_ffn";
  const std::string activation = taken(activation_handle), missing = taken(missing_handle);
  return with_python_errors([&] {
    const auto [function, gated] = checked_activation(activation, op);
    CHECK_VALUE(missing == "error" || missing == "skip", op, ": missing is '", missing,
                "', expected 'error' or 'skip'");
    check_dims(slot_of_expert, 1, op, "slot_of_expert", "[experts]");
    check_device(expert_index, x, op, "expert_index");
    check_device(gate, x, op, "gate");
    const DType dtype = check_tokens(x, expert_index, gate, op);
    const DType w_dtype = check_weights(x, wi, wo, slot_of_expert, wi_scale, wo_scale, gated, op);
    const OnDevice here(x);
    const Tokens tokens{narrowed_index(expert_index, op, "expert_index"), contiguous(gate), dtype};
    const Tensor slots = contiguous(slot_of_expert);
    MoeFfnArgs args{};
    const Results results = set_tokens(args, x, tokens);
    args.num_experts = slots.size(0);
    set_weights(args, w_dtype, wi, wo, wi_scale, wo_scale, wi_bias, wo_bias, gated, op);
    args.slot_of_expert = slots.const_data_ptr<int32_t>();
    args.activation = function;
    if (args.tokens == 0 || args.d_model == 0 || args.d_ff == 0) return results.out;
    const Architecture& architecture = architecture_of(here.device);
    const Tensor workspace = workspace_for(args, architecture, x);
    // A graph is replayed without this code: nobody would read its error words.
    std::optional<Tensor> words;
    if (!here.capturing) {
      words = empty({2}, ScalarType::Int, x);
      check_torch(aoti_torch_aten_fill__Scalar(words->get(), PendingErrors::none), "filling error words");
    }
    cuda::moe_ffn(args, architecture, workspace.mutable_data_ptr(),
                  words ? words->mutable_data_ptr<int32_t>() : nullptr, here.stream);
    if (words) pending_errors().add(here.device, *words, args.top_k, missing == "error", here.stream);
    return results.out;
  });
}

std::tuple<Tensor, Tensor> route_top1_cuda(const Tensor& router_logits, int64_t capacity,
                                           std::optional<ScalarType> probs_dtype) {
  constexpr const char* op = "route_top1";
  return with_python_errors([&]() -> std::tuple<Tensor, Tensor> {
    cuda::RouteArgs args{};
    args.dtype = dtype_of(router_logits, op, "router_logits", /*weights=*/false);
    check_dims(router_logits, 3, op, "router_logits", "[batch, sequence, experts]");
    CHECK_VALUE(router_logits.size(2) >= 1, op, ": router_logits has shape ", Text(router_logits),
                ", expected at least one expert");
    CHECK_VALUE(capacity >= 0, op, ": capacity is ", capacity, ", expected 0 or more");
    const ScalarType rounded = probs_dtype.value_or(type_of(router_logits));
    CHECK_TYPE(rounded == ScalarType::Float || rounded == ScalarType::BFloat16 || rounded == ScalarType::Half, op,
               ": probs_dtype is ", rounded, ", expected float32, bfloat16 or float16");
    const OnDevice here(router_logits);
    const Tensor logits = contiguous(router_logits);
    const std::vector<int64_t> shape{logits.size(0), logits.size(1)};
    const Tensor expert_index = empty(shape, ScalarType::Int, logits);
    const Tensor gate = empty(shape, ScalarType::Float, logits);
    args.sequences = logits.size(0);
    args.length = logits.size(1);
    args.experts = logits.size(2);
    args.capacity = capacity;
    args.rounded = rounded == ScalarType::Float ? DType::f32 : rounded == ScalarType::Half ? DType::f16 : DType::bf16;
    args.logits = logits.const_data_ptr();
    args.expert_index = expert_index.mutable_data_ptr<int32_t>();
    args.gate = gate.mutable_data_ptr<float>();
    cuda::route_top1(args, here.stream);
    return {expert_index, gate};
  });
}

Tensor linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& bias) {
  const LinearCall call = checked_linear(x, weight, scale, bias, "linear");
  return with_python_errors([&] {
    const OnDevice here(x);
    const Architecture& architecture = architecture_of(here.device);
    const Tensor workspace = workspace_for(call.args, architecture, x);
    cuda::linear(call.args, architecture, workspace.mutable_data_ptr(), here.stream);
    return call.out;
  });
}

// To the device of `x` without a wait, by way of pinned memory.
Tensor uploaded(const Tensor& tensor, const Tensor& x) {
  if (!Place(tensor).is_cpu()) return tensor;
  const Tensor pinned = taken(call_torch("aten::pin_memory", "", contiguous(tensor), std::nullopt)[0]);
  const std::optional device(torch::stable::Device(torch::headeronly::DeviceType::CUDA, Place(x).index));
  return taken(call_torch("aten::to", "dtype_layout", pinned, std::nullopt, std::nullopt, device, std::nullopt,
                          /*non_blocking=*/true, /*copy=*/false, std::nullopt)[0]);
}

Tensor moe_layer_cuda(const Tensor& x, const Tensor& expert_index, const Tensor& gate, int64_t handle) {
  constexpr const char* op = "moe_layer";
  return with_python_errors([&] {
    const auto layer = find_layer(handle);
    CHECK_VALUE(layer->cuda != nullptr, op, ": x is on ", Place(x), ", but this layer's experts are computed on ",
                "cpu; load the model with device='", Place(x), "'");
    cuda::CudaServing& serving = *layer->cuda;
    CHECK_VALUE(Place(x).index == serving.device(), op, ": x is on ", Place(x),
                ", but this layer's experts are computed on cuda:", serving.device());
    const DType dtype = check_tokens(x, expert_index, gate, op);
    check_size(x, 1, serving.engine().format().d_model, op, "x", "d_model of the expert store");
    const OnDevice here(x);

    // Indices that lie on the host, as those of a hash table, are known without a wait.
    const bool on_host = Place(expert_index).is_cpu();
    if (!on_host) check_device(expert_index, x, op, "expert_index");
    if (!Place(gate).is_cpu()) check_device(gate, x, op, "gate");
    const Tensor narrow = narrowed_index(expert_index, op, "expert_index");
    const Tokens tokens{uploaded(narrow, x), uploaded(contiguous(gate), x), dtype};
    MoeFfnArgs args{};
    const Results results = set_tokens(args, x, tokens);
    args.num_experts = layer->num_experts;
    args.activation = layer->activation;
    set_slots(args, serving.engine());
    const Architecture& architecture = architecture_of(here.device);
    const Tensor workspace = workspace_for(args, architecture, x);
    const Tensor slot_table = empty({layer->num_experts}, ScalarType::Int, x);

    const WithoutGil waits_and_launches;
    const int64_t rows = args.tokens * args.top_k;
    std::vector<int32_t> chosen;
    if (on_host) {
      chosen.assign(narrow.const_data_ptr<int32_t>(), narrow.const_data_ptr<int32_t>() + rows);
    } else {
      chosen = serving.fetch_indices(args.expert_index, rows, here.stream);
    }
    for (size_t i = 0; i < chosen.size(); ++i) {
      CHECK_INDEX(chosen[i] >= -1 && chosen[i] < layer->num_experts, op, ": expert_index holds ", chosen[i],
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
    return results.out;
  });
}

}  // namespace
}  // namespace sida

STABLE_TORCH_LIBRARY_IMPL(sida, CUDA, m) {
  m.impl("moe_ffn", TORCH_BOX(&sida::moe_ffn_cuda));
  m.impl("route_top1", TORCH_BOX(&sida::route_top1_cuda));
  m.impl("linear", TORCH_BOX(&sida::linear_cuda));
  m.impl("moe_layer", TORCH_BOX(&sida::moe_layer_cuda));
}
