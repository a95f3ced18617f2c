// wgmma (sm_90a): a warpgroup of 128 threads multiplies 64 rows of A, in registers, with B in shared memory.
//
// A: every warp holds 16 rows in the register layout of mma.m16n8k16 / m16n8k32. B: N columns, K-major, rows of 128
// bytes with the 128-byte swizzle (16-byte chunk index ^= column % 8), 1024-byte aligned; `b` points at the first byte of
// the k range, so consecutive steps add 32 bytes. D: like mma's C for each 8 columns. Every call zeroes D unless `add`.
#pragma once
#include <type_traits>

#include "cuda/ptx.cuh"

namespace jointnas::ptx {

#ifndef JN_EMULATE
// B in shared memory. The matrix descriptor's low word is address / 16 (stride 1 between chunks, unused when swizzled);
// its high word says 1024 bytes between 8-column blocks and the 128-byte swizzle. Shared memory ends below 2^18, so
// moving on is one addition.
struct Operand {
  uint32_t low;
  JN_DEVICE Operand(const void* b) : low(((shared_address(b) >> 4) & 0x3fff) | 0x10000) {}
  JN_DEVICE Operand after(int bytes) const {
    Operand moved = *this;
    moved.low += bytes / 16;
    return moved;
  }
  JN_DEVICE uint64_t descriptor() const { return uint64_t{0x40000040} << 32 | low; }
};
JN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
JN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> JN_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// Keeps the compiler from moving uses of an accumulator before the wait, on which they do not depend as it sees them:
// between each wait and the first use.
template <int N> JN_DEVICE void registers_fence(int (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(c[i])::"memory");
}
template <int N> JN_DEVICE void registers_fence(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
// ordinary writes to shared memory (cp.async too) become visible to wgmma
JN_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The operands of a product with N columns: sums of constraint `t`, then A, B and `add`; and their numbers.
#define JN_4(t, i) "+" t(c[i]), "+" t(c[i + 1]), "+" t(c[i + 2]), "+" t(c[i + 3])
#define JN_16(t, i) JN_4(t, i), JN_4(t, i + 4), JN_4(t, i + 8), JN_4(t, i + 12)
#define JN_SUMS_16(t) JN_4(t, 0), JN_4(t, 4)
#define JN_SUMS_32(t) JN_16(t, 0)
#define JN_SUMS_64(t) JN_16(t, 0), JN_16(t, 16)
#define JN_SUMS_128(t) JN_SUMS_64(t), JN_16(t, 32), JN_16(t, 48)
#define JN_FIRST_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define JN_NUMBERS_16 "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12"
#define JN_NUMBERS_32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20"
#define JN_NUMBERS_64 "{" JN_FIRST_32 "}, {%32,%33,%34,%35}, %36"
#define JN_NUMBERS_128 \
  "{" JN_FIRST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68"
#define JN_ADD_16 "%13"
#define JN_ADD_32 "%21"
#define JN_ADD_64 "%37"
#define JN_ADD_128 "%69"
#define JN_WGMMA(N, shape, t, flags) \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " JN_ADD_##N ", 0; wgmma.mma_async.sync.aligned." shape " " \
               JN_NUMBERS_##N ", p" flags "; }" \
               : JN_SUMS_##N(t) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "r"(static_cast<int>(add)))

template <class T, int N> JN_DEVICE void wgmma_m64k16(float (&c)[N / 2], const uint32_t (&a)[4], Operand b, bool add) {
  constexpr bool bf16 = std::is_same_v<T, BF16>;
  static_assert(N == 16 || N == 32 || N == 64 || N == 128);
  if constexpr (N == 16 && bf16) JN_WGMMA(16, "m64n16k16.f32.bf16.bf16", "f", ", 1, 1, 0");
  else if constexpr (N == 16) JN_WGMMA(16, "m64n16k16.f32.f16.f16", "f", ", 1, 1, 0");
  else if constexpr (N == 32 && bf16) JN_WGMMA(32, "m64n32k16.f32.bf16.bf16", "f", ", 1, 1, 0");
  else if constexpr (N == 32) JN_WGMMA(32, "m64n32k16.f32.f16.f16", "f", ", 1, 1, 0");
  else if constexpr (N == 64 && bf16) JN_WGMMA(64, "m64n64k16.f32.bf16.bf16", "f", ", 1, 1, 0");
  else if constexpr (N == 64) JN_WGMMA(64, "m64n64k16.f32.f16.f16", "f", ", 1, 1, 0");
  else if constexpr (bf16) JN_WGMMA(128, "m64n128k16.f32.bf16.bf16", "f", ", 1, 1, 0");
  else JN_WGMMA(128, "m64n128k16.f32.f16.f16", "f", ", 1, 1, 0");
}
template <int N> JN_DEVICE void wgmma_m64k32_s8(int (&c)[N / 2], const uint32_t (&a)[4], Operand b, bool add) {
  static_assert(N == 64 || N == 128);
  if constexpr (N == 64) JN_WGMMA(64, "m64n64k32.s32.s8.s8", "r", "");
  else JN_WGMMA(128, "m64n128k32.s32.s8.s8", "r", "");
}
#else

struct Operand {
  const void* place;
  Operand(const void* b) : place(b) {}
  Operand after(int bytes) const { return static_cast<const char*>(place) + bytes; }
};

// A product happens when its group is waited for, on what its registers and shared memory hold then, and reaches its
// accumulator at the fence: a result used too early or without a fence, or an operand changed too early, shows.
inline void wgmma_fence() {}
inline void fence_async_shared() {}
inline void wgmma_commit() {
  fiber().products.push_back(std::move(fiber().open_products));
  fiber().open_products.clear();
}
template <int PENDING> void wgmma_wait() {
  auto& groups = fiber().products;
  while (groups.size() > PENDING) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}
template <class C, int N> void registers_fence(C (&c)[N]) {
  const auto found = fiber().sums.find(c);
  if (found == fiber().sums.end()) return;
  emu::require(found->second.size() == sizeof(c), "fence of another accumulator than a product's");
  std::memcpy(c, found->second.data(), sizeof(c));
  fiber().sums.erase(found);
}

// Four mma per 8 columns would do the same; B's bytes are found through the swizzle as the hardware does, on addresses
// relative to the 1024-byte aligned start of shared memory.
inline uint32_t swizzled_word(const void* b, int column, int byte) {
  const unsigned char* base = emu::shared_base();
  size_t at = static_cast<const unsigned char*>(b) - base + column / 8 * 1024 + column % 8 * 128 + byte;
  at ^= (at >> 7 & 7) << 4;
  uint32_t v;
  std::memcpy(&v, base + at, 4);
  return v;
}
template <int N, class C, class F> void wgmma(C (&c)[N / 2], Operand operand, bool add, F mma) {
  if (!add) std::memset(c, 0x7F, sizeof(c));
  fiber().open_products.push_back([&c, b = operand.place, add, mma] {
    const int lane = emu::block().current % 32, g = lane / 4, t = lane % 4;
    std::vector<unsigned char>& held = fiber().sums[c];
    if (held.empty()) held.assign(reinterpret_cast<unsigned char*>(c), reinterpret_cast<unsigned char*>(c) + sizeof(c));
    C* sums = reinterpret_cast<C*>(held.data());
    for (int n = 0; n < N; n += 8) {
      C d[4] = {};
      if (add) std::memcpy(d, sums + n / 2, sizeof(d));
      mma(d, swizzled_word(b, n + g, 4 * t), swizzled_word(b, n + g, 16 + 4 * t));
      std::memcpy(sums + n / 2, d, sizeof(d));
    }
  });
}
template <class T, int N> void wgmma_m64k16(float (&c)[N / 2], const uint32_t (&a)[4], Operand b, bool add) {
  wgmma<N>(c, b, add, [&a](float (&d)[4], uint32_t b0, uint32_t b1) { mma_m16n8k16<T>(d, a, b0, b1); });
}
template <int N> void wgmma_m64k32_s8(int (&c)[N / 2], const uint32_t (&a)[4], Operand b, bool add) {
  wgmma<N>(c, b, add, [&a](int (&d)[4], uint32_t b0, uint32_t b1) { mma_m16n8k32_s8(d, a, b0, b1); });
}
#endif

}  // namespace jointnas::ptx
