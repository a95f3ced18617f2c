// W{2,4,8}A8 for tokens between lowbit_stream and lowbit_int8 on sm_90a: as lowbit_tile.cu, with wgmma. Two warpgroups share 128 rows x N tokens; the
// weights go from shared memory through registers (dequantised once per block) straight into wgmma's A operand, tokens
// are its B operand in shared memory, so Y^T = W X^T. While one warpgroup scales its group sums the other multiplies.
//
// wgmma reads B in memory order, so tokens come in the order of the A registers (place_for_wgmma, lowbit.cuh).
// Zero points of the activations enter once, at the end, through the row sums of the dequantised weights.
#include "cuda/lowbit.cuh"
#include "cuda/lowbit_finish.cuh"
#include "cuda/wgmma.cuh"

namespace jointnas {
namespace {

constexpr int kThreads = 256;

template <int BITS, int N> struct Shape {
  static constexpr int token_bytes = N * kGroup;
  static constexpr int weight_bytes = kBlockTiles * BITS * 256;
  static constexpr int stage_bytes = token_bytes + weight_bytes + 1024;  // 256 of scales; stages stay 1024-byte aligned
  static constexpr int fit = 200 * 1024 / stage_bytes;
  static constexpr int stages = fit > 4 ? 4 : fit;
  static_assert(stages >= 3);
  static constexpr int ring = stages * stage_bytes, sums = N * kPitch * 4;
  static constexpr int bytes = ring > sums ? ring : sums;
};

constexpr int kSteps = 2;  // products per half of a group

// Half HALF of the warp's tile at `src` (this lane's first vector) as A operands.
template <int BITS, int HALF> JN_DEVICE void unpack(const unsigned char* src, uint32_t (&a)[kSteps][4]) {
  uint32_t w[2 * BITS];
  load_half<BITS, HALF>(src, w);
  spread_steps<BITS, HALF * kSteps, kSteps>(w, a);
}

// Its products with the tokens of a group, in flight on return.
template <int N, int HALF>
JN_DEVICE void multiply(int (&sum)[N / 2], const uint32_t (&a)[kSteps][4], const unsigned char* tokens) {
  ptx::wgmma_fence();
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const int i = HALF * kSteps + j;
    ptx::wgmma_m64k32_s8<N>(sum, a[j], tokens + i * 32, i > 0);
  }
  ptx::wgmma_commit();
}

template <class T, int BITS, int N> __global__ void __launch_bounds__(kThreads, 1) wgmma_kernel(const LowbitArgs p) {
#if defined(JN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  JN_DYNAMIC_SHARED(shared);
  using S = Shape<BITS, N>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows, groups = p.inputs / kGroup;
  const int first_tile = blockIdx.x * kBlockTiles, first_token = blockIdx.z * N;
  const int begin = groups * blockIdx.y / p.splits, end = groups * (blockIdx.y + 1) / p.splits;

  // Rows and tokens past the end are copies of the last one; their results are not stored. Indices count vectors of 16
  // bytes: 32 bits reach 64 GB.
  auto fetch = [&](int group, int stage) {
    if (group < end) {
      unsigned char* dst = shared + stage * S::stage_bytes;
      constexpr int per_token = 8;  // vectors of 16 bytes
#pragma unroll
      for (int j = 0; j < N * per_token / kThreads; ++j) {
        const int i = j * kThreads + threadIdx.x, token = i / per_token, v = i % per_token;
        const int from = min_of(first_token + token, p.tokens - 1);
        const uint32_t at = (static_cast<uint32_t>(from) * groups + group) * per_token + v;
        unsigned char* to = dst + token * 128 + (v ^ token % 8) * 16;
        ptx::cp_async16(to, static_cast<const Vec4*>(p.x) + at);
      }
      dst += S::token_bytes;
      constexpr int per_tile = BITS * 16;
#pragma unroll
      for (int j = 0; j < kBlockTiles * per_tile / kThreads; ++j) {
        const int i = j * kThreads + threadIdx.x, tile = min_of(first_tile + i / per_tile, tiles - 1);
        const uint32_t at = (static_cast<uint32_t>(tile) * groups + group) * per_tile + i % per_tile;
        ptx::cp_async16(dst + i * 16, static_cast<const Vec4*>(p.weight) + at);
      }
      if (threadIdx.x < kBlockTiles * 2) {
        const int tile = min_of(first_tile + static_cast<int>(threadIdx.x) / 2, tiles - 1);
        const Vec4* src = static_cast<const Vec4*>(p.scale) + ((group * tiles + tile) * 2 + threadIdx.x % 2);
        ptx::cp_async16(dst + S::weight_bytes + threadIdx.x * 16, src);
      }
    }
    ptx::cp_async_commit();
  };

  float acc[N / 2] = {};
  int sum[N / 2];
#pragma unroll
  for (int s = 0; s < S::stages - 1; ++s) fetch(begin + s, s);
  ptx::cp_async_wait<S::stages - 2>();
  ptx::fence_async_shared();
  ptx::sync_threads();
  uint32_t a0[kSteps][4], a1[kSteps][4];
  const unsigned char* tile = shared + S::token_bytes + warp * BITS * 256 + lane * 16;
  unpack<BITS, 0>(tile, a0);
  int stage = 0;
  for (int group = begin; group < end; ++group) {  // weights are unpacked and fetched while products run
    const unsigned char* tokens = shared + stage * S::stage_bytes;
    multiply<N, 0>(sum, a0, tokens);
    unpack<BITS, 1>(tile + stage * S::stage_bytes, a1);
    multiply<N, 1>(sum, a1, tokens);
    const T* scales = reinterpret_cast<const T*>(tokens + S::token_bytes + S::weight_bytes);
    const float low = ptx::to_float(scales[warp * kTileRows + 2 * g]);  // row g
    const float high = ptx::to_float(scales[warp * kTileRows + 2 * g + 1]);  // row g + 8
    ptx::cp_async_wait<S::stages - 3>();  // the next group
    ptx::fence_async_shared();
    ptx::sync_threads();  // and nobody multiplies the previous group any more: its place is free
    fetch(group + S::stages - 1, (stage + S::stages - 1) % S::stages);
    stage = (stage + 1) % S::stages;
    ptx::wgmma_wait<1>();
    if (group + 1 < end) unpack<BITS, 0>(tile + stage * S::stage_bytes, a0);
    ptx::wgmma_wait<0>();
    ptx::registers_fence(sum);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] += static_cast<float>(sum[i]) * (i % 4 < 2 ? low : high);
  }

