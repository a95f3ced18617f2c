// quant_lora_mix:  out = sum_p probs[p] * Q_p(W + B'_p A_p)   in one pass over W, and what its backward needs of Q_p
//     W, out [O, I] dtype; A [P, r, I], B [P, O, r] lora_dtype; B' = scaling * B; A and B' rounded to dtype
//     Q_p: signed symmetric, bits[p], groups of g along I: s = clip * max|w| / ((2^b - 1)/2) rounded to dtype,
//          s < 2^-100 becomes 1, q = clamp(rint(w / s), -2^(b-1), 2^(b-1) - 1), Q = q * s
//
// Order: 12 rows x one tile of columns (whole groups, ~128 columns) at a time, and there all precisions, so that the
// tile of A (8 KB at rank 32) and the row buffers stay in the first-level cache and W is read from memory once.
// Per precision: (1) T = W + B'A in registers, 3 rows x 8 vectors; (2) max|T| per group; (3) the scales of all rows
// in vector operations, because one by one their chain of reduction, two divisions and rounding is ~60 cycles; (4)
// levels and mixture.
// Cost at P = 3, r = 32: per 16 elements and precision 16 vdpbf16ps (or 32 fma) and 9 others.
//
// Backward takes rows of the gradient G = dL/dout, computes the levels again in the same way and reduces them:
//     dprobs[p] = <G, Q_p>,  dclip = probs[p] ds/dclip sum_group G (q - inside w/s),  and writes inside * G (ste="clip")
// for the products with A and B, which are the library's.
//
// Division: with r = RN(1/s), y = RN(w r), e = fma(-y, s, w), fma(e, r, y) is RN(w / s) (Markstein); without fma
// instructions (scalar) a real division. Levels equal those of an fp32 reference except where the LoRA sum, whose
// order of addition differs, puts w/s on the other side of a rounding boundary: |dT| <= (r + 2) 2^-24 (|W| + |B'||A|).

#ifdef JN_ISA  // once per instruction set

