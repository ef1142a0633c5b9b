// Tunes moe_ffn without Python: time, rate and ratio to the floor for each number of tokens, weights and set.
//
//   bench_kernels [weights: f32,bf16,f16,i8] [tokens: 1,8,...] [d_model] [d_ff] [experts] [top_k] [zipf]
//
// The floor is max(bytes of the distinct experts / read bandwidth, multiply-adds / arithmetic peak), both measured
// here: bandwidth by reading more than any cache holds, the peak by this library's own densest case (one expert, its
// weights in the cache) unless SIDA_PEAK_GFLOPS names that of a GEMM library.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "kernels/moe_ffn.h"

using namespace sida;

namespace {

// Threads that wait between calls, as torch's do.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { serve(t); });
  }
  ~Pool() {
    stop_ = true;
    ++round_;
    for (std::thread& worker : workers_) worker.join();
  }
  void run(int64_t count, void (*body)(void*, int64_t), void* context) {
    body_ = body;
    context_ = context;
    count_ = count;
    left_ = static_cast<int>(workers_.size());
    ++round_;
    body(context, 0);
    while (left_ != 0) __builtin_ia32_pause();
  }

 private:
  void serve(int index) {
    for (uint64_t seen = 0;;) {
      while (round_ == seen) __builtin_ia32_pause();
      seen = round_;
      if (stop_) return;
      if (index < count_) body_(context_, index);
      --left_;
    }
  }
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int> left_{0};
  std::atomic<bool> stop_{false};
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

int thread_count = 2;
Pool* pool = nullptr;
ParallelFor parallel() {
  return {thread_count,
          [](int64_t count, void (*body)(void*, int64_t), void* context) { pool->run(count, body, context); }};
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

char* memory(int64_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) std::abort();
  madvise(at, bytes, MADV_HUGEPAGE);
  return static_cast<char*>(at);
}

// GB/s of all threads reading `bytes` from `data`.
double read_rate(const char* data, int64_t bytes) {
  struct Range {
    const char* data;
    int64_t bytes;
    std::atomic<uint64_t> sum;
  } range{data, bytes / thread_count, {0}};
  std::vector<double> times;
  for (int i = 0; i < 5; ++i) {
    const double start = seconds();
    pool->run(
        thread_count,
        [](void* of, int64_t t) {
          auto& r = *static_cast<Range*>(of);
          typedef uint64_t V __attribute__((vector_size(64)));
          V sum[4]{};
          const V* at = reinterpret_cast<const V*>(r.data + t * r.bytes);
          for (int64_t k = 0; k + 4 <= r.bytes / 64; k += 4) {
            for (int j = 0; j < 4; ++j) sum[j] += at[k + j];
          }
          r.sum += (sum[0] + sum[1] + sum[2] + sum[3])[0];
        },
        &range);
    times.push_back(seconds() - start);
  }
  return bytes / *std::min_element(times.begin(), times.end()) / 1e9;
}

struct Layer {
  DType dtype;
  int64_t d_model, d_ff, experts, top_k;
  char* weights;
  std::vector<float> scale;
  double zipf;
  std::mt19937_64 random{1};

  int64_t expert_bytes() const { return 2 * d_model * d_ff * element_bytes(dtype); }

