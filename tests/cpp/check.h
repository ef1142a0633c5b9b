// The few macros that the C++ tests need: each test is a function, a failed check is counted and printed, not fatal.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace sida::test {

struct Case {
  const char* name;
  std::function<void()> body;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, std::function<void()> body) { cases().push_back({name, std::move(body)}); }
};

inline void report(const char* file, int line, const std::string& what) {
  ++failures();
  std::cerr << file << ":" << line << ": " << what << std::endl;
}

// Runs every case whose name contains argv[1] (all without one); the last line counts them.
inline int run_all(int argc, char** argv) {
  int passed = 0, failed = 0;
  for (const Case& test : cases()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const int before = failures();
    try {
      test.body();
    } catch (const std::exception& error) {
      report(test.name, 0, std::string("threw: ") + error.what());
    }
    const bool ok = failures() == before;
    (ok ? passed : failed)++;
    if (!ok) std::cerr << "FAILED " << test.name << std::endl;
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace sida::test

#define SIDA_TEST(name)                                       \
  static void name();                                         \
  static ::sida::test::Register register_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                                     \
  do {                                                                                       \
    if (!(condition)) ::sida::test::report(__FILE__, __LINE__, "CHECK failed: " #condition); \
  } while (false)

#define CHECK_EQ(left, right)                                                                 \
  do {                                                                                        \
    const auto& left_value = (left);                                                          \
    const auto& right_value = (right);                                                        \
    if (!(left_value == right_value)) {                                                       \
      std::ostringstream text;                                                                \
      text << "CHECK_EQ failed: " #left " is " << left_value << ", expected " << right_value; \
      ::sida::test::report(__FILE__, __LINE__, text.str());                                   \
    }                                                                                         \
  } while (false)

// The expression must throw an `exception` whose message contains `part`.
#define CHECK_THROWS(expression, exception, part)                                                   \
  do {                                                                                              \
    bool threw = false;                                                                             \
    try {                                                                                           \
      (void)(expression);                                                                           \
    } catch (const exception& error) {                                                              \
      threw = true;                                                                                 \
      if (std::string(error.what()).find(part) == std::string::npos)                                \
        ::sida::test::report(__FILE__, __LINE__,                                                    \
                             std::string("message '") + error.what() + "' lacks '" + (part) + "'"); \
    }                                                                                               \
    if (!threw) ::sida::test::report(__FILE__, __LINE__, "did not throw: " #expression);            \
  } while (false)
