// The MoE layers that torch.ops.sida.moe_layer can be called for, by handle.
#pragma once

#include <cstdint>
#include <memory>

#include "experts/transfer.h"
#include "kernels/moe_ffn.h"

namespace sida {

namespace cuda {
class CudaServing;
}

struct Layer {
  std::shared_ptr<TransferEngine> engine;
  int32_t index;  // among the store's MoE layers
  int32_t num_experts;
  Activation activation;
  std::shared_ptr<cuda::CudaServing> cuda;            // null: experts are computed on the CPU
  std::shared_ptr<TransferEngine> low_bit = nullptr;  // as cpu::LayerForward::low_bit
};

// Handles are never reused, so that a stale one is an error and not another model's layer.
int64_t register_layer(Layer layer);
void unregister_layer(int64_t handle) noexcept;
// Throws Error(closed) for a handle that is not (or no longer) registered.
std::shared_ptr<const Layer> find_layer(int64_t handle);

// The announced batch that the calling thread computes, 0 for none; demands of this thread carry it.
BatchId current_batch() noexcept;
void set_current_batch(BatchId batch) noexcept;

}  // namespace sida
