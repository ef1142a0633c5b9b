// PYBIND11_MODULE(_C): the engine's objects. Every call that may wait for a lock of the engine or of the
// table of layers gives the GIL up first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/borrow.h"
#include "bindings/layers.h"
#include "bindings/measure_compute.h"
#include "bindings/python_errors.h"
#include "bindings/torch_threads.h"
#include "experts/measure.h"
#include "experts/policy_trace.h"
#include "experts/store.h"
#include "experts/transfer.h"
#include "experts/virtual_clock.h"
#include "kernels/activation.h"
#include "kernels/group_rounding.h"
#include "kernels/moe_ffn.h"
#ifdef SIDA_WITH_CUDA
#include "serving/cuda_serving.h"
#endif

namespace py = pybind11;

namespace sida {
namespace {

DType dtype_from(const std::string& name) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::i8, DType::int4, DType::mxfp4}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  fail(ErrorKind::invalid, "dtype is '", name, "', expected float32, bfloat16, float16, int8, int4 or mxfp4");
}

using WithoutLock = py::call_guard<py::gil_scoped_release>;

// The bytes of a contiguous buffer of whole 4096-byte blocks.
RecordChecksum checksum_of(const py::buffer& record) {
  const py::buffer_info info = record.request();
  const int64_t bytes = info.size * info.itemsize;
  if (!PyBuffer_IsContiguous(info.view(), 'C') || bytes % ExpertFormat::record_alignment != 0) {
    fail(ErrorKind::invalid, "record has ", bytes, " bytes, expected a contiguous buffer of a multiple of ",
         ExpertFormat::record_alignment);
  }
  return record_checksum(info.ptr, bytes);
}

// A contiguous buffer of so many bytes, which a caller of rounding and expanding has made to measure.
void* measured(const py::buffer& buffer, int64_t bytes, const char* name, bool writable = false) {
  const py::buffer_info info = buffer.request(writable);
  if (!PyBuffer_IsContiguous(info.view(), 'C') || info.size * info.itemsize != bytes) {
    fail(ErrorKind::invalid, name, " has ", info.size * info.itemsize, " bytes, expected ", bytes, ", contiguous");
  }
  return info.ptr;
}

DType grouped_from(const std::string& name) {
  const DType dtype = dtype_from(name);
  if (!is_grouped(dtype)) fail(ErrorKind::invalid, "dtype is '", name, "', expected int4 or mxfp4");
  return dtype;
}

void round_groups_into(const std::string& to, int64_t rows, int64_t columns, const py::buffer& weight,
                       const std::optional<py::buffer>& importance, const py::buffer& values, const py::buffer& scale) {
  const DType dtype = grouped_from(to);
  const GroupRounding args{
      dtype,
      rows,
      columns,
      static_cast<const float*>(measured(weight, rows * columns * 4, "weight")),
      importance ? static_cast<const float*>(measured(*importance, columns * 4, "importance")) : nullptr,
      static_cast<uint8_t*>(measured(values, rows * row_bytes(dtype, columns), "values", true)),
      measured(scale, rows * row_scale_bytes(dtype, columns), "scale", true)};
  const py::gil_scoped_release released;
  round_groups(args, torch_threads());
}

void expand_groups_into(const std::string& from, int64_t rows, int64_t columns, const py::buffer& values,
                        const py::buffer& scale, const py::buffer& out) {
  const DType dtype = grouped_from(from);
  const GroupExpansion args{dtype,
                            rows,
                            columns,
                            static_cast<const uint8_t*>(measured(values, rows * row_bytes(dtype, columns), "values")),
                            measured(scale, rows * row_scale_bytes(dtype, columns), "scale"),
                            static_cast<float*>(measured(out, rows * columns * 4, "out", true))};
  const py::gil_scoped_release released;
  expand_groups(args, torch_threads());
}

py::bytes prologue(const std::string& header) {
  std::string out(store_magic);
  const auto append = [&](uint32_t value) {
    for (int shift = 0; shift < 32; shift += 8) out.push_back(static_cast<char>(value >> shift & 0xff));
  };
  append(static_cast<uint32_t>(header.size()));
  append(crc32c(header.data(), static_cast<int64_t>(header.size())));
  return py::bytes(out);
}

