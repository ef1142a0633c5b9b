#include "bindings/layers.h"

#include <mutex>
#include <unordered_map>
#include <utility>

#include "base/error.h"

namespace sida {
namespace {

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Layer>> layers;
  int64_t next = 1;
};

// Never destroyed: a handle may be given back by a finaliser that runs at interpreter exit.
Registry& registry() {
  static auto* all = new Registry;
  return *all;
}

thread_local BatchId batch_of_thread = 0;

}  // namespace

int64_t register_layer(Layer layer) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const int64_t handle = all.next++;
  all.layers.emplace(handle, std::make_shared<const Layer>(std::move(layer)));
  return handle;
}

void unregister_layer(int64_t handle) noexcept {
  Registry& all = registry();
  std::unordered_map<int64_t, std::shared_ptr<const Layer>>::node_type gone;  // destroyed after the lock is given back
  const std::lock_guard lock(all.mutex);
  gone = all.layers.extract(handle);
}

std::shared_ptr<const Layer> find_layer(int64_t handle) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.layers.find(handle);
  if (found == all.layers.end()) {
    fail(ErrorKind::closed,
         "moe_layer: this model was closed (model.sida.close(), or its runtime's), and its experts are gone ",
         "from memory; load the model again (handle ", handle, " names no layer)");
  }
  return found->second;
}

BatchId current_batch() noexcept {
  return batch_of_thread;
}
void set_current_batch(BatchId batch) noexcept {
  batch_of_thread = batch;
}

}  // namespace sida
