// W~ = sum_p probs[p] * Q_p(W + B'_p A_p) for half-type weights: one read of W, one write of W~, B' = scaling * B.
// And the same tiles for the arch step: sum(dW * Q_p) for every p, from W and some rows of dW.
// Semantics and gradients: the docstring of the op.
//
// A warp owns tiles of 16 rows by 128 inputs in the accumulator layout of mma.m16n8k16, so a quad of lanes holds a row
// of a group: 32 values per lane, two shuffles per group maximum. The columns of the 16 n-tiles are permuted so that a
// lane's values are four 16-byte pieces of a row; W goes through shared memory only to be fetched one tile ahead, and
// nothing is exchanged between lanes on the way in or out. A_p is stored once per block, in fragment order.
//
// W's packed pairs have the layout of an A operand, so one more product, with the identity, turns them into fp32
// accumulators: 16 instructions where conversions take 64, and W stays in 32 registers instead of 64.
//
// Blocks stay, one per multiprocessor, and share the tiles evenly: columns of which A is kept in shared memory, rows
// going by. A block that reaches the end of its columns goes on with the next ones.
//
// Per element and precision: |max|, 2 for the exact quotient, + 2^23, clamp, - 2^23, fma = 7 operations. The quotient:
// with r + t = 1/s to 45 bits, RN(x r + RN(x t)) = RN(x / s) because s has at most 11 significant bits.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda/dispatch.cuh"
#include "cuda/ptx.cuh"

namespace jointnas {

// W~ = sum_p probs[p] * Q_p(W + scaling B_p A_p), or, if there is a grad, sum(grad * Q_p) of the rows begin .. end - 1,
// one partial sum per warp. Of several weights with the same inputs in one launch.
struct MixArgs {
  const int64_t* weights;  // on the host, a Weight each
  int count;            // of them, at most kMost; one if there is a grad
  const void* grad;     // [end - begin, I] dtype, or null
  const float* probs;   // [P], P at most 4
  float* partial;       // [blocks * kWarps, P]; only if there is a grad
  int begin, end;       // the rows to work on, if there is a grad; else all
  int inputs, rank, precisions, group_size;  // I, r, P; group_size 32, 64 or 128
  int bits;             // bit width of precision p in byte p
  int dtype;
  int columns, blocks;  // 128-input tiles whose A a block keeps; blocks that share the work evenly
  float scaling;
};

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTile = 128, kRows = 16, kPrecisions = 4;  // rank padded to 32
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, to nearest even
constexpr float kTiny = 0x1p-100f;

struct Weight {
  const void* weight;   // [O, I] dtype, I a multiple of 128
  const void* lora_a;   // [P, r, I] dtype, r 8, 16, 24 or 32
  const void* lora_b;   // [P, O, r] dtype
  const float* clip;    // [P, O, I / group_size], or null for all
  void* out;            // [O, I] dtype; not written if there is a grad
  int64_t rows;         // O
};
constexpr int kMost = 3;

struct Params {
  Weight of[kMost];
  int units[kMost];  // of work of each
  int all_units;
  const void* grad;
  const float* probs;
  float* partial;
  int begin, end;  // rows of W to work on, if there is a grad
  int inputs, rank, precisions;
  int columns;  // 128-input tiles whose A a block keeps
  float scaling;
  uint32_t nil;  // 0, which the compiler must not know: xor with it puts W into operand order once, not per precision
  float high[kPrecisions], inverse[kPrecisions], rest[kPrecisions];  // top level; 1 / ((2^b - 1)/2) in two floats
};

// Byte offsets in shared memory.
JN_HOST_DEVICE int fragment_bytes(int columns, int precisions) { return columns * precisions * 16 * 32 * 16; }
// Shared memory of a warp, for kPrecisions whatever their number, so that all offsets (in bytes) are constants: the
// next tile of W; to reduce, the next tile of dW; B of this row tile and the next; the clip ratios of this tile and the
// next; to reduce, a sum per lane and precision.
template <int GROUPS, bool CLIP, bool REDUCE> struct Layout {
  static constexpr int kGrad = 8 * 32 * 16, kLoraB = kGrad * (REDUCE ? 2 : 1), kBuffer = kPrecisions * 64;
  static constexpr int kRatios = kLoraB + 2 * kBuffer * 16, kRatioBuffer = kPrecisions * GROUPS * 16;
  static constexpr int kSums = kRatios + (CLIP ? 2 * kRatioBuffer * 4 : 0);
  static constexpr int kBytes = kSums + (REDUCE ? kPrecisions * 32 * 4 : 0);
};

// A_p of this block's columns as B operands of the products: word k/8 of lane 4 n + (k/2 % 4) holds
// ranks k, k + 1 of column n of n-tile j. Column n = 2 t + e of n-tile j = 4 c + i is input 32 c + 8 t + 2 i + e.
template <class T>
JN_DEVICE void load_lora_a(const Params& p, const Weight& m, Vec4* fragments, int first_column, int columns) {
  static_assert(kThreads == 256, "one thread per piece of 8 columns and pair of ranks");
  const int piece = threadIdx.x / 16, pair = threadIdx.x % 16;  // so that a warp's stores meet in no bank thrice
  const bool inside = 2 * pair < p.rank;  // the rank is even; zeros here make the padding of B' irrelevant
  const int tile = 4 * (piece / 4), lane = 8 * (piece % 4) + pair % 4;
  uint32_t* words = reinterpret_cast<uint32_t*>(fragments) + (tile * 32 + lane) * 4 + pair / 4;
  const T* a = static_cast<const T*>(m.lora_a) + first_column * kTile + 8 * piece;
  if (inside) a += static_cast<size_t>(2 * pair) * p.inputs;
#pragma unroll 1
  for (int column = 0; column < columns; ++column, a += kTile) {
    Vec4 even[kPrecisions], odd[kPrecisions];  // of all precisions, to wait for memory once
    const T* from = a;
#pragma unroll
    for (int i = 0; i < kPrecisions; ++i, from += static_cast<size_t>(p.rank) * p.inputs) {
      even[i] = odd[i] = Vec4{{0, 0, 0, 0}};
      if (inside && i < p.precisions) {
        even[i] = ptx::load_readonly(from);
        odd[i] = ptx::load_readonly(from + p.inputs);
      }
    }
#pragma unroll
    for (int i = 0; i < kPrecisions; ++i) {
      if (i == p.precisions) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        words[k * 32 * 4] = (even[i].w[k] & 0xffff) | odd[i].w[k] << 16;
        words[(k * 32 + 4) * 4] = even[i].w[k] >> 16 | (odd[i].w[k] & 0xffff0000u);
      }
      words += 16 * 32 * 4;
    }
  }
}

