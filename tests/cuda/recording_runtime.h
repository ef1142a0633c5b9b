// A CUDA runtime that records what is asked of it and then executes it in every order that streams, events and the
// host's waits allow.
//
// Each recorded operation knows which operations are ordered before it. Two operations that touch the same bytes, one
// of them writing, without such an order are a hazard, whatever order a run happens to take; replays show what the
// hazard does to the values. Host actions (writes into pinned memory, giving memory back) are operations too.
//
// May be called from several threads. What a thread enqueues, or gives back, comes after what that thread has waited
// for; another thread's waits count only for the host's own reads and writes, which happen at once and therefore after
// every wait that has returned and before everything that is enqueued later.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
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
  static constexpr size_t page_bytes = 4096;

  explicit Recording(uint64_t seed);
  Recording(uint64_t seed, const Memory& memory);
  ~Recording();
  Recording(const Recording&) = delete;

  // The table whose functions record here; only the newest Recording is called.
  const cuda::RuntimeTable& table() const;

  // Executes every operation as soon as it is recorded too: one legal order, and the values that the host reads.
  bool eager = false;
  // Whether pinned memory's bytes are kept for replays, and who fills it tells so (host_fill), or read where they lie.
  bool replayed = true;
  // A copy to the device from memory that is not pinned is a problem.
  bool pinned_only = false;
  int devices = 1;
  int compute_capability = 80;
  int numa_node = -1;  // that the devices are near to
  // The next calls of `call` fail with this status: as many as are asked for, after letting `after` of them pass.
  void fail(const std::string& call, int status, int times = 1, int after = 0);
  // The calling thread captures `stream` into a graph, as torch does it: until the end, a call of any thread that might
  // wait for or allocate something is a problem, unless that thread ignores captures; so is any on the captured stream.
  void begin_capture(cuda::Stream stream);
  void end_capture();

  // A kernel: reads and writes these ranges; `body` runs in every replay.
  void kernel(cuda::Stream stream, std::vector<Range> reads, std::vector<Range> writes, std::function<void()> body);
  // The host fills pinned memory: with one value, or with the bytes of a record, which must outlive the recording.
  void host_write(void* target, uint8_t value, size_t bytes);
  void host_fill(void* target, const void* record, size_t bytes);
  cuda::Stream user_stream();  // of the test's own; not counted as a leak
  // The test destroys its stream and makes one, which gets the same handle: what was enqueued before is not over.
  void make_anew(cuda::Stream user_stream);

  // Ends the recording: what was not given back becomes a problem.
  void finish();
  const std::vector<std::string>& problems() const { return problems_; }

  // Executes everything in one random legal order.
  void replay(uint64_t seed);
  // Executes every legal order, `most` at the most, calling `after` behind each; returns their number.
  size_t replay_all(size_t most, const std::function<void()>& after);

  size_t calls(const std::string& name) const;
  size_t all_calls() const;  // of the runtime; kernels and the host's own reads and writes are none
  size_t operations() const { return operations_.size(); }
  size_t pinned_bytes() const;  // now, allocated and registered

 private:
  friend struct RecordingTable;
  // Who waits for what: what a device does, what the host does with its own hands, what a host thread has waited for,
  // and what the host gives back.
  enum class Side { device, host_access, host_wait, host_return };
  struct Operation {
    std::string what;
    std::vector<size_t> after;  // direct predecessors
    std::vector<bool> before;   // all operations ordered before this one
    std::vector<Range> reads, writes;
    std::function<void()> body;
  };
  struct Failing {
    int status, times, after;
  };
  struct Registered {
    size_t bytes;
    std::unique_ptr<unsigned char[]> bytes_of_replay;  // the memory itself is gone by then
  };

  size_t add(const std::string& what, cuda::Stream stream, Side side, std::vector<size_t> after,
             std::vector<Range> reads, std::vector<Range> writes, std::function<void()> body);
  void problem(const std::string& what) { problems_.push_back(what); }
  bool known_stream(cuda::Stream stream, const char* call);
  bool known_event(cuda::Event event, const char* call);
  void check_capture(const std::string& call);
  void check_mapped(const std::string& what, const std::vector<Range>& ranges);
  bool is_pinned(const void* memory, size_t bytes) const;
  // Where a pinned address's bytes are kept.
  void* kept(const void* memory) const;
  int status_of(const char* call);
  void all_orders(std::vector<size_t>& order, std::vector<int>& missing, size_t most, size_t& count,
                  const std::function<void()>& after);
  void execute(const std::vector<size_t>& order);

  mutable std::recursive_mutex mutex_;
  std::mt19937_64 random_;
  Memory device_;
  cuda::Stream captured_ = nullptr;
  std::thread::id capturing_thread_;
  std::set<std::thread::id> ignoring_;  // captures of other threads
  std::vector<Operation> operations_;
  std::map<cuda::Stream, long> last_of_stream_;  // -1: none yet
  std::map<cuda::Event, long> recorded_;         // the operation that the event stands behind; -1: never recorded
  std::map<cuda::Stream, uint64_t> number_of_stream_;
  uint64_t last_stream_ = 0;
  std::set<cuda::Stream> user_streams_;
  std::map<void*, size_t> reserved_;
  std::set<void*> mapped_;                    // pages
  std::map<void*, size_t> pinned_;            // allocated
  std::map<const void*, Registered> shadow_;  // of registered memory, kept after it was given back
  std::set<const void*> registered_;          // now
  std::vector<void*> to_free_, to_free_host_;
  std::vector<Range> memory_;  // all memory ever touched, poisoned before a replay
  std::map<std::string, size_t> calls_;
  std::map<std::string, Failing> failing_;
  std::vector<std::string> problems_;
  std::map<std::thread::id, long> last_wait_;
  std::vector<size_t> waits_since_access_;
  long last_access_ = -1;  // of the host to memory
  bool replaying_ = false;
  uintptr_t next_handle_ = 16;
};

}  // namespace sida::cuda_test
