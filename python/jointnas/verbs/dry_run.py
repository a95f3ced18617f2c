"""`search --dry-run`: what a search would need on a device, before anything of it is loaded or measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from jointnas import loading, parallel
from jointnas.cluster import NODE, Sharding, Share, share
from jointnas.config import RunConfig
from jointnas.footprint import KINDS, PHASES, Phase, footprint
from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.space import count_params

HERE = "here"  # the configuration's device on this machine
ONE = Sharding()
SPARE = 0.95  # of a device's memory: the rest is its driver's, kernels' and allocator's


@dataclass(frozen=True)
class Device:
    """Memory in bytes, and dense products in operations per second: of bfloat16, as the vendor's data sheet says, or of
    the model's dtype, as measured."""

    name: str
    memory: float
    flops: float


DEVICES = {
    "a100": Device("NVIDIA A100 80 GB", 80e9, 312e12),
    "h100": Device("NVIDIA H100 SXM", 80e9, 989e12),
    "h200": Device("NVIDIA H200", 141e9, 989e12),
    "rtx-4090": Device("NVIDIA RTX 4090", 24e9, 165e12),
}


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        params: of the model.
        choices: in the search space.
        tokens: of a GPU's step, search and distillation.
        phases: the largest steps, by name, on one device.
        sharding: on how many of them, and how.
        fits: whether all do.
        instead: changes of the configuration that would fit, as (options, largest bytes), if any are needed and known.
    """

    device: Device
    params: int
    choices: int
    tokens: tuple[int, int]
    phases: dict[str, Phase]
    fits: bool
    instead: tuple[str, float] | None
    sharding: Sharding = ONE

    def share(self, phase: str) -> Share:
        """A device's part of a step."""
        return share(self.phases[phase], self.sharding)

    def seconds(self, phase: str) -> float:
        """At least, of a step: its products at the device's full speed, and meanwhile what it sends to others."""
        return max(self.phases[phase].flops / self.device.flops, self.share(phase).seconds)


def dry_run(config: RunConfig, on: str = HERE, gpus: int = 1) -> Plan:
    """Plans a search: memory by kind, the least time of its steps, and what to change where it does not fit. Nothing is
    loaded or measured but the model's config, and on this machine the speed of one product.

    Args:
        config: the whole configuration.
        on: a device of DEVICES, or "here": that of the configuration.
        gpus: how many of them share the work, as `config.parallel` says; each has its rows of a batch.

    Raises:
        JointNASError: no such device or model, or batches that so many GPUs cannot divide.
    """
    if on != HERE and on not in DEVICES:
        raise unknown("device", on, [HERE, *DEVICES])
    if on == HERE:
        config = loading.resolve(config)
    else:
        config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cuda"})})
    known = loading.model_config(config.model)
    if config.model.dtype == "auto":
        dtype = "bfloat16" if getattr(known, "dtype", None) == torch.bfloat16 else "float32"
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    space, _ = loading.space_of(config, known)
    device = here(config) if on == HERE else DEVICES[on]
    sharding = ONE if gpus == 1 else Sharding(gpus, config.parallel.mode, config.parallel.shard or NODE)
    parallel.check(config, gpus)
    own = rows_of(config, gpus)
    phases = footprint(own, known, space)
    instead = None
    fits = most(phases, sharding) <= SPARE * device.memory
    if not fits:
        for what, other in changes(config):
            if other.data.batch_size % gpus:
                continue
            needed = most(footprint(rows_of(other, gpus), known, space), sharding)
            if needed <= SPARE * device.memory:
                instead = what, needed
                break
    batch = own.data.batch_size, own.finetune.batch_size or own.data.batch_size
    tokens = batch[0] * own.data.seq_len, batch[1] * own.data.seq_len
    return Plan(device, count_params(known, space.full()), space.size(), tokens, phases, fits, instead, sharding)


