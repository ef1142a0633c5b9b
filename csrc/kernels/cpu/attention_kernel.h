// Attention for one `Simd`, made by including this after a simd_*.h; see kernels.h for what may stand here.
#pragma once

#include "kernels/attention.h"
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/rms_norm_kernel.h"
#include "kernels/cpu/simd_math.h"

namespace sida::cpu {

template <class S, DType dtype>
struct AttentionKernel {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int64_t element = dtype == DType::f32 ? 4 : 2;
  // Vectors of a result that are summed in registers while the values pass by.
  static constexpr int held = 4;
  // Queries of a prompt for which keys and values are loaded once: their sums fit to the registers.
  static constexpr int together = S::lanes == 8 ? 2 : 4;

  static constexpr int log2(int value) { return value <= 1 ? 0 : 1 + log2(value / 2); }

  static const char* at(const void* base, const HeadStrides& strides, int64_t sequence, int64_t head, int64_t token) {
    return static_cast<const char*>(base) +
           (sequence * strides.sequence + head * strides.head + token * strides.token) * element;
  }

  static F load(const char* from) { return load_as_float<S>(dtype, from); }

  // The first `count` < lanes elements, and zeros.
  static F load_some(const char* from, int64_t count) {
    alignas(64) char all[S::lanes * 4] = {};
    int64_t at = 0;
    unroll<log2(S::lanes)>([&](auto level) SIDA_INLINE {  // copies of known sizes instead of a call
      constexpr int64_t size = S::lanes >> (decltype(level)::value + 1);
      if ((count & size) != 0) __builtin_memcpy(all + at, from + at, size * element);
      at += (count & size) * element;
    });
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

  // scores[j] = scale * (query . key j) for all keys.
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
  }

  // The elements of a square of vectors change places: rows[i][j] and rows[j][i].
  static void transpose(F (&rows)[S::lanes]) {
    unroll<log2(S::lanes)>([&](auto level) SIDA_INLINE {
      constexpr int step = S::lanes >> (decltype(level)::value + 1);
      I low{}, high{};
      for (int i = 0; i < S::lanes; ++i) {
        low[i] = (i & step) != 0 ? S::lanes + i - step : i;
        high[i] = (i & step) != 0 ? S::lanes + i : i + step;
      }
      unroll<S::lanes>([&](auto index) SIDA_INLINE {
        constexpr int i = decltype(index)::value;
        if constexpr ((i & step) == 0) {
          const F a = rows[i], b = rows[i + step];
          rows[i] = __builtin_shuffle(a, b, low);
          rows[i + step] = __builtin_shuffle(a, b, high);
        }
      });
    });
  }

  // to [dim][columns] = the keys, fp32, dimensions and keys padded with zeros to multiples of the lanes.
  static void turn(const AttentionArgs& args, const char* keys, int64_t count, int64_t columns, float* to) {
    const int64_t step = args.key_strides.token * element;
    for (int64_t d = 0; d < args.dim; d += S::lanes) {
      for (int64_t j = 0; j < count; j += S::lanes) {
        F square[S::lanes] = {};
        const int64_t rows = count - j < S::lanes ? count - j : S::lanes;
        const char* from = keys + j * step + d * element;
        for (int64_t i = 0; i < rows; ++i, from += step) {
          square[i] = d + S::lanes <= args.dim ? load(from) : load_some(from, args.dim - d);
        }
        transpose(square);
        for (int64_t i = 0; i < S::lanes; ++i) store<S>(to + (d + i) * columns + j, square[i]);
      }
    }
  }

  template <int n>
  struct Many {
    F of[n];
  };

  // For n queries and a vector of turned keys: the products of dimensions `lane`, `lane + step`, ... as `products` and
  // `fold` add them.
  template <int n, int lane, int step>
  [[gnu::always_inline]] static Many<n> sums_of_lanes(const float* queries, int64_t padded, const float* keys,
                                                      int64_t columns) {
    if constexpr (step == S::lanes) {
      Many<n> sum{};
      for (int64_t d = lane; d < padded; d += S::lanes) {
        const F key = sida::cpu::load<S>(keys + d * columns);
        unroll<n>([&](auto q) SIDA_INLINE {
          sum.of[q.value] = S::fma(broadcast<S>(queries[q.value * padded + d]), key, sum.of[q.value]);
        });
      }
      return sum;
    } else {
      return plus(sums_of_lanes<n, lane, 2 * step>(queries, padded, keys, columns),
                  sums_of_lanes<n, lane + step, 2 * step>(queries, padded, keys, columns));
    }
  }

  template <int n>
  [[gnu::always_inline]] static Many<n> plus(Many<n> a, const Many<n>& b) {
    unroll<n>([&](auto q) SIDA_INLINE { a.of[q.value] += b.of[q.value]; });
    return a;
  }

