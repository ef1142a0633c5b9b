// Launches a kernel that takes one struct, on the caller's stream, and checks the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/error.h"

namespace sida::cuda {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    fail(ErrorKind::internal, what, " failed: ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
  }
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, const Params& params,
            cudaStream_t stream) {
  // Above 48 KiB a kernel has to ask for its dynamic shared memory.
  if (shape.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          name);
  }
#ifdef SIDA_HARNESS
  harness::launch([=] { kernel(params); }, static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.threads),
                  static_cast<size_t>(shape.shared_bytes), name, reinterpret_cast<const void*>(kernel));
  static_cast<void>(stream);  // kernels run at once
#else
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(shape.blocks)),
                         dim3(static_cast<unsigned>(shape.threads)), arguments, static_cast<size_t>(shape.shared_bytes),
                         stream),
        name);
#endif
}

}  // namespace sida::cuda
