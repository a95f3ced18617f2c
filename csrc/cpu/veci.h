// W 32-bit integers for the instruction set of the current pass, and four bytes per lane where dots are concerned
// (included once per pass, hence no guard).

namespace jointnas::JN_ISA {

#if defined(JN_AVX512) || defined(JN_AVX2)

#if defined(JN_AVX512)
#define JN_MM(name) _mm512_##name
struct vi {
  __m512i v;
};
inline vi loadi(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline vi loadi(const uint32_t* p, int64_t n) { return {_mm512_maskz_loadu_epi32(lanes(n), p)}; }
inline void storei(uint32_t* p, vi a) { _mm512_storeu_si512(p, a.v); }
inline vi operator&(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
inline vi operator^(vi a, vi b) { return {_mm512_xor_si512(a.v, b.v)}; }
#else
#define JN_MM(name) _mm256_##name
struct vi {
  __m256i v;
};
inline vi loadi(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline vi loadi(const uint32_t* p, int64_t n) {
  uint32_t t[W] = {};
  std::memcpy(t, p, static_cast<size_t>(n) * 4);
  return loadi(t);
}
inline void storei(uint32_t* p, vi a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline vi operator&(vi a, vi b) { return {_mm256_and_si256(a.v, b.v)}; }
inline vi operator^(vi a, vi b) { return {_mm256_xor_si256(a.v, b.v)}; }
#endif
inline vi seti(uint32_t x) { return {JN_MM(set1_epi32)(static_cast<int>(x))}; }
inline vi operator+(vi a, vi b) { return {JN_MM(add_epi32)(a.v, b.v)}; }
inline vi operator-(vi a, vi b) { return {JN_MM(sub_epi32)(a.v, b.v)}; }
inline vi operator*(vi a, vi b) { return {JN_MM(mullo_epi32)(a.v, b.v)}; }
template <int N>
inline vi shr(vi a) {
  return {JN_MM(srli_epi32)(a.v, N)};
}
template <int N>
inline vi shl(vi a) {
  return {JN_MM(slli_epi32)(a.v, N)};
}
template <int N>
inline vi sar(vi a) {
  return {JN_MM(srai_epi32)(a.v, N)};
}
inline vf convert(vi a) { return {JN_MM(cvtepi32_ps)(a.v)}; }
inline vf as_float(vi a) { return {(decltype(vf::v))a.v}; }
inline vi bits_of(vf a) { return {(decltype(vi::v))a.v}; }
// Pairs of bytes, unsigned times signed, to saturated int16 (maddubs) and pairs of int16 to int32 (madd).
inline vi maddubs(vi a, vi b) { return {JN_MM(maddubs_epi16)(a.v, b.v)}; }
inline vi madd(vi a, vi b) { return {JN_MM(madd_epi16)(a.v, b.v)}; }
inline vi add16(vi a, vi b) { return {JN_MM(add_epi16)(a.v, b.v)}; }
// Computed here, in a register: GCC 12 otherwise adds up 64 products as a tree, and spills them all.
template <class V>
inline V settled(V a) {
  asm("" : "+v"(a.v));
  return a;
}
inline vi shl16(vi a) { return {JN_MM(slli_epi16)(a.v, 8)}; }
inline vi sar16(vi a) { return {JN_MM(srai_epi16)(a.v, 8)}; }
#undef JN_MM

#else  // scalar

struct vi {
  uint32_t v;
};
inline vi seti(uint32_t x) { return {x}; }
inline vi loadi(const uint32_t* p) { return {*p}; }
inline vi loadi(const uint32_t* p, int64_t) { return {*p}; }
inline void storei(uint32_t* p, vi a) { *p = a.v; }
inline vi operator&(vi a, vi b) { return {a.v & b.v}; }
inline vi operator^(vi a, vi b) { return {a.v ^ b.v}; }
inline vi operator+(vi a, vi b) { return {a.v + b.v}; }
inline vi operator-(vi a, vi b) { return {a.v - b.v}; }
inline vi operator*(vi a, vi b) { return {a.v * b.v}; }
template <int N>
inline vi shr(vi a) {
  return {a.v >> N};
}
template <int N>
inline vi shl(vi a) {
  return {a.v << N};
}
template <int N>
inline vi sar(vi a) {
  return {static_cast<uint32_t>(static_cast<int32_t>(a.v) >> N)};
}
inline vf convert(vi a) { return {static_cast<float>(static_cast<int32_t>(a.v))}; }
template <class V>
inline V settled(V a) {
  return a;
}
inline vf as_float(vi a) {
  vf f;
  std::memcpy(&f, &a, 4);
  return f;
}
inline vi bits_of(vf a) {
  vi u;
  std::memcpy(&u, &a, 4);
  return u;
}

#endif

// Set bits of each lane.
inline vi popcount(vi a) {
#if defined(JN_AVX512EXT)
  return {_mm512_popcnt_epi32(a.v)};
#else
  a = a - (shr<1>(a) & seti(0x55555555u));
  a = (a & seti(0x33333333u)) + (shr<2>(a) & seti(0x33333333u));
  return shr<24>(((a + shr<4>(a)) & seti(0x0f0f0f0fu)) * seti(0x01010101u));
#endif
}

// The low bytes of W integers in [-128, 127] given as floats.
inline void store_bytes(int8_t* p, vf a, int64_t n) {
#if defined(JN_AVX512)
  _mm512_mask_cvtepi32_storeu_epi8(p, lanes(n), _mm512_cvtps_epi32(a.v));
#elif defined(JN_AVX2)
  const __m256i integers = _mm256_cvtps_epi32(a.v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves));
  std::memcpy(p, &bytes, static_cast<size_t>(n));
#else
  float t[W];
  store(t, a);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<int8_t>(t[i]);
#endif
}

// acc + sum of four products of unsigned bytes u and signed bytes s, exact. Without VNNI: for u < 128 by maddubs, which
// cannot saturate then; else in 16-bit halves.
template <bool kSmall>
inline vi dot(vi acc, vi u, vi s) {
#if defined(JN_AVX512EXT)
  return {_mm512_dpbusd_epi32(acc.v, u.v, s.v)};
#elif defined(JN_AVXVNNI)
  return {_mm256_dpbusd_avx_epi32(acc.v, u.v, s.v)};
#elif defined(JN_AVX512) || defined(JN_AVX2)
  if constexpr (kSmall) return acc + madd(maddubs(u, s), seti(0x00010001u));
  const vi even = madd(u & seti(0x00ff00ffu), sar16(shl16(s))), odd = madd(shr<8>(u) & seti(0x00ff00ffu), sar16(s));
  return acc + even + odd;
#else
  for (int i = 0; i < 32; i += 8)
    acc.v += (u.v >> i & 255u) * static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(s.v >> i)));
  return acc;
#endif
}

// The same in place, for loops over many sums.
template <bool kSmall>
inline vi dot_settled(vi acc, vi u, vi s) {
#if defined(JN_AVX512EXT)
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u.v), "v"(s.v));
  return acc;
#else
  return settled(dot<kSmall>(acc, u, s));
#endif
}

