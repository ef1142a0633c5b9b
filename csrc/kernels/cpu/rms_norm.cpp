// Hands out rows to the threads.
#include "kernels/rms_norm.h"

#include <algorithm>

#include "kernels/cpu/attention_kernels.h"

namespace sida::cpu {
namespace {

// Elements below which waking other threads costs more than they save.
constexpr int64_t serial_elements = 1 << 15, rows_at_once = 16;

struct Call {
  const RmsNormArgs& args;
  NormaliseRows rows;

  void run(int64_t task) const { rows(args, task * rows_at_once, std::min(args.rows, (task + 1) * rows_at_once)); }
};

}  // namespace

void rms_norm(const RmsNormArgs& args, const ParallelFor& parallel) {
  const AttentionKernels& kernels = attention_kernels();
  Call call{args, args.dtype == DType::f32    ? kernels.norm_f32
                  : args.dtype == DType::bf16 ? kernels.norm_bf16
                                              : kernels.norm_f16};
  const int64_t tasks = (args.rows + rows_at_once - 1) / rows_at_once;
  if (parallel.threads <= 1 || tasks == 1 || args.rows * args.columns <= serial_elements) {
    return call.rows(args, 0, args.rows);
  }
  parallel.run(tasks, [](void* self, int64_t task) { static_cast<const Call*>(self)->run(task); }, &call);
}

}  // namespace sida::cpu