namespace jointnas::JN_ISA {

constexpr int kVecs = W == 16 ? 8 : W == 8 ? 4 : 8;  // register block: kRowBlock rows x kVecs vectors
constexpr int kRowBlock = W == 8 ? 2 : 3;

inline vf divide(vf x, vf s, vf r) {
  if constexpr (W == 1) return x / s;
  const vf y = x * r;
  return fma(fnma(y, s, x), r, y);
}

struct Fma {
  static vf add(vf sum, vf a, vf b) { return fma(a, b, sum); }
};

// t[R][NV W] = base + sum_k b[row][k] a[k][.]   a [K][lda], b [.][K], t and base [.][ld]
template <class Product, int R, int NV>
void lora_sums(const float* base, const float* a, const float* b, float* t, int64_t K, int64_t lda, int64_t ld) {
  vf acc[R][NV];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[i][v] = load(base + i * ld + v * W);
  for (int64_t k = 0; k < K; ++k) {
    vf bk[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) bk[i] = set(b[i * K + k]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const vf ak = load(a + k * lda + v * W);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) acc[i][v] = Product::add(acc[i][v], ak, bk[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(t + i * ld + v * W, acc[i][v]);
}

#if defined(JN_AVX512)
// The same with bf16 operands in pairs along k: a [K/2][lda] and b [.][K/2] hold two bf16 per 32-bit word. In assembly,
// as only some processors of this pass have the instruction (AVX512_BF16).
struct Dot {
  static vf add(vf sum, vf a, vf b) {
    asm("vdpbf16ps %2,%1,%0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
    return sum;
  }
};
#endif

template <int R, int NV>
void lora_block([[maybe_unused]] bool dot, const float* base, const float* a, const float* b, float* t, int64_t K,
                int64_t lda, int64_t ld) {
#if defined(JN_AVX512)
  if (dot) return lora_sums<Dot, R, NV>(base, a, b, t, K, lda, ld);
#endif
  lora_sums<Fma, R, NV>(base, a, b, t, K, lda, ld);
}

template <int R>
void lora_rows(bool dot, const float* base, const float* a, const float* b, float* t, int64_t K, int64_t cols,
               int64_t ld) {
  int64_t c = 0;
  for (; c + kVecs * W <= cols; c += kVecs * W) lora_block<R, kVecs>(dot, base + c, a + c, b, t + c, K, ld, ld);
  for (; c < cols; c += W) lora_block<R, 1>(dot, base + c, a + c, b, t + c, K, ld, ld);
}

// T of `rows` rows; the buffers are padded to whole vectors, so there are no tails.
inline void lora_tile(bool dot, const float* base, const float* a, const float* b, float* t, int64_t rows, int64_t K,
                      int64_t cols, int64_t ld) {
  int64_t i = 0;
  for (; i + kRowBlock <= rows; i += kRowBlock)
    lora_rows<kRowBlock>(dot, base + i * ld, a, b + i * K, t + i * ld, K, cols, ld);
  for (; i < rows; ++i) lora_rows<1>(dot, base + i * ld, a, b + i * K, t + i * ld, K, cols, ld);
}

// Of values that are not all finite: NaN, which max would forget.
inline float group_max(const float* t, int64_t g) {
  vf m = set(0.0f), nan = m;
  each(0, g, [&](auto at) {
    const vf v = at(t);
    m = max(m, abs(v));
    nan = fma(v, set(0.0f), nan);
  });
  return hmax(m) + sum(nan);
}

// absmax [n] -> s and 1/s [n]; clip null or [n]
template <class T>
void group_scales(const float* absmax, const float* clip, float* s, float* r, int64_t n, float divisor) {
  for (int64_t j = 0; j < n; j += W) {
    const int64_t k = std::min<int64_t>(W, n - j);
    vf x = load(absmax + j, k);
    if (clip) x = load(clip + j, k) * x;
    T rounded[W];
    store(rounded, x / set(divisor));
    x = load(rounded);
    x = less(x, set(0x1p-100f), set(1.0f), x);
    store(s + j, x, k);
    store(r + j, set(1.0f) / x, k);
  }
}

// The constants come first, so that NaN passes (min and max return their second operand then).
inline vf level(vf t, vf s, vf r, vf low, vf high) { return min(high, max(low, round(divide(t, s, r)))); }

// mix (+)= q * weight, weight = probs[p] * s
template <bool kFirst>
void mix_group(const float* t, float* mix, int64_t g, float s1, float r1, float weight1, float low1, float high1) {
  const vf s = set(s1), r = set(r1), weight = set(weight1), low = set(low1), high = set(high1);
  each(0, g, [=](auto at) {
    const vf q = level(at(t), s, r, low, high);
    at.put(mix, kFirst ? q * weight : fma(q, weight, at(mix)));
  });
}

template <class T>
void write_row(const float* mix, T* out, int64_t n, bool nontemporal) {
  pairs(0, n, nontemporal && reinterpret_cast<uintptr_t>(out) % 64 == 0, [=](auto at) { at.put(out, at(mix)); });
}

struct Scratch {
  float *base, *t, *mix;  // [kRows][ld]
  float *absmax, *clip, *s, *r;  // [rows][groups of the tile]
  float* b;  // [P][rows][K]
  Scratch(const MixPlan& plan, float* memory) {
    const int64_t matrix = kRows * plan.ld, vector = kRows * (plan.tile / plan.g);
    base = memory, t = base + matrix, mix = t + matrix;
    absmax = mix + matrix, clip = absmax + vector, s = clip + vector, r = s + vector, b = r + vector;
  }
};

// T, s and 1/s of precision p for the tile in m.base.
template <class T>
void scaled_tile(const MixPlan& plan, const Scratch& m, int64_t p, int64_t tile, int64_t row0, int64_t rows,
                 int64_t cols) {
  const int64_t ld = plan.ld, g = plan.g, groups = cols / g, col0 = tile * plan.tile;
  lora_tile(plan.dot, m.base, plan.a + (tile * plan.P + p) * plan.K * ld, m.b + p * rows * plan.K, m.t, rows, plan.K,
            cols, ld);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < groups; ++k) {
      m.absmax[i * groups + k] = group_max(m.t + i * ld + k * g, g);
      if (plan.clip) m.clip[i * groups + k] = plan.clip[(p * plan.O + row0 + i) * (plan.I / g) + col0 / g + k];
    }
  const float divisor = (static_cast<float>(1 << plan.bits[p]) - 1.0f) / 2.0f;
  group_scales<T>(m.absmax, plan.clip ? m.clip : nullptr, m.s, m.r, rows * groups, divisor);
}

// W of one tile, widened.
template <class T>
void load_tile(const MixPlan& plan, const Scratch& m, int64_t tile, int64_t row0, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* w = static_cast<const T*>(plan.w) + (row0 + i) * plan.I + tile * plan.tile;
    float* base = m.base + i * plan.ld;
    each(0, cols, [=](auto at) { store(base + at.j, at(w)); });  // whole vectors: the pad becomes 0
    // The next tile of this row: 4 to 8 lines that the hardware does not expect, as the rows are pages apart.
    if (tile + 1 < plan.tiles)
      for (int64_t j = 0; j < plan.tile; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(w + cols + j);
  }
}

// group(p, row, column, number among the tile's groups, place in T, 2^(b-1)) for every group of the rows
// [row0, row0 + rows) and every precision p, a tile after the other; behind each tile end(first column, columns).
template <class T, class Group, class End>
void each_group(const MixPlan& plan, const Scratch& m, int64_t row0, int64_t rows, const Group& group, const End& end) {
  plan.pack_b(plan, m.b, row0, rows);
  for (int64_t tile = 0; tile < plan.tiles; ++tile) {
    const int64_t col0 = tile * plan.tile, cols = std::min(plan.tile, plan.I - col0), groups = cols / plan.g;
    load_tile<T>(plan, m, tile, row0, rows, cols);
    for (int64_t p = 0; p < plan.P; ++p) {
      scaled_tile<T>(plan, m, p, tile, row0, rows, cols);
      const float half = static_cast<float>(1 << plan.bits[p]) / 2.0f;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < groups; ++k)
          group(p, i, col0 + k * plan.g, i * groups + k, i * plan.ld + k * plan.g, half);
    }
    end(col0, cols);
  }
}

// One chunk: rows [row0, row0 + rows) of everything.
template <class T>
void mix_rows(const MixPlan& plan, int64_t row0, int64_t rows, float* scratch) {
  const Scratch m(plan, scratch);
  each_group<T>(
      plan, m, row0, rows,
      [&](int64_t p, int64_t, int64_t, int64_t n, int64_t at, float half) {
        const auto f = p == 0 ? mix_group<true> : mix_group<false>;
        f(m.t + at, m.mix + at, plan.g, m.s[n], m.r[n], plan.probs[p] * m.s[n], -half, half - 1.0f);
      },
      [&](int64_t col, int64_t cols) {
        for (int64_t i = 0; i < rows; ++i)
          write_row(m.mix + i * plan.ld, static_cast<T*>(plan.out) + (row0 + i) * plan.I + col, cols, plan.nontemporal);
      });
  if (plan.nontemporal) stream_end();
}

// Of one group: returns {sum G q, sum G (q - inside v)} and writes inside * G, if asked to.
template <class G>
std::pair<float, float> group_gradients(const float* t, const G* grad, G* masked, int64_t g, float s1, float r1,
                                        float low1, float high1) {
  const vf s = set(s1), r = set(r1), low = set(low1), high = set(high1);
  vf along = set(0.0f), slope = set(0.0f);
  each(0, g, [&](auto at) {
    const vf d = at(grad), v = divide(at(t), s, r), n = round(v), q = min(high, max(low, n));
    const vf inside = less(abs(n - q), set(0.5f), set(1.0f), set(0.0f));
    along = fma(d, q, along);
    slope = fma(d, fnma(inside, v, q), slope);
    if (masked) at.put(masked, d * inside);
  });
  return {sum(along), sum(slope)};
}

// Rows [row0, row0 + rows) of the backward; grad.rows counts from grad.begin.
template <class T, class G>
void mix_backward_rows(const MixPlan& plan, const MixGrad& grad, int64_t row0, int64_t rows, float* dprobs,
                       float* scratch) {
  const Scratch m(plan, scratch);
  for (int64_t p = 0; p < plan.P; ++p) dprobs[p] = 0.0f;
  each_group<T>(
      plan, m, row0, rows,
      [&](int64_t p, int64_t i, int64_t col, int64_t n, int64_t at, float half) {
        const int64_t local = row0 + i - grad.begin;
        const G* from = static_cast<const G*>(grad.grad) + local * plan.I + col;
        G* masked = grad.masked ? static_cast<G*>(grad.masked) + (p * grad.count + local) * plan.I + col : nullptr;
        const auto [along, slope] = group_gradients(m.t + at, from, masked, plan.g, m.s[n], m.r[n], -half, half - 1.0f);
        dprobs[p] += m.s[n] * along;
        if (grad.dclip)
          grad.dclip[(p * plan.O + row0 + i) * (plan.I / plan.g) + col / plan.g] =
              plan.probs[p] * slope * (m.absmax[n] / (half - 0.5f));
      },
      [](int64_t, int64_t) {});
}

}  // namespace jointnas::JN_ISA

#else

#include <utility>

#include "cpu/chunks.h"
#include "export.h"

namespace jointnas {

constexpr int64_t kRows = 12;      // rows of a chunk: a multiple of 3 and 2, below one AVX-512 vector
constexpr int64_t kColumns = 128;  // columns of a tile, if a group is not larger

// The arguments that forward and backward share.
struct MixInputs {
  const void* w;               // [O, I] dtype
  const void *lora_a, *lora_b;  // [P, rank, I], [P, O, rank] lora_dtype
  const float* probs;          // [P]
  const float* clip;           // [P, O, I/g] or null
  const int* bits;             // [P]
};
struct MixSizes {
  int64_t O, I, P, rank, g;
  float scaling;
  int dtype, lora_dtype;
};

// Rows begin .. begin + count - 1 of the gradient, and what is made of them.
struct MixGrad {
  const void* grad;  // [count, I] grad_dtype
  void* masked;      // [P, count, I] grad_dtype or null: grad where the level was not clamped
  float* dprobs;     // [ceil(count / kRows), P]: partial sums of <G, Q_p>
  float* dclip;      // [P, O, I/g] or null, these rows only
  int64_t begin, count;
};

struct MixPlan : MixInputs, MixSizes {
  int level;
  bool dot;
  int64_t K;     // rank, or rank/2 rounded up if dot
  int64_t tile;  // columns per tile, whole groups
  int64_t ld;    // tile rounded up to whole vectors of the widest instruction set
  int64_t tiles;
  const float* a;  // packed [tiles][P][K][ld]: fp32, or two bf16 along k per word if dot
  void (*pack_b)(const MixPlan&, float* b, int64_t row0, int64_t rows);
  void* out;
  bool nontemporal;
  MixPlan(const MixInputs& inputs, const MixSizes& sizes, int isa)
      : MixInputs(inputs), MixSizes(sizes), level(choose_isa(isa, dtype == kBf16 ? kHasBf16 : kNoFeature)),
        dot(dtype == kBf16 && level >= kAvx512Ext), K(dot ? (rank + 1) / 2 : rank),
        tile(std::max(g, kColumns / g * g)), ld((tile + 15) / 16 * 16), tiles((I + tile - 1) / tile) {}
};

}  // namespace jointnas

#define JN_THIS_FILE "cpu/quant_lora_mix.cpp"
#include "cpu/each_isa.h"

namespace jointnas {
namespace {

// Operand k of a LoRA factor as the kernel wants it: rounded to the weight's dtype; fp32, or a pair of bf16.
template <class T, class At>
float operand(const MixPlan& plan, int64_t k, const At& at) {
  if (!plan.dot) return to_float(from_float<T>(at(k)));
  const uint32_t low = from_float<bf16>(at(2 * k)).bits;
  const uint32_t high = 2 * k + 1 < plan.rank ? from_float<bf16>(at(2 * k + 1)).bits : 0u;
  const uint32_t pair = low | high << 16;
  float f;
  std::memcpy(&f, &pair, 4);
  return f;
}

template <class T, class L>
void pack_a_tile(const MixPlan& plan, float* packed, int64_t tile) {
  const L* a = static_cast<const L*>(plan.lora_a) + tile * plan.tile;
  const int64_t cols = std::min(plan.tile, plan.I - tile * plan.tile);
  for (int64_t p = 0; p < plan.P; ++p)
    for (int64_t k = 0; k < plan.K; ++k) {
      float* row = packed + ((tile * plan.P + p) * plan.K + k) * plan.ld;
      for (int64_t c = 0; c < cols; ++c)
        row[c] = operand<T>(plan, k, [&](int64_t j) { return to_float(a[(p * plan.rank + j) * plan.I + c]); });
      std::fill(row + cols, row + plan.ld, 0.0f);
    }
}

template <class T, class L>
void pack_b_rows(const MixPlan& plan, float* b, int64_t row0, int64_t rows) {
  const L* lora_b = static_cast<const L*>(plan.lora_b);
  for (int64_t p = 0; p < plan.P; ++p)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < plan.K; ++k)
        b[(p * rows + i) * plan.K + k] = operand<T>(
            plan, k, [&](int64_t j) { return plan.scaling * to_float(lora_b[(p * plan.O + row0 + i) * plan.rank + j]); });
}

// f(T{} of the weight, plan with A packed, first row, rows, chunk, scratch) for the rows [begin, end)
template <class T, class L, class F>
int run(MixPlan plan, int64_t begin, int64_t end, int threads, const F& f) {
  const Memory packed = allocate(plan.tiles * plan.P * plan.K * plan.ld * 4);
  if (!packed) return kNoMemory;
  float* a = static_cast<float*>(packed.get());
  parallel_for(plan.tiles, threads, [&](int64_t tile) { pack_a_tile<T, L>(plan, a, tile); });
  plan.a = a;
  plan.pack_b = pack_b_rows<T, L>;
  const int64_t scratch = 3 * kRows * plan.ld + 4 * kRows * (plan.tile / plan.g) + plan.P * kRows * plan.K;
  return parallel_for((end - begin + kRows - 1) / kRows, threads, scratch * 4, [&](int64_t chunk, void* memory) {
    const int64_t row0 = begin + chunk * kRows;
    f(T{}, plan, row0, std::min(kRows, end - row0), chunk, static_cast<float*>(memory));
  });
}
template <class F>
int run(const MixPlan& plan, int64_t begin, int64_t end, int threads, const F& f) {
  if (!plan.level) return kIsaMissing;
  if (plan.dtype == kF32 && plan.lora_dtype == kF32) return run<float, float>(plan, begin, end, threads, f);
  if (plan.dtype == kF32 && plan.lora_dtype == kBf16) return run<float, bf16>(plan, begin, end, threads, f);
  if (plan.dtype == kBf16 && plan.lora_dtype == kF32) return run<bf16, float>(plan, begin, end, threads, f);
  if (plan.dtype == kBf16 && plan.lora_dtype == kBf16) return run<bf16, bf16>(plan, begin, end, threads, f);
  return kBadArgument;
}

}  // namespace

// out [O, I] = sum_p probs[p] * Q_p(w + scaling * B_p A_p); kAvx512Ext: AVX512_BF16, for bf16 weights
int cpu_quant_lora_mix(const MixInputs& inputs, void* out, const MixSizes& sizes, int threads, int isa) {
  MixPlan plan(inputs, sizes, isa);
  plan.out = out;
  plan.nontemporal = plan.O * plan.I * (plan.dtype == kBf16 ? 2 : 4) > kCache;
  return run(plan, 0, plan.O, threads,
             [](auto t, const MixPlan& ready, int64_t row0, int64_t rows, int64_t, float* scratch) {
               JN_DISPATCH(ready.level, mix_rows<decltype(t)>(ready, row0, rows, scratch));
             });
}
JN_EXPORT(cpu_quant_lora_mix);

// The backward's reductions for some rows of the gradient.
int cpu_quant_lora_mix_backward(const MixInputs& inputs, const MixGrad& grad, const MixSizes& sizes, int grad_dtype,
                                int threads, int isa) {
  if (grad_dtype != kF32 && grad_dtype != kBf16) return kBadArgument;
  return run(MixPlan(inputs, sizes, isa), grad.begin, grad.begin + grad.count, threads,
             [&](auto t, const MixPlan& ready, int64_t row0, int64_t rows, int64_t chunk, float* scratch) {
               using T = decltype(t);
               float* sums = grad.dprobs + chunk * ready.P;
               if (grad_dtype == kF32)
                 JN_DISPATCH(ready.level, mix_backward_rows<T, float>(ready, grad, row0, rows, sums, scratch));
               else
                 JN_DISPATCH(ready.level, mix_backward_rows<T, bf16>(ready, grad, row0, rows, sums, scratch));
             });
}
JN_EXPORT(cpu_quant_lora_mix_backward);

}  // namespace jointnas

#endif
