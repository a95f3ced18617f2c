// lowbit_linear: y[m, n] = s[m] * sum_g scale[n, g] * sum_{k in g} q[n, k] (a[m, k] - z[m]), W{2,4,8} x A{8,16}
// (4- and 2-bit activations are int8 values of a smaller range). Weights stay in the storage layout of ops/pack.py:
// int32 [O, I b/32], value k of a row in word k / (32/b), least significant first, as u = q + 2^(b-1).
//
// Few tokens (<= 4): the product is one pass over the weights at the speed of memory. A row's words are read in
// order, 64 bytes at a time; the activations are laid out beforehand in the order in which the fields come out of the
// words, so that a field of 16 words and its activations meet without any shuffle:
//     table[m][step][field][lane] holds what word (step * lanes + lane) needs for that field
// with 4 int8 per entry and word (dot product of bytes: VNNI), 2 bf16 (AVX512_BF16) or 1 fp32.
// Many tokens: 2 W rows at a time are transposed, so that lanes are rows, and 8 tokens are multiplied from registers;
// the same fields, the table with one lane per step and broadcast.
//
// Integers: sum u (a - z) - 2^(b-1) sum (a - z) = [sum u a + T] - z sum u with T[m][g] = 2^(b-1) (z g - sum a), all
// exact in int32 before a scale is applied. Floats: q is an exact bf16 or fp32, accumulated per group in fp32.

#ifdef JN_ISA  // once per instruction set

#include "act_quant.h"
#include "veci.h"

namespace jnk {
namespace JN_ISA {

// Per way of multiplying: how many fields a word has, the field as an operand, and accumulation.

template <int B>
struct Bytes {
  using Acc = vi;
  static constexpr bool kInteger = true;
  static constexpr int kFields = 8 / B;
  static Acc zero() { return seti(0); }
  template <int F>
  static vi operand(vi w) {
    if constexpr (B == 8) return w;
    constexpr uint32_t mask = ((1u << B) - 1) * 0x01010101u;
    return shr<B * F>(w) & seti(mask);
  }
  static Acc mul(Acc acc, vi u, vi a) { return dot<(B < 8)>(acc, u, a); }
};

template <int B>
struct Floats {
  using Acc = vf;
  static constexpr bool kInteger = false;
  static constexpr int kFields = 32 / B;
  static Acc zero() { return set(0.0f); }
  template <int F>
  static vf operand(vi w) {
#if defined(JN_AVX512)
    // vpermps looks at 4 bits of each lane: a 16-entry table of q (2-bit fields ignore the upper two)
    if constexpr (B < 8) {
      alignas(64) static constexpr float table4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
      alignas(64) static constexpr float table2[16] = {-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1};
      return {_mm512_permutexvar_ps(shr<B * F>(w).v, _mm512_load_ps(B == 4 ? table4 : table2))};
    }
#endif
    constexpr uint32_t flip = B == 8 ? 0x80808080u : B == 4 ? 0x88888888u : 0xaaaaaaaau;  // offset to two's complement
    return convert(sar<32 - B>(shl<32 - B * (F + 1)>(w ^ seti(flip))));
  }
  static Acc mul(Acc acc, vf q, vi a) { return fma(q, as_float(a), acc); }
};

#if defined(JN_AVX512EXT)
template <int B>
struct Pairs {
  using Acc = vf;
  static constexpr bool kInteger = false;
  static constexpr int kFields = 16 / B;
  static Acc zero() { return set(0.0f); }
  template <int F>
  static __m512i operand(vi w) {
    if constexpr (B == 8) {
      // two bytes per word to two bf16: an integer of 8 bits is exact in the upper half of its fp32
      const vi s = w ^ seti(0x80808080u);
      const vf low = convert(sar<24>(shl<24 - 8 * F>(s))), high = convert(sar<24>(shl<8 - 8 * F>(s)));
      return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low.v), 16),
                             _mm512_and_si512(_mm512_castps_si512(high.v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    } else {
      // vpermw looks at 5 bits of each half: q as bf16, repeated over the bits that are not the field's
      alignas(64) static constexpr uint16_t table4[32] = {
          0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
          0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
          0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
      alignas(64) static constexpr uint16_t table2[32] = {
          0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80,
          0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80};
      return _mm512_permutexvar_epi16(_mm512_srli_epi16(w.v, B * F), _mm512_load_si512(B == 4 ? table4 : table2));
    }
  }
  static Acc mul(Acc acc, __m512i q, vi a) {
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(q), reinterpret_cast<__m512bh>(a.v))};
  }
};
#endif

template <class F, int... I>
inline void fields(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>{}), ...);
}

