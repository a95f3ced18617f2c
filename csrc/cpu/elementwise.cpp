// The supernet's elementwise operations with the width masks folded in, forward and backward, one pass over each
// tensor (two over a row for RMSNorm, the second from the cache). Math is fp32, one rounding per output.
// Formulas: the docstrings of the ops. Tensors are [rows, N] of the dtype, vectors fp32. Work is cut into chunks of rows
// (chunks.h); column sums (mask gradients) are kept for each chunk: partial [chunks, N], summed by the caller.

#ifdef JN_ISA  // once per instruction set

#include "cpu/segments.h"

namespace jointnas::JN_ISA {

// y = g * mask, and with x and column: column += g * x
template <class T>
void mask_rows(const T* g, const T* x, const float* mask, T* y, float* column, int64_t rows, int64_t N, bool streamed) {
  zero(column, N);
  for (int64_t i = 0; i < rows; ++i, g += N, y += N) {
    if (column) {
      pairs(0, N, streamed, [=](auto at) {
        const auto v = at(g);
        at.put(y, v * at(mask));
        at.add_product(column, v, at(x));
      });
      x += N;
    } else {
      pairs(0, N, streamed, [=](auto at) { at.put(y, at(g) * at(mask)); });
    }
  }
  if (streamed) stream_end();
}

// out = h + mask y, or gate (h + mask y) + (1 - gate) x
template <class T>
void residual_rows(const T* h, const T* y, const float* mask, const float* gate, const T* x, T* out, int64_t rows,
                   int64_t N, bool streamed) {
  for (int64_t i = 0; i < rows; ++i, h += N, y += N, out += N) {
    const auto block = [=](auto at) { return mask ? fma(at(mask), at(y), at(h)) : at(h) + at(y); };
    if (gate) {
      // not x + gate (.. - x): at gate 1 and 0 the result must be the block's and x exactly
      const vf v = set(*gate), rest = set(1.0f - *gate);
      pairs(0, N, streamed, [=](auto at) { at.put(out, fma(v, block(at), rest * at(x))); });
      x += N;
    } else {
      pairs(0, N, streamed, [=](auto at) { at.put(out, block(at)); });
    }
  }
  if (streamed) stream_end();
}

// dh = gate g, dx = (1 - gate) g, dy = gate g mask (if dy); column += gate g y (if column); returns sum g (h + mask y - x)
template <class T>
float residual_backward_rows(const T* g, const T* h, const T* y, const float* mask, float gate1, const T* x, T* dh, T* dy,
                             T* dx, float* column, bool need_gate, int64_t rows, int64_t N, bool streamed) {
  zero(column, N);
  const vf gate = set(gate1), rest = set(1.0f - gate1);
  float total = 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t o = i * N;
    vf2 dot = set(0.0f);
    pairs(0, N, streamed, [&](auto at) {
      const auto v = at(g + o), a = gate * v;
      at.put(dh + o, a);
      at.put(dx + o, rest * v);
      if (dy) at.put(dy + o, a * at(mask));
      if (column) at.add_product(column, a, at(y + o));
      if (need_gate) {
        const auto block = mask ? fma(at(mask), at(y + o), at(h + o)) : at(h + o) + at(y + o);
        add_product(dot, v, block - at(x + o));
      }
    });
    total += sum(dot);
  }
  if (streamed) stream_end();
  return total;
}

// out = silu(r gate) up rc, rc = r c
template <class T>
void swiglu_rows(const T* gate, const T* up, const float* r, const float* rc, T* out, int64_t rows, int64_t N,
                 bool streamed) {
  for (int64_t i = 0; i < rows; ++i, gate += N, up += N, out += N)
    pairs(0, N, streamed, [=](auto at) {
      const auto a = at(r) * at(gate);
      at.put(out, a * (at(up) * at(rc)) / (set(1.0f) + exp_minus(a)));
    });
  if (streamed) stream_end();
}

