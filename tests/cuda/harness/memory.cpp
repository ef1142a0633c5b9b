// Checks of bounds, alignment, initialisation and order of every access to the emulated memories.
#include "harness/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <sstream>

namespace sida::harness {
namespace {

std::string describe(const char* what, const void* address, const unsigned char* base, size_t bytes) {
  std::ostringstream text;
  text << what << " of " << bytes << " bytes at offset " << static_cast<const unsigned char*>(address) - base;
  return text.str();
}

// CUDA wants every access at a multiple of its size, and 16-byte alignment for anything wider.
void check_alignment(const void* address, size_t bytes, const void* site, const char* what) {
  const size_t natural = bytes % 16 == 0 ? 16 : bytes & (~bytes + 1);
  if (reinterpret_cast<uintptr_t>(address) % natural != 0) {
    report(Fault::misaligned,
           std::string(what) + " of " + std::to_string(bytes) + " bytes is not aligned to " + std::to_string(natural),
           site);
  }
}

}  // namespace

bool ordered(const Moment& earlier, const Moment& now) {
  if (earlier.thread < 0 || earlier.thread == now.thread || earlier.block_epoch != now.block_epoch) return true;
  return earlier.thread / 32 == now.thread / 32 && earlier.warp_epoch != now.warp_epoch;
}

void SharedShadow::start_block(size_t bytes) {
  bytes_ = bytes;
  ++block_serial_;
  // What the last block left must not look like a value: as floats these are NaN, as offsets nonsense.
  std::memset(memory_, 0xF3, bytes);
}

SharedShadow::Granule* SharedShadow::find(const void* address, size_t bytes, const Moment& now, size_t& count) {
  const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - memory_);
  if (address < memory_ || offset + bytes > bytes_) {
    report(Fault::out_of_bounds,
           describe("shared access", address, memory_, bytes) + ", the block asked for " + std::to_string(bytes_) +
               " bytes",
           now.site);
  }
  check_alignment(address, bytes, now.site, "shared access");
  count = (offset + bytes - 1) / 4 - offset / 4 + 1;
  return &granules_[offset / 4];
}

void SharedShadow::check_writers(const Granule& granule, const void* address, const Moment& now, const char* what) {
  if (granule.copy.thread >= 0 && granule.written_in == block_serial_) {
    report(Fault::copy_in_flight, describe(what, address, memory_, 4) + " meets a cp.async that was not waited for",
           now.site, granule.copy.site);
  }
  if (!ordered(granule.writer, now)) {
    report(Fault::race,
           describe(what, address, memory_, 4) + " by thread " + std::to_string(now.thread) +
               " and a write by thread " + std::to_string(granule.writer.thread) + " are not ordered",
           now.site, granule.writer.site);
  }
}

void SharedShadow::check_readers(const Granule& granule, const void* address, const Moment& now, const char* what) {
  for (const Moment* reader : {&granule.reader, &granule.other_warp, &granule.other_lane}) {
    if (!ordered(*reader, now)) {
      report(Fault::race,
             describe(what, address, memory_, 4) + " by thread " + std::to_string(now.thread) +
                 " and a read by thread " + std::to_string(reader->thread) + " are not ordered",
             now.site, reader->site);
    }
  }
}

void SharedShadow::read(const void* address, size_t bytes, const Moment& now) {
  size_t count;
  Granule* granule = find(address, bytes, now, count);
  for (size_t i = 0; i < count; ++i, ++granule) {
    if (granule->written_in != block_serial_) {
      report(Fault::uninitialised, describe("shared read", address, memory_, bytes), now.site);
    }
    check_writers(*granule, address, now, "shared read");
    Moment& last = granule->reader;
    if (last.thread != now.thread && last.thread >= 0) {
      (last.thread / 32 == now.thread / 32 ? granule->other_lane : granule->other_warp) = last;
    }
    last = now;
  }
}

