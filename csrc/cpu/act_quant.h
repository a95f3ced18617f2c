// Dynamic per-token quantization of activations, shared by act_quant.cpp, norm_quant.cpp and lowbit.cpp; included once
// per instruction set (each_isa.h), hence no guard. Every operation is rounded to the activation's dtype T, because that
// is what compressed-tensors executes: the docstring of act_quant_mix has the formulas.

#ifndef JN_ACT_QUANT_H
#define JN_ACT_QUANT_H
namespace jointnas {
constexpr int64_t kMaxPrecisions = 16;
}
#endif

namespace jointnas::JN_ISA {

template <class T, class V>
inline V round_to(V x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return round_bf16(x);
}

struct Range {
  float low, high;  // of the token, 0 included; NaN if a value is
};

template <class T, class Load>
inline Range token_range(int64_t N, const Load& value) {
  vf low = set(0.0f), high = set(0.0f), nan = set(0.0f);
  each(0, N, [&](auto at) {
    const vf v = round_to<T>(value(at));
    low = min(low, v);
    high = max(high, v);
    nan = fma(v, set(0.0f), nan);  // NaN of NaN and infinity; the extremes would forget the former
  });
  const float all = sum(nan);
  return {hmin(low) + all, hmax(high) + all};
}

// The same of values in memory.
template <class T>
inline Range row_range(const T* x, int64_t N) {
#if defined(JN_AVX512)
  if constexpr (sizeof(T) == 2) {
    // As words, 32 at a time: the largest signed one is the largest number, the largest unsigned one the smallest.
    __m512i high = _mm512_setzero_si512(), low = high;
    const auto take = [&](__m512i words) {
      high = _mm512_max_epi16(high, words);
      low = _mm512_max_epu16(low, words);
    };
    int64_t j = 0;
    for (; j + 32 <= N; j += 32) take(_mm512_loadu_si512(x + j));
    if (j < N) take(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << (N - j)) - 1), x + j));
    const auto largest = [](__m512i words) {  // widened, as AVX-512 reduces no words
      const __m512i even = _mm512_and_si512(words, _mm512_set1_epi32(0xffff)), odd = _mm512_srli_epi32(words, 16);
      return static_cast<uint16_t>(_mm512_reduce_max_epu32(_mm512_max_epu32(even, odd)));
    };
    const uint16_t top = largest(high), bottom = largest(low);
    const bool nan = top > 0x7f80 || bottom > 0xff80;
    if (!nan) return {bottom & 0x8000 ? to_float(bf16{bottom}) : 0.0f, to_float(bf16{top})};
  }
#endif
  return token_range<T>(N, [=](auto at) { return at(x); });
}

struct Quantizer {
  float s, z, low, high;
  float r = 0.0f;       // bf16: slightly more than 1 / s; 0: divide
  bool inside = false;  // the token's extremes have levels in [low, high] without the clamp, so all values have
};

// For a scale and zero point that quantizer() made.
template <class T>
inline Quantizer quantizer_of(float s, float z, int bits) {
  const float half = static_cast<float>(1 << (bits - 1));
  Quantizer q{s, z, -half, half - 1.0f};
  // Far from the ends of fp32's range all of token_level's products are normal numbers, or too small to matter.
  if (sizeof(T) == 2 && s >= 0x1p-100f && s <= 0x1p100f) q.r = 1.0f / s * 0x1.000002p0f;
  return q;
}

template <class T>
inline Quantizer quantizer(Range range, int bits, bool symmetric) {
  const auto r = [](float x) { return to_float(from_float<T>(x)); };
  const float steps = static_cast<float>((1 << bits) - 1), low = -static_cast<float>(1 << (bits - 1));
  float s = symmetric ? r(std::max(-range.low, range.high) / (steps / 2.0f)) : r(r(range.high - range.low) / steps);
  s += s - s;  // of a range that is not finite: NaN, and so are all values of the token
  float z = 0.0f;
  if (!symmetric && s > 0.0f)
    z = std::nearbyint(std::min(std::max(r(low - r(range.low / s)), low), -low - 1.0f));
  if (s == 0.0f) s = sizeof(T) == 4 ? 0x1p-23f : 0x1p-7f;  // the dtype's epsilon; an all-zero token stays zero
  Quantizer q = quantizer_of<T>(s, z, bits);
  const auto level = [=](float x) { return std::nearbyint(r(r(x / s) + z)); };
  q.inside = level(range.low) >= q.low && level(range.high) <= q.high;
  return q;
}

// How levels are computed: by true division; with the reciprocal; the same where no level needs the clamp.
enum class Path { kDivide, kClamp, kInside };

