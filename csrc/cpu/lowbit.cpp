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
    // vpermps looks at 4 bits of each lane: a table of q for one 4-bit field, or for either of two 2-bit fields,
    // which then share the shift
    if constexpr (B < 8) {
      alignas(64) static constexpr float table4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
      alignas(64) static constexpr float low2[16] = {-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1};
      alignas(64) static constexpr float high2[16] = {-2, -2, -2, -2, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1};
      const float* table = B == 4 ? table4 : F % 2 ? high2 : low2;
      return {_mm512_permutexvar_ps(shr<4 * (B * F / 4)>(w).v, _mm512_load_ps(table))};
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
      // vpermw looks at 5 bits of each half: as above, as bf16, repeated for the fifth bit
      alignas(64) static constexpr uint16_t table4[32] = {
          0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
          0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
          0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
      alignas(64) static constexpr uint16_t low2[32] = {
          0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80,
          0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80, 0xc000, 0xbf80, 0, 0x3f80};
      alignas(64) static constexpr uint16_t high2[32] = {
          0xc000, 0xc000, 0xc000, 0xc000, 0xbf80, 0xbf80, 0xbf80, 0xbf80, 0, 0, 0, 0, 0x3f80, 0x3f80, 0x3f80, 0x3f80,
          0xc000, 0xc000, 0xc000, 0xc000, 0xbf80, 0xbf80, 0xbf80, 0xbf80, 0, 0, 0, 0, 0x3f80, 0x3f80, 0x3f80, 0x3f80};
      const uint16_t* table = B == 4 ? table4 : F % 2 ? high2 : low2;
      return _mm512_permutexvar_epi16(_mm512_srli_epi16(w.v, 4 * (B * F / 4)), _mm512_load_si512(table));
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

// Rows [row, row + R) times tokens [token, token + MB), those beyond the last repeated; groups are whole vectors, or
// vectors whole groups. scales: room for R rows of plan.scale_ld floats.
template <class Op, class S, int R, int MB>
void gemv_block(const LowbitPlan& plan, int64_t token, int64_t row, float* scales) {
  constexpr auto each_field = std::make_integer_sequence<int, Op::kFields>{};
  const uint32_t *table[MB], *offset[MB];
  vi zero[MB];
  for (int m = 0; m < MB; ++m) {
    const int64_t t = std::min(token + m, plan.M - 1);
    table[m] = plan.table + t * plan.steps * Op::kFields * W;
    offset[m] = plan.offset + t * plan.steps * W;
    if constexpr (Op::kInteger) zero[m] = seti((plan.zero[t] & 255u) * 0x01010101u);
  }
  const int64_t per_vector = plan.words_per_group < W ? W / plan.words_per_group : 1;  // groups
  const int64_t per_group = plan.words_per_group < W ? 1 : plan.words_per_group / W;  // vectors
  const uint32_t* w[R];
  vf total[R][MB];
  for (int r = 0; r < R; ++r) {
    w[r] = plan.w + (row + r) * plan.words;
    const S* scale = static_cast<const S*>(plan.scale) + (row + r) * plan.groups;
    each(0, plan.groups, [&](auto at) { store(scales + r * plan.scale_ld + at.j, at(scale)); });
    for (int m = 0; m < MB; ++m) total[r][m] = set(0.0f);
  }
  // The memory R rows and 2 KiB ahead, in order: the processor does not follow two rows at a time by itself (one
  // thread, 4096^2, W4A8: 14 GB/s without, 33 GB/s with; W8A8 16 and 38 of the 41 GB/s that a plain read reaches).
  const char* ahead = reinterpret_cast<const char*>(plan.w + (row + R) * plan.words) + 2048;
  const auto run = [&](int64_t step, const auto& words_of, const auto& scale_of) {
    vi words[R], sum[R];
    typename Op::Acc acc[R][MB];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(ahead + (step * R + r) * W * 4);
      words[r] = words_of(w[r] + step * W);
#pragma GCC unroll 4
      for (int m = 0; m < MB; ++m) {
        if constexpr (Op::kInteger)
          acc[r][m] = loadi(offset[m] + step * W);
        else
          acc[r][m] = Op::zero();
      }
    }
    fields(each_field, [&](auto f) {
      vi a[MB];
#pragma GCC unroll 4
      for (int m = 0; m < MB; ++m) a[m] = loadi(table[m] + (step * Op::kFields + f()) * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const auto u = Op::template operand<f()>(words[r]);
        if constexpr (Op::kInteger) sum[r] = f() == 0 ? u : sum[r] + u;  // bytes: at most 4 times 3 or twice 15
#pragma GCC unroll 4
        for (int m = 0; m < MB; ++m) acc[r][m] = Op::mul(acc[r][m], u, a[m]);
      }
    });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf s = scale_of(scales + r * plan.scale_ld);
#pragma GCC unroll 4
      for (int m = 0; m < MB; ++m) {
        if constexpr (Op::kInteger)
          total[r][m] = fma(s, convert(acc[r][m] - Op::mul(seti(0), sum[r], zero[m])), total[r][m]);
        else
          total[r][m] = fma(s, acc[r][m], total[r][m]);
      }
    }
  };
  const auto whole = [](const uint32_t* p) { return loadi(p); };
  const int64_t full = plan.words / W;
  if (per_vector == 1) {
    for (int64_t g = 0, step = 0; g < plan.groups; ++g)
      for (int64_t i = 0; i < per_group; ++i, ++step) run(step, whole, [=](const float* s) { return set(s[g]); });
  } else {
    const auto scale_at = [&](int64_t step) {
      return [=, &plan](const float* s) { return spread(load(s + step * per_vector), plan.index); };
    };
    for (int64_t step = 0; step < full; ++step) run(step, whole, scale_at(step));
    if (const int64_t left = plan.words - full * W)
      run(full, [=](const uint32_t* p) { return loadi(p, left); }, scale_at(full));
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < MB && token + m < plan.M; ++m)
      put_output(plan, (token + m) * plan.O + row + r, (plan.s ? plan.s[token + m] : 1.0f) * sum(total[r][m]));
}

