// Torch's threads, for what the kernels cut into parts.
#pragma once

#include "kernels/moe_ffn.h"

namespace sida {

// Inside a parallel region of torch's, and in a child of fork(), a loop on the calling thread.
[[nodiscard]] ParallelFor torch_threads();

}  // namespace sida