// Past the end the last row stands in: its dW is taken as 0, and it is not stored.
JN_DEVICE int existing(int end, int row) { return row < end ? row : end - 1; }

// Start fetching B_p of 16 rows: [precision][row][4 vectors], swapped within a row: ldmatrix then meets no bank twice.
JN_HOST_DEVICE int lora_b_place(int row, int vector) { return 4 * row + (vector ^ (row / 2 % 4)); }
template <class T>
JN_DEVICE void fetch_lora_b(const Params& p, const Weight& m, Vec4* stage, int first_row, int end, int lane) {
  const T* b = static_cast<const T*>(m.lora_b);
  const int vector = lane % 4;
  const bool inside = 8 * vector < p.rank;
#pragma unroll 1
  for (int precision = 0; precision < p.precisions; ++precision) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      const T* from = b + static_cast<size_t>(existing(end, first_row + row)) * p.rank + (inside ? 8 * vector : 0);
      ptx::cp_async16(stage + lora_b_place(row, vector), from, inside);
    }
    stage += 64;
    b += static_cast<size_t>(m.rows) * p.rank;
  }
}

// The clip ratios of a tile: [precision][group][16 rows].
template <int GROUP>
JN_DEVICE void fetch_ratios(const Params& p, const Weight& m, float* stage, int first_row, int end, int input,
                            int lane) {
  constexpr int kGroups = kTile / GROUP;
  const int groups = p.inputs / GROUP;
  const float* from = m.clip + static_cast<size_t>(existing(end, first_row + lane % 16)) * groups + input / GROUP;
#pragma unroll 1
  for (int i = lane / 16; i < p.precisions * kGroups; i += 2)
    ptx::cp_async4(stage + i * 16 + lane % 16, from + static_cast<size_t>(i / kGroups) * m.rows * groups + i % kGroups);
}

