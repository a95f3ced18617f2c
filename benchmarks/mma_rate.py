"""How fast this GPU's tensor cores multiply by instruction and type: the ceiling of every GEMM kernel.

Warps repeat one instruction on registers (mma.sync) or on one shared-memory tile (wgmma), eight or four independent
accumulators deep, with no memory traffic. The CUDA source is generated here because a 64-register wgmma is not to be
typed by hand. Operands are pseudo-random bits: zeros would draw less power and clock higher.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

REPEATS = 2048

# name: (instruction, A registers, operations of one instruction)
MMA = {
    "mma b1 m16n8k256": ("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc", "s32", 2 * 16 * 8 * 256),
    "mma s4 m16n8k64": ("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", "s32", 2 * 16 * 8 * 64),
    "mma s8 m16n8k32": ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "s32", 2 * 16 * 8 * 32),
    "mma bf16 m16n8k16": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "f32", 2 * 16 * 8 * 16),
}
# name: (instruction, accumulator type, operands after the scale flag, operations)
WGMMA = {
    "wgmma b1 m64n128k256": ("m64n128k256.s32.b1.b1.and.popc", "s32", "", 2 * 64 * 128 * 256),
    "wgmma s8 m64n128k32": ("m64n128k32.s32.s8.s8", "s32", "", 2 * 64 * 128 * 32),
    "wgmma bf16 m64n128k16": ("m64n128k16.f32.bf16.bf16", "f32", ", 1, 1, 0, 0", 2 * 64 * 128 * 16),
}

HEADER = """
#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>
__device__ uint32_t bits(uint32_t x) {
  x ^= x >> 16; x *= 0x7feb352dU; x ^= x >> 15; x *= 0x846ca68bU;
  return x ^ (x >> 16);
}
// bf16 pairs near one, so that sums stay finite
__device__ uint32_t ones(uint32_t x) { return (bits(x) & 0x007f007fU) | 0x3f003f00U; }
template <class F> void rate(const char* name, double operations, F launch) {
  cudaEvent_t a, b;
  cudaEventCreate(&a); cudaEventCreate(&b);
  launch();
  float best = 1e30f;
  for (int i = 0; i < 5; ++i) {
    cudaEventRecord(a); launch(); cudaEventRecord(b); cudaEventSynchronize(b);
    float ms; cudaEventElapsedTime(&ms, a, b);
    if (ms < best) best = ms;
  }
  cudaError_t error = cudaGetLastError();
  printf("%s\\t%.6g\\t%s\\n", name, operations / best * 1e3, cudaGetErrorString(error));
}
"""


def _mma_kernel(index: int, instruction: str, kind: str) -> str:
    ctype, constraint = ("float", "f") if kind == "f32" else ("int", "r")
    fill = "ones" if kind == "f32" else "bits"
    out = ", ".join(f'"+{constraint}"(c[j][{i}])' for i in range(4))
    return f"""
__global__ void mma{index}({ctype}* out) {{
  uint32_t a[4], b[2];
  {ctype} c[8][4] = {{}};
  for (int i = 0; i < 4; ++i) a[i] = {fill}(threadIdx.x * 8 + i);
  for (int i = 0; i < 2; ++i) b[i] = {fill}(threadIdx.x * 8 + 4 + i);
#pragma unroll 1
  for (int t = 0; t < {REPEATS}; ++t)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      asm volatile("{instruction} {{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};" : {out}
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  {ctype} sum = 0;
  for (int j = 0; j < 8; ++j) for (int i = 0; i < 4; ++i) sum += c[j][i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}}
"""


def _wgmma_kernel(index: int, shape: str, kind: str, flags: str) -> str:
    ctype, constraint = ("float", "f") if kind == "f32" else ("int", "r")
    fill = "ones" if kind == "f32" else "bits"
    registers = ", ".join(f"%{i}" for i in range(64))
    one = f"wgmma.mma_async.sync.aligned.{shape} {{{registers}}}, %64, %65, p{flags};"
    body = "".join(f'"{one}\\n"\n' for _ in range(4))
    out = ", ".join(f'"+{constraint}"(c[{i}])' for i in range(64))
    return f"""
__global__ void __launch_bounds__(128) wgmma{index}({ctype}* out) {{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint32_t tile[];
  for (int i = threadIdx.x; i < 12288; i += 128) tile[i] = {fill}(i);
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  // descriptor: address/16, leading and stride offsets of 16 and 1024 bytes, 128-byte swizzle
  uint32_t address = (uint32_t)__cvta_generic_to_shared(tile);
  uint64_t layout = (1ull << 62) | (64ull << 32) | (1ull << 16);
  uint64_t da = ((address >> 4) & 0x3fff) | layout, db = (((address + 16384) >> 4) & 0x3fff) | layout;
  {ctype} c[64] = {{}};
#pragma unroll 1
  for (int t = 0; t < {REPEATS // 4}; ++t)
    asm volatile("{{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.fence.sync.aligned;\\n"
{body}"wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }}" : {out} : "l"(da), "l"(db));
  {ctype} sum = 0;
  for (int i = 0; i < 64; ++i) sum += c[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
#endif
}}
"""


def source(wgmma: bool) -> str:
    """The whole CUDA program."""
    parts, calls = [HEADER], []
    for index, (name, (instruction, kind, operations)) in enumerate(MMA.items()):
        parts.append(_mma_kernel(index, instruction, kind))
        pointer = "(float*)out" if kind == "f32" else "(int*)out"
        launch = f"[&] {{ mma{index}<<<sms * 4, 256>>>({pointer}); }}"
        calls.append(f'rate("{name}", {operations}.0 * {REPEATS} * 8 * 8 * sms * 4, {launch});')
    for index, (name, (shape, kind, flags, operations)) in enumerate(WGMMA.items() if wgmma else ()):
        parts.append(_wgmma_kernel(index, shape, kind, flags))
        pointer = "(float*)out" if kind == "f32" else "(int*)out"
        launch = f"[&] {{ wgmma{index}<<<sms * 4, 128, 49152>>>({pointer}); }}"
        calls.append(f'rate("{name}", {operations}.0 * {REPEATS} * sms * 4, {launch});')
    body = "\n  ".join(calls)
    return "".join(parts) + (
        "\nint main() {\n  cudaDeviceProp p; cudaGetDeviceProperties(&p, 0);\n  int sms = p.multiProcessorCount;\n"
        f"  void* out; cudaMalloc(&out, sms * 4 * 256 * 4);\n  {body}\n}}\n"
    )


def build(nvcc: str, capability: tuple[int, int], folder: Path) -> Path:
    """Compile for one device; sm_90 needs its 'a' target for wgmma."""
    wgmma = capability == (9, 0)
    arch = f"{capability[0]}{capability[1]}" + ("a" if wgmma else "")
    program, text = folder / "mma_rate", folder / "mma_rate.cu"
    text.write_text(source(wgmma))
    command = [nvcc, "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(program), str(text)]
    subprocess.run(command, check=True)
    return program


def measure(nvcc: str, capability: tuple[int, int]) -> dict[str, float]:
    """Operations per second by instruction; an instruction that fails is printed and left out."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([build(nvcc, capability, Path(folder))], capture_output=True, text=True, timeout=60)
    for line in done.stdout.splitlines():
        name, rate, error = line.split("\t")
        if error == "no error":
            rates[name] = float(rate)
        else:
            print(f"{name}: {error}")
    return rates
