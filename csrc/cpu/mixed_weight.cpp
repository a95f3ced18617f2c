// mixed_weight, factored: the probabilistic mask sum_ij alpha_i alpha_j G_ij is rank 1, so the mixed weight is
//     out[m, n] = W[m, n] * r[m] * c[n]
// one read and one write of W. Products are fp32 (r * c first, as r c^T is the mask), rounded once to the dtype.

#ifdef JN_ISA  // once per instruction set

namespace jointnas {
namespace JN_ISA {

template <class T>
void mixed_weight_row(const T* w, float r, const float* c, T* out, int64_t N, bool nontemporal) {
  const vf vr = set(r);
  int64_t n = 0;
  if (nontemporal) {
    for (; n + 2 * W <= N; n += 2 * W)
      stream2(out + n, load(w + n) * (vr * load(c + n)), load(w + n + W) * (vr * load(c + n + W)));
  }
  for (; n + W <= N; n += W) store(out + n, load(w + n) * (vr * load(c + n)));
  if (n < N) store(out + n, load(w + n, N - n) * (vr * load(c + n, N - n)), N - n);
}

template <class T>
void mixed_weight_rows(const T* w, const float* r, const float* c, T* out, int64_t begin, int64_t end, int64_t N,
                       bool nontemporal) {
  for (int64_t m = begin; m < end; ++m) {
    T* row = out + m * N;
    const bool aligned = reinterpret_cast<uintptr_t>(row) % 64 == 0;
    mixed_weight_row(w + m * N, r[m], c, row, N, kStreams && nontemporal && aligned);
  }
  if (nontemporal) stream_end();
}

// dw = g r c (if dw), dr[m] = sum_n c g w, column[n] = sum_m r g w
template <class T>
void mixed_weight_backward_rows(const T* g, const T* w, const float* r, const float* c, T* dw, float* dr, float* column,
                                int64_t rows, int64_t N) {
  std::memset(column, 0, static_cast<size_t>(N) * sizeof(float));
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

}  // namespace JN_ISA
}  // namespace jointnas

#else

#include "cpu/bf16.h"
#include "cpu/cpu_ops.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#define JN_THIS_FILE "cpu/mixed_weight.cpp"
#include "cpu/each_isa.h"

namespace {

template <class T>
void run(int level, const void* w, const float* r, const float* c, void* out, int64_t M, int64_t N, int threads) {
  constexpr int64_t kChunk = 1 << 16;  // elements per claim
  constexpr int64_t kCache = 8 << 20;  // a larger output will not be read back from the cache
  const int64_t rows = std::max<int64_t>(1, kChunk / std::max<int64_t>(N, 1));
  const bool nontemporal = M * N * static_cast<int64_t>(sizeof(T)) > kCache;
  jointnas::parallel_for((M + rows - 1) / rows, threads, [&](int64_t i) {
    JN_DISPATCH(level, mixed_weight_rows(static_cast<const T*>(w), r, c, static_cast<T*>(out), i * rows,
                                         std::min(M, (i + 1) * rows), N, nontemporal));
  });
}

}  // namespace

int jn_cpu_mixed_weight(const void* w, const float* r, const float* c, void* out, int64_t M, int64_t N, int dtype,
                        int threads, int isa) {
  const int level = jointnas::choose_isa(isa);
  if (!level) return jointnas::kIsaMissing;
  if (dtype == jointnas::kF32)
    run<float>(level, w, r, c, out, M, N, threads);
  else if (dtype == jointnas::kBf16)
    run<jointnas::bf16>(level, w, r, c, out, M, N, threads);
  else
    return jointnas::kBadArgument;
  return jointnas::kOk;
}

int jn_cpu_mixed_weight_backward(const void* g, const void* w, const float* r, const float* c, void* dw, float* dr,
                                 float* partial, int64_t M, int64_t N, int64_t chunk_rows, int dtype, int threads,
                                 int isa) {
  const int level = jointnas::choose_isa(isa);
  if (!level) return jointnas::kIsaMissing;
  if (dtype != jointnas::kF32 && dtype != jointnas::kBf16) return jointnas::kBadArgument;
  jointnas::parallel_for((M + chunk_rows - 1) / chunk_rows, threads, [&](int64_t chunk) {
    const int64_t m = chunk * chunk_rows, rows = std::min(chunk_rows, M - m);
    const auto go = [&](auto t) {
      using T = decltype(t);
      T* out = dw ? static_cast<T*>(dw) + m * N : nullptr;
      JN_DISPATCH(level, mixed_weight_backward_rows(static_cast<const T*>(g) + m * N, static_cast<const T*>(w) + m * N,
                                                    r + m, c, out, dr + m, partial + chunk * N, rows, N));
    };
    dtype == jointnas::kF32 ? go(float{}) : go(jointnas::bf16{});
  });
  return jointnas::kOk;
}

#endif
