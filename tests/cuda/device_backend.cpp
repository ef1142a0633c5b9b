// Lets the tests of the kernels run on a real device: the harness's functions over pinned memory that the device sees.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "harness/harness.h"
#include "kernels/cuda/launch.h"

namespace sida::harness {
namespace {

std::vector<void*>& allocated() {
  static std::vector<void*> all;
  return all;
}

}  // namespace

const char* unavailable() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return devices == 0 ? "no CUDA device on this machine" : nullptr;
}

void finish() {
  cuda::check(cudaDeviceSynchronize(), "running the kernels");
}

void* global_allocate(size_t bytes, size_t misalignment) {
  void* memory = nullptr;
  cuda::check(cudaHostAlloc(&memory, bytes + misalignment + 1, cudaHostAllocMapped), "allocating a test's memory");
  std::memset(memory, 0xF3, bytes + misalignment + 1);
  allocated().push_back(memory);
  return static_cast<unsigned char*>(memory) + misalignment;
}

void global_fill(void* target, const void* source, size_t bytes) {
  std::memcpy(target, source, bytes);
}

void global_read_only(void*, size_t) {}

void global_reset() {
  for (void* const memory : allocated()) cuda::check(cudaFreeHost(memory), "freeing a test's memory");
  allocated().clear();
}

// The device schedules as it likes.
void seed(uint64_t) {}
void order_blocks(std::function<void(std::vector<unsigned>&)>) {}

std::string launched() {
  return "";
}

}  // namespace sida::harness
