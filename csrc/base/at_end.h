// Runs something when a scope is left, however.
#pragma once

#include <utility>

namespace sida {

template <class Body>
class AtEnd {
 public:
  explicit AtEnd(Body body) : body_(std::move(body)) {}
  ~AtEnd() { body_(); }
  AtEnd(const AtEnd&) = delete;
  AtEnd& operator=(const AtEnd&) = delete;

 private:
  Body body_;
};

}  // namespace sida
