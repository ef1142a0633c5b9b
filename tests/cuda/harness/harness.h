// Executes CUDA kernels, compiled as host C++, thread by thread with the semantics that the GPU gives them, and stops
// at the first thing that the GPU would leave undefined.
//
// Threads are fibres; a warp's lanes and a block's warps run in a random order between their synchronisation points,
// and so do the blocks, up to three of them at the same time. Every memory access reaches the harness, because the
// kernels are compiled with -fsanitize=thread and linked with our own callbacks. Accesses to the emulated global memory
// are checked for bounds, alignment, initialisation and read-only buffers; accesses to shared memory for bounds,
// alignment, initialisation, copies in flight and races. A race is found from what the barriers order (epochs), so it
// does not depend on the schedule of the run that shows it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace sida::harness {

// The kinds of mistakes, as the first word of a KernelError's message.
enum class Fault {
  race,             // two threads touch a shared address, one writes, nothing orders them
  uninitialised,    // read of shared or global memory that nobody wrote
  out_of_bounds,    // outside every buffer, or outside the block's shared memory
  read_only,        // write to an input
  misaligned,       // vector access at an address that is no multiple of its size
  copy_in_flight,   // access to the target of a cp.async that was not waited for
  global_conflict,  // two blocks touch a global address, one writes, no fence and atomic order them
  divergence,       // lanes or threads disagree about a synchronisation, or some never come
};

const char* fault_name(Fault fault);

class KernelError : public std::runtime_error {
 public:
  KernelError(Fault fault, const std::string& what) : std::runtime_error(what), fault_(fault) {}
  Fault fault() const { return fault_; }

 private:
  Fault fault_;
};

struct Index {
  unsigned x, y, z;
};

struct Thread {
  Index index;
};

struct Launch {
  Index block, threads, blocks;
};

const Thread& current_thread();
const Launch& current_launch();
int lane();

// Runs `body`, which calls `kernel`, for every thread of every block, blocks in a random order of the present seed and
// some of them at the same time. Throws KernelError.
void launch(const std::function<void()>& body, unsigned blocks, unsigned threads, size_t shared_bytes, const char* name,
            const void* kernel);

// Until the next seed(): blocks run one after another, in the order that `rearrange` makes of 0, 1, 2, ...
void order_blocks(std::function<void(std::vector<unsigned>& order)> rearrange);

// Seeds the schedule of all later launches.
void seed(uint64_t value);

// Kernels launched since the last call, in order, joined by commas.
std::string launched();

// Entry points of all kernels launched so far in this process.
const std::set<const void*>& launched_kernels();

// What each launch since the last call did.
struct LaunchCounts {
  std::string name;
  int64_t blocks, threads, shared_bytes;
  int64_t bytes_read, bytes_written;  // distinct bytes of global memory, in whole words of four
  int64_t mma;                        // of m16n8k16, by the whole warp
};
std::vector<LaunchCounts> launch_counts();

// ldmatrix phases (eight rows each) since the last call in which two rows lay in the same banks, and all phases.
struct BankConflicts {
  int64_t conflicts, phases;
};
BankConflicts bank_conflicts();

// Emulated global memory. Guard zones lie between buffers; a new buffer's bytes are uninitialised.
void* global_allocate(size_t bytes, size_t misalignment = 0);
void global_fill(void* target, const void* source, size_t bytes);  // from the host: marks the bytes initialised
void global_read_only(void* begin, size_t bytes);
void global_reset();                 // frees everything
void global_capacity(size_t bytes);  // of all buffers together, 64 MiB at first; frees everything

// For tests that also run on a device (device_backend.cpp): why this backend cannot run, or null, and the wait before
// the host reads results. Here kernels run at once.
const char* unavailable();
void finish();

// What the shim's names call.
void vector_access(const void* address, size_t bytes);  // its alignment, if it lies in emulated memory
void block_barrier();
void warp_barrier(unsigned mask);
void thread_fence();
uint32_t shuffle(unsigned mask, uint32_t bits, int source);
unsigned match_any(unsigned mask, int key);
unsigned ballot(unsigned mask, bool predicate);
int atomic_add(int* address, int value);
int atomic_min(int* address, int value);
unsigned char* shared_memory();
void cp_async16(void* shared, const void* global, bool inside);
void cp_async_commit();
void cp_async_wait(int newest);
void ldmatrix4(uint32_t (&fragment)[4], const void* shared_row);
void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16);

}  // namespace sida::harness
