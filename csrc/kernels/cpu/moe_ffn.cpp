// Runs a dispatch plan: every worker takes tasks in order until none is left.
#include "kernels/moe_ffn.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/rounding.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/scratch.h"
#include "kernels/dispatch_plan.h"

namespace sida::cpu {
namespace {

// Tokens of a block: its hidden layer (fp32) should stay in a core's cache while all rows of wo pass by.
constexpr int64_t max_block_tokens = 32;
// Rows between two passes over their sums. A multiple of every set's group and tile rows.
constexpr int64_t rows_at_once = 192;
// Multiply-adds that one thread is through with before another would be awake.
constexpr int64_t serial_work = 1 << 15;

// Progress of one split block.
struct Progress {
  alignas(cache_line) std::atomic<int64_t> up_left{0};
  std::atomic<int64_t> down_left{0};
};

// Waits for other workers' running tasks; they are short.
void wait_for(const std::atomic<int64_t>& left) {
  for (int spins = 0; left.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins >= 4096) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// Sizes and places of the buffers, in floats.
struct Layout {
  PanelForm x, h;
  int64_t x_panel, h_panel, sums, unfolded;  // of one worker
  int64_t sums_stride;
  int64_t worker;       // all of one worker's
  int64_t split_panel;  // hidden layer of one split block
};

class Call {
 public:
  Call(const Kernels& kernels, const MoeFfnArgs& args, int threads)
      : args_(args),
        kernels_(kernels),
        threads_(multiply_adds(args) <= serial_work ? 1 : threads),
        plan_(make_dispatch_plan(request(args, threads_, kernels_))) {}

  void run(const ParallelFor& parallel) {
    if (plan_.tasks.empty()) return;
    const int64_t tasks = static_cast<int64_t>(plan_.tasks.size());
    const int64_t workers = std::clamp<int64_t>(threads_, 1, tasks);
    lay_out();
    const int64_t split_panels = std::min<int64_t>(plan_.split_blocks, DispatchPlan::split_buffers);
    memory_ = scratch_.floats(workers * layout_.worker + split_panels * layout_.split_panel);
    split_panels_ = memory_ + workers * layout_.worker;
    progress_ = std::make_unique<Progress[]>(plan_.split_blocks);
    for (int64_t i = 0; i < plan_.split_blocks; ++i) {
      progress_[i].up_left.store(plan_.up_tasks, std::memory_order_relaxed);
      progress_[i].down_left.store(plan_.down_tasks, std::memory_order_relaxed);
    }
    if (workers == 1) return work(0);
    parallel.run(workers, [](void* call, int64_t worker) { static_cast<Call*>(call)->work(worker); }, this);
  }

 private:
  // At most; choices of experts that are not there count too.
  static int64_t multiply_adds(const MoeFfnArgs& args) {
    return args.tokens * args.top_k * args.d_model * args.d_ff * (args.gated ? 3 : 2);
  }

  static PlanRequest request(const MoeFfnArgs& args, int threads, const Kernels& kernels) {
    // A hidden task ends at a panel's group and fills whole tiles.
    int64_t up = kernels.group;
    while (up % kernels.tile_rows != 0) up += kernels.group;
    return {args.tokens,         args.top_k, args.num_experts, args.d_model, args.d_ff,        args.expert_index,
            args.slot_of_expert, threads,    max_block_tokens, up,           kernels.tile_rows};
  }

  void lay_out() {
    const int64_t tokens = plan_.largest_block;
    layout_.x = kernels_.panel_form(args_.x_dtype, args_.w_dtype, args_.d_model);
    layout_.h = kernels_.panel_form(DType::f32, args_.w_dtype, args_.d_ff);
    layout_.sums_stride = rows_at_once;
    layout_.x_panel = round_up(tokens * layout_.x.padded_width, cache_line);
    layout_.h_panel = round_up(tokens * layout_.h.padded_width, cache_line);
    layout_.sums = tokens * layout_.sums_stride;
    layout_.unfolded = is_grouped(args_.w_dtype) ? kernels_.unfolded_floats : 0;
    layout_.worker = layout_.x_panel + layout_.h_panel + 2 * layout_.sums + layout_.unfolded;
    layout_.split_panel = layout_.h_panel;
  }

  struct Buffers {
    float *x, *h, *sums, *up_sums, *unfolded;
    int64_t packed_block;  // whose tokens are in x; -1: none
  };

  void work(int64_t worker) {
    float* const memory = memory_ + worker * layout_.worker;
    Buffers buffers{memory, memory + layout_.x_panel, memory + layout_.x_panel + layout_.h_panel, nullptr, nullptr, -1};
    buffers.up_sums = buffers.sums + layout_.sums;
    buffers.unfolded = buffers.up_sums + layout_.sums;
    const int64_t tasks = static_cast<int64_t>(plan_.tasks.size());
    for (;;) {
      const int64_t i = next_task_.fetch_add(1, std::memory_order_relaxed);
      if (i >= tasks) return;
      const Task& task = plan_.tasks[i];
      if (task.phase == Phase::whole) {
        up(task.block, 0, args_.d_ff, buffers.h, buffers);
        down(task.block, 0, args_.d_model, buffers.h, buffers);
      } else {
        run_split(task, buffers);
      }
    }
  }

  void run_split(const Task& task, Buffers& buffers) {
    const int64_t blocks = static_cast<int64_t>(plan_.blocks.size());
    const int64_t split = task.block - (blocks - plan_.split_blocks);
    float* const h = split_panels_ + split % DispatchPlan::split_buffers * layout_.split_panel;
    Progress& progress = progress_[split];
    if (task.phase == Phase::up) {
      if (split >= DispatchPlan::split_buffers) wait_for(progress_[split - DispatchPlan::split_buffers].down_left);
      up(task.block, task.row_begin, task.row_end, h, buffers);
      progress.up_left.fetch_sub(1, std::memory_order_release);
    } else {
      wait_for(progress.up_left);
      down(task.block, task.row_begin, task.row_end, h, buffers);
      progress.down_left.fetch_sub(1, std::memory_order_release);
    }
  }

  static const char* row(const ExpertMatrix& matrix, DType dtype, int32_t slot, int64_t row) {
    return static_cast<const char*>(matrix.data) +
           (slot * matrix.slot_stride + row * matrix.row_stride) * element_bytes(dtype);
  }

  static const float* scale(const ExpertMatrix& matrix, int32_t slot, int64_t row) {
    return matrix.scale == nullptr ? nullptr : matrix.scale + slot * matrix.scale_slot_stride + row;
  }

  static const float* bias(const ExpertMatrix& matrix, int32_t slot, int64_t row) {
    return matrix.bias == nullptr ? nullptr : matrix.bias + slot * matrix.bias_slot_stride + row;
  }

  Panel hidden_panel(const TokenBlock& block, float* h) const {
    return {h, block.tokens, args_.d_ff, layout_.h.padded_width, layout_.h.terms};
  }

  // sums = `rows` rows of a matrix from `first` on times the panel; `after` rows more will be wanted next.
  void project(const ExpertMatrix& matrix, int32_t slot, int64_t first, int64_t rows, int64_t after, const Panel& panel,
               float* sums, const Buffers& buffers) const {
    Project project{args_.w_dtype,
                    row(matrix, args_.w_dtype, slot, first),
                    matrix.row_stride * element_bytes(args_.w_dtype),
                    rows,
                    after,
                    panel,
                    sums,
                    layout_.sums_stride};
    if (is_grouped(args_.w_dtype)) {
      const int64_t bytes = group_scale_bytes(args_.w_dtype);
      project.unfolded = buffers.unfolded;
      project.scale_row_bytes = matrix.group_scale_row_stride * bytes;
      project.group_scales = static_cast<const char*>(matrix.group_scale) +
                             slot * matrix.group_scale_slot_stride * bytes + first * project.scale_row_bytes;
    }
    kernels_.project(project);
  }

  // Rows [begin, end) of the block's hidden layer.
  void up(int64_t index, int64_t begin, int64_t end, float* h, Buffers& buffers) {
    const TokenBlock& block = plan_.blocks[index];
    const Panel x{buffers.x, block.tokens, args_.d_model, layout_.x.padded_width, layout_.x.terms};
    if (buffers.packed_block != index) {
      kernels_.pack({args_.x_dtype, args_.w_dtype, args_.x, args_.x_row_stride, plan_.entries.data() + block.first,
                     args_.top_k, x});
      buffers.packed_block = index;
    }
    for (int64_t first = begin; first < end; first += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, end - first);
      project(args_.wi, block.slot, first, rows, end - first - rows, x, buffers.sums, buffers);
      if (args_.gated) {
        project(args_.wi, block.slot, args_.d_ff + first, rows, end - first - rows, x, buffers.up_sums, buffers);
      }
      kernels_.activate(
          {args_.activation, args_.w_dtype, buffers.sums, args_.gated ? buffers.up_sums : nullptr, layout_.sums_stride,
           scale(args_.wi, block.slot, first), args_.gated ? scale(args_.wi, block.slot, args_.d_ff + first) : nullptr,
           bias(args_.wi, block.slot, first), args_.gated ? bias(args_.wi, block.slot, args_.d_ff + first) : nullptr,
           first, rows, hidden_panel(block, h)});
    }
  }

  // Rows [begin, end) of the block's output, gated and scattered.
  void down(int64_t index, int64_t begin, int64_t end, float* h, Buffers& buffers) {
    const TokenBlock& block = plan_.blocks[index];
    const DType out_dtype = args_.top_k == 1 ? args_.x_dtype : DType::f32;
    char* const out = args_.top_k == 1 ? static_cast<char*>(args_.out) : reinterpret_cast<char*>(args_.partials);
    for (int64_t first = begin; first < end; first += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, end - first);
      project(args_.wo, block.slot, first, rows, end - first - rows, hidden_panel(block, h), buffers.sums, buffers);
      for (int64_t t = 0; t < block.tokens; ++t) {
        const int64_t entry = plan_.entries[block.first + t];
        kernels_.finish(buffers.sums + t * layout_.sums_stride, rows, scale(args_.wo, block.slot, first),
                        bias(args_.wo, block.slot, first), args_.gate[entry], out_dtype,
                        out + (entry * args_.d_model + first) * element_bytes(out_dtype));
      }
    }
  }

