// Prepared weights times many tokens, per instruction set (each_isa.h, hence no guard; included by cpu/lowbit.cpp):
// register tiles, and what a group and an output need, shared with the one-pass product there.

namespace jointnas::JN_ISA {

// Vectors and tokens of a register tile: 24 sums of 32 registers, 8 of 16; the scalar pass just runs.
#if defined(JN_AVX512)
constexpr int kTileVectors = 4, kTileTokens = 6;
#elif defined(JN_AVX2)
constexpr int kTileVectors = 2, kTileTokens = 4;
#else
constexpr int kTileVectors = 4, kTileTokens = 2;
#endif

// Weights below 8 bits without VNNI: sums of maddubs stay within int16 for a run of entries (8 times two products of 15
// and 128), which saves a madd and half of the multiplier's work.
#if (defined(JN_AVX2) && !defined(JN_AVXVNNI)) || (defined(JN_AVX512) && !defined(JN_AVX512EXT))
template <class Product>
constexpr bool kShort = std::is_same_v<Product, ByteProduct<2>> || std::is_same_v<Product, ByteProduct<4>>;
#else
template <class Product>
constexpr bool kShort = false;
#endif
constexpr int kRun = 8;

inline void put_rows(const LowbitPlan& plan, int64_t token, int64_t row, vf value) {
  const int64_t n = std::min<int64_t>(W, plan.layout.O - row), at = token * plan.layout.O + row;
  if (n <= 0) return;
  value = value * set(plan.tokens.s[token]);
  const auto put = [&](auto* y) { n == W ? store(y, value) : store(y, value, n); };  // counted stores are slow on AVX2
  if (plan.dtype == kF32)
    put(static_cast<float*>(plan.y) + at);
  else
    put(static_cast<bf16*>(plan.y) + at);
}

// What a group adds to W rows: scale * (acc - z S), zero: -z as int16 in every lane.
struct Meta {
  vf scale;
  vi sums;
  Meta(const LowbitPlan& plan, const uint32_t* meta)
      : scale(as_float(loadi(meta) & seti(plan.scale_mask))), sums(loadi(meta + plan.sums)) {}
  vf add(vi acc, vi zero, vf total) const { return fma(scale, convert(dot16(acc, sums, zero)), total); }
  vf add(vf acc, vi, vf total) const { return fma(scale, acc, total); }
};

// acc[v][m] = offset[m] + sum over entries. A function of its own that ends in stores, because GCC 12 keeps the sums in
// registers, without a second copy of each, only in a loop that is followed by nothing else. kCold: w comes from memory.
template <class Product, int V, int MB, bool kCold>
__attribute__((noinline)) void gemm_group(const uint32_t* w, int64_t entries, const uint32_t* a, const uint32_t* offset,
                                          typename Product::Acc* out) {
  typename Product::Acc acc[V][MB];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      if constexpr (Product::kInteger)
        acc[v][m] = seti(offset[m]);
      else
        acc[v][m] = set(0.0f);
    }
  for (int64_t e = 0; e < entries; ++e) {
    if constexpr (kCold)
      for (int v = 0; v < V; v += (W < 16 ? 16 / W : 1)) __builtin_prefetch(w + e * kBlock + v * W + 2048);
    vi u[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) u[v] = loadi(w + e * kBlock + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      const vi am = seti(a[m * entries + e]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[v][m] = Product::mul(acc[v][m], u[v], am);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) out[v * MB + m] = acc[v][m];
}

// The same in runs.
template <int V, int MB>
__attribute__((noinline)) void gemm_group_short(const uint32_t* w, int64_t entries, const uint32_t* a,
                                                const uint32_t* offset, vi* out);
#if defined(JN_AVX2) || defined(JN_AVX512)
template <int V, int MB>
void gemm_group_short(const uint32_t* w, int64_t entries, const uint32_t* a, const uint32_t* offset, vi* out) {
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) out[v * MB + m] = seti(offset[m]);
  const auto run = [&](int64_t e, auto length) {
    vi acc[V][MB];
#pragma GCC unroll 16
    for (auto& of_row : acc)
#pragma GCC unroll 16
      for (vi& sum : of_row) sum = seti(0);
    fields<length()>([&](auto i) {
      vi u[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) u[v] = loadi(w + (e + i) * kBlock + v * W);
#pragma GCC unroll 16
      for (int m = 0; m < MB; ++m) {
        const vi am = seti(a[m * entries + e + i]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          acc[v][m] = add16(acc[v][m], maddubs(u[v], am));
          settle(acc[v][m]);
        }
      }
    });
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
      for (int m = 0; m < MB; ++m)
        out[v * MB + m] = out[v * MB + m] + madd(acc[v][m], seti(0x00010001u));
  };
  int64_t e = 0;
  for (; e + kRun <= entries; e += kRun) run(e, std::integral_constant<int, kRun>{});
  for (; e < entries; ++e) run(e, std::integral_constant<int, 1>{});
}
#endif

// Tokens [token, token + MB) of one group times V W rows of the panel; total [m][kBlock] is that of these rows.
template <class Product, int V, int MB, bool kCold>
void gemm_tile(const LowbitPlan& plan, const uint32_t* meta, const uint32_t* panel, int64_t g, int64_t token,
               float* total) {
  const LowbitTokens& t = plan.tokens;
  const int64_t at = g * t.M + token;
  typename Product::Acc acc[V * MB];
  if constexpr (kShort<Product>)
    gemm_group_short<V, MB>(panel, t.entries, t.table + at * t.entries, t.offset + at, acc);
  else
    gemm_group<Product, V, MB, kCold>(panel, t.entries, t.table + at * t.entries, t.offset + at, acc);
  vi zero[MB];
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) zero[m] = seti(t.zero[token + m]);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const Meta of(plan, meta + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      float* sum = total + m * kBlock + v * W;
      store(sum, of.add(acc[v * MB + m], zero[m], load(sum)));
    }
  }
}

