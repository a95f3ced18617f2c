// Low-bit GEMM for few tokens (decode): the cost is reading the weights once, so each warp streams its own tiles
// through a private cp.async ring and never waits for another warp until the final sum.
//
// Weights are the A operand (16 rows per mma), tokens the B operand (8 columns per mma), so one token wastes no weight
// bytes. A warp owns 64 rows (4 tiles) and every warps-th group of 128 inputs of its block's share. Per group the tensor
// cores sum (in fp32, or exactly in int32), then one fma per output applies the scale: weights are never rounded to q*s.
//
// What a lane does with a tile's words is the Math class: lowbit_stream.cu has 16-bit and 8-bit activations,
// lowbit_bitplane.cu bit-planes. A Math has
//   kWarps     warps per block; kTogether: tiles multiplied together, so that chains of dependent products overlap
//   kColumns   columns of B per token
//   Sum        type of a group's sums, which start at kNothing<Sum>; kUnit: what they are to be multiplied with at the end
//   load(p, first token, group, lane)   the tokens' part of a group, into registers
//   tiles(words, sums)                  sums of kTogether tiles, all columns
//   combine(column in token)            factor of a column in its token's result
#pragma once
#include "cuda/lowbit.cuh"
#include "cuda/lowbit_finish.cuh"

namespace jointnas {

constexpr int kStrip = 4;          // tiles per warp: token fragments are loaded once per 64 rows
constexpr int kSumPitch = 64 + 4;  // floats per column in the final sum; +4 keeps the 4 columns of a store apart

template <class Math, int BITS, int NT> struct StreamShape {
  static constexpr int tile_bytes = BITS * 256;
  static constexpr int stage_bytes = kStrip * (tile_bytes + 32);  // weights, then 16 scales per tile
  // 67 KB or more on their way while a group is computed: bandwidth x latency is 26 KB per SM at 4.3 TB/s and 0.8 us
  static constexpr int stages = 128 / (BITS * Math::kWarps);
  static constexpr int ring = Math::kWarps * stages * stage_bytes;
  static constexpr int sums = Math::kWarps * NT * 8 * kSumPitch * 4;
  static constexpr int bytes = ring > sums ? ring : sums;
};

template <class T, class Math, int BITS, int NT>
__global__ void __launch_bounds__(Math::kWarps * 32, 1) stream_kernel(const LowbitArgs p) {
  JN_DYNAMIC_SHARED(shared);
  using S = StreamShape<Math, BITS, NT>;
  constexpr int warps = Math::kWarps, stages = S::stages, tile_bytes = S::tile_bytes, stage_bytes = S::stage_bytes;
  constexpr int together = Math::kTogether, block_tokens = NT * 8 / Math::kColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % p.warp_rows, warp_k = warp / p.warp_rows, k_warps = warps / p.warp_rows;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows, groups = p.inputs / kGroup;
  const int first_tile = (blockIdx.z * p.warp_rows + warp_row) * kStrip;
  const int first_token = blockIdx.x * block_tokens;
  const int begin = groups * blockIdx.y / p.splits + warp_k, end = groups * (blockIdx.y + 1) / p.splits;

  unsigned char* ring = shared + size_t(warp) * stages * stage_bytes + lane * 16;
  uint32_t tile_at[kStrip];  // in vectors of 16 bytes
#pragma unroll
  for (int r = 0; r < kStrip; ++r)
    tile_at[r] = static_cast<uint32_t>(min_of(first_tile + r, tiles - 1)) * groups * (tile_bytes / 16) + lane;
  const uint32_t scale_at = min_of(first_tile + lane % 8 / 2, tiles - 1) * 2 + lane % 2;

  auto fetch = [&](int group, int stage) {
    if (group < end) {
      unsigned char* dst = ring + stage * stage_bytes;
#pragma unroll
      for (int r = 0; r < kStrip; ++r) {
        const Vec4* src = static_cast<const Vec4*>(p.weight) + (tile_at[r] + group * (tile_bytes / 16));
#pragma unroll
        for (int v = 0; v < BITS / 2; ++v) ptx::cp_async16(dst + r * tile_bytes + v * 512, src + v * 32);
      }
      if (lane < kStrip * 2) {
        const Vec4* src = static_cast<const Vec4*>(p.scale) + (scale_at + static_cast<uint32_t>(group) * tiles * 2);
        ptx::cp_async16(dst + kStrip * tile_bytes, src);
      }
    }
    ptx::cp_async_commit();
  };

  ptx::launch_dependents();
#pragma unroll
  for (int s = 0; s < stages - 1; ++s) fetch(begin + s * k_warps, s);
  ptx::wait_dependencies();  // everything below may depend on the previous kernel; the weights do not

  float acc[kStrip][NT][4] = {};
  Math math;
  int stage = 0;
  for (int group = begin; group < end; group += k_warps) {
    math.load(p, first_token, group, lane);  // in flight while the weights are waited for
    ptx::cp_async_wait<stages - 2>();
    ptx::sync_warp();  // scales were copied by 8 lanes; and all lanes are done with the stage fetched into next
    fetch(group + (stages - 1) * k_warps, (stage + stages - 1) % stages);
    const unsigned char* src = ring + stage * stage_bytes;
    const T* scales = reinterpret_cast<const T*>(src - lane * 16 + kStrip * tile_bytes);
#pragma unroll
    for (int first = 0; first < kStrip; first += together) {
      uint32_t w[together][2 * BITS];
#pragma unroll
      for (int r = 0; r < together; ++r)
#pragma unroll
        for (int v = 0; v < BITS / 2; ++v) {
          const Vec4 u = *reinterpret_cast<const Vec4*>(src + (first + r) * tile_bytes + v * 512);
#pragma unroll
          for (int j = 0; j < 4; ++j) w[r][4 * v + j] = u.w[j];
        }
      typename Math::Sum sum[together][NT][4];
#pragma unroll
      for (int r = 0; r < together; ++r)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][n][c] = kNothing<typename Math::Sum>;
      math.tiles(w, sum);
#pragma unroll
      for (int r = 0; r < together; ++r) {
        const T* s = scales + (first + r) * kTileRows + lane / 4 * 2;
        const float low = ptx::to_float(s[0]), high = ptx::to_float(s[1]);  // rows g, g + 8
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) acc[first + r][n][c] += sum_of(sum[r][n][c]) * (c < 2 ? low : high);
      }
    }
    stage = (stage + 1) % stages;
  }

  // Sum over the block's k-warps in shared memory, always in the same order.
  ptx::cp_async_wait<0>();
  ptx::sync_threads();
  float* sums = reinterpret_cast<float*>(shared);  // [warp][column][row]
