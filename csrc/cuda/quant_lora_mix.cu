// W~ = sum_p probs[p] * Q_p(W + B'_p A_p) for half-type weights: one read of W, one write of W~, B' = scaling * B.
// And the same tiles for the arch step: sum(dW * Q_p) for every p, from W and some rows of dW.
// Semantics and gradients: jointnas_kernels/ops/quant_lora_mix.py.
//
// A warp owns tiles of 16 rows by 128 inputs in the accumulator layout of mma.m16n8k16, so a quad of lanes holds a row of
// a group: 32 values per lane, two shuffles per group maximum. The columns of the 16 n-tiles are permuted such that a
// lane's values are four 16-byte pieces of a row; W goes through shared memory only to be fetched one tile ahead, and
// nothing is exchanged between lanes on the way in or out. A_p is stored once per block, in fragment order.
//
// W's packed pairs have the layout of an A operand, so one more product with the identity turns them into fp32
// accumulators: 16 instructions where conversions take 64, and W stays in 32 registers instead of 64.
//
// Per element and precision: |max|, 2 for the exact quotient, + 2^23, clamp, - 2^23, fma = 7 operations. The quotient:
// with r + t = 1/s to 45 bits, RN(x r + RN(x t)) = RN(x / s) because s has at most 11 significant bits.
#include <cmath>

#include "cuda_ops.h"
#include "ptx.cuh"

namespace jointnas {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTile = 128, kRows = 16, kPrecisions = 4;  // rank padded to 32
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, to nearest even
constexpr float kTiny = 0x1p-100f;

struct Params {
  const void *weight, *lora_a, *lora_b, *grad;
  const float *probs, *clip;
  void* out;
  float* partial;
  int rows, begin, end;  // of W; the part of them to work on
  int inputs, rank, precisions;
  int columns;         // 128-input tiles per block
  int tiles_per_block; // 16-row tiles per block
  float scaling;
  uint32_t nil;  // 0, which the compiler must not know: xor with it puts W into operand order once, not per precision
  float high[kPrecisions], inverse[kPrecisions], rest[kPrecisions];  // top level; 1 / ((2^b - 1)/2) in two floats
};

// Byte offsets in shared memory.
JN_HOST_DEVICE size_t fragment_bytes(int columns, int precisions) {
  return static_cast<size_t>(columns) * precisions * 16 * 32 * sizeof(Vec4);
}
// Per warp: the next tile of W, B' of one row tile; to reduce, also the next tile of dW and a sum per lane and precision.
JN_HOST_DEVICE size_t warp_bytes(int precisions, bool reduce) {
  const size_t vectors = (8 + static_cast<size_t>(precisions) * 2 + (reduce ? 8 : 0)) * 32;
  return vectors * sizeof(Vec4) + (reduce ? precisions * 32 * sizeof(float) : 0);
}

template <class T> JN_DEVICE float low_half(uint32_t v) { return ptx::to_float(T{static_cast<uint16_t>(v)}); }
template <class T> JN_DEVICE float high_half(uint32_t v) { return ptx::to_float(T{static_cast<uint16_t>(v >> 16)}); }

// A_p of this block's columns as B operands of the products: word k/8 of lane 4 n + (k/2 % 4) holds
// ranks k, k + 1 of column n of n-tile j. Column n = 2 t + e of n-tile j = 4 c + i is input 32 c + 8 t + 2 i + e.
template <class T> JN_DEVICE void load_lora_a(const Params& p, Vec4* fragments, int first_column, int columns) {
  static_assert(kThreads == 256, "one thread per piece of 8 columns and pair of ranks");
  const int piece = threadIdx.x / 16, pair = threadIdx.x % 16;  // so that a warp's stores meet in no bank more than twice
  const bool inside = 2 * pair < p.rank;  // the rank is even; zeros here make the padding of B' irrelevant
  const int tile = 4 * (piece / 4), lane = 8 * (piece % 4) + pair % 4;
  uint32_t* words = reinterpret_cast<uint32_t*>(fragments) + (tile * 32 + lane) * 4 + pair / 4;
  const T* a = static_cast<const T*>(p.lora_a) + static_cast<size_t>(2 * pair) * p.inputs + first_column * kTile + 8 * piece;
  for (int column = 0; column < columns; ++column, a += kTile) {
    const T* from = a;
#pragma unroll 1
    for (int precision = 0; precision < p.precisions; ++precision, words += 16 * 32 * 4) {
      Vec4 even{{0, 0, 0, 0}}, odd = even;
      if (inside) {
        even = ptx::load_readonly(from);
        odd = ptx::load_readonly(from + p.inputs);
      }
      from += static_cast<size_t>(p.rank) * p.inputs;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i * 32 * 4] = (even.w[i] & 0xffff) | odd.w[i] << 16;
        words[(i * 32 + 4) * 4] = even.w[i] >> 16 | (odd.w[i] & 0xffff0000u);
      }
    }
  }
}

