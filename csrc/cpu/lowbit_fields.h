// Fields of packed words as operands of a multiplication, per instruction set (each_isa.h, hence no guard).
//
// A word holds 32/b values, value k at bit b k, as u = q + 2^(b-1). Seen as 4 bytes it has 8/b fields, each 4 values
// 8/b inputs apart; as 2 halves 16/b fields of 2 values; as one lane 32/b fields. The activations are permuted to match
// (lowbit_tokens.h), so that a field is cut out with a shift and an AND, or looked up:
//     Bytes   u as 4 unsigned bytes times 4 int8, exact in int32
//     Pairs   q as 2 bf16 times 2 bf16 (AVX512_BF16), exact products, fp32 sums
//     Floats  q as fp32 times fp32
//     Sums    two 2-bit q select q_0 a_0 + q_1 a_1 among the 16 such sums, which are as exact as an FMA
#include "cpu/veci.h"

namespace jointnas::JN_ISA {

struct Broadcast {
  static vi activation(const uint32_t* a, int64_t field) { return seti(a[field]); }
};

template <int B>  // u < 2^B
struct ByteProduct : Broadcast {
  using Acc = vi;
  static constexpr bool kInteger = true;
  static Acc mul(Acc acc, vi u, vi a) { return dot<(B < 8)>(acc, u, a); }
  static Acc mul_settled(Acc acc, vi u, vi a) { return dot_settled<(B < 8)>(acc, u, a); }
};

struct FloatProduct : Broadcast {
  using Acc = vf;
  static constexpr bool kInteger = false;
  static Acc mul(Acc acc, vi q, vi a) { return fma(as_float(q), as_float(a), acc); }
  static Acc mul_settled(Acc acc, vi q, vi a) { return settled(mul(acc, q, a)); }
};

template <int B>
struct Bytes : ByteProduct<B> {
  using Product = ByteProduct<B>;
  static constexpr int kFields = 8 / B;
  template <int F>
  static vi operand(vi w) {
    if constexpr (B == 8) return w;
    constexpr uint32_t mask = ((1u << B) - 1) * 0x01010101u;
    return shr<B * F>(w) & seti(mask);
  }
};

#if defined(JN_AVX2) || defined(JN_AVX512)
// q = u - 2^(B-1) of B-bit field F as fp32, exact: u becomes low bits of the mantissa of 2^(23-p), p its place in the word.
// No shift but for the upper half of a word.
template <int B, int F>
inline vf level(vi w) {
  constexpr int kShift = B * F < 16 ? 0 : 16, kPlace = B * F - kShift;
  constexpr uint32_t mask = ((1u << B) - 1) << kPlace, exponent = (150u - kPlace) << 23;
  const vi at = kShift ? shr<16>(w) : w;
#if defined(JN_AVX512)
  const vi u = {_mm512_ternarylogic_epi32(at.v, seti(mask).v, seti(exponent).v, 0xea)};
#else
  const vi u = {_mm256_or_si256((at & seti(mask)).v, seti(exponent).v)};
#endif
  return as_float(u) - set(static_cast<float>((1 << (23 - kPlace)) + (1 << (B - 1))));
}
#endif

template <int B>
struct Floats : FloatProduct {
  using Product = FloatProduct;
  static constexpr int kFields = 32 / B;
  template <int F>
  static vi operand(vi w) {
#if defined(JN_AVX512)
    // vpermps looks at 4 bits of each lane: a table of q for one 4-bit field, or for either of two 2-bit fields,
    // which then share the shift
    if constexpr (B < 8) {
      alignas(64) static constexpr float table4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
      alignas(64) static constexpr float low2[16] = {-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1};
      alignas(64) static constexpr float high2[16] = {-2, -2, -2, -2, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1};
      const float* table = B == 4 ? table4 : F % 2 ? high2 : low2;
      return {_mm512_castps_si512(_mm512_permutexvar_ps(shr<4 * (B * F / 4)>(w).v, _mm512_load_ps(table)))};
    }
#elif defined(JN_AVX2)
    if constexpr (B == 2) {  // here it looks at 3 bits
      alignas(32) static constexpr float table[8] = {-2, -1, 0, 1, -2, -1, 0, 1};
      return {_mm256_castps_si256(_mm256_permutevar8x32_ps(_mm256_load_ps(table), shr<2 * F>(w).v))};
    }
#endif
#if defined(JN_AVX2) || defined(JN_AVX512)
    return bits_of(level<B, F>(w));
#else
    constexpr uint32_t flip = B == 8 ? 0x80808080u : B == 4 ? 0x88888888u : 0xaaaaaaaau;  // offset to two's complement
    return bits_of(convert(sar<32 - B>(shl<32 - B * (F + 1)>(w ^ seti(flip)))));
#endif
  }
};

#if defined(JN_AVX512)
struct Sums {
  using Acc = vf;
  static constexpr bool kInteger = false;
  static constexpr int kFields = 8;
  static vi activation(const uint32_t* a, int64_t field) { return loadi(a + field * 16); }
  template <int F>
  static vi operand(vi w) {
    return shr<4 * F>(w);  // vpermps looks at the lowest 4 bits
  }
  static Acc mul(Acc acc, vi u, vi sums) {
    return acc + vf{_mm512_permutexvar_ps(u.v, _mm512_castsi512_ps(sums.v))};
  }
};
#endif

#if defined(JN_AVX512EXT)
struct PairProduct : Broadcast {
  using Acc = vf;
  static constexpr bool kInteger = false;
  static Acc mul(Acc acc, vi q, vi a) {
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(q.v), reinterpret_cast<__m512bh>(a.v))};
  }
  static Acc mul_settled(Acc acc, vi q, vi a) { return settled(mul(acc, q, a)); }
};

template <int B>
struct Pairs : PairProduct {
  using Product = PairProduct;
  static constexpr int kFields = 16 / B;
  template <int F>
  static vi operand(vi w) {
    if constexpr (B == 8) {
      // two bytes per word to two bf16: an integer of 8 bits is exact in the upper half of its fp32
      return shr<16>(bits_of(level<8, F>(w))) ^ bits_of(level<8, F + 2>(w));
    } else {
      // vpermw looks at 5 bits of each half: as above, as bf16, repeated for the fifth bit
      alignas(64) static constexpr uint16_t table4[32] = {
          0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
          0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
          0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
      alignas(64) static constexpr uint16_t low2[32] = {
          0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80,
          0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80};
      alignas(64) static constexpr uint16_t high2[32] = {
          0xc000, 0xc000, 0xc000, 0xc000, 0xbf80, 0xbf80, 0xbf80, 0xbf80, 0, 0, 0, 0, 0x3f80, 0x3f80, 0x3f80, 0x3f80,
          0xc000, 0xc000, 0xc000, 0xc000, 0xbf80, 0xbf80, 0xbf80, 0xbf80, 0, 0, 0, 0, 0x3f80, 0x3f80, 0x3f80, 0x3f80};
      const uint16_t* table = B == 4 ? table4 : F % 2 ? high2 : low2;
      return {_mm512_permutexvar_epi16(_mm512_srli_epi16(w.v, 4 * (B * F / 4)), _mm512_load_si512(table))};
    }
  }
};
#endif

template <class F, int... I>
inline void fields(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
// f(0), ..., f(N - 1) with constant arguments
template <int N, class F>
inline void fields(const F& f) {
  fields(std::make_integer_sequence<int, N>{}, f);
}

}  // namespace jointnas::JN_ISA
