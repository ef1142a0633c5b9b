// Records runtime calls as a graph of operations and replays it.
#include "recording_runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

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
  using Side = Recording::Side;

  // The recording, locked for one call.
  struct On {
    std::unique_lock<std::recursive_mutex> lock{current->mutex_};
    Recording* operator->() const { return current; }
    Recording& operator*() const { return *current; }
    int status = 0;  // that a test wants
    explicit On(const char* call) {
      ++current->calls_[call];
      status = current->status_of(call);
      current->check_capture(call);
    }
  };
  static void* handle(Recording& r) { return reinterpret_cast<void*>(r.next_handle_ += 16); }

  static int device_count(int* devices) {
    const On r("device_count");
    *devices = r->devices;
    return r.status;
  }
  static int device_facts(int, cuda::DeviceFacts* facts) {
    const On r("device_facts");
    *facts = {r->compute_capability, 108, 99 * 1024, r->numa_node};
    return r.status;
  }
  static int set_device(int device) {
    const On r("set_device");
    if (device < 0 || device >= r->devices) return invalid;
    return r.status;
  }
  static int ignore_captures() {
    const On r("ignore_captures");
    if (r.status == 0) r->ignoring_.insert(std::this_thread::get_id());
    return r.status;
  }
  static int page_bytes(int, size_t* bytes) {
    const On r("page_bytes");
    *bytes = Recording::page_bytes;
    return r.status;
  }
  static int reserve(void** base, size_t bytes) {
    const On r("reserve");
    if (r.status != 0) return r.status;
    *base = r->device_.allocate(bytes);
    r->reserved_[*base] = bytes;
    r->memory_.push_back({*base, bytes});
    return 0;
  }
  static int unreserve(void* base, size_t bytes) {
    const On r("unreserve");
    const auto found = r->reserved_.find(base);
    if (found == r->reserved_.end() || found->second != bytes) {
      r->problem("unreserve of addresses that are not reserved");
      return invalid;
    }
    for (size_t at = 0; at < bytes; at += Recording::page_bytes) {
      if (r->mapped_.count(static_cast<char*>(base) + at) != 0) r->problem("device memory was never freed");
    }
    r->reserved_.erase(found);
    r->to_free_.push_back(base);
    return r.status;
  }
  static int map_page(void* page, size_t, int) {
    const On r("map_page");
    if (r.status != 0) return r.status;
    if (!r->mapped_.insert(page).second) r->problem("map of a page that has memory");
    return 0;
  }
  static int unmap_page(void* page, size_t bytes) {
    const On r("unmap_page");
    if (r->mapped_.erase(page) == 0) {
      r->problem("free of memory that is not allocated");
      return invalid;
    }
    // Freeing is a write of the host: everything that touches the memory must be over.
    r->add("free", nullptr, Side::host_return, {}, {}, {{page, bytes}}, [] {});
    return r.status;
  }
  static int host_alloc(void** memory, size_t bytes) {
    const On r("host_alloc");
    if (r.status != 0) return r.status;
    *memory = std::malloc(bytes);
    r->pinned_[*memory] = bytes;
    r->memory_.push_back({*memory, bytes});
    return 0;
  }
  static int host_free(void* memory) {
    const On r("host_free");
    const auto found = r->pinned_.find(memory);
    if (found == r->pinned_.end()) {
      r->problem("host_free of memory that is not allocated");
      return invalid;
    }
    r->add("host free", nullptr, Side::host_return, {}, {}, {{memory, found->second}}, [] {});
    r->pinned_.erase(found);
    r->to_free_host_.push_back(memory);
    return r.status;
  }
  static int host_register(void* memory, size_t bytes) {
    const On r("host_register");
    if (r.status != 0) return r.status;
    r->registered_.insert(memory);
    auto kept = std::make_unique<unsigned char[]>(bytes);
    r->memory_.push_back({kept.get(), bytes});
    r->shadow_.insert_or_assign(memory, Recording::Registered{bytes, std::move(kept)});
    return 0;
  }
  static int host_unregister(void* memory) {
    const On r("host_unregister");
    if (r->registered_.erase(memory) == 0) {
      r->problem("host_unregister of memory that is not registered");
      return invalid;
    }
    r->add("unpin", nullptr, Side::host_return, {}, {}, {{memory, r->shadow_.at(memory).bytes}}, [] {});
    return r.status;
  }
  static void host_write(void* pinned, const void* source, size_t bytes) {
    const On r("host_write");
    const auto* const first = static_cast<const unsigned char*>(source);
    r->add("host write", nullptr, Side::host_access, {}, {}, {{pinned, bytes}},
           [kept = r->kept(pinned), value = std::vector<unsigned char>(first, first + bytes)] {
             std::memcpy(kept, value.data(), value.size());
           });
  }
  static void host_read(void* target, const void* pinned, size_t bytes) {
    const On r("host_read");
    auto value = std::make_shared<std::vector<unsigned char>>();
    r->add("host read", nullptr, Side::host_access, {}, {{pinned, bytes}}, {},
           [=, recording = current, kept = r->kept(pinned)] {
             const auto* const first = static_cast<const unsigned char*>(kept);
             if (!recording->replaying_) {
               value->assign(first, first + bytes);
             } else if (std::memcmp(value->data(), kept, bytes) != 0) {
               // What the host decided from it would be another run.
               throw std::runtime_error("the host read other bytes than in the recorded order");
             }
           });
    if (!r->eager) r->problem("the host reads what only an eager recording knows");
    std::memcpy(target, value->data(), value->size());
  }
  static int stream_create(cuda::Stream* stream, int) {
    const On r("stream_create");
    *stream = handle(*r);
    r->last_of_stream_[*stream] = -1;
    r->number_of_stream_[*stream] = ++r->last_stream_;
    return r.status;
  }
  static int stream_destroy(cuda::Stream stream) {
    const On r("stream_destroy");
    if (!r->known_stream(stream, "stream_destroy")) return invalid;
    r->last_of_stream_.erase(stream);
    return r.status;
  }
  static int stream_capturing(cuda::Stream stream, bool* capturing) {
    const On r("stream_capturing");
    *capturing = r->captured_ != nullptr && stream == r->captured_;
    return r.status;
  }
  static int stream_number(cuda::Stream stream, uint64_t* number) {
    const On r("stream_number");
    if (!r->known_stream(stream, "stream_number")) return invalid;
    *number = r->number_of_stream_[stream];
    return r.status;
  }
  static int event_create(cuda::Event* event, bool) {
    const On r("event_create");
    *event = handle(*r);
    r->recorded_[*event] = -1;
    return r.status;
  }
  static int event_destroy(cuda::Event event) {
    const On r("event_destroy");
    if (!r->known_event(event, "event_destroy")) return invalid;
    r->recorded_.erase(event);
    return r.status;
  }
  static int event_record(cuda::Event event, cuda::Stream stream) {
    const On r("event_record");
    if (!r->known_event(event, "event_record") || !r->known_stream(stream, "event_record")) return invalid;
    if (r.status != 0) return r.status;
    r->recorded_[event] = static_cast<long>(r->add("record", stream, Side::device, {}, {}, {}, [] {}));
    return r.status;
  }
  static int stream_wait(cuda::Stream stream, cuda::Event event) {
    const On r("stream_wait");
    if (!r->known_event(event, "stream_wait") || !r->known_stream(stream, "stream_wait")) return invalid;
    if (r.status != 0) return r.status;
    if (r->recorded_[event] < 0) {
      r->problem("wait for an event that was never recorded");
      return 0;
    }
    // The wait is for what is recorded now, as the runtime has it: recording again later changes nothing.
    r->add("wait", stream, Side::device, {static_cast<size_t>(r->recorded_[event])}, {}, {}, [] {});
    return r.status;
  }
  static int event_query(cuda::Event event) {
    const On r("event_query");
    if (!r->known_event(event, "event_query")) return invalid;
    // Both answers are possible at any time; "done" orders what the host does next behind the event.
    if (r->recorded_[event] < 0) return 0;
    if (r->random_() % 2 == 0) return cuda::RuntimeTable::not_ready;
    r->add("query", nullptr, Side::host_wait, {static_cast<size_t>(r->recorded_[event])}, {}, {}, [] {});
    return r.status;
  }
  static int event_synchronize(cuda::Event event) {
    const On r("event_synchronize");
    if (!r->known_event(event, "event_synchronize")) return invalid;
    if (r->recorded_[event] < 0) return 0;
    r->add("synchronize", nullptr, Side::host_wait, {static_cast<size_t>(r->recorded_[event])}, {}, {}, [] {});
    return r.status;
  }
  static int copy_to_device(void* target, const void* source, size_t bytes, cuda::Stream stream) {
    const On r("copy_to_device");
    if (!r->known_stream(stream, "copy_to_device")) return invalid;
    if (r.status != 0) return r.status;
    if (r->pinned_only && !r->is_pinned(source, bytes)) r->problem("copy from memory that is not pinned");
    r->add("copy", stream, Side::device, {}, {{source, bytes}}, {{target, bytes}},
           [=, copy = r->device_.copy, kept = r->kept(source)] { copy(target, kept, bytes); });
    return 0;
  }
  static int copy_to_host(void* target, const void* source, size_t bytes, cuda::Stream stream) {
    const On r("copy_to_host");
    if (!r->known_stream(stream, "copy_to_host")) return invalid;
    if (r.status != 0) return r.status;
    if (r->pinned_only && !r->is_pinned(target, bytes)) r->problem("copy to memory that is not pinned");
    r->add("copy to host", stream, Side::device, {}, {{source, bytes}}, {{target, bytes}},
           [=, kept = r->kept(target)] { std::memcpy(kept, source, bytes); });
    return 0;
  }
  static int copy_priority() { return 0; }
  static const char* error_text(int) { return "a failure that the test asked for"; }
};

