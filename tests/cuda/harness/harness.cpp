// The fibres and their schedule, the warp's collective operations, cp.async, and the callbacks through which the
// compiler reports every memory access of a kernel.
#include "harness/harness.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "harness/half.h"
#include "harness/memory.h"

#if !defined(__x86_64__)
#error "the harness switches fibres by hand and knows x86-64 only"
#endif

// Saves the callee-saved registers and the stack pointer in *save, and continues where `resume` was saved.
extern "C" void sida_switch(void** save, void* resume);
asm(R"(
.text
.globl sida_switch
.type sida_switch, @function
sida_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sida_switch, .-sida_switch
)");

namespace sida::harness {
namespace {

constexpr size_t stack_bytes = 64 * 1024;
constexpr int most_threads = 1024;

enum class State { ready, at_block_barrier, at_warp_operation, ended };

struct Copy {
  void* shared;
  const void* global;
  bool inside;
  const void* site;
};

struct Fibre {
  Thread thread;
  State state = State::ended;
  void* stack_pointer = nullptr;
  const void* site = nullptr;  // where it waits
  bool unfenced = false;       // wrote global memory since its last fence
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

// A collective operation of a warp that some lanes have reached.
struct Collective {
  int kind = 0;
  unsigned mask = 0, arrived = 0;
  std::array<void*, 32> operand{};
};

// One block on its way, with shared memory and stacks of its own.
struct Block {
  SharedShadow shared;
  BlockView view;
  std::vector<Fibre> fibres{most_threads};
  std::array<Collective, most_threads / 32> warps;
  std::array<uint32_t, most_threads / 32> warp_epoch{};
  uint32_t block_epoch = 1;
  Index index{};
  bool done = true;
  unsigned char* stacks = nullptr;

