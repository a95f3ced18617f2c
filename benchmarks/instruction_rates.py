"""How fast this GPU executes one instruction: the ceiling of every GEMM kernel, and the floor of what it does besides.

A kernel per instruction repeats it on registers (wgmma: on one shared-memory tile) with no memory traffic, in eight
chains per thread or warp that do not wait for each other (wgmma: one in each of four warpgroups per SM). Rates are of
the whole device per second, and of one multiprocessor (SM) per clock, by its own clock. Tensor cores are counted in
operations, a multiply-add being two; other instructions once per thread, as the CUDA programming guide does: an SM
issues at most 128 per clock.

Nothing is merged or left out: each instruction reads what the one before it in its chain wrote, and results are stored.
tests/aot/test_instruction_rates.py counts them in the assembled loops. The CUDA source is generated because a wgmma of
64 registers is not to be typed by hand. Values are pseudo-random: zeros would draw less power and clock higher.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import Timing

BLOCKS = 4  # per SM, resident together
CHAINS, UNROLLED = 8, 32  # a loop of 256 instructions hides its own three


@dataclass(frozen=True)
class Instruction:
    """One kernel: in its loop ``count`` instructions, each issued by ``issuers`` of a block and worth ``work``."""

    name: str
    sass: Mapping[int, str]  # compute capability: a pattern of what it is assembled to there, empty if emulated
    count: int
    repeats: int
    work: float  # operations, or 1
    threads: int
    issuers: int  # threads, warps or warpgroups of a block
    body: str
    shared: int = 0  # bytes
    unit: str = "instr/s"

    @property
    def symbol(self) -> str:
        return "rate_" + re.sub(r"\W+", "_", self.name).lower()

    @property
    def block_work(self) -> float:
        """What one thread block does."""
        return self.work * self.count * self.repeats * self.issuers


class Span(NamedTuple):
    """When a thread block ran, in clocks of its SM."""

    sm: int
    begin: int
    end: int


class Rate(NamedTuple):
    """Of the whole device per second, and of one SM per clock."""

    second: Timing
    clock: float
    sms: int


# --- instructions -----------------------------------------------------------------------------------------------------

HEADER = """
#include <cstdint>
#include <cstdio>
#include <vector>
#include <cuda_runtime.h>
struct Span { int sm; long long begin, end; };
__device__ uint32_t bits(uint32_t x) {
  x ^= x >> 16; x *= 0x7feb352dU; x ^= x >> 15; x *= 0x846ca68bU;
  return x ^ (x >> 16);
}
// bf16 pairs near one, so that sums stay finite
__device__ uint32_t ones(uint32_t x) { return (bits(x) & 0x007f007fU) | 0x3f003f00U; }
__device__ void note(Span* spans, long long begin) {
  __syncthreads();
  long long end = clock64();
  int sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  if (threadIdx.x == 0) spans[blockIdx.x] = {sm, begin, end};
}
template <class Kernel> void rate(const char* name, Kernel kernel, int threads, int shared) {
  int sms = 0;
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
  int blocks = sms * BLOCKS;
  uint32_t* out = nullptr; Span* spans = nullptr;
  cudaMalloc(&out, blocks * threads * 4); cudaMalloc(&spans, blocks * sizeof(Span));
  cudaEvent_t a, b;
  cudaEventCreate(&a); cudaEventCreate(&b);
  std::vector<float> times(5);
  kernel<<<blocks, threads, shared>>>(out, spans);
  for (float& ms : times) {
    cudaEventRecord(a); kernel<<<blocks, threads, shared>>>(out, spans); cudaEventRecord(b);
    cudaEventSynchronize(b); cudaEventElapsedTime(&ms, a, b);
  }
  std::vector<Span> found(blocks);
  cudaMemcpy(found.data(), spans, blocks * sizeof(Span), cudaMemcpyDeviceToHost);
  printf("%s\\t%s\\t", name, cudaGetErrorString(cudaGetLastError()));
  for (float ms : times) printf("%.9g ", ms / 1e3);
  printf("\\t");
  for (Span& s : found) printf("%d:%lld:%lld ", s.sm, s.begin, s.end);
  printf("\\n");
  fflush(stdout);
  cudaFree(out); cudaFree(spans);
}
"""


class Scalar(NamedTuple):
    """PTX of an instruction of one thread: %0 is its chain, %1 and %2 the next two, %3 a constant.

    Chains of multiply-adds are x² - c with c of 1.5 to 1.75, whose values never settle. Integers are stirred by other
    chains, or by an odd factor. Only conversions from integers settle, on numbers whose bits are their own value.
    """

    ptx: str
    start: tuple[int, int] = (0xFFFFFFFF, 0)  # bits that are random, bits that are set
    constant: tuple[int, int] = (0xFFFFFFFF, 1)


# name: PTX, and SASS of sm_80 and sm_90. The assembler takes HFMA2 and HFMA2.MMA in turns,
# as it does in kernels.
SCALAR = {
    "I2FP s32 to fp32": (Scalar("cvt.rn.f32.s32 %0, %0;"), "I2F", "I2FP.F32.S32"),
    "FP16x2 FMA": (
        Scalar("fma.rn.f16x2 %0, %0, %0, %3;", (0x03FF03FF, 0x38003800), (0x00FF00FF, 0xBE00BE00)),
        r"HFMA2(\.MMA)?", r"HFMA2(\.MMA)?",
    ),
    "BF16x2 FMA": (
        Scalar("fma.rn.bf16x2 %0, %0, %0, %3;", (0x007F007F, 0x3F003F00), (0x001F001F, 0xBFC0BFC0)),
        r"HFMA2(\.MMA)?\.BF16_V2", r"HFMA2(\.MMA)?\.BF16_V2",
    ),
    "FP32 FMA": (
        Scalar("fma.rn.f32 %0, %0, %0, %3;", (0x007FFFFF, 0x3F000000), (0x001FFFFF, 0xBFC00000)), "FFMA", "FFMA",
    ),
    "F2FP fp32 to bf16x2": (
        Scalar("cvt.rn.bf16x2.f32 %0, %1, %0;", (0x007F007F, 0x3F003F00)), "F2FP.BF16.PACK_AB", "F2FP.BF16.F32.PACK_AB",
    ),
    "LOP3": (Scalar("lop3.b32 %0, %0, %1, %2, 0x96;"), "LOP3.LUT", "LOP3.LUT"),
    "PRMT": (Scalar("prmt.b32 %0, %0, %1, 0x5062;"), "PRMT", "PRMT"),
    "IMAD": (Scalar("mad.lo.u32 %0, %0, %3, %1;"), "IMAD", "IMAD"),
}  # fmt: skip
# name: (PTX, accumulators, operations of one, SASS of sm_80 and sm_90)
MMA = {
    "mma b1 m16n8k256": (
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc", "s32", 2 * 16 * 8 * 256,
        "BMMA.168256.AND.POPC", "BMMA.168256.AND.POPC",
    ),
    # without an instruction on sm_90, where it is emulated
    "mma s4 m16n8k64": (
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", "s32", 2 * 16 * 8 * 64, "IMMA.16864.S4.S4", "",
    ),
    "mma s8 m16n8k32": (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "s32", 2 * 16 * 8 * 32, "IMMA.16832.S8.S8",
        "IMMA.16832.S8.S8",
    ),
    "mma bf16 m16n8k16": (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "f32", 2 * 16 * 8 * 16, "HMMA.16816.F32.BF16",
        "HMMA.16816.F32.BF16",
    ),
}  # fmt: skip
# name: (PTX, accumulators, operands after the scale flag, operations, SASS)
WGMMA = {
    "wgmma b1 m64n128k256": (
        "m64n128k256.s32.b1.b1.and.popc", "s32", "", 2 * 64 * 128 * 256, "BGMMA.64x128x256.AND.POPC",
    ),
    "wgmma s8 m64n128k32": ("m64n128k32.s32.s8.s8", "s32", "", 2 * 64 * 128 * 32, "IGMMA.64x128x32.S8.S8"),
    "wgmma bf16 m64n128k16": (
        "m64n128k16.f32.bf16.bf16", "f32", ", 1, 1, 0, 0", 2 * 64 * 128 * 16, "HGMMA.64x128x16.F32.BF16",
    ),
}  # fmt: skip


def _scalar_body(s: Scalar, repeats: int) -> str:
    fill = lambda index, masks: f"(bits({index}) & {masks[0]:#x}U) | {masks[1]:#x}U"  # noqa: E731
    start, constant = fill(f"threadIdx.x * {CHAINS} + j", s.start), fill("threadIdx.x + 0x10000", s.constant)
    return f"""
  uint32_t x[{CHAINS}], c = {constant}, sum = 0;
  for (int j = 0; j < {CHAINS}; ++j) x[j] = {start};
  __syncthreads();
  long long begin = clock64();
