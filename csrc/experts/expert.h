// What an expert is: its name, its matrices and where they lie inside its record.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/rounding.h"

namespace sida {

struct ExpertKey {
  int32_t layer;  // index among the MoE layers of the whole model, encoder first
  int32_t index;  // expert within the layer
  auto operator<=>(const ExpertKey&) const = default;
};

// A record is wi, wo, the scales of both (int8: fp32, one a row; int4: float16, mxfp4: bytes, one for each group of 32
// columns, row by row), and where experts have them the fp32 biases of both, each part aligned to `part_alignment`, the
// whole padded to `record_alignment` so that O_DIRECT can read it straight into a slot.
struct ExpertFormat {
  static constexpr int64_t part_alignment = 64;
  static constexpr int64_t record_alignment = 4096;
  // Of d_model and d_ff: the bytes of every part, and of a record, are then below 2^61 whatever the type.
  static constexpr int64_t largest_dimension = int64_t{1} << 28;
  static constexpr bool is_dimension(int64_t size) { return size >= 1 && size <= largest_dimension; }

  int64_t d_model, d_ff;
  DType dtype;
  bool gated;
  bool biased = false;

  int64_t wi_rows() const { return gated ? 2 * d_ff : d_ff; }
  int64_t wi_row_bytes() const { return row_bytes(dtype, d_model); }
  int64_t wo_row_bytes() const { return row_bytes(dtype, d_ff); }
  int64_t wi_bytes() const { return wi_rows() * wi_row_bytes(); }
  int64_t wo_bytes() const { return d_model * wo_row_bytes(); }
  int64_t wi_scale_bytes() const { return wi_rows() * row_scale_bytes(dtype, d_model); }
  int64_t wo_scale_bytes() const { return d_model * row_scale_bytes(dtype, d_ff); }
  int64_t wi_offset() const { return 0; }
  int64_t wo_offset() const { return round_up(wi_bytes(), part_alignment); }
  int64_t wi_scale_offset() const { return round_up(wo_offset() + wo_bytes(), part_alignment); }
  int64_t wo_scale_offset() const { return round_up(wi_scale_offset() + wi_scale_bytes(), part_alignment); }
  int64_t wi_bias_offset() const { return round_up(wo_scale_offset() + wo_scale_bytes(), part_alignment); }
  int64_t wo_bias_offset() const { return round_up(wi_bias_offset() + bias_bytes(wi_rows()), part_alignment); }
  int64_t used_bytes() const {
    return biased ? wo_bias_offset() + bias_bytes(d_model) : wo_scale_offset() + wo_scale_bytes();
  }
  int64_t record_bytes() const { return round_up(used_bytes(), record_alignment); }

  bool operator==(const ExpertFormat&) const = default;

 private:
  int64_t bias_bytes(int64_t rows) const { return biased ? rows * 4 : 0; }
};

}  // namespace sida
