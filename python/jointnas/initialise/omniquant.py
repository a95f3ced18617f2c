"""OmniQuant (Shao et al., arXiv 2308.13137): what quantizes a block best is learned, by gradient descent on the mean
squared error of the block's output, straight-through gradients, weights untouched.

    learnable weight clipping          s = sigmoid(gamma) max|w| / ((2^b - 1)/2),   one gamma per (row, group)
    learnable equivalent transformation (for quantized activations), t > 0 and d learned per channel

        norm -> q, k, v                norm / t,                    W_q, W_k, W_v columns * t
        v -> o                         (W_v x + b_v - d) / t,       W_o columns * t, b_o + W_o d
        norm -> gate, up               norm / t,                    W_gate, W_up columns * t
        up -> down                     up rows / t,                 W_down columns * t

Attention averages values per channel with weights that sum to 1, and the gate multiplies `up` per channel, so each line
leaves the block's function as it is and its result is the same kind of block. Query heads of one key-value head share
t and d. The shift d exists only where both v and o have a bias; the norms (RMSNorm) have none to put a shift into.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from jointnas.config import InitOptions
from jointnas.initialise.blocks import Blocks
from jointnas.initialise.descent import descend
from jointnas.initialise.problem import Clips, Parameters, Problem
from jointnas_kernels.layout import HIDDEN, NEURONS, Axis, size
from jointnas_kernels.ops.core.tensors import compute_dtype

log = logging.getLogger(__name__)
EPOCHS = 20  # of the option's none
LARGEST = 4.0  # start of gamma at most: at a ratio of 1 its gradient would vanish; sigmoid(4) = 0.98
SITES = ("attention", "value", "mlp", "up")  # the inputs that t scales, one of each stage of a block
WRITERS = {"value": "v_proj", "up": "up_proj"}  # whose rows are divided by t; elsewhere the norm's weight is


# ---- equivalent transformation --------------------------------------------------------------------------------------


@dataclass
class Transform:
    """log t of each site (of q's, gate's and down's inputs, and of v's outputs), and the shift d of v's outputs."""

    head_dim: int
    log_scale: Parameters
    shift: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """What is learned."""
        return [*self.log_scale.values(), *([] if self.shift is None else [self.shift])]

    def of_heads(self, values: Tensor, channels: int) -> Tensor:
        """Per key-value channel [Hkv D] -> per channel of o's input [H D]."""
        heads = values.view(-1, self.head_dim)
        return heads.repeat_interleave(channels // values.numel(), 0).flatten()


def equivalent(parameters: Mapping[str, Tensor], blocks: Blocks, transform: Transform) -> Parameters:
    """A block's parameters after the transformation: the same function up to rounding."""
    p = {k: v.to(compute_dtype(v.dtype)) for k, v in parameters.items()}
    t = {k: v.exp() for k, v in transform.log_scale.items()}
    norms = {norm.name: f"{norm.path}.weight" for norm in blocks.layout.norms}

    def rows(values: Tensor, linear: str, elsewhere: float) -> Tensor:
        """Of all rows of the linear's module."""
        path, own = blocks.places[linear]
        total = len(p[f"{path}.weight"])
        return values if len(values) == total else pad(values, (own.start, total - own.stop), value=elsewhere)

    v_proj, o_proj = (blocks.places[name][0] for name in ("v_proj", "o_proj"))
    o_weight = p[f"{o_proj}.weight"]
    channels = o_weight.shape[1]
    if transform.shift is not None:
        p[f"{v_proj}.bias"] = p[f"{v_proj}.bias"] - rows(transform.shift, "v_proj", 0.0)
        p[f"{o_proj}.bias"] = p[f"{o_proj}.bias"] + o_weight @ transform.of_heads(transform.shift, channels)
    for site, stage in zip(SITES, blocks.stages, strict=True):
        inputs = transform.of_heads(t[site], channels) if site == "value" else t[site]
        if site in WRITERS:
            path, by = blocks.places[WRITERS[site]][0], rows(t[site], WRITERS[site], 1.0)
            p[f"{path}.weight"] = p[f"{path}.weight"] / by.unsqueeze(1)
            if f"{path}.bias" in p:
                p[f"{path}.bias"] = p[f"{path}.bias"] / by
        else:
            norm = norms[blocks.modules[stage[0]][0].reads]
            p[norm] = p[norm] / t[site]
        for path in stage:
            p[f"{path}.weight"] = p[f"{path}.weight"] * inputs
    return {k: v.to(parameters[k].dtype) for k, v in p.items()}


def identity(parameters: Mapping[str, Tensor], blocks: Blocks) -> Transform:
    """t = 1, d = 0, for a block with these parameters."""
    linears, like = {linear.name: linear for linear in blocks.layout.linears}, next(iter(parameters.values()))

    def zeros(axis: Axis) -> Tensor:
        return torch.zeros(size(axis, blocks.sizes), dtype=compute_dtype(like.dtype), device=like.device)

    v_proj, o_proj = linears["v_proj"], linears["o_proj"]
    scales = {"attention": zeros(HIDDEN), "value": zeros(v_proj.rows), "mlp": zeros(HIDDEN), "up": zeros(NEURONS)}
    return Transform(blocks.sizes["head_dim"], scales, zeros(v_proj.rows) if v_proj.bias and o_proj.bias else None)


@torch.no_grad()
def smoothed(problem: Problem, start: Transform) -> Transform:
    """SmoothQuant's scales (arXiv 2211.10438), t = sqrt(max|x| / max|w|) per channel with geometric mean 1."""
    assert problem.x is not None
    scales = {}
    for site, stage in zip(SITES, problem.blocks.stages, strict=True):
        inputs = problem.blocks.inputs(problem.b, stage[0], problem.x, {})
        acts = torch.stack([v.abs().flatten(0, -2).amax(0) for v in inputs]).amax(0)
        weights = torch.stack([problem.parameters[f"{path}.weight"].abs().amax(0) for path in stage]).amax(0)
        if site == "value":  # one scale per key-value channel, for all query heads that read it
            shape = (len(start.log_scale[site]) // start.head_dim, -1, start.head_dim)
            acts, weights = (v.view(shape).amax(1).flatten() for v in (acts, weights))
        t = (acts.to(start.log_scale[site]).clamp_min(1e-5) / weights.clamp_min(1e-5)).log() / 2
        scales[site] = t - t.mean()
    return Transform(start.head_dim, scales, start.shift)


# ---- learning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """A block's parameters before quantization (those that changed, and all weights), clip ratios, and block errors."""

    parameters: Parameters
    clips: Clips
    start: float
    end: float


def learn(problem: Problem, options: InitOptions, *, transform: bool, seed: int = 0) -> Learned:
    """Clip ratios, and with `transform` a transformation, that bring the block's output on x near y.

    Starts from the best of: plain absmax, or clip ratios with the least error weighed by the inputs' energy; each
    without a transformation or with SmoothQuant's. That start is returned should learning end above it."""
    blocks, b, x, y = problem.blocks, problem.b, problem.x, problem.y
    assert x is not None
    assert y is not None
    candidates: list[Transform | None] = [None]
    if transform:
        same = identity(problem.parameters, blocks)
        candidates = [same, smoothed(problem, same)]

    def parameters_of(transform: Transform | None) -> Parameters:
        return problem.weights if transform is None else equivalent(problem.parameters, blocks, transform)

    starts = []
    for candidate in candidates:
        parameters = parameters_of(candidate)
        for clips in (problem.unclipped(), problem.searched(parameters, problem.energies(parameters))):
            error = problem.error(problem.quantized(parameters, clips))
            starts.append((error, candidate, Learned(parameters, clips, error, error)))
    start, moved, best = min(starts, key=lambda s: s[0])
    # at 8 bits 0.98 would cut the largest weights by 4 levels; this cuts none by more than half a level
    most = max(LARGEST, math.log(2**problem.bits - 1))
    logits = {n: ratio.logit().clamp_max(most).requires_grad_() for n, ratio in best.clips.items()}
    groups: list[dict[str, Any]] = [{"params": list(logits.values()), "lr": options.lr_clip}]
    if moved is not None:
        groups.append({"params": [leaf.requires_grad_() for leaf in moved.leaves()], "lr": options.lr_transform})

    def loss(chosen: Tensor) -> Tensor:  # in units of the start: down to 1e-7 at 8 bits, where Adam's epsilon counts
        clips = {n: v.sigmoid() for n, v in logits.items()}
        out = blocks.run(b, x[chosen], problem.quantized(parameters_of(moved), clips))
        return (out - y[chosen]).to(compute_dtype(out.dtype)).square().mean() / max(start, 1e-30)

    epochs, seeds = options.epochs or EPOCHS, (seed, b, problem.bits)
    descend(loss, groups, len(x), blocks.batch, epochs, x.device, *seeds, warmup=0.0, floor=0.0, betas=(0.9, 0.999))
    with torch.no_grad():
        parameters, clips = parameters_of(moved), {n: v.sigmoid() for n, v in logits.items()}
        end = problem.error(problem.quantized(parameters, clips))
    if not end < start:
        log.warning("omniquant: block %d did not improve on its start (%.3g to %.3g), which is kept", b, start, end)
        return best
    return Learned(parameters, clips, start, end)
