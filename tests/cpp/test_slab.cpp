// Slab: slots have memory when they should and none when they should not.
#include "device/slab.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "base/error.h"
#include "check.h"

using namespace sida;

namespace {

// Bytes of the slab that are in memory.
int64_t resident_bytes(const Slab& slab) {
  std::vector<unsigned char> pages(slab.slots() * slab.slot_bytes() / 4096);
  if (::mincore(slab.base(), pages.size() * 4096, pages.data()) != 0) return -1;
  return 4096 * std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
}

}  // namespace

SIDA_TEST(memory_comes_with_commit_and_goes_with_give_back) {
  constexpr int64_t slot_bytes = 3 << 20, slots = 50;
  Slab slab(slots, slot_bytes);
  CHECK_EQ(resident_bytes(slab), 0);
  for (int64_t slot = 10; slot < 30; ++slot) {
    slab.commit(slot);
    slab.commit(slot);
    std::memset(slab.slot(slot), static_cast<int>(slot), slot_bytes);
  }
  CHECK_EQ(resident_bytes(slab), 20 * slot_bytes);  // and no huge page beyond the edges
  slab.give_back(10, 19);
  CHECK_EQ(resident_bytes(slab), slot_bytes);
  CHECK_EQ(static_cast<int>(slab.slot(29)[slot_bytes - 1]), 29);
  slab.commit(12);
  CHECK_EQ(static_cast<int>(slab.slot(12)[100]), 0);  // memory that came back is empty
}

SIDA_TEST(a_populated_slot_has_memory_before_anybody_writes) {
  constexpr int64_t slot_bytes = 2 << 20;
  Slab slab(4, slot_bytes);
  slab.populate(1);
  slab.populate(1);
#ifdef MADV_POPULATE_WRITE
  CHECK_EQ(resident_bytes(slab), slot_bytes);
#endif
  slab.give_back(1, 1);
  CHECK_EQ(resident_bytes(slab), 0);
  slab.populate(1);
  std::memset(slab.slot(1), 7, slot_bytes);
  slab.populate(1);  // what is there stays
  CHECK_EQ(static_cast<int>(slab.slot(1)[slot_bytes - 1]), 7);
}

SIDA_TEST(wrong_sizes_and_slots_are_refused) {
  CHECK_THROWS(Slab(0, 4096), Error, "0 slots");
  CHECK_THROWS(Slab(1, 1000), Error, "1000 bytes");
  Slab slab(4, 4096);
  CHECK_THROWS(slab.give_back(3, 2), Error, "slots 3 to 4 do not exist");
  CHECK_THROWS(slab.commit(4), std::out_of_range, "");
}

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