void SharedShadow::write(const void* address, size_t bytes, const Moment& now) {
  size_t count;
  Granule* granule = find(address, bytes, now, count);
  for (size_t i = 0; i < count; ++i, ++granule) {
    if (granule->written_in == block_serial_) check_writers(*granule, address, now, "shared write");
    check_readers(*granule, address, now, "shared write");
    granule->writer = now;
    granule->copy.thread = -1;
    granule->written_in = block_serial_;
  }
}

void SharedShadow::start_copy(const void* address, size_t bytes, const Moment& now) {
  write(address, bytes, now);
  size_t count;
  Granule* granule = find(address, bytes, now, count);
  for (size_t i = 0; i < count; ++i) granule[i].copy = now;
}

void SharedShadow::finish_copy(const void* address, size_t bytes, const Moment& now) {
  size_t count;
  Granule* granule = find(address, bytes, now, count);
  for (size_t i = 0; i < count; ++i) {
    const void* const site = granule[i].copy.site;
    granule[i].copy.thread = -1;
    granule[i].writer = now;
    granule[i].writer.site = site;
  }
}

namespace {

void* map(size_t bytes, const char* what) {
  void* const range = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) throw std::runtime_error(std::string("harness: mmap of ") + what + " failed");
  return range;
}

}  // namespace

GlobalShadow::GlobalShadow(size_t capacity)
    : capacity_(capacity),
      base_(static_cast<unsigned char*>(map(capacity, "the emulated global memory"))),
      state_(static_cast<uint8_t*>(map(capacity, "the state of its bytes"))),
      granules_(static_cast<Granule*>(map(capacity / 4 * sizeof(Granule), "the history of its bytes"))) {}

GlobalShadow::~GlobalShadow() {
  munmap(base_, capacity_);
  munmap(state_, capacity_);
  munmap(granules_, capacity_ / 4 * sizeof(Granule));
}

void* GlobalShadow::allocate(size_t bytes, size_t misalignment) {
  constexpr size_t guard = 8192;
  const size_t begin = (used_ + guard + 255) / 256 * 256 + misalignment;
  if (begin + bytes + guard > capacity_) throw std::runtime_error("harness: the emulated global memory is full");
  used_ = begin + bytes;
  std::fill_n(state_ + begin, bytes, valid);
  std::memset(base_ + begin, 0xF3, bytes);
  return base_ + begin;
}

void GlobalShadow::fill(void* target, const void* source, size_t bytes) {
  const auto offset = static_cast<unsigned char*>(target) - base_;
  std::memcpy(target, source, bytes);
  for (size_t i = 0; i < bytes; ++i) state_[static_cast<size_t>(offset) + i] |= initialised;
}

void GlobalShadow::read_only(void* begin, size_t bytes) {
  const auto offset = static_cast<unsigned char*>(begin) - base_;
  for (size_t i = 0; i < bytes; ++i) state_[static_cast<size_t>(offset) + i] |= constant;
}

void GlobalShadow::reset() {
  std::fill_n(state_, used_, uint8_t{0});
  used_ = 0;
}

void GlobalShadow::start_launch(size_t blocks) {
  ++launch_;
  blocks_ = blocks;
  released_.clear();
  bytes_read_ = bytes_written_ = 0;
}

bool GlobalShadow::visible(int block, uint32_t epoch) const {
  if (block == view_->block) return true;
  return !view_->acquired.empty() && epoch < view_->acquired[static_cast<size_t>(block)];
}

void GlobalShadow::atomic(const void* address, size_t bytes, bool fenced, const void* site) {
  check(address, bytes, valid | initialised, site, "atomic operation");
  Granule& granule = granules_[(static_cast<const unsigned char*>(address) - base_) / 4];
  granule.atomic_launch = launch_;
  granule.atomic_site = site;
  auto& released = released_[address];
  if (!released.empty() && view_->acquired.empty()) view_->acquired.resize(blocks_);
  for (const auto& [block, epoch] : released) {
    uint32_t& known = view_->acquired[static_cast<size_t>(block)];
    known = std::max(known, epoch + 1);
  }
  if (fenced) released.emplace_back(view_->block, view_->epoch++);
}

