// act_quant_mix: y = sum_q probs[q] Q_q(mask x), one token (row) at a time: range, then all precisions of an element
// together, so x is read from memory once. Backward needs the levels again for dprobs and recomputes them.

#ifdef JN_ISA  // once per instruction set

#include "cpu/act_quant.h"

namespace jointnas {
namespace JN_ISA {

// mask x of one token, rounded to T: x itself without a mask
template <class T>
inline const T* masked(const T* x, const float* mask, T* scratch, int64_t N) {
  if (!mask) return x;
  pairs(0, N, [=](auto at) { at.put(scratch, at(x) * at(mask)); });
  return scratch;
}

template <class T>
void act_mix_rows(const T* x, const float* probs, const float* mask, const int* bits, int64_t Q, bool symmetric, T* y,
                  int64_t rows, int64_t N, bool streamed) {
  std::vector<T> scratch(mask ? static_cast<size_t>(N) : 0);
  for (int64_t i = 0; i < rows; ++i, x += N, y += N) {
    const T* v = masked(x, mask, scratch.data(), N);
    mix_token(v, precisions<T>(row_range(v, N), bits, Q, symmetric), probs, y, N, x + N, streamed);
  }
  if (streamed) stream_end();
}

// dx = total mask g (if dx); dprobs [rows, Q] (if given) <g, Q_q> of each row; column += g x (if column)
template <class T>
void act_mix_backward_rows(const T* g, const T* x, const float* mask, const int* bits, int64_t Q, bool symmetric,
                           float total1, T* dx, float* dprobs, float* column, int64_t rows, int64_t N, bool streamed) {
  if (column) std::memset(column, 0, static_cast<size_t>(N) * sizeof(float));
  std::vector<T> scratch(mask && dprobs ? static_cast<size_t>(N) : 0);
  const vf total = set(total1);
  for (int64_t i = 0; i < rows; ++i, g += N, x += N) {
    if (dx) {
      pairs(0, N, streamed, [=](auto at) { at.put(dx, mask ? at(g) * at(mask) * total : at(g) * total); });
      dx += N;
    }
    if (column) pairs(0, N, [=](auto at) { at.add_product(column, at(g), at(x)); });
    if (dprobs) {
      const T* v = masked(x, mask, scratch.data(), N);
      dot_token(g, v, precisions<T>(row_range(v, N), bits, Q, symmetric), dprobs + i * Q, N, x + N);
    }
  }
  if (streamed) stream_end();
}

}  // namespace JN_ISA
}  // namespace jointnas

#else

#include "cpu/bf16.h"
#include "cpu/cpu_ops.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/past_cache.h"

#include <vector>

#define JN_THIS_FILE "cpu/act_quant.cpp"
#include "cpu/each_isa.h"

using namespace jointnas;

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
  const bool streamed = past_cache({y}, rows * N, N, dtype);
  return run(rows, chunk_rows, Q, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    using T = decltype(t);
    JN_DISPATCH(level, act_mix_rows(static_cast<const T*>(x) + i * N, probs, mask, bits, Q, symmetric != 0,
                                    static_cast<T*>(y) + i * N, n, N, streamed));
  });
}

int jn_cpu_act_quant_mix_backward(const void* g, const void* x, const float* mask, const int* bits, void* dx,
                                  float* dprobs, float* partial, int64_t rows, int64_t N, int64_t Q, int symmetric,
                                  float total, int64_t chunk_rows, int dtype, int threads, int isa) {
  const bool streamed = !partial && past_cache({dx}, rows * N, N, dtype);
  return run(rows, chunk_rows, Q, dtype, threads, isa, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    using T = decltype(t);
    JN_DISPATCH(level, act_mix_backward_rows(static_cast<const T*>(g) + i * N, static_cast<const T*>(x) + i * N, mask,
                                             bits, Q, symmetric != 0, total, dx ? static_cast<T*>(dx) + i * N : nullptr,
                                             dprobs ? dprobs + i * Q : nullptr,
                                             partial ? partial + chunk * N : nullptr, n, N, streamed));
  });
}

#endif