  Block() {
    void* const range = mmap(nullptr, stack_bytes * most_threads, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) throw std::runtime_error("harness: mmap of the fibres' stacks failed");
    stacks = static_cast<unsigned char*>(range);
  }
};

constexpr size_t most_blocks = 3;  // at the same time

struct Machine {
  std::unique_ptr<GlobalShadow> global = std::make_unique<GlobalShadow>(size_t{64} << 20);
  std::array<Block, most_blocks> resident;
  Block* block = resident.data();  // the one that runs
  Launch launch{};
  const std::function<void()>* body = nullptr;
  Fibre* running = nullptr;
  void* scheduler_stack = nullptr;
  std::mt19937_64 random{1};
  std::function<void(std::vector<unsigned>&)> rearrange;
  std::string kernel_name, launched;
  std::set<const void*> kernels;
  std::vector<LaunchCounts> counts;
  int64_t mma = 0;
  std::unique_ptr<KernelError> error;
  int threads = 0;
  BankConflicts bank_conflicts{};
};

Machine& machine() {
  static Machine one;
  return one;
}

int running_thread() {
  return static_cast<int>(machine().running->thread.index.x);
}

Moment now(const void* site, int thread) {
  return {thread, machine().block->block_epoch, machine().block->warp_epoch[static_cast<size_t>(thread / 32)], site};
}

void switch_to_scheduler() {
  Machine& m = machine();
  sida_switch(&m.running->stack_pointer, m.scheduler_stack);
}

void wait_as(State state, const void* site) {
  machine().running->state = state;
  machine().running->site = site;
  switch_to_scheduler();
}

extern "C" void sida_fibre_main() {
  Machine& m = machine();
  (*m.body)();
  if (!m.running->open_group.empty() || !m.running->groups.empty()) {
    report(Fault::copy_in_flight, "a thread ends with cp.async groups that it never waited for", nullptr);
  }
  m.running->state = State::ended;
  switch_to_scheduler();
  std::abort();  // an ended fibre is never resumed
}

// `file:line` of a place in the kernel and of what it is inlined into, innermost first.
std::string source_line(const void* site) {
  if (site == nullptr) return "";
  char command[256];
  std::snprintf(command, sizeof command, "addr2line -i -s -e /proc/%d/exe %p 2>/dev/null", static_cast<int>(getpid()),
                static_cast<const void*>(static_cast<const char*>(site) - 1));
  std::string text;
  if (FILE* const pipe = popen(command, "r")) {
    char line[512];
    while (std::fgets(line, sizeof line, pipe) != nullptr) {
      std::string place(line);
      place.erase(std::find(place.begin(), place.end(), '\n'), place.end());
      text += (text.empty() ? "" : " < ") + place.substr(0, place.find(" ("));
    }
    pclose(pipe);
  }
  return text.empty() ? "unknown place (is addr2line installed?)" : text;
}

// Runs when the last lane of the mask has come: `operand` holds every lane's argument.
using CollectiveBody = void (*)(const std::array<void*, 32>& operand, unsigned mask);

void warp_collective(int kind, unsigned mask, void* operand, const void* site, CollectiveBody body) {
  Machine& m = machine();
  const int thread = running_thread();
  Collective& c = m.block->warps[static_cast<size_t>(thread / 32)];
  if ((mask >> (thread % 32) & 1) == 0) report(Fault::divergence, "a lane is not in the mask that it names", site);
  if (c.arrived == 0) {
    c.kind = kind;
    c.mask = mask;
  } else if (c.kind != kind || c.mask != mask) {
    const int other = thread / 32 * 32 + __builtin_ctz(c.arrived);
    report(Fault::divergence, "lanes of one warp meet at different operations or with different masks", site,
           m.block->fibres[static_cast<size_t>(other)].site);
  }
  c.arrived |= 1u << (thread % 32);
  c.operand[static_cast<size_t>(thread % 32)] = operand;
  if (c.arrived != mask) {
    wait_as(State::at_warp_operation, site);
    return;
  }
  body(c.operand, mask);
  c.arrived = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) m.block->fibres[static_cast<size_t>(thread / 32 * 32 + lane)].state = State::ready;
  }
}

void release_block_barrier() {
  Machine& m = machine();
  for (int i = 0; i < m.threads; ++i) m.block->fibres[static_cast<size_t>(i)].state = State::ready;
  ++m.block->block_epoch;
}

void run_fibre(Fibre& fibre) {
  Machine& m = machine();
  m.running = &fibre;
  sida_switch(&m.scheduler_stack, fibre.stack_pointer);
  m.running = nullptr;
  if (m.error != nullptr) throw *m.error;
}

// The scheduler runs on the test's own stack.
void start_fibre(int thread) {
  Machine& m = machine();
  Fibre& fibre = m.block->fibres[static_cast<size_t>(thread)];
  fibre.thread = {{static_cast<unsigned>(thread), 0, 0}};
  fibre.state = State::ready;
  fibre.unfenced = false;
  fibre.open_group.clear();
  fibre.groups.clear();
  auto* top = reinterpret_cast<void**>(m.block->stacks + stack_bytes * static_cast<size_t>(thread + 1));
  // As if sida_fibre_main had been called: the stack is 16-byte aligned before its return address is pushed.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&sida_fibre_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fibre.stack_pointer = top;
}

void stop_stuck_block() {
  Machine& m = machine();
  int ended = 0;
  const Fibre* waiting = nullptr;
  const Fibre* other = nullptr;
  for (int i = 0; i < m.threads; ++i) {
    const Fibre& fibre = m.block->fibres[static_cast<size_t>(i)];
    if (fibre.state == State::ended) {
      ++ended;
    } else if (waiting == nullptr) {
      waiting = &fibre;
    } else if (fibre.site != waiting->site && other == nullptr) {
      other = &fibre;
    }
  }
  const std::string what = ended > 0
                               ? std::to_string(ended) + " threads ended while others wait for the whole block or warp"
                               : "threads of one block wait at different synchronisations for each other";
  throw KernelError(Fault::divergence, "divergence in " + m.kernel_name + ": " + what + "\n  waiting at " +
                                           source_line(waiting->site) +
                                           (other != nullptr ? "\n  and at " + source_line(other->site) : ""));
}

void start_block(unsigned number, size_t shared_bytes) {
  Machine& m = machine();
  Block& b = *m.block;
  b.index = {number, 0, 0};
  b.view = {static_cast<int>(number), 0, {}};
  b.done = false;
  b.shared.start_block(shared_bytes);
  ++b.block_epoch;
  for (auto& collective : b.warps) collective.arrived = 0;
  for (int i = 0; i < m.threads; ++i) start_fibre(i);
}

// Lets every warp of the running block go on for a while, and the block over its barrier if all have come.
void run_round() {
  Machine& m = machine();
  Block& b = *m.block;
  std::array<int, most_threads / 32> warps;
  const auto warp_count = static_cast<size_t>(m.threads / 32);
  for (size_t warp = 0; warp < warp_count; ++warp) warps[warp] = static_cast<int>(warp);
  std::shuffle(warps.begin(), warps.begin() + warp_count, m.random);
  bool ran = false, all_ended = true, all_at_barrier = true;
  for (size_t w = 0; w < warp_count; ++w) {
    // Some warps run far ahead of others: they go on while they can.
    const int rounds = 1 + static_cast<int>(m.random() % 8);
    for (int round = 0; round < rounds; ++round) {
      bool warp_ran = false;
      const unsigned rotate = static_cast<unsigned>(m.random() % 32);
      const unsigned stride = static_cast<unsigned>(m.random() % 16) * 2 + 1;  // odd: every lane once
      for (unsigned i = 0; i < 32; ++i) {
        Fibre& fibre = b.fibres[static_cast<size_t>(warps[w] * 32) + (i * stride + rotate) % 32];
        if (fibre.state == State::ready) {
          run_fibre(fibre);
          warp_ran = true;
        }
      }
      if (!warp_ran) break;
      ran = true;
    }
  }
  for (int i = 0; i < m.threads; ++i) {
    const State state = b.fibres[static_cast<size_t>(i)].state;
    all_ended = all_ended && state == State::ended;
    all_at_barrier = all_at_barrier && state == State::at_block_barrier;
  }
  b.done = all_ended;
  if (all_ended) return;
  if (all_at_barrier) {
    release_block_barrier();
  } else if (!ran) {
    stop_stuck_block();
  }
}

void run_blocks(const std::vector<unsigned>& order, size_t at_once, size_t shared_bytes) {
  Machine& m = machine();
  size_t next = 0, ended = 0;
  for (Block& block : m.resident) block.done = true;
  while (ended < order.size()) {
    m.block = &m.resident[at_once == 1 ? 0 : m.random() % at_once];
    m.global->run_as(&m.block->view);
    if (m.block->done) {
      if (next == order.size()) continue;
      start_block(order[next++], shared_bytes);
    }
    m.launch.block = m.block->index;
    run_round();
    if (m.block->done) ++ended;
  }
}

struct ShuffleOperand {
  uint32_t bits, result;
  int source;
};

struct MatrixOperand {
  const void* row;
  uint32_t* fragment;
  int thread;
  const void* site;
};

struct MmaOperand {
  float* sums;
  const uint32_t* a;
  uint32_t b[2];
  const float* widen;  // table of all 65536 values of the element type
};

const float* widening_table(bool is_bf16) {
  static const auto tables = [] {
    auto both = std::make_unique<std::array<std::array<float, 65536>, 2>>();
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      (*both)[0][bits] = f16_to_float(static_cast<uint16_t>(bits));
      (*both)[1][bits] = bf16_to_float(static_cast<uint16_t>(bits));
    }
    return both;
  }();
  return (*tables)[is_bf16 ? 1 : 0].data();
}

