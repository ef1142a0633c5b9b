// Kernels that multiply bfloat16 pairs (AMX, VDPBF16PS): the emulated instructions, the exact terms, every bit of the
// sums, the stated bounds; with SIDA_TEST_HARDWARE the real instructions, where the CPU has them, instead of emulated.
#include "bf16_case.h"
#include "emulated/simd_wide_dot.h"
#include "kernels/cpu/bf16_terms.h"
#include "kernels/cpu/cpu_features.h"

using namespace sida;
using namespace sida::test;

namespace {

bool is_hardware = false;
PairKernels tables{emulated_amx_kernels(), emulated_amx_fast_kernels(), emulated_dot_kernels()};

void fail_with(const std::optional<std::string>& found) {
  if (found) report(__FILE__, __LINE__, *found);
}

double exact_sum(const PairCase& test, int64_t t, int64_t r, double& magnitude, double& w_size, double& x_size) {
  double sum = 0.0;
  magnitude = w_size = x_size = 0.0;
  for (int64_t k = 0; k < test.width; ++k) {
    const double w = element(test.w.data(), DType::bf16, r * test.row_stride + k), x = test.token(t, k);
    sum += w * x;
    magnitude += std::fabs(w * x);
    w_size += std::fabs(w);
    x_size += std::fabs(x);
  }
  return sum;
}

// The largest |error| / (sum |w| |x|) that a table makes, beyond what flushing denormals may cost.
double largest_relative_error(const cpu::Kernels& table, PairCase& test) {
  const std::vector<float> found = test.run(table);
  CHECK_EQ(found.size(), static_cast<size_t>(test.tokens * test.rows));
  if (found.empty()) return INFINITY;
  double largest = 0.0;
  for (int64_t t = 0; t < test.tokens; ++t) {
    for (int64_t r = 0; r < test.rows; ++r) {
      double magnitude, w_size, x_size;
      const double sum = exact_sum(test, t, r, magnitude, w_size, x_size);
      const double flushed = 0x1p-126 * (w_size + x_size + 4.0 * static_cast<double>(test.width));
      const double error = std::max(std::fabs(found[t * test.rows + r] - sum) - flushed, 0.0);
      largest = std::max(largest, magnitude > 0.0 ? error / magnitude : error > 0.0 ? INFINITY : 0.0);
    }
  }
  return largest;
}

}  // namespace

SIDA_TEST(the_emulated_arithmetic_is_the_manuals) {
  CHECK_EQ(flushed_multiply_add(0x1p-130f, 0x1p100f, 1.0f), 1.0f);  // a denormal factor is zero
  CHECK_EQ(flushed_multiply_add(1.0f, 1.0f, 0x1p-130f), 1.0f);      // a denormal sum too
  CHECK_EQ(flushed_multiply_add(0x1p-70f, 0x1p-60f, 0.0f), 0.0f);   // a denormal result is made zero
  CHECK(std::signbit(flushed_multiply_add(-0x1p-70f, 0x1p-60f, 0.0f)));
  CHECK_EQ(flushed_multiply_add(0x1p-60f, 0x1p-60f, 0.0f), 0x1p-120f);
  // One rounding, to nearest even: 2^24 + 1 lies half way, and 1 - 2^-30 from a product is not rounded before.
  CHECK_EQ(flushed_multiply_add(1.0f, 1.0f, 0x1p24f), 0x1p24f);
  CHECK_EQ(flushed_multiply_add(1.0f, 1.0f, 0x1p24f + 2.0f), 0x1p24f + 4.0f);
  CHECK_EQ(flushed_multiply_add(1.0f + 0x1p-7f, 1.0f - 0x1p-7f, -1.0f), -0x1p-14f);
  CHECK(std::isnan(flushed_multiply_add(INFINITY, 0x1p-130f, 0.0f)));  // infinity times zero

  // VDPBF16PS adds the product of the upper elements first: 2^24 + 1 - 2^24 is 0, 1 + 2^24 - 2^24 would be 1 or 0.
  const auto pair = [](float low, float high) {
    return cpu::broadcast<cpu::SimdWideDot>(
        std::bit_cast<float>(uint32_t{to_bf16(low)} | uint32_t{to_bf16(high)} << 16));
  };
  cpu::SimdWideDot::F sum = cpu::broadcast<cpu::SimdWideDot>(0x1p24f);
  cpu::SimdWideDot::accumulate(sum, pair(-0x1p24f, 1.0f), pair(1.0f, 1.0f));
  CHECK_EQ(sum[5], 0.0f);
  sum = cpu::broadcast<cpu::SimdWideDot>(0x1p24f);
  cpu::SimdWideDot::accumulate(sum, pair(1.0f, -0x1p24f), pair(1.0f, 1.0f));
  CHECK_EQ(sum[5], 1.0f);
}

