// Dynamic per-token quantization of activations, shared by act_quant.cpp and lowbit.cpp; included once per instruction
// set (each_isa.h), hence no guard. Every operation is rounded to the activation's dtype T, because that is what
// compressed-tensors executes: ops/act_quant_mix.py has the formulas.

namespace jnk {
namespace JN_ISA {

template <class T>
inline vf round_to(vf x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T t[W];
    store(t, x);
    return load(t);
  }
}

struct Range {
  float low, high;  // of the token, 0 included
};

template <class T, class Load>
inline Range token_range(int64_t N, const Load& value) {
  vf low = set(0.0f), high = set(0.0f);
  each(0, N, [&](auto at) {
    const vf v = round_to<T>(value(at));
    low = min(low, v);
    high = max(high, v);
  });
  return {hmin(low), hmax(high)};
}

struct Quantizer {
  float s, z, low, high;
};

template <class T>
inline Quantizer quantizer(Range range, int bits, bool symmetric) {
  const auto r = [](float x) { return to_float(from_float<T>(x)); };
  const float steps = static_cast<float>((1 << bits) - 1);
  Quantizer q{0.0f, 0.0f, -static_cast<float>(1 << (bits - 1)), static_cast<float>((1 << (bits - 1)) - 1)};
  q.s = symmetric ? r(std::max(-range.low, range.high) / (steps / 2.0f)) : r(r(range.high - range.low) / steps);
  if (!symmetric && q.s != 0.0f)
    q.z = std::nearbyint(std::min(std::max(r(q.low - r(range.low / q.s)), q.low), q.high));
  if (q.s == 0.0f) q.s = sizeof(T) == 4 ? 0x1p-23f : 0x1p-7f;  // the dtype's epsilon; an all-zero token stays zero
  return q;
}

// The level of x: an integer in [low, high]; NaN stays NaN.
template <class T>
inline vf token_level(vf x, const Quantizer& q) {
  const vf v = round_to<T>(round_to<T>(x / set(q.s)) + set(q.z));
  return round(min(set(q.high), max(set(q.low), v)));
}

}  // namespace JN_ISA
}  // namespace jnk
