#include "experts/transfer.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "base/at_end.h"
#include "base/error.h"
#include "device/host_device.h"

namespace sida {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds poll_interval{50};
constexpr size_t stall_samples = 4096;

// Records of a store, as a device's lanes ask for them.
class StoreSource final : public RecordSource {
 public:
  StoreSource(std::shared_ptr<ExpertStore> store, const Faults& faults, int64_t read_bytes)
      : store_(std::move(store)), reader_(make_reader(faults)), read_bytes_(read_bytes) {}

  void read(int64_t record, void* into) override {
    const int32_t experts = store_->layout().experts;
    store_->read({static_cast<int32_t>(record / experts), static_cast<int32_t>(record % experts)}, into, *reader_,
                 read_bytes_);
  }
  void interrupt() override { reader_->interrupt(); }

 private:
  const std::shared_ptr<ExpertStore> store_;
  const std::unique_ptr<FileReader> reader_;
  const int64_t read_bytes_;
};

std::shared_ptr<Device> host_device(const std::shared_ptr<ExpertStore>& store, const EngineOptions& options) {
  const StoreLayout& layout = store->layout();
  return std::make_shared<HostDevice>(store_source(store, options.faults, options.read_bytes),
                                      int64_t{layout.layers} * layout.experts, layout.format.record_bytes());
}

ResidencyOptions residency_options(const StoreLayout& layout, const EngineOptions& options) {
  return {.layers = layout.layers,
          .experts = layout.experts,
          .slots = options.slots,
          .lanes = options.lanes,
          .eviction = parse_eviction(options.eviction),
          .prefetch_layers = options.prefetch_layers,
          .populated = options.populate};
}

}  // namespace

std::shared_ptr<RecordSource> store_source(std::shared_ptr<ExpertStore> store, const Faults& faults,
                                           int64_t read_bytes) {
  if (read_bytes < 0 || read_bytes % ExpertFormat::record_alignment != 0) {
    fail(ErrorKind::invalid, "read_bytes is ", read_bytes, ", expected a multiple of ", ExpertFormat::record_alignment,
         ", or 0 for a record at once");
  }
  return std::make_shared<StoreSource>(std::move(store), faults, read_bytes);
}

struct TransferEngine::Impl {
  Impl(std::shared_ptr<ExpertStore> from, std::shared_ptr<Device> to, EngineOptions given)
      : store(std::move(from)),
        device(std::move(to)),
        options(std::move(given)),
        process(::getpid()),
        residency(residency_options(store->layout(), options)),
        stalls(store->layout().layers) {}

  struct Stalls {
    std::vector<float> ring;  // the latest, seconds
    int64_t count = 0;
    double seconds = 0;
  };

  const std::shared_ptr<ExpertStore> store;
  const std::shared_ptr<Device> device;
  const EngineOptions options;
  const pid_t process;  // threads do not survive a fork
  Trace trace;

  mutable std::mutex mutex;
  std::condition_variable progress;
  Residency residency;
  std::vector<Stalls> stalls;
  double lane_seconds = 0;
  int64_t restarts_before = 0;  // the last reset: what device and store count, they count from their start
  double verified_before = 0;
  bool settled = false;
  bool closing = false;
  std::string broken;  // why the engine cannot go on; empty while it can

  std::mutex close_mutex;
  bool closed = false;

  const char* layer_name(int32_t layer) const { return store->layout().layer_names[layer].c_str(); }

  void check_process() const {
    if (::getpid() == process) return;
    fail(ErrorKind::closed, "the expert engine was started in process ", process, " and cannot be used in its fork ",
         ::getpid(), ": its lanes are not there; load the model after the fork");
  }

  void check_usable(const char* call) const {
    if (closing) {
      fail(ErrorKind::closed, call,
           ": the expert engine is closed: close() of its model or runtime was called, and the "
           "experts are gone from memory; load the model again");
    }
    if (!broken.empty()) fail(ErrorKind::internal, call, ": the expert engine is broken: ", broken);
  }

  // Carries out what the residency wants done now. The lock is held.
  void run_commands() {
    if (closing || !broken.empty()) return;
    while (const std::optional<Command> command = residency.next_command()) {
      if (command->kind == Command::Kind::give_back) {
        device->submit({.kind = LaneJob::Kind::give_back, .slot = command->slot, .count = command->count});
      } else {
        const ExpertKey expert = command->expert;
        device->submit({.kind = LaneJob::Kind::fill,
                        .slot = command->slot,
                        .record = int64_t{expert.layer} * store->layout().experts + expert.index});
      }
    }
  }

