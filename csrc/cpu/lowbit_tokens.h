// Activations of one token, quantized if asked for and permuted to meet the fields of packed words, per instruction set
// (each_isa.h, hence no guard; needs lowbit_fields.h).
//
// Entry (step, field) of a group takes, for its parts p, input  step * 32/b + p * fields + field.

#include "cpu/act_quant.h"

namespace jointnas::JN_ISA {

// Levels a [I], scale and zero of one token.
template <class T>
void quantize_token(const T* x, int64_t N, int bits, bool symmetric, int8_t* a, float* s, int* z) {
  const Quantizer q = quantizer<T>(row_range(x, N), bits, symmetric);
  *s = q.s;
  *z = static_cast<int>(q.z);
  each(0, N, [&](auto at) {
    store_bytes(a + at.j, token_level<T>(at(x), q), std::min<int64_t>(W, N - at.j));
  });
}

// out[word][field][part] = in[word][part][field] for `words` words of kParts * kFields values.
template <class V, int kParts, int kFields>
inline void permute(const V* in, V* out, int64_t words) {
  constexpr int kPerWord = kParts * kFields;
  int64_t i = 0;
#if defined(JN_AVX2) || defined(JN_AVX512)
  if constexpr (kFields > 1 && kPerWord * sizeof(V) <= 16) {  // words within 16 bytes: one shuffle
    alignas(16) uint8_t index[16];
    for (int b = 0; b < 16; ++b) {
      const int at = b / static_cast<int>(sizeof(V)), k = at % kPerWord;
      const int from = at - k + k % kParts * kFields + k / kParts;
      index[b] = static_cast<uint8_t>(from * static_cast<int>(sizeof(V)) + b % static_cast<int>(sizeof(V)));
    }
    const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(index));
    constexpr int64_t kStep = 16 / (kPerWord * static_cast<int64_t>(sizeof(V)));
    for (; i + kStep <= words; i += kStep)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * kPerWord),
                       _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * kPerWord)), shuffle));
  } else if constexpr (kParts == 2 && kFields == 8) {  // 16-bit halves: the two vectors of a word interleaved
    for (; i < words; ++i) {
      const __m128i* p = reinterpret_cast<const __m128i*>(in + i * 16);
      const __m128i a = _mm_loadu_si128(p), b = _mm_loadu_si128(p + 1);
      __m128i* q = reinterpret_cast<__m128i*>(out + i * 16);
      _mm_storeu_si128(q, _mm_unpacklo_epi16(a, b));
      _mm_storeu_si128(q + 1, _mm_unpackhi_epi16(a, b));
    }
  }
#endif
  for (; i < words; ++i)
    for (int f = 0; f < kFields; ++f)
      for (int p = 0; p < kParts; ++p) out[i * kPerWord + f * kParts + p] = in[i * kPerWord + p * kFields + f];
}

// -2^(b-1) sum a, with its byte product's zero point still to pay by the weights' sums
inline uint32_t group_offset(const int8_t* a, int64_t g, int w_bits) {
  int32_t sum = 0;
  int64_t k = 0;
#if defined(JN_AVX512EXT)
  __m512i total = _mm512_setzero_si512();
  for (; k + 64 <= g; k += 64) total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), _mm512_loadu_si512(a + k));
  sum = _mm512_reduce_add_epi32(total);
#endif
  for (; k < g; ++k) sum += a[k];
  return (0u - static_cast<uint32_t>(sum)) << (w_bits - 1);
}

// Bit-planes of levels a - low, entry (chunk of 32 inputs, plane); returns the sum of a - low.
inline int32_t planes_of(const int8_t* a, int64_t g, int a_bits, uint32_t* out) {
  int32_t sum = 0;
  for (int64_t c = 0; c < g; c += 32, out += a_bits) {
    std::fill(out, out + a_bits, 0u);
    for (int k = 0; k < 32; ++k) {
      const uint32_t u = static_cast<uint32_t>(a[c + k] + (1 << (a_bits - 1)));
      sum += static_cast<int32_t>(u);
      for (int p = 0; p < a_bits; ++p) out[p] |= (u >> p & 1u) << k;
    }
  }
  return sum;
}

constexpr uint32_t kNibbles[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class T, int B>
void token_bits(const LowbitLayout& l, LowbitTokens& t, const T* x, int64_t m, int8_t* levels) {
  const int64_t g = l.group();
  const auto row = [&](int64_t group) { return t.table + (group * t.M + m) * t.entries; };
  if (t.kind == kBytes || t.kind == kPlanes) {
    int z;
    quantize_token<T>(x, l.I, t.a_bits, t.symmetric, levels, t.s + m, &z);
    for (int64_t i = 0; i < l.groups; ++i) {
      const int8_t* a = levels + i * g;
      uint32_t& offset = t.offset[i * t.M + m];
      if (t.kind == kPlanes) {
        offset = (0u - static_cast<uint32_t>(planes_of(a, g, t.a_bits, row(i)))) << (B - 1);
      } else {
        offset = group_offset(a, g, B);
        permute<int8_t, 4, 8 / B>(a, reinterpret_cast<int8_t*>(row(i)), l.words);
      }
    }
    t.zero[m] = static_cast<float>(-z);
    return;
  }
  t.zero[m] = 0.0f, t.s[m] = 1.0f;
  for (int64_t i = 0; i < l.groups; ++i) {
    const T* a = x + i * g;
    if constexpr (sizeof(T) == 2)
      if (t.kind == kPairs) {
        permute<uint16_t, 2, 16 / B>(reinterpret_cast<const uint16_t*>(a), reinterpret_cast<uint16_t*>(row(i)), l.words);
        continue;
      }
    float* out = reinterpret_cast<float*>(row(i));
#if defined(JN_AVX512)
    if (t.kind == kSums) {
      const vi nibbles = loadi(kNibbles);
      const vf first = as_float(Floats<2>::operand<0>(nibbles)), second = as_float(Floats<2>::operand<1>(nibbles));
      for (int64_t k = 0; k < g; k += 2, out += 16)
        store(out, fma(set(to_float(a[k + 1])), second, set(to_float(a[k])) * first));
      continue;
    }
#endif
    each(0, g, [&](auto at) { at.put(out, at(a)); });
  }
}

template <class T>
void prepare_token(const LowbitLayout& l, LowbitTokens& t, const T* x, int64_t m, int8_t* levels) {
  const auto f = l.w_bits == 2 ? token_bits<T, 2> : l.w_bits == 4 ? token_bits<T, 4> : token_bits<T, 8>;
  f(l, t, x, m, levels);
}

}  // namespace jointnas::JN_ISA
