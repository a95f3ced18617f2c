// W{2,4,8}A8 for many tokens on sm_90a, made to keep the int8 tensor cores busy: Y^T = W X^T, weights as wgmma's register
// operand (unpacked once per block), tokens in shared memory.
//
// A block owns 128 rows x N tokens. A third warpgroup only fetches (bulk copies onto barriers, a ring of 4 or more
// groups); two blocks that share their tokens form a cluster and each fetches half of them for both. The two consumer
// warpgroups own 64 rows each and walk the tokens in chunks of 64: while the tensor cores multiply a chunk, the chunk
// before is scaled. Integer sums of one group are exact; scales enter in fp32.
//
// Cost per output and group of 128 inputs: 128 MACs, at 4096 per clock and SM 1/32 clock of tensor core; one I2FP and one
// FFMA, 2/128 = 1/64 clock of issue slots (I2FP alone 1/64, 64 lanes per clock). So scaling can hide behind multiplying,
// but takes half of all issue slots. (Sums that begin at a float's bits, as kNothing, would need a MOV each: 3/128.)
// Bytes per group from L2: N * 128 tokens / cluster + 2048 * bits weights, for 256 tokens in pairs and W4 24 KB per 1024
// clocks at full rate.
#include "cuda/lowbit_finish.cuh"
#include "cuda/lowbit_ring.cuh"
#include "cuda/wgmma.cuh"

namespace jointnas {
namespace {

constexpr int kChunk = 64;  // tokens per product

template <int BITS, int N> using Stages = Ring<BITS, N, 1, 6, 220 * 1024>;

// The chunk's sums, times the scales of rows g (low) and g + 8, onto the totals.
template <int N> JN_DEVICE void scale_chunk(float (&total)[N / 2], const int (&sum)[kChunk / 2], int chunk, float low, float high) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) total[chunk * (kChunk / 2) + i] += static_cast<float>(sum[i]) * (i % 4 < 2 ? low : high);
}

template <class T, int BITS, int N>
__global__ void __launch_bounds__(kRingThreads, 1) int8_kernel(const LowbitArgs p) {
#if defined(JN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  JN_DYNAMIC_SHARED(shared);
  using S = Stages<BITS, N>;
  const Part part = part_of(blockIdx.x, row_blocks_of(p), (p.tokens + N - 1) / N);
  const int groups = p.inputs / kGroup, first_token = part.token_block * N;
  const S ring(shared, p.cluster);
  if (threadIdx.x >= kConsumers) {
    ptx::lower_registers<40>();
    if (threadIdx.x < kConsumers + 32) ring.fill(p, shared, part.row_block * kBlockTiles, first_token, 0, groups);
  } else {
    ptx::raise_registers<232>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    float total[N / 2] = {};
    int stage = 0, parity = 0;
    for (int group = 0; group < groups; ++group) {
      ptx::barrier_wait(ring.full + stage, parity);
      const unsigned char* tokens = shared + stage * S::stage_bytes;
      const unsigned char* weights = tokens + S::token_bytes + warp * S::tile_bytes + lane * 16;
      const T* scales = reinterpret_cast<const T*>(tokens + S::token_bytes + S::weight_bytes) + warp * kTileRows + 2 * g;
      const float low = ptx::to_float(scales[0]), high = ptx::to_float(scales[1]);  // rows g, g + 8
      uint32_t w[2 * BITS];
      load_words<BITS, 0, BITS / 2>(weights, w);
      uint32_t a[4][4];
      int sum[2][kChunk / 2];
      spread_tile<BITS>(w, a);
      const ptx::Operand operand(tokens);
#pragma unroll
      for (int chunk = 0; chunk < N / kChunk; ++chunk) {
        int (&now)[kChunk / 2] = sum[chunk % 2];
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32_s8<kChunk>(now, a[i], operand.after(chunk * kChunk * kGroup + i * 32), i > 0);
        ptx::wgmma_commit();
        if (chunk > 0) {
          ptx::wgmma_wait<1>();
          ptx::registers_fence(sum[(chunk + 1) % 2]);
          scale_chunk<N>(total, sum[(chunk + 1) % 2], chunk - 1, low, high);
        }
      }
      // A product in flight across the loop's end would make ptxas serialize all; the other warpgroup fills the gap.
      ptx::wgmma_wait<0>();
      ptx::registers_fence(sum[1]);
      if (lane < p.cluster) ptx::barrier_arrive(ring.empty + stage, lane);
      scale_chunk<N>(total, sum[1], N / kChunk - 1, low, high);
      if (++stage == S::stages) {
        stage = 0;
        parity ^= 1;
      }
    }

    // Through shared memory to y: everybody has read the ring, and every copy into it was waited for.
    ptx::sync_some(1, kConsumers);
    float* sums = reinterpret_cast<float*>(shared);
    exchange<N>(total, warp, lane, sums);
    ptx::sync_some(1, kConsumers);
    constexpr float unit = 1.0f / (1 << (8 - BITS));
    store_block<T, true>(p, unit, kConsumers, part.row_block * kBlockRows, first_token, N, sums);
  }
  ptx::sync_warp();
  ptx::sync_cluster();  // a block's shared memory must outlive its neighbour's arrivals
#endif
}

template <class T, int BITS, int N> int run(const LowbitArgs& p, cudaStream_t stream) {
  const dim3 grid(row_blocks_of(p) * ((p.tokens + N - 1) / N));
  return launch_cluster(int8_kernel<T, BITS, N>, grid, dim3(kRingThreads), Stages<BITS, N>::bytes, stream, p.cluster, false, p);
}
}  // namespace

// Quantized tokens only, sm_90a only, warp-specialised: blocks of 128 rows x 128 or 256 tokens; x of
// act_quant_pack(layout 2); no splits.
int lowbit_int8(const LowbitArgs& p, cudaStream_t stream) {
  if (const int error = check(p)) return error;
  if (p.splits != 1 || p.cluster < 1 || p.cluster > 2 || !p.act_scale) return kBadArgument;
  if (compute_capability() != 90) return kIsaMissing;
  return dispatch([&](auto type, auto bits, auto tiles) { return run<Half<type>, bits, tiles * 8>(p, stream); },
                  Type{p.dtype}, OneOf<2, 4, 8>{p.w_bits}, OneOf<16, 32>{p.token_tiles});
}
JN_EXPORT(lowbit_int8);

}  // namespace jointnas
