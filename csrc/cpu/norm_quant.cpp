// mixed_rmsnorm with a mixture of activation precisions behind it, one token (row) at a time, so that x is read from
// memory once: sums of squares, the normalised row into y (whose values are the unfused kernel's), its range, then the
// mixture over it in place. Formulas: ops/mixed_rmsnorm_quant.py.

#ifdef JN_ISA  // once per instruction set

#include "cpu/act_quant.h"
#include "cpu/segments.h"

namespace jointnas {
namespace JN_ISA {

template <class T>
void norm_mix_rows(const T* x, const float* scale, const float* alpha, const Segments& seg, float eps,
                   const float* probs, const int* bits, int64_t Q, bool symmetric, T* y, float* inv, float* levels,
                   int64_t rows, int64_t N) {
  float t[kMaxChoices];
  for (int64_t row = 0; row < rows; ++row, x += N, y += N, inv += seg.K, levels += 2 * Q) {
    norm_factors(x, alpha, seg, eps, inv, t);
    int64_t start = 0;
    for (int64_t s = 0; s < seg.S; start = seg.ends[s++]) {
      const vf k = set(t[s]);
      pairs(start, seg.ends[s], [=](auto at) { at.put(y, at(x) * k * at(scale)); });
    }
    each(start, N, [=](auto at) { at.put(y, set(0.0f)); });
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
  if (column) std::memset(column, 0, static_cast<size_t>(N) * sizeof(float));
  float t[kMaxChoices], back[kMaxChoices];
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
      int64_t start = 0;
      for (int64_t s = 0; s < seg.S; start = seg.ends[s++]) {
        const vf k = set(t[s]), kt = set(t[s] * total), b = set(back[s] * total);
        pairs(start, seg.ends[s], [&](auto at) {
          at.prefetch(g + N);
          at.prefetch(x + N);
          const auto d = at(g), u = at(x), m = at(scale), v = round_to<T>(u * k * m);
          at.put(dx, fnma(u, b, d * m * kt));
          if (column) at.add(column, d * u * kt);
          add_product(identity, d, v);
          for (int64_t p = 0; p < all.n; ++p)
            add_product(dot[p], d, token_level<T, path>(v, all.q[p]) - set(all.q[p].z));
        });
      }
      each(start, N, [=](auto at) { at.put(dx, set(0.0f)); });
    });
    for (int64_t p = 0; p < Q; ++p) dprobs[p] = sum(identity);
    for (int64_t p = 0; p < all.n; ++p) dprobs[all.index[p]] = all.q[p].s * sum(dot[p]);
  }
}

}  // namespace JN_ISA
}  // namespace jointnas

#else

#include "cpu/bf16.h"
#include "cpu/cpu_ops.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/segments.h"

#define JN_THIS_FILE "cpu/norm_quant.cpp"
#include "cpu/each_isa.h"

using namespace jointnas;

namespace {

template <class F>
int run(int64_t rows, int64_t chunk_rows, const Segments& seg, int64_t Q, int dtype, int threads, int isa, const F& f) {
  const int level = choose_isa(isa);
  if (!level) return kIsaMissing;
  if ((dtype != kF32 && dtype != kBf16) || seg.K > kMaxChoices || Q > kMaxPrecisions) return kBadArgument;
  parallel_for((rows + chunk_rows - 1) / chunk_rows, threads, [&](int64_t i) {
    const int64_t first = i * chunk_rows, n = std::min(chunk_rows, rows - first);
    dtype == kF32 ? f(float{}, level, first, n, i) : f(bf16{}, level, first, n, i);
  });
  return kOk;
}

}  // namespace

int jn_cpu_mixed_rmsnorm_quant(const void* x, const float* scale, const float* alpha, const int64_t* ends,
                               const int64_t* kept, const float* probs, const int* bits, void* y, float* inv,
                               float* levels, int64_t rows, int64_t N, int64_t S, int64_t K, int64_t Q, int symmetric,
                               float eps, int64_t chunk_rows, int dtype, int threads, int isa) {
  const Segments seg{S, K, ends, kept};
  return run(rows, chunk_rows, seg, Q, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    using T = decltype(t);
    JN_DISPATCH(level, norm_mix_rows(static_cast<const T*>(x) + i * N, scale, alpha, seg, eps, probs, bits, Q,
                                     symmetric != 0, static_cast<T*>(y) + i * N, inv + i * K, levels + 2 * i * Q, n, N));
  });
}

int jn_cpu_mixed_rmsnorm_quant_backward(const void* g, const void* x, const float* scale, const float* alpha,
                                        const float* inv, const int64_t* ends, const int64_t* kept,
                                        const float* levels, const int* bits, void* dx, float* dalpha, float* dprobs,
                                        float* partial, int64_t rows, int64_t N, int64_t S, int64_t K, int64_t Q,
                                        float total, int64_t chunk_rows, int dtype, int threads, int isa) {
  const Segments seg{S, K, ends, kept};
  return run(rows, chunk_rows, seg, Q, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    using T = decltype(t);
    JN_DISPATCH(level, norm_mix_backward_rows(static_cast<const T*>(g) + i * N, static_cast<const T*>(x) + i * N, scale,
                                              alpha, inv + i * K, seg, levels + 2 * i * Q, bits, Q, total,
                                              static_cast<T*>(dx) + i * N, dalpha ? dalpha + i * K : nullptr,
                                              dprobs + i * Q, partial ? partial + chunk * N : nullptr, n, N));
  });
}

#endif
