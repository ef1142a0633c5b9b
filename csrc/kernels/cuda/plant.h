// Switches for deliberately wrong code, with which the tests prove that the harness catches each kind of mistake.
//
// In every real build PLANTED(...) is the constant false and leaves nothing in the machine code. Only the harness,
// which compiles the kernels as host C++, defines SIDA_HARNESS and can switch one bug on at a time.
#pragma once

namespace sida::cuda {

enum class Plant : int {
  none = 0,
  gemm_no_barrier,            // the main loop does not wait for the other warps before it reuses a stage
  gemm_lax_wait,              // cp.async.wait_group leaves one group too many in flight
  gemm_swapped_fragment,      // two registers of the weight fragment exchanged
  gemm_no_swizzle,            // fragments are read where an unswizzled tile would have them
  gemm_no_depth_guard,        // the last slice of the reduction reads past the row's end
  gemm_no_row_guard,          // weight rows past the matrix are read
  gemm_no_token_guard,        // the tile's unused tokens are gathered too
  gemm_wrong_row_stride,      // rows taken to be contiguous when they are strided
  gemm_no_epilogue_barrier,   // sums are laid over the pipeline's stages while a warp still reads them
  gemm_uninitialised_table,   // the tile's last row offset is never written
  epilogue_no_column_guard,   // columns past d_ff or d_model are written
  epilogue_gate_by_position,  // the gate is looked up by sorted position instead of by row
  epilogue_scale_of_tile,     // int8 scales are looked up within the tile instead of within the matrix
  epilogue_misaligned_store,  // 16-byte stores begin one element late
  split_by_arrival,           // the last block adds its own partial sum first: the sum depends on timing
  split_no_barrier,           // the ticket is read before it is written
  split_no_fence,             // a slice's sums are announced before they are visible to other blocks
  split_short_slice,          // the last slice of d_ff is left out
  combine_no_fence,           // a row's arrival is announced before its values are visible to other blocks
  combine_early_arrival,      // a row's arrival is announced before the other threads of the block have stored theirs
  combine_no_barrier,         // who completes a token is read before it is written
  combine_by_arrival,         // the completing row's choice is added first: the sum depends on timing
  combine_counts_absent,      // choices without a resident expert are waited for
  combine_reads_counter,      // the counter is read again instead of the value that the atomic returned
  combine_always,             // every row adds its token's choices, complete or not
  plan_counters_not_cleared,  // tickets and arrivals keep what the scratch held
  plan_no_warp_barrier,       // two steps of a warp update the same counter without __syncwarp between
  plan_inclusive_scan,        // first positions are taken from an inclusive scan
  plan_zero_missing,          // rows without a resident expert become tiles of slot 0
  route_capacity_off_by_one,  // one token too many for each expert
  route_divergent_shuffle,    // lanes past the last expert leave before the warp's reduction
  simt_misaligned_slice,      // fp32: rows of a slice are no multiple of 16 bytes apart
  simt_no_barrier,            // the fp32 loop stores the next slice while a warp still reads the last one
  count
};

#ifdef SIDA_HARNESS
inline Plant planted_bug = Plant::none;
#define SIDA_PLANTED(bug) (::sida::cuda::planted_bug == ::sida::cuda::Plant::bug)
#else
#define SIDA_PLANTED(bug) false
#endif

}  // namespace sida::cuda
