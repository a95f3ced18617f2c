#include "isa.h"

namespace jnk {

uint32_t cpu_features() {
  static const uint32_t features = [] {
    uint32_t f = kNone;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) f |= kHasAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && (f & kHasAvx2))
      f |= kHasAvx512;
    if (f & kHasAvx512) {
      if (__builtin_cpu_supports("avx512bf16")) f |= kHasBf16;
      if (__builtin_cpu_supports("avx512vnni")) f |= kHasVnni;
      if (__builtin_cpu_supports("avx512vbmi")) f |= kHasVbmi;
      if (__builtin_cpu_supports("avx512vpopcntdq")) f |= kHasVpopcnt;
    }
#endif
    return f;
  }();
  return features;
}

int choose_isa(int requested, uint32_t extra) {
  const uint32_t f = cpu_features();
  int best = kScalar;
  if (f & kHasAvx2) best = kAvx2;
  if (f & kHasAvx512) best = kAvx512;
  if ((f & kHasAvx512) && (f & extra) == extra) best = kAvx512Ext;
  if (requested == kAuto) return best;
  return requested >= kScalar && requested <= best ? requested : 0;
}

}  // namespace jnk
