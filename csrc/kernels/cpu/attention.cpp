// Hands out heads of sequences to the threads until none are left.
#include "kernels/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/scratch.h"

namespace sida::cpu {
namespace {

// Multiply-adds below which waking other threads costs more than they save.
constexpr int64_t serial_work = 1 << 17;

struct Call {
  const AttentionArgs& args;
  AttendHead attend;
  int64_t floats;  // of memory for each worker
  float* memory;
  alignas(cache_line) std::atomic<int64_t> next{0};

  void work(int64_t worker) {
    const int64_t tasks = args.sequences * args.heads;
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      attend(args, task / args.heads, task % args.heads, memory + worker * floats);
    }
  }
};

}  // namespace

const AttentionKernels& attention_kernels() {
  static const AttentionKernels* const table = [] {
    [[maybe_unused]] const char* const name = instruction_set();
#if defined(__x86_64__)
    if (std::strcmp(name, "amx") == 0 || std::strcmp(name, "avx512") == 0) return avx512_attention();
    if (std::strcmp(name, "avx2") == 0) return avx2_attention();
#elif defined(__aarch64__)
    if (std::strcmp(name, "neon") == 0) return neon_attention();
#endif
    return scalar_attention();
  }();
  return *table;
}

void attention(const AttentionArgs& args, const ParallelFor& parallel) {
  const int64_t tasks = args.sequences * args.heads;
  if (tasks == 0 || args.value_dim == 0) return;
  const AttentionKernels& kernels = attention_kernels();
  int64_t scores = 0, longest = 0, turned = 0;
  for (int64_t b = 0; b < args.sequences; ++b) {
    const AttentionSpan& span = args.spans[b];
    const int64_t count = span.last - span.first;
    scores += count * (span.last_query - span.first_query);
    longest = std::max(longest, count);
    if (turns_keys(span, kernels.together)) turned = std::max(turned, count);
  }
  const bool serial = scores * args.heads * (args.dim + args.value_dim) <= serial_work;
  const int64_t workers = serial ? 1 : std::min<int64_t>(std::max(parallel.threads, 1), tasks);
  const auto padded = [&](int64_t count) { return round_up(count, kernels.lanes); };
  const int64_t floats = round_up(
      kernels.together * (padded(args.dim) + padded(longest)) + padded(args.dim) * padded(turned), cache_line / 4);
  ScopedScratch scratch;
  Call call{args,
            args.dtype == DType::f32    ? kernels.f32
            : args.dtype == DType::bf16 ? kernels.bf16
                                        : kernels.f16,
            floats, scratch.floats(workers * floats)};
  if (workers == 1) return call.work(0);
  parallel.run(workers, [](void* self, int64_t worker) { static_cast<Call*>(self)->work(worker); }, &call);
}

}  // namespace sida::cpu
