// The table's entries over the real CUDA runtime.
#include "device/cuda_runtime_table.h"

#include <cuda_runtime_api.h>

namespace sida::cuda {
namespace {

static_assert(cudaSuccess == RuntimeTable::success && cudaErrorNotReady == RuntimeTable::not_ready);

cudaStream_t stream_of(Stream stream) {
  return static_cast<cudaStream_t>(stream);
}
cudaEvent_t event_of(Event event) {
  return static_cast<cudaEvent_t>(event);
}

int highest_priority() {
  int least = 0, greatest = 0;
  return cudaDeviceGetStreamPriorityRange(&least, &greatest) == cudaSuccess ? greatest : 0;
}

}  // namespace

const RuntimeTable& runtime_table() {
  static const RuntimeTable table{
      .set_device = [](int device) -> int { return cudaSetDevice(device); },
      .device_alloc = [](void** memory, size_t bytes) -> int { return cudaMalloc(memory, bytes); },
      .device_free = [](void* memory) -> int { return cudaFree(memory); },
      .stream_create = [](Stream* stream, int priority) -> int {
        return cudaStreamCreateWithPriority(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking, priority);
      },
      .stream_destroy = [](Stream stream) -> int { return cudaStreamDestroy(stream_of(stream)); },
      .event_create = [](Event* event) -> int {
        return cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), cudaEventDisableTiming);
      },
      .event_destroy = [](Event event) -> int { return cudaEventDestroy(event_of(event)); },
      .event_record = [](Event event, Stream stream) -> int {
        return cudaEventRecord(event_of(event), stream_of(stream));
      },
      .event_query = [](Event event) -> int { return cudaEventQuery(event_of(event)); },
      .event_synchronize = [](Event event) -> int { return cudaEventSynchronize(event_of(event)); },
      .stream_wait = [](Stream stream, Event event) -> int {
        return cudaStreamWaitEvent(stream_of(stream), event_of(event), 0);
      },
      .copy_to_device = [](void* target, const void* source, size_t bytes, Stream stream) -> int {
        return cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, stream_of(stream));
      },
      .copy_priority = highest_priority,
      .error_text = [](int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); },
  };
  return table;
}

}  // namespace sida::cuda