// One record, read and verified, in memory of its own (aligned for O_DIRECT).
py::object read_record(const ExpertStore& store, int32_t layer, int32_t index) {
  const int64_t bytes = store.layout().format.record_bytes();
  void* memory = std::aligned_alloc(ExpertFormat::record_alignment, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, std::free);
  {
    const py::gil_scoped_release released;
    store.read({layer, index}, memory);
  }
  return py::bytearray(static_cast<const char*>(memory), static_cast<size_t>(bytes));
}

py::dict to_dict(const ExpertFormat& format) {
  py::dict fields;
  fields["d_model"] = format.d_model;
  fields["d_ff"] = format.d_ff;
  fields["dtype"] = dtype_name(format.dtype);
  fields["gated"] = format.gated;
  fields["biased"] = format.biased;
  return fields;
}

template <class List, class Struct>
void add_counters(py::dict& fields, const List& list, const Struct& counters) {
  for_each_counter(list, [&](const auto& counter) { fields[counter.name] = counters.*counter.member; });
}

// What a list counts: (name, text) of each.
template <class List>
py::tuple described(const List& list) {
  py::list found;
  for_each_counter(list, [&](const auto& counter) { found.append(py::make_tuple(counter.name, counter.text)); });
  return py::tuple(found);
}

py::dict stats_of(const TransferEngine& engine) {
  EngineStats stats;
  {
    const py::gil_scoped_release released;
    stats = engine.stats();
  }
  py::list layers;
  for (size_t i = 0; i < stats.layers.size(); ++i) {
    py::dict fields;
    add_counters(fields, layer_counters, stats.layers[i]);
    fields["stalls"] = stats.stalls[i];
    layers.append(fields);
  }
  py::dict fields;
  fields["layers"] = layers;
  add_counters(fields, engine_counters, static_cast<const EngineCounters&>(stats));
  fields["direct"] = stats.direct;
  return fields;
}

// Two strings of [layers * experts]: places as bytes, demands as int64 in the machine's order.
py::tuple standings_of(const TransferEngine& engine) {
  std::vector<ExpertStanding> standings;
  {
    const py::gil_scoped_release released;
    standings = engine.standings();
  }
  std::string places;
  std::vector<int64_t> demands;
  for (const ExpertStanding& expert : standings) {
    places.push_back(static_cast<char>(expert.place));
    demands.push_back(expert.demands);
  }
  return py::make_tuple(py::bytes(places),
                        py::bytes(reinterpret_cast<const char*>(demands.data()), demands.size() * sizeof(int64_t)));
}

using Wanted = std::vector<std::pair<int32_t, std::vector<int32_t>>>;

AnnouncedBatch batch_from(const Wanted& wanted) {
  AnnouncedBatch batch;
  for (const auto& [layer, experts] : wanted) batch.layers.push_back({layer, experts});
  return batch;
}

BatchId announce(TransferEngine& engine, const Wanted& wanted, bool begin) {
  AnnouncedBatch batch = batch_from(wanted);
  const py::gil_scoped_release released;
  return engine.announce(std::move(batch), begin);
}

RoutingTrace trace_from(int32_t layers, int32_t experts, const std::vector<Wanted>& batches) {
  RoutingTrace trace{layers, experts, {}};
  for (const Wanted& wanted : batches) trace.batches.push_back(batch_from(wanted));
  return trace;
}

py::tuple policy_result(const PolicyResult& result) {
  return py::make_tuple(result.wanted, result.loads, result.wasted_prefetches);
}

py::tuple run_policy_of(int32_t layers, int32_t experts, const std::vector<Wanted>& batches,
                        const std::string& eviction, int64_t slots, int lookahead,
                        const std::vector<Wanted>& predicted) {
  const RoutingTrace trace = trace_from(layers, experts, batches);
  const RoutingTrace tables = trace_from(layers, experts, predicted);
  PolicyResult result;
  {
    const py::gil_scoped_release released;
    result = run_policy(trace, {.eviction = parse_eviction(eviction), .slots = slots, .lookahead = lookahead},
                        tables.batches);
  }
  return policy_result(result);
}

