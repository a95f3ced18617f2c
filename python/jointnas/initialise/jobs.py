"""What is done to each block of a supernet, and of a plain model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jointnas.config import InitOptions, Method
from jointnas.initialise.bits import Bits
from jointnas.initialise.blocks import Blocks
from jointnas.initialise.end_to_end import end_to_end
from jointnas.initialise.gptq import accumulate, gptq
from jointnas.initialise.omniquant import learn
from jointnas.initialise.problem import Parameters, Problem, Row, State
from jointnas.initialise.reconstruct import Pair, Solution, judged, reconstruct
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.ops.quant.grid import Grid

END_EPOCHS = 2  # of the option's none, below 4 bits


class Supernets:
    """Clip ratios, and with `reconstruct` LoRA pairs, of every precision of a supernet's blocks."""

    def __init__(self, model: Supernet, method: Method, options: InitOptions, seed: int) -> None:
        self.model, self.method, self.options, self.seed = model, method, options, seed
        self.blocks, self.bits = Blocks(model, options.batch), model.space.weight_bits or ()
        self.chains = len(self.bits) if method == "reconstruct" else 0
        self.end_epochs = 0

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
                rows[-1]["mse"] = _judged(problem, self.method).error(found.quantized(problem))
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
        epochs = options.end_epochs
        if epochs is None:
            epochs = END_EPOCHS if min(bits.weight, default=16) < 4 else 0
        self.end_epochs = epochs if method == "reconstruct" else 0
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
                quantized = {k: v for k, v in state.items() if not k.endswith(".scale")}
            else:
                transform = act < 16 if self.options.transform is None else self.options.transform
                found, more = _searched(problem, self.method, self.options, transform, self.seed)
                row |= more
                state = dict(found.parameters) | {f"{path}.clip": ratio for path, ratio in found.clips.items()}
                quantized = found.quantized(problem)
            if y is not None:
                seen = _judged(problem, self.method)
                assert seen.y is not None
                row["mse"], row["power"] = seen.error(quantized), float(seen.y.double().square().mean())
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

    def end(self, ids: Tensor, y: Tensor, states: Sequence[State]) -> tuple[list[State], Row]:
        """What the blocks are changed to by learning end to end, and its errors."""
        return end_to_end(self.model, self.blocks, ids, y, states, self.end_epochs, self.options, self.seed)

    def weights(self, b: int, index: int) -> Parameters | None:
        """None: block b holds its quantized weights."""
        return None

    def install(self, b: int, state: State) -> None:
        """Change block b."""
        layer, groups = self.blocks.layers[b], self.bits.groups(self.blocks.modules)
        for name, value in state.items():
            path, _, what = name.rpartition(".")
            if path not in self.blocks.modules:  # a norm that took up a transformation
                setattr(layer.get_submodule(path), what, nn.Parameter(value, requires_grad=False))
        for path in self.blocks.modules:
            old: Any = layer.get_submodule(path)
            bits, values = self.bits.weight[b], state[f"{path}.weight"]
            if f"{path}.scale" in state:
                of = Grid(bits, state[f"{path}.scale"])
            else:
                values, of = grid.quantize(values, bits, groups[path], clip=state[f"{path}.clip"])
            bias = state.get(f"{path}.bias", old.bias)
            new = FakeQuantLinear(values, bias, of, self.bits.act[b], self.bits.act_symmetric)
            layer.set_submodule(path, new.requires_grad_(old.weight.requires_grad).train(old.training))


def _searched(
    problem: Problem, method: Method, options: InitOptions, transform: bool, seed: int,
    pairs: Mapping[str, Pair] | None = None,
) -> tuple[Solution, Row]:
    """Clip ratios and what belongs to them, and errors; `pairs`: of a supernet, whose weights do not change."""
    weights, row = problem.weights, {}
    clips = problem.unclipped()
    if problem.x is not None:
        row["mse_rtn"] = _judged(problem, method).error(problem.quantized(weights, clips))
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


def _judged(problem: Problem, method: Method) -> Problem:
    """The windows on which errors are reported: those that nothing was learned from, if there are such."""
    return judged(problem) if method == "reconstruct" else problem


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
