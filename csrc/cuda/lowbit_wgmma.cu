// Low-bit GEMM for many tokens on sm_90a: as lowbit_tile.cu, with wgmma. Two warpgroups share 128 rows x N tokens; the
// weights go from shared memory through registers (dequantised once per block) straight into wgmma's A operand, tokens
// are its B operand in shared memory, so Y^T = W X^T. While one warpgroup scales its group sums the other multiplies.
//
// wgmma reads B in memory order, so tokens come in the order of the A registers (place_for_wgmma, act_quant_pack.cu).
// Zero points of the activations enter once, at the end, through the row sums of the dequantised weights.
#include <type_traits>

#include "cuda_ops.h"
#include "lowbit.cuh"
#include "lowbit_finish.cuh"
#include "wgmma.cuh"

namespace jointnas {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockTiles = 8;  // 128 rows, one tile per warp
constexpr int kSumPitch = kBlockTiles * kTileRows + 4;

template <int BITS, int N, int BYTES> struct Shape {
  static constexpr int token_bytes = N * kGroup * BYTES;
  static constexpr int weight_bytes = kBlockTiles * BITS * 256;
  static constexpr int stage_bytes = token_bytes + weight_bytes + 1024;  // 256 of scales; stages stay 1024-byte aligned
  static constexpr int fit = 200 * 1024 / stage_bytes;
  static constexpr int stages = fit > 4 ? 4 : fit;
  static constexpr int ring = stages * stage_bytes, sums = N * kSumPitch * 4;
  static constexpr int bytes = ring > sums ? ring : sums;
};

template <class T, int BITS, int N, bool QUANTIZED>
__global__ void __launch_bounds__(kThreads, 1) wgmma_kernel(const JnLowbitArgs p) {
#if defined(JN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  JN_DYNAMIC_SHARED(shared);
  constexpr int bytes = QUANTIZED ? 1 : 2;
  using S = Shape<BITS, N, bytes>;
  using Sum = std::conditional_t<QUANTIZED, int, float>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows, groups = p.inputs / kGroup;
  const int first_tile = blockIdx.x * kBlockTiles, first_token = blockIdx.z * N;
  const int begin = groups * blockIdx.y / p.splits, end = groups * (blockIdx.y + 1) / p.splits;

  // Rows and tokens past the end are copies of the last one; their results are not stored.
  auto fetch = [&](int group, int stage) {
    if (group < end) {
      unsigned char* dst = shared + stage * S::stage_bytes;
      constexpr int per_token = bytes * 8;  // vectors of 16 bytes, in segments of 8
#pragma unroll
      for (int j = 0; j < N * per_token / kThreads; ++j) {
        const int i = j * kThreads + threadIdx.x, token = i / per_token, segment = i % per_token / 8, v = i % 8;
        const int from = min_of(first_token + token, p.tokens - 1);
        const Vec4* src = static_cast<const Vec4*>(p.x) + (size_t(from) * groups + group) * per_token + segment * 8 + v;
        ptx::cp_async16(dst + segment * N * 128 + token * 128 + (v ^ token % 8) * 16, src);
      }
      dst += S::token_bytes;
      constexpr int per_tile = BITS * 16;
#pragma unroll
      for (int j = 0; j < kBlockTiles * per_tile / kThreads; ++j) {
        const int i = j * kThreads + threadIdx.x, tile = min_of(first_tile + i / per_tile, tiles - 1);
        const size_t at = (size_t(tile) * groups + group) * per_tile + i % per_tile;
        ptx::cp_async16(dst + i * 16, static_cast<const Vec4*>(p.weight) + at);
      }
      if (threadIdx.x < kBlockTiles * 2) {
        const int tile = min_of(first_tile + static_cast<int>(threadIdx.x) / 2, tiles - 1);
        const Vec4* src = static_cast<const Vec4*>(p.scale) + (size_t(group) * tiles + tile) * 2 + threadIdx.x % 2;
        ptx::cp_async16(dst + S::weight_bytes + threadIdx.x * 16, src);
      }
    }
    ptx::cp_async_commit();
  };

#pragma unroll
  for (int s = 0; s < S::stages - 1; ++s) fetch(begin + s, s);
  float acc[N / 2] = {};
  int stage = 0;
  for (int group = begin; group < end; ++group) {
    ptx::cp_async_wait<S::stages - 2>();
    ptx::fence_async_shared();
    ptx::sync_threads();
    fetch(group + S::stages - 1, (stage + S::stages - 1) % S::stages);
    const unsigned char* tokens = shared + stage * S::stage_bytes;
    const unsigned char* weights = tokens + S::token_bytes + warp * BITS * 256 + lane * 16;
    const T* scales = reinterpret_cast<const T*>(tokens + S::token_bytes + S::weight_bytes) + warp * kTileRows + 2 * g;
    const float low = ptx::to_float(scales[0]), high = ptx::to_float(scales[1]);  // rows g, g + 8
    uint32_t w[2 * BITS];
#pragma unroll
    for (int v = 0; v < BITS / 2; ++v) {
      const Vec4 u = *reinterpret_cast<const Vec4*>(weights + v * 512);
#pragma unroll
      for (int j = 0; j < 4; ++j) w[4 * v + j] = u.w[j];
    }
    Sum sum[N / 2];
    if constexpr (QUANTIZED) {
      uint32_t a[4][4];
      spread_tile<BITS>(w, a);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32_s8<N>(sum, a[i], tokens + i * 32, i > 0);
    } else {
      uint32_t a[8][4];
      dequant_tile<T, BITS>(w, a);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i) ptx::wgmma_m64k16<T, N>(sum, a[i], tokens + i / 4 * N * 128 + i % 4 * 32, i > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] += static_cast<float>(sum[i]) * (i % 4 < 2 ? low : high);
    stage = (stage + 1) % S::stages;
  }

  ptx::cp_async_wait<0>();
  ptx::sync_threads();
  float* sums = reinterpret_cast<float*>(shared);  // [token][row], so that stores to y are coalesced
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    sums[(i / 4 * 8 + 2 * t + i % 2) * kSumPitch + warp * kTileRows + g + i % 4 / 2 * 8] = acc[i];
  ptx::sync_threads();
  constexpr float unit = 1.0f / (1 << (8 - BITS));
  finish_block<T>(p, unit, kThreads, first_tile * kTileRows, kBlockTiles * kTileRows, first_token, N, shared,
                  [&](int token, int row) { return sums[token * kSumPitch + row]; });
#endif
}

template <class T, int BITS, int N, bool QUANTIZED> int run(const JnLowbitArgs& p, cudaStream_t stream) {
  using S = Shape<BITS, N, QUANTIZED ? 1 : 2>;
  const int block_rows = kBlockTiles * kTileRows;
  const dim3 grid((p.rows + block_rows - 1) / block_rows, p.splits, (p.tokens + N - 1) / N);
  return launch(wgmma_kernel<T, BITS, N, QUANTIZED>, grid, dim3(kThreads), S::bytes, stream, false, p);
}
template <class T, int BITS, int N> int run_quantized(const JnLowbitArgs& p, cudaStream_t stream) {
  return p.act_scale ? run<T, BITS, N, true>(p, stream) : run<T, BITS, N, false>(p, stream);
}
template <class T, int BITS> int run_tokens(const JnLowbitArgs& p, cudaStream_t stream) {
  if (p.token_tiles == 8) return run_quantized<T, BITS, 64>(p, stream);
  if (p.token_tiles == 16) return run_quantized<T, BITS, 128>(p, stream);
  return 1;  // cudaErrorInvalidValue
}
template <class T> int run_bits(const JnLowbitArgs& p, cudaStream_t stream) {
  switch (p.w_bits) {
    case 2: return run_tokens<T, 2>(p, stream);
    case 4: return run_tokens<T, 4>(p, stream);
    case 8: return run_tokens<T, 8>(p, stream);
    default: return 1;
  }
}

}  // namespace
}  // namespace jointnas

int jn_lowbit_wgmma(const JnLowbitArgs* args, void* stream) {
  const JnLowbitArgs& p = *args;
  if (p.inputs % jointnas::kGroup || p.splits < 1 || p.tokens < 1 || p.rows < 1) return 1;
  if (p.splits > 1 && !(p.partial && p.locks)) return 1;
  if (p.act_scale && !p.row_sum) return 1;
  if (jointnas::compute_capability() != 90) return 209;  // cudaErrorNoKernelImageForDevice
  auto s = static_cast<cudaStream_t>(stream);
  if (p.dtype == JN_F16) return jointnas::run_bits<jointnas::F16>(p, s);
  if (p.dtype == JN_BF16) return jointnas::run_bits<jointnas::BF16>(p, s);
  return 1;
}
