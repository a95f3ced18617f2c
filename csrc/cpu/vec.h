// A vector of W floats for the instruction set of the current pass (see each_isa.h; hence no include guard).
// load/store convert from and to float or bf16; the forms with a count handle tails (missing lanes are 0).
#include "cpu/bf16.h"

namespace jointnas::JN_ISA {

#if defined(JN_AVX512)

constexpr int W = 16;
struct vf {
  __m512 v;
};
inline __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline vf set(float x) { return {_mm512_set1_ps(x)}; }
inline vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline vf load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline vf widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
inline vf load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline vf load(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
// In the upper halves, a rounded to nearest even by integer arithmetic: vcvtneps2bf16 would flush denormals to zero.
inline __m512i rounded(vf a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fc00000), _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), u,
                               _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline vf round_bf16(vf a) {
  return {_mm512_castsi512_ps(_mm512_and_epi32(rounded(a), _mm512_set1_epi32(-0x10000)))};
}
inline __m256i narrow(vf a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(a), 16)); }
inline __m512i narrow2(vf a, vf b) {  // the upper halves of both: one permutation instead of two shifts and conversions
  alignas(64) static const uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                               33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(rounded(a), _mm512_load_si512(odd), rounded(b));
}
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
inline void store(bf16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
inline void store(bf16* p, vf a, int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow(a)); }
// Non-temporal stores of 2 W elements, p aligned to 64 bytes: the line about to be overwritten is not read first.
// Only whole lines are worth it: mixed_weight of a 4096^2 bf16 matrix ran at 5.6 GB/s with half lines, 46 with whole.
inline void stream2(float* p, vf a, vf b) {
  _mm512_stream_ps(p, a.v);
  _mm512_stream_ps(p + W, b.v);
}
inline void stream2(bf16* p, vf a, vf b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow2(a, b));
}
inline void store2(bf16* p, vf a, vf b) { _mm512_storeu_si512(p, narrow2(a, b)); }
inline void stream_end() { _mm_sfence(); }
inline vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline vf fnma(vf a, vf b, vf c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline vf abs(vf a) { return {_mm512_abs_ps(a.v)}; }
inline vf round(vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// p 2^k for t = 1.5 * 2^23 + k, while the result is a normal number
inline vf scale2(vf p, vf t) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
}
// a < b ? x : y
inline vf less(vf a, vf b, vf x, vf y) { return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)}; }
inline float sum(vf a) { return _mm512_reduce_add_ps(a.v); }
inline float hmax(vf a) { return _mm512_reduce_max_ps(a.v); }
inline float hmin(vf a) { return _mm512_reduce_min_ps(a.v); }

#elif defined(JN_AVX2)

