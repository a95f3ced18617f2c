// Reads memory and does nothing else: what the weights of a one-token product could stream at best.

#ifdef JN_ISA  // once per instruction set

#include "cpu/veci.h"

namespace jointnas {
namespace JN_ISA {

inline uint32_t read_words(const uint32_t* p, int64_t count) {
  vi sum[4] = {seti(0), seti(0), seti(0), seti(0)};
  for (int64_t i = 0; i + 4 * W <= count; i += 4 * W)
    for (int v = 0; v < 4; ++v) sum[v] = sum[v] ^ loadi(p + i + v * W);
  uint32_t out[W];
  storei(out, (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]));
  return out[0];
}

}  // namespace JN_ISA
}  // namespace jointnas

#else

#include <atomic>
#include <utility>

#include "cpu/bf16.h"
#include "cpu/cpu_ops.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

#define JN_THIS_FILE "cpu/read.cpp"
#include "cpu/each_isa.h"

int jn_cpu_read(const void* p, int64_t bytes, int threads, int isa) {
  using namespace jointnas;
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

#endif