// The level of x: an integer in [low, high]; NaN stays NaN.
//
// In bf16 the reciprocal gives the same levels as dividing and rounding twice would: 65537 v + z, of which fp32 keeps
// 65536 v, z and the 8 bits of v that bf16 keeps, minus 65536 v is RN(v) + z, and once more without z the rounding of
// that. tests/ops/test_exact_division.py tries every x, s and z. (10 instructions instead of about 30.)
template <class T, Path kPath, class V>
inline V token_level(V x, const Quantizer& q) {
  if constexpr (kPath == Path::kDivide) {
    const V v = round_to<T>(round_to<T>(x / set(q.s)) + set(q.z));
    return round(min(set(q.high), max(set(q.low), v)));
  } else {
    V v = x * set(q.r);
    v = fnma(v, set(65536.0f), fma(v, set(65537.0f), set(q.z)));
    v = fnma(v, set(65536.0f), v * set(65537.0f));
    return round(kPath == Path::kInside ? v : min(set(q.high), max(set(q.low), v)));
  }
}

template <class F>
inline void with_path(Path path, const F& f) {
  if (path == Path::kDivide)
    f(std::integral_constant<Path, Path::kDivide>{});
  else if (path == Path::kClamp)
    f(std::integral_constant<Path, Path::kClamp>{});
  else
    f(std::integral_constant<Path, Path::kInside>{});
}

template <class T, class V>
inline V token_level(V x, const Quantizer& q) {
  return q.r == 0.0f ? token_level<T, Path::kDivide>(x, q) : token_level<T, Path::kClamp>(x, q);
}

// The quantizers of one token; 16 bits, the identity, needs none.
struct Precisions {
  const int* bits;
  int64_t Q, n = 0;
  Quantizer q[kMaxPrecisions];    // n of them
  int64_t index[kMaxPrecisions];  // which of the Q each is
  Path path = Path::kInside;      // one that serves all
  void add(const Quantizer& one, int64_t p) {
    q[n] = one;
    index[n++] = p;
    path = std::min(path, one.r == 0.0f ? Path::kDivide : one.inside ? Path::kInside : Path::kClamp);
  }
};

template <class T>
inline Precisions precisions(Range range, const int* bits, int64_t Q, bool symmetric) {
  Precisions all{bits, Q};
  for (int64_t p = 0; p < Q; ++p)
    if (bits[p] != 16) all.add(quantizer<T>(range, bits[p], symmetric), p);
  return all;
}

// y = sum of probs Q(x) over one token; y may be x. Meanwhile the token at `next` is brought into the cache.
template <class T>
inline void mix_token(const T* x, const Precisions& all, const float* probs, T* y, int64_t N, const T* next,
                      bool streamed) {
  float weight[kMaxPrecisions], identity = 0.0f;
  for (int64_t p = 0; p < all.Q; ++p)
    if (all.bits[p] == 16) identity += probs[p];
  for (int64_t p = 0; p < all.n; ++p) weight[p] = probs[all.index[p]] * all.q[p].s;
  with_path(all.path, [&](auto path) {
    pairs(0, N, streamed, [&](auto at) {
      at.prefetch(next);
      const auto v = at(x);
      auto sum = v * set(identity);
      for (int64_t p = 0; p < all.n; ++p)
        sum = fma(token_level<T, path>(v, all.q[p]) - set(all.q[p].z), set(weight[p]), sum);
      at.put(y, sum);
    });
  });
}

// dprobs [Q] = <g, Q(x)> of one token; the next ones are at g + N and `next`
template <class T>
inline void dot_token(const T* g, const T* x, const Precisions& all, float* dprobs, int64_t N, const T* next) {
  vf2 identity = set(0.0f), dot[kMaxPrecisions];
  for (int64_t p = 0; p < all.n; ++p) dot[p] = set(0.0f);
  with_path(all.path, [&](auto path) {
    pairs(0, N, [&](auto at) {
      at.prefetch(g + N);
      at.prefetch(next);
      const auto v = at(x), d = at(g);
      add_product(identity, d, v);
      for (int64_t p = 0; p < all.n; ++p)
        add_product(dot[p], d, token_level<T, path>(v, all.q[p]) - set(all.q[p].z));
    });
  });
  for (int64_t p = 0; p < all.Q; ++p) dprobs[p] = sum(identity);
  for (int64_t p = 0; p < all.n; ++p) dprobs[all.index[p]] = all.q[p].s * sum(dot[p]);
}

}  // namespace jointnas::JN_ISA
