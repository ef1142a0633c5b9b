// The bugs that mutate.cmake has planted in what a test is linked with, and a switch that lasts for a scope.
#pragma once

#include <string>
#include <vector>

#include "cpp/check.h"

namespace sida::test {

// Of the list that the test is linked with: names.cpp, made by mutate.cmake.
extern int mutation;
extern const char* const mutation_names[];
extern const int mutations;

inline std::vector<std::string> mutants() {
  return {mutation_names + 1, mutation_names + 1 + mutations};
}

// Switches one bug on; a name that is not on the list is a failure of the test.
class Mutant {
 public:
  explicit Mutant(const std::string& name) {
    for (int number = 1; number <= mutations; ++number) {
      if (mutation_names[number] == name) mutation = number;
    }
    if (mutation == 0) report(__FILE__, __LINE__, "no mutant is called " + name);
  }
  ~Mutant() { mutation = 0; }
  Mutant(const Mutant&) = delete;
  Mutant& operator=(const Mutant&) = delete;
};

}  // namespace sida::test
