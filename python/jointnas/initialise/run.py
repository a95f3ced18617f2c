"""`initialise`: block by block, resumable.

    x_0 = embeddings of the calibration windows
    block b:   y = block(x) of the original;   quantizers of b from (x', y);   x <- y,   x' <- quantized block(x')

x' are the inputs the block sees when everything before it is quantized. In a supernet a block's precision is one choice
of several, and so is that of every block before it: `reconstruct` takes x' behind blocks of the same precision, the
other methods x' = x. Activations of a supernet are not quantized here.

Memory beyond the model: x, x' and y, and what the method needs for one block. With a folder, every finished block is
written at once (`block-000.safetensors`, renamed into place), and its errors to `blocks.jsonl`. A resumed run puts
finished blocks in, carries x and x' through them, and ends where an uninterrupted one would have, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from jointnas.config import InitOptions, Method
from jointnas.data import Batches
from jointnas.initialise.blocks import Blocks
from jointnas.initialise.gptq import accumulate, gptq
from jointnas.initialise.omniquant import learn
from jointnas.initialise.problem import Parameters, Problem
from jointnas.initialise.reconstruct import Pair, Solution, reconstruct
from jointnas.initialise.store import Store
from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.hf import Supernet
from jointnas_kernels.layout import Linear
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.ops.quant.grid import Grid
from jointnas_kernels.progress import Progress
from jointnas_kernels.space import Choice, SearchSpace, kept_blocks

METHODS: tuple[Method, ...] = get_args(Method)
DATA_FREE = ("rtn", "clip")
Row = dict[str, Any]
State = dict[str, Tensor]  # what a block is changed to: parameters by name, and NAME.scale or NAME.clip of its linears


@dataclass(frozen=True)
class Bits:
    """The precision of every block of a plain model, in the order they run."""

    weight: tuple[int, ...]
    act: tuple[int, ...]
    group_size: int
    o_proj_group: int
    act_symmetric: bool = False

    @classmethod
    def uniform(
        cls, config: Any, weight: int, act: int = 16, group_size: int = 128, act_symmetric: bool = False
    ) -> Bits:
        """One precision for all blocks of a model with this config."""
        space = single_space(config, weight, act, group_size)
        return cls.of(space.full(), space, act_symmetric=act_symmetric)

    @classmethod
    def of(
        cls, choice: Choice, space: SearchSpace, block_rank: Sequence[int] | None = None, act_symmetric: bool = False
    ) -> Bits:
        """Those of a choice, for the plain model it was extracted to; block_rank as the supernet had it."""
        space.check(choice)
        if choice.weight_bits is None:
            raise JointNASError("initialise: the choice has no weight bits: there is no weight quantizer to initialise")
        kept = kept_blocks(block_rank or range(space.depth), choice.blocks)
        act = choice.act_bits or (16,) * space.depth
        return cls(
            tuple(choice.weight_bits[b] for b in kept), tuple(act[b] for b in kept), space.group_size,
            space.o_proj_group, act_symmetric,
        )  # fmt: skip

    def groups(self, modules: Mapping[str, Sequence[Linear]]) -> dict[str, int]:
        """Quantization group of each module of a block."""
        return {
            path: self.o_proj_group if linears[0].cut_in_heads else self.group_size
            for path, linears in modules.items()
        }


def single_space(config: Any, weight: int, act: int = 16, group_size: int = 128) -> SearchSpace:
    """The space whose only choice is the model itself at one precision; raises if that precision does not fit it."""
    space = SearchSpace.single(config, (weight,), (act,), group_size)
    space.validate(config)
    return space


def calibration_windows(
    tokens: Tensor, options: InitOptions, seq_len: int, seed: int = 0, bos: int | None = None
) -> Tensor:
    """[samples, seq_len] token ids, drawn from a stream, integers [N] (`data.Streams`); each begins with `bos`."""
    most = len(tokens) // (seq_len - (bos is not None))
    count = options.samples or max(1, min(128, most))
    if most < count:
        raise JointNASError(
            f"options.samples is {count}, but {len(tokens)} tokens of data hold {most} calibration windows "
            f"of {seq_len}; lower options.samples or data.seq_len, or bring more data"
        )
    return Batches(tokens, count, seq_len, seed, bos).at(0).ids


def initialise(
    model: nn.Module, method: Method = "clip", calibration: Tensor | None = None, bits: Bits | None = None, *,
    options: InitOptions | None = None, folder: str | Path | None = None, progress: bool = True, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """Initialises the weight quantizers of a supernet, or quantizes a plain model; in place.

    A supernet gets clip ratios for every precision of its space. In a plain transformers model every linear of a block
    becomes a `FakeQuantLinear`, whose weight lies on the grid it carries; `omniquant` also moves scales between norms
    and linears where activations are quantized. "rtn" (round to nearest) and "clip" (each group's ratio of least
    squared error, weighed by the energy of its inputs where there is calibration) need no `calibration` [windows,
    tokens]; errors are reported only with it. Finished blocks go to
    `folder`. "reconstruct" learns weights, or a supernet's LoRA pairs, and ratios.

    One row per block, or with a supernet per (block, weight bits): the mean squared error of the block's output with
    rounding to nearest (`mse_rtn`), where learning started (`mse_start`) and at the end (`mse`), and the mean square of
    that output (`power`). With reconstruct also `error_rtn`, `error_start`, `error`: the means of
    `blocks.relative_error` on the windows that were not learned from."""
    if method not in METHODS:
        raise unknown("quantizer initialiser", method, METHODS)
    options = options or InitOptions()
    if calibration is None and method not in DATA_FREE:
        raise JointNASError(
            f"initialise: {method} needs calibration tokens [windows, tokens]; without data: {', '.join(DATA_FREE)}"
        )
    if calibration is not None and (calibration.dim() != 2 or calibration.numel() == 0):
        shape = tuple(calibration.shape)
        raise JointNASError(f"initialise: calibration must be token ids [windows, tokens], got shape {shape}")
    job: Supernets | Plain
    if isinstance(model, Supernet):
        if bits is not None:
            raise JointNASError("initialise: a supernet's bits are those of its space; leave out `bits`")
        if model.space.weight_bits is None:
            return []
        if method == "gptq":
            raise JointNASError(
                "initialise: gptq decides how fixed weights are rounded, but a supernet rounds W + s B A anew in every "
                "step. Allowed for supernets: rtn, clip, omniquant, reconstruct; gptq is for the plain model that "
                "`extract` returns"
            )
        job = Supernets(model, method, options, seed)
    else:
        if bits is None:
            raise JointNASError("initialise: a plain model needs `bits`, e.g. Bits.uniform(model.config, weight=4)")
        job = Plain(model, method, options, bits, seed)
    store = None if folder is None else Store(Path(folder), job.settings(calibration))
    return _walk(job, calibration, store, progress)


@torch.no_grad()
def _walk(job: Supernets | Plain, calibration: Tensor | None, store: Store | None, progress: bool) -> list[Row]:
    blocks, count = job.blocks, len(job.blocks.layers)
    rows: list[Row] = []
    todo = store is None or store.finished() < count
    x = blocks.start(calibration) if calibration is not None and todo else None
    behind = [] if x is None else [x.clone() for _ in range(job.chains)]  # inputs behind quantized blocks
    bar = Progress(f"initialise: {job.method}", count, 0, progress)
    for b in range(count):
        began = time.monotonic()
        y = None if x is None else blocks.advance(b, x.clone())
        found = store.load(b) if store is not None else None
        if found is None:
            state, new = job.solve(b, x, behind, y)
            for row in new:
                row["seconds"] = time.monotonic() - began
            if store is not None:
                store.save(b, state, new)
        else:
            state, new = found
        job.install(b, {k: v.to(blocks.device) for k, v in state.items()})
        x = y
        for i, inputs in enumerate(behind):
            blocks.advance(b, inputs, job.weights(b, i))
        rows += new
        bar.step(**{k: v for k, v in new[-1].items() if k in ("mse_rtn", "mse", "error_rtn", "error")})
    bar.close()
    if store is not None:
        store.report(rows)
    return rows


# ---- what is done to a block ----------------------------------------------------------------------------------------


class Supernets:
    """Clip ratios, and with `reconstruct` LoRA pairs, of every precision of a supernet's blocks."""

    def __init__(self, model: Supernet, method: Method, options: InitOptions, seed: int) -> None:
        self.model, self.method, self.options, self.seed = model, method, options, seed
        self.blocks, self.bits = Blocks(model, options.batch), model.space.weight_bits or ()
        self.chains = len(self.bits) if method == "reconstruct" else 0

    def settings(self, calibration: Tensor | None) -> dict[str, Any]:
        """What blocks in one folder must have in common."""
        about = {"space": self.model.space.to_dict(), "block_rank": list(self.model.block_rank)}
        return _settings(self, calibration) | {"supernet": about}

    def solve(
        self, b: int, x: Tensor | None, behind: Sequence[Tensor], y: Tensor | None
    ) -> tuple[State, list[Row]]:
        """What block b is changed to, and its errors, for inputs x, or those behind blocks of each precision, and
        targets y [windows, tokens, N]."""
        linears = {path: self._linear(b, path) for path in self.blocks.modules}
        groups = {path: linear.group_size for path, linear in linears.items()}
        solutions: list[Solution] = []
        rows: list[Row] = []
        for i, bits in enumerate(self.bits):
            problem = Problem(self.blocks, b, behind[i] if behind else x, y, bits, groups)
            pairs = {path: Pair.of(linear, bits) for path, linear in linears.items()}
            found, row = _searched(problem, self.method, self.options, False, self.seed, pairs)
            solutions.append(found)
            rows.append({"block": b, "method": self.method, "weight_bits": bits, "act_bits": 16, **row})
            if x is not None:
                rows[-1]["mse"] = problem.error(found.quantized(problem))
        state = {f"{path}.clip": torch.stack([found.clips[path] for found in solutions]) for path in groups}
        for path in solutions[0].pairs:
            state[f"{path}.lora_a"] = torch.stack([found.pairs[path].a for found in solutions])
            state[f"{path}.lora_b"] = torch.stack([found.pairs[path].b for found in solutions])
        return state, rows

    @torch.no_grad()
    def install(self, b: int, state: State) -> None:
        """Change block b."""
        for path in self.blocks.modules:
            linear = self._linear(b, path)
            linear.set_clip(state[f"{path}.clip"])
            for name in ("lora_a", "lora_b") if f"{path}.lora_a" in state else ():
                getattr(linear, name).copy_(state[f"{path}.{name}"])

    def weights(self, b: int, index: int) -> Parameters | None:
        """Block b's weights at precision number `index`."""
        return {f"{path}.weight": self._linear(b, path).merged(index) for path in self.blocks.modules}

    def _linear(self, b: int, path: str) -> Any:
        return self.blocks.layers[b].get_submodule(path)


