#include "experts/measure.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "base/error.h"
#include "experts/store.h"

namespace sida {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t chunk = 16 << 20;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Memory that comes and goes with the object, aligned to pages.
class Pages {
 public:
  explicit Pages(int64_t bytes) : bytes_(bytes) {
    data_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED)
      fail(ErrorKind::io, "cannot map ", bytes, " bytes to measure with: ", std::strerror(errno));
    // As the slots have them: a direct read into small pages is half as fast, and would be no floor for the engine.
    ::madvise(data_, bytes, MADV_HUGEPAGE);
    // Every page is written once, so that none is the shared page of zeros.
    auto* words = static_cast<uint64_t*>(data_);
    for (int64_t i = 0; i < bytes / 8; ++i) words[i] = static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u;
  }
  ~Pages() { ::munmap(data_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  void* data() const { return data_; }

 private:
  int64_t bytes_;
  void* data_;
};

class File {
 public:
  File(const std::string& path, int flags) : path_(path), fd_(::open(path.c_str(), flags | O_CLOEXEC, 0600)) {}
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }
  [[noreturn]] void fail_with(const char* doing) const {
    fail(ErrorKind::io, path_, ": ", doing, " failed: ", std::strerror(errno));
  }

 private:
  std::string path_;
  int fd_;
};

struct Removed {
  std::string path;
  ~Removed() { ::unlink(path.c_str()); }
};

}  // namespace

DiskRate measure_disk_rate(const std::string& folder, int64_t bytes, int readers) {
  const std::string path = folder + "/.disk-rate-" + std::to_string(::getpid());
  const Removed removed{path};
  const Pages pages(chunk * readers);
  const int64_t chunks = std::max<int64_t>(readers, bytes / chunk);
  {
    const File file(path, O_WRONLY | O_CREAT | O_TRUNC);
    if (file.fd() < 0) file.fail_with("creating a file to measure with");
    for (int64_t i = 0; i < chunks; ++i) {
      if (::pwrite(file.fd(), pages.data(), chunk, i * chunk) != chunk) file.fail_with("writing");
    }
    if (::fsync(file.fd()) != 0) file.fail_with("fsync");
    ::posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED);
  }
  auto file = std::make_unique<File>(path, O_RDONLY | O_DIRECT);
  const bool direct = file->fd() >= 0;
  if (!direct) {
    if (errno != EINVAL) file->fail_with("opening for direct reads");
    file = std::make_unique<File>(path, O_RDONLY);
    if (file->fd() < 0) file->fail_with("opening");
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto begin = Clock::now();
  std::vector<std::thread> threads;
  for (int reader = 0; reader < readers; ++reader) {
    threads.emplace_back([&, reader] {
      char* into = static_cast<char*>(pages.data()) + reader * chunk;
      for (int64_t i = next++; i < chunks; i = next++) {
        if (::pread(file->fd(), into, chunk, i * chunk) != chunk) failed = true;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = seconds_since(begin);
  if (failed) file->fail_with("reading");
  return {static_cast<double>(chunks * chunk) / seconds, direct};
}

ReadRates measure_read_rates(const std::string& path, double seconds) {
  constexpr int64_t sizes[] = {1 << 20, 2 << 20, 4 << 20, 8 << 20};
  constexpr int lane_counts[] = {1, 2, 4, 8};
  constexpr int64_t largest = 8 << 20, smallest_file = 64 << 20;
  const auto begin = Clock::now();
  auto file = std::make_unique<File>(path, O_RDONLY | O_DIRECT);
  const bool direct = file->fd() >= 0;
  if (!direct) {
    if (errno != EINVAL) file->fail_with("opening for direct reads");
    file = std::make_unique<File>(path, O_RDONLY);
    if (file->fd() < 0) file->fail_with("opening");
  }
  struct stat status{};
  if (::fstat(file->fd(), &status) != 0) file->fail_with("fstat");
  if (status.st_size < smallest_file) {
    fail(ErrorKind::invalid, path, " has ", status.st_size, " bytes, expected at least ", smallest_file,
         " to measure read rates with");
  }
  const Pages pages(largest * 8);
  ReadRates found{{}, direct, 0};
  double slowest_lane = 0;  // bytes a second of the first pair, the only guess there is for the next
  std::mt19937_64 random(1);
  const double share = seconds / static_cast<double>(std::size(sizes) * std::size(lane_counts));
  for (const int lanes : lane_counts) {
    for (const int64_t size : sizes) {
      const double left = seconds - seconds_since(begin);
      if (left <= 0 || (slowest_lane > 0 && static_cast<double>(lanes * size) / slowest_lane > left)) continue;
      const auto pair_begin = Clock::now();
      std::atomic<int64_t> bytes{0};
      std::atomic<int> error{0};
      std::vector<std::thread> threads;
      for (int lane = 0; lane < lanes; ++lane) {
        threads.emplace_back([&, lane, seed = random()] {
          std::mt19937_64 place(seed);
          char* into = static_cast<char*>(pages.data()) + lane * largest;
          do {
            const auto piece = static_cast<int64_t>(place() % static_cast<uint64_t>(status.st_size / size));
            const ssize_t got = ::pread(file->fd(), into, static_cast<size_t>(size), piece * size);
            if (got != size) {
              error = got < 0 ? errno : EIO;
              return;
            }
            (void)record_checksum(into, size);
            bytes += size;
          } while (seconds_since(pair_begin) < share && error == 0);
        });
      }
      for (std::thread& thread : threads) thread.join();
      if (error != 0) {
        errno = error;
        file->fail_with("reading");
      }
      const double rate = static_cast<double>(bytes) / seconds_since(pair_begin);
      if (slowest_lane == 0) slowest_lane = rate;
      found.rates.push_back({size, lanes, rate});
    }
  }
  found.seconds = seconds_since(begin);
  return found;
}

double measure_memory_bandwidth(int threads, int64_t bytes) {
  if (threads < 1) fail(ErrorKind::invalid, "threads is ", threads, ", expected at least 1");
  const Pages pages(bytes);
  const auto* words = static_cast<const uint64_t*>(pages.data());
  const int64_t share = bytes / 8 / threads / 8 * 8;
  double best = 0;
  std::atomic<uint64_t> sink{0};
  for (int pass = 0; pass < 3; ++pass) {
    const auto begin = Clock::now();
    std::vector<std::thread> pool;
    for (int thread = 0; thread < threads; ++thread) {
      pool.emplace_back([&, thread] {
        uint64_t sums[8] = {};
        const uint64_t* at = words + thread * share;
        for (int64_t i = 0; i < share; i += 8) {
          for (int lane = 0; lane < 8; ++lane) sums[lane] += at[i + lane];
        }
        for (const uint64_t sum : sums) sink += sum;
      });
    }
    for (std::thread& thread : pool) thread.join();
    best = std::max(best, static_cast<double>(share * threads * 8) / seconds_since(begin));
  }
  return best;
}

}  // namespace sida
