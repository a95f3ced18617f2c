// From a launcher's arguments to the template arguments of a kernel.
#pragma once
#include <type_traits>

#include "cuda/ptx.cuh"
#include "export.h"

namespace jointnas {

// The code of an element type of activations, scales and outputs.
constexpr int kF16 = 0, kBF16 = 1;
template <int CODE> using Half = std::conditional_t<CODE == kF16, F16, BF16>;

JN_HOST_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

// Whether 16-byte accesses can start there: on the device an odd address would end the process's use of it.
template <class... P> bool aligned(const P*... addresses) {
  return (... | reinterpret_cast<uintptr_t>(addresses)) % 16 == 0;
}

// One of a few values that a kernel is compiled for.
template <int... VALUES> struct OneOf { int value; };
using Type = OneOf<kF16, kBF16>;

// f(constants) for the values given, an error code; kBadArgument if one of them is none of its list.
template <int... CHOSEN, class F> int dispatch(const F& f) { return f(std::integral_constant<int, CHOSEN>{}...); }
template <int... CHOSEN, class F, int... VALUES, class... Rest>
int dispatch(const F& f, OneOf<VALUES...> first, Rest... rest) {
  int error = kBadArgument;
  (void)((first.value == VALUES && (error = dispatch<CHOSEN..., VALUES>(f, rest...), true)) || ...);
  return error;
}

}  // namespace jointnas