// Rows g and g + 8 of a tile, for lane 4 g + t; past the end the last row stands in, its dW is 0 and it is not stored.
struct Rows { int r[2]; bool inside[2]; };
JN_DEVICE Rows rows_of(const Params& p, int row, int lane) {
  const int low = row + lane / 4, high = low + 8, end = p.end - 1;
  return {{low < end ? low : end, high < end ? high : end}, {low <= end, high <= end}};
}

// B'_p of 16 rows as A operands; a lane reads back only what it wrote.
template <class T> JN_DEVICE void load_lora_b(const Params& p, Vec4* fragments, const Rows& rows, int lane) {
  const uint32_t scale2 = ptx::pack2<T>(p.scaling, p.scaling);
  const T* b = static_cast<const T*>(p.lora_b);
#pragma unroll 1
  for (int precision = 0; precision < p.precisions; ++precision, b += static_cast<size_t>(p.rows) * p.rank) {
    const T* row[2] = {b + static_cast<size_t>(rows.r[0]) * p.rank, b + static_cast<size_t>(rows.r[1]) * p.rank};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      Vec4 v;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // word i: rows g + 8 (i % 2), ranks 16 step + 8 (i / 2) + 2 t, + 1
        const int k = 16 * step + 8 * (i / 2) + 2 * (lane % 4);
        v.w[i] = ptx::fma2<T>(*reinterpret_cast<const uint32_t*>(row[i % 2] + (k < p.rank ? k : 0)), scale2, 0);
      }
      fragments[(precision * 2 + step) * 32 + lane] = v;
    }
  }
}

// Start fetching this lane's eight pieces of 16 rows by 128 columns of a matrix; `start` is its first column here.
template <class T, bool ZEROS>
JN_DEVICE void fetch(const T* start, Vec4* stage, const Rows& rows, int inputs, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const T* row = start + static_cast<size_t>(rows.r[h]) * inputs + 8 * (lane % 4);
#pragma unroll
    for (int c = 0; c < 4; ++c) ptx::cp_async16(stage + (4 * h + c) * 32 + lane, row + 32 * c, !ZEROS || rows.inside[h]);
  }
}

template <class T, bool REDUCE>
JN_DEVICE void fetch_tile(const Params& p, Vec4* stage, const Rows& rows, int input, int lane) {
  fetch<T, false>(static_cast<const T*>(p.weight) + input, stage, rows, p.inputs, lane);
  if (REDUCE) {
    const Rows local{{rows.r[0] - p.begin, rows.r[1] - p.begin}, {rows.inside[0], rows.inside[1]}};  // dW has no others
    fetch<T, true>(static_cast<const T*>(p.grad) + input, stage + 8 * 32, local, p.inputs, lane);
  }
}

// The pieces as A operands of n-tiles 2 m, 2 m + 1: rows g, g + 8 of the first, then of the second.
JN_DEVICE void operands(const Params& p, const Vec4* stage, uint32_t (&w)[8][4], int lane) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const Vec4 low = stage[c * 32 + lane], high = stage[(4 + c) * 32 + lane];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      w[2 * c + k / 2][k % 2 * 2] = low.w[k] ^ p.nil;
      w[2 * c + k / 2][k % 2 * 2 + 1] = high.w[k] ^ p.nil;
    }
  }
}

