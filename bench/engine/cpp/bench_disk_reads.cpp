// Direct reads of one file by blocking threads and by io_uring, side by side: rate and processor time by read size and
// by the number of reads under way. No library needed beyond the kernel's headers.
//
//   g++ -O2 -std=c++20 -o build/bench_disk_reads bench/engine/cpp/bench_disk_reads.cpp -lpthread
//   build/bench_disk_reads FILE [GiB of the file, made if it is not there; 2] [MiB read for each figure; 512]
#include <fcntl.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void die(const std::string& what) {
  std::perror(what.c_str());
  std::exit(1);
}

double processor_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void read_by_threads(int fd, char* memory, const std::vector<int64_t>& offsets, int64_t size, int depth) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < depth; ++i) {
    threads.emplace_back([&, i] {
      for (size_t at = next++; at < offsets.size(); at = next++) {
        if (::pread(fd, memory + i * size, static_cast<size_t>(size), offsets[at]) != size) die("pread");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

class Ring {
 public:
  explicit Ring(unsigned entries) {
    fd_ = static_cast<int>(::syscall(SYS_io_uring_setup, entries, &params_));
    if (fd_ < 0) die("io_uring_setup");
    bytes_ = std::max<size_t>(params_.sq_off.array + params_.sq_entries * sizeof(unsigned),
                              params_.cq_off.cqes + params_.cq_entries * sizeof(io_uring_cqe));
    if ((params_.features & IORING_FEAT_SINGLE_MMAP) == 0) die("an io_uring with one map is needed");
    rings_ = static_cast<char*>(map(bytes_, IORING_OFF_SQ_RING));
    entries_ = static_cast<io_uring_sqe*>(map(params_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
  }
  ~Ring() {
    ::munmap(entries_, params_.sq_entries * sizeof(io_uring_sqe));
    ::munmap(rings_, bytes_);
    ::close(fd_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  void queue_read(int file, void* into, int64_t size, int64_t offset, uint64_t tag) {
    unsigned* tail = at(params_.sq_off.tail);
    const unsigned slot = *tail & *at(params_.sq_off.ring_mask);
    io_uring_sqe& entry = entries_[slot];
    std::memset(&entry, 0, sizeof entry);
    entry.opcode = IORING_OP_READ;
    entry.fd = file;
    entry.addr = reinterpret_cast<uint64_t>(into);
    entry.len = static_cast<unsigned>(size);
    entry.off = static_cast<uint64_t>(offset);
    entry.user_data = tag;
    at(params_.sq_off.array)[slot] = slot;
    std::atomic_ref(*tail).store(*tail + 1, std::memory_order_release);
    ++queued_;
  }
  // Submits what is queued and waits for one; its tag.
  uint64_t wait(int64_t size) {
    unsigned* head = at(params_.cq_off.head);
    while (*head == std::atomic_ref(*at(params_.cq_off.tail)).load(std::memory_order_acquire)) {
      if (::syscall(SYS_io_uring_enter, fd_, queued_, 1, IORING_ENTER_GETEVENTS, nullptr, 0) < 0) die("io_uring_enter");
      queued_ = 0;
    }
    const auto* done =
        reinterpret_cast<const io_uring_cqe*>(rings_ + params_.cq_off.cqes) + (*head & *at(params_.cq_off.ring_mask));
    if (done->res != size) die("io_uring read: " + std::string(std::strerror(-done->res)));
    const uint64_t tag = done->user_data;
    std::atomic_ref(*head).store(*head + 1, std::memory_order_release);
    return tag;
  }

 private:
  void* map(size_t bytes, off_t offset) const {
    void* made = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, offset);
    if (made == MAP_FAILED) die("mapping the ring");
    return made;
  }
  unsigned* at(unsigned offset) const { return reinterpret_cast<unsigned*>(rings_ + offset); }

  io_uring_params params_{};
  int fd_ = -1;
  size_t bytes_ = 0;
  char* rings_ = nullptr;
  io_uring_sqe* entries_ = nullptr;
  unsigned queued_ = 0;
};

void read_by_ring(int fd, char* memory, const std::vector<int64_t>& offsets, int64_t size, int depth) {
  Ring ring(static_cast<unsigned>(depth));
  size_t next = 0;
  for (; next < std::min<size_t>(depth, offsets.size()); ++next) {
    ring.queue_read(fd, memory + static_cast<int64_t>(next) * size, size, offsets[next], next);
  }
  for (size_t done = 0; done < offsets.size(); ++done) {
    const uint64_t buffer = ring.wait(size);
    if (next < offsets.size())
      ring.queue_read(fd, memory + static_cast<int64_t>(buffer) * size, size, offsets[next++], buffer);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: bench_disk_reads FILE [GiB] [MiB for each figure]\n");
    return 2;
  }
  const int64_t bytes = (argc > 2 ? std::atoll(argv[2]) : 2) << 30, part = (argc > 3 ? std::atoll(argv[3]) : 512) << 20;
  constexpr int most = 16;
  constexpr int64_t largest = 8 << 20;
  auto* memory =
      static_cast<char*>(::mmap(nullptr, most * largest, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) die("mmap");
  ::madvise(memory, most * largest, MADV_HUGEPAGE);
  std::mt19937_64 random(1);
  for (int64_t i = 0; i < most * largest / 8; ++i) reinterpret_cast<uint64_t*>(memory)[i] = random();
  struct stat status{};
  if (::stat(argv[1], &status) != 0 || status.st_size < bytes) {
    const int made = ::open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (made < 0) die(argv[1]);
    for (int64_t at = 0; at < bytes; at += largest) {
      if (::pwrite(made, memory, largest, at) != largest) die("pwrite");
    }
    ::fsync(made);
    ::close(made);
  }
  const int fd = ::open(argv[1], O_RDONLY | O_DIRECT);
  if (fd < 0) die(argv[1]);
  std::printf("%9s %7s | %12s %12s | %12s %12s | %s\n", "read", "under", "threads", "threads", "io_uring", "io_uring",
              "rate,");
  std::printf("%9s %7s | %12s %12s | %12s %12s | %s\n", "KiB", "way", "MB/s", "CPU s/GB", "MB/s", "CPU s/GB",
              "ring/threads");
  for (const int64_t size : {int64_t{128} << 10, int64_t{512} << 10, int64_t{2} << 20, largest}) {
    for (const int depth : {1, 2, 4, 8, 16}) {
      std::vector<int64_t> offsets(bytes / size);
      std::iota(offsets.begin(), offsets.end(), 0);
      std::shuffle(offsets.begin(), offsets.end(), random);
      offsets.resize(std::max<int64_t>(depth, part / size));
      for (int64_t& offset : offsets) offset *= size;
      double rate[2] = {}, cpu[2] = {};
      // In turns, the better of two each: a neighbour's load hits both ways alike.
      for (int turn = 0; turn < 4; ++turn) {
        const auto begin = Clock::now();
        const double before = processor_seconds();
        (turn % 2 == 0 ? read_by_threads : read_by_ring)(fd, memory, offsets, size, depth);
        const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
        const double read = static_cast<double>(offsets.size()) * static_cast<double>(size);
        if (read / seconds > rate[turn % 2]) {
          rate[turn % 2] = read / seconds;
          cpu[turn % 2] = (processor_seconds() - before) / (read * 1e-9);
        }
      }
      std::printf("%9lld %7d | %12.0f %12.3f | %12.0f %12.3f | %.2f\n", static_cast<long long>(size >> 10), depth,
                  rate[0] * 1e-6, cpu[0], rate[1] * 1e-6, cpu[1], rate[1] / rate[0]);
      std::fflush(stdout);
    }
  }
  return 0;
}
