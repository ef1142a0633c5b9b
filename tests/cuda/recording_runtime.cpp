// Records runtime calls as a graph of operations and replays it.
#include "recording_runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace sida::cuda_test {
namespace {

Recording* current = nullptr;

bool overlap(const Range& a, const Range& b) {
  const auto* const a_begin = static_cast<const char*>(a.begin);
  const auto* const b_begin = static_cast<const char*>(b.begin);
  return a_begin < b_begin + b.bytes && b_begin < a_begin + a.bytes;
}

bool any_overlap(const std::vector<Range>& a, const std::vector<Range>& b) {
  return std::any_of(a.begin(), a.end(), [&](const Range& one) {
    return std::any_of(b.begin(), b.end(), [&](const Range& other) { return overlap(one, other); });
  });
}

}  // namespace

// The table's functions; a struct of its own so that it may see the recording.
struct RecordingTable {
  static constexpr int invalid = 1;

  static Recording& on(const char* call) {
    ++current->calls_[call];
    return *current;
  }
  static void* handle(Recording& r) { return reinterpret_cast<void*>(r.next_handle_ += 16); }

  static int set_device(int) { return 0; }
  static int device_alloc(void** memory, size_t bytes) {
    Recording& r = on("device_alloc");
    *memory = r.device_.allocate(bytes);
    r.allocated_[*memory] = bytes;
    r.memory_.push_back({*memory, bytes});
    return 0;
  }
  static int device_free(void* memory) {
    Recording& r = on("device_free");
    if (r.allocated_.count(memory) == 0) {
      r.problem("free of memory that is not allocated");
      return invalid;
    }
    // Freeing is a write of the host: everything that touches the memory must be over.
    r.add("free", nullptr, true, {}, {}, {{memory, r.allocated_[memory]}}, [] {});
    r.allocated_.erase(memory);
    r.freed_.push_back(memory);
    return 0;
  }
  static int stream_create(cuda::Stream* stream, int) {
    Recording& r = on("stream_create");
    *stream = handle(r);
    r.last_of_stream_[*stream] = -1;
    return 0;
  }
  static int stream_destroy(cuda::Stream stream) {
    Recording& r = on("stream_destroy");
    if (!r.known_stream(stream, "stream_destroy")) return invalid;
    r.last_of_stream_.erase(stream);
    return 0;
  }
  static int event_create(cuda::Event* event) {
    Recording& r = on("event_create");
    *event = handle(r);
    r.recorded_[*event] = -1;
    return 0;
  }
  static int event_destroy(cuda::Event event) {
    Recording& r = on("event_destroy");
    if (!r.known_event(event, "event_destroy")) return invalid;
    r.recorded_.erase(event);
    return 0;
  }
  static int event_record(cuda::Event event, cuda::Stream stream) {
    Recording& r = on("event_record");
    if (!r.known_event(event, "event_record") || !r.known_stream(stream, "event_record")) return invalid;
    r.recorded_[event] = static_cast<long>(r.add("record", stream, false, {}, {}, {}, [] {}));
    return 0;
  }
  static int stream_wait(cuda::Stream stream, cuda::Event event) {
    Recording& r = on("stream_wait");
    if (!r.known_event(event, "stream_wait") || !r.known_stream(stream, "stream_wait")) return invalid;
    if (r.recorded_[event] < 0) {
      r.problem("wait for an event that was never recorded");
      return 0;
    }
    // The wait is for what is recorded now, as the runtime has it: recording again later changes nothing.
    r.add("wait", stream, false, {static_cast<size_t>(r.recorded_[event])}, {}, {}, [] {});
    return 0;
  }
  static int event_query(cuda::Event event) {
    Recording& r = on("event_query");
    if (!r.known_event(event, "event_query")) return invalid;
    // Both answers are possible at any time; "done" orders what the host does next behind the event.
    if (r.recorded_[event] < 0) return 0;
    if (r.random_() % 2 == 0) return cuda::RuntimeTable::not_ready;
    r.add("query", nullptr, true, {static_cast<size_t>(r.recorded_[event])}, {}, {}, [] {});
    return 0;
  }
  static int event_synchronize(cuda::Event event) {
    Recording& r = on("event_synchronize");
    if (!r.known_event(event, "event_synchronize")) return invalid;
    if (r.recorded_[event] < 0) return 0;
    r.add("synchronize", nullptr, true, {static_cast<size_t>(r.recorded_[event])}, {}, {}, [] {});
    return 0;
  }
  static int copy_to_device(void* target, const void* source, size_t bytes, cuda::Stream stream) {
    Recording& r = on("copy_to_device");
    if (!r.known_stream(stream, "copy_to_device")) return invalid;
    r.add("copy", stream, false, {}, {{source, bytes}}, {{target, bytes}},
          [=, copy = r.device_.copy] { copy(target, source, bytes); });
    return 0;
  }
  static int copy_priority() { return 0; }
  static const char* error_text(int) { return "invalid handle"; }
};

