// How an elementwise op goes over its rows: in chunks, for either dtype, on any level.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "cpu/bf16.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "errors.h"

namespace jointnas {

constexpr int64_t kCache = 8 << 20;  // bytes; a larger output will not be read back from the cache

// Element i of an array that may be missing; of the type of `t` if it is untyped.
template <class T>
T* at(T* p, int64_t i) {
  return p ? p + i : nullptr;
}
template <class T>
T* at(T, void* p, int64_t i) {
  return at(static_cast<T*>(p), i);
}
template <class T>
const T* at(T, const void* p, int64_t i) {
  return at(static_cast<const T*>(p), i);
}

inline void zero(float* p, int64_t n) {
  if (p) std::memset(p, 0, static_cast<size_t>(n) * sizeof(float));
}

// The last arguments of every elementwise op.
struct Chunks {
  int64_t height;  // rows of a chunk
  int dtype, threads, isa;

  // f(T{}, level, first row, rows, chunk) for every chunk
  template <class F>
  int run(int64_t rows, const F& f) const {
    const int level = choose_isa(isa);
    if (!level) return kIsaMissing;
    if (dtype != kF32 && dtype != kBf16) return kBadArgument;
    parallel_for((rows + height - 1) / height, threads, [&](int64_t i) {
      const int64_t first = i * height, n = std::min(height, rows - first);
      if (dtype == kF32)
        f(float{}, level, first, n, i);
      else
        f(bf16{}, level, first, n, i);
    });
    return kOk;
  }

  // Whether to write `size` elements each, in rows of `width`, past the cache: they are more than the next op would find
  // there, and whole lines. 1,024 x 4096 bf16 masked and read back on two cores: 432 us instead of 509. An op that also
  // sums columns does not gain (gated_residual with three outputs lost: 1.85 ms instead of 1.55).
  bool past_cache(std::initializer_list<const void*> outputs, int64_t size, int64_t width) const {
    const int64_t bytes = dtype == kBf16 ? 2 : 4;
    bool lines = width * bytes % 64 == 0;
    for (const void* p : outputs) lines = lines && reinterpret_cast<uintptr_t>(p) % 64 == 0;
    return lines && size * bytes >= kCache;
  }
};

}  // namespace jointnas
