// Sums over the first channels of a row for every hidden size, shared by elementwise.cpp and norm_quant.cpp. The struct
// is for every pass; the functions are included once per instruction set (each_isa.h), hence the partial guard.
#ifndef JN_SEGMENTS_H
#define JN_SEGMENTS_H
#include <cstdint>

namespace jointnas {
constexpr int64_t kMaxChoices = 64;
// Channels are cut where a choice ends: ends [S] ascending; choice i keeps segments 0..kept[i].
struct Segments {
  int64_t S, K;
  const int64_t *ends, *kept;
};
}  // namespace jointnas
#endif

#ifdef JN_ISA

namespace jointnas::JN_ISA {

// t[s] = sum of value_i over kept[i] >= s; [S + 1], the last one 0
inline void spread(const Segments& seg, const float* value, float* t) {
  std::fill(t, t + seg.S + 1, 0.0f);
  for (int64_t i = 0; i < seg.K; ++i)
    for (int64_t s = 0; s <= seg.kept[i]; ++s) t[s] += value[i];
}

// prefix[s] = sum of term over the channels before ends[s]
template <class T, class F>
void prefix_sums(const Segments& seg, float* prefix, const F& term) {
  float total = 0.0f;
  int64_t start = 0;
  for (int64_t s = 0; s < seg.S; ++s) {
    // Four sums: one would wait for the latency of its own addition.
    vf a = set(0.0f), b = a, c = a, d = a;
    int64_t j = start;
    for (; j + 4 * W <= seg.ends[s]; j += 4 * W) {
      a = a + term(Whole{j});
      b = b + term(Whole{j + W});
      c = c + term(Whole{j + 2 * W});
      d = d + term(Whole{j + 3 * W});
    }
    each(j, seg.ends[s], [&](auto at) { a = a + term(at); });
    total += sum((a + b) + (c + d));
    prefix[s] = total;
    start = seg.ends[s];
  }
}

// f(segment, begin, end) for every segment; S is what is behind the last one. Inlined, as f is a whole loop.
template <class F>
inline __attribute__((always_inline)) void each_segment(const Segments& seg, int64_t N, const F& f) {
  int64_t start = 0;
  for (int64_t s = 0; s <= seg.S && start < N; ++s) {
    const int64_t end = s < seg.S ? seg.ends[s] : N;
    f(s, start, end);
    start = end;
  }
}

// inv[i] = rsqrt(mean of the squares of x before choice i's end + eps), t[s] = sum of alpha_i inv_i over kept[i] >= s
template <class T>
void norm_factors(const T* x, const float* alpha, const Segments& seg, float eps, float* inv, float* t) {
  float prefix[kMaxChoices], value[kMaxChoices];
  prefix_sums<T>(seg, prefix, [=](auto at) {
    const vf v = at(x);
    return v * v;
  });
  for (int64_t i = 0; i < seg.K; ++i) {
    inv[i] = 1.0f / std::sqrt(prefix[seg.kept[i]] / static_cast<float>(seg.ends[seg.kept[i]]) + eps);
    value[i] = alpha[i] * inv[i];
  }
  spread(seg, value, t);
}

// Of g scale x summed before choice i's end, S_i, and inv: t as above; back[s] = sum of alpha_i inv_i^3 S_i / end_i over
// kept[i] >= s; dalpha[i] = inv_i S_i (if given).
template <class T>
void norm_backward_factors(const T* g, const T* x, const float* scale, const float* alpha, const float* inv,
                           const Segments& seg, float* t, float* back, float* dalpha) {
  float prefix[kMaxChoices], value[kMaxChoices];
  prefix_sums<T>(seg, prefix, [=](auto at) { return at(g) * at(scale) * at(x); });
  for (int64_t i = 0; i < seg.K; ++i) value[i] = alpha[i] * inv[i];
  spread(seg, value, t);
  for (int64_t i = 0; i < seg.K; ++i) {
    const float whole = prefix[seg.kept[i]];
    if (dalpha) dalpha[i] = inv[i] * whole;
    value[i] *= whole * inv[i] * inv[i] / static_cast<float>(seg.ends[seg.kept[i]]);
  }
  spread(seg, value, back);
}

}  // namespace jointnas::JN_ISA

#endif
