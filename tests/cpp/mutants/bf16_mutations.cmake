# Bugs in copies of the headers that multiply bfloat16 pairs: the checks of bf16_case.h must find each.
sida_mutants(bf16)

sida_mutation("the elements of a pair are swapped" kernels/cpu/kernel_amx.h
  [=[__builtin_memcpy(to + pair * n, halves + 2 * pair, 4);]=]
  [=[const uint32_t both = halves[2 * pair + 1] | uint32_t{halves[2 * pair]} << 16;
     __builtin_memcpy(to + pair * n, &both, 4);]=])
sida_mutation("a pair is of columns that lie half a block apart" kernels/cpu/kernel_amx.h
  [=[store_upper_halves<S>(halves, low_term, high_term);]=]
  [=[uint16_t apart[columns];
     store_upper_halves<S>(apart, low_term, high_term);
     for (int i = 0; i < columns; ++i) halves[i] = apart[i % 2 * tile + i / 2];]=])
sida_mutation("the terms are added from the smallest up" kernels/cpu/kernel_amx.h
  [=[Tiles::template load<6>(x[0], x_bytes[0]);]=]
  [=[Tiles::template load<6>(x[0] + (terms - 1 - 2 * term) * tile * x_bytes[0], x_bytes[0]);]=])
sida_mutation("the tokens' tile has a row too few" kernels/cpu/kernel_amx.h [=[shape(config, 6 + a, tile, 4 * tokens[a]);]=]
  [=[shape(config, 6 + a, tile - 1, 4 * tokens[a]);]=])
sida_mutation("all tiles have a row too few" kernels/cpu/kernel_amx.h
  [=[config.rows[number] = static_cast<uint8_t>(is_used ? rows : 0);]=]
  [=[config.rows[number] = static_cast<uint8_t>(is_used ? (rows > 1 ? rows - 1 : 1) : 0);]=])
sida_mutation("a tile of sums is as wide as the other tokens" kernels/cpu/kernel_amx.h
  [=[for (int b = 0; b < 2; ++b) shape(config, 2 * a + b, rows[a], 4 * tokens[b]);]=]
  [=[for (int b = 0; b < 2; ++b) shape(config, 2 * a + b, rows[a], 4 * tokens[1 - b]);]=])
sida_mutation("the last rows have the configuration of the ones before" kernels/cpu/kernel_amx.h
  [=[if (both != configured) configure(rows, tokens);]=] [=[if (configured == 0) configure(rows, tokens);]=])
sida_mutation("the columns past the end are not masked" kernels/cpu/kernel_amx.h
  [=[__builtin_memcpy(tail + r * 2 * columns, w + r * row_bytes, 2 * left);]=]
  [=[__builtin_memcpy(tail + r * 2 * columns, w + r * row_bytes, 2 * columns);]=])
sida_mutation("a segment's sum replaces those before" kernels/cpu/kernel_amx.h [=[if (!is_first) sum = Set::load_some(to, rows) + sum;]=] [=[]=])
sida_mutation("the tiles are not given back" kernels/cpu/kernel_amx.h [=[Tiles::release();]=] [=[]=])
sida_mutation("the second tile of tokens is looked for a whole tile on" kernels/cpu/kernel_amx.h
  [=[x[b] = reinterpret_cast<const char*>(args.x.data + (first + b * tokens[0]) * args.x.padded_width);]=]
  [=[x[b] = reinterpret_cast<const char*>(args.x.data + (first + b * tile) * args.x.padded_width);]=])
sida_mutation("a tile of sums begins with those before" kernels/cpu/kernel_amx.h
  [=[if constexpr (A == 2) Tiles::template zero<2>();]=] [=[]=])
sida_mutation("rows past the last are written" kernels/cpu/kernel_amx.h
  [=[Set::store_some(DType::f32, reinterpret_cast<char*>(to), sum, rows);]=]
  [=[Set::store_some(DType::f32, reinterpret_cast<char*>(to), sum, tile);]=])
sida_mutation("a sum that is not finite is believed" kernels/cpu/kernel_amx.h
  [=[if (is_last && !is_finite(sum)) take_again(args, row, rows, first, n, t);]=] [=[]=])
sida_mutation("rows and tokens are not exchanged" kernels/cpu/kernel_amx.h [=[transpose(v);]=] [=[]=])
sida_mutation("half a group is left as it was" kernels/cpu/kernel_dot.h
  [=[if (k % columns == 0 && k + Set::group >= panel.width) __builtin_memset(to + D::lanes, 0, D::lanes * 4);]=] [=[]=])
sida_mutation("the upper vector lies a vector too far" kernels/cpu/kernel_dot.h [=[store_bf16<D>(to + D::lanes / 2, high);]=]
  [=[store_bf16<D>(to + D::lanes, high);]=])
sida_mutation("half of a pair past the end is multiplied" kernels/cpu/kernel_dot.h
  [=[words.x.width = args.x.width / 2;]=] [=[words.x.width = args.x.width / 2 + 1;]=])
sida_mutation("rows of an odd number of columns are taken for pairs" kernels/cpu/kernel_dot.h
  [=[if (w_dtype != DType::bf16 || width % 2 != 0) return base()->panel_form(values, w_dtype, width);]=]
  [=[if (w_dtype != DType::bf16) return base()->panel_form(values, w_dtype, width);]=])
sida_mutation("an fp32 value is held in two terms" kernels/cpu/bf16_terms.h
  [=[return values == DType::bf16 ? 1 : values == DType::f16 ? 2 : 3;]=]
  [=[return values == DType::bf16 ? 1 : 2;]=])
sida_mutation("what is left of an infinity is NaN" kernels/cpu/bf16_terms.h
  [=[rest = (bits & 0x7f800000u) == 0x7f800000u ? F{} : left;]=] [=[rest = left;]=])

sida_write_mutants()
# Its own copy of emulated_kernels.cpp comes before the one in the library.
add_executable(test_bf16_mutants ${CMAKE_CURRENT_LIST_DIR}/../test_bf16_mutants.cpp
  ${CMAKE_CURRENT_LIST_DIR}/../emulated/emulated_kernels.cpp ${PROJECT_BINARY_DIR}/mutants/bf16/names.cpp)
target_include_directories(test_bf16_mutants BEFORE PRIVATE ${PROJECT_BINARY_DIR}/mutants/bf16)
target_link_libraries(test_bf16_mutants PRIVATE sida_emulated)
target_compile_options(test_bf16_mutants PRIVATE -O1 -ffp-contract=off -fno-math-errno -Wno-psabi)
add_test(NAME kernels_bf16_mutants COMMAND test_bf16_mutants)
