#include "serving_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "base/error.h"
#include "cpp/check.h"
#include "harness/half.h"
#include "harness/harness.h"
#include "layer_case.h"
#include "serving/moe_layer.h"

namespace sida::cuda_test {
namespace {

using cuda::CudaServing;

constexpr cuda::Architecture architecture{80, 108, 99 * 1024};

template <class Value>
Value* upload(const std::vector<Value>& values) {
  auto* const device = static_cast<Value*>(harness::global_allocate(values.size() * sizeof(Value)));
  harness::global_fill(device, values.data(), values.size() * sizeof(Value));
  return device;
}

// The layer's arguments over slots that begin at `base`.
MoeFfnArgs layer_args(const Model& model, int layer, const void* base, int slots, const void* x, void* out) {
  const ExpertFormat& f = model.format;
  const auto* const first = static_cast<const std::byte*>(base);
  const auto matrix = [&](int64_t offset, int64_t columns, int64_t scale_offset, int64_t bias_offset) {
    const int64_t element = element_bytes(f.dtype);
    ExpertMatrix made{first + offset, f.record_bytes() / element, row_bytes(f.dtype, columns) / element, nullptr, 0};
    if (f.dtype == DType::i8) {
      made.scale = reinterpret_cast<const float*>(first + scale_offset);
      made.scale_slot_stride = f.record_bytes() / 4;
    } else if (is_grouped(f.dtype)) {
      made.group_scale = first + scale_offset;
      made.group_scale_slot_stride = f.record_bytes() / group_scale_bytes(f.dtype);
      made.group_scale_row_stride = groups_of(columns);
    }
    if (f.biased) {
      made.bias = reinterpret_cast<const float*>(first + bias_offset);
      made.bias_slot_stride = f.record_bytes() / 4;
    }
    return made;
  };
  MoeFfnArgs args{};
  args.tokens = model.tokens;
  args.top_k = 1;
  args.d_model = f.d_model;
  args.d_ff = f.d_ff;
  args.num_experts = model.experts;
  args.num_slots = slots;
  args.x_dtype = DType::bf16;
  args.w_dtype = f.dtype;
  args.x = x;
  args.x_row_stride = f.d_model;
  args.expert_index = upload(model.expert_index[static_cast<size_t>(layer)]);
  args.gate = upload(model.gate[static_cast<size_t>(layer)]);
  args.wi = matrix(f.wi_offset(), f.d_model, f.wi_scale_offset(), f.wi_bias_offset());
  args.wo = matrix(f.wo_offset(), f.d_ff, f.wo_scale_offset(), f.wo_bias_offset());
  args.activation = Activation::gelu;
  args.out = out;
  return args;
}

void* workspace_for(const MoeFfnArgs& args) {
  return harness::global_allocate(static_cast<size_t>(cuda::workspace_bytes(args, architecture)));
}

// The file: gives a record to the pool, and tells the recording.
class ModelSource final : public RecordSource {
 public:
  ModelSource(Recording& recording, const Model& model) : recording_(recording), model_(model) {}
  void read(int64_t record, void* into) override {
    const auto& bytes = model_.records[static_cast<size_t>(record)];
    std::memcpy(into, bytes.data(), bytes.size());
    recording_.host_fill(into, bytes.data(), bytes.size());
  }

