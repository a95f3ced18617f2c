// Instruction sets of the CPU kernels, chosen at run time.
//
// Every kernel is compiled for each level below from one source (each_isa.h), so that one binary built for
// baseline x86-64 runs everywhere. Level 4 adds what a single kernel can use on top of AVX-512 (bf16 dot
// product for quant_lora_mix, VNNI + VBMI for the low-bit products), hence its requirement is the kernel's own.
#pragma once
#include <cstdint>

namespace jnk {

enum Isa : int { kAuto = 0, kScalar = 1, kAvx2 = 2, kAvx512 = 3, kAvx512Ext = 4 };

enum Feature : uint32_t {
  kNone = 0,
  kHasAvx2 = 1u << 0,  // AVX2 + FMA
  kHasAvx512 = 1u << 1,  // F + BW + DQ + VL
  kHasBf16 = 1u << 2,  // AVX512_BF16
  kHasVnni = 1u << 3,  // AVX512_VNNI
  kHasVbmi = 1u << 4,  // AVX512_VBMI
  kHasVpopcnt = 1u << 5,  // AVX512_VPOPCNTDQ
};

enum Error : int { kOk = 0, kBadArgument = 1, kIsaMissing = 2, kNoMemory = 3 };

uint32_t cpu_features();

// The level to run: the best one for `requested == kAuto`, else the requested one; 0 if this CPU lacks it.
// `extra`: features that level 4 needs on top of AVX-512; kNone when the kernel has no level 4.
int choose_isa(int requested, uint32_t extra = kNone);

}  // namespace jnk
