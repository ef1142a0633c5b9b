#include "store_file.h"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <vector>

#include "base/error.h"

namespace sida::test {
namespace {

struct Scratch {
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("sida-test-" + std::to_string(::getpid()));
  const pid_t owner = ::getpid();
  Scratch() { std::filesystem::create_directories(path); }
  ~Scratch() {
    if (::getpid() == owner) std::filesystem::remove_all(path);
  }
};

constexpr char header[] = "{\"made\": \"for a test\"}";

}  // namespace

const std::filesystem::path& scratch() {
  static const Scratch folder;
  return folder.path;
}

StoreFile::StoreFile(int32_t layers, int32_t experts, ExpertFormat format) {
  static std::atomic<int> count{0};
  path_ = scratch() / ("store-" + std::to_string(count++));
  layout_ = {format, layers, experts, ExpertFormat::record_alignment, {}, {}};
  std::vector<char> bytes(layout_.data_offset, 0);
  const auto put = [&](size_t at, uint32_t value) {
    for (int i = 0; i < 4; ++i) bytes[at + i] = static_cast<char>(value >> 8 * i);
  };
  const size_t length = sizeof header - 1;
  std::memcpy(bytes.data(), store_magic.data(), store_magic.size());
  put(8, static_cast<uint32_t>(length));
  put(12, crc32c(header, static_cast<int64_t>(length)));
  std::memcpy(bytes.data() + 16, header, length);
  std::ofstream file(path_, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  std::vector<uint64_t> record(format.record_bytes() / 8);
  for (int32_t layer = 0; layer < layers; ++layer) {
    layout_.layer_names.push_back("encoder.block." + std::to_string(layer));
    for (int32_t index = 0; index < experts; ++index) {
      for (size_t i = 0; i < record.size(); ++i) record[i] = word_of({layer, index}, static_cast<int64_t>(i));
      layout_.checksums.push_back(record_checksum(record.data(), format.record_bytes()));
      file.write(reinterpret_cast<const char*>(record.data()), static_cast<std::streamsize>(format.record_bytes()));
    }
  }
  if (!file.flush()) fail(ErrorKind::io, path_, ": cannot write a store for a test");
}

StoreFile::~StoreFile() {
  std::filesystem::remove(path_);
}

std::shared_ptr<ExpertStore> StoreFile::open() const {
  auto store = ExpertStore::open(path_);
  store->set_layout(layout_);
  return store;
}

int64_t StoreFile::offset_of(ExpertKey key) const {
  return layout_.data_offset + (int64_t{key.layer} * layout_.experts + key.index) * layout_.format.record_bytes();
}

void StoreFile::flip_bit(int64_t offset) const {
  std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
  file.seekg(offset);
  const int byte = file.get();
  file.seekp(offset);
  file.put(static_cast<char>(byte ^ 4));
}

void StoreFile::truncate(int64_t bytes) const {
  std::filesystem::resize_file(path_, static_cast<uintmax_t>(bytes));
}

void StoreFile::write(int64_t offset, const std::string& bytes) const {
  std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(offset);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

uint64_t StoreFile::word_of(ExpertKey key, int64_t position) {
  return (static_cast<uint64_t>(key.layer) << 20 | static_cast<uint64_t>(key.index)) * 0x9E3779B97F4A7C15u +
         static_cast<uint64_t>(position);
}

bool StoreFile::holds(const void* record, ExpertKey key) const {
  const int64_t words = layout_.format.record_bytes() / 8;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, static_cast<const char*>(record) + i * 8, 8);
    if (word != word_of(key, i)) return false;
  }
  return true;
}

}  // namespace sida::test