// A plain access sees a word that others change atomically at some moment or another.
void GlobalShadow::check_atomics(const Granule& granule, const void* address, size_t bytes, const void* site,
                                 const char* what) {
  if (granule.atomic_launch == launch_) {
    report(Fault::global_conflict,
           describe(what, address, base_, bytes) + " meets atomic operations of the same launch", site,
           granule.atomic_site);
  }
}

void GlobalShadow::check(const void* address, size_t bytes, uint8_t needed, const void* site, const char* what) {
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - base_);
  check_alignment(address, bytes, site, what);
  for (size_t i = 0; i < bytes; ++i) {
    const uint8_t state = offset + i < capacity_ ? state_[offset + i] : 0;
    if ((state & valid) == 0) report(Fault::out_of_bounds, describe(what, address, base_, bytes), site);
    if ((state & needed) != needed) report(Fault::uninitialised, describe(what, address, base_, bytes), site);
    if (needed == valid && (state & constant) != 0)
      report(Fault::read_only, describe(what, address, base_, bytes), site);
  }
}

void GlobalShadow::read(const void* address, size_t bytes, const void* site) {
  check(address, bytes, valid | initialised, site, "global read");
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - base_);
  for (size_t i = offset / 4; i <= (offset + bytes - 1) / 4; ++i) {
    Granule& granule = granules_[i];
    check_atomics(granule, address, bytes, site, "global read");
    if (granule.write_launch == launch_ && !visible(granule.writer, granule.write_epoch)) {
      report(Fault::global_conflict,
             describe("global read", address, base_, bytes) + " by block " + std::to_string(view_->block) +
                 " of what block " + std::to_string(granule.writer) + " wrote",
             site, granule.write_site);
    }
    if (granule.read_launch != launch_) {
      granule.other_reader = -1;
      bytes_read_ += 4;
    } else if (granule.reader != view_->block) {
      granule.other_reader = granule.reader;
    }
    granule.read_launch = launch_;
    granule.reader = view_->block;
  }
}

void GlobalShadow::write(const void* address, size_t bytes, const void* site) {
  check(address, bytes, valid, site, "global write");
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - base_);
  for (size_t i = 0; i < bytes; ++i) state_[offset + i] |= initialised;
  for (size_t i = offset / 4; i <= (offset + bytes - 1) / 4; ++i) {
    Granule& granule = granules_[i];
    // Neighbouring 16-bit results of one granule may come from two blocks only if the granule is cut; whole granules
    // alone are judged.
    const bool whole = i * 4 >= offset && i * 4 + 4 <= offset + bytes;
    check_atomics(granule, address, bytes, site, "global write");
    if (whole && granule.write_launch == launch_ && !visible(granule.writer, granule.write_epoch)) {
      report(Fault::global_conflict,
             describe("global write", address, base_, bytes) + " by block " + std::to_string(view_->block) +
                 " over what block " + std::to_string(granule.writer) + " wrote",
             site, granule.write_site);
    }
    if (whole && granule.read_launch == launch_) {
      for (const int reader : {granule.reader, granule.other_reader}) {
        if (reader >= 0 && !visible(reader, 0)) {
          report(Fault::global_conflict,
                 describe("global write", address, base_, bytes) + " by block " + std::to_string(view_->block) +
                     " over what block " + std::to_string(reader) + " read",
                 site);
        }
      }
    }
    if (granule.write_launch != launch_) bytes_written_ += 4;
    granule.write_launch = launch_;
    granule.writer = view_->block;
    granule.write_epoch = view_->epoch;
    granule.write_site = site;
  }
}

}  // namespace sida::harness
