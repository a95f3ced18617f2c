"""Compile a Triton kernel for a GPU that is not there, and look at what the assembler made of it.

    compiled = compile_kernel(kernel, {"x_ptr": "*bf16:16", "n": "i32:16", "BLOCK": 1024}, arch=90, num_warps=4)
    compiled.assert_sound()                  # no spills, shared memory within the device limit
    assert compiled.has("HMMA", "HGMMA")     # one of these instructions is in the SASS

Runtime arguments are given as types: "*bf16", "*fp32", "i32", "fp32", ...; the suffix ":16" says that the pointer or
integer is a multiple of 16, as the launcher finds for aligned tensors and sizes. Constexpr arguments are given as
values, and None for a runtime argument means that it is absent (specialised away).
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one block may use (opt-in maximum)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # cuobjdump and ptxas come with the package


@dataclass(frozen=True)
class Compiled:
    name: str
    arch: int
    cubin: bytes
    shared: int
    ttgir: str  # Triton's last intermediate form, with the layout of every tensor over threads

    def _cuobjdump(self, *flags: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{hashlib.sha1(self.cubin).hexdigest()}.cubin"
            path.write_bytes(self.cubin)
            return subprocess.run(
                [TOOLS / "cuobjdump", *flags, path], check=True, capture_output=True, text=True
            ).stdout

    @cached_property
    def usage(self) -> dict[str, int]:
        """REG, STACK, SHARED, LOCAL ... of the kernel."""
        text = self._cuobjdump("--dump-resource-usage")
        return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}

    @property
    def registers(self) -> int:
        return self.usage["REG"]

    @property
    def spilled(self) -> int:
        """Bytes of local memory per thread: the stack frame plus spill slots; 0 when everything is in registers."""
        return self.usage["STACK"] + self.usage["LOCAL"]

    @cached_property
    def sass(self) -> str:
        return self._cuobjdump("--dump-sass")

    def count(self, opcode: str) -> int:
        """How many instructions start with ``opcode`` (e.g. "LDG.E.128")."""
        return len(re.findall(rf"^\s*/\*[0-9a-f]{{4,}}\*/\s+(?:@!?U?P\w+\s+)?{re.escape(opcode)}", self.sass, re.M))

    def reductions(self) -> list[tuple[str, str, str]]:
        """Every reduction and scan in order: which, along which axis, and of what with which layout. Equal entries add
        in the same order."""
        layouts = dict(re.findall(r"^(#\w+) = (.*)$", self.ttgir, re.M))
        pattern = r'"tt\.(reduce|scan)"\(.*?<\{axis = (\d+)(?s:.*?)^ *\}\) : \(([^)]*)\) ->'
        found = re.findall(pattern, self.ttgir, re.M)
        return [(kind, axis, re.sub(r"#\w+", lambda m: layouts.get(m[0], m[0]), of)) for kind, axis, of in found]

    def has(self, *opcodes: str) -> bool:
        return any(self.count(opcode) for opcode in opcodes)

    def assert_sound(self, max_registers: int = 255) -> None:
        where = f"{self.name} for sm_{self.arch}"
        assert self.spilled == 0, f"{where}: {self.spilled} bytes of local memory per thread ({self.usage})"
        assert self.shared <= SHARED_LIMIT[self.arch], f"{where}: {self.shared} bytes of shared memory"
        assert self.registers <= max_registers, f"{where}: {self.registers} registers"


def compile_kernel(
    kernel: triton.JITFunction, arguments: dict[str, object], arch: int, num_warps: int = 4, num_stages: int = 1
) -> Compiled:
    """Compile ``kernel`` for sm_<arch>; ``arguments`` names every parameter (see the module docstring)."""
    names = [p.name for p in kernel.params]
    assert set(arguments) == set(names), f"arguments differ from the parameters by {set(arguments) ^ set(names)}"
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        assert isinstance(value, str), f"{parameter.name} is a runtime argument: give its type, not {value!r}"
        kind, _, multiple = value.partition(":")
        signature[parameter.name] = kind
        if multiple:
            attributes[(i,)] = [["tt.divisibility", int(multiple)]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    return Compiled(kernel.__name__, arch, compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ttgir"])