py::tuple run_optimal_of(int32_t layers, int32_t experts, const std::vector<Wanted>& batches, int64_t slots) {
  const RoutingTrace trace = trace_from(layers, experts, batches);
  PolicyResult result;
  {
    const py::gil_scoped_release released;
    result = run_optimal(trace, slots);
  }
  return policy_result(result);
}

py::dict run_clock_of(int32_t layers, int32_t experts, const std::vector<Wanted>& batches, const std::string& eviction,
                      int64_t slots, int lookahead, double read, double before, double compute, int lanes,
                      const std::vector<Wanted>& predicted, const py::object& admit, double shared,
                      const py::object& in_vain) {
  const RoutingTrace trace = trace_from(layers, experts, batches);
  const RoutingTrace tables = trace_from(layers, experts, predicted);
  const auto ask = [](const py::object& whom, const ClockProgress& progress) -> py::object {
    const Pace& pace = progress.pace;
    return whom(progress.seconds, pace.named_wanted, pace.named - pace.named_wanted, pace.useful_prefetches,
                pace.wasted_prefetches, pace.loads, pace.read_seconds, pace.stall_seconds);
  };
  Admission admission;
  if (!admit.is_none()) {
    admission.admit = [&](const ClockProgress& progress) {
      const py::gil_scoped_acquire held;
      const auto [wanted, early] = ask(admit, progress).cast<std::pair<int64_t, bool>>();
      return Admitted{wanted, early};
    };
  }
  if (!in_vain.is_none()) {
    admission.in_vain = [&](const ClockProgress& progress) {
      const py::gil_scoped_acquire held;
      return ask(in_vain, progress).cast<bool>();
    };
  }
  const PolicyOptions options{.eviction = parse_eviction(eviction), .slots = slots, .lookahead = lookahead};
  ClockResult result;
  {
    const py::gil_scoped_release released;
    const ModelledTime time{.read = read, .before = before, .compute = compute, .lanes = lanes, .shared = shared};
    result = run_clock(trace, options, time, tables.batches, admission);
  }
  py::dict fields;
  fields["seconds"] = result.seconds;
  fields["stalled"] = result.stalled;
  fields["wanted"] = result.wanted;
  fields["loads"] = result.loads;
  fields["misses"] = result.demanded_loads;
  fields["late"] = result.late;
  fields["wasted_prefetches"] = result.wasted_prefetches;
  return fields;
}

py::tuple take_trace(TransferEngine& engine) {
  Trace::Taken taken;
  {
    const py::gil_scoped_release released;
    taken = engine.trace().take();
  }
  py::list events;
  for (const TraceEvent& event : taken.events) {
    const char* kind = event.kind == TraceEvent::Kind::copy    ? "copy"
                       : event.kind == TraceEvent::Kind::stall ? "stall"
                                                               : "compute";
    events.append(
        py::make_tuple(kind, event.lane, event.layer, event.expert, event.batch, event.begin_ns, event.end_ns));
  }
  return py::make_tuple(events, taken.dropped);
}

const char* precision_name(cpu::Precision precision) {
  return precision == cpu::Precision::fast ? "fast" : "exact";
}

Activation activation_of(const TransferEngine& engine, const std::string& activation) {
  const std::optional<ActivationName> known = parse_activation(activation);
  if (!known) fail(ErrorKind::invalid, "activation is '", activation, "', expected one of ", activation_names());
  if (known->gated != engine.format().gated) {
    fail(ErrorKind::invalid, "activation is '", activation, "', but the expert store holds ",
         engine.format().gated ? "gated" : "plain", " experts");
  }
  return known->function;
}