// This lane's eight pieces of 16 rows by 128 columns of W and of dW.
template <class T, bool REDUCE>
JN_DEVICE void fetch_tile(const Params& p, const Weight& m, Vec4* stage, int first_row, int end, int input, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + lane / 4 + 8 * h, r = existing(end, row);
    const T* w = static_cast<const T*>(m.weight) + static_cast<size_t>(r) * p.inputs + input + 8 * (lane % 4);
    const T* g = static_cast<const T*>(p.grad) + static_cast<size_t>(r - p.begin) * p.inputs + input + 8 * (lane % 4);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      Vec4* to = stage + (4 * h + c) * 32 + lane;
      ptx::cp_async16(to, w + 32 * c, true);
      if (REDUCE) ptx::cp_async16(to + 8 * 32, g + 32 * c, row < end);
    }
  }
}

// The pieces as A operands, rows g and g + 8 of n-tile j.
JN_DEVICE void operands(const Params& p, const Vec4* stage, uint32_t (&w)[16][2], int lane) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const Vec4 low = stage[c * 32 + lane], high = stage[(4 + c) * 32 + lane];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      w[4 * c + k][0] = ptx::xor_here(low.w[k], p.nil);
      w[4 * c + k][1] = ptx::xor_here(high.w[k], p.nil);
    }
  }
}