  // Called by the lanes.
  void job_done(const JobDone& done) {
    const LaneJob& job = done.job;
    if (job.kind == LaneJob::Kind::fill) {
      const int32_t experts = store->layout().experts;
      trace.record({.kind = TraceEvent::Kind::copy,
                    .lane = done.lane,
                    .layer = static_cast<int32_t>(job.record / experts),
                    .expert = static_cast<int32_t>(job.record % experts),
                    .batch = 0,
                    .begin_ns = done.begin_ns,
                    .end_ns = done.end_ns});
    }
    const std::lock_guard lock(mutex);
    try {
      if (job.kind == LaneJob::Kind::give_back) {
        // Memory that the system does not take back would break the budget unseen.
        if (done.error) fail(done.error->kind, done.error->why);
        residency.given_back(job.slot, job.count);
      } else {
        lane_seconds += done.seconds;
        if (done.error) {
          residency.copy_failed(job.slot, {done.error->kind, done.error->why});
        } else {
          residency.copy_done(job.slot);
        }
      }
      run_commands();
    } catch (const std::exception& error) {
      broken = error.what();
    }
    progress.notify_all();
  }

  // Until no read is under way: then none is queued for which there is a slot.
  void wait_settled(std::unique_lock<std::mutex>& lock) {
    const auto end = Clock::now() + options.wait_deadline;
    while (residency.in_flight() > 0) {
      if (Clock::now() >= end) {
        fail(ErrorKind::timeout, "waited ", options.wait_deadline.count(), " ms for ", residency.in_flight(),
             " reads to end before a layer begins; a slower disk needs a longer wait_deadline");
      }
      progress.wait_for(lock, poll_interval);
      check_usable("demand");
    }
  }

  void count_stall(DemandId demand, Clock::time_point begin) {
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    const int32_t layer = residency.layer_of(demand);
    Stalls& all = stalls[layer];
    if (all.ring.size() < stall_samples) {
      all.ring.push_back(static_cast<float>(seconds));
    } else {
      all.ring[all.count % stall_samples] = static_cast<float>(seconds);
    }
    ++all.count;
    all.seconds += seconds;
    const int64_t begin_ns = std::chrono::nanoseconds(begin.time_since_epoch()).count();
    trace.record({.kind = TraceEvent::Kind::stall,
                  .lane = 0,
                  .layer = layer,
                  .expert = static_cast<int32_t>(residency.missing(demand).size()),
                  .batch = residency.batch_of(demand),
                  .begin_ns = begin_ns,
                  .end_ns = Trace::now_ns()});
  }

  [[noreturn]] void throw_timeout(DemandId demand) const {
    const std::vector<int32_t> missing = residency.missing(demand);
    fail(ErrorKind::timeout, "waited ", options.wait_deadline.count(), " ms for ", missing.size(), " experts of ",
         layer_name(residency.layer_of(demand)), " (first: expert ", missing.front(), "); ", residency.in_flight(),
         " copies are under way, ", residency.queued(), " are queued, ", residency.committed(), " of ",
         residency.budget(), " slots are in use, ", residency.pinned(),
         " are pinned by waves that were not released; a slower disk needs a longer wait_deadline");
  }

  void close() {
    if (::getpid() != process) return;
    const std::lock_guard one_at_a_time(close_mutex);
    if (closed) return;
    {
      const std::lock_guard lock(mutex);
      closing = true;
    }
    progress.notify_all();
    const bool stopped = device->stop(options.wait_deadline);
    std::unique_lock lock(mutex);
    // A kernel may still compute from a wave: its memory goes only after it was released, else with this object.
    const bool unused = progress.wait_for(lock, options.wait_deadline, [&] { return residency.pinned() == 0; });
    closed = true;
    if (stopped && unused) device->free_memory();
    if (!stopped) {
      fail(ErrorKind::timeout, "close: a lane did not end within ", options.wait_deadline.count(),
           " ms; it hangs in a ", "read of ", store->path(), ", and its memory is kept");
    }
    if (!unused) {
      fail(ErrorKind::timeout, "close: ", residency.pinned(), " experts were still in use after ",
           options.wait_deadline.count(), " ms; their memory is kept until the engine is destroyed");
    }
  }
};

TransferEngine::TransferEngine(std::shared_ptr<ExpertStore> store, EngineOptions options)
    : TransferEngine(store, host_device(store, options), options) {}

