#include "experts/measure.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <utility>
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
  File(std::string path, int flags) : File(path, ::open(path.c_str(), flags | O_CLOEXEC), errno) {}
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // A new file under a name that nothing had before: the folder may be anybody's, with a link under a name that one
  // could guess.
  static File make(const std::string& folder) {
    std::string path = folder + "/.disk-rate-XXXXXX";
    const int fd = ::mkostemp(path.data(), O_CLOEXEC);
    if (fd < 0) fail(ErrorKind::io, folder, ": creating a file to measure with failed: ", std::strerror(errno));
    return {path, fd, 0};
  }
  // Past the page cache where the file system can.
  static std::unique_ptr<File> open_to_read(const std::string& path) {
    auto direct = std::make_unique<File>(path, O_RDONLY | O_DIRECT);
    if (direct->is_open()) return direct;
    if (direct->error_ != EINVAL) fail_with(path, "opening for direct reads", direct->error_);
    auto cached = std::make_unique<File>(path, O_RDONLY);
    if (!cached->is_open()) fail_with(path, "opening", cached->error_);
    cached->direct_ = false;
    return cached;
  }

  int fd() const { return fd_; }
  bool direct() const { return direct_; }
  const std::string& path() const { return path_; }
  [[noreturn]] void fail_with(const char* doing, int error = errno) const { fail_with(path_, doing, error); }

  void write(const void* data, int64_t bytes, int64_t offset) const {
    const auto* at = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t put = ::pwrite(fd_, at, static_cast<size_t>(bytes), offset);
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) fail_with("writing");
      if (put == 0) fail_with("writing", ENOSPC);
      at += put;
      offset += put;
      bytes -= put;
    }
  }
  // 0 or the number of the error; for threads, which cannot throw. Half a read is an error: the file is as long as
  // that.
  [[nodiscard]] int read(void* into, int64_t bytes, int64_t offset) const {
    const ssize_t got = ::pread(fd_, into, static_cast<size_t>(bytes), offset);
    return got == bytes ? 0 : got < 0 ? errno : EIO;
  }

 private:
  File(std::string path, int fd, int error) : path_(std::move(path)), fd_(fd), error_(error) {}
  bool is_open() const { return fd_ >= 0; }
  [[noreturn]] static void fail_with(const std::string& path, const char* doing, int error) {
    fail(ErrorKind::io, path, ": ", doing, " failed: ", std::strerror(error));
  }

  std::string path_;
  int fd_;
  int error_;
  bool direct_ = true;
};

struct Removed {
  std::string path;
  ~Removed() { ::unlink(path.c_str()); }
};

}  // namespace

DiskRate measure_disk_rate(const std::string& folder, int64_t bytes, int readers) {
  if (readers < 1) fail(ErrorKind::invalid, "readers is ", readers, ", expected at least 1");
  const Pages pages(chunk * readers);
  const int64_t chunks = std::max<int64_t>(readers, bytes / chunk);
  const File written = File::make(folder);
  const Removed removed{written.path()};
  for (int64_t i = 0; i < chunks; ++i) written.write(pages.data(), chunk, i * chunk);
  if (::fsync(written.fd()) != 0) written.fail_with("fsync");
  ::posix_fadvise(written.fd(), 0, 0, POSIX_FADV_DONTNEED);

  const auto file = File::open_to_read(written.path());
  std::atomic<int64_t> next{0};
  std::atomic<int> error{0};
  const auto begin = Clock::now();
  {
    std::vector<std::jthread> threads;
    for (int reader = 0; reader < readers; ++reader) {
      threads.emplace_back([&, reader] {
        char* into = static_cast<char*>(pages.data()) + reader * chunk;
        for (int64_t i = next++; i < chunks && error == 0; i = next++) {
          if (const int status = file->read(into, chunk, i * chunk); status != 0) error = status;
        }
      });
    }
  }
  const double seconds = seconds_since(begin);
  if (error != 0) file->fail_with("reading", error);
  return {.bytes_per_second = static_cast<double>(chunks * chunk) / seconds, .direct = file->direct()};
}

ReadRates measure_read_rates(const std::string& path, double seconds) {
  constexpr int64_t sizes[] = {1 << 20, 2 << 20, 4 << 20, 8 << 20};
  constexpr int lane_counts[] = {1, 2, 4, 8};
  constexpr int64_t largest = 8 << 20, smallest_file = 64 << 20;
  const auto begin = Clock::now();
  const auto file = File::open_to_read(path);
  struct stat status{};
  if (::fstat(file->fd(), &status) != 0) file->fail_with("fstat");
  if (status.st_size < smallest_file) {
    fail(ErrorKind::invalid, path, " has ", status.st_size, " bytes, expected at least ", smallest_file,
         " to measure read rates with");
  }
  const Pages pages(largest * 8);
  ReadRates found{.rates = {}, .direct = file->direct(), .seconds = 0};
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
      std::vector<std::jthread> threads;
      for (int lane = 0; lane < lanes; ++lane) {
        threads.emplace_back([&, lane, seed = random()] {
          std::mt19937_64 place(seed);
          char* into = static_cast<char*>(pages.data()) + lane * largest;
          do {
            const auto piece = static_cast<int64_t>(place() % static_cast<uint64_t>(status.st_size / size));
            if (const int status = file->read(into, size, piece * size); status != 0) {
              error = status;
              return;
            }
            (void)record_checksum(into, size);
            bytes += size;
          } while (seconds_since(pair_begin) < share && error == 0);
        });
      }
      for (std::jthread& thread : threads) thread.join();
      if (error != 0) file->fail_with("reading", error);
      const double rate = static_cast<double>(bytes) / seconds_since(pair_begin);
      if (slowest_lane == 0) slowest_lane = rate;
      found.rates.push_back({.read_bytes = size, .lanes = lanes, .bytes_per_second = rate});
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
    std::vector<std::jthread> pool;
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
    for (std::jthread& thread : pool) thread.join();
    best = std::max(best, static_cast<double>(share * threads * 8) / seconds_since(begin));
  }
  return best;
}

}  // namespace sida
