// Instruction sets of the CPU kernels, chosen at run time.
//
// Every kernel is compiled for scalar, AVX2 and AVX-512 from one source (each_isa.h), so that one binary built for
// baseline x86-64 runs everywhere. The other levels are what a single kernel can use on top (bf16 dot product for
// quant_lora_mix, VNNI and tiles for the low-bit products); a kernel without a variant of its own runs the one below.
#pragma once
#include <cstdint>

namespace jointnas {

enum Isa : int { kAuto = 0, kScalar = 1, kAvx2 = 2, kAvxVnni = 3, kAvx512 = 4, kAvx512Ext = 5, kAmx = 6 };

enum Feature : uint32_t {
  kNone = 0,
  kHasAvx2 = 1u << 0,  // AVX2 + FMA
  kHasAvx512 = 1u << 1,  // F + BW + DQ + VL
  kHasBf16 = 1u << 2,  // AVX512_BF16
  kHasVnni = 1u << 3,  // AVX512_VNNI
  kHasVbmi = 1u << 4,  // AVX512_VBMI
  kHasVpopcnt = 1u << 5,  // AVX512_VPOPCNTDQ
  kHasAvxVnni = 1u << 6,  // VNNI for 256 bits without AVX-512: laptops
  kHasAmx = 1u << 7,  // AMX tiles of int8 and bf16, and the kernel lets this process use them
  kIsIntel = 1u << 8,
};

enum Error : int { kOk = 0, kBadArgument = 1, kIsaMissing = 2, kNoMemory = 3 };

uint32_t cpu_features();

// The level to run: the best one for `requested == kAuto`, else the requested one; 0 if this CPU lacks it.
// `extra`: features that kAvx512Ext and kAmx need on top of AVX-512; kNone when the kernel has neither.
int choose_isa(int requested, uint32_t extra = kNone);

}  // namespace jointnas