  const MoeFfnArgs& args_;
  const Kernels& kernels_;
  const int threads_;
  const DispatchPlan plan_;
  ScopedScratch scratch_;
  Layout layout_{};
  float* memory_ = nullptr;
  float* split_panels_ = nullptr;
  std::unique_ptr<Progress[]> progress_;
  alignas(cache_line) std::atomic<int64_t> next_task_{0};
};

}  // namespace

void moe_ffn_with(const Kernels& kernels, const MoeFfnArgs& args, const ParallelFor& parallel) {
  if ((args.top_k == 1) != (args.partials == nullptr)) {
    fail(ErrorKind::invalid, "moe_ffn: partials is ", args.partials == nullptr ? "null" : "given", " with top_k ",
         args.top_k, "; it is given if and only if top_k is above 1");
  }
  if (args.activation == Activation::swiglu_oai && !args.gated) {
    fail(ErrorKind::invalid, "moe_ffn: activation swiglu_oai combines two halves, expected gated weights");
  }
  if (args.tokens == 0 || args.d_model == 0 || args.d_ff == 0) return;
  Call(kernels, args, parallel.threads).run(parallel);
}

void moe_ffn(const MoeFfnArgs& args, const ParallelFor& parallel) {
  moe_ffn_with(kernels(), args, parallel);
}