 private:
  Recording& recording_;
  const Model& model_;
};

}  // namespace

Model::Model(uint64_t seed, DType dtype) {
  format.dtype = dtype;
  if (dtype == DType::i8) format.d_ff = 80;
  format.biased = is_grouped(dtype);
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  for (int i = 0; i < layers * experts; ++i) {
    std::vector<unsigned char> record(static_cast<size_t>(format.record_bytes()));
    const auto fill = [&](int64_t offset, int64_t elements) {
      for (int64_t e = 0; e < elements; ++e) {
        if (element_bytes(dtype) == 1) {
          record[static_cast<size_t>(offset + e)] = static_cast<unsigned char>(random());
        } else {
          reinterpret_cast<uint16_t*>(record.data() + offset)[e] = harness::float_to_bf16(normal(random) / 8);
        }
      }
    };
    fill(format.wi_offset(), format.wi_bytes() / element_bytes(dtype));
    fill(format.wo_offset(), format.wo_bytes() / element_bytes(dtype));
    if (is_grouped(dtype)) {
      // Powers of two from 2^-7 on, in mxfp4's bytes or float16's bits.
      const auto fill_factors = [&](int64_t offset, int64_t bytes) {
        for (int64_t g = 0; g < bytes / group_scale_bytes(dtype); ++g) {
          const auto step = static_cast<int>(random() % 3);
          if (dtype == DType::mxfp4) {
            record[static_cast<size_t>(offset + g)] = static_cast<unsigned char>(120 + step);
          } else {
            reinterpret_cast<uint16_t*>(record.data() + offset)[g] = static_cast<uint16_t>((8 + step) << 10);
          }
        }
      };
      fill_factors(format.wi_scale_offset(), format.wi_scale_bytes());
      fill_factors(format.wo_scale_offset(), format.wo_scale_bytes());
      auto* const biases = record.data();
      for (int64_t r = 0; r < format.wi_rows(); ++r) {
        reinterpret_cast<float*>(biases + format.wi_bias_offset())[r] = normal(random) / 4;
      }
      for (int64_t r = 0; r < format.d_model; ++r) {
        reinterpret_cast<float*>(biases + format.wo_bias_offset())[r] = normal(random) / 4;
      }
    }
    if (dtype == DType::i8) {
      for (int64_t r = 0; r < format.wi_rows(); ++r) {
        reinterpret_cast<float*>(record.data() + format.wi_scale_offset())[r] = 0.001f * static_cast<float>(1 + r % 3);
      }
      for (int64_t r = 0; r < format.d_model; ++r) {
        reinterpret_cast<float*>(record.data() + format.wo_scale_offset())[r] = 0.001f * static_cast<float>(1 + r % 5);
      }
    }
    records.push_back(std::move(record));
  }
  for (int layer = 0; layer < layers; ++layer) {
    expert_index.emplace_back();
    gate.emplace_back();
    for (int64_t t = 0; t < tokens; ++t) {
      expert_index.back().push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(experts)));
      gate.back().push_back(0.5f + static_cast<float>(random() % 100) / 100);
    }
  }
  for (int64_t i = 0; i < tokens * format.d_model; ++i) x.push_back(harness::float_to_bf16(normal(random)));
}

std::vector<unsigned char> reference(const Model& model) {
  harness::global_reset();
  const void* x = upload(model.x);
  for (int layer = 0; layer < model.layers; ++layer) {
    std::vector<unsigned char> slots;
    std::vector<int32_t> slot_of_expert;
    for (int expert = 0; expert < model.experts; ++expert) {
      const auto& record = model.records[static_cast<size_t>(layer * model.experts + expert)];
      slots.insert(slots.end(), record.begin(), record.end());
      slot_of_expert.push_back(expert);
    }
    void* const out = upload(std::vector<unsigned char>(model.row_bytes()));
    MoeFfnArgs args = layer_args(model, layer, upload(slots), model.experts, x, out);
    args.slot_of_expert = upload(slot_of_expert);
    cuda::moe_ffn(args, architecture, workspace_for(args), nullptr, nullptr);
    x = out;
  }
  const auto* const bytes = static_cast<const unsigned char*>(x);
  return {bytes, bytes + model.row_bytes()};
}

