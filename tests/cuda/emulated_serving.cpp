// A Python module with the two-tier engine over the recording runtime, so that the Python side of device="cuda" runs
// where there is no GPU: "device memory" is the host's, the kernels are the CPU's, and every call of the CUDA runtime
// is recorded and checked. Takes the place of _C.CudaServing in tests/emulated.py; shares the other classes of _C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "experts/transfer.h"
#include "kernels/activation.h"
#include "recording_runtime.h"
#include "serving/cuda_serving.h"

namespace py = pybind11;

namespace sida::cuda_test {
namespace {

using cuda::CudaServing;

// A machine with some devices; one at a time.
struct Machine {
  Recording recording{1};
  std::mutex mutex;
  std::map<std::pair<int, std::thread::id>, cuda::Stream> streams;  // the current one of each device and thread

  explicit Machine(int devices) {
    recording.devices = devices;
    recording.eager = true;
    recording.replayed = false;
    recording.pinned_only = true;
  }

  cuda::Stream stream(int device) {
    const std::lock_guard lock(mutex);
    cuda::Stream& own = streams[{device, std::this_thread::get_id()}];
    if (own == nullptr) own = recording.user_stream();
    return own;
  }
};

// What the op's CUDA implementation does (csrc/bindings/ops_cuda.cpp), with addresses in the place of tensors.
struct Call {
  int32_t layer;
  int64_t batch, tokens, top_k, d_model, num_experts;
  std::string dtype, activation;
  uintptr_t x, expert_index, gate, out, partials;
  bool indices_on_host;
};

void forward(Machine& machine, CudaServing& serving, const Call& call) {
  const cuda::Stream stream = machine.stream(serving.device());
  const auto* const indices = reinterpret_cast<const int32_t*>(call.expert_index);
  const int64_t rows = call.tokens * call.top_k;
  std::vector<int32_t> chosen(indices, indices + rows);
  if (!call.indices_on_host) chosen = serving.fetch_indices(indices, rows, stream);
  const std::set<int32_t> distinct(chosen.begin(), chosen.end());
  std::vector<int32_t> experts(distinct.begin(), distinct.end());
  std::erase(experts, -1);
  std::vector<int32_t> table(static_cast<size_t>(call.num_experts));

  cuda::LayerForward layer{};
  layer.layer = call.layer;
  layer.batch = call.batch;
  layer.stream = stream;
  layer.slot_table = table.data();
  layer.experts = experts;
  MoeFfnArgs& args = layer.args;
  args.tokens = call.tokens;
  args.top_k = call.top_k;
  args.d_model = call.d_model;
  args.num_experts = call.num_experts;
  args.x_dtype = call.dtype == "float32" ? DType::f32 : call.dtype == "bfloat16" ? DType::bf16 : DType::f16;
  args.x = reinterpret_cast<const void*>(call.x);
  args.x_row_stride = call.d_model;
  args.expert_index = indices;
  args.gate = reinterpret_cast<const float*>(call.gate);
  const std::optional<ActivationName> known = parse_activation(call.activation);
  if (!known) fail(ErrorKind::invalid, "activation is '", call.activation, "', expected one of ", activation_names());
  args.activation = known->function;  // whether it is gated the store knows
  args.out = reinterpret_cast<void*>(call.out);
  args.partials = reinterpret_cast<float*>(call.partials);
  const ParallelFor serial{1, [](int64_t count, void (*body)(void*, int64_t), void* context) {
                             for (int64_t i = 0; i < count; ++i) body(context, i);
                           }};
  serving.forward(layer, [&](const MoeFfnArgs& wave, cuda::Stream on) {
    // The slots alone: torch gives the other tensors' memory to later ones, which is not this recording's to judge.
    std::vector<Range> reads;
    const auto bytes = serving.engine().format().record_bytes();
    for (const int32_t slot : table) {
      if (slot < 0) continue;
      const auto* const record = static_cast<const char*>(serving.engine().slot_base()) + slot * bytes;
      reads.push_back({record, static_cast<size_t>(bytes)});
    }
    machine.recording.kernel(on, std::move(reads), {}, [&] { cpu::moe_ffn(wave, serial); });
  });
  if (call.top_k > 1) cpu::moe_ffn_combine(args, serial);
}

}  // namespace
}  // namespace sida::cuda_test

using namespace sida;
using namespace sida::cuda_test;

