// Attention of many sequences in one call, each over its own span of keys, with the bits that it has alone.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/moe_ffn.h"

namespace sida {

// Elements from one index of a dimension to the next; the last dimension, of `dim` elements, is contiguous.
struct HeadStrides {
  int64_t sequence, head, token;
};

// The keys of one sequence.
struct KeySpan {
  int64_t slot;         // where its keys and values are
  int64_t first, last;  // [first, last) of them
  int64_t bias_column;  // of the first
};

struct AttentionArgs {
  int64_t sequences, heads, queries, dim;
  int64_t kv_heads, value_dim;  // query head h reads key head h / (heads / kv_heads)
  DType dtype;                  // of queries, keys, values, bias and result: f32, bf16 or f16
  const void* query;
  HeadStrides query_strides;
  const void* key;
  HeadStrides key_strides;
  const void* value;
  HeadStrides value_strides;
  const KeySpan* spans;  // [sequences]
  const void* bias;      // null: none
  HeadStrides bias_strides;
  float scale;
  // The last query sees all keys, each one before it one key less; those that would see none give 0.
  bool causal;
  void* out;  // [sequences, queries, heads, value_dim] contiguous
};

namespace cpu {

// softmax(scale * q . k + bias) . v in fp32, rounded once. Keys are taken in their order, so the bits of a query depend
// on itself and its own keys, values and bias alone.
void attention(const AttentionArgs& args, const ParallelFor& parallel);

}  // namespace cpu
}  // namespace sida