void check_layer(const Model& model, int layer, const uint16_t* x, const uint16_t* found) {
  const ExpertFormat& f = model.format;
  std::vector<unsigned char> slots;
  std::vector<int32_t> slot_of_expert;
  for (int expert = 0; expert < model.experts; ++expert) {
    const auto& record = model.records[static_cast<size_t>(layer * model.experts + expert)];
    slots.insert(slots.end(), record.begin(), record.end());
    slot_of_expert.push_back(expert);
  }
  MoeFfnArgs args = layer_args(model, layer, slots.data(), model.experts, x, nullptr);
  args.expert_index = model.expert_index[static_cast<size_t>(layer)].data();
  args.gate = model.gate[static_cast<size_t>(layer)].data();
  args.slot_of_expert = slot_of_expert.data();
  std::vector<uint16_t> expected(static_cast<size_t>(model.tokens * f.d_model));
  args.out = expected.data();
  cpu::moe_ffn(args, {1, [](int64_t count, void (*task)(void*, int64_t), void* context) {
                        for (int64_t i = 0; i < count; ++i) task(context, i);
                      }});
  const auto weight = [&](const std::vector<unsigned char>& record, int64_t offset, int64_t scale, int64_t row,
                          int64_t columns, int64_t column) {
    const int64_t at = row * columns + column;
    if (f.dtype == DType::i8) {
      return static_cast<double>(reinterpret_cast<const int8_t*>(record.data() + offset)[at]) *
             reinterpret_cast<const float*>(record.data() + scale)[row];
    }
    if (is_grouped(f.dtype)) {
      const int64_t group = row * groups_of(columns) + column / group_columns;
      const int code =
          record[static_cast<size_t>(offset + row * row_bytes(f.dtype, columns) + column / 2)] >> (column % 2 * 4) & 15;
      const double factor =
          f.dtype == DType::mxfp4
              ? std::ldexp(1, record[static_cast<size_t>(scale + group)] - 127)
              : harness::f16_to_float(reinterpret_cast<const uint16_t*>(record.data() + scale)[group]);
      return of_code(code, f.dtype) * factor;
    }
    return static_cast<double>(harness::bf16_to_float(reinterpret_cast<const uint16_t*>(record.data() + offset)[at]));
  };
  for (int64_t t = 0; t < model.tokens; ++t) {
    const auto expert = model.expert_index[static_cast<size_t>(layer)][static_cast<size_t>(t)];
    const auto& record = model.records[static_cast<size_t>(layer * model.experts + expert)];
    std::vector<double> hidden(static_cast<size_t>(f.d_ff),
                               0);  // sizes of the terms, before the activation shrinks them
    for (int64_t h = 0; h < f.d_ff; ++h) {
      double sum = f.biased ? reinterpret_cast<const float*>(record.data() + f.wi_bias_offset())[h] : 0;
      for (int64_t i = 0; i < f.d_model; ++i) {
        sum += weight(record, f.wi_offset(), f.wi_scale_offset(), h, f.d_model, i) *
               harness::bf16_to_float(x[t * f.d_model + i]);
      }
      hidden[static_cast<size_t>(h)] = std::abs(sum);
    }
    for (int64_t o = 0; o < f.d_model; ++o) {
      double terms = 0;
      for (int64_t h = 0; h < f.d_ff; ++h) {
        terms +=
            std::abs(weight(record, f.wo_offset(), f.wo_scale_offset(), o, f.d_ff, h)) * hidden[static_cast<size_t>(h)];
      }
      const double gate = model.gate[static_cast<size_t>(layer)][static_cast<size_t>(t)];
      const double on_cpu = harness::bf16_to_float(expected[static_cast<size_t>(t * f.d_model + o)]);
      const double on_gpu = harness::bf16_to_float(found[t * f.d_model + o]);
      if (!(std::abs(on_gpu - on_cpu) <= std::ldexp(gate * terms, -8) + std::ldexp(std::abs(on_cpu), -7))) {
        test::report(__FILE__, __LINE__,
                     "layer " + std::to_string(layer) + ", token " + std::to_string(t) + ": " + std::to_string(on_gpu) +
                         ", on the CPU " + std::to_string(on_cpu));
        return;
      }
    }
  }
}

Forward::Forward(Recording& recording, const Model& model, const Setting& setting)
    : recording_(recording),
      model_(model),
      setting_(setting),
      random_(setting.seed),
      store_(model.layers, model.experts, model.format),
      source_(std::make_shared<ModelSource>(recording, model)) {
  for (int i = 0; i < setting.streams; ++i) streams_.push_back(recording.user_stream());
  x_ = upload(model.x);
  for (int layer = 0; layer < model.layers; ++layer) {
    chosen_.push_back(upload(model.expert_index[static_cast<size_t>(layer)]));
    gates_.push_back(upload(model.gate[static_cast<size_t>(layer)]));
  }
}

Served Forward::run() {
  Served served;
  cuda::ServingOptions options{};
  options.slots = setting_.slots;
  options.host_slots = setting_.host_slots;
  options.lanes = setting_.lanes;
  options.host_lanes = setting_.host_lanes;
  options.eviction = setting_.eviction;
  options.wait_deadline = setting_.wait_deadline;
  options.most_staging = setting_.most_staging;
  CudaServing serving(recording_.table(), store_.open(), source_, options);
  size_t calls = 0, synchronised = 0, buffers = 0;
  const auto made = [&] { return recording_.calls("host_alloc") + recording_.calls("event_create"); };
  for (int pass = 0; pass < setting_.passes; ++pass) {
    if (pass == 1) {
      calls = recording_.all_calls();
      synchronised = recording_.calls("event_synchronize");
      buffers = made();
      serving.engine().reset_stats();
      waves_ = 0;
    }
    const BatchId batch = setting_.announced ? serving.announce(prediction()) : 0;
    served.outs.emplace_back();
    const cuda::Stream stream = streams_[static_cast<size_t>(pass) % streams_.size()];
    const unsigned char* input = reinterpret_cast<const unsigned char*>(x_);
    for (int layer = 0; layer < model_.layers; ++layer) {
      if (setting_.resized) serving.engine().set_budget(1 + static_cast<int64_t>(random_() % 5));
      input = layer_forward(serving, layer, input, stream, batch);
      served.outs.back().push_back(input);
    }
    if (batch != 0) serving.retire(batch);
  }
  served.calls = recording_.all_calls() - calls;
  served.buffers = made() - buffers;
  served.synchronisations = recording_.calls("event_synchronize") - synchronised;
  for (const LayerCounters& layer : serving.engine().stats().layers) {
    served.loads += static_cast<size_t>(layer.loads);
    served.layers += static_cast<size_t>(layer.requested);
  }
  served.waves = waves_;
  CHECK(serving.pinned_bytes() <= model_.layers * model_.experts * model_.format.record_bytes() + (2 << 20));
  serving.close();
  recording_.finish();
  return served;
}

