// The CUDA runtime as one thin table of functions: what the transfer code calls, so that tests can put a recording
// runtime in its place. This header needs no CUDA; handles are the runtime's own pointers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sida::cuda {

using Stream = void*;  // cudaStream_t
using Event = void*;   // cudaEvent_t

struct DeviceFacts {
  int compute_capability;  // 80, 86, 89, 90, 100, 120
  int multiprocessors;
  int64_t shared_per_block;  // bytes that a block may ask for
  int numa_node;             // of the host memory that is nearest; -1: unknown
};

// Every function that returns int returns the runtime's status: 0 for success.
struct RuntimeTable {
  static constexpr int success = 0;
  static constexpr int not_ready = 600;  // cudaErrorNotReady

  int (*device_count)(int* devices);
  int (*device_facts)(int device, DeviceFacts* facts);
  int (*set_device)(int device);
  // From now on the calling thread's calls neither fail because another thread captures a graph, nor spoil that graph.
  int (*ignore_captures)();

  // Device memory whose addresses are reserved first and backed by memory page by page.
  int (*page_bytes)(int device, size_t* bytes);
  int (*reserve)(void** base, size_t bytes);  // a multiple of page_bytes, as everywhere below
  int (*unreserve)(void* base, size_t bytes);
  int (*map_page)(void* page, size_t bytes, int device);
  int (*unmap_page)(void* page, size_t bytes);  // nothing may use it any more

  int (*host_alloc)(void** memory, size_t bytes);  // pinned
  int (*host_free)(void* memory);
  int (*host_register)(void* memory, size_t bytes);  // pins
  int (*host_unregister)(void* memory);
  // The host's own accesses to pinned memory: plain copies, here so that a recording sees them.
  void (*host_write)(void* pinned, const void* source, size_t bytes);
  void (*host_read)(void* target, const void* pinned, size_t bytes);

  int (*stream_create)(Stream* stream, int priority);  // does not synchronise with the default stream
  int (*stream_destroy)(Stream stream);
  int (*stream_capturing)(Stream stream, bool* capturing);  // into a CUDA graph
  // Of this stream alone in the whole process: a stream made later may have a destroyed one's handle, never its number.
  int (*stream_number)(Stream stream, uint64_t* number);
  int (*event_create)(Event* event,
                      bool sleeping);  // without timing; whether a thread that waits for it sleeps or spins
  int (*event_destroy)(Event event);
  int (*event_record)(Event event, Stream stream);
  int (*event_query)(Event event);  // success or not_ready
  int (*event_synchronize)(Event event);
  int (*stream_wait)(Stream stream, Event event);
  int (*copy_to_device)(void* target, const void* source, size_t bytes, Stream stream);
  int (*copy_to_host)(void* target, const void* source, size_t bytes, Stream stream);
  int (*copy_priority)();  // the priority for copy lanes: the highest that the device has
  const char* (*error_text)(int status);
};

// The real runtime. Touches no device until a function is called.
const RuntimeTable& runtime_table();

}  // namespace sida::cuda