template <class T, int GROUP, bool CLIP, bool REDUCE>
__global__ void __launch_bounds__(kThreads, 1) mix_kernel(const __grid_constant__ Params p) {
  JN_DYNAMIC_SHARED(shared);
  constexpr int kGroups = kTile / GROUP;  // groups per tile
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Vec4* fragments = reinterpret_cast<Vec4*>(shared);
  Vec4* mine = reinterpret_cast<Vec4*>(shared + fragment_bytes(p.columns, p.precisions) +
                                       warp * warp_bytes(p.precisions, REDUCE));
  Vec4* lora_b = mine + (REDUCE ? 16 : 8) * 32;
  float* sums = reinterpret_cast<float*>(lora_b + p.precisions * 2 * 32) + lane;  // [precision][lane]

  const int first_column = blockIdx.x * p.columns, left = p.inputs / kTile - first_column;
  const int columns = left < p.columns ? left : p.columns;
  const int tiles = (p.end - p.begin + kRows - 1) / kRows;
  const int first = blockIdx.y * p.tiles_per_block + warp;
  const int last = (blockIdx.y + 1) * p.tiles_per_block < tiles ? (blockIdx.y + 1) * p.tiles_per_block : tiles;
  const int steps = first < last ? (last - first + kWarps - 1) / kWarps * columns : 0;

  int column = 0, row = p.begin + first * kRows;
  Rows rows = rows_of(p, row, lane);
  if (steps) fetch_tile<T, REDUCE>(p, mine, rows, first_column * kTile, lane);
  ptx::cp_async_commit();
  if (REDUCE)
    for (int precision = 0; precision < p.precisions; ++precision) sums[precision * 32] = 0;
  load_lora_a<T>(p, fragments, first_column, columns);
  ptx::sync_threads();

  // The identity as a B operand: lane 4 g + t holds (2 t == g, 2 t + 1 == g).
  const uint32_t one = ptx::pack2<T>(lane / 4 == 2 * (lane % 4) ? 1.0f : 0.0f, lane / 4 == 2 * (lane % 4) + 1 ? 1.0f : 0.0f);
  const uint32_t halves[2][2] = {{one, p.nil}, {p.nil, one}};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (column == 0) load_lora_b<T>(p, lora_b, rows, lane);
    ptx::cp_async_wait<0>();
    uint32_t w[8][4];
    operands(p, mine, w, lane);
    float mixed[16][4];  // W~ (or dW): [j][2 h + e]: row g + 8 h, input 32 (j / 4) + 8 t + 2 (j % 4) + e
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) mixed[j][k] = 0;
    if (REDUCE) {
      uint32_t grad[8][4];
      operands(p, mine + 8 * 32, grad, lane);
#pragma unroll
      for (int j = 0; j < 16; ++j) ptx::mma_m16n8k16<T>(mixed[j], grad[j / 2], halves[j % 2][0], halves[j % 2][1]);
    }
    const int input = (first_column + column) * kTile, at_row = row;
    const Rows at = rows;
    if (++column == columns) {
      column = 0;
      row += kWarps * kRows;
      rows = rows_of(p, row, lane);
    }

    const Vec4* a = fragments + static_cast<size_t>(input / kTile - first_column) * p.precisions * 16 * 32 + lane;
#pragma unroll 1
    for (int precision = 0; precision < p.precisions; ++precision, a += 16 * 32) {
      float x[16][4];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        x[j][0] = x[j][1] = x[j][2] = x[j][3] = 0;
        ptx::mma_m16n8k16<T>(x[j], w[j / 2], halves[j % 2][0], halves[j % 2][1]);
      }
      const Vec4 b0 = lora_b[precision * 2 * 32 + lane], b1 = lora_b[(precision * 2 + 1) * 32 + lane];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const Vec4 v = a[j * 32];
        ptx::mma_m16n8k16<T>(x[j], b0.w, v.w[0], v.w[1]);
        ptx::mma_m16n8k16<T>(x[j], b1.w, v.w[2], v.w[3]);
      }
      float total = 0;
      if (precision == 0 && step + 1 < steps) {  // w has left shared memory by now: fetch the next tile into its place
        fetch_tile<T, REDUCE>(p, mine, rows, (first_column + column) * kTile, lane);
        ptx::cp_async_commit();
      }
      const float high = kMagic + p.high[precision], low = kMagic - p.high[precision] - 1;
      const float inverse = p.inverse[precision], rest = p.rest[precision], pi = p.probs[precision];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          constexpr int kTilesPerGroup = 16 / kGroups;
          float unit = 0;
#pragma unroll
          for (int j = g * kTilesPerGroup; j < (g + 1) * kTilesPerGroup; ++j)
            unit = fmaxf(fmaxf(unit, fabsf(x[j][2 * h])), fabsf(x[j][2 * h + 1]));
          unit = fmaxf(unit, ptx::shuffle_xor(unit, 1));
          unit = fmaxf(unit, ptx::shuffle_xor(unit, 2));
          if (CLIP)
            unit *= p.clip[(static_cast<size_t>(precision) * p.rows + at.r[h]) * (p.inputs / GROUP) + input / GROUP + g];
          float s = ptx::to_float(ptx::from_float<T>(fmaf(unit, inverse, unit * rest)));
          s = s < kTiny ? 1.0f : s;
          const float r = ptx::reciprocal(s), t = fmaf(-s, r, 1.0f) * r, weight = pi * s;
          float dot[2] = {0, 0};
