// W~ = sum_p probs[p] * Q_p(W + B'_p A_p) for half-type weights: one read of W, one write of W~, B' = scaling * B.
// And the same tiles for the arch step: sum(dW * Q_p) for every p, from W and some rows of dW. Of several weights with
// inputs and groups of their own in one launch, so that a transformer block needs one.
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

#include "cuda/quant_lora_mix.cuh"

namespace jointnas {

// W~ of every weight, or, if there is a `total`, sum(dW * Q_p) of them all.
struct MixArgs {
  const int64_t* weights;  // on the host, a Weight each
  int count;            // of them, at most kMost
  const float* probs;   // [P], P at most 4
  float* partial;       // [blocks, P] and
  float* total;         // [P]; only to sum
  int* arrived;         // 0, of blocks; 0 again behind the launch
  int rank, precisions;  // r, P
  int bits;             // bit width of precision p in byte p
  int dtype;
  int columns, blocks;  // 128-input tiles whose A a block keeps; blocks that share the work evenly
  float scaling;
};

namespace {

using namespace mix;

// Of every lane the sums of the whole launch: of a warp, of a block, and by the last block of all, in one order.
JN_DEVICE void add_up(const Params& p, const float* sums, unsigned char* shared, int lane, int warp) {
  float* block = reinterpret_cast<float*>(shared);  // [warp][precision]; no warp reads A any more
  int* last = reinterpret_cast<int*>(block + kWarps * kPrecisions);
  ptx::sync_threads();
  for (int precision = 0; precision < p.precisions; ++precision) {
    float v = sums[precision * 32];
#pragma unroll
    for (int m = 16; m; m /= 2) v += ptx::shuffle_xor(v, m);
    if (lane == 0) block[warp * kPrecisions + precision] = v;
  }
  ptx::sync_threads();
  const int t = threadIdx.x;
  if (t < p.precisions) {
    float v = 0;
    for (int i = 0; i < kWarps; ++i) v += block[i * kPrecisions + t];
    p.partial[blockIdx.x * p.precisions + t] = v;
    ptx::fence_device();
  }
  ptx::sync_threads();
  if (t == 0) *last = ptx::atomic_add(p.arrived, 1) == static_cast<int>(gridDim.x) - 1;
  ptx::sync_threads();
  if (!*last) return;
  ptx::fence_device();
  if (t == 0) *p.arrived = 0;
  if (warp >= p.precisions) return;
  float v = 0;
  for (int i = lane; i < static_cast<int>(gridDim.x); i += 32) {
    float part[1];
    ptx::load_l2(p.partial + i * p.precisions + warp, part);
    v += part[0];
  }
#pragma unroll
  for (int m = 16; m; m /= 2) v += ptx::shuffle_xor(v, m);
  if (lane == 0) p.total[warp] = v;
}

template <int VALUE> using Constant = std::integral_constant<int, VALUE>;

// FINEST: the smallest group of the weights; others have 128. There is code for both: a weight of groups of 128 that
// took the maxima of 64 and then of both would need 594 instructions per precision and tile where it needs 562 (sm_90a).
template <class T, int FINEST, bool CLIP, bool REDUCE>
__global__ void __launch_bounds__(kThreads, 1) mix_kernel(const __grid_constant__ Params p) {
  JN_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  using At = Layout<kTile / FINEST, CLIP, REDUCE>;
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
    while (own_unit >= p.units[which]) own_unit -= p.units[which++];
    const Weight& m = p.of[which];
    const int begin = static_cast<int>(m.begin), end = static_cast<int>(m.end);
    const int tiles = (end - begin + kRows - 1) / kRows, chunks = (tiles + kWarps - 1) / kWarps;
    const int group = own_unit / chunks, from = own_unit % chunks, to = min_of(chunks, from + until - unit);
    const int first_column = group * p.columns;
    const int columns = min_of(p.columns, static_cast<int>(m.inputs) / kTile - first_column);
    const int first = from * kWarps + warp, last = min_of(to * kWarps, tiles);
    const int steps = first < last ? (last - first + kWarps - 1) / kWarps * columns : 0;
    unit += to - from;

    const auto work = [&](auto group_size) {
      constexpr int GROUP = decltype(group_size)::value;
      constexpr int kGroups = kTile / GROUP, kTilesPerGroup = 16 / kGroups;  // groups per tile, n-tiles per group
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
        [[maybe_unused]] const int at_row = row, at_input = (first_column + column) * kTile;
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
            T* out = static_cast<T*>(m.target) + static_cast<size_t>(at) * m.inputs + at_input + 8 * t;
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
    };
    if (FINEST == kTile || m.group == FINEST) work(Constant<FINEST>{});
    else if constexpr (FINEST != kTile) work(Constant<kTile>{});
  }
  if constexpr (REDUCE) add_up(p, sums, shared, lane, warp);
}

template <class T, int GROUP, bool CLIP, bool REDUCE> int run(const Params& p, int blocks, cudaStream_t stream) {
  const size_t bytes = fragment_bytes(p.columns, p.precisions) + kWarps * Layout<kTile / GROUP, CLIP, REDUCE>::kBytes;
  return launch(mix_kernel<T, GROUP, CLIP, REDUCE>, dim3(blocks), dim3(kThreads), bytes, stream, false, p);
}

}  // namespace

int quant_lora_mix(const MixArgs& a, cudaStream_t stream) {
  if (a.precisions < 1 || a.precisions > kPrecisions || a.rank < 8 || a.rank > 32 || a.rank % 8 || a.columns < 1 ||
      a.blocks < 1 || a.count < 1 || a.count > kMost)
    return kBadArgument;
  Params p{{}, {}, 0, a.probs, a.partial, a.total, a.arrived, a.rank, a.precisions, a.columns, a.scaling, 0, {}, {},
           {}};
  std::memcpy(p.of, a.weights, a.count * sizeof(Weight));
  int64_t finest = kTile;
  for (int i = 0; i < a.count; ++i) {
    const Weight& w = p.of[i];
    if (w.begin < 0 || w.begin >= w.end || w.end > w.rows || w.inputs < 1 || w.inputs % kTile ||
        (w.group != 32 && w.group != 64 && w.group != kTile) || !w.clip != !p.of[0].clip)
      return kBadArgument;
    if (!aligned(w.weight, w.lora_a, w.lora_b, w.target)) return kMisaligned;
    if (w.group < kTile) {
      if (finest < kTile && finest != w.group) return kBadArgument;
      finest = w.group;
    }
    const int tiles = static_cast<int>((w.end - w.begin + kRows - 1) / kRows);
    const int groups = static_cast<int>(w.inputs / kTile + a.columns - 1) / a.columns;
    p.all_units += p.units[i] = groups * ((tiles + kWarps - 1) / kWarps);
  }
  for (int i = 0; i < a.precisions; ++i) {
    const int bits = a.bits >> (8 * i) & 255;
    const double divisor = ((1 << bits) - 1) / 2.0;
    p.high[i] = static_cast<float>((1 << (bits - 1)) - 1);
    p.inverse[i] = static_cast<float>(1 / divisor);
    p.rest[i] = static_cast<float>(1 / divisor - p.inverse[i]);
  }
  return dispatch([&](auto type, auto group, auto clip, auto reduce) {
    return run<Half<type>, group, clip != 0, reduce != 0>(p, a.blocks, stream);
  }, Type{a.dtype}, OneOf<32, 64, 128>{static_cast<int>(finest)}, OneOf<0, 1>{p.of[0].clip != nullptr},
     OneOf<0, 1>{a.total != nullptr});
}
JN_EXPORT(quant_lora_mix);

}  // namespace jointnas
