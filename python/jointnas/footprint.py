"""What a search and its distillation keep in memory, from steps on the meta device: of models that fit nowhere, too.

The steps are those of the search itself; nothing is computed, but every tensor has its size. A dispatch mode counts the
bytes of those that are alive, by what they are, and keeps the counts of the moment when their sum was largest, of every
part of a step: forward, the backward pass of the last and of the first block, and so on. Steps of models with two and
with three blocks give those of any number, because each part is linear in it. Which is the largest depends on it: with
few blocks the logits, with many the gradients.

Not seen: what kernels need while they run, and what an allocator wastes.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as assumed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import jointnas.flops  # noqa: F401  formulas of this package's ops
from jointnas.bilevel import update
from jointnas.config import RunConfig
from jointnas.data import Batch
from jointnas.distillation import Trained, distillation_step, original_logits, student_of
from jointnas.guards import Guard
from jointnas.losses import cross_entropy
from jointnas_kernels.hf import Supernet, convert
from jointnas_kernels.hf.families import family
from jointnas_kernels.nn import loss
from jointnas_kernels.nn.choices import seeded
from jointnas_kernels.space import SearchSpace

META = torch.device("meta")
PHASES = ("weight step", "architecture step", "distillation")
WEIGHTS, ADAPTERS, COPIES, GRADIENTS = "weights", "adapters", "trained weights", "gradients"
OPTIMIZER, MIXED, LOSS, ACTIVATIONS = "optimizer", "mixed weights", "logits and loss", "activations"
KINDS = (WEIGHTS, ADAPTERS, COPIES, GRADIENTS, OPTIMIZER, MIXED, LOSS, ACTIVATIONS)
Bytes = Mapping[str, float]
# parts of a step; blocks between the last and the first are not larger than both
FORWARD, LAST, BETWEEN, FIRST, AFTER, STEP = "forward", "last block", "between", "first block", "after", "optimizer"
FEW = (2, 3)  # blocks of the models whose steps are made


class Alive(TorchDispatchMode):
    """Counts the bytes of meta tensors that are alive, by kind, and the operations of products. `FlopCounterMode`
    beside it would keep alive what checkpoints compute again.

    Attributes:
        part: of the step, that is on.
        peaks: of every part so far, the counts when their sum was largest.
        flops: operations so far.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.kinds: dict[int, str] = {}  # of a storage
        self.now: Counter[str] = Counter()
        self.total = self.flops = 0
        self.part = FORWARD
        self.peaks: dict[str, Counter[str]] = {}
        self.outputs: dict[Any, Any] = {}  # of ops, by their arguments
        self.inside: list[str] = []  # kinds of whatever is made in a context

    @contextlib.contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Tensors that are made inside are of this kind."""
        self.inside.append(kind)
        yield
        self.inside.pop()

    def add(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Counts tensors from now on; those counted already become of this kind."""
        for tensor in tensors:
            if tensor is None or not tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.kinds:
                self.now[self.kinds[key]] -= size
            else:
                self.total += size
                weakref.finalize(storage, self._gone, key, size)
            self.kinds[key] = kind
            self.now[kind] += size
        self._look()

    def _look(self) -> None:
        if self.total > self.peaks.get(self.part, Counter()).total():
            self.peaks[self.part] = self.now.copy()

    def enter(self, part: str) -> None:
        """The next part of a step begins."""
        self.part = part
        self._look()

    def _like(self, func: Any, args: Sequence[Any]) -> Any:
        """What one of this package's ops returns for such arguments. Asking it takes 40 ms: it runs its reference."""
        key = (func, *map(_plain, args))
        if key not in self.outputs:
            outputs = func(*args)
            self.outputs[key] = [_plain(t) for t in tree_leaves(outputs)], isinstance(outputs, tuple)
        sizes, several = self.outputs[key]
        made = [torch.empty_strided(*size, dtype=dtype, device=META) for *size, dtype in sizes]
        return tuple(made) if several else made[0]

    def _gone(self, key: int, size: int) -> None:
        self.now[self.kinds.pop(key)] -= size
        self.total -= size

    def restart(self) -> None:
        """From now on."""
        self.peaks, self.flops = {}, 0
        self.enter(FORWARD)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and device is not None and device.type == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)  # gradients to the host
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool  # "is this batch a plain one?" is all that models ask
        own = func.namespace == "jointnas" and args[0].is_meta
        outputs = self._like(func, args) if own else func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=outputs)
        made = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        fresh = [t for t in made if t.is_meta and t.untyped_storage()._cdata not in self.kinds]
        if self.inside:
            self.add(fresh, self.inside[-1])
            return outputs
        mixes = str(func).startswith("jointnas.quant_lora")
        for tensor in fresh:
            kind = LOSS if tensor.shape[-1:] == (self.vocabulary,) else ACTIVATIONS
            if mixes and len(made) > 1 and tensor is made[-1]:  # beside its results it keeps the weight that it mixed
                kind = MIXED
            self.add((tensor,), kind)
        return outputs


