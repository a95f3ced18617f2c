// What the warp-specialised kernels of sm_90a share: a ring of groups in shared memory that one warp of a third
// warpgroup fills by bulk copies onto barriers, for two consumer warpgroups. A stage is the tokens of a group, in
// SEGMENTS parts of 128 bytes per token, as wgmma swizzles them; then kBlockTiles tiles of weights; then their scales.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/lowbit.cuh"

namespace jointnas {

constexpr int kConsumers = 256, kRingThreads = kConsumers + 128;
// Registers of a consumer beside those of a fetching thread; together the 168 per thread that such a block is given.
template <int FETCHING> constexpr int kConsumerRegisters = (kRingThreads * 168 - 128 * FETCHING) / kConsumers;

// Makes the second consumer warpgroup begin behind the first one's first product. A warpgroup has nothing on the tensor
// cores between its groups; if both are in step, that time is lost, and nothing pulls them apart. With the second one a
// product behind, one multiplies while the other scales and unpacks, and they stay so (LOG.md has a model of it).
struct Stagger {
  bool open = true;  // nothing was multiplied yet
  static JN_DEVICE bool second() { return threadIdx.x >= kConsumers / 2; }
  JN_DEVICE void before_product() const {
    if (open && second()) ptx::sync_some(2, kConsumers);
  }
  JN_DEVICE void after_product() {
    if (open && !second()) ptx::arrive_some(2, kConsumers);
    open = false;
  }
};

template <int BITS, int N, int SEGMENTS, int MOST_STAGES, int BUDGET> struct Ring {
  static constexpr int segments = SEGMENTS, segment_bytes = N * 128;
  static constexpr int token_bytes = SEGMENTS * segment_bytes;
  static constexpr int tile_bytes = BITS * 256, weight_bytes = kBlockTiles * tile_bytes;
  static constexpr int stage_bytes = token_bytes + weight_bytes + 1024;  // scales; stages stay 1024-byte aligned
  static constexpr int fit = BUDGET / stage_bytes, stages = fit > MOST_STAGES ? MOST_STAGES : fit;
  static constexpr int barriers_at = stages * stage_bytes, bytes = barriers_at + 128;
  static_assert(stages >= 2 && 2 * stages * 8 <= 128 && bytes <= 227 * 1024);

  // Which stage is next, and the parity of its phase.
  struct Place {
    int stage = 0, parity;
    JN_DEVICE void advance() {
      if (++stage < stages) return;
      stage = 0;
      parity ^= 1;
    }
  };
  static JN_DEVICE Place of_producer() { return {0, 1}; }
  static JN_DEVICE Place of_consumer() { return {0, 0}; }

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

  // Fetches groups begin .. end - 1 into the stages from `at` on; by one warp. Lanes 0 .. 7 fetch a tile of weights,
  // lane 8 the scales, the next ones this block's share of a segment of the tokens, for all blocks of the cluster.
  JN_DEVICE void fill(const LowbitArgs& p, unsigned char* shared, int first_tile, int first_token, int begin,
                      int end, Place& at) const {
    const int lane = threadIdx.x % 32, rank = ptx::cluster_rank(), segment = lane - kBlockTiles - 1;
    const int tiles = (p.rows + kTileRows - 1) / kTileRows, groups = p.inputs / kGroup;
    const int eights = (p.tokens + 7) / 8, mine = N / 8 / p.cluster;
    const int all_eights = min_of(N / 8, eights - first_token / 8);   // of the block, and of the cluster
    const int block_tiles = min_of(kBlockTiles, tiles - first_tile);  // none or less in a block beyond the rows
    const int present = block_tiles > 0 ? block_tiles : 0;
    const int bytes = all_eights * 1024 * segments + present * (tile_bytes + kTileRows * 2);
    // What this lane copies of every group: how much, from where, whereto in the stage. One place for all: three of
    // them would not fit this warp's registers.
    int size = 0, to = token_bytes;
    const void* of = nullptr;
    size_t from = 0, step = 0;
    if (lane < present) {
      size = tile_bytes, to += lane * tile_bytes, of = p.weight;
      step = tile_bytes, from = size_t(first_tile + lane) * groups * step;
    } else if (lane == kBlockTiles) {
      size = present * kTileRows * 2, to += weight_bytes, of = p.scale;
      step = size_t(tiles) * kTileRows * 2, from = size_t(first_tile) * kTileRows * 2;
    } else if (segment >= 0 && segment < segments) {
      ptx::wait_dependencies();  // the kernel before wrote the tokens, not the weights
      size = min_of(mine, all_eights - rank * mine) * 1024, to = segment * segment_bytes + rank * mine * 1024, of = p.x;
      step = size_t(segments) * eights * 1024, from = (size_t(segment) * eights + first_token / 8 + rank * mine) * 1024;
    }
    const char* src = static_cast<const char*>(of) + from + begin * step;
#pragma unroll 1
    for (int group = begin; group < end; ++group, src += step, at.advance()) {
      unsigned char* stage = shared + at.stage * stage_bytes;
      ptx::barrier_wait(empty + at.stage, at.parity);
      if (lane == 0) ptx::barrier_expect(full + at.stage, bytes);
      if (size <= 0) continue;  // a share of the tokens may be none
      if (segment >= 0 && p.cluster > 1)
        ptx::bulk_copy_multicast(stage + to, src, size, full + at.stage, (1 << p.cluster) - 1);
      else ptx::bulk_copy(stage + to, src, size, full + at.stage);
    }
  }
};

}  // namespace jointnas
