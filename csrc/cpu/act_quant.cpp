// act_quant_mix: y = sum_q probs[q] Q_q(mask x), one token (row) at a time: range, then all precisions of an element
// together, so x is read from memory once. Backward needs the levels again for dprobs and recomputes them.

#ifdef JN_ISA  // once per instruction set

#include "cpu/act_quant.h"

namespace jointnas::JN_ISA {

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
  zero(column, N);
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

}  // namespace jointnas::JN_ISA

#else

#include <vector>

#include "cpu/chunks.h"
#include "export.h"

#define JN_THIS_FILE "cpu/act_quant.cpp"
#include "cpu/each_isa.h"

namespace jointnas {

// y = sum_q probs[q] Q_q(mask x), per row; mask [N] or null; bits [Q] <= 8 or 16; Q <= 16
int cpu_act_quant_mix(const void* x, const float* probs, const float* mask, const int* bits, void* y, int64_t rows,
                      int64_t N, int64_t Q, bool symmetric, Chunks chunks) {
  if (Q > kMaxPrecisions) return kBadArgument;
  const bool streamed = chunks.past_cache({y}, rows * N, N);
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t) {
    JN_DISPATCH(level, act_mix_rows(at(t, x, i * N), probs, mask, bits, Q, symmetric, at(t, y, i * N), n, N, streamed));
  });
}
JN_EXPORT(cpu_act_quant_mix);

// Each output may be null: dx = total mask g; dprobs [rows, Q]: <g, Q_q> per row; partial: column sums of g x
int cpu_act_quant_mix_backward(const void* g, const void* x, const float* mask, const int* bits, void* dx,
                               float* dprobs, float* partial, int64_t rows, int64_t N, int64_t Q, bool symmetric,
                               float total, Chunks chunks) {
  if (Q > kMaxPrecisions) return kBadArgument;
  const bool streamed = !partial && chunks.past_cache({dx}, rows * N, N);
  return chunks.run(rows, [&](auto t, int level, int64_t i, int64_t n, int64_t chunk) {
    JN_DISPATCH(level, act_mix_backward_rows(at(t, g, i * N), at(t, x, i * N), mask, bits, Q, symmetric, total,
                                             at(t, dx, i * N), at(dprobs, i * Q), at(partial, chunk * N), n, N,
                                             streamed));
  });
}
JN_EXPORT(cpu_act_quant_mix_backward);

}  // namespace jointnas

#endif