def _plain(value: Any) -> Any:
    """An argument without its contents."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(value) if isinstance(value, list) else value


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """Attention as its kernels do it, without the matrix of scores that it has on the meta device. A function mode
    would not reach what checkpoints compute again."""
    where: Any = nn.functional
    plain = where.scaled_dot_product_attention
    where.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        where.scaled_dot_product_attention = plain


@contextlib.contextmanager
def _distilled_as_on(device: str) -> Iterator[None]:
    """As many logits at once as such a device takes."""
    loss.PARTS[META.type] = loss.PARTS["cpu" if device == "cpu" else "cuda"]
    try:
        yield
    finally:
        del loss.PARTS[META.type]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if k.shape[1] != q.shape[1]:
        k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y: Tensor = flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return y


def _repeated(t: Tensor, heads: int) -> Tensor:
    return t.repeat_interleave(heads // t.shape[1], 1)


@dataclass(frozen=True)
class Phase:
    """One step of a phase.

    Attributes:
        kinds: bytes of what is alive when most is, by kind.
        flops: floating-point operations of products, two for a multiplication and an addition.
        block: the part of `kinds` that one block adds.
        blocks: how many there are.
        gradients: bytes of the gradients of all that the step trains, of which `kinds` has those that are alive then.
    """

    kinds: Bytes
    flops: float
    block: Bytes = field(default_factory=dict)
    blocks: int = 0
    gradients: float = 0.0

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.kinds.values())


def footprint(config: RunConfig, model_config: Any, space: SearchSpace) -> dict[str, Phase]:
    """The largest steps of a run by phase: every block active, and the full model distilled at its most bits.

    Args:
        config: resolved; batch, LoRA, distillation and checkpointing count, and whether the device is a CPU.
        model_config: transformers' config of the model.
        space: what is searched.
    """
    few = [_steps(config, *_shallow(model_config, space, blocks)) for blocks in FEW]
    return {name: _of_depth(few[0][name], few[1][name], space.depth) for name in few[0]}


@dataclass(frozen=True)
class _Step:
    """What `Alive` saw of one: its peaks by part, operations, and bytes of the gradients of all that it trains."""

    peaks: Mapping[str, Mapping[str, int]]
    flops: int
    gradients: int


def _of_depth(two: _Step, three: _Step, depth: int) -> Phase:
    """The largest part of a step of a model with so many blocks."""

    def line(a: float, b: float) -> float:
        return a + (b - a) * (depth - FEW[0])

    def kinds(part: str) -> dict[str, float]:
        return {k: line(two.peaks[part].get(k, 0), three.peaks[part].get(k, 0)) for k in KINDS}

    largest = max((part for part in two.peaks if part in three.peaks), key=lambda part: sum(kinds(part).values()))
    block = {k: float(three.peaks[largest].get(k, 0) - two.peaks[largest].get(k, 0)) for k in KINDS}
    flops, gradients = line(two.flops, three.flops), line(two.gradients, three.gradients)
    return Phase(kinds(largest), flops, block, depth, gradients)


def _shallow(model_config: Any, space: SearchSpace, blocks: int) -> tuple[Any, SearchSpace]:
    """The same with so many blocks."""
    config = copy.deepcopy(model_config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    return config, replace(space, blocks=tuple(range(1, blocks + 1)) if len(space.blocks) > 1 else (blocks,))


def _steps(config: RunConfig, model_config: Any, space: SearchSpace) -> dict[str, _Step]:
    """The phases of a model as it is given."""
    options = config.search
    with META:
        model = family(model_config).model._from_config(model_config, dtype=getattr(torch, config.model.dtype))
    supernet = convert(
        model, space, lora_rank=options.lora_rank, lora_alpha=options.lora_alpha, relaxation=options.relaxation,
        bit_relaxation=options.bit_relaxation, lora_pairs=options.lora_pairs, base_bits=config.model.base_bits,
    )  # fmt: skip
    del model
    supernet.gradient_checkpointing = options.gradient_checkpointing
    supernet.train()
    if "blocks" in supernet.arch.logits:  # all blocks are drawn
        with torch.no_grad():
            supernet.arch.logits["blocks"][-1] = 1e3
    alive = Alive(model_config.vocab_size)
    alive.add((*supernet.parameters(), *supernet.buffers()), WEIGHTS)
    alive.add(supernet.lora_parameters(), ADAPTERS)
    assume: Any = assumed
    with (
        assume.patch(meta_nonzero_assume_all_nonzero=True), _flash_attention(), _distilled_as_on(config.model.device),
        alive,
    ):  # fmt: skip
        return _search(supernet, config, alive) | {PHASES[2]: _distillation(supernet, config, alive)}


def _search(supernet: Supernet, config: RunConfig, alive: Alive) -> dict[str, _Step]:
    batch = _batch(config.data.batch_size, config.data.seq_len)
    trained = {"weight": supernet.lora_parameters(), "arch": supernet.arch_parameters()}
    optimizers = {mode: torch.optim.AdamW(of, lr=1e-3) for mode, of in trained.items()}
    found: list[_Step] = []

    def losses(part: Batch) -> dict[str, Tensor]:
        return {"loss": cross_entropy(supernet, part)}

    with _gradients(trained["weight"], alive), _parts(supernet.blocks, alive):
        for mode in ("weight", "arch", "weight", "arch"):  # in the second round optimizers have their state

            def step(mode: str = mode) -> None:
                supernet.mode(mode).relax()
                supernet.draw(seeded(0, 0, 0))
                update(optimizers[mode], trained[mode], 1.0, batch, losses, _Watched(alive))

            found.append(_largest(step, optimizers[mode], trained[mode], alive))
    supernet.zero_grad(set_to_none=True)
    return dict(zip(PHASES, found[2:], strict=False))


def _distillation(supernet: Supernet, config: RunConfig, alive: Alive) -> _Step:
    with alive.making(COPIES):
        student = student_of(supernet, supernet.space.full(), config.finetune.train).train()
        if not isinstance(student, Supernet):
            student.requires_grad_(True)
        trained = Trained(student)
    optimizer = torch.optim.AdamW(trained.masters.values(), lr=1e-3)
    teacher = original_logits(supernet)
    batch = _batch(config.finetune.batch_size or config.data.batch_size, config.data.seq_len)

    def step() -> None:
        distillation_step(student, teacher, batch, config.finetune, trained, optimizer, _Watched(alive))

    learning = list(trained.parameters.values())
    plain: Any = student
    blocks = student.blocks if isinstance(student, Supernet) else plain.model.layers
    with _gradients(learning, alive), _parts(blocks, alive):
        _largest(step, optimizer, learning, alive)
        return _largest(step, optimizer, learning, alive)


@contextlib.contextmanager
def _gradients(parameters: Iterable[nn.Parameter], alive: Alive) -> Iterator[None]:
    """Gradients are known as such inside."""
    hooks = [p.register_post_accumulate_grad_hook(lambda p: alive.add((p.grad,), GRADIENTS)) for p in parameters]
    yield
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def _parts(blocks: nn.ModuleList, alive: Alive) -> Iterator[None]:
    """Inside, a block's backward pass, which begins with the gradient of its output, is known as a part of the step."""

    def watch(part: str) -> Callable[..., None]:
        def forward(module: nn.Module, inputs: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if y.requires_grad:  # the teacher's does not
                y.register_hook(lambda gradient: alive.enter(part))

        return forward

    names = [FIRST, *[BETWEEN] * (len(blocks) - 2), LAST]
    hooks = [block.register_forward_hook(watch(name)) for block, name in zip(blocks, names, strict=True)]
    yield
    for hook in hooks:
        hook.remove()


class _Watched(Guard):
    """Tells where the backward pass ends."""

    def __init__(self, alive: Alive) -> None:
        super().__init__()
        self.alive = alive

    def gradients(self, *args: Any) -> dict[str, Tensor]:
        """As any guard."""
        found = super().gradients(*args)
        self.alive.enter(AFTER)
        self.alive.inside.append(GRADIENTS)  # in fp32, of weights in bf16
        return found


def _largest(
    step: Callable[[], None], optimizer: torch.optim.Optimizer, trained: Iterable[nn.Parameter], alive: Alive
) -> _Step:
    """What a step needs."""

    def begin(*_: Any) -> None:
        alive.enter(STEP)
        alive.inside[:] = [OPTIMIZER]

    before = optimizer.register_step_pre_hook(begin)
    after = optimizer.register_step_post_hook(lambda *_: alive.inside.clear())
    alive.restart()
    step()
    before.remove()
    after.remove()
    return _Step(dict(alive.peaks), alive.flops, sum(p.nbytes for p in trained))


def _batch(sequences: int, tokens: int) -> Batch:
    ids = torch.zeros(sequences, tokens, dtype=torch.int64, device=META)
    return Batch(ids, ids)
