// Which instruction set is chosen on which CPU, and what is said where there is none: on made-up CPUs.
#include "base/error.h"
#include "check.h"
#include "kernels/cpu/instruction_set.h"

using namespace sida;
using namespace sida::cpu;

namespace {

CpuFeatures avx2_cpu() {
  CpuFeatures cpu;
  cpu.avx2 = cpu.fma = cpu.f16c = true;
  cpu.saved_state = 0x7;
  return cpu;
}

CpuFeatures avx512_cpu() {
  CpuFeatures cpu = avx2_cpu();
  cpu.avx512f = cpu.avx512bw = cpu.avx512vl = cpu.avx512dq = true;
  cpu.saved_state = 0xe7;
  return cpu;
}

CpuFeatures amx_cpu() {
  CpuFeatures cpu = avx512_cpu();
  cpu.avx512_vnni = cpu.avx512_bf16 = cpu.amx_tile = cpu.amx_bf16 = true;
  cpu.tiles = 8;
  cpu.tile_rows = 16;
  cpu.tile_row_bytes = 64;
  cpu.saved_state = 0x600e7;
  return cpu;
}

}  // namespace

#if defined(__x86_64__)

SIDA_TEST(the_best_set_that_is_taken_by_default) {
  CHECK_EQ(choose_set(nullptr, CpuFeatures()).name, "scalar");
  CHECK_EQ(choose_set(nullptr, avx2_cpu()).name, "avx2");
  CHECK_EQ(choose_set("", avx512_cpu()).name, "avx512");
  CHECK_EQ(choose_set(nullptr, amx_cpu()).name, "amx");
  CHECK_EQ(choose_set("amx", amx_cpu()).name, "amx");
  CHECK_EQ(choose_set("scalar", amx_cpu()).name, "scalar");
}

SIDA_TEST(each_missing_feature_is_named) {
  const auto without = [](auto change) {
    CpuFeatures cpu = amx_cpu();
    change(cpu);
    return cpu;
  };
  const auto amx_without = [&](auto change) { return choose_set("amx", without(change)).name; };
  CHECK_THROWS(amx_without([](CpuFeatures& cpu) { cpu.amx_tile = false; }), Error,
               "SIDA_CPU is 'amx', but this machine lacks AMX-TILE; available here: avx512, avx2, scalar");
  CHECK_THROWS(amx_without([](CpuFeatures& cpu) { cpu.amx_bf16 = false; }), Error, "lacks AMX-BF16;");
  CHECK_THROWS(amx_without([](CpuFeatures& cpu) { cpu.saved_state &= ~uint64_t{0x40000}; }), Error,
               "lacks an operating system that saves tile registers;");
  CHECK_THROWS(amx_without([](CpuFeatures& cpu) { cpu.saved_state &= ~uint64_t{0x20000}; }), Error,
               "lacks an operating system that saves tile registers;");
  CHECK_THROWS(amx_without([](CpuFeatures& cpu) { cpu.tile_rows = 8; }), Error, "lacks eight tiles of 16 rows");
  CHECK_THROWS(amx_without([](CpuFeatures& cpu) { cpu.avx512bw = false; }), Error, "lacks AVX512BW;");
  for (const uint64_t state : {0x7, 0x27, 0xa7, 0xc7, 0x67}) {
    CHECK_THROWS(choose_set("avx512", without([&](CpuFeatures& cpu) { cpu.saved_state = state; })), Error,
                 "an operating system that saves 512-bit registers");
  }
  for (const uint64_t state : {0x0, 0x1, 0x3, 0x5}) {
    CHECK_EQ(choose_set(nullptr, without([&](CpuFeatures& cpu) { cpu.saved_state = state; })).name, "scalar");
  }
  CHECK_THROWS(choose_set("avx2", CpuFeatures()), Error,
               "SIDA_CPU is 'avx2', but this machine lacks AVX2, FMA, F16C, an operating system that saves 256-bit");
}

SIDA_TEST(sets_that_no_cpu_could_give) {
  CHECK_THROWS(choose_set("neon", amx_cpu()), Error,
               "SIDA_CPU is 'neon', which this build for x86-64 does not have; available here: amx, avx512");
  CHECK_THROWS(
      choose_set("sse9", avx2_cpu()), Error,
      "SIDA_CPU is 'sse9', which no build has (scalar, avx2, avx512, amx, neon); available here: avx2, scalar;");
  CHECK_THROWS(choose_set("AVX2", avx2_cpu()), Error, "SIDA_CPU is 'AVX2', which no build has");
}

SIDA_TEST(fast_is_where_its_instruction_is) {
  const auto lacks = [](const char* name, const CpuFeatures& cpu) {
    return lacks_for_fast(choose_set(name, cpu), cpu);
  };
  CHECK_EQ(lacks("amx", amx_cpu()), "");
  CHECK_EQ(lacks("avx512", amx_cpu()), "");
  CHECK_EQ(lacks("avx512", avx512_cpu()), "AVX512_VNNI");
  CHECK_EQ(lacks("avx2", avx2_cpu()), "");
  CHECK_EQ(lacks("scalar", amx_cpu()), "kernels that round activations");
  CpuFeatures zen4 = avx512_cpu();
  zen4.avx512_vnni = true;
  const auto fast = [](const CpuFeatures& cpu) { return choose_set("avx512", cpu).fast(cpu); };
  CHECK(fast(zen4) == avx512_vnni_kernels());
  zen4.avx512_bf16 = true;
  CHECK(fast(zen4) == avx512_bf16_kernels());
  CHECK(fast(amx_cpu()) == avx512_vnni_kernels());
  CHECK(choose_set("amx", amx_cpu()).fast(amx_cpu()) == amx_fast_kernels());
}

SIDA_TEST(detection_agrees_with_the_compiler) {
  const CpuFeatures cpu = detect_cpu();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  CHECK_EQ(lacks_for_avx2(cpu).empty(), avx2);
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  CHECK_EQ(lacks_for_avx512(cpu).empty(), avx512);
  CHECK_EQ(lacks_for_avx512_bf16(cpu).empty(), avx512 && __builtin_cpu_supports("avx512bf16"));
}

#else

SIDA_TEST(no_set_of_another_architecture) {
  for (const char* name : {"avx2", "avx512", "amx"}) {
    CHECK_THROWS(choose_set(name, amx_cpu()), Error, "does not have; available here:");
  }
  CHECK_THROWS(choose_set("sse9", avx2_cpu()), Error, "which no build has");
  CHECK(!choose_set(nullptr, CpuFeatures()).name.empty());
}

#endif

// The set in force here is one of these; a machine with AVX512_BF16 or AMX takes the first way.
SIDA_TEST(precision_is_exact_until_told_and_never_pretends) {
  CHECK(precision() == Precision::exact);
  const Kernels* const exact = &kernels();
  if (precisions().size() == 2) {
    set_precision(Precision::fast);
    CHECK(precision() == Precision::fast);
    CHECK(&kernels() != exact);
    set_precision(Precision::exact);
  } else {
    CHECK_THROWS(
        set_precision(Precision::fast), Error,
        std::string("precision is 'fast', but the instruction set in force, ") + instruction_set() + ", lacks");
  }
  CHECK(precision() == Precision::exact);
  CHECK(&kernels() == exact);
}

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
