// The supernet's elementwise operations with the width masks folded in, forward and backward, one pass over each
// tensor (two over a row for RMSNorm, the second from the cache). Math is fp32, one rounding per output.
// Formulas: the docstrings of ops/channel_mask.py, gated_residual.py, masked_swiglu.py, mixed_rmsnorm.py and
// masked_rope.py. Column sums (mask gradients) are kept per chunk of rows: partial [chunks, N], summed by the caller.

#ifdef JN_ISA  // once per instruction set

#include "segments.h"

namespace jnk {
namespace JN_ISA {

inline void zero(float* p, int64_t n) {
  if (p) std::memset(p, 0, static_cast<size_t>(n) * sizeof(float));
}

// y = g * mask, and with x and column: column += g * x
template <class T>
void mask_rows(const T* g, const T* x, const float* mask, T* y, float* column, int64_t rows, int64_t N) {
  zero(column, N);
  for (int64_t i = 0; i < rows; ++i, g += N, y += N) {
    if (column) {
      each(0, N, [=](auto at) {
        const vf v = at(g);
        at.put(y, v * at(mask));
        at.add(column, v * at(x));
      });
      x += N;
    } else {
      each(0, N, [=](auto at) { at.put(y, at(g) * at(mask)); });
    }
  }
}

// out = h + mask y, or gate (h + mask y) + (1 - gate) x
template <class T>
void residual_rows(const T* h, const T* y, const float* mask, const float* gate, const T* x, T* out, int64_t rows,
                   int64_t N) {
  for (int64_t i = 0; i < rows; ++i, h += N, y += N, out += N) {
    const auto block = [=](auto at) { return mask ? fma(at(mask), at(y), at(h)) : at(h) + at(y); };
    if (gate) {
      // not x + gate (.. - x): at gate 1 and 0 the result must be the block's and x exactly
      const vf v = set(*gate), rest = set(1.0f - *gate);
      each(0, N, [=](auto at) { at.put(out, fma(v, block(at), rest * at(x))); });
      x += N;
    } else {
      each(0, N, [=](auto at) { at.put(out, block(at)); });
    }
  }
}

// dh = gate g, dx = (1 - gate) g, dy = gate g mask (if dy); column += gate g y (if column); returns sum g (h + mask y - x)
template <class T>
float residual_backward_rows(const T* g, const T* h, const T* y, const float* mask, float gate1, const T* x, T* dh, T* dy,
                             T* dx, float* column, bool need_gate, int64_t rows, int64_t N) {
  zero(column, N);
  const vf gate = set(gate1), rest = set(1.0f - gate1);
  float total = 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t o = i * N;
    vf dot = set(0.0f);
    each(0, N, [&](auto at) {
      const vf v = at(g + o), a = gate * v;
      at.put(dh + o, a);
      at.put(dx + o, rest * v);
      if (dy) at.put(dy + o, a * at(mask));
      if (column) at.add(column, a * at(y + o));
      if (need_gate) {
        const vf block = mask ? fma(at(mask), at(y + o), at(h + o)) : at(h + o) + at(y + o);
        dot = fma(v, block - at(x + o), dot);
      }
    });
    total += sum(dot);
  }
  return total;
}

inline vf sigmoid(vf a) { return set(1.0f) / (set(1.0f) + exp(set(0.0f) - a)); }

// out = silu(r gate) (r up) c
template <class T>
void swiglu_rows(const T* gate, const T* up, const float* r, const float* c, T* out, int64_t rows, int64_t N) {
  for (int64_t i = 0; i < rows; ++i, gate += N, up += N, out += N)
    each(0, N, [=](auto at) {
      const vf k = at(r), a = k * at(gate);
      at.put(out, a * sigmoid(a) * (k * at(up)) * at(c));
    });
}

template <class T>
void swiglu_backward_rows(const T* g, const T* gate, const T* up, const float* r, const float* c, T* dgate, T* dup,
                          float* dr, float* dc, int64_t rows, int64_t N) {
  zero(dr, N);
  zero(dc, N);
  for (int64_t i = 0; i < rows; ++i, g += N, gate += N, up += N, dgate += N, dup += N)
    each(0, N, [=](auto at) {
      const vf k = at(r), x = at(gate), u = at(up), a = k * x, v = k * u, s = sigmoid(a);
      const vf f = a * s, slope = s * fma(a, set(1.0f) - s, set(1.0f));
      const vf d = at(g), dcol = d * at(c), vs = v * slope;
      at.put(dgate, dcol * vs * k);
      at.put(dup, dcol * f * k);
      if (dr) at.add(dr, dcol * fma(vs, x, f * u));
      if (dc) at.add(dc, d * f * v);
    });
}

template <class T>
void rmsnorm_rows(const T* x, const float* scale, const float* alpha, const Segments& seg, float eps, T* y, float* inv,
                  int64_t rows, int64_t N) {
  float t[kMaxChoices];
  for (int64_t row = 0; row < rows; ++row, x += N, y += N, inv += seg.K) {
    norm_factors(x, alpha, seg, eps, inv, t);
    int64_t start = 0;
    for (int64_t s = 0; s < seg.S; start = seg.ends[s++]) {
      const vf k = set(t[s]);
      each(start, seg.ends[s], [=](auto at) { at.put(y, at(x) * k * at(scale)); });
    }
    each(start, N, [=](auto at) { at.put(y, set(0.0f)); });
  }
}

// dx; dalpha [rows, K] (if given) inv_i S_i per row; column (if given) += g x t
template <class T>
void rmsnorm_backward_rows(const T* g, const T* x, const float* scale, const float* alpha, const float* inv,
                           const Segments& seg, T* dx, float* dalpha, float* column, int64_t rows, int64_t N) {
  zero(column, N);
  float t[kMaxChoices], back[kMaxChoices];
  for (int64_t row = 0; row < rows; ++row, g += N, x += N, dx += N, inv += seg.K) {
    norm_backward_factors(g, x, scale, alpha, inv, seg, t, back, dalpha ? dalpha + row * seg.K : nullptr);
    int64_t start = 0;
    for (int64_t s = 0; s < seg.S; start = seg.ends[s++]) {
      const vf k = set(t[s]), b = set(back[s]);
      each(start, seg.ends[s], [=](auto at) {
        const vf d = at(g), v = at(x);
        at.put(dx, fnma(v, b, d * at(scale) * k));
        if (column) at.add(column, d * v * k);
      });
    }
    each(start, N, [=](auto at) { at.put(dx, set(0.0f)); });
  }
}

// One token's heads [H, D]: out = rope(mask x), or backward: dx = mask rope^T(g) and dmask += x rope^T(g) (if dmask)
template <class T>
void rope_token(const T* x, const float* mask, const float* cosine, const float* sine, T* out, int64_t H, int64_t D) {
  const int64_t half = D / 2;
  for (int64_t h = 0; h < H; ++h, x += D, mask += D, out += D)
    each(0, half, [=](auto at) {
      const vf a = at(x) * at(mask), b = at(x + half) * at(mask + half);
      at.put(out, fnma(b, at(sine), a * at(cosine)));
      at.put(out + half, fma(a, at(sine + half), b * at(cosine + half)));
    });
}
template <class T>
void rope_token_backward(const T* g, const T* x, const float* mask, const float* cosine, const float* sine, T* dx,
                         float* dmask, int64_t H, int64_t D) {
  const int64_t half = D / 2;
  for (int64_t h = 0; h < H; ++h, g += D, mask += D, dx += D) {
    each(0, half, [=](auto at) {
      const vf a = at(g), b = at(g + half);
      const vf p = fma(b, at(sine + half), a * at(cosine)), q = fnma(a, at(sine), b * at(cosine + half));
      at.put(dx, p * at(mask));
      at.put(dx + half, q * at(mask + half));
      if (dmask) {
        at.add(dmask, p * at(x));
        at.add(dmask + half, q * at(x + half));
      }
    });
    if (dmask) x += D, dmask += D;
  }
}

}  // namespace JN_ISA
}  // namespace jnk