SIDA_TEST(a_tile_is_what_its_configuration_says) {
  TileUnit unit;
  alignas(64) float data[16 * 16];
  for (int i = 0; i < 256; ++i) data[i] = static_cast<float>(i);
  unit.load(0, data, 64);
  CHECK_EQ(take_faults().size(), 1u);  // nothing is configured
  cpu::TileConfig config;
  config.rows[0] = 3;
  config.row_bytes[0] = 8;
  unit.configure(config);
  unit.load(0, data, 64);
  float back[16 * 16] = {};
  unit.store(0, back, 64);
  CHECK(back[0] == 0.0f && back[1] == 1.0f && back[16] == 16.0f && back[33] == 33.0f);
  CHECK(back[2] == 0.0f && back[48] == 0.0f);
  CHECK(take_faults().empty());
  unit.load(1, data, 64);
  CHECK_EQ(take_faults().size(), 1u);  // tile 1 is left out
  for (const auto change : {0, 1, 2, 3, 4}) {
    cpu::TileConfig bad = config;
    if (change == 0) bad.rows[0] = 17;
    if (change == 1) bad.row_bytes[0] = 68;
    if (change == 2) bad.row_bytes[0] = 0;
    if (change == 3) bad.palette = 2;
    if (change == 4) bad.rows[9] = bad.row_bytes[9] = 4;
    unit.configure(bad);
    CHECK_EQ(take_faults().size(), 1u);
  }
  unit.release();
}

SIDA_TEST(tiles_multiply_pairs) {
  // [2 rows, 2 pairs] times [2 pairs, 3 columns], by hand: w = row + 1 in column k + 1 ..., x likewise.
  TileUnit unit;
  cpu::TileConfig config;
  const auto shape = [&](int tile, int rows, int row_bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
  };
  shape(0, 2, 12);
  shape(1, 2, 8);
  shape(2, 2, 12);
  unit.configure(config);
  uint16_t w[2][4], x[2][6];
  for (int r = 0; r < 2; ++r) {
    for (int k = 0; k < 4; ++k) w[r][k] = to_bf16(static_cast<float>(10 * r + k));
  }
  for (int p = 0; p < 2; ++p) {
    for (int i = 0; i < 6; ++i) x[p][i] = to_bf16(static_cast<float>(p * 6 + i + 1));
  }
  unit.load(1, w, 8);
  unit.load(2, x, 12);
  unit.multiply_add(0, 1, 2);
  unit.multiply_add(0, 1, 2);
  float sums[2][3];
  unit.store(0, sums, 12);
  for (int r = 0; r < 2; ++r) {
    for (int n = 0; n < 3; ++n) {
      float expected = 0.0f;
      for (int k = 0; k < 4; ++k) expected += static_cast<float>((10 * r + k) * (k / 2 * 6 + 2 * n + k % 2 + 1));
      CHECK_EQ(sums[r][n], 2.0f * expected);
    }
  }
  CHECK(take_faults().empty());
  unit.multiply_add(0, 2, 1);
  CHECK_EQ(take_faults().size(), 1u);  // shapes that do not fit
  unit.release();
}

SIDA_TEST(three_terms_add_up_to_every_float) {
  using S = cpu::SimdWide;
  std::mt19937_64 random(4);
  std::vector<float> values{0.0f, -0.0f,        3.4028235e38f, -3.4028235e38f, 0x1p-149f, 0x1.fffffep-127f,
                            1.0f, 0x1.fffffep0f};
  while (values.size() < 200000) values.push_back(std::bit_cast<float>(static_cast<uint32_t>(random())));
  values.resize(values.size() / 16 * 16);
  for (size_t i = 0; i < values.size(); i += 16) {
    S::F rest = cpu::load<S>(values.data() + i), term[3];
    for (auto& t : term) t = cpu::bits_as<S::F>(cpu::take_term<S>(rest));
    for (int lane = 0; lane < 16; ++lane) {
      const float x = values[i + lane];
      if (std::isnan(x)) {
        CHECK(std::isnan(term[0][lane]));
        CHECK(term[1][lane] == 0.0f && term[2][lane] == 0.0f);
      } else if (std::isinf(x)) {
        CHECK(term[0][lane] == x && term[1][lane] == 0.0f && term[2][lane] == 0.0f);
      } else {
        const double a = term[0][lane], b = term[1][lane], c = term[2][lane];
        CHECK(a * x >= 0.0 && b * x >= 0.0 && c * x >= 0.0);
        if (std::fabs(x) >= 0x1p-110f) {
          CHECK(a + b + c == static_cast<double>(x));
        } else {  // bfloat16 has no bits below 2^-133
          CHECK(std::fabs(a + b + c - x) < 0x1p-133);
        }
        for (const auto& t : term) CHECK_EQ(std::bit_cast<uint32_t>(t[lane]) & 0xffffu, 0u);
      }
    }
  }
}

