// SIDA_ASSERT(condition, parts...): what must hold if this code is right, whatever its caller passes. Checked in builds
// with a sanitizer and in debug builds (SIDA_CHECKED, see CMakeLists.txt), where it throws Error(internal); elsewhere
// it is not evaluated. What a caller may get wrong is checked in every build, with fail().
#pragma once

#include "base/error.h"

namespace sida {

#ifdef SIDA_CHECKED
constexpr bool checked_build = true;
#else
constexpr bool checked_build = false;
#endif

}  // namespace sida

#define SIDA_ASSERT(condition, ...)                                                                           \
  do {                                                                                                        \
    if (::sida::checked_build && !(condition)) {                                                              \
      ::sida::fail(::sida::ErrorKind::internal, __FILE__, ":", __LINE__, ": does not hold: " #condition "; ", \
                   __VA_ARGS__);                                                                              \
    }                                                                                                         \
  } while (false)
