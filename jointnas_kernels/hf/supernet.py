"""The supernet: a decoder whose blocks compute the expectation over a search space, with LoRA on frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.hf.graphs import BlockGraphs, Repeats
from jointnas_kernels.hf.ordering import Order
from jointnas_kernels.hf.pretrained import Pretrained
from jointnas_kernels.hf.visibility import check_positions, sequences, visible
from jointnas_kernels.layout import HEAD, all_sizes, sliding_windows, traits
from jointnas_kernels.nn.block import HeadNorm, Step, SupernetBlock, SupernetNorm
from jointnas_kernels.nn.choices import ArchParameters, ArchSample, BlockSample, Masks, seeded
from jointnas_kernels.nn.head import HeadQuantizer
from jointnas_kernels.nn.linear import MODES, SupernetLinear
from jointnas_kernels.nn.loss import IGNORE, linear_cross_entropy
from jointnas_kernels.ops.core.tensors import autocast_dtype
from jointnas_kernels.ops.width.channel import channel_mask
from jointnas_kernels.space import Choice, SearchSpace


class Supernet(Pretrained):
    """Made by `convert`; computes what `fix(choice)` or, once per step, `draw(generator)` decided.

    Without either, a forward pass in evaluation mode is that of the most probable choice, what the search has found so
    far. In training mode each one draws an architecture of its own, a function of (seed, step, mode), and counts `step`
    up; set `step` back to draw the same again, as `SearchCallback` does for the micro-batches of an optimizer step. The
    three are part of the state dict: a resumed run draws what the killed one would have drawn, and all ranks the same.

    Modes say whose gradients a backward pass computes: "weight" LoRA's, "arch" those of the architecture parameters
    (and neither costs what the other needs), "full" both. Changing the mode drops a drawn sample, not a fixed choice.

    Attributes:
        embedding: [V, N], frozen like every weight.
        lm_head: [V, N]; None: tied to the embedding.
        head_quantizer: of the head's searched precisions; None: they are not.
        arch: the architecture parameters; they stay on the host.
        seed, step: of the next automatic draw.
        regularizer: of the probabilities, keyed as `arch.probs` returns them; what it returns is added to the loss of
            "arch" and "full" steps in training mode, once per batch (a micro-batch adds its share). None: nothing.
        full_depth_gradient: in "arch" and "full" mode, blocks that the depth draw skips still run, without a graph, to
            give their gates a gradient; their output is the identity either way. "weight" mode always skips them.
        gradient_checkpointing: recompute blocks in the backward pass.
        graphs: the captured blocks, see `capture`; None: none.
        repeats: on a CUDA device, blocks are captured by themselves when the same training step came `repeats.after`
            times in a row (3; None: never) and nothing forbids it. Then more than one forward pass may be open: all but
            the first run without graphs. What else `capture` says holds.
    """

    def __init__(
        self, config: Any, space: SearchSpace, order: Order, arch: ArchParameters, embedding: Tensor,
        blocks: list[SupernetBlock], norm: SupernetNorm, lm_head: Tensor | None, rotary: nn.Module,
        backend: str | None = None, generation_config: Any = None,
    ) -> None:
        super().__init__()
        self.config, self.space, self.order, self.backend = config, space, order, backend
        self.arch, self.generation_config = arch, generation_config
        self.embedding = nn.Parameter(embedding.detach(), requires_grad=False)
        self.blocks, self.norm, self.rotary = nn.ModuleList(blocks), norm, rotary
        self.lm_head = None if lm_head is None else nn.Parameter(lm_head.detach(), requires_grad=False)
        bits, group_size = space.head_bits, space.group(HEAD)
        self.head_quantizer = None if bits is None else HeadQuantizer(self.head, bits, group_size, backend)
        self.seed = self.step = 0
        self.regularizer: Callable[[dict[str, Tensor]], Tensor] | None = None
        self.sample: ArchSample | None = None
        self.choice: Choice | None = None
        self.graphs: BlockGraphs | None = None
        self.repeats = Repeats()
        self._mode = "weight"
        self._window = next((w for w in sliding_windows(config) if w is not None), None)
        self._qk_norm = traits(config).qk_norm
        self.replaced = sum(isinstance(m, (SupernetLinear, SupernetNorm, HeadNorm)) for m in self.modules())

    @property
    def block_rank(self) -> tuple[int, ...]:
        """Original block indices, most important first."""
        return self.order.block_rank

    @property
    def head(self) -> Tensor:
        """[V, N] of the original head, which may be the embedding."""
        return self.embedding if self.lm_head is None else self.lm_head

    # ---- what runs --------------------------------------------------------------------------------------------------

    def mode(self, name: str) -> Supernet:
        """Whose gradients the next steps compute: "weight", "arch" or "full".

        Raises:
            JointNASError: another name.
        """
        if name not in MODES:
            raise unknown("mode", name, MODES)
        if name != self._mode:
            self._mode, self.sample = name, None
            self._refresh()
        return self

    @property
    def current_mode(self) -> str:
        """Whose gradients the next steps compute."""
        return self._mode

    def draw(self, generator: torch.Generator | None = None, relaxation: str | None = None) -> ArchSample:
        """One architecture sample for the next forward passes; the generator is one of the host."""
        with torch.set_grad_enabled(self._mode != "weight" and torch.is_grad_enabled()):
            return self.use(self.arch.draw(generator, relaxation))

    def use(self, alphas: Mapping[str, Tensor]) -> ArchSample:
        """Like `draw`, with given values (keyed as `arch.draw` returns them); gradients reach them."""
        self.choice = None
        if self.graphs is not None and not self.graphs.busy:
            self.sample = self.graphs.assemble(self, alphas)
        else:
            self.sample = self.arch.assemble(alphas, device=self.device, dtype=self.mask_dtype)
        return self.sample

    def fix(self, choice: Choice) -> Supernet:
        """Compute exactly this choice from now on; equal to the extracted model."""
        self.space.check(choice)
        self.choice = choice
        self._refresh()
        return self

    def relax(self) -> Supernet:
        """Back to sampling: let go of a fixed choice and of a drawn sample."""
        self.choice = self.sample = None
        return self

    def capture(self, batch: int, tokens: int, modes: Sequence[str] = ("weight", "arch")) -> Supernet:
        """Capture the blocks in CUDA graphs, so that steps over [batch, tokens] are not bound by the host.

        From then on a forward pass of a drawn sample over that shape replays the graphs of the mode, values and
        gradients as before; everything else runs as if nothing had been captured: other shapes, an attention mask, a
        fixed choice, other modes, autocast, gradient checkpointing, and blocks one of whose precisions became certain.
        Blocks that the depth draw skips are not replayed. Embedding, last norm and loss stay outside.

        The graphs keep what they work on: activations of one step (with searched bits also the mixed weights, as much
        as the blocks' weights), one input and output gradient per block and mode, and the LoRA gradients; the modes
        share the activations. `graphs.bytes` says how much. Hence
        * `.grad` of LoRA after a backward pass is memory of the graphs, overwritten by the next backward pass unless it
          is still there then (gradient accumulation works); `clone` it to keep it.
        * Between a forward pass and its backward pass there must be no other draw, forward or backward pass; the
          backward pass raises if there was.
        * Hooks on modules inside the blocks are not called.

        Moving the supernet releases the graphs. Parameters may be changed in place; where one is replaced, or a
        quantizer's clip ratios are, steps run without graphs until `capture` is called again.

        Raises:
            JointNASError: not on a CUDA device, under autocast or inference mode, parameters sharded over devices, bits
                drawn as one precision each (bit_relaxation="reinmax": in "weight" mode the kernels differ from draw to
                draw), or an unknown mode.
        """
        for name in modes:
            if name not in MODES:
                raise unknown("mode", name, MODES, where="capture")
        if self.device.type != "cuda":
            raise JointNASError(f"capture: the supernet is on {self.device.type!r}; CUDA graphs need a CUDA device.")
        self.release()
        self.graphs = BlockGraphs(self, batch, tokens, modes)
        return self

    @property
    def capturable(self) -> bool:
        """Whether blocks can be captured here: on a CUDA device that captures nothing else, without hooks in blocks."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return False
        return not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self.blocks.modules())

    def release(self) -> Supernet:
        """Let go of captured graphs and their memory."""
        self.graphs = None
        return self

    def _refresh(self) -> None:
        if self.choice is not None:
            self.sample = self._one_hot(self.choice)

    def _one_hot(self, choice: Choice) -> ArchSample:
        return self.arch.assemble(self.arch.one_hot(choice), device=self.device, dtype=self.mask_dtype)

    def _automatic(self) -> ArchSample:
        """What runs without `draw`, `use` or `fix`."""
        if not self.training:
            return self._one_hot(self.argmax())
        with torch.set_grad_enabled(self._mode != "weight" and torch.is_grad_enabled()):
            alphas = self.arch.draw(seeded(self.seed, self.step, MODES.index(self._mode)))
            sample = self.use(self.averaged(alphas))
        self.sample = None  # it holds for one forward pass
        self.step += 1
        return sample

    def _apply(self, fn: Any, recurse: bool = True) -> Supernet:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.graphs = None
        self.sample = None  # its masks are on the old device
        self._refresh()
        return self

    @property
    def mask_dtype(self) -> torch.dtype:
        """Of masks, gates and probabilities."""
        return torch.float64 if self.embedding.dtype == torch.float64 else torch.float32

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
        position_ids: Tensor | None = None, return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None, return_dict: bool | None = None, **others: Any,
    ) -> CausalLMOutput:
        """Loss (if labels are given) and logits [B, T, V].

        With labels the logits are left out in training mode, unless `return_logits=True`: the loss is then computed
        chunk by chunk and the full logits never exist.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 at padding. Leave it out when there is none, because only then attention can use
                the causal kernel.
            labels: [B, T], the input ids, shifted here; -100 is ignored.
            position_ids: [B, T] or [1, T], None: 0 to T - 1. Where they do not go on by one, and without an
                attention_mask, another sequence begins, and attention stays inside each.
            return_logits: None: where there are no labels, and in evaluation mode.
            num_items_in_batch: a scalar: the loss is the sum over the tokens, divided by this; None: their mean.
            return_dict: False: a tuple.
            others: arguments of transformers' models that are not supported; they may only be None or False.

        Raises:
            JointNASError: an unsupported argument, or position_ids of another shape.
        """
        asked = [name for name, value in others.items() if value is not None and value is not False]
        if asked:
            allowed = ("input_ids", "attention_mask", "labels", "position_ids", "return_logits", "num_items_in_batch")
            raise unknown("argument", asked[0], (*allowed, "return_dict"), where="a supernet's forward pass")
        if position_ids is not None:
            check_positions(position_ids, *input_ids.shape)
        plain = attention_mask is None and position_ids is None and self.choice is None
        plain = plain and self.training and torch.is_grad_enabled() and not self.gradient_checkpointing
        self.repeats.step(self, input_ids.shape, plain and autocast_dtype(self.embedding) is None)
        sample = self._automatic() if self.sample is None else self.sample
        graphs = None if position_ids is not None else self._replayable(sample, input_ids, attention_mask)
        ticket = 0 if graphs is None else graphs.begin()
        embedding, head = self.tables(sample.head_probs, sample.head_index)
        x, step = self.embed(
            input_ids, sample, attention_mask, None if graphs is None else graphs.step, position_ids, embedding
        )
        block: Any
        for index, (block, one, gate) in enumerate(zip(self.blocks, sample.blocks, sample.gates, strict=True)):
            skipped = gate == 0
            if skipped and (one.gate is None or not one.gate.requires_grad or not self.full_depth_gradient):
                continue
            replay = None if graphs is None else graphs.find(index, self._mode, skipped, one, x)
            if replay is not None:
                x = BlockGraphs.run(replay, x, one, skipped)
            elif skipped:
                x = block.skipped(x, step, one)
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, step, one, use_reentrant=False)
            else:
                x = block(x, step, one)
        _, x = self.norm(x, sample.masks, step.sizes)
        if graphs is not None:
            x = graphs.guard(x, ticket)
        wanted = labels is None or not self.training if return_logits is None else return_logits
        output = self._output(x, head, labels, wanted, num_items_in_batch)
        regularized = self.training and self._mode != "weight" and self.choice is None
        if self.regularizer is not None and regularized and labels is not None and output.loss is not None:
            value = self.regularizer(self.averaged(self.arch.probs())).to(output.loss.device, output.loss.dtype)
            if num_items_in_batch is not None:  # the share of this micro-batch
                value = value * ((labels[:, 1:] != IGNORE).sum() / num_items_in_batch)
            output.loss = output.loss + value
        return output if return_dict is not False else output.to_tuple()  # type: ignore[return-value]

    def _replayable(
        self, sample: ArchSample, input_ids: Tensor, attention_mask: Tensor | None
    ) -> BlockGraphs | None:
        """The graphs, if a forward pass of these may use them."""
        if self.graphs is None or attention_mask is not None or torch.is_autocast_enabled(self.device.type):
            return None
        if self.graphs.busy:
            return None
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return None
        return self.graphs if self.graphs.covers(sample, self._mode, input_ids.shape) else None

    @torch.no_grad()
    def original(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutput:
        """The model before conversion, from the same weights: a distillation teacher without a second copy."""
        return self._output(self.original_states(input_ids, attention_mask, position_ids), self.head, labels, True)

    @torch.no_grad()
    def original_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """What the head of the model before conversion reads, [B, T, N], for ids [B, T]."""
        s = all_sizes(self.config)

        def ones(*shape: int) -> Tensor:
            return torch.ones(*shape, dtype=self.mask_dtype, device=self.device)

        heads, dim = s["heads"], s["head_dim"]
        queries, norms = ones(heads, dim), (ones(1) / dim**0.5, ones(1)) if self._qk_norm else ()
        masks = Masks(
            ones(1), ones(s["hidden"]), queries if norms else queries / dim**0.5, ones(s["kv_heads"], dim),
            ones(heads * dim), ones(s["intermediate"]), *norms,
        )  # fmt: skip
        x = self._tokens(input_ids, masks, self.embedding)
        step = self._step(x, masks, attention_mask, position_ids)
        sample = BlockSample((masks, masks, masks))
        step = step._replace(sizes=(s["hidden"],), head_dims=(dim,), original=True)
        for block in self.blocks:
            x = block(x, step, sample)
        _, states = self.norm(x, masks, step.sizes)
        assert isinstance(states, Tensor)
        return states

    def tables(self, probs: Tensor | None = None, index: int | None = None) -> tuple[Tensor, Tensor]:
        """Embedding and head, both [V, N], the same tensor where they are tied. Where the head's bits are searched,
        `probs` [P] mixes its precisions, `index` computes one of them only."""
        if self.head_quantizer is None:
            return self.embedding, self.head
        mixed: Tensor = self.head_quantizer(self.head, probs, index)
        return (mixed if self.lm_head is None else self.embedding), mixed

    def embed(
        self, input_ids: Tensor, sample: ArchSample, attention_mask: Tensor | None = None, known: Step | None = None,
        position_ids: Tensor | None = None, embedding: Tensor | None = None,
    ) -> tuple[Tensor, Step]:
        """Masked embeddings [B, T, N], and what the blocks share; `known`: that of an earlier pass of this shape;
        `embedding` [V, N]: of this pass, None: the unquantized one."""
        x = self._tokens(input_ids, sample.masks, self.embedding if embedding is None else embedding)
        if known is not None:
            return x, known._replace(mode=self._mode)
        return x, self._step(x, sample.masks, attention_mask, position_ids)

    def _tokens(self, input_ids: Tensor, masks: Masks, embedding: Tensor) -> Tensor:
        x = nn.functional.embedding(input_ids, embedding)
        x = x.to(autocast_dtype(x) or x.dtype)  # the whole residual stream runs in the autocast dtype
        return channel_mask(x, masks.hidden, backend=self.backend)

    def _step(self, x: Tensor, masks: Masks, attention_mask: Tensor | None, position_ids: Tensor | None) -> Step:
        length, device = x.shape[1], x.device
        packed = None if position_ids is None or attention_mask is not None else sequences(position_ids)
        cos, sin = self.rotary(x, torch.arange(length, device=device)[None] if position_ids is None else position_ids)
        look = near = None
        if attention_mask is not None or packed is not None:
            look = visible(length, device, attention_mask, packed)
        if self._window is not None:  # up to its length a window hides nothing
            near = look if length <= self._window else visible(length, device, attention_mask, packed, self._window)
        ones = (torch.ones_like(masks.q), torch.ones_like(masks.k)) if self._qk_norm else None
        return Step(
            self.space.hidden, cos, sin, look, near, head_dims=self.space.head_dim, rope_masks=ones, mode=self._mode
        )

    def _output(
        self, x: Tensor, head: Tensor, labels: Tensor | None, return_logits: bool, items: Tensor | int | None = None
    ) -> CausalLMOutput:
        weight = head.to(x.dtype)
        loss = logits = None
        if labels is not None:
            target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        if return_logits:
            logits = nn.functional.linear(x, weight)
            if labels is not None:
                wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
                loss = nn.functional.cross_entropy(wide, target, reduction="mean" if items is None else "sum")
                loss = loss if items is None else loss / items
        elif labels is not None:
            loss = linear_cross_entropy(x.flatten(0, 1), weight, target, items)
        return CausalLMOutput(loss=loss, logits=logits)

    # ---- parameters -------------------------------------------------------------------------------------------------

    def argmax(self) -> Choice:
        """The most probable choice."""
        return self.arch.argmax()

    def lora_parameters(self) -> list[nn.Parameter]:
        """What weight steps train: LoRA, and clip logits where they are learned."""
        return [p for p in self.blocks.parameters() if p.requires_grad]

    def arch_parameters(self) -> list[nn.Parameter]:
        """What arch steps train."""
        return list(self.arch.parameters())
