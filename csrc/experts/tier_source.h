// TierSource: the expert memory of one engine as the source of the engine above it (slots of a GPU over a host pool).
#pragma once

#include <atomic>
#include <cstring>
#include <memory>

#include "device/device.h"
#include "experts/transfer.h"

namespace sida {

class TierSource final : public RecordSource {
 public:
  TierSource(std::shared_ptr<TransferEngine> below, int32_t experts) : below_(std::move(below)), experts_(experts) {}

  void read(int64_t record, void* into) override {
    const auto layer = static_cast<int32_t>(record / experts_), index = static_cast<int32_t>(record % experts_);
    const DemandId demand = below_->demand(layer, {&index, 1});
    struct Finished {
      TransferEngine& engine;
      DemandId demand;
      ~Finished() { engine.finish(demand); }
    } const finished{*below_, demand};
    const Wave wave = below_->next_wave(demand, [this] { return interrupted_.load(); });
    const int64_t bytes = below_->format().record_bytes();
    std::memcpy(into, static_cast<const char*>(below_->slot_base()) + wave.slots.at(0) * bytes, bytes);
  }
  void interrupt() override { interrupted_ = true; }

 private:
  const std::shared_ptr<TransferEngine> below_;
  const int32_t experts_;  // per layer
  std::atomic<bool> interrupted_{false};
};

}  // namespace sida
