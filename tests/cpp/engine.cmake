# Tests of csrc/experts and csrc/device.
add_library(sida_engine_test_tools STATIC ${CMAKE_CURRENT_LIST_DIR}/store_file.cpp ${CMAKE_CURRENT_LIST_DIR}/residency_model.cpp)
target_include_directories(sida_engine_test_tools PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(sida_engine_test_tools PUBLIC sida_experts)

function(sida_engine_test name)
  add_executable(${name} ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/${name}.cpp ${ARGN})
  target_link_libraries(${name} PRIVATE sida_engine_test_tools)
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT 300)
endfunction()

sida_engine_test(test_simulator ${CMAKE_CURRENT_LIST_DIR}/residency_simulator.cpp)
sida_engine_test(test_transfer)
sida_engine_test(test_faults)
sida_engine_test(test_store)
sida_engine_test(test_slab)
sida_engine_test(test_measure)

include(${CMAKE_CURRENT_LIST_DIR}/mutants/residency_mutations.cmake)
sida_engine_test(test_mutants ${CMAKE_CURRENT_LIST_DIR}/residency_simulator.cpp
  ${PROJECT_BINARY_DIR}/mutants/residency/experts/residency.cpp ${PROJECT_BINARY_DIR}/mutants/residency/names.cpp)
sida_engine_test(test_policy_trace)
sida_engine_test(test_soak)
if(NOT SIDA_SANITIZE)  # which are slow, and whose own memory grows: there it runs for three seconds
  add_test(NAME test_soak_half_a_minute COMMAND test_soak --seconds 30)
  set_tests_properties(test_soak_half_a_minute PROPERTIES TIMEOUT 300)
endif()
sida_engine_test(test_residency)

sida_engine_test(test_cpu_serving)
target_link_libraries(test_cpu_serving PRIVATE sida_serving)

# The two tiers of a GPU machine, over the recording runtime: no toolkit, no kernels.
sida_engine_test(test_cuda_serving ${PROJECT_SOURCE_DIR}/tests/cuda/recording_runtime.cpp)
target_include_directories(test_cuda_serving PRIVATE ${PROJECT_SOURCE_DIR}/tests/cuda)
target_link_libraries(test_cuda_serving PRIVATE sida_cuda_serving)
sida_engine_test(test_pinned_pool ${PROJECT_SOURCE_DIR}/tests/cuda/recording_runtime.cpp)
target_include_directories(test_pinned_pool PRIVATE ${PROJECT_SOURCE_DIR}/tests/cuda)
target_link_libraries(test_pinned_pool PRIVATE sida_cuda_serving)
