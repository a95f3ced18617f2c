// What concerns memory itself: fresh pages, and how fast it can be read.

#ifdef JN_ISA  // once per instruction set

#include "cpu/veci.h"

namespace jointnas::JN_ISA {

inline uint32_t read_words(const uint32_t* p, int64_t count) {
  vi sum[4] = {seti(0), seti(0), seti(0), seti(0)};
  for (int64_t i = 0; i + 4 * W <= count; i += 4 * W)
    for (int v = 0; v < 4; ++v) sum[v] = sum[v] ^ loadi(p + i + v * W);
  uint32_t out[W];
  storei(out, (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]));
  return out[0];
}

}  // namespace jointnas::JN_ISA

#else

#include <sys/mman.h>

#include <atomic>
#include <utility>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "export.h"

#define JN_THIS_FILE "cpu/memory.cpp"
#include "cpu/each_isa.h"

namespace jointnas {

// Asks for huge pages under a fresh allocation that is about to be written. Of the 33 ms that quant_lora_mix of a
// 4096^2 bf16 matrix took in one thread with a new output, 17 were first-touch faults of 4 KiB pages.
int cpu_huge_pages(void* begin, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // Advice only: a kernel without huge pages refuses, and nothing changes.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return kOk;
}
JN_EXPORT(cpu_huge_pages);

// Reads `bytes` of memory and keeps nothing: what the weights of a one-token product could stream at best.
int cpu_read(const void* p, int64_t bytes, int threads, int isa) {
  const int level = choose_isa(isa);
  if (!level) return kIsaMissing;
  const int64_t words = bytes / 4 / threads;  // one contiguous part per thread
  static std::atomic<uint32_t> seen;
  parallel_for(threads, threads, [&](int64_t i) {
    uint32_t sum = 0;
    JN_DISPATCH(level, sum = read_words(static_cast<const uint32_t*>(p) + i * words, words));
    seen.fetch_xor(sum, std::memory_order_relaxed);  // so that the loads are not optimised away
  });
  return kOk;
}
JN_EXPORT(cpu_read);

}  // namespace jointnas

#endif
