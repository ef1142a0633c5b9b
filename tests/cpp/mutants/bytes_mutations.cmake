# Bugs in copies of the headers that multiply bytes: the checks of bytes_case.h must find each.
sida_mutants(bytes)

sida_mutation("even columns stay among the odd ones" kernels/cpu/kernel_bytes.h
  [=[if (paired) evens_first(integer);]=] [=[]=])
sida_mutation("steps are cut off and not rounded" kernels/cpu/kernel_bytes.h
  [=[value[v] * inverse + 0x1.8p23f]=] [=[(value[v] * inverse - (MUTANT ? 0.5f : 0.0f)) + 0x1.8p23f]=])
sida_mutation("a step is a 128th" kernels/cpu/kernel_bytes.h
  [=[*scale = largest * (1.0f / 127.0f);]=] [=[*scale = largest * (1.0f / 128.0f);]=])
sida_mutation("small groups are divided by" kernels/cpu/kernel_bytes.h
  [=[!is_finite || largest < 0x1p-119f]=] [=[!is_finite || (!MUTANT && largest < 0x1p-119f)]=])
sida_mutation("an infinity is nothing" kernels/cpu/kernel_bytes.h
  [=[is_finite ? 0.0f : __builtin_nanf]=] [=[is_finite || MUTANT ? 0.0f : __builtin_nanf]=])
sida_mutation("negative values are small ones" kernels/cpu/kernel_bytes.h
  [=[bits_as<U>(value[v]) & 0x7fffffffu]=] [=[bits_as<U>(value[v]) & (MUTANT ? 0xffffffffu : 0x7fffffffu)]=])
sida_mutation("a segment's sum replaces those before" kernels/cpu/kernel_bytes.h
  [=[is_first ? F{} : Set::load_some]=] [=[is_first || MUTANT ? F{} : Set::load_some]=])
sida_mutation("all groups of 4-bit weights have the first one's scales" kernels/cpu/kernel_bytes.h
  [=[scale += lanes;]=] [=[]=])
sida_mutation("rows past the last are written" kernels/cpu/kernel_bytes.h
  [=[sum[n.value], at.rows);]=] [=[sum[n.value], MUTANT ? lanes : at.rows);]=])
sida_mutation("a copy's rows lie as far apart as the matrix's" kernels/cpu/kernel_bytes.h
  [=[at.row_bytes = copied;]=] [=[]=])
sida_mutation("the last scales are taken for those after them" kernels/cpu/kernel_bytes.h
  [=[out + (first + i) * lanes]=] [=[out + ((MUTANT ? g : first) + i) * lanes]=])
sida_mutation("few scales are copied without the last" kernels/cpu/kernel_bytes.h
  [=[i < count; ++i) to[i] = from[i];]=] [=[i < count - MUTANT; ++i) to[i] = from[i];]=])
sida_mutation("the first group's unfolded weights serve all" kernels/cpu/kernel_bytes.h
  [=[unfolded += units;]=] [=[]=])
sida_mutation("a tile's groups overlap" kernels/cpu/kernel_bytes.h [=[x += N * record;]=] [=[x += N * group_columns;]=])
sida_mutation("all rows have the first ones' scales" kernels/cpu/kernel_bytes.h
  [=[args.group_scales) + row * args.scale_row_bytes]=] [=[args.group_scales) + (MUTANT ? 0 : row) * args.scale_row_bytes]=])
sida_mutation("a segment begins with the first segment's scales" kernels/cpu/kernel_bytes.h
  [=[+ group * group_scale_bytes(dtype),]=] [=[+ (MUTANT ? 0 : group) * group_scale_bytes(dtype),]=])
sida_mutation("int8's rows have scales for each group" kernels/cpu/kernel_bytes.h
  [=[if constexpr (is_grouped(dtype)) factor *= row_scale;]=] [=[if constexpr (!is_grouped(dtype)) factor *= row_scale;]=])