// The fragments of PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": with group = lane / 4 and
// pair = lane % 4, A's element i lies in row group (i in 0, 1, 4, 5) or group + 8, column 2 * pair + i % 2, + 8 from
// i = 4 on; B's element i in row 2 * pair + i % 2, + 8 from i = 2 on, column group; C's element i in row group, + 8
// from i = 2 on, column 2 * pair + i % 2.
void mma_body(const std::array<void*, 32>& operand, unsigned) {
  ++machine().mma;
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<MmaOperand*>(operand[static_cast<size_t>(lane)]);
    const int group = lane / 4, pair = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i % 4 < 2 ? group : group + 8;
      const int column = pair * 2 + i % 2 + (i >= 4 ? 8 : 0);
      a[row][column] = own.widen[(own.a[i / 2] >> (i % 2 * 16)) & 0xFFFF];
    }
    for (int i = 0; i < 4; ++i) {
      b[group][pair * 2 + i % 2 + (i >= 2 ? 8 : 0)] = own.widen[(own.b[i / 2] >> (i % 2 * 16)) & 0xFFFF];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<MmaOperand*>(operand[static_cast<size_t>(lane)]);
    for (int i = 0; i < 4; ++i) {
      const float* row = a[lane / 4 + (i >= 2 ? 8 : 0)];
      const float* column = b[lane % 4 * 2 + i % 2];
      // The order inside one instruction is the hardware's own; the products are exact and the sum is rounded once.
      double sum = own.sums[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(row[k]) * column[k];
      own.sums[i] = static_cast<float>(sum);
    }
  }
}

