#include "experts/store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace sida {
namespace {

constexpr int64_t largest_header = 64 << 20;
constexpr int most_reads_without_progress = 16;

// Reads exactly `bytes` at `offset`; false at the end of the file. Short reads and EINTR are gone on with.
bool read_fully(int fd, void* into, int64_t bytes, int64_t offset, const std::string& path) {
  auto* at = static_cast<char*>(into);
  while (bytes > 0) {
    const ssize_t got = ::pread(fd, at, static_cast<size_t>(bytes), offset);
    if (got < 0) {
      if (errno == EINTR) continue;
      fail(ErrorKind::io, path, ": reading ", bytes, " bytes at ", offset, " failed: ", std::strerror(errno));
    }
    if (got == 0) return false;
    at += got;
    bytes -= got;
    offset += got;
  }
  return true;
}

uint32_t little_endian(const unsigned char* bytes) {
  return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
}

int64_t size_of(int fd, const std::string& path) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) fail(ErrorKind::io, path, ": fstat failed: ", std::strerror(errno));
  return status.st_size;
}

}  // namespace

std::shared_ptr<ExpertStore> ExpertStore::open(const std::string& path) {
  std::shared_ptr<ExpertStore> store(new ExpertStore);
  store->path_ = path;
  store->fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (store->fd_ < 0) fail(ErrorKind::io, path, ": cannot open the expert store: ", std::strerror(errno));
  store->file_bytes_ = size_of(store->fd_, path);
  unsigned char prologue[store_prologue_bytes];
  const bool whole =
      store->file_bytes_ >= store_prologue_bytes && read_fully(store->fd_, prologue, store_prologue_bytes, 0, path);
  if (!whole || std::memcmp(prologue, store_magic.data(), store_magic.size()) != 0) {
    fail(ErrorKind::store, path, " is not an expert store: it does not begin with ", store_magic,
         "; make one with: sida pack CHECKPOINT -o STORE");
  }
  const int64_t length = little_endian(prologue + 8);
  if (length > largest_header || store_prologue_bytes + length > store->file_bytes_) {
    fail(ErrorKind::store, path, ": the header is said to be ", length, " bytes long, but the file has ",
         store->file_bytes_, "; it is damaged or truncated, pack the checkpoint again");
  }
  store->header_.resize(length);
  if (!read_fully(store->fd_, store->header_.data(), length, store_prologue_bytes, path) ||
      crc32c(store->header_.data(), length) != little_endian(prologue + 12)) {
    fail(ErrorKind::store, path, ": the header does not match its checksum; the file is damaged, pack the checkpoint ",
         "again");
  }
  // Where the file system has no O_DIRECT the records come through the page cache; direct() says so.
  store->record_fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  store->direct_ = store->record_fd_ >= 0;
  if (!store->direct_ && errno != EINVAL) {
    fail(ErrorKind::io, path, ": cannot open the expert store for direct reads: ", std::strerror(errno));
  }
  return store;
}

ExpertStore::~ExpertStore() {
  for (const int fd : {fd_, record_fd_}) {
    if (fd >= 0) ::close(fd);
  }
}

void ExpertStore::set_layout(StoreLayout layout) {
  const int64_t records = static_cast<int64_t>(layout.layers) * layout.experts;
  if (layout.layers < 1 || layout.experts < 1 || static_cast<int64_t>(layout.checksums.size()) != records ||
      static_cast<int32_t>(layout.layer_names.size()) != layout.layers) {
    fail(ErrorKind::store, path_, ": ", layout.layers, " layers of ", layout.experts, " experts with ",
         layout.checksums.size(), " checksums and ", layout.layer_names.size(), " names do not fit together");
  }
  const int64_t first = store_prologue_bytes + static_cast<int64_t>(header_.size());
  if (layout.data_offset < first || layout.data_offset % ExpertFormat::record_alignment != 0) {
    fail(ErrorKind::store, path_, ": data_offset is ", layout.data_offset, ", expected a multiple of ",
         ExpertFormat::record_alignment, " of at least ", first);
  }
  const ExpertFormat& format = layout.format;
  for (const auto& [name, size] : {std::pair{"d_model", format.d_model}, {"d_ff", format.d_ff}}) {
    if (!ExpertFormat::is_dimension(size)) {
      fail(ErrorKind::store, path_, ": ", name, " is ", size, ", expected 1 to ", ExpertFormat::largest_dimension,
           "; the header is damaged, pack the checkpoint again");
    }
  }
  // What the header says is multiplied: a product that does not fit 64 bits belongs to no file.
  int64_t expected = 0;
  if (__builtin_mul_overflow(records, format.record_bytes(), &expected) ||
      __builtin_add_overflow(expected, layout.data_offset, &expected)) {
    fail(ErrorKind::store, path_, ": ", records, " experts of ", format.record_bytes(), " bytes from ",
         layout.data_offset, " on are more than a file can hold; the header is damaged, pack the checkpoint again");
  }
  if (file_bytes_ != expected) {
    fail(ErrorKind::store, path_, " has ", file_bytes_, " bytes, expected ", expected, " (", records, " experts of ",
         format.record_bytes(), " bytes); it is truncated or damaged, pack the checkpoint again");
  }
  layout_ = std::move(layout);
  has_layout_ = true;
}

