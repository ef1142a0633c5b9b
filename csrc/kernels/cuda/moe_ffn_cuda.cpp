// Lays out the scratch of a layer, chooses its kernels and launches them in order on the caller's stream.
#include "kernels/cuda/moe_ffn_cuda.h"

#include <algorithm>
#include <limits>

#include "base/rounding.h"
#include "kernels/cuda/kernels.h"

namespace sida::cuda {
namespace {

constexpr int64_t shared_without_asking = 48 * 1024;

LayerKernels kernels_of(const MoeFfnArgs& args, const Choice& choice) {
  if (choice.path == Path::f32) return f32_kernels(choice.block_t);
  const bool int8 = args.w_dtype == DType::i8;
  if (args.x_dtype == DType::bf16) return int8 ? bf16_int8_kernels(choice.block_t) : bf16_kernels(choice.block_t);
  return int8 ? f16_int8_kernels(choice.block_t) : f16_kernels(choice.block_t);
}

// Offsets of the parts of the scratch, each 256-byte aligned.
struct Layout {
  int64_t rows, tiles, output_tiles, hidden_row_stride, split_row_stride;
  int64_t ticket_count, arrival_count;
  int64_t tile_count, tile_list, row_of_position, counters, hidden, split_sums, bytes;

  Layout(const MoeFfnArgs& args, const Choice& choice, int block_w) {
    rows = args.tokens * args.top_k;
    tiles = max_tiles(rows, args.num_experts, choice.block_t);
    output_tiles = divide_up(args.d_model, block_w);
    hidden_row_stride = round_up(args.d_ff, 8);
    split_row_stride = round_up(args.d_model, 8);
    const int64_t hidden_element = choice.path == Path::f32 ? 4 : element_bytes(args.x_dtype);
    bytes = 0;
    tile_count = part(4);
    tile_list = part(tiles * static_cast<int64_t>(sizeof(TokenTile)));
    row_of_position = part(rows * 4);
    ticket_count = choice.splits > 1 ? tiles * output_tiles : 0;
    arrival_count = args.top_k > 1 ? args.tokens * output_tiles : 0;
    counters = part((ticket_count + arrival_count) * 4);
    hidden = part(rows * hidden_row_stride * hidden_element);
    split_sums = part(choice.splits > 1 ? choice.splits * rows * split_row_stride * 4 : 0);
  }