// PTX ISA, ldmatrix: lane l names row l % 8 of matrix l / 8; lane l receives from each matrix, of row l / 4, the two
// 16-bit elements that begin at 2 * (l % 4).
void ldmatrix_body(const std::array<void*, 32>& operand, unsigned) {
  uint32_t words[32][4];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<MatrixOperand*>(operand[static_cast<size_t>(lane)]);
    machine().block->shared.read(own.row, 16, now(own.site, own.thread));
    std::memcpy(words[lane], own.row, 16);
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    // A row is 16 bytes, four of the 32 banks: eight rows are free of conflicts if they fall into eight places.
    unsigned places = 0;
    for (int row = 0; row < 8; ++row) {
      const auto& own = *static_cast<MatrixOperand*>(operand[static_cast<size_t>(matrix * 8 + row)]);
      places |= 1u << (reinterpret_cast<uintptr_t>(own.row) / 16 % 8);
    }
    ++machine().bank_conflicts.phases;
    if (places != 0xff) ++machine().bank_conflicts.conflicts;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<MatrixOperand*>(operand[static_cast<size_t>(lane)]);
    for (int matrix = 0; matrix < 4; ++matrix) own.fragment[matrix] = words[matrix * 8 + lane / 4][lane % 4];
  }
}

void shuffle_body(const std::array<void*, 32>& operand, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto& own = *static_cast<ShuffleOperand*>(operand[static_cast<size_t>(lane)]);
    if ((mask >> own.source & 1) == 0)
      report(Fault::divergence, "a shuffle reads a lane that is not in its mask", nullptr);
    own.result = static_cast<ShuffleOperand*>(operand[static_cast<size_t>(own.source)])->bits;
  }
}

void match_body(const std::array<void*, 32>& operand, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto& own = *static_cast<ShuffleOperand*>(operand[static_cast<size_t>(lane)]);
    own.result = 0;
    for (int other = 0; other < 32; ++other) {
      if ((mask >> other & 1) != 0 &&
          static_cast<ShuffleOperand*>(operand[static_cast<size_t>(other)])->bits == own.bits) {
        own.result |= 1u << other;
      }
    }
  }
}

void ballot_body(const std::array<void*, 32>& operand, unsigned mask) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && static_cast<ShuffleOperand*>(operand[static_cast<size_t>(lane)])->bits != 0) {
      votes |= 1u << lane;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) static_cast<ShuffleOperand*>(operand[static_cast<size_t>(lane)])->result = votes;
  }
}

void warp_barrier_body(const std::array<void*, 32>&, unsigned mask) {
  // Only a barrier of the whole warp orders its memory accesses here; a part of it orders less than we would claim.
  if (mask == 0xffffffffu) ++machine().block->warp_epoch[static_cast<size_t>(running_thread() / 32)];
}

bool on_the_stacks(const void* address) {
  const Machine& m = machine();
  return address >= m.block->stacks && address < m.block->stacks + stack_bytes * most_threads;
}

enum class Access { read, write };

void access(Access kind, const void* address, size_t bytes, const void* site) {
  Machine& m = machine();
  if (m.running == nullptr || bytes == 0 || on_the_stacks(address)) return;
  if (m.block->shared.holds(address)) {
    if (kind == Access::read) {
      m.block->shared.read(address, bytes, now(site, running_thread()));
    } else {
      m.block->shared.write(address, bytes, now(site, running_thread()));
    }
  } else if (m.global->holds(address)) {
    if (kind == Access::read) {
      m.global->read(address, bytes, site);
    } else {
      m.global->write(address, bytes, site);
      m.running->unfenced = true;
    }
  } else if (kind == Access::write || reinterpret_cast<uintptr_t>(address) < 4096) {
    // Reads elsewhere are of the program's constants and of the launch's parameters; nothing may be written there.
    report(Fault::out_of_bounds,
           kind == Access::write ? "write outside global, shared and local memory" : "read of a null pointer", site);
  }
}

bool block_is_fenced() {
  const Machine& m = machine();
  return std::none_of(m.block->fibres.begin(), m.block->fibres.begin() + m.threads,
                      [](const Fibre& f) { return f.unfenced; });
}

}  // namespace

const char* fault_name(Fault fault) {
  switch (fault) {
    case Fault::race:
      return "race";
    case Fault::uninitialised:
      return "uninitialised";
    case Fault::out_of_bounds:
      return "out_of_bounds";
    case Fault::read_only:
      return "read_only";
    case Fault::misaligned:
      return "misaligned";
    case Fault::copy_in_flight:
      return "copy_in_flight";
    case Fault::global_conflict:
      return "global_conflict";
    case Fault::divergence:
      return "divergence";
  }
  return "unknown";
}

