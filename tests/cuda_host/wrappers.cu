// One kernel per PTX wrapper: 32 lanes (128 for wgmma) read their operands from `in` and write the result to `out`.
// Built by nvcc for a device and by g++ on the emulation; both must give the same (tests/gpu/test_wrappers.py).
#include "cuda/hopper.cuh"
#include "cuda/lowbit.cuh"
#include "cuda/wgmma.cuh"

namespace jointnas {
namespace {

constexpr int kWords = 512;  // of input per lane, and of output

template <class T> __global__ void mma_half(const uint32_t* in, uint32_t* out) {
  in += threadIdx.x * kWords;
  out += threadIdx.x * kWords;
  float c[4];
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(static_cast<int>(in[6 + i] % 1000)) / 64;
  ptx::mma_m16n8k16<T>(c, a, in[4], in[5]);
  for (int i = 0; i < 4; ++i) reinterpret_cast<float*>(out)[i] = c[i];
}
__global__ void mma_int(const uint32_t* in, uint32_t* out) {
  in += threadIdx.x * kWords;
  out += threadIdx.x * kWords;
  int c[4] = {int(in[6]), int(in[7]), int(in[8]), int(in[9])}, d[4] = {c[0], c[1], c[2], c[3]};
  int e[4] = {c[0], c[1], c[2], c[3]};
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  ptx::mma_m16n8k32_s8(c, a, in[4], in[5]);
  ptx::mma_m16n8k128_and(d, in[0], in[1], in[4]);
  ptx::mma_m16n8k64_s4(e, a, in[4], in[5]);
  for (int i = 0; i < 4; ++i) out[i] = c[i], out[4 + i] = d[i], out[8 + i] = e[i];
}
template <class T> __global__ void scalars(const uint32_t* in, uint32_t* out) {
  in += threadIdx.x * kWords;
  out += threadIdx.x * kWords;
  for (int i = 0; i < 100; i += 3) {  // any bit patterns: subnormals, infinities and NaN too
    float f;
    memcpy(&f, &in[i], 4);
    out[i] = ptx::from_float<T>(f).bits;
    reinterpret_cast<float*>(out)[i + 1] = ptx::to_float(T{static_cast<uint16_t>(in[i])});
    out[i + 2] = ptx::fma2<T>(in[i], in[i + 1], in[i + 2]);
  }
  out[103] = ptx::and_or(in[0], in[1], in[2]);
  out[104] = ptx::and_xor(in[0], in[1], in[2]);
  out[107] = ptx::bits_of(in[0], in[1], in[2]);
  out[105] = ptx::shuffle_xor(in[0], 5);
  out[106] = ptx::permute(in[0], in[1], in[2] & 0x7777);
  for (int i = 0; i < 4; ++i) {
    out[108 + i] = ptx::smaller2<T>(in[i], in[i + 1]);
    out[112 + i] = ptx::larger2<T>(in[i], in[i + 1]);
  }
  ptx::store8(out + 116, in[0], in[1]);
}
// A tile of dequantised weights, every width and field.
template <class T, int BITS> JN_DEVICE void dequantised(const uint32_t* in, uint32_t* out) {
  uint32_t w[2 * BITS], a[8][4], b[4][4];
  for (int i = 0; i < 2 * BITS; ++i) w[i] = in[i];
  dequant_steps<T, BITS, 0, 8>(w, a);
  spread_tile<BITS>(w, b);
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 4; ++j) out[4 * i + j] = a[i][j];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) out[32 + 4 * i + j] = b[i][j];
}
template <class T> __global__ void tiles(const uint32_t* in, uint32_t* out) {
  in += threadIdx.x * kWords;
  out += threadIdx.x * kWords;
  dequantised<T, 2>(in, out);
  dequantised<T, 4>(in, out + 48);
  dequantised<T, 8>(in, out + 96);
}
// 64 x 64 x 32 int8 and 64 x 64 x 16 half, B in swizzled shared memory at the second k step.
template <class T> __global__ void __launch_bounds__(128) wgmma(const uint32_t* in, uint32_t* out) {
#if defined(JN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  JN_DYNAMIC_SHARED(shared);
  for (int i = threadIdx.x; i < 64 * 32; i += 128) reinterpret_cast<uint32_t*>(shared)[i] = in[i / 16 * kWords + i % 16];
  in += threadIdx.x * kWords;
  out += threadIdx.x * kWords;
  ptx::fence_async_shared();
  ptx::sync_threads();
  const uint32_t a[4] = {in[16], in[17], in[18], in[19]};
  int c[32];
  float d[32];
  ptx::wgmma_fence();
  ptx::wgmma_m64k32_s8<64>(c, a, shared + 32, false);
  ptx::wgmma_m64k16<T, 64>(d, a, shared + 32, false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::registers_fence(c);
  ptx::registers_fence(d);
  for (int i = 0; i < 32; ++i) {
    out[i] = c[i];
    reinterpret_cast<float*>(out)[32 + i] = d[i];
  }
#endif
}

// Four tiles of 8 x 8 halves into rows.
__global__ void turned(const uint32_t* in, uint32_t* out) {
#if defined(JN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  JN_DYNAMIC_SHARED(shared);
  in += threadIdx.x * kWords;
  out += threadIdx.x * kWords;
  ptx::store_transposed4(shared + threadIdx.x * 16, {in[0], in[1], in[2], in[3]});
  ptx::sync_warp();
  for (int i = 0; i < 4; ++i) out[i] = reinterpret_cast<const uint32_t*>(shared)[threadIdx.x * 4 + i];
#endif
}

}  // namespace
}  // namespace jointnas

// name: 0 mma f16, 1 mma bf16, 2 integer mma, 3 scalars f16, 4 scalars bf16, 5 tiles f16, 6 tiles bf16, 7 wgmma f16,
// 8 wgmma bf16, 9 stmatrix
extern "C" int run_wrapper(int name, const uint32_t* in, uint32_t* out, void* stream) {
  using namespace jointnas;
  void (*kernels[])(const uint32_t*, uint32_t*) = {mma_half<F16>, mma_half<BF16>, mma_int,     scalars<F16>, scalars<BF16>,
                                                   tiles<F16>,    tiles<BF16>,    wgmma<F16>, wgmma<BF16>,
                                                   turned};
  const int threads = name == 7 || name == 8 ? 128 : 32;
  return launch(kernels[name], dim3(1), dim3(threads), 8192, static_cast<cudaStream_t>(stream), false, in, out);
}