Recording::Recording(uint64_t seed)
    : Recording(seed, {[](size_t bytes) { return std::malloc(bytes); }, [](void* memory) { std::free(memory); },
                       [](void* target, const void* source, size_t bytes) { std::memcpy(target, source, bytes); }}) {}

Recording::Recording(uint64_t seed, const Memory& memory) : random_(seed), device_(memory) {
  current = this;
}

Recording::~Recording() {
  for (void* const memory : to_free_) device_.free(memory);
  for (const auto& [memory, bytes] : reserved_) device_.free(memory);
  for (void* const memory : to_free_host_) std::free(memory);
  for (const auto& [memory, bytes] : pinned_) std::free(memory);
  if (current == this) current = nullptr;  // Python frees one when it likes, maybe after the next was made
}

const cuda::RuntimeTable& Recording::table() const {
  using T = RecordingTable;
  static const cuda::RuntimeTable functions{
      .device_count = T::device_count,
      .device_facts = T::device_facts,
      .set_device = T::set_device,
      .ignore_captures = T::ignore_captures,
      .page_bytes = T::page_bytes,
      .reserve = T::reserve,
      .unreserve = T::unreserve,
      .map_page = T::map_page,
      .unmap_page = T::unmap_page,
      .host_alloc = T::host_alloc,
      .host_free = T::host_free,
      .host_register = T::host_register,
      .host_unregister = T::host_unregister,
      .host_write = T::host_write,
      .host_read = T::host_read,
      .stream_create = T::stream_create,
      .stream_destroy = T::stream_destroy,
      .stream_capturing = T::stream_capturing,
      .stream_number = T::stream_number,
      .event_create = T::event_create,
      .event_destroy = T::event_destroy,
      .event_record = T::event_record,
      .event_query = T::event_query,
      .event_synchronize = T::event_synchronize,
      .stream_wait = T::stream_wait,
      .copy_to_device = T::copy_to_device,
      .copy_to_host = T::copy_to_host,
      .copy_priority = T::copy_priority,
      .error_text = T::error_text,
  };
  return functions;
}

