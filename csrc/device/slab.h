// Slab: one reserved address range cut into equal slots. A slot has memory from commit() until give_back(); the
// addresses stay. A slot without memory cannot be read or written: touching one is a crash, not wrong numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sida {

class Slab {
 public:
  // slot_bytes: a multiple of 4096. Error(io) if the system refuses the address space.
  Slab(int64_t slots, int64_t slot_bytes);
  ~Slab();
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  std::byte* base() const { return base_; }
  std::byte* slot(int64_t slot) const { return base_ + slot * slot_bytes_; }
  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t slots() const { return static_cast<int64_t>(committed_.size()); }

  // Different slots may be committed and given back at the same time. Error(io) if the system refuses the memory.
  void commit(int64_t slot);
  // Commits a slot and has the system back it with memory now, so that whoever fills it does not wait for that. Where
  // the system cannot (Linux before 5.14), the first write does it as ever.
  void populate(int64_t slot);
  void give_back(int64_t first, int64_t count);

 private:
  std::byte* base_ = nullptr;
  int64_t bytes_, slot_bytes_;
  std::vector<uint8_t> committed_;  // not bool: neighbours are written by different threads
};

}  // namespace sida
