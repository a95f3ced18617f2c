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

// put(r, <w[r], x>) for rows [first, end) of w [.., N]
template <class T, class Put>
void dots(const T* w, const T* x, int64_t first, int64_t end, int64_t N, const Put& put) {
  int64_t r = first;
  for (; r + 4 <= end; r += 4) {
    const T* p = w + r * N;
    vf s[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    each(0, N, [&](auto at) {
      const vf v = at(x);
      for (int i = 0; i < 4; ++i) s[i] = fma(at(p + i * N), v, s[i]);
    });
    for (int i = 0; i < 4; ++i) put(r + i, sum(s[i]));
  }
  for (; r < end; ++r) {
    vf s = set(0.0f);
    each(0, N, [&](auto at) { s = fma(at(w + r * N), at(x), s); });
    put(r, sum(s));
  }
}

// Rows [first, end) of y = w x, of a dense weight
template <class T>
void dense_rows(const T* w, const T* x, T* y, int64_t first, int64_t end, int64_t N) {
  dots(w, x, first, end, N, [y](int64_t r, float value) { y[r] = from_float<T>(value); });
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

// out [N] = scale (p[count] last + sum of p[i] rows[i]), V vectors at a time from j on; where the next would begin.
template <int V, class T>
int64_t mixed_rows(const float* p, const T* rows, const T* last, int64_t count, float scale, T* out, int64_t j, int64_t N) {
  for (; j + V * W <= N; j += V * W) {
    vf total[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) total[v] = set(p[count]) * load(last + j + v * W);
    for (int64_t i = 0; i < count; ++i) {
      const vf share = set(p[i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) total[v] = fma(share, load(rows + i * N + j + v * W), total[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + j + v * W, total[v] * set(scale));
  }
  return j;
}

// out [D] = softmax(scale q K^T) V over `count` cached positions and, last, the token's own key and value. scores
// [count + 1].
template <class T>
void attend(const T* q, const T* keys, const T* values, const T* key, const T* value, int64_t count, float scale,
            float* scores, T* out, int64_t D) {
  dots(keys, q, 0, count, D, [=](int64_t i, float s) { scores[i] = s * scale; });
  dots(key, q, 0, 1, D, [=](int64_t, float s) { scores[count] = s * scale; });
  vf largest = set(scores[count]);
  int64_t whole = 0;
  for (; whole + W <= count; whole += W) largest = max(largest, load(scores + whole));
  float most = hmax(largest);
  for (int64_t i = whole; i < count; ++i) most = std::max(most, scores[i]);
  bool nan = false;
  for (int64_t i = 0; i <= count; ++i) nan |= scores[i] != scores[i];
  each(0, count + 1, [&](auto at) { at.put(scores, exp_minus(set(most) - at(scores))); });
  vf all = set(0.0f);
  each(0, count + 1, [&](auto at) { all = all + at(scores); });
  const float inv = nan ? NAN : 1.0f / sum(all);  // exp_minus makes a number of NaN
  constexpr int kMost = W == 8 ? 8 : 4;  // vectors of an output: of 64 floats all
  int64_t j = mixed_rows<kMost>(scores, values, value, count, inv, out, 0, D);
  j = mixed_rows<1>(scores, values, value, count, inv, out, j, D);
  each(j, D, [&](auto at) {
    vf total = set(scores[count]) * at(value);
    for (int64_t i = 0; i < count; ++i) total = fma(set(scores[i]), at(values + i * D), total);
    at.put(out, total * set(inv));
  });
}

}  // namespace jointnas::JN_ISA
