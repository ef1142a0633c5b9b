#include "bindings/torch_threads.h"

#include <pthread.h>

#include <atomic>
#include <exception>

#include "bindings/tensors.h"

// Found where torch has loaded GNU's OpenMP runtime, null elsewhere.
extern "C" [[gnu::weak]] int omp_pause_resource_all(int kind);
// LLVM's runtime alone has this one. It keeps one set of threads for all, and pausing would end them for all.
extern "C" [[gnu::weak]] int kmp_get_blocktime(void);

namespace sida {
namespace {

// Set in a child of fork(): the threads of torch's pool stayed with the parent, and GNU's OpenMP runtime would wait for
// them for ever.
std::atomic<bool> is_forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

// One call of a ParallelFor on torch's threads. What a body throws must not cross torch's C interface.
struct Loop {
  void (*body)(void*, int64_t);
  void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  static void run(int64_t begin, int64_t end, void* self) {
    auto* const loop = static_cast<Loop*>(self);
    try {
      for (int64_t i = begin; i < end; ++i) loop->body(loop->context, i);
    } catch (...) {
      if (!loop->failed.exchange(true)) loop->error = std::current_exception();
    }
  }
};

}  // namespace

ParallelFor torch_threads() {
  if (is_forked) {
    return ParallelFor{1, [](int64_t count, void (*body)(void*, int64_t), void* context) {
                         for (int64_t i = 0; i < count; ++i) body(context, i);
                       }};
  }
  uint32_t threads = 1;
  check_torch(torch_get_num_threads(&threads), "torch_get_num_threads");
  return ParallelFor{static_cast<int>(threads), [](int64_t count, void (*body)(void*, int64_t), void* context) {
                       Loop loop{body, context};
                       // Inside a parallel region it is this thread's loop: torch_parallel_for sees to that.
                       check_torch(torch_parallel_for(0, count, 1, &Loop::run, &loop), "torch_parallel_for");
                       if (loop.failed) std::rethrow_exception(loop.error);
                     }};
}

void release_threads() {
  constexpr int soft = 1;
  if (is_forked || omp_pause_resource_all == nullptr || kmp_get_blocktime != nullptr) return;
  omp_pause_resource_all(soft);  // fails inside a parallel region: then they are at work
}

}  // namespace sida
