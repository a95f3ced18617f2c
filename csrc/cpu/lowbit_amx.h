// Prepared weights times tokens in AMX tiles (included by cpu/lowbit.cpp in its last pass, hence no guard). An unpacked
// panel [entries][kBlock] is what a tile of B holds, a token's table what a row of A holds; tiles of C are sums of a
// group: 16 tokens by 16 rows of weights. Per group of 128 inputs 2 products of bytes or 4 of bf16 make a tile, 16 cycles
// each, and about as many are needed to add it, scaled, to the totals.

#include "cpu/amx.h"

namespace jointnas::JN_ISA {

constexpr int64_t kAmxTokens = 128;  // whose totals are read and written for each group

inline amx::Config tile_config(int64_t tokens, int64_t entries) {
  amx::Config c;
  for (int i = 0; i < 8; ++i) {  // 0 to 3: C, 4 and 5: A, 6 and 7: B
    c.rows[i] = static_cast<uint8_t>(i < 6 ? tokens : entries);
    c.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? entries * 4 : 64);
  }
  return c;
}

// Sums [MT kTileRows][NT W] of a group: MT tiles of `height` tokens from a on, NT of W rows of the panel.
template <class Product, int MT, int NT>
inline void tile_sums(const uint32_t* a, const uint32_t* panel, int64_t entries, int64_t height, uint32_t* sums) {
  fields<MT * NT>([](auto i) { amx::zero<i()>(); });
  const int64_t step = tile_entries(entries);
  for (int64_t e = 0; e < entries; e += step) {
    fields<MT>([&](auto m) { amx::load<4 + m()>(a + m() * height * entries + e, entries * 4); });
    fields<NT>([&](auto n) {
      amx::load<6 + n() % 2>(panel + e * kBlock + n() * W, kBlock * 4);
      fields<MT>([&](auto m) {
        if constexpr (Product::kInteger)
          amx::dot_bytes<m() * NT + n(), 4 + m(), 6 + n() % 2>();
        else
          amx::dot_bf16<m() * NT + n(), 4 + m(), 6 + n() % 2>();
      });
    });
  }
  fields<MT>([&](auto m) {
    fields<NT>([&](auto n) { amx::store<m() * NT + n()>(sums + m() * kTileRows * NT * W + n() * W, NT * W * 4); });
  });
}

// Adds the sums of a group, scaled, to the totals of tokens [token, token + count) and NT W rows.
template <class Product, int NT>
inline void add_sums(const LowbitPlan& plan, const uint32_t* meta, const uint32_t* sums, int64_t g, int64_t token,
                     int64_t count, int64_t height, float* total) {
  const LowbitTokens& t = plan.tokens;
  const uint32_t* offset = t.offset + g * t.M;
  vf scale[NT];
#pragma GCC unroll 4
  for (int n = 0; n < NT; ++n) scale[n] = Meta(plan, meta + n * W).scale;
  for (int64_t first = 0; first < count; first += height, sums += kTileRows * NT * W) {
    const uint32_t* sum = sums;
    for (int64_t m = token + first, end = token + std::min(first + height, count); m < end; ++m, sum += NT * W) {
      float* out = total + (m - token) * kBlock;
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        vf value;
        if constexpr (Product::kInteger)
          value = convert(loadi(sum + n * W) + seti(offset[m]));
        else
          value = as_float(loadi(sum + n * W));
        store(out + n * W, fma(scale[n], value, load(out + n * W)));
      }
    }
  }
}

// Tokens [first, first + count) of a block, in tiles of MT by NT.
template <class Op, int MT, int NT>
void gemm_tiles(const LowbitPlan& plan, const uint32_t* data, int64_t first, int64_t count, uint32_t* scratch,
                float* total) {
  using Product = typename Op::Product;
  const LowbitLayout& l = plan.layout;
  const LowbitTokens& t = plan.tokens;
  // As even as possible, so that one configuration serves all tiles: 17 tokens are 9 + 8. The last ones read beyond, by
  // less than a whole tile for an odd number of them and a token for each: the table is followed by that much.
  const int64_t tiles = (count + kTileRows - 1) / kTileRows, height = (count + tiles - 1) / tiles;
  const amx::Config config = tile_config(height, tile_entries(t.entries));
  amx::configure(config);
  alignas(64) uint32_t sums[MT * kTileRows * NT * W];
  for (int64_t g = 0; g < l.groups; ++g) {
    const uint32_t *const meta = data + g * l.height() * kBlock, *panel = meta + l.meta * kBlock;
    if constexpr (Op::kFields > 1) {
      unpack_group<Op>(l, panel, first == plan.begin, scratch);
      panel = scratch;
    }
    for (int64_t m = 0; m < count; m += MT * height)
      for (int64_t lane = 0; lane < kBlock; lane += NT * W) {
        const int64_t token = first + m;
        tile_sums<Product, MT, NT>(t.table + (g * t.M + token) * t.entries, panel + lane, t.entries, height, sums);
        add_sums<Product, NT>(plan, meta + lane, sums, g, token, std::min(count - m, MT * height), height,
                              total + m * kBlock + lane);
      }
  }
  amx::release();
}

// A block times all tokens: f(first, count, total [count][kBlock]) adds up the products of at most `most` tokens at a time.
template <class Product, class F>
void passes(const LowbitPlan& plan, const uint32_t* data, int64_t block, int64_t most, float* total, const F& f) {
  vf correction[kBlock / W];
  for (int64_t i = 0; i < kBlock / W; ++i) correction[i] = correction_of<Product>(plan, data + i * W);
  const int64_t all = plan.end - plan.begin, number = (all + most - 1) / most, each = (all + number - 1) / number;
  for (int64_t first = plan.begin; first < plan.end; first += each) {
    const int64_t count = std::min(each, plan.end - first);
    std::memset(total, 0, static_cast<size_t>(count * kBlock) * 4);
    f(first, count, total);
    for (int64_t m = 0; m < count; ++m)
      for (int64_t i = 0; i < kBlock / W; ++i)
        put_rows(plan, first + m, block * kBlock + i * W, load(total + m * kBlock + i * W), correction[i]);
  }
}

template <class Op>
void gemm_amx(const LowbitPlan& plan, const uint32_t* data, int64_t block, uint32_t* scratch) {
  float* const totals = reinterpret_cast<float*>(scratch + plan.tokens.entries * kBlock);
  passes<typename Op::Product>(plan, data, block, kAmxTokens, totals, [&](int64_t first, int64_t count, float* total) {
    (count <= kTileRows ? gemm_tiles<Op, 1, 4> : gemm_tiles<Op, 2, 2>)(plan, data, first, count, scratch, total);
  });
}

}  // namespace jointnas::JN_ISA
