"""What a device would answer with an error that ends the process's use of it: odd addresses, tensors of two devices,
more blocks than locks. Copied where that is right, else refused by a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops import LowbitWeight, lowbit_matmul
from jointnas_kernels.ops.core import cuda as calls
from jointnas_kernels.ops.lowbit import choice
from jointnas_kernels.ops.lowbit import cuda as lowbit_cuda
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.quant.mixture import cuda
from jointnas_kernels.ops.quant.mixture.reference import Mixture, Upstream

pytestmark = pytest.mark.usefixtures("on_cpu")


def odd(tensor: Tensor) -> Tensor:
    """The same values as a dense view one element into a larger tensor."""
    view = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert view.is_contiguous()
    assert view.data_ptr() % 16
    return view


def weight(rows: int, inputs: int, bits: int = 4, planes: bool = False) -> LowbitWeight:
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, inputs), dtype=torch.int8)
    scale = (torch.rand(rows, inputs // 128) + 0.5).half()
    return LowbitWeight.pack(pack_weight(q, bits), scale, bits, 128, layout="cuda", planes=planes)


@pytest.mark.parametrize("kernel", ["stream", "stripe", "tile", "wgmma", "int8", "half", "dense", "bitplane"])
@pytest.mark.parametrize("a_bits", [16, 4])
def test_activations_at_an_odd_address(kernel, a_bits, monkeypatch):
    if kernel in (("wgmma", "int8", "bitplane") if a_bits == 16 else ("stripe", "half", "dense")):
        pytest.skip("not this kernel's activations")
    monkeypatch.setattr(choice, "kernel_for", lambda *_: kernel)
    w, x = weight(40, 256, planes=kernel == "bitplane"), torch.randn(9, 256).half()
    assert torch.equal(lowbit_matmul(odd(x), w, a_bits), lowbit_matmul(x, w, a_bits))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kernel", ["stream", "stripe", "tile", "half"])
def test_weights_at_an_odd_address(kernel, which):
    w = weight(40, 256)
    moved = w._replace(tensors=[odd(t) if i == which else t for i, t in enumerate(w.tensors)])
    with pytest.raises(JointNASError, match=f"lowbit_{kernel}: a tensor whose address is no multiple of 16 bytes"):
        lowbit_cuda.multiply(kernel, torch.randn(9, 256).half(), moved)
    if which == 0:
        with pytest.raises(JointNASError, match="no multiple of 16 bytes"):
            lowbit_cuda.dense(moved)


@pytest.mark.parametrize("given", [False, True], ids=["from x", "given"])
def test_mixture_at_odd_addresses(given):
    tensors = [torch.randn(s).bfloat16() for s in ((40, 256), (2, 8, 256), (2, 40, 8))]
    rest = torch.rand(2), torch.rand(2, 40, 2) * 0.5 + 0.5, 0.5, (2, 4), 128
    grad = torch.randn((40, 256) if given else (9, 40)).bfloat16()
    x = None if given else torch.randn(9, 256).bfloat16()
    straight, shifted = Mixture(*tensors, *rest), Mixture(*map(odd, tensors), *map(odd, rest[:2]), *rest[2:])
    assert torch.equal(cuda.forward(straight), cuda.forward(shifted))
    assert torch.equal(*(cuda.probs_gradient([m], [Upstream(odd(grad), x)]) for m in (straight, shifted)))


def test_tensors_of_two_devices():
    x, a = torch.randn(3, 128).half(), torch.empty(3, 128, dtype=torch.int8)
    scale, zero = torch.empty(3), torch.empty(3, dtype=torch.int32, device="meta")
    with pytest.raises(JointNASError, match=r"act_quant_pack: tensors on cpu and meta; move them to one device"):
        calls.call("act_quant_pack", x, a, scale, zero, 3, 128, 8, False, 0, 0, on=x)


@pytest.mark.parametrize("kernel", ["stream", "tile"])
def test_activations_without_zero_points(kernel):
    w, x = weight(40, 256), torch.randn(9, 256).half()
    a, scale, _ = lowbit_cuda.quantize_pack(x, 8)
    with pytest.raises(JointNASError, match="an argument it does not support"):
        lowbit_cuda.multiply(kernel, a, w, (scale, None))


@pytest.mark.parametrize(
    ("kernel", "a_bits"), [("stripe", 8), ("half", 8), ("wgmma", 16), ("int8", 16), ("bitplane", 16)]
)
def test_activations_of_another_kernel(kernel, a_bits):
    w, x = weight(40, 256), torch.randn(9, 256).half()
    a, *activation = lowbit_cuda.quantize_pack(x, 8) if a_bits == 8 else (x,)
    with pytest.raises(JointNASError, match="an argument it does not support"):
        lowbit_cuda.multiply(kernel, a, w, activation or None)


@pytest.mark.parametrize(("kernel", "tiles"), [("stream", 1), ("stripe", 4), ("tile", 8), ("half", 8)])
def test_more_split_blocks_than_locks(kernel, tiles):
    w = weight(64, 256)
    x = torch.zeros(8 * tiles * 4100, 256, dtype=torch.float16)
    with pytest.raises(JointNASError, match="an argument it does not support"):
        lowbit_cuda.multiply(kernel, x, w, None, lowbit_cuda.Plan(tiles, 1 if kernel == "stream" else 2, splits=2))


def test_launches_on_the_device_of_the_tensors(monkeypatch):
    """The guard is entered for the tensors' device before anything of the module runs."""
    seen = []
    w, x = weight(40, 256), torch.randn(9, 256).half()
    real = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: seen.append(t) or real(t))
    lowbit_matmul(x, w, 4)
    assert [t.data_ptr() for t in seen[:1]] == [x.data_ptr()]
    assert len(seen) == 2