  ptx::cp_async_wait<0>();
  ptx::sync_threads();
  float* sums = reinterpret_cast<float*>(shared);
  exchange<N>(acc, warp, lane, sums);
  ptx::sync_threads();
  constexpr float unit = 1.0f / (1 << (8 - BITS));
  finish_block<T, true>(p, unit, kThreads, first_tile * kTileRows, kBlockRows, first_token, N, shared,
                        [&](int token, int row) { return sums[token * kPitch + row]; });
#endif
}

template <class T, int BITS, int N> int run(const LowbitArgs& p, cudaStream_t stream) {
  const dim3 grid((p.rows + kBlockRows - 1) / kBlockRows, p.splits, (p.tokens + N - 1) / N);
  if (!locked(p, grid)) return kBadArgument;
  return launch(wgmma_kernel<T, BITS, N>, grid, dim3(kThreads), Shape<BITS, N>::bytes, stream, false, p);
}
}  // namespace

// As lowbit_tile, for quantized tokens on sm_90a only; x of act_quant_pack(layout 1).
int lowbit_wgmma(const LowbitArgs& p, cudaStream_t stream) {
  if (const int error = check(p)) return error;
  if (!p.act_scale) return kBadArgument;
  if (compute_capability() != 90) return kIsaMissing;
  return dispatch([&](auto type, auto bits, auto tiles) { return run<Half<type>, bits, tiles * 8>(p, stream); },
                  Type{p.dtype}, OneOf<2, 4, 8>{p.w_bits}, OneOf<8, 16>{p.token_tiles});
}
JN_EXPORT(lowbit_wgmma);

}  // namespace jointnas