inline void put_output(const LowbitPlan& plan, int64_t at, float value) {
  if (plan.dtype == kF32)
    static_cast<float*>(plan.y)[at] = value;
  else
    static_cast<bf16*>(plan.y)[at] = from_float<bf16>(value);
}

// Rows [begin, end) times tokens [token, token + MB), those beyond the last repeated; groups are whole vectors, or
// vectors whole groups.
template <class Op, class S, int MB>
void gemv_rows(const LowbitPlan& plan, int64_t token, int64_t begin, int64_t end) {
  constexpr auto each_field = std::make_integer_sequence<int, Op::kFields>{};
  const uint32_t *table[MB], *offset[MB];
  for (int m = 0; m < MB; ++m) {
    const int64_t t = std::min(token + m, plan.M - 1);
    table[m] = plan.table + t * plan.steps * Op::kFields * W;
    offset[m] = plan.offset + t * plan.steps * W;
  }
  const int64_t per_vector = plan.words_per_group < W ? W / plan.words_per_group : 1;  // groups
  const int64_t per_group = plan.words_per_group < W ? 1 : plan.words_per_group / W;  // vectors
  int index[W];
  for (int i = 0; i < W; ++i) index[i] = static_cast<int>(std::min(i / plan.words_per_group, per_vector - 1));
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t* w = plan.w + row * plan.words;
    const S* scale = static_cast<const S*>(plan.scale) + row * plan.groups;
    vf total[MB];
    for (int m = 0; m < MB; ++m) total[m] = set(0.0f);
    for (int64_t step = 0; step < plan.steps; ++step) {
      const int64_t left = plan.words - step * W;
      const vi words = left >= W ? loadi(w + step * W) : loadi(w + step * W, left);
      typename Op::Acc acc[MB];
      vi sum = seti(0);
      for (int m = 0; m < MB; ++m) {
        if constexpr (Op::kInteger)
          acc[m] = loadi(offset[m] + step * W);
        else
          acc[m] = Op::zero();
      }
      fields(each_field, [&](auto f) {
        const auto u = Op::template operand<f()>(words);
        if constexpr (Op::kInteger) sum = Op::mul(sum, u, seti(0x01010101u));
        for (int m = 0; m < MB; ++m)
          acc[m] = Op::mul(acc[m], u, loadi(table[m] + (step * Op::kFields + f()) * W));
      });
      const vf s = per_vector > 1 ? spread(load(scale + step * per_vector, std::min(per_vector, plan.groups - step * per_vector)), index)
                                  : set(to_float(scale[step / per_group]));
      for (int m = 0; m < MB; ++m) {
        if constexpr (Op::kInteger)
          total[m] = fma(s, convert(acc[m] - sum * seti(plan.zero[std::min(token + m, plan.M - 1)])), total[m]);
        else
          total[m] = fma(s, acc[m], total[m]);
      }
    }
    for (int m = 0; m < MB && token + m < plan.M; ++m)
      put_output(plan, (token + m) * plan.O + row, (plan.s ? plan.s[token + m] : 1.0f) * sum(total[m]));
  }
}