void report(Fault fault, const std::string& what, const void* first, const void* second) {
  Machine& m = machine();
  std::string text = std::string(fault_name(fault)) + " in " + m.kernel_name + ", block " +
                     std::to_string(m.launch.block.x) +
                     (m.running != nullptr ? ", thread " + std::to_string(running_thread()) : "") + ": " + what;
  if (first != nullptr) text += "\n  at " + source_line(first);
  if (second != nullptr) text += "\n  and at " + source_line(second);
  if (m.running == nullptr) throw KernelError(fault, text);
  // A fibre cannot unwind into the scheduler: it leaves the error there and is never resumed.
  m.error = std::make_unique<KernelError>(fault, text);
  switch_to_scheduler();
  std::abort();
}

const Thread& current_thread() {
  return machine().running->thread;
}
const Launch& current_launch() {
  return machine().launch;
}
int lane() {
  return running_thread() % 32;
}
const char* unavailable() {
  return nullptr;
}
void finish() {}
BankConflicts bank_conflicts() {
  return std::exchange(machine().bank_conflicts, BankConflicts{});
}
void seed(uint64_t value) {
  machine().random.seed(value);
  machine().rearrange = nullptr;
}
void order_blocks(std::function<void(std::vector<unsigned>& order)> rearrange) {
  machine().rearrange = std::move(rearrange);
}
std::string launched() {
  return std::exchange(machine().launched, "");
}
const std::set<const void*>& launched_kernels() {
  return machine().kernels;
}
std::vector<LaunchCounts> launch_counts() {
  return std::exchange(machine().counts, {});
}

void launch(const std::function<void()>& body, unsigned blocks, unsigned threads, size_t shared_bytes, const char* name,
            const void* kernel) {
  Machine& m = machine();
  if (blocks == 0 || threads == 0 || threads > most_threads || threads % 32 != 0 ||
      shared_bytes > SharedShadow::capacity) {
    throw std::runtime_error(std::string("harness: ") + name + " has a launch shape that no device takes");
  }
  m.error = nullptr;
  m.kernel_name = name;
  m.launched += (m.launched.empty() ? "" : ",") + m.kernel_name;
  m.kernels.insert(kernel);
  m.body = &body;
  m.threads = static_cast<int>(threads);
  m.launch = {{0, 0, 0}, {threads, 1, 1}, {blocks, 1, 1}};
  m.global->start_launch(blocks);
  m.mma = 0;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  size_t at_once = 1;
  if (m.rearrange) {
    m.rearrange(order);
  } else {
    std::shuffle(order.begin(), order.end(), m.random);
    at_once = 1 + m.random() % most_blocks;
  }
  try {
    run_blocks(order, at_once, shared_bytes);
  } catch (...) {
    m.running = nullptr;
    throw;
  }
  m.counts.push_back({name, blocks, threads, static_cast<int64_t>(shared_bytes), m.global->bytes_read(),
                      m.global->bytes_written(), m.mma});
}

void* global_allocate(size_t bytes, size_t misalignment) {
  return machine().global->allocate(bytes, misalignment);
}
void global_fill(void* target, const void* source, size_t bytes) {
  machine().global->fill(target, source, bytes);
}
void global_read_only(void* begin, size_t bytes) {
  machine().global->read_only(begin, bytes);
}
void global_reset() {
  machine().global->reset();
}
void global_capacity(size_t bytes) {
  machine().global = std::make_unique<GlobalShadow>(bytes);
}

