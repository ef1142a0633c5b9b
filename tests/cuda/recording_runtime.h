// A CUDA runtime that records what is asked of it and then executes it in every order that streams, events and the
// host's waits allow.
//
// Each recorded operation knows which operations are ordered before it. Two operations that touch the same bytes, one
// of them writing, without such an order are a hazard, whatever order a run happens to take; replays show what the
// hazard does to the values. Host actions (writes into pinned memory, frees) are operations too.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "device/cuda_runtime_table.h"

namespace sida::cuda_test {

struct Range {
  const void* begin;
  size_t bytes;
};

// Where the device's memory lies, for tests whose kernels need the harness's.
struct Memory {
  void* (*allocate)(size_t bytes);
  void (*free)(void* memory);
  void (*copy)(void* target, const void* source, size_t bytes);
};

class Recording {
 public:
  explicit Recording(uint64_t seed);
  Recording(uint64_t seed, const Memory& memory);
  ~Recording();
  Recording(const Recording&) = delete;

  // The table whose functions record here; one Recording exists at a time.
  const cuda::RuntimeTable& table() const;

  // A kernel: reads and writes these ranges; `body` runs in every replay.
  void kernel(cuda::Stream stream, std::vector<Range> reads, std::vector<Range> writes, std::function<void()> body);
  // The host fills pinned memory: with one value, or with the bytes of a record, which must outlive the recording.
  void host_write(void* target, uint8_t value, size_t bytes);
  void host_read(void* target, const void* record, size_t bytes);
  cuda::Stream user_stream();  // of the test's own; not counted as a leak

  // Ends the recording: what was not given back becomes a problem.
  void finish();
  const std::vector<std::string>& problems() const { return problems_; }

  // Executes everything in one random legal order.
  void replay(uint64_t seed);
  // Executes every legal order, `most` at the most, calling `after` behind each; returns their number.
  size_t replay_all(size_t most, const std::function<void()>& after);

  size_t calls(const std::string& name) const;
  size_t operations() const { return operations_.size(); }

 private:
  friend struct RecordingTable;
  struct Operation {
    std::string what;
    std::vector<size_t> after;  // direct predecessors
    std::vector<bool> before;   // all operations ordered before this one
    std::vector<Range> reads, writes;
    std::function<void()> body;
  };

  size_t add(const std::string& what, cuda::Stream stream, bool on_host, std::vector<size_t> after,
             std::vector<Range> reads, std::vector<Range> writes, std::function<void()> body);
  void problem(const std::string& what) { problems_.push_back(what); }
  bool known_stream(cuda::Stream stream, const char* call);
  bool known_event(cuda::Event event, const char* call);
  void all_orders(std::vector<size_t>& order, std::vector<int>& missing, size_t most, size_t& count,
                  const std::function<void()>& after);
  void execute(const std::vector<size_t>& order);

  std::mt19937_64 random_;
  Memory device_;
  std::vector<Operation> operations_;
  std::map<cuda::Stream, long> last_of_stream_;  // -1: none yet
  std::map<cuda::Event, long> recorded_;         // the operation that the event stands behind; -1: never recorded
  std::set<cuda::Stream> user_streams_;
  std::map<void*, size_t> allocated_;
  std::vector<void*> freed_;   // given back to the system at the end
  std::vector<Range> memory_;  // all memory ever touched, poisoned before a replay
  std::map<std::string, size_t> calls_;
  std::vector<std::string> problems_;
  long last_of_host_ = -1;
  uintptr_t next_handle_ = 16;
};

}  // namespace sida::cuda_test