SIDA_TEST(every_bit_of_the_sums_is_as_documented) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    const std::optional<std::string> found = violation(tables, seed);
    if (found && is_hardware) {
      // Nothing is promised of the order within an instruction; the bounds below hold for any.
      std::cout << "this CPU sums otherwise than Intel's manual says: " << *found << std::endl;
      return;
    }
    fail_with(found);
  }
}

SIDA_TEST(layers_are_within_the_bound_and_batch_invariant) {
  for (uint64_t seed = 1; seed <= 25; ++seed) {
    fail_with(layer_violation(tables.amx, false, seed));
    fail_with(layer_violation(tables.amx_fast, true, seed));
    fail_with(layer_violation(tables.dot, true, seed));
  }
}

// Roundings of fp32 on the way of a sum, in any order within an instruction.
double any_order(int64_t width) {
  return 3.0 * static_cast<double>(width) + 20.0;
}

// |error| <= (17 + 3 width / 32 + width / 1024) 2^-24 sum |w| |x|: roundings on a sum's way.
SIDA_TEST(exact_terms_keep_fp32_accuracy) {
  if (tables.amx == nullptr) return;
  for (const int64_t width : {1, 2, 31, 32, 33, 64, 100, 768, 1024, 1025, 3072}) {
    for (const DType x : {DType::f32, DType::bf16, DType::f16}) {
      PairCase test(33, 17, width, 3, x, 7 + width);
      const double steps = 17.0 + 3.0 * std::ceil(width / 32.0) + std::ceil(width / 1024.0);
      CHECK(largest_relative_error(*tables.amx, test) <= (is_hardware ? any_order(width) : steps) * 0x1p-24);
    }
  }
}

// The bound that sida_ext.set_precision states for a dot product: (2^-8 + (width + 2) 2^-24) sum |w| |x|.
SIDA_TEST(rounded_activations_are_within_the_stated_bound) {
  for (const cpu::Kernels* table : {tables.amx_fast, tables.dot}) {
    if (table == nullptr) continue;
    double largest = 0.0;
    for (const int64_t width : {2, 4, 30, 32, 64, 66, 128, 768, 3072, 4098}) {
      PairCase test(40, 19, width, 2, DType::f32, 100 + width);
      const double error = largest_relative_error(*table, test);
      if (error > 0x1p-8 + static_cast<double>(width + 2) * 0x1p-24) {
        std::ostringstream text;
        text << table->name << " width " << width << ": relative error " << error;
        report(__FILE__, __LINE__, text.str());
      }
      largest = std::max(largest, error);
    }
    CHECK(largest > 0x1p-9);  // it does round: the bound is not an idle one
    PairCase held(40, 19, 768, 2, DType::bf16, 3);
    CHECK(largest_relative_error(*table, held) <= 770 * 0x1p-24);  // nothing to round in x
  }
}

SIDA_TEST(denormals_cost_no_more_than_stated) {
  for (const cpu::Kernels* table : {tables.amx, tables.amx_fast, tables.dot}) {
    if (table == nullptr) continue;
    for (const float scale : {0x1p-120f, 0x1p-126f, 0x1p-130f, 0x1p-140f}) {
      PairCase test(20, 9, 70, 0, DType::f32, 5);
      for (int64_t i = 0; i < 9 * 70; ++i) {
        set_element(test.x.data(), DType::f32, i, static_cast<float>(element(test.x.data(), DType::f32, i)) * scale);
      }
      const bool rounds = table != tables.amx;
      CHECK(largest_relative_error(*table, test) <=
            (rounds ? 0x1p-8 : 0.0) + (is_hardware ? any_order(70) : 72.0) * 0x1p-24);
    }
  }
}

SIDA_TEST(infinite_factors_and_overflow_have_the_class_of_the_sum) {
  fail_with(class_violation(tables.amx));
}

int main(int argc, char** argv) {
  if (std::getenv("SIDA_TEST_HARDWARE") != nullptr) {
    try {
      is_hardware = true;
      const std::string set = cpu::instruction_set();
      tables = {};
      if (set == "amx") {
        tables = {&cpu::kernels(), nullptr, nullptr};
        cpu::set_precision(cpu::Precision::fast);
        tables.amx_fast = &cpu::kernels();
      } else {
        const std::string lacks = cpu::lacks_for_avx512_bf16(cpu::detect_cpu());
        if (!lacks.empty()) fail(ErrorKind::invalid, "this machine lacks ", lacks);
#if defined(__x86_64__)
        tables.dot = cpu::avx512_bf16_kernels();  // also on CPUs where it is not what "fast" takes
#endif
      }
      std::cout << "instruction set: " << set << std::endl;
    } catch (const Error& error) {
      std::cout << "skipped: " << error.what() << std::endl;
      return 77;
    }
  }
  return run_all(argc, argv);
}
