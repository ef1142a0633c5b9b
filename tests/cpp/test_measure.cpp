// Measuring the disk: leaves the folder as it was, and says what the system said.
#include "experts/measure.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "base/error.h"
#include "check.h"
#include "store_file.h"

using namespace sida;
using namespace sida::test;

namespace {

namespace fs = std::filesystem;
constexpr int64_t bytes = 32 << 20;

// An empty folder of its own for each test.
fs::path folder() {
  static int count = 0;
  const fs::path made = scratch() / ("measured-" + std::to_string(count++));
  fs::create_directories(made);
  return made;
}

// Truncates the file as soon as it is complete, as somebody who empties the folder would.
void truncate_when_written(const fs::path& folder, const std::atomic<bool>& stop) {
  while (!stop) {
    std::error_code gone;
    for (const auto& entry : fs::directory_iterator(folder)) {
      if (entry.file_size(gone) == bytes && !gone) (void)::truncate(entry.path().c_str(), 0);
    }
  }
}

}  // namespace

SIDA_TEST(a_rate_is_measured_and_nothing_is_left) {
  const fs::path empty = folder();
  CHECK(measure_disk_rate(empty.string(), bytes, 2).bytes_per_second > 0);
  CHECK(fs::is_empty(empty));
  CHECK_THROWS(measure_disk_rate(empty.string(), bytes, 0), Error, "readers is 0, expected at least 1");
  CHECK_THROWS(measure_disk_rate("/nowhere", bytes, 2), Error, "No such file or directory");
}

// In a folder that others may write to: a file or a link under the name that could be guessed is left alone.
SIDA_TEST(somebody_elses_file_is_left_alone) {
  const fs::path shared = folder(), precious = folder() / "precious";
  std::ofstream(precious) << "precious";
  fs::create_symlink(precious, shared / (".disk-rate-" + std::to_string(::getpid())));
  measure_disk_rate(shared.string(), bytes, 2);
  std::string text;
  std::ifstream(precious) >> text;
  CHECK_EQ(text, "precious");
  CHECK(fs::exists(shared / (".disk-rate-" + std::to_string(::getpid()))));
}

// A write that stops half way, as on a full disk, is named by the reason that the next one gets.
SIDA_TEST(a_short_write_has_the_systems_reason) {
  const fs::path full = folder();
  rlimit before{};
  CHECK_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  ::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{(20 << 20) + 512, before.rlim_max};
  CHECK_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  CHECK_THROWS(measure_disk_rate(full.string(), bytes, 2), Error, "writing failed: File too large");
  CHECK_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  CHECK(fs::is_empty(full));
}

SIDA_TEST(a_readers_failure_has_its_own_reason) {
  const fs::path emptied = folder();
  std::string said;
  std::atomic<bool> stop{false};
  std::thread other([&] { truncate_when_written(emptied, stop); });
  // When the other thread gets to it is not ours to say.
  for (int attempt = 0; attempt < 100 && said.empty(); ++attempt) {
    try {
      measure_disk_rate(emptied.string(), bytes, 2);
    } catch (const Error& error) {
      said = error.what();
    }
  }
  stop = true;
  other.join();
  if (said.find("reading failed: Input/output error") == std::string::npos) report(__FILE__, __LINE__, said);
  CHECK(fs::is_empty(emptied));
}

int main(int argc, char** argv) {
  return run_all(argc, argv);
}
