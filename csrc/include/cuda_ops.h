// Torch-free launchers. Raw device pointers and a stream in, CUDA error code out (0: launched).
#pragma once
#include <cstdint>

extern "C" {

// Element type codes of activations, scales and outputs.
enum { JN_F16 = 0, JN_BF16 = 1, JN_F32 = 2 };

// y[M, O] = x_hat @ (q * scale)^T, groups of 128 inputs.
struct JnLowbitArgs {
  const void* weight;         // tiled layout of ops/pack.py: [tiles, groups, bits/2, 32, 4] int32
  const void* scale;          // [groups, 16 * tiles], rows g and g + 8 of a tile adjacent; dtype
  const void* x;              // [M, I] dtype, or int8 as written by jn_act_quant_pack
  const float* act_scale;     // [M]; null for 16-bit activations
  const int* act_zero;        // [M]; null for 16-bit activations
  const float* row_sum;       // [O], sums of q * scale over the inputs: zero points applied at the end (wgmma); or null
  void* y;                    // [M, O] dtype
  float* partial;             // [splits, M, O] if splits > 1
  int* locks;                 // [row blocks * token blocks], zero before and after, if splits > 1
  int tokens, rows, inputs;   // M, O, I
  int w_bits, dtype;
  int token_tiles;            // 8-token tiles per block: 1, 2 or 4 (stream), 8 or 16 (tile)
  int warp_rows;              // stream: 64-row strips per block: 1, 2, 4 or 8
  int splits;                 // blocks along the inputs
  int early;                  // 1: programmatic dependent launch; the weights must not come from the kernel before
};
// Few tokens: each warp streams weights of its own, once (lowbit_stream.cu).
int jn_lowbit_stream(const JnLowbitArgs* args, void* stream);
// Many tokens: blocks of 128 rows x 64 or 128 tokens (lowbit_tile.cu).
int jn_lowbit_tile(const JnLowbitArgs* args, void* stream);
// The same with wgmma, sm_90a only; x in the order of jn_token_layout or jn_act_quant_pack(layout 1) (lowbit_wgmma.cu).
int jn_lowbit_wgmma(const JnLowbitArgs* args, void* stream);
// x[M, I] of a 16-bit type to the order lowbit_wgmma reads.
int jn_token_layout(const void* x, void* out, int tokens, int inputs, void* stream);

// Tiled weights and scales to dense [O, I] of dtype: q * scale rounded once (lowbit_dequant.cu).
int jn_lowbit_dequant(const void* weight, const void* scale, void* out, int rows, int inputs, int bits, int dtype,
                      void* stream);

// Per-token dynamic quantization of x[M, I] (dtype, I a multiple of 128) to int8 in the order the kernels read.
// symmetric: 0 or 1. layout: 0 for lowbit_stream and lowbit_tile, 1 for lowbit_wgmma. Writes a[M, I], scale[M] (the
// rounded scale, as fp32) and zero[M].
int jn_act_quant_pack(const void* x, int8_t* a, float* scale, int* zero, int tokens, int inputs, int bits,
                      int symmetric, int layout, int dtype, void* stream);

// W~ = sum_p probs[p] * Q_p(W + scaling B_p A_p), ops/quant_lora_mix.py (quant_lora_mix.cu).
struct JnMixArgs {
  const void* weight;   // [O, I] dtype, I a multiple of 128
  const void* lora_a;   // [P, r, I] dtype, r even, at most 32
  const void* lora_b;   // [P, O, r] dtype
  const float* probs;   // [P], P at most 4
  const float* clip;    // [P, O, I / group_size], or null
  void* out;            // [O, I] dtype
  int rows, inputs, rank, precisions, group_size;  // O, I, r, P; group_size 32, 64 or 128
  int bits;             // bit width of precision p in byte p
  int dtype;            // JN_F16 or JN_BF16
  int columns, splits;  // 128-input tiles per block; blocks along the rows
  float scaling;
};
int jn_quant_lora_mix(const JnMixArgs* args, void* stream);
}  // extern "C"
