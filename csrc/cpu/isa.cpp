#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jointnas {

#if defined(__x86_64__)
namespace {

// AMX has to be asked for: Linux gives a process the room for the tiles of a context only then.
bool may_use_tiles(uint32_t edx) {
  constexpr uint32_t kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTiles | kInt8;
  if ((edx & kAll) != kAll) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

uint32_t cpu_features() {
  static const uint32_t features = [] {
    uint32_t f = kNoFeature;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) f |= kHasAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && (f & kHasAvx2))
      f |= kHasAvx512;
    if (f & kHasAvx512) {
      if (__builtin_cpu_supports("avx512bf16")) f |= kHasBf16;
      if (__builtin_cpu_supports("avx512vnni")) f |= kHasVnni;
      if (__builtin_cpu_supports("avx512vpopcntdq")) f |= kHasVpopcnt;
    }
    if (__builtin_cpu_is("intel")) f |= kIsIntel;
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;  // what GCC 12 has no name for
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
      if ((f & kHasAvx512) && may_use_tiles(edx)) f |= kHasAmx;
      if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (f & kHasAvx2) && (eax & 1u << 4))
        f |= kHasAvxVnni;
    }
#endif
    return f;
  }();
  return features;
}

int choose_isa(int requested, uint32_t extra) {
  const uint32_t f = cpu_features();
  int best = kScalar;
  if (f & kHasAvx2) best = f & kHasAvxVnni ? kAvxVnni : kAvx2;
  if (f & kHasAvx512) best = (f & extra) != extra ? kAvx512 : f & kHasAmx ? kAmx : kAvx512Ext;
  if (requested == kAuto) return best;
  if (requested == kAvxVnni && !(f & kHasAvxVnni)) return 0;
  return requested >= kScalar && requested <= best ? requested : 0;
}

}  // namespace jointnas
