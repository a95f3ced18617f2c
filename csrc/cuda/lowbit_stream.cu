// Low-bit GEMM for few tokens (decode): the cost is reading the weights once, so each warp streams its own tiles
// through a private cp.async ring and never waits for another warp until the final sum.
//
// Weights are the A operand (16 rows per mma), tokens the B operand (8 per mma), so one token wastes no weight bytes.
// A warp owns 64 rows (4 tiles) and every warps-th group of 128 inputs of its block's share. Per group the tensor
// cores sum in fp32 (or exactly in int32), then one fma per output applies the scale: weights are never rounded to q*s.
#include <type_traits>

#include "cuda_ops.h"
#include "lowbit.cuh"
#include "lowbit_finish.cuh"

namespace jointnas {
namespace {

constexpr int kStrip = 4;  // tiles per warp: token fragments are loaded once per 64 rows

// Dequantising keeps the issue slots busy, so 4 warps per scheduler where registers and shared memory allow.
template <int BITS, int NT> constexpr int kWarps = BITS == 8 || NT > 1 ? 8 : 16;
// Tiles multiplied together, so that chains of dependent products overlap.
template <int NT> constexpr int kTogether = NT < 4 ? 2 : 1;
template <int BITS> constexpr int kTileBytes = BITS * 256;
template <int BITS> constexpr int kStageBytes = kStrip * (kTileBytes<BITS> + 32);  // weights, then 16 scales per tile
// 67 KB or more on their way while a group is computed: bandwidth x latency is 26 KB per SM at 4.3 TB/s and 0.8 us
template <int BITS, int NT> constexpr int kStages = 128 / (BITS * kWarps<BITS, NT>);
constexpr int kSumPitch = 64 + 4;  // floats per token in the final sum; +4 keeps the 4 token rows of a store apart

template <int BITS, int NT> constexpr size_t shared_bytes() {
  const size_t ring = size_t(kWarps<BITS, NT>) * kStages<BITS, NT> * kStageBytes<BITS>;
  const size_t sum = size_t(kWarps<BITS, NT>) * NT * 8 * kSumPitch * 4;
  return ring > sum ? ring : sum;
}

// Tokens and tiles past the end are read as copies of the last one; their results are not stored.

// 16-bit activations: T is F16 or BF16.
template <class T, int BITS, int NT> struct HalfMath {
  using Sum = float;
  using Words = uint32_t[kTogether<NT>][2 * BITS];
  using Sums = float[kTogether<NT>][NT][4];
  Vec4 x[NT][4];  // [token tile][i]: inputs 32i + 8t .. + 7 of token g

  JN_DEVICE void load(const JnLowbitArgs& p, int first_token, int group, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = min_of(first_token + 8 * n + lane / 4, p.tokens - 1);
      const T* row = static_cast<const T*>(p.x) + size_t(token) * p.inputs + group * kGroup + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = ptx::load_readonly(row + 32 * i);
    }
  }

  // sum[r][n] = tile r (words w[r]) times the tokens
  template <int STEP> JN_DEVICE void step(const Words& w, Sums& sum) const {
    constexpr int per_word = 8 / BITS, f0 = 2 * STEP, f1 = f0 + 1;
#pragma unroll
    for (int r = 0; r < kTogether<NT>; ++r) {
      const uint32_t w0 = w[r][f0 / per_word], w1 = w[r][f1 / per_word];
      const uint32_t a[4] = {dequant<T, BITS, f0 % per_word, 0>(w0), dequant<T, BITS, f1 % per_word, 0>(w1),
                             dequant<T, BITS, f0 % per_word, 1>(w0), dequant<T, BITS, f1 % per_word, 1>(w1)};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const Vec4& v = x[n][STEP / 2];
        ptx::mma_m16n8k16<T>(sum[r][n], a, v.w[STEP % 2 * 2], v.w[STEP % 2 * 2 + 1]);
      }
    }
  }
  JN_DEVICE void tiles(const Words& w, Sums& sum, const int (&)[NT][2]) const {
    step<0>(w, sum); step<1>(w, sum); step<2>(w, sum); step<3>(w, sum);
    step<4>(w, sum); step<5>(w, sum); step<6>(w, sum); step<7>(w, sum);
  }
};

