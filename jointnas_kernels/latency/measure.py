"""Whole models: the same blocks with the table's kernels, measured, and the calibration of a table against them.

A table adds up operations; a model also spends time between them (module calls, views, the rotary table, Python).
`calibrate` measures a few random choices whole and fits two numbers, by least squares on the relative error:

    measured ≈ fixed + per_block · blocks + Σ operations,   fixed, per_block >= 0
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import backends as registry
from jointnas_kernels.latency.backends import step
from jointnas_kernels.latency.backends.base import Target, Weight, quantize_weight
from jointnas_kernels.latency.interpolation import measured_by
from jointnas_kernels.latency.schema import Calibration
from jointnas_kernels.latency.spec import DENSE, OpSpec, Workload
from jointnas_kernels.latency.table import LatencyTable
from jointnas_kernels.latency.timing import measure, pinned_threads
from jointnas_kernels.latency.watch import Measured, Watch
from jointnas_kernels.layout import HEAD, Linear, block_of
from jointnas_kernels.runtime import Runtime, attach
from jointnas_kernels.runtime.generation import RESULT
from jointnas_kernels.space import Choice, SearchSpace, count_params, kept_blocks, subnet_config

ENOUGH = 4  # whole models for the two terms of a calibration
TURNS = 5  # of measuring a whole model
AHEAD = 16  # tokens that decoding runs ahead of its context


class BackendLinear(nn.Module):
    """A linear that runs on one backend; its weight lives only in the backend's packed form."""

    bias: Tensor | None

    def __init__(
        self, spec: OpSpec, target: Target, backend: str, weight: Weight, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("bias", bias)
        self.spec, self.backend = spec, backend
        self._run = registry.get(backend).prepare(spec, target, weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        y = self._run(x.reshape(-1, self.spec.k)).view(*x.shape[:-1], self.spec.n)
        return y if self.bias is None else y + self.bias


def deploy(
    model: nn.Module, choice: Choice, space: SearchSpace, table: LatencyTable, block_rank: Sequence[int] | None = None
) -> nn.Module:
    """Replaces the linears of an extracted model's blocks, and its head where that is quantized, by the table's fastest
    backend for its bits, in place.

    The weights are quantized by rounding to nearest: this model has the latency of the choice, not its quality.

    Raises:
        JointNASError: the model is not of this choice, or no backend in the table runs one of its linears.
    """
    if table.header.stepped:
        attach(model)
    target = Target(next(model.parameters()).device, table.workload, table.dims.kv_heads)

    def replace(parent: nn.Module, path: str, part: Linear, op: str, rows: int, bits: tuple[int, int]) -> None:
        linear: Any = parent.get_submodule(path)
        (n, k), (wbits, abits), group = linear.weight.shape, bits, space.group(part)
        spec = OpSpec(op, rows, n, k).with_bits(wbits, abits, group)
        row = table.best(spec)
        if row is None:
            raise JointNASError(f"{spec} is infeasible on this device or not in the latency table")
        dense = linear.weight.detach()
        weight = dense if wbits == DENSE else quantize_weight(dense, wbits, group)
        bias = None if linear.bias is None else linear.bias.detach()
        if table.header.runtime == "step":
            parent.set_submodule(path, step.linear(weight, abits, bias))
        else:
            parent.set_submodule(path, BackendLinear(spec, target, measured_by(table, row), weight, bias))

    if choice.head_bits is not None and choice.quantizes_head:
        replace(model, HEAD.module, HEAD, "lm_head", table.workload.batch, (choice.head_bits, DENSE))
    if choice.weight_bits is None and choice.act_bits is None:
        return model
    layers: Any = model.model.layers  # type: ignore[union-attr]
    kept = kept_blocks(block_rank if block_rank is not None else range(space.depth), choice.blocks)
    if len(layers) != len(kept):
        raise JointNASError(f"the model has {len(layers)} blocks, the choice {len(kept)}")
    modules = block_of(model.config).modules
    for layer, b in zip(layers, kept, strict=True):
        weight_bits, abits = choice.bits(b)
        for path, members in modules.items():
            replace(layer, path, members[0], "linear", table.workload.rows, (weight_bits or DENSE, abits))
    return model


def measure_model(
    model: nn.Module, workload: Workload, *, threads: int | None = None, seconds: float = 0.5, samples: int = 15,
    watch: Watch | None = None,
) -> Measured:
    """Milliseconds of one prefill, or one decoded token, of a transformers causal model.

    watch: repeats what other processes disturb; `LatencyTable.watch` compares with the machine as it was profiled.

    Raises:
        JointNASError: a model that should run through the step (it has a `Runtime`) does not.
    """
    model.eval()
    device = next(model.parameters()).device
    with pinned_threads(threads or 0):
        captured = not isinstance(getattr(model, "runtime", None), Runtime)  # its steps are graphs themselves
        return measure([call_of(model, workload, device)], device, seconds, samples, watch=watch, captured=captured)


@torch.inference_mode()
def call_of(model: nn.Module, workload: Workload, device: torch.device) -> Callable[[], object]:
    """One prefill, or the next of endless decoded tokens."""
    vocab: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    ids = torch.randint(vocab, (workload.batch, workload.queries), device=device)
    if workload.mode == "prefill":
        return lambda: _through_step(model, model(input_ids=ids, use_cache=True, logits_to_keep=1))
    prompt = torch.randint(vocab, (workload.batch, workload.seq), device=device)
    cache = getattr(model(input_ids=prompt, use_cache=True, logits_to_keep=1), RESULT)

    def decode() -> object:
        """One token more; back by AHEAD now and then, which costs as much as some tokens of a small model."""
        if cache.get_seq_length() >= workload.seq + AHEAD:
            cache.crop(-AHEAD)
        return _through_step(model, model(input_ids=ids, use_cache=True, logits_to_keep=1, **{RESULT: cache}))

    return decode


def _through_step(model: nn.Module, output: object) -> object:
    runtime = getattr(model, "runtime", None)
    if isinstance(runtime, Runtime) and runtime.reason is not None:
        raise JointNASError(f"the model does not run through the step: {runtime.reason}")
    return output


def calibrate(
    table: LatencyTable, space: SearchSpace, config: Any, choices: Sequence[Choice] | int = 8, *, seed: int = 0,
    seconds: float = 0.3, watch: Watch | None = None, strict: bool = True,
) -> LatencyTable:
    """A table whose predictions are fitted to whole models of these choices (or of that many feasible random ones).

    Weights are random: latency does not depend on them. Models that were disturbed are left out of the fit if enough
    others remain. `strict`: stops where the machine is too busy to be measured; otherwise the result is marked.

    Raises:
        JointNASError: too few random choices are feasible, or one of the given ones is not.
        Busy: `strict`, and something else takes the processors.
    """
    space, _ = space.feasible(config)
    plain = LatencyTable(table.header, table.rows)
    bound = plain.bind(space)
    if isinstance(choices, int):
        size, most = getattr(torch, table.workload.dtype).itemsize, _free_bytes(table.header.device.type) / 3
        choices = feasible_choices(plain, space, choices, seed, lambda c: count_params(config, c) * size < most)
    watch = watch or plain.watch(strict)
    found = measure_choices(plain, space, config, choices, seed=seed, seconds=seconds, watch=watch)
    points = list(zip(choices, found, strict=True))
    clean = [(choice, measured) for choice, measured in points if not measured.contended]
    if len(clean) >= ENOUGH:
        points = clean
    fitted = fit([(bound.predict(choice), choice.blocks, measured.value) for choice, measured in points])
    contended = any(measured.contended for _, measured in points) or None
    return LatencyTable(table.header, table.rows, fitted.model_copy(update={"contended": contended}))


def measure_choices(
    table: LatencyTable, space: SearchSpace, config: Any, choices: Sequence[Choice], *, seed: int = 0,
    seconds: float = 0.3, watch: Watch | None = None,
) -> list[Measured]:
    """Whole models of these choices, with random weights, each in several short turns: a machine that is slow for some
    seconds is so for one turn of many models, not for all of one model.

    Raises:
        JointNASError: one of the choices is infeasible, on this device or for the model's class.
    """
    from jointnas_kernels.hf.families import build  # late: reading tables needs no transformers

    device, dtype = torch.device(table.header.device.type), getattr(torch, table.workload.dtype)

    def deployed(choice: Choice) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build(subnet_config(config, choice))
        nn.Module.to(model, device, dtype)
        return deploy(model, choice, space, table)

    makers = [functools.partial(deployed, choice) for choice in choices]
    sizes = [count_params(config, choice) * dtype.itemsize for choice in choices]
    return measure_in_turns(makers, sizes, table, seconds=seconds, watch=watch)


def measure_in_turns(
    makers: Sequence[Callable[[], nn.Module]], sizes: Sequence[float], table: LatencyTable, *, seconds: float = 0.3,
    watch: Watch | None = None,
) -> list[Measured]:
    """Deployed models, made when there is room for as many of them as possible, each measured in several short turns.

    Args:
        makers: each makes a model, as `deploy` leaves it.
        sizes: bytes of each.
        table: whose workload, device and threads count.
        seconds: on each model, in all turns.
        watch: repeats what other processes disturb; None: the table's.

    Raises:
        JointNASError: a model that should run through the step does not.
    """
    device = torch.device(table.header.device.type)
    watch = watch or table.watch()

    def turn(model: nn.Module) -> Measured:
        threads, share = table.header.device.threads, seconds / TURNS
        return measure_model(model, table.workload, threads=threads, seconds=share, samples=3, watch=watch)

    found: list[Measured] = []
    while len(found) < len(makers):
        first, held, room = len(found), 0, _free_bytes(device.type) / 3
        while first + held < len(makers) and (held == 0 or sum(sizes[first : first + held + 1]) < room):
            held += 1
        models = [make() for make in makers[first : first + held]]
        turns = [[turn(model) for model in models] for _ in range(TURNS)]
        found += [_undisturbed(of_one) for of_one in zip(*turns, strict=True)]
    return found


def _undisturbed(turns: Sequence[Measured]) -> Measured:
    """The fastest turn, as of operations: others make a machine slower, never faster (seen: 2 times, for seconds, in up
    to half of the turns)."""
    fine = [turn for turn in turns if not turn.contended] or turns
    return min(fine, key=lambda turn: turn.value)._replace(
        p90=max(turn.p90 for turn in turns), samples=sum(turn.samples for turn in turns)
    )


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def feasible_choices(
    table: LatencyTable, space: SearchSpace, count: int, seed: int = 0, fits: Callable[[Choice], bool] = lambda _: True
) -> list[Choice]:
    """Random choices this device can run; the first is the largest, if it `fits`, for the range of the fit.

    Raises:
        JointNASError: hardly any are feasible.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = table.bind(space)
    found: list[Choice] = []
    for attempt in range(200 * count):
        choice = space.full() if attempt == 0 else space.sample(generator)
        with suppress(JointNASError):
            if fits(choice):
                bound.predict(choice)
                found.append(choice)
        if len(found) == count:
            return found
    raise JointNASError(f"only {len(found)} of {200 * count} random choices are feasible on this device")


def fit(points: Sequence[tuple[float, int, float]]) -> Calibration:
    """The two overhead terms from (Σ operations, blocks, measured); neither is negative."""
    ops, blocks, measured = torch.tensor(points, dtype=torch.float64).T
    # relative residual (fixed + per_block * blocks + ops - measured) / measured
    design, target = torch.stack((1 / measured, blocks / measured), 1), 1 - ops / measured
    candidates = [(0.0, 0.0)]
    for columns in ((0, 1), (0,), (1,)):  # non-negative least squares in two variables: the best valid subset
        if len(columns) == 2 and len({int(b) for b in blocks.tolist()}) < 2:
            continue  # fixed and per-block cannot be told apart
        solution = dict(zip(columns, torch.linalg.lstsq(design[:, columns], target).solution.tolist(), strict=True))
        if all(v >= 0 for v in solution.values()):
            candidates.append((solution.get(0, 0.0), solution.get(1, 0.0)))

    def residual(pair: tuple[float, float]) -> float:
        return float((design @ torch.tensor(pair, dtype=torch.float64) - target).square().sum())

    fixed, per_block = min(candidates, key=residual)

    def error(predicted: Tensor) -> float:
        return float(((predicted - measured).abs() / measured).mean())

    return Calibration(
        fixed=fixed, per_block=per_block, mape_before=error(ops), mape=error(fixed + per_block * blocks + ops),
        points=[(float(o), int(b), float(m)) for o, b, m in points],
    )