TransferEngine::TransferEngine(std::shared_ptr<ExpertStore> store, std::shared_ptr<Device> device,
                               EngineOptions options) {
  if (options.wait_deadline.count() <= 0) {
    fail(ErrorKind::invalid, "wait_deadline is ", options.wait_deadline.count(), " ms, expected more than 0");
  }
  const int64_t record = store->layout().format.record_bytes();
  if (options.slots < 1) {
    fail(ErrorKind::invalid, "the budget is ", options.slots, " slots; the smallest that works is 1 slot, ", record,
         " bytes");
  }
  if (device->slot_bytes() != record) {
    fail(ErrorKind::invalid, "the device has slots of ", device->slot_bytes(), " bytes, the store has records of ",
         record);
  }
  impl_ = std::make_unique<Impl>(std::move(store), std::move(device), std::move(options));
  impl_->device->start(impl_->options.lanes, [impl = impl_.get()](const JobDone& done) { impl->job_done(done); });
  if (impl_->options.populate) {
    impl_->device->submit(
        {.kind = LaneJob::Kind::populate, .slot = 0, .count = static_cast<int32_t>(impl_->residency.budget())});
  }
}

TransferEngine::~TransferEngine() {
  if (impl_ == nullptr) return;
  if (::getpid() != impl_->process) {
    // A forked child has the objects but not the threads, and locks may be held by nobody: nothing can be taken apart.
    (void)impl_.release();
    return;
  }
  try {
    impl_->close();
  } catch (const Error&) {
    // Told to whoever calls close(); a destructor cannot. What hangs keeps what it uses.
  }
}

BatchId TransferEngine::announce(AnnouncedBatch batch, bool begin) {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  impl_->check_usable("announce");
  const BatchId number = impl_->residency.announce(std::move(batch));
  if (begin) impl_->run_commands();
  return number;
}

void TransferEngine::retire(BatchId batch) {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  impl_->residency.retire(batch);
  impl_->run_commands();
}

DemandId TransferEngine::demand(int32_t layer, std::span<const int32_t> experts, BatchId batch,
                                std::span<const int64_t> choices) {
  impl_->check_process();
  std::unique_lock lock(impl_->mutex);
  impl_->check_usable("demand");
  if (impl_->settled) impl_->wait_settled(lock);
  const DemandId demand = impl_->residency.demand(layer, experts, batch, choices);
  if (!impl_->settled) impl_->run_commands();  // else next_wave begins the reads, when it has said what came too late
  return demand;
}

void TransferEngine::set_max_low_bit(double share) {
  if (!(share >= 0 && share <= 1)) fail(ErrorKind::invalid, "max_low_bit is ", share, ", expected a share of 0 to 1");
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  impl_->check_usable("set_max_low_bit");
  impl_->residency.set_low_bit(std::llround(share * 1e6));
}

void TransferEngine::set_early_prefetch(bool early) {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  impl_->check_usable("set_early_prefetch");
  impl_->residency.set_early_prefetch(early);
}

void TransferEngine::set_settled(bool settled) {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  impl_->check_usable("set_settled");
  impl_->settled = settled;
}

void TransferEngine::load_all(const std::function<bool()>& interrupted) {
  const StoreLayout& layout = impl_->store->layout();
  if (budget() != capacity()) {
    fail(ErrorKind::invalid, "load_all: the budget is ", budget(), " slots, expected one for each of the ", capacity(),
         " experts");
  }
  std::vector<int32_t> experts(static_cast<size_t>(layout.experts));
  std::iota(experts.begin(), experts.end(), 0);
  for (int32_t layer = 0; layer < layout.layers; ++layer) {
    const DemandId all = demand(layer, experts);
    const AtEnd finished([&] { finish(all); });
    while (!next_wave(all, interrupted).experts.empty()) {
    }
  }
}

Wave TransferEngine::next_wave(DemandId demand, const std::function<bool()>& interrupted) {
  impl_->check_process();
  std::unique_lock lock(impl_->mutex);
  Residency& residency = impl_->residency;
  std::optional<Clock::time_point> begin;  // of the wait
  // The residency favours demands that are waited for; however the wait ends, it ends there too.
  struct Waiting {
    Impl& impl;
    DemandId demand;
    std::optional<Clock::time_point>& begin;
    std::unique_lock<std::mutex>& lock;
    ~Waiting() {
      if (!begin) return;
      if (!lock.owns_lock()) lock.lock();
      if (!impl.residency.is_under_way(demand)) return;  // another thread has finished it meanwhile
      impl.residency.set_waiting(demand, false);
      impl.count_stall(demand, *begin);
    }
  } const waiting{*impl_, demand, begin, lock};
  // Kept over calls, so that a caller whose waits are all short is asked too.
  thread_local Clock::time_point polled{};
  while (true) {
    impl_->check_usable("next_wave");
    if (const Failure* failure = residency.failure(demand)) throw Error(failure->kind, failure->why);
    if (impl_->settled) {
      Wave late = residency.take_low_bit(demand);
      impl_->run_commands();
      if (!late.experts.empty()) return late;
      // A wave of what has come so far would leave other slots free, earlier or later, from run to run.
      impl_->wait_settled(lock);
      if (const Failure* failure = residency.failure(demand)) throw Error(failure->kind, failure->why);
    }
    Wave wave = residency.take_ready(demand);
    if (!wave.experts.empty() || residency.exhausted(demand)) return wave;
    if (Wave late = residency.take_low_bit(demand); !late.experts.empty()) {
      impl_->run_commands();
      return late;
    }
    const auto now = Clock::now();
    if (!begin) {
      begin = now;
      residency.set_waiting(demand, true);
      impl_->run_commands();
    }
    const auto left = std::chrono::ceil<milliseconds>(impl_->options.wait_deadline - (now - *begin));
    if (left.count() <= 0) impl_->throw_timeout(demand);
    impl_->progress.wait_for(lock, std::min(left, poll_interval));
    // Not at every arrival: asking costs the caller's interpreter lock, which another thread may hold for long.
    if (interrupted && Clock::now() - polled >= poll_interval) {
      polled = Clock::now();
      lock.unlock();
      const bool stop = interrupted();
      lock.lock();
      if (stop) {
        fail(ErrorKind::closed, "interrupted while ", impl_->layer_name(residency.layer_of(demand)),
             " waited for its experts");
      }
    }
  }
}

