// mixed_weight, factored: the probabilistic mask sum_ij alpha_i alpha_j G_ij is rank 1, so the mixed weight is
//     out[m, n] = W[m, n] * r[m] * c[n]
// one read and one write of W. Products are fp32 (r * c first, as r c^T is the mask), rounded once to the dtype.

#ifdef JN_ISA  // once per instruction set

namespace jointnas::JN_ISA {

template <class T>
void mixed_weight_rows(const T* w, const float* r, const float* c, T* out, int64_t rows, int64_t N, bool nontemporal) {
  for (int64_t m = 0; m < rows; ++m, w += N, out += N) {
    const vf vr = set(r[m]);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
    pairs(0, N, nontemporal && aligned, [=](auto at) { at.put(out, at(w) * (vr * at(c))); });
  }
  if (nontemporal) stream_end();
}

// dw = g r c (if dw), dr[m] = sum_n c g w, column[n] = sum_m r g w
template <class T>
void mixed_weight_backward_rows(const T* g, const T* w, const float* r, const float* c, T* dw, float* dr, float* column,
                                int64_t rows, int64_t N) {
  zero(column, N);
  for (int64_t m = 0; m < rows; ++m, g += N, w += N) {
    const vf vr = set(r[m]);
    vf total = set(0.0f);
    each(0, N, [&](auto at) {
      const vf v = at(g), e = v * at(w), vc = at(c);
      total = fma(vc, e, total);
      at.add(column, vr * e);
      if (dw) at.put(dw + m * N, v * (vr * vc));
    });
    dr[m] = sum(total);
  }
}

}  // namespace jointnas::JN_ISA

#else

#include "cpu/chunks.h"
#include "export.h"

#define JN_THIS_FILE "cpu/mixed_weight.cpp"
#include "cpu/each_isa.h"

namespace jointnas {

// out[m, n] = w[m, n] * r[m] * c[n]     w, out [M, N] dtype; r [M], c [N] fp32
int cpu_mixed_weight(const void* w, const float* r, const float* c, void* out, int64_t M, int64_t N, int dtype,
                     int threads, int isa) {
  const Chunks chunks{std::max<int64_t>(1, 65536 / std::max<int64_t>(N, 1)), dtype, threads, isa};
  const bool nontemporal = M * N * (dtype == kBf16 ? 2 : 4) > kCache;
  return chunks.run(M, [&](auto t, int level, int64_t m, int64_t n, int64_t) {
    JN_DISPATCH(level, mixed_weight_rows(at(t, w, m * N), r + m, c, at(t, out, m * N), n, N, nontemporal));
  });
}
JN_EXPORT(cpu_mixed_weight);

// dw = g r c (null: skipped); dr [M] = row sums of c g w; partial [chunks, N]: column sums of r g w
int cpu_mixed_weight_backward(const void* g, const void* w, const float* r, const float* c, void* dw, float* dr,
                              float* partial, int64_t M, int64_t N, Chunks chunks) {
  return chunks.run(M, [&](auto t, int level, int64_t m, int64_t n, int64_t chunk) {
    JN_DISPATCH(level, mixed_weight_backward_rows(at(t, g, m * N), at(t, w, m * N), r + m, c, at(t, dw, m * N), dr + m,
                                                  partial + chunk * N, n, N));
  });
}
JN_EXPORT(cpu_mixed_weight_backward);

}  // namespace jointnas

#endif
