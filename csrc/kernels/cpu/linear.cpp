// Packs the tokens into panels and has every thread take rows of the matrix until none are left.
#include "kernels/linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/scratch.h"

namespace sida::cpu {
namespace {

// Tokens of a panel, as moe_ffn's blocks; of all panels that are held at once, while the matrix passes by once.
constexpr int64_t panel_tokens = 32, most_tokens = 512;
constexpr int64_t rows_at_once = 192, tasks_per_thread = 8;
// Multiply-adds below which waking other threads costs more than they save.
constexpr int64_t serial_work = 1 << 17;

class Call {
 public:
  Call(const Kernels& kernels, const LinearArgs& args)
      : kernels_(kernels), args_(args), form_(kernels.panel_form(args.x_dtype, args.w_dtype, args.columns)) {}

  void run(const ParallelFor& parallel) {
    const bool serial = args_.tokens * args_.rows * args_.columns <= serial_work;
    const int64_t threads = serial ? 1 : std::max(parallel.threads, 1);
    // A multiple of whole tiles' rows, so that few rows are left to narrower tiles.
    const int64_t wanted = (args_.rows + threads * tasks_per_thread - 1) / (threads * tasks_per_thread);
    task_rows_ = std::min(round_up(wanted, kernels_.tile_rows), round_up(rows_at_once, kernels_.tile_rows));
    const int64_t tasks = (args_.rows + task_rows_ - 1) / task_rows_;
    const int64_t workers = std::min(threads, tasks);
    const int64_t held = std::min(args_.tokens, most_tokens);
    panel_floats_ = round_up(std::min(held, panel_tokens) * form_.padded_width, cache_line / 4);
    sums_floats_ = round_up(std::min(held, panel_tokens) * task_rows_, cache_line / 4);
    worker_floats_ = sums_floats_ + (is_grouped(args_.w_dtype) ? kernels_.unfolded_floats : 0);
    const int64_t panels = (held + panel_tokens - 1) / panel_tokens;
    memory_ = scratch_.floats(workers * worker_floats_ + panels * panel_floats_);
    panels_ = memory_ + workers * worker_floats_;
    entries_.resize(held);
    for (begin_ = 0; begin_ < args_.tokens; begin_ += most_tokens) {
      tokens_ = std::min(most_tokens, args_.tokens - begin_);
      for (int64_t t = 0; t < tokens_; ++t) entries_[t] = begin_ + t;
      const int64_t blocks = (tokens_ + panel_tokens - 1) / panel_tokens;
      next_task_.store(0, std::memory_order_relaxed);
      tasks_ = tasks;
      const auto pack = [](void* call, int64_t block) { static_cast<Call*>(call)->pack(block); };
      const auto work = [](void* call, int64_t worker) { static_cast<Call*>(call)->work(worker); };
      if (workers == 1 || blocks == 1) {
        for (int64_t block = 0; block < blocks; ++block) pack(this, block);
      } else {
        parallel.run(blocks, pack, this);
      }
      if (workers == 1) {
        work(this, 0);
      } else {
        parallel.run(workers, work, this);
      }
    }
  }

 private:
  int64_t tokens_of(int64_t block) const { return std::min(panel_tokens, tokens_ - block * panel_tokens); }

  Panel panel(int64_t block) const {
    return {panels_ + block * panel_floats_, tokens_of(block), args_.columns, form_.padded_width, form_.terms};
  }

  void pack(int64_t block) {
    kernels_.pack({args_.x_dtype, args_.w_dtype, args_.x, args_.x_row_stride, entries_.data() + block * panel_tokens, 1,
                   panel(block)});
  }

  void work(int64_t worker) {
    float* const sums = memory_ + worker * worker_floats_;
    for (;;) {
      const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      const int64_t first = task * task_rows_, rows = std::min(task_rows_, args_.rows - first);
      for (int64_t block = 0; block * panel_tokens < tokens_; ++block) multiply(block, first, rows, sums);
    }
  }

  void multiply(int64_t block, int64_t first, int64_t rows, float* sums) {
    const ExpertMatrix& w = args_.w;
    const int64_t row_bytes = w.row_stride * element_bytes(args_.w_dtype);
    Project project{
        args_.w_dtype, static_cast<const char*>(w.data) + first * row_bytes, row_bytes, rows, 0, panel(block), sums,
        task_rows_};
    if (is_grouped(args_.w_dtype)) {
      project.scale_row_bytes = w.group_scale_row_stride * group_scale_bytes(args_.w_dtype);
      project.group_scales = static_cast<const char*>(w.group_scale) + first * project.scale_row_bytes;
      project.unfolded = sums + sums_floats_;
    }
    kernels_.project(project);
    const float* const scale = w.scale == nullptr ? nullptr : w.scale + first;
    const float* const bias = w.bias == nullptr ? nullptr : w.bias + first;
    for (int64_t t = 0; t < tokens_of(block); ++t) {
      const int64_t token = begin_ + block * panel_tokens + t;
      kernels_.finish(sums + t * task_rows_, rows, scale, bias, 1.0f, args_.x_dtype,
                      static_cast<char*>(args_.out) + (token * args_.rows + first) * element_bytes(args_.x_dtype));
    }
  }

  const Kernels& kernels_;
  const LinearArgs& args_;
  const PanelForm form_;
  ScopedScratch scratch_;
  std::vector<int64_t> entries_;
  int64_t task_rows_ = 0, tasks_ = 0, begin_ = 0, tokens_ = 0;
  int64_t panel_floats_ = 0, sums_floats_ = 0, worker_floats_ = 0;
  float* memory_ = nullptr;
  float* panels_ = nullptr;
  alignas(cache_line) std::atomic<int64_t> next_task_{0};
};

}  // namespace

void linear_with(const Kernels& kernels, const LinearArgs& args, const ParallelFor& parallel) {
  if (args.tokens == 0 || args.rows == 0) return;
  Call(kernels, args).run(parallel);
}

void linear(const LinearArgs& args, const ParallelFor& parallel) {
  linear_with(kernels(), args, parallel);
}

}  // namespace sida::cpu
