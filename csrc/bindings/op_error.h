// Errors of an op as the Python exceptions of their kinds.
//
// torch's stable ABI has no exception types: what an op throws reaches Python as RuntimeError, unless pybind11, through
// which every call from Python comes, knows what to raise for it. It asks a builtin_exception for that, whatever copy
// of pybind11 torch was built with: the class has been a std::runtime_error with one virtual function, set_error(),
// since pybind11 2.0. On any other way out of torch it is a RuntimeError with the same message.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include "bindings/python_errors.h"

namespace sida {

class OpError final : public pybind11::builtin_exception {
 public:
  OpError(PyObject* type, const std::string& what) : builtin_exception(what), type_(type) {}

  // Of an engine error. A signal that ended a wait has left its own exception on this thread (KeyboardInterrupt), which
  // says more than ours. Takes the GIL.
  static OpError of(const Error& error) {
    const WithGil held;
    if (PyErr_Occurred() == nullptr) set_python_error(error);
    OpError made(PyExc_RuntimeError, error.what());
    made.raised_ = std::make_shared<Raised>();
    return made;
  }

  void set_error() const override {
    if (raised_ == nullptr) {
      PyErr_SetString(type_, what());
    } else {
      raised_->restore();
    }
  }

 private:
  // The Python error of this thread, taken off it. The GIL must be held where it is made and where it is restored.
  struct Raised {
    PyObject *type = nullptr, *value = nullptr, *trace = nullptr;

    Raised() { PyErr_Fetch(&type, &value, &trace); }
    ~Raised() {
      const WithGil held;
      Py_XDECREF(type);
      Py_XDECREF(value);
      Py_XDECREF(trace);
    }
    Raised(const Raised&) = delete;
    Raised& operator=(const Raised&) = delete;

    void restore() const { PyErr_Restore(Py_XNewRef(type), Py_XNewRef(value), Py_XNewRef(trace)); }
  };

  PyObject* type_;  // a static exception of Python
  std::shared_ptr<Raised> raised_;
};

// Throws an OpError whose message is the concatenation of `parts`.
template <class... Parts>
[[noreturn]] void raise(PyObject* type, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw OpError(type, text.str());
}

// Runs `body` and turns an engine error into the Python exception of its kind.
template <class Body>
auto with_python_errors(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    throw OpError::of(error);
  }
}

}  // namespace sida

// Macros, so that a message is only put together for an error.
#define SIDA_CHECK(type, condition, ...) \
  do {                                   \
    if (!(condition)) [[unlikely]]       \
      ::sida::raise(type, __VA_ARGS__);  \
  } while (false)
#define CHECK_VALUE(condition, ...) SIDA_CHECK(PyExc_ValueError, condition, __VA_ARGS__)
#define CHECK_TYPE(condition, ...) SIDA_CHECK(PyExc_TypeError, condition, __VA_ARGS__)
#define CHECK_INDEX(condition, ...) SIDA_CHECK(PyExc_IndexError, condition, __VA_ARGS__)
