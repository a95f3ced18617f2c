// Vector parts of a decode step, per instruction set (each_isa.h, hence no guard; included by cpu/decode.cpp).

#include "cpu/act_quant.h"

namespace jointnas::JN_ISA {

// y = weight * RN(x / rms(x))
template <class T>
void norm_row(const T* x, const T* weight, float eps, T* y, int64_t N) {
  vf a = set(0.0f), b = a;
  int64_t j = 0;
  for (; j + 2 * W <= N; j += 2 * W) {
    const vf u = load(x + j), v = load(x + j + W);
    a = fma(u, u, a), b = fma(v, v, b);
  }
  each(j, N, [&](auto at) {
    const vf u = at(x);
    a = fma(u, u, a);
  });
  const vf inv = set(1.0f / std::sqrt(sum(a + b) / static_cast<float>(N) + eps));
  each(0, N, [=](auto at) { at.put(y, at(weight) * round_to<T>(at(x) * inv)); });
}

template <class T>
void swiglu_row(const T* gate, const T* up, T* y, int64_t N) {
  each(0, N, [=](auto at) {
    const vf g = at(gate);
    at.put(y, round_to<T>(g / (set(1.0f) + exp_minus(g))) * at(up));
  });
}

template <class T>
void add_row(const T* x, T* y, int64_t N) {
  each(0, N, [=](auto at) { at.put(y, at(y) + at(x)); });
}

// y[r] = <w[r], x> for rows [first, end) of a dense weight
template <class T>
void dense_rows(const T* w, const T* x, T* y, int64_t first, int64_t end, int64_t N) {
  int64_t r = first;
  for (; r + 4 <= end; r += 4) {
    const T* p = w + r * N;
    vf s[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    each(0, N, [&](auto at) {
      const vf v = at(x);
      for (int i = 0; i < 4; ++i) s[i] = fma(at(p + i * N), v, s[i]);
    });
    for (int i = 0; i < 4; ++i) y[r + i] = from_float<T>(sum(s[i]));
  }
  for (; r < end; ++r) {
    vf s = set(0.0f);
    each(0, N, [&](auto at) { s = fma(at(w + r * N), at(x), s); });
    y[r] = from_float<T>(sum(s));
  }
}

// A head's query or key: normalised if there is a norm, then rotated (rotate-half), all in the dtype as transformers does.
template <class T>
void rotate(const T* x, const T* norm, float eps, const T* cosine, const T* sine, T* y, int64_t D) {
  if (norm) {
    norm_row(x, norm, eps, y + D, D);
    x = y + D;
  }
  const int64_t half = D / 2;
  each(0, half, [=](auto at) {
    const vf a = at(x), b = at(x + half);
    at.put(y, round_to<T>(a * at(cosine)) - round_to<T>(b * at(sine)));
    at.put(y + half, round_to<T>(b * at(cosine + half)) + round_to<T>(a * at(sine + half)));
  });
}

template <class T>
float dot_row(const T* x, const T* y, int64_t N) {
  vf s = set(0.0f);
  each(0, N, [&](auto at) { s = fma(at(x), at(y), s); });
  return sum(s);
}

// out [D] = softmax(scale q K^T) V over `count` cached positions and, last, the token's own key and value. scores
// [count + 1]; total [D].
template <class T>
void attend(const T* q, const T* keys, const T* values, const T* key, const T* value, int64_t count, float scale,
            float* scores, float* total, T* out, int64_t D) {
  float most = dot_row(q, key, D) * scale;
  bool nan = most != most;
  scores[count] = most;
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = dot_row(q, keys + i * D, D) * scale;
    nan |= scores[i] != scores[i];
    most = std::max(most, scores[i]);
  }
  each(0, count + 1, [&](auto at) { at.put(scores, exp_minus(set(most) - at(scores))); });
  float sum_of = 0.0f;
  for (int64_t i = 0; i <= count; ++i) sum_of += scores[i];
  const float inv = nan ? NAN : 1.0f / sum_of;  // exp_minus makes a number of NaN
  each(0, D, [&](auto at) { at.put(total, at(value) * set(scores[count] * inv)); });
  for (int64_t i = 0; i < count; ++i) {
    const vf p = set(scores[i] * inv);
    each(0, D, [&](auto at) { at.put(total, fma(p, at(values + i * D), at(total))); });
  }
  each(0, D, [&](auto at) { at.put(out, at(total)); });
}

}  // namespace jointnas::JN_ISA