#pragma unroll
  for (int r = 0; r < kStrip; ++r)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = 8 * n + lane % 4 * 2 + c % 2, row = 16 * r + lane / 4 + c / 2 * 8;
        sums[(warp * NT * 8 + column) * kSumPitch + row] = acc[r][n][c];
      }
  ptx::sync_threads();

  const int block_rows = p.warp_rows * 64;
  finish_block<T>(p, Math::kUnit, warps * 32, blockIdx.z * block_rows, block_rows, first_token, block_tokens, shared,
                  [&](int token, int row) {
    float v = 0;
    for (int i = 0; i < k_warps; ++i)
#pragma unroll
      for (int c = 0; c < Math::kColumns; ++c) {
        const int column = token * Math::kColumns + c, warp_of = i * p.warp_rows + row / 64;
        v += Math::combine(c) * sums[(warp_of * NT * 8 + column) * kSumPitch + row % 64];
      }
    return v;
  });
}

template <class T, class Math, int BITS, int NT> int run_stream(const LowbitArgs& p, cudaStream_t stream) {
  constexpr int block_tokens = NT * 8 / Math::kColumns;
  const int block_rows = 64 * p.warp_rows;
  if (p.warp_rows < 1 || p.warp_rows > 8 || Math::kWarps % p.warp_rows) return kBadArgument;
  // Passes over the tokens first: those of the same weights run beside each other, so that memory is read once and L2
  // serves the others. (Rows first, weights larger than L2 were read from memory once per pass.)
  const dim3 grid((p.tokens + block_tokens - 1) / block_tokens, p.splits, (p.rows + block_rows - 1) / block_rows);
  if (!locked(p, grid)) return kBadArgument;
  constexpr size_t bytes = StreamShape<Math, BITS, NT>::bytes;
  return launch(stream_kernel<T, Math, BITS, NT>, grid, dim3(Math::kWarps * 32), bytes, stream, p.early != 0, p);
}

}  // namespace jointnas
