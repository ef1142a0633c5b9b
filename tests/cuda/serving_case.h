// A small model of several MoE layers whose experts do not fit, served by the whole two-tier engine: records come from
// a source through a pool of pinned host memory into a few GPU slots, and the real kernels read the slots, all recorded
// and executed in many legal orders.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpp/store_file.h"
#include "experts/expert.h"
#include "kernels/cuda/moe_ffn_cuda.h"
#include "recording_runtime.h"
#include "serving/cuda_serving.h"

namespace sida::cuda_test {

struct Model {
  ExpertFormat format{64, 72, DType::bf16, false};
  int layers = 3, experts = 5;
  int64_t tokens = 11;
  std::vector<std::vector<unsigned char>> records;  // [layers * experts]: the file
  std::vector<std::vector<int32_t>> expert_index;   // [layers][tokens]
  std::vector<std::vector<float>> gate;
  std::vector<uint16_t> x;

  Model(uint64_t seed, DType dtype);
  size_t row_bytes() const { return static_cast<size_t>(tokens * format.d_model) * 2; }
};

// The bytes of the last layer's result with every expert resident, layer after layer, at once.
std::vector<unsigned char> reference(const Model& model);

// The layer on the CPU for the same input, and how far the GPU may be from it: both round the result to bf16, and the
// tensor cores' hidden values are rounded once, which each term of the second product feels. Reports what is beyond.
void check_layer(const Model& model, int layer, const uint16_t* x, const uint16_t* found);

struct Setting {
  int64_t slots = 2, host_slots = 15;
  int lanes = 2, host_lanes = 2, streams = 1, passes = 2, most_staging = 256;
  bool announced = false;  // batches, with a prediction that is right in most of its experts
  bool resized = false;    // the budget changes between layers
  std::string eviction = "lru";
  std::chrono::milliseconds wait_deadline{20'000};
  uint64_t seed = 1;
};

struct Served {
  std::vector<std::vector<const unsigned char*>> outs;                                    // [passes][layers]
  size_t calls = 0, loads = 0, waves = 0, layers = 0, synchronisations = 0, buffers = 0;  // after the first pass
};

// Keeps what the recording's replays read.
class Forward {
 public:
  Forward(Recording& recording, const Model& model, const Setting& setting);
  Served run();

 private:
  AnnouncedBatch prediction();
  const unsigned char* layer_forward(cuda::CudaServing& serving, int layer, const unsigned char* input,
                                     cuda::Stream stream, BatchId batch);

  Recording& recording_;
  const Model& model_;
  const Setting setting_;
  std::mt19937_64 random_;
  test::StoreFile store_;
  std::shared_ptr<RecordSource> source_;
  std::vector<cuda::Stream> streams_;
  const uint16_t* x_;
  std::vector<const int32_t*> chosen_;
  std::vector<const float*> gates_;
  size_t waves_ = 0;
};

// The device's memory is the harness's.
Memory harness_memory();
void prepare(Recording& recording);

// Whether every pass ended with these bytes.
bool same(const Served& served, const std::vector<unsigned char>& expected);

}  // namespace sida::cuda_test