template <class T, int GROUP, bool CLIP, bool REDUCE>
__global__ void __launch_bounds__(kThreads, 1) mix_kernel(const __grid_constant__ Params p) {
  JN_DYNAMIC_SHARED(shared);
  constexpr int kGroups = kTile / GROUP, kTilesPerGroup = 16 / kGroups;  // groups per tile, n-tiles per group
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  using At = Layout<kGroups, CLIP, REDUCE>;
  Vec4* fragments = reinterpret_cast<Vec4*>(shared);
  unsigned char* own = shared + fragment_bytes(p.columns, p.precisions) + warp * At::kBytes;
  Vec4* mine = reinterpret_cast<Vec4*>(own);
  Vec4* lora_b = reinterpret_cast<Vec4*>(own + At::kLoraB);         // [which][precision][64]
  float* ratios = reinterpret_cast<float*>(own + At::kRatios);      // [tile % 2][precision][group][16 rows]
  float* sums = reinterpret_cast<float*>(own + At::kSums) + lane;   // [precision][lane]

  const int g = lane / 4, t = lane % 4;
  // The identity as a B operand: lane 4 g + t holds (2 t == g, 2 t + 1 == g).
  const uint32_t one = ptx::pack2<T>(g == 2 * t ? 1.0f : 0.0f, g == 2 * t + 1 ? 1.0f : 0.0f);
  const uint32_t scale2 = ptx::pack2<T>(p.scaling, p.scaling);
  if (REDUCE)
    for (int precision = 0; precision < p.precisions; ++precision) sums[precision * 32] = 0;

  // A unit of work is kWarps row tiles times p.columns; a block's follow each other down the groups of columns of a
  // weight, then of the next one.
  const long long units = p.all_units;
  const int until = static_cast<int>(units * (blockIdx.x + 1) / gridDim.x);
#pragma unroll 1
  for (int unit = static_cast<int>(units * blockIdx.x / gridDim.x); unit < until;) {
    int which = 0, own_unit = unit;
    if (!REDUCE)
      while (own_unit >= p.units[which]) own_unit -= p.units[which++];
    const Weight& m = p.of[which];
    const int begin = REDUCE ? p.begin : 0, end = REDUCE ? p.end : static_cast<int>(m.rows);
    const int tiles = (end - begin + kRows - 1) / kRows, chunks = (tiles + kWarps - 1) / kWarps;
    const int group = own_unit / chunks, from = own_unit % chunks, to = min_of(chunks, from + until - unit);
    const int first_column = group * p.columns, columns = min_of(p.columns, p.inputs / kTile - first_column);
    const int first = from * kWarps + warp, last = min_of(to * kWarps, tiles);
    const int steps = first < last ? (last - first + kWarps - 1) / kWarps * columns : 0;
    unit += to - from;

    int column = 0, row = begin + first * kRows, buffer = 0;  // of the tile to fetch; buffer: of its B
    const auto fetch = [&](int step) {
      const int input = (first_column + column) * kTile;
      fetch_tile<T, REDUCE>(p, m, mine, row, end, input, lane);
      if (column == 0) fetch_lora_b<T>(p, m, lora_b + (buffer ^= 1) * At::kBuffer, row, end, lane);
      if (CLIP) fetch_ratios<GROUP>(p, m, ratios + step % 2 * At::kRatioBuffer, row, end, input, lane);
      ptx::cp_async_commit();
    };
    ptx::sync_threads();  // all warps are done with the columns before, all lanes with their ratios
    if (steps) fetch(0);
    load_lora_a<T>(p, m, fragments, first_column, columns);
    ptx::sync_threads();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<0>();
      ptx::sync_warp();  // B and the ratios come from all lanes, W only from this one
      uint32_t w[16][2];
      operands(p, mine, w, lane);
      float mixed[16][4];  // W~ (or dW): [j][2 h + e]: row g + 8 h, input 32 (j / 4) + 8 t + 2 (j % 4) + e
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) mixed[j][k] = 0;
      if (REDUCE) {
        uint32_t grad[16][2];
        operands(p, mine + 8 * 32, grad, lane);
#pragma unroll
        for (int j = 0; j < 16; ++j) ptx::mma_m16n8k8<T>(mixed[j], grad[j][0], grad[j][1], one);
      }
      const int at_row = row, at_input = (first_column + column) * kTile;
      const float* ratio = ratios + step % 2 * At::kRatioBuffer + g;
      const Vec4* a = fragments + column * p.precisions * 16 * 32 + lane;
      const Vec4* b = lora_b + buffer * At::kBuffer;
      if (++column == columns) {
        column = 0;
        row += kWarps * kRows;
      }
      if (step + 1 < steps) fetch(step + 1);  // the tile has left shared memory by now
#pragma unroll 1
      for (int precision = 0; precision < p.precisions; ++precision, a += 16 * 32, b += 64) {
        float x[16][4];
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          x[j][0] = x[j][1] = x[j][2] = x[j][3] = 0;
          ptx::mma_m16n8k8<T>(x[j], w[j][0], w[j][1], one);
        }
        uint32_t scaled[2][4];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          ptx::ldmatrix4(scaled[k], b + lora_b_place(lane % 16, 2 * k + lane / 16));
#pragma unroll
          for (int i = 0; i < 4; ++i) scaled[k][i] = ptx::fma2<T>(scaled[k][i], scale2, 0);
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const Vec4 v = a[j * 32];
          ptx::mma_m16n8k16<T>(x[j], scaled[0], v.w[0], v.w[1]);
          ptx::mma_m16n8k16<T>(x[j], scaled[1], v.w[2], v.w[3]);
        }
        const float high = kMagic + p.high[precision], low = kMagic - p.high[precision] - 1;
        const float inverse = p.inverse[precision], more = p.rest[precision], pi = p.probs[precision];
        float total = 0;
        float scale[2][kGroups];
        bool coarse = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int of = 0; of < kGroups; ++of) {
            const int from = 2 * of * kTilesPerGroup, to = from + 2 * kTilesPerGroup;
            float most[4];  // four chains, as each waits for itself
#pragma unroll
            for (int i = from; i < to; ++i) {
              const float v = fabsf(x[i / 2][2 * h + i % 2]);
              most[i % 4] = i < from + 4 ? v : ptx::larger(most[i % 4], v);
            }
            float unit = ptx::larger(ptx::larger(most[0], most[1]), ptx::larger(most[2], most[3]));
            unit = ptx::larger(unit, ptx::shuffle_xor(unit, 1));
            unit = ptx::larger(unit, ptx::shuffle_xor(unit, 2));
            if (CLIP) unit *= ratio[(precision * kGroups + of) * 16 + 8 * h];
            const float s = ptx::to_float(ptx::from_float<T>(fmaf(unit, inverse, unit * more)));
            scale[h][of] = s < kTiny ? 1.0f : s;
            coarse |= s < 0x1p-14f;
          }
        }
        // Without ratios |v / s| <= (2^b - 1)/2 (1 + 2^-8), never below the lowest level; but fp16 scales below 2^-14
        // are rounded to multiples of 2^-24. Then v is clamped instead of 64 levels, all the time.
        if (!CLIP && std::is_same_v<T, F16> && coarse) {
#pragma unroll
          for (int i = 0; i < 64; ++i) {
            float& v = x[i / 4][i % 4];
            v = ptx::larger(v, (low - kMagic) * scale[i % 4 / 2][i / 4 / kTilesPerGroup]);
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int of = 0; of < kGroups; ++of) {
            const float s = scale[h][of], r = ptx::reciprocal(s), rest = fmaf(-s, r, 1.0f) * r, weight = pi * s;
            float dot[2] = {0, 0};
#pragma unroll
            for (int j = of * kTilesPerGroup; j < (of + 1) * kTilesPerGroup; ++j) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const float v = x[j][2 * h + e];
                float level = ptx::smaller(fmaf(v, r, v * rest) + kMagic, high);
                if (CLIP) level = ptx::larger(level, low);
                if (REDUCE) dot[e] = fmaf(level - kMagic, mixed[j][2 * h + e], dot[e]);
                else mixed[j][2 * h + e] = fmaf(level - kMagic, weight, mixed[j][2 * h + e]);
              }
            }
            if (REDUCE) total = fmaf(dot[0] + dot[1], s, total);
          }
        }
        if (REDUCE) sums[precision * 32] += total;
      }

      if constexpr (!REDUCE) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = at_row + g + 8 * h;
          if (at >= end) continue;
          T* out = static_cast<T*>(m.out) + static_cast<size_t>(at) * p.inputs + at_input + 8 * t;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            Vec4 v;
