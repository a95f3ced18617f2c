// CPU operations. Raw pointers to dense row-major arrays, no allocation of outputs, no checks (Python does both).
// Common arguments: dtype of the untyped pointers (0 fp32, 1 bf16); threads >= 1; isa 0 = best of this CPU, or 1
// scalar, 2 AVX2, 3 AVX-512, 4 AVX-512 + the extension the op names. Result: 0, or an Error of isa.h.
#pragma once
#include <cstdint>

// out[m, n] = w[m, n] * r[m] * c[n]     w, out [M, N] dtype; r [M], c [N] fp32
int jn_cpu_mixed_weight(const void* w, const float* r, const float* c, void* out, int64_t M, int64_t N, int dtype,
                        int threads, int isa);

// out = sum_p probs[p] * Q_p(w + scaling * B_p A_p)
// w, out [O, I] dtype; lora_a [P, rank, I], lora_b [P, O, rank] lora_dtype; probs [P]; clip [P, O, I/g] or null; bits [P]
// isa 4: AVX512_BF16, for bf16 weights
int jn_cpu_quant_lora_mix(const void* w, const void* lora_a, const void* lora_b, const float* probs, const float* clip,
                          const int* bits, void* out, int64_t O, int64_t I, int64_t P, int64_t rank, int64_t g,
                          float scaling, int dtype, int lora_dtype, int threads, int isa);
