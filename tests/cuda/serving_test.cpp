// A small model of several MoE layers whose experts do not fit: records go from "disk" through a pool of pinned buffers
// into a few GPU slots, and the real kernels read the slots, all recorded and executed in many legal orders. The result
// must be, bit for bit, that of the same kernels with every expert in a slot of its own.
#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "base/error.h"
#include "cpp/check.h"
#include "device/cuda_slots.h"
#include "experts/expert.h"
#include "harness/half.h"
#include "harness/harness.h"
#include "kernels/cuda/moe_ffn_cuda.h"
#include "recording_runtime.h"

namespace sida::cuda_test {
namespace {

using cuda::CudaSlots;
using cuda::SlotPlant;

constexpr cuda::Architecture architecture{80, 108, 99 * 1024};

struct Model {
  ExpertFormat format{64, 72, DType::bf16, false};
  int layers = 3, experts = 5;
  int64_t tokens = 11;
  std::vector<std::vector<unsigned char>> records;  // [layers * experts]: the file
  std::vector<std::vector<int32_t>> expert_index;   // [layers][tokens]
  std::vector<std::vector<float>> gate;
  std::vector<uint16_t> x;

  explicit Model(uint64_t seed, DType dtype) {
    format.dtype = dtype;
    if (dtype == DType::i8) format.d_ff = 80;
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (int i = 0; i < layers * experts; ++i) {
      std::vector<unsigned char> record(static_cast<size_t>(format.record_bytes()));
      const auto fill = [&](int64_t offset, int64_t elements) {
        for (int64_t e = 0; e < elements; ++e) {
          if (dtype == DType::i8) {
            record[static_cast<size_t>(offset + e)] = static_cast<unsigned char>(random());
          } else {
            reinterpret_cast<uint16_t*>(record.data() + offset)[e] = harness::float_to_bf16(normal(random) / 8);
          }
        }
      };
      fill(format.wi_offset(), format.wi_rows() * format.d_model);
      fill(format.wo_offset(), format.d_model * format.d_ff);
      if (dtype == DType::i8) {
        for (int64_t r = 0; r < format.wi_rows(); ++r) {
          reinterpret_cast<float*>(record.data() + format.wi_scale_offset())[r] =
              0.001f * static_cast<float>(1 + r % 3);
        }
        for (int64_t r = 0; r < format.d_model; ++r) {
          reinterpret_cast<float*>(record.data() + format.wo_scale_offset())[r] =
              0.001f * static_cast<float>(1 + r % 5);
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

  size_t row_bytes() const { return static_cast<size_t>(tokens * format.d_model) * 2; }
};

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
  const auto scale = [&](int64_t offset) {
    return f.dtype == DType::i8 ? reinterpret_cast<const float*>(first + offset) : nullptr;
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
  const int64_t stride = f.record_bytes() / element_bytes(f.dtype);
  args.wi = {first + f.wi_offset(), stride, f.d_model, scale(f.wi_scale_offset()), f.record_bytes() / 4};
  args.wo = {first + f.wo_offset(), stride, f.d_ff, scale(f.wo_scale_offset()), f.record_bytes() / 4};
  args.activation = Activation::gelu;
  args.out = out;
  return args;
}

void* workspace_for(const MoeFfnArgs& args) {
  return harness::global_allocate(static_cast<size_t>(cuda::workspace_bytes(args, architecture)));
}

// Every expert resident, layer after layer, at once.
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

// The pool of pinned buffers: a record is read from disk into a buffer that no copy reads any more.
class PinnedPool {
 public:
  PinnedPool(Recording& recording, size_t buffers, size_t bytes)
      : recording_(recording), buffers_(buffers, std::vector<unsigned char>(bytes)) {
    for (size_t i = 0; i < buffers; ++i) free_.push_back(i);
  }

  // Waits, as an engine would, by asking until the oldest copy is done.
  const void* read(CudaSlots& slots, const std::vector<unsigned char>& record, int32_t slot) {
    while (free_.empty()) {
      for (auto lease = leases_.begin(); lease != leases_.end();) {
        const bool done = slots.source_free(lease->slot);
        if (done) free_.push_back(lease->buffer);
        lease = done ? leases_.erase(lease) : lease + 1;
      }
    }
    const size_t buffer = free_.front();
    free_.pop_front();
    // A slot answers for its newest copy, which is behind all its older ones.
    leases_.push_back({buffer, slot});
    recording_.host_read(buffers_[buffer].data(), record.data(), record.size());
    return buffers_[buffer].data();
  }

 private:
  struct Lease {
    size_t buffer;
    int32_t slot;
  };
  Recording& recording_;
  std::vector<std::vector<unsigned char>> buffers_;
  std::deque<size_t> free_;
  std::vector<Lease> leases_;
};

// Records the model's forward with `slots` expert slots; returns where the result will be.
const unsigned char* serve(Recording& recording, const Model& model, int slots, int lanes, int pinned_buffers) {
  const auto record_bytes = static_cast<size_t>(model.format.record_bytes());
  CudaSlots memory(recording.table(), 0, slots, model.format.record_bytes(), lanes);
  static std::vector<std::unique_ptr<PinnedPool>> pools;  // replays read the buffers after this function
  pools.push_back(std::make_unique<PinnedPool>(recording, static_cast<size_t>(pinned_buffers), record_bytes));
  PinnedPool& pool = *pools.back();
  const cuda::Stream stream = recording.user_stream();

  const auto* const x = upload(model.x);
  const void* input = x;
  std::vector<int> resident(static_cast<size_t>(slots), -1);  // layer * experts + expert
  int32_t next_slot = 0;
  int copies = 0;
  const unsigned char* result = nullptr;
  for (int layer = 0; layer < model.layers; ++layer) {
    std::vector<int> wanted = model.expert_index[static_cast<size_t>(layer)];
    std::sort(wanted.begin(), wanted.end());
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
    void* const out = harness::global_allocate(model.row_bytes());
    MoeFfnArgs args = layer_args(model, layer, memory.slot(0), slots, input, out);
    const auto scratch_bytes = static_cast<size_t>(cuda::workspace_bytes(args, architecture));
    void* const scratch = workspace_for(args);
    recording.kernel(stream, {}, {{out, model.row_bytes()}}, [=, bytes = model.row_bytes()] {
      const std::vector<unsigned char> zeros(bytes);
      harness::global_fill(out, zeros.data(), bytes);
    });
    for (size_t begin = 0; begin < wanted.size(); begin += static_cast<size_t>(slots)) {
      const size_t end = std::min(wanted.size(), begin + static_cast<size_t>(slots));
      std::vector<int32_t> slot_of_expert(static_cast<size_t>(model.experts), -1), read;
      std::vector<Range> reads{{input, model.row_bytes()}};
      for (size_t i = begin; i < end; ++i) {
        const int id = layer * model.experts + wanted[i];
        const int32_t slot = next_slot++ % slots;
        if (resident[static_cast<size_t>(slot)] != id) {
          memory.fill(slot, copies++ % lanes, pool.read(memory, model.records[static_cast<size_t>(id)], slot),
                      record_bytes);
          resident[static_cast<size_t>(slot)] = id;
        }
        slot_of_expert[static_cast<size_t>(wanted[i])] = slot;
        read.push_back(slot);
        reads.push_back({memory.slot(slot), record_bytes});
      }
      args.slot_of_expert = upload(slot_of_expert);
      memory.before_read(stream, read);
      recording.kernel(stream, reads, {{out, model.row_bytes()}, {scratch, scratch_bytes}},
                       [=] { cuda::moe_ffn(args, architecture, scratch, nullptr, static_cast<cudaStream_t>(stream)); });
      memory.after_read(stream, read);
    }
    input = out;
    result = static_cast<const unsigned char*>(out);
  }
  memory.close();
  recording.finish();
  return result;
}

Memory harness_memory() {
  return {[](size_t bytes) { return harness::global_allocate(bytes); }, [](void*) {},
          [](void* target, const void* source, size_t bytes) { harness::global_fill(target, source, bytes); }};
}

SIDA_TEST(every_budget_gives_the_same_bits) {
  for (const DType dtype : {DType::bf16, DType::i8}) {
    const Model model(7, dtype);
    const std::vector<unsigned char> expected = reference(model);
    CHECK(std::count(expected.begin(), expected.end(), 0) < static_cast<long>(expected.size() / 8));
    for (const int slots : {1, 2, 3, 5}) {
      harness::global_reset();
      Recording recording(static_cast<uint64_t>(slots), harness_memory());
      const unsigned char* const out = serve(recording, model, slots, 2, 3);
      for (const std::string& problem : recording.problems()) test::report(__FILE__, __LINE__, problem);
      for (uint64_t order = 1; order <= 3; ++order) {
        recording.replay(order);
        CHECK(std::memcmp(out, expected.data(), expected.size()) == 0);
      }
      CHECK_EQ(recording.calls("event_synchronize") > 0, true);  // in close() alone
    }
  }
}

SIDA_TEST(missing_waits_are_seen_through_the_kernels) {
  const Model model(9, DType::bf16);
  const std::vector<unsigned char> expected = reference(model);
  for (const SlotPlant plant : {SlotPlant::no_copy_wait, SlotPlant::no_reader_wait, SlotPlant::filled_too_early}) {
    harness::global_reset();
    Recording recording(3, harness_memory());
    CudaSlots::planted = plant;
    const unsigned char* const out = serve(recording, model, 2, 2, 4);
    CudaSlots::planted = SlotPlant::none;
    CHECK(!recording.problems().empty());
    bool seen = false;
    for (uint64_t order = 1; order <= 6 && !seen; ++order) {
      try {
        recording.replay(order);
        seen = std::memcmp(out, expected.data(), expected.size()) != 0;
      } catch (const harness::KernelError&) {
        seen = true;  // the kernel met bytes that no copy had written yet
      }
    }
    CHECK(seen);
  }
}

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
