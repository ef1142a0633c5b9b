#include "device/slab.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace sida {
namespace {

// Below this a huge page would span many slots, and giving one slot back would free little.
constexpr int64_t huge_page_from = 1 << 20;
constexpr int64_t page = 4096;

}  // namespace

Slab::Slab(int64_t slots, int64_t slot_bytes) : bytes_(slots * slot_bytes), slot_bytes_(slot_bytes) {
  if (slots < 1 || slot_bytes < page || slot_bytes % page != 0) {
    fail(ErrorKind::invalid, slots, " slots of ", slot_bytes, " bytes: expected at least one, of a multiple of ", page,
         " bytes");
  }
  void* range = ::mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) {
    fail(ErrorKind::io, "cannot reserve ", bytes_, " bytes of address space for ", slots,
         " expert slots: ", std::strerror(errno), "; is an address-space limit set (ulimit -v)?");
  }
  base_ = static_cast<std::byte*>(range);
  committed_.assign(slots, 0);
  // Advice only: kernels that stream weights miss the TLB less; where the system says no, nothing else changes. Huge
  // pages never reach beyond committed slots, for they do not cross the edge of what may be accessed.
  if (slot_bytes_ >= huge_page_from) ::madvise(range, bytes_, MADV_HUGEPAGE);
  // A forked child has no lanes and must not compute from slots; and a page shared with a child would be copied under
  // a direct read that is under way.
  ::madvise(range, bytes_, MADV_DONTFORK);
}

Slab::~Slab() {
  if (base_ != nullptr) ::munmap(base_, bytes_);
}

void Slab::commit(int64_t slot) {
  if (committed_.at(slot) != 0) return;
  if (::mprotect(this->slot(slot), slot_bytes_, PROT_READ | PROT_WRITE) != 0) {
    fail(ErrorKind::io, "the system refused ", slot_bytes_, " bytes of memory for expert slot ", slot, ": ",
         std::strerror(errno), "; make the expert memory smaller");
  }
  committed_[slot] = 1;
}

void Slab::populate(int64_t slot) {
  commit(slot);
#ifdef MADV_POPULATE_WRITE
  // What it cannot do here, the first write to the slot does, or reports: nothing is lost but time.
  ::madvise(this->slot(slot), slot_bytes_, MADV_POPULATE_WRITE);
#endif
}

void Slab::give_back(int64_t first, int64_t count) {
  const int64_t bytes = count * slot_bytes_;
  if (first < 0 || count < 1 || first + count > slots()) {
    fail(ErrorKind::internal, "slots ", first, " to ", first + count - 1, " do not exist; there are ", slots());
  }
  if (::madvise(slot(first), bytes, MADV_DONTNEED) != 0 || ::mprotect(slot(first), bytes, PROT_NONE) != 0) {
    fail(ErrorKind::io, "cannot give the memory of slots ", first, " to ", first + count - 1,
         " back: ", std::strerror(errno));
  }
  std::fill_n(committed_.begin() + first, count, uint8_t{0});
}

}  // namespace sida
