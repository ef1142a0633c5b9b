# C++ tests of the CPU kernels, once for each instruction set that this machine may have and once for each emulated one.
add_library(sida_emulated_tiles STATIC ${CMAKE_CURRENT_LIST_DIR}/emulated/emulated_tiles.cpp)
target_include_directories(sida_emulated_tiles PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(sida_emulated_tiles PUBLIC sida_kernels)
target_compile_options(sida_emulated_tiles PRIVATE -O1 -ffp-contract=off -fno-math-errno -Wno-psabi)
add_library(sida_emulated STATIC ${CMAKE_CURRENT_LIST_DIR}/emulated/wide_kernels.cpp
  ${CMAKE_CURRENT_LIST_DIR}/emulated/emulated_kernels.cpp)
target_link_libraries(sida_emulated PUBLIC sida_emulated_tiles)
# -O1: sixteen lanes without instructions for them are slow to compile.
target_compile_options(sida_emulated PRIVATE -O1 -ffp-contract=off -fno-math-errno -Wno-psabi)
# Instrumented they take minutes. No sanitizer's run goes through `wide` (see below); of emulated sets the thread
# sanitizer would see what it sees of the machine's own, whose threads meet in moe_ffn.cpp alone.
if(NOT SIDA_SANITIZE STREQUAL "")
  set(sida_plain_units ${CMAKE_CURRENT_LIST_DIR}/emulated/wide_kernels.cpp)
  if(SIDA_SANITIZE STREQUAL "thread")
    list(APPEND sida_plain_units ${CMAKE_CURRENT_LIST_DIR}/emulated/emulated_kernels.cpp)
  endif()
  set_source_files_properties(${sida_plain_units} PROPERTIES COMPILE_OPTIONS -fno-sanitize=all)
endif()

# Emulated sets take minutes to compile: the programs of `make test` have none.
foreach(test plan moe_ffn math choice)
  add_library(test_kernels_${test}_object OBJECT ${CMAKE_CURRENT_LIST_DIR}/test_kernels_${test}.cpp)
  target_link_libraries(test_kernels_${test}_object PUBLIC sida_emulated_tiles)
  target_compile_options(test_kernels_${test}_object PRIVATE ${sida_test_options})
  add_executable(test_kernels_${test} ${CMAKE_CURRENT_LIST_DIR}/emulated/no_emulated_sets.cpp)
  target_link_libraries(test_kernels_${test} PRIVATE test_kernels_${test}_object)
endforeach()
add_executable(test_kernels_bf16 ${CMAKE_CURRENT_LIST_DIR}/test_kernels_bf16.cpp)
target_link_libraries(test_kernels_bf16 PRIVATE sida_emulated)
# It uses sixteen lanes itself.
target_compile_options(test_kernels_bf16 PRIVATE ${sida_test_options} -ffp-contract=off -Wno-psabi)
add_test(NAME kernels_plan COMMAND test_kernels_plan)
sida_quick(test_kernels_plan kernels_plan)
add_test(NAME kernels_choice COMMAND test_kernels_choice)
sida_quick(test_kernels_choice kernels_choice)

# A run of a test with something in its environment. The programs exit with 77 where the CPU lacks the set.
function(sida_kernel_test name test)
  add_test(NAME ${name} COMMAND test_kernels_${test})
  set_tests_properties(${name} PROPERTIES ENVIRONMENT "${ARGN}" SKIP_RETURN_CODE 77)
endfunction()

# All cases on a machine's instruction set take half a minute: `make test` has a fifth of the random ones.
function(sida_moe_ffn_test name)
  sida_kernel_test(${name} moe_ffn ${ARGN})
  if(SIDA_SANITIZE STREQUAL "")
    sida_kernel_test(${name}_quick moe_ffn ${ARGN} SIDA_TEST_SHARE=5)
    sida_quick(test_kernels_moe_ffn ${name}_quick)
  endif()
endfunction()

set(sida_exact_sets scalar avx2 avx512 amx neon)
set(sida_fast_sets avx2 avx512 amx neon)
if(SIDA_SANITIZE STREQUAL "thread")  # the scalar set alone is instrumented; one of the others, for what it is called with
  set(sida_exact_sets scalar)
  set(sida_fast_sets avx2 neon)
endif()
foreach(set ${sida_exact_sets})
  sida_moe_ffn_test(kernels_moe_ffn_${set} SIDA_CPU=${set})
  sida_kernel_test(kernels_math_${set} math SIDA_CPU=${set})
  sida_quick(test_kernels_math kernels_math_${set})
endforeach()
foreach(set ${sida_fast_sets})
  sida_moe_ffn_test(kernels_moe_ffn_${set}_fast SIDA_CPU=${set} SIDA_TEST_PRECISION=fast)
endforeach()
if(SIDA_SANITIZE STREQUAL "")  # kernels_bf16_emulated goes through the same code in a tenth of the time
  add_executable(test_kernels_moe_ffn_emulated $<TARGET_OBJECTS:test_kernels_moe_ffn_object>)
  target_link_libraries(test_kernels_moe_ffn_emulated PRIVATE sida_emulated)
  foreach(set wide dot amx amx-fast)
    sida_kernel_test(kernels_moe_ffn_emulated_${set} moe_ffn_emulated SIDA_TEST_SET=${set})
  endforeach()
  include(${CMAKE_CURRENT_LIST_DIR}/mutants/bf16_mutations.cmake)
  include(${CMAKE_CURRENT_LIST_DIR}/mutants/bytes_mutations.cmake)
endif()
# The emulation itself, and where the CPU has the instructions, that both give the same bits. On one thread.
if(NOT SIDA_SANITIZE STREQUAL "thread")
  sida_kernel_test(kernels_bf16_emulated bf16)
  sida_kernel_test(kernels_bf16_avx512 bf16 SIDA_CPU=avx512 SIDA_TEST_HARDWARE=1)
  sida_kernel_test(kernels_bf16_amx bf16 SIDA_CPU=amx SIDA_TEST_HARDWARE=1)
endif()
