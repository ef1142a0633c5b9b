# Bugs in copies of the CUDA kernels: planted_test.cpp says which check of the harness must find each.
sida_mutants(cuda_kernels)
set(gemm kernels/cuda/expert_gemm.cuh)
set(simt kernels/cuda/expert_gemm_f32.cu)
set(work kernels/cuda/work.cuh)
set(epilogue kernels/cuda/epilogue.cuh)
set(plan kernels/cuda/dispatch_plan.cu)
set(route kernels/cuda/route_top1.cu)

# The main loop does not wait for the other warps before it reuses a stage.
sida_mutation(gemm_no_barrier ${gemm}
  [=[__syncthreads();
    load(step + Shape::stages - 1);]=]
  [=[if (step < steps.begin + Shape::stages) __syncthreads();
    load(step + Shape::stages - 1);]=])
# cp.async.wait_group leaves one group too many in flight.
sida_mutation(gemm_lax_wait ${gemm} [=[cp_async_wait<Shape::stages - 2>();]=] [=[cp_async_wait<Shape::stages - 1>();]=])
# Two registers of the weight fragment are exchanged.
sida_mutation(gemm_swapped_fragment ${gemm}
  [=[(k32 * 2 + step) * 2 + lane / 16));]=]
  [=[(k32 * 2 + step) * 2 + lane / 16));
    if (MUTANT) {
      const uint32_t kept = fragment[step][1];
      fragment[step][1] = fragment[step][2];
      fragment[step][2] = kept;
    }]=])
sida_mutation(gemm_swapped_fragment ${gemm}
  [=[widen(bytes[step * 2 + 1], token, fragment[step][1], fragment[step][3]);]=]
  [=[widen(bytes[step * 2 + 1], token, fragment[step][1], fragment[step][3]);
    const uint32_t kept = fragment[step][1];
    fragment[step][1] = fragment[step][2];
    fragment[step][2] = kept;]=])
# Fragments are read where an unswizzled tile would have them.
sida_mutation(gemm_no_swizzle ${gemm}
  [=[WeightTile<Token>::at(first_row + lane % 16, (k32 * 2 + step) * 2 + lane / 16)]=]
  [=[(MUTANT ? (first_row + lane % 16) * 128 + ((k32 * 2 + step) * 2 + lane / 16) * 16
             : WeightTile<Token>::at(first_row + lane % 16, (k32 * 2 + step) * 2 + lane / 16))]=])
# The last slice of the reduction reads past the row's end.
sida_mutation(gemm_no_depth_guard ${gemm}
  [=[inside ? weights + offset + k / per_object : weights,
               inside);]=]
  [=[(inside || (MUTANT && offset >= 0)) ? weights + offset + k / per_object : weights,
               inside || (MUTANT && offset >= 0));]=])
sida_mutation(gemm_no_depth_guard ${gemm}
  [=[inside ? tokens + offset + k : tokens, inside);]=]
  [=[(inside || (MUTANT && offset >= 0)) ? tokens + offset + k : tokens, inside || (MUTANT && offset >= 0));]=])
# Sums are laid over the pipeline's stages while a warp still reads them.
sida_mutation(gemm_no_epilogue_barrier ${gemm}
  [=[cp_async_wait<0>();
  __syncthreads();]=]
  [=[cp_async_wait<0>();]=])

# 4 bits: two registers of the weight fragment are exchanged.
sida_mutation(groups_swapped_fragment ${gemm} [=[weight_fragment[0][half + 2] = unfolded[1];]=]
  [=[weight_fragment[0][half + 2] = unfolded[MUTANT ? 2 : 1];]=])
# A lane's tokens are the next lane's.
sida_mutation(groups_wrong_token_chunk ${gemm} [=[warp_token + j * 8 + group, k32 * 4 + pair);]=]
  [=[warp_token + j * 8 + group, k32 * 4 + (MUTANT ? pair ^ 1 : pair));]=])
# Weights are read where a tile whose chunks are not exchanged would have them.
sida_mutation(groups_no_swizzle ${gemm} [=[WeightTile<Weight>::at(warp_row + lane % 16, lane / 16)]=]
  [=[(MUTANT ? (warp_row + lane % 16) * 32 + lane / 16 * 16 : WeightTile<Weight>::at(warp_row + lane % 16, lane / 16))]=])
sida_mutation(groups_no_swizzle ${gemm} [=[WeightTile<Weight>::at(warp_row + i * 32 + lane, k32)]=]
  [=[(MUTANT ? (warp_row + i * 32 + lane) * 32 + k32 * 16 : WeightTile<Weight>::at(warp_row + i * 32 + lane, k32))]=])
# The lower eight rows of a fragment have the upper ones' factors.
sida_mutation(groups_factor_of_upper_rows ${gemm} [=[i * 16 + half * 8 + group) * 2]=]
  [=[i * 16 + (MUTANT ? 0 : half) * 8 + group) * 2]=])
