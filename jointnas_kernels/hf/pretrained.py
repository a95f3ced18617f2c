"""What transformers' Trainer, accelerate and their users expect of a model: state, files, counts, checkpointing.

A saved supernet is a folder of

    supernet.json        model config, generation config, space, what LoRA and the architecture parameters are made of
    model.safetensors    the state dict, or model-0000i-of-0000n.safetensors and model.safetensors.index.json

There is no config.json, so that nobody takes it for a plain model and gets one with random weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from jointnas_kernels.errors import JointNASError, reading
from jointnas_kernels.hf.families import build, family, rotary
from jointnas_kernels.hf.loading import Tensors, read_object
from jointnas_kernels.hf.ordering import Order
from jointnas_kernels.hf.parts import supernet_parts
from jointnas_kernels.layout import LINEARS
from jointnas_kernels.nn.choices import ArchParameters
from jointnas_kernels.nn.head import HeadQuantizer
from jointnas_kernels.nn.linear import MODES, SupernetLinear
from jointnas_kernels.space import Choice, SearchSpace

DESCRIPTION = "supernet.json"
FORMAT = 1
EXTRA = "_extra_state"  # torch's name of what `get_extra_state` returns
KEYS = (
    "format", "config", "generation_config", "space", "groups", "linear", "arch", "act_symmetric", "choice",
    "full_depth_gradient",
)  # fmt: skip


class Pretrained(nn.Module):
    """Base of `Supernet`: its files, and what Trainer and accelerate ask a model for."""

    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    loss_type = "ForCausalLM"  # Trainer counts the labels behind the first of each row
    main_input_name = "input_ids"
    _keys_to_ignore_on_save = None
    config: Any
    generation_config: Any
    space: SearchSpace
    order: Order
    arch: ArchParameters
    blocks: nn.ModuleList
    embedding: nn.Parameter
    lm_head: nn.Parameter | None
    head_quantizer: HeadQuantizer | None
    choice: Choice | None
    backend: str | None
    seed: int
    step: int
    _mode: str

    def __init__(self) -> None:
        super().__init__()
        self.full_depth_gradient, self.gradient_checkpointing = True, False
        self.register_state_dict_post_hook(_own_memory)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights; LoRA has its own."""
        return self.embedding.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Parameters of the supernet, LoRA and architecture parameters included; for a choice see `count_params`."""
        left_out = self.embedding if exclude_embeddings else None
        found = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in found if p is not left_out)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """Recompute blocks in the backward pass, as Trainer's `gradient_checkpointing` asks for.

        Raises:
            JointNASError: another kind of checkpointing than torch's, without re-entrance, of every block.
        """
        options = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if options != {"use_reentrant": False} or every_n_layers != 1 or offload:
            raise JointNASError(
                f"gradient checkpointing of a supernet recomputes every block, with use_reentrant=False; got {options},"
                f" every_n_layers={every_n_layers}, offload={offload}."
            )
        self.gradient_checkpointing = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.gradient_checkpointing = False

    # ---- ranks ------------------------------------------------------------------------------------------------------

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DistributedDataParallel, which wants parameters of one device; see `averaged`."""
        return [f"arch.{name}" for name, _ in self.arch.named_parameters()]

    def averaged(self, alphas: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same host values [K] or [blocks, K]; where several ranks train, the gradient of each is its mean over
        them. It reaches parameters that are equal on all ranks, and stay so."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for alpha in alphas.values():
                if alpha.requires_grad:
                    alpha.register_hook(self._mean_over_ranks)
        return alphas

    def _mean_over_ranks(self, gradient: Tensor) -> Tensor:
        total = gradient.to(self.device, copy=True)  # NCCL has nothing for the host
        dist.all_reduce(total)
        return (total / dist.get_world_size()).to(gradient.device)

    # ---- state ------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Where automatic draws are (seed, step, mode) and the channel order that the weights have, int64 [n]."""
        return torch.cat((torch.tensor([self.seed, self.step, MODES.index(self._mode)]), self.order.pack()))

    def set_extra_state(self, state: Any) -> None:
        """Inverse of `get_extra_state`; part of `load_state_dict`.

        Raises:
            JointNASError: the state is of another channel order.
        """
        if not torch.equal(state[3:].cpu(), self.order.pack()):
            raise JointNASError(
                "the state's channel order is not this supernet's; convert with the importance it was saved with, or"
                " load it with Supernet.from_pretrained."
            )
        self.seed, self.step, mode = state[:3].tolist()
        supernet: Any = self
        supernet.mode(MODES[mode])

    def linears(self) -> Iterator[tuple[str, SupernetLinear]]:
        """Name and layer of every linear of the blocks."""
        for name, module in self.named_modules():
            if isinstance(module, SupernetLinear):
                yield name, module

    def search_state(self) -> dict[str, Tensor]:
        """Everything a search changes, as a flat dict for safetensors: LoRA, architecture parameters, quantizer state,
        and the channel order they belong to. The base weights are not in it."""
        state = {f"arch.{k}": v.detach() for k, v in self.arch.logits.items()}
        for name, linear in self.linears():
            for part in ("lora_a", "lora_b", "clip", "clip_logits"):
                value = getattr(linear, part)
                if value is not None:
                    state[f"{name}.{part}"] = value.detach()
        if self.head_quantizer is not None:
            state["head_quantizer.clip"] = self.head_quantizer.clip
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

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write everything into a folder: weights, LoRA, quantizer state, architecture parameters, channel order, space
        and configs. `from_pretrained` reads it back bit for bit.

        Args:
            folder: is made if it is not there; an earlier supernet in it is replaced.
            max_shard_size: of one file, in bytes or as in "5GB".

        Raises:
            JointNASError: the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / DESCRIPTION).unlink(missing_ok=True)  # what is half written is no supernet
            save_torch_state_dict(self.state_dict(), folder, max_shard_size=max_shard_size)
        except OSError as error:
            raise JointNASError(f"{str(folder)!r} cannot be written: {error}") from None
        self.save_description(folder)

    def save_description(self, folder: str | Path) -> None:
        """Write supernet.json only: beside a state dict that Trainer saved, it makes the folder loadable."""
        block: Any = self.blocks[0]
        one = block.linears[LINEARS[0]]
        generation = self.generation_config
        description = {
            "format": FORMAT, "config": json.loads(self.config.to_json_string(use_diff=False)),
            "generation_config": None if generation is None else json.loads(generation.to_json_string(use_diff=False)),
            "space": self.space.to_dict(), "groups": {k: linear.group_size for k, linear in block.linears.items()},
            "linear": {k: getattr(one, k) for k in ("rank", "alpha", "rslora", "ste", "lora_pairs", "base_bits")},
            "arch": {k: getattr(self.arch, k) for k in ("relaxation", "bit_relaxation", "tau")},
            "act_symmetric": block.mlp.act.symmetric, "choice": None if self.choice is None else self.choice.to_dict(),
            "full_depth_gradient": self.full_depth_gradient,
        }  # fmt: skip
        (Path(folder) / DESCRIPTION).write_text(json.dumps(description, indent=1))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", backend: str | None = None
    ) -> Self:
        """The supernet of a folder that `save_pretrained` wrote, or of a checkpoint of a Trainer with `SearchCallback`.

        Args:
            folder: nothing else is read, and nothing fetched.
            device: of everything but the architecture parameters, which stay on the host.
            backend: forces one backend of every operator; None: by device.

        Raises:
            JointNASError: a file is missing or damaged, or holds something else; the message names it.
        """
        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise JointNASError(f"{str(folder)!r} holds no supernet: it has no {DESCRIPTION}")
        data = read_object(path)
        missing = [key for key in KEYS if key not in data]
        if missing or data["format"] != FORMAT:
            what = f"lacks {', '.join(missing)}" if missing else f"has format {data['format']!r}, supported: {FORMAT}"
            raise JointNASError(f"{path} {what}")
        with reading(str(path), "it is damaged, or not of these weights"):
            return cls._of(data, Path(folder), device, backend)

    @classmethod
    def _of(cls, data: dict[str, Any], folder: Path, device: str | torch.device, backend: str | None) -> Self:
        path = folder / DESCRIPTION
        with Tensors(folder, torch.device(device)) as tensors:
            state = {name: tensors.take(name) for name in tensors.names()}
        state = {k: v.cpu() if k.startswith(("arch.", EXTRA)) else v for k, v in state.items()}
        if EXTRA not in state:
            raise JointNASError(f"{str(folder)!r} has no tensor {EXTRA!r}: its weights are not a supernet's")
        try:
            parts = _parts(data, path, state[EXTRA][3:], backend)
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # JointNASError is a ValueError
            raise JointNASError(f"{path} is damaged, or not of these weights: {error}") from None
        supernet: Any = cls(**parts)
        try:
            supernet.load_state_dict(state, assign=True)
        except RuntimeError as error:  # names and shapes of all that differ, on many lines
            raise JointNASError(f"{str(folder)!r}: {' '.join(str(error).split())[:400]}") from None
        supernet.rotary = rotary(supernet.config).to(device)  # computed from the config, not stored
        supernet.full_depth_gradient = bool(data["full_depth_gradient"])
        if data["choice"] is not None:
            supernet.fix(Choice.from_dict(data["choice"], where=str(path)))
        return supernet


def _parts(data: dict[str, Any], path: Path, order: Tensor, backend: str | None) -> dict[str, Any]:
    """Arguments of `Supernet`, without weights (meta device)."""
    config = AutoConfig.for_model(**data["config"])
    family(config, f"{path}: a model")
    with torch.device("meta"):
        model: Any = build(config)
    model.tie_weights()
    generation = data["generation_config"]
    model.generation_config = None if generation is None else GenerationConfig.from_dict(generation)
    space = SearchSpace.from_dict(data["space"], where=str(path))
    space.validate(config)
    return supernet_parts(
        model, space, Order.unpack(order, config), groups=data["groups"], linear=data["linear"], arch=data["arch"],
        act_symmetric=data["act_symmetric"], backend=backend,
    )  # fmt: skip


def _own_memory(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Rows of a linear that its family fuses share its memory, which files cannot: such tensors are copied."""
    for name, value in state.items():
        if not name.startswith(prefix) or type(value) is not Tensor:
            continue
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            state[name] = value.clone(memory_format=torch.contiguous_format)
