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
  int token_tiles;            // 8-token tiles per block: 1, 2 or 4 (stream), 8 or 16 (tile), 16 or 32 (int8);
                              // bitplane: tiles of 8 token planes, 1, 2 or 4
  int warp_rows;              // stream: 64-row strips per block: 1, 2, 4 or 8
  int splits;                 // blocks along the inputs
  int early;                  // 1: programmatic dependent launch; the weights must not come from the kernel before
  int a_bits;                 // bitplane: planes per token
  int cluster;                // int8: blocks that share their tokens' copies, 1 or 2
};
// Few tokens: each warp streams weights of its own, once (lowbit_stream.cu).
int jn_lowbit_stream(const JnLowbitArgs* args, void* stream);
// Many tokens: blocks of 128 rows x 64 or 128 tokens (lowbit_tile.cu).
int jn_lowbit_tile(const JnLowbitArgs* args, void* stream);
// The same with wgmma, sm_90a only; x in the order of jn_token_layout or jn_act_quant_pack(layout 1) (lowbit_wgmma.cu).
int jn_lowbit_wgmma(const JnLowbitArgs* args, void* stream);
// Quantized tokens only, sm_90a only, warp-specialised: blocks of 128 rows x 128 or 256 tokens; x of
// jn_act_quant_pack(layout 2); no splits (lowbit_int8.cu).
int jn_lowbit_int8(const JnLowbitArgs* args, void* stream);
// Few tokens, W{2,4} x A{2,4,8} on bit-planes, zero points by row_sum: weight of ops/pack.py tile_planes, x of
// jn_act_quant_pack(layout 3); warp_rows and splits as for the streaming kernel (lowbit_bitplane.cu).
int jn_lowbit_bitplane(const JnLowbitArgs* args, void* stream);
// x[M, I] of a 16-bit type to the order lowbit_wgmma reads.
int jn_token_layout(const void* x, void* out, int tokens, int inputs, void* stream);

// Tiled weights and scales to dense [O, I] of dtype: q * scale rounded once (lowbit_dequant.cu).
int jn_lowbit_dequant(const void* weight, const void* scale, void* out, int rows, int inputs, int bits, int dtype,
                      void* stream);

// Per-token dynamic quantization of x[M, I] (dtype, I a multiple of 128) in the order the kernels read. symmetric: 0 or
// 1. Writes scale[M] (the rounded scale, as fp32), zero[M] and, by layout,
//   0  int8 [M, I] for lowbit_stream and lowbit_tile       1  int8 [M, I] for lowbit_wgmma
//   2  int8 [I / 128, ceil(M / 8), 8, 128] for lowbit_int8, swizzled; tokens past the end are not written
//   3  bits [M, I / 128, bits, 128] for lowbit_bitplane: plane j holds bit j of the two's complement, input k at bit k
int jn_act_quant_pack(const void* x, int8_t* a, float* scale, int* zero, int tokens, int inputs, int bits,
                      int symmetric, int layout, int dtype, void* stream);

// W~ = sum_p probs[p] * Q_p(W + scaling B_p A_p), ops/quant_lora_mix.py; or, if there is a grad, sum(grad * Q_p) of the
// rows begin .. end - 1, one partial sum per warp (quant_lora_mix.cu).
struct JnMixArgs {
  const void* weight;   // [O, I] dtype, I a multiple of 128
  const void* lora_a;   // [P, r, I] dtype, r 8, 16, 24 or 32
  const void* lora_b;   // [P, O, r] dtype
  const void* grad;     // [end - begin, I] dtype, or null
  const float* probs;   // [P], P at most 4
  const float* clip;    // [P, O, I / group_size], or null
  void* out;            // [O, I] dtype; not written if there is a grad
  float* partial;       // [P, ceil(I / 128 / columns) * splits * 4]; only if there is a grad
  int rows, begin, end; // O, and the rows to work on
  int inputs, rank, precisions, group_size;  // I, r, P; group_size 32, 64 or 128
  int bits;             // bit width of precision p in byte p
  int dtype;            // JN_F16 or JN_BF16
  int columns, splits;  // 128-input tiles per block; blocks along the rows
  float scaling;
};
int jn_quant_lora_mix(const JnMixArgs* args, void* stream);
}  // extern "C"
