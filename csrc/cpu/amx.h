// The instructions of AMX (Intel, since 2023) as functions. Eight tiles of up to 16 rows of 64 bytes, numbered at compile
// time. In assembly: compilers' own intrinsics do not say that a load reads memory.
#pragma once
#include <cstdint>

namespace jointnas::amx {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void release() { asm volatile("tilerelease" ::); }

template <int T>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
inline void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
// C[m][n] += sum_k A[m][k] B[k][n]: 4 signed bytes of A times 4 unsigned ones of B per 32 bits, sums in int32 ...
template <int C, int A, int B>
inline void dot_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// ... or 2 bf16 times 2 bf16, sums in fp32.
template <int C, int A, int B>
inline void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace jointnas::amx
