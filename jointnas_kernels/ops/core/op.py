"""An operator declared once: the annotated signature of its reference gives schema, fake and autograd.

    swiglu = Op(
        "masked_swiglu",
        {"triton": launch, "cpu": call, "reference": reference},                            # forward, best first
        {"triton": launch_backward, "cpu": call_backward, "reference": reference_backward},
    )
    y = swiglu(gate, up, out_mask, in_mask, backend)

* Forward implementations take tensors first, then plain values: (x, mask, sizes, eps). They return one tensor, or a
  tuple: the results, then what is saved for the backward pass. Parts may be absent (None), if the reference is so
  annotated. Callers add the backend as last argument.
* Backward implementations take the gradients of the results, the tensors, what was saved, the plain values, and `need`:
  which gradients are wanted. They return one gradient per tensor that is neither `frozen` nor `identity`, in order;
  unwanted ones may be None, and some may share memory. `need` has their order.
* The reference is the specification. It also runs on fake tensors, so that shapes, dtypes and devices are said once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from jointnas_kernels.ops.core.backends import resolve

Implementations = Mapping[str, Callable[..., Any]]
_KINDS = {  # of arguments
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str",
    Sequence[Tensor]: "Tensor[]", Sequence[int]: "int[]", Sequence[bool]: "bool[]",
}  # fmt: skip


def _dense(output: Any) -> Any:
    """Outputs as kernels write them."""
    if isinstance(output, tuple):
        return tuple(None if part is None else part.contiguous() for part in output)
    return output.contiguous()


def _apart(output: Any, args: Sequence[Any]) -> Any:
    """Outputs as the dispatcher knows them: none is absent (but empty), none shares memory with another or an input."""
    if not isinstance(output, tuple):
        return output
    device = next(a.device for a in args if isinstance(a, Tensor))
    inputs, parts = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}, list[Tensor]()
    for part in (torch.empty(0, dtype=torch.float32, device=device) if part is None else part for part in output):
        memory = part.untyped_storage()._cdata
        shared = memory in inputs or any(memory == other.untyped_storage()._cdata for other in parts)
        parts.append(part.clone() if shared else part)
    return tuple(parts)


def _schema(arguments: Sequence[str], outputs: int) -> str:
    returned = ", ".join(["Tensor"] * outputs)
    return f"({', '.join(arguments)}) -> {f'({returned})' if outputs > 1 else returned}"


class Registered:
    """``jointnas::NAME`` in ``torch.library``, its implementations chosen by the first tensor and the last argument.

    The dispatcher's Python layers cost about 25 us per call, as much as a kernel over 8 x 128 tokens. Plain tensors in
    eager mode therefore go straight to the implementation; tracing, tensor subclasses and dispatch modes see the
    registered op.
    """

    function: type[torch.autograd.Function] | None = None

    def __init__(
        self, name: str, schema: str, implementations: Implementations, choose: Callable[..., str] | None = None,
        public: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.implementations, self.choose = public or name, implementations, choose
        self.available = tuple(implementations)
        reference = implementations["reference"]
        self.alone = reference if len(implementations) == 1 and choose is None else None

        def run(*args: Any) -> Any:
            return _apart(_dense(self.run(*args)), args)

        definition = torch.library.custom_op(f"jointnas::{name}", run, mutates_args=(), schema=schema)
        definition.register_fake(lambda *args: _apart(_dense(reference(*args[:-1])), args))
        self.definition, self.registered = definition, getattr(torch.ops.jointnas, name).default

    def run(self, *args: Any) -> Any:
        """The outputs by the backend that the last argument asks for, or that fits; below autograd."""
        if self.alone:  # nothing to choose, and no kernel whose layout to follow
            return self.alone(*args[:-1])
        how = self.choose(*args) if self.choose else resolve(self.name, args[-1], args[0], self.available)
        output = self.implementations[how](*args[:-1])
        return _dense(output) if how == "reference" else output

    def __call__(self, *args: Any) -> Any:
        """The outputs for positional arguments, a tensor first, the backend last."""
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return self.registered(*args)
        if type(args[0]) is not Tensor and type(args[0]) is not torch.nn.Parameter:
            return self.registered(*args)
        if self.function is not None and torch.is_grad_enabled():
            return self.function.apply(*args)
        return self.run(*args)


class Op(Registered):
    """An operator with gradients (module docstring).

    Args:
        name: registered as ``jointnas::NAME`` and ``jointnas::NAME_backward``.
        forward, backward: implementations by backend, best first; without a backward only ``identity`` has gradients.
        results: how many outputs are results; further ones are saved for the backward pass.
        frozen: tensors that never get a gradient.
        identity: tensors whose gradient is that of the first result itself.
        read_for: tensor, or saved output ("saved0", "saved1", ..), -> the tensors whose gradients read it. It is kept
            for the backward pass, and not None there, only if one of them is wanted.
        choose: (the arguments) -> backend, where more than the first tensor decides. The backward pass calls it with
            the same tensors, of which those dropped are None, and values.
        public: the name in messages, where the user called something else.
    """

    backward: Registered | None = None

    def __init__(
        self, name: str, forward: Implementations, backward: Implementations | None = None, *, results: int = 1,
        frozen: Collection[str] = (), identity: Collection[str] = (),
        read_for: Mapping[str, Sequence[str]] | None = None, choose: Callable[..., str] | None = None,
        public: str | None = None,
    ) -> None:  # fmt: skip
        reference: Any = forward["reference"]
        hints = get_type_hints(getattr(reference, "func", reference))
        outputs = len(get_args(hints.pop("return"))) or 1
        names = list(hints)[len(getattr(reference, "args", ())) :]  # those that a partial leaves open
        kinds = [f"{_KINDS[hints[n]]} {n}" for n in names]
        count = sum(kind.startswith("Tensor") for kind in kinds)
        if not all(kind.startswith("Tensor") for kind in kinds[:count]):
            raise TypeError(f"{name}: tensors come first, then plain values; got {kinds}")
        super().__init__(name, _schema([*kinds, "str? backend"], outputs), forward, choose, public)
        if backward is None and not identity:
            return
        kept = [*names[:count], *(f"saved{i}" for i in range(outputs - results))]
        reads: Mapping[str, Sequence[str]] = read_for or {}
        trained: list[int] = []
        if backward is None:
            reads = dict.fromkeys(kept, ())
        else:
            trained = [i for i in range(count) if names[i] not in frozen and names[i] not in identity]
            given = [*(f"Tensor grad{i}" for i in range(results)), *(f"Tensor? {n}" for n in kept)]
            schema = _schema([*given, *kinds[count:], "bool[] need", "str? backend"], len(trained))

            def choose_backward(*args: Any) -> str:
                assert choose is not None
                return choose(*args[results : results + count], *args[len(given) : -2], args[-1])

            self.backward = Registered(
                f"{name}_backward", schema, backward, None if choose is None else choose_backward, public or name
            )
        readers = [(kept.index(k), [names.index(n) for n in of]) for k, of in reads.items()]
        self._differentiate(count, results, outputs > results, trained, [names.index(n) for n in identity], readers)

    def _differentiate(
        self, count: int, results: int, saves: bool, trained: list[int], identity: list[int],
        readers: list[tuple[int, list[int]]],
    ) -> None:  # fmt: skip
        # the steps below take 1 us of a call together, and would take 3 in fewer words
        backward: Any = self.backward
        single, everything = len(trained) == 1, trained == list(range(count))

        def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            kept = inputs[:count]
            if saves:
                kept += output[results:]
                ctx.mark_non_differentiable(*[t for t in output[results:] if t is not None])
            if readers:
                need, kept = ctx.needs_input_grad, list(kept)
                for i, of in readers:
                    for j in of:
                        if need[j]:
                            break
                    else:
                        kept[i] = None
            ctx.save_for_backward(*kept)
            ctx.values, ctx.backend = inputs[count:-1], inputs[-1]
            ctx.set_materialize_grads(False)  # it would fill gradients of saved outputs, too
            if results > 1:
                ctx.like = [None if t is None else (t.shape, t.dtype, t.device) for t in output[:results]]

        def back(ctx: Any, *grads: Any) -> Any:
            needs, of_results = ctx.needs_input_grad, grads[:results]
            if grads[0] is None and all([g is None for g in of_results]):
                return (None,) * len(needs)
            if results > 1:  # one that was not used has no gradient
                of_results = tuple([
                    g if g is not None or like is None else torch.zeros(like[0], dtype=like[1], device=like[2])
                    for g, like in zip(of_results, ctx.like, strict=True)
                ])
            need = needs[:count] if everything else [needs[i] for i in trained]
            if everything:
                found = backward(*of_results, *ctx.saved_tensors, *ctx.values, need, ctx.backend)
                gradients = zip((found,) if single else found, needs, strict=False)
                return *[g if wanted else None for g, wanted in gradients], *(None,) * (len(needs) - count)
            all_of: list[Tensor | None] = [None] * len(needs)
            if any(need):
                found = backward(*of_results, *ctx.saved_tensors, *ctx.values, need, ctx.backend)
                for i, gradient in zip(trained, (found,) if single else found, strict=True):
                    all_of[i] = gradient if needs[i] else None
            for i in identity:
                all_of[i] = grads[0]
            return tuple(all_of)

        def forward(ctx: Any, *args: Any) -> Any:  # a separate setup_context costs a signature binding per call, 30 us
            output = self.run(*args)
            setup(ctx, args, output)
            return output

        self.definition.register_autograd(back, setup_context=setup)
        members = {"forward": staticmethod(forward), "backward": staticmethod(back)}
        self.function = type("Direct", (torch.autograd.Function,), members)
