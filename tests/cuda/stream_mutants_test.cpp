// Every bug of stream_mutations.cmake must be caught, and in the way that is named here: by random programs over the
// slots alone, by the whole engine with its kernels, or while another thread captures a graph.
#include <algorithm>
#include <chrono>
#include <functional>
#include <iostream>
#include <set>
#include <string>
#include <vector>

#include "cpp/check.h"
#include "cpp/cuda_machine.h"
#include "cpp/mutants/mutants.h"
#include "harness/harness.h"
#include "serving_case.h"
#include "slots_program.h"

namespace sida::cuda_test {
namespace {

using test::Mutant;

struct Planted {
  const char* bug;
  const char* expected;  // part of what is said; empty: anything
};

// Which of the two ends of a missing order is reported first depends on the threads.
constexpr const char* unordered = "is not ordered after";

const std::vector<Planted> found_by_programs = {
    {"no_copy_wait", "kernel"},
    {"no_reader_wait", "copy"},
    {"newest_reader_only", "is not ordered after kernel"},
    {"filled_too_early", "is not ordered after copy"},
    {"wrong_lane", "is not ordered after copy"},
    {"slots_default_stream", "default stream"},
    {"no_refill_wait", "copy"},
    {"stale_wait", "kernel"},
    {"one_lane_waited", "kernel"},
    {"stream_by_handle", unordered},
    {"oldest_of_lane", "is not ordered after copy"},
    {"given_back_early", unordered},
    {"page_given_back", "given back, or never taken"},
    {"event_reused", "is not ordered after kernel"},
    {"freed_too_soon", "free"},
    {"event_leaked", "an event was never destroyed"},
    {"source_too_early", "host write"},
};

const std::vector<Planted> found_by_serving = {
    {"no_before_read", unordered},
    {"no_after_read", ""},
    {"after_read_early", unordered},
    {"released_early", ""},
    {"kernels_default_stream", "default stream"},
    {"other_stream_read", "default stream"},
    {"index_unwaited", unordered},
    {"staging_reused", unordered},
    {"source_returned_early", unordered},
    {"held_while_lending", "waited"},
    {"no_copy_wait", unordered},
    {"no_reader_wait", unordered},
    {"filled_too_early", unordered},
    {"wrong_lane", unordered},
    {"slots_default_stream", "default stream"},
    {"stale_wait", unordered},
    {"freed_too_soon", unordered},
    {"given_back_early", ""},
    {"event_leaked", "never destroyed"},
    {"source_too_early", ""},
};

const char* const found_by_captures = "captures_spoiled";

void judge(const Planted& planted, uint64_t runs, const std::string& caught) {
  std::cout << planted.bug << " (" << runs << " runs): " << caught << std::endl;
  if (caught.empty() || caught.find(planted.expected) == std::string::npos) {
    test::report(__FILE__, __LINE__, std::string(planted.bug) + " gave '" + caught + "', expected " + planted.expected);
  }
}

Program program_of(uint64_t seed) {
  Program program;
  program.seed = seed;
  program.reuse_given_back = false;
  return program;
}

SIDA_TEST(random_programs_find_the_bugs_of_the_slots) {
  for (const Planted& planted : found_by_programs) {
    const Mutant mutant(planted.bug);
    std::string caught;
    uint64_t seed = 0;
    while (caught.empty() && seed < 20) {
      Recording recording(++seed);
      Wanted wanted;
      record(recording, program_of(seed), wanted);
      // A mistake may show in several ways; the one that is its own is asked for.
      for (const std::string& problem : recording.problems()) {
        if (caught.empty() || problem.find(planted.expected) != std::string::npos) caught = problem;
      }
    }
    judge(planted, seed, caught);
  }
}

// A hazard is not only named: some order of the replay gives a wrong value.
SIDA_TEST(a_hazard_gives_wrong_values_in_some_order) {
  for (const char* const bug : {"no_copy_wait", "no_reader_wait"}) {
    bool wrong = false;
    for (uint64_t seed = 1; seed <= 10 && !wrong; ++seed) {
      Recording recording(seed);
      Wanted wanted;
      {
        const Mutant mutant(bug);
        record(recording, program_of(seed), wanted);
      }
      for (uint64_t order = 0; order < 20 && !wrong; ++order) {
        recording.replay(order);
        wrong = !as_wanted(wanted);
      }
    }
    CHECK(wrong);
  }
}

// How a mistake shows: what the recording or the harness says, an error of the engine, or other bits.
std::string how_caught(const Model& model, const std::vector<unsigned char>& expected, const Setting& setting) {
  harness::global_reset();
  Recording recording(setting.seed, harness_memory());
  prepare(recording);
  try {
    Forward forward(recording, model, setting);
    const Served served = forward.run();
    if (!recording.problems().empty()) return recording.problems().front();
    if (!same(served, expected)) return "other bits";
    for (uint64_t order = 1; order <= 4; ++order) {
      recording.replay(order);
      if (!same(served, expected)) return "other bits in a replay";
    }
  } catch (const std::exception& error) {
    return recording.problems().empty() ? error.what() : recording.problems().front();
  }
  return "";
}

Setting setting_of(uint64_t seed) {
  Setting setting;
  setting.seed = seed;
  setting.host_slots = 1 + static_cast<int64_t>(seed % 4);
  setting.slots = 2 + static_cast<int64_t>(seed % 3);
  setting.resized = seed % 2 == 0;
  return setting;
}

SIDA_TEST(serving_finds_the_bugs_of_the_engine) {
  const Model model(9, DType::bf16);
  const std::vector<unsigned char> expected = reference(model);
  for (const Planted& planted : found_by_serving) {
    const std::string bug = planted.bug;
    const Mutant mutant(bug);
    std::string caught;
    uint64_t seed = 0;
    // Which thread comes first is not ours to say: a mistake shows in some of the runs.
    while (caught.empty() && seed < 200) {
      Setting setting = setting_of(++seed);
      if (bug == "held_while_lending") setting.wait_deadline = std::chrono::milliseconds(200);
      caught = how_caught(model, expected, setting);
    }
    judge(planted, seed, caught);
  }
}

SIDA_TEST(a_lane_that_minds_captures_is_found) {
  const Mutant mutant(found_by_captures);
  const std::vector<std::string> problems = test::problems_of_lanes_during_a_capture();
  for (const char* const call : {"map_page", "event_synchronize", "event_create"}) {
    const std::string said = std::string(call) + " while a graph is captured by another thread";
    if (std::find(problems.begin(), problems.end(), said) == problems.end()) {
      test::report(__FILE__, __LINE__, std::string(found_by_captures) + " did not give '" + said + "'");
    }
  }
}

SIDA_TEST(nothing_is_reported_without_a_bug) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Recording recording(seed);
    Wanted wanted;
    record(recording, program_of(seed), wanted);
    CHECK(recording.problems().empty());
    recording.replay(seed);
    CHECK(as_wanted(wanted));
  }
  const Model model(9, DType::bf16);
  const std::vector<unsigned char> expected = reference(model);
  for (uint64_t seed = 1; seed <= 6; ++seed) CHECK_EQ(how_caught(model, expected, setting_of(seed)), "");
  CHECK(test::problems_of_lanes_during_a_capture().empty());
}

SIDA_TEST(the_list_is_complete) {
  std::set<std::string> seen{found_by_captures};
  for (const auto* list : {&found_by_programs, &found_by_serving}) {
    for (const Planted& planted : *list) seen.insert(planted.bug);
  }
  for (const std::string& bug : test::mutants()) {
    if (!seen.contains(bug)) test::report(__FILE__, __LINE__, "planted bug " + bug + " has no test");
  }
  CHECK_EQ(test::mutants().size(), seen.size());
  // Ten bugs of the slots are found both ways.
  CHECK_EQ(found_by_programs.size() + found_by_serving.size() + 1, 38u);
}

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