// With rc = r c and rrc = r r c: dgate, dup, and (if given) dr / c and dc / r summed over the rows, then times c and r.
// The sigmoids of a block come first: both in one loop are a chain too long for the scheduler (1,024 x 14336 bf16 with dr
// and dc: 6.3 ms instead of 5.8).
template <class T>
void swiglu_backward_rows(const T* g, const T* gate, const T* up, const float* r, const float* c, const float* rc,
                          const float* rrc, T* dgate, T* dup, float* dr, float* dc, int64_t rows, int64_t N,
                          bool streamed) {
  constexpr int64_t kBlock = 512;
  alignas(64) float memory[kBlock];
  float* const sigmoids = memory;
  zero(dr, N);
  zero(dc, N);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t b = 0; b < N; b += kBlock) {
      const int64_t n = std::min(kBlock, N - b), o = row * N + b;
      pairs(0, n, [=](auto at) { at.put(sigmoids, set(1.0f) / (set(1.0f) + exp_minus(at(r + b) * at(gate + o)))); });
      pairs(0, n, streamed, [=](auto at) {
        const auto d = at(g + o), h = d * at(up + o), a = at(r + b) * at(gate + o), s = at(sigmoids), f = a * s;
        const auto slope = fma(f, set(1.0f) - s, s);
        at.put(dgate + o, h * at(rrc + b) * slope);
        at.put(dup + o, d * at(rc + b) * f);
        if (dr) at.add_product(dr + b, h, fma(a, slope, f));
        if (dc) at.add_product(dc + b, h, f);
      });
    }
  if (dr) each(0, N, [=](auto at) { at.put(dr, at(dr) * at(c)); });
  if (dc) each(0, N, [=](auto at) { at.put(dc, at(dc) * at(r)); });
  if (streamed) stream_end();
}

// Rows of RMSNorm are read twice. While the second pass works on the cache it asks for the next row (`next` elements
// on), which the first would otherwise wait for.
template <class T>
void rmsnorm_rows(const T* x, const float* scale, const float* alpha, const Segments& seg, float eps, T* y, float* inv,
                  int64_t rows, int64_t N, bool streamed) {
  float t[kMaxChoices + 1];
  for (int64_t row = 0; row < rows; ++row, x += N, y += N, inv += seg.K) {
    norm_factors(x, alpha, seg, eps, inv, t);
    each_segment(seg, N, [&](int64_t s, int64_t begin, int64_t end) {
      const vf k = set(t[s]);
      pairs(begin, end, streamed && begin % 32 == 0, [=](auto at) {
        at.prefetch(x + N);
        at.put(y, at(x) * k * at(scale));
      });
    });
  }
  if (streamed) stream_end();
}

// dx; dalpha [rows, K] (if given) inv_i S_i per row; column (if given) += g x t
template <class T>
void rmsnorm_backward_rows(const T* g, const T* x, const float* scale, const float* alpha, const float* inv,
                           const Segments& seg, T* dx, float* dalpha, float* column, int64_t rows, int64_t N,
                           bool streamed) {
  zero(column, N);
  float t[kMaxChoices + 1], back[kMaxChoices + 1];
  for (int64_t row = 0; row < rows; ++row, g += N, x += N, dx += N, inv += seg.K) {
    norm_backward_factors(g, x, scale, alpha, inv, seg, t, back, dalpha ? dalpha + row * seg.K : nullptr);
    each_segment(seg, N, [&](int64_t s, int64_t begin, int64_t end) {
      const vf k = set(t[s]), b = set(back[s]);
      pairs(begin, end, streamed && begin % 32 == 0, [=](auto at) {
        at.prefetch(g + N);
        at.prefetch(x + N);
        const auto d = at(g) * k, v = at(x);
        at.put(dx, fnma(v, b, d * at(scale)));
        if (column) at.add_product(column, d, v);
      });
    });
  }
  if (streamed) stream_end();
}

