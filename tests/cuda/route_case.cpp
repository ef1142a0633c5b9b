// Runs route_top1 in the harness and judges its choices, gates and capacity.
#include "route_case.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <sstream>

#include "harness/half.h"
#include "harness/harness.h"
#include "kernels/cuda/moe_ffn_cuda.h"

namespace sida::cuda_test {
namespace {

float rounded(float value, DType dtype) {
  if (dtype == DType::bf16) return harness::bf16_to_float(harness::float_to_bf16(value));
  if (dtype == DType::f16) return harness::f16_to_float(harness::float_to_f16(value));
  return value;
}

}  // namespace

Routed route(const RouteCase& shape, const std::vector<float>& logits, uint64_t schedule) {
  harness::global_reset();
  harness::seed(schedule);
  const auto tokens = static_cast<size_t>(shape.sequences * shape.length);
  const auto bytes = logits.size() * static_cast<size_t>(element_bytes(shape.dtype));
  std::vector<unsigned char> packed(bytes);
  for (size_t i = 0; i < logits.size(); ++i) {
    if (shape.dtype == DType::f32) {
      reinterpret_cast<float*>(packed.data())[i] = logits[i];
    } else {
      reinterpret_cast<uint16_t*>(packed.data())[i] =
          shape.dtype == DType::bf16 ? harness::float_to_bf16(logits[i]) : harness::float_to_f16(logits[i]);
    }
  }
  void* const device = harness::global_allocate(bytes);
  harness::global_fill(device, packed.data(), bytes);
  harness::global_read_only(device, bytes);
  auto* const index = static_cast<int32_t*>(harness::global_allocate(tokens * 4));
  auto* const gate = static_cast<float*>(harness::global_allocate(tokens * 4));
  cuda::route_top1(
      {shape.sequences, shape.length, shape.experts, shape.capacity, shape.dtype, shape.rounded, device, index, gate},
      nullptr);
  harness::finish();
  return {"", {index, index + tokens}, {gate, gate + tokens}};
}

Routed run(const RouteCase& shape, uint64_t schedule) {
  std::mt19937_64 random(shape.seed);
  std::vector<float> logits(static_cast<size_t>(shape.sequences * shape.length * shape.experts));
  for (float& logit : logits) logit = static_cast<float>(static_cast<int>(random() % 13) - 6) * 0.5f;
  Routed routed = route(shape, logits, schedule);
  for (int64_t s = 0; s < shape.sequences; ++s) {
    std::vector<int64_t> taken(static_cast<size_t>(shape.experts));
    for (int64_t t = 0; t < shape.length; ++t) {
      const auto token = static_cast<size_t>(s * shape.length + t);
      const float* const own = logits.data() + token * static_cast<size_t>(shape.experts);
      const float* const best = std::max_element(own, own + shape.experts);
      double sum = 0;
      for (int64_t e = 0; e < shape.experts; ++e) sum += std::exp(static_cast<double>(own[e]) - *best);
      const auto expert = static_cast<size_t>(best - own);
      const int expected = taken[expert]++ < shape.capacity ? static_cast<int>(expert) : -1;
      const float gate = rounded(static_cast<float>(1 / sum), shape.rounded);
      const float spacing = shape.rounded == DType::f32 ? 1e-6f : shape.rounded == DType::bf16 ? 0x1p-8f : 0x1p-11f;
      if (routed.expert_index[token] != expected || std::fabs(routed.gate[token] - gate) > 1.01f * spacing * gate) {
        std::ostringstream text;
        text << "sequence " << s << ", token " << t << ": expert " << routed.expert_index[token] << " with gate "
             << routed.gate[token] << ", expected " << expected << " with " << gate;
        routed.wrong = text.str();
        return routed;
      }
    }
  }
  return routed;
}

}  // namespace sida::cuda_test