Recording::Recording(uint64_t seed)
    : Recording(seed, {[](size_t bytes) { return std::malloc(bytes); }, [](void* memory) { std::free(memory); },
                       [](void* target, const void* source, size_t bytes) { std::memcpy(target, source, bytes); }}) {}

Recording::Recording(uint64_t seed, const Memory& memory) : random_(seed), device_(memory) {
  current = this;
}

Recording::~Recording() {
  for (void* const memory : freed_) device_.free(memory);
  for (const auto& [memory, bytes] : allocated_) device_.free(memory);
  current = nullptr;
}

const cuda::RuntimeTable& Recording::table() const {
  using T = RecordingTable;
  static const cuda::RuntimeTable functions{
      T::set_device,   T::device_alloc,   T::device_free,   T::stream_create, T::stream_destroy,
      T::event_create, T::event_destroy,  T::event_record,  T::event_query,   T::event_synchronize,
      T::stream_wait,  T::copy_to_device, T::copy_priority, T::error_text};
  return functions;
}

bool Recording::known_stream(cuda::Stream stream, const char* call) {
  if (stream == nullptr) {
    problem(std::string(call) + " on the default stream");
    last_of_stream_.emplace(nullptr, -1);
    user_streams_.insert(nullptr);
    return true;
  }
  if (last_of_stream_.count(stream) != 0) return true;
  problem(std::string(call) + " with a stream that does not exist (any more)");
  return false;
}

bool Recording::known_event(cuda::Event event, const char* call) {
  if (recorded_.count(event) != 0) return true;
  problem(std::string(call) + " with an event that does not exist (any more)");
  return false;
}

cuda::Stream Recording::user_stream() {
  cuda::Stream stream = nullptr;
  RecordingTable::stream_create(&stream, 0);
  user_streams_.insert(stream);
  return stream;
}

size_t Recording::add(const std::string& what, cuda::Stream stream, bool on_host, std::vector<size_t> after,
                      std::vector<Range> reads, std::vector<Range> writes, std::function<void()> body) {
  const size_t id = operations_.size();
  // Whatever the host does or asks for comes after what it has waited for.
  if (last_of_host_ >= 0) after.push_back(static_cast<size_t>(last_of_host_));
  if (!on_host && last_of_stream_[stream] >= 0) after.push_back(static_cast<size_t>(last_of_stream_[stream]));
  std::vector<bool> before(id, false);
  for (const size_t one : after) {
    before[one] = true;
    for (size_t i = 0; i < one; ++i) before[i] = before[i] || operations_[one].before[i];
  }
  for (size_t i = 0; i < id; ++i) {
    if (before[i]) continue;
    const Operation& other = operations_[i];
    if (any_overlap(writes, other.writes) || any_overlap(writes, other.reads) || any_overlap(reads, other.writes)) {
      problem(what + " (operation " + std::to_string(id) + ") is not ordered after " + other.what + " (operation " +
              std::to_string(i) + "), which touches the same bytes");
    }
  }
  operations_.push_back({what, after, before, std::move(reads), std::move(writes), std::move(body)});
  (on_host ? last_of_host_ : last_of_stream_[stream]) = static_cast<long>(id);
  return id;
}

