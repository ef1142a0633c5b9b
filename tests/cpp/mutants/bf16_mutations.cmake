# Bugs planted in copies of the headers that multiply bfloat16 pairs, one at a time: the checks of bf16_case.h must find
# each. As in mutations.cmake, a statement that stands exactly once in its file is replaced while `mutation` has its number.
set(sida_bf16_names "")
set(sida_bf16_count 0)
foreach(header kernel_amx kernel_dot bf16_terms)
  file(READ ${PROJECT_SOURCE_DIR}/csrc/kernels/cpu/${header}.h sida_bf16_${header})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/kernels/cpu/${header}.h)
endforeach()

macro(sida_bf16_mutation header name right wrong)
  string(FIND "${sida_bf16_${header}}" "${right}" first)
  string(FIND "${sida_bf16_${header}}" "${right}" last REVERSE)
  if(first EQUAL -1 OR NOT first EQUAL last)
    message(FATAL_ERROR "mutation ${name}: its text must stand exactly once in ${header}.h: ${right}")
  endif()
  math(EXPR sida_bf16_count "${sida_bf16_count} + 1")
  string(REPLACE "${right}" "if (::sida::test::mutation == ${sida_bf16_count}) { ${wrong} } else { ${right} }"
         sida_bf16_${header} "${sida_bf16_${header}}")
  string(APPEND sida_bf16_names "\"${name}\",\n")
endmacro()

sida_bf16_mutation(kernel_amx "the elements of a pair are swapped"
  [=[__builtin_memcpy(to + pair * n, halves + 2 * pair, 4);]=]
  [=[const uint32_t both = halves[2 * pair + 1] | uint32_t{halves[2 * pair]} << 16;
     __builtin_memcpy(to + pair * n, &both, 4);]=])
sida_bf16_mutation(kernel_amx "a pair is of columns that lie half a block apart"
  [=[store_upper_halves<S>(halves, low_term, high_term);]=]
  [=[uint16_t apart[columns];
     store_upper_halves<S>(apart, low_term, high_term);
     for (int i = 0; i < columns; ++i) halves[i] = apart[i % 2 * tile + i / 2];]=])
sida_bf16_mutation(kernel_amx "the terms are added from the smallest up"
  [=[Tiles::template load<6>(x[0], x_bytes[0]);]=]
  [=[Tiles::template load<6>(x[0] + (terms - 1 - 2 * term) * tile * x_bytes[0], x_bytes[0]);]=])
sida_bf16_mutation(kernel_amx "the tokens' tile has a row too few" [=[shape(config, 6 + a, tile, 4 * tokens[a]);]=]
  [=[shape(config, 6 + a, tile - 1, 4 * tokens[a]);]=])
sida_bf16_mutation(kernel_amx "all tiles have a row too few"
  [=[config.rows[number] = static_cast<uint8_t>(is_used ? rows : 0);]=]
  [=[config.rows[number] = static_cast<uint8_t>(is_used ? (rows > 1 ? rows - 1 : 1) : 0);]=])
sida_bf16_mutation(kernel_amx "a tile of sums is as wide as the other tokens"
  [=[for (int b = 0; b < 2; ++b) shape(config, 2 * a + b, rows[a], 4 * tokens[b]);]=]
  [=[for (int b = 0; b < 2; ++b) shape(config, 2 * a + b, rows[a], 4 * tokens[1 - b]);]=])
sida_bf16_mutation(kernel_amx "the last rows have the configuration of the ones before"
  [=[if (both != configured) configure(rows, tokens);]=] [=[if (configured == 0) configure(rows, tokens);]=])
sida_bf16_mutation(kernel_amx "the columns past the end are not masked"
  [=[__builtin_memcpy(tail + r * 2 * columns, w + r * row_bytes, 2 * left);]=]
  [=[__builtin_memcpy(tail + r * 2 * columns, w + r * row_bytes, 2 * columns);]=])
