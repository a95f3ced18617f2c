// CPU operations. Raw pointers to dense row-major arrays, no allocation of outputs, no checks (Python does both).
// Common arguments: dtype of the untyped pointers (0 fp32, 1 bf16); threads >= 1; isa 0 = best of this CPU, or 1
// scalar, 2 AVX2, 3 AVX-512, 4 AVX-512 + the extension the op names. Result: 0, or an Error of isa.h.
#pragma once
#include <cstdint>

// Asks for huge pages under a fresh allocation that is about to be written. Of the 33 ms that quant_lora_mix of a
// 4096^2 bf16 matrix took in one thread with a new output, 17 were first-touch faults of 4 KiB pages.
int jn_cpu_huge_pages(void* begin, int64_t bytes);

// Reads `bytes` of memory and keeps nothing: the ceiling of anything that streams weights.
int jn_cpu_read(const void* p, int64_t bytes, int threads, int isa);

// out[m, n] = w[m, n] * r[m] * c[n]     w, out [M, N] dtype; r [M], c [N] fp32
int jn_cpu_mixed_weight(const void* w, const float* r, const float* c, void* out, int64_t M, int64_t N, int dtype,
                        int threads, int isa);
// dw = g r c (null: skipped); dr [M] = row sums of c g w; partial [chunks of chunk_rows, N]: column sums of r g w
int jn_cpu_mixed_weight_backward(const void* g, const void* w, const float* r, const float* c, void* dw, float* dr,
                                 float* partial, int64_t M, int64_t N, int64_t chunk_rows, int dtype, int threads,
                                 int isa);

// out = sum_p probs[p] * Q_p(w + scaling * B_p A_p)
// w, out [O, I] dtype; lora_a [P, rank, I], lora_b [P, O, rank] lora_dtype; probs [P]; clip [P, O, I/g] or null; bits [P]
// isa 4: AVX512_BF16, for bf16 weights
int jn_cpu_quant_lora_mix(const void* w, const void* lora_a, const void* lora_b, const float* probs, const float* clip,
                          const int* bits, void* out, int64_t O, int64_t I, int64_t P, int64_t rank, int64_t g,
                          float scaling, int dtype, int lora_dtype, int threads, int isa);

// The backward's reductions for rows [begin, begin + count) of the gradient, grad [count, I] grad_dtype:
// dprobs [ceil(count / 12), P] partial sums of <G, Q_p>; masked [P, count, I] grad_dtype or null: G where the level was
// not clamped; dclip [P, O, I/g] or null, these rows only. Others as above.
int jn_cpu_quant_lora_mix_backward(const void* w, const void* lora_a, const void* lora_b, const float* probs,
                                   const float* clip, const int* bits, const void* grad, void* masked, float* dprobs,
                                   float* dclip, int64_t begin, int64_t count, int64_t O, int64_t I, int64_t P,
                                   int64_t rank, int64_t g, float scaling, int dtype, int lora_dtype, int grad_dtype,
                                   int threads, int isa);

// Elementwise operations: tensors [rows, N] dtype, vectors fp32. Work is cut into chunks of chunk_rows rows; a
// `partial` [chunks, N] receives each chunk's column sums. Formulas: the docstrings of ops/*.py.

// y = g * mask; partial (with x): column sums of g * x
int jn_cpu_channel_mask(const void* g, const void* x, const float* mask, void* y, float* partial, int64_t rows, int64_t N,
                        int64_t chunk_rows, int dtype, int threads, int isa);
// out = h + mask y (mask may be null: 1), or with gate [1] and x: x + gate (h + mask y - x)
int jn_cpu_gated_residual(const void* h, const void* y, const float* mask, const float* gate, const void* x, void* out,
                          int64_t rows, int64_t N, int64_t chunk_rows, int dtype, int threads, int isa);
// dh = gate g, dx = (1 - gate) g, dy = gate g mask (null: skipped); partial: column sums of gate g y; dgate [chunks]
int jn_cpu_gated_residual_backward(const void* g, const void* h, const void* y, const float* mask, const float* gate,
                                   const void* x, void* dh, void* dy, void* dx, float* partial, float* dgate,
                                   int64_t rows, int64_t N, int64_t chunk_rows, int dtype, int threads, int isa);
// out = silu(r gate) (r up) c
int jn_cpu_masked_swiglu(const void* gate, const void* up, const float* r, const float* c, void* out, int64_t rows,
                         int64_t N, int64_t chunk_rows, int dtype, int threads, int isa);
// dr, dc: column sums per chunk, or null
int jn_cpu_masked_swiglu_backward(const void* g, const void* gate, const void* up, const float* r, const float* c,
                                  void* dgate, void* dup, float* dr, float* dc, int64_t rows, int64_t N,
                                  int64_t chunk_rows, int dtype, int threads, int isa);