void Recording::kernel(cuda::Stream stream, std::vector<Range> reads, std::vector<Range> writes,
                       std::function<void()> body) {
  ++calls_["kernel"];
  if (!known_stream(stream, "kernel")) return;
  memory_.insert(memory_.end(), writes.begin(), writes.end());
  add("kernel", stream, false, {}, std::move(reads), std::move(writes), std::move(body));
}

void Recording::host_write(void* target, uint8_t value, size_t bytes) {
  memory_.push_back({target, bytes});
  add("host write", nullptr, true, {}, {}, {{target, bytes}}, [=] { std::memset(target, value, bytes); });
}

void Recording::host_read(void* target, const void* record, size_t bytes) {
  memory_.push_back({target, bytes});
  add("host read", nullptr, true, {}, {}, {{target, bytes}}, [=] { std::memcpy(target, record, bytes); });
}

void Recording::finish() {
  for (const auto& [stream, last] : last_of_stream_) {
    if (user_streams_.count(stream) == 0) problem("a stream was never destroyed");
  }
  for (size_t i = 0; i < recorded_.size(); ++i) problem("an event was never destroyed");
  for (size_t i = 0; i < allocated_.size(); ++i) problem("device memory was never freed");
}

void Recording::execute(const std::vector<size_t>& order) {
  for (const Range& range : memory_) std::memset(const_cast<void*>(range.begin), 0xEE, range.bytes);
  for (const size_t id : order) operations_[id].body();
}

void Recording::replay(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int> missing(operations_.size());
  std::vector<std::vector<size_t>> followers(operations_.size());
  std::vector<size_t> ready, order;
  for (size_t i = 0; i < operations_.size(); ++i) {
    missing[i] = static_cast<int>(operations_[i].after.size());
    for (const size_t one : operations_[i].after) followers[one].push_back(i);
    if (missing[i] == 0) ready.push_back(i);
  }
  // Sometimes the newest first, which lets one stream run far ahead; else any.
  while (!ready.empty()) {
    const size_t pick = random() % 3 == 0 ? ready.size() - 1 : random() % ready.size();
    const size_t id = ready[pick];
    ready.erase(ready.begin() + static_cast<long>(pick));
    order.push_back(id);
    for (const size_t next : followers[id]) {
      if (--missing[next] == 0) ready.push_back(next);
    }
  }
  execute(order);
}

void Recording::all_orders(std::vector<size_t>& order, std::vector<int>& missing, size_t most, size_t& count,
                           const std::function<void()>& after) {
  if (count >= most) return;
  if (order.size() == operations_.size()) {
    ++count;
    execute(order);
    after();
    return;
  }
  for (size_t id = 0; id < operations_.size(); ++id) {
    if (missing[id] != 0) continue;
    missing[id] = -1;
    order.push_back(id);
    for (size_t next = id + 1; next < operations_.size(); ++next) {
      missing[next] -= static_cast<int>(std::count(operations_[next].after.begin(), operations_[next].after.end(), id));
    }
    all_orders(order, missing, most, count, after);
    for (size_t next = id + 1; next < operations_.size(); ++next) {
      missing[next] += static_cast<int>(std::count(operations_[next].after.begin(), operations_[next].after.end(), id));
    }
    order.pop_back();
    missing[id] = 0;
  }
}

size_t Recording::replay_all(size_t most, const std::function<void()>& after) {
  std::vector<size_t> order;
  std::vector<int> missing;
  for (const Operation& operation : operations_) missing.push_back(static_cast<int>(operation.after.size()));
  size_t count = 0;
  all_orders(order, missing, most, count, after);
  return count;
}

size_t Recording::calls(const std::string& name) const {
  const auto found = calls_.find(name);
  return found == calls_.end() ? 0 : found->second;
}

}  // namespace sida::cuda_test