AnnouncedBatch Forward::prediction() {
  AnnouncedBatch batch;
  for (int layer = 0; layer < model_.layers; ++layer) {
    std::set<int32_t> experts;
    for (const int32_t expert : model_.expert_index[static_cast<size_t>(layer)]) {
      experts.insert(random_() % 4 == 0 ? static_cast<int32_t>(random_() % static_cast<uint64_t>(model_.experts))
                                        : expert);
    }
    batch.layers.push_back({layer, {experts.begin(), experts.end()}});
  }
  return batch;
}

const unsigned char* Forward::layer_forward(CudaServing& serving, int layer, const unsigned char* input,
                                            cuda::Stream stream, BatchId batch) {
  const size_t row_bytes = model_.row_bytes(), index_bytes = static_cast<size_t>(model_.tokens) * 4;
  const size_t table_bytes = static_cast<size_t>(model_.experts) * 4;
  auto* const out = static_cast<unsigned char*>(harness::global_allocate(row_bytes));
  auto* const index = static_cast<int32_t*>(harness::global_allocate(index_bytes));
  cuda::LayerForward forward{};
  forward.layer = layer;
  forward.batch = batch;
  forward.stream = stream;
  forward.slot_table = static_cast<int32_t*>(harness::global_allocate(table_bytes));
  MoeFfnArgs& args = forward.args;
  args.tokens = model_.tokens;
  args.top_k = 1;
  args.d_model = model_.format.d_model;
  args.num_experts = model_.experts;
  args.x_dtype = DType::bf16;
  args.x = input;
  args.x_row_stride = model_.format.d_model;
  args.expert_index = index;
  args.gate = gates_[static_cast<size_t>(layer)];
  args.activation = Activation::gelu;
  args.out = out;
  // The router stands for itself: what it chooses appears on the device when the input is there.
  recording_.kernel(
      stream, {{input, row_bytes}}, {{index, index_bytes}},
      [=, from = chosen_[static_cast<size_t>(layer)]] { harness::global_fill(index, from, index_bytes); });
  recording_.kernel(stream, {}, {{out, row_bytes}}, [=] {
    const std::vector<unsigned char> zeros(row_bytes);
    harness::global_fill(out, zeros.data(), row_bytes);
  });
  const std::vector<int32_t> fetched = serving.fetch_indices(index, model_.tokens, stream);
  const std::set<int32_t> distinct(fetched.begin(), fetched.end());
  const std::vector<int32_t> experts(distinct.begin(), distinct.end());
  forward.experts = experts;

  MoeFfnArgs sized = args;
  set_slots(sized, serving.engine());
  sized.slot_of_expert = forward.slot_table;
  const auto scratch_bytes = static_cast<size_t>(cuda::workspace_bytes(sized, architecture));
  void* const scratch = harness::global_allocate(scratch_bytes);
  serving.forward(forward, [&](const MoeFfnArgs& wave, cuda::Stream on) {
    ++waves_;
    std::vector<Range> reads{{input, row_bytes}, {index, index_bytes}, {wave.slot_of_expert, table_bytes}};
    for (int expert = 0; expert < model_.experts; ++expert) {
      const int32_t slot = wave.slot_of_expert[expert];
      const auto bytes = static_cast<size_t>(model_.format.record_bytes());
      if (slot >= 0)
        reads.push_back({static_cast<const char*>(wave.wi.data) + slot * static_cast<int64_t>(bytes), bytes});
    }
    recording_.kernel(on, reads, {{out, row_bytes}, {scratch, scratch_bytes}},
                      [=] { cuda::moe_ffn(wave, architecture, scratch, nullptr, static_cast<cudaStream_t>(on)); });
  });
  return out;
}

Memory harness_memory() {
  return {[](size_t bytes) { return harness::global_allocate(bytes); }, [](void*) {},
          [](void* target, const void* source, size_t bytes) { harness::global_fill(target, source, bytes); }};
}

void prepare(Recording& recording) {
  recording.eager = true;
  recording.pinned_only = true;
}

bool same(const Served& served, const std::vector<unsigned char>& expected) {
  return std::all_of(served.outs.begin(), served.outs.end(),
                     [&](const auto& pass) { return std::memcmp(pass.back(), expected.data(), expected.size()) == 0; });
}

}  // namespace sida::cuda_test
