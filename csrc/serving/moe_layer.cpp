#include "serving/moe_layer.h"

#include <cstddef>

namespace sida {

void set_slots(MoeFfnArgs& args, const TransferEngine& engine) {
  const ExpertFormat& format = engine.format();
  const auto* const base = static_cast<const std::byte*>(engine.slot_base());
  args.d_ff = format.d_ff;
  args.num_slots = engine.capacity();
  args.w_dtype = format.dtype;
  args.gated = format.gated;
  const auto matrix = [&](int64_t offset, int64_t stride, int64_t scale_offset, int64_t groups, int64_t bias_offset) {
    ExpertMatrix made{base + offset, format.record_bytes() / element_bytes(format.dtype), stride, nullptr, 0};
    if (format.dtype == DType::i8) {
      made.scale = reinterpret_cast<const float*>(base + scale_offset);
      made.scale_slot_stride = format.record_bytes() / 4;
    } else if (is_grouped(format.dtype)) {
      made.group_scale = base + scale_offset;
      made.group_scale_slot_stride = format.record_bytes() / group_scale_bytes(format.dtype);
      made.group_scale_row_stride = groups;
    }
    if (format.biased) {
      made.bias = reinterpret_cast<const float*>(base + bias_offset);
      made.bias_slot_stride = format.record_bytes() / 4;
    }
    return made;
  };
  const int64_t element = element_bytes(format.dtype);
  args.wi = matrix(format.wi_offset(), format.wi_row_bytes() / element, format.wi_scale_offset(),
                   groups_of(format.d_model), format.wi_bias_offset());
  args.wo = matrix(format.wo_offset(), format.wo_row_bytes() / element, format.wo_scale_offset(),
                   groups_of(format.d_ff), format.wo_bias_offset());
}

std::vector<int32_t> distinct_experts(std::span<const int32_t> expert_index, int64_t num_experts) {
  std::vector<int32_t> experts;
  std::vector<bool> seen(static_cast<size_t>(num_experts), false);
  for (const int32_t expert : expert_index) {
    if (expert < 0 || seen[static_cast<size_t>(expert)]) continue;
    seen[static_cast<size_t>(expert)] = true;
    experts.push_back(expert);
  }
  return experts;
}

std::vector<int64_t> choices_of(std::span<const int32_t> experts, std::span<const int32_t> expert_index,
                                int64_t num_experts) {
  std::vector<int64_t> of_all(static_cast<size_t>(num_experts), 0);
  for (const int32_t expert : expert_index) {
    if (expert >= 0) ++of_all[static_cast<size_t>(expert)];
  }
  std::vector<int64_t> choices;
  for (const int32_t expert : experts) choices.push_back(of_all[static_cast<size_t>(expert)]);
  return choices;
}

}  // namespace sida
