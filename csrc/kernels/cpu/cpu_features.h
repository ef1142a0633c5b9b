// What the CPU has and the operating system lets programs use, as data: tests make CPUs up.
#pragma once

#include <cstdint>
#include <string>

namespace sida::cpu {

// Zero and false on an architecture that has no such thing.
struct CpuFeatures {
  // CPUID
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false, avx512_bf16 = false, avx512_vnni = false;
  bool amx_tile = false, amx_bf16 = false;
  // Palette 1 of AMX: how many tiles, of how many rows, of how many bytes.
  uint32_t tiles = 0, tile_rows = 0, tile_row_bytes = 0;
  // XGETBV: the registers that the operating system saves (XCR0); 0 where it saves none by XSAVE.
  uint64_t saved_state = 0;
  bool neon_dot = false;  // HWCAP_ASIMDDP
};

CpuFeatures detect_cpu();

// What is missing for an instruction set, in words; empty where nothing is.
std::string lacks_nothing(const CpuFeatures& cpu);
std::string lacks_for_avx2(const CpuFeatures& cpu);
std::string lacks_for_avx512(const CpuFeatures& cpu);
std::string lacks_for_avx512_bf16(const CpuFeatures& cpu);
std::string lacks_for_avx512_vnni(const CpuFeatures& cpu);
std::string lacks_for_amx(const CpuFeatures& cpu);
std::string lacks_for_neon_dot(const CpuFeatures& cpu);

// Linux gives a process the tile registers only when asked. For the whole process, for good; threads started before
// and after have them too. Empty, or why it was refused.
std::string request_tile_registers();

}  // namespace sida::cpu
