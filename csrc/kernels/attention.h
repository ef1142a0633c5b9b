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

// One sequence: its keys and its queries.
struct AttentionSpan {
  int64_t slot;                     // where its keys and values are
  int64_t first, last;              // [first, last) of them
  int64_t bias_column;              // of the first
  int64_t row;                      // of `query` and `out`
  int64_t first_query, last_query;  // [first_query, last_query) in that row
};

struct AttentionArgs {
  int64_t sequences, heads, dim;
  int64_t queries;              // of a row of `query` and `out`
  int64_t kv_heads, value_dim;  // query head h reads key head h / (heads / kv_heads)
  DType dtype;                  // of queries, keys, values, bias and result: f32, bf16 or f16
  const void* query;
  HeadStrides query_strides;
  const void* key;
  HeadStrides key_strides;
  const void* value;
  HeadStrides value_strides;
  const AttentionSpan* spans;  // [sequences]; no two have a query in common
  const void* bias;            // null: none; else [sequences, heads, queries of the longest sequence, columns]
  HeadStrides bias_strides;
  float scale;
  // A sequence's last query sees all keys, each one before it one key less; those that would see none give 0.
  bool causal;
  void* out;  // [rows, queries, heads, value_dim] contiguous; untouched where no sequence has a query
};

namespace cpu {

// softmax(scale * q . k + bias) . v in fp32, rounded once. Keys are taken in their order, so the bits of a query depend
// on itself and its own keys, values and bias alone.
void attention(const AttentionArgs& args, const ParallelFor& parallel);

}  // namespace cpu
}  // namespace sida