// Kernels go by the sizes of whichever record they compute from.
void check_low_bit(const TransferEngine& engine, const TransferEngine& low_bit) {
  ExpertFormat expected = engine.format();
  const ExpertFormat& found = low_bit.format();
  expected.dtype = found.dtype;
  if (!is_grouped(found.dtype) || found != expected || low_bit.capacity() != engine.capacity()) {
    fail(ErrorKind::invalid, "the low-bit copies are ", low_bit.capacity(), " experts of ", found.d_model, " x ",
         found.d_ff, " in ", dtype_name(found.dtype), ", expected ", engine.capacity(), " of ", expected.d_model, " x ",
         expected.d_ff, " in int4 or mxfp4, with the same gate and biases");
  }
}

#ifdef SIDA_WITH_CUDA
void bind_cuda(py::module_& m) {
  using cuda::CudaServing;
  m.def(
      "check_cuda_device", [](int device) { cuda::check_device(cuda::runtime_table(), device); }, py::arg("device"),
      WithoutLock());
  py::class_<CudaServing, std::shared_ptr<CudaServing>>(m, "CudaServing")
      .def(py::init([](std::shared_ptr<ExpertStore> store, int device, int64_t slots, int64_t host_slots,
                       const std::string& pin, int lanes, int host_lanes, const std::string& eviction,
                       int64_t wait_deadline_ms, const Faults& faults, int64_t read_bytes, bool blocking) {
             const py::gil_scoped_release released;
             const cuda::ServingOptions options{.device = device,
                                                .slots = slots,
                                                .host_slots = host_slots,
                                                .pin = cuda::parse_pin(pin),
                                                .lanes = lanes,
                                                .host_lanes = host_lanes,
                                                .eviction = eviction,
                                                .wait_deadline = std::chrono::milliseconds(wait_deadline_ms),
                                                .faults = faults,
                                                .read_bytes = read_bytes,
                                                .blocking = blocking};
             return std::make_shared<CudaServing>(cuda::runtime_table(), std::move(store), options);
           }),
           py::arg("store"), py::kw_only(), py::arg("device"), py::arg("slots"), py::arg("host_slots"), py::arg("pin"),
           py::arg("lanes"), py::arg("host_lanes"), py::arg("eviction"), py::arg("wait_deadline_ms"), py::arg("faults"),
           py::arg("read_bytes"), py::arg("blocking"))
      .def_property_readonly("engine", &CudaServing::shared_engine)
      .def("pool_stats", [](CudaServing& serving) { return stats_of(serving.pool()); })
      .def(
          "reset_pool_stats", [](CudaServing& serving) { serving.pool().reset_stats(); }, WithoutLock())
      .def_property_readonly("pinned_bytes", py::cpp_function(&CudaServing::pinned_bytes, WithoutLock()))
      .def_property_readonly("memory_bytes", py::cpp_function(&CudaServing::memory_bytes, WithoutLock()))
      .def_property_readonly("pin_obstacle", &CudaServing::pin_obstacle)
      .def_property_readonly("placement", &CudaServing::placement)
      .def(
          "announce",
          [](CudaServing& serving, const Wanted& wanted) {
            const AnnouncedBatch batch = batch_from(wanted);
            const py::gil_scoped_release released;
            return serving.announce(batch);
          },
          py::arg("wanted"))
      .def("retire", &CudaServing::retire, py::arg("batch"), WithoutLock())
      .def("close", &CudaServing::close, WithoutLock());
  m.def(
      "register_cuda_layer",
      [](std::shared_ptr<CudaServing> serving, int32_t index, int32_t num_experts, const std::string& activation) {
        const Activation function = activation_of(serving->engine(), activation);
        const ExpertFormat& format = serving->engine().format();
        if (format.biased || function == Activation::swiglu_oai || is_grouped(format.dtype)) {
          fail(ErrorKind::invalid, "the experts have ",
               is_grouped(format.dtype) ? dtype_name(format.dtype)
               : format.biased          ? "biases"
                                        : "the activation swiglu_oai",
               ", for which there are no CUDA kernels; load the model with device='cpu'");
        }
        return register_layer({serving->shared_engine(), index, num_experts, function, serving});
      },
      py::arg("serving"), py::arg("index"), py::arg("num_experts"), py::arg("activation"), WithoutLock());
}
#endif

}  // namespace
}  // namespace sida

