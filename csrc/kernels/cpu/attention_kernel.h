// Attention for one `Simd`, made by including this after a simd_*.h; see kernels.h for what may stand here.
#pragma once

#include "kernels/attention.h"
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/simd_math.h"

namespace sida::cpu {

template <class S, DType dtype>
struct AttentionKernel {
  using F = typename S::F;
  static constexpr int64_t element = dtype == DType::f32 ? 4 : 2;
  // Vectors of a result that are summed in registers while the values pass by.
  static constexpr int held = 4;

  static const char* at(const void* base, const HeadStrides& strides, int64_t sequence, int64_t head, int64_t token) {
    return static_cast<const char*>(base) +
           (sequence * strides.sequence + head * strides.head + token * strides.token) * element;
  }

  static F load(const char* from) { return load_as_float<S>(dtype, from); }

  // The first `count` < lanes elements, and zeros.
  static F load_some(const char* from, int64_t count) {
    char all[S::lanes * 4] = {};
    __builtin_memcpy(all, from, count * element);
    return load(all);
  }

  static void store_some(char* to, F value, int64_t count) {
    if (count >= S::lanes) return store_rounded<S>(dtype, to, value);
    char all[S::lanes * 4];
    store_rounded<S>(dtype, all, value);
    __builtin_memcpy(to, all, count * element);
  }

  // Products of the query, fp32 and padded with zeros, with one key, not yet summed over the lanes.
  static F products(const float* query, const char* key, int64_t dim) {
    F sum{};
    int64_t d = 0;
    for (; d + S::lanes <= dim; d += S::lanes) {
      sum = S::fma(sida::cpu::load<S>(query + d), load(key + d * element), sum);
    }
    if (d < dim) sum = S::fma(sida::cpu::load<S>(query + d), load_some(key + d * element, dim - d), sum);
    return sum;
  }

  // scores[j] = scale * (query . key j) for all keys, minus infinity up to a multiple of the lanes.
  static void score(const AttentionArgs& args, const float* query, const char* keys, int64_t count, float* scores) {
    const int64_t step = args.key_strides.token * element;
    for (int64_t j = 0; j < count; j += 4) {
      Float4 sums[4];
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t key = j + i < count ? j + i : count - 1;
        sums[i] = S::fold(products(query, keys + key * step, args.dim));
      }
      const Float4 four = sum_each(sums[0], sums[1], sums[2], sums[3]) * args.scale;
      for (int64_t i = 0; i < 4 && j + i < count; ++i) scores[j + i] = four[i];
    }
    for (int64_t j = count; j % S::lanes != 0; ++j) scores[j] = -__builtin_inff();
  }

  // exp(scores - their maximum) in place; their sum.
  static float exponents(float* scores, int64_t count) {
    float highest = scores[0];
    for (int64_t j = 1; j < count; ++j) highest = scores[j] > highest || scores[j] != scores[j] ? scores[j] : highest;
    F sum{};
    for (int64_t j = 0; j < count; j += S::lanes) {
      const F power = Math<S>::exp(sida::cpu::load<S>(scores + j) - highest);
      store<S>(scores + j, power);
      if (j + S::lanes > count) {
        for (int64_t i = count; i < j + S::lanes; ++i) scores[i] = 0;
      }
      sum += sida::cpu::load<S>(scores + j);
    }
    const Float4 parts = S::fold(sum);
    return (parts[0] + parts[2]) + (parts[1] + parts[3]);
  }

  template <int vectors>
  static void weigh(const AttentionArgs& args, const float* weights, const char* values, int64_t count, int64_t begin,
                    float inverse, char* out) {
    const int64_t step = args.value_strides.token * element;
    F sums[vectors] = {};
    const bool whole = begin + vectors * S::lanes <= args.value_dim;
    for (int64_t j = 0; j < count; ++j) {
      const F weight = broadcast<S>(weights[j]);
      const char* value = values + j * step + begin * element;
      for (int i = 0; i < vectors; ++i) {
        const char* const from = value + i * S::lanes * element;
        const F part = whole || i + 1 < vectors ? load(from) : load_some(from, args.value_dim - begin - i * S::lanes);
        sums[i] = S::fma(weight, part, sums[i]);
      }
    }
    for (int i = 0; i < vectors; ++i) {
      const int64_t d = begin + i * S::lanes;
      store_some(out + d * element, sums[i] * inverse, args.value_dim - d);
    }
  }

  static void add_up(const AttentionArgs& args, const float* weights, const char* values, int64_t count, float inverse,
                     char* out) {
    for (int64_t d = 0; d < args.value_dim; d += held * S::lanes) {
      const int64_t left = (args.value_dim - d + S::lanes - 1) / S::lanes;
      switch (left < held ? left : held) {
        case 1:
          weigh<1>(args, weights, values, count, d, inverse, out);
          break;
        case 2:
          weigh<2>(args, weights, values, count, d, inverse, out);
          break;
        case 3:
          weigh<3>(args, weights, values, count, d, inverse, out);
          break;
        default:
          weigh<held>(args, weights, values, count, d, inverse, out);
      }
    }
  }

  static void attend(const AttentionArgs& args, int64_t sequence, int64_t head, float* memory) {
    const AttentionSpan& span = args.spans[sequence];
    const int64_t kv_head = head / (args.heads / args.kv_heads);
    const char* const keys = at(args.key, args.key_strides, span.slot, kv_head, span.first);
    const char* const values = at(args.value, args.value_strides, span.slot, kv_head, span.first);
    float* const query = memory;
    float* const scores = memory + (args.dim + S::lanes - 1) / S::lanes * S::lanes;
    for (int64_t m = span.first_query; m < span.last_query; ++m) {
      char* const out =
          static_cast<char*>(args.out) + ((span.row * args.queries + m) * args.heads + head) * args.value_dim * element;
      const int64_t count = span.last - span.first - (args.causal ? span.last_query - 1 - m : 0);
      if (count <= 0) {
        __builtin_memset(out, 0, args.value_dim * element);
        continue;
      }
      const char* const from = at(args.query, args.query_strides, span.row, head, m);
      int64_t d = 0;
      for (; d + S::lanes <= args.dim; d += S::lanes) store<S>(query + d, load(from + d * element));
      if (d < args.dim) store<S>(query + d, load_some(from + d * element, args.dim - d));
      score(args, query, keys, count, scores);
      if (args.bias != nullptr) {
        const char* const bias =
            at(args.bias, args.bias_strides, sequence, head, m - span.first_query) + span.bias_column * element;
        int64_t j = 0;
        for (; j + S::lanes <= count; j += S::lanes) {
          store<S>(scores + j, sida::cpu::load<S>(scores + j) + load(bias + j * element));
        }
        if (j < count) store<S>(scores + j, sida::cpu::load<S>(scores + j) + load_some(bias + j * element, count - j));
      }
      const float sum = exponents(scores, count);
      add_up(args, scores, values, count, 1.0f / sum, out);
    }
  }
};

template <class S>
struct AttentionTable {
  static constexpr AttentionKernels table{S::lanes, AttentionKernel<S, DType::f32>::attend,
                                          AttentionKernel<S, DType::bf16>::attend,
                                          AttentionKernel<S, DType::f16>::attend};
};

}  // namespace sida::cpu