// scale = weight * in_mask; ends [S] where choices end, ascending; choice i keeps segments 0..kept[i]; inv [rows, K] out
int jn_cpu_mixed_rmsnorm(const void* x, const float* scale, const float* alpha, const int64_t* ends, const int64_t* kept,
                         void* y, float* inv, int64_t rows, int64_t N, int64_t S, int64_t K, float eps,
                         int64_t chunk_rows, int dtype, int threads, int isa);
// dalpha [rows, K] or null; partial: column sums of g x t, or null
int jn_cpu_mixed_rmsnorm_backward(const void* g, const void* x, const float* scale, const float* alpha, const float* inv,
                                  const int64_t* ends, const int64_t* kept, void* dx, float* dalpha, float* partial,
                                  int64_t rows, int64_t N, int64_t S, int64_t K, int64_t chunk_rows, int dtype,
                                  int threads, int isa);
// x, out [tokens, H, D]; mask [H, D]; cosine, sine [period, D], token t uses row t % period
int jn_cpu_masked_rope(const void* x, const float* mask, const float* cosine, const float* sine, void* out, int64_t tokens,
                       int64_t period, int64_t H, int64_t D, int64_t chunk_rows, int dtype, int threads, int isa);
// partial [chunks, H, D]: sums of x rope^T(g), or null (x is not read then)
int jn_cpu_masked_rope_backward(const void* g, const void* x, const float* mask, const float* cosine, const float* sine,
                                void* dx, float* partial, int64_t tokens, int64_t period, int64_t H, int64_t D,
                                int64_t chunk_rows, int dtype, int threads, int isa);

// y = sum_q probs[q] Q_q(mask x), per row; mask [N] or null; bits [Q] <= 8 or 16; Q <= 16
int jn_cpu_act_quant_mix(const void* x, const float* probs, const float* mask, const int* bits, void* y, int64_t rows,
                         int64_t N, int64_t Q, int symmetric, int64_t chunk_rows, int dtype, int threads, int isa);
// Each output may be null: dx = total mask g; dprobs [rows, Q]: <g, Q_q> per row; partial: column sums of g x
int jn_cpu_act_quant_mix_backward(const void* g, const void* x, const float* mask, const int* bits, void* dx,
                                  float* dprobs, float* partial, int64_t rows, int64_t N, int64_t Q, int symmetric,
                                  float total, int64_t chunk_rows, int dtype, int threads, int isa);

// y = sum_q probs[q] Q_q(v), v = mixed_rmsnorm(x) rounded to dtype; levels [rows, Q, 2] out: scale and zero point
int jn_cpu_mixed_rmsnorm_quant(const void* x, const float* scale, const float* alpha, const int64_t* ends,
                               const int64_t* kept, const float* probs, const int* bits, void* y, float* inv,
                               float* levels, int64_t rows, int64_t N, int64_t S, int64_t K, int64_t Q, int symmetric,
                               float eps, int64_t chunk_rows, int dtype, int threads, int isa);
// total = sum of probs; dalpha [rows, K] or null; dprobs [rows, Q]; partial: column sums of total g x t, or null
int jn_cpu_mixed_rmsnorm_quant_backward(const void* g, const void* x, const float* scale, const float* alpha,
                                        const float* inv, const int64_t* ends, const int64_t* kept,
                                        const float* levels, const int* bits, void* dx, float* dalpha, float* dprobs,
                                        float* partial, int64_t rows, int64_t N, int64_t S, int64_t K, int64_t Q,
                                        float total, int64_t chunk_rows, int dtype, int threads, int isa);

// Weights laid out for lowbit_matmul: packed int32 [O, I w_bits/32] (ops/pack.py) and scale [O, I/g] scale_dtype to data
// int32 [ceil(O/64), I/stored, meta + words, 64] (ops/lowbit_prepared.py). stored divides g; both are whole words.
int jn_cpu_lowbit_pack(const void* packed, const void* scale, void* data, int64_t O, int64_t I, int w_bits, int64_t g,
                       int64_t stored, int planes, int scale_dtype, int threads, int isa);
// y = x_hat (q scale)^T: x, y [M, I], [M, O] dtype; a_bits 16, or 2..8: x is quantized per token first; scale_dtype that
// of lowbit_pack. isa 4: AVX512_VNNI for a_bits < 16, AVX512_BF16 for bf16 activations, AVX512_VPOPCNTDQ for planes
int jn_cpu_lowbit_matmul(const void* x, const void* data, void* y, int64_t M, int64_t O, int64_t I, int w_bits,
                         int a_bits, int64_t stored, int symmetric, int planes, int dtype, int scale_dtype, int threads,
                         int isa);
// The same from the storage layout, laid out block by block on the way.
int jn_cpu_lowbit_linear(const void* x, const void* packed, const void* scale, void* y, int64_t M, int64_t O, int64_t I,
                         int w_bits, int a_bits, int64_t g, int64_t stored, int symmetric, int dtype, int scale_dtype,
                         int threads, int isa);
