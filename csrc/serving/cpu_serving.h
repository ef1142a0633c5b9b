// The forward of one MoE layer whose experts lie in an engine's slots in RAM: waves of experts as they come in, each
// computed by the CPU's kernels and released. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <functional>

#include "experts/transfer.h"
#include "kernels/moe_ffn.h"

namespace sida::cpu {

struct LayerForward {
  int32_t layer = 0;  // among the store's MoE layers
  BatchId batch = 0;  // that was announced; 0: none
  // All experts of the same model in 4 bits, in memory: what computes those that the engine hands out as too late.
  // Null: the engine's max_low_bit must be 0.
  TransferEngine* low_bit = nullptr;
  // Without what set_slots() and the waves set. Indices are checked by the caller, as for moe_ffn.
  MoeFfnArgs args{};
  ParallelFor threads{};
  std::function<bool()> interrupted;  // as TransferEngine::next_wave
  // Runs the body under a name, for a profiler: "sida::demand" for a wait, "sida::moe_ffn" for a wave's kernels.
  void (*profiled)(const char* name, const std::function<void()>& body) = nullptr;
};

// Returns when the layer's result is complete. Throws as TransferEngine::demand and next_wave; whatever it throws, the
// demand is over and no slot stays pinned.
void forward(TransferEngine& engine, const LayerForward& layer);

}  // namespace sida::cpu
