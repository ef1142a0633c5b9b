#include "device/memory_limits.h"

#include <sys/resource.h>

#include <cstdint>
#include <fstream>
#include <optional>
#include <sstream>

namespace sida {
namespace {

// Version 1 says "no limit" with the largest multiple of a page that fits; nothing real is near it.
constexpr uint64_t no_limit = uint64_t{1} << 60;

// The smallest number in `file` of a group's folder and of those above it.
std::optional<uint64_t> smallest_on_path(const std::string& mount, std::string group, const char* file) {
  std::optional<uint64_t> smallest;
  while (true) {
    uint64_t bytes = 0;
    // Version 2 says "max" where there is no limit.
    if (std::ifstream(mount + group + "/" + file) >> bytes && bytes < no_limit && bytes < smallest.value_or(no_limit)) {
      smallest = bytes;
    }
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return smallest;
    group.resize(slash);
  }
}

std::optional<uint64_t> control_group_limit(const std::string& root) {
  std::optional<uint64_t> smallest;
  const auto take = [&](std::optional<uint64_t> one) {
    if (one && *one < smallest.value_or(no_limit)) smallest = one;
  };
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "hierarchy:controllers:path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers(",");
    controllers.append(line, first + 1, second - first - 1).append(",");
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") take(smallest_on_path(root + "/sys/fs/cgroup", path, "memory.max"));
    if (controllers.find(",memory,") != std::string::npos) {
      take(smallest_on_path(root + "/sys/fs/cgroup/memory", path, "memory.limit_in_bytes"));
    }
  }
  return smallest;
}

}  // namespace

std::string memory_limits(const std::string& root) {
  std::ostringstream text;
  rlimit locked{};
  if (::getrlimit(RLIMIT_MEMLOCK, &locked) == 0) {
    text << "locked memory (ulimit -l) is ";
    if (locked.rlim_cur == RLIM_INFINITY) {
      text << "not limited";
    } else {
      text << "limited to " << locked.rlim_cur << " bytes";
    }
  }
  std::ifstream meminfo(root + "/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) text << ", " << line;
  }
  if (const std::optional<uint64_t> group = control_group_limit(root)) {
    text << ", the control group allows " << *group << " bytes";
  }
  return text.str();
}

}  // namespace sida