// Tokens [first, last) of [tokens, H, D]: out = rope(mask x), or backward: dx = mask rope^T(g), dmask += x rope^T(g) (if dmask)
template <class T>
void rope_rows(const T* x, const float* mask, const float* cosine, const float* sine, T* out, int64_t first,
               int64_t last, int64_t period, int64_t H, int64_t D, bool streamed) {
  const int64_t half = D / 2;
  for (int64_t i = first; i < last; ++i) {
    const float *c = cosine + i % period * D, *s = sine + i % period * D;
    for (int64_t h = 0; h < H; ++h) {
      const float* m = mask + h * D;
      const T* u = x + (i * H + h) * D;
      T* v = out + (i * H + h) * D;
      pairs(0, half, streamed, [=](auto at) {
        const auto a = at(u) * at(m), b = at(u + half) * at(m + half);
        at.put(v, fnma(b, at(s), a * at(c)));
        at.put(v + half, fma(a, at(s + half), b * at(c + half)));
      });
    }
  }
  if (streamed) stream_end();
}
template <class T>
void rope_backward_rows(const T* g, const T* x, const float* mask, const float* cosine, const float* sine, T* dx,
                        float* dmask, int64_t first, int64_t last, int64_t period, int64_t H, int64_t D,
                        bool streamed) {
  const int64_t half = D / 2;
  zero(dmask, H * D);
  for (int64_t i = first; i < last; ++i) {
    const float *c = cosine + i % period * D, *s = sine + i % period * D;
    for (int64_t h = 0; h < H; ++h) {
      const int64_t o = (i * H + h) * D;
      const float* m = mask + h * D;
      pairs(0, half, streamed, [=](auto at) {
        const auto a = at(g + o), b = at(g + o + half);
        const auto p = fma(b, at(s + half), a * at(c)), q = fnma(a, at(s), b * at(c + half));
        at.put(dx + o, p * at(m));
        at.put(dx + o + half, q * at(m + half));
        if (dmask) {
          at.add_product(dmask + h * D, p, at(x + o));
          at.add_product(dmask + h * D + half, q, at(x + o + half));
        }
      });
    }
  }
  if (streamed) stream_end();
}

}  // namespace jointnas::JN_ISA

#else

#include <vector>

#include "cpu/chunks.h"
#include "cpu/segments.h"
#include "export.h"

#define JN_THIS_FILE "cpu/elementwise.cpp"
#include "cpu/each_isa.h"

namespace jointnas {

static std::vector<float> product(const float* a, const float* b, int64_t N) {
  std::vector<float> out(static_cast<size_t>(N));
  for (int64_t i = 0; i < N; ++i) out[static_cast<size_t>(i)] = a[i] * b[i];
  return out;
}

// y = g * mask; partial (with x): column sums of g * x
int cpu_channel_mask(const void* g, const void* x, const float* mask, void* y, float* partial, int64_t rows, int64_t N,
                     Chunks chunks) {
  const bool streamed = !partial && chunks.past_cache({y}, rows * N, N);
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    JN_DISPATCH(level, mask_rows(at(t, g, i * N), at(t, x, i * N), mask, at(t, y, i * N), at(partial, chunk * N), n, N,
                                 streamed));
  });
}
JN_EXPORT(cpu_channel_mask);

// out = h + mask y (mask may be null: 1), or with gate [1] and x: x + gate (h + mask y - x)
int cpu_gated_residual(const void* h, const void* y, const float* mask, const float* gate, const void* x, void* out,
                       int64_t rows, int64_t N, Chunks chunks) {
  const bool streamed = chunks.past_cache({out}, rows * N, N);
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    JN_DISPATCH(level, residual_rows(at(t, h, i * N), at(t, y, i * N), mask, gate, at(t, x, i * N), at(t, out, i * N), n,
                                     N, streamed));
  });
}
JN_EXPORT(cpu_gated_residual);

// dh = gate g, dx = (1 - gate) g, dy = gate g mask (null: skipped); partial: column sums of gate g y; dgate [chunks]
int cpu_gated_residual_backward(const void* g, const void* h, const void* y, const float* mask, const float* gate,
                                const void* x, void* dh, void* dy, void* dx, float* partial, float* dgate,
                                int64_t rows, int64_t N, Chunks chunks) {
  const bool streamed = !partial && chunks.past_cache({dh, dy, dx}, rows * N, N);
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    float total = 0.0f;
    JN_DISPATCH(level, total = residual_backward_rows(at(t, g, i * N), at(t, h, i * N), at(t, y, i * N), mask, *gate,
                                                      at(t, x, i * N), at(t, dh, i * N), at(t, dy, i * N),
                                                      at(t, dx, i * N), at(partial, chunk * N), dgate != nullptr, n, N,
                                                      streamed));
    if (dgate) dgate[chunk] = total;
  });
}
JN_EXPORT(cpu_gated_residual_backward);

// out = silu(r gate) (r up) c
int cpu_masked_swiglu(const void* gate, const void* up, const float* r, const float* c, void* out, int64_t rows,
                      int64_t N, Chunks chunks) {
  const std::vector<float> rc = product(r, c, N);
  const bool streamed = chunks.past_cache({out}, rows * N, N);
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    JN_DISPATCH(level, swiglu_rows(at(t, gate, i * N), at(t, up, i * N), r, rc.data(), at(t, out, i * N), n, N,
                                   streamed));
  });
}
JN_EXPORT(cpu_masked_swiglu);