// Rows [begin, begin + 2 W) (those beyond the last repeated) times all tokens. scratch: words [words][2 W], then
// scales [groups][2 W], then sums of u [groups][2 W].
template <class Op>
void gemm_rows(const LowbitPlan& plan, int64_t begin, uint32_t* scratch) {
  constexpr int MB = 8;
  constexpr auto each_field = std::make_integer_sequence<int, Op::kFields>{};
  const int64_t last = plan.O - 1, ld = 2 * W, gw = plan.words_per_group;
  uint32_t* words = scratch;
  float* scales = reinterpret_cast<float*>(words + plan.words * ld);
  uint32_t* sums = reinterpret_cast<uint32_t*>(scales + plan.groups * ld);
  for (int64_t v = 0; v < 2; ++v)
    for (int64_t c = 0; c < plan.words; c += W)
      transpose([&](int64_t r) { return plan.w + std::min(begin + v * W + r, last) * plan.words + c; },
                std::min<int64_t>(W, plan.words - c), words + c * ld + v * W, ld);
  for (int64_t r = 0; r < ld; ++r)
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t at = std::min(begin + r, last) * plan.groups + g;
      scales[g * ld + r] = plan.scale_dtype == kF32 ? static_cast<const float*>(plan.scale)[at]
                                                    : to_float(static_cast<const bf16*>(plan.scale)[at]);
    }
  if constexpr (Op::kInteger)
    for (int64_t g = 0; g < plan.groups; ++g)
      for (int64_t v = 0; v < 2; ++v) {
        vi sum = seti(0);
        for (int64_t c = g * gw; c < (g + 1) * gw; ++c)
          fields(each_field, [&](auto f) {
            sum = Op::mul(sum, Op::template operand<f()>(loadi(words + c * ld + v * W)), seti(0x01010101u));
          });
        storei(sums + g * ld + v * W, sum);
      }
  for (int64_t token = 0; token < plan.M; token += MB) {
    const uint32_t* table[MB];
    const uint32_t* offset[MB];
    vi zero[MB];
    for (int m = 0; m < MB; ++m) {
      const int64_t t = std::min(token + m, plan.M - 1);
      table[m] = plan.table + t * plan.words * Op::kFields;
      offset[m] = plan.offset + t * plan.groups;
      if constexpr (Op::kInteger) zero[m] = seti(plan.zero[t]);
    }
    vf total[2][MB];
    for (int m = 0; m < MB; ++m) total[0][m] = total[1][m] = set(0.0f);
    for (int64_t g = 0; g < plan.groups; ++g) {
      typename Op::Acc acc[2][MB];
#pragma GCC unroll 8
      for (int m = 0; m < MB; ++m) {
        if constexpr (Op::kInteger)
          acc[0][m] = acc[1][m] = seti(offset[m][g]);
        else
          acc[0][m] = acc[1][m] = Op::zero();
      }
      for (int64_t c = g * gw; c < (g + 1) * gw; ++c) {
        const vi w0 = loadi(words + c * ld), w1 = loadi(words + c * ld + W);
        fields(each_field, [&](auto f) {
          const auto u0 = Op::template operand<f()>(w0), u1 = Op::template operand<f()>(w1);
#pragma GCC unroll 8
          for (int m = 0; m < MB; ++m) {
            const vi a = seti(table[m][c * Op::kFields + f()]);
            acc[0][m] = Op::mul(acc[0][m], u0, a);
            acc[1][m] = Op::mul(acc[1][m], u1, a);
          }
        });
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const vf s = load(scales + g * ld + v * W);
#pragma GCC unroll 8
        for (int m = 0; m < MB; ++m) {
          if constexpr (Op::kInteger)
            total[v][m] = fma(s, convert(acc[v][m] - loadi(sums + g * ld + v * W) * zero[m]), total[v][m]);
          else
            total[v][m] = fma(s, acc[v][m], total[v][m]);
        }
      }
    }
    for (int m = 0; m < MB && token + m < plan.M; ++m)
      for (int v = 0; v < 2; ++v) {
        const int64_t n = std::min<int64_t>(W, plan.O - begin - v * W), at = (token + m) * plan.O + begin + v * W;
        if (n <= 0) break;
        const vf value = total[v][m] * set(plan.s ? plan.s[token + m] : 1.0f);
        if (plan.dtype == kF32)
          store(static_cast<float*>(plan.y) + at, value, n);
        else
          store(static_cast<bf16*>(plan.y) + at, value, n);
      }
  }
}

// Levels a [I], scale and zero of one token.
template <class T>
void quantize_token(const T* x, int64_t N, int bits, bool symmetric, int8_t* a, float* s, uint32_t* z) {
  const Range range = token_range<T>(N, [=](auto at) { return at(x); });
  const Quantizer q = quantizer<T>(range, bits, symmetric);
  *s = q.s;
  *z = static_cast<uint32_t>(static_cast<int32_t>(q.z));
  each(0, N, [&](auto at) {
    store_bytes(a + at.j, token_level<T>(at(x), q), std::min<int64_t>(W, N - at.j));
  });
}

template <class Op>
void lowbit_chunk(const LowbitPlan& plan, int64_t chunk, uint32_t* scratch) {
  if (!plan.gemv) return gemm_rows<Op>(plan, chunk * 2 * W, scratch);
  const int64_t begin = chunk * plan.chunk_rows, end = std::min(plan.O, begin + plan.chunk_rows);
  if (plan.M == 1)
    return plan.scale_dtype == kF32 ? gemv_rows<Op, float, 1>(plan, 0, begin, end)
                                    : gemv_rows<Op, bf16, 1>(plan, 0, begin, end);
  for (int64_t token = 0; token < plan.M; token += 4)
    plan.scale_dtype == kF32 ? gemv_rows<Op, float, 4>(plan, token, begin, end)
                             : gemv_rows<Op, bf16, 4>(plan, token, begin, end);
}

