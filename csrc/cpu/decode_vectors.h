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

// scores[a][i] = scale <q[a], keys[i]> for Q queries
template <int Q, class T>
void scores_of(const T* q, const T* keys, int64_t n, int64_t D, float scale, float* scores, int64_t stride) {
  const auto some = [&](auto count, int64_t i) {
    constexpr int R = count();
    vf s[Q][R];
    for (auto& of_query : s)
      for (vf& x : of_query) x = set(0.0f);
    each(0, D, [&](auto at) {
      vf key[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) key[r] = at(keys + (i + r) * D);
#pragma GCC unroll 4
      for (int a = 0; a < Q; ++a) {
        const vf query = at(q + a * D);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) s[a][r] = fma(key[r], query, s[a][r]);
      }
    });
    for (int a = 0; a < Q; ++a)
      for (int r = 0; r < R; ++r) scores[a * stride + i + r] = sum(s[a][r]) * scale;
  };
  constexpr int kRows = Q <= 2 ? 4 : 2;  // sums that fit into the registers
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows) some(std::integral_constant<int, kRows>{}, i);
  for (; i < n; ++i) some(std::integral_constant<int, 1>{}, i);
}

// out[a][j] = sum of p[a][i] rows[i][j] from column j on, V vectors at a time; the first column that is left.
template <int Q, int V, class T>
int64_t mixed_columns(const float* p, int64_t p_stride, const T* rows, int64_t n, int64_t D, float* out, int64_t stride,
                      int64_t j) {
  for (; j + V * W <= D; j += V * W) {
    vf total[Q][V];
    for (auto& of_query : total)
      for (vf& x : of_query) x = set(0.0f);
    for (int64_t i = 0; i < n; ++i) {
      vf row[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) row[v] = load(rows + i * D + j + v * W);
#pragma GCC unroll 4
      for (int a = 0; a < Q; ++a) {
        const vf share = set(p[a * p_stride + i]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) total[a][v] = fma(share, row[v], total[a][v]);
      }
    }
    for (int a = 0; a < Q; ++a)
      for (int v = 0; v < V; ++v) store(out + a * stride + j + v * W, total[a][v]);
  }
  return j;
}

// Attention of Q queries [Q, D] with one key-value head over n positions, not yet divided by the sum. out [Q][stride]: D
// values, the largest score, the sum. scores [Q, n].
template <int Q, class T>
void attend_queries(const T* q, const T* keys, const T* values, int64_t n, float scale, float* scores, float* out,
                    int64_t stride, int64_t D) {
  scores_of<Q>(q, keys, n, D, scale, scores, n);
  for (int a = 0; a < Q; ++a) {
    float *const own = scores + a * n, *const to = out + a * stride + D;
    float most = own[0];
    int64_t i = 0;
    if (n >= W) {
      vf largest = load(own);
      for (i = W; i + W <= n; i += W) largest = max(largest, load(own + i));
      most = hmax(largest);
    }
    for (; i < n; ++i) most = std::max(most, own[i]);
    bool nan = false;
    for (i = 0; i < n; ++i) nan |= own[i] != own[i];
    vf all = set(0.0f);
    each(0, n, [&](auto at) {
      at.put(own, exp_minus(set(most) - at(own)));
      all = all + at(own);
    });
    to[0] = most, to[1] = nan ? NAN : sum(all);  // exp_minus makes a number of NaN
  }
  constexpr int kVectors = Q == 1 ? 4 : 2;
  int64_t j = mixed_columns<Q, kVectors>(scores, n, values, n, D, out, stride, 0);
  j = mixed_columns<Q, 1>(scores, n, values, n, D, out, stride, j);
  for (int a = 0; a < Q; ++a)
    each(j, D, [&](auto at) {
      vf total = set(0.0f);
      for (int64_t i = 0; i < n; ++i) total = fma(set(scores[a * n + i]), at(values + i * D), total);
      at.put(out + a * stride, total);
    });
}

template <class T>
void attend(const T* q, int64_t queries, const T* keys, const T* values, int64_t n, float scale, float* scores, float* out,
            int64_t stride, int64_t D) {
  int64_t a = 0;
  const auto next = [&](auto count) {
    attend_queries<count()>(q + a * D, keys, values, n, scale, scores, out + a * stride, stride, D);
    a += count();
  };
  while (a + 4 <= queries) next(std::integral_constant<int, 4>{});
  if (queries - a == 3) next(std::integral_constant<int, 3>{});
  if (queries - a == 2) next(std::integral_constant<int, 2>{});
  if (queries - a == 1) next(std::integral_constant<int, 1>{});
}

// out [D] of one query from its parts [count][D + 2].
template <class T>
void merged_parts(const float* parts, int64_t count, T* out, int64_t D) {
  const int64_t stride = D + 2;
  float most = parts[D], all = 0.0f, share[kMostParts];
  for (int64_t i = 1; i < count; ++i) most = std::max(most, parts[i * stride + D]);
  for (int64_t i = 0; i < count; ++i) {
    share[i] = std::exp(parts[i * stride + D] - most);
    all += share[i] * parts[i * stride + D + 1];
  }
  each(0, D, [&](auto at) {
    vf total = set(0.0f);
    for (int64_t i = 0; i < count; ++i) total = fma(set(share[i]), at(parts + i * stride), total);
    at.put(out, total * set(1.0f / all));
  });
}

}  // namespace jointnas::JN_ISA
