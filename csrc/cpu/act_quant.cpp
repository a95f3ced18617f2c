// act_quant_mix: y = sum_q probs[q] Q_q(mask x), one token (row) at a time: range, then all precisions of an element
// together, so x is read from memory once. Backward needs the levels again for dprobs and recomputes them.

#ifdef JN_ISA  // once per instruction set

#include "act_quant.h"

namespace jnk {
namespace JN_ISA {

template <class T>
void act_mix_rows(const T* x, const float* probs, const float* mask, const int* bits, int64_t Q, bool symmetric, T* y,
                  int64_t rows, int64_t N) {
  for (int64_t i = 0; i < rows; ++i, x += N, y += N) {
    const auto value = [=](auto at) { return mask ? round_to<T>(at(x) * at(mask)) : at(x); };
    const Range range = token_range<T>(N, value);
    Quantizer q[kMaxPrecisions];
    for (int64_t p = 0; p < Q; ++p) q[p] = quantizer<T>(range, bits[p] == 16 ? 8 : bits[p], symmetric);
    each(0, N, [&](auto at) {
      const vf v = value(at);
      vf sum = set(0.0f);
      for (int64_t p = 0; p < Q; ++p) {
        const vf Qv = bits[p] == 16 ? v : (token_level<T>(v, q[p]) - set(q[p].z)) * set(q[p].s);
        sum = fma(set(probs[p]), Qv, sum);
      }
      at.put(y, sum);
    });
  }
}

// dx = total mask g (if dx); dprobs [rows, Q] (if given) <g, Q_q> of each row; column += g x (if column)
template <class T>
void act_mix_backward_rows(const T* g, const T* x, const float* mask, const int* bits, int64_t Q, bool symmetric,
                           float total1, T* dx, float* dprobs, float* column, int64_t rows, int64_t N) {
  if (column) std::memset(column, 0, static_cast<size_t>(N) * sizeof(float));
  const vf total = set(total1);
  for (int64_t i = 0; i < rows; ++i, g += N, x += N) {
    if (dx) {
      each(0, N, [=](auto at) { at.put(dx, mask ? at(g) * at(mask) * total : at(g) * total); });
      dx += N;
    }
    if (column) each(0, N, [=](auto at) { at.add(column, at(g) * at(x)); });
    if (dprobs) {
      const auto value = [=](auto at) { return mask ? round_to<T>(at(x) * at(mask)) : at(x); };
      const Range range = token_range<T>(N, value);
      vf dot[kMaxPrecisions];
      Quantizer q[kMaxPrecisions];
      for (int64_t p = 0; p < Q; ++p) {
        dot[p] = set(0.0f);
        q[p] = quantizer<T>(range, bits[p] == 16 ? 8 : bits[p], symmetric);
      }
      each(0, N, [&](auto at) {
        const vf v = value(at), d = at(g);
        for (int64_t p = 0; p < Q; ++p) {
          const vf level = bits[p] == 16 ? v : (token_level<T>(v, q[p]) - set(q[p].z)) * set(q[p].s);
          dot[p] = fma(d, level, dot[p]);
        }
      });
      for (int64_t p = 0; p < Q; ++p) dprobs[i * Q + p] = sum(dot[p]);
    }
  }
}

}  // namespace JN_ISA
}  // namespace jnk

#else

#include "bf16.h"
#include "cpu_ops.h"
#include "isa.h"
#include "parallel.h"

namespace jnk {
constexpr int64_t kMaxPrecisions = 16;
}

#define JN_THIS_FILE "../cpu/act_quant.cpp"
#include "each_isa.h"

using namespace jnk;

namespace {

template <class F>
int run(int64_t rows, int64_t chunk_rows, int64_t Q, int dtype, int threads, int isa, const F& f) {
  const int level = choose_isa(isa);
  if (!level) return kIsaMissing;
  if ((dtype != kF32 && dtype != kBf16) || Q > kMaxPrecisions) return kBadArgument;
  parallel_for((rows + chunk_rows - 1) / chunk_rows, threads, [&](int64_t i) {
    const int64_t first = i * chunk_rows, n = std::min(chunk_rows, rows - first);
    dtype == kF32 ? f(float{}, level, first, n, i) : f(bf16{}, level, first, n, i);
  });
  return kOk;
}

}  // namespace

int jn_cpu_act_quant_mix(const void* x, const float* probs, const float* mask, const int* bits, void* y, int64_t rows,
                         int64_t N, int64_t Q, int symmetric, int64_t chunk_rows, int dtype, int threads, int isa) {
  return run(rows, chunk_rows, Q, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    using T = decltype(t);
    JN_DISPATCH(level, act_mix_rows(static_cast<const T*>(x) + i * N, probs, mask, bits, Q, symmetric != 0,
                                    static_cast<T*>(y) + i * N, n, N));
  });
}

int jn_cpu_act_quant_mix_backward(const void* g, const void* x, const float* mask, const int* bits, void* dx,
                                  float* dprobs, float* partial, int64_t rows, int64_t N, int64_t Q, int symmetric,
                                  float total, int64_t chunk_rows, int dtype, int threads, int isa) {
  return run(rows, chunk_rows, Q, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    using T = decltype(t);
    JN_DISPATCH(level, act_mix_backward_rows(static_cast<const T*>(g) + i * N, static_cast<const T*>(x) + i * N, mask,
                                             bits, Q, symmetric != 0, total, dx ? static_cast<T*>(dx) + i * N : nullptr,
                                             dprobs ? dprobs + i * Q : nullptr,
                                             partial ? partial + chunk * N : nullptr, n, N));
  });
}

#endif