template <class Op, class S, int MB>
void gemv_rows(const LowbitPlan& plan, int64_t token, int64_t begin, int64_t end, float* scales) {
  // Two rows share the loads of the activations; with fp32 activations there are too many fields to gain by it.
  constexpr int R = MB == 1 && !std::is_same_v<Op, Floats<2>> && !std::is_same_v<Op, Floats<4>> ? 2 : 1;
  for (; begin + R <= end; begin += R) gemv_block<Op, S, R, MB>(plan, token, begin, scales);
  if (begin < end) gemv_block<Op, S, 1, MB>(plan, token, begin, scales);
}

// 2 W rows times MB tokens: the tokens' activations, what a group adds to them, and the running results.
template <class Acc, int MB>
struct Tile {
  const uint32_t* table[MB];
  const uint32_t* offset[MB];
  uint32_t zero[MB];  // -z: as int32, or as int16 in the low half (kNarrow)
  Acc acc[2][MB];
  vf total[2][MB];
};

// acc = the product of one group. Two functions that meet in memory, because GCC 12 keeps the 16 sums in registers,
// without a second copy of each, only in a loop that is followed by nothing but their stores.
template <class Op, int MB>
__attribute__((noinline)) void gemm_group(const uint32_t* words, int64_t count, int64_t g,
                                          Tile<typename Op::Acc, MB>& tile) {
  const uint32_t* a[MB];
  typename Op::Acc acc[2][MB];
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m) {
    a[m] = tile.table[m] + g * count * Op::kFields;
    if constexpr (Op::kInteger)
      acc[0][m] = acc[1][m] = seti(tile.offset[m][g]);
    else
      acc[0][m] = acc[1][m] = Op::zero();
  }
  for (int64_t c = 0; c < count; ++c) {
    const vi w0 = loadi(words + c * 2 * W), w1 = loadi(words + c * 2 * W + W);
    fields(std::make_integer_sequence<int, Op::kFields>{}, [&](auto f) {
      const auto u0 = Op::template operand<f()>(w0), u1 = Op::template operand<f()>(w1);
#pragma GCC unroll 8
      for (int m = 0; m < MB; ++m) {
        const vi am = seti(a[m][c * Op::kFields + f()]);
        acc[0][m] = Op::mul(acc[0][m], u0, am);
        acc[1][m] = Op::mul(acc[1][m], u1, am);
      }
    });
  }
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m) {
    tile.acc[0][m] = acc[0][m];
    tile.acc[1][m] = acc[1][m];
  }
}

