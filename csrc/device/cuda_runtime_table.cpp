// The table's entries over the real CUDA runtime. Virtual memory is the driver's; its functions are asked for by name,
// so that nothing here needs a driver before it is called.
#include "device/cuda_runtime_table.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cctype>
#include <cstring>
#include <fstream>
#include <string>

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

struct Driver {
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) unreserve = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  int status = cudaSuccess;  // of finding them

  Driver() {
    find("cuMemGetAllocationGranularity", granularity);
    find("cuMemAddressReserve", reserve);
    find("cuMemAddressFree", unreserve);
    find("cuMemCreate", create);
    find("cuMemRelease", release);
    find("cuMemMap", map);
    find("cuMemUnmap", unmap);
    find("cuMemSetAccess", set_access);
  }

 private:
  template <class Function>
  void find(const char* name, Function& function) {
    if (status != cudaSuccess) return;
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    status = cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found);
    if (status == cudaSuccess && found != cudaDriverEntryPointSuccess) status = cudaErrorSymbolNotFound;
    function = reinterpret_cast<Function>(address);
  }
};

const Driver& driver() {
  static const Driver functions;
  return functions;
}

CUmemAllocationProp memory_of(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  return properties;
}

CUdeviceptr address_of(void* memory) {
  return reinterpret_cast<CUdeviceptr>(memory);
}

int page_bytes(int device, size_t* bytes) {
  if (driver().status != cudaSuccess) return driver().status;
  const CUmemAllocationProp properties = memory_of(device);
  return driver().granularity(bytes, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
}

int reserve(void** base, size_t bytes) {
  if (driver().status != cudaSuccess) return driver().status;
  CUdeviceptr address = 0;
  const CUresult status = driver().reserve(&address, bytes, 0, 0, 0);
  *base = reinterpret_cast<void*>(address);
  return status;
}

int map_page(void* page, size_t bytes, int device) {
  const CUmemAllocationProp properties = memory_of(device);
  CUmemGenericAllocationHandle handle;
  CUresult status = driver().create(&handle, bytes, &properties, 0);
  if (status != CUDA_SUCCESS) return status;
  status = driver().map(address_of(page), bytes, 0, handle, 0);
  // The mapping keeps the memory; it is freed when it is unmapped.
  const CUresult released = driver().release(handle);
  if (status != CUDA_SUCCESS) return status;
  const CUmemAccessDesc access{properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  status = driver().set_access(address_of(page), bytes, &access, 1);
  if (status == CUDA_SUCCESS) status = released;
  if (status != CUDA_SUCCESS) driver().unmap(address_of(page), bytes);
  return status;
}

// What the system's list of PCI devices says; -1 where it says nothing.
int numa_node_in_sysfs(int device) {
  char id[32] = {};
  if (cudaDeviceGetPCIBusId(id, sizeof id, device) != cudaSuccess) return -1;
  std::string name(id);
  for (char& letter : name) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  int node = -1;
  std::ifstream("/sys/bus/pci/devices/" + name + "/numa_node") >> node;
  return node;
}

int device_facts(int device, DeviceFacts* facts) {
  int major = 0, minor = 0, shared = 0;
  int status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&facts->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  facts->compute_capability = 10 * major + minor;
  facts->shared_per_block = shared;
  if (cudaDeviceGetAttribute(&facts->numa_node, cudaDevAttrHostNumaId, device) != cudaSuccess) facts->numa_node = -1;
  if (facts->numa_node < 0) facts->numa_node = numa_node_in_sysfs(device);
  return status;
}

}  // namespace

const RuntimeTable& runtime_table() {
  static const RuntimeTable table{
      .device_count = [](int* devices) -> int { return cudaGetDeviceCount(devices); },
      .device_facts = device_facts,
      .set_device = [](int device) -> int { return cudaSetDevice(device); },
      .ignore_captures = []() -> int {
        cudaStreamCaptureMode mode = cudaStreamCaptureModeThreadLocal;
        return cudaThreadExchangeStreamCaptureMode(&mode);
      },
      .page_bytes = page_bytes,
      .reserve = reserve,
      .unreserve = [](void* base, size_t bytes) -> int { return driver().unreserve(address_of(base), bytes); },
      .map_page = map_page,
      .unmap_page = [](void* page, size_t bytes) -> int { return driver().unmap(address_of(page), bytes); },
      .host_alloc = [](void** memory, size_t bytes) -> int {
        return cudaHostAlloc(memory, bytes, cudaHostAllocPortable);
      },
      .host_free = [](void* memory) -> int { return cudaFreeHost(memory); },
      .host_register = [](void* memory, size_t bytes) -> int {
        return cudaHostRegister(memory, bytes, cudaHostRegisterPortable);
      },
      .host_unregister = [](void* memory) -> int { return cudaHostUnregister(memory); },
      .host_write = [](void* pinned, const void* source, size_t bytes) { std::memcpy(pinned, source, bytes); },
      .host_read = [](void* target, const void* pinned, size_t bytes) { std::memcpy(target, pinned, bytes); },
      .stream_create = [](Stream* stream, int priority) -> int {
        return cudaStreamCreateWithPriority(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking, priority);
      },
      .stream_destroy = [](Stream stream) -> int { return cudaStreamDestroy(stream_of(stream)); },
      .stream_capturing = [](Stream stream, bool* capturing) -> int {
        cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
        const cudaError_t status = cudaStreamIsCapturing(stream_of(stream), &state);
        *capturing = state != cudaStreamCaptureStatusNone;
        return status;
      },
      .stream_number = [](Stream stream, uint64_t* number) -> int {
        unsigned long long id = 0;
        const cudaError_t status = cudaStreamGetId(stream_of(stream), &id);
        *number = id;
        return status;
      },
      .event_create = [](Event* event, bool sleeping) -> int {
        return cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event),
                                        cudaEventDisableTiming | (sleeping ? cudaEventBlockingSync : 0u));
      },
      .event_destroy = [](Event event) -> int { return cudaEventDestroy(event_of(event)); },
      .event_record = [](Event event, Stream stream) -> int {
        return cudaEventRecord(event_of(event), stream_of(stream));
      },
      .event_query = [](Event event) -> int {
        const cudaError_t status = cudaEventQuery(event_of(event));
        if (status == cudaErrorNotReady) cudaGetLastError();  // an answer, not an error for others to find
        return status;
      },
      .event_synchronize = [](Event event) -> int { return cudaEventSynchronize(event_of(event)); },
      .stream_wait = [](Stream stream, Event event) -> int {
        return cudaStreamWaitEvent(stream_of(stream), event_of(event), 0);
      },
      .copy_to_device = [](void* target, const void* source, size_t bytes, Stream stream) -> int {
        return cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, stream_of(stream));
      },
      .copy_to_host = [](void* target, const void* source, size_t bytes, Stream stream) -> int {
        return cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToHost, stream_of(stream));
      },
      .copy_priority = highest_priority,
      .error_text = [](int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); },
  };
  return table;
}

}  // namespace sida::cuda