sida_bf16_mutation(kernel_amx "a segment's sum replaces those before" [=[if (!is_first) sum = Set::load_some(to, rows) + sum;]=] [=[]=])
sida_bf16_mutation(kernel_amx "the tiles are not given back" [=[Tiles::release();]=] [=[]=])
sida_bf16_mutation(kernel_amx "the second tile of tokens is looked for a whole tile on"
  [=[x[b] = reinterpret_cast<const char*>(args.x.data + (first + b * tokens[0]) * args.x.padded_width);]=]
  [=[x[b] = reinterpret_cast<const char*>(args.x.data + (first + b * tile) * args.x.padded_width);]=])
sida_bf16_mutation(kernel_amx "a tile of sums begins with those before"
  [=[if constexpr (A == 2) Tiles::template zero<2>();]=] [=[]=])
sida_bf16_mutation(kernel_amx "rows past the last are written"
  [=[Set::store_some(DType::f32, reinterpret_cast<char*>(to), sum, rows);]=]
  [=[Set::store_some(DType::f32, reinterpret_cast<char*>(to), sum, tile);]=])
sida_bf16_mutation(kernel_amx "a sum that is not finite is believed"
  [=[if (is_last && !is_finite(sum)) take_again(args, row, rows, first, n, t);]=] [=[]=])
sida_bf16_mutation(kernel_amx "rows and tokens are not exchanged" [=[transpose(v);]=] [=[]=])
sida_bf16_mutation(kernel_dot "half a group is left as it was"
  [=[if (k % columns == 0 && k + Set::group >= panel.width) __builtin_memset(to + D::lanes, 0, D::lanes * 4);]=] [=[]=])
sida_bf16_mutation(kernel_dot "the upper vector lies a vector too far" [=[store_bf16<D>(to + D::lanes / 2, high);]=]
  [=[store_bf16<D>(to + D::lanes, high);]=])
sida_bf16_mutation(kernel_dot "half of a pair past the end is multiplied"
  [=[words.x.width = args.x.width / 2;]=] [=[words.x.width = args.x.width / 2 + 1;]=])
sida_bf16_mutation(kernel_dot "rows of an odd number of columns are taken for pairs"
  [=[if (w_dtype != DType::bf16 || width % 2 != 0) return base()->panel_form(values, w_dtype, width);]=]
  [=[if (w_dtype != DType::bf16) return base()->panel_form(values, w_dtype, width);]=])
sida_bf16_mutation(bf16_terms "an fp32 value is held in two terms"
  [=[return values == DType::bf16 ? 1 : values == DType::f16 ? 2 : 3;]=]
  [=[return values == DType::bf16 ? 1 : 2;]=])
sida_bf16_mutation(bf16_terms "what is left of an infinity is NaN"
  [=[rest = (bits & 0x7f800000u) == 0x7f800000u ? F{} : left;]=] [=[rest = left;]=])

foreach(header kernel_amx kernel_dot bf16_terms)
  set(sida_bf16_text "${sida_bf16_${header}}")
  string(REPLACE "namespace sida::cpu {" "namespace sida::test {\nextern int mutation;\n}\nnamespace sida::cpu {"
         sida_bf16_text "${sida_bf16_text}")
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/bf16_mutants/kernels/cpu/${header}.h @ONLY CONTENT "@sida_bf16_text@")
endforeach()
file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/bf16_mutants/names.cpp @ONLY CONTENT [=[
// Made by tests/cpp/mutants/bf16_mutations.cmake.
namespace sida::test {
int mutation = 0;
extern const char* const mutation_names[] = {"the code as it is",
@sida_bf16_names@};
extern const int mutations = @sida_bf16_count@;
}
]=])
# Its own copy of emulated_kernels.cpp comes before the one in the library.
add_executable(test_bf16_mutants ${CMAKE_CURRENT_LIST_DIR}/../test_bf16_mutants.cpp
  ${CMAKE_CURRENT_LIST_DIR}/../emulated/emulated_kernels.cpp ${PROJECT_BINARY_DIR}/bf16_mutants/names.cpp)
target_include_directories(test_bf16_mutants BEFORE PRIVATE ${PROJECT_BINARY_DIR}/bf16_mutants)
target_link_libraries(test_bf16_mutants PRIVATE sida_emulated)
target_compile_options(test_bf16_mutants PRIVATE -O1 -ffp-contract=off -fno-math-errno -Wno-psabi)
add_test(NAME kernels_bf16_mutants COMMAND test_bf16_mutants)