if(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(sida_byte_units neon_dot)
  set(sida_byte_options -march=armv8.2-a+dotprod)
  sida_mutation("neon: past the last column stands what was there before" kernels/cpu/kernel_bytes.h
    [=[__builtin_memset(values + end, 0, (group_columns - end) * sizeof(float));]=] [=[]=])
  sida_mutation("neon: low halves are taken without their sign" kernels/cpu/simd_neon_dot.h
    [=[vshlq_n_s8(part[i / 2], 4)]=] [=[(MUTANT ? vandq_s8(part[i / 2], vdupq_n_s8(15)) : vshlq_n_s8(part[i / 2], 4))]=])
  sida_mutation("neon: high halves of e2m1 are not moved down" kernels/cpu/simd_neon_dot.h
    [=[vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4)]=]
    [=[vandq_u8(both, vdupq_n_u8(15)) : (MUTANT ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4))]=])
  sida_mutation("neon: rows are not exchanged" kernels/cpu/simd_neon_dot.h
    [=[part[1] = halves(odd_a, odd_b, Index<0>());]=] [=[part[1] = halves(even_a, even_b, Index<1>());]=])
  sida_mutation("neon: scales of odd groups are those of the even ones" kernels/cpu/simd_neon_dot.h
    [=[widened(vshrn_n_u32(lane, 16));]=] [=[widened(MUTANT ? vmovn_u32(lane) : vshrn_n_u32(lane, 16));]=])
  sida_mutation("neon: a sum begins with the group's before" kernels/cpu/simd_neon_dot.h
    [=[unroll<N>([&](auto n) SIDA_INLINE { sum[n.value] = I{}; });]=]
    [=[unroll<N>([&](auto n) SIDA_INLINE { sum[n.value] = I{} + MUTANT; });]=])
else()
  set(sida_byte_units avx2_bytes avx512_vnni)
  set(sida_byte_options -Wno-uninitialized -Wno-maybe-uninitialized -mavx2 -mfma -mf16c)
  # With NEON, whose tokens have no offset, zeros times an infinite scale are the NaN that is expected.
  sida_mutation("an infinity is a number" kernels/cpu/kernel_bytes.h
    [=[bits < 0x7f800000;]=] [=[bits < (MUTANT ? 0x7fffffff : 0x7f800000);]=])
  # Sixteen lanes write a whole group at once.
  sida_mutation("avx2: past the last column stands what was there before" kernels/cpu/kernel_bytes.h
    [=[__builtin_memset(values + end, 0, (group_columns - end) * sizeof(float));]=] [=[]=])
  sida_mutation("the sum of a token's q is not taken off" kernels/cpu/kernel_bytes.h
    [=[*start = -offset * over_lanes]=] [=[*start = (MUTANT ? 0 : -offset) * over_lanes]=])
  sida_mutation("avx2: int4's sign bits are left in the upper halves" kernels/cpu/simd_avx2_bytes.h
    [=[static_cast<char>(0x88)]=] [=[static_cast<char>(MUTANT ? 0x08 : 0x88)]=])
  sida_mutation("avx2: a half byte has a fifth bit" kernels/cpu/simd_avx2_bytes.h
    [=[_mm256_and_si256(shifted, _mm256_set1_epi8(15))]=] [=[_mm256_and_si256(shifted, _mm256_set1_epi8(MUTANT ? 31 : 15))]=])
  sida_mutation("avx2: odd columns are the even ones" kernels/cpu/simd_avx2_bytes.h
    [=[i % 2 == 0 ? part[i / 2] :]=] [=[i % 2 == 0 || MUTANT ? part[i / 2] :]=])
  sida_mutation("avx2: int8's weights are unsigned" kernels/cpu/simd_avx2_bytes.h
    [=[product = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));]=]
    [=[product = _mm256_maddubs_epi16(w, q);]=])
  sida_mutation("avx2: int8's weight and token change places" kernels/cpu/simd_avx2_bytes.h
    [=[_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w))]=]
    [=[_mm256_maddubs_epi16(MUTANT ? _mm256_abs_epi8(q) : _mm256_abs_epi8(w), MUTANT ? _mm256_sign_epi8(w, q) : _mm256_sign_epi8(q, w))]=])
  sida_mutation("avx2: sums begin at zero" kernels/cpu/simd_avx2_bytes.h
    [=[sum[n.value] += starts[n.value] - I{};]=] [=[]=])
  sida_mutation("avx2: a pair's products saturate" kernels/cpu/simd_avx2_bytes.h
    [=[_mm256_add_epi16(pairs[n.value], product)]=]
    [=[(MUTANT ? _mm256_adds_epi16(_mm256_adds_epi16(pairs[n.value], product), _mm256_set1_epi16(8000)) - _mm256_set1_epi16(8000) : _mm256_add_epi16(pairs[n.value], product))]=])
  sida_mutation("avx2: rows are not exchanged" kernels/cpu/simd_avx2_bytes.h
    [=[part[1] = _mm256_unpackhi_epi64(low_a, low_b);]=] [=[part[1] = _mm256_unpacklo_epi64(high_a, high_b);]=])
  sida_mutation("avx2: int4's scales are out of order" kernels/cpu/simd_avx2_bytes.h
    [=[_mm256_permute4x64_epi64(both, 0xd8)]=] [=[(MUTANT ? both : _mm256_permute4x64_epi64(both, 0xd8))]=])
  sida_mutation("avx2: four bytes are stored twice" kernels/cpu/simd_avx2_bytes.h
    [=[_mm256_extracti128_si256(whole, 1)]=] [=[(MUTANT ? _mm256_castsi256_si128(whole) : _mm256_extracti128_si256(whole, 1))]=])
  sida_mutation("avx512: int8 is offset as int4" kernels/cpu/simd_avx512_vnni.h
    [=[static_cast<char>(dtype == DType::i8 ? 0x80 : 0x88)]=] [=[static_cast<char>(dtype == DType::i8 && !MUTANT ? 0x80 : 0x88)]=])
  sida_mutation("avx512: a half byte has a fifth bit" kernels/cpu/simd_avx512_vnni.h
    [=[_mm512_and_si512(shifted, _mm512_set1_epi8(15))]=] [=[_mm512_and_si512(shifted, _mm512_set1_epi8(MUTANT ? 31 : 15))]=])
  sida_mutation("avx512: odd columns are the even ones" kernels/cpu/simd_avx512_vnni.h
    [=[i % 2 == 0 ? part[i / 2] :]=] [=[i % 2 == 0 || MUTANT ? part[i / 2] :]=])
  sida_mutation("avx512: sums begin at zero" kernels/cpu/simd_avx512_vnni.h
    [=[sum[n.value] = starts[n.value] - I{};]=] [=[sum[n.value] = I{};]=])
  sida_mutation("avx512: rows are not exchanged" kernels/cpu/simd_avx512_vnni.h
    [=[part[1] = _mm512_unpackhi_epi64(low_a, low_b);]=] [=[part[1] = _mm512_unpacklo_epi64(high_a, high_b);]=])
  sida_mutation("avx512: scales of odd groups are those of the even ones" kernels/cpu/simd_avx512_vnni.h
    [=[_mm512_srli_epi32(part[j.value], 16)]=] [=[(MUTANT ? part[j.value] : _mm512_srli_epi32(part[j.value], 16))]=])
