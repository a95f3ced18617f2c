// When an elementwise op writes its outputs past the cache.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "cpu/bf16.h"

namespace jointnas {

// Whether `size` elements each, in rows of `width`, are more than the next op would find in the cache, and whole lines.
// 1,024 x 4096 bf16 masked and read back on two cores: 432 us instead of 509. An op that also sums columns does not gain
// (gated_residual with three outputs lost: 1.85 ms instead of 1.55).
inline bool past_cache(std::initializer_list<const void*> outputs, int64_t size, int64_t width, int dtype) {
  const int64_t bytes = dtype == kBf16 ? 2 : 4;
  bool lines = width * bytes % 64 == 0;
  for (const void* p : outputs) lines = lines && reinterpret_cast<uintptr_t>(p) % 64 == 0;
  return lines && size * bytes >= 8 << 20;
}

}  // namespace jointnas