using namespace sida;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The expert engine of sida_ext.";
  store_error_class() = py::object(py::module_::import("sida_ext.errors").attr("StoreError")).release().ptr();
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      set_python_error(error);
    }
  });
  m.attr("layer_counters") = described(layer_counters);
  m.attr("engine_counters") = described(engine_counters);

  py::class_<ExpertFormat>(m, "ExpertFormat")
      .def(py::init([](int64_t d_model, int64_t d_ff, const std::string& dtype, bool gated, bool biased) {
             for (const auto& [name, size] : {std::pair{"d_model", d_model}, {"d_ff", d_ff}}) {
               if (ExpertFormat::is_dimension(size)) continue;
               fail(ErrorKind::invalid, "ExpertFormat: ", name, " is ", size, ", expected 1 to ",
                    ExpertFormat::largest_dimension);
             }
             return ExpertFormat{d_model, d_ff, dtype_from(dtype), gated, biased};
           }),
           py::arg("d_model"), py::arg("d_ff"), py::arg("dtype"), py::arg("gated") = false, py::arg("biased") = false)
      .def_property_readonly("record_bytes", &ExpertFormat::record_bytes)
      .def_property_readonly("wi_offset", &ExpertFormat::wi_offset)
      .def_property_readonly("wo_offset", &ExpertFormat::wo_offset)
      .def_property_readonly("wi_scale_offset", &ExpertFormat::wi_scale_offset)
      .def_property_readonly("wo_scale_offset", &ExpertFormat::wo_scale_offset)
      .def_property_readonly("wi_bias_offset", &ExpertFormat::wi_bias_offset)
      .def_property_readonly("wo_bias_offset", &ExpertFormat::wo_bias_offset)
      .def("__repr__", [](const ExpertFormat& format) {
        return "ExpertFormat(" + py::str(to_dict(format)).cast<std::string>() + ")";
      });

  m.attr("largest_dimension") = ExpertFormat::largest_dimension;
  m.attr("store_prologue_bytes") = store_prologue_bytes;
  m.def("store_prologue", &prologue, py::arg("header"));
  m.def("record_checksum", &checksum_of, py::arg("record"));
  m.def("round_groups", &round_groups_into, py::arg("to"), py::arg("rows"), py::arg("columns"), py::arg("weight"),
        py::arg("importance"), py::arg("values"), py::arg("scale"));
  m.def("expand_groups", &expand_groups_into, py::arg("from_"), py::arg("rows"), py::arg("columns"), py::arg("values"),
        py::arg("scale"), py::arg("out"));

  py::class_<ExpertStore, std::shared_ptr<ExpertStore>>(m, "ExpertStore")
      .def(py::init([](const std::string& path) { return ExpertStore::open(path); }), py::arg("path"))
      .def_property_readonly("header_json", &ExpertStore::header_json)
      .def_property_readonly("path", &ExpertStore::path)
      .def(
          "set_layout",
          [](ExpertStore& store, const ExpertFormat& format, int32_t layers, int32_t experts, int64_t data_offset,
             std::vector<RecordChecksum> checksums, std::vector<std::string> layer_names) {
            store.set_layout({format, layers, experts, data_offset, std::move(checksums), std::move(layer_names)});
          },
          py::arg("format"), py::arg("layers"), py::arg("experts"), py::arg("data_offset"), py::arg("checksums"),
          py::arg("layer_names"))
      .def("read", &read_record, py::arg("layer"), py::arg("index"));

  py::class_<Faults>(m, "Faults", "What tests make go wrong in the reads of a TransferEngine.")
      .def(py::init([](uint64_t seed, int64_t delay_us_max, int64_t fail_every, int64_t delay_us_min,
                       int64_t short_every, int64_t interrupt_every, int64_t flip_every, int64_t die_every) {
             return Faults{.seed = seed,
                           .delay_us_max = delay_us_max,
                           .fail_every = fail_every,
                           .delay_us_min = delay_us_min,
                           .short_every = short_every,
                           .interrupt_every = interrupt_every,
                           .flip_every = flip_every,
                           .die_every = die_every};
           }),
           py::kw_only(), py::arg("seed") = 0, py::arg("delay_us_max") = 0, py::arg("fail_every") = 0,
           py::arg("delay_us_min") = 0, py::arg("short_every") = 0, py::arg("interrupt_every") = 0,
           py::arg("flip_every") = 0, py::arg("die_every") = 0);

  py::class_<TransferEngine, std::shared_ptr<TransferEngine>>(m, "TransferEngine")
      .def(py::init([](std::shared_ptr<ExpertStore> store, int64_t slots, int lanes, const std::string& eviction,
                       int64_t wait_deadline_ms, const Faults& faults, bool populate, int64_t read_bytes) {
             const py::gil_scoped_release released;
             EngineOptions options{.slots = slots,
                                   .lanes = lanes,
                                   .eviction = eviction,
                                   .wait_deadline = std::chrono::milliseconds(wait_deadline_ms),
                                   .faults = faults,
                                   .read_bytes = read_bytes,
                                   .populate = populate};
             return std::make_shared<TransferEngine>(std::move(store), std::move(options));
           }),
           py::arg("store"), py::kw_only(), py::arg("slots"), py::arg("lanes"), py::arg("eviction"),
           py::arg("wait_deadline_ms"), py::arg("faults"), py::arg("populate"), py::arg("read_bytes"))
      .def("announce", &announce, py::arg("wanted"), py::arg("begin") = true)
      .def("pace",
           [](const TransferEngine& engine) {
             const Pace pace = engine.pace();
             return py::make_tuple(pace.useful_prefetches, pace.wasted_prefetches, pace.loads, pace.read_seconds,
                                   pace.stall_seconds);
           })
      .def("announcing_pace",
           [](const TransferEngine& engine) {
             const Pace pace = engine.pace();
             return py::make_tuple(pace.named_wanted, pace.named - pace.named_wanted, pace.useful_prefetches,
                                   pace.wasted_prefetches, pace.loads, pace.read_seconds, pace.stall_seconds);
           })
      .def("retire", &TransferEngine::retire, py::arg("batch"), WithoutLock())
      .def_property_readonly("budget", py::cpp_function(&TransferEngine::budget, WithoutLock()))
      .def_property_readonly("capacity", &TransferEngine::capacity)
      .def("set_budget", &TransferEngine::set_budget, py::arg("slots"), WithoutLock())
      .def("set_max_low_bit", &TransferEngine::set_max_low_bit, py::arg("share"), WithoutLock())
      .def("set_early_prefetch", &TransferEngine::set_early_prefetch, py::arg("early"), WithoutLock())
      .def("set_settled", &TransferEngine::set_settled, py::arg("settled"), WithoutLock())
      .def("load_all",
           [](TransferEngine& engine) {
             try {
               const py::gil_scoped_release reads;
               engine.load_all(signal_raised);
             } catch (const Error&) {
               if (PyErr_Occurred() != nullptr) throw py::error_already_set();
               throw;
             }
           })
      .def("stats", &stats_of)
      .def("standings", &standings_of)
      .def("reset_stats", &TransferEngine::reset_stats, WithoutLock())
      .def(
          "set_trace", [](TransferEngine& engine, bool on) { engine.trace().set_on(on); }, py::arg("on"))
      .def("take_trace", &take_trace)
      .def("close", &TransferEngine::close, WithoutLock());

  m.def("release_threads", &release_threads, WithoutLock());

  py::class_<DiskRate>(m, "DiskRate")
      .def_readonly("bytes_per_second", &DiskRate::bytes_per_second)
      .def_readonly("direct", &DiskRate::direct);
  m.def("measure_disk_rate", &measure_disk_rate, py::arg("folder"), py::arg("bytes") = int64_t{1} << 30,
        py::arg("readers") = 4, WithoutLock());
  m.def(
      "measure_read_rates",
      [](const std::string& path, double seconds) {
        ReadRates found;
        {
          const py::gil_scoped_release released;
          found = measure_read_rates(path, seconds);
        }
        py::list rates;
        for (const ReadRate& rate : found.rates) {
          rates.append(py::make_tuple(rate.read_bytes, rate.lanes, rate.bytes_per_second));
        }
        return py::make_tuple(rates, found.direct);
      },
      py::arg("path"), py::arg("seconds"));
  m.def("measure_memory_bandwidth", &measure_memory_bandwidth, py::arg("threads"), py::arg("bytes") = int64_t{2} << 30,
        WithoutLock());
  m.def("measure_moe_ffn", &measure_moe_ffn, py::arg("d_model"), py::arg("d_ff"), py::arg("activation"),
        py::arg("dtype"), py::arg("experts"), py::arg("tokens"), py::arg("seconds"), py::arg("x_dtype"),
        py::arg("walked"), WithoutLock());
  m.def("measure_linear", &measure_linear, py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("tokens"),
        py::arg("seconds"), py::arg("x_dtype"), py::arg("walked"), WithoutLock());
  m.def("measure_multiply_add_rate", &cpu::measure_multiply_add_rate, py::arg("threads"), WithoutLock());

  m.def("run_policy", &run_policy_of, py::arg("layers"), py::arg("experts"), py::arg("batches"), py::arg("eviction"),
        py::arg("slots"), py::arg("lookahead"), py::arg("predicted"));
  m.def("run_clock", &run_clock_of, py::arg("layers"), py::arg("experts"), py::arg("batches"), py::arg("eviction"),
        py::arg("slots"), py::arg("lookahead"), py::arg("read"), py::arg("before"), py::arg("compute"),
        py::arg("lanes"), py::arg("predicted"), py::arg("admit") = py::none(), py::arg("shared") = 0.0,
        py::arg("in_vain") = py::none());
  m.def("run_optimal", &run_optimal_of, py::arg("layers"), py::arg("experts"), py::arg("batches"), py::arg("slots"));

  py::class_<Borrow>(m, "Borrow")
      .def(py::init([](std::shared_ptr<TransferEngine> engine, int32_t layer, const std::vector<int32_t>& experts) {
             return std::make_unique<Borrow>(std::move(engine), layer, experts, current_batch());
           }),
           py::arg("engine"), py::arg("layer"), py::arg("experts"))
      .def("next", &Borrow::next)
      .def("finish", &Borrow::finish);
  m.def(
      "register_layer",
      [](std::shared_ptr<TransferEngine> engine, int32_t index, int32_t num_experts, const std::string& activation,
         std::shared_ptr<TransferEngine> low_bit) {
        if (low_bit != nullptr) check_low_bit(*engine, *low_bit);
        return register_layer({engine, index, num_experts, activation_of(*engine, activation), nullptr, low_bit});
      },
      py::arg("engine"), py::arg("index"), py::arg("num_experts"), py::arg("activation"),
      py::arg("low_bit") = std::shared_ptr<TransferEngine>(), WithoutLock());
#ifdef SIDA_WITH_CUDA
  m.attr("cuda_built") = true;
  bind_cuda(m);
#else
  m.attr("cuda_built") = false;
#endif
  m.def("unregister_layer", &unregister_layer, py::arg("handle"), WithoutLock());
  m.def("set_current_batch", &set_current_batch, py::arg("batch"));
  m.def("instruction_set", &cpu::instruction_set);
  m.def("instruction_sets", &cpu::instruction_sets);
  m.def(
      "set_precision",
      [](const std::string& name) {
        for (const cpu::Precision precision : {cpu::Precision::exact, cpu::Precision::fast}) {
          if (name == precision_name(precision)) return cpu::set_precision(precision);
        }
        fail(ErrorKind::invalid, "precision is '", name, "', expected 'exact' or 'fast'");
      },
      py::arg("precision"));
  m.def("get_precision", [] { return precision_name(cpu::precision()); });
  m.def("precisions", [] {
    std::vector<std::string> names;
    for (const cpu::Precision precision : cpu::precisions()) names.emplace_back(precision_name(precision));
    return names;
  });
}
