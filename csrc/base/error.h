// The one exception type that the engine and the kernels throw.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace sida {

// Kinds let the bindings raise the Python exception that a caller expects.
enum class ErrorKind {
  invalid,   // a value that the caller passed: ValueError
  store,     // the expert store is not what it should be: sida_ext.StoreError
  io,        // the operating system failed a read: OSError
  timeout,   // a wait passed its deadline: TimeoutError
  closed,    // used after close(): RuntimeError
  internal,  // an invariant of ours is broken: RuntimeError
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& what) : std::runtime_error(what), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

// Throws an Error whose message is the concatenation of `parts`.
template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(kind, text.str());
}

}  // namespace sida