unsigned char* shared_memory() {
  return machine().block->shared.base();
}
void vector_access(const void* address, size_t bytes) {
  const Machine& m = machine();
  if (m.running == nullptr || reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  if (m.block->shared.holds(address) || m.global->holds(address)) {
    report(Fault::misaligned, "vector access of " + std::to_string(bytes) + " bytes is not aligned to them",
           __builtin_return_address(0));
  }
}

void thread_fence() {
  machine().running->unfenced = false;
}

void block_barrier() {
  wait_as(State::at_block_barrier, __builtin_return_address(0));
}

void warp_barrier(unsigned mask) {
  warp_collective(1, mask, nullptr, __builtin_return_address(0), warp_barrier_body);
}

uint32_t shuffle(unsigned mask, uint32_t bits, int source) {
  ShuffleOperand own{bits, 0, source};
  warp_collective(2, mask, &own, __builtin_return_address(0), shuffle_body);
  return own.result;
}

unsigned match_any(unsigned mask, int key) {
  ShuffleOperand own{static_cast<uint32_t>(key), 0, 0};
  warp_collective(3, mask, &own, __builtin_return_address(0), match_body);
  return own.result;
}

unsigned ballot(unsigned mask, bool predicate) {
  ShuffleOperand own{predicate ? 1u : 0u, 0, 0};
  warp_collective(4, mask, &own, __builtin_return_address(0), ballot_body);
  return own.result;
}

void ldmatrix4(uint32_t (&fragment)[4], const void* shared_row) {
  MatrixOperand own{shared_row, fragment, running_thread(), __builtin_return_address(0)};
  if (!machine().block->shared.holds(shared_row)) {
    report(Fault::out_of_bounds, "ldmatrix of an address outside shared memory", own.site);
  }
  warp_collective(5, 0xffffffffu, &own, own.site, ldmatrix_body);
}

void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16) {
  MmaOperand own{sums, a, {b0, b1}, widening_table(is_bf16)};
  warp_collective(is_bf16 ? 6 : 7, 0xffffffffu, &own, __builtin_return_address(0), mma_body);
}

void cp_async16(void* shared, const void* global, bool inside) {
  Machine& m = machine();
  const void* const site = __builtin_return_address(0);
  if (!m.block->shared.holds(shared))
    report(Fault::out_of_bounds, "cp.async to an address outside shared memory", site);
  if (!m.global->holds(global)) report(Fault::out_of_bounds, "cp.async from an address outside global memory", site);
  m.block->shared.start_copy(shared, 16, now(site, running_thread()));
  m.running->open_group.push_back({shared, global, inside, site});
}

void cp_async_commit() {
  Fibre& own = *machine().running;
  own.groups.push_back(std::move(own.open_group));
  own.open_group.clear();
}

// The data move as late as the rules allow: whoever relies on an earlier arrival is found out.
void cp_async_wait(int newest) {
  Machine& m = machine();
  Fibre& own = *m.running;
  while (own.groups.size() > static_cast<size_t>(newest)) {
    for (const Copy& copy : own.groups.front()) {
      if (copy.inside) {
        m.global->read(copy.global, 16, copy.site);
        std::memcpy(copy.shared, copy.global, 16);
      } else {
        std::memset(copy.shared, 0, 16);
      }
      m.block->shared.finish_copy(copy.shared, 16, now(copy.site, running_thread()));
    }
    own.groups.pop_front();
  }
}

// Atomics do not conflict with each other, and order the blocks' other accesses if a fence stands before them.
template <class Change>
int atomic_change(int* address, const void* site, Change change) {
  Machine& m = machine();
  if (m.global->holds(address)) {
    m.global->atomic(address, 4, block_is_fenced(), site);
  } else {
    access(Access::read, address, 4, site);
    access(Access::write, address, 4, site);
  }
  const int before = *address;
  *address = change(before);
  return before;
}

int atomic_add(int* address, int value) {
  return atomic_change(address, __builtin_return_address(0), [=](int before) { return before + value; });
}

int atomic_min(int* address, int value) {
  return atomic_change(address, __builtin_return_address(0), [=](int before) { return std::min(before, value); });
}

}  // namespace sida::harness

// What -fsanitize=thread makes the compiler call, in place of the sanitizer's own library.
#define SIDA_TSAN_ACCESS(bytes)                                                                       \
  void __tsan_read##bytes(void* address) {                                                            \
    sida::harness::access(sida::harness::Access::read, address, bytes, __builtin_return_address(0));  \
  }                                                                                                   \
  void __tsan_write##bytes(void* address) {                                                           \
    sida::harness::access(sida::harness::Access::write, address, bytes, __builtin_return_address(0)); \
  }                                                                                                   \
  void __tsan_unaligned_read##bytes(void* address) {                                                  \
    sida::harness::access(sida::harness::Access::read, address, bytes, __builtin_return_address(0));  \
  }                                                                                                   \
  void __tsan_unaligned_write##bytes(void* address) {                                                 \
    sida::harness::access(sida::harness::Access::write, address, bytes, __builtin_return_address(0)); \
  }

extern "C" {
SIDA_TSAN_ACCESS(1)
SIDA_TSAN_ACCESS(2)
SIDA_TSAN_ACCESS(4)
SIDA_TSAN_ACCESS(8)
SIDA_TSAN_ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) {
  sida::harness::access(sida::harness::Access::read, address, bytes, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  sida::harness::access(sida::harness::Access::write, address, bytes, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