// acc + the product of the signed low halves of each lane; the high halves are 0
inline vi dot16(vi acc, vi a, vi b) {
#if defined(JN_AVX512EXT)
  return {_mm512_dpwssd_epi32(acc.v, a.v, b.v)};
#elif defined(JN_AVXVNNI)
  return {_mm256_dpwssd_avx_epi32(acc.v, a.v, b.v)};
#elif defined(JN_AVX512) || defined(JN_AVX2)
  return acc + madd(a, b);
#else
  return {acc.v + static_cast<uint32_t>(static_cast<int16_t>(a.v) * static_cast<int16_t>(b.v))};
#endif
}

// out(c)[r] = row(r)[c] for W rows r and n <= W words c
template <class Row, class Out>
inline void transpose(const Row& row, int64_t n, const Out& out) {
#if defined(JN_AVX512)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = loadi(row(i), n).v;
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
    }
  // a[4 i + j]: rows 4i..4i+3, word 4 l + j in 128-bit lane l
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i c[4] = {_mm512_shuffle_i32x4(b[j], b[8 + j], 0x88), _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88),
                          _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd), _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd)};
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l)
      if (4 * l + j < n) _mm512_storeu_si512(out(4 * l + j), c[l]);
  }
#else
  for (int64_t r = 0; r < W; ++r)
    for (int64_t c = 0; c < n; ++c) out(c)[r] = row(r)[c];
#endif
}

}  // namespace jointnas::JN_ISA