// The panel [entries][kBlock] of a group: unpacked to scratch, or where nothing is packed the words themselves.
template <class Op>
const uint32_t* unpack_group(const LowbitLayout& l, const uint32_t* meta, bool prefetch, uint32_t* scratch) {
  const uint32_t* words = meta + l.meta * kBlock;
  if constexpr (Op::kFields == 1) return words;
  uint32_t* out = scratch;
  for (int64_t c = 0; c < l.words; ++c, words += kBlock) {
    if (prefetch)  // the next group, while this one is multiplied
      for (int64_t r = 0; r < kBlock; r += 16) __builtin_prefetch(words + l.height() * kBlock + r);
    fields<Op::kFields>([&](auto f) {
      for (int64_t r = 0; r < kBlock; r += W) storei(out + r, Op::template operand<f()>(loadi(words + r)));
      out += kBlock;
    });
  }
  return scratch;
}

// A block times all tokens: f(first, count, total [count][kBlock]) adds up the products of at most kTokens at a time.
// scratch: a group's panel [entries][kBlock], then the totals.
template <class F>
void passes(const LowbitPlan& plan, int64_t block, uint32_t* scratch, const F& f) {
  float* total = reinterpret_cast<float*>(scratch + plan.tokens.entries * kBlock);
  const int64_t M = plan.tokens.M, number = (M + kTokens - 1) / kTokens, each = (M + number - 1) / number;
  for (int64_t first = 0; first < M; first += each) {
    const int64_t count = std::min(each, M - first);
    std::memset(total, 0, static_cast<size_t>(count * kBlock) * 4);
    f(first, count, total);
    for (int64_t m = 0; m < count; ++m)
      for (int64_t r = 0; r < kBlock; r += W) put_rows(plan, first + m, block * kBlock + r, load(total + m * kBlock + r));
  }
}

template <class Op>
void gemm(const LowbitPlan& plan, const uint32_t* data, int64_t block, uint32_t* scratch) {
  using Product = typename Op::Product;
  const LowbitLayout& l = plan.layout;
  passes(plan, block, scratch, [&](int64_t first, int64_t count, float* total) {
    const int64_t tiles = (count + kTileTokens - 1) / kTileTokens;
    for (int64_t g = 0; g < l.groups; ++g) {
      const uint32_t* meta = data + g * l.height() * kBlock;
      const uint32_t* panel = unpack_group<Op>(l, meta, first == 0, scratch);
      for (int64_t lane = 0; lane < kBlock; lane += kTileVectors * W) {
        const auto tile = [&](auto mb, int64_t m) {
          const auto f = Op::kFields == 1 && first + m == 0 ? gemm_tile<Product, kTileVectors, mb(), Op::kFields == 1>
                                                            : gemm_tile<Product, kTileVectors, mb(), false>;
          f(plan, meta + lane, panel + lane, g, first + m, total + m * kBlock + lane);
        };
        int64_t m = 0;
        for (int64_t left = tiles; left > 0; --left) {  // as even as possible: 16 tokens are 6 + 5 + 5
          const int64_t mb = (count - m + left - 1) / left;
          fields<kTileTokens>([&](auto i) {
            if (mb == i() + 1) tile(std::integral_constant<int, i() + 1>{}, m);
          });
          m += mb;
        }
      }
    }
  });
}

}  // namespace jointnas::JN_ISA