# The next step's factors are put where this step's are still read.
sida_mutation(groups_factors_not_doubled ${gemm} [=[factors + step % 2 * Shape::block_w * 2;]=]
  [=[factors + (MUTANT ? 0 : step % 2) * Shape::block_w * 2;]=])
# Factors past a row's last group are read.
sida_mutation(groups_no_factor_guard ${gemm} [=[row[i] != nullptr && group < groups ?]=]
  [=[row[i] != nullptr && (group < groups || MUTANT) ?]=])
# Rows of factors are taken to be contiguous when they are strided.
sida_mutation(groups_wrong_factor_stride ${gemm} [=[matrix_row * w.group_scale_row_stride;]=]
  [=[matrix_row * (MUTANT ? groups : w.group_scale_row_stride);]=])
# int4 is read without its sign, mxfp4 without its subnormal numbers' and its other numbers' last bit.
sida_mutation(groups_wrong_code ${gemm} [=[^ 0x43084308u, 0xC308C308u)]=] [=[^ (MUTANT ? 0x43004300u : 0x43084308u), 0xC308C308u)]=])
sida_mutation(groups_wrong_code ${gemm} [=[& 0x01C001C0u) | sign]=] [=[& (MUTANT ? 0x01800180u : 0x01C001C0u)) | sign]=])

# Weight rows past the matrix are read.
sida_mutation(gemm_no_row_guard ${work} [=[column < columns ? matrix_row : -1]=]
  [=[column < columns || MUTANT ? matrix_row : -1]=])
# Rows are taken to be contiguous when they are strided.
sida_mutation(gemm_wrong_row_stride ${work} [=[matrix_row * w.row_stride]=]
  [=[matrix_row * (MUTANT ? (phase == Phase::hidden ? p.d_model : p.d_ff) : w.row_stride)]=])
# The tile's last row offset is never written.
sida_mutation(gemm_uninitialised_table ${work}
  [=[const bool inside = row < work.tokens.count;]=]
  [=[if (MUTANT && row == block_t - 1) continue;
    const bool inside = row < work.tokens.count;]=])
# The tile's unused tokens are gathered too.
sida_mutation(gemm_no_token_guard ${work} [=[row < work.tokens.count;]=] [=[row < work.tokens.count || MUTANT;]=])
# The last slice of d_ff is left out.
sida_mutation(split_short_slice ${work} [=[steps * (work.split + 1) / p.splits}]=]
  [=[steps * (work.split + 1) / p.splits - (MUTANT && work.split == p.splits - 1 ? 1 : 0)}]=])

# Columns past d_ff or d_model are written.
sida_mutation(epilogue_no_column_guard ${epilogue} [=[max(0, min(8, columns - column))]=]
  [=[MUTANT ? 8 : max(0, min(8, columns - column))]=])
# The gate is looked up by sorted position instead of by row.
sida_mutation(epilogue_gate_by_position ${epilogue} [=[p.gate[row]]=] [=[p.gate[MUTANT ? position : row]]=])
# int8 scales are looked up within the tile instead of within the matrix.
sida_mutation(epilogue_scale_of_tile ${epilogue} [=[w.scale_slot_stride + matrix_row];]=]
  [=[w.scale_slot_stride + (MUTANT ? matrix_row % 64 : matrix_row)];]=])
sida_mutation(epilogue_scale_of_tile ${epilogue}
  [=[unit.tile_row, p.wo, work.tokens.slot, unit.column,]=]
  [=[unit.tile_row, p.wo, work.tokens.slot, MUTANT ? unit.tile_row : unit.column,]=])
# Every slice of d_ff adds the bias.
sida_mutation(epilogue_bias_of_every_slice ${epilogue} [=[if (p.splits == 1) {]=]
  [=[if (MUTANT && p.splits > 1) add_bias(p.wo, work.tokens.slot, unit.column, unit.count, value);
    if (p.splits == 1) {]=])
# The up rows get the gate rows' biases.
sida_mutation(epilogue_bias_of_gate ${epilogue} [=[p.wi, work.tokens.slot, p.d_ff + unit.column + j)]=]
  [=[p.wi, work.tokens.slot, (MUTANT ? 0 : p.d_ff) + unit.column + j)]=])
# 16-byte stores begin one element late.
sida_mutation(epilogue_misaligned_store ${epilogue} [=[* p.hidden_row_stride + unit.column, hidden_dtype]=]
  [=[* p.hidden_row_stride + unit.column + (MUTANT ? 1 : 0), hidden_dtype]=])
# The last block adds its own partial sum first: the sum depends on timing.
sida_mutation(split_by_arrival ${epilogue} [=[own + split * slice]=]
  [=[own + (MUTANT ? (work.split + split) % p.splits : split) * slice]=])
