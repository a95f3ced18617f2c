// Prepared weights times many tokens, per instruction set (each_isa.h, hence no guard; included by cpu/lowbit.cpp):
// register tiles, and what a group and an output need, shared with the one-pass product there.

namespace jointnas::JN_ISA {

// Vectors and tokens of a register tile: 12 sums and totals in 32 registers, 8 sums in 16; the scalar pass just runs.
#if defined(JN_AVX512)
constexpr int kTileVectors = 2, kTileTokens = 6;
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

// y of W rows and a token: (value - z correction) s
inline void put_rows(const LowbitPlan& plan, int64_t token, int64_t row, vf value, vf correction) {
  const int64_t n = std::min<int64_t>(W, plan.layout.O - row), at = token * plan.layout.O + row;
  if (n <= 0) return;
  value = fma(set(plan.tokens.zero[token]), correction, value) * set(plan.tokens.s[token]);
  const auto put = [&](auto* y) { n == W ? store(y, value) : store(y, value, n); };  // counted stores are slow on AVX2
  if (plan.dtype == kF32)
    put(static_cast<float*>(plan.y) + at);
  else
    put(static_cast<bf16*>(plan.y) + at);
}

// What a group adds to W rows: scale * acc to their sums, scale * S to what zero points are multiplied with at the end.
struct Meta {
  vf scale;
  vi sums;
  bool halves;  // of the sums, the others are the scale's
  Meta(const LowbitPlan& plan, const uint32_t* meta)
      : scale(as_float(loadi(meta) & seti(plan.scale_mask))), sums(loadi(meta + plan.sums)), halves(plan.sums == 0) {}
  vf add(vi acc, vf total) const { return fma(scale, convert(acc), total); }
  vf add(vf acc, vf total) const { return fma(scale, acc, total); }
  vf correct(vf correction) const { return fma(scale, convert(halves ? sar<16>(shl<16>(sums)) : sums), correction); }
};

// The latter of W rows of a block
template <class Product>
vf correction_of(const LowbitPlan& plan, const uint32_t* meta) {
  vf correction = set(0.0f);
  if constexpr (Product::kInteger)
    for (int64_t g = 0; g < plan.layout.groups; ++g, meta += plan.layout.height() * kBlock)
      correction = Meta(plan, meta).correct(correction);
  return correction;
}

// out[v MB + m] = offset[m] + sum over the entries of a group, in runs.
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
        for (int v = 0; v < V; ++v) acc[v][m] = settled(add16(acc[v][m], maddubs(u[v], am)));
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

// A tile's weights: groups [first, end) as meta and as a panel [entries][kBlock], so many words apart.
struct Panel {
  int64_t first, end;
  const uint32_t *meta, *words;
  int64_t meta_stride, word_stride;
};

// total [m][kBlock] of V W rows and tokens [token, token + MB): what it is after earlier groups, if there are any, plus
// these. kCold: words come from memory. Sums and, on AVX-512, totals stay in registers, as on Zen 4 a store takes a cycle
// of the multipliers. A function of its own that ends in stores, constant indices, and products in place (settled), or
// GCC 12 keeps copies of them.
template <class Product, int V, int MB, bool kCold>
__attribute__((noinline)) void gemm_tile(const LowbitPlan& plan, Panel p, int64_t token, float* total) {
  const LowbitTokens& t = plan.tokens;
  const int64_t entries = t.entries;
  const auto of_tile = [](const auto& f) { fields<V>([&](auto v) { fields<MB>([&](auto m) { f(v(), m()); }); }); };
  vf sum[V][MB];
  of_tile([&](int v, int m) { sum[v][m] = set(0.0f); });
  if (p.first) of_tile([&](int v, int m) { sum[v][m] = load(total + m * kBlock + v * W); });
  for (int64_t g = p.first; g < p.end; ++g, p.meta += p.meta_stride, p.words += p.word_stride) {
    const uint32_t *const offset = t.offset + g * t.M + token, *const a = t.table + (g * t.M + token) * entries;
    typename Product::Acc acc[V][MB];
    if constexpr (kShort<Product>) {
      gemm_group_short<V, MB>(p.words, entries, a, offset, acc[0]);
    } else {
      of_tile([&](int v, int m) {
        if constexpr (Product::kInteger)
          acc[v][m] = seti(offset[m]);
        else
          acc[v][m] = set(0.0f);
      });
      for (int64_t e = 0; e < entries; ++e) {
        if constexpr (kCold)
          for (int v = 0; v < V; v += (W < 16 ? 16 / W : 1)) __builtin_prefetch(p.words + e * kBlock + v * W + 2048);
        vi u[V];
        fields<V>([&](auto v) { u[v] = loadi(p.words + e * kBlock + v * W); });
        fields<MB>([&](auto m) {
          const vi am = seti(a[m * entries + e]);
          fields<V>([&](auto v) { acc[v][m] = Product::mul_settled(acc[v][m], u[v], am); });
        });
      }
    }
    fields<V>([&](auto v) {
      const Meta of(plan, p.meta + v * W);
      fields<MB>([&](auto m) { sum[v][m] = settled(of.add(settled(acc[v][m]), sum[v][m])); });
    });
  }
  of_tile([&](int v, int m) { store(total + m * kBlock + v * W, sum[v][m]); });
}

// The panel [entries][kBlock] of a group, from its words.
template <class Op>
void unpack_group(const LowbitLayout& l, const uint32_t* words, bool prefetch, uint32_t* out) {
  for (int64_t c = 0; c < l.words; ++c, words += kBlock) {
    if (prefetch)  // the next group
      for (int64_t r = 0; r < kBlock; r += 16) __builtin_prefetch(words + l.height() * kBlock + r);
    fields<Op::kFields>([&](auto f) {
      for (int64_t r = 0; r < kBlock; r += W) storei(out + r, Op::template operand<f()>(loadi(words + r)));
      out += kBlock;
    });
  }
}

// A block times tokens [plan.begin, plan.end). scratch: panels of some groups, then the totals of kTokens.
template <class Op>
void gemm(const LowbitPlan& plan, const uint32_t* data, int64_t block, uint32_t* scratch) {
  using Product = typename Op::Product;
  constexpr bool kStored = Op::kFields == 1;  // as they are multiplied
  constexpr int64_t kRows = kTileVectors * W;
  const LowbitLayout& l = plan.layout;
  const int64_t count = plan.end - plan.begin, passes = (count + kTokens - 1) / kTokens;
  const int64_t each = (count + passes - 1) / passes;
  const int64_t panel = plan.tokens.entries * kBlock, height = l.height() * kBlock, most = plan.panel_groups();
  float* const totals = reinterpret_cast<float*>(scratch + most * panel);
  vf correction[kBlock / W];
  for (int64_t i = 0; i < kBlock / W; ++i) correction[i] = correction_of<Product>(plan, data + i * W);
  for (int64_t from = plan.begin; from < plan.end; from += each)
    for (int64_t first = 0, end; first < l.groups; first = end) {
      end = std::min(first + most, l.groups);
      const uint32_t *const meta = data + first * height, *const words = meta + l.meta * kBlock;
      if constexpr (!kStored)
        for (int64_t g = 0; g < end - first; ++g)
          unpack_group<Op>(l, words + g * height, from == plan.begin, scratch + g * panel);
      for (int64_t lane = 0; lane < kBlock; lane += kRows) {
        const Panel p{first, end, meta + lane, (kStored ? words : scratch) + lane, height, kStored ? height : panel};
        const auto tile = [&](auto mb, int64_t m) {
          const auto f = kStored && m == plan.begin ? gemm_tile<Product, kTileVectors, mb(), kStored>
                                                    : gemm_tile<Product, kTileVectors, mb(), false>;
          f(plan, p, m, totals + (m - from) * kBlock + lane);
          if (end < l.groups) return;
          for (int64_t i = 0; i < mb(); ++i)
            for (int64_t r = lane; r < lane + kRows; r += W)
              put_rows(plan, m + i, block * kBlock + r, load(totals + (m + i - from) * kBlock + r), correction[r / W]);
        };
        const int64_t last = std::min(from + each, plan.end);
        int64_t m = from;
        for (int64_t left = (last - m + kTileTokens - 1) / kTileTokens; left > 0; --left) {
          const int64_t mb = (last - m + left - 1) / left;  // as even as possible: 16 tokens are 6 + 5 + 5
          fields<kTileTokens>([&](auto i) {
            if (mb == i() + 1) tile(std::integral_constant<int, i() + 1>{}, m);
          });
          m += mb;
        }
      }
    }
}

}  // namespace jointnas::JN_ISA
