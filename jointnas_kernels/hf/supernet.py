"""The supernet: a decoder whose blocks compute the expectation over a search space, with LoRA on frozen weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.hf.graphs import BlockGraphs
from jointnas_kernels.hf.ordering import Order
from jointnas_kernels.layout import all_sizes, sliding_windows, traits
from jointnas_kernels.nn.block import HeadNorm, Step, SupernetBlock, SupernetNorm
from jointnas_kernels.nn.choices import ArchParameters, ArchSample, BlockSample, Masks
from jointnas_kernels.nn.linear import MODES, SupernetLinear
from jointnas_kernels.nn.loss import linear_cross_entropy
from jointnas_kernels.ops.width.channel import channel_mask
from jointnas_kernels.space import Choice, SearchSpace


class Supernet(nn.Module):
    """Made by `convert`. Before a forward pass: `fix(choice)`, or `draw(generator)` once per step.

    Modes say whose gradients a backward pass computes: "weight" LoRA's, "arch" those of the architecture parameters
    (and neither costs what the other needs), "full" both. Changing the mode drops a drawn sample, not a fixed choice.

    Attributes:
        embedding: [V, N], frozen like every weight.
        lm_head: [V, N]; None: tied to the embedding.
        arch: the architecture parameters; they stay on the host.
        full_depth_gradient: in "arch" and "full" mode, blocks that the depth draw skips still run, without a graph, to
            give their gates a gradient; their output is the identity either way. "weight" mode always skips them.
        gradient_checkpointing: recompute blocks in the backward pass.
        graphs: the captured blocks, see `capture`; None: none.
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
        self.full_depth_gradient, self.gradient_checkpointing = True, False
        self.sample: ArchSample | None = None
        self.choice: Choice | None = None
        self.graphs: BlockGraphs | None = None
        self._mode = "weight"
        self._window = next((w for w in sliding_windows(config) if w is not None), None)
        self._qk_norm = traits(config).qk_norm
        self.replaced = sum(isinstance(m, (SupernetLinear, SupernetNorm, HeadNorm)) for m in self.modules())

    @property
    def block_rank(self) -> tuple[int, ...]:
        """Original block indices, most important first."""
        return self.order.block_rank

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

    def draw(self, generator: torch.Generator | None = None, relaxation: str | None = None) -> ArchSample:
        """One architecture sample for the next forward passes; the generator is one of the host."""
        with torch.set_grad_enabled(self._mode != "weight" and torch.is_grad_enabled()):
            return self.use(self.arch.draw(generator, relaxation))

    def use(self, alphas: Mapping[str, Tensor]) -> ArchSample:
        """Like `draw`, with given values (keyed as `arch.draw` returns them); gradients reach them."""
        self.choice = None
        if self.graphs is not None:
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
        """Back to sampling: the next forward pass needs a `draw`."""
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

    def release(self) -> Supernet:
        """Let go of captured graphs and their memory."""
        self.graphs = None
        return self

    def _refresh(self) -> None:
        if self.choice is not None:
            alphas = self.arch.one_hot(self.choice)
            self.sample = self.arch.assemble(alphas, device=self.device, dtype=self.mask_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Supernet:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.graphs = None
        self.sample = None  # its masks are on the old device
        self._refresh()
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def mask_dtype(self) -> torch.dtype:
        """Of masks, gates and probabilities."""
        return torch.float64 if self.embedding.dtype == torch.float64 else torch.float32

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
        return_logits: bool | None = None,
    ) -> CausalLMOutput:
        """Loss (if labels are given) and logits [B, T, V].

        With labels the logits are left out unless `return_logits=True`: the loss is then computed chunk by chunk and
        the full logits never exist. `attention_mask` [B, T] marks padding with 0; leave it out when there is none,
        because only then attention can use the causal kernel. Labels are the input ids, shifted here; -100 is ignored.

        Raises:
            JointNASError: there is no architecture, by `draw` or `fix`.
        """
        if self.sample is None:
            raise JointNASError("the supernet has no architecture: call draw(generator) or fix(choice) before a step.")
        sample = self.sample
        graphs = self._replayable(sample, input_ids, attention_mask)
        ticket = 0 if graphs is None else graphs.begin()
        x, step = self.embed(input_ids, sample, attention_mask, None if graphs is None else graphs.step)
        block: Any
        for index, (block, one, gate) in enumerate(zip(self.blocks, sample.blocks, sample.gates, strict=True)):
            skipped = gate == 0
            if skipped and (one.gate is None or not one.gate.requires_grad or not self.full_depth_gradient):
                continue
            replay = None if graphs is None else graphs.find(index, self._mode, skipped, one, x)
            if replay is not None:
                x = BlockGraphs.run(replay, x, step, one, skipped)
            elif skipped:
                x = block.skipped(x, step, one)
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, step, one, use_reentrant=False)
            else:
                x = block(x, step, one)
        x = self.norm(x, step)
        if graphs is not None:
            x = graphs.guard(x, ticket)
        return self._output(x, labels, return_logits)

    def _replayable(
        self, sample: ArchSample, input_ids: Tensor, attention_mask: Tensor | None
    ) -> BlockGraphs | None:
        """The graphs, if a forward pass of these may use them."""
        if self.graphs is None or attention_mask is not None or torch.is_autocast_enabled(self.device.type):
            return None
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return None
        return self.graphs if self.graphs.covers(sample, self._mode, input_ids.shape) else None

    @torch.no_grad()
    def original(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        """The model before conversion, from the same weights: a distillation teacher without a second copy."""
        s = all_sizes(self.config)

        def ones(*shape: int) -> Tensor:
            return torch.ones(*shape, dtype=self.mask_dtype, device=self.device)

        heads, dim = s["heads"], s["head_dim"]
        queries, norms = ones(heads, dim), (ones(1) / dim**0.5, ones(1)) if self._qk_norm else ()
        masks = Masks(
            ones(1), ones(s["hidden"]), queries if norms else queries / dim**0.5, ones(s["kv_heads"], dim),
            ones(heads * dim), ones(s["intermediate"]), *norms,
        )  # fmt: skip
        x = self._tokens(input_ids, masks)
        step = self._step(x, masks, attention_mask)._replace(sizes=(s["hidden"],), head_dims=(dim,), original=True)
        for block in self.blocks:
            x = block(x, step, BlockSample())
        return self._output(self.norm(x, step), labels, True)

    def embed(
        self, input_ids: Tensor, sample: ArchSample, attention_mask: Tensor | None = None, known: Step | None = None
    ) -> tuple[Tensor, Step]:
        """Masked embeddings [B, T, N], and what the blocks share; `known`: that of an earlier pass of this shape."""
        x = self._tokens(input_ids, sample.masks)
        if known is not None:
            return x, known._replace(masks=sample.masks, mode=self._mode)
        return x, self._step(x, sample.masks, attention_mask)

    def _tokens(self, input_ids: Tensor, masks: Masks) -> Tensor:
        kind = self.device.type
        x = nn.functional.embedding(input_ids, self.embedding)
        if torch.is_autocast_enabled(kind):  # the whole residual stream runs in the autocast dtype
            x = x.to(torch.get_autocast_dtype(kind))
        return channel_mask(x, masks.hidden, backend=self.backend)

    def _step(self, x: Tensor, masks: Masks, attention_mask: Tensor | None) -> Step:
        length = x.shape[1]
        cos, sin = self.rotary(x, torch.arange(length, device=x.device)[None])
        look = near = None
        if attention_mask is not None:
            look = self._visible(length, attention_mask)
        if self._window is not None:  # up to its length a window hides nothing
            near = look if length <= self._window else self._visible(length, attention_mask, self._window)
        ones = (torch.ones_like(masks.q), torch.ones_like(masks.k)) if self._qk_norm else None
        return Step(
            masks, self.space.hidden, cos, sin, look, near, head_dims=self.space.head_dim, rope_masks=ones,
            mode=self._mode,
        )  # fmt: skip

    def _visible(self, length: int, attention_mask: Tensor | None, window: int | None = None) -> Tensor:
        """[B or 1, 1, T, T]: True where a query may look."""
        visible = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        if window is not None:
            visible = visible.triu(1 - window)
        if attention_mask is None:
            return visible[None, None]
        visible = visible & attention_mask[:, None, None, :].bool()
        return visible | torch.eye(length, dtype=torch.bool, device=self.device)  # left padding would see nothing: NaN

    def _output(self, x: Tensor, labels: Tensor | None, return_logits: bool | None) -> CausalLMOutput:
        weight = (self.embedding if self.lm_head is None else self.lm_head).to(x.dtype)
        loss = logits = None
        if labels is not None:
            target = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        if return_logits or (return_logits is None and labels is None):
            logits = nn.functional.linear(x, weight)
            if labels is not None:
                wide = torch.promote_types(logits.dtype, torch.float32)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).to(wide), target)
        elif labels is not None:
            loss = linear_cross_entropy(x.flatten(0, 1), weight, target)
        return CausalLMOutput(loss=loss, logits=logits)

    # ---- parameters and state ---------------------------------------------------------------------------------------

    def argmax(self) -> Choice:
        """The most probable choice."""
        return self.arch.argmax()

    def linears(self) -> Iterator[tuple[str, SupernetLinear]]:
        """Name and layer of every linear of the blocks."""
        for name, module in self.named_modules():
            if isinstance(module, SupernetLinear):
                yield name, module

    def lora_parameters(self) -> list[nn.Parameter]:
        """What weight steps train: LoRA, and clip logits where they are learned."""
        return [p for p in self.blocks.parameters() if p.requires_grad]

    def arch_parameters(self) -> list[nn.Parameter]:
        """What arch steps train."""
        return list(self.arch.parameters())

    def search_state(self) -> dict[str, Tensor]:
        """Everything a search changes, as a flat dict for safetensors: LoRA, architecture parameters, quantizer state,
        and the channel order they belong to. The base weights are not in it."""
        state = {f"arch.{k}": v.detach() for k, v in self.arch.logits.items()}
        for name, linear in self.linears():
            for part in ("lora_a", "lora_b", "clip", "clip_logits"):
                value = getattr(linear, part)
                if value is not None:
                    state[f"{name}.{part}"] = value.detach()
        state["order.hidden"] = torch.tensor(self.order.hidden)
        state["order.block_rank"] = torch.tensor(self.order.block_rank)
        return state

    @torch.no_grad()
    def load_search_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `search_state`.

        Raises:
            JointNASError: it is of another model, space or importance.
        """
        for name, own in (("hidden", self.order.hidden), ("block_rank", self.order.block_rank)):
            saved = state.get(f"order.{name}")
            if saved is None or tuple(saved.tolist()) != own:
                raise JointNASError(
                    f"search state: its {name} order is not this supernet's; convert with the importance it was saved"
                    " with."
                )
        for name, linear in self.linears():
            linear.set_clip(state.get(f"{name}.clip"))
            if f"{name}.clip_logits" in state:
                linear.learn_clip()
        own_state = self.search_state()
        missing, extra = sorted(set(own_state) - set(state)), sorted(set(state) - set(own_state))
        if missing or extra:
            raise JointNASError(
                f"search state: {len(missing)} missing tensors {missing[:3]}, {len(extra)} unexpected {extra[:3]}."
            )
        for name, value in own_state.items():
            if state[name].shape != value.shape:
                raise JointNASError(
                    f"search state: {name} has shape {tuple(state[name].shape)}; this supernet needs"
                    f" {tuple(value.shape)}."
                )
            value.copy_(state[name])
