// TierSource: the expert memory of one engine as the source of the engine above it (slots of a GPU over a host pool).
#pragma once

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "device/device.h"
#include "experts/transfer.h"

namespace sida {

class TierSource final : public RecordSource, public RecordLender {
 public:
  TierSource(std::shared_ptr<TransferEngine> below, int32_t experts) : below_(std::move(below)), experts_(experts) {}

  void read(int64_t record, void* into) override {
    std::memcpy(into, lend(record)->data(), static_cast<size_t>(below_->format().record_bytes()));
  }

  std::unique_ptr<LentRecord> lend(int64_t record) override {
    const auto layer = static_cast<int32_t>(record / experts_), index = static_cast<int32_t>(record % experts_);
    auto lent = std::make_unique<Pinned>(below_, below_->demand(layer, {&index, 1}));
    const Wave wave = below_->next_wave(lent->demand, [this] { return interrupted_.load(); });
    lent->at = static_cast<const char*>(below_->slot_base()) + wave.slots.at(0) * below_->format().record_bytes();
    return lent;
  }
  bool holds_all() const override { return below_->budget() == below_->capacity(); }
  void interrupt() override { interrupted_ = true; }
  std::string name_of(int64_t record) const override {
    return below_->name_of({static_cast<int32_t>(record / experts_), static_cast<int32_t>(record % experts_)});
  }

 private:
  // Ends its demand, which keeps the record where it is until then.
  struct Pinned final : LentRecord {
    Pinned(std::shared_ptr<TransferEngine> from, DemandId id) : engine(std::move(from)), demand(id) {}
    ~Pinned() override { engine->finish(demand); }
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;
    const void* data() const override { return at; }

    const std::shared_ptr<TransferEngine> engine;
    const DemandId demand;
    const void* at = nullptr;
  };

  const std::shared_ptr<TransferEngine> below_;
  const int32_t experts_;  // per layer
  std::atomic<bool> interrupted_{false};
};

}  // namespace sida
