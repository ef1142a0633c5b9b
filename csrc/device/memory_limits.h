// What the system allows this process to take and to pin: for the error of a pool that could not be pinned.
#pragma once

#include <string>

namespace sida {

// One phrase: the limit of locked memory (ulimit -l), the memory available, and the smallest limit of the process's
// control groups (versions 1 and 2) if there is one. `root`: where /proc and /sys lie, for tests.
std::string memory_limits(const std::string& root = "");

}  // namespace sida
