# Tests of csrc/experts and csrc/device.
add_library(sida_engine_test_tools STATIC ${CMAKE_CURRENT_LIST_DIR}/store_file.cpp
  ${CMAKE_CURRENT_LIST_DIR}/residency_model.cpp ${CMAKE_CURRENT_LIST_DIR}/residency_simulator.cpp)
target_include_directories(sida_engine_test_tools PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(sida_engine_test_tools PUBLIC sida_experts)
target_compile_options(sida_engine_test_tools PRIVATE ${sida_test_options})

# The CUDA runtime's functions, recorded; and programs of slots over them.
add_library(sida_recording_runtime STATIC ${PROJECT_SOURCE_DIR}/tests/cuda/recording_runtime.cpp
  ${PROJECT_SOURCE_DIR}/tests/cuda/slots_program.cpp)
target_include_directories(sida_recording_runtime PUBLIC ${PROJECT_SOURCE_DIR}/tests/cuda ${PROJECT_SOURCE_DIR}/tests)
target_link_libraries(sida_recording_runtime PUBLIC sida_flags)
target_compile_options(sida_recording_runtime PRIVATE ${sida_test_options})

# One program with one test of the same name.
function(sida_engine_test name)
  add_executable(${name} ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/${name}.cpp ${ARGN})
  target_link_libraries(${name} PRIVATE sida_engine_test_tools)
  target_compile_options(${name} PRIVATE ${sida_test_options})
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT 300)
endfunction()

sida_engine_test(test_simulator)
sida_engine_test(test_transfer)
sida_engine_test(test_faults)
sida_engine_test(test_store)
sida_engine_test(test_slab)
sida_engine_test(test_measure)

include(${CMAKE_CURRENT_LIST_DIR}/mutants/residency_mutations.cmake)
sida_engine_test(test_mutants
  ${PROJECT_BINARY_DIR}/mutants/residency/experts/residency.cpp
  ${PROJECT_BINARY_DIR}/mutants/residency/experts/eviction.cpp ${PROJECT_BINARY_DIR}/mutants/residency/names.cpp)
# The same bugs, told by the residency itself with the checks of a sanitizer build.
sida_engine_test(test_invariants
  ${PROJECT_BINARY_DIR}/mutants/residency/experts/residency.cpp
  ${PROJECT_BINARY_DIR}/mutants/residency/experts/eviction.cpp ${PROJECT_BINARY_DIR}/mutants/residency/names.cpp)
target_compile_definitions(test_invariants PRIVATE SIDA_CHECKED)
if(NOT SIDA_SANITIZE STREQUAL "thread")  # one thread
  sida_engine_test(test_policy_trace)
  sida_quick(test_policy_trace test_policy_trace)
endif()
sida_engine_test(test_soak)
if(NOT SIDA_SANITIZE)  # which are slow, and whose own memory grows: there it runs for three seconds
  add_test(NAME test_soak_half_a_minute COMMAND test_soak --seconds 30)
  set_tests_properties(test_soak_half_a_minute PROPERTIES TIMEOUT 300)
endif()
sida_engine_test(test_residency)
sida_engine_test(test_layer_clock)

sida_engine_test(test_cpu_serving)
target_link_libraries(test_cpu_serving PRIVATE sida_serving)

# The two tiers of a GPU machine, over the recording runtime: no toolkit, no kernels.
sida_engine_test(test_cuda_serving)
target_link_libraries(test_cuda_serving PRIVATE sida_recording_runtime sida_cuda_serving)
sida_engine_test(test_pinned_pool)
target_link_libraries(test_pinned_pool PRIVATE sida_recording_runtime sida_cuda_serving)

foreach(test simulator transfer faults store slab measure soak residency cpu_serving cuda_serving pinned_pool)
  sida_quick(test_${test} test_${test})
endforeach()
