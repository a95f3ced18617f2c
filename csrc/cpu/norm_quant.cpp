// mixed_rmsnorm with a mixture of activation precisions behind it, one token (row) at a time, so that x is read from
// memory once: sums of squares, the normalised row into y (whose values are the unfused kernel's), its range, then the
// mixture over it in place. Formulas: the op's docstring.

#ifdef JN_ISA  // once per instruction set

#include "cpu/act_quant.h"
#include "cpu/segments.h"

namespace jointnas::JN_ISA {

template <class T>
void norm_mix_rows(const T* x, const float* scale, const float* alpha, const Segments& seg, float eps,
                   const float* probs, const int* bits, int64_t Q, bool symmetric, T* y, float* inv, float* levels,
                   int64_t rows, int64_t N) {
  float t[kMaxChoices + 1];
  for (int64_t row = 0; row < rows; ++row, x += N, y += N, inv += seg.K, levels += 2 * Q) {
    norm_factors(x, alpha, seg, eps, inv, t);
    each_segment(seg, N, [&](int64_t s, int64_t begin, int64_t end) {
      const vf k = set(t[s]);
      pairs(begin, end, [=](auto at) { at.put(y, at(x) * k * at(scale)); });
    });
    const Precisions all = precisions<T>(row_range(y, N), bits, Q, symmetric);
    for (int64_t p = 0; p < Q; ++p) levels[2 * p] = 1.0f, levels[2 * p + 1] = 0.0f;  // of the identity
    for (int64_t p = 0; p < all.n; ++p) {
      levels[2 * all.index[p]] = all.q[p].s;
      levels[2 * all.index[p] + 1] = all.q[p].z;
    }
    mix_token(y, all, probs, y, N, x + N, false);
  }
}

// dx; dalpha [rows, K] (if given) per row; dprobs [rows, Q] <g, Q_q> per row; column (if given) += total g x t
template <class T>
void norm_mix_backward_rows(const T* g, const T* x, const float* scale, const float* alpha, const float* inv,
                            const Segments& seg, const float* levels, const int* bits, int64_t Q, float total, T* dx,
                            float* dalpha, float* dprobs, float* column, int64_t rows, int64_t N) {
  zero(column, N);
  float t[kMaxChoices + 1], back[kMaxChoices + 1];
  for (int64_t row = 0; row < rows; ++row, g += N, x += N, dx += N, inv += seg.K, levels += 2 * Q, dprobs += Q) {
    norm_backward_factors(g, x, scale, alpha, inv, seg, t, back, dalpha);
    if (dalpha)
      for (int64_t i = 0; i < seg.K; ++i) *dalpha++ *= total;
    Precisions all{bits, Q};
    for (int64_t p = 0; p < Q; ++p)
      if (bits[p] != 16) all.add(quantizer_of<T>(levels[2 * p], levels[2 * p + 1], bits[p]), p);
    vf2 identity = set(0.0f), dot[kMaxPrecisions];
    for (int64_t p = 0; p < all.n; ++p) dot[p] = set(0.0f);
    with_path(all.path, [&](auto path) {
      each_segment(seg, N, [&](int64_t s, int64_t begin, int64_t end) {
        const vf k = set(t[s]), kt = set(t[s] * total), b = set(back[s] * total);
        pairs(begin, end, [&](auto at) {
          at.prefetch(g + N);
          at.prefetch(x + N);
          const auto d = at(g), u = at(x), m = at(scale), v = round_to<T>(u * k * m);
          at.put(dx, fnma(u, b, d * m * kt));
          if (column) at.add(column, d * u * kt);
          add_product(identity, d, v);
          for (int64_t p = 0; p < all.n; ++p)
            add_product(dot[p], d, token_level<T, path>(v, all.q[p]) - set(all.q[p].z));
        });
      });
    });
    for (int64_t p = 0; p < Q; ++p) dprobs[p] = sum(identity);
    for (int64_t p = 0; p < all.n; ++p) dprobs[all.index[p]] = all.q[p].s * sum(dot[p]);
  }
}

}  // namespace jointnas::JN_ISA

#else

#include "cpu/chunks.h"
#include "cpu/segments.h"
#include "export.h"

#define JN_THIS_FILE "cpu/norm_quant.cpp"
#include "cpu/each_isa.h"

namespace jointnas {

// y = sum_q probs[q] Q_q(v), v = mixed_rmsnorm(x) rounded to dtype; levels [rows, Q, 2] out: scale and zero point
int cpu_mixed_rmsnorm_quant(const void* x, const float* scale, const float* alpha, const int64_t* ends,
                            const int64_t* kept, const float* probs, const int* bits, void* y, float* inv,
                            float* levels, int64_t rows, int64_t N, int64_t S, int64_t K, int64_t Q, bool symmetric,
                            float eps, Chunks chunks) {
  if (K > kMaxChoices || Q > kMaxPrecisions) return kBadArgument;
  const Segments seg{S, K, ends, kept};
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    JN_DISPATCH(level, norm_mix_rows(at(t, x, i * N), scale, alpha, seg, eps, probs, bits, Q, symmetric,
                                     at(t, y, i * N), inv + i * K, levels + 2 * i * Q, n, N));
  });
}
JN_EXPORT(cpu_mixed_rmsnorm_quant);

// total = sum of probs; dalpha [rows, K] or null; dprobs [rows, Q]; partial: column sums of total g x t, or null
int cpu_mixed_rmsnorm_quant_backward(const void* g, const void* x, const float* scale, const float* alpha,
                                     const float* inv, const int64_t* ends, const int64_t* kept, const float* levels,
                                     const int* bits, void* dx, float* dalpha, float* dprobs, float* partial,
                                     int64_t rows, int64_t N, int64_t S, int64_t K, int64_t Q, float total,
                                     Chunks chunks) {
  if (K > kMaxChoices || Q > kMaxPrecisions) return kBadArgument;
  const Segments seg{S, K, ends, kept};
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    JN_DISPATCH(level, norm_mix_backward_rows(at(t, g, i * N), at(t, x, i * N), scale, alpha, inv + i * K, seg,
                                              levels + 2 * i * Q, bits, Q, total, at(t, dx, i * N), at(dalpha, i * K),
                                              dprobs + i * Q, at(partial, chunk * N), n, N));
  });
}
JN_EXPORT(cpu_mixed_rmsnorm_quant_backward);

}  // namespace jointnas

#endif
