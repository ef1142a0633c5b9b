// ExpertStore and its checksums: what is right is read, what is wrong has its own error.
#include "experts/store.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "store_file.h"

using namespace sida;
using namespace sida::test;

namespace {

struct Record {
  explicit Record(int64_t bytes) : data(std::aligned_alloc(4096, static_cast<size_t>(bytes))) {}
  ~Record() { std::free(data); }
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;
  void* data;
};

std::string write_file(const std::string& bytes) {
  const std::string path = (scratch() / "file").string();
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

}  // namespace

SIDA_TEST(crc32c_gives_the_published_values) {
  CHECK_EQ(crc32c("123456789", 9), 0xE3069283u);  // RFC 3720, B.4
  const std::vector<char> zeros(32, 0), ones(32, '\xff');
  CHECK_EQ(crc32c(zeros.data(), 32), 0x8A9136AAu);
  CHECK_EQ(crc32c(ones.data(), 32), 0x62A8AB43u);
  CHECK_EQ(crc32c("456789", 6, crc32c("123", 3)), 0xE3069283u);
  CHECK_EQ(crc32c("", 0), 0u);
}

SIDA_TEST(instruction_and_table_agree) {
  std::vector<unsigned char> bytes(4096 * 5);
  uint32_t state = 1;
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>((state = state * 1664525 + 1013904223) >> 24);
  for (const int64_t length : {4096, 8192, 4096 * 5}) {
    const RecordChecksum fast = record_checksum(bytes.data(), length),
                         slow = record_checksum_by_table(bytes.data(), length);
    CHECK(fast == slow);
    for (int part = 0; part < 4; ++part) {
      CHECK_EQ(fast[part], crc32c(bytes.data() + part * length / 4, length / 4));
    }
  }
#if defined(__x86_64__)
  CHECK_EQ(std::string(checksum_instructions()), __builtin_cpu_supports("sse4.2") ? "sse4.2" : "table");
#endif
}

SIDA_TEST(every_record_is_read) {
  for (const ExpertFormat& format : std::vector<ExpertFormat>{{32, 64, DType::f32, false},
                                                              {16, 48, DType::i8, true},
                                                              {24, 40, DType::bf16, false},
                                                              {40, 72, DType::int4, true},
                                                              {64, 33, DType::mxfp4, false, true}}) {
    const StoreFile file(2, 5, format);
    const auto store = file.open();
    CHECK_EQ(store->header_json(), "{\"made\": \"for a test\"}");
    const Record record(format.record_bytes());
    FileReader reader;
    for (int32_t layer = 0; layer < 2; ++layer) {
      for (int32_t index = 0; index < 5; ++index) {
        for (const int64_t read_bytes : {0, 4096, 8192}) {
          std::memset(record.data, 0, static_cast<size_t>(format.record_bytes()));
          store->read({layer, index}, record.data, reader, read_bytes);
          CHECK(file.holds(record.data, {layer, index}));
        }
      }
    }
    CHECK(store->verify_seconds() > 0);
  }
}

SIDA_TEST(what_is_no_store_is_told_apart) {
  CHECK_THROWS(ExpertStore::open("/nowhere/at/all"), Error, "No such file");
  CHECK_THROWS(ExpertStore::open(write_file("")), Error, "is not an expert store");
  CHECK_THROWS(ExpertStore::open(write_file("SIDAEXP1")), Error, "is not an expert store");
  CHECK_THROWS(ExpertStore::open(write_file(std::string(4096, 'x'))), Error, "is not an expert store");
  std::string long_header("SIDAEXP1");
  long_header += std::string("\xff\xff\xff\x00", 4) + std::string(4, 0);
  CHECK_THROWS(ExpertStore::open(write_file(long_header)), Error, "header is said to be");
  const StoreFile file;
  file.flip_bit(20);
  CHECK_THROWS(file.open(), Error, "header does not match its checksum");
}

SIDA_TEST(a_layout_that_does_not_fit_the_file_is_refused) {
  const StoreFile file;
  const auto try_layout = [&](auto change) {
    StoreLayout layout = file.layout();
    change(layout);
    ExpertStore::open(file.path())->set_layout(layout);
  };
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.layers = 0; }), Error, "do not fit together");
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.checksums.pop_back(); }), Error, "23 checksums");
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.layer_names.pop_back(); }), Error, "2 names");
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.data_offset = 100; }), Error, "data_offset is 100");
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.data_offset = 0; }), Error, "data_offset is 0");
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.format.d_ff = 128; }), Error, "truncated or damaged");
  // Sizes whose products do not fit 64 bits: 2^48 x 2^48 has a record of zero bytes, if nobody looks.
  constexpr int64_t huge = int64_t{1} << 48, largest = ExpertFormat::largest_dimension;
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.format.d_model = huge; }), Error, "d_model is 281474976710656");
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.format.d_model = l.format.d_ff = huge; }), Error, "expected 1 to");
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.format.d_ff = 0; }), Error, "d_ff is 0, expected 1 to 268435456");
  CHECK_THROWS(try_layout([](StoreLayout& l) {
                 l.format = {largest, largest, DType::f32, true, true};
                 CHECK(l.format.record_bytes() > 0 && l.format.record_bytes() < int64_t{1} << 61);
               }),
               Error, "more than a file can hold");
  CHECK_THROWS(try_layout([](StoreLayout& l) { l.data_offset = std::numeric_limits<int64_t>::max() / 4096 * 4096; }),
               Error, "more than a file can hold");
  const auto store = ExpertStore::open(file.path());
  CHECK_THROWS(store->layout(), Error, "layout was not set");
  file.truncate(file.offset_of({2, 7}));
  CHECK_THROWS(file.open(), Error, "truncated or damaged");
}

