// Rows of a decode step: norms, activations, dense products, rotations; per instruction set (each_isa.h, hence no guard;
// included by cpu/decode.cpp).

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

// Rows [r, r + R) of y = w x, for tokens [m, m + Q). y [.., outputs]
template <int R, int Q, class T>
void dense_tile(const T* w, const T* x, T* y, int64_t r, int64_t m, int64_t N, int64_t outputs) {
  vf s[Q][R];
  for (auto& of_token : s)
    for (vf& sum : of_token) sum = set(0.0f);
  const T *const p = w + r * N, *const q = x + m * N;
  each(0, N, [&](auto at) {
    vf v[Q];
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) v[i] = at(q + i * N);
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      const vf row = at(p + j * N);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) s[i][j] = fma(row, v[i], s[i][j]);
    }
  });
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < R; ++j) y[(m + i) * outputs + r + j] = from_float<T>(sum(s[i][j]));
}

// Rows [first, end) of y [M, outputs] = x [M, N] w^T, of a dense weight
template <class T>
void dense_rows(const T* w, const T* x, T* y, int64_t first, int64_t end, int64_t M, int64_t N, int64_t outputs) {
  constexpr int kTokens = W == 16 ? 6 : 3;  // with 4 rows: sums that fit into the registers
  const auto tokens = [&](auto rows, int64_t r, int64_t begin, int64_t last) {
    int64_t m = begin;
    for (; m + kTokens <= last; m += kTokens) dense_tile<rows(), kTokens>(w, x, y, r, m, N, outputs);
    for (; m < last; ++m) dense_tile<rows(), 1>(w, x, y, r, m, N, outputs);
  };
  constexpr int64_t kPass = 8 * kTokens;  // tokens that stay in the second-level cache while rows pass by
  for (int64_t m = 0; m < M; m += kPass) {
    const int64_t last = std::min(m + kPass, M);
    int64_t r = first;
    for (; r + 4 <= end; r += 4) tokens(std::integral_constant<int, 4>{}, r, m, last);
    for (; r < end; ++r) tokens(std::integral_constant<int, 1>{}, r, m, last);
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

}  // namespace jointnas::JN_ISA
