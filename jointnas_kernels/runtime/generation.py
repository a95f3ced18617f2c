"""A model's `forward`: prompts and decode steps through its device's `Step` where they apply, transformers' own code
otherwise.

The cache stays transformers' own. After a call its layers hold views of the step's static buffers, so everything that
is done to caches (cropping, reordering beams, tokens read by transformers) goes on working; what it leaves there is
copied into the buffers by the next call.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from jointnas_kernels.runtime.decode import DecodeStep
from jointnas_kernels.runtime.graph import GraphStep
from jointnas_kernels.runtime.step import Step

STEPS: dict[str, type[Step]] = {step.kind: step for step in (DecodeStep, GraphStep)}
MORE = 256  # positions that buffers grow by
# The cache in calls and results was `past_key_values` before transformers 5.24; calls may still name it so.
CACHE_NAMES = ("cache", "past_key_values")
RESULT = next(name for name in CACHE_NAMES if name in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)})
# Arguments that are read here, or that change nothing.
KNOWN = {"input_ids", "attention_mask", "position_ids", "cache_position", "logits_to_keep", *CACHE_NAMES}


class _Unsuited(Exception):
    """Why a call is left to transformers."""


class Runtime:
    """Stands in for a model's `forward`, and says what ran.

    Prompts of a few sequences (16 on a CPU, 64 on a GPU), at the beginning or later, and one more token for each (a
    decode step) are run by the device's step, if the model fits it and nothing is wanted that only transformers' code
    has: other inputs or outputs, other masks than causal ones with padding on the left, hooks, gradients, caches that
    do not grow. Changes of the model (other modules, dtype or device) are seen with the next cache.

    Attributes:
        enabled: False leaves every call to transformers.
        prompts: calls that read a prompt here: several tokens of each sequence, or the first ones.
        steps: calls that were decode steps.
        reason: why the latest call was neither; None: it was one of them.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.enabled = model, True
        self.prompts = self.steps = 0
        self.reason: str | None = "nothing ran yet"
        self._step: Step | None = None
        self._state: list[int] = []  # of the model, when it was looked at
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))  # generate() reads it

    def __str__(self) -> str:
        latest = "one of them" if self.reason is None else f"neither: {self.reason}"
        return f"prompts: {self.prompts}, decode steps: {self.steps}; the latest call was {latest}"

    def __reduce__(self) -> tuple[Any, ...]:  # copies have a step of their own
        return Runtime, (self.model,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's `forward`."""
        if not torch.compiler.is_compiling():
            try:
                return self._run(*args, **kwargs)
            except _Unsuited as reason:
                self.reason = str(reason)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        if args:
            kwargs["input_ids"] = args[0]
        ids, mask, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        cache: Any = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if not self.enabled:
            raise _Unsuited("it is switched off")
        if ids is None or not ids.numel():
            raise _Unsuited("no token ids are given")
        if len(args) > 1:
            raise _Unsuited("arguments are given by position")
        if cache is None:
            if not (self.model.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]):
                raise _Unsuited("use_cache is False")
            cache = DynamicCache(config=self.model.config)
        _check(kwargs, cache, mask, self.model.config)
        room = cache.__dict__.get("_room")
        if room is None or room.runtime is not self:
            room = cache._room = _Room(self)
        if room.reason is not None:
            raise _Unsuited(room.reason)
        if len(ids) > room.most:
            raise _Unsuited(f"{len(ids)} sequences, of at most {room.most}")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise _Unsuited("gradients are wanted")
        seen, (batch, count) = cache.get_seq_length(), ids.shape
        if positions is None:
            positions = torch.arange(seen, seen + count, device=ids.device)
        starts, farthest = _read(mask, positions, seen + count)
        keep = kwargs.get("logits_to_keep") or count
        logits = room.run(ids, positions.expand(batch, count), farthest, starts, cache, seen, min(keep, count))
        if count > 1 or not seen:
            self.prompts += 1
        else:
            self.steps += 1
        self.reason = None
        return CausalLMOutputWithPast(logits=logits, **{RESULT: cache})

    def fitted(self) -> Step:
        """The step of the model as it is now; raises where there is none."""
        model = self.model
        below = [m for m in model.modules() if m is not model]
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in below):
            raise _Unsuited("modules of the model have hooks")

        def state() -> list[int]:
            return [*map(id, below), *(t.data_ptr() for m in (model.parameters(), model.buffers()) for t in m)]

        if self._step is None or state() != self._state:
            if reason := misfit(model):
                raise _Unsuited(reason)
            self._step = STEPS[model.device.type](model)
            self._state = state()  # a step may move weights
        return self._step


