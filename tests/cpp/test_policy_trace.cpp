// Policies on made-up routings: next_use must stay close to the best there is, and never behind the others.
#include "experts/policy_trace.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iomanip>
#include <numeric>
#include <random>
#include <set>

#include "base/error.h"
#include "check.h"

using namespace sida;

namespace {

enum class Kind { uniform, zipf, clustered };
constexpr const char* kind_names[] = {"uniform", "zipf", "clustered"};

double unit(std::mt19937_64& random) {
  return static_cast<double>(random() >> 11) * 0x1p-53;
}

// Distinct experts of `tokens` tokens. uniform: any; zipf: weight 1 / rank, ranks shuffled in each layer; clustered:
// every sentence belongs to one of a few topics, each with a few experts of its own that most of its tokens go to.
RoutingTrace make_trace(Kind kind, int32_t layers, int32_t experts, int batches, int tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  RoutingTrace trace{layers, experts, {}};
  constexpr int topics = 8;
  std::vector<std::vector<int32_t>> order(static_cast<size_t>(layers) * topics, std::vector<int32_t>(experts));
  for (auto& ranks : order) {
    std::iota(ranks.begin(), ranks.end(), 0);
    for (size_t i = ranks.size(); i > 1; --i) std::swap(ranks[i - 1], ranks[random() % i]);
  }
  for (int batch = 0; batch < batches; ++batch) {
    AnnouncedBatch made;
    const size_t topic = kind == Kind::clustered ? random() % topics : 0;
    for (int32_t layer = 0; layer < layers; ++layer) {
      const auto& ranks = order[static_cast<size_t>(layer) * topics + topic];
      std::vector<int32_t> wanted;
      for (int token = 0; token < tokens; ++token) {
        double at = unit(random);
        if (kind == Kind::zipf) at = (std::pow(experts + 1.0, at) - 1) / experts;
        if (kind == Kind::clustered && unit(random) < 0.8) at /= 6;
        const int32_t expert = ranks[std::min<size_t>(experts - 1, static_cast<size_t>(at * experts))];
        if (std::find(wanted.begin(), wanted.end(), expert) == wanted.end()) wanted.push_back(expert);
      }
      made.layers.push_back({layer, wanted});
    }
    trace.batches.push_back(made);
  }
  return trace;
}

// Distinct experts that the tables of `batches` neighbouring batches name, on average.
double named_ahead(const RoutingTrace& trace, size_t batches) {
  double total = 0;
  const size_t windows = trace.batches.size() - batches + 1;
  for (size_t begin = 0; begin < windows; ++begin) {
    std::set<ExpertKey> named;
    for (size_t i = begin; i < begin + batches; ++i) {
      for (const auto& layer : trace.batches[i].layers) {
        for (const int32_t index : layer.experts) named.insert({layer.layer, index});
      }
    }
    total += static_cast<double>(named.size());
  }
  return total / static_cast<double>(windows);
}

PolicyResult run(const RoutingTrace& trace, Eviction eviction, int64_t slots, int lookahead) {
  return run_policy(trace, {eviction, slots, lookahead});
}

}  // namespace

SIDA_TEST(next_use_stays_close_to_the_optimum_and_ahead_of_the_others) {
  const bool print = std::getenv("SIDA_PRINT") != nullptr;
  for (const Kind kind : {Kind::uniform, Kind::zipf, Kind::clustered}) {
    for (const int percent : {10, 25, 50, 75, 90}) {
      for (const bool large : {false, true}) {
#ifdef SIDA_CHECKED  // the invariants look at all experts after each event: minutes for the large model
        if (large) continue;
#endif
        const auto trace = large ? make_trace(kind, 6, 128, 60, 32, 7) : make_trace(kind, 4, 32, 120, 24, 7);
        const int64_t slots = std::max<int64_t>(1, trace.layers * trace.experts * percent / 100);
        const PolicyResult optimal = run_optimal(trace, slots), ahead = run(trace, Eviction::next_use, slots, 4);
        const PolicyResult lru = run(trace, Eviction::lru, slots, 0), lfu = run(trace, Eviction::lfu, slots, 0);
        const PolicyResult fifo = run(trace, Eviction::fifo, slots, 0);
        if (print) {
          std::cout << std::setw(4) << static_cast<int>(100.0 * static_cast<double>(slots) / named_ahead(trace, 5))
                    << "% of named; " << std::setw(9) << kind_names[static_cast<int>(kind)] << " " << trace.layers
                    << "x" << trace.experts << " " << percent << " %: hit rates optimal " << std::fixed
                    << std::setprecision(4) << optimal.hit_rate() << " next_use " << ahead.hit_rate() << " lru "
                    << lru.hit_rate() << " lfu " << lfu.hit_rate() << " fifo " << fifo.hit_rate()
                    << "; next_use/optimal hits "
                    << static_cast<double>(ahead.hits()) / static_cast<double>(std::max<int64_t>(1, optimal.hits()))
                    << " reads " << static_cast<double>(ahead.loads) / static_cast<double>(optimal.loads) << " late "
                    << ahead.demanded_loads << " wasted " << ahead.wasted_prefetches << "\n";
        }
        CHECK_EQ(ahead.wanted, optimal.wanted);
        CHECK(ahead.hits() <= optimal.hits());
        // Where the slots come near the number of experts that the tables name, the rest of the choice is a guess for
        // everybody but the optimum, which knows all the future.
        const double share = static_cast<double>(slots) <= 0.6 * named_ahead(trace, 5) ? 0.97 : 0.9;
        CHECK(static_cast<double>(ahead.hits()) >= share * static_cast<double>(optimal.hits()));
        for (const PolicyResult& other : {lru, lfu, fifo}) {
          CHECK(other.hits() <= optimal.hits());
          CHECK(ahead.hits() >= other.hits());
        }
        if (optimal.hit_rate() > lru.hit_rate() + 0.01) CHECK(ahead.hits() > lru.hits());
      }
    }
  }
}

SIDA_TEST(the_optimum_of_a_small_case_is_the_known_one) {
  // One layer, three slots, the page references of Belady's textbook example: 9 faults.
  RoutingTrace trace{1, 8, {}};
  for (const int32_t page : {7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1}) {
    trace.batches.push_back({{{0, {page}}}});
  }
  CHECK_EQ(run_optimal(trace, 3).loads, 9);
  CHECK_EQ(run(trace, Eviction::fifo, 3, 0).loads, 15);
  CHECK_EQ(run(trace, Eviction::lru, 3, 0).loads, 12);
}

SIDA_TEST(wrong_tables_cost_reads_and_nothing_else) {
  const auto trace = make_trace(Kind::zipf, 4, 32, 60, 24, 3), other = make_trace(Kind::uniform, 4, 32, 60, 24, 4);
  const PolicyResult right = run_policy(trace, {Eviction::next_use, 40, 4});
  const PolicyResult wrong = run_policy(trace, {Eviction::next_use, 40, 4}, other.batches);
  CHECK_EQ(right.wanted, wrong.wanted);
  CHECK(wrong.loads > right.loads);
  CHECK(wrong.wasted_prefetches > 0);
  CHECK_EQ(right.wasted_prefetches, 0);
  CHECK_THROWS(run_policy(trace, {}, {other.batches[0]}), Error, "60 batches, but 1 tables");
  CHECK_THROWS(run_optimal(trace, 0), Error, "0 slots");
}

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
