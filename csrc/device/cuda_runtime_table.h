// The CUDA runtime as one thin table of functions: what the transfer code calls, so that tests can put a recording
// runtime in its place. This header needs no CUDA; handles are the runtime's own pointers.
#pragma once

#include <cstddef>

namespace sida::cuda {

using Stream = void*;  // cudaStream_t
using Event = void*;   // cudaEvent_t

// Every function returns the runtime's status: 0 for success.
struct RuntimeTable {
  static constexpr int success = 0;
  static constexpr int not_ready = 600;  // cudaErrorNotReady

  int (*set_device)(int device);
  int (*device_alloc)(void** memory, size_t bytes);
  int (*device_free)(void* memory);
  int (*stream_create)(Stream* stream, int priority);  // does not synchronise with the default stream
  int (*stream_destroy)(Stream stream);
  int (*event_create)(Event* event);  // without timing
  int (*event_destroy)(Event event);
  int (*event_record)(Event event, Stream stream);
  int (*event_query)(Event event);  // success or not_ready
  int (*event_synchronize)(Event event);
  int (*stream_wait)(Stream stream, Event event);
  int (*copy_to_device)(void* target, const void* source, size_t bytes, Stream stream);
  int (*copy_priority)();  // the priority for copy lanes: the highest that the device has
  const char* (*error_text)(int status);
};

// The real runtime. Touches no device until a function is called.
const RuntimeTable& runtime_table();

}  // namespace sida::cuda