#else

#include "bf16.h"
#include "cpu_ops.h"
#include "isa.h"
#include "parallel.h"
#include "segments.h"

#define JN_THIS_FILE "../cpu/elementwise.cpp"
#include "each_isa.h"

using namespace jnk;

namespace {

template <class T>
const T* at(const void* p, int64_t i) {
  return p ? static_cast<const T*>(p) + i : nullptr;
}
template <class T>
T* at(void* p, int64_t i) {
  return p ? static_cast<T*>(p) + i : nullptr;
}

// f(T{}, level, first row, rows, chunk) for every chunk of `chunk_rows` rows
template <class F>
int run(int64_t rows, int64_t chunk_rows, int dtype, int threads, int isa, const F& f) {
  const int level = choose_isa(isa);
  if (!level) return kIsaMissing;
  if (dtype != kF32 && dtype != kBf16) return kBadArgument;
  parallel_for((rows + chunk_rows - 1) / chunk_rows, threads, [&](int64_t i) {
    const int64_t first = i * chunk_rows, n = std::min(chunk_rows, rows - first);
    if (dtype == kF32)
      f(float{}, level, first, n, i);
    else
      f(bf16{}, level, first, n, i);
  });
  return kOk;
}

}  // namespace

int jn_cpu_channel_mask(const void* g, const void* x, const float* mask, void* y, float* partial, int64_t rows, int64_t N,
                        int64_t chunk_rows, int dtype, int threads, int isa) {
  return run(rows, chunk_rows, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    using T = decltype(t);
    JN_DISPATCH(level, mask_rows(at<T>(g, i * N), at<T>(x, i * N), mask, at<T>(y, i * N), at<float>(partial, chunk * N), n, N));
  });
}

int jn_cpu_gated_residual(const void* h, const void* y, const float* mask, const float* gate, const void* x, void* out,
                          int64_t rows, int64_t N, int64_t chunk_rows, int dtype, int threads, int isa) {
  return run(rows, chunk_rows, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    using T = decltype(t);
    JN_DISPATCH(level, residual_rows(at<T>(h, i * N), at<T>(y, i * N), mask, gate, at<T>(x, i * N), at<T>(out, i * N), n, N));
  });
}

