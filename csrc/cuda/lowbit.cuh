// What the low-bit products share: their arguments, the tiled weight layout (packed by ops/lowbit) and what a lane
// does with its words.
//
// A tile is 16 rows x 128 inputs = BITS*256 bytes: vectors [BITS/2][32 lanes] of 16 bytes. Field F = 4i + 2s + r of lane
// 4g + t holds inputs 32i + 8t + 4s + {0..3} of row 8r + g, as bytes j = 2e + h for input 2h + e.
#pragma once
#include "cuda/dispatch.cuh"
#include "cuda/ptx.cuh"

namespace jointnas {

// y[M, O] = x_hat @ (q * scale)^T, groups of 128 inputs.
struct LowbitArgs {
  const void* weight;         // tiled layout: [tiles, groups, bits/2, 32, 4] int32
  const void* scale;          // [groups, 16 * tiles], rows g and g + 8 of a tile adjacent; dtype
  const void* x;              // [M, I] dtype, or int8 as written by act_quant_pack
  const float* act_scale;     // [M]; null for 16-bit activations
  const int* act_zero;        // [M]; null for 16-bit activations
  const float* row_sum;       // [O], sums of q * scale over the inputs, for the zero points; or null
  void* y;                    // [M, O] dtype
  float* partial;             // [splits, M, O] if splits > 1; stripe: see there
  int* locks;                 // [kLocks], zero before and after, if splits > 1
  int tokens, rows, inputs;   // M, O, I
  int w_bits, dtype;
  int token_tiles;            // 8-token tiles per block: 1, 2 or 4 (stream), 4 or 8 (stripe), 8 or 16 (tile, wgmma),
                              // 16 or 32 (int8), 2 to 32 (half); bitplane: tiles of 8 token planes, 1, 2 or 4
  int warp_rows;              // stream, bitplane: 64-row strips per block: 1, 2, 4 or 8
  int splits;                 // blocks along the inputs; stripe: of a pass over all rows and inputs
  int early;                  // 1: programmatic dependent launch; the weights must not come from the kernel before
  int a_bits;                 // bitplane: planes per token; tile: bits of int8 levels
  int cluster;                // int8, half: blocks that share their tokens' copies, 1, 2 or 4
};

constexpr int kTileRows = 16;
constexpr int kGroup = 128;  // inputs per scale, and per tile
constexpr int kBlockTiles = 8;  // of a block of many tokens: 128 rows
constexpr int kBlockRows = kBlockTiles * kTileRows;
constexpr int kPitch = kBlockRows + 4;  // floats per token of its final sums; + 4 keeps stores off each other's banks
constexpr int kBand = 16;               // such blocks along the rows that run together, for L2
constexpr int kLocks = 4096;  // as many as ops/lowbit/tiles.py allocates

// What is wrong with the arguments every kernel shares, or kOk.
inline int check(const LowbitArgs& p) {
  const bool splits = p.splits == 1 || (p.splits > 1 && p.partial && p.locks);
  const bool zeros = !p.act_scale || (p.act_zero && p.row_sum);
  if (!splits || !zeros || p.inputs % kGroup || p.tokens < 1 || p.rows < 1) return kBadArgument;
  return aligned(p.weight, p.scale, p.x, p.y) ? kOk : kMisaligned;
}

// Which part of y the block of this index computes: bands of kBand row blocks, inside a band along the rows first.
struct Part { int row_block, token_block; };
JN_HOST_DEVICE Part part_of(int index, int row_blocks, int token_blocks) {
  const int band = index / (kBand * token_blocks), rest = index - band * kBand * token_blocks;
  const int width = min_of(kBand, row_blocks - band * kBand);
  return {band * kBand + rest % width, rest / width};
}
JN_HOST_DEVICE int row_blocks_of(const LowbitArgs& p) {  // whole clusters
  return ((p.rows + kBlockRows - 1) / kBlockRows + p.cluster - 1) / p.cluster * p.cluster;
}

// Whether a cluster can be such and every block of it has whole tiles of tokens to fetch.
inline bool shares_tokens(const LowbitArgs& p) {
  return (p.cluster == 1 || p.cluster == 2 || p.cluster == 4) && p.token_tiles % p.cluster == 0;
}

// Whether the blocks of a grid along x and z have a lock each.
inline bool locked(const LowbitArgs& p, dim3 grid) { return p.splits == 1 || size_t(grid.x) * grid.z <= kLocks; }

// Storage index of a token's input inside its group after quantization (act_quant_pack.cu): lane t's 32 bytes are
// contiguous, four bytes per (i, s) in the byte order of the weights.
JN_HOST_DEVICE int place_in_token(int input) {
  const int i = input / 32, t = input / 8 % 4, s = input / 4 % 2, h = input / 2 % 2, e = input % 2;
  return 32 * t + 8 * i + 4 * s + 2 * e + h;
}

// The same for wgmma, which takes a token's inputs in memory order: 16-bit activations in the order of the A registers
// of successive k16 products, 8-bit ones of k32 products.
JN_HOST_DEVICE int place_for_wgmma(int bytes, int input) {
  const int i = input / 32, t = input / 8 % 4, s = input / 4 % 2, h = input / 2 % 2, e = input % 2;
  return bytes == 2 ? 32 * i + 16 * s + 8 * h + 2 * t + e : 32 * i + 16 * s + 4 * t + 2 * e + h;
}

// Where byte `at` of a token's group is for lowbit_int8, and of half a group (64 inputs) for lowbit_half:
// [group][token / 8][token % 8][128], 16-byte chunks swizzled, so that any number of whole eights of tokens is one
// contiguous copy into wgmma's shared-memory layout.
JN_HOST_DEVICE size_t place_swizzled(int tokens, int token, int group, int at) {
  return (static_cast<size_t>(group) * ((tokens + 7) / 8) + token / 8) * 1024 + token % 8 * 128 +
         (at / 16 ^ token % 8) * 16 + at % 16;
}

// A group's sums before the first product, and as numbers. Integers are counted from the bits of 1.5 * 2^23, whose last
// mantissa bit is worth 1: |sum| <= 128 * 128 * 128 = 2^21 for any bits (spread() scales up to 8), so the sum is the
// float's distance from there, exactly, by one FADD. I2F would take as long as 4 of them on sm_80 (16 lanes per clock,
// FADD 64); mma.sync reads its first sums from registers that are set once, so beginning there costs nothing. (wgmma
// adds in place, where a MOV per sum makes it 3 instructions for I2FP's 2.)
template <class Sum> constexpr Sum kNothing = 0;
template <> inline constexpr int kNothing<int> = 0x4B400000;
JN_DEVICE float sum_of(float sum) { return sum; }
JN_DEVICE float sum_of(int sum) { return ptx::bits_float(static_cast<uint32_t>(sum)) - 12582912.0f; }

// Bits of a small number as F16 / BF16; exact for every constant used below.
JN_HOST_DEVICE constexpr uint32_t half_bits(bool bf16, double v) {
  const uint32_t sign = v < 0 ? 0x8000u : 0u;
  if (v < 0) v = -v;
  int e = 0;
  while (v >= 2) { v /= 2; ++e; }
  while (v < 1) { v *= 2; --e; }
  const int mantissa = bf16 ? 7 : 10;
  const double scaled = (v - 1) * (1 << mantissa);
  return sign | static_cast<uint32_t>((e + (bf16 ? 127 : 15)) << mantissa) | static_cast<uint32_t>(scaled);
}
JN_HOST_DEVICE constexpr uint32_t both(uint32_t half) { return half | half << 16; }

template <class T> constexpr bool kIsBf16 = false;
template <> inline constexpr bool kIsBf16<BF16> = true;

// Two weights as packed T: field `f` (counted inside the word), half `h` of its bytes. Magic numbers: with the exponent
// of 2^m (m = mantissa bits) or-ed onto a field at bit p, the number is 2^m + u*2^p; one fma takes the offset off and
// scales down, exactly.
template <class T, int BITS, int F, int H> JN_DEVICE uint32_t dequant(uint32_t word) {
  constexpr bool bf = kIsBf16<T>;
  constexpr int mantissa = bf ? 7 : 10, magic_exponent = bf ? 0x4300 : 0x6400;
  constexpr int position = BITS * F + 8 * H;
  constexpr double offset = 1 << (BITS - 1);
  if constexpr (BITS == 8 && bf) {  // 8 bits do not fit beside the hidden one: the top bit goes separately
    constexpr uint32_t magic = both(magic_exponent), one = both(half_bits(true, 1)), off = both(half_bits(true, -384));
    const uint32_t v = H ? word >> 8 : word;
    const uint32_t low = ptx::and_or(v, 0x007f007fu, magic);  // 128 + low 7 bits
    const uint32_t top = ptx::and_or(v, 0x00800080u, magic);  // 128 or 256
    return ptx::fma2<T>(low, one, ptx::fma2<T>(top, one, off));
  } else {
    constexpr int step = bf ? 4 : 8;  // few distinct shifts, so that the compiler shares them
    constexpr int shift = position + BITS <= mantissa ? 0 : position / step * step;
    constexpr int p = position - shift;
    static_assert(p + BITS <= mantissa);
    constexpr uint32_t magic = both(magic_exponent), mask = both(((1u << BITS) - 1) << p);
    constexpr uint32_t down = both(half_bits(bf, 1.0 / (1 << p)));
    constexpr uint32_t off = both(half_bits(bf, -(double(1 << mantissa) / (1 << p) + offset)));
    return ptx::fma2<T>(ptx::and_or(word >> shift, mask, magic), down, off);
  }
}

// Vectors FIRST .. FIRST + COUNT - 1 of a lane's words of a tile; `tile` is at this lane's first vector.
template <int BITS, int FIRST, int COUNT> JN_DEVICE void load_words(const unsigned char* tile, uint32_t (&w)[2 * BITS]) {
#pragma unroll
  for (int v = FIRST; v < FIRST + COUNT; ++v) {
    const Vec4 u = *reinterpret_cast<const Vec4*>(tile + v * 512);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[4 * v + j] = u.w[j];
  }
}
// The words that half HALF of the tile's inputs needs; W2 has one vector.
template <int BITS, int HALF> JN_DEVICE void load_half(const unsigned char* tile, uint32_t (&w)[2 * BITS]) {
  load_words<BITS, HALF * BITS / 4, (BITS + 3) / 4>(tile, w);
}

// Four weights as signed bytes, times 2^(8-BITS): the field moved to the top of its byte, sign bit flipped.
template <int BITS, int F> JN_DEVICE uint32_t spread(uint32_t word) {
  constexpr int up = 8 - BITS - BITS * F;  // bits pushed into the next byte are masked off
  constexpr uint32_t top = (0xffu << (8 - BITS)) & 0xffu;
  return ptx::and_xor(up > 0 ? word << up : word, top * 0x01010101u, 0x80808080u);
}

// A registers of products FROM .. FROM + COUNT - 1 of a tile, for mma.m16n8k16 (a tile has 8) ...
template <class T, int BITS, int FROM, int COUNT, int I = 0>
JN_DEVICE void dequant_steps(const uint32_t (&w)[2 * BITS], uint32_t (&a)[COUNT][4]) {
  constexpr int per_word = 8 / BITS, f0 = 2 * (FROM + I), f1 = f0 + 1;
  a[I][0] = dequant<T, BITS, f0 % per_word, 0>(w[f0 / per_word]);
  a[I][1] = dequant<T, BITS, f1 % per_word, 0>(w[f1 / per_word]);
  a[I][2] = dequant<T, BITS, f0 % per_word, 1>(w[f0 / per_word]);
  a[I][3] = dequant<T, BITS, f1 % per_word, 1>(w[f1 / per_word]);
  if constexpr (I + 1 < COUNT) dequant_steps<T, BITS, FROM, COUNT, I + 1>(w, a);
}
// ... and for mma.m16n8k32.s8 (a tile has 4).
template <int BITS, int FROM, int COUNT, int I = 0>
JN_DEVICE void spread_steps(const uint32_t (&w)[2 * BITS], uint32_t (&a)[COUNT][4]) {
  constexpr int per_word = 8 / BITS, f = 4 * FROM + I;
  a[I / 4][I % 4] = spread<BITS, f % per_word>(w[f / per_word]);
  if constexpr (I + 1 < 4 * COUNT) spread_steps<BITS, FROM, COUNT, I + 1>(w, a);
}
// For mma.m16n8k64.s4, of which a tile has 2: 32 inputs of rows g (low) and g + 8 (high), the I-th ones of a vector, as
// signed nibbles, times 2^(4-BITS). Nibble 2j + s is byte j of s.
template <int BITS, int I> JN_DEVICE void spread_nibbles(const uint32_t (&w)[4], uint32_t& low, uint32_t& high) {
  constexpr uint32_t signs = 0x88888888u;
  if constexpr (BITS == 4) {  // a byte of word 2I + s holds both rows
    low = ptx::and_xor(w[2 * I + 1] << 4, 0xf0f0f0f0u, ptx::and_xor(w[2 * I], 0x0f0f0f0fu, signs));
    high = ptx::and_xor(w[2 * I + 1], 0xf0f0f0f0u, ptx::and_xor(w[2 * I] >> 4, 0x0f0f0f0fu, signs));
  } else {  // a byte of word I: both rows of s = 0, then of s = 1
    low = ptx::and_xor(w[I] << 2, 0xccccccccu, signs);
    high = ptx::and_xor(w[I], 0xccccccccu, signs);
  }
}
// A token's levels in that order, from their bytes (place_in_token).
JN_DEVICE uint32_t pair_nibbles(uint32_t s0, uint32_t s1) { return ptx::bits_of(s0, 0x0f0f0f0fu, s1 << 4); }
template <int BITS> JN_DEVICE void spread_tile(const uint32_t (&w)[2 * BITS], uint32_t (&a)[4][4]) {
  spread_steps<BITS, 0, 4>(w, a);
}

}  // namespace jointnas
