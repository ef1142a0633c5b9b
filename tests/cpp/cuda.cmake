# The CUDA kernels on the CPU. Their harness is a sanitizer of its own and cannot be mixed with another.
if(SIDA_SANITIZE STREQUAL "")
  add_subdirectory(${PROJECT_SOURCE_DIR}/tests/cuda)
endif()