#pragma unroll
            for (int k = 0; k < 4; ++k) v.w[k] = ptx::pack2<T>(mixed[4 * c + k][2 * h], mixed[4 * c + k][2 * h + 1]);
            *reinterpret_cast<Vec4*>(out + 32 * c) = v;
          }
        }
      }
    }
  }
  if constexpr (REDUCE) {
    const int self = blockIdx.x * kWarps + warp;
    for (int precision = 0; precision < p.precisions; ++precision) {
      float v = sums[precision * 32];
#pragma unroll
      for (int m = 16; m; m /= 2) v += ptx::shuffle_xor(v, m);
      if (lane == 0) p.partial[self * p.precisions + precision] = v;
    }
  }
}

template <class T, int GROUP, bool CLIP, bool REDUCE> int run(const Params& p, int blocks, cudaStream_t stream) {
  const size_t bytes = fragment_bytes(p.columns, p.precisions) + kWarps * Layout<kTile / GROUP, CLIP, REDUCE>::kBytes;
  return launch(mix_kernel<T, GROUP, CLIP, REDUCE>, dim3(blocks), dim3(kThreads), bytes, stream, false, p);
}

}  // namespace

int quant_lora_mix(const MixArgs& a, cudaStream_t stream) {
  if (a.precisions < 1 || a.precisions > kPrecisions || a.rank < 8 || a.rank > 32 || a.rank % 8 || a.inputs % kTile ||
      a.columns < 1 || a.blocks < 1 || a.inputs == 0 || a.count < 1 || a.count > kMost)
    return kBadArgument;
  Params p{{}, {}, 0, a.grad, a.probs, a.partial, a.begin, a.end, a.inputs, a.rank, a.precisions, a.columns, a.scaling, 0,
           {}, {}, {}};
  std::memcpy(p.of, a.weights, a.count * sizeof(Weight));
  const int groups = (a.inputs / kTile + a.columns - 1) / a.columns;
  for (int i = 0; i < a.count; ++i) {
    const Weight& w = p.of[i];
    if (w.rows < 1 || (a.grad && i) || !w.clip != !p.of[0].clip) return kBadArgument;
    if (!aligned(w.weight, w.lora_a, w.lora_b, a.grad, w.out)) return kMisaligned;
    const int tiles = static_cast<int>(((a.grad ? a.end - a.begin : w.rows) + kRows - 1) / kRows);
    p.all_units += p.units[i] = groups * ((tiles + kWarps - 1) / kWarps);
  }
  if (a.grad && (a.begin < 0 || a.begin >= a.end || a.end > p.of[0].rows)) return kBadArgument;
  for (int i = 0; i < a.precisions; ++i) {
    const int bits = a.bits >> (8 * i) & 255;
    const double divisor = ((1 << bits) - 1) / 2.0;
    p.high[i] = static_cast<float>((1 << (bits - 1)) - 1);
    p.inverse[i] = static_cast<float>(1 / divisor);
    p.rest[i] = static_cast<float>(1 / divisor - p.inverse[i]);
  }
  return dispatch([&](auto type, auto group, auto clip, auto reduce) {
    return run<Half<type>, group, clip != 0, reduce != 0>(p, a.blocks, stream);
  }, Type{a.dtype}, OneOf<32, 64, 128>{a.group_size}, OneOf<0, 1>{p.of[0].clip != nullptr},
     OneOf<0, 1>{p.grad != nullptr});
}
JN_EXPORT(quant_lora_mix);

}  // namespace jointnas