int jn_cpu_gated_residual_backward(const void* g, const void* h, const void* y, const float* mask, const float* gate,
                                   const void* x, void* dh, void* dy, void* dx, float* partial, float* dgate,
                                   int64_t rows, int64_t N, int64_t chunk_rows, int dtype, int threads, int isa) {
  return run(rows, chunk_rows, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    using T = decltype(t);
    float total = 0.0f;
    JN_DISPATCH(level, total = residual_backward_rows(at<T>(g, i * N), at<T>(h, i * N), at<T>(y, i * N), mask, *gate,
                                              at<T>(x, i * N), at<T>(dh, i * N), at<T>(dy, i * N), at<T>(dx, i * N),
                                              at<float>(partial, chunk * N), dgate != nullptr, n, N));
    if (dgate) dgate[chunk] = total;
  });
}

int jn_cpu_masked_swiglu(const void* gate, const void* up, const float* r, const float* c, void* out, int64_t rows,
                         int64_t N, int64_t chunk_rows, int dtype, int threads, int isa) {
  return run(rows, chunk_rows, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    using T = decltype(t);
    JN_DISPATCH(level, swiglu_rows(at<T>(gate, i * N), at<T>(up, i * N), r, c, at<T>(out, i * N), n, N));
  });
}

int jn_cpu_masked_swiglu_backward(const void* g, const void* gate, const void* up, const float* r, const float* c,
                                  void* dgate, void* dup, float* dr, float* dc, int64_t rows, int64_t N,
                                  int64_t chunk_rows, int dtype, int threads, int isa) {
  return run(rows, chunk_rows, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    using T = decltype(t);
    JN_DISPATCH(level, swiglu_backward_rows(at<T>(g, i * N), at<T>(gate, i * N), at<T>(up, i * N), r, c, at<T>(dgate, i * N),
                                            at<T>(dup, i * N), at<float>(dr, chunk * N), at<float>(dc, chunk * N), n, N));
  });
}

int jn_cpu_mixed_rmsnorm(const void* x, const float* scale, const float* alpha, const int64_t* ends, const int64_t* kept,
                         void* y, float* inv, int64_t rows, int64_t N, int64_t S, int64_t K, float eps,
                         int64_t chunk_rows, int dtype, int threads, int isa) {
  if (K > kMaxChoices) return kBadArgument;
  const Segments seg{S, K, ends, kept};
  return run(rows, chunk_rows, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    using T = decltype(t);
    JN_DISPATCH(level, rmsnorm_rows(at<T>(x, i * N), scale, alpha, seg, eps, at<T>(y, i * N), inv + i * K, n, N));
  });
}

int jn_cpu_mixed_rmsnorm_backward(const void* g, const void* x, const float* scale, const float* alpha, const float* inv,
                                  const int64_t* ends, const int64_t* kept, void* dx, float* dalpha, float* partial,
                                  int64_t rows, int64_t N, int64_t S, int64_t K, int64_t chunk_rows, int dtype,
                                  int threads, int isa) {
  if (K > kMaxChoices) return kBadArgument;
  const Segments seg{S, K, ends, kept};
  return run(rows, chunk_rows, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    using T = decltype(t);
    JN_DISPATCH(level, rmsnorm_backward_rows(at<T>(g, i * N), at<T>(x, i * N), scale, alpha, inv + i * K, seg,
                                             at<T>(dx, i * N), at<float>(dalpha, i * K), at<float>(partial, chunk * N), n, N));
  });
}

int jn_cpu_masked_rope(const void* x, const float* mask, const float* cosine, const float* sine, void* out, int64_t tokens,
                       int64_t period, int64_t H, int64_t D, int64_t chunk_rows, int dtype, int threads, int isa) {
  return run(tokens, chunk_rows, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    using T = decltype(t);
    for (int64_t k = i; k < i + n; ++k) {
      const int64_t o = k * H * D, row = k % period * D;
      JN_DISPATCH(level, rope_token(at<T>(x, o), mask, cosine + row, sine + row, at<T>(out, o), H, D));
    }
  });
}

int jn_cpu_masked_rope_backward(const void* g, const void* x, const float* mask, const float* cosine, const float* sine,
                                void* dx, float* partial, int64_t tokens, int64_t period, int64_t H, int64_t D,
                                int64_t chunk_rows, int dtype, int threads, int isa) {
  return run(tokens, chunk_rows, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    using T = decltype(t);
    float* dmask = at<float>(partial, chunk * H * D);
    if (dmask) std::fill(dmask, dmask + H * D, 0.0f);
    for (int64_t k = i; k < i + n; ++k) {
      const int64_t o = k * H * D, row = k % period * D;
      JN_DISPATCH(level, rope_token_backward(at<T>(g, o), at<T>(x, o), mask, cosine + row, sine + row, at<T>(dx, o), dmask, H, D));
    }
  });
}

#endif