void moe_ffn_combine_with(const Kernels& kernels, const MoeFfnArgs& args, const ParallelFor& parallel) {
  if (args.top_k < 2) {
    fail(ErrorKind::invalid, "moe_ffn_combine: top_k is ", args.top_k, "; there are partials to combine only above 1");
  }
  struct Context {
    const MoeFfnArgs& args;
    const Kernels& kernels;
    int64_t chunk;
  };
  constexpr int64_t floats_at_once = 64 * 1024;  // below it, starting a thread costs more than it gives
  const int64_t per_token = std::max<int64_t>(args.top_k * args.d_model, 1);
  Context context{args, kernels, std::max<int64_t>(floats_at_once / per_token, 1)};
  const int64_t chunks = (args.tokens + context.chunk - 1) / context.chunk;
  const auto combine = [](void* of, int64_t index) {
    const auto& [args, kernels, chunk] = *static_cast<const Context*>(of);
    const int64_t end = std::min((index + 1) * chunk, args.tokens);
    for (int64_t t = index * chunk; t < end; ++t) {
      kernels.combine(args.partials + t * args.top_k * args.d_model, args.top_k, args.d_model, args.x_dtype,
                      static_cast<char*>(args.out) + t * args.d_model * element_bytes(args.x_dtype));
    }
  };
  if (chunks == 1) return combine(&context, 0);
  parallel.run(chunks, combine, &context);
}

void moe_ffn_combine(const MoeFfnArgs& args, const ParallelFor& parallel) {
  moe_ffn_combine_with(kernels(), args, parallel);
}

}  // namespace sida::cpu