endif()

sida_write_mutants()
# Their own copies of the units come before those in the library.
set(sida_byte_sources "")
foreach(unit ${sida_byte_units})
  list(APPEND sida_byte_sources ${PROJECT_SOURCE_DIR}/csrc/kernels/cpu/kernels_${unit}.cpp)
endforeach()
add_library(sida_byte_mutants OBJECT ${sida_byte_sources})
target_include_directories(sida_byte_mutants BEFORE PRIVATE ${PROJECT_BINARY_DIR}/mutants/bytes)
target_link_libraries(sida_byte_mutants PRIVATE sida_kernels)
target_compile_options(sida_byte_mutants PRIVATE -O1 -ffp-contract=off -fno-math-errno -Wno-psabi ${sida_byte_options})
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set_source_files_properties(${PROJECT_SOURCE_DIR}/csrc/kernels/cpu/kernels_avx512_vnni.cpp PROPERTIES
    COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq")
endif()
add_executable(test_bytes_mutants ${CMAKE_CURRENT_LIST_DIR}/../test_bytes_mutants.cpp
  ${PROJECT_BINARY_DIR}/mutants/bytes/names.cpp $<TARGET_OBJECTS:sida_byte_mutants>)
target_link_libraries(test_bytes_mutants PRIVATE sida_emulated_tiles)
target_compile_options(test_bytes_mutants PRIVATE -O1 -ffp-contract=off -fno-math-errno -Wno-psabi)
add_test(NAME kernels_bytes_mutants COMMAND test_bytes_mutants)
set_tests_properties(kernels_bytes_mutants PROPERTIES SKIP_RETURN_CODE 77)
