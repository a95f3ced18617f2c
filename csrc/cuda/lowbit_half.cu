// W{2,4,8}A16 for more than a few tokens on sm_90a: Y^T = W X^T as in lowbit_int8.cu, with 16-bit products. Weights go
// from shared memory through registers (dequantised once per block) into wgmma's A operand, tokens are its B operand.
//
// A block owns 128 rows x N tokens. A third warpgroup only fetches (bulk copies onto barriers); blocks of a cluster
// share their tokens and each fetches its part of them for all. The two consumer warpgroups own 64 rows each and walk
// the tokens in chunks: the tensor cores sum a chunk's group, then one FFMA per output applies the scale, beside the
// other warpgroup's products. Few tokens are split along the inputs so that all SMs have work.
//
// Cost per output and group of 128 inputs: 128 MACs at 2048 per clock and SM, 1/16 clock, and one FFMA, 1/128 clock of
// issue slots. Bytes per group from L2: N * 256 tokens / cluster + 2048 * bits weights, for 256 tokens in pairs and W4
// 40 KB per 2048 clocks.
#include "cuda/lowbit_finish.cuh"
#include "cuda/lowbit_ring.cuh"
#include "cuda/wgmma.cuh"

namespace jointnas {
namespace {

constexpr int kFetching = 24;  // registers of a fetching thread; with 40 the sums of 256 tokens spill

template <int BITS, int N> using Stages = Ring<BITS, N, 2, 8, 226 * 1024>;

// Half HALF of the warp's tile at `src` (this lane's first vector): the A operands of 64 inputs.
template <class T, int BITS, int HALF> JN_DEVICE void unpack(const unsigned char* src, uint32_t (&a)[4][4]) {
  uint32_t w[2 * BITS];
  load_half<BITS, HALF>(src, w);
  dequant_steps<T, BITS, HALF * 4, 4>(w, a);
}

// Its products with a chunk of tokens, whose segment of these inputs is at `tokens`, added to the half before.
template <class T, int HALF, int CHUNK>
JN_DEVICE void multiply(float (&sum)[CHUNK / 2], const uint32_t (&a)[4][4], ptx::Operand tokens) {
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::wgmma_m64k16<T, CHUNK>(sum, a[i], tokens.after(i * 32), HALF > 0 || i > 0);
}

template <class T, int BITS, int N> __global__ void __launch_bounds__(kRingThreads, 1) half_kernel(const LowbitArgs p) {
#if defined(JN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  JN_DYNAMIC_SHARED(shared);
  using S = Stages<BITS, N>;
  const int groups = p.inputs / kGroup;
  const int begin = groups * blockIdx.y / p.splits, end = groups * (blockIdx.y + 1) / p.splits;
  const Part part = part_of(blockIdx.x, row_blocks_of(p), (p.tokens + N - 1) / N);
  const int first_token = part.token_block * N;
  const S ring(shared, p.cluster);
  if (threadIdx.x >= kConsumers) {
    ptx::lower_registers<kFetching>();
    if (threadIdx.x < kConsumers + 32) {
      auto at = S::of_producer();
      ring.fill(p, shared, part.row_block * kBlockTiles, first_token, begin, end, at);
    }
  } else {
    ptx::raise_registers<kConsumerRegisters<kFetching>>();
    constexpr int chunk = N < 128 ? N : 128, chunks = N / chunk;  // tokens per product
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    float total[N / 2] = {};
    Stagger stagger;
    auto at = S::of_consumer();
    for (int group = begin; group < end; ++group, at.advance()) {
      ptx::barrier_wait(ring.full + at.stage, at.parity);
      const unsigned char* tokens = shared + at.stage * S::stage_bytes;
      const unsigned char* weights = tokens + S::token_bytes + warp * S::tile_bytes + lane * 16;
      const T* scales = reinterpret_cast<const T*>(tokens + S::token_bytes + S::weight_bytes);
      const float low = ptx::to_float(scales[warp * kTileRows + 2 * g]);  // row g
      const float high = ptx::to_float(scales[warp * kTileRows + 2 * g + 1]);  // row g + 8
      uint32_t first[4][4], second[4][4];
      unpack<T, BITS, 0>(weights, first);
      stagger.before_product();
      const ptx::Operand operand(tokens);
#pragma unroll
      for (int c = 0; c < chunks; ++c) {
        float sum[chunk / 2];
        multiply<T, 0, chunk>(sum, first, operand.after(c * chunk * 128));
        if (c == 0) unpack<T, BITS, 1>(weights, second);  // while the first half is multiplied
        multiply<T, 1, chunk>(sum, second, operand.after(S::segment_bytes + c * chunk * 128));
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();  // the other warpgroup multiplies
        ptx::registers_fence(sum);
        stagger.after_product();
        if (c + 1 == chunks && lane < p.cluster) ptx::barrier_arrive(ring.empty + at.stage, lane);
#pragma unroll
        for (int i = 0; i < chunk / 2; ++i) total[c * (chunk / 2) + i] += sum[i] * (i % 4 < 2 ? low : high);
      }
    }

    // Through shared memory to y: everybody has read the ring, and every copy into it was waited for.
    ptx::sync_some(1, kConsumers);
    const int first_row = part.row_block * kBlockRows;
    if (p.splits == 1) {
      store_warp<T, false, N>(p, 1.0f, total, first_row + warp * kTileRows, first_token, shared + warp * kTurnBytes);
    } else {
      static_assert(N * kPitch * 4 <= S::barriers_at);
      float* sums = reinterpret_cast<float*>(shared);
      exchange<N>(total, warp, lane, sums);
      ptx::sync_some(1, kConsumers);
      finish_block<T, true>(p, 1.0f, kConsumers, first_row, kBlockRows, first_token, N, shared,
                            [&](int token, int row) { return sums[token * kPitch + row]; });
    }
  }
  ptx::sync_warp();
  ptx::sync_cluster();  // a block's shared memory must outlive its neighbours' arrivals
#endif
}

template <class T, int BITS, int N> int run(const LowbitArgs& p, cudaStream_t stream) {
  const dim3 grid(row_blocks_of(p) * ((p.tokens + N - 1) / N), p.splits);
  if (!locked(p, grid)) return kBadArgument;
  return launch_cluster(half_kernel<T, BITS, N>, grid, dim3(kRingThreads), Stages<BITS, N>::bytes, stream, p.cluster,
                        p.early != 0, p);
}
}  // namespace

// 16-bit tokens in the order of token_layout, sm_90a only, warp-specialised: blocks of 128 rows x 16 .. 256 tokens.
int lowbit_half(const LowbitArgs& p, cudaStream_t stream) {
  if (const int error = check(p)) return error;
  if (!shares_tokens(p) || p.act_scale) return kBadArgument;
  if (compute_capability() != 90) return kIsaMissing;
  return dispatch([&](auto type, auto bits, auto tiles) { return run<Half<type>, bits, tiles * 8>(p, stream); },
                  Type{p.dtype}, OneOf<2, 4, 8>{p.w_bits}, OneOf<2, 4, 8, 16, 32>{p.token_tiles});
}
JN_EXPORT(lowbit_half);

}  // namespace jointnas