// int8 activations: sums are exact integers, times 2^(8-BITS).
template <int BITS, int NT> struct IntMath {
  using Sum = int;
  using Words = uint32_t[kTogether<NT>][2 * BITS];
  using Sums = int[kTogether<NT>][NT][4];
  Vec4 x[NT][2];  // lane t's 32 bytes of the group, token g

  JN_DEVICE void load(const JnLowbitArgs& p, int first_token, int group, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = min_of(first_token + 8 * n + lane / 4, p.tokens - 1);
      const int8_t* row = static_cast<const int8_t*>(p.x) + size_t(token) * p.inputs + group * kGroup + lane % 4 * 32;
#pragma unroll
      for (int i = 0; i < 2; ++i) x[n][i] = ptx::load_readonly(row + 16 * i);
    }
  }

  template <int I>
  JN_DEVICE void step(const Words& w, Sums& sum, int (&ones)[kTogether<NT>][4]) const {
    constexpr int n8 = 8 / BITS, f = 4 * I;
#pragma unroll
    for (int r = 0; r < kTogether<NT>; ++r) {
      const uint32_t a[4] = {
          spread<BITS, f % n8>(w[r][f / n8]), spread<BITS, (f + 1) % n8>(w[r][(f + 1) / n8]),
          spread<BITS, (f + 2) % n8>(w[r][(f + 2) / n8]), spread<BITS, (f + 3) % n8>(w[r][(f + 3) / n8])};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const Vec4& v = x[n][I / 2];
        ptx::mma_m16n8k32_s8(sum[r][n], a, v.w[I % 2 * 2], v.w[I % 2 * 2 + 1]);
      }
      ptx::mma_m16n8k32_s8(ones[r], a, 0x01010101u, 0x01010101u);  // row sums of q, for the zero points
    }
  }
  JN_DEVICE void tiles(const Words& w, Sums& sum, const int (&zero)[NT][2]) const {
    int ones[kTogether<NT>][4] = {};
    step<0>(w, sum, ones); step<1>(w, sum, ones); step<2>(w, sum, ones); step<3>(w, sum, ones);
#pragma unroll
    for (int r = 0; r < kTogether<NT>; ++r)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][n][c] -= zero[n][c % 2] * ones[r][c / 2 * 2];
  }
};

template <class T, class Math, int BITS, int NT>
__global__ void __launch_bounds__(kWarps<BITS, NT> * 32, 1) stream_kernel(const JnLowbitArgs p) {
  JN_DYNAMIC_SHARED(shared);
  constexpr int warps = kWarps<BITS, NT>, stages = kStages<BITS, NT>;
  constexpr int tile_bytes = kTileBytes<BITS>, stage_bytes = kStageBytes<BITS>;
  constexpr bool quantized = std::is_same_v<typename Math::Sum, int>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % p.warp_rows, warp_k = warp / p.warp_rows, k_warps = warps / p.warp_rows;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows, groups = p.inputs / kGroup;
  const int first_tile = (blockIdx.x * p.warp_rows + warp_row) * kStrip;
  const int first_token = blockIdx.z * NT * 8;
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
  int zero[NT][2] = {};
  if constexpr (quantized) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) zero[n][c] = p.act_zero[min_of(first_token + 8 * n + lane % 4 * 2 + c, p.tokens - 1)];
  }
  int stage = 0;
  for (int group = begin; group < end; group += k_warps) {
    Math now;
    now.load(p, first_token, group, lane);  // in flight while the weights are waited for
    ptx::cp_async_wait<stages - 2>();
    ptx::sync_warp();  // scales were copied by 8 lanes; and all lanes are done with the stage fetched into next
    fetch(group + (stages - 1) * k_warps, (stage + stages - 1) % stages);
    const unsigned char* src = ring + stage * stage_bytes;
    const T* scales = reinterpret_cast<const T*>(src - lane * 16 + kStrip * tile_bytes);
#pragma unroll
    for (int first = 0; first < kStrip; first += kTogether<NT>) {
      typename Math::Words w;
#pragma unroll
      for (int r = 0; r < kTogether<NT>; ++r)
#pragma unroll
        for (int v = 0; v < BITS / 2; ++v) {
          const Vec4 u = *reinterpret_cast<const Vec4*>(src + (first + r) * tile_bytes + v * 512);
#pragma unroll
          for (int j = 0; j < 4; ++j) w[r][4 * v + j] = u.w[j];
        }
      typename Math::Sums sum = {};
      now.tiles(w, sum, zero);
#pragma unroll
      for (int r = 0; r < kTogether<NT>; ++r) {
        const T* s = scales + (first + r) * kTileRows + lane / 4 * 2;
        const float low = ptx::to_float(s[0]), high = ptx::to_float(s[1]);  // rows g, g + 8
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) acc[first + r][n][c] += static_cast<float>(sum[r][n][c]) * (c < 2 ? low : high);
      }
    }
    stage = (stage + 1) % stages;
  }

  // Sum over the block's k-warps in shared memory, always in the same order.
  ptx::cp_async_wait<0>();
  ptx::sync_threads();
  float* sums = reinterpret_cast<float*>(shared);  // [warp][token][row]
