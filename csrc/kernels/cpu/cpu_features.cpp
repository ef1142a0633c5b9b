// CPUID, XGETBV and the request for tile registers.
#include "kernels/cpu/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace sida::cpu {
namespace {

// Bits of XCR0 (Intel SDM volume 1, 13.1).
constexpr uint64_t ymm_state = 0x6, zmm_state = 0xe6, tile_state = 0x60000;

class Missing {
 public:
  void want(bool has, const char* what) {
    if (!has) text_.append(text_.empty() ? "" : ", ").append(what);
  }
  void want(const std::string& others) {
    if (!others.empty()) want(false, others.c_str());
  }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

}  // namespace

std::string lacks_nothing(const CpuFeatures&) {
  return {};
}

std::string lacks_for_avx2(const CpuFeatures& cpu) {
  Missing missing;
  missing.want(cpu.avx2, "AVX2");
  missing.want(cpu.fma, "FMA");
  missing.want(cpu.f16c, "F16C");
  missing.want((cpu.saved_state & ymm_state) == ymm_state, "an operating system that saves 256-bit registers");
  return missing.take();
}

std::string lacks_for_avx512(const CpuFeatures& cpu) {
  Missing missing;
  missing.want(lacks_for_avx2(cpu));
  missing.want(cpu.avx512f, "AVX512F");
  missing.want(cpu.avx512bw, "AVX512BW");
  missing.want(cpu.avx512vl, "AVX512VL");
  missing.want(cpu.avx512dq, "AVX512DQ");
  missing.want((cpu.saved_state & zmm_state) == zmm_state, "an operating system that saves 512-bit registers");
  return missing.take();
}

std::string lacks_for_avx512_bf16(const CpuFeatures& cpu) {
  Missing missing;
  missing.want(lacks_for_avx512(cpu));
  missing.want(cpu.avx512_bf16, "AVX512_BF16");
  return missing.take();
}

std::string lacks_for_avx512_vnni(const CpuFeatures& cpu) {
  Missing missing;
  missing.want(lacks_for_avx512(cpu));
  missing.want(cpu.avx512_vnni, "AVX512_VNNI");
  return missing.take();
}

std::string lacks_for_amx(const CpuFeatures& cpu) {
  Missing missing;
  missing.want(lacks_for_avx512(cpu));
  missing.want(cpu.amx_tile, "AMX-TILE");
  missing.want(cpu.amx_bf16, "AMX-BF16");
  missing.want(cpu.tiles >= 8 && cpu.tile_rows >= 16 && cpu.tile_row_bytes >= 64, "eight tiles of 16 rows of 64 bytes");
  missing.want((cpu.saved_state & tile_state) == tile_state, "an operating system that saves tile registers");
  return missing.take();
}

std::string lacks_for_neon_dot(const CpuFeatures& cpu) {
  Missing missing;
  missing.want(cpu.neon_dot, "the dot products of Armv8.2 (asimddp)");
  return missing.take();
}

#if defined(__x86_64__)

CpuFeatures detect_cpu() {
  CpuFeatures cpu;
  uint32_t a, b, c, d;
  const auto bit = [](uint32_t word, int number) { return (word >> number & 1) != 0; };
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return cpu;
  cpu.fma = bit(c, 12);
  cpu.f16c = bit(c, 29);
  if (bit(c, 27)) {  // OSXSAVE: XGETBV may be executed
    uint32_t low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    cpu.saved_state = uint64_t{high} << 32 | low;
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return cpu;
  const uint32_t last_subleaf = a;
  cpu.avx2 = bit(b, 5);
  cpu.avx512f = bit(b, 16);
  cpu.avx512dq = bit(b, 17);
  cpu.avx512bw = bit(b, 30);
  cpu.avx512vl = bit(b, 31);
  cpu.avx512_vnni = bit(c, 11);
  cpu.amx_bf16 = bit(d, 22);
  cpu.amx_tile = bit(d, 24);
  if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) cpu.avx512_bf16 = bit(a, 5);
  if (cpu.amx_tile && __get_cpuid_count(0x1d, 0, &a, &b, &c, &d) != 0 && a >= 1 &&
      __get_cpuid_count(0x1d, 1, &a, &b, &c, &d) != 0) {
    cpu.tile_row_bytes = b & 0xffff;
    cpu.tiles = b >> 16;
    cpu.tile_rows = c & 0xffff;
  }
  return cpu;
}

std::string request_tile_registers() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (::syscall(SYS_arch_prctl, request_permission, tile_data) == 0) return {};
  return std::string("the operating system refused the tile registers (arch_prctl(ARCH_REQ_XCOMP_PERM): ") +
         std::strerror(errno) + ")";
}

#else

CpuFeatures detect_cpu() {
  CpuFeatures cpu;
#if defined(__aarch64__)
  cpu.neon_dot = (::getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
  return cpu;
}

std::string request_tile_registers() {
  return "this architecture has no tile registers";
}

#endif

}  // namespace sida::cpu
