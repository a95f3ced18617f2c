// Compiles a kernel file once per instruction set. The file ends with
//     #define JN_THIS_FILE "name.cpp"
//     #include "cpu/each_isa.h"
// and is then included three times with JN_ISA = scalar, avx2, avx512 (a namespace; code between its own
// `#ifdef JN_ISA` and `#else`), each time with vec.h for that instruction set and the matching target options.
// What a kernel has beyond these sits in the avx512 pass behind its own target attribute, or in two more passes
// (JN_EXTENSION): avxvnni, and avx512ext with VNNI, BF16 and VPOPCNTDQ, each used only by kernels that ask for it.
// Everything these passes use must be included before: inline functions of the standard library that were first
// seen under a target option could otherwise be emitted with instructions the CPU lacks.
#pragma once
#include <cstdint>
#include <cstring>
#include <cmath>
#include <algorithm>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// GCC 12 reports the deliberately undefined operands inside its own AVX-512 intrinsics (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#define JN_ISA scalar
#include "cpu/vec.h"
#include JN_THIS_FILE
#undef JN_ISA

#if defined(__x86_64__)
#define JN_AVX2 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define JN_ISA avx2
#include "cpu/vec.h"
#include JN_THIS_FILE
#undef JN_ISA
#pragma GCC pop_options
#ifdef JN_EXTENSION
#define JN_AVXVNNI 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#define JN_ISA avxvnni
#include "cpu/vec.h"
#include JN_THIS_FILE
#undef JN_ISA
#pragma GCC pop_options
#undef JN_AVXVNNI
#endif
#undef JN_AVX2

#define JN_AVX512 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define JN_ISA avx512
#include "cpu/vec.h"
#include JN_THIS_FILE
#undef JN_ISA
#pragma GCC pop_options
#ifdef JN_EXTENSION
#define JN_AVX512EXT 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vpopcntdq,prefer-vector-width=512")
#define JN_ISA avx512ext
#include "cpu/vec.h"
#include JN_THIS_FILE
#undef JN_ISA
#pragma GCC pop_options
#undef JN_AVX512EXT
#endif
#undef JN_AVX512
#endif

// JN_DISPATCH(level, call): the variant of a call `f(args)`, or of an assignment `x = f(args)`, for that level, without
// the passes of JN_EXTENSION. The using-directive reaches the call alone; no name of a kernel may exist elsewhere.
#if defined(__x86_64__)
#define JN_DISPATCH(level, ...)             \
  do {                                      \
    if ((level) >= jointnas::kAvx512) {          \
      using namespace jointnas::avx512;          \
      __VA_ARGS__;                          \
    } else if ((level) >= jointnas::kAvx2) {     \
      using namespace jointnas::avx2;            \
      __VA_ARGS__;                          \
    } else {                                \
      using namespace jointnas::scalar;          \
      __VA_ARGS__;                          \
    }                                       \
  } while (0)
#else
#define JN_DISPATCH(level, ...)    \
  do {                             \
    using namespace jointnas::scalar;   \
    __VA_ARGS__;                   \
  } while (0)
#endif
