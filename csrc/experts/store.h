// ExpertStore: the file of aligned expert records.
//
//   bytes 0..7     magic "SIDAEXP1"
//   bytes 8..11    header length n, little-endian uint32
//   bytes 12..15   CRC-32C of the header's n bytes
//   bytes 16..     header: n bytes of UTF-8 JSON (parsed by sida_ext/experts/store.py, which then calls set_layout)
//   then           records, each at a multiple of 4096 bytes, in the order layer-major, expert-minor
//
// Each record carries four CRC-32Cs, one for each quarter of its (padded) bytes, so that one thread can compute them
// side by side.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "experts/expert.h"
#include "experts/faults.h"

namespace sida {

inline constexpr std::string_view store_magic = "SIDAEXP1";
inline constexpr int64_t store_prologue_bytes = 16;

using RecordChecksum = std::array<uint32_t, 4>;

RecordChecksum record_checksum(const void* record, int64_t bytes);  // bytes: a multiple of 4096
uint32_t crc32c(const void* data, int64_t bytes, uint32_t seed = 0);
// The same by table, whatever the CPU has.
RecordChecksum record_checksum_by_table(const void* record, int64_t bytes);
// What record_checksum uses on this CPU: "sse4.2", "armv8" or "table".
const char* checksum_instructions();

struct StoreLayout {
  ExpertFormat format;
  int32_t layers, experts;                // experts per layer
  int64_t data_offset;                    // of the first record
  std::vector<RecordChecksum> checksums;  // [layers * experts]
  std::vector<std::string> layer_names;   // for messages
};

class ExpertStore {
 public:
  // Opens the file and checks magic, length and the header's checksum.
  static std::shared_ptr<ExpertStore> open(const std::string& path);
  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  const std::string& header_json() const { return header_; }
  // Checks the layout against the file's size; must be called once before a record is read.
  void set_layout(StoreLayout layout);
  const StoreLayout& layout() const;
  const std::string& path() const { return path_; }
  // Whether records are read past the page cache; false where the file system lacks O_DIRECT.
  bool direct() const { return direct_; }
  // Reads one record into `slot` (aligned to 4096) and verifies it, with reads of at most `read_bytes` (a multiple of
  // 4096; 0: the whole record at once). Error(store) if the bytes are not what they should be, Error(io) if the system
  // fails; both name file, layer and expert.
  void read(ExpertKey key, void* slot) const;
  void read(ExpertKey key, void* slot, FileReader& reader, int64_t read_bytes) const;
  // Spent in checksums so far, by all threads.
  double verify_seconds() const { return static_cast<double>(verify_ns_) * 1e-9; }
  // "encoder.block.1.layer.1.mlp expert 5", for messages.
  std::string name_of(ExpertKey key) const;

 private:
  ExpertStore() = default;
  void read_bytes_of(ExpertKey key, char* into, int64_t bytes, int64_t offset, FileReader& reader) const;

  std::string path_, header_;
  int fd_ = -1;                              // page-cached, for the header
  int record_fd_ = -1;                       // O_DIRECT where the file system has it
  mutable std::atomic<bool> direct_{false};  // some file systems open a file for direct reads and then refuse them
  mutable std::atomic<int64_t> verify_ns_{0};
  int64_t file_bytes_ = 0;
  bool has_layout_ = false;
  StoreLayout layout_{};
};

}  // namespace sida