const StoreLayout& ExpertStore::layout() const {
  if (!has_layout_) fail(ErrorKind::internal, path_, ": the layout was not set before it was used");
  return layout_;
}

std::string ExpertStore::name_of(ExpertKey key) const {
  return layout().layer_names[key.layer] + " expert " + std::to_string(key.index);
}

void ExpertStore::read(ExpertKey key, void* slot) const {
  FileReader reader;
  read(key, slot, reader, 0);
}

void ExpertStore::read(ExpertKey key, void* slot, FileReader& reader, int64_t read_bytes) const {
  const StoreLayout& layout = this->layout();
  if (key.layer < 0 || key.layer >= layout.layers || key.index < 0 || key.index >= layout.experts) {
    fail(ErrorKind::invalid, path_, ": there is no expert ", key.index, " in layer ", key.layer, "; the store has ",
         layout.layers, " layers of ", layout.experts, " experts");
  }
  if (reinterpret_cast<uintptr_t>(slot) % ExpertFormat::record_alignment != 0 || read_bytes < 0 ||
      read_bytes % ExpertFormat::record_alignment != 0) {
    fail(ErrorKind::invalid, path_, ": slot ", slot, " and read_bytes ", read_bytes, ": expected multiples of ",
         ExpertFormat::record_alignment);
  }
  const int64_t number = static_cast<int64_t>(key.layer) * layout.experts + key.index;
  const int64_t bytes = layout.format.record_bytes(), begin = layout.data_offset + number * bytes;
  const int64_t part = read_bytes == 0 ? bytes : read_bytes;
  for (int64_t at = 0; at < bytes; at += part) {
    read_bytes_of(key, static_cast<char*>(slot) + at, std::min(part, bytes - at), begin + at, reader);
  }
  const auto verify_begin = std::chrono::steady_clock::now();
  const bool right = record_checksum(slot, bytes) == layout.checksums[number];
  verify_ns_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - verify_begin).count();
  if (!right) {
    fail(ErrorKind::store, path_, ": the record of ", name_of(key),
         " does not match its checksum; the file or the disk is damaged, pack the checkpoint again");
  }
}

// Reads exactly `bytes` at `offset`. A short read is gone on with from the last whole block: direct reads know no other
// place.
void ExpertStore::read_bytes_of(ExpertKey key, char* into, int64_t bytes, int64_t offset, FileReader& reader) const {
  int without_progress = 0;
  while (bytes > 0) {
    const bool direct = direct_;
    const ssize_t got = reader.pread(direct ? record_fd_ : fd_, into, static_cast<size_t>(bytes), offset);
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno == EINVAL && direct) {
        direct_ = false;  // seen in direct(), in the statistics and in `sida info`
        continue;
      }
      fail(ErrorKind::io, path_, ": reading ", name_of(key), ", ", bytes, " bytes at ", offset,
           ", failed: ", std::strerror(errno));
    }
    const int64_t whole = got / ExpertFormat::record_alignment * ExpertFormat::record_alignment;
    if (got < bytes && size_of(fd_, path_) < offset + bytes) {
      fail(ErrorKind::store, path_, ": the file ends inside ", name_of(key), "; it was truncated while it was open");
    }
    if (whole == 0 && ++without_progress == most_reads_without_progress) {
      fail(ErrorKind::io, path_, ": reading ", name_of(key), " at ", offset, " gave less than a block of ",
           ExpertFormat::record_alignment, " bytes ", without_progress, " times");
    }
    if (whole > 0) without_progress = 0;
    into += whole;
    bytes -= whole;
    offset += whole;
  }
}

}  // namespace sida