 private:
  int64_t part(int64_t size) {
    const int64_t offset = bytes;
    bytes += round_up(size, 256);
    return offset;
  }
};

void check_sizes(const MoeFfnArgs& args) {
  const int64_t largest = std::numeric_limits<int32_t>::max() / 2;
  if (args.tokens < 0 || args.top_k < 1 || args.d_model < 1 || args.d_ff < 1 || args.num_experts < 1 ||
      args.num_slots < 0 || args.tokens > largest / args.top_k || args.d_model > largest || args.d_ff > largest / 2) {
    fail(ErrorKind::invalid, "cuda::moe_ffn: tokens ", args.tokens, ", top_k ", args.top_k, ", d_model ", args.d_model,
         ", d_ff ", args.d_ff, ", experts ", args.num_experts, ", slots ", args.num_slots,
         ": expected positive sizes with at most ", largest, " (token, choice) rows; split the batch");
  }
  if (is_grouped(args.w_dtype)) {
    fail(ErrorKind::invalid, "cuda::moe_ffn: there are no CUDA kernels for ", dtype_name(args.w_dtype),
         " weights; expected float32, bfloat16, float16 or int8, or compute them on the CPU");
  }
  if (args.wi.bias != nullptr || args.wo.bias != nullptr || args.activation == Activation::swiglu_oai) {
    fail(ErrorKind::invalid, "cuda::moe_ffn: there are no CUDA kernels for biases and swiglu_oai; expected experts ",
         "without them, or compute them on the CPU");
  }
  if ((args.partials == nullptr) != (args.top_k == 1)) {
    fail(ErrorKind::invalid, "cuda::moe_ffn: partials is ", args.partials == nullptr ? "null" : "given", " with top_k ",
         args.top_k, ", expected it if and only if top_k is above 1");
  }
}

// Warps of a counting kernel: as many as have items and as shared memory has counters for.
int counting_warps(int64_t items, int64_t experts, int other_arrays, const char* op) {
  const int64_t room = shared_without_asking / 4 / experts - other_arrays;
  if (room < 1) {
    fail(ErrorKind::invalid, op, ": ", experts, " experts, expected at most ",
         shared_without_asking / 4 / (other_arrays + 1), ", what the counters in shared memory allow");
  }
  return static_cast<int>(std::clamp<int64_t>(divide_up(items, 32), 1, std::min<int64_t>(32, room)));
}

template <class Pointer>
Pointer at(void* workspace, int64_t offset) {
  return reinterpret_cast<Pointer>(static_cast<unsigned char*>(workspace) + offset);
}

bool row_vectors(const void* data, int64_t row_stride, DType dtype, int64_t rows) {
  const int64_t bytes = std::min<int64_t>(16, 8 * element_bytes(dtype));
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0 &&
         (rows <= 1 || row_stride * element_bytes(dtype) % bytes == 0);
}

bool matrix_vectors(const ExpertMatrix& matrix, DType dtype) {
  const int64_t bytes = std::min<int64_t>(16, 8 * element_bytes(dtype));
  return row_vectors(matrix.data, matrix.row_stride, dtype, 2) &&
         matrix.slot_stride * element_bytes(dtype) % bytes == 0;
}

}  // namespace

int64_t workspace_bytes(const MoeFfnArgs& args, const Architecture& architecture) {
  check_sizes(args);
  const Choice choice = choose(args, architecture);
  return Layout(args, choice, kernels_of(args, choice).block_w).bytes;
}

void moe_ffn(const MoeFfnArgs& args, const Architecture& architecture, void* workspace, int32_t* error_rows,
             cudaStream_t stream) {
  check_sizes(args);
  if (args.tokens == 0) return;
  const Choice choice = choose(args, architecture);
  const LayerKernels kernels = kernels_of(args, choice);
  if (kernels.shared_bytes > architecture.shared_per_block) {
    fail(ErrorKind::invalid, "cuda::moe_ffn: ", kernels.name, " needs ", kernels.shared_bytes,
         " bytes of shared memory, the device allows ", architecture.shared_per_block,
         " a block; expected compute capability 8.0 or later");
  }
  const Layout layout(args, choice, kernels.block_w);
  const int64_t hidden_tiles = divide_up(args.d_ff, args.gated ? kernels.block_w / 2 : kernels.block_w);
  const int64_t hidden_blocks = layout.tiles * hidden_tiles;
  const int64_t output_blocks = layout.tiles * layout.output_tiles * choice.splits;
  const int64_t most = std::max({hidden_blocks, output_blocks, layout.ticket_count + layout.arrival_count});
  if (most > std::numeric_limits<int32_t>::max()) {
    fail(ErrorKind::invalid, "cuda::moe_ffn: ", most, " blocks or counters in one launch, expected at most ",
         std::numeric_limits<int32_t>::max(), "; split the batch");
  }
  const Plan plan{at<int32_t*>(workspace, layout.tile_count), at<TokenTile*>(workspace, layout.tile_list),
                  at<int32_t*>(workspace, layout.row_of_position)};

  PlanParams plan_params{};
  plan_params.routing = {args.expert_index, args.slot_of_expert, static_cast<int32_t>(args.num_experts),
                         static_cast<int32_t>(args.num_slots)};
  plan_params.rows = static_cast<int32_t>(layout.rows);
  plan_params.block_t = choice.block_t;
  plan_params.warps = counting_warps(layout.rows, args.num_experts, 3, "cuda::moe_ffn");
  plan_params.plan = plan;
  plan_params.counters = at<int32_t*>(workspace, layout.counters);
  plan_params.counter_count = static_cast<int32_t>(layout.ticket_count + layout.arrival_count);
  plan_params.error_rows = error_rows;
  launch("dispatch_plan", dispatch_plan_kernel,
         {1, plan_params.warps * 32, (plan_params.warps + 3) * args.num_experts * 4}, plan_params, stream);

  LayerParams params{};
  params.top_k = static_cast<int32_t>(args.top_k);
  params.d_model = static_cast<int32_t>(args.d_model);
  params.d_ff = static_cast<int32_t>(args.d_ff);
  params.gated = args.gated;
  params.activation = args.activation;
  params.x_dtype = args.x_dtype;
  params.w_dtype = args.w_dtype;
  params.vector_x = row_vectors(args.x, args.x_row_stride, args.x_dtype, args.tokens);
  params.vector_wi = matrix_vectors(args.wi, args.w_dtype);
  params.vector_wo = matrix_vectors(args.wo, args.w_dtype);
  params.vector_out = row_vectors(args.out, args.d_model, args.x_dtype, args.tokens);
  params.vector_partials = row_vectors(args.partials, args.d_model, DType::f32, layout.rows);
  params.routing = plan_params.routing;
  params.x = args.x;
  params.x_row_stride = args.x_row_stride;
  params.gate = args.gate;
  params.wi = args.wi;
  params.wo = args.wo;
  params.plan = plan;
  params.hidden = at<void*>(workspace, layout.hidden);
  params.hidden_row_stride = layout.hidden_row_stride;
  params.splits = choice.splits;
  params.split_sums = choice.splits > 1 ? at<float*>(workspace, layout.split_sums) : nullptr;
  params.split_row_stride = layout.split_row_stride;
  params.positions = layout.rows;
  params.tickets = plan_params.counters;
  params.arrivals = args.top_k > 1 ? plan_params.counters + layout.ticket_count : nullptr;
  params.out = args.out;
  params.partials = args.partials;
  launch(kernels.name, kernels.hidden, {hidden_blocks, kernels.threads, kernels.shared_bytes}, params, stream);
  launch(kernels.name, kernels.output, {output_blocks, kernels.threads, kernels.shared_bytes}, params, stream);
}

void route_top1(const RouteArgs& args, cudaStream_t stream) {
  const int64_t largest = std::numeric_limits<int32_t>::max() / 2;
  if (args.sequences < 0 || args.length < 0 || args.experts < 1 || args.capacity < 0 || args.length > largest ||
      args.sequences > largest) {
    fail(ErrorKind::invalid, "cuda::route_top1: ", args.sequences, " sequences of ", args.length, " tokens over ",
         args.experts, " experts with capacity ", args.capacity, ": expected at least one expert, nothing negative, ",
         "and at most ", largest, " of each");
  }
  if (args.sequences == 0 || args.length == 0) return;
  RouteParams params{};
  params.logits = args.logits;
  params.dtype = args.dtype;
  params.rounded = args.rounded;
  params.length = static_cast<int32_t>(args.length);
  params.experts = static_cast<int32_t>(args.experts);
  params.capacity = static_cast<int32_t>(std::min(args.capacity, args.length));
  params.warps = counting_warps(args.length * 32, args.experts, 0, "cuda::route_top1");
  params.expert_index = args.expert_index;
  params.gate = args.gate;
  launch("route_top1", route_top1_kernel, {args.sequences, params.warps * 32, params.warps * args.experts * 4}, params,
         stream);
}

}  // namespace sida::cuda
