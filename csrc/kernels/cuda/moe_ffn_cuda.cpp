// Lays out the scratch of a layer, chooses its kernels and launches them in order on the caller's stream.
#include "kernels/cuda/moe_ffn_cuda.h"

#include <algorithm>
#include <limits>

#include "base/rounding.h"
#include "kernels/cuda/kernels.h"

namespace sida::cuda {
namespace {

constexpr int64_t shared_without_asking = 48 * 1024;

LayerKernels kernels_of(DType x_dtype, DType w_dtype, const Choice& choice) {
  if (choice.path == Path::f32) return f32_kernels(choice.block_t);
  const bool bf16 = x_dtype == DType::bf16;
  switch (w_dtype) {
    case DType::i8:
      return bf16 ? bf16_int8_kernels(choice.block_t) : f16_int8_kernels(choice.block_t);
    case DType::int4:
      return bf16 ? bf16_int4_kernels(choice.block_t) : f16_int4_kernels(choice.block_t);
    case DType::mxfp4:
      return bf16 ? bf16_mxfp4_kernels(choice.block_t) : f16_mxfp4_kernels(choice.block_t);
    default:
      return bf16 ? bf16_kernels(choice.block_t) : f16_kernels(choice.block_t);
  }
}

// The type of a layer's hidden values.
DType hidden_dtype(DType x_dtype, const Choice& choice) {
  return choice.path == Path::f32 ? DType::f32 : x_dtype;
}

// Offsets of the parts of the scratch, each 256-byte aligned.
struct Layout {
  int64_t rows, tiles, output_tiles, split_row_stride;
  int64_t hidden_row_stride = 0;
  int64_t ticket_count, arrival_count = 0;
  int64_t tile_count, tile_list, row_of_position, counters, hidden = 0, split_sums, bytes = 0;

  Layout(const MoeFfnArgs& args, const Choice& choice, int block_w)
      : Layout(args.tokens, args.top_k, args.num_experts, args.d_model, choice, block_w) {
    hidden_row_stride = round_up(args.d_ff, 8);
    hidden = part(rows * hidden_row_stride * element_bytes(hidden_dtype(args.x_dtype, choice)));
  }

  Layout(const LinearArgs& args, const Choice& choice, int block_w)
      : Layout(args.tokens, 1, 1, args.rows, choice, block_w) {}

 private:
  Layout(int64_t tokens, int64_t top_k, int64_t experts, int64_t columns, const Choice& choice, int block_w) {
    rows = tokens * top_k;
    tiles = max_tiles(rows, experts, choice.block_t);
    output_tiles = divide_up(columns, block_w);
    split_row_stride = round_up(columns, 8);
    tile_count = part(4);
    tile_list = part(tiles * static_cast<int64_t>(sizeof(TokenTile)));
    row_of_position = part(rows * 4);
    ticket_count = choice.splits > 1 ? tiles * output_tiles : 0;
    arrival_count = top_k > 1 ? tokens * output_tiles : 0;
    counters = part((ticket_count + arrival_count) * 4);
    split_sums = part(choice.splits > 1 ? choice.splits * rows * split_row_stride * 4 : 0);
  }