#pragma unroll 1
  for (int t = 0; t < {repeats}; ++t)
#pragma unroll
    for (int u = 0; u < {UNROLLED}; ++u)
#pragma unroll
      for (int j = 0; j < {CHAINS}; ++j)
        asm volatile("{s.ptx}" : "+r"(x[j]) : "r"(x[(j + 1) % {CHAINS}]), "r"(x[(j + 2) % {CHAINS}]), "r"(c));
  note(spans, begin);
  for (int j = 0; j < {CHAINS}; ++j) sum ^= x[j];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
"""


def _mma_body(ptx: str, kind: str, repeats: int) -> str:
    ctype, constraint = ("float", "f") if kind == "f32" else ("int", "r")
    fill = "ones" if kind == "f32" else "bits"
    out = ", ".join(f'"+{constraint}"(c[j][{i}])' for i in range(4))
    return f"""
  uint32_t a[4], b[2];
  {ctype} c[{CHAINS}][4] = {{}};
  for (int i = 0; i < 4; ++i) a[i] = {fill}(threadIdx.x * 8 + i);
  for (int i = 0; i < 2; ++i) b[i] = {fill}(threadIdx.x * 8 + 4 + i);
  __syncthreads();
  long long begin = clock64();
#pragma unroll 1
  for (int t = 0; t < {repeats}; ++t)