#pragma unroll
  for (int r = 0; r < kStrip; ++r)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = 8 * n + lane % 4 * 2 + c % 2, row = 16 * r + lane / 4 + c / 2 * 8;
        sums[(warp * NT * 8 + token) * kSumPitch + row] = acc[r][n][c];
      }
  ptx::sync_threads();

  finish_block<T, quantized, BITS>(p, warps * 32, blockIdx.x * p.warp_rows * 64, p.warp_rows * 64, first_token, NT * 8,
                                   shared, [&](int token, int row) {
    float v = 0;
    for (int k = 0; k < k_warps; ++k)
      v += sums[((k * p.warp_rows + row / 64) * NT * 8 + token) * kSumPitch + row % 64];
    return v;
  });
}

template <class T, int BITS, int NT> int run(const JnLowbitArgs& p, cudaStream_t stream) {
  const dim3 grid((p.rows + 64 * p.warp_rows - 1) / (64 * p.warp_rows), p.splits, (p.tokens + 8 * NT - 1) / (8 * NT));
  constexpr int threads = kWarps<BITS, NT> * 32;
  if (p.act_scale)
    return launch(stream_kernel<T, IntMath<BITS, NT>, BITS, NT>, grid, dim3(threads), shared_bytes<BITS, NT>(),
                  stream, p.early != 0, p);
  return launch(stream_kernel<T, HalfMath<T, BITS, NT>, BITS, NT>, grid, dim3(threads), shared_bytes<BITS, NT>(),
                stream, p.early != 0, p);
}
template <class T, int BITS> int run_tiles(const JnLowbitArgs& p, cudaStream_t stream) {
  switch (p.token_tiles) {
    case 1: return run<T, BITS, 1>(p, stream);
    case 2: return run<T, BITS, 2>(p, stream);
    case 4: return run<T, BITS, 4>(p, stream);
    default: return 1;  // cudaErrorInvalidValue
  }
}
template <class T> int run_bits(const JnLowbitArgs& p, cudaStream_t stream) {
  switch (p.w_bits) {
    case 2: return run_tiles<T, 2>(p, stream);
    case 4: return run_tiles<T, 4>(p, stream);
    case 8: return run_tiles<T, 8>(p, stream);
    default: return 1;
  }
}

}  // namespace
}  // namespace jointnas

int jn_lowbit_stream(const JnLowbitArgs* args, void* stream) {
  const JnLowbitArgs& p = *args;
  const bool strips = p.warp_rows == 1 || p.warp_rows == 2 || p.warp_rows == 4 || p.warp_rows == 8;
  if (p.inputs % jointnas::kGroup || !strips || p.splits < 1 || p.tokens < 1 || p.rows < 1) return 1;
  if (p.splits > 1 && !(p.partial && p.locks)) return 1;
  auto s = static_cast<cudaStream_t>(stream);
  if (p.dtype == JN_F16) return jointnas::run_bits<jointnas::F16>(p, s);
  if (p.dtype == JN_BF16) return jointnas::run_bits<jointnas::BF16>(p, s);
  return 1;
}