  // Seconds, distinct experts.
  std::pair<double, int64_t> once(int64_t tokens, bool one_expert = false) {
    std::vector<float> x(tokens * d_model), out(tokens * d_model), gate(tokens * top_k, 0.5f), partials;
    if (top_k > 1) partials.resize(tokens * top_k * d_model);
    std::vector<int32_t> index(tokens * top_k), slots(experts);
    for (int64_t e = 0; e < experts; ++e) slots[e] = static_cast<int32_t>(e);
    for (float& v : x) v = static_cast<float>(random() % 2001) * 1e-3f - 1.0f;
    std::vector<double> odds(experts);
    for (int64_t e = 0; e < experts; ++e) odds[e] = 1.0 / std::pow(e + 1.0, zipf);
    std::discrete_distribution<int32_t> draw(odds.begin(), odds.end());
    for (int32_t& e : index) e = one_expert ? 0 : draw(random);
    std::vector<bool> seen(experts);
    int64_t distinct = 0;
    for (const int32_t e : index) {
      distinct += !seen[e];
      seen[e] = true;
    }
    const int64_t size = element_bytes(dtype), slot = expert_bytes() / size;
    const float* s = dtype == DType::i8 ? scale.data() : nullptr;
    const MoeFfnArgs args{tokens,
                          top_k,
                          d_model,
                          d_ff,
                          experts,
                          experts,
                          DType::f32,
                          dtype,
                          x.data(),
                          d_model,
                          index.data(),
                          gate.data(),
                          {weights, slot, d_model, s, d_ff},
                          {weights + d_model * d_ff * size, slot, d_ff, s, d_model},
                          slots.data(),
                          Activation::relu,
                          false,
                          out.data(),
                          top_k > 1 ? partials.data() : nullptr};
    const double start = seconds();
    cpu::moe_ffn(args, parallel());
    if (top_k > 1) cpu::moe_ffn_combine(args, parallel());
    return {seconds() - start, distinct};
  }
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, const char* otherwise) { return std::string(argc > i ? argv[i] : otherwise); };
  if (const char* wanted = std::getenv("SIDA_THREADS")) thread_count = std::atoi(wanted);
  Pool threads(thread_count);
  pool = &threads;
  Layer layer{DType::f32,
              std::stoll(argument(3, "768")),
              std::stoll(argument(4, "3072")),
              std::stoll(argument(5, "128")),
              std::stoll(argument(6, "1")),
              nullptr,
              {},
              std::stod(argument(7, "0"))};
  const int64_t bytes = layer.experts * 2 * layer.d_model * layer.d_ff * 4;
  layer.weights = memory(std::max<int64_t>(bytes, int64_t(1) << 30));
  layer.scale.assign(layer.experts * std::max(layer.d_model, layer.d_ff), 0.01f);
  std::memset(layer.weights, 0x3c, std::max<int64_t>(bytes, int64_t(1) << 30));  // a small normal in every dtype
  const double bandwidth = read_rate(layer.weights, int64_t(1) << 30);
  double peak = 0.0;
  if (const char* named = std::getenv("SIDA_PEAK_GFLOPS")) {
    peak = std::atof(named);
  } else {
    for (int i = 0; i < 5; ++i) {
      peak = std::max(peak, 4.0 * 256 * layer.top_k * layer.d_model * layer.d_ff / layer.once(256, true).first / 1e9);
    }
  }
  std::printf("%s, %d threads, %.1f GB/s, %.0f GFLOP/s\n", cpu::instruction_set(), thread_count, bandwidth, peak);
  std::printf("%6s %6s %8s %9s %8s %8s %7s %7s\n", "w", "T", "experts", "ms", "GB/s", "GFLOP/s", "x floor", "best");
  for (const std::string& name : split(argument(1, "f32,bf16,i8"))) {
    layer.dtype = name == "f32" ? DType::f32 : name == "bf16" ? DType::bf16 : name == "f16" ? DType::f16 : DType::i8;
    for (const std::string& count : split(argument(2, "1,8,32,64,256,1024,4096"))) {
      const int64_t tokens = std::stoll(count);
      std::vector<double> ratios, times, rates, flops;
      int64_t distinct = 0;
      const int repeats = tokens >= 1024 ? 5 : tokens >= 64 ? 9 : 31;
      for (int i = 0; i < repeats + 1; ++i) {
        const auto [time, experts] = layer.once(tokens);
        if (i == 0) continue;
        distinct = experts;
        const double work = 4.0 * tokens * layer.top_k * layer.d_model * layer.d_ff;
        const double read = static_cast<double>(experts * layer.expert_bytes());
        times.push_back(time);
        ratios.push_back(time / std::max(read / bandwidth / 1e9, work / peak / 1e9));
        rates.push_back(read / time / 1e9);
        flops.push_back(work / time / 1e9);
      }
      std::printf("%6s %6ld %8ld %9.3f %8.1f %8.1f %7.2f %7.2f\n", name.c_str(), static_cast<long>(tokens),
                  static_cast<long>(distinct), median(times) * 1e3, median(rates), median(flops), median(ratios),
                  *std::min_element(ratios.begin(), ratios.end()));
      std::fflush(stdout);
    }
  }
  return 0;
}