#pragma unroll
          for (int j = g * kTilesPerGroup; j < (g + 1) * kTilesPerGroup; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float v = x[j][2 * h + e];
              float level = fminf(fmaf(v, r, v * t) + kMagic, high);
              if (CLIP) level = fmaxf(level, low);  // without ratios |v / s| <= (2^b - 1)/2 (1 + 2^-8): never below
              if (REDUCE) dot[e] = fmaf(level - kMagic, mixed[j][2 * h + e], dot[e]);
              else mixed[j][2 * h + e] = fmaf(level - kMagic, weight, mixed[j][2 * h + e]);
            }
          }
          if (REDUCE) total = fmaf(dot[0] + dot[1], s, total);
        }
      }
      if (REDUCE) sums[precision * 32] += total;
    }
    if (REDUCE) continue;

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (at_row + lane / 4 + 8 * h >= p.end) continue;
      T* out = static_cast<T*>(p.out) + static_cast<size_t>(at.r[h]) * p.inputs + input + 8 * (lane % 4);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        Vec4 v;
#pragma unroll
        for (int k = 0; k < 4; ++k) v.w[k] = ptx::pack2<T>(mixed[4 * c + k][2 * h], mixed[4 * c + k][2 * h + 1]);
        *reinterpret_cast<Vec4*>(out + 32 * c) = v;
      }
    }
  }
  if (!REDUCE) return;
  const int warps = gridDim.x * gridDim.y * kWarps, self = (blockIdx.y * gridDim.x + blockIdx.x) * kWarps + warp;
  for (int precision = 0; precision < p.precisions; ++precision) {
    float v = sums[precision * 32];
#pragma unroll
    for (int m = 16; m; m /= 2) v += ptx::shuffle_xor(v, m);
    if (lane == 0) p.partial[precision * warps + self] = v;
  }
}

template <class T, int GROUP, bool CLIP> int run(const Params& p, int splits, cudaStream_t stream) {
  const dim3 grid((p.inputs / kTile + p.columns - 1) / p.columns, splits);
  const size_t bytes = fragment_bytes(p.columns, p.precisions) + kWarps * warp_bytes(p.precisions, p.grad != nullptr);
  return p.grad ? launch(mix_kernel<T, GROUP, CLIP, true>, grid, dim3(kThreads), bytes, stream, false, p)
                : launch(mix_kernel<T, GROUP, CLIP, false>, grid, dim3(kThreads), bytes, stream, false, p);
}
template <class T, int GROUP> int by_clip(const Params& p, int splits, cudaStream_t stream) {
  return p.clip ? run<T, GROUP, true>(p, splits, stream) : run<T, GROUP, false>(p, splits, stream);
}
template <class T> int by_group(const Params& p, int group, int splits, cudaStream_t stream) {
  if (group == 128) return by_clip<T, 128>(p, splits, stream);
  if (group == 64) return by_clip<T, 64>(p, splits, stream);
  return by_clip<T, 32>(p, splits, stream);
}

}  // namespace
}  // namespace jointnas

int jn_quant_lora_mix(const JnMixArgs* args, void* stream) {
  using namespace jointnas;
  const JnMixArgs& a = *args;
  if (a.precisions < 1 || a.precisions > kPrecisions || a.rank < 2 || a.rank > 32 || a.rank % 2 || a.inputs % kTile ||
      (a.group_size != 32 && a.group_size != 64 && a.group_size != 128) || a.columns < 1 || a.splits < 1 ||
      a.begin < 0 || a.begin >= a.end || a.end > a.rows || a.inputs == 0)
    return 1;
  Params p{a.weight, a.lora_a, a.lora_b, a.grad, a.probs, a.clip, a.out, a.partial, a.rows, a.begin, a.end, a.inputs,
           a.rank, a.precisions, a.columns, 0, a.scaling, 0, {}, {}, {}};
  const int tiles = (a.end - a.begin + kRows - 1) / kRows;
  p.tiles_per_block = (tiles + a.splits - 1) / a.splits;
  for (int i = 0; i < a.precisions; ++i) {
    const int bits = a.bits >> (8 * i) & 255;
    const double divisor = ((1 << bits) - 1) / 2.0;
    p.high[i] = static_cast<float>((1 << (bits - 1)) - 1);
    p.inverse[i] = static_cast<float>(1 / divisor);
    p.rest[i] = static_cast<float>(1 / divisor - p.inverse[i]);
  }
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == JN_BF16) return by_group<BF16>(p, a.group_size, a.splits, s);
  if (a.dtype == JN_F16) return by_group<F16>(p, a.group_size, a.splits, s);
  return 1;
}