class _Room:
    """A step's static buffers for one cache, and the views of them that its layers were given last; or the reason why
    the model had no step when this cache was first used."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.reason: str | None = None
        self._views: list[tuple[Tensor, Tensor]] = []
        try:
            self._step = runtime.fitted()
            self.most, self._caches = self._step.most, self._step.caches(0, 0)
        except _Unsuited as reason:
            self.reason = str(reason)

    def __reduce__(self) -> tuple[Any, ...]:  # copies of a cache get buffers of their own with their next call
        return type(None), ()

    def run(
        self, ids: Tensor, positions: Tensor, farthest: int, starts: Tensor | None, cache: DynamicCache, seen: int,
        keep: int,
    ) -> Tensor:  # fmt: skip
        """Logits [batch, keep, vocab] of the last of ids [batch, count]; the layers' keys and values are `seen` long
        before, and longer by `count` afterwards."""
        layers: Any = cache.layers
        if not layers:  # a cache without a config
            layers.extend(DynamicLayer() for _ in self._caches.keys)
        end = seen + ids.shape[1]
        same = len(self._views) == len(layers) and all(
            layer.keys is keys and layer.values is values
            for layer, (keys, values) in zip(layers, self._views, strict=True)
        )
        if not same or self._caches.batch != len(ids) or end > self._caches.length:
            self._adopt(layers, len(ids), seen, end)
        if farthest >= self._caches.length:
            raise _Unsuited("positions beyond those of the cache")
        logits = self._step.prefill(ids, positions, self._caches, seen, starts, keep)
        self._views, views = [], {0: self._caches.between(0, end)}
        for b, layer in enumerate(layers):
            begin = 0
            if not layer.is_initialized:
                layer.lazy_initialization(self._caches.keys[b], self._caches.values[b])
            if layer.is_sliding:
                layer.cumulative_length = end
                begin = max(0, end + 1 - layer.sliding_window)
            if begin not in views:
                views[begin] = self._caches.between(begin, end)
            keys, values = views[begin]
            layer.keys, layer.values = keys[b], values[b]
            self._views.append((keys[b], values[b]))
        return logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def _adopt(self, layers: list[Any], batch: int, seen: int, end: int) -> None:
        """Copies into the buffers what the layers hold, unless it is there; larger buffers where these do not do."""
        shape, dtype = (batch, *self._caches.keys[0].shape[1::2]), self._caches.keys[0].dtype
        if len(layers) != len(self._caches.keys) or any((layer.keys is None) == (seen > 0) for layer in layers):
            raise _Unsuited("a cache of other layers")
        for layer in layers if seen else ():
            for tensor in (layer.keys, layer.values):
                length, device = tensor.shape[2], self._caches.keys[0].device
                if (*tensor.shape[:2], tensor.shape[3]) != shape or tensor.dtype != dtype or tensor.device != device:
                    raise _Unsuited(f"a cache of {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
                if length != seen and not (layer.is_sliding and length >= min(seen, layer.sliding_window - 1)):
                    raise _Unsuited("a cache whose layers are not equally long")
        caches = self._caches
        if caches.batch != batch or end > caches.length:
            caches = self._step.caches(batch, end + MORE)
        for layer, *buffers in zip(layers if seen else (), caches.keys, caches.values, strict=bool(seen)):
            for tensor, buffer in zip((layer.keys, layer.values), buffers, strict=True):
                place = buffer[:, :, seen - tensor.shape[2] : seen]
                if (tensor.data_ptr(), tensor.stride()) != (place.data_ptr(), place.stride()):
                    place.copy_(tensor.clone())  # it may be another part of the same buffer
        self._caches = caches


def misfit(model: Any) -> str | None:
    """Why no step can run a transformers model where it is; None: one can."""
    step = STEPS.get(model.device.type)
    return f"there is none for {model.device}" if step is None else step.misfit(model)


def attach(model: Any) -> None:
    """Lets a transformers model read and write through the step, where it applies; `model.runtime` is its `Runtime`."""
    model.runtime = model.forward = Runtime(model)


def _check(kwargs: dict[str, Any], cache: Any, mask: Any, config: Any) -> None:
    """That nothing is asked for which the step has not."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache or cache.offloading or any(type(layer) not in kinds for layer in cache.layers):
        raise _Unsuited("its cache is no plain DynamicCache")
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        raise _Unsuited("its cache records what slides out of the window")
    for name in ("use_cache", "return_dict"):
        if kwargs.pop(name, None) is False:
            raise _Unsuited(f"{name} is False")
    for name, value in kwargs.items():
        if name not in KNOWN and value is not None and value is not False:
            raise _Unsuited(f"{name} is given")
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, Tensor) or (keep or 0) < 0:
        raise _Unsuited("logits_to_keep is no number of last tokens")
    device = kwargs["input_ids"].device
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or mask.device != device):
        raise _Unsuited("its attention mask is not [batch, positions], where the ids are")
    if config.output_attentions or config.output_hidden_states or config.return_dict is False:
        raise _Unsuited("the config wants other outputs")
    if torch.is_autocast_enabled(device.type):
        raise _Unsuited("autocast is on")


def _read(mask: Tensor | None, positions: Tensor, count: int) -> tuple[Tensor | None, int]:
    """The first visible position of each sequence, int64 [batch] (None: all are), and the largest of `positions`.

    What usual calls need to know is read from a device at once: it is waited for."""
    if mask is not None and mask.shape[1] != count:
        raise _Unsuited(f"an attention mask of {mask.shape[1]} positions, where there are {count}")
    visible = None if mask is None else mask.bool()
    whole = (positions.diff(dim=-1) == 1).all() if visible is None else visible.all()
    least, farthest, usual = torch.stack([*positions.aminmax(), whole.to(positions.dtype)]).tolist()
    if least < 0:
        raise _Unsuited("positions beyond those of the cache")
    if usual:
        return None, farthest
    if visible is None:
        raise _Unsuited("positions of several texts in one row")
    starts = visible.long().argmax(1)
    if not torch.equal(visible.sum(1), count - starts) or not visible[:, -1].all():
        raise _Unsuited("an attention mask with more than padding on the left")
    return starts, farthest