  int64_t part(int64_t size) {
    const int64_t offset = bytes;
    bytes += round_up(size, 256);
    return offset;
  }
};

constexpr int64_t largest = std::numeric_limits<int32_t>::max() / 2;

void check_sizes(const MoeFfnArgs& args) {
  if (args.tokens < 0 || args.top_k < 1 || args.d_model < 1 || args.d_ff < 1 || args.num_experts < 1 ||
      args.num_slots < 0 || args.tokens > largest / args.top_k || args.d_model > largest || args.d_ff > largest / 2) {
    fail(ErrorKind::invalid, "cuda::moe_ffn: tokens ", args.tokens, ", top_k ", args.top_k, ", d_model ", args.d_model,
         ", d_ff ", args.d_ff, ", experts ", args.num_experts, ", slots ", args.num_slots,
         ": expected positive sizes with at most ", largest, " (token, choice) rows; split the batch");
  }
  if (args.activation == Activation::swiglu_oai && !args.gated) {
    fail(ErrorKind::invalid,
         "cuda::moe_ffn: swiglu_oai with gated false, expected true: it is a function of two values");
  }
  if ((args.partials == nullptr) != (args.top_k == 1)) {
    fail(ErrorKind::invalid, "cuda::moe_ffn: partials is ", args.partials == nullptr ? "null" : "given", " with top_k ",
         args.top_k, ", expected it if and only if top_k is above 1");
  }
}

void check_sizes(const LinearArgs& args) {
  if (args.tokens < 0 || args.columns < 1 || args.rows < 0 || args.tokens > largest || args.columns > largest ||
      args.rows > largest) {
    fail(ErrorKind::invalid, "cuda::linear: tokens ", args.tokens, ", columns ", args.columns, ", rows ", args.rows,
         ": expected at least one column, nothing negative, and at most ", largest, " of each; split the batch");
  }
}

void check_shared(const char* op, const LayerKernels& kernels, const Architecture& architecture) {
  if (kernels.shared_bytes > architecture.shared_per_block) {
    fail(ErrorKind::invalid, op, ": ", kernels.name, " needs ", kernels.shared_bytes,
         " bytes of shared memory, the device allows ", architecture.shared_per_block,
         " a block; expected compute capability 8.0 or later");
  }
}

void check_blocks(const char* op, int64_t most) {
  if (most > std::numeric_limits<int32_t>::max()) {
    fail(ErrorKind::invalid, op, ": ", most, " blocks or counters in one launch, expected at most ",
         std::numeric_limits<int32_t>::max(), "; split the batch");
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

// Eight 4-bit weights are four bytes.
bool matrix_vectors(const ExpertMatrix& matrix, DType dtype) {
  const int64_t bytes = is_grouped(dtype) ? 4 : std::min<int64_t>(16, 8 * element_bytes(dtype));
  return reinterpret_cast<uintptr_t>(matrix.data) % static_cast<uintptr_t>(bytes) == 0 &&
         matrix.row_stride * element_bytes(dtype) % bytes == 0 &&
         matrix.slot_stride * element_bytes(dtype) % bytes == 0;
}

// The plan's part of a call: which row goes where, in which slot its expert lies.
PlanParams plan_of(const Routing& routing, const Layout& layout, const Choice& choice, void* workspace,
                   int32_t* error_rows, const char* op) {
  PlanParams params{};
  params.routing = routing;
  params.rows = static_cast<int32_t>(layout.rows);
  params.block_t = choice.block_t;
  params.warps = counting_warps(layout.rows, routing.num_experts, 3, op);
  params.plan = {at<int32_t*>(workspace, layout.tile_count), at<TokenTile*>(workspace, layout.tile_list),
                 at<int32_t*>(workspace, layout.row_of_position)};
  params.counters = at<int32_t*>(workspace, layout.counters);
  params.counter_count = static_cast<int32_t>(layout.ticket_count + layout.arrival_count);
  params.error_rows = error_rows;
  return params;
}

void launch_plan(const PlanParams& params, cudaStream_t stream) {
  launch("dispatch_plan", dispatch_plan_kernel,
         {1, params.warps * 32, (params.warps + 3) * params.routing.num_experts * 4}, params, stream);
}

// What the output phase is told of the plan, of the slices of its reduction and of `out`.
void set_output(LayerParams& params, const PlanParams& plan, const Layout& layout, const Choice& choice,
                void* workspace) {
  params.routing = plan.routing;
  params.plan = plan.plan;
  params.splits = choice.splits;
  params.split_sums = choice.splits > 1 ? at<float*>(workspace, layout.split_sums) : nullptr;
  params.split_row_stride = layout.split_row_stride;
  params.positions = layout.rows;
  params.tickets = plan.counters;
  params.arrivals = layout.arrival_count > 0 ? plan.counters + layout.ticket_count : nullptr;
}

}  // namespace

int64_t workspace_bytes(const MoeFfnArgs& args, const Architecture& architecture) {
  check_sizes(args);
  const Choice choice = choose(args, architecture);
  return Layout(args, choice, kernels_of(args.x_dtype, args.w_dtype, choice).block_w).bytes;
}

int64_t workspace_bytes(const LinearArgs& args, const Architecture& architecture) {
  check_sizes(args);
  const Choice choice = choose(args, architecture);
  return Layout(args, choice, kernels_of(args.x_dtype, args.w_dtype, choice).block_w).bytes;
}

void moe_ffn(const MoeFfnArgs& args, const Architecture& architecture, void* workspace, int32_t* error_rows,
             cudaStream_t stream) {
  constexpr const char* op = "cuda::moe_ffn";
  check_sizes(args);
  if (args.tokens == 0) return;
  const Choice choice = choose(args, architecture);
  const LayerKernels kernels = kernels_of(args.x_dtype, args.w_dtype, choice);
  check_shared(op, kernels, architecture);
  const Layout layout(args, choice, kernels.block_w);
  const int64_t hidden_tiles = divide_up(args.d_ff, args.gated ? kernels.block_w / 2 : kernels.block_w);
  const int64_t hidden_blocks = layout.tiles * hidden_tiles;
  const int64_t output_blocks = layout.tiles * layout.output_tiles * choice.splits;
  check_blocks(op, std::max({hidden_blocks, output_blocks, layout.ticket_count + layout.arrival_count}));
  const Routing routing{args.expert_index, args.slot_of_expert, static_cast<int32_t>(args.num_experts),
                        static_cast<int32_t>(args.num_slots)};
  const PlanParams plan = plan_of(routing, layout, choice, workspace, error_rows, op);
  launch_plan(plan, stream);

  LayerParams params{};
  params.top_k = static_cast<int32_t>(args.top_k);
  params.d_model = static_cast<int32_t>(args.d_model);
  params.d_ff = static_cast<int32_t>(args.d_ff);
  params.gated = args.gated;
  params.activation = args.activation;
  params.x_dtype = args.x_dtype;
  params.w_dtype = args.w_dtype;
  params.hidden_dtype = hidden_dtype(args.x_dtype, choice);
  params.vector_x = row_vectors(args.x, args.x_row_stride, args.x_dtype, args.tokens);
  params.vector_wi = matrix_vectors(args.wi, args.w_dtype);
  params.vector_wo = matrix_vectors(args.wo, args.w_dtype);
  params.vector_hidden = true;
  params.vector_out = row_vectors(args.out, args.d_model, args.x_dtype, args.tokens);
  params.vector_partials = row_vectors(args.partials, args.d_model, DType::f32, layout.rows);
  params.x = args.x;
  params.x_row_stride = args.x_row_stride;
  params.gate = args.gate;
  params.wi = args.wi;
  params.wo = args.wo;
  params.hidden = at<void*>(workspace, layout.hidden);
  params.hidden_values = params.hidden;
  params.hidden_row_stride = layout.hidden_row_stride;
  params.out = args.out;
  params.partials = args.partials;
  set_output(params, plan, layout, choice, workspace);
  launch(kernels.name, kernels.hidden, {hidden_blocks, kernels.threads, kernels.shared_bytes}, params, stream);
  launch(kernels.name, kernels.output, {output_blocks, kernels.threads, kernels.shared_bytes}, params, stream);
}

void linear(const LinearArgs& args, const Architecture& architecture, void* workspace, cudaStream_t stream) {
  constexpr const char* op = "cuda::linear";
  check_sizes(args);
  if (args.tokens == 0 || args.rows == 0) return;
  const Choice choice = choose(args, architecture);
  const LayerKernels kernels = kernels_of(args.x_dtype, args.w_dtype, choice);
  check_shared(op, kernels, architecture);
  const Layout layout(args, choice, kernels.block_w);
  const int64_t blocks = layout.tiles * layout.output_tiles * choice.splits;
  check_blocks(op, std::max(blocks, layout.ticket_count));
  const PlanParams plan = plan_of({nullptr, nullptr, 1, 1}, layout, choice, workspace, nullptr, op);
  launch_plan(plan, stream);

  LayerParams params{};
  params.top_k = 1;
  params.d_model = static_cast<int32_t>(args.rows);
  params.d_ff = static_cast<int32_t>(args.columns);
  params.x_dtype = args.x_dtype;
  params.w_dtype = args.w_dtype;
  params.hidden_dtype = args.x_dtype;
  params.vector_wo = matrix_vectors(args.w, args.w_dtype);
  params.vector_hidden = row_vectors(args.x, args.x_row_stride, args.x_dtype, args.tokens);
  params.vector_out = row_vectors(args.out, args.rows, args.x_dtype, args.tokens);
  params.wo = args.w;
  params.hidden_values = args.x;
  params.hidden_row_stride = args.x_row_stride;
  params.out = args.out;
  set_output(params, plan, layout, choice, workspace);
  launch(kernels.name, kernels.output, {blocks, kernels.threads, kernels.shared_bytes}, params, stream);
}

void route_top1(const RouteArgs& args, cudaStream_t stream) {
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
