// A small expert store on disk for tests; every 8-byte word of a record tells which expert it belongs to.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "experts/store.h"

namespace sida::test {

class StoreFile {
 public:
  // Records of 16 KiB (d_model 32, d_ff 64, fp32) unless another format is given.
  explicit StoreFile(int32_t layers = 3, int32_t experts = 8, ExpertFormat format = {32, 64, DType::f32, false});
  ~StoreFile();
  StoreFile(const StoreFile&) = delete;
  StoreFile& operator=(const StoreFile&) = delete;

  const std::string& path() const { return path_; }
  const StoreLayout& layout() const { return layout_; }
  std::shared_ptr<ExpertStore> open() const;
  int64_t offset_of(ExpertKey key) const;
  void flip_bit(int64_t offset) const;
  void truncate(int64_t bytes) const;
  void write(int64_t offset, const std::string& bytes) const;

  static uint64_t word_of(ExpertKey key, int64_t position);
  // Whether `record` holds exactly this expert.
  bool holds(const void* record, ExpertKey key) const;

 private:
  std::string path_;
  StoreLayout layout_;
};

// A folder for the files of one test program, removed when it ends.
const std::filesystem::path& scratch();

}  // namespace sida::test