SIDA_TEST(a_bad_record_names_file_layer_and_expert) {
  const StoreFile file;
  const auto store = file.open();
  const Record record(file.layout().format.record_bytes());
  for (const int64_t at : {int64_t{0}, file.layout().format.record_bytes() - 1}) {
    file.flip_bit(file.offset_of({1, 3}) + at);
    CHECK_THROWS(store->read({1, 3}, record.data), Error, file.path() + ": the record of encoder.block.1 expert 3");
    store->read({1, 2}, record.data);
    store->read({1, 4}, record.data);
    file.flip_bit(file.offset_of({1, 3}) + at);
    store->read({1, 3}, record.data);
  }
}

SIDA_TEST(wrong_keys_and_unaligned_slots_are_refused) {
  const StoreFile file;
  const auto store = file.open();
  const Record record(file.layout().format.record_bytes() + 4096);
  CHECK_THROWS(store->read({3, 0}, record.data), Error, "no expert 0 in layer 3");
  CHECK_THROWS(store->read({0, 8}, record.data), Error, "no expert 8");
  CHECK_THROWS(store->read({-1, 0}, record.data), Error, "layer -1");
  CHECK_THROWS(store->read({0, 0}, static_cast<char*>(record.data) + 64), Error, "multiples of 4096");
  FileReader reader;
  CHECK_THROWS(store->read({0, 0}, record.data, reader, 1000), Error, "multiples of 4096");
}

// A file system that opens files for direct reads and then refuses to read.
SIDA_TEST(a_file_system_without_direct_reads_is_fallen_back_from_in_the_open) {
  class NoDirect final : public FileReader {
   public:
    ssize_t pread(int fd, void* into, size_t bytes, int64_t offset) override {
      if ((::fcntl(fd, F_GETFL) & O_DIRECT) == 0) return FileReader::pread(fd, into, bytes, offset);
      errno = EINVAL;
      return -1;
    }
  };
  const StoreFile file;
  const auto store = file.open();
  const bool had_direct = store->direct();
  const Record record(file.layout().format.record_bytes());
  NoDirect reader;
  store->read({2, 2}, record.data, reader, 0);
  CHECK(file.holds(record.data, {2, 2}));
  CHECK(!store->direct());
  if (!had_direct)
    std::cerr << "the folder for temporary files has no direct reads: nothing to fall back from" << std::endl;
}

int main(int argc, char** argv) {
  return run_all(argc, argv);
}