template <int B>
void lowbit_bits(const LowbitPlan& plan, int64_t chunk, uint32_t* scratch) {
  if (plan.kind == kBytes) return lowbit_chunk<Bytes<B>>(plan, chunk, scratch);
#if defined(JN_AVX512EXT)
  if (plan.kind == kPairs) return lowbit_chunk<Pairs<B>>(plan, chunk, scratch);
#endif
  lowbit_chunk<Floats<B>>(plan, chunk, scratch);
}

inline void lowbit_run(const LowbitPlan& plan, int64_t chunk, uint32_t* scratch) {
  plan.w_bits == 2 ? lowbit_bits<2>(plan, chunk, scratch)
  : plan.w_bits == 4 ? lowbit_bits<4>(plan, chunk, scratch)
                     : lowbit_bits<8>(plan, chunk, scratch);
}

}  // namespace JN_ISA
}  // namespace jnk

#else

#include <atomic>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "bf16.h"
#include "cpu_ops.h"
#include "isa.h"
#include "parallel.h"

namespace jnk {

enum Kind { kBytes = 4, kPairs = 2, kFloats = 1 };  // the value: activations per table entry

struct LowbitPlan {
  const uint32_t* w;
  const void* scale;  // [O, groups] scale_dtype
  const uint32_t* table;
  const uint32_t* offset;  // T, for bytes: [M][steps][lanes] with T in a group's first lane, or [M][groups]
  const uint32_t* zero;  // [M]
  const float* s;  // [M], or null: 1
  void* y;
  int64_t M, O, I;
  int64_t words, groups, words_per_group;  // per row, per row, in words
  int64_t steps;  // vectors per row
  int64_t chunk_rows;
  int w_bits, dtype, scale_dtype;
  Kind kind;
  bool gemv;
};

}  // namespace jnk

#define JN_EXTENSION 1
#define JN_THIS_FILE "../cpu/lowbit.cpp"
#include "each_isa.h"

// As JN_DISPATCH, with the fourth pass at level 4.
#if defined(__x86_64__)
#define DISPATCH(level, ...)         \
  if ((level) == kAvx512Ext) {       \
    using namespace jnk::avx512ext;  \
    __VA_ARGS__;                     \
  } else                             \
    JN_DISPATCH(level, __VA_ARGS__)
#else
#define DISPATCH(level, ...) JN_DISPATCH(level, __VA_ARGS__)
#endif

namespace jnk {
namespace {

// One token's activations in the order of the fields (top of the file).
void fill_table(const LowbitPlan& plan, const void* token, uint32_t* table, int64_t lanes) {
  const int per_word = 32 / plan.w_bits, parts = plan.kind, fields = per_word / parts;
  const int64_t count = plan.steps * lanes;
  for (int64_t word = 0; word < count; ++word)
    for (int f = 0; f < fields; ++f) {
      uint32_t entry = 0;
      if (word < plan.words)
        for (int p = 0; p < parts; ++p) {
          const int64_t k = word * per_word + p * fields + f;
          if (plan.kind == kBytes)
            entry |= static_cast<uint32_t>(static_cast<const uint8_t*>(token)[k]) << (8 * p);
          else if (plan.kind == kPairs)
            entry |= static_cast<uint32_t>(static_cast<const bf16*>(token)[k].bits) << (16 * p);
          else {
            const float x = plan.dtype == kF32 ? static_cast<const float*>(token)[k] : to_float(static_cast<const bf16*>(token)[k]);
            std::memcpy(&entry, &x, 4);
          }
        }
      table[(word / lanes * fields + f) * lanes + word % lanes] = entry;
    }
}

// T of every group of one token: 2^(b-1) (z g - sum a)
void fill_offset(const LowbitPlan& plan, const int8_t* a, uint32_t zero, uint32_t* offset, int64_t lanes) {
  const int64_t g = plan.I / plan.groups;
  if (plan.gemv) std::memset(offset, 0, static_cast<size_t>(plan.steps * lanes) * 4);
  for (int64_t group = 0; group < plan.groups; ++group) {
    int32_t sum = 0;
    for (int64_t k = group * g; k < (group + 1) * g; ++k) sum += a[k];
    offset[plan.gemv ? group * plan.words_per_group : group] =
        (zero * static_cast<uint32_t>(g) - static_cast<uint32_t>(sum)) << (plan.w_bits - 1);
  }
}

}  // namespace
}  // namespace jnk

