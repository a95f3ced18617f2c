// What sm_90 adds for moving data: barriers in shared memory that count bytes, bulk copies that complete on them (also
// into every block of a cluster at once), clusters of blocks, registers handed from one warpgroup to another.
#pragma once
#include "cuda/ptx.cuh"

namespace jointnas::ptx {

#ifndef JN_EMULATE
JN_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
JN_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// One arrival, and `bytes` more to come before the phase can end.
JN_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// One arrival at the same barrier of block `rank` of the cluster.
JN_DEVICE void barrier_arrive(uint64_t* barrier, int rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote,%0,%1; mbarrier.arrive.shared::cluster.b64 _,[remote]; }" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Until the phase of this parity has ended; a new barrier is in phase 0, so waiting for parity 1 returns at once.
JN_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done,[%0],%1; @!done bra AGAIN; }" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// `bytes` (a multiple of 16) from global to shared memory; both 16-byte aligned; counted on `barrier`.
JN_DEVICE void bulk_copy(void* dst, const void* src, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
                   shared_address(dst)),
               "l"(src), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// The same to the same place, and barrier, of every block in `ranks` (bit mask).
JN_DEVICE void bulk_copy_multicast(void* dst, const void* src, int bytes, uint64_t* barrier, int ranks) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0],[%1],%2,[%3],%4;" ::"r"(
                   shared_address(dst)),
               "l"(src), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(ranks))
               : "memory");
}
JN_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0,%%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Four 8 x 8 tiles of halves into rows of 16 bytes. A lane holds two halves of column lane / 4 of each, rows
// 2 (lane % 4) and the next; lane 8 i + j gives the address of row j of tile i.
JN_DEVICE void store_transposed4(void* row, const uint32_t (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
}
JN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
template <int REGISTERS> JN_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> JN_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
#else

inline int cluster_rank() { return emu::block().rank(); }
// The same place in the shared memory of another block of the cluster.
template <class P> P* on_rank(P* p, int rank) {
  emu::Block& b = emu::block();
  return reinterpret_cast<P*>(reinterpret_cast<uintptr_t>(p) + (rank - b.rank()) * b.shared_stride);
}
inline void barrier_init(uint64_t* barrier, int arrivals) { emu::block().barriers[barrier] = {arrivals, arrivals, 0, 0, {}}; }
inline void fence_barrier_init() {}
inline emu::Barrier& barrier_at(uint64_t* barrier) {
  auto found = emu::block().barriers.find(barrier);
  emu::require(found != emu::block().barriers.end(), "barrier used before its initialisation");
  return found->second;
}
inline void barrier_expect(uint64_t* barrier, int bytes) {
  emu::Barrier& b = barrier_at(barrier);
  b.bytes += bytes;
  b.arrive();
}
inline void barrier_arrive(uint64_t* barrier, int rank) { barrier_at(on_rank(barrier, rank)).arrive(); }
// Copies land only when somebody waits for them.
inline void barrier_wait(uint64_t* barrier, int parity) {
  emu::Barrier& b = barrier_at(barrier);
  while (b.phase % 2 == static_cast<unsigned>(parity)) {
    b.land();
    if (b.phase % 2 == static_cast<unsigned>(parity)) emu::yield();
  }
}
inline void bulk_copy_multicast(void* dst, const void* src, int bytes, uint64_t* barrier, int ranks) {
  for (const void* p : {static_cast<const void*>(dst), src}) emu::require_aligned(p, "bulk copy not in units of 16 bytes");
  emu::require(bytes > 0 && bytes % 16 == 0, "bulk copy not in units of 16 bytes");
  for (int rank = 0; rank < 16; ++rank)
    if (ranks >> rank & 1) {
      std::memset(on_rank(static_cast<char*>(dst), rank), 0xFF, bytes);
      barrier_at(on_rank(barrier, rank)).copies.push_back({on_rank(static_cast<char*>(dst), rank), src, bytes});
    }
}
inline void bulk_copy(void* dst, const void* src, int bytes, uint64_t* barrier) {
  bulk_copy_multicast(dst, src, bytes, barrier, 1 << cluster_rank());
}
struct RowsIn { unsigned char* row; uint32_t a[4]; };
struct RowsOut {};
inline void store_transposed4(void* row, const uint32_t (&a)[4]) {
  emu::require_aligned(row, "stmatrix with an address that is no multiple of 16");
  RowsIn in{static_cast<unsigned char*>(row), {}};
  std::memcpy(in.a, a, 16);
  emu::warp_wide<RowsIn, RowsOut>(in, [](const RowsIn* all, RowsOut*) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e) {
          const auto half = static_cast<uint16_t>(all[lane].a[i] >> 16 * e);
          std::memcpy(all[8 * i + 2 * (lane % 4) + e].row + 2 * (lane / 4), &half, 2);
        }
  });
}
inline void sync_cluster() { emu::meet(emu::block().cluster_barrier, static_cast<int>(emu::block().fibers.size()), [] {}); }
template <int> void raise_registers() {}
template <int> void lower_registers() {}
#endif

}  // namespace jointnas::ptx