constexpr int W = 8;
struct vf {
  __m256 v;
};
inline vf set(float x) { return {_mm256_set1_ps(x)}; }
inline vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline vf widen(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
inline vf load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m256i rounded(vf a) {  // the upper halves are bf16
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan);
}
inline vf round_bf16(vf a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(rounded(a), _mm256_set1_epi32(-0x10000)))};
}
inline __m128i narrow(vf a) {
  const __m256i r = _mm256_srli_epi32(rounded(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline void store(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, vf a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
inline vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline vf fnma(vf a, vf b, vf c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
inline vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
inline vf abs(vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline vf round(vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline vf scale2(vf p, vf t) {
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(_mm256_castps_si256(t.v), 23)))};
}
inline vf less(vf a, vf b, vf x, vf y) { return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))}; }
inline float sum(vf a) {
  float t[W];
  store(t, a);
  return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

#else  // scalar

constexpr int W = 1;
struct vf {
  float v;
};
inline vf set(float x) { return {x}; }
template <class T>
inline vf load(const T* p) {
  return {to_float(*p)};
}
template <class T>
inline void store(T* p, vf a) {
  *p = from_float<T>(a.v);
}
inline vf round_bf16(vf a) { return {to_float(from_float<bf16>(a.v))}; }
inline vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
inline vf fnma(vf a, vf b, vf c) { return {c.v - a.v * b.v}; }
// As the vector instructions: the second operand if either is NaN.
inline vf min(vf a, vf b) { return {a.v < b.v ? a.v : b.v}; }
inline vf max(vf a, vf b) { return {a.v > b.v ? a.v : b.v}; }
inline vf abs(vf a) { return {std::fabs(a.v)}; }
inline vf round(vf a) { return {std::nearbyint(a.v)}; }
inline vf scale2(vf p, vf t) {
  uint32_t u, k;
  std::memcpy(&u, &p.v, 4);
  std::memcpy(&k, &t.v, 4);
  u += k << 23;
  std::memcpy(&p.v, &u, 4);
  return p;
}
inline vf less(vf a, vf b, vf x, vf y) { return a.v < b.v ? x : y; }
inline float sum(vf a) { return a.v; }

#endif

inline vf operator+(vf a, vf b) { return {a.v + b.v}; }
inline vf operator-(vf a, vf b) { return {a.v - b.v}; }
inline vf operator*(vf a, vf b) { return {a.v * b.v}; }
inline vf operator/(vf a, vf b) { return {a.v / b.v}; }

#if !defined(JN_AVX512)
template <class T>
inline vf load(const T* p, int64_t n) {
  T t[W] = {};
  std::memcpy(t, p, static_cast<size_t>(n) * sizeof(T));
  return load(t);
}
template <class T>
inline void store(T* p, vf a, int64_t n) {
  T t[W];
  store(t, a);
  std::memcpy(p, t, static_cast<size_t>(n) * sizeof(T));
}
inline float hmax(vf a) {
  float t[W];
  store(t, a);
  for (int i = 1; i < W; ++i) t[0] = t[0] < t[i] ? t[i] : t[0];
  return t[0];
}
inline float hmin(vf a) {
  float t[W];
  store(t, a);
  for (int i = 1; i < W; ++i) t[0] = t[i] < t[0] ? t[i] : t[0];
  return t[0];
}
template <class T>
inline void stream2(T* p, vf a, vf b) {
  store2(p, a, b);
}
inline void stream_end() {}
#endif
template <class T>
inline void store2(T* p, vf a, vf b) {
  store(p, a);
  store(p + W, b);
}

// Two vectors of consecutive elements, a whole line of bf16 with AVX-512: half the loop, and independent work to fill
// latencies. A vf stands for two equal ones.
struct vf2 {
  vf a, b;
  vf2() = default;
  vf2(vf x) : a(x), b(x) {}
  vf2(vf x, vf y) : a(x), b(y) {}
};
inline vf2 operator+(vf2 x, vf2 y) { return {x.a + y.a, x.b + y.b}; }
inline vf2 operator-(vf2 x, vf2 y) { return {x.a - y.a, x.b - y.b}; }
inline vf2 operator*(vf2 x, vf2 y) { return {x.a * y.a, x.b * y.b}; }
inline vf2 operator/(vf2 x, vf2 y) { return {x.a / y.a, x.b / y.b}; }
inline vf2 fma(vf2 x, vf2 y, vf2 z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
inline vf2 fnma(vf2 x, vf2 y, vf2 z) { return {fnma(x.a, y.a, z.a), fnma(x.b, y.b, z.b)}; }
inline vf2 min(vf2 x, vf2 y) { return {min(x.a, y.a), min(x.b, y.b)}; }
inline vf2 max(vf2 x, vf2 y) { return {max(x.a, y.a), max(x.b, y.b)}; }
inline vf2 round(vf2 x) { return {round(x.a), round(x.b)}; }
inline vf2 scale2(vf2 p, vf2 t) { return {scale2(p.a, t.a), scale2(p.b, t.b)}; }
inline vf2 round_bf16(vf2 x) { return {round_bf16(x.a), round_bf16(x.b)}; }
template <class T>
inline vf2 load2(const T* p) {
  return {load(p), load(p + W)};
}
#if defined(JN_AVX512)
inline vf2 load2(const bf16* p) {  // one permutation for each half instead of a conversion and a shift
  alignas(64) static const uint16_t low[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                               0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i line = _mm512_loadu_si512(p), at = _mm512_load_si512(low);
  const auto spread = [&](__m512i i) { return vf{_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, i, line))}; };
  return {spread(at), spread(_mm512_add_epi16(at, _mm512_set1_epi16(16)))};
}
#endif
// Sums along a row: s += x y; a tail of one vector goes to the first half.
inline void add_product(vf2& s, vf2 x, vf2 y) { s = fma(x, y, s); }
inline void add_product(vf2& s, vf x, vf y) { s.a = fma(x, y, s.a); }
inline float sum(vf2 s) { return sum(s.a + s.b); }

// e^-x, relative error 2e-7; x is clamped to [-88.3, 87.3]. NaN gives something, so multiply by x.
template <class V>
inline V exp_minus(V x) {
  x = min(set(87.3f), max(set(-88.3f), x));
  const V t = fnma(x, set(1.44269504f), set(12582912.0f)), k = t - set(12582912.0f);
  const V g = fma(k, set(0.693147181f), x);
  V p = set(-0x1.10625p-7f);  // minimax of e^-g on |g| <= ln 2 / 2, relative error 1.1e-7
  p = fma(p, g, set(0x1.572a64p-5f));
  p = fma(p, g, set(-0x1.5557bp-3f));
  p = fma(p, g, set(0x1.fffdfcp-2f));
  p = fma(p, g, set(-1.0f));
  return scale2(fma(p, g, set(1.0f)), t);
}

// One step of a loop over a row: at(p) loads, at.put(p, v) stores, at.add(p, v) and at.add_product(p, x, y) accumulate,
// at.prefetch(p) brings its bytes into the cache.
template <bool kWhole>
struct Step {
  int64_t j, n = W;  // elements j .. j + n - 1
  template <class T>
  vf operator()(const T* p) const {
    if constexpr (kWhole)
      return load(p + j);
    else
      return load(p + j, n);
  }
  template <class T>
  void put(T* p, vf v) const {
    if constexpr (kWhole)
      store(p + j, v);
    else
      store(p + j, v, n);
  }
  template <class T>
  void prefetch(const T* p) const {
    __builtin_prefetch(p + j);
  }
  void add(float* p, vf v) const { put(p, (*this)(p) + v); }
  void add_product(float* p, vf x, vf y) const { put(p, fma(x, y, (*this)(p))); }
};
using Whole = Step<true>;
using Tail = Step<false>;
template <class F>
inline void each(int64_t begin, int64_t end, const F& f) {
  int64_t j = begin;
  for (; j + W <= end; j += W) f(Whole{j});
  if (j < end) f(Tail{j, end - j});
}

// The same two vectors at a time: at(p) is a vf2 there, a vf in the tail. streamed: at.put writes past the cache, to
// addresses p + begin that are multiples of 64.
struct Pair {
  int64_t j;
  bool streamed;
  template <class T>
  vf2 operator()(const T* p) const {
    return load2(p + j);
  }
  template <class T>
  void put(T* p, vf2 v) const {
    if (streamed)
      stream2(p + j, v.a, v.b);
    else
      store2(p + j, v.a, v.b);
  }
  template <class T>
  void prefetch(const T* p) const {
    __builtin_prefetch(p + j);
    if (2 * W * sizeof(T) > 64) __builtin_prefetch(p + j + W);
  }
  void add(float* p, vf2 v) const { Pair{j, false}.put(p, (*this)(p) + v); }
  void add_product(float* p, vf2 x, vf2 y) const { Pair{j, false}.put(p, fma(x, y, (*this)(p))); }
};
template <class F>
inline void pairs(int64_t begin, int64_t end, bool streamed, const F& f) {
  int64_t j = begin;
  for (; j + 2 * W <= end; j += 2 * W) f(Pair{j, streamed});
  each(j, end, f);
}
template <class F>
inline void pairs(int64_t begin, int64_t end, const F& f) {
  pairs(begin, end, false, f);
}

}  // namespace jointnas::JN_ISA