int jn_cpu_lowbit_linear(const void* x, const void* packed, const void* scale, void* y, int64_t M, int64_t O, int64_t I,
                         int w_bits, int a_bits, int64_t g, int symmetric, int dtype, int scale_dtype, int threads,
                         int isa) {
  using namespace jnk;
  const int per_word = 32 / w_bits;
  if ((dtype != kF32 && dtype != kBf16) || (scale_dtype != kF32 && scale_dtype != kBf16) || g % per_word)
    return kBadArgument;
  const bool integer = a_bits < 16;
  const int level = choose_isa(isa, integer ? kHasVnni : dtype == kBf16 ? kHasVnni | kHasBf16 : kNone);
  if (!level) return kIsaMissing;
  const int64_t width = level >= kAvx512 ? 16 : level == kAvx2 ? 8 : 1;

  LowbitPlan plan{};
  plan.w = static_cast<const uint32_t*>(packed), plan.scale = scale, plan.y = y;
  plan.M = M, plan.O = O, plan.I = I, plan.w_bits = w_bits, plan.dtype = dtype, plan.scale_dtype = scale_dtype;
  plan.words = I / per_word, plan.groups = I / g, plan.words_per_group = g / per_word;
  plan.kind = integer ? kBytes : dtype == kBf16 && level == kAvx512Ext ? kPairs : kFloats;
  const int64_t gw = plan.words_per_group;
  plan.gemv = M <= 4 && (gw % width == 0 || width % gw == 0);
  const int64_t lanes = plan.gemv ? width : 1;
  plan.steps = (plan.words + lanes - 1) / lanes;
  plan.chunk_rows = std::max<int64_t>(1, (128 << 10) / (plan.words * 4));

  // Activations: quantized if asked for, then laid out.
  const int64_t per_token = plan.steps * lanes * (per_word / plan.kind);
  const int64_t offsets = integer ? (plan.gemv ? plan.steps * lanes : plan.groups) : 0;
  std::unique_ptr<void, void (*)(void*)> memory(
      std::aligned_alloc(64, static_cast<size_t>((M * (per_token + offsets + 2) * 4 + (integer ? M * I : 0) + 63) / 64 * 64)),
      std::free);
  if (!memory) return kNoMemory;
  uint32_t* table = static_cast<uint32_t*>(memory.get());
  uint32_t* offset = table + M * per_token;
  uint32_t* zero = offset + M * offsets;
  float* s = reinterpret_cast<float*>(zero + M);
  int8_t* levels = reinterpret_cast<int8_t*>(s + M);
  const int64_t item = dtype == kF32 ? 4 : 2;
  parallel_for(M, threads, [&](int64_t m) {
    const void* token = static_cast<const char*>(x) + m * I * item;
    if (integer) {
      int8_t* a = levels + m * I;
      if (dtype == kF32) {
        DISPATCH(level, quantize_token(static_cast<const float*>(token), I, a_bits, symmetric != 0, a, s + m, zero + m));
      } else {
        DISPATCH(level, quantize_token(static_cast<const bf16*>(token), I, a_bits, symmetric != 0, a, s + m, zero + m));
      }
      fill_offset(plan, a, zero[m], offset + m * offsets, lanes);
      token = a;
    }
    fill_table(plan, token, table + m * per_token, lanes);
  });
  plan.table = table, plan.offset = offset, plan.zero = zero, plan.s = integer ? s : nullptr;

  const int64_t rows = plan.gemv ? plan.chunk_rows : 2 * width;
  const size_t scratch = static_cast<size_t>(plan.gemv ? 0 : (plan.words + 2 * plan.groups) * rows * 4);
  std::atomic<int> error{kOk};
  parallel_for((O + rows - 1) / rows, threads, [&](int64_t chunk) {
    std::unique_ptr<void, void (*)(void*)> buffer(scratch ? std::aligned_alloc(64, (scratch + 63) / 64 * 64) : nullptr,
                                                  std::free);
    if (scratch && !buffer) {
      error = kNoMemory;
      return;
    }
    DISPATCH(level, lowbit_run(plan, chunk, static_cast<uint32_t*>(buffer.get())));
  });
  return error;
}

#endif
