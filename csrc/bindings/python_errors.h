// Engine errors as Python exceptions, and Ctrl-C during a wait.
#pragma once

#include <Python.h>

#include "base/error.h"

namespace sida {

// Gives the GIL up for a scope, if this thread holds it: no lock of the engine is ever waited for with the GIL held.
class WithoutGil {
 public:
  WithoutGil() : state_(PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Takes the GIL for a scope, whether or not this thread holds it.
class WithGil {
 public:
  WithGil() : state_(PyGILState_Ensure()) {}
  ~WithGil() { PyGILState_Release(state_); }
  WithGil(const WithGil&) = delete;
  WithGil& operator=(const WithGil&) = delete;

 private:
  PyGILState_STATE state_;
};

// The Python class of sida_ext.errors.StoreError, set when the module is imported.
inline PyObject*& store_error_class() {
  static PyObject* type = nullptr;
  return type;
}

// Sets the Python error of an engine error; the GIL must be held.
inline void set_python_error(const Error& error) {
  PyObject* type = PyExc_RuntimeError;
  switch (error.kind()) {
    case ErrorKind::invalid:
      type = PyExc_ValueError;
      break;
    case ErrorKind::store:
      type = store_error_class() != nullptr ? store_error_class() : PyExc_RuntimeError;
      break;
    case ErrorKind::io:
      type = PyExc_OSError;
      break;
    case ErrorKind::timeout:
      type = PyExc_TimeoutError;
      break;
    case ErrorKind::closed:
    case ErrorKind::internal:
      break;
  }
  PyErr_SetString(type, error.what());
}

// True if a signal handler raised (Ctrl-C): the Python error stays set for the caller to hand on.
inline bool signal_raised() {
  const WithGil held;
  return PyErr_CheckSignals() != 0;
}

}  // namespace sida