class Plain:
    """Quantized linears of a plain transformers model."""

    def __init__(self, model: nn.Module, method: Method, options: InitOptions, bits: Bits, seed: int) -> None:
        self.model, self.method, self.options, self.bits, self.seed = model, method, options, bits, seed
        self.blocks, self.chains = Blocks(model, options.batch), 1
        count = len(self.blocks.layers)
        if not len(bits.weight) == len(bits.act) == count:
            raise JointNASError(
                f"initialise: bits for the weights of {len(bits.weight)} blocks and for the activations of "
                f"{len(bits.act)}; the model has {count} blocks"
            )
        for b, layer in enumerate(self.blocks.layers):
            for path in self.blocks.modules:
                if isinstance(layer.get_submodule(path), FakeQuantLinear):
                    raise JointNASError(f"initialise: block {b}, {path} is quantized already; load the original model")

    def settings(self, calibration: Tensor | None) -> dict[str, Any]:
        """What blocks in one folder must have in common."""
        return _settings(self, calibration) | {"bits": json.loads(json.dumps(self.bits.__dict__))}

    def solve(
        self, b: int, x: Tensor | None, behind: Sequence[Tensor], y: Tensor | None
    ) -> tuple[State, list[Row]]:
        """What block b is changed to, and its errors, for inputs behind quantized blocks and targets y
        [windows, tokens, N]."""
        bits, act, groups = self.bits.weight[b], self.bits.act[b], self.bits.groups(self.blocks.modules)
        problem = Problem(self.blocks, b, behind[0] if behind else None, y, bits, groups)
        row: Row = {"block": b, "method": self.method, "weight_bits": bits, "act_bits": act}
        with self.blocks.quantized_inputs(b, act, self.bits.act_symmetric):
            if self.method == "gptq":
                state = self._gptq(problem)
                row["mse_rtn"] = problem.error(problem.quantized(problem.weights, problem.unclipped()))
            else:
                transform = act < 16 if self.options.transform is None else self.options.transform
                found, more = _searched(problem, self.method, self.options, transform, self.seed)
                row |= more
                state = dict(found.parameters)
                for path, group in groups.items():
                    values, of = grid.quantize(state[f"{path}.weight"], bits, group, clip=found.clips[path])
                    state |= {f"{path}.weight": values, f"{path}.scale": of.scale}
            if y is not None:
                row["mse"] = problem.error({k: v for k, v in state.items() if not k.endswith(".scale")})
                row["power"] = float(y.double().square().mean())
        return state, [row]

    def _gptq(self, problem: Problem) -> State:
        """Stage by stage: each linear's inputs are those behind the quantized linears of earlier stages."""
        assert problem.x is not None
        values: State = {}
        scales: State = {}
        for stage in problem.blocks.stages:
            hessian: Tensor | None = None
            for inputs in problem.blocks.inputs(problem.b, stage[0], problem.x, values):
                hessian = accumulate(hessian, inputs)
            assert hessian is not None
            for path in stage:
                weight = problem.parameters[f"{path}.weight"]
                values[f"{path}.weight"], of = gptq(
                    weight, hessian, problem.bits, problem.groups[path], damping=self.options.damping,
                    act_order=self.options.act_order,
                )  # fmt: skip
                scales[f"{path}.scale"] = of.scale
        return values | scales

    def weights(self, b: int, index: int) -> Parameters | None:
        """None: block b holds its quantized weights."""
        return None

    def install(self, b: int, state: State) -> None:
        """Change block b."""
        layer = self.blocks.layers[b]
        for name, value in state.items():
            path, _, what = name.rpartition(".")
            if path not in self.blocks.modules:  # a norm that took up a transformation
                setattr(layer.get_submodule(path), what, nn.Parameter(value, requires_grad=False))
        for path in self.blocks.modules:
            old: Any = layer.get_submodule(path)
            of = Grid(self.bits.weight[b], state[f"{path}.scale"])
            bias = state.get(f"{path}.bias", old.bias)
            new = FakeQuantLinear(state[f"{path}.weight"], bias, of, self.bits.act[b], self.bits.act_symmetric)
            layer.set_submodule(path, new.requires_grad_(old.weight.requires_grad).train(old.training))