  // What `score` gives, for n queries and turned keys, to the bit; nothing is said of keys from `count` on.
  template <int n>
  static void score_turned(const AttentionArgs& args, const float* queries, int64_t padded, const float* keys,
                           int64_t count, int64_t columns, float* scores) {
    for (int64_t j = 0; j < count; j += S::lanes, keys += S::lanes) {
      const auto even = plus(sums_of_lanes<n, 0, 4>(queries, padded, keys, columns),
                             sums_of_lanes<n, 2, 4>(queries, padded, keys, columns));
      const auto odd = plus(sums_of_lanes<n, 1, 4>(queries, padded, keys, columns),
                            sums_of_lanes<n, 3, 4>(queries, padded, keys, columns));
      const auto sums = plus(even, odd);  // as sum_each
      for (int q = 0; q < n; ++q) store<S>(scores + q * columns + j, sums.of[q] * args.scale);
    }
  }

  static void add_bias(const char* bias, int64_t count, float* scores) {
    int64_t j = 0;
    for (; j + S::lanes <= count; j += S::lanes) {
      store<S>(scores + j, sida::cpu::load<S>(scores + j) + load(bias + j * element));
    }
    if (j < count) store<S>(scores + j, sida::cpu::load<S>(scores + j) + load_some(bias + j * element, count - j));
  }

  // exp(scores - their maximum) in place for n queries, 0 from where a query's keys end; each one's sum. The n go side
  // by side, as each has to wait for its maximum. A NaN that the maximum passes over still makes the sum one.
  template <int n>
  static void exponents(float* scores, int64_t columns, int64_t count, int64_t more, float* sums) {
    I places;
    for (int i = 0; i < S::lanes; ++i) places[i] = i;
    const int64_t longest = count + (n - 1) * more;
    const auto own = [&](int64_t j, int64_t q, F value, float other) SIDA_INLINE {
      const int64_t left = count + q * more - j;
      return left >= S::lanes ? value : places < static_cast<int32_t>(left) ? value : broadcast<S>(other);
    };
    const auto larger = [](F a, F b) SIDA_INLINE { return b > a ? b : a; };
    F highest[n], sum[n] = {};
    for (F& each : highest) each = broadcast<S>(-__builtin_inff());
    for (int64_t j = 0; j < longest; j += S::lanes) {
      unroll<n>([&](auto index) SIDA_INLINE {
        constexpr int q = decltype(index)::value;
        const F all = sida::cpu::load<S>(scores + q * columns + j);
        highest[q] = larger(highest[q], own(j, q, all, -__builtin_inff()));
      });
    }
    unroll<log2(S::lanes)>([&](auto level) SIDA_INLINE {
      const I turned = (places + (1 << decltype(level)::value)) & (S::lanes - 1);
      for (F& each : highest) each = larger(each, __builtin_shuffle(each, turned));
    });
    for (int64_t j = 0; j < longest; j += S::lanes) {
      unroll<n>([&](auto index) SIDA_INLINE {
        constexpr int q = decltype(index)::value;
        float* const at = scores + q * columns + j;
        // 0 instead of what is no score: a power that is hardly more than 0 takes a processor long.
        const F power = own(j, q, Math<S>::exp(own(j, q, sida::cpu::load<S>(at) - highest[q], 0)), 0);
        store<S>(at, power);
        sum[q] += power;
      });
    }
    for (int q = 0; q < n; ++q) {
      const Float4 parts = S::fold(sum[q]);
      sums[q] = (parts[0] + parts[2]) + (parts[1] + parts[3]);
    }
  }

  // Of n queries one after the other: where their weights and results are, and how many keys the first one sees.
  struct Weights {
    const float* of;
    int64_t step;  // from one query's to the next one's
    const float* inverse;
    int64_t common;
    int64_t more;  // keys that each query sees beyond those of the one before it
    char* out;
    int64_t out_step;
  };

  template <int n, int vectors>
  static void weigh(const AttentionArgs& args, const Weights& weights, const char* values, int64_t begin) {
    const int64_t step = args.value_strides.token * element;
    F sums[n][vectors] = {};
    const bool whole = begin + vectors * S::lanes <= args.value_dim;
    const auto add = [&](int64_t j, auto first_query) SIDA_INLINE {
      constexpr int first = decltype(first_query)::value;
      const char* const value = values + j * step + begin * element;
      F parts[vectors];
      for (int i = 0; i < vectors; ++i) {
        const char* const from = value + i * S::lanes * element;
        parts[i] = whole || i + 1 < vectors ? load(from) : load_some(from, args.value_dim - begin - i * S::lanes);
      }
      unroll<n>([&](auto q) SIDA_INLINE {
        if constexpr (decltype(q)::value >= first) {
          const F weight = broadcast<S>(weights.of[q.value * weights.step + j]);
          for (int i = 0; i < vectors; ++i) sums[q.value][i] = S::fma(weight, parts[i], sums[q.value][i]);
        }
      });
    };
    int64_t j = 0;
    for (; j < weights.common; ++j) add(j, Index<0>());
    if (weights.more != 0) unroll<n - 1>([&](auto q) SIDA_INLINE { add(j++, Index<decltype(q)::value + 1>()); });
    for (int q = 0; q < n; ++q) {
      for (int i = 0; i < vectors; ++i) {
        const int64_t d = begin + i * S::lanes;
        store_some(weights.out + q * weights.out_step + d * element, sums[q][i] * weights.inverse[q],
                   args.value_dim - d);
      }
    }
  }

