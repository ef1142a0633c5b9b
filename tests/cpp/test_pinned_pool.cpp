// The pinned pool alone, as the system sees it: how its memory is made, where it lies, that the store's bytes come into
// it and nowhere else, and what is said when it cannot be pinned.
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../cuda/recording_runtime.h"
#include "check.h"
#include "device/pinned_device.h"
#include "experts/transfer.h"
#include "store_file.h"

namespace sida::test {
namespace {

using cuda::Pin;
using cuda::PinnedDevice;
using cuda_test::Recording;

class NoRecords final : public RecordSource {
 public:
  void read(int64_t, void*) override {}
};

constexpr int64_t mib = 1 << 20;

// The lines of /proc/self/smaps that describe the mapping of `address`.
std::vector<std::string> mapping_of(const void* address) {
  std::ifstream maps("/proc/self/smaps");
  std::vector<std::string> lines;
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    uintptr_t begin = 0, end = 0;
    char dash = 0;
    std::istringstream words(line);
    if (line.find('-') < line.find(' ') && words >> std::hex >> begin >> dash >> end && dash == '-') {
      inside = begin <= reinterpret_cast<uintptr_t>(address) && reinterpret_cast<uintptr_t>(address) < end;
    }
    if (inside) lines.push_back(line);
  }
  return lines;
}

std::string flags_of(const void* address) {
  for (const std::string& line : mapping_of(address)) {
    if (line.rfind("VmFlags:", 0) == 0) return line + " ";
  }
  return "";
}

// 4.5 MiB: an expert of Switch-base in int8 has about as much, and no power of two is near.
constexpr int64_t record = 9 * mib / 2;

SIDA_TEST(exactly_the_slots_are_pinned_and_huge_pages_are_asked_for) {
  Recording recording(1);
  {
    constexpr int64_t slots = 3, reserved = 8;
    PinnedDevice pool(recording.table(), 0, std::make_shared<NoRecords>(), slots, reserved, record, Pin::require);
    CHECK_EQ(recording.pinned_bytes(), static_cast<size_t>(slots * record));
    CHECK_EQ(pool.pinned_bytes(), slots * record);
    auto* const base = static_cast<char*>(pool.slot_base());
    std::memset(base, 1, static_cast<size_t>(slots * record));
    if (std::filesystem::exists("/sys/kernel/mm/transparent_hugepage")) {
      CHECK(flags_of(base).find(" hg ") != std::string::npos);
    } else {
      std::cout << "not looked at: this kernel has no huge pages for programs" << std::endl;
    }
    CHECK(flags_of(base).find(" dc ") != std::string::npos);  // not for a child
    // The rest of the range is addresses alone.
    CHECK(flags_of(base + slots * record).find(" wr ") == std::string::npos);
    pool.free_memory();
    CHECK_EQ(recording.pinned_bytes(), 0u);
  }
  recording.finish();
  CHECK(recording.problems().empty());
}

SIDA_TEST(memory_of_the_devices_node_is_preferred) {
  Recording recording(1);
  recording.numa_node = 0;
  {
    PinnedDevice pool(recording.table(), 0, std::make_shared<NoRecords>(), 2, 2, record, Pin::require);
    int policy = -1;
    unsigned long nodes[16] = {};
    const long status = ::syscall(SYS_get_mempolicy, &policy, nodes, sizeof nodes * 8,
                                  static_cast<char*>(pool.slot_base()) + record, MPOL_F_ADDR);
    if (status != 0 || pool.placement().find("refused") != std::string::npos) {
      std::cout << "not looked at: " << pool.placement() << "; " << std::strerror(errno) << std::endl;
      CHECK(pool.placement().find("anywhere: the system refused memory of node 0") == 0);
    } else {
      CHECK_EQ(policy, MPOL_PREFERRED);
      CHECK_EQ(nodes[0], 1u);
      CHECK_EQ(pool.placement(), "on node 0, the device's, as far as it has room");
    }
  }
  recording.numa_node = -1;
  PinnedDevice pool(recording.table(), 0, std::make_shared<NoRecords>(), 2, 2, record, Pin::require);
  CHECK_EQ(pool.placement(), "anywhere: the system does not say which node is the device's");
}

// Pages of the file that the system holds.
int64_t cached_pages(const std::string& path) {
  const auto bytes = static_cast<size_t>(std::filesystem::file_size(path));
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  void* const map = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  CHECK(map != MAP_FAILED);
  std::vector<unsigned char> there((bytes + 4095) / 4096);
  CHECK_EQ(::mincore(map, bytes, there.data()), 0);
  ::munmap(map, bytes);
  ::close(fd);
  int64_t count = 0;
  for (const unsigned char page : there) count += page & 1;
  return count;
}

void drop_cache(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  ::fsync(fd);
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  ::close(fd);
}

SIDA_TEST(records_come_from_the_disk_straight_into_the_pool) {
  const StoreFile file(2, 4, {256, 1024, DType::f32, false});  // records of 2 MiB
  Recording recording(1);
  recording.eager = true;
  recording.replayed = false;
  const std::shared_ptr<ExpertStore> store = file.open();
  const int64_t bytes = store->layout().format.record_bytes();
  drop_cache(file.path());
  const int64_t before = cached_pages(file.path());
  {
    auto pool = std::make_shared<PinnedDevice>(recording.table(), 0, store_source(store, {}, 4 << 20), 8, 8, bytes,
                                               Pin::require);
    TransferEngine engine(store, pool, EngineOptions{.slots = 8, .lanes = 2});
    for (int32_t layer = 0; layer < 2; ++layer) {
      const std::vector<int32_t> all{0, 1, 2, 3};
      const DemandId demand = engine.demand(layer, all);
      size_t served = 0;
      while (served < all.size()) {
        const Wave wave = engine.next_wave(demand);
        for (size_t i = 0; i < wave.experts.size(); ++i) {
          CHECK(file.holds(static_cast<const char*>(engine.slot_base()) + wave.slots[i] * bytes,
                           {layer, wave.experts[i]}));
        }
        served += wave.experts.size();
        engine.release(demand, wave);
      }
      engine.finish(demand);
    }
    // Nothing was pinned beside the slots, and nothing of the records is in the page cache too.
    CHECK_EQ(recording.pinned_bytes(), static_cast<size_t>(8 * bytes));
    if (store->direct()) {
      CHECK_EQ(cached_pages(file.path()), before);
    } else {
      std::cout << "not looked at: the folder of temporary files has no O_DIRECT" << std::endl;
    }
    engine.close();
  }
  recording.finish();
  CHECK(recording.problems().empty());
}

}  // namespace
}  // namespace sida::test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