# The ticket is read before it is written.
sida_mutation(split_no_barrier ${epilogue}
  [=[work.weight_tile], 1);
  __syncthreads();
  if (*flag]=]
  [=[work.weight_tile], 1);
  if (!MUTANT) __syncthreads();
  if (*flag]=])
# A slice's sums are announced before they are visible to other blocks.
sida_mutation(split_no_fence ${epilogue}
  [=[int* flag) {
  __threadfence();]=]
  [=[int* flag) {
  if (!MUTANT) __threadfence();]=])
# A row's arrival is announced before its values are visible to other blocks.
sida_mutation(combine_no_fence ${epilogue}
  [=[int* completes) {
  __threadfence();]=]
  [=[int* completes) {
  if (!MUTANT) __threadfence();]=])
# A row's arrival is announced before the other threads of the block have stored theirs.
sida_mutation(combine_early_arrival ${epilogue}
  [=[__syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < work.tokens.count;]=]
  [=[if (!MUTANT) __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < work.tokens.count;]=])
# Who completes a token is read before it is written.
sida_mutation(combine_no_barrier ${epilogue}
  [=[__syncthreads();
  __threadfence();]=]
  [=[if (!MUTANT) __syncthreads();
  __threadfence();]=])
# The completing row's choice is added first: the sum depends on timing.
sida_mutation(combine_by_arrival ${epilogue} [=[* p.top_k + choice) * p.d_model]=]
  [=[* p.top_k + (MUTANT ? (row + choice) % p.top_k : choice)) * p.d_model]=])
# Choices without a resident expert are waited for.
sida_mutation(combine_counts_absent ${epilogue} [=[if (routed.found == Found::resident) ++rows;]=] [=[++rows;]=])
# The counter is read again instead of the value that the atomic returned.
sida_mutation(combine_reads_counter ${epilogue} [=[completes[i] = atomicAdd(arrivals, 1) == rows - 1;]=]
  [=[atomicAdd(arrivals, 1);
    completes[i] = *arrivals == rows;]=])
# Every row adds its token's choices, complete or not.
sida_mutation(combine_always ${epilogue} [=[atomicAdd(arrivals, 1) == rows - 1;]=]
  [=[atomicAdd(arrivals, 1) == rows - 1 || MUTANT;]=])

# Tickets and arrivals keep what the scratch held.
sida_mutation(plan_counters_not_cleared ${plan}
  [=[for (int i = thread; i < p.counter_count; i += threads) p.counters[i] = 0;]=] [=[]=])
# Two steps of a warp update the same counter without __syncwarp between.
sida_mutation(plan_no_warp_barrier kernels/cuda/warp_rank.cuh
  [=[__syncwarp();
  if (key >= 0 && rank == 0)]=]
  [=[if (!MUTANT) __syncwarp();
  if (key >= 0 && rank == 0)]=])
# First positions are taken from an inclusive scan.
sida_mutation(plan_inclusive_scan ${plan} [=[position_end - total;]=] [=[position_end - (MUTANT ? 0 : total);]=])
# Rows without a resident expert become tiles of slot 0.
sida_mutation(plan_zero_missing ${plan} [=[routed.found == Found::resident ?]=]
  [=[routed.found == Found::resident || (MUTANT && routed.found == Found::missing) ?]=])

# One token too many for each expert.
sida_mutation(route_capacity_off_by_one ${route} [=[rank >= p.capacity]=] [=[rank >= p.capacity + (MUTANT ? 1 : 0)]=])
# Lanes past the last expert, which the masks name, leave before the warp's reduction: only independent thread
# scheduling shows it.
sida_mutation(route_divergent_shuffle ${route}
  [=[for (int step = 16; step > 0; step /= 2) largest =]=]
  [=[if (MUTANT && lane >= p.experts) return {0.0f, 0};
  for (int step = 16; step > 0; step /= 2) largest =]=])

# fp32: every row of 4-bit weights has the first one's factors.
sida_mutation(simt_factors_of_first_row ${simt} [=[scale_offset[unit % rows]]=] [=[scale_offset[MUTANT ? 0 : unit % rows]]=])
# fp32: rows of a slice are no multiple of 16 bytes apart.
sida_mutation(simt_misaligned_slice ${simt} [=[weight_slice + k * Memory::weight_floats + own_row]=]
  [=[weight_slice + k * (Memory::weight_floats - (MUTANT ? 1 : 0)) + own_row]=])
# The fp32 loop stores the next slice while a warp still reads the last one.
sida_mutation(simt_no_barrier ${simt}
  [=[    __syncthreads();
  }

  float* tile_sums]=]
  [=[    if (!MUTANT) __syncthreads();
  }

  float* tile_sums]=])

sida_write_mutants()