void Recording::fail(const std::string& call, int status, int times, int after) {
  const std::lock_guard lock(mutex_);
  failing_[call] = {status, times, after};
}

int Recording::status_of(const char* call) {
  const auto found = failing_.find(call);
  if (found == failing_.end() || found->second.times == 0) return 0;
  if (found->second.after > 0) {
    --found->second.after;
    return 0;
  }
  --found->second.times;
  return found->second.status;
}

void Recording::begin_capture(cuda::Stream stream) {
  const std::lock_guard lock(mutex_);
  captured_ = stream;
  capturing_thread_ = std::this_thread::get_id();
}
void Recording::end_capture() {
  const std::lock_guard lock(mutex_);
  captured_ = nullptr;
}

void Recording::check_capture(const std::string& call) {
  if (captured_ == nullptr) return;
  // What queues work touches a capture only on the captured stream (known_stream); the rest asks or is the host's own.
  static const std::set<std::string> harmless{"device_count",     "device_facts", "set_device",  "ignore_captures",
                                              "stream_capturing", "event_record", "stream_wait", "copy_to_device",
                                              "copy_to_host",     "host_write",   "host_read",   "copy_priority"};
  if (harmless.count(call) != 0) return;
  const std::thread::id here = std::this_thread::get_id();
  if (here != capturing_thread_ && ignoring_.count(here) != 0) return;
  problem(call + " while a graph is captured by " + (here == capturing_thread_ ? "this" : "another") + " thread");
}