def rows_of(config: RunConfig, gpus: int) -> RunConfig:
    """What one of several GPUs computes: its rows of every batch."""
    own, rows = config.finetune.batch_size, config.data.batch_size // gpus
    data = config.data.model_copy(update={"batch_size": rows})
    finetune = config.finetune.model_copy(update={"batch_size": None if own is None else own // gpus})
    return config.model_copy(update={"data": data, "finetune": finetune})


def most(phases: dict[str, Phase], sharding: Sharding = ONE) -> float:
    """Bytes of the largest phase on a device."""
    return max(share(phase, sharding).total for phase in phases.values())


def here(config: RunConfig) -> Device:
    """The device of a resolved configuration, its speed measured by one product."""
    device = torch.device(config.model.device)
    if device.type == "cuda":
        memory: float = torch.cuda.mem_get_info(device)[0]
        name = torch.cuda.get_device_name(device)
    else:
        try:
            import psutil
        except ImportError:
            raise JointNASError("a dry run on this CPU needs the `psutil` package: pip install psutil") from None
        memory, name = psutil.virtual_memory().available, f"this CPU, {torch.get_num_threads()} threads"
    return Device(name, memory, _speed(getattr(torch, config.model.dtype), device))


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    size, best = (4096 if device.type == "cuda" else 768), float("inf")
    a = torch.randn(size, size, device=device).to(dtype)
    for _ in range(5):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for it
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Ways to less memory, the cheapest first: each one is added to those before it."""
    made: dict[str, object] = {}  # by option

    def changed(**options: object) -> tuple[str, RunConfig]:
        made.update((name.replace("__", "."), value) for name, value in options.items())
        other = config
        for name, value in made.items():
            section, _, key = name.partition(".")
            other = other.model_copy(update={section: getattr(other, section).model_copy(update={key: value})})
        return " ".join(f"--{name} {str(value).lower()}" for name, value in made.items()), other

    if config.finetune.train != "lora":
        yield changed(finetune__train="lora")
    if not (config.search.gradient_checkpointing and config.finetune.gradient_checkpointing):
        yield changed(search__gradient_checkpointing=True, finetune__gradient_checkpointing=True)
    if config.model.base_bits is None and config.parallel.mode == "replicate":
        yield changed(model__base_bits=8)
    size = config.data.batch_size
    while size > 1:
        size //= 2
        yield changed(data__batch_size=size, finetune__batch_size=size)


def text(plan: Plan) -> str:
    """What the command prints."""

    def gb(size: float) -> str:
        return f"{size / 1e9:,.2f}"

    width, shares, gpus = max(map(len, KINDS)), {name: plan.share(name) for name in PHASES}, plan.sharding.gpus
    several = f"{gpus} of them, sharing: {plan.sharding.mode}; each " if gpus > 1 else ""
    lines = [
        f"{plan.device.name}: {several}{gb(plan.device.memory)} GB of memory; {plan.params:,} parameters; "
        f"{plan.choices:.2g} choices",
        "",
        f"{'GB when most is in use':<{width + 8}}" + "".join(f"{name:>20}" for name in PHASES),
    ]
    for kind in KINDS:
        values = [shares[name].kinds.get(kind, 0.0) for name in PHASES]
        if any(values):
            lines.append(f"  {kind:<{width + 6}}" + "".join(f"{gb(v):>20}" for v in values))
    lines.append(f"  {'all':<{width + 6}}" + "".join(f"{gb(shares[name].total):>20}" for name in PHASES))
    for where in ("inside", "between") if gpus > 1 else ():
        title = "GB sent " + {"inside": "within a machine", "between": "to others"}[where]
        lines.append(f"{title:<{width + 8}}" + "".join(f"{gb(getattr(shares[n], where)):>20}" for n in PHASES))
    times = [plan.seconds(name) for name in PHASES]
    tokens = (plan.tokens[0], plan.tokens[0], plan.tokens[1])
    lines += [
        "",
        f"{'seconds of a step, at least':<{width + 8}}" + "".join(f"{t:>20.3g}" for t in times),
        f"{'tokens per second, at most':<{width + 8}}"
        + "".join(f"{gpus * n / t:>20,.0f}" for n, t in zip(tokens, times, strict=True)),
        "",
        verdict(plan),
    ]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """One sentence."""
    room = SPARE * plan.device.memory
    needed = f"{most(plan.phases, plan.sharding) / 1e9:,.1f} GB"
    if plan.fits:
        return f"It fits: {needed} of the {room / 1e9:,.1f} GB that can be used."
    if plan.instead:
        options, size = plan.instead
        return f"It does not fit: {needed} of {room / 1e9:,.1f} GB. With {options} it would: {size / 1e9:,.1f} GB."
    return (
        f"It does not fit: {needed} of {room / 1e9:,.1f} GB, and neither do smaller batches; use a device with more "
        "memory, shorter windows (--data.seq_len) or a smaller --search.lora_rank."
    )
