#include "serving/cuda_serving.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/at_end.h"
#include "base/error.h"
#include "experts/tier_source.h"
#include "serving/moe_layer.h"

namespace sida::cuda {
namespace {

constexpr int64_t least_staging = 1024;  // numbers: a page

}  // namespace

void check_device(const RuntimeTable& runtime, int device) {
  int devices = 0;
  const int status = runtime.device_count(&devices);
  if (status != RuntimeTable::success) {
    fail(ErrorKind::closed, "CUDA cannot be used on this machine: ", runtime.error_text(status), " (status ", status,
         "); expected a GPU and a driver for it (does nvidia-smi list it?); device='cpu' needs neither");
  }
  if (device < 0 || device >= devices) {
    fail(ErrorKind::invalid, "device is cuda:", device, ", but CUDA finds ", devices, " devices");
  }
  DeviceFacts facts{};
  if (runtime.device_facts(device, &facts) == RuntimeTable::success && facts.compute_capability < 80) {
    fail(ErrorKind::invalid, "cuda:", device, " has compute capability ", facts.compute_capability / 10, ".",
         facts.compute_capability % 10, ", expected 8.0 or later");
  }
}

CudaServing::CudaServing(const RuntimeTable& runtime, std::shared_ptr<ExpertStore> store, const ServingOptions& options)
    : CudaServing(runtime, store, store_source(store, options.faults, options.read_bytes), options) {}

CudaServing::CudaServing(const RuntimeTable& runtime, std::shared_ptr<ExpertStore> store,
                         std::shared_ptr<RecordSource> source, const ServingOptions& options)
    : runtime_(runtime), options_(options) {
  check_device(runtime_, options_.device);
  const StoreLayout& layout = store->layout();
  const int64_t records = int64_t{layout.layers} * layout.experts, record = layout.format.record_bytes();
  for (const auto& [name, slots] : {std::pair{"expert_memory", options_.slots}, {"host_memory", options_.host_slots}}) {
    if (slots < 1 || slots > records) {
      fail(ErrorKind::invalid, name, " is ", slots, " experts, expected 1 to ", records, " (of ", record, " bytes)");
    }
  }
  pinned_ = std::make_shared<PinnedDevice>(runtime_, options_.device, std::move(source), options_.host_slots, records,
                                           record, options_.pin);
  pool_ = std::make_shared<TransferEngine>(store, pinned_,
                                           EngineOptions{.slots = options_.host_slots,
                                                         .lanes = options_.host_lanes,
                                                         .eviction = options_.eviction,
                                                         .wait_deadline = options_.wait_deadline});
  slots_ = std::make_shared<CudaDevice>(runtime_, options_.device, std::make_shared<TierSource>(pool_, layout.experts),
                                        records, record, options_.lanes);
  engine_ = std::make_shared<TransferEngine>(store, slots_,
                                             EngineOptions{.slots = options_.slots,
                                                           .lanes = options_.lanes,
                                                           .eviction = options_.eviction,
                                                           .wait_deadline = options_.wait_deadline});
}

CudaServing::~CudaServing() {
  try {
    close();
  } catch (const Error&) {
    // Told to whoever calls close(); what hangs keeps what it uses.
  }
}

void CudaServing::check(int status, const char* what) const {
  if (status != RuntimeTable::success) {
    fail(ErrorKind::internal, "CUDA device ", options_.device, ": ", what, " failed: ", runtime_.error_text(status),
         " (status ", status, ")");
  }
}

int64_t CudaServing::pinned_bytes() const {
  const std::lock_guard lock(mutex_);
  return pinned_->pinned_bytes() + staging_bytes_;
}
int64_t CudaServing::memory_bytes() const {
  return slots_->slots().memory_bytes();
}
const std::string& CudaServing::pin_obstacle() const {
  return pinned_->obstacle();
}
const std::string& CudaServing::placement() const {
  return pinned_->placement();
}

BatchId CudaServing::announce(const AnnouncedBatch& batch) {
  const BatchId below = pool_->announce(batch);
  const BatchId number = engine_->announce(batch);
  const std::lock_guard lock(mutex_);
  batches_.emplace_back(number, below);
  return number;
}

void CudaServing::retire(BatchId batch) {
  engine_->retire(batch);
  BatchId below = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto found =
        std::find_if(batches_.begin(), batches_.end(), [&](const auto& both) { return both.first == batch; });
    if (found == batches_.end()) return;
    below = found->second;
    batches_.erase(found);
  }
  pool_->retire(below);
}

void CudaServing::use_device(Stream stream, const char* call) const {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) fail(ErrorKind::closed, call, ": the expert engine is closed; load the model again");
  }
  slots_->check_healthy();
  slots_->slots().use_device();
  bool capturing = false;
  check(runtime_.stream_capturing(stream, &capturing), "asking for graph capture");
  if (capturing) {
    fail(ErrorKind::invalid, call, ": the stream is being captured into a CUDA graph; which experts a layer reads, ",
         "and where they lie, is decided on the host each time it runs: capture the model's parts between its MoE ",
         "layers, or ops.moe_ffn over weights that stay where they are");
  }
}

