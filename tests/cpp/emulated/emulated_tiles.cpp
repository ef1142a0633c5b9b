// The tile instructions of AMX in plain code.
#include "emulated/emulated_tiles.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <utility>

#include "emulated/bf16_arithmetic.h"

namespace sida::test {
namespace {

std::mutex fault_mutex;
std::vector<std::string> faults;

void record(std::string what) {
  const std::lock_guard lock(fault_mutex);
  if (faults.size() < 20) faults.push_back(std::move(what));
}

std::atomic<const char*> watched{nullptr};
std::atomic<int64_t> watched_bytes{0};

// Tiles that a thread forgets to release would be saved at every switch of threads from then on.
struct PerThread {
  TileUnit unit;
  ~PerThread() {
    if (unit.is_configured()) record("a thread ended with its tiles configured");
  }
};

}  // namespace

TileUnit& tile_unit() {
  static thread_local PerThread own;
  return own.unit;
}

std::vector<std::string> take_faults() {
  if (tile_unit().is_configured()) record("the calling thread's tiles are still configured");
  const std::lock_guard lock(fault_mutex);
  return std::exchange(faults, {});
}

void watch_loads_from(const void* data, int64_t bytes) {
  watched = static_cast<const char*>(data);
  watched_bytes = bytes;
}

bool TileUnit::is_usable(int tile, const char* instruction) {
  if (!is_configured_) {
    record(std::string(instruction) + " without a tile configuration");
    return false;
  }
  if (tile_[tile].rows == 0) {
    record(std::string(instruction) + " of tile " + std::to_string(tile) + ", which the configuration leaves out");
    return false;
  }
  return true;
}

void TileUnit::configure(const cpu::TileConfig& config) {
  bool is_good = config.palette == 1 && config.start_row == 0;
  for (const uint8_t byte : config.reserved) is_good = is_good && byte == 0;
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], row_bytes = config.row_bytes[i];
    is_good = is_good && rows <= max_rows && row_bytes <= max_row_bytes && (rows == 0) == (row_bytes == 0);
    if (i >= tiles) is_good = is_good && rows == 0;
  }
  if (!is_good) return record("LDTILECFG of a configuration that it refuses");
  is_configured_ = true;
  for (int i = 0; i < tiles; ++i) {
    tile_[i] = {};
    tile_[i].rows = config.rows[i];
    tile_[i].row_bytes = config.row_bytes[i];
  }
}

void TileUnit::release() {
  is_configured_ = false;
  for (Tile& tile : tile_) tile = {};
}

void TileUnit::zero(int tile) {
  if (is_usable(tile, "TILEZERO")) std::memset(tile_[tile].data, 0, sizeof(tile_[tile].data));
}

// Rows and bytes of a row past the tile's shape become zero.
void TileUnit::load(int tile, const void* from, int64_t stride) {
  if (!is_usable(tile, "TILELOADD")) return;
  Tile& to = tile_[tile];
  const char *const first = static_cast<const char*>(from), *const last = first + (to.rows - 1) * stride + to.row_bytes;
  const char* const begin = watched;
  if (begin != nullptr && first >= begin && first < begin + watched_bytes && last > begin + watched_bytes) {
    return record("TILELOADD past the end of the weights");
  }
  std::memset(to.data, 0, sizeof(to.data));
  for (int row = 0; row < to.rows; ++row) {
    std::memcpy(to.data[row], static_cast<const char*>(from) + row * stride, to.row_bytes);
  }
}

void TileUnit::store(int tile, void* to, int64_t stride) {
  if (!is_usable(tile, "TILESTORED")) return;
  const Tile& from = tile_[tile];
  for (int row = 0; row < from.rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, from.data[row], from.row_bytes);
  }
}

// The even and the odd elements of a row's pairs are chains of their own, added at the end and then to the sum.
void TileUnit::multiply_add(int sum, int a, int b) {
  if (!is_usable(sum, "TDPBF16PS") || !is_usable(a, "TDPBF16PS") || !is_usable(b, "TDPBF16PS")) return;
  const Tile &left = tile_[a], &right = tile_[b];
  Tile& to = tile_[sum];
  const bool fits = sum != a && sum != b && a != b && to.rows == left.rows && to.row_bytes == right.row_bytes &&
                    left.row_bytes == 4 * right.rows && to.row_bytes % 4 == 0;
  if (!fits) {
    return record("TDPBF16PS of tiles " + std::to_string(sum) + ", " + std::to_string(a) + ", " + std::to_string(b) +
                  ", whose shapes do not fit");
  }
  const int pairs = left.row_bytes / 4, columns = to.row_bytes / 4;
  const auto word = [](const Tile& tile, int row, int column) {
    uint32_t value;
    std::memcpy(&value, tile.data[row] + 4 * column, 4);
    return value;
  };
  for (int m = 0; m < to.rows; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < pairs; ++k) {
      const uint32_t w = word(left, m, k);
      for (int n = 0; n < columns; ++n) {
        const uint32_t x = word(right, k, n);
        even[n] = flushed_multiply_add(low_bf16(w), low_bf16(x), even[n]);
        odd[n] = flushed_multiply_add(high_bf16(w), high_bf16(x), odd[n]);
      }
    }
    for (int n = 0; n < columns; ++n) {
      const float made = flushed_sum(even[n], odd[n]);
      const float total = flushed_sum(std::bit_cast<float>(word(to, m, n)), made);
      std::memcpy(to.data[m] + 4 * n, &total, 4);
    }
  }
}

}  // namespace sida::test