// dr, dc: column sums per chunk, or null
int cpu_masked_swiglu_backward(const void* g, const void* gate, const void* up, const float* r, const float* c,
                               void* dgate, void* dup, float* dr, float* dc, int64_t rows, int64_t N, Chunks chunks) {
  const std::vector<float> rc = product(r, c, N), rrc = product(r, rc.data(), N);
  const bool streamed = !dr && !dc && chunks.past_cache({dgate, dup}, rows * N, N);
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    JN_DISPATCH(level, swiglu_backward_rows(at(t, g, i * N), at(t, gate, i * N), at(t, up, i * N), r, c, rc.data(),
                                            rrc.data(), at(t, dgate, i * N), at(t, dup, i * N), at(dr, chunk * N),
                                            at(dc, chunk * N), n, N, streamed));
  });
}
JN_EXPORT(cpu_masked_swiglu_backward);

// scale = weight * in_mask; ends [S] and kept [K]: Segments; alpha [K]; inv [rows, K] out
int cpu_mixed_rmsnorm(const void* x, const float* scale, const float* alpha, const int64_t* ends, const int64_t* kept,
                      void* y, float* inv, int64_t rows, int64_t N, int64_t S, int64_t K, float eps, Chunks chunks) {
  if (K > kMaxChoices) return kBadArgument;
  const Segments seg{S, K, ends, kept};
  const bool streamed = chunks.past_cache({y}, rows * N, N);
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    JN_DISPATCH(level, rmsnorm_rows(at(t, x, i * N), scale, alpha, seg, eps, at(t, y, i * N), inv + i * K, n, N,
                                    streamed));
  });
}
JN_EXPORT(cpu_mixed_rmsnorm);

// dalpha [rows, K] or null; partial: column sums of g x t, or null
int cpu_mixed_rmsnorm_backward(const void* g, const void* x, const float* scale, const float* alpha, const float* inv,
                               const int64_t* ends, const int64_t* kept, void* dx, float* dalpha, float* partial,
                               int64_t rows, int64_t N, int64_t S, int64_t K, Chunks chunks) {
  if (K > kMaxChoices) return kBadArgument;
  const Segments seg{S, K, ends, kept};
  const bool streamed = !partial && chunks.past_cache({dx}, rows * N, N);
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    JN_DISPATCH(level, rmsnorm_backward_rows(at(t, g, i * N), at(t, x, i * N), scale, alpha, inv + i * K, seg,
                                             at(t, dx, i * N), at(dalpha, i * K), at(partial, chunk * N), n, N,
                                             streamed));
  });
}
JN_EXPORT(cpu_mixed_rmsnorm_backward);

// x, out [tokens, H, D]; mask [H, D]; cosine, sine [period, D], token t uses row t % period
int cpu_masked_rope(const void* x, const float* mask, const float* cosine, const float* sine, void* out, int64_t tokens,
                    int64_t period, int64_t H, int64_t D, Chunks chunks) {
  const bool streamed = chunks.past_cache({out}, tokens * H * D, D / 2);
  return chunks.run(tokens, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    JN_DISPATCH(level, rope_rows(at(t, x, 0), mask, cosine, sine, at(t, out, 0), i, i + n, period, H, D, streamed));
  });
}
JN_EXPORT(cpu_masked_rope);

// partial [chunks, H, D]: sums of x rope^T(g), or null (x is not read then)
int cpu_masked_rope_backward(const void* g, const void* x, const float* mask, const float* cosine, const float* sine,
                             void* dx, float* partial, int64_t tokens, int64_t period, int64_t H, int64_t D,
                             Chunks chunks) {
  const bool streamed = !partial && chunks.past_cache({dx}, tokens * H * D, D / 2);
  return chunks.run(tokens, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    JN_DISPATCH(level, rope_backward_rows(at(t, g, 0), at(t, x, 0), mask, cosine, sine, at(t, dx, 0),
                                          at(partial, chunk * H * D), i, i + n, period, H, D, streamed));
  });
}
JN_EXPORT(cpu_masked_rope_backward);

}  // namespace jointnas

#endif
