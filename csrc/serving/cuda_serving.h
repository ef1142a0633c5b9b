// CudaServing: an expert store served from a GPU: slots in its memory over a pool of pinned host memory over the file,
// each tier the same engine; and the forward of one MoE layer with them.
//
// Knows nothing of torch. The kernels come in as functions, so that tests can record their launches.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "device/cuda_device.h"
#include "device/pinned_device.h"
#include "experts/transfer.h"
#include "kernels/moe_ffn.h"

namespace sida::cuda {

struct ServingOptions {
  int device = 0;
  int64_t slots;       // in the GPU's memory: the budget
  int64_t host_slots;  // of the pool
  Pin pin = Pin::require;
  int lanes = 2;       // copies to the GPU under way at once
  int host_lanes = 4;  // reads of the store under way at once
  std::string eviction = "next_use";
  std::chrono::milliseconds wait_deadline{60'000};
  Faults faults{};               // of the reads of the store, for tests
  int64_t read_bytes = 4 << 20;  // largest single read of the store, as in EngineOptions
  // Buffers of slot numbers, one for each wave under way, before the caller waits for the oldest: more waves than a
  // stream's queue takes, so that the host never waits here while there is room, in 1 MiB of pinned memory.
  int most_staging = 256;
  // To find a failure's cause: forward() returns when its kernels are over, and raises what they or their copies failed
  // of. Otherwise such a failure is raised by a later call, which cannot tell whose it is.
  bool blocking = false;
};

// One wave of a layer, launched on `stream`: as cuda::moe_ffn of moe_ffn_cuda.h.
using LaunchWave = std::function<void(const MoeFfnArgs& args, Stream stream)>;

struct LayerForward {
  int32_t layer = 0;                 // among the store's MoE layers
  BatchId batch = 0;                 // that was announced; 0: none
  MoeFfnArgs args{};                 // without d_ff, num_slots, w_dtype, gated, wi, wo and slot_of_expert: set here
  int32_t* slot_table = nullptr;     // device memory for num_experts numbers
  std::span<const int32_t> experts;  // distinct experts of args.expert_index
  Stream stream = nullptr;
  std::function<bool()> interrupted;  // as TransferEngine::next_wave
};

// Throws Error(closed) if there is no usable driver or device at all, Error(invalid) if there is no such device or it
// is too old.
void check_device(const RuntimeTable& runtime, int device);

class CudaServing {
 public:
  // Throws Error with kind io if host memory cannot be pinned, closed if there is no usable device or driver.
  CudaServing(const RuntimeTable& runtime, std::shared_ptr<ExpertStore> store, const ServingOptions& options);
  // For tests: the pool reads from `source` instead of the store.
  CudaServing(const RuntimeTable& runtime, std::shared_ptr<ExpertStore> store, std::shared_ptr<RecordSource> source,
              const ServingOptions& options);
  ~CudaServing();  // close()
  CudaServing(const CudaServing&) = delete;
  CudaServing& operator=(const CudaServing&) = delete;

  TransferEngine& engine() { return *engine_; }
  // For its counters alone: it is pinned as a whole, so its budget cannot change.
  TransferEngine& pool() { return *pool_; }
  // For its counters and its budget alone: announce, retire and close() are both tiers'.
  std::shared_ptr<TransferEngine> shared_engine() const { return engine_; }
  int device() const { return options_.device; }
  int64_t pinned_bytes() const;             // slab and staging buffers
  int64_t memory_bytes() const;             // of the GPU, taken by slots now
  const std::string& pin_obstacle() const;  // empty if the pool is pinned
  const std::string& placement() const;     // of the pool: as PinnedDevice::placement

  // For both tiers: the pool reads ahead what the slots will want.
  BatchId announce(const AnnouncedBatch& batch);
  void retire(BatchId batch);

  // The indices of a layer, fetched from the device: the one thing that the host waits for in the steady state.
  std::vector<int32_t> fetch_indices(const int32_t* indices, int64_t count, Stream stream);
  // Demands the experts, launches waves as they are there, releases them. Returns when all are launched.
  void forward(const LayerForward& layer, const LaunchWave& launch);

  // As TransferEngine::close, for both tiers.
  void close();

 private:
  // Pinned memory for what passes between host and device with every layer.
  struct Staging {
    int32_t* memory = nullptr;
    int64_t capacity = 0;                               // numbers
    Event event = nullptr;                              // behind a fetch
    std::shared_ptr<const CudaSlots::Readers> readers;  // behind the kernels of the wave whose slots it held
    bool taken = false;
  };

  void check(int status, const char* what) const;
  void use_device(Stream stream, const char* call) const;
  Staging& take_staging(int64_t count);
  void put_back(Staging& staging, std::shared_ptr<const CudaSlots::Readers> readers);
  void wait_for_wave(int32_t layer, const Wave& wave, const CudaSlots::Readers& readers) const;

  const RuntimeTable& runtime_;
  const ServingOptions options_;
  std::shared_ptr<PinnedDevice> pinned_;
  std::shared_ptr<TransferEngine> pool_;
  std::shared_ptr<CudaDevice> slots_;
  std::shared_ptr<TransferEngine> engine_;
  mutable std::mutex mutex_;
  bool closed_ = false;
  std::vector<std::unique_ptr<Staging>> staging_;
  int64_t staging_bytes_ = 0;
  std::vector<std::pair<BatchId, BatchId>> batches_;  // the engine's number, the pool's
};

}  // namespace sida::cuda
