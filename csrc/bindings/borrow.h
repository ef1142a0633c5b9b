// Experts of one layer lent to Python, wave by wave: for what no kernel computes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings/python_errors.h"
#include "experts/transfer.h"

namespace sida {

// A demand that Python drives. A record that was lent may be read until the next call of `next` or `finish`.
class Borrow {
 public:
  Borrow(std::shared_ptr<TransferEngine> engine, int32_t layer, const std::vector<int32_t>& experts, BatchId batch)
      : engine_(std::move(engine)), id_(engine_->demand(layer, experts, batch)) {}
  ~Borrow() { finish(); }
  Borrow(const Borrow&) = delete;
  Borrow& operator=(const Borrow&) = delete;

  // Gives the last wave back and waits for the next: pairs of an expert and its record. Empty at the end.
  std::vector<std::pair<int32_t, pybind11::memoryview>> next() {
    {
      const pybind11::gil_scoped_release released;
      if (!wave_.experts.empty()) engine_->release(id_, wave_);
      wave_ = {};
      wave_ = engine_->next_wave(id_, signal_raised);
    }
    std::vector<std::pair<int32_t, pybind11::memoryview>> lent;
    const int64_t bytes = engine_->format().record_bytes();
    for (size_t i = 0; i < wave_.experts.size(); ++i) {
      auto* const record = static_cast<std::byte*>(engine_->slot_base()) + wave_.slots[i] * bytes;
      lent.emplace_back(wave_.experts[i], pybind11::memoryview::from_memory(record, bytes, /*readonly=*/false));
    }
    return lent;
  }

  void finish() {
    if (finished_) return;
    finished_ = true;
    engine_->finish(id_);
  }

 private:
  std::shared_ptr<TransferEngine> engine_;
  DemandId id_;
  Wave wave_;
  bool finished_ = false;
};

}  // namespace sida