void TransferEngine::release(DemandId demand, const Wave& wave) {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  impl_->residency.release(demand, wave);
  impl_->run_commands();
  if (impl_->closing) impl_->progress.notify_all();
}

void TransferEngine::finish(DemandId demand) noexcept {
  if (::getpid() != impl_->process) return;
  const std::lock_guard lock(impl_->mutex);
  try {
    impl_->residency.finish(demand);
    impl_->run_commands();
  } catch (const std::exception& error) {
    impl_->broken = error.what();  // raised by the next call
  }
  if (impl_->closing) impl_->progress.notify_all();
}

void* TransferEngine::slot_base() const {
  return impl_->device->slot_base();
}
std::string TransferEngine::name_of(ExpertKey expert) const {
  return impl_->store->name_of(expert);
}
const ExpertFormat& TransferEngine::format() const {
  return impl_->store->layout().format;
}

int64_t TransferEngine::capacity() const {
  const StoreLayout& layout = impl_->store->layout();
  return int64_t{layout.layers} * layout.experts;
}

int64_t TransferEngine::budget() const {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  return impl_->residency.budget();
}

void TransferEngine::set_budget(int64_t slots) {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  impl_->check_usable("set_budget");
  if (slots < 1) {
    fail(ErrorKind::invalid, "the budget is ", slots, " slots; the smallest that works is 1 slot, ",
         format().record_bytes(), " bytes");
  }
  impl_->residency.set_budget(slots);
  impl_->run_commands();
}

EngineStats TransferEngine::stats() const {
  impl_->check_process();
  EngineStats stats;
  stats.direct = impl_->store->direct();
  const int64_t record = format().record_bytes();
  const std::lock_guard lock(impl_->mutex);
  stats.verify_seconds = impl_->store->verify_seconds() - impl_->verified_before;
  stats.lane_restarts = impl_->device->lane_restarts() - impl_->restarts_before;
  stats.layers = impl_->residency.counters();
  for (size_t layer = 0; layer < stats.layers.size(); ++layer) {
    stats.layers[layer].stall_seconds = impl_->stalls[layer].seconds;
    stats.layers[layer].bytes_read = stats.layers[layer].loads * record;
    stats.stalls.push_back(impl_->stalls[layer].ring);
  }
  stats.peak_slots = impl_->residency.peak_committed();
  stats.committed_slots = impl_->residency.committed();
  stats.read_seconds = impl_->lane_seconds;
  return stats;
}

std::vector<ExpertStanding> TransferEngine::standings() const {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  return impl_->residency.standings();
}

Pace TransferEngine::pace() const {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  Pace pace = pace_of(impl_->residency.counters());
  for (const Impl::Stalls& stalls : impl_->stalls) pace.stall_seconds += stalls.seconds;
  pace.read_seconds = impl_->lane_seconds;
  return pace;
}

void TransferEngine::reset_stats() {
  impl_->check_process();
  const std::lock_guard lock(impl_->mutex);
  impl_->residency.reset_counters();
  std::fill(impl_->stalls.begin(), impl_->stalls.end(), Impl::Stalls{});
  impl_->lane_seconds = 0;
  impl_->restarts_before = impl_->device->lane_restarts();
  impl_->verified_before = impl_->store->verify_seconds();
}

Trace& TransferEngine::trace() {
  return impl_->trace;
}
void TransferEngine::close() {
  impl_->close();
}

}  // namespace sida