  template <int n>
  static void add_up(const AttentionArgs& args, const Weights& weights, const char* values) {
    for (int64_t d = 0; d < args.value_dim; d += held * S::lanes) {
      const int64_t left = (args.value_dim - d + S::lanes - 1) / S::lanes;
      switch (left < held ? left : held) {
        case 1:
          weigh<n, 1>(args, weights, values, d);
          break;
        case 2:
          weigh<n, 2>(args, weights, values, d);
          break;
        case 3:
          weigh<n, 3>(args, weights, values, d);
          break;
        default:
          weigh<n, held>(args, weights, values, d);
      }
    }
  }

  // One head of one sequence.
  struct Head {
    const AttentionArgs& args;
    const AttentionSpan& span;
    int64_t sequence, head;
    const char *keys, *values;
    int64_t padded, columns;  // dimensions and keys, rounded up to the lanes
    float *queries, *scores;  // [together][padded], [together][columns]
    const float* turned;      // [padded][columns], or null

    int64_t keys_of(int64_t m) const { return span.last - span.first - (args.causal ? span.last_query - 1 - m : 0); }

    // n queries from m on, each of which sees a key.
    template <int n>
    void attend(int64_t m) const {
      const int64_t common = keys_of(m), more = args.causal ? 1 : 0;
      for (int q = 0; q < n; ++q) {
        const char* const from = at(args.query, args.query_strides, span.row, head, m + q);
        float* const query = queries + q * padded;
        int64_t d = 0;
        for (; d + S::lanes <= args.dim; d += S::lanes) store<S>(query + d, load(from + d * element));
        if (d < args.dim) store<S>(query + d, load_some(from + d * element, args.dim - d));
      }
      if (turned != nullptr) {
        score_turned<n>(args, queries, padded, turned, common + (n - 1) * more, columns, scores);
      }
      for (int q = 0; q < n; ++q) {
        float* const own = scores + q * columns;
        const int64_t count = common + q * more;
        if (turned == nullptr) score(args, queries + q * padded, keys, count, own);
        if (args.bias != nullptr) {
          const char* const bias = at(args.bias, args.bias_strides, sequence, head, m + q - span.first_query);
          add_bias(bias + span.bias_column * element, count, own);
        }
      }
      float inverse[n];
      exponents<n>(scores, columns, common, more, inverse);
      for (float& each : inverse) each = 1.0f / each;
      const int64_t out_step = args.heads * args.value_dim * element;
      char* const out =
          static_cast<char*>(args.out) + (span.row * args.queries + m) * out_step + head * args.value_dim * element;
      add_up<n>(args, {scores, columns, inverse, common, more, out, out_step}, values);
    }
  };

  static void attend(const AttentionArgs& args, int64_t sequence, int64_t head, float* memory) {
    const AttentionSpan& span = args.spans[sequence];
    const int64_t kv_head = head / (args.heads / args.kv_heads), count = span.last - span.first;
    const char* const keys = at(args.key, args.key_strides, span.slot, kv_head, span.first);
    const char* const values = at(args.value, args.value_strides, span.slot, kv_head, span.first);
    const int64_t padded = (args.dim + S::lanes - 1) / S::lanes * S::lanes;
    const int64_t columns = (count + S::lanes - 1) / S::lanes * S::lanes;
    float* const turned = memory + together * (padded + columns);
    const bool turns = turns_keys(span, together);
    if (turns) turn(args, keys, count, columns, turned);
    const Head of{args,
                  span,
                  sequence,
                  head,
                  keys,
                  values,
                  padded,
                  columns,
                  memory,
                  memory + together * padded,
                  turns ? turned : nullptr};
    int64_t m = span.first_query;
    for (; m < span.last_query && of.keys_of(m) <= 0; ++m) {
      __builtin_memset(
          static_cast<char*>(args.out) + ((span.row * args.queries + m) * args.heads + head) * args.value_dim * element,
          0, args.value_dim * element);
    }
    for (; m + together <= span.last_query; m += together) of.template attend<together>(m);
    for (; m < span.last_query; ++m) of.template attend<1>(m);
  }
};

template <class S>
struct AttentionTable {
  static constexpr AttentionKernels table{S::lanes,
                                          AttentionKernel<S, DType::f32>::together,
                                          AttentionKernel<S, DType::f32>::attend,
                                          AttentionKernel<S, DType::bf16>::attend,
                                          AttentionKernel<S, DType::f16>::attend,
                                          RmsNormKernel<S, DType::f32>::rows,
                                          RmsNormKernel<S, DType::bf16>::rows,
                                          RmsNormKernel<S, DType::f16>::rows};
};

}  // namespace sida::cpu