bool Recording::known_stream(cuda::Stream stream, const char* call) {
  if (captured_ != nullptr && stream == captured_) {
    problem(std::string(call) + " on a stream that is being captured");
  }
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

bool Recording::is_pinned(const void* memory, size_t bytes) const {
  const auto inside = [&](const void* begin, size_t size) {
    return memory >= begin && static_cast<const char*>(memory) + bytes <= static_cast<const char*>(begin) + size;
  };
  for (const void* const begin : registered_) {
    if (inside(begin, shadow_.at(begin).bytes)) return true;
  }
  return std::any_of(pinned_.begin(), pinned_.end(), [&](const auto& one) { return inside(one.first, one.second); });
}

void* Recording::kept(const void* memory) const {
  if (!replayed) return const_cast<void*>(memory);
  for (const void* const begin : registered_) {
    const Registered& range = shadow_.at(begin);
    const auto offset = static_cast<const char*>(memory) - static_cast<const char*>(begin);
    if (offset >= 0 && offset < static_cast<std::ptrdiff_t>(range.bytes)) return range.bytes_of_replay.get() + offset;
  }
  return const_cast<void*>(memory);
}

cuda::Stream Recording::user_stream() {
  const std::lock_guard lock(mutex_);
  cuda::Stream stream = nullptr;
  RecordingTable::stream_create(&stream, 0);
  user_streams_.insert(stream);
  return stream;
}

void Recording::make_anew(cuda::Stream stream) {
  const std::lock_guard lock(mutex_);
  last_of_stream_.at(stream) = -1;
  number_of_stream_.at(stream) = ++last_stream_;
}

// What lies in reserved addresses must lie on pages that have memory.
void Recording::check_mapped(const std::string& what, const std::vector<Range>& ranges) {
  for (const Range& range : ranges) {
    for (const auto& [base, bytes] : reserved_) {
      if (!overlap(range, {base, bytes})) continue;
      const size_t first = static_cast<size_t>(static_cast<const char*>(range.begin) - static_cast<char*>(base));
      for (size_t page = first / page_bytes; page * page_bytes < first + range.bytes; ++page) {
        if (mapped_.count(static_cast<char*>(base) + page * page_bytes) == 0) {
          problem(what + " touches device memory that was given back, or never taken");
          break;
        }
      }
    }
  }
}

size_t Recording::add(const std::string& what, cuda::Stream stream, Side side, std::vector<size_t> after,
                      std::vector<Range> reads, std::vector<Range> writes, std::function<void()> body) {
  const size_t id = operations_.size();
  const auto follow = [&](long earlier) {
    if (earlier >= 0) after.push_back(static_cast<size_t>(earlier));
  };
  long& own_wait = last_wait_.emplace(std::this_thread::get_id(), -1).first->second;
  follow(last_access_);
  if (side == Side::device) follow(last_of_stream_[stream]);
  if (side == Side::host_access) {
    after.insert(after.end(), waits_since_access_.begin(), waits_since_access_.end());
  } else {
    follow(own_wait);
  }
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
  if (side == Side::device) {
    check_mapped(what, reads);
    check_mapped(what, writes);
  }
  operations_.push_back({what, after, before, std::move(reads), std::move(writes), std::move(body)});
  switch (side) {
    case Side::device:
      last_of_stream_[stream] = static_cast<long>(id);
      break;
    case Side::host_wait:
      own_wait = static_cast<long>(id);
      waits_since_access_.push_back(id);
      break;
    case Side::host_access:
    case Side::host_return:
      last_access_ = static_cast<long>(id);
      if (side == Side::host_access) waits_since_access_.clear();
      break;
  }
  if (eager) operations_.back().body();
  return id;
}

void Recording::kernel(cuda::Stream stream, std::vector<Range> reads, std::vector<Range> writes,
                       std::function<void()> body) {
  const std::lock_guard lock(mutex_);
  ++calls_["kernel"];
  if (!known_stream(stream, "kernel")) return;
  memory_.insert(memory_.end(), writes.begin(), writes.end());
  add("kernel", stream, Side::device, {}, std::move(reads), std::move(writes), std::move(body));
}

void Recording::host_write(void* target, uint8_t value, size_t bytes) {
  const std::lock_guard lock(mutex_);
  memory_.push_back({kept(target), bytes});
  add("host write", nullptr, Side::host_access, {}, {}, {{target, bytes}},
      [=, at = kept(target)] { std::memset(at, value, bytes); });
}

void Recording::host_fill(void* target, const void* record, size_t bytes) {
  const std::lock_guard lock(mutex_);
  memory_.push_back({kept(target), bytes});
  add("host read", nullptr, Side::host_access, {}, {}, {{target, bytes}},
      [=, at = kept(target)] { std::memcpy(at, record, bytes); });
}

void Recording::finish() {
  for (const auto& [stream, last] : last_of_stream_) {
    if (user_streams_.count(stream) == 0) problem("a stream was never destroyed");
  }
  for (size_t i = 0; i < recorded_.size(); ++i) problem("an event was never destroyed");
  for (size_t i = 0; i < mapped_.size(); ++i) problem("device memory was never freed");
  for (size_t i = 0; i < reserved_.size(); ++i) problem("device addresses were never given back");
  for (size_t i = 0; i < pinned_.size(); ++i) problem("pinned memory was never freed");
  for (size_t i = 0; i < registered_.size(); ++i) problem("host memory was never unpinned");
}

void Recording::execute(const std::vector<size_t>& order) {
  replaying_ = true;
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

size_t Recording::pinned_bytes() const {
  const std::lock_guard lock(mutex_);
  size_t sum = 0;
  for (const auto& [memory, bytes] : pinned_) sum += bytes;
  for (const void* const memory : registered_) sum += shadow_.at(memory).bytes;
  return sum;
}

size_t Recording::calls(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  const auto found = calls_.find(name);
  return found == calls_.end() ? 0 : found->second;
}

size_t Recording::all_calls() const {
  const std::lock_guard lock(mutex_);
  size_t sum = 0;
  for (const auto& [name, count] : calls_) {
    if (name != "kernel" && name != "host_write" && name != "host_read") sum += count;
  }
  return sum;
}

}  // namespace sida::cuda_test
