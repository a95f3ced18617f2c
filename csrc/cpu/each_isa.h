// Compiles a kernel file once per instruction set. The file ends with
//     #define JN_THIS_FILE "cpu/name.cpp"
//     #include "cpu/each_isa.h"
// and is then included once for each namespace JN_ISA = scalar, avx2 and avx512 (code between its own `#ifdef JN_ISA`
// and `#else`), each time with vec.h for that instruction set and the matching target options. A file that first defines
// JN_EXTENSION gets two more passes: avxvnni, and avx512ext with VNNI, BF16 and VPOPCNTDQ; others may have what they
// need beyond AVX-512 in the avx512 pass, behind its own target attribute, used only where the CPU has it.
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
#else
namespace jointnas {
namespace avx2 = scalar;
namespace avx512 = scalar;
namespace avxvnni = scalar;
namespace avx512ext = scalar;
}  // namespace jointnas
#endif

// JN_DISPATCH(level, call): the variant of a call `f(args)`, or of an assignment `x = f(args)`, for that level. The
// using-directive reaches the call alone; no name of a kernel may exist elsewhere.
#ifdef JN_EXTENSION
#define JN_DISPATCH_EXTENSION(level, ...)      \
  if ((level) >= jointnas::kAvx512Ext) {       \
    using namespace jointnas::avx512ext;       \
    __VA_ARGS__;                               \
  } else if ((level) == jointnas::kAvxVnni) {  \
    using namespace jointnas::avxvnni;         \
    __VA_ARGS__;                               \
  } else
#else
#define JN_DISPATCH_EXTENSION(level, ...)
#endif
#define JN_DISPATCH(level, ...)                       \
  do {                                                \
    JN_DISPATCH_EXTENSION(level, __VA_ARGS__)         \
    if ((level) >= jointnas::kAvx512) {               \
      using namespace jointnas::avx512;               \
      __VA_ARGS__;                                    \
    } else if ((level) >= jointnas::kAvx2) {          \
      using namespace jointnas::avx2;                 \
      __VA_ARGS__;                                    \
    } else {                                          \
      using namespace jointnas::scalar;               \
      __VA_ARGS__;                                    \
    }                                                 \
  } while (0)