CudaServing::Staging& CudaServing::take_staging(int64_t count) {
  const std::lock_guard lock(mutex_);
  Staging* oldest = nullptr;
  size_t held = 0;
  for (const auto& one : staging_) {
    if (one->taken || one->capacity < count) continue;
    ++held;
    bool free = one->readers == nullptr;
    if (!free && oldest == nullptr) {
      // In order of use, for put_back() moves them to the end: if the oldest is not free, none is.
      oldest = one.get();
      const int status = runtime_.event_query(one->readers->event);
      if (status != RuntimeTable::not_ready) check(status, "a layer's kernels");
      free = status == RuntimeTable::success;
    }
    if (free) {
      one->readers = nullptr;
      one->taken = true;
      return *one;
    }
  }
  if (held >= static_cast<size_t>(options_.most_staging)) {
    check(runtime_.event_synchronize(oldest->readers->event), "a layer's kernels");
    oldest->readers = nullptr;
    oldest->taken = true;
    return *oldest;
  }
  auto fresh = std::make_unique<Staging>();
  fresh->capacity = std::max(count, least_staging);
  const auto bytes = static_cast<size_t>(fresh->capacity) * 4;
  void* memory = nullptr;
  check(runtime_.host_alloc(&memory, bytes), "pinning a staging buffer");
  fresh->memory = static_cast<int32_t*>(memory);
  fresh->taken = true;
  staging_bytes_ += static_cast<int64_t>(bytes);
  staging_.push_back(std::move(fresh));
  return *staging_.back();
}

void CudaServing::put_back(Staging& staging, std::shared_ptr<const CudaSlots::Readers> readers) {
  const std::lock_guard lock(mutex_);
  staging.readers = std::move(readers);
  staging.taken = false;
  const auto at =
      std::find_if(staging_.begin(), staging_.end(), [&](const auto& one) { return one.get() == &staging; });
  std::rotate(at, at + 1, staging_.end());
}

std::vector<int32_t> CudaServing::fetch_indices(const int32_t* indices, int64_t count, Stream stream) {
  use_device(stream, "moe_layer");
  std::vector<int32_t> fetched(static_cast<size_t>(count));
  if (count == 0) return fetched;
  const auto bytes = static_cast<size_t>(count) * 4;
  Staging& staging = take_staging(count);
  const AtEnd put([&] { put_back(staging, nullptr); });
  if (staging.event == nullptr) check(runtime_.event_create(&staging.event, false), "creating an event");
  check(runtime_.copy_to_host(staging.memory, indices, bytes, stream), "fetching a layer's expert indices");
  check(runtime_.event_record(staging.event, stream), "recording a fetch");
  check(runtime_.event_synchronize(staging.event), "the work before a layer's expert indices");
  runtime_.host_read(fetched.data(), staging.memory, bytes);
  return fetched;
}

void CudaServing::wait_for_wave(int32_t layer, const Wave& wave, const CudaSlots::Readers& readers) const {
  const int status = runtime_.event_synchronize(readers.event);
  slots_->check_healthy();  // knows a failed copy's expert
  check(status, ("the kernels of " + engine_->name_of({layer, wave.experts.front()}) + " and " +
                 std::to_string(wave.experts.size() - 1) + " other experts, or something before them,")
                    .c_str());
}

void CudaServing::forward(const LayerForward& layer, const LaunchWave& launch) {
  use_device(layer.stream, "moe_layer");
  MoeFfnArgs args = layer.args;
  set_slots(args, *engine_);
  args.slot_of_expert = layer.slot_table;
  std::vector<int32_t> table(static_cast<size_t>(args.num_experts), -1);
  const auto table_bytes = table.size() * sizeof(int32_t);
  CudaSlots& slots = slots_->slots();

  const DemandId demand = engine_->demand(layer.layer, layer.experts, layer.batch);
  const AtEnd finish([&] { engine_->finish(demand); });
  while (true) {
    const Wave wave = engine_->next_wave(demand, layer.interrupted);
    if (wave.experts.empty()) break;
    slots_->check_healthy();
    const int64_t begin = Trace::now_ns();
    for (size_t i = 0; i < wave.experts.size(); ++i) table[static_cast<size_t>(wave.experts[i])] = wave.slots[i];
    Staging& staging = take_staging(args.num_experts);
    std::shared_ptr<const CudaSlots::Readers> readers;
    {
      const AtEnd order_after([&] {
        // A launch or a record failed: what was launched all the same reads the slots, and the copy its staging buffer.
        try {
          if (readers == nullptr) readers = slots.after_read(layer.stream, wave.slots);
          put_back(staging, readers);
        } catch (const Error& error) {
          // Nothing can be ordered behind those kernels any more. The buffer stays taken, and no lane fills a slot
          // again.
          slots_->condemn(error);
        }
      });
      runtime_.host_write(staging.memory, table.data(), table_bytes);
      check(runtime_.copy_to_device(layer.slot_table, staging.memory, table_bytes, layer.stream),
            "copying a layer's slot numbers");
      slots.before_read(layer.stream, wave.slots);
      launch(args, layer.stream);
      readers = slots.after_read(layer.stream, wave.slots);
    }
    if (options_.blocking) wait_for_wave(layer.layer, wave, *readers);
    engine_->trace().record({TraceEvent::Kind::compute, 0, layer.layer, static_cast<int32_t>(wave.experts.size()),
                             layer.batch, begin, Trace::now_ns()});
    for (const int32_t expert : wave.experts) table[static_cast<size_t>(expert)] = -1;
    engine_->release(demand, wave);
  }
}

void CudaServing::close() {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
  }
  std::exception_ptr failure;
  const auto keep_failure = [&](TransferEngine& engine) {
    try {
      engine.close();
    } catch (const Error&) {
      if (!failure) failure = std::current_exception();
    }
  };
  // The slots first: their copies read the pool, and their records are lent from it.
  keep_failure(*engine_);
  keep_failure(*pool_);
  if (!failure) {
    // The slots have waited for all kernels, and those are behind the copies from the staging buffers.
    const std::lock_guard lock(mutex_);
    for (const auto& staging : staging_) {
      if (staging->taken) continue;  // by a wave that could not be ordered: a copy may still read it
      if (staging->event != nullptr) runtime_.event_destroy(staging->event);
      runtime_.host_free(staging->memory);
    }
    staging_.clear();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace sida::cuda