// total += scale * (acc - z sum)
template <class Op, bool kNarrow, int MB>
__attribute__((noinline)) void gemm_scale(const float* scales, const uint32_t* sums, Tile<typename Op::Acc, MB>& tile) {
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const vf s = load(scales + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < MB; ++m) {
      vf& total = tile.total[v][m];
      if constexpr (Op::kInteger) {
        const vi sum = loadi(sums + v * W), zero = seti(tile.zero[m]), x = tile.acc[v][m];
        total = fma(s, convert(kNarrow ? dot16(x, sum, zero) : x + sum * zero), total);
      } else {
        total = fma(s, tile.acc[v][m], total);
      }
    }
  }
}

// Rows [begin, begin + 2 W) (those beyond the last repeated) times all tokens. scratch: words [words][2 W], then
// scales [groups][2 W], then sums of u [groups][2 W]; kNarrow: these fit 16 bits, so that acc - z sum is one instruction.
template <class Op, bool kNarrow>
void gemm_rows(const LowbitPlan& plan, int64_t begin, uint32_t* scratch) {
  constexpr int MB = 8;
  const int64_t last = plan.O - 1, ld = 2 * W, gw = plan.words_per_group;
  uint32_t* words = scratch;
  float* scales = reinterpret_cast<float*>(words + plan.words * ld);
  uint32_t* sums = reinterpret_cast<uint32_t*>(scales + plan.groups * ld);
  for (int64_t v = 0; v < 2; ++v)
    for (int64_t c = 0; c < plan.words; c += W) {
      // 16 rows at once are more streams than the processor prefetches by itself
      for (int64_t r = 0; r < W; ++r) __builtin_prefetch(plan.w + std::min(begin + v * W + r, last) * plan.words + c + 64);
      transpose([&](int64_t r) { return plan.w + std::min(begin + v * W + r, last) * plan.words + c; },
                std::min<int64_t>(W, plan.words - c), words + c * ld + v * W, ld);
    }
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
          fields(std::make_integer_sequence<int, Op::kFields>{}, [&](auto f) {
            sum = Op::mul(sum, Op::template operand<f()>(loadi(words + c * ld + v * W)), seti(0x01010101u));
          });
        storei(sums + g * ld + v * W, sum);
      }
  Tile<typename Op::Acc, MB> tile;
  for (int64_t token = 0; token < plan.M; token += MB) {
    for (int m = 0; m < MB; ++m) {
      const int64_t t = std::min(token + m, plan.M - 1);
      tile.table[m] = plan.table + t * plan.words * Op::kFields;
      tile.offset[m] = plan.offset + t * plan.groups;
      tile.zero[m] = Op::kInteger ? (0u - plan.zero[t]) & (kNarrow ? 0xffffu : ~0u) : 0u;
      tile.total[0][m] = tile.total[1][m] = set(0.0f);
    }
    for (int64_t g = 0; g < plan.groups; ++g) {
      gemm_group<Op>(words + g * gw * ld, gw, g, tile);
      gemm_scale<Op, kNarrow>(scales + g * ld, sums + g * ld, tile);
    }
    for (int m = 0; m < MB && token + m < plan.M; ++m)
      for (int v = 0; v < 2; ++v) {
        const int64_t n = std::min<int64_t>(W, plan.O - begin - v * W), at = (token + m) * plan.O + begin + v * W;
        if (n <= 0) break;
        const vf value = tile.total[v][m] * set(plan.s ? plan.s[token + m] : 1.0f);
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
  if (!plan.gemv) {
    const bool narrow = (plan.I / plan.groups << plan.w_bits) <= 32768;
    return narrow ? gemm_rows<Op, true>(plan, chunk * 2 * W, scratch) : gemm_rows<Op, false>(plan, chunk * 2 * W, scratch);
  }
  const int64_t begin = chunk * plan.chunk_rows, end = std::min(plan.O, begin + plan.chunk_rows);
  float* scales = reinterpret_cast<float*>(scratch);
  if (plan.M == 1)
    return plan.scale_dtype == kF32 ? gemv_rows<Op, float, 1>(plan, 0, begin, end, scales)
                                    : gemv_rows<Op, bf16, 1>(plan, 0, begin, end, scales);
  for (int64_t token = 0; token < plan.M; token += 4)
    plan.scale_dtype == kF32 ? gemv_rows<Op, float, 4>(plan, token, begin, end, scales)
                             : gemv_rows<Op, bf16, 4>(plan, token, begin, end, scales);
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
  int64_t scale_ld;  // room for one row's scales in fp32, a vector beyond the last
  int index[16];  // the group of each lane, counted from the vector's first
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

// One token's activations in the order of the fields (top of the file): entry (step, field, lane) takes value
// p * fields + field of word step * lanes + lane for its parts p.
template <int kParts, int kFields, class Value>
void fill_table(const LowbitPlan& plan, uint32_t* table, int64_t lanes, const Value& value) {
  constexpr int64_t kPerWord = kParts * kFields;
  for (int64_t first = 0; first < plan.steps * lanes; first += lanes)
    for (int64_t f = 0; f < kFields; ++f, table += lanes)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t word = first + lane;
        uint32_t entry = 0;
        if (word < plan.words)
          for (int64_t p = 0; p < kParts; ++p)
            entry |= static_cast<uint32_t>(value(word * kPerWord + p * kFields + f)) << (32 / kParts * p);
        table[lane] = entry;
      }
}

template <int kPerWord>
void fill_table(const LowbitPlan& plan, const void* token, uint32_t* table, int64_t lanes) {
  if (plan.kind == kBytes)
    fill_table<4, kPerWord / 4>(plan, table, lanes, [=](int64_t k) { return static_cast<const uint8_t*>(token)[k]; });
  else if (plan.kind == kPairs)
    fill_table<2, kPerWord / 2>(plan, table, lanes, [=](int64_t k) { return static_cast<const uint16_t*>(token)[k]; });
  else if (plan.dtype == kF32)
    fill_table<1, kPerWord>(plan, table, lanes, [=](int64_t k) { return static_cast<const uint32_t*>(token)[k]; });
  else
    fill_table<1, kPerWord>(plan, table, lanes,
                            [=](int64_t k) { return uint32_t{static_cast<const uint16_t*>(token)[k]} << 16; });
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
  for (int i = 0; i < 16; ++i) plan.index[i] = static_cast<int>(i % width / gw);
  plan.steps = (plan.words + lanes - 1) / lanes;
  plan.scale_ld = (plan.groups + 31) / 16 * 16;
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
    const auto fill = w_bits == 2 ? fill_table<16> : w_bits == 4 ? fill_table<8> : fill_table<4>;
    fill(plan, token, table + m * per_token, lanes);
  });
  plan.table = table, plan.offset = offset, plan.zero = zero, plan.s = integer ? s : nullptr;

  const int64_t rows = plan.gemv ? plan.chunk_rows : 2 * width;
  const size_t scratch = static_cast<size_t>(plan.gemv ? 2 * plan.scale_ld * 4 : (plan.words + 2 * plan.groups) * rows * 4);
  std::atomic<int> error{kOk};
  parallel_for((O + rows - 1) / rows, threads, [&](int64_t chunk) {
    std::unique_ptr<void, void (*)(void*)> buffer(std::aligned_alloc(64, (scratch + 63) / 64 * 64), std::free);
    if (!buffer) {
      error = kNoMemory;
      return;
    }
    DISPATCH(level, lowbit_run(plan, chunk, static_cast<uint32_t*>(buffer.get())));
  });
  return error;
}

#endif
