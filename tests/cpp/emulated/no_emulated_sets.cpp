// For programs that are built without emulated instruction sets: no name is one.
#include "emulated/emulated_kernels.h"

namespace sida::test {

EmulatedSet emulated_set(std::string_view) {
  return {nullptr, false};
}

}  // namespace sida::test
