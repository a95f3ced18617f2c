// W{2,4,8}A8 for many tokens on sm_90a, made to keep the int8 tensor cores busy: Y^T = W X^T, weights as wgmma's
// register operand (unpacked once per block), tokens in shared memory.
//
// A part of y is 128 rows x N tokens. A third warpgroup only fetches (bulk copies onto barriers, a ring of 4 or more
// groups); blocks that share their tokens form a cluster and each fetches its share of them for all. The two consumer
// warpgroups own 64 rows each and walk the tokens in chunks of 128: one scales its chunk while the other's is
// multiplied. Integer sums of one group are exact; scales enter in fp32. Blocks stay: the fetching warp runs on to the
// next part, and a warpgroup stores its rows while the other one multiplies.
//
// Cost per output and group of 128 inputs: 128 MACs, at 4096 per clock and SM 1/32 clock of tensor core; one I2FP and
// one FFMA, 2/128 = 1/64 clock of issue slots (I2FP alone 1/64, 64 lanes per clock). So scaling can hide behind
// multiplying, but takes half of all issue slots. (Sums that begin at a float's bits, as kNothing, would need a MOV
// each: 3/128.) Bytes per group from L2: N * 128 tokens / cluster + 2048 * bits weights, for 256 tokens in pairs and W4
// 24 KB per 1024 clocks at full rate, for W8 32 KB, in fours 24 KB. Through shared memory for 256 tokens and W8:
// tokens written once and read by each warpgroup, weights written and read once, 128 KB, just 1024 clocks at 128 bytes.
// Weights as wgmma's shared operand would be read once per chunk, 16 KB more for 20 instructions of 358 less.
//
// What the warpgroups do at the same time decides. A group costs one of them 512 clocks of tensor cores, and about 260
// in which it has nothing there (a chunk's scales, the barrier, unpacking). In step, these add: predicted 1280 to 1400
// clocks per group with chunks of 64 in two buffers. Chunks of 128 fall into turns: 1050 to 1180 (LOG.md).
#include "cuda/lowbit_finish.cuh"
#include "cuda/lowbit_ring.cuh"
#include "cuda/wgmma.cuh"

namespace jointnas {
namespace {

constexpr int kChunk = 128;  // tokens per product
constexpr int kFetching = 40;  // registers of a fetching thread; 24 would spill

template <int BITS, int N> using Stages = Ring<BITS, N, 1, 6, 216 * 1024>;
template <int BITS, int N> constexpr int kBytes = Stages<BITS, N>::bytes + kConsumers / 32 * kTurnBytes;

template <class T, int BITS, int N>
__global__ void __launch_bounds__(kRingThreads, 1) int8_kernel(const LowbitArgs p, int row_blocks, int token_blocks) {
#if defined(JN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  JN_DYNAMIC_SHARED(shared);
  using S = Stages<BITS, N>;
  static_assert(kBytes<BITS, N> <= 227 * 1024);
  const int groups = p.inputs / kGroup;
  const S ring(shared, p.cluster);
  if (threadIdx.x >= kConsumers) {
    ptx::lower_registers<kFetching>();
    if (threadIdx.x < kConsumers + 32) {
      auto at = S::of_producer();
      for (int i = blockIdx.x; i < row_blocks * token_blocks; i += gridDim.x) {
        const Part part = part_of(i, row_blocks, token_blocks);
        ring.fill(p, shared, part.row_block * kBlockTiles, part.token_block * N, 0, groups, at);
      }
    }
  } else {
    ptx::raise_registers<kConsumerRegisters<kFetching>>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    Stagger stagger;
    auto at = S::of_consumer();
    for (int i = blockIdx.x; i < row_blocks * token_blocks; i += gridDim.x) {
      float total[N / 2] = {};
      for (int group = 0; group < groups; ++group, at.advance()) {
        ptx::barrier_wait(ring.full + at.stage, at.parity);
        const unsigned char* tokens = shared + at.stage * S::stage_bytes;
        const unsigned char* weights = tokens + S::token_bytes + warp * S::tile_bytes + lane * 16;
        const T* scales = reinterpret_cast<const T*>(tokens + S::token_bytes + S::weight_bytes) + warp * kTileRows;
        const float low = ptx::to_float(scales[2 * g]), high = ptx::to_float(scales[2 * g + 1]);  // rows g, g + 8
        uint32_t w[2 * BITS], a[4][4];
        load_words<BITS, 0, BITS / 2>(weights, w);
        spread_tile<BITS>(w, a);
        stagger.before_product();
        const ptx::Operand operand(tokens);
#pragma unroll
        for (int chunk = 0; chunk < N / kChunk; ++chunk) {
          int sum[kChunk / 2];
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k)
            ptx::wgmma_m64k32_s8<kChunk>(sum, a[k], operand.after(chunk * kChunk * kGroup + k * 32), k > 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::registers_fence(sum);
          stagger.after_product();
          if (chunk + 1 == N / kChunk && lane < p.cluster) ptx::barrier_arrive(ring.empty + at.stage, lane);
#pragma unroll
          for (int j = 0; j < kChunk / 2; ++j)
            total[chunk * (kChunk / 2) + j] += static_cast<float>(sum[j]) * (j % 4 < 2 ? low : high);
        }
      }
      constexpr float unit = 1.0f / (1 << (8 - BITS));
      const Part part = part_of(i, row_blocks, token_blocks);
      store_warp<T, true, N>(p, unit, total, part.row_block * kBlockRows + warp * kTileRows, part.token_block * N,
                             shared + S::bytes + warp * kTurnBytes);
    }
  }
  ptx::sync_warp();
  ptx::sync_cluster();  // a block's shared memory must outlive its neighbours' arrivals
#endif
}

template <class T, int BITS, int N> int run(const LowbitArgs& p, cudaStream_t stream) {
  const int row_blocks = row_blocks_of(p), token_blocks = (p.tokens + N - 1) / N;
  const int parts = row_blocks * token_blocks, bytes = kBytes<BITS, N>;
  const int resident = resident_blocks<int8_kernel<T, BITS, N>>(dim3(kRingThreads), bytes, p.cluster);
  const dim3 grid(resident ? min_of(parts, resident) : parts);
  return launch_cluster(int8_kernel<T, BITS, N>, grid, dim3(kRingThreads), bytes, stream, p.cluster, false, p,
                        row_blocks, token_blocks);
}
}  // namespace

// Quantized tokens only, sm_90a only, warp-specialised: parts of 128 rows x 128 or 256 tokens; x of
// act_quant_pack(layout 2); no splits.
int lowbit_int8(const LowbitArgs& p, cudaStream_t stream) {
  if (const int error = check(p)) return error;
  if (p.splits != 1 || !shares_tokens(p) || !p.act_scale) return kBadArgument;
  if (compute_capability() != 90) return kIsaMissing;
  return dispatch([&](auto type, auto bits, auto tiles) { return run<Half<type>, bits, tiles * 8>(p, stream); },
                  Type{p.dtype}, OneOf<2, 4, 8>{p.w_bits}, OneOf<16, 32>{p.token_tiles});
}
JN_EXPORT(lowbit_int8);

}  // namespace jointnas