PYBIND11_MODULE(sida_emulated_cuda, m) {
  using Wanted = std::vector<std::pair<int32_t, std::vector<int32_t>>>;
  using WithoutLock = py::call_guard<py::gil_scoped_release>;
  py::class_<Machine, std::shared_ptr<Machine>>(m, "Machine")
      .def(py::init<int>(), py::arg("devices"))
      .def("problems", [](Machine& machine) { return machine.recording.problems(); })
      .def("calls", [](Machine& machine, const std::string& name) { return machine.recording.calls(name); })
      .def("fail", [](Machine& machine, const std::string& call, int status) { machine.recording.fail(call, status); })
      .def("pinned_bytes", [](Machine& machine) { return machine.recording.pinned_bytes(); })
      .def("set_pinned_only", [](Machine& machine, bool only) { machine.recording.pinned_only = only; })
      // What was not given back becomes a problem.
      .def("finish", [](Machine& machine) { machine.recording.finish(); })
      .def("check_device", [](Machine& machine, int device) { cuda::check_device(machine.recording.table(), device); });

  // Of this module alone: _C has one of the same type where it was built with CUDA.
  py::class_<CudaServing, std::shared_ptr<CudaServing>>(m, "CudaServing", py::module_local())
      .def(py::init([](Machine& machine, std::shared_ptr<ExpertStore> store, int device, int64_t slots,
                       int64_t host_slots, const std::string& pin, int lanes, int host_lanes,
                       const std::string& eviction, int64_t wait_deadline_ms, const Faults& faults, int64_t read_bytes,
                       bool blocking) {
             const py::gil_scoped_release released;
             cuda::ServingOptions options{};
             options.device = device;
             options.slots = slots;
             options.host_slots = host_slots;
             options.pin = cuda::parse_pin(pin);
             options.lanes = lanes;
             options.host_lanes = host_lanes;
             options.eviction = eviction;
             options.wait_deadline = std::chrono::milliseconds(wait_deadline_ms);
             options.faults = faults;
             options.read_bytes = read_bytes;
             options.blocking = blocking;
             return std::make_shared<CudaServing>(machine.recording.table(), std::move(store), options);
           }),
           py::arg("machine"), py::arg("store"), py::kw_only(), py::arg("device"), py::arg("slots"),
           py::arg("host_slots"), py::arg("pin"), py::arg("lanes"), py::arg("host_lanes"), py::arg("eviction"),
           py::arg("wait_deadline_ms"), py::arg("faults"), py::arg("read_bytes"), py::arg("blocking"))
      .def_property_readonly("engine", &CudaServing::shared_engine)
      .def_property_readonly("pool", &CudaServing::pool, py::return_value_policy::reference_internal)
      .def_property_readonly("device", &CudaServing::device)
      .def_property_readonly("pinned_bytes", &CudaServing::pinned_bytes)
      .def_property_readonly("memory_bytes", &CudaServing::memory_bytes)
      .def_property_readonly("pin_obstacle", &CudaServing::pin_obstacle)
      .def_property_readonly("placement", &CudaServing::placement)
      .def(
          "announce",
          [](CudaServing& serving, const Wanted& wanted) {
            AnnouncedBatch batch;
            for (const auto& [layer, experts] : wanted) batch.layers.push_back({layer, experts});
            const py::gil_scoped_release released;
            return serving.announce(batch);
          },
          py::arg("wanted"))
      .def("retire", &CudaServing::retire, py::arg("batch"), WithoutLock())
      .def("close", &CudaServing::close, WithoutLock())
      .def(
          "forward",
          [](CudaServing& serving, Machine& machine, int32_t layer, int64_t batch, int64_t tokens, int64_t top_k,
             int64_t d_model, int64_t num_experts, const std::string& dtype, const std::string& activation, uintptr_t x,
             uintptr_t expert_index, uintptr_t gate, uintptr_t out, uintptr_t partials, bool indices_on_host) {
            forward(machine, serving,
                    {layer, batch, tokens, top_k, d_model, num_experts, dtype, activation, x, expert_index, gate, out,
                     partials, indices_on_host});
          },
          py::arg("machine"), py::kw_only(), py::arg("layer"), py::arg("batch"), py::arg("tokens"), py::arg("top_k"),
          py::arg("d_model"), py::arg("num_experts"), py::arg("dtype"), py::arg("activation"), py::arg("x"),
          py::arg("expert_index"), py::arg("gate"), py::arg("out"), py::arg("partials"), py::arg("indices_on_host"),
          WithoutLock());
}
