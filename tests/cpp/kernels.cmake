# C++ tests of the CPU kernels, once for each instruction set that this machine may have and once for each emulated one.
add_library(sida_emulated STATIC ${CMAKE_CURRENT_LIST_DIR}/emulated/wide_kernels.cpp
  ${CMAKE_CURRENT_LIST_DIR}/emulated/emulated_kernels.cpp ${CMAKE_CURRENT_LIST_DIR}/emulated/emulated_tiles.cpp)
target_include_directories(sida_emulated PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(sida_emulated PUBLIC sida_kernels)
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

foreach(test plan moe_ffn math bf16 choice)
  add_executable(test_kernels_${test} ${CMAKE_CURRENT_LIST_DIR}/test_kernels_${test}.cpp)
  target_link_libraries(test_kernels_${test} PRIVATE sida_emulated)
endforeach()
# It uses sixteen lanes itself.
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/test_kernels_bf16.cpp PROPERTIES COMPILE_OPTIONS "-ffp-contract=off;-Wno-psabi")
add_test(NAME kernels_plan COMMAND test_kernels_plan)
add_test(NAME kernels_choice COMMAND test_kernels_choice)

# A run of a test with something in its environment. The programs exit with 77 where the CPU lacks the set.
function(sida_kernel_test name test)
  add_test(NAME ${name} COMMAND test_kernels_${test})
  set_tests_properties(${name} PROPERTIES ENVIRONMENT "${ARGN}" SKIP_RETURN_CODE 77)
endfunction()

foreach(set scalar avx2 avx512 amx neon)
  sida_kernel_test(kernels_moe_ffn_${set} moe_ffn SIDA_CPU=${set})
  sida_kernel_test(kernels_math_${set} math SIDA_CPU=${set})
endforeach()
foreach(set avx512 amx)
  sida_kernel_test(kernels_moe_ffn_${set}_fast moe_ffn SIDA_CPU=${set} SIDA_TEST_PRECISION=fast)
endforeach()
if(SIDA_SANITIZE STREQUAL "")  # kernels_bf16_emulated goes through the same code in a tenth of the time
  foreach(set wide dot amx amx-fast)
    sida_kernel_test(kernels_moe_ffn_emulated_${set} moe_ffn SIDA_TEST_SET=${set})
  endforeach()
  include(${CMAKE_CURRENT_LIST_DIR}/mutants/bf16_mutations.cmake)
endif()
# The emulation itself, and where the CPU has the instructions, that both give the same bits.
sida_kernel_test(kernels_bf16_emulated bf16)
sida_kernel_test(kernels_bf16_avx512 bf16 SIDA_CPU=avx512 SIDA_TEST_HARDWARE=1)
sida_kernel_test(kernels_bf16_amx bf16 SIDA_CPU=amx SIDA_TEST_HARDWARE=1)
