// Instruction sets of the CPU kernels, chosen at run time.
//
// Every kernel is compiled for scalar, AVX2 and AVX-512 from one source (each_isa.h), so that one binary built for
// baseline x86-64 runs everywhere. The other levels are what a single kernel can use on top (bf16 dot product for
// quant_lora_mix, VNNI and tiles for the low-bit products); a kernel without a variant of its own runs the one below.
#pragma once
#include <cstdint>

namespace jointnas {

// The `isa` of every function: kAuto, the best of this CPU, or the level to run.
enum Isa : int { kAuto = 0, kScalar = 1, kAvx2 = 2, kAvxVnni = 3, kAvx512 = 4, kAvx512Ext = 5, kAmx = 6 };

enum Feature : uint32_t {
  kNoFeature = 0,
  kHasAvx2 = 1u << 0,
  kHasAvx512 = 1u << 1,
  kHasBf16 = 1u << 2,
  kHasVnni = 1u << 3,
  kHasVpopcnt = 1u << 4,
  kHasAvxVnni = 1u << 5,
  kHasAmx = 1u << 6,
  kIsIntel = 1u << 7,
};
constexpr struct {
  Feature bit;
  const char* name;
} kFeatures[] = {
    {kHasAvx2, "avx2"},  // and FMA
    {kHasAvx512, "avx512f"},  // + BW + DQ + VL
    {kHasBf16, "avx512_bf16"},
    {kHasVnni, "avx512_vnni"},
    {kHasVpopcnt, "avx512_vpopcntdq"},
    {kHasAvxVnni, "avx_vnni"},  // VNNI for 256 bits without AVX-512: laptops
    {kHasAmx, "amx"},  // tiles of int8 and bf16, and Linux lets this process use them
};

uint32_t cpu_features();

// The level to run: the best one for `requested == kAuto`, else the requested one; 0 if this CPU lacks it.
// `extra`: features that kAvx512Ext and kAmx need on top of AVX-512; kNoFeature when the kernel has neither.
int choose_isa(int requested, uint32_t extra = kNoFeature);

}  // namespace jointnas