def _searched(
    problem: Problem, method: Method, options: InitOptions, transform: bool, seed: int,
    pairs: Mapping[str, Pair] | None = None,
) -> tuple[Solution, Row]:
    """Clip ratios and what belongs to them, and errors; `pairs`: of a supernet, whose weights do not change."""
    weights, row = problem.weights, {}
    clips = problem.unclipped()
    if problem.x is not None:
        row["mse_rtn"] = problem.error(problem.quantized(weights, clips))
    if method == "omniquant":
        learned = learn(problem, options, transform=transform, seed=seed)
        return Solution(learned.parameters, learned.clips), row | {"mse_start": learned.start}
    if method == "reconstruct":
        found = reconstruct(problem, options, pairs, seed)
        row |= {"error_rtn": found.rtn, "error_start": found.start, "error": found.end}
        return found.solution, row
    if method == "clip":
        clips = problem.searched(weights, problem.energies(weights) if problem.x is not None else None)
    return Solution(weights, clips), row


def _settings(job: Supernets | Plain, calibration: Tensor | None) -> dict[str, Any]:
    """What blocks of one folder share. Of each weight 64 values stand for all."""
    digest = hashlib.sha256()
    for layer in job.blocks.layers:
        for name, parameter in sorted(layer.named_parameters()):
            if not name.rpartition(".")[2].startswith(("lora", "clip")):
                flat = parameter.detach().flatten()
                some = flat[:: max(1, flat.numel() // 64)].double().cpu()
                digest.update(name.encode() + some.numpy().tobytes())
    tokens = "" if calibration is None else hashlib.sha256(calibration.cpu().numpy().tobytes()).hexdigest()
    return {
        "method": job.method, "options": job.options.model_dump(), "seed": job.seed, "model": digest.hexdigest(),
        "calibration": tokens,
    }  # fmt: skip
