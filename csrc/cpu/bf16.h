// bfloat16 storage type; arithmetic is fp32.
#pragma once
#include <cstdint>
#include <cstring>

namespace jointnas {

struct bf16 {
  uint16_t bits;
};

enum Dtype : int { kF32 = 0, kBf16 = 1 };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
// Round to nearest even; NaN stays NaN (torch's rule).
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return bf16{0x7fc0};
  return bf16{static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

}  // namespace jointnas
