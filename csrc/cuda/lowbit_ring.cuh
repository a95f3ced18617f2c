// What the warp-specialised kernels of sm_90a share: a ring of groups in shared memory that one warp of a third
// warpgroup fills by bulk copies onto barriers, for two consumer warpgroups. A stage is the tokens of a group, in
// SEGMENTS parts of 128 bytes per token, as wgmma swizzles them; then kBlockTiles tiles of weights; then their scales.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/lowbit.cuh"

namespace jointnas {

constexpr int kConsumers = 256, kRingThreads = kConsumers + 128;

template <int BITS, int N, int SEGMENTS, int MOST_STAGES, int BUDGET> struct Ring {
  static constexpr int segments = SEGMENTS, segment_bytes = N * 128;
  static constexpr int token_bytes = SEGMENTS * segment_bytes;
  static constexpr int tile_bytes = BITS * 256, weight_bytes = kBlockTiles * tile_bytes;
  static constexpr int stage_bytes = token_bytes + weight_bytes + 1024;  // scales; stages stay 1024-byte aligned
  static constexpr int fit = BUDGET / stage_bytes, stages = fit > MOST_STAGES ? MOST_STAGES : fit;
  static constexpr int barriers_at = stages * stage_bytes, bytes = barriers_at + 2 * stages * 8;
  static_assert(stages >= 2 && N * kPitch * 4 <= barriers_at && bytes <= 227 * 1024);  // the final sums overwrite it

  uint64_t *full, *empty;

  JN_DEVICE Ring(unsigned char* shared, int cluster)
      : full(reinterpret_cast<uint64_t*>(shared + barriers_at)), empty(full + stages) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < stages; ++s) {
        ptx::barrier_init(full + s, 1);
        ptx::barrier_init(empty + s, kConsumers / 32 * cluster);
      }
      ptx::fence_barrier_init();
    }
    ptx::sync_cluster();
  }

  // Fetches groups begin .. end - 1; by one warp. Lanes 0 .. 7 fetch a tile of weights each, lane 8 the scales, the next
  // ones this block's share of a segment of the tokens, for all blocks of the cluster.
  JN_DEVICE void fill(const LowbitArgs& p, unsigned char* shared, int first_tile, int first_token, int begin,
                      int end) const {
    const int lane = threadIdx.x % 32, rank = ptx::cluster_rank(), segment = lane - kBlockTiles - 1;
    const int tiles = (p.rows + kTileRows - 1) / kTileRows, groups = p.inputs / kGroup;
    const int eights = (p.tokens + 7) / 8, mine = N / 8 / p.cluster;
    const int all_eights = min_of(N / 8, eights - first_token / 8);   // of the block, and of the cluster
    const int share = min_of(mine, all_eights - rank * mine);         // may be none
    const int block_tiles = min_of(kBlockTiles, tiles - first_tile);  // none or less in a block beyond the rows
    const int present = block_tiles > 0 ? block_tiles : 0;
    const int bytes = all_eights * 1024 * segments + present * (tile_bytes + kTileRows * 2);
    if (segment >= 0) ptx::wait_dependencies();  // the kernel before wrote the tokens, not the weights
    int stage = 0, parity = 1;
    for (int group = begin; group < end; ++group) {
      unsigned char* dst = shared + stage * stage_bytes;
      ptx::barrier_wait(empty + stage, parity);
      if (lane == 0) ptx::barrier_expect(full + stage, bytes);
      if (lane < present) {
        const char* src = static_cast<const char*>(p.weight) + (size_t(first_tile + lane) * groups + group) * tile_bytes;
        ptx::bulk_copy(dst + token_bytes + lane * tile_bytes, src, tile_bytes, full + stage);
      } else if (lane == kBlockTiles && present) {
        const char* src = static_cast<const char*>(p.scale) + (size_t(group) * tiles + first_tile) * kTileRows * 2;
        ptx::bulk_copy(dst + token_bytes + weight_bytes, src, present * kTileRows * 2, full + stage);
      } else if (segment >= 0 && segment < segments && share > 0) {
        const size_t at = size_t(segments * group + segment) * eights + first_token / 8 + rank * mine;
        const char* src = static_cast<const char*>(p.x) + at * 1024;
        unsigned char* to = dst + segment * segment_bytes + rank * mine * 1024;
        if (p.cluster > 1) ptx::bulk_copy_multicast(to, src, share * 1024, full + stage, (1 << p.cluster) - 1);
        else ptx::bulk_copy(to, src, share * 1024, full + stage);
      }
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
};

}  // namespace jointnas
