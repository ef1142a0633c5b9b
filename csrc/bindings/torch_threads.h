// Torch's threads, for what the kernels cut into parts.
#pragma once

#include "kernels/moe_ffn.h"

namespace sida {

// Inside a parallel region of torch's, and in a child of fork(), a loop on the calling thread.
[[nodiscard]] ParallelFor torch_threads();

// Ends the threads that wait for the next parallel region of the calling thread, if it has any; that region starts
// others.
//
// GNU's OpenMP runtime, which torch's wheels for Linux come with, keeps a team for every thread that has computed in
// parallel. As long as all teams together are more than the processors, no thread waits actively: each region of each
// team begins and ends with a wake by the kernel. A thread that is done with computing should not hold others back so.
void release_threads();

}  // namespace sida
