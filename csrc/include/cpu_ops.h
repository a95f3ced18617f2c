// CPU operations. Raw pointers to dense row-major arrays, no allocation of outputs, no checks (Python does both).
// Common arguments: dtype of the untyped pointers (0 fp32, 1 bf16); threads >= 1; isa 0 = best of this CPU, or 1
// scalar, 2 AVX2, 3 AVX-512, 4 AVX-512 + the extension the op names. Result: 0, or an Error of isa.h.
#pragma once
#include <cstdint>

// out[m, n] = w[m, n] * r[m] * c[n]     w, out [M, N] dtype; r [M], c [N] fp32
int jn_cpu_mixed_weight(const void* w, const float* r, const float* c, void* out, int64_t M, int64_t N, int dtype,
                        int threads, int isa);