#pragma unroll
    for (int j = 0; j < {CHAINS}; ++j)
      asm volatile("{ptx} {{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};" : {out}
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  note(spans, begin);
  {ctype} sum = 0;
  for (int j = 0; j < {CHAINS}; ++j) for (int i = 0; i < 4; ++i) sum += c[j][i];
  (({ctype}*)out)[blockIdx.x * blockDim.x + threadIdx.x] = sum;
"""


def _wgmma_body(shape: str, kind: str, flags: str, repeats: int) -> str:
    ctype, constraint = ("float", "f") if kind == "f32" else ("int", "r")
    fill = "ones" if kind == "f32" else "bits"
    registers = ", ".join(f"%{i}" for i in range(64))
    one = f"wgmma.mma_async.sync.aligned.{shape} {{{registers}}}, %64, %65, p{flags};"
    four = "".join(f'"{one}\\n"\n' for _ in range(4))
    out = ", ".join(f'"+{constraint}"(c[{i}])' for i in range(64))
    return f"""
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
  long long begin = clock64();
#pragma unroll 1
  for (int t = 0; t < {repeats}; ++t)
    asm volatile("{{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.fence.sync.aligned;\\n"
{four}"wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }}" : {out} : "l"(da), "l"(db));
  note(spans, begin);
  {ctype} sum = 0;
  for (int i = 0; i < 64; ++i) sum += c[i];
  (({ctype}*)out)[blockIdx.x * blockDim.x + threadIdx.x] = sum;
#endif
"""


def instructions(wgmma: bool) -> dict[str, Instruction]:
    """All that a device has, by name."""
    found = []
    for name, (scalar, ampere, hopper) in SCALAR.items():
        body, sass = _scalar_body(scalar, 4096), {80: ampere, 90: hopper}
        found.append(Instruction(name, sass, CHAINS * UNROLLED, 4096, 1, 256, 256, body))
    for name, (ptx, kind, operations, ampere, hopper) in MMA.items():
        body, sass = _mma_body(ptx, kind, 2048), {80: ampere, 90: hopper}
        found.append(Instruction(name, sass, CHAINS, 2048, operations, 256, 8, body, unit="OP/s"))
    for name, (shape, kind, flags, operations, hopper) in WGMMA.items() if wgmma else ():
        body = _wgmma_body(shape, kind, flags, 512)
        found.append(Instruction(name, {90: hopper}, 4, 512, operations, 128, 1, body, 49152, "OP/s"))
    return {instruction.name: instruction for instruction in found}


# --- the program ------------------------------------------------------------------------------------------------------


def source(chosen: Collection[Instruction]) -> str:
    """The whole CUDA program."""
    given = "(uint32_t* out, Span* spans)"
    kernels = "".join(
        f'extern "C" __global__ void __launch_bounds__({i.threads}) {i.symbol}{given} {{{i.body}}}\n' for i in chosen
    )
    calls = "".join(f'  rate("{i.name}", {i.symbol}, {i.threads}, {i.shared});\n' for i in chosen)
    return f"#define BLOCKS {BLOCKS}{HEADER}{kernels}int main() {{\n{calls}}}\n"


def compile_program(nvcc: str, arch: str, chosen: Collection[Instruction], target: Path, *options: str) -> Path:
    """The program for one GPU generation, e.g. ``90a``."""
    text = target.with_suffix(".cu")
    text.write_text(source(chosen))
    command = [nvcc, "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", *options]
    subprocess.run([*command, "-o", str(target), str(text)], check=True)
    return target


def per_clock(spans: Sequence[Span], block_work: float) -> float:
    """What one SM does per clock: from when its first thread block began to when its last one ended; the median."""
    on: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        on[span.sm].append(span)
    return statistics.median(
        block_work * len(own) / (max(s.end for s in own) - min(s.begin for s in own)) for own in on.values()
    )


def parsed(line: str, instruction: Instruction) -> Rate | str:
    """What the program says of one instruction: its rate, or the error."""
    _, error, seconds, blocks = line.split("\t")
    if error != "no error":
        return error
    spans = [Span(*map(int, block.split(":"))) for block in blocks.split()]
    total = instruction.block_work * len(spans)
    rates = Timing.of([total / float(s) for s in seconds.split()])
    return Rate(rates, per_clock(spans, instruction.block_work), len({s.sm for s in spans}))


def measure(
    nvcc: str, capability: tuple[int, int], without: Collection[str] = ()
) -> Iterator[tuple[Instruction, Rate]]:
    """Each instruction but those ``without``, as soon as it is measured; one that fails is printed and left out."""
    wgmma = capability == (9, 0)  # needs the 'a' target
    known = instructions(wgmma)
    chosen = [instruction for name, instruction in known.items() if name not in without]
    if not chosen:
        return
    with tempfile.TemporaryDirectory() as folder:
        arch = f"{capability[0]}{capability[1]}" + ("a" if wgmma else "")
        program = compile_program(nvcc, arch, chosen, Path(folder) / "rates")
        with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                name = line.split("\t")[0]
                found = parsed(line.rstrip("\n"), known[name])
                if isinstance(found, str):
                    print(f"FAILED {name}: {found}", flush=True)
                else:
                    yield known[name], found
