// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78): by the CPU's instruction where there is one, else by table.
#include <cstring>

#include "experts/store.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace sida {
namespace {

constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = value & 1 ? value >> 1 ^ 0x82F63B78u : value >> 1;
    tables[0][byte] = value;
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (int i = 1; i < 8; ++i) tables[i][byte] = tables[i - 1][byte] >> 8 ^ tables[0][tables[i - 1][byte] & 0xff];
  }
  return tables;
}

constexpr auto tables = make_tables();

uint64_t load8(const uint8_t* data) {
  uint64_t value;
  std::memcpy(&value, data, 8);
  return value;
}

uint32_t step8_table(uint32_t crc, uint64_t word) {
  word ^= crc;
  uint32_t next = 0;
  for (int i = 0; i < 8; ++i) next ^= tables[7 - i][word >> 8 * i & 0xff];
  return next;
}

uint32_t step1_table(uint32_t crc, uint8_t byte) {
  return crc >> 8 ^ tables[0][(crc ^ byte) & 0xff];
}

uint32_t run_table(uint32_t crc, const uint8_t* data, int64_t bytes) {
  for (; bytes >= 8; bytes -= 8, data += 8) crc = step8_table(crc, load8(data));
  for (; bytes > 0; --bytes, ++data) crc = step1_table(crc, *data);
  return crc;
}

// The instruction has a latency of three cycles and can start each cycle: four streams keep it busy.
#if defined(__x86_64__)
constexpr const char* instructions = "sse4.2";

__attribute__((target("sse4.2"))) RecordChecksum record_by_instruction(const uint8_t* data, int64_t quarter) {
  uint64_t a = ~0u, b = ~0u, c = ~0u, d = ~0u;
  for (int64_t i = 0; i < quarter; i += 8) {
    a = _mm_crc32_u64(a, load8(data + i));
    b = _mm_crc32_u64(b, load8(data + quarter + i));
    c = _mm_crc32_u64(c, load8(data + 2 * quarter + i));
    d = _mm_crc32_u64(d, load8(data + 3 * quarter + i));
  }
  return {~static_cast<uint32_t>(a), ~static_cast<uint32_t>(b), ~static_cast<uint32_t>(c), ~static_cast<uint32_t>(d)};
}

bool has_instruction() {
  static const bool has = __builtin_cpu_supports("sse4.2");
  return has;
}
#elif defined(__aarch64__) && defined(__linux__)
constexpr const char* instructions = "armv8";

__attribute__((target("+crc"))) RecordChecksum record_by_instruction(const uint8_t* data, int64_t quarter) {
  uint32_t a = ~0u, b = ~0u, c = ~0u, d = ~0u;
  for (int64_t i = 0; i < quarter; i += 8) {
    a = __crc32cd(a, load8(data + i));
    b = __crc32cd(b, load8(data + quarter + i));
    c = __crc32cd(c, load8(data + 2 * quarter + i));
    d = __crc32cd(d, load8(data + 3 * quarter + i));
  }
  return {~a, ~b, ~c, ~d};
}

bool has_instruction() {
  static const bool has = (::getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
  return has;
}
#else
constexpr const char* instructions = "table";

RecordChecksum record_by_instruction(const uint8_t*, int64_t) {
  return {};
}
constexpr bool has_instruction() {
  return false;
}
#endif

}  // namespace

uint32_t crc32c(const void* data, int64_t bytes, uint32_t seed) {
  return ~run_table(~seed, static_cast<const uint8_t*>(data), bytes);
}

RecordChecksum record_checksum_by_table(const void* record, int64_t bytes) {
  const int64_t quarter = bytes / 4;
  RecordChecksum sums;
  for (int i = 0; i < 4; ++i) sums[i] = crc32c(static_cast<const uint8_t*>(record) + i * quarter, quarter);
  return sums;
}

RecordChecksum record_checksum(const void* record, int64_t bytes) {
  if (!has_instruction()) return record_checksum_by_table(record, bytes);
  return record_by_instruction(static_cast<const uint8_t*>(record), bytes / 4);
}

const char* checksum_instructions() {
  return has_instruction() ? instructions : "table";
}

}  // namespace sida
